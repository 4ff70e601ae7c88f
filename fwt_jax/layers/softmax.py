"""``SoftmaxAttention``: the baseline, whose memory is a cache of keys and values."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.core import Tracer

from fwt_jax import arguments
from fwt_jax.attention_arguments import resets, tokens_within
from fwt_jax.layers.common import (
    KERNEL_INIT,
    check_kind,
    check_shapes,
    check_sizes,
    checked_input,
    linear_layers,
    projections,
    softmax_read,
)


class KeyValueCache(NamedTuple):
    """The memory of softmax attention: all keys and values, up to a capacity S.

    Attributes:
      key, value: ``[B, S, H, D]`` and ``[B, S, H, V]``, in the dtype of the computation.
      start: the slot in which each token's segment began, int32 ``[B, S]``. The token sees no slot before it.
      length: the number of tokens written, int32 ``[B]``. To take tokens back, set it back: the next call overwrites
        them.
    """

    key: jax.Array
    value: jax.Array
    start: jax.Array
    length: jax.Array


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
        batch, num_tokens, _ = x.shape
        reset, written = resets(ids, batch, num_tokens), tokens_within(lengths, batch, num_tokens)
        query, key, value = self.query(x), self.key(x), self.value(x)
        if memory is None:
            length = jnp.zeros(batch, jnp.int32)
            last_start = length
        else:
            self._check_cache(memory, batch, num_tokens)
            length = memory.length.astype(jnp.int32)
            last_start = _last_start(memory.start, length)

        slot = length[:, None] + jnp.arange(num_tokens, dtype=jnp.int32)[None]
        start = jnp.broadcast_to(last_start[:, None], slot.shape)
        if reset is not None:
            start = lax.cummax(jnp.where(reset, slot, start), axis=1)
        after = KeyValueCache(key, value, start, length + num_tokens)
        if memory is not None:
            after = _appended(memory, after, length)
        slots = jnp.arange(after.key.shape[1], dtype=jnp.int32)[None, None]
        visible = (start[..., None] <= slots) & (slots <= slot[..., None])
        y = softmax_read(query, after.key, after.value, visible, self.precision)
        y = jnp.where((after.length <= after.key.shape[1])[:, None, None, None], y, jnp.nan)
        if written is not None:
            y = jnp.where(written[..., None, None], y, 0)
            after = after._replace(length=length + jnp.sum(written, axis=1, dtype=jnp.int32))
        return self.out(y), after

    def init_memory(self, batch_size: int, max_length: int | None) -> KeyValueCache:
        """An empty cache with room for ``max_length`` tokens."""
        arguments.sizes(batch_size=batch_size, max_length=max_length)
        slots = (batch_size, max_length)
        return KeyValueCache(
            key=jnp.zeros((*slots, *self.key_shape), self.memory_dtype),
            value=jnp.zeros((*slots, *self.value_shape), self.memory_dtype),
            start=jnp.zeros(slots, jnp.int32),
            length=jnp.zeros(batch_size, jnp.int32),
        )

    def _check_cache(self, memory, batch, num_tokens):
        way_out = f"layer.init_memory({batch}, max_length) makes an empty one"
        check_kind(memory, KeyValueCache, way_out)
        capacity = (*np.shape(memory.key), 0, 0)[1]
        slots = (batch, capacity)
        check_shapes(memory, ((*slots, *self.key_shape), (*slots, *self.value_shape), slots, (batch,)), way_out)
        used = 0 if isinstance(memory.length, Tracer) else np.asarray(memory.length).max()
        if used + num_tokens > capacity:
            raise ValueError(
                f"the cache holds {used} of at most {capacity} tokens and has no room for {num_tokens} more; "
                "start with layer.init_memory(batch_size, max_length) and a larger max_length"
            )


def _last_start(start, length):
    """The start of the segment of the newest token, int32 ``[B]``; 0 if there is no token."""
    newest = jnp.take_along_axis(start, jnp.maximum(length - 1, 0)[:, None], axis=1)[:, 0]
    return jnp.where(length == 0, 0, newest)


def _appended(memory, new, length):
    """The cache with the tokens of ``new`` from slot ``length`` ``[B]`` on."""
    append = jax.vmap(functools.partial(lax.dynamic_update_slice_in_dim, axis=0))
    return KeyValueCache(
        key=append(memory.key, new.key.astype(memory.key.dtype), length),
        value=append(memory.value, new.value.astype(memory.value.dtype), length),
        start=append(memory.start, new.start, length),
        length=new.length,
    )
