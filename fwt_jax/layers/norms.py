"""``RMSNorm``: root mean square normalisation, plain or zero-centred, with or without a gate."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from fwt_jax import arguments
from fwt_jax.layers.common import at_least_float32, check_rngs


class RMSNorm(nnx.Module):
    """x / √(mean(x²) + eps) · w over the last axis (Zhang & Sennrich 2019), computed in float32.

    ``nnx.RMSNorm`` has no zero-centred scale.

    Args:
      size: of the last axis of x.
      eps: at least 0.
      zero_centered: multiplies by 1 + w, with w = 0 at the start (Qwen3-Next).
      param_dtype, rngs: of w.

    Attributes:
      scale: w, ``[size]``.
    """

    def __init__(
        self,
        size: int,
        eps: float = 1e-6,
        *,
        zero_centered: bool = False,
        param_dtype: jax.typing.DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        check_rngs(rngs)
        arguments.sizes(size=size)
        arguments.at_least(0, eps=eps)
        self.eps = eps
        self.zero_centered = zero_centered
        self.scale = nnx.Param((jnp.zeros if zero_centered else jnp.ones)(size, param_dtype))

    def __call__(self, x: jax.Array) -> jax.Array:
        """x ``[..., size]``, normalised, in its dtype."""
        y = at_least_float32(x)
        y = y * lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        scale = jnp.expand_dims(at_least_float32(self.scale[...]), range(x.ndim - 1))
        return (y * (1 + scale if self.zero_centered else scale)).astype(x.dtype)
