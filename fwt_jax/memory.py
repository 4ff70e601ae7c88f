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
    recall_scale  None or [T]: what the delta rule recalls, v̄_t, is multiplied by it (attention normalisation, eq. 27)

Everything is computed in the dtype of ``fast_weights``: float32, or float64.
"""

from __future__ import annotations

import functools
from typing import Literal, NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from fwt_jax.triangular import unit_lower_inverse, unit_lower_solve

Rule = Literal["sum", "delta", "fwm"]
HIGHEST = lax.Precision.HIGHEST
KEPT = jax.checkpoint_policies.save_only_these_names("fwm")  # what is found token by token and not to be found again


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


def delta_step(fast_weights, key, value, beta, decay=None, recall_scale=None):
    """W ← α W, then W ← W + β k (v − r Wᵀk)ᵀ (eq. 20, 24; r = 1, or 1/(zᵀk + eps) in eq. 27). 4KV FLOPs.

    Arguments as in ``sum_step``; recall_scale: r, None or ``[]``.
    """
    fast_weights = _decayed(fast_weights, decay)
    recalled = jnp.matmul(key, fast_weights, precision=HIGHEST)
    if recall_scale is not None:
        recalled = recall_scale * recalled
    return fast_weights + beta * jnp.outer(key, value - recalled)


def fwm_step(fast_weights, key, value, beta, decay=None):
    """The delta step, then W ← W / max(1, ‖W‖_F); gradients flow through the norm. Arguments as in ``sum_step``."""
    fast_weights = delta_step(fast_weights, key, value, beta, decay)
    return fast_weights * lax.rsqrt(jnp.maximum(1, jnp.sum(jnp.square(fast_weights))))


_STEPS = {"sum": sum_step, "delta": delta_step, "fwm": fwm_step}


def _check_rule(rule, known=tuple(_STEPS)):
    if rule not in known:
        raise ValueError(f"rule must be one of {', '.join(map(repr, known))} here, got {rule!r}")


def _decayed(fast_weights, decay):
    if decay is None:
        return fast_weights
    return (decay if decay.ndim == 0 else decay[:, None]) * fast_weights


def recurrent(fast_weights, query, key, value, beta, log_decay=None, reset=None, recall_scale=None, *, rule: Rule):
    """The definition: a scan of the step of ``rule`` over T tokens.

    Cost: 2KV (sum) or 4KV (delta, fwm) FLOPs per token for the write and 2KV for the read, T steps in sequence. The
    gradient keeps T memories; that of ``recurrent_in_blocks`` does not.

    Args:
      fast_weights: W_0, ``[K, V]``.
      query, key, value, beta, log_decay, reset, recall_scale: see the head of this file; recall_scale is for "delta".
      rule: "sum", "delta" or "fwm".

    Returns:
      The reads y ``[T, V]`` and W_T ``[K, V]``.

    Raises:
      ValueError: another rule.
    """
    _check_rule(rule)
    _check_shapes(fast_weights, query, key, value, beta, log_decay, reset, recall_scale)
    tokens = (query, key, value, beta, log_decay, reset, recall_scale)
    fast_weights, reads = lax.scan(_token_of(rule), fast_weights, tokens)
    return reads, fast_weights


def recurrent_in_blocks(
    fast_weights, query, key, value, beta, log_decay=None, reset=None, recall_scale=None, *, rule: Rule
):
    """``recurrent`` as a scan over √T blocks of √T tokens, each computed again in the gradient.

    So the gradient keeps about 2√T memories; the values by themselves take up to twice the time of ``recurrent``.
    """
    _check_rule(rule)
    _check_shapes(fast_weights, query, key, value, beta, log_decay, reset, recall_scale)
    tokens = (query, key, value, beta, log_decay, reset, recall_scale)
    length = len(key)
    block = max(1, int(length**0.5))
    blocks = jax.tree.map(lambda x: x[: length // block * block].reshape(-1, block, *x.shape[1:]), tokens)
    rest = jax.tree.map(lambda x: x[length // block * block :], tokens)
    fast_weights, reads = lax.scan(_block_of(rule), fast_weights, blocks)
    fast_weights, last_reads = lax.scan(_token_of(rule), fast_weights, rest)
    return jnp.concatenate([reads.reshape(-1, reads.shape[-1]), last_reads]), fast_weights


@functools.cache  # a scan of the same function is compiled once outside of jit
def _token_of(rule):
    return functools.partial(_token, rule)


@functools.cache
def _block_of(rule):
    return jax.checkpoint(functools.partial(lax.scan, _token_of(rule)), prevent_cse=False)


def _token(rule, fast_weights, token):
    query, key, value, beta, log_decay, reset, recall_scale = token
    if reset is not None:
        fast_weights = jnp.where(reset, 0, fast_weights)
    decay = None if log_decay is None else jnp.exp(log_decay)
    scale = () if recall_scale is None else (recall_scale,)
    fast_weights = _STEPS[rule](fast_weights, key, value, beta, decay, *scale)
    return fast_weights, jnp.matmul(query, fast_weights, precision=HIGHEST)


# --- many steps at once ----------------------------------------------------------------------------------------------


def chunk(
    fast_weights,
    query,
    key,
    value,
    beta,
    log_decay=None,
    reset=None,
    recall_scale=None,
    *,
    rule: Rule,
    precision=HIGHEST,
):
    """T steps at once (Yang et al. 2024; with decay, Yang et al. 2025): for all T the parallel form, O(T³) for delta.

    With D_ti = α_{i+1} ⋯ α_t, the decay from token i to token t, every token's write u_i solves

        sum      u_t = β_t v_t
        delta    u_t = β_t (v_t − r_t [D_t0 W_0ᵀk_t + Σ_{i<t} D_ti (k_tᵀk_i) u_i])      r = recall_scale, or 1
        fwm      the same, with what clips did to W_0 and to each write since it was made: see ``_fwm_errors``

    and then  y_t = D_t0 W_0ᵀq_t + Σ_{i≤t} D_ti (q_tᵀk_i) u_i  and  W_T = D_T0 W_0 + Σ_i D_Ti k_i u_iᵀ.
    For delta the system is unit lower triangular, and solved by ``unit_lower_solve``.

    Cost for T tokens: 4T²K + 3T²V + 6TKV FLOPs for delta, and those of the inverses in ``unit_lower_solve``; T² numbers
    of memory, which a decay per channel raises to T²K unless the compiler fuses the sum. fwm takes T small steps in
    sequence, of 2T²V FLOPs in all; its gradient needs the inverse of the whole system, O(T³).

    Args:
      fast_weights: W_0, ``[K, V]``.
      query, key, value, beta, log_decay, reset, recall_scale: see the head of this file; without a query nothing is
        read; recall_scale is for "delta".
      rule: "sum", "delta" or "fwm"; a decay per channel is not defined for "fwm" here, use ``recurrent``.
      precision: of the matrix products, as in ``jax.lax``.

    Returns:
      The reads y ``[T, V]``, or None, and W_T ``[K, V]``.

    Raises:
      ValueError: another rule.
    """
    _check_rule(rule)
    clip = start_clip(fast_weights) if rule == "fwm" else None
    reads, fast_weights, clip = advance(
        fast_weights, clip, query, key, value, beta, log_decay, reset, recall_scale, rule=rule, precision=precision
    )
    return reads, end_clip(fast_weights, clip)


class Clip(NamedTuple):
    """What a memory of the fwm rule is carried with from chunk to chunk: W = scale · M, and norm is ‖W‖²_F."""

    scale: jax.Array
    norm: jax.Array


def start_clip(fast_weights):
    """M = W.

    The norm is carried on by differences: a W_0 of a norm far above 1 that the first write erases leaves of it only
    what float32 tells apart from zero beside ‖W_0‖², where ``recurrent`` sums the squares of what is left.
    """
    norm = jnp.sum(jnp.square(fast_weights))
    return Clip(jnp.ones_like(norm), norm)


def end_clip(fast_weights, clip):
    """W of M, and of other rules' W."""
    return fast_weights if clip is None else clip.scale * fast_weights


