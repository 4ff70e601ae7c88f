"""The cache of keys and values, which every softmax attention shares: its slots, and what a token sees of them.

A call appends its T tokens, one slot each. A token sees the slots from the start of its segment to its own.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer

from fwt_jax import arguments
from fwt_jax.attention_arguments import resets, tokens_within
from fwt_jax.layers.common import check_kind, check_shapes


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


class Places(NamedTuple):
    """Where the T tokens of a call go in the cache.

    Attributes:
      slot: of each token, int32 ``[B, T]``.
      start: the slot in which the token's segment began, int32 ``[B, T]``.
      length: the number of tokens in the cache before the call, int32 ``[B]``.
      written: False for padding behind, bool ``[B, T]``; None without lengths.
    """

    slot: jax.Array
    start: jax.Array
    length: jax.Array
    written: jax.Array | None


def empty_cache(batch_size, max_length, key_shape, value_shape, dtype) -> KeyValueCache:
    """A cache with room for ``max_length`` tokens, with keys ``[B, S, *key_shape]``."""
    arguments.sizes(batch_size=batch_size, max_length=max_length)
    slots = (batch_size, max_length)
    return KeyValueCache(
        key=jnp.zeros((*slots, *key_shape), dtype),
        value=jnp.zeros((*slots, *value_shape), dtype),
        start=jnp.zeros(slots, jnp.int32),
        length=jnp.zeros(batch_size, jnp.int32),
    )


def places(x, memory: Any, key_shape, value_shape, segment_ids, lengths) -> Places:
    """The places of the tokens of x, ``[B, T, D]``, behind those of ``memory``, which may be None.

    Raises:
      ValueError: segment_ids or lengths that do not fit x, or a cache of other shapes or without room for T tokens.
    """
    batch, num_tokens, _ = x.shape
    reset, written = resets(segment_ids, batch, num_tokens), tokens_within(lengths, batch, num_tokens)
    if memory is None:
        length = jnp.zeros(batch, jnp.int32)
        last_start = length
    else:
        _check_cache(memory, batch, num_tokens, key_shape, value_shape)
        length = memory.length.astype(jnp.int32)
        last_start = _last_start(memory.start, length)
    slot = length[:, None] + jnp.arange(num_tokens, dtype=jnp.int32)[None]
    start = jnp.broadcast_to(last_start[:, None], slot.shape)
    if reset is not None:
        start = lax.cummax(jnp.where(reset, slot, start), axis=1)
    return Places(slot, start, length, written)


def appended(memory: KeyValueCache | None, key, value, place: Places) -> KeyValueCache:
    """The cache with the keys ``[B, T, ...]`` and values in their places; without a memory, a full one of T slots."""
    after = KeyValueCache(key, value, place.start, place.length + key.shape[1])
    if memory is None:
        return after
    append = jax.vmap(functools.partial(lax.dynamic_update_slice_in_dim, axis=0))
    return KeyValueCache(
        key=append(memory.key, key.astype(memory.key.dtype), place.length),
        value=append(memory.value, value.astype(memory.value.dtype), place.length),
        start=append(memory.start, place.start, place.length),
        length=after.length,
    )


def visible_slots(after: KeyValueCache, place: Places, window: int | None = None) -> jax.Array:
    """What each token sees of the cache ``after`` the call, bool ``[B, T, S]``; with a window, its last slots alone."""
    first = place.start if window is None else jnp.maximum(place.start, place.slot - (window - 1))
    slots = jnp.arange(after.key.shape[1], dtype=jnp.int32)[None, None]
    return (first[..., None] <= slots) & (slots <= place.slot[..., None])


def finished(y, after: KeyValueCache, place: Places) -> tuple[jax.Array, KeyValueCache]:
    """The reads y ``[B, T, H, V]`` and the cache that a call returns.

    Reads are 0 for padding behind, and NaN for a row whose cache is full. The next call overwrites the padding.
    """
    y = jnp.where((after.length <= after.key.shape[1])[:, None, None, None], y, jnp.nan)
    if place.written is not None:
        y = jnp.where(place.written[..., None, None], y, 0)
        after = after._replace(length=place.length + jnp.sum(place.written, axis=1, dtype=jnp.int32))
    return y, after


def _check_cache(memory, batch, num_tokens, key_shape, value_shape):
    way_out = f"layer.init_memory({batch}, max_length) makes an empty one"
    check_kind(memory, KeyValueCache, way_out)
    capacity = (*np.shape(memory.key), 0, 0)[1]
    slots = (batch, capacity)
    check_shapes(memory, ((*slots, *key_shape), (*slots, *value_shape), slots, (batch,)), way_out)
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
