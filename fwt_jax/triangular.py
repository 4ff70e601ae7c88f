"""Unit lower triangular systems, solved by matrix products: the delta rule has one in each chunk.

XLA's triangular solve is sequential on TPU and slow on CPU. Powers of the matrix lose all digits if keys are
correlated, so no power of it appears here.
"""

import jax
import jax.numpy as jnp
import numpy as np

HIGHEST = jax.lax.Precision.HIGHEST


@jax.custom_jvp
def unit_lower_solve(lower: jax.Array, right: jax.Array) -> jax.Array:
    """(I + L)⁻¹ R for the strictly lower triangular part L of a matrix.

    The substitution takes one block of S rows at a time. S is the larger of 16 and T/8. The inverse of a
    diagonal block is built from the inverses of its two halves:

        [[X, 0], [C, Y]]⁻¹ = [[X⁻¹, 0], [−Y⁻¹ C X⁻¹, Y⁻¹]].

    T²V + STV FLOPs, and 4S²T(log₂ S − 1) for the inverses: 3072T for S = 16, O(T³) from T = 128 on.

    Args:
      lower: ``[T, T]``, float32 or float64; entries on or above the diagonal count as zero.
      right: R, ``[T, V]``, of the same dtype.

    Returns:
      ``[T, V]``.
    """
    return _substitute(lower, _invert_blocks(lower), right)


def unit_lower_inverse(lower: jax.Array) -> jax.Array:
    """(I + L)⁻¹, ``[T, T]``, unit lower triangular: see ``unit_lower_solve``."""
    return unit_lower_solve(lower, jnp.eye(len(lower), dtype=lower.dtype))


@unit_lower_solve.defjvp
def _unit_lower_solve_jvp(primals, tangents):
    lower, right = primals
    inverses = _invert_blocks(lower)
    solution = _substitute(lower, inverses, right)
    lower_dot, right_dot = tangents
    right_dot -= jnp.matmul(jnp.tril(lower_dot, -1), solution, precision=HIGHEST)
    return solution, _substitute(lower, inverses, right_dot)


def _substitute(lower, inverses, right):
    """(I + L)⁻¹ R, with the inverses of the diagonal blocks."""
    size, solved = len(inverses[0]), []
    for i, inverse in enumerate(inverses):
        rows = slice(i * size, (i + 1) * size)
        block = right[rows]
        if solved:
            above = solved[0] if i == 1 else jnp.concatenate(solved)
            block -= jnp.matmul(lower[rows, : i * size], above, precision=HIGHEST)
        solved.append(jnp.matmul(inverse, block, precision=HIGHEST))
    return solved[0] if len(solved) == 1 else jnp.concatenate(solved)


def _invert_blocks(lower):
    """The inverses of the diagonal blocks of I + L."""
    length = len(lower)
    size = min(length, max(16, -(-length // 8)))
    # One block at a time: stacked blocks have three batch axes under vmap, and XLA's simplifier fails (jaxlib 0.10).
    return [_invert(lower[i : i + size, i : i + size]) for i in range(0, length, size)]


def _invert(lower):
    """(I + L)⁻¹ of one block, by doubling."""
    size, half = len(lower), 1
    inverse = jnp.eye(size, dtype=lower.dtype)
    while half < size:
        # From inverses of ``half`` rows to inverses of twice as many: one masked matrix holds the lower left corners of
        # all pairs of blocks.
        block = np.arange(size) // half
        corners = jnp.where((block[:, None] % 2 == 1) & (block[:, None] - 1 == block[None]), lower, 0)
        if half > 1:
            corners = jnp.matmul(jnp.matmul(inverse, corners, precision=HIGHEST), inverse, precision=HIGHEST)
        inverse, half = inverse - corners, 2 * half
    return inverse
