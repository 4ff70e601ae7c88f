"""Pieces of a sequence, which run at once: the map of a piece is what its tokens do to any memory.

A rule that is linear in W takes the memory at a stretch's start to that at its end by an affine map

    W_end = M W_start + U

M is ``[K, K]`` for the delta rule, and diagonal for the sum rule: D_T0, the decay of the whole stretch. Oja's rule is
the delta rule of Wᵀ, so it has such a map for Wᵀ. Maps compose, and the order of grouping does not matter:

    (M₂, U₂) ∘ (M₁, U₁) = (M₂ M₁, M₂ U₁ + U₂)

The pieces of a sequence lie along a named axis of ``jax.shard_map`` (one piece on each device) or of ``jax.vmap``.
Every piece computes its map, ``before_piece`` composes the maps of all earlier pieces in log₂ P + 1 rounds of messages
for P pieces, and then each piece starts from its true memory. Running key sums are a sum-ruled memory of their own.

For the delta rule, the map costs a pass over K + V columns: 4K(K + V) FLOPs per token and head, and the products within
chunks. The operation itself, 6KV and the products within chunks, runs after it. A round is one message of K(K + V)
numbers per head, M and U side by side, or K(V + 1) for the sum rule.

Derivatives are JAX's. That of a message is the message back, so gradients go from later to earlier pieces by Mᵀ in as
many rounds, and no piece keeps more than log₂ P + 1 maps.
"""

from __future__ import annotations

import functools
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from fwt_jax.chunkwise import BLOCK, chunkwise
from fwt_jax.heads import over_heads
from fwt_jax.rules import Rule

HIGHEST = lax.Precision.HIGHEST


class Piece(NamedTuple):
    """The map W ↦ M W + U of a stretch of tokens.

    Attributes:
      factor: M, ``[..., K, K]``, or its diagonal ``[..., K, 1]``.
      update: U, ``[..., K, V]``.
    """

    factor: jax.Array
    update: jax.Array


def advance(piece: Piece, memory: jax.Array) -> jax.Array:
    """M W + U for W ``[..., K, V]``; 2K²V FLOPs, or 2KV if M is diagonal."""
    return _times(piece.factor, memory) + piece.update


def compose(first: Piece, second: Piece) -> Piece:
    """The map of ``first`` and then ``second``; 2K²(K + V) FLOPs, or 2KV if M is diagonal."""
    return Piece(_times(second.factor, first.factor), advance(second, first.update))


def _times(factor, x):
    if factor.shape[-1] == 1:
        return factor * x
    return jnp.matmul(factor, x, precision=HIGHEST)


def piece_of(
    fast_weights, key, value, beta, log_decay=None, reset=None, recall_scale=None, *, rule: Rule, chunk_size, precision
) -> Piece:
    """The map of a stretch of tokens, or that of Wᵀ if ``rule.piece`` is "transposed".

    A memory's columns do not mix, so M and U come from one pass over the chunks: from the memory [I | 0], whose tokens
    write [0 | V], to [M | U]. It costs as much as K + V columns that are not read.

    Args:
      fast_weights: ``[B, H, K, V]``, for its dtype and its varying axes alone.
      key, value, beta, log_decay, reset, recall_scale: ``[B, T, H, ...]``, else as in ``chunkwise``.
      rule, chunk_size, precision: see ``chunkwise``. The rule has a ``Rule.piece``.

    Returns:
      M ``[B, H, K, K]`` and U ``[B, H, K, V]``; diagonal M ``[B, H, K, 1]``; transposed ``[B, H, V, V]`` and
      ``[B, H, V, K]``.
    """

    def end(start, key, value):
        inputs = (start, None, key, value, beta, log_decay, reset, recall_scale)
        one_head = functools.partial(chunkwise, rule=rule, chunk_size=chunk_size, precision=precision)
        return over_heads(one_head, inputs)(*inputs)[1]

    def beside(x, size):  # zeros of that size before the last axis of x
        return jnp.concatenate([jnp.zeros_like(x, shape=(*x.shape[:-1], size)), x], axis=-1)

    def identity(size):
        return _identity_like(jnp.zeros_like(fast_weights, shape=(*fast_weights.shape[:2], size, size)))

    key_size, value_size = fast_weights.shape[2:]
    empty = jnp.zeros_like(fast_weights)
    if rule.piece == "diagonal":
        factor = _decay_of(beta, log_decay, reset) + jnp.zeros_like(empty[..., :1])
        return Piece(factor, end(empty, key, value))
    if rule.piece == "matrix":
        start = jnp.concatenate([identity(key_size), empty], axis=-1)
        both = end(start, key, beside(value, key_size))
        return Piece(both[..., :key_size], both[..., key_size:])
    start = jnp.concatenate([identity(value_size), empty], axis=-2)
    both = jnp.swapaxes(end(start, beside(key, value_size), value), -1, -2)
    return Piece(both[..., :value_size], both[..., value_size:])


