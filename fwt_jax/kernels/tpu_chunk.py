"""One chunk of a key head on a TPU: ``memory.chunk`` in the same letters, for the sum and delta rules.

It is written again because the TPU compiler wants arrays of two axes, masks instead of slices, and products of the
bfloat16 multiplier with a given number of passes. tpu.py maps it over heads by ``jax.vmap``, and differentiates it.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

DEFAULT, HIGH, HIGHEST = lax.Precision.DEFAULT, lax.Precision.HIGH, lax.Precision.HIGHEST
SUBLANES = 8


class ChunkSettings(NamedTuple):
    """The static arguments of a chunk.

    Attributes:
      corrects: see ``rules.Rule``.
      channels: whether every key channel has a decay of its own.
      gates: the names of the rows of the array ``gates``, see ``tpu._gates``.
      precision: of the products.
      length: the number of tokens, T.
      chunk_size: C.
    """

    corrects: bool
    channels: bool
    gates: tuple[str, ...]
    precision: lax.Precision
    length: int
    chunk_size: int


def chunk(settings, fast_weights, gates, query, key, value, log_decay=None):
    """The chunk in float32, of one key head and the r value heads that share it.

    With a decay per head they also share the products of queries and keys.

    Args:
      fast_weights: W_0, ``[r, K, V]``.
      gates: ``[r, 1 to 5, C]``, with the rows of ``settings.gates``.
      query, key: ``[1, C, K]``.
      value: ``[r, C, V]``.
      log_decay: None, or that per key channel ``[r, C, K]``.

    Returns:
      The reads ``[r, C, V]`` and W_C ``[r, K, V]``.
    """
    query, key = (lax.squeeze(x, (0,)) for x in (query, key))
    # Where queries and keys meet the same matrix, one product of both loads it once.
    rows = jnp.concatenate([query, key]) if settings.corrects else query
    scores = None if settings.channels else _dot("nt", settings.precision, rows, key)
    log_decays = [None] * len(value) if log_decay is None else log_decay
    # Unrolled: Pallas has no product of one matrix with several.
    heads = [
        _value_head(settings, rows, key, scores, *head)
        for head in zip(fast_weights, gates, value, log_decays, strict=True)
    ]
    reads, end = zip(*heads, strict=True)
    return jnp.stack(reads), jnp.stack(end)


def _value_head(settings, rows, key, scores, fast_weights, gates, value, log_decay):
    """Its reads ``[C, V]`` and W_C ``[K, V]``.

    rows: queries, and below them keys if the rule corrects; scores: their products with keys, for a decay per head.
    """
    size = len(key)
    gates = {name: gates[i : i + 1] for i, name in enumerate(settings.gates)}
    dot = functools.partial(_dot, precision=settings.precision)
    if log_decay is None:
        decays = _decays_of(gates, size)
        products = decays.times_between(scores)
    else:
        decays = _channel_decays_of(gates, log_decay)
        products = decays.products(rows, key, settings.precision)
    beta = _as_column(gates["beta"])
    recalled = dot("nn", a=decays.scaled(decays.from_start, rows), b=fast_weights)
    b = beta * value
    if settings.corrects:
        overlaps, recalled_by_key = products[size:], recalled[size:]
        if "recall_scale" in gates:
            recall_scale = _as_column(gates["recall_scale"])
            overlaps, recalled_by_key = recall_scale * overlaps, recall_scale * recalled_by_key
        row, column = _indices(size)
        overlaps = jnp.where(row > column, beta * overlaps, 0)
        b = _unit_lower_solve(settings.precision, overlaps, beta * (value - recalled_by_key))
    reads = recalled[:size] + dot("nn", a=products[:size], b=b)
    written = dot("tn", a=decays.scaled(decays.to_end, key), b=b)
    return reads, decays.scaled(decays.of_start, fast_weights) + written


# --- decays ----------------------------------------------------------------------------------------------------------


class _Decays(NamedTuple):
    """``decays.Decays`` within a chunk, for a decay per head. None stands for a factor of 1.

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

    def scaled(self, scale, rows):
        """Each C rows of ``[C or 2C, ...]``, or a memory, times a scale."""
        return rows if scale is None else _repeated(scale, rows) * rows

    def times_between(self, scores):
        """P_ti = D_ti scores_ti for i ≤ t, else 0; for each C rows of ``[C or 2C, C]``."""
        return _repeated(self.between, scores) * scores