def advance(fast_weights, clip, query, key, value, beta, log_decay, reset, recall_scale=None, *, rule: Rule, precision):
    """``chunk`` as a step from chunk to chunk: for "fwm" it takes and returns M and a ``Clip``, else W and None.

    M goes from chunk to chunk with a scale of 1: to multiply it by the scale's *value*, which has no gradient, changes
    neither W nor its gradient, and spares a product with a [K, V] matrix on the way back.
    """
    _check_shapes(fast_weights, query, key, value, beta, log_decay, reset, recall_scale)
    length = key.shape[0]
    matmul = lambda a, b: jnp.matmul(a, b, precision=precision)  # noqa: E731
    resets = jnp.zeros(length, jnp.int32) if reset is None else jnp.cumsum(reset)
    sees_start, reaches_end = resets == 0, resets == resets[-1]
    causal = jnp.tri(length, dtype=bool) & (resets[:, None] == resets[None])
    log_alpha = None if log_decay is None else cumulative_log_decay(log_decay.reshape(length, -1))
    from_start = sees_start[:, None].astype(key.dtype)
    if log_decay is not None:
        from_start = jnp.where(sees_start[:, None], jnp.exp(sum(log_alpha)), 0)
    if rule == "sum":
        writes = beta[:, None] * value
    else:
        recalled = matmul(key * from_start, fast_weights)
        overlaps = _decayed_products(key, key, log_alpha, causal & ~jnp.eye(length, dtype=bool), precision)
        if recall_scale is not None:
            recalled, overlaps = recall_scale[:, None] * recalled, recall_scale[:, None] * overlaps
        if rule == "delta":
            writes = unit_lower_solve(beta[:, None] * overlaps, beta[:, None] * (value - recalled))
        else:
            decay = jnp.ones(length, key.dtype) if log_decay is None else jnp.exp(log_decay)
            decay = decay if reset is None else jnp.where(reset, 0, decay)
            key_norms = jnp.sum(jnp.square(key), axis=-1)
            errors, shares, kept, norm = _fwm_errors(clip, overlaps, value, recalled, beta, key_norms, decay)
            writes = beta[:, None] * errors
            kept_start = jnp.where(sees_start, clip.scale * shares * kept[:, 0], 1)
            kept = shares[:, None] * kept

    reads = None
    if query is not None:
        scores = _decayed_products(query, key, log_alpha, causal, precision)
        if rule == "fwm":
            query, scores = kept_start[:, None] * query, kept * scores
        if log_decay is not None and log_decay.ndim == 2:
            # One product of blocks: XLA's CPU compiler (jaxlib 0.10) fuses the sum over channels, of which the scores
            # are made, into the sum of two products, and does so wrongly.
            left = jnp.concatenate([query * from_start, scores], axis=1)
            reads = matmul(left, jnp.concatenate([fast_weights, writes]))
        else:
            reads = matmul(query * from_start, fast_weights) + matmul(scores, writes)
    if log_decay is not None or reset is not None:
        fast_weights = from_start[-1][:, None] * fast_weights
    to_end = reaches_end[:, None].astype(key.dtype)
    if log_decay is not None:
        to_end = jnp.where(reaches_end[:, None], jnp.exp(sum(x[-1:] - x for x in log_alpha)), 0)
    if rule == "fwm":
        share = lax.stop_gradient(kept_start[-1])
        scale = jnp.where(share > 0, kept_start[-1] / jnp.where(share > 0, share, 1), 1)
        fast_weights, to_end, clip = share * fast_weights, kept[-1][:, None] / scale * to_end, Clip(scale, norm)
    return reads, fast_weights + matmul((key * to_end).T, writes), clip


