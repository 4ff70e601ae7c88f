"""Attention that is not causal: of encoders, where the source is x itself, and from a decoder to its source.

    y = layer(x, source, mask)                 # at once
    memory = layer.write(source, mask)         # or once for a source, and then for each new x
    y = layer.read(x, memory)

Letters: B batch, T tokens that read, S tokens of the source, H heads, D head size, K key features, V value size.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from fwt_jax import attention, feature_maps
from fwt_jax.layers import (
    DEFAULT_INIT,
    FeatureMap,
    _at_least_float32,
    _check_kind,
    _check_shapes,
    _count_features,
    _features,
    _projections,
)
from fwt_jax.memory import Memory


class Source(NamedTuple):
    """What softmax attention remembers of a source: keys ``[B, S, H, D]``, values ``[B, S, H, V]``, and which of them
    are not padding, bool ``[B, S]``."""

    key: jax.Array
    value: jax.Array
    mask: jax.Array


class CrossAttention(nnx.Module):
    """Multi-head attention from x to all tokens of a source, by softmax or by a fast weight memory with the sum rule.

        softmax    o_t = Σ_i softmax_i(k_iᵀq_t / √D) v_i                          Vaswani et al. 2017; eq. 6-7
        sum        W = Σ_i k_i v_iᵀ,   z = Σ_i k_i,   o_t = Wᵀq_t / (zᵀq_t + eps)      eq. 17-19

    with k = N(φ(W_k s)), q = N(φ(W_q x)), v = W_v s and y_t = W_o [o_t of all heads]. A token that reads costs 2S(D+V)
    FLOPs per head with softmax, and 2KV with the sum rule, whose memory is K·V numbers however long the source is.

    Args:
      in_features, num_heads, head_size, feature_map, feature_normalization, eps, use_bias, precision, dtype,
      param_dtype, kernel_init, rngs: as in ``FastWeightAttention``; the values are of head_size.
      rule: "softmax" (without features) or "sum".
      normalize: False, or "read", for "sum".

    Raises:
      ValueError: another rule: the order of the source does not matter here, which the delta rule depends on; another
        normalisation; sizes or a feature map as in ``FastWeightAttention``. When called: x or a source that is not
        floating point and of three axes, a mask that is not bool ``[B, S]``, x and a source or memory of different B, a
        memory that is not of this layer.

    Example:
      >>> layer = CrossAttention(512, 8, 64, rule="sum", rngs=nnx.Rngs(0))
      >>> y = layer(x, source, mask)
    """

    def __init__(
        self,
        in_features: int,
        num_heads: int,
        head_size: int,
        *,
        rule: Literal["softmax", "sum"] = "softmax",
        feature_map: FeatureMap = feature_maps.elu_plus_one,
        feature_normalization: FeatureMap | None = None,
        normalize: Literal[False, "read"] = "read",
        eps: float = 1e-6,
        use_bias: bool = False,
        precision: lax.PrecisionLike = None,
        dtype: jax.typing.DTypeLike | None = None,
        param_dtype: jax.typing.DTypeLike = jnp.float32,
        kernel_init: nnx.Initializer = DEFAULT_INIT,
        rngs: nnx.Rngs,
    ):
        if rule not in ("softmax", "sum"):
            raise ValueError(f'rule must be "softmax" or "sum" where attention is not causal, got {rule!r}')
        self.rule, self.normalize, self.eps, self.precision = rule, normalize, eps, precision
        self.feature_map = feature_map
        self.feature_normalization = feature_normalization or feature_maps.identity
        if normalize not in (False, "read"):
            raise ValueError(f'normalize must be False or "read" where nothing is retrieved by key, got {normalize!r}')
        options = dict(use_bias=use_bias, dtype=dtype, param_dtype=param_dtype, kernel_init=kernel_init, rngs=rngs)
        self.query, self.key, self.value, self.out = _projections(
            in_features, num_heads, head_size, head_size, **options
        )
        self.num_features = None
        if rule == "sum":
            self.num_features = _count_features(feature_map, self.feature_normalization, num_heads, head_size)

    def __call__(
        self, x: jax.Array, source: jax.Array, mask: jax.Array | None = None, *, rngs: nnx.Rngs | None = None
    ) -> jax.Array:
        """Reads a source that is written for this call.

        Args:
          x: ``[B, T, in_features]``; source ``[B, S, in_features]``.
          mask: bool ``[B, S]``, False for padding; none if not given.
          rngs: draws a random feature map for this call, see ``FastWeightAttention``.

        Returns:
          y, as x.
        """
        feature_map = self.feature_map
        source, mask = self._checked("source", source, mask)
        x, _ = self._checked("x", x, batch=len(source))
        if rngs is not None and hasattr(feature_map, "draw"):
            feature_map = feature_map.draw(rngs)  # once: keys and queries must share it
        if self.rule == "softmax":
            return self._read(x, self._write(source, mask, feature_map), feature_map)
        query, key = (self._features(y, feature_map) for y in (self.query(x), self.key(source)))
        options = {"key_mask": mask, "normalize": self.normalize, "eps": self.eps, "precision": self.precision}
        out, _ = attention.fast_weight_cross_attention(query, key, self.value(source), **options)
        return self.out(out.astype(x.dtype))

    def write(self, source: jax.Array, mask: jax.Array | None = None) -> Memory | Source:
        """The memory of a source: fast weights ``[B, H, K, V]`` and key sums, or keys and values for softmax."""
        source, mask = self._checked("source", source, mask)
        return self._write(source, mask, self.feature_map)

    def read(self, x: jax.Array, memory: Memory | Source) -> jax.Array:
        """y, as x ``[B, T, in_features]``, from what ``write`` returned."""
        way_out = f'layer.write(source), of a layer of rule "{self.rule}", makes one'
        _check_kind(memory, Source if self.rule == "softmax" else Memory, way_out)
        heads, size = self.query.out_features
        batch, slots = (*np.shape(memory[0]), 0, 0)[:2]
        key, slots = (batch, slots, heads, size), (batch, slots)
        weights = (batch, heads, self.num_features, size)
        shapes = (key, key, slots) if self.rule == "softmax" else (weights, weights[:-1])
        _check_shapes(memory, shapes, way_out)
        x, _ = self._checked("x", x, batch=batch)
        return self._read(x, memory, self.feature_map)

    def _checked(self, name, x, mask=None, batch=None):
        """x and its mask as arrays."""
        x, mask = jnp.asarray(x), None if mask is None else jnp.asarray(mask)
        size = self.query.in_features[0]
        if x.ndim != 3 or x.shape[-1] != size or 0 in x.shape or not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(
                f"{name} must be floating point and [B, tokens, {size}] with at least one token, "
                f"got {x.dtype}{list(x.shape)}; for one token or one sequence add an axis of length 1"
            )
        if batch not in (None, len(x)):
            raise ValueError(f"x must have the {batch} rows of its source, got {len(x)}; repeat the source or x")
        if mask is not None and (mask.shape != x.shape[:2] or mask.dtype != jnp.bool_):
            raise ValueError(
                f"mask must be bool {list(x.shape[:2])}, True where the source is no padding, "
                f"got {mask.dtype}{list(mask.shape)}; a mask that is added to scores is mask == 0 here"
            )
        return x, mask

    def _write(self, source, mask, feature_map):
        key, value = self.key(source), self.value(source)
        if self.rule == "softmax":
            return Source(key, value, jnp.ones(source.shape[:2], bool) if mask is None else mask)
        key = self._features(key, feature_map)
        options = {"key_mask": mask, "precision": self.precision}
        return attention.fast_weight_cross_attention(key[:, :1], key, value, **options)[1]  # nothing is read

    def _read(self, x, memory, feature_map):
        query = self.query(x)
        if self.rule == "softmax":
            return self.out(_softmax_read(query, memory, self.precision))
        query = self._features(query, feature_map)
        options = {"normalize": self.normalize, "eps": self.eps, "precision": self.precision}
        return self.out(attention.read(query, memory, **options).astype(x.dtype))

    def _features(self, x, feature_map):
        return _features(x, feature_map, self.feature_normalization)


def _softmax_read(query, source, precision):
    key, value, mask = source
    precision = attention.products_precision(precision, query, key, value)
    scores = jnp.einsum("bthd,bshd->bhts", _at_least_float32(query), _at_least_float32(key), precision=precision)
    scores = jnp.where(mask[:, None, None], scores * query.shape[-1] ** -0.5, jnp.finfo(scores.dtype).min)
    weights = jax.nn.softmax(scores, axis=-1)
    out = jnp.einsum("bhts,bshv->bthv", weights, _at_least_float32(value), precision=precision)
    return out.astype(value.dtype)
