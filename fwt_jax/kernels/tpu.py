"""The chunkwise form of the sum and delta rules as Pallas kernels for TPU: one forward, and one for its gradient.

A step of a kernel takes one chunk of several heads, whose products the compiler interleaves. Value heads that share a
key head have one product of queries and keys, if a decay is one number per head. The chunks of a sequence follow each
other, and the memories stay in VMEM. Only the inputs and the results move to and from HBM, as they are
``[B, T, H, ·]``, but where eight heads are too large for VMEM (``_call``). For the gradient, the forward kernel
also writes the memory at each chunk's start: T/C matrices per head, in float32. The backward kernel recomputes each
chunk from there and applies JAX's derivative of it.

tpu_chunk.py has the mathematics of a chunk.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from fwt_jax.chunkwise import chunkwise as chunkwise_of_head
from fwt_jax.decays import cumulative_log_decay
from fwt_jax.heads import of_value_heads, over_heads
from fwt_jax.kernels.derivatives import Kernels, advance
from fwt_jax.kernels.over_mesh import axes_of_mesh, over_axes_of_mesh
from fwt_jax.kernels.refused import refused, zero_of
from fwt_jax.kernels.tpu_chunk import DEFAULT, ChunkSettings, chunk
from fwt_jax.rules import name_of

REFUSAL = 'implementation="pallas" is for TPU, got {platforms}; use implementation="xla"'
CHUNK_SIZES = (16, 32, 64, 128)  # 16: the rows of a tile of bfloat16. 128: the width of the multiplier
HEADS = 8  # key heads of a step of the kernel: the rows of a tile of float32
NUMBERS = 8 * 128 * 128  # of the memories whose products are interleaved
BLOCK_BYTES = 26 * 2**20  # of the blocks of a step. What the compiler spills comes on top
VMEM_BYTES = 48 * 2**20
# The axes of the arrays of the kernels: C tokens of a chunk, n chunks, r rows of gates, g key heads, h value heads.
MEMORY, STARTS, GATES, KEYS, VALUES = "b h k v", "b n h k v", "b n r h c", "b t g k", "b t h v"
CHANNELS = "b t h k"  # of a decay per key channel


def chunkwise(
    fast_weights,
    query,
    key,
    value,
    beta,
    log_decay=None,
    reset=None,
    recall_scale=None,
    *,
    rule,
    chunk_size=None,
    precision,
    fallback=False,
) -> tuple[jax.Array, jax.Array]:
    """``chunkwise`` of a batch of heads on a TPU. On CPU the kernels are interpreted, which is slow.

    The delta rule takes 6KV + C(4K + 4V) FLOPs per token and head, and 16C² for the inverse, in three passes or more.
    Value heads of one key head share the 4CK. A decay per channel takes 4CK log₂ C FLOPs for the scores instead of 4CK,
    which nothing shares. The gradient takes about three times as many. Forward, 2(K + V) numbers per token move to or
    from HBM, and K more of a decay per channel.

    The reads and the memories at the starts of the chunks have the name ``derivatives.RESIDUALS`` for the policies of
    ``jax.checkpoint``. With them kept, the gradient runs the forward kernel once.

    Args:
      fast_weights, query, key, value, beta, log_decay, reset, recall_scale, rule: see ``why_not``. Value heads in
        groups share a query and a key head. It is repeated where a group is too large for a step, and on a mesh that
        splits the value heads into more parts than there are key heads.
      chunk_size: 16, 32, 64 or 128; None takes 128, or less if T is less.
      precision: of the products: one, three or six passes of the bfloat16 multiplier for "default", "high" and
        "highest". The triangular system takes at least three.
      fallback: on other platforms, plain JAX. If False, a CPU interprets the kernels (in shard_map it runs plain JAX,
        because there Pallas' interpreter fails), and others refuse them.

    Returns:
      The reads ``[B, T, H, V]`` in value's dtype and W_T ``[B, H, K, V]``.

    Raises:
      ValueError: arguments for which ``why_not`` has a reason; compiled for another platform without ``fallback``.
    """
    options = {"rule": rule, "chunk_size": chunk_size, "precision": precision}
    reason = why_not(fast_weights, query, key, value, **options)
    if reason:
        raise ValueError(f'implementation="pallas" {reason}; use implementation="xla"')
    settings = Settings(rule, chunk_size, lax.Precision(precision or "default"), fallback)
    heads, key_heads = value.shape[2], key.shape[2]
    if axes_of_mesh(len(key), heads) and not axes_of_mesh(len(key), key_heads):
        query, key = (of_value_heads(x, heads) for x in (query, key))
    inputs = (fast_weights, query, key, value, beta, log_decay, reset, recall_scale)
    decay_axes = CHANNELS if log_decay is not None and log_decay.ndim == 4 else "b t h"
    # What splits the heads of a mesh splits key heads and value heads alike.
    axes = (MEMORY, CHANNELS, CHANNELS, VALUES, "b t h", decay_axes, "b t", "b t h")

    def of_device(*inputs):
        # In shard_map the results vary over every mesh axis that any input varies over. A zero makes the inputs agree.
        zero = zero_of([x for x in inputs if x is not None and x.dtype != bool])
        inputs = (x if x is None or x.dtype == bool else x + zero.astype(x.dtype) for x in inputs)
        return advance(KERNELS, settings, *inputs)

    return over_axes_of_mesh(of_device, inputs, axes, (VALUES, MEMORY))(*inputs)


def why_not(fast_weights, query, key, value, *, rule, chunk_size, precision) -> str | None:
    """The reason why the kernels cannot take these arguments of ``chunkwise``, or None.

    They take float32 and bfloat16; sum, delta and rules with the same write (``Rule.corrects``); K and V up to 512,
    and for float32 K·V up to 256², which fit on the chip; chunks of 16, 32, 64 or 128 tokens.
    """
    if rule.corrects is None:
        return f"has no rule {name_of(rule)}"
    dtypes = {x.dtype for x in (fast_weights, query, key, value)}
    if not dtypes <= {jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16)}:
        return f"takes float32 and bfloat16, got {', '.join(sorted(map(str, dtypes)))}"
    key_size, value_size = fast_weights.shape[2:]
    large = key_size * value_size > 256 * 256
    if max(key_size, value_size) > 512 or (large and jnp.dtype(jnp.float32) in (query.dtype, key.dtype, value.dtype)):
        sizes = f"got K = {key_size}, V = {value_size}"
        return f"takes K and V up to 512, and K·V up to 256² for float32, which fit on the chip; {sizes}"
    if chunk_size not in (None, *CHUNK_SIZES):
        return f"takes chunk_size {', '.join(map(str, CHUNK_SIZES))} or None, got {chunk_size}"
    try:
        lax.Precision(precision or "default")
    except ValueError:
        return f'takes precision "default", "high" or "highest", got {precision!r}'
    return None


def is_default(*arrays, **options) -> bool:
    """Whether a program is for TPUs, and ``why_not`` has no reason against these arguments.

    It is for TPUs if the devices of the mesh (``jax.set_mesh``, ``jax.shard_map``) are, or without one, JAX's default
    device. XLA splits no kernel over several devices. So without a mesh there must be one device, and a mesh must have
    axes that ``over_mesh.axes_of_mesh`` knows.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.abstract_device is None:
        is_for_tpus = jax.default_backend() == "tpu" and jax.device_count() == 1
    else:
        is_for_tpus = "TPU" in mesh.abstract_device.device_kind and axes_of_mesh(*arrays[0].shape[:2]) is not None
    return is_for_tpus and not why_not(*arrays, **options)


class Settings(NamedTuple):
    """The static arguments of the kernels.

    Attributes:
      rule, chunk_size, precision, fallback: see ``chunkwise``.
      interpret: whether Pallas interprets the kernels.
    """

    rule: Any
    chunk_size: int | None
    precision: lax.Precision
    fallback: bool
    interpret: bool = False


# --- the kernels, and plain JAX --------------------------------------------------------------------------------------


def _forward(settings, keep, *inputs):
    """Reads and W_T, and the memory at each chunk's start, ``[B, n, H, K, V]`` (None without ``keep``)."""
    value, length = inputs[3], inputs[3].shape[1]
    of_chunk, arrays = _prepared(settings, *inputs)
    results = [(VALUES, value.dtype), (MEMORY, inputs[0].dtype), *([(STARTS, inputs[0].dtype)] if keep else [])]
    reads, end, *starts = _call(settings, of_chunk, _forward_kernel, arrays, results, "fast_weight_attention")
    return (reads[:, :length], end), starts[0] if keep else None


def _backward(settings, inputs, starts, outputs_grad):
    """The gradients in the inputs; that in the resets is None."""
    differentiable = [i for i, x in enumerate(inputs) if x is not None and x.dtype != bool]

    def prepare(*arrays):
        of_index = dict(zip(differentiable, arrays, strict=True))
        return [x for _, x in _prepared(settings, *(of_index.get(i, x) for i, x in enumerate(inputs)))[1]]

    of_chunk, arrays = _prepared(settings, *inputs)
    _, pull = jax.vjp(prepare, *(inputs[i] for i in differentiable))
    reads_grad, end_grad = outputs_grad
    reads_grad = _padded(reads_grad, of_chunk.chunk_size)
    arguments = [(MEMORY, end_grad), (STARTS, starts), *arrays[1:], (VALUES, reads_grad)]
    results = [(axes, x.dtype) for axes, x in arrays]
    name = "fast_weight_attention_gradient"
    grads = pull(list(_call(settings, of_chunk, _backward_kernel, arguments, results, name, backwards=True)))
    return tuple(grads[differentiable.index(i)] if i in differentiable else None for i in range(len(inputs)))


def _in_plain_jax(settings, *inputs):
    options = {"rule": settings.rule, "chunk_size": settings.chunk_size, "precision": settings.precision}
    return over_heads(functools.partial(chunkwise_of_head, **options), inputs)(*inputs)


def _on_tpu(settings, kernels, plain):
    """``kernels`` in programs for TPUs, interpreted on a CPU, and elsewhere an error; see ``chunkwise`` on fallback."""

    def refuse(*arguments):
        inputs = [x for x in jax.tree.leaves(arguments) if x.dtype != bool]
        return refused(REFUSAL, jax.eval_shape(plain, *arguments), inputs)

    def call(*arguments):
        interpreted = functools.partial(kernels, settings._replace(interpret=True))
        on_cpu = plain if settings.fallback or _varies(jax.tree.leaves(arguments)[0]) else interpreted
        default = plain if settings.fallback else refuse
        compiled = functools.partial(kernels, settings)
        return lax.platform_dependent(*arguments, tpu=compiled, cpu=on_cpu, default=default)

    return call


KERNELS = Kernels(_forward, _backward, _in_plain_jax, _on_tpu)


# --- the arrays of the kernels ---------------------------------------------------------------------------------------


def _prepared(settings, fast_weights, query, key, value, beta, log_decay, reset, recall_scale):
    """The ``ChunkSettings``, and a list of pairs of axes and arrays: W_0, the gates and the tokens."""
    length, chunk_size = key.shape[1], settings.chunk_size
    if chunk_size is None:
        chunk_size = next((size for size in CHUNK_SIZES if size >= length), CHUNK_SIZES[-1])
    gates = _gates(beta, recall_scale, log_decay, reset, chunk_size)
    channels = log_decay is not None and log_decay.ndim == 4
    length = max(length, chunk_size)
    of_chunk = ChunkSettings(settings.rule.corrects, channels, tuple(gates), settings.precision, length, chunk_size)
    gates = jnp.stack([jnp.swapaxes(x, 2, 3) for x in gates.values()], axis=2)
    key_heads = _key_heads(of_chunk, fast_weights.dtype, query, key, value, gates.shape[2])
    query, key = (of_value_heads(x, key_heads) for x in (query, key))
    tokens = [(KEYS, query), (KEYS, key), (VALUES, value)]
    if log_decay is not None and channels:
        tokens.append((CHANNELS, log_decay.astype(jnp.float32)))
    return of_chunk, [(MEMORY, fast_weights), (GATES, gates), *((axes, _padded(x, chunk_size)) for axes, x in tokens)]


def _key_heads(of_chunk, dtype, query, key, value, num_gates):
    """The number of key heads for the kernels. A group that is too large for a step becomes several with equal keys."""
    number, heads = key.shape[2], value.shape[2]
    most = _heads_at_once(of_chunk, key.shape[3], value.shape[3])
    possible = [n for n in range(number, heads + 1, number) if heads % n == 0 and heads // n <= most]
    arrays = [(MEMORY, dtype), (GATES, jnp.float32), (KEYS, query.dtype), (KEYS, key.dtype), (VALUES, value.dtype)]
    arrays += [(CHANNELS, jnp.float32)] if of_chunk.channels else []
    of_gradient = [*arrays, *arrays, (STARTS, dtype), (VALUES, value.dtype)]
    sizes = {"h": heads, "k": key.shape[3], "v": value.shape[3], "r": num_gates, "c": of_chunk.chunk_size}

    def must_copy(number):
        return _heads_of_a_step(sizes | {"g": number}, of_chunk.chunk_size, of_gradient) not in (HEADS, number)

    return min(possible, key=must_copy)  # the first that copies nothing, else the first


def _padded(x, length):
    """``[B, T, ...]`` with at least ``length`` tokens, the added ones zeros."""
    return jnp.pad(x, ((0, 0), (0, max(length - x.shape[1], 0)), *((0, 0),) * (x.ndim - 2)))


def _in_chunks(x, chunk_size):
    """``[B, T, ...]`` -> ``[B, n, C, ...]``. The last chunk is filled up with zeros."""
    num_chunks = -(-x.shape[1] // chunk_size)
    return _padded(x, num_chunks * chunk_size).reshape(x.shape[0], num_chunks, chunk_size, *x.shape[2:])


def _gates(beta, recall_scale, log_decay, reset, chunk_size):
    """The arrays with one number per token and head, ``[B, n, C, H]`` each, in float32, by name.

    "beta" and "recall_scale" are the arguments. "coarse" and "fine" are the two parts of the cumulative log decay.
    "segment" is the number of resets since the chunk began. An argument that is None has no entry. With a decay per
    channel, "reset" is 1 where the memory is dropped, and the decays are no gate.
    """
    arrays = {"beta": beta, "recall_scale": recall_scale}
    if reset is not None:
        arrays["reset"] = jnp.broadcast_to(reset[..., None], beta.shape)
    by_head = log_decay is not None and log_decay.ndim == 3
    if by_head:
        arrays["log_decay"] = log_decay
    gates = {name: _in_chunks(x.astype(jnp.float32), chunk_size) for name, x in arrays.items() if x is not None}
    if by_head:
        parts = cumulative_log_decay(jnp.moveaxis(gates.pop("log_decay"), 2, 0))
        gates["coarse"], gates["fine"] = (jnp.moveaxis(x, 0, 2) for x in parts)
    if reset is not None and (log_decay is None or by_head):
        gates["segment"] = jnp.cumsum(gates.pop("reset"), axis=2)
    return gates


# --- the two kernels -------------------------------------------------------------------------------------------------


def _forward_kernel(of_chunk, inputs, results, scratch):
    """A chunk of several heads. The memory of the chunks is the block of W_T, which stays in VMEM."""
    start_ref, *token_refs = inputs
    reads_ref, end_ref, *starts_refs = results
    *tokens, reads = scratch

    @pl.when(pl.program_id(2) == 0)
    def _():
        end_ref[...] = start_ref[...]

    def one_key_head(start, gates, *tokens):
        reads_of_head, end = chunk(of_chunk, start, gates, *(x.astype(jnp.float32) for x in tokens))
        return reads_of_head.astype(reads.dtype), end

    for ref in starts_refs:
        ref[...] = end_ref[...]
    _load(of_chunk, pl.program_id(2), token_refs, tokens)
    _over_heads(of_chunk, one_key_head, (end_ref, *tokens), (reads, end_ref))
    _store((reads,), (reads_ref,))


def _backward_kernel(of_chunk, inputs, results, scratch):
    """The same in reverse. ``x_grad`` is the gradient of the loss in x; inputs end with that in the reads."""
    end_grad_ref, starts_ref, *token_refs = inputs
    start_grad_ref, *grad_refs = results
    tokens, grads = scratch[: len(token_refs)], scratch[len(token_refs) :]

    @pl.when(pl.program_id(2) == 0)
    def _():
        start_grad_ref[...] = end_grad_ref[...]

    def one_key_head(end_grad, start, gates, *tokens):
        *tokens, reads_grad = (x.astype(jnp.float32) for x in tokens)
        _, pull = jax.vjp(functools.partial(chunk, of_chunk), start, gates, *tokens)
        start_grad, *token_grads = pull((reads_grad, end_grad))
        return start_grad, *(x.astype(ref.dtype) for x, ref in zip(token_grads, grads, strict=True))

    _load(of_chunk, pl.num_programs(2) - 1 - pl.program_id(2), token_refs, tokens)
    _over_heads(of_chunk, one_key_head, (start_grad_ref, starts_ref, *tokens), (start_grad_ref, *grads))
    _store(grads, grad_refs)


def _load(of_chunk, i, refs, scratch):
    """Copies chunk i of the gates and tokens, with the heads first. Tokens behind the last one become zeros."""
    gates_ref, *token_refs = refs
    scratch[0][...] = jnp.swapaxes(gates_ref[...], 0, 1)
    index = i * of_chunk.chunk_size + lax.broadcasted_iota(jnp.int32, (1, of_chunk.chunk_size, 1), 1)
    for ref, rows in zip(token_refs, scratch[1:], strict=True):
        x = jnp.swapaxes(ref[...], 0, 1)
        if of_chunk.length % of_chunk.chunk_size:
            x = jnp.where(index < of_chunk.length, x, jnp.zeros_like(x))
        rows[...] = x


def _store(scratch, refs):
    for rows, ref in zip(scratch, refs, strict=True):
        ref[...] = jnp.swapaxes(rows[...], 0, 1)


def _over_heads(of_chunk, function, inputs, results):
    """``function`` of each key head and its value heads, of as many at a time as the compiler interleaves well.

    inputs, results: refs with an axis of value heads, or of key heads, in front. The function's arrays have one of the
    value heads that share a key head, or of size 1.
    """
    heads, *sizes = inputs[0].shape
    key_heads = min(len(ref) for ref in inputs)
    most = max(_heads_at_once(of_chunk, *sizes) * key_heads // heads, 1)
    number = max(n for n in range(1, key_heads + 1) if key_heads % n == 0 and n <= most)

    def body(group, _):
        def some(ref):
            size = number * (len(ref) // key_heads)
            return pl.ds(group * size, size)

        loaded = (ref[some(ref)].reshape(number, -1, *ref.shape[1:]) for ref in inputs)
        for ref, x in zip(results, jax.vmap(function)(*loaded), strict=True):
            ref[some(ref)] = x.reshape(-1, *ref.shape[1:])

    lax.fori_loop(0, key_heads // number, body, None)


def _heads_at_once(of_chunk, key_size, value_size):
    """The number of value heads whose products are interleaved, from 1 to 8."""
    # The products of six passes at each level of the decays spill as much as twice as many heads.
    numbers = NUMBERS // 2 if of_chunk.channels and of_chunk.precision != DEFAULT else NUMBERS
    return max(numbers // (max(key_size, 128) * max(value_size, 128)), 1)


# --- a call of a kernel ----------------------------------------------------------------------------------------------


def _call(settings, of_chunk, kernel, inputs, results, name, *, backwards=False):
    """Runs a kernel once per chunk of several key heads and their value heads.

    Args:
      inputs: pairs of axes and an array. The first one, a memory, has a block that stays in VMEM for all chunks.
      results: pairs of axes and a dtype.
    """
    sizes = _sizes(inputs)
    heads = _heads_of_a_step(sizes, of_chunk.chunk_size, [*((names, x.dtype) for names, x in inputs), *results])
    # A block of a kernel has eight heads of an array, or all, as it is.
    parts = 1 if heads == HEADS else sizes["g"] // heads
    inputs = [(names, _grouped(names, x, parts)) for names, x in inputs]
    call = _pallas_call(settings, of_chunk, kernel, inputs, results, heads, name, backwards)
    outputs = call(*(x for _, x in inputs))
    return tuple(_ungrouped(names, x, parts) for (names, _), x in zip(results, outputs, strict=True))


def _sizes(arrays):
    """The size of each axis, from pairs of axes and an array."""
    return {axis: size for names, x in arrays for axis, size in zip(names.split(), x.shape, strict=True)}


def _pallas_call(settings, of_chunk, kernel, inputs, results, heads, name, backwards):
    """A function of the arrays. The gates and the tokens of a step lie in scratch memory once more, heads first."""
    sizes = _sizes(inputs)
    num_chunks = sizes["n"]
    blocks = {"b": None, "n": None, "t": of_chunk.chunk_size, "g": heads, "h": heads * sizes["h"] // sizes["g"]}
    matrix = functools.partial(_matrix, sizes, of_chunk.chunk_size)

    def spec(names):
        def index(row, group, i):
            i = num_chunks - 1 - i if backwards else i
            return tuple({"b": row, "n": i, "t": i, "g": group, "h": group}.get(axis, 0) for axis in names.split())

        return pl.BlockSpec(tuple(blocks.get(axis, sizes[axis]) for axis in names.split()), index)

    varying = jax.typeof(inputs[0][1]).manual_axis_type  # in shard_map, which the results have in common with it

    def out_shape(names, dtype):
        return jax.ShapeDtypeStruct([sizes[axis] for axis in names.split()], dtype, manual_axis_type=varying)

    arrays = [(names, x.dtype) for names, x in inputs] + list(results)

    def of_refs(*refs):
        num_inputs, num_arrays = len(inputs), len(inputs) + len(results)
        kernel(of_chunk, refs[:num_inputs], refs[num_inputs:num_arrays], refs[num_arrays:])

    return pl.pallas_call(
        of_refs,
        grid=(sizes["b"], sizes["g"] // heads, num_chunks),
        in_specs=[spec(names) for names, _ in inputs],
        out_specs=[spec(names) for names, _ in results],
        out_shape=[out_shape(*x) for x in results],
        scratch_shapes=[
            pltpu.VMEM((blocks["g" if names == KEYS else "h"], *matrix(names)), dtype)
            for names, dtype in arrays
            if names not in (MEMORY, STARTS)
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
        ),
        cost_estimate=_cost(of_chunk, sizes, arrays, backwards),
        interpret=settings.interpret,
        name=name,
    )


def _cost(of_chunk, sizes, arrays, backwards):
    """What XLA's scheduler and ``cost_analysis`` take a call for. ``arrays``: pairs of axes and a dtype."""
    key_size, value_size, size = sizes["k"], sizes["v"], of_chunk.chunk_size
    # Of queries and keys, for each value head: a product at each level of the decays, or its share of its group's.
    products = size.bit_length() if of_chunk.channels else sizes["g"] / sizes["h"]
    flops = 4 * key_size * value_size + 2 * size * (key_size * products + value_size)
    if of_chunk.corrects:
        flops += 2 * key_size * value_size + 2 * size * (key_size * products + value_size) + 16 * size**2
    tokens = sizes["b"] * sizes["h"] * sizes["t"]
    numbers = (math.prod(sizes[axis] for axis in names.split()) * dtype.itemsize for names, dtype in arrays)
    return pl.CostEstimate(
        flops=round(tokens * flops * (3 if backwards else 1)),
        transcendentals=tokens * (key_size if of_chunk.channels else size),
        bytes_accessed=sum(numbers),
    )


def _varies(x):
    """Whether, in shard_map, x varies over an axis of the mesh."""
    return bool(jax.typeof(x).manual_axis_type.varying)


def _matrix(sizes, chunk_size, names):
    """What a head has of an array in a step: ``[K, V]`` of a memory, ``[r, C]`` of gates, ``[C, K or V]`` of tokens."""
    rows, columns = {MEMORY: "kv", STARTS: "kv", GATES: "rc", KEYS: "tk", CHANNELS: "tk", VALUES: "tv"}[names]
    return chunk_size if rows == "t" else sizes[rows], sizes[columns]


def _heads_of_a_step(sizes, chunk_size, arrays):
    """Eight key heads, or all where eight do not divide them, or as many as fit in VMEM, which ``_grouped`` copies.

    Each of the arrays, pairs of axes and a dtype, has two buffers, and gates and tokens lie there once more.
    """
    heads = sizes["g"]

    def num_bytes(names, dtype):
        rows, columns = _matrix(sizes, chunk_size, names)
        buffers = 2 if names in (MEMORY, STARTS) else 3
        shared = 1 if names == KEYS else sizes["h"] // heads
        return shared * buffers * rows * -(-columns // 128) * 128 * jnp.dtype(dtype).itemsize

    most = max(BLOCK_BYTES // sum(num_bytes(*x) for x in arrays), 1)
    number = HEADS if heads % HEADS == 0 else heads
    return number if number <= most else max(n for n in range(1, most + 1) if heads % n == 0)


def _grouped(names, x, parts):
    """The axis of heads becomes one of a part of them, and the batch ``parts`` times as large."""
    if parts == 1:
        return x
    axis = _axis_of_heads(names)
    x = x.reshape(*x.shape[:axis], parts, x.shape[axis] // parts, *x.shape[axis + 1 :])
    x = jnp.moveaxis(x, axis, 1)
    return x.reshape(-1, *x.shape[2:])


def _ungrouped(names, x, parts):
    """The inverse of ``_grouped``."""
    axis = _axis_of_heads(names)
    x = jnp.moveaxis(x.reshape(-1, parts, *x.shape[1:]), 1, axis)
    return x.reshape(*x.shape[:axis], parts * x.shape[axis + 1], *x.shape[axis + 2 :])


def _axis_of_heads(names):
    return next(i for i, name in enumerate(names.split()) if name in "gh")
