"""Attention that is not causal: among the tokens of an encoder, and from a decoder to its source.

    y = layer(x, source, mask)                 # in one call
    memory = layer.write(source, mask)         # or once for a source,
    y = layer.read(x, memory)                  # and then for each new x

Letters: B batch, T tokens of x, S tokens of the source, H heads, D head size, K key features, V value size.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from fwt_jax import cross_attention, feature_maps
from fwt_jax.layers.common import (
    KERNEL_INIT,
    FeatureMap,
    check_kind,
    check_shapes,
    check_sizes,
    count_features,
    draw_once,
    features,
    linear_layers,
    projections,
    softmax_read,
)
from fwt_jax.memory import Memory
from fwt_jax.rules import Rule, find_rule, name_of


class Source(NamedTuple):
    """The memory that softmax attention has of a source.

    Attributes:
      key, value: ``[B, S, H, D]`` and ``[B, S, H, V]``.
      mask: bool ``[B, S]``, False for padding.
    """

    key: jax.Array
    value: jax.Array
    mask: jax.Array


class CrossAttention(nnx.Module):
    """Multi-head attention from x to all tokens of a source, by softmax or by a fast weight memory with the sum rule.

        softmax    o_t = Σ_i softmax_i(k_iᵀq_t / √D) v_i                          Vaswani et al. 2017; eq. 6-7
        sum        W = Σ_i k_i v_iᵀ,   z = Σ_i k_i,   o_t = Wᵀq_t / (zᵀq_t + eps)      eq. 17-19

    with k = N(φ(W_k s)), q = N(φ(W_q x)), v = W_v s and y_t = W_o [o_t of all heads]. A token of x costs 2S(D+V) FLOPs
    per head with softmax, and 2KV with the sum rule. The memory of the sum rule is K·V numbers per head for any S.

    Args:
      in_features, num_heads, head_size, feature_map, feature_normalization, eps, use_bias, precision, dtype,
      param_dtype, kernel_init, rngs: as in ``FastWeightAttention``; the values are of head_size.
      rule: "softmax" (without features), "sum", or a ``Rule`` whose write is k vᵀ (``corrects`` is False).
      normalize: False or "read", with rule "sum".

    Raises:
      ValueError: a rule that depends on the order of the source, such as "delta"; another normalisation; sizes, rngs or
        a feature map as in ``FastWeightAttention``. When called: x or a source that is not floating point and of three
        axes, a mask that is not bool ``[B, S]``, x and a source or memory of different B, a memory of another layer.

    Example:
      >>> import jax
      >>> from flax import nnx
      >>> from fwt_jax.layers import CrossAttention
      >>> layer = CrossAttention(16, 2, 8, rule="sum", rngs=nnx.Rngs(0))
      >>> x, source = (jax.random.normal(jax.random.key(i), (1, length, 16)) for i, length in ((0, 3), (1, 7)))
      >>> layer(x, source).shape
      (1, 3, 16)
    """

    def __init__(
        self,
        in_features: int,
        num_heads: int,
        head_size: int,
        *,
        rule: str | Rule = "softmax",
        feature_map: FeatureMap = feature_maps.elu_plus_one,
        feature_normalization: FeatureMap | None = None,
        normalize: Literal[False, "read"] = "read",
        eps: float = 1e-6,
        use_bias: bool = False,
        precision: lax.PrecisionLike = None,
        dtype: jax.typing.DTypeLike | None = None,
        param_dtype: jax.typing.DTypeLike = jnp.float32,
        kernel_init: nnx.Initializer = KERNEL_INIT,
        rngs: nnx.Rngs,
    ):
        check_sizes(in_features, num_heads, head_size, head_size)
        row = find_rule(rule, others=("softmax",))
        self.rule_name = '"softmax"' if row is None else name_of(row)
        if row is not None and row.corrects is not False:
            raise ValueError(
                f'rule must be "softmax" or "sum" where attention is not causal, got {self.rule_name}, '
                "which depends on the order of the source"
            )
        if normalize not in (False, "read"):
            raise ValueError(f'normalize must be False or "read" where nothing is retrieved by key, got {normalize!r}')
        self.normalize: Literal[False, "read"] = normalize
        self.eps = eps
        self.precision = precision
        self.feature_map = feature_map
        self.feature_normalization = feature_normalization or feature_maps.identity
        linear = linear_layers(
            use_bias=use_bias, dtype=dtype, param_dtype=param_dtype, kernel_init=kernel_init, rngs=rngs
        )
        self.query, self.key, self.value, self.out = projections(linear, in_features, num_heads, head_size, head_size)
        self.is_softmax = row is None
        self.num_features = None
        if not self.is_softmax:
            self.num_features = count_features(feature_map, self.feature_normalization, num_heads, head_size)

    def __call__(
        self, x: jax.Array, source: jax.Array, mask: jax.Array | None = None, *, rngs: nnx.Rngs | None = None
    ) -> jax.Array:
        """Reads a source that is written for this call.

        Args:
          x: ``[B, T, in_features]``; source ``[B, S, in_features]``.
          mask: bool ``[B, S]``, False for padding. If not given, no token is padding.
          rngs: draws a new projection for a random feature map, see ``FastWeightAttention``.

        Returns:
          y, as x.
        """
        source, mask = self._checked("source", source, mask)
        x, _ = self._checked("x", x, batch=len(source))
        feature_map = draw_once(self.feature_map, rngs)
        if self.is_softmax:
            return self._read(x, self._write(source, mask, feature_map), feature_map)
        # One function that sees all arguments can take the cheaper of two orders: all scores, or the memory.
        y, _ = cross_attention.fast_weight_cross_attention(
            self._features(self.query(x), feature_map),
            self._features(self.key(source), feature_map),
            self.value(source),
            key_mask=mask,
            normalize=self.normalize,
            eps=self.eps,
            precision=self.precision,
        )
        return self.out(y.astype(x.dtype))

    def write(self, source: jax.Array, mask: jax.Array | None = None) -> Memory | Source:
        """The memory of a source: fast weights ``[B, H, K, V]`` and key sums, or keys and values for softmax."""
        source, mask = self._checked("source", source, mask)
        return self._write(source, mask, self.feature_map)

    def read(self, x: jax.Array, memory: Memory | Source) -> jax.Array:
        """y, as x ``[B, T, in_features]``, from the memory of ``write``."""
        way_out = f"layer.write(source), of a layer of rule {self.rule_name}, makes one"
        check_kind(memory, Source if self.is_softmax else Memory, way_out)
        heads, size = self.query.out_features
        batch, length = (*np.shape(memory[0]), 0, 0)[:2]
        keys = (batch, length, heads, size)
        weights = (batch, heads, self.num_features, size)
        shapes = (keys, keys, (batch, length)) if self.is_softmax else (weights, weights[:-1])
        check_shapes(memory, shapes, way_out)
        x, _ = self._checked("x", x, batch=batch)
        return self._read(x, memory, self.feature_map)

    def _checked(self, name, x, mask=None, batch=None):
        """x and its mask as arrays."""
        x = jnp.asarray(x)
        mask = None if mask is None else jnp.asarray(mask)
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
                f"mask must be bool {list(x.shape[:2])}, False for padding, got {mask.dtype}{list(mask.shape)}; "
                "of a mask that is added to scores, take mask == 0"
            )
        return x, mask

    def _write(self, source, mask, feature_map):
        key, value = self.key(source), self.value(source)
        if self.is_softmax:
            return Source(key, value, jnp.ones(source.shape[:2], bool) if mask is None else mask)
        key = self._features(key, feature_map)
        # The function wants a query. Its read is not used, so the compiler drops it.
        _, memory = cross_attention.fast_weight_cross_attention(
            key[:, :1], key, value, key_mask=mask, precision=self.precision
        )
        return memory

    def _read(self, x, memory, feature_map):
        query = self.query(x)
        if self.is_softmax:
            key, value, mask = memory
            return self.out(softmax_read(query, key, value, mask[:, None], self.precision))
        query = self._features(query, feature_map)
        y = cross_attention.read(query, memory, normalize=self.normalize, eps=self.eps, precision=self.precision)
        return self.out(y.astype(x.dtype))

    def _features(self, x, feature_map):
        return features(x, feature_map, self.feature_normalization)
