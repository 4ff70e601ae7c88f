"""The inverse of a triangular matrix by products: what a chunk of the delta rule must solve."""

import jax
import jax.numpy as jnp
import numpy as np

HIGHEST = jax.lax.Precision.HIGHEST


def unit_lower_inverse(lower: jax.Array) -> jax.Array:
    """(I + L)⁻¹ for the strictly lower triangular part of a matrix, by products alone.

    From the inverses X, Y of two neighbouring diagonal blocks comes the inverse of both, of twice the size:

        [[X, 0], [C, Y]]⁻¹ = [[X⁻¹, 0], [−Y⁻¹ C X⁻¹, Y⁻¹]].

    Up to blocks of 16 all pairs C of a size are one masked matrix, in few and large products; from there on block by
    block. No power of L appears, so nothing is lost for correlated keys (powers of L lose all digits of a whole chunk).
    A triangular solve is sequential on TPU and slow on CPU.

    Args:
      lower: ``[T, T]``, float32 or float64; what lies on or above the diagonal is taken as zero.

    Returns:
      ``[T, T]``, unit lower triangular.
    """
    return jnp.ones_like(lower) if len(lower) == 1 else _unit_lower_inverse(lower)


@jax.custom_jvp
def _unit_lower_inverse(lower):
    length = lower.shape[-1]
    size = 1
    while size < min(length, 16):
        size *= 2
    padded = size
    while padded < length:
        padded *= 2
    matmul = lambda a, b: jnp.matmul(a, b, precision=HIGHEST)  # noqa: E731
    lower = jnp.pad(lower, (0, padded - length))

    def blocks(size, row, column):
        """The [row, column] block, of ``size``, of each diagonal pair of blocks."""
        pairs = padded // size // 2
        split = lower.reshape(pairs, 2, size, pairs, 2, size)
        return jnp.stack([split[i, row, :, i, column] for i in range(pairs)])

    def invert(diagonal):
        """One diagonal block, ``[size, size]``."""
        inverse, half = jnp.eye(size, dtype=lower.dtype), 1
        while half < size:
            block = np.arange(size) // half
            is_corner = (block[:, None] % 2 == 1) & (block[:, None] - 1 == block[None])
            corners = jnp.where(is_corner, diagonal, 0)
            inverse = inverse - (corners if half == 1 else matmul(matmul(inverse, corners), inverse))
            half *= 2
        return inverse

    diagonal = lower.reshape(padded // size, size, padded // size, size)
    inverse = jnp.stack([invert(diagonal[i, :, i]) for i in range(padded // size)])
    while size < padded:
        first, second = inverse[0::2], inverse[1::2]
        corner = -matmul(matmul(second, blocks(size, 1, 0)), first)
        top = jnp.concatenate([first, jnp.zeros_like(first)], axis=-1)
        inverse = jnp.concatenate([top, jnp.concatenate([corner, second], axis=-1)], axis=-2)
        size *= 2
    return inverse[0, :length, :length]


@_unit_lower_inverse.defjvp
def _unit_lower_inverse_jvp(primals, tangents):
    inverse = _unit_lower_inverse(*primals)
    tangent = jnp.matmul(inverse, jnp.tril(*tangents, -1), precision=HIGHEST)
    return inverse, -jnp.matmul(tangent, inverse, precision=HIGHEST)