def cumulative_log_decay(log_decay):
    """Running sums over the tokens ``[T, ...]``, in two parts: s_t = Σ_{i≤t} log_decay_i is the sum of the two.

    The decay from token i to token t is exp(s_t − s_i), and after a strong decay that is a small difference of large
    numbers. So the first part has multiples of 1/64, which floating point adds exactly up to 2¹⁸ in float32, and the
    second what they leave, at most 1/128 per token. What is below −200 (−1000 in float64) counts as that: exp is 0.
    """
    bounded = jnp.maximum(log_decay, -200 if log_decay.dtype == jnp.float32 else -1000)
    coarse = lax.stop_gradient(jnp.round(64 * bounded) / 64)
    return jnp.cumsum(coarse, axis=0), jnp.cumsum(bounded - coarse, axis=0)


def _decayed_products(left, key, log_alpha, mask, precision):
    """P_ti = Σ_c left_tc key_ic D_ti,c where mask_ti; log_alpha: None or two of ``[T, 1 or K]``, see above."""
    if log_alpha is None:
        return jnp.where(mask, jnp.matmul(left, key.T, precision=precision), 0)
    if log_alpha[0].shape[1] == 1:
        decays = jnp.exp(jnp.where(mask, sum(x - x.T for x in log_alpha), -jnp.inf))
        return jnp.matmul(left, key.T, precision=precision) * decays
    exponents = jnp.where(mask[:, :, None], sum(x[:, None] - x[None] for x in log_alpha), -jnp.inf)
    return jnp.sum(left[:, None] * key[None] * jnp.exp(exponents), axis=-1)


