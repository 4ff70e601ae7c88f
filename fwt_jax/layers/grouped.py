"""``GroupedQueryAttention``: softmax attention as in public language models, and its rotary positions."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from fwt_jax import arguments
from fwt_jax.layers.cache import KeyValueCache, appended, empty_cache, finished, places, visible_slots
from fwt_jax.layers.common import (
    KERNEL_INIT,
    at_least_float32,
    check_sizes,
    checked_input,
    linear_layers,
    softmax_read,
)
from fwt_jax.layers.norms import RMSNorm


class GroupedQueryAttention(nnx.Module):
    """Causal softmax attention whose heads of keys and values each serve a group of query heads.

        q_t, k_t = R_t norm(W_q x_t), R_t norm(W_k x_t)        for each head; R_t: ``rotary``
        o_t = Σ_i softmax_i(k_iᵀq_t / √D) W_v x_i
        y_t = W_o [sigmoid(W_g x_t) ⊙ o_t of all heads]

    Query head h reads head ⌊hG/H⌋ of the G heads of keys and values. Norm, rotation and gate are optional. The sum is
    over i from t − w + 1 to t with ``window`` w, over i ≤ t without. Norm, rotation, scores, softmax and gate are
    float32 (float64 for float64). A token costs 4SD FLOPs per query head beside the projections. The memory is 2S·D
    numbers per head of keys.

    Args:
      in_features, num_heads, head_size: of x and y; H; D.
      num_key_value_heads: G, which divides H; H if not given.
      qk_norm: None; "head": each head of queries and keys is divided by its root mean square; "all": all heads of a
        token are divided by one root mean square.
      norm_eps, zero_centered: of these norms, see ``RMSNorm``.
      rotary_size: how many features of a head are rotated, see ``rotary``; 0 for none; D if not given.
      rotary_theta: the base of the frequencies of ``rotary``.
      window: w, how many tokens a token sees, itself included; all if not given.
      gate: whether sigmoid(W_g x) multiplies the reads (Qwen3-Next).
      use_bias: of the projections query, key, value and gate.
      out_bias: of the projection out.
      precision, dtype, param_dtype, kernel_init, rngs: as in ``FastWeightAttention``.

    Attributes:
      query, gate: projections with kernels ``[in_features, H, D]``; gate may be None.
      key, value: projections with kernels ``[in_features, G, D]``.
      query_norm, key_norm: ``RMSNorm`` of size D, or H·D and G·D for "all", or None.
      out: projection with kernel ``[H, D, in_features]``.

    Raises:
      ValueError: sizes that are not integers of at least 1, more heads than features (probably the order of
        ``nnx.MultiHeadAttention``), heads that G does not divide, a rotary_size for which D is too small, an
        unknown qk_norm, rngs that are no ``nnx.Rngs``.

    References:
      Ainslie et al. 2023 (groups); Su et al. 2021 (rotary positions); Beltagy et al. 2020 (windows); Qwen3-Next
      (gate, zero-centred norms per head); OLMo 2 (norms of all heads).

    Example:
      >>> import jax
      >>> from flax import nnx
      >>> from fwt_jax.layers import GroupedQueryAttention
      >>> layer = GroupedQueryAttention(16, 4, 8, num_key_value_heads=2, qk_norm="head", gate=True, rngs=nnx.Rngs(0))
      >>> prompt = jax.random.normal(jax.random.key(0), (1, 5, 16))
      >>> y, cache = layer(prompt, layer.init_memory(batch_size=1, max_length=100))
      >>> y.shape, cache.key.shape
      ((1, 5, 16), (1, 100, 2, 8))
    """

    def __init__(
        self,
        in_features: int,
        num_heads: int,
        head_size: int,
        *,
        num_key_value_heads: int | None = None,
        qk_norm: Literal[None, "head", "all"] = None,
        norm_eps: float = 1e-6,
        zero_centered: bool = False,
        rotary_size: int | None = None,
        rotary_theta: float = 1e4,
        window: int | None = None,
        gate: bool = False,
        use_bias: bool = False,
        out_bias: bool = False,
        precision: lax.PrecisionLike = None,
        dtype: jax.typing.DTypeLike | None = None,
        param_dtype: jax.typing.DTypeLike = jnp.float32,
        kernel_init: nnx.Initializer = KERNEL_INIT,
        rngs: nnx.Rngs,
    ):
        groups = num_heads if num_key_value_heads is None else num_key_value_heads
        check_sizes(in_features, num_heads, head_size, head_size)
        _check_groups(num_heads, groups)
        arguments.one_of((None, "head", "all"), qk_norm=qk_norm)
        self.in_features = in_features
        self.qk_norm = qk_norm
        self.rotary_size = head_size if rotary_size is None else rotary_size
        self.rotary_theta = rotary_theta
        self.window = window
        self.precision = precision
        self.key_shape = (groups, head_size)
        self.memory_dtype = jnp.dtype(param_dtype if dtype is None else dtype)
        _check_positions(self.rotary_size, rotary_theta, head_size, window)
        options = dict(dtype=dtype, param_dtype=param_dtype, kernel_init=kernel_init, rngs=rngs)
        linear = linear_layers(use_bias=use_bias, **options)
        self.query = linear(in_features, (num_heads, head_size))
        self.key = linear(in_features, (groups, head_size))
        self.value = linear(in_features, (groups, head_size))
        self.gate = linear(in_features, (num_heads, head_size)) if gate else None
        self.out = linear_layers(use_bias=out_bias, **options)((num_heads, head_size), in_features, axis=(-2, -1))

        def norm(heads):
            size = heads * head_size if qk_norm == "all" else head_size
            return RMSNorm(size, norm_eps, zero_centered=zero_centered, param_dtype=param_dtype, rngs=rngs)

        self.query_norm = None if qk_norm is None else norm(num_heads)
        self.key_norm = None if qk_norm is None else norm(groups)

    def __call__(
        self,
        x: jax.Array,
        memory: KeyValueCache | None = None,
        *,
        segment_ids: jax.Array | None = None,
        lengths: jax.Array | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> tuple[jax.Array, KeyValueCache]:
        """Appends T tokens to the cache and attends from each of them.

        The cache holds keys after norm and rotation. A token's position is its distance from the start of its segment.

        Args:
          x, memory, segment_ids, lengths, rngs: as in ``SoftmaxAttention``.

        Returns:
          y, as x, and the cache with the T tokens in it.

        Raises:
          ValueError: as ``SoftmaxAttention``.
        """
        x, ids = checked_input(x, self.in_features, segment_ids)
        place = places(x, memory, self.key_shape, self.key_shape, ids, lengths)
        position = place.slot - place.start
        query = rotary(self._normalized(self.query(x), self.query_norm), position, self.rotary_theta, self.rotary_size)
        key = rotary(self._normalized(self.key(x), self.key_norm), position, self.rotary_theta, self.rotary_size)
        after = appended(memory, key, self.value(x), place)
        visible = visible_slots(after, place, self.window)
        y, after = finished(softmax_read(query, after.key, after.value, visible, self.precision), after, place)
        if self.gate is not None:
            y = (at_least_float32(y) * jax.nn.sigmoid(at_least_float32(self.gate(x)))).astype(y.dtype)
        return self.out(y), after

    def init_memory(self, batch_size: int, max_length: int | None) -> KeyValueCache:
        """An empty cache with room for ``max_length`` tokens."""
        return empty_cache(batch_size, max_length, self.key_shape, self.key_shape, self.memory_dtype)

    def _normalized(self, heads, norm):
        """Queries or keys ``[B, T, heads, D]`` after their norm."""
        if norm is None:
            return heads
        x = heads.reshape(*heads.shape[:2], -1) if self.qk_norm == "all" else heads
        return norm(x).reshape(heads.shape)


def rotary(x: jax.Array, positions: jax.Array, theta: float, size: int) -> jax.Array:
    """R_t x: the first ``size`` features of each head, rotated by angles that grow with the position t.

        R_t x = [x₁ cos φ − x₂ sin φ, x₂ cos φ + x₁ sin φ],    φ_j = t θ^(−2j/size),    j < size/2

    x₁ and x₂ are the two halves of these features. The other features pass. R_tᵀR_u depends on u − t alone, and so do
    the scores of attention (Su et al. 2021). Angles are float32 (float64 for float64).

    Args:
      x: ``[B, T, H, D]``.
      positions: integers ``[B, T]``.
      theta: θ, the base of the frequencies.
      size: from 0 to D. With an odd one size + 1 features are rotated, with the frequencies of ``size``, as
        transformers does.
    """
    if size == 0:
        return x
    y = at_least_float32(x)
    # NumPy's float64: a rounded frequency would be a wrong angle at a far position.
    frequencies = jnp.asarray(theta ** (-np.arange(0, size, 2) / size), y.dtype)
    angles = positions.astype(y.dtype)[:, :, None, None] * frequencies[None, None, None]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    half = len(frequencies)
    first, second, rest = jnp.split(y, [half, 2 * half], axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1).astype(x.dtype)


def _check_groups(num_heads, num_key_value_heads):
    arguments.sizes(num_key_value_heads=num_key_value_heads)
    if num_heads % num_key_value_heads:
        raise ValueError(
            f"num_key_value_heads must divide num_heads, {num_heads}, got {num_key_value_heads}; "
            f"as many query heads read each of them"
        )


def _check_positions(rotary_size, rotary_theta, head_size, window):
    arguments.sizes(0, rotary_size=rotary_size)
    if rotary_size + rotary_size % 2 > head_size:
        raise ValueError(
            f"rotary_size must be from 0 to head_size, {head_size}, and below it if odd, got {rotary_size}; "
            "0 is for no positions"
        )
    if not rotary_theta > 0:
        raise ValueError(f"rotary_theta must be above 0, as 10000, got {rotary_theta}")
    if window is not None:
        arguments.sizes(window=window)
