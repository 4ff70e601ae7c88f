"""The fast weight memory: one head, one sequence. Everything else in the library is this file, made fast or batched.

The memory of a head is a matrix W, ``[K, V]`` (K key features, V value size; the paper writes its transpose).
Each token decays it, writes one outer product, and reads it:

    sum      W_t = α_t W_{t−1} + β_t k_t v_tᵀ                          Katharopoulos et al. 2020
    delta    W_t = α_t W_{t−1} + β_t k_t (v_t − v̄_t)ᵀ                  Schlag, Irie & Schmidhuber 2021, eq. 24
             v̄_t = (α_t W_{t−1})ᵀ k_t                                  eq. 20
    fwm      delta, then W_t / max(1, ‖W_t‖_F)                         Schlag, Munkhdalai & Schmidhuber 2021
    read     y_t = W_tᵀ q_t, after the write                           eq. 25

α_t = exp(log_decay_t) is a scalar (gated delta rule, Yang et al. 2025) or one number per key channel (Kimi Delta
Attention 2025); without it α_t = 1. ``reset_t`` drops the memory before token t, exactly.

``recurrent`` is a scan of the step and the definition; ``chunk`` advances the memory by many tokens at once; both give
the same numbers up to rounding. Shapes, for all functions of this file:

    query, key  [T, K]     value  [T, V]     beta  [T]     log_decay  None, [T] or [T, K]     reset  None or bool [T]

Everything is computed in the dtype of ``fast_weights``: float32, or float64.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Rule = Literal["sum", "delta", "fwm"]
HIGHEST = lax.Precision.HIGHEST


class Memory(NamedTuple):
    """What a fast weight layer remembers; the size does not depend on how much was read.

    Attributes:
      fast_weights: W, ``[..., K, V]``, float32 (float64 for float64 inputs).
      key_sum: z = Σφ(k) of attention normalisation (eq. 26), ``[..., K]``, same dtype. It is a sum-ruled memory
        whose values are ones, and decays and resets with W. Only calls that normalise advance it.
    """

    fast_weights: jax.Array
    key_sum: jax.Array


# --- one step --------------------------------------------------------------------------------------------------------


def sum_step(fast_weights, key, value, beta, decay=None):
    """W ← α W + β k vᵀ (eq. 17). key ``[K]``, value ``[V]``, beta ``[]``, decay None, ``[]`` or ``[K]``. 2KV FLOPs."""
    fast_weights = _decayed(fast_weights, decay)
    return fast_weights + beta * jnp.outer(key, value)


def delta_step(fast_weights, key, value, beta, decay=None):
    """W ← α W, then W ← W + β k (v − Wᵀk)ᵀ (eq. 20, 24). Arguments as in ``sum_step``. 4KV FLOPs."""
    fast_weights = _decayed(fast_weights, decay)
    recalled = jnp.matmul(key, fast_weights, precision=HIGHEST)
    return fast_weights + beta * jnp.outer(key, value - recalled)


def fwm_step(fast_weights, key, value, beta, decay=None):
    """The delta step, then W ← W / max(1, ‖W‖_F); gradients flow through the norm. Arguments as in ``sum_step``."""
    fast_weights = delta_step(fast_weights, key, value, beta, decay)
    return fast_weights * lax.rsqrt(jnp.maximum(1, jnp.sum(jnp.square(fast_weights))))


_STEPS = {"sum": sum_step, "delta": delta_step, "fwm": fwm_step}


def _decayed(fast_weights, decay):
    if decay is None:
        return fast_weights
    return (decay if decay.ndim == 0 else decay[:, None]) * fast_weights


def recurrent(fast_weights, query, key, value, beta, log_decay=None, reset=None, *, rule: Rule):
    """The definition: a scan of the step of ``rule`` over T tokens.

    The gradient keeps about 2√T memories, not T: the scan is nested, and the inner one is recomputed. Cost: 2KV (sum)
    or 4KV (delta, fwm) FLOPs per token for the write and 2KV for the read, T steps in sequence.

    Args:
      fast_weights: W_0, ``[K, V]``.
      query, key, value, beta, log_decay, reset: see the head of this file.
      rule: "sum", "delta" or "fwm".

    Returns:
      The reads y ``[T, V]`` and W_T ``[K, V]``.
    """
    _check_shapes(fast_weights, query, key, value, beta, log_decay, reset)
    step = _STEPS[rule]

    def body(fast_weights, inputs):
        query, key, value, beta, log_decay, reset = inputs
        if reset is not None:
            fast_weights = jnp.where(reset, 0, fast_weights)
        decay = None if log_decay is None else jnp.exp(log_decay)
        fast_weights = step(fast_weights, key, value, beta, decay)
        return fast_weights, jnp.matmul(query, fast_weights, precision=HIGHEST)

    length = key.shape[0]
    block = max(1, int(length**0.5))
    inputs = (query, key, value, beta, log_decay, reset)
    blocks = jax.tree.map(lambda x: x[: length // block * block].reshape(-1, block, *x.shape[1:]), inputs)
    rest = jax.tree.map(lambda x: x[length // block * block :], inputs)
    fast_weights, reads = lax.scan(
        jax.checkpoint(lambda w, x: lax.scan(body, w, x), prevent_cse=False), fast_weights, blocks
    )
    fast_weights, last_reads = lax.scan(body, fast_weights, rest)
    return jnp.concatenate([reads.reshape(-1, value.shape[-1]), last_reads]), fast_weights


# --- many steps at once ----------------------------------------------------------------------------------------------


def chunk(fast_weights, query, key, value, beta, log_decay=None, reset=None, *, rule: Rule, precision=HIGHEST):
    """T steps at once (Yang et al. 2024; with decay, Yang et al. 2025), for T of the order of K.

    With D_ti = α_{i+1} ⋯ α_t, the decay from token i to token t, every token's write u_i solves

        sum      u_t = β_t v_t
        delta    u_t = β_t (v_t − D_t0 W_0ᵀk_t − Σ_{i<t} D_ti (k_tᵀk_i) u_i)
        fwm      the same, with what clips did to W_0 and to each write since it was made: see ``_fwm_writes``

    and then  y_t = D_t0 W_0ᵀq_t + Σ_{i≤t} D_ti (q_tᵀk_i) u_i  and  W_T = D_T0 W_0 + Σ_i D_Ti k_i u_iᵀ.
    For delta the system is unit lower triangular and is inverted by ``unit_lower_inverse``.

    Cost for T tokens: 2T²(K+V) + 6TKV FLOPs for delta, and the inverse, O(T³); T² numbers of memory, which a decay per
    channel raises to T²K unless the compiler fuses the sum.

    Args:
      fast_weights: W_0, ``[K, V]``.
      query, key, value, beta, log_decay, reset: see the head of this file; without a query nothing is read.
      rule: "sum", "delta" or "fwm"; a decay per channel is not defined for "fwm" here, use ``recurrent``.
      precision: of the matrix products, as in ``jax.lax``.

    Returns:
      The reads y ``[T, V]``, or None, and W_T ``[K, V]``.
    """
    clip = start_clip(fast_weights) if rule == "fwm" else None
    reads, transposed, clip = advance(
        fast_weights.T, clip, query, key, value, beta, log_decay, reset, rule=rule, precision=precision
    )
    return reads, end_clip(transposed.T, clip)


class Clip(NamedTuple):
    """What a memory of the fwm rule is carried with from chunk to chunk: W = scale · M, and norm is ‖W‖²_F."""

    scale: jax.Array
    norm: jax.Array


def start_clip(fast_weights):
    """M = W."""
    norm = jnp.sum(jnp.square(fast_weights))
    return Clip(jnp.ones_like(norm), norm)


def end_clip(fast_weights, clip):
    """W of M, and of other rules' W."""
    return fast_weights if clip is None else clip.scale * fast_weights


