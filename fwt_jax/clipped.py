"""The fwm rule (Schlag, Munkhdalai & Schmidhuber 2021): the delta rule whose memory is clipped after each write.

    W_t = W̃_t / max(1, ‖W̃_t‖_F)        W̃_t = α_t W_{t−1} + β_t k_t (v_t − (α_t W_{t−1})ᵀk_t)ᵀ

A clip is a decay that depends on the writes. So the chunk form takes T small steps in sequence, of 2T²V FLOPs in all,
and its gradient inverts the whole triangular system, O(T³). A decay per key channel is not defined in the chunk form.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from fwt_jax.decays import decays_of
from fwt_jax.memory import HIGHEST, check_shapes, delta_step
from fwt_jax.triangular import unit_lower_inverse

# The checkpoint name of the scan's outputs. They are saved, so that the backward pass does not run the scan again.
SCANNED = "fwm"


def step(fast_weights, key, value, beta, decay=None):
    """The delta step, then W ← W / max(1, ‖W‖_F); gradients flow through the norm. Arguments as in ``sum_step``."""
    fast_weights = delta_step(fast_weights, key, value, beta, decay)
    return fast_weights * lax.rsqrt(jnp.maximum(1, jnp.sum(jnp.square(fast_weights))))


class Clipped(NamedTuple):
    """The carry of the fwm rule between chunks: W = scale · M.

    Attributes:
      fast_weights: M, ``[K, V]``.
      scale: ``[]``.
      squared_norm: ‖W‖²_F, ``[]``.
    """

    fast_weights: jax.Array
    scale: jax.Array
    squared_norm: jax.Array


def start(fast_weights) -> Clipped:
    """The carry of W: M = W.

    A chunk adds the changes of ‖W‖² up. If the first write erases a W_0 of ‖W_0‖ ≫ 1, ‖W‖² is wrong by the float32
    rounding of ‖W_0‖². The recurrent form sums the squares of W instead.
    """
    squared_norm = jnp.sum(jnp.square(fast_weights))
    return Clipped(fast_weights, jnp.ones_like(squared_norm), squared_norm)


def end(carry: Clipped):
    """W = scale · M."""
    return carry.scale * carry.fast_weights


def chunk(carry: Clipped, query, key, value, beta, log_decay=None, reset=None, recall_scale=None, *, precision=HIGHEST):
    """``memory.chunk`` for the fwm rule, from a ``Clipped`` to a ``Clipped``.

    We fold the scale's value (without its gradient) into M after each chunk. This leaves W and its gradient unchanged
    and saves one [K, V] product in the backward pass.
    """
    fast_weights, clip_scale, squared_norm = carry
    check_shapes(fast_weights, query, key, value, beta, log_decay, reset, recall_scale)
    length = len(key)
    decays = decays_of(key, log_decay, reset)
    recalled = jnp.matmul(key * decays.from_start, fast_weights, precision=precision)
    overlaps = decays.products(key, key, precision, strict=True)
    decay = jnp.ones(length, key.dtype) if log_decay is None else jnp.exp(log_decay)
    decay = decay if reset is None else jnp.where(reset, 0, decay)
    key_norms = jnp.sum(jnp.square(key), axis=-1)
    clip = (clip_scale, squared_norm)
    errors, clips, since_write, squared_norm = _errors(clip, overlaps, value, recalled, beta, key_norms, decay)
    b = beta[:, None] * errors
    sees_start = jnp.ones(length, bool) if reset is None else jnp.cumsum(reset) == 0
    clips_of_start = jnp.where(sees_start, clip_scale * clips * since_write[:, 0], 1)
    clips_of_writes = clips[:, None] * since_write

    reads = None
    if query is not None:
        scores = clips_of_writes * decays.products(query, key, precision)
        query = clips_of_start[:, None] * query * decays.from_start
        reads = decays.read(query, fast_weights, scores, b, precision)
    if decays.of_start is not None:
        fast_weights = decays.of_start * fast_weights
    folded = lax.stop_gradient(clips_of_start[-1])
    scale = jnp.where(folded > 0, clips_of_start[-1] / jnp.where(folded > 0, folded, 1), 1)
    to_end = clips_of_writes[-1][:, None] / scale * decays.to_end
    fast_weights = folded * fast_weights + jnp.matmul((key * to_end).T, b, precision=precision)
    return reads, Clipped(fast_weights, scale, squared_norm)


@jax.custom_jvp
def _errors(clip, overlaps, value, recalled, beta, key_norms, decay):
    """Errors and clips of all tokens, by a scan that forms no [K, V] matrix.

    Let s_t = 1/max(1, ‖W̃_t‖_F) be the clip after write t. Let S_ti = s_i ⋯ s_{t−1} be the clips between write i and
    token t; those of M_0 are S_t0 s, with s the scale of the carry. Then

        e_t = v_t − m_t,    m_t = S_t0 s D_t0 M_0ᵀk_t + Σ_{i<t} S_ti D_ti (k_tᵀk_i) β_i e_i
        ‖α_t W_{t−1} + β_t k_t e_tᵀ‖² = α_t²‖W_{t−1}‖² + β_t e_tᵀ(2 m_t + β_t‖k_t‖² e_t).

    The forward pass needs a scan. Its derivative does not: with the clips held fixed it is a few matrix products, plus
    a scalar recurrence for the clips.

    Args:
      clip: s and ‖W_0‖², ``[]`` each.
      overlaps: D_ti k_tᵀk_i, ``[T, T]``, strictly lower triangular.
      value, recalled: v_t and D_t0 M_0ᵀk_t, ``[T, V]``.
      beta, key_norms, decay: β_t, ‖k_t‖² and α_t (0 at a reset), ``[T]``.

    Returns:
      e ``[T, V]``, s_t ``[T]``, S ``[T, T]`` (1 for i ≥ t) and ‖W_T‖².
    """
    errors, clips, since_write, squared_norms = _scan(clip, overlaps, value, recalled, beta, key_norms, decay)
    return errors, clips, since_write, jnp.minimum(1, squared_norms)[-1]


def _scan(clip, overlaps, value, recalled, beta, key_norms, decay):
    """As ``_errors``, but with ‖W̃_t‖² of every token, ``[T]``, instead of ‖W_T‖²."""

    def body(carry, token):
        b, since_write, since_start, squared_norm = carry
        t, overlap, value, recalled, beta, key_norm, decay = token
        recall = since_start * recalled + jnp.matmul(overlap * since_write, b, precision=HIGHEST)
        error = value - recall
        gain = jnp.sum(error * (2 * recall + beta * key_norm * error))
        squared_norm = jnp.square(decay) * squared_norm + beta * gain
        clip = lax.rsqrt(jnp.maximum(1, squared_norm))
        b = lax.dynamic_update_slice(b, (beta * error)[None], (t, 0))
        carry = b, jnp.where(order <= t, clip * since_write, 1), clip * since_start, jnp.minimum(1, squared_norm)
        return carry, (error, clip, since_write, squared_norm)

    order = jnp.arange(len(beta))
    # In shard_map the template varies over every mesh axis that an input varies over, as the carry must.
    template = value + recalled + beta[:, None]
    scale, squared_norm = clip
    initial = (jnp.zeros_like(template), jnp.ones_like(template[:, 0]), scale, squared_norm)
    return lax.scan(body, initial, (order, overlaps, value, recalled, beta, key_norms, decay))[1]


@_errors.defjvp
def _errors_jvp(primals, tangents):
    (scale, start_norm), overlaps, value, recalled, beta, key_norms, decay = primals
    (scale_dot, start_norm_dot), overlaps_dot, value_dot, recalled_dot, beta_dot, key_norms_dot, decay_dot = tangents
    matmul = functools.partial(jnp.matmul, precision=HIGHEST)
    errors, clips, since_write, squared_norms = (checkpoint_name(x, SCANNED) for x in _scan(*primals))
    clipped_norms = jnp.minimum(1, squared_norms)
    norms_before = jnp.concatenate([start_norm[None], clipped_norms[:-1]])

    # The clips held fixed: with A the inverse of I + S D (KKᵀ) β,  dm = A dr − (A − I) dv,  where r is the part of m
    # that does not depend on earlier errors.
    scaled_overlaps, since_start = since_write * overlaps, since_write[:, 0][:, None]
    inverse = unit_lower_inverse(scaled_overlaps * beta[None])
    strict_inverse = jnp.tril(inverse, -1)
    recall = scale * since_start * recalled + matmul(scaled_overlaps, beta[:, None] * errors)
    r_dot = scale_dot * (since_start * recalled) + scale * since_start * recalled_dot
    r_dot += matmul(since_write * overlaps_dot, beta[:, None] * errors)
    r_dot += matmul(scaled_overlaps, beta_dot[:, None] * errors)
    recall_dot = matmul(inverse, r_dot) - matmul(strict_inverse, value_dot)
    half_slope = recall + (beta * key_norms)[:, None] * errors
    slopes = 2 * beta[:, None] * (errors - half_slope)
    norms_dot = 2 * decay * decay_dot * norms_before
    norms_dot += jnp.square(beta) * jnp.sum(jnp.square(errors), axis=-1) * key_norms_dot
    norms_dot += 2 * jnp.sum(errors * half_slope, axis=-1) * beta_dot
    norms_dot += jnp.sum(slopes * recall_dot + 2 * beta[:, None] * half_slope * value_dot, axis=-1)

    by_value, by_recall = strict_inverse * matmul(slopes, value.T), jnp.sum(slopes * recall, axis=-1)
    log_dots, clip_log_dots, norm_dot = _clips_dot(start_norm_dot, by_value, by_recall, norms_dot, squared_norms, decay)
    errors_dot = value_dot - recall_dot - log_dots[:, None] * recall - matmul(strict_inverse, log_dots[:, None] * value)
    since_write_dot = jnp.tril(since_write * (log_dots[:, None] - log_dots[None]))
    outputs = (errors, clips, since_write, clipped_norms[-1])
    return outputs, (errors_dot, clips * clip_log_dots, since_write_dot, norm_dot)


def _clips_dot(start_norm_dot, by_value, by_recall, norms_dot, squared_norms, decay):
    """The tangents of the clips, by a recurrence of scalars.

    A change of ln s_j scales the whole memory after token j: the part of m_t that stems from v_i for every i ≤ j. So,
    with λ_i = Σ_{j<i} d ln s_j,

        dm_t = λ_t m_t + Σ_{i<t} A_ti λ_i v_i.

    λ restarts at a reset. S is never used across a reset, so its tangent may restart there.

    Args:
      start_norm_dot: the tangent of ‖W_0‖², ``[]``.
      by_value, by_recall: the derivatives of ‖W̃_t‖² in λ_i, ``[T, T]``, and in λ_t, ``[T]``.
      norms_dot: the tangents of ‖W̃_t‖² with the clips held fixed, ``[T]``.
      squared_norms, decay: ‖W̃_t‖² and α_t, ``[T]``.

    Returns:
      λ ``[T]``, d ln s ``[T]`` and the tangent of ‖W_T‖².
    """
    zeros = jnp.zeros_like(norms_dot)
    initial = (zeros, zeros[0], start_norm_dot + zeros[0])
    tokens = (jnp.eye(len(decay), dtype=bool), by_value, by_recall, norms_dot, squared_norms, decay)
    (log_dots, _, norm_dot), clip_log_dots = lax.scan(_clip_dot, initial, tokens)
    return log_dots, clip_log_dots, norm_dot


def _clip_dot(carry, token):
    log_dots, log_dot, norm_dot = carry
    at_token, by_value, by_recall, change, norm, decay = token
    log_dot = jnp.where(decay == 0, 0, log_dot)
    log_dots = jnp.where(at_token, log_dot, log_dots)
    change = change + jnp.square(decay) * norm_dot + log_dot * by_recall + jnp.sum(by_value * log_dots)
    is_clipped = (1 + jnp.sign(norm - 1)) / 2  # one half at a tie, as for jnp.maximum
    clip_log_dot = -is_clipped * change / (2 * jnp.maximum(1, norm))
    return (log_dots, log_dot + clip_log_dot, (1 - is_clipped) * change), clip_log_dot
