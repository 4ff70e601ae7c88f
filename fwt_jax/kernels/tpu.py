"""The chunkwise form of the sum and delta rules as Pallas kernels for TPU: one forward, and one for its gradient.

A step of a kernel takes one chunk of several heads, whose products the compiler interleaves. The chunks of a sequence
follow each other, and the memories stay in VMEM. Only the inputs and the results move to and from HBM, as they are
``[B, T, H, ·]``. For the gradient, the forward kernel also writes the memory at each chunk's start: T/C matrices per
head, in float32. The backward kernel recomputes each chunk from there and applies JAX's derivative of it.

tpu_chunk.py has the mathematics of a chunk.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from fwt_jax.decays import cumulative_log_decay
from fwt_jax.kernels.refused import refused, zero_of
from fwt_jax.kernels.tpu_chunk import DEFAULT, Settings, chunk
from fwt_jax.rules import name_of

REFUSAL = 'implementation="pallas" is for TPU, got {platforms}; use implementation="xla"'
CHUNK_SIZES = (16, 32, 64, 128)  # 16: the rows of a tile of bfloat16. 128: the width of the multiplier
HEADS = 8  # of a step of the kernel: the rows of a tile of float32
NUMBERS = 8 * 128 * 128  # of the memories whose products are interleaved
VMEM_BYTES = 48 * 2**20
CHUNK_STARTS = "fast_weight_chunk_starts"


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
) -> tuple[Any, jax.Array]:
    """``chunkwise`` of a batch of heads on a TPU. On CPU the kernels are interpreted, which is slow.

    The delta rule takes 6KV + C(4K + 4V) FLOPs per token and head, and 16C² for the inverse, in three passes or more.
    A decay per channel takes 4CK log₂ C FLOPs for the scores instead of 4CK. The gradient takes about three times as
    many. Forward, 2(K + V) numbers per token move to or from HBM.

    The memories at the starts of the chunks, which the gradient needs, have the name "fast_weight_chunk_starts" for the
    policies of ``jax.checkpoint``.

    Args:
      fast_weights, query, key, value, beta, reset, recall_scale: see ``recurrent.recurrent``; float32 or bfloat16
        inputs, a query is needed. K and V are at most 512, and for float32 K·V is at most 256².
      log_decay: None, ``[B, T, H]`` or ``[B, T, H, K]``.
      rule: the row of "sum" or "delta", or one with the same write (``Rule.corrects``).
      chunk_size: 16, 32, 64 or 128; None takes 128, or less if T is less.
      precision: of the products: one, three or six passes of the bfloat16 multiplier for "default", "high" and
        "highest". The triangular system takes at least three.

    Returns:
      The reads ``[B, T, H, V]`` in value's dtype and W_T ``[B, H, K, V]``.

    Raises:
      ValueError: another rule, dtype, size, chunk_size or precision; compiled for a platform other than TPU and CPU.
      NotImplementedError, TypeError: the derivative of a gradient, forward mode. The plain JAX form has both.
    """
    _check(fast_weights, query, key, value, rule)
    length = key.shape[1]
    chunk_size = _chunk_size(chunk_size, length)
    gates = _gates(beta, recall_scale, log_decay, reset, chunk_size)
    settings = Settings(rule.corrects, tuple(gates), _canonical(precision), max(length, chunk_size), chunk_size)
    tokens = (query, key, value)
    if log_decay is not None and log_decay.ndim == 4:
        tokens = (*tokens, log_decay.astype(jnp.float32))
    if length < chunk_size:
        tokens = (jnp.pad(x, ((0, 0), (0, chunk_size - length), (0, 0), (0, 0))) for x in tokens)
    inputs = (fast_weights, jnp.stack([jnp.swapaxes(x, 2, 3) for x in gates.values()], axis=2), *tokens)
    # In shard_map the results vary over every mesh axis that any input varies over. A zero makes the inputs agree.
    zero = zero_of(inputs)
    reads, end = _advance(settings, *(x + zero.astype(x.dtype) for x in inputs))
    return reads[:, :length], end


# --- the arguments of the kernels ------------------------------------------------------------------------------------


def _check(fast_weights, query, key, value, rule):
    if rule.corrects is None:
        raise ValueError(f'implementation="pallas" has no rule {name_of(rule)}; use implementation="xla"')
    dtypes = {x.dtype for x in (query, key, value)} | {fast_weights.dtype}
    if not dtypes <= {jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16)}:
        got = ", ".join(sorted(map(str, dtypes)))
        raise ValueError(f'implementation="pallas" takes float32 and bfloat16, got {got}; use implementation="xla"')
    key_size, value_size = fast_weights.shape[2:]
    large = key_size * value_size > 256 * 256
    if max(key_size, value_size) > 512 or (large and jnp.dtype(jnp.float32) in (query.dtype, key.dtype, value.dtype)):
        raise ValueError(
            'implementation="pallas" takes K and V up to 512, and K·V up to 256² for float32, which fit on the chip; '
            f'got K = {key_size}, V = {value_size}; use implementation="xla"'
        )


def _chunk_size(chunk_size, length):
    if chunk_size is None:
        return next((size for size in CHUNK_SIZES if size >= length), CHUNK_SIZES[-1])
    if chunk_size not in CHUNK_SIZES:
        raise ValueError(
            f'implementation="pallas" takes chunk_size {", ".join(map(str, CHUNK_SIZES))} or None, got {chunk_size}'
        )
    return chunk_size


def _canonical(precision):
    try:
        return DEFAULT if precision is None else lax.Precision(precision)
    except ValueError as error:
        raise ValueError(
            f'implementation="pallas" takes precision "default", "high" or "highest", got {precision!r}'
        ) from error


def _in_chunks(x, chunk_size):
    """``[B, T, ...]`` -> ``[B, n, C, ...]``. The last chunk is filled up with zeros."""
    length = x.shape[1]
    num_chunks = -(-length // chunk_size)
    x = jnp.pad(x, ((0, 0), (0, num_chunks * chunk_size - length), *((0, 0),) * (x.ndim - 2)))
    return x.reshape(x.shape[0], num_chunks, chunk_size, *x.shape[2:])


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


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _advance(settings, start, gates, *tokens):
    """Reads ``[B, T, H, V]`` and W_T ``[B, H, K, V]``, of gates ``[B, n, R, H, C]`` and tokens ``[B, T, H, ·]``."""
    return _forward(settings, False, start, gates, *tokens)


def _advance_forward(settings, start, *inputs):
    reads, end, starts = _forward(settings, True, start, *inputs)
    return (reads, end), (checkpoint_name(starts, CHUNK_STARTS), *inputs)


def _forward(settings, keep_starts, start, gates, *tokens):
    """As ``_advance``; with ``keep_starts`` also the memory at each chunk's start, ``[B, n, H, K, V]``."""
    value = tokens[2]

    inputs = (("memory", start), ("gates", gates), *(("tokens", x) for x in tokens))
    results = [("tokens", _like(value)), ("memory", _like(start))]
    if keep_starts:
        results.append(("starts", _like(start, (*gates.shape[:2], *start.shape[1:]))))

    def advance(start, gates, *tokens):
        reads, end = chunk(settings, start, gates, *(x.astype(jnp.float32) for x in tokens))
        return reads.astype(value.dtype), end

    def kernel(start_ref, *refs):
        input_refs, (reads_ref, end_ref, *starts_refs), scratch = _split(refs, 1 + len(tokens), len(results))
        *inputs, reads = scratch

        @pl.when(pl.program_id(2) == 0)
        def _():
            end_ref[...] = start_ref[...]

        for ref in starts_refs:
            ref[...] = end_ref[...]
        _load(settings, pl.program_id(2), input_refs, inputs)
        _over_heads(advance, (end_ref, *inputs), (reads, end_ref))
        _store((reads,), (reads_ref,))

    def in_plain_jax(start, *tokens):
        def body(start, tokens):
            reads, end = advance(start, *tokens)
            return end, (reads, start)

        end, (reads, starts) = lax.scan(body, start, tokens)
        return (reads, end, starts) if keep_starts else (reads, end)

    return _call(settings, kernel, in_plain_jax, inputs, results, "fast_weight_attention")