def _decay_of(beta, log_decay, reset):
    """D_T0 of a stretch, ``[B, H, K or 1, 1]``; 0 if the memory is reset in it."""
    log_decay = jnp.zeros_like(beta) if log_decay is None else log_decay
    decay = jnp.exp(jnp.sum(log_decay, axis=1))
    decay = decay[..., None, None] if decay.ndim == 2 else decay[..., None]
    return decay if reset is None else jnp.where(jnp.any(reset, axis=1)[:, None, None, None], 0, decay)


def start_of_piece(fast_weights, *tokens, sequence_axis: str, rule: Rule, **options):
    """The memory before the tokens of this piece, if W_0 is the one before the whole sequence; see ``piece_of``."""
    piece = piece_of(fast_weights, *tokens, rule=rule, **options)
    earlier = before_piece(compose, piece, identity_like(piece), sequence_axis)
    if rule.piece == "transposed":
        return jnp.swapaxes(advance(earlier, jnp.swapaxes(fast_weights, -1, -2)), -1, -2)
    return advance(earlier, fast_weights)


def identity_like(piece: Piece) -> Piece:
    """The map of no tokens."""
    is_diagonal = piece.factor.shape[-1] == 1
    factor = jnp.ones_like(piece.factor) if is_diagonal else _identity_like(piece.factor)
    return Piece(factor, jnp.zeros_like(piece.update))


def _identity_like(x):
    """Identity matrices of the shape of x ``[..., n, n]``; in shard_map they vary over the axes that x varies over."""
    return jnp.zeros_like(x) + jnp.eye(x.shape[-1], dtype=x.dtype).reshape((1,) * (x.ndim - 2) + x.shape[-2:])


def before_piece(combine, piece, identity, axis_name: str):
    """The composition of all pieces before this one along a named axis, in order; ``identity`` for the first.

    It is a scan by Hillis & Steele: in round r each piece gets what the piece 2ʳ before it has, and composes.

    Args:
      combine: an associative function of two trees of arrays, the earlier one first, as ``compose``.
      piece: a tree of arrays of one dtype and, but for the last axis, of one shape. A message is all of them.
      identity: what ``combine`` with any tree leaves unchanged.
      axis_name: of a mesh axis in ``jax.shard_map``, or of ``jax.vmap``.
    """
    size, index = lax.axis_size(axis_name), lax.axis_index(axis_name)
    arrays, structure = jax.tree.flatten(piece)
    ends = list(itertools.accumulate(x.shape[-1] for x in arrays))

    def from_earlier(tree, distance, otherwise):
        message = jnp.concatenate(jax.tree.leaves(tree), axis=-1)
        received = jnp.split(_from_earlier(message, distance, axis_name), ends[:-1], axis=-1)
        return jax.tree.map(lambda x, y: jnp.where(index >= distance, x, y), structure.unflatten(received), otherwise)

    total = from_earlier(piece, 1, identity)
    distance = 1
    while distance < size - 1:
        total = combine(from_earlier(total, distance, identity), total)
        distance *= 2
    return total


def of_last(tree, axis_name: str):
    """The arrays of the last piece, in every piece."""
    is_last = lax.axis_index(axis_name) == lax.axis_size(axis_name) - 1
    return lax.psum(jax.tree.map(lambda x: jnp.where(is_last, x, 0), tree), axis_name)


def from_previous(tree, axis_name: str):
    """The arrays of the piece before this one; those of the last piece for the first."""
    return _from_earlier(tree, 1, axis_name)


def _from_earlier(tree, distance, axis_name):
    size = lax.axis_size(axis_name)
    return lax.ppermute(tree, axis_name, [(i, (i + distance) % size) for i in range(size)])  # vmap needs all of them


def is_axis(axis_name: str) -> bool:
    """Whether the caller is in ``jax.shard_map`` or ``jax.vmap`` over an axis of this name."""
    try:
        lax.axis_size(axis_name)
    except NameError:
        return False
    return True