def advance(transposed, clip, query, key, value, beta, log_decay, reset, *, rule: Rule, precision):
    """``chunk`` as a step from chunk to chunk: for "fwm" it takes and returns Mᵀ and a ``Clip``, else Wᵀ and None.

    Wᵀ, ``[V, K]``, because then the gradient of each product with it comes out in the order it is kept in.

    M goes from chunk to chunk with a scale of 1: to multiply it by the scale's *value*, which has no gradient, changes
    neither W nor its gradient, and spares a product with a [K, V] matrix on the way back.
    """
    _check_shapes(transposed.T, query, key, value, beta, log_decay, reset)
    length = key.shape[0]
    matmul = lambda a, b: jnp.matmul(a, b, precision=precision)  # noqa: E731
    resets = jnp.zeros(length, jnp.int32) if reset is None else jnp.cumsum(reset)
    sees_start, reaches_end = resets == 0, resets == resets[-1]
    causal = jnp.tri(length, dtype=bool) & (resets[:, None] == resets[None])
    log_alpha = jnp.zeros((length, 1), key.dtype)
    if log_decay is not None:
        # What follows a large number in a cumulative sum loses its digits: less than e⁻⁶⁴ is nothing in float32.
        least = -64 if key.dtype == jnp.float32 else -512
        log_alpha = jnp.cumsum(jnp.maximum(log_decay, least).reshape(length, -1), axis=0)

    from_start = jnp.where(sees_start[:, None], jnp.exp(log_alpha), 0)
    if rule == "sum":
        writes = beta[None] * value.T
    else:
        recalled = matmul(transposed, (key * from_start).T)
        overlaps = _decayed_products(key, key, log_alpha, causal & ~jnp.eye(length, dtype=bool), precision)
        if rule == "delta":
            inverse = unit_lower_inverse(beta[:, None] * overlaps)
            writes = matmul(beta[None] * (value.T - recalled), inverse.T)
        else:
            decay = jnp.ones(length, key.dtype) if log_decay is None else jnp.exp(log_decay)
            decay = decay if reset is None else jnp.where(reset, 0, decay)
            writes, kept, kept_start, norm = _fwm_writes(clip, value, beta, key, recalled, overlaps, decay, reset)

    reads = None
    if query is not None:
        scores = _decayed_products(query, key, log_alpha, causal, precision)
        if rule == "fwm":
            query, scores = kept_start[:, None] * query, kept * scores
        reads = (matmul(transposed, (query * from_start).T) + matmul(writes, scores.T)).T
    if log_decay is not None or reset is not None:
        transposed = from_start[-1:] * transposed
    to_end = jnp.where(reaches_end[:, None], jnp.exp(log_alpha[-1:] - log_alpha), 0)
    if rule == "fwm":
        value = lax.stop_gradient(kept_start[-1])
        scale = jnp.where(value > 0, kept_start[-1] / jnp.where(value > 0, value, 1), 1)
        transposed, to_end, clip = value * transposed, kept[-1][:, None] / scale * to_end, Clip(scale, norm)
    return reads, transposed + matmul(writes, key * to_end), clip


