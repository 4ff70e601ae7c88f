"""The chunkwise form of the sum and delta rules as Pallas kernels for TPU: one forward, and one for its gradient.

Each kernel takes the chunks of a head in sequence and holds the memory in VMEM. Only the inputs and the results move
to and from HBM. For the gradient, the forward kernel also writes the memory at each chunk's start: T/C matrices per
head, in float32. The backward kernel recomputes each chunk from there and applies JAX's derivative of ``_chunk``.

``_chunk`` is ``memory.chunk`` in the same letters. It is written again because the TPU compiler wants arrays of two
axes, masks instead of slices, and products of the bfloat16 multiplier with a given number of passes.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from fwt_jax.decays import cumulative_log_decay
from fwt_jax.kernels.refused import refused, zero_of
from fwt_jax.rules import name_of

DEFAULT, HIGH, HIGHEST = lax.Precision.DEFAULT, lax.Precision.HIGH, lax.Precision.HIGHEST
REFUSAL = 'implementation="pallas" is for TPU, got {platforms}; use implementation="xla"'
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
) -> tuple[Any, jax.Array]:
    """``chunkwise`` of a batch of heads on a TPU. On CPU the kernels are interpreted, which is slow.

    The delta rule takes 6KV + C(4K + 4V) FLOPs per token and head, and 16C² for the inverse, in three passes or more.
    The gradient takes about three times as many. Forward, 2(K + V) numbers per token move to or from HBM.

    Args:
      fast_weights, query, key, value, beta, reset, recall_scale: see ``recurrent.recurrent``; float32 or bfloat16
        inputs, a query is needed. K and V are at most 512, and for float32 K·V is at most 256².
      log_decay: None or ``[B, T, H]``.
      rule: the row of "sum" or "delta", or one with the same write (``Rule.corrects``).
      chunk_size: 16, 32, 64 or 128; None takes 128, or less if T is less.
      precision: of the products: one, three or six passes of the bfloat16 multiplier for "default", "high" and
        "highest". The triangular system takes at least three.

    Returns:
      The reads ``[B, T, H, V]`` in value's dtype and W_T ``[B, H, K, V]``.

    Raises:
      ValueError: another rule, decay, dtype, size, chunk_size or precision; compiled for a platform other than TPU
        and CPU.
      NotImplementedError, TypeError: the derivative of a gradient, forward mode. The plain JAX form has both.
    """
    _check(fast_weights, query, key, value, log_decay, rule)
    batch, length, heads, _ = key.shape
    chunk_size = _chunk_size(chunk_size, length)
    tokens = (_split(x, chunk_size) for x in (query, key, value))
    gates = _gates(beta, recall_scale, log_decay, reset, chunk_size)
    settings = _Settings(rule.corrects, tuple(gates), _canonical(precision))
    start = fast_weights.reshape(batch * heads, *fast_weights.shape[2:])
    inputs = (start, *tokens, jnp.stack(list(gates.values()), axis=2))
    # In shard_map the results vary over every mesh axis that any input varies over. A zero makes the inputs agree.
    zero = zero_of(inputs)
    reads, end = _advance(settings, *(x + zero.astype(x.dtype) for x in inputs))
    reads = jnp.moveaxis(reads.reshape(batch, heads, -1, value.shape[-1]), 1, 2)[:, :length]
    return reads, end.reshape(fast_weights.shape)


# --- the arguments of the kernels ------------------------------------------------------------------------------------


class _Settings(NamedTuple):
    """The static arguments of the kernels.

    Attributes:
      corrects: see ``rules.Rule``.
      gates: the names of the rows of the array ``gates``, see ``_gates``.
      precision: of the products.
    """

    corrects: bool
    gates: tuple[str, ...]
    precision: lax.Precision


def _check(fast_weights, query, key, value, log_decay, rule):
    if rule.corrects is None:
        raise ValueError(f'implementation="pallas" has no rule {name_of(rule)}; use implementation="xla"')
    if log_decay is not None and log_decay.ndim != 3:
        raise ValueError('implementation="pallas" has no decay per key channel; use implementation="xla"')
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


def _split(x, chunk_size):
    """``[B, T, H, ...]`` -> ``[B·H, n, C, ...]``. The last chunk is filled up with tokens that write nothing."""
    batch, length, heads, *sizes = x.shape
    num_chunks = -(-length // chunk_size)
    x = jnp.pad(x, ((0, 0), (0, num_chunks * chunk_size - length), *((0, 0),) * (x.ndim - 2)))
    return jnp.moveaxis(x, 2, 1).reshape(batch * heads, num_chunks, chunk_size, *sizes)


def _gates(beta, recall_scale, log_decay, reset, chunk_size):
    """The arrays with one number per token, ``[B·H, n, C]`` each, in float32, by name.

    "beta" and "recall_scale" are the arguments. "coarse" and "fine" are the two parts of the cumulative log decay.
    "segment" is the number of resets since the chunk began. An argument that is None has no entry.
    """
    arrays = {"beta": beta, "recall_scale": recall_scale}
    gates = {name: _split(x.astype(jnp.float32), chunk_size) for name, x in arrays.items() if x is not None}
    if log_decay is not None:
        by_token = jnp.moveaxis(_split(log_decay.astype(jnp.float32), chunk_size), -1, 0)
        gates["coarse"], gates["fine"] = (jnp.moveaxis(x, 0, -1) for x in cumulative_log_decay(by_token))
    if reset is not None:
        reset = jnp.broadcast_to(reset[..., None], beta.shape)
        gates["segment"] = jnp.cumsum(_split(reset.astype(jnp.float32), chunk_size), axis=-1)
    return gates


# --- the two kernels -------------------------------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _advance(settings, start, query, key, value, gates):
    """Reads ``[B·H, n, C, V]`` and W_T ``[B·H, K, V]``, of all chunks."""
    return _forward(settings, False, start, query, key, value, gates)[:2]


def _advance_forward(settings, start, *inputs):
    reads, end, starts = _forward(settings, True, start, *inputs)
    return (reads, end), (starts, *inputs)


def _forward(settings, keep_starts, start, query, key, value, gates):
    """As ``_advance``; with ``keep_starts`` also the memory at each chunk's start, ``[B·H, n, K, V]``."""

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
    out_shapes = [_shape_like(value), _shape_like(start)]
    if keep_starts:
        out_shapes.append(_shape_like(start, (*key.shape[:2], *start.shape[1:])))
    return _call(kernel, in_plain_jax, inputs, out_shapes, "fast_weight_attention")