def number_of_pieces(programs: int, units: int, chunks: int) -> int:
    """How many pieces plain JAX should take on a GPU, by a count of steps. It is computed and was never timed.

    A GPU launches the same few kernels for a chunk, whatever their size. So a chunk takes one step of time while its
    programs fit on the processors, and programs/units steps beyond. (An H100 with 132 processors took 74 µs for 64
    programs and 103 µs for 192, in an earlier version.) One piece of n chunks takes n max(1, programs/units) steps.
    P pieces run at once, in two passes over n/P chunks, of which that for the maps has K + V columns instead of V.
    Then follow log₂ P + 1 rounds. With K = V:

        steps(P) = n/P [max(1, 2P programs/units) + max(1, P programs/units)] + log₂ P + 1

    A piece has at least the ``BLOCK`` of chunks that a GPU prepares at once, because shorter blocks launch as many
    kernels. Pieces take memory, so this is the least power of 2 within a tenth of the fewest steps. It is 1 unless that
    takes at most two thirds of the steps of one piece.

    Args:
      programs: those of a chunk's product: batch x heads x blocks of 64 value columns. In ``jax.vmap``,
        ``fast_weight_attention`` does not see the axis that is mapped, and counts too few.
      units: the streaming multiprocessors of the GPU.
      chunks: n, of a sequence.
    """

    def steps(pieces):
        load = pieces * programs / units
        if pieces == 1:
            return chunks * max(1, load)
        return -(-chunks // pieces) * (max(1, 2 * load) + max(1, load)) + pieces.bit_length()

    numbers = [2**i for i in range(max(1, chunks // BLOCK).bit_length())]
    fewest = min(map(steps, numbers))
    best = next(n for n in numbers if steps(n) <= 1.1 * fewest)
    return best if 1.5 * steps(best) <= steps(1) else 1


def in_pieces(attend, arrays, memory, lengths, pieces: int, sequence_axis: str | None):
    """``attend`` of a sequence in pieces: by ``jax.shard_map`` over an axis of the mesh, or by ``jax.vmap``.

    Tokens that write nothing fill the sequence up to a multiple of the number of pieces. Other axes of the mesh stay as
    they are.

    Args:
      attend: (query, key, value, beta, log_decay, memory=, segment_ids=, lengths=, sequence_axis=) -> y and the memory
        after the last token.
      arrays: query, key, value, beta, log_decay and segment_ids, ``[B, T, ...]`` or None.
      memory: the one before the first token.
      lengths: ``[B]``, or None.
      pieces: their number, if ``sequence_axis`` is None.
      sequence_axis: the name of an axis of the mesh, or None.
    """
    axis = "pieces" if sequence_axis is None else sequence_axis
    pieces = pieces if sequence_axis is None else jax.sharding.get_abstract_mesh().shape[sequence_axis]
    length = arrays[0].shape[1]
    padding = -length % pieces

    def padded(x, mode="constant"):
        if x is None or not padding:
            return x
        return jnp.pad(x, ((0, 0), (0, padding), *((0, 0),) * (x.ndim - 2)), mode=mode)

    # A normalised read of a query 0 would be 0/0 if eps = 0.
    query, *others, segment_ids = arrays
    arrays = (padded(query, "edge"), *map(padded, others), padded(segment_ids, "edge"))

    def of_piece(memory, lengths, *arrays):
        *tokens, segment_ids = arrays
        return attend(*tokens, memory=memory, segment_ids=segment_ids, lengths=lengths, sequence_axis=axis)

    if sequence_axis is None:
        _check_not_varying(arrays, pieces)
        arrays = jax.tree.map(lambda x: x.reshape(x.shape[0], pieces, -1, *x.shape[2:]), arrays)
        in_axes = (None, None, *(None if x is None else 1 for x in arrays))
        y, memory = jax.vmap(of_piece, in_axes, (1, None), axis_name=axis)(memory, lengths, *arrays)
        y = y.reshape(y.shape[0], -1, *y.shape[3:])
    else:
        by_token, whole = PartitionSpec(None, axis), PartitionSpec()
        in_specs = (whole, None if lengths is None else whole, *(None if x is None else by_token for x in arrays))
        divided = jax.shard_map(of_piece, in_specs=in_specs, out_specs=(by_token, whole), axis_names={axis})
        y, memory = divided(memory, lengths, *arrays)
    return y[:, :length], memory


def _check_not_varying(arrays, pieces):
    """Refuses ``pieces`` in ``jax.shard_map``, whose check does not know messages along an axis of ``jax.vmap``."""
    axes = sorted({str(axis) for x in jax.tree.leaves(arrays) for axis in jax.typeof(x).manual_axis_type.varying})
    if axes:
        raise ValueError(
            f"pieces={pieces} is not for arrays that vary over axes of a mesh, got {', '.join(axes)}; in jax.shard_map "
            "pass check_vma=False, or take pieces=1"
        )