def parallel(fast_weights, query, key, value, beta, log_decay=None, reset=None, *, rule: Rule, precision=HIGHEST):
    """One chunk of length T, the "attention" form: O(T²(K+V)), and for delta O(T³). For short T and for tests.

    Arguments and results are those of ``chunk``; ``rule`` is "sum" or "delta".
    """
    return chunk(fast_weights, query, key, value, beta, log_decay, reset, rule=rule, precision=precision)


def _decayed_products(left, key, log_alpha, mask, precision):
    """P_ti = Σ_c left_tc key_ic exp(g_tc − g_ic) where mask_ti, else 0; g ``[T, 1]`` or ``[T, K]`` is cumulative."""
    if log_alpha.shape[1] == 1:
        products = jnp.matmul(left, key.T, precision=precision)
        return products * jnp.exp(jnp.where(mask, log_alpha - log_alpha.T, -jnp.inf))
    exponents = jnp.where(mask[:, :, None], log_alpha[:, None] - log_alpha[None], -jnp.inf)
    return jnp.sum(left[:, None] * key[None] * jnp.exp(exponents), axis=-1)


def _fwm_writes(clip, value, beta, key, recalled, overlaps, decay, reset):
    """The fwm rule without a [K, V] matrix: writes ``[V, T]``, what clips leave of them and of M_0, ‖W_T‖².

    A clip is a decay that follows from what was written. ``kept[t, i]`` is what the clips of tokens i … t leave of
    write i, ``[T, T]``, ``kept_start[t]`` what they leave of M_0, and the norm that is clipped next is, for a write u_t
    to what recalled m_t,

        ‖α_t W_{t−1} + k_t u_tᵀ‖² = α_t²‖W_{t−1}‖² + u_tᵀ(2 m_t + ‖k_t‖² u_t).
    """
    # The compiler would fuse each of these into all that follow, and compute it again there.
    once = lax.optimization_barrier
    rows = lambda x: [jnp.squeeze(row, 0) for row in jnp.split(x, len(x))]  # noqa: E731  (transposes to one concatenation)
    key_norms = rows(jnp.sum(jnp.square(key), axis=-1))
    start, shares, norm, writes, kept, kept_start = clip.scale, [], clip.norm, [], [], []
    for t, (overlap, found, value_t, beta_t, decay_t) in enumerate(
        zip(map(rows, rows(overlaps)), rows(once(recalled.T)), rows(value), rows(beta), rows(decay), strict=True)
    ):
        start = start if reset is None else jnp.where(reset[t], 1, start)
        found = once(sum((overlap[i] * shares[i] * writes[i] for i in range(t)), start * found))
        write = once(beta_t * (value_t - found))
        norm = jnp.square(decay_t) * norm + jnp.sum(write * (2 * found + key_norms[t] * write))
        share = once(lax.rsqrt(jnp.maximum(1, norm)))
        norm, start, shares = jnp.minimum(1, norm), start * share, [share * x for x in shares] + [share]
        writes.append(write)
        kept.append(jnp.stack(shares + [jnp.zeros_like(share)] * (len(key) - t - 1)))
        kept_start.append(start)
    return jnp.stack(writes, axis=1), jnp.stack(kept), jnp.stack(kept_start), norm


