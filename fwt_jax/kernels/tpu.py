"""The chunkwise form of the sum and delta rules as Pallas kernels for TPU: one forward, and one for its gradient.

Each goes over a head's tokens chunk by chunk with its memory in VMEM, so that nothing but the inputs and the results
moves to and from HBM; and, for the gradient, the memory at the start of each chunk: T/C of them per head, in float32.
The kernel of the gradient takes a chunk forward again from there, then back. Its derivative is what JAX makes of
``_chunk``, which is ``memory.chunk`` for these rules, written for a TPU: two-dimensional arrays, masks and products.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.extend
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.interpreters import mlir

from fwt_jax import memory

DEFAULT, HIGH, HIGHEST = lax.Precision.DEFAULT, lax.Precision.HIGH, lax.Precision.HIGHEST
CHUNK_SIZES = (16, 32, 64, 128)  # 16: the rows of a tile of bfloat16. 128: the width of the multiplier


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
):
    """``chunkwise.chunkwise`` on a TPU, or interpreted, slowly, on CPU.

    FLOPs per token and head for delta, forward: 6KV + C(4K + 4V), and 16C² for the inverse, of three passes at least;
    about three times that for the gradient. 2(K + V) numbers of HBM traffic per token forward.

    Args:
      fast_weights, query, key, value, beta, reset, recall_scale: see ``chunkwise.chunkwise``; float32 or bfloat16
        inputs, a query is needed. K and V are at most 512, and for float32 K·V is at most 256².
      log_decay: None or ``[B, T, H]``.
      rule: "sum" or "delta".
      chunk_size: 16, 32, 64 or 128; None takes 128, or less if T is less.
      precision: of the products: one, three or six passes of the bfloat16 multiplier for "default", "high" and
        "highest". The triangular system takes at least three.

    Returns:
      The reads ``[B, T, H, V]`` in value's dtype and W_T ``[B, H, K, V]``.

    Raises:
      ValueError: anything else, or when it is compiled for another platform than TPU and CPU.
      NotImplementedError, TypeError: for the derivative of a gradient, for forward mode; the plain JAX form has both.
    """
    if rule not in ("sum", "delta") or (log_decay is not None and log_decay.ndim != 3):
        decay = "a decay per key channel" if rule in ("sum", "delta") else f"rule {rule!r}"
        raise ValueError(f'implementation="pallas" has no {decay}; use implementation="xla"')
    dtypes = {x.dtype for x in (query, key, value)} | {fast_weights.dtype}
    if not dtypes <= {jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16)}:
        got = ", ".join(sorted(map(str, dtypes)))
        raise ValueError(f'implementation="pallas" takes float32 and bfloat16, got {got}; use implementation="xla"')
    batch, length, heads, _ = key.shape
    if chunk_size is None:
        chunk_size = next((size for size in CHUNK_SIZES if size >= length), CHUNK_SIZES[-1])
    if chunk_size not in CHUNK_SIZES:
        raise ValueError(
            f'implementation="pallas" takes chunk_size {", ".join(map(str, CHUNK_SIZES))} or None, got {chunk_size}'
        )
    key_size, value_size = fast_weights.shape[2:]
    large = key_size * value_size > 256 * 256
    if max(key_size, value_size) > 512 or (large and jnp.dtype(jnp.float32) in (query.dtype, key.dtype, value.dtype)):
        raise ValueError(
            'implementation="pallas" takes K and V up to 512, and K·V up to 256² for float32, which fit on the chip; '
            f'got K = {key_size}, V = {value_size}; use implementation="xla"'
        )
    num_chunks = -(-length // chunk_size)
    padding = num_chunks * chunk_size - length

    def split(x):
        """[B, T, H, ...] -> [B·H, n, C, ...], filled up with tokens that write nothing."""
        x = jnp.pad(x, ((0, 0), (0, padding), *((0, 0),) * (x.ndim - 2)))
        return jnp.moveaxis(x, 2, 1).reshape(batch * heads, num_chunks, chunk_size, *x.shape[3:])

    rows = {"beta": beta, "recall_scale": recall_scale}
    rows = {name: split(x.astype(jnp.float32)) for name, x in rows.items() if x is not None}
    if log_decay is not None:
        decays = memory.cumulative_log_decay(jnp.moveaxis(split(log_decay.astype(jnp.float32)), -1, 0))
        rows["coarse"], rows["fine"] = (jnp.moveaxis(x, 0, -1) for x in decays)
    if reset is not None:
        reset = jnp.broadcast_to(reset[..., None], beta.shape)
        rows["segment"] = jnp.cumsum(split(reset.astype(jnp.float32)), axis=-1)
    settings = _Settings(rule, tuple(rows), _canonical(precision))
    gates = jnp.stack(list(rows.values()), axis=2)  # [B·H, n, 1 to 5, C]
    start = fast_weights.reshape(batch * heads, *fast_weights.shape[2:])
    inputs = (start, *map(split, (query, key, value)), gates)
    # In shard_map all results vary over the mesh as any of these does, and so must all of them.
    zero = sum(jnp.zeros_like(x[(0,) * x.ndim], jnp.float32) for x in inputs)
    reads, end = _attention(settings, *(x + zero.astype(x.dtype) for x in inputs))
    reads = jnp.moveaxis(reads.reshape(batch, heads, -1, value.shape[-1]), 1, 2)[:, :length]
    return reads, end.reshape(fast_weights.shape)


class _Settings(NamedTuple):
    """What the kernels are compiled for; gates: what is in each row of the argument of that name."""

    rule: str
    gates: tuple[str, ...]
    precision: lax.Precision


def _canonical(precision):
    try:
        return DEFAULT if precision is None else lax.Precision(precision)
    except ValueError as error:
        raise ValueError(
            f'implementation="pallas" takes precision "default", "high" or "highest", got {precision!r}'
        ) from error


# --- the two kernels -------------------------------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(settings, start, query, key, value, gates):
    return _forward(settings, False, start, query, key, value, gates)[:2]


def _attention_forward(settings, start, *inputs):
    reads, end, starts = _forward(settings, True, start, *inputs)
    return (reads, end), (starts, *inputs)


def _forward(settings, keep_starts, start, query, key, value, gates):
    def kernel(start_ref, query_ref, key_ref, value_ref, gates_ref, reads_ref, end_ref, *starts_ref):
        @pl.when(pl.program_id(1) == 0)
        def _():
            end_ref[...] = start_ref[...]

        for head in range(len(query_ref)):
            fast_weights = end_ref[head]
            for ref in starts_ref:
                ref[head] = fast_weights
            inputs = (ref[head] for ref in (query_ref, key_ref, value_ref, gates_ref))
            reads_ref[head], end_ref[head] = advance(fast_weights, *inputs)

    def advance(fast_weights, *tokens):
        reads, end = _chunk(settings, fast_weights, *(x.astype(jnp.float32) for x in tokens))
        return reads.astype(value.dtype), end

    @jax.vmap
    def in_plain_jax(start, *tokens):
        def body(fast_weights, tokens):
            reads, end = advance(fast_weights, *tokens)
            return end, (reads, fast_weights)

        end, (reads, starts) = lax.scan(body, start, tokens)
        return (reads, end, starts) if keep_starts else (reads, end)

    inputs = (start, query, key, value, gates)
    outs = [_shape_like(value), _shape_like(start)]
    if keep_starts:
        outs.append(_shape_like(start, (*key.shape[:2], *start.shape[1:])))
    return _call(kernel, in_plain_jax, inputs, outs, "fast_weight_attention")


def _attention_backward(settings, kept, cotangents):
    def kernel(starts_ref, query_ref, key_ref, value_ref, gates_ref, reads_bar_ref, end_bar_ref, *out_refs):
        start_bar_ref, *token_bar_refs = out_refs

        @pl.when(pl.program_id(1) == 0)
        def _():
            start_bar_ref[...] = end_bar_ref[...]

        for head in range(len(query_ref)):
            inputs = (ref[head] for ref in (starts_ref, query_ref, key_ref, value_ref, gates_ref, reads_bar_ref))
            start_bar_ref[head], *token_bars = back(start_bar_ref[head], *inputs)
            for ref, bar in zip(token_bar_refs, token_bars, strict=True):
                ref[head] = bar

    def back(end_bar, start, *tokens):
        *inputs, reads_bar = (x.astype(jnp.float32) for x in tokens)
        _, pull = jax.vjp(functools.partial(_chunk, settings), start, *inputs)
        start_bar, *bars = pull((reads_bar, end_bar))
        return start_bar, *(bar.astype(x.dtype) for bar, x in zip(bars, tokens[:-1], strict=True))

    @jax.vmap
    def in_plain_jax(starts, query, key, value, gates, reads_bar, end_bar):
        def body(end_bar, tokens):
            start_bar, *token_bars = back(end_bar, *tokens)
            return start_bar, token_bars

        start_bar, token_bars = lax.scan(body, end_bar, (starts, query, key, value, gates, reads_bar), reverse=True)
        return (start_bar, *token_bars)

    outs = [_shape_like(x) for x in (cotangents[1], *kept[1:])]
    inputs = (*kept, *cotangents)
    return _call(kernel, in_plain_jax, inputs, outs, "fast_weight_attention_gradient", backwards=True)


_attention.defvjp(_attention_forward, _attention_backward)


def _shape_like(x, shape=None):
    """In shard_map it varies over the mesh as x does (which has two names, before and from JAX 0.10)."""
    kind = jax.typeof(x)
    varying = {name: getattr(kind, name) for name in ("vma", "manual_axis_type") if hasattr(kind, name)}
    return jax.ShapeDtypeStruct(x.shape if shape is None else shape, x.dtype, **varying)


def _varies(x):
    """Whether x varies over axes of a mesh that shard_map keeps account of."""
    kind = jax.typeof(x)
    return bool(kind.vma if hasattr(kind, "vma") else kind.manual_axis_type.varying)


def _call(kernel, in_plain_jax, inputs, outs, name, backwards=False):
    """Runs a kernel for each chunk of each pair of heads. What has a memory's three axes stays; the rest is cut.

    ``in_plain_jax``: what the kernel does, of inputs, for a CPU where they vary over a mesh.
    """
    heads, num_chunks = inputs[1].shape[:2]
    small = inputs[1].shape[-1] * inputs[3].shape[-1] <= 256 * 256
    together = 2 if small and heads % 2 == 0 else 1  # two keep the multiplier busy while one waits for its result

    def spec(x):
        if x.ndim == 3:
            return pl.BlockSpec((together, *x.shape[1:]), lambda head, i: (head, 0, 0))
        at = (lambda head, i: (head, num_chunks - 1 - i, 0, 0)) if backwards else (lambda head, i: (head, i, 0, 0))
        return pl.BlockSpec((together, None, *x.shape[2:]), at)

    @jax.custom_jvp
    def call(*inputs):
        return lax.platform_dependent(*inputs, tpu=compiled, cpu=interpreted, default=refused)

    @call.defjvp
    def _(*_):
        raise NotImplementedError('implementation="pallas" has no derivative of its gradient; use implementation="xla"')

    def pallas(interpret):
        return pl.pallas_call(
            kernel,
            grid=(heads // together, num_chunks),
            in_specs=[spec(x) for x in inputs],
            out_specs=[spec(x) for x in outs],
            out_shape=outs,
            compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
            interpret=interpret,
            name=name,
        )

    def refused(*inputs):
        # Zero, and like the inputs in what varies over a mesh.
        zero = _for_tpu_alone.bind() + sum(jnp.zeros_like(x[(0,) * x.ndim], jnp.float32) for x in inputs)
        return tuple(jnp.zeros(x.shape, x.dtype) + zero.astype(x.dtype) for x in outs)

    # Pallas' interpreter slices what varies over a mesh at places that do not, which shard_map refuses.
    compiled, interpreted = pallas(interpret=False), in_plain_jax if _varies(inputs[0]) else pallas(interpret=True)
    return call(*inputs)


_for_tpu_alone = jax.extend.core.Primitive("for_tpu_alone")  # a zero that cannot be compiled
_for_tpu_alone.def_abstract_eval(lambda: jax.core.ShapedArray((), jnp.float32))


def _refuse(context):
    platforms = ", ".join(context.module_context.platforms)
    raise ValueError(f'implementation="pallas" is for TPU, got {platforms}; use implementation="xla"')


mlir.register_lowering(_for_tpu_alone, _refuse)


# --- one chunk of one head -------------------------------------------------------------------------------------------


def _chunk(settings, fast_weights, query, key, value, gates):
    """``memory.chunk``: [K, V], [C, K], [C, K], [C, V] and the rows of gates [1 to 5, C] -> reads [C, V], W [K, V]."""
    size, precision = len(key), settings.precision
    row, column = (lax.broadcasted_iota(jnp.int32, (size, size), axis) for axis in (0, 1))
    gates = {name: gates[i : i + 1] for i, name in enumerate(settings.gates)}

    def upright(x):  # [1, C] -> [C, 1]
        return jnp.sum(jnp.where(row == column, x, 0), axis=1, keepdims=True)

    def last(x):  # -> [1, 1]
        return jnp.sum(jnp.where(column[:1] == size - 1, x, 0), axis=1, keepdims=True)

    def scaled(scale, x):
        return x if scale is None else scale * x

    seen, from_start, to_end, over_chunk = row >= column, None, None, None
    decays = jnp.where(seen, 1.0, 0.0)
    if "coarse" in gates:
        parts = gates["coarse"], gates["fine"]  # of the cumulative log decay
        from_start = jnp.exp(sum(upright(x) for x in parts))
        over_chunk = jnp.exp(sum(last(x) for x in parts))
        to_end = jnp.exp(sum(last(x) - upright(x) for x in parts))
        decays = jnp.exp(jnp.where(seen, sum(upright(x) - x for x in parts), -jnp.inf))
    if "segment" in gates:
        segment = gates["segment"]  # how many resets there were since the chunk began

        def mask(x, where):
            return jnp.where(where, 1.0 if x is None else x, 0.0)

        from_start, to_end = mask(from_start, upright(segment) == 0), mask(to_end, upright(segment) == last(segment))
        decays, over_chunk = mask(decays, upright(segment) == segment), mask(over_chunk, last(segment) == 0)

    beta = upright(gates["beta"])
    if settings.rule == "sum":
        writes = beta * value
    else:
        overlaps = jnp.where(row > column, decays * _dot("nt", precision, key, key), 0)
        recalled = _dot("nn", precision, scaled(from_start, key), fast_weights)
        if "recall_scale" in gates:
            scale = upright(gates["recall_scale"])
            overlaps, recalled = scale * overlaps, scale * recalled
        writes = _unit_lower_solve(precision, beta * overlaps, beta * (value - recalled))
    reads = _dot("nn", precision, scaled(from_start, query), fast_weights)
    reads += _dot("nn", precision, decays * _dot("nt", precision, query, key), writes)
    return reads, scaled(over_chunk, fast_weights) + _dot("tn", precision, scaled(to_end, key), writes)


def _product(kind, precision, a, b):
    """A product of two matrices in float32: "n" as they are, "t" transposed; "nt" is A Bᵀ."""
    axes = (((1 if kind[0] == "n" else 0,), (0 if kind[1] == "n" else 1,)), ((), ()))
    options = {"dimension_numbers": axes, "preferred_element_type": jnp.float32}
    if precision == HIGHEST:
        return lax.dot_general(a, b, precision=HIGHEST, **options)
    dot = functools.partial(lax.dot_general, precision=DEFAULT, **options)  # whatever JAX is configured to
    a_high, b_high = a.astype(jnp.bfloat16), b.astype(jnp.bfloat16)
    if precision == DEFAULT:
        return dot(a_high, b_high)
    a_low, b_low = ((x - high.astype(x.dtype)).astype(jnp.bfloat16) for x, high in ((a, a_high), (b, b_high)))
    return dot(a_high, b_high) + (dot(a_high, b_low) + dot(a_low, b_high))


# The products of its derivative have the same precision.
_dot = jax.custom_vjp(_product, nondiff_argnums=(0, 1))


def _dot_backward(kind, precision, kept, bar):
    a, b = kept
    dot = functools.partial(_product, precision=precision)
    if kind == "nn":
        return dot("nt", a=bar, b=b), dot("tn", a=a, b=bar)
    if kind == "nt":
        return dot("nn", a=bar, b=b), dot("tn", a=bar, b=a)
    return dot("nt", a=b, b=bar), dot("nn", a=a, b=bar)


_dot.defvjp(lambda kind, precision, a, b: (_product(kind, precision, a, b), (a, b)), _dot_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _unit_lower_solve(precision, lower, right):
    """(I + L)⁻¹ R for a strictly lower triangular L: ``triangular.unit_lower_solve`` with the whole inverse.

    Its entries cancel where keys are correlated, so that one pass would lose what the delta rule corrects.
    """
    return _product("nn", _at_least_high(precision), _unit_lower_inverse(precision, lower), right)


def _at_least_high(precision):
    return HIGH if precision == DEFAULT else precision


def _unit_lower_solve_forward(precision, lower, right):
    inverse = _unit_lower_inverse(precision, lower)
    solution = _product("nn", _at_least_high(precision), inverse, right)
    return solution, (inverse, solution)


def _unit_lower_solve_backward(precision, kept, bar):
    inverse, solution = kept
    right_bar = _product("tn", _at_least_high(precision), inverse, bar)
    return -_product("nt", _at_least_high(precision), right_bar, solution), right_bar


_unit_lower_solve.defvjp(_unit_lower_solve_forward, _unit_lower_solve_backward)


def _unit_lower_inverse(precision, lower):
    """By doubling, from the inverses of two neighbouring blocks of half the size: see ``triangular._invert``."""
    size, half = len(lower), 1
    row, column = (lax.broadcasted_iota(jnp.int32, lower.shape, axis) for axis in (0, 1))
    dot = functools.partial(_product, "nn", _at_least_high(precision))
    inverse = jnp.where(row == column, 1.0, 0.0)
    while half < size:
        # Shifts, not //: to lower that for a TPU, Pallas asks which one is there, and an export has none.
        block, other = (lax.shift_right_logical(x, lax.full_like(x, half.bit_length() - 1)) for x in (row, column))
        corners = jnp.where((block & 1 == 1) & (block - 1 == other), lower, 0)
        if half == 1:
            inverse -= corners
        elif half < 8:  # the rows of a tile of float32
            inverse -= dot(dot(inverse, corners), inverse)
        else:  # only the lower rows of each pair of blocks change
            blocks = [inverse[i : i + half] for i in range(0, size, half)]
            below = jnp.concatenate(blocks[1::2])
            below -= dot(dot(below, corners), inverse)
            blocks[1::2] = [below[i : i + half] for i in range(0, size // 2, half)]
            inverse = jnp.concatenate(blocks)
        half *= 2
    return inverse