def _advance_backward(settings, residuals, cotangents):
    """The chunks in reverse. ``x_grad`` is the gradient of the loss in x."""

    def kernel(starts_ref, query_ref, key_ref, value_ref, gates_ref, reads_grad_ref, end_grad_ref, *out_refs):
        start_grad_ref, *token_grad_refs = out_refs

        @pl.when(pl.program_id(1) == 0)
        def _():
            start_grad_ref[...] = end_grad_ref[...]

        for head in range(len(query_ref)):
            inputs = (ref[head] for ref in (starts_ref, query_ref, key_ref, value_ref, gates_ref, reads_grad_ref))
            start_grad_ref[head], *token_grads = back(start_grad_ref[head], *inputs)
            for ref, token_grad in zip(token_grad_refs, token_grads, strict=True):
                ref[head] = token_grad

    def back(end_grad, start, *tokens):
        *inputs, reads_grad = (x.astype(jnp.float32) for x in tokens)
        _, pull = jax.vjp(functools.partial(_chunk, settings), start, *inputs)
        start_grad, *token_grads = pull((reads_grad, end_grad))
        return start_grad, *(grad.astype(x.dtype) for grad, x in zip(token_grads, tokens[:-1], strict=True))

    @jax.vmap
    def in_plain_jax(starts, query, key, value, gates, reads_grad, end_grad):
        def body(end_grad, tokens):
            start_grad, *token_grads = back(end_grad, *tokens)
            return start_grad, token_grads

        tokens = (starts, query, key, value, gates, reads_grad)
        start_grad, token_grads = lax.scan(body, end_grad, tokens, reverse=True)
        return (start_grad, *token_grads)

    out_shapes = [_shape_like(x) for x in (cotangents[1], *residuals[1:])]
    inputs = (*residuals, *cotangents)
    return _call(kernel, in_plain_jax, inputs, out_shapes, "fast_weight_attention_gradient", backwards=True)


_advance.defvjp(_advance_forward, _advance_backward)


def _shape_like(x, shape=None):
    """The type of a result. In shard_map it varies over the mesh as x does."""
    kind = jax.typeof(x)
    # The attribute that says so has two names: before JAX 0.10, and from it on.
    varying = {name: getattr(kind, name) for name in ("vma", "manual_axis_type") if hasattr(kind, name)}
    return jax.ShapeDtypeStruct(x.shape if shape is None else shape, x.dtype, **varying)


def _varies(x):
    """Whether, in shard_map, x varies over an axis of the mesh."""
    kind = jax.typeof(x)
    return bool(kind.vma if hasattr(kind, "vma") else kind.manual_axis_type.varying)