@jax.custom_jvp
def _fwm_errors(clip, overlaps, value, recalled, beta, key_norms, decay):
    """What the fwm rule writes and clips, without a [K, V] matrix, token after token.

    A clip is a decay that follows from what was written. Let s_t = 1/max(1, ‖·‖_F) be what the clip after write t
    leaves, and S_ti = s_i ⋯ s_{t−1} what is left of write i when token t comes (S_t0 s, s the scale, of M_0). Then

        e_t = v_t − m_t,    m_t = S_t0 s D_t0 M_0ᵀk_t + Σ_{i<t} S_ti D_ti (k_tᵀk_i) β_i e_i
        ‖α_t W_{t−1} + β_t k_t e_tᵀ‖² = α_t²‖W_{t−1}‖² + β_t e_tᵀ(2 m_t + β_t‖k_t‖² e_t).

    Only the numbers are found in sequence. Their derivative is that of a memory whose clips are fixed, which takes
    products alone, and on top of it a linear recurrence of scalars for the clips.

    Args:
      clip: what M_0 is carried with.
      overlaps: D_ti k_tᵀk_i, ``[T, T]``, strictly lower triangular.
      value, recalled: v_t and D_t0 M_0ᵀk_t, ``[T, V]``.
      beta, key_norms, decay: β_t, ‖k_t‖² and α_t (0 at a reset), ``[T]``.

    Returns:
      e ``[T, V]``, s ``[T]``, S ``[T, T]`` (1 for i ≥ t) and ‖W_T‖².
    """
    errors, shares, kept, norms = _fwm_forward(clip, overlaps, value, recalled, beta, key_norms, decay)
    return errors, shares, kept, jnp.minimum(1, norms)[-1]


