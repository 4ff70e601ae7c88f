"""``SoftmaxAttention``: the baseline, whose memory is a cache of keys and values."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from fwt_jax.layers.cache import KeyValueCache, appended, empty_cache, finished, places, visible_slots
from fwt_jax.layers.common import (
    KERNEL_INIT,
    check_sizes,
    checked_input,
    linear_layers,
    projections,
    softmax_read,
)


class SoftmaxAttention(nnx.Module):
    """Causal multi-head softmax attention, the baseline (Vaswani et al. 2017; Schlag et al. 2021, eq. 4-7).

        o_t = Σ_{i≤t} softmax_i(k_iᵀq_t / √D) v_i        for each head;   y_t = W_o [o_t of all heads]

    Scores and softmax are float32 (float64 for float64). A token costs 2S(D+V) FLOPs per head beside the projections,
    and the memory is S·(D+V) numbers per head.

    Args:
      in_features, num_heads, head_size, value_size, use_bias, precision, dtype, param_dtype, kernel_init, rngs: as in
        ``FastWeightAttention``, as are the attributes query, key, value and out.

    Raises:
      ValueError: sizes that are not integers of at least 1, more heads than features (probably the order of
        ``nnx.MultiHeadAttention``), rngs that are no ``nnx.Rngs``.

    Example:
      >>> import jax
      >>> from flax import nnx
      >>> from fwt_jax import SoftmaxAttention
      >>> layer = SoftmaxAttention(16, 2, 8, rngs=nnx.Rngs(0))
      >>> prompt = jax.random.normal(jax.random.key(0), (1, 5, 16))
      >>> y, cache = layer(prompt, layer.init_memory(batch_size=1, max_length=100))
      >>> y.shape, cache.key.shape, int(cache.length[0])
      ((1, 5, 16), (1, 100, 2, 8), 5)
    """

    def __init__(
        self,
        in_features: int,
        num_heads: int,
        head_size: int,
        *,
        value_size: int | None = None,
        use_bias: bool = False,
        precision: lax.PrecisionLike = None,
        dtype: jax.typing.DTypeLike | None = None,
        param_dtype: jax.typing.DTypeLike = jnp.float32,
        kernel_init: nnx.Initializer = KERNEL_INIT,
        rngs: nnx.Rngs,
    ):
        value_size = head_size if value_size is None else value_size
        check_sizes(in_features, num_heads, head_size, value_size)
        self.in_features = in_features
        self.precision = precision
        self.key_shape = (num_heads, head_size)
        self.value_shape = (num_heads, value_size)
        self.memory_dtype = jnp.dtype(param_dtype if dtype is None else dtype)
        linear = linear_layers(
            use_bias=use_bias, dtype=dtype, param_dtype=param_dtype, kernel_init=kernel_init, rngs=rngs
        )
        self.query, self.key, self.value, self.out = projections(linear, in_features, num_heads, head_size, value_size)

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

        Args:
          x: ``[B, T, in_features]``, floating point, T ≥ 1.
          memory: a cache with room for T tokens, of ``init_memory`` or of an earlier call. If not given, the call reads
            the tokens of x alone and returns a full cache. To add tokens later, start with ``init_memory``.
          segment_ids: integers ``[B, T]``: a token sees no further back than the last change of the id. The first
            token of a call always continues ``memory``.
          lengths: integers ``[B]`` from 0 to T, for padding behind: row b has ``lengths[b]`` tokens, and the next call
            overwrites the others. The reads of the padding are 0. T for all rows if not given.
          rngs: not used, because nothing in this layer is random.

        Returns:
          y, as x, and the cache with the T tokens in it.

        Raises:
          ValueError: x, memory, segment_ids or lengths of the wrong shape or dtype, or a cache without room for T
            tokens. A traced length (``jax.jit``) cannot raise: then y is NaN for the rows whose cache is full.
        """
        x, ids = checked_input(x, self.in_features, segment_ids)
        place = places(x, memory, self.key_shape, self.value_shape, ids, lengths)
        after = appended(memory, self.key(x), self.value(x), place)
        y = softmax_read(self.query(x), after.key, after.value, visible_slots(after, place), self.precision)
        y, after = finished(y, after, place)
        return self.out(y), after

    def init_memory(self, batch_size: int, max_length: int | None) -> KeyValueCache:
        """An empty cache with room for ``max_length`` tokens."""
        return empty_cache(batch_size, max_length, self.key_shape, self.value_shape, self.memory_dtype)