class _ChannelDecays(NamedTuple):
    """``decays.Decays`` within a chunk, for a decay per key channel.

    Attributes:
      from_start: D_t0, ``[C, K]``.
      to_end: D_Ti, ``[C, K]``.
      of_start: D_T0, ``[K, 1]``.
      levels: for h = 1, 2, 4, … C/2: the decays from the start of a token's block of h tokens to the token, and from
        the token to the end of the block; both ``[C, K]``. From 8 tokens on, the former only for the tokens of each
        second block, and the latter only for those of the other blocks, ``[C/2, K]``.
    """

    from_start: jax.Array
    to_end: jax.Array
    of_start: jax.Array
    levels: list[tuple[jax.Array, jax.Array]]

    def scaled(self, scale, rows):
        """See ``_Decays``."""
        return _repeated(scale, rows) * rows

    def products(self, rows, columns, precision):
        """P_ti = Σ_c rows_tc columns_ic D_ti,c for i ≤ t, else 0; for each C rows, ``[C or 2C, C]``.

        i and t lie in two neighbouring blocks of h tokens, for one h. With m the last token of i's block, D_ti is
        D_tm D_mi. Both factors are at most 1, so no exponential overflows. Both are products of decays, and lose no
        digits where differences of cumulative logarithms do.
        """
        row, column = _indices(len(columns))
        diagonal = jnp.sum(rows * _repeated(columns, rows), axis=1, keepdims=True)
        products = jnp.where(_repeated(row == column, rows), diagonal, 0)
        for level, (from_start, to_end) in enumerate(self.levels):
            half = 2**level
            if half < SUBLANES:
                block, other = _shifted(row, level), _shifted(column, level)
                neighbours = (block & 1 == 1) & (block - 1 == other)
                product = _dot("nt", precision, self.scaled(from_start, rows), to_end * columns)
                products = jnp.where(_repeated(neighbours, rows), product, products)
            else:
                first, second = _halves(products, half)
                later, earlier = self.scaled(from_start, _halves(rows, half)[1]), to_end * _halves(columns, half)[0]
                product = _dot("nt", precision, later, _joined(earlier, jnp.zeros_like(earlier), half))
                row_of_pair, of_column = (
                    lax.broadcasted_iota(jnp.int32, (len(row) // 2, len(row)), axis) for axis in (0, 1)
                )
                neighbours = 2 * _shifted(row_of_pair, level) == _shifted(of_column, level)
                products = _joined(first, jnp.where(_repeated(neighbours, second), product, second), half)
        return products


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


def _channel_decays_of(gates, log_decay):
    """By doubling blocks: a block's decays are those of its halves, times the decay of the whole other half."""
    alpha = jnp.exp(log_decay)
    if "reset" in gates:
        alpha = jnp.where(_as_column(gates["reset"]) > 0, 0, alpha)
    size, half, levels = len(alpha), 1, []
    from_start, to_end, whole = alpha, jnp.ones_like(alpha), alpha
    row = lax.broadcasted_iota(jnp.int32, alpha.shape, 0)
    while half < min(SUBLANES, size):
        levels.append((from_start, to_end))
        second = row & half != 0
        before, after = (jnp.concatenate([whole[n:], whole[:n]]) for n in (size - half, half))
        other = jnp.where(second, before, after)
        from_start = jnp.where(second, from_start * other, from_start)
        to_end = jnp.where(second, to_end, to_end * other)
        whole, half = whole * other, 2 * half
    while half < size:  # ``whole`` has 8 equal rows for each block
        firsts, seconds = zip(*(_halves(x, half) for x in (from_start, to_end)), strict=True)
        of_first, of_second = _halves(whole, SUBLANES)
        levels.append((seconds[0], firsts[1]))
        from_start = _joined(firsts[0], _by_block(of_first, seconds[0]), half)
        to_end = _joined(_by_block(of_second, firsts[1]), seconds[1], half)
        whole, half = of_first * of_second, 2 * half
    return _ChannelDecays(from_start, to_end, _as_column(whole[:1]), levels)


def _by_block(scale, rows):
    """Each block of ``rows [n·h, K]`` times its 8 rows of ``scale [n·8, K]``."""
    blocks = rows.reshape(len(scale) // SUBLANES, -1, SUBLANES, rows.shape[1])
    return (scale.reshape(len(blocks), 1, *blocks.shape[2:]) * blocks).reshape(rows.shape)


def _halves(x, half):
    """The rows of the first and of the second of each two neighbouring blocks of ``half`` rows."""
    blocks = x.reshape(-1, 2, half, x.shape[1])
    return tuple(part.reshape(-1, x.shape[1]) for part in lax.split(blocks, (1, 1), axis=1))


def _joined(first, second, half):
    """The inverse of ``_halves``."""
    blocks = (x.reshape(-1, 1, half, x.shape[1]) for x in (first, second))
    return jnp.concatenate(list(blocks), axis=1).reshape(-1, first.shape[1])


# --- helpers ---------------------------------------------------------------------------------------------------------


def _repeated(x, rows):
    """x again and again until it has as many rows, if it has more than one."""
    return x if len(x) in (1, len(rows)) else jnp.concatenate([x] * (len(rows) // len(x)))


def _masked(scale, mask):
    return jnp.where(mask, 1.0 if scale is None else scale, 0.0)


def _shifted(x, count):
    """x // 2^count. Pallas lowers // by the kind of TPU, which an export for TPUs in general does not have."""
    return lax.shift_right_logical(x, lax.full_like(x, count))


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


# --- products and the triangular system ------------------------------------------------------------------------------


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
        elif half < SUBLANES:
            inverse -= dot(dot(inverse, corners), inverse)
        else:  # only the lower rows of each pair of blocks change
            blocks = [inverse[i : i + half] for i in range(0, size, half)]
            below = jnp.concatenate(blocks[1::2])
            below -= dot(dot(below, corners), inverse)
            blocks[1::2] = [below[i : i + half] for i in range(0, size // 2, half)]
            inverse = jnp.concatenate(blocks)
        half *= 2
    return inverse