def _advance_backward(settings, residuals, cotangents):
    """The chunks in reverse. ``x_grad`` is the gradient of the loss in x."""
    reads_grad, end_grad = cotangents
    starts, gates, *tokens = residuals
    of_tokens = [("tokens", x) for x in tokens]
    inputs = (("memory", end_grad), ("starts", starts), ("gates", gates), *of_tokens, ("tokens", reads_grad))
    results = [(kind, _like(x)) for kind, x in (("memory", end_grad), ("gates", gates), *of_tokens)]

    def back(end_grad, start, gates, *tokens):
        *inputs, reads_grad = (x.astype(jnp.float32) for x in tokens)
        _, pull = jax.vjp(functools.partial(chunk, settings), start, gates, *inputs)
        start_grad, gates_grad, *token_grads = pull((reads_grad, end_grad))
        grads = (grad.astype(x.dtype) for grad, x in zip(token_grads, tokens[:-1], strict=True))
        return start_grad, gates_grad, *grads

    def kernel(end_grad_ref, starts_ref, *refs):
        input_refs, (start_grad_ref, *grad_refs), scratch = _split(refs, 2 + len(tokens), len(results))
        inputs, grads = scratch[: len(input_refs)], scratch[len(input_refs) :]

        @pl.when(pl.program_id(2) == 0)
        def _():
            start_grad_ref[...] = end_grad_ref[...]

        _load(settings, pl.num_programs(2) - 1 - pl.program_id(2), input_refs, inputs)
        _over_heads(back, (start_grad_ref, starts_ref, *inputs), (start_grad_ref, *grads))
        _store(grads, grad_refs)

    def in_plain_jax(end_grad, *tokens):
        def body(end_grad, tokens):
            start_grad, *token_grads = back(end_grad, *tokens)
            return start_grad, token_grads

        start_grad, token_grads = lax.scan(body, end_grad, tokens, reverse=True)
        return start_grad, *token_grads

    return _call(settings, kernel, in_plain_jax, inputs, results, "fast_weight_attention_gradient", backwards=True)


