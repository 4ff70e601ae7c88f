"""Checks of the operations' arguments: an error says what came, what was expected and the way out."""

import math
from numbers import Integral, Real

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer

from fwt_jax import arguments
from fwt_jax.memory import Memory
from fwt_jax.pieces import from_previous, is_axis
from fwt_jax.rules import RULES, name_of

LIBRARY_RULES = frozenset(RULES.values())  # without the rows that a caller adds later


def check_read(normalize, eps):
    if not (normalize is False or (isinstance(normalize, str) and normalize == "read")):
        raise ValueError(f'normalize must be False or "read" where nothing is retrieved by key, got {normalize!r}')
    check_eps(eps)


def check_eps(eps):
    if not (isinstance(eps, Real) and 0 <= float(eps) < math.inf):
        raise ValueError(f"eps must be a number of at least 0, as 1e-6, got {eps!r}")


def check_qkv(query, key, value):
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.ndim != 4:
            raise ValueError(
                f"{name} must be [B, T, H, size], got {list(x.shape)}; "
                "for one sequence or one head add axes of length 1, e.g. x[None, :, None, :]"
            )
        arguments.floating(**{name: x})
        if 0 in x.shape:
            raise ValueError(f"{name} must not be empty, got {list(x.shape)}; a call takes at least one token (T = 1)")
    if query.shape[0::2] != key.shape[0::2] or query.shape[3] != key.shape[3]:
        raise ValueError(
            f"query and key must agree in B, H and K, got query {list(query.shape)} and key {list(key.shape)}; "
            "with grouped heads, repeat the smaller of them"
        )
    if value.shape[0] != key.shape[0] or value.shape[2] % key.shape[2]:
        raise ValueError(
            "value must agree with key in B and H, or its heads must be a multiple of key's, got value "
            f"{list(value.shape)}, key {list(key.shape)}; repeat the heads of value or of query and key"
        )


def check_options(rule, form, normalize, implementation, beta, log_decay, chunk_size, eps=0.0):
    """Refuses options that are unknown or that the ``Rule`` does not define."""

    arguments.one_of((None, "chunkwise", "recurrent", "parallel"), form=form)
    arguments.one_of((False, "read", "retrieval"), normalize=normalize)
    arguments.one_of((None, "xla", "pallas", "triton"), implementation=implementation)
    check_eps(eps)
    name = name_of(rule)
    if implementation in ("pallas", "triton") and form not in (None, "chunkwise"):
        raise ValueError(
            f'implementation="{implementation}" needs form="chunkwise", got form={form!r}; use "xla" or None'
        )
    if beta is None and rule.needs_beta:
        raise ValueError(
            f"rule {name} needs beta, the write strength [B, T, H] (e.g. a sigmoid of a projection), got None; "
            'pass jnp.ones(...) to write in full, or use rule="sum"'
        )
    if form == "parallel" and not (rule.parallel and rule.chunk):
        raise ValueError(f'rule {name} has no parallel form; use "recurrent" or "chunkwise"')
    if form == "chunkwise" and not has_chunks(rule, log_decay):
        raise ValueError(f'rule {name} has no chunkwise form with a decay per key channel; use form="recurrent"')
    if form == "parallel" and not rule.decay_per_channel and _per_channel(log_decay):
        raise ValueError(f'rule {name} has no parallel form with a decay per key channel; use form="recurrent"')
    if normalize not in rule.normalize:
        defined = " and ".join(map(repr, rule.normalize))
        raise ValueError(f"rule {name} has no attention normalisation {normalize!r}; normalize may be {defined}")
    if chunk_size is not None and (
        form not in (None, "chunkwise") or not isinstance(chunk_size, Integral) or chunk_size < 1
    ):
        raise ValueError(
            f'chunk_size must be an integer above 0 and goes with form="chunkwise", got {chunk_size} and form={form!r}'
        )


