"""N memories for each row: a token advances and reads the one that its segment id names.

Memories of different segments do not depend on each other, so their tokens may be taken in any order of segments. The
tokens of a row are laid out anew in stretches of C places. Each stretch belongs to one segment:

    ids          0 0 0 1 1 2 0      C = 2
    stretches    0 0|0 0|1 1|2 ·

Only the last stretch of a segment may have empty places, so T tokens fill at most ⌊(T + N(C − 1))/C⌋ stretches, and at
most T. A scan over the stretches takes the memory of each one's segment out of the N, advances it, and puts it back.

Taking and putting are linear in the memories. So a gradient stores what ``attend`` stores for each stretch, and none of
the N memories. Its backward pass carries the N gradients of memories, and passes over all of them at each stretch. On
a CPU that took about half of the time of a gradient for N = 256, and little for N = 8.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


class Layout(NamedTuple):
    """Where the tokens of a row lie in S stretches of C places.

    Attributes:
      segment: that of each stretch, int ``[S]``; any for a stretch without tokens.
      token: the one at each place, int ``[S, C]``; T at an empty place.
      place: of each token, int ``[T]``; S·C for a token of no segment.
    """

    segment: jax.Array
    token: jax.Array
    place: jax.Array


def layout(ids, num_segments: int, size: int) -> Layout:
    """Lays out the tokens of a row in stretches of ``size`` places, in the order of their segments.

    Args:
      ids: the segment of each token, int ``[T]``; a token belongs to none if it is not from 0 to ``num_segments`` − 1.
    """
    length = len(ids)
    num_stretches = min(length, (length + num_segments * (size - 1)) // size)
    segments = jnp.arange(num_segments, dtype=jnp.int32)
    order = jnp.argsort(jnp.where((ids < 0) | (ids >= num_segments), num_segments, ids), stable=True)
    counts = jnp.sum(ids[:, None] == segments[None], axis=0, dtype=jnp.int32)
    first_token = jnp.cumsum(counts) - counts
    stretches = -(-counts // size)
    ends = jnp.cumsum(stretches)

    stretch = jnp.arange(num_stretches, dtype=jnp.int32)
    segment = jnp.searchsorted(ends, stretch, side="right", method="compare_all")
    segment = jnp.minimum(segment, num_segments - 1)
    rank = ((stretch - (ends - stretches)[segment]) * size)[:, None] + jnp.arange(size, dtype=jnp.int32)[None]
    is_used = rank < counts[segment][:, None]
    token = jnp.where(is_used, order[jnp.minimum(first_token[segment][:, None] + rank, length - 1)], length)
    places = jnp.arange(token.size, dtype=jnp.int32)
    place = jnp.full((length,), token.size, jnp.int32).at[token.ravel()].set(places, mode="drop")
    return Layout(segment, token, place)


def by_segment(attend, tokens, memories, ids, size: int):
    """``attend`` of each segment's tokens in their order, from the segment's own memory.

    Args:
      attend: (tokens ``[B, size, ...]``, memory ``[B, ...]``, written: bool ``[B, size]``) -> y ``[B, size, ...]``, and
        the memory. A row without a written token must leave its memory as it is.
      tokens: a tree of arrays ``[B, T, ...]``.
      memories: a tree of arrays ``[B, N, ...]``.
      ids: int ``[B, T]``; a token of another id than 0..N − 1 belongs to no segment.
      size: C, the number of tokens that ``attend`` takes at once.

    Returns:
      y ``[B, T, ...]``, 0 for a token of no segment, and the memories after each segment's last token.
    """
    num_segments = jax.tree.leaves(memories)[0].shape[1]
    laid_out = jax.vmap(functools.partial(layout, num_segments=num_segments, size=size))(ids)

    def advance(memories, stretch):
        segment, tokens, written = stretch
        y, memory = attend(tokens, jax.tree.map(lambda x: _take(x, segment), memories), written)
        return jax.tree.map(lambda x, new: _put(x, segment, new), memories, memory), y

    stretches = jax.tree.map(lambda x: _gather(x, laid_out.token), tokens)
    scanned = (laid_out.segment, stretches, laid_out.token < ids.shape[1])
    memories, y = lax.scan(advance, memories, jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), scanned))
    y = jnp.moveaxis(y, 0, 1)
    return _gather(y.reshape(y.shape[0], -1, *y.shape[3:]), laid_out.place), memories


def _gather(x, index):
    """x ``[B, T, ...]`` at ``index [B, ...]`` of T; 0 where that is T. Its gradient adds nothing there."""
    return jax.vmap(lambda row, index: row.at[index].get(mode="fill", fill_value=0))(x, index)


def _take(x, segment):
    """x ``[B, N, ...]`` at one segment ``[B]`` of each row."""
    return jax.vmap(lambda row, i: lax.dynamic_index_in_dim(row, i, keepdims=False))(x, segment)


def _put(x, segment, new):
    """x ``[B, N, ...]`` with ``new [B, ...]`` at one segment ``[B]`` of each row."""
    return jax.vmap(lambda row, i, new: lax.dynamic_update_index_in_dim(row, new, i, 0))(x, segment, new)