def _fwm_forward(clip, overlaps, value, recalled, beta, key_norms, decay):
    def body(carry, token):
        writes, kept, start, norm = carry
        here, overlap, value, recalled, beta, key_norm, decay = token
        found = start * recalled + jnp.matmul(overlap * kept, writes, precision=HIGHEST)
        error = value - found
        gain = jnp.sum(error * (2 * found + beta * key_norm * error))
        norm = jnp.square(decay) * norm + beta * gain
        share = lax.rsqrt(jnp.maximum(1, norm))
        writes = lax.dynamic_update_slice(writes, (beta * error)[None], (here, 0))
        carry = writes, jnp.where(order <= here, share * kept, 1), share * start, jnp.minimum(1, norm)
        return carry, (error, share, kept, norm)

    order = jnp.arange(len(beta))
    like = value + recalled + beta[:, None]  # what varies over a mesh, in shard_map, as any of them does
    start = (jnp.zeros_like(like), jnp.ones_like(like[:, 0]), clip.scale, clip.norm)
    return lax.scan(body, start, (order, overlaps, value, recalled, beta, key_norms, decay))[1]


@_fwm_errors.defjvp
def _fwm_errors_jvp(primals, tangents):
    clip, overlaps, value, recalled, beta, key_norms, decay = primals
    clip_dot, overlaps_dot, value_dot, recalled_dot, beta_dot, key_norms_dot, decay_dot = tangents
    matmul = lambda a, b: jnp.matmul(a, b, precision=HIGHEST)  # noqa: E731
    errors, shares, kept, norms = (checkpoint_name(x, "fwm") for x in _fwm_forward(*primals))
    clipped = jnp.minimum(1, norms)
    before = jnp.concatenate([clip.norm[None], clipped[:-1]])

    # All clips fixed: with A the inverse of I + S D (KKᵀ) β,  dm = A dr − (A − I) dv  for r what m takes over directly.
    scaled, left = kept * overlaps, kept[:, 0][:, None]
    inverse = unit_lower_inverse(scaled * beta[None])
    strict = jnp.tril(inverse, -1)
    found = clip.scale * left * recalled + matmul(scaled, beta[:, None] * errors)
    direct_dot = clip_dot.scale * (left * recalled) + clip.scale * left * recalled_dot
    direct_dot += matmul(kept * overlaps_dot, beta[:, None] * errors) + matmul(scaled, beta_dot[:, None] * errors)
    found_dot = matmul(inverse, direct_dot) - matmul(strict, value_dot)
    middle = found + (beta * key_norms)[:, None] * errors
    slopes = 2 * beta[:, None] * (errors - middle)
    norms_dot = 2 * decay * decay_dot * before + jnp.square(beta) * jnp.sum(jnp.square(errors), axis=-1) * key_norms_dot
    norms_dot += 2 * jnp.sum(errors * middle, axis=-1) * beta_dot
    norms_dot += jnp.sum(slopes * found_dot + 2 * beta[:, None] * middle * value_dot, axis=-1)

    # A change of ln s_j scales all that the memory holds then, which is all of m_t that stems from v_i, i ≤ j. So, for
    # λ_i = Σ_{j<i} d ln s_j,   dm_t = λ_t m_t + Σ_{i<t} A_ti λ_i v_i.  λ starts anew at a reset, and so do the tangents
    # of S, which nobody asks for across one.
    by_value, by_found = strict * matmul(slopes, value.T), jnp.sum(slopes * found, axis=-1)

    def body(carry, token):
        logs, log, norm_dot = carry
        here, by_value, by_found, change, norm, decay = token
        log = jnp.where(decay == 0, 0, log)
        logs = jnp.where(here, log, logs)
        change = change + jnp.square(decay) * norm_dot + log * by_found + jnp.sum(by_value * logs)
        clips = (1 + jnp.sign(norm - 1)) / 2  # at a tie one half, as jnp.maximum has it
        log_dot = -clips * change / (2 * jnp.maximum(1, norm))
        return (logs, log + log_dot, (1 - clips) * change), log_dot

    here = jnp.eye(len(beta), dtype=bool)
    zeros = jnp.zeros_like(norms_dot)
    start = (zeros, zeros[0], clip_dot.norm + zeros[0])
    (logs, _, norm_dot), log_dots = lax.scan(body, start, (here, by_value, by_found, norms_dot, norms, decay))
    errors_dot = value_dot - found_dot - logs[:, None] * found - matmul(strict, logs[:, None] * value)
    kept_dot = jnp.tril(kept * (logs[:, None] - logs[None]))
    return (errors, shares, kept, clipped[-1]), (errors_dot, shares * log_dots, kept_dot, norm_dot)


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
      ValueError: another rule, or arrays that do not fit together.
    """
    if rule not in ("sum", "delta"):
        raise ValueError(
            f'read_weights is for rule "sum" or "delta", whose reads are linear in the values, got {rule!r}'
        )
    arrays = {"query": query, "key": key, "beta": beta, "log_decay": log_decay, "reset": reset}
    for name, x in arrays.items():
        if (x is None and name in ("query", "key", "beta")) or (x is not None and not hasattr(x, "shape")):
            raise ValueError(f"{name} must be an array, got {type(x).__name__}; jnp.asarray makes one of numbers")
    if key.ndim != 2:
        raise ValueError(f"key must be [T, K], of one head and sequence, got {list(key.shape)}; take jax.vmap for more")
    length, key_size = key.shape
    expected = {
        "query": [(key_size,)],
        "beta": [(length,)],
        "log_decay": [(length,), (length, key_size)],
        "reset": [(length,)],
    }
    for name, shapes in expected.items():
        x = arrays[name]
        if x is not None and x.shape not in shapes:
            words = " or ".join(str(list(shape)) for shape in shapes)
            raise ValueError(f"{name} must be {words} to go with key {list(key.shape)}, got {list(x.shape)}")
    return _read_weights(query, key, beta, log_decay, reset, rule=rule)


@functools.partial(jax.jit, static_argnames="rule")  # else its scan compiles anew at each call
def _read_weights(query, key, beta, log_decay, reset, *, rule):
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


def log_of_largest_key(key_sum, key, log_decay=None, reset=None):
    """ln max_c |z_{t−1}|, as far as it is one of the keys' entries that are left: −∞ where nothing was written yet.

    It says whether the running key sum is zero because nothing was written, or because what was written has decayed to
    less than the smallest number: max_t ← max(max_{t−1} + log_decay_t, ln|k_t|). Arguments as in ``key_sums``.

    Returns:
      The logarithm of the largest entry that token t finds, ``[T]``.
    """
    heads = log_decay is None or log_decay.ndim == 1

    def log(x):
        return jnp.log(jnp.max(jnp.abs(x), axis=-1, keepdims=True) if heads else jnp.abs(x))

    decay = jnp.zeros((len(key), 1), key.dtype) if log_decay is None else log_decay.reshape(len(key), -1)
    decay = decay if reset is None else jnp.where(reset[:, None], -jnp.inf, decay)

    def combine(first, second):
        return first[0] + second[0], jnp.maximum(first[1] + second[0], second[1])

    decays, largest = lax.associative_scan(combine, (decay, log(key)))
    after = jnp.maximum(decays + log(key_sum)[None], largest)
    before = decay + jnp.concatenate([log(key_sum)[None], after[:-1]])
    return jnp.max(before, axis=-1)


def _check_shapes(fast_weights, query, key, value, beta, log_decay, reset, recall_scale=None):
    length, key_size, value_size = *key.shape, value.shape[-1]
    chex.assert_shape(fast_weights, (key_size, value_size))
    chex.assert_shape(key if query is None else [query, key], (length, key_size))
    chex.assert_shape(value, (length, value_size))
    chex.assert_shape(beta, (length,))
    if log_decay is not None and log_decay.shape != (length,):
        chex.assert_shape(log_decay, (length, key_size))
    for x in (reset, recall_scale):
        if x is not None:
            chex.assert_shape(x, (length,))