def unit_lower_inverse(lower: jax.Array) -> jax.Array:
    """(I + L)⁻¹ for the strictly lower triangular part of a matrix, by products alone.

    From the inverses X, Y of two neighbouring diagonal blocks comes the inverse of both, of twice the size:

        [[X, 0], [C, Y]]⁻¹ = [[X⁻¹, 0], [−Y⁻¹ C X⁻¹, Y⁻¹]].

    Up to blocks of 16 all pairs C of a size are one masked matrix, in few and large products; from there on block by
    block. No power of L appears, so nothing is lost for correlated keys (powers of L lose all digits of a whole chunk).
    A triangular solve is sequential on TPU and slow on CPU.

    Args:
      lower: ``[T, T]``, float32 or float64; what lies on or above the diagonal is taken as zero.

    Returns:
      ``[T, T]``, unit lower triangular.
    """
    return jnp.ones_like(lower) if len(lower) == 1 else _unit_lower_inverse(lower)


@jax.custom_jvp
def _unit_lower_inverse(lower):
    length = lower.shape[-1]
    size = 1
    while size < min(length, 16):
        size *= 2
    padded = size
    while padded < length:
        padded *= 2
    matmul = lambda a, b: jnp.matmul(a, b, precision=HIGHEST)  # noqa: E731
    lower = jnp.pad(lower, (0, padded - length))

    def blocks(size, row, column):
        """The [row, column] block, of ``size``, of each diagonal pair of blocks."""
        pairs = padded // size // 2
        split = lower.reshape(pairs, 2, size, pairs, 2, size)
        return jnp.stack([split[i, row, :, i, column] for i in range(pairs)])

    def invert(diagonal):
        """One diagonal block, ``[size, size]``."""
        inverse, half = jnp.eye(size, dtype=lower.dtype), 1
        while half < size:
            block = np.arange(size) // half
            is_corner = (block[:, None] % 2 == 1) & (block[:, None] - 1 == block[None])
            corners = jnp.where(is_corner, diagonal, 0)
            inverse = inverse - (corners if half == 1 else matmul(matmul(inverse, corners), inverse))
            half *= 2
        return inverse

    diagonal = lower.reshape(padded // size, size, padded // size, size)
    inverse = jnp.stack([invert(diagonal[i, :, i]) for i in range(padded // size)])
    while size < padded:
        first, second = inverse[0::2], inverse[1::2]
        corner = -matmul(matmul(second, blocks(size, 1, 0)), first)
        top = jnp.concatenate([first, jnp.zeros_like(first)], axis=-1)
        inverse = jnp.concatenate([top, jnp.concatenate([corner, second], axis=-1)], axis=-2)
        size *= 2
    return inverse[0, :length, :length]


@_unit_lower_inverse.defjvp
def _unit_lower_inverse_jvp(primals, tangents):
    inverse = _unit_lower_inverse(*primals)
    tangent = jnp.matmul(inverse, jnp.tril(*tangents, -1), precision=HIGHEST)
    return inverse, -jnp.matmul(tangent, inverse, precision=HIGHEST)


# --- what else one may ask of a memory -------------------------------------------------------------------------------


def read_weights(query, key, beta, log_decay=None, reset=None, *, rule: Rule):
    """What a read after the last write takes of each value: w with W_Tᵀq = Σ_t w_t v_t + W_0ᵀr, without forming W.

    The recurrence is run backwards on the query: w_t = β_t k_tᵀr,  then  r ← α_t (r − w_t k_t) for delta and r ← α_t r
    for sum, from r = q. O(TK), where advancing the memory costs O(TKV). These are the "attention weights" of a
    fast weight memory: for sum βkᵀq, for delta less what later keys have overwritten.

    Args:
      query: ``[K]``, the one read.
      key, beta, log_decay, reset: see the head of this file.
      rule: "sum" or "delta" (fwm is not linear in its values).

    Returns:
      The weights w ``[T]`` and r ``[K]``, what of the query reaches the initial memory.

    Raises:
      ValueError: another rule.
    """
    if rule not in ("sum", "delta"):
        raise ValueError(
            f'read_weights is for rule "sum" or "delta", whose reads are linear in the values, got {rule!r}'
        )
    if rule == "sum" and log_decay is None and reset is None:
        return beta * jnp.matmul(key, query, precision=HIGHEST), query

    def body(query, inputs):
        key, beta, log_decay, reset = inputs
        weight = beta * jnp.dot(key, query, precision=HIGHEST)
        if rule == "delta":
            query = query - weight * key
        if log_decay is not None:
            query = jnp.exp(log_decay) * query
        if reset is not None:
            query = jnp.where(reset, 0, query)
        return query, weight

    query, weights = lax.scan(body, query, (key, beta, log_decay, reset), reverse=True)
    return weights, query


def key_sums(key_sum, key, log_decay=None, reset=None):
    """Running key sums of attention normalisation (eq. 26): z_t = α_t z_{t−1} + k_t, before and after each token.

    Args:
      key_sum: z_0, ``[K]``.
      key, log_decay, reset: see the head of this file.

    Returns:
      α_t z_{t−1} (what token t finds) and z_t (what it leaves), both ``[T, K]``.
    """
    decay = jnp.ones((len(key), 1), key.dtype) if log_decay is None else jnp.exp(log_decay.reshape(len(key), -1))
    decay = decay if reset is None else jnp.where(reset[:, None], 0, decay)

    def combine(first, second):
        return first[0] * second[0], second[0] * first[1] + second[1]

    decays, sums = lax.associative_scan(combine, (decay, key))
    after = decays * key_sum[None] + sums
    before = decay * jnp.concatenate([key_sum[None], after[:-1]])
    return before, after


def _check_shapes(fast_weights, query, key, value, beta, log_decay, reset):
    length, key_size, value_size = *key.shape, value.shape[-1]
    chex.assert_shape(fast_weights, (key_size, value_size))
    chex.assert_shape(key if query is None else [query, key], (length, key_size))
    chex.assert_shape(value, (length, value_size))
    chex.assert_shape(beta, (length,))
    if log_decay is not None and log_decay.shape != (length,):
        chex.assert_shape(log_decay, (length, key_size))
    if reset is not None:
        chex.assert_shape(reset, (length,))