_advance.defvjp(_advance_forward, _advance_backward)


def _split(refs, num_inputs, num_results):
    """The gates and tokens that come in, the results, and the scratch memory."""
    num_results += num_inputs
    return refs[:num_inputs], refs[num_inputs:num_results], refs[num_results:]


def _load(settings, i, refs, scratch):
    """Copies chunk i of the gates and tokens, with the heads first. Tokens behind the last one become zeros."""
    gates_ref, *token_refs = refs
    scratch[0][...] = jnp.swapaxes(gates_ref[...], 0, 1)
    index = i * settings.chunk_size + lax.broadcasted_iota(jnp.int32, (1, settings.chunk_size, 1), 1)
    for ref, rows in zip(token_refs, scratch[1:], strict=True):
        x = jnp.swapaxes(ref[...], 0, 1)
        if settings.length % settings.chunk_size:
            x = jnp.where(index < settings.length, x, jnp.zeros_like(x))
        rows[...] = x


def _store(scratch, refs):
    for rows, ref in zip(scratch, refs, strict=True):
        ref[...] = jnp.swapaxes(rows[...], 0, 1)


def _over_heads(function, inputs, results):
    """``function`` of each head, of as many heads at a time as the compiler interleaves well."""
    heads, *sizes = inputs[0].shape
    most = max(NUMBERS // math.prod(max(size, 128) for size in sizes), 1)
    number = max(n for n in range(1, heads + 1) if heads % n == 0 and n <= most)

    def body(group, _):
        some = pl.ds(group * number, number)
        for ref, x in zip(results, jax.vmap(function)(*(ref[some] for ref in inputs)), strict=True):
            ref[some] = x

    lax.fori_loop(0, heads // number, body, None)


# --- a call of a kernel ----------------------------------------------------------------------------------------------


def _like(x, shape=None):
    """The type of a result. In shard_map it varies over the mesh as x does."""
    kind = jax.typeof(x)
    # The attribute that says so has two names: before JAX 0.10, and from it on.
    varying = {name: getattr(kind, name) for name in ("vma", "manual_axis_type") if hasattr(kind, name)}
    return jax.ShapeDtypeStruct(x.shape if shape is None else shape, x.dtype, **varying)


def _varies(x):
    """Whether, in shard_map, x varies over an axis of the mesh."""
    kind = jax.typeof(x)
    return bool(kind.vma if hasattr(kind, "vma") else kind.manual_axis_type.varying)


def _call(settings, kernel, in_plain_jax, inputs, results, name, backwards=False):
    """Runs ``kernel`` on a TPU, interpreted on a CPU, and refuses other platforms.

    ``in_plain_jax`` is the same function of one head without Pallas. It runs on a CPU in shard_map, because there
    Pallas' interpreter slices arrays that vary over the mesh at indices that do not, which shard_map refuses.

    Args:
      inputs, results: pairs of a kind and an array or its type. "memory" ``[B, H, K, V]``, "starts"
        ``[B, n, H, K, V]``, "gates" ``[B, n, R, H, C]``, "tokens" ``[B, T, H, ·]``.
    """
    kinds, arrays = zip(*inputs, strict=True)
    out_kinds, out_shapes = zip(*results, strict=True)
    pallas_call = functools.partial(_pallas_call, settings, kernel, inputs, results, name, backwards)
    compiled = pallas_call(interpret=False)
    if _varies(arrays[0]):
        interpreted = _in_plain_jax(settings, in_plain_jax, kinds, out_kinds)
    else:
        interpreted = pallas_call(interpret=True)

    @jax.custom_jvp
    def call(*arrays):
        def refuse(*arrays):
            return tuple(refused(REFUSAL, out_shapes, arrays))

        return lax.platform_dependent(*arrays, tpu=compiled, cpu=interpreted, default=refuse)

    @call.defjvp
    def _(*_):
        raise NotImplementedError('implementation="pallas" has no derivative of its gradient; use implementation="xla"')

    return call(*arrays)


def _pallas_call(settings, kernel, inputs, results, name, backwards, *, interpret):
    """A function that runs the kernel once per chunk of several heads. Memories stay in VMEM for all chunks."""
    (_, heads, *_), (_, num_chunks, *_) = (
        next(x.shape for k, x in inputs if k == kind) for kind in ("memory", "gates")
    )
    per_step = HEADS if heads % HEADS == 0 else heads

    def spec(kind, x):
        def index(row, group, i):
            i = num_chunks - 1 - i if backwards else i
            return {
                "memory": (row, group, 0, 0),
                "starts": (row, i, group, 0, 0),
                "gates": (row, i, 0, group, 0),
                "tokens": (row, i, group, 0),
            }[kind]

        block = {
            "memory": (None, per_step),
            "starts": (None, None, per_step),
            "gates": (None, None, x.shape[2], per_step),
            "tokens": (None, settings.chunk_size, per_step),
        }[kind]
        return pl.BlockSpec((*block, *x.shape[len(block) :]), index)

    def scratch(kind, x):
        """For the gates and the tokens of a step, with the heads first."""
        shape = (x.shape[2], x.shape[4]) if kind == "gates" else (settings.chunk_size, x.shape[3])
        return pltpu.VMEM((per_step, *shape), x.dtype)

    return pl.pallas_call(
        kernel,
        grid=(inputs[0][1].shape[0], heads // per_step, num_chunks),
        in_specs=[spec(*x) for x in inputs],
        out_specs=[spec(*x) for x in results],
        out_shape=[x for _, x in results],
        scratch_shapes=[scratch(*x) for x in (*inputs, *results) if x[0] in ("gates", "tokens")],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
        ),
        interpret=interpret,
        name=name,
    )


def _in_plain_jax(settings, one_head, kinds, out_kinds):
    """``one_head`` mapped over the batch and the heads, of arrays cut into chunks."""
    # The axes of the heads, behind the batch. The axis of the chunks comes next.
    axes = {"memory": 1, "starts": 2, "gates": 3, "tokens": 3}

    def split(kind, x):
        x = _in_chunks(x, settings.chunk_size) if kind == "tokens" else x
        return jnp.moveaxis(x, axes[kind], 1)

    def join(kind, x):
        x = jnp.moveaxis(x, 1, axes[kind])
        return x.reshape(x.shape[0], -1, *x.shape[3:])[:, : settings.length] if kind == "tokens" else x

    mapped = jax.vmap(jax.vmap(one_head))
    return lambda *arrays: tuple(map(join, out_kinds, mapped(*map(split, kinds, arrays))))