def _call(kernel, in_plain_jax, inputs, out_shapes, name, backwards=False):
    """Runs ``kernel`` on a TPU, interpreted on a CPU, and refuses other platforms.

    ``in_plain_jax`` is the same function of the inputs without Pallas. It runs on a CPU in shard_map, because there
    Pallas' interpreter slices arrays that vary over the mesh at indices that do not, which shard_map refuses.
    """
    pallas_call = functools.partial(_pallas_call, kernel, inputs, out_shapes, name, backwards)
    compiled = pallas_call(interpret=False)
    interpreted = in_plain_jax if _varies(inputs[0]) else pallas_call(interpret=True)

    @jax.custom_jvp
    def call(*inputs):
        def refuse(*inputs):
            return tuple(refused(REFUSAL, out_shapes, inputs))

        return lax.platform_dependent(*inputs, tpu=compiled, cpu=interpreted, default=refuse)

    @call.defjvp
    def _(*_):
        raise NotImplementedError('implementation="pallas" has no derivative of its gradient; use implementation="xla"')

    return call(*inputs)


def _pallas_call(kernel, inputs, out_shapes, name, backwards, *, interpret):
    """A function that runs the kernel once per chunk, and once per pair of heads where pairs fit.

    Arrays of three axes (memories) stay in VMEM for all chunks of a head; those of four axes are cut into chunks.
    """
    heads, num_chunks = inputs[1].shape[:2]
    small = inputs[1].shape[-1] * inputs[3].shape[-1] <= 256 * 256
    heads_per_step = 2 if small and heads % 2 == 0 else 1  # two keep the multiplier busy while one waits for its result

    def spec(x):
        if x.ndim == 3:
            return pl.BlockSpec((heads_per_step, *x.shape[1:]), lambda head, i: (head, 0, 0))
        block = (heads_per_step, None, *x.shape[2:])
        return pl.BlockSpec(block, lambda head, i: (head, num_chunks - 1 - i if backwards else i, 0, 0))

    return pl.pallas_call(
        kernel,
        grid=(heads // heads_per_step, num_chunks),
        in_specs=[spec(x) for x in inputs],
        out_specs=[spec(x) for x in out_shapes],
        out_shape=out_shapes,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        interpret=interpret,
        name=name,
    )


# --- one chunk of one head -------------------------------------------------------------------------------------------


def _chunk(settings, fast_weights, query, key, value, gates):
    """``memory.chunk`` of one head, in float32.

    Args:
      fast_weights: W_0, ``[K, V]``.
      query, key: ``[C, K]``.
      value: ``[C, V]``.
      gates: ``[1 to 5, C]``, with the rows of ``settings.gates``.

    Returns:
      The reads ``[C, V]`` and W_C ``[K, V]``.
    """
    gates = {name: gates[i : i + 1] for i, name in enumerate(settings.gates)}
    precision = settings.precision
    decays = _decays_of(gates, len(key))
    a, b = key, _as_column(gates["beta"]) * value
    if settings.corrects:
        b = _delta_b(precision, fast_weights, key, value, gates, decays)
    scores = decays.between * _dot("nt", precision, query, a)
    reads = _dot("nn", precision, _scaled(decays.from_start, query), fast_weights)
    reads += _dot("nn", precision, scores, b)
    written = _dot("tn", precision, _scaled(decays.to_end, a), b)
    return reads, _scaled(decays.of_start, fast_weights) + written


def _delta_b(precision, fast_weights, key, value, gates, decays):
    """b of ``memory.delta_writes``, ``[C, V]``."""
    row, column = _indices(len(key))
    beta = _as_column(gates["beta"])
    overlaps = jnp.where(row > column, decays.between * _dot("nt", precision, key, key), 0)
    recalled = _dot("nn", precision, _scaled(decays.from_start, key), fast_weights)
    if "recall_scale" in gates:
        recall_scale = _as_column(gates["recall_scale"])
        overlaps, recalled = recall_scale * overlaps, recall_scale * recalled
    return _unit_lower_solve(precision, beta * overlaps, beta * (value - recalled))


class _Decays(NamedTuple):
    """``decays.Decays`` within a chunk. None stands for a factor of 1.

    Attributes:
      from_start: D_t0, ``[C, 1]`` or None.
      to_end: D_Ti, ``[C, 1]`` or None.
      of_start: D_T0, ``[1, 1]`` or None.
      between: D_ti for i ≤ t, else 0; ``[C, C]``.
    """

    from_start: jax.Array | None
    to_end: jax.Array | None
    of_start: jax.Array | None
    between: jax.Array


def _decays_of(gates, size):
    row, column = _indices(size)
    causal = row >= column
    from_start = to_end = of_start = None
    between = jnp.where(causal, 1.0, 0.0)
    if "coarse" in gates:
        log_alpha = gates["coarse"], gates["fine"]
        from_start = jnp.exp(sum(_as_column(x) for x in log_alpha))
        of_start = jnp.exp(sum(_last(x) for x in log_alpha))
        to_end = jnp.exp(sum(_last(x) - _as_column(x) for x in log_alpha))
        between = jnp.exp(jnp.where(causal, sum(_as_column(x) - x for x in log_alpha), -jnp.inf))
    if "segment" in gates:
        segment, last_segment = gates["segment"], _last(gates["segment"])
        row_segment = _as_column(segment)
        from_start, of_start = _masked(from_start, row_segment == 0), _masked(of_start, last_segment == 0)
        to_end, between = _masked(to_end, row_segment == last_segment), _masked(between, row_segment == segment)
    return _Decays(from_start, to_end, of_start, between)


def _scaled(scale, x):
    return x if scale is None else scale * x


def _masked(scale, mask):
    return jnp.where(mask, 1.0 if scale is None else scale, 0.0)


def _indices(size):
    """The row and the column of each entry of a matrix ``[size, size]``."""
    return tuple(lax.broadcasted_iota(jnp.int32, (size, size), axis) for axis in (0, 1))


def _as_column(x):
    """``[1, C]`` -> ``[C, 1]``, by a mask and a sum."""
    row, column = _indices(x.shape[1])
    return jnp.sum(jnp.where(row == column, x, 0), axis=1, keepdims=True)


def _last(x):
    """The last entry of ``[1, C]``, ``[1, 1]``, by a mask and a sum."""
    column = lax.broadcasted_iota(jnp.int32, x.shape, 1)
    return jnp.sum(jnp.where(column == x.shape[1] - 1, x, 0), axis=1, keepdims=True)


# --- its products and its triangular system --------------------------------------------------------------------------


def _product(kind, precision, a, b):
    """A product of two matrices in float32. kind: "n" as it is or "t" transposed, for each; "nt" is A Bᵀ."""
    axes = (((1 if kind[0] == "n" else 0,), (0 if kind[1] == "n" else 1,)), ((), ()))
    dot = functools.partial(lax.dot_general, dimension_numbers=axes, preferred_element_type=jnp.float32)
    if precision == HIGHEST:
        return dot(a, b, precision=HIGHEST)
    dot = functools.partial(dot, precision=DEFAULT)  # explicit, because None follows JAX's configuration
    a_high, b_high = a.astype(jnp.bfloat16), b.astype(jnp.bfloat16)
    if precision == DEFAULT:
        return dot(a_high, b_high)
    a_low, b_low = ((x - high.astype(x.dtype)).astype(jnp.bfloat16) for x, high in ((a, a_high), (b, b_high)))
    return dot(a_high, b_high) + (dot(a_high, b_low) + dot(a_low, b_high))


# A product whose derivative has products of the same precision.
_dot = jax.custom_vjp(_product, nondiff_argnums=(0, 1))


def _dot_forward(kind, precision, a, b):
    return _product(kind, precision, a, b), (a, b)


def _dot_backward(kind, precision, residuals, cotangent):
    a, b = residuals
    product = functools.partial(_product, precision=precision)
    if kind == "nn":
        return product("nt", a=cotangent, b=b), product("tn", a=a, b=cotangent)
    if kind == "nt":
        return product("nn", a=cotangent, b=b), product("tn", a=cotangent, b=a)
    return product("nt", a=b, b=cotangent), product("nn", a=a, b=cotangent)


_dot.defvjp(_dot_forward, _dot_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _unit_lower_solve(precision, lower, right):
    """(I + L)⁻¹ R for a strictly lower triangular L: ``triangular.unit_lower_solve`` with the whole inverse.

    The entries of the inverse cancel if keys are correlated. So its products take at least three passes: one pass
    would lose the correction of the delta rule.
    """
    return _unit_lower_solve_forward(precision, lower, right)[0]


def _unit_lower_solve_forward(precision, lower, right):
    precision = _at_least_high(precision)
    inverse = _unit_lower_inverse(precision, lower)
    solution = _product("nn", precision, inverse, right)
    return solution, (inverse, solution)


def _unit_lower_solve_backward(precision, residuals, cotangent):
    precision = _at_least_high(precision)
    inverse, solution = residuals
    right_grad = _product("tn", precision, inverse, cotangent)
    return -_product("nt", precision, right_grad, solution), right_grad


_unit_lower_solve.defvjp(_unit_lower_solve_forward, _unit_lower_solve_backward)


def _at_least_high(precision):
    return HIGH if precision == DEFAULT else precision


def _unit_lower_inverse(precision, lower):
    """(I + L)⁻¹, by doubling: from the inverses of two neighbouring blocks of half the size, see ``triangular``."""
    size, half = len(lower), 1
    row, column = _indices(size)
    dot = functools.partial(_product, "nn", precision)
    inverse = jnp.where(row == column, 1.0, 0.0)
    while half < size:
        # Shifts, not //: Pallas lowers // by the kind of TPU, which an export for TPUs in general does not have.
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
