"""Unit lower triangular systems by products alone: what a chunk of the delta rule must solve.

A triangular solve is sequential on TPU and slow on CPU, and powers of the matrix lose all digits of a whole chunk when
keys are correlated. No power of it appears here.
"""

import jax
import jax.numpy as jnp
import numpy as np

HIGHEST = jax.lax.Precision.HIGHEST


@jax.custom_jvp
def unit_lower_solve(lower: jax.Array, right: jax.Array) -> jax.Array:
    """(I + L)⁻¹ R for the strictly lower triangular part L of a matrix.

    Substitution, a block of rows at a time (S = 16, or an eighth of all). A diagonal block is inverted by doubling,
    from the inverses of two neighbouring blocks of half its size:

        [[X, 0], [C, Y]]⁻¹ = [[X⁻¹, 0], [−Y⁻¹ C X⁻¹, Y⁻¹]].

    T²V + STV FLOPs, and 4S²T(log₂ S − 1) for the inverses: 3072T for S = 16, O(T³) from T = 128 on.

    Args:
      lower: ``[T, T]``, float32 or float64; what lies on or above the diagonal is taken as zero.
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
    change = tangents[1] - jnp.matmul(jnp.tril(tangents[0], -1), solution, precision=HIGHEST)
    return solution, _substitute(lower, inverses, change)


def _substitute(lower, inverses, right):
    size, rows = len(inverses[0]), []
    for i, inverse in enumerate(inverses):
        here = slice(i * size, (i + 1) * size)
        block = right[here]
        if rows:
            found = rows[0] if i == 1 else jnp.concatenate(rows)
            block -= jnp.matmul(lower[here, : i * size], found, precision=HIGHEST)
        rows.append(jnp.matmul(inverse, block, precision=HIGHEST))
    return rows[0] if len(rows) == 1 else jnp.concatenate(rows)


def _invert_blocks(lower):
    """The inverses of the diagonal blocks of I + L."""
    length = len(lower)
    size = min(length, max(16, -(-length // 8)))
    # One by one: stacked, and under vmap, they have three batch axes, which XLA's simplifier fails on (jaxlib 0.10).
    return [_invert(lower[i : i + size, i : i + size]) for i in range(0, length, size)]


def _invert(lower):
    size, half = len(lower), 1
    inverse = jnp.eye(size, dtype=lower.dtype)
    while half < size:
        # The inverses of twice the size: all lower left corners, one for each pair of blocks, are one masked matrix.
        block = np.arange(size) // half
        corners = jnp.where((block[:, None] % 2 == 1) & (block[:, None] - 1 == block[None]), lower, 0)
        if half > 1:
            corners = jnp.matmul(jnp.matmul(inverse, corners, precision=HIGHEST), inverse, precision=HIGHEST)
        inverse, half = inverse - corners, 2 * half
    return inverse