def check_step(rule, key, value, log_decay, normalize, dtype):
    """Refuses a caller's own step that is no step: its arguments, its result, or traced arrays in its closure."""
    if rule in LIBRARY_RULES:
        return
    key_size, value_size = key.shape[-1], value.shape[-1]
    decay = None if log_decay is None else ((key_size,) if _per_channel(log_decay) else ())
    shapes = ((key_size, value_size), (key_size,), (value_size,), (), decay)
    shapes += ((),) if normalize == "retrieval" else ()
    arrays = [None if shape is None else jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
    name = name_of(rule)
    expected = f"a step takes W [K, V], key [K], value [V], beta [] and decay (None, [] or [K]), and returns W, {dtype}"
    try:
        program, result = jax.make_jaxpr(rule.step, return_shape=True)(*arrays)
    except (TypeError, ValueError) as error:
        words = str(error).partition("\n")[0]
        raise ValueError(
            f"rule {name} cannot be traced with K = {key_size}, V = {value_size}: {words}; {expected}"
        ) from error
    if getattr(result, "shape", None) != shapes[0] or result.dtype != dtype:
        raise ValueError(f"rule {name} returns {result} for W {list(shapes[0])}; {expected}")
    if any(isinstance(x, Tracer) for x in program.consts):
        raise ValueError(
            f"rule {name} closes over a traced array, and would have no gradient for it; "
            "give it to the step as a part of key, value, beta or log_decay"
        )


def check_axis(sequence_axis):
    if not isinstance(sequence_axis, str) or not is_axis(sequence_axis):
        raise ValueError(
            f"sequence_axis must be the name of an axis of the jax.shard_map that the call is in, got {sequence_axis!r}"
        )


def check_pieces(pieces, sequence_axis, rule, log_decay, length, memory_every=None):
    if not isinstance(pieces, Integral) or not 1 <= int(pieces) <= length:
        raise ValueError(f"pieces must be None or an integer from 1 to T = {length}, got {pieces!r}")
    if pieces == 1 and sequence_axis is None:
        return
    if pieces != 1 and sequence_axis is not None:
        raise ValueError(f"pieces and sequence_axis exclude each other, got {pieces} and {sequence_axis!r}; take one")
    if sequence_axis is not None and not isinstance(sequence_axis, str):
        raise ValueError(f"sequence_axis must be the name of an axis of the mesh, got {sequence_axis!r}")
    if memory_every is not None:
        raise ValueError(
            f"memory_every goes with one piece, got pieces={pieces} and sequence_axis={sequence_axis!r}; leave it out, "
            "or take pieces=1 and no sequence_axis"
        )
    name, way_out = name_of(rule), "take pieces=1 and no sequence_axis"
    if rule.piece is None:
        raise ValueError(
            f"rule {name} is not linear in the memory, so its tokens cannot be divided into pieces; {way_out}"
        )
    if not has_chunks(rule, log_decay):
        raise ValueError(f"rule {name} has no chunks with a decay per key channel, and so no pieces; {way_out}")
    axes = jax.sharding.get_abstract_mesh().axis_names
    if sequence_axis is not None and sequence_axis not in axes and not is_axis(sequence_axis):
        raise ValueError(
            f"sequence_axis must be an axis of the mesh, got {sequence_axis!r} and a mesh of {axes}; call the "
            "operation in jax.shard_map over that axis, or under jax.set_mesh"
        )


def _per_channel(log_decay):
    return log_decay is not None and log_decay.ndim == 4


def has_chunks(rule, log_decay):
    """False where the chunkwise form has neither a chunk of the rule nor its step for this decay."""
    return rule.chunk is None or rule.decay_per_channel or not _per_channel(log_decay)


def check_like(x, name, shapes):
    if x is None:
        return
    if not hasattr(x, "shape") or x.shape not in shapes:
        expected = " or ".join(str(list(shape)) for shape in shapes)
        got = list(x.shape) if hasattr(x, "shape") else f"{x!r}; jnp.full makes an array of one number"
        raise ValueError(f"{name} must be {expected} to go with key and value, got {got}")
    arguments.floating(**{name: x})


def check_is_memory(memory, shape: object = ""):
    if not isinstance(memory, Memory):
        raise ValueError(
            f"memory must be a Memory, as a call returns it or init_memory{shape} makes it, got "
            f"{type(memory).__name__}; Memory(fast_weights, key_sum) makes one of two arrays"
        )
    for name, x in zip(memory._fields, arguments.arrays(**memory._asdict()), strict=True):
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(f"{name} of memory must be floating point, got {x.dtype}")


def check_memory(memory, key, value, segments=False):
    """Refuses what is no memory for these keys and values; with ``segments`` it may have an axis N behind B."""
    if memory is None:
        return
    shape = (value.shape[0], value.shape[2], key.shape[3], value.shape[3])
    check_is_memory(memory, shape)
    way_out = f"init_memory{shape} makes an empty one"
    got = (memory.fast_weights.shape, memory.key_sum.shape)
    if segments and len(got[0]) == 5:
        shape = (shape[0], max(1, got[0][1]), *shape[1:])
        way_out += " of one segment"
    if got != (shape, shape[:-1]):
        raise ValueError(
            f"memory must hold fast_weights {list(shape)} and key_sum {list(shape[:-1])}, "
            f"got {list(got[0])} and {list(got[1])}; {way_out}"
        )


def check_segments(segment_ids, memory_every, pieces, sequence_axis):
    """Refuses what does not go with a memory for each segment."""
    way_out = "for one memory per row, take that of segment i as jax.tree.map(lambda x: x[:, i], memory)"
    if segment_ids is None:
        raise ValueError(f"a memory [B, N, H, K, V] needs segment_ids [B, T] from 0 to N − 1, got None; {way_out}")
    if memory_every is not None or pieces not in (1, None) or sequence_axis is not None:
        raise ValueError(
            "a memory [B, N, H, K, V] goes without memory_every, pieces and sequence_axis, "
            f"got {memory_every}, {pieces} and {sequence_axis!r}; {way_out}"
        )


def check_key_mask(key_mask, batch, length):
    if key_mask.shape != (batch, length) or key_mask.dtype != bool:
        raise ValueError(
            f"key_mask must be bool [B, S] = [{batch}, {length}], got {key_mask.dtype}{list(key_mask.shape)}"
        )


def tokens_within(lengths, batch, length, sequence_axis=None):
    """True for the first ``lengths[b]`` tokens of row b, bool ``[B, T]``; None without lengths.

    With ``sequence_axis``, lengths are those of the whole sequences, of which these tokens are a piece.
    """
    if lengths is None:
        return None
    axes = f"[B] = [{batch}] (of a mask, take jnp.sum(mask, axis=1))"
    num_pieces = 1 if sequence_axis is None else lax.axis_size(sequence_axis)
    lengths = arguments.integers("lengths", lengths, num_pieces * length, axes=axes, shape=(batch,))
    first = 0 if sequence_axis is None else length * lax.axis_index(sequence_axis)
    return (first + jnp.arange(length, dtype=jnp.int32))[None] < lengths[:, None]


def segments_of(segment_ids, num_segments, lengths, batch, length):
    """The segment of each token, int32 ``[B, T]``; −1 for padding, and where a traced id is not from 0 to N − 1."""
    axes = f"[B, T] = [{batch}, {length}]"
    ids = arguments.integers("segment_ids", segment_ids, num_segments - 1, axes=axes, shape=(batch, length))
    ids = jnp.where(ids < num_segments, jnp.maximum(ids, -1), -1)
    written = tokens_within(lengths, batch, length)
    return ids if written is None else jnp.where(written, ids, -1)


def resets(segment_ids, batch, length, sequence_axis=None):
    """True where a token's segment differs from the one before it; None without segments.

    With ``sequence_axis``, the one before the first token is the last token of the piece before, see pieces.py.
    """
    if segment_ids is None:
        return None
    if not isinstance(segment_ids, np.ndarray):  # JAX would cast int64 of NumPy to int32, where different ids may agree
        (segment_ids,) = arguments.arrays(segment_ids=segment_ids)
    if segment_ids.shape != (batch, length) or not jnp.issubdtype(segment_ids.dtype, jnp.integer):
        raise ValueError(
            f"segment_ids must be integers [B, T] = [{batch}, {length}], "
            f"got {segment_ids.dtype}{list(segment_ids.shape)}"
        )
    changes = segment_ids[:, 1:] != segment_ids[:, :-1]
    first = jnp.zeros_like(segment_ids[:, :1], bool)
    if sequence_axis is not None:
        differs = segment_ids[:, :1] != from_previous(segment_ids[:, -1:], sequence_axis)
        first = differs & (lax.axis_index(sequence_axis) > 0)
    return jnp.concatenate([first, changes], axis=1)
