"""The fast weight memory: one head, one sequence. Everything else in the library is this file, made fast or batched.

The memory of a head is a matrix W, ``[K, V]`` (K key features, V value size; the paper writes its transpose).
Each token decays it, writes one outer product, and reads it:

    sum      W_t = α_t W_{t−1} + β_t k_t v_tᵀ                          Katharopoulos et al. 2020
    delta    W_t = α_t W_{t−1} + β_t k_t (v_t − v̄_t)ᵀ                  Schlag, Irie & Schmidhuber 2021, eq. 24
             v̄_t = (α_t W_{t−1})ᵀ k_t                                  eq. 20
    oja      W_t = α_t W_{t−1} + β_t (k_t − α_t W_{t−1} v_t) v_tᵀ      Irie & Schmidhuber 2023
    read     y_t = W_tᵀ q_t, after the write                           eq. 25

α_t = exp(log_decay_t) is a scalar (gated delta rule, Yang et al. 2025) or one number per key channel (Kimi Delta
Attention 2025); without it α_t = 1. ``reset_t`` drops the memory before token t, exactly.

``recurrent`` is a scan of the step and the definition. ``chunk`` advances the memory by many tokens at once. Both give
the same numbers up to rounding. ``rules.py`` has the table of rules. Shapes, for all functions of this file:

    query, key  [T, K]     value  [T, V]     beta  [T]     log_decay  None, [T] or [T, K]     reset  None or bool [T]
    recall_scale  None or [T]: the delta rule multiplies v̄_t by it (attention normalisation, eq. 27)

Everything is computed in the dtype of ``fast_weights``: float32, or float64.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax import lax

from fwt_jax.decays import decays_of
from fwt_jax.triangular import unit_lower_solve

HIGHEST = lax.Precision.HIGHEST


class Memory(NamedTuple):
    """The state of a fast weight layer. Its size does not depend on the number of tokens that were read.

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
    return _decayed(fast_weights, decay) + beta * jnp.outer(key, value)


def delta_step(fast_weights, key, value, beta, decay=None, recall_scale=None):
    """W ← α W, then W ← W + β k (v − r Wᵀk)ᵀ (eq. 20, 24; r = 1, or 1/(zᵀk + eps) in eq. 27). 4KV FLOPs.

    Arguments as in ``sum_step``; recall_scale: r, None or ``[]``.
    """
    fast_weights = _decayed(fast_weights, decay)
    recalled = jnp.matmul(key, fast_weights, precision=HIGHEST)
    if recall_scale is not None:
        recalled = recall_scale * recalled
    return fast_weights + beta * jnp.outer(key, value - recalled)


def oja_step(fast_weights, key, value, beta, decay=None):
    """W ← α W, then W ← W + β (k − W v) vᵀ: the delta rule of Wᵀ, which stores keys under values. 4KV FLOPs."""
    fast_weights = _decayed(fast_weights, decay)
    recalled = jnp.matmul(fast_weights, value, precision=HIGHEST)
    return fast_weights + beta * jnp.outer(key - recalled, value)


def _decayed(fast_weights, decay):
    if decay is None:
        return fast_weights
    return (decay if decay.ndim == 0 else decay[:, None]) * fast_weights


def recurrent(
    fast_weights,
    query,
    key,
    value,
    beta,
    log_decay=None,
    reset=None,
    recall_scale=None,
    written=None,
    *,
    step: Callable,
    scan: Callable = lax.scan,
):
    """The definition: a scan of ``step`` over T tokens.

    Cost: that of the step, and 2KV FLOPs per token for the read, T steps in sequence. The gradient of ``lax.scan``
    keeps T memories; that of ``checkpointed_scan`` keeps 2√T.

    Args:
      fast_weights: W_0, ``[K, V]``.
      query, key, value, beta, log_decay, reset, recall_scale: see the head of this file. Without a query nothing is
        read. recall_scale is for ``delta_step``.
      written: None or bool ``[T]``: W stays as it is where it is False.
      step: ``sum_step``, or a function of the same arguments and result.
      scan: ``lax.scan``, or a function like it.

    Returns:
      The reads y ``[T, V]``, or None, and W_T ``[K, V]``.
    """
    check_shapes(fast_weights, query, key, value, beta, log_decay, reset, recall_scale)
    tokens = (query, key, value, beta, log_decay, reset, recall_scale, written)
    fast_weights, reads = scan(_token_of(step), fast_weights, tokens)
    return reads, fast_weights


@functools.lru_cache(maxsize=64)  # outside of jit, JAX compiles a scan once per function
def _token_of(step):
    return functools.partial(_token, step)


def _token(step, fast_weights, token):
    query, key, value, beta, log_decay, reset, recall_scale, written = token
    before = fast_weights
    if reset is not None:
        fast_weights = jnp.where(reset, 0, fast_weights)
    decay = None if log_decay is None else jnp.exp(log_decay)
    scale = () if recall_scale is None else (recall_scale,)
    with jax.default_matmul_precision("highest"):  # for the products of a caller's own step
        fast_weights = step(fast_weights, key, value, beta, decay, *scale)
    if written is not None:  # zeros may change W: the step of fwm clips it, and a caller's own may do anything
        fast_weights = jnp.where(written, fast_weights, before)
    return fast_weights, None if query is None else jnp.matmul(query, fast_weights, precision=HIGHEST)


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
    writes: Callable,
    precision=HIGHEST,
):
    """T steps at once, for rules that are linear in W (Yang et al. 2024; with decay, Yang et al. 2025).

    Let D_ti = α_{i+1} ⋯ α_t be the decay from token i to token t. ``writes`` gives a_i ``[K]`` and b_i ``[V]`` of the
    outer product that each token writes. Then

        y_t = D_t0 W_0ᵀq_t + Σ_{i≤t} D_ti (q_tᵀa_i) b_i        W_T = D_T0 W_0 + Σ_i D_Ti a_i b_iᵀ

    Cost for T tokens: 2T²K + 2T²V + 4TKV FLOPs and those of ``writes``. It takes T² numbers of memory. A decay per
    channel raises them to T²K unless the compiler fuses the sum.

    Args:
      fast_weights: W_0, ``[K, V]``.
      query, key, value, beta, log_decay, reset, recall_scale: see the head of this file. Without a query nothing is
        read. recall_scale is for ``delta_writes``.
      writes: ``sum_writes``, ``delta_writes``, ``oja_writes``, or a function of the same arguments that returns a
        ``[T, K]`` and b ``[T, V]``. Tokens whose arrays are all 0 must have a or b of 0.
      precision: of the matrix products, as in ``jax.lax``.

    Returns:
      The reads y ``[T, V]``, or None, and W_T ``[K, V]``.
    """
    check_shapes(fast_weights, query, key, value, beta, log_decay, reset, recall_scale)
    decays = decays_of(key, log_decay, reset)
    a, b = writes(fast_weights, key, value, beta, recall_scale, decays, precision)
    reads = None
    if query is not None:
        scores = decays.products(query, a, precision)
        reads = decays.read(query * decays.from_start, fast_weights, scores, b, precision)
    if decays.of_start is not None:
        fast_weights = decays.of_start * fast_weights
    return reads, fast_weights + jnp.matmul((a * decays.to_end).T, b, precision=precision)


def sum_writes(fast_weights, key, value, beta, recall_scale, decays, precision):
    """a_t = k_t, b_t = β_t v_t."""
    return key, beta[:, None] * value


def delta_writes(fast_weights, key, value, beta, recall_scale, decays, precision):
    """a_t = k_t, and b solves a unit lower triangular system; 2T²K + 2TKV FLOPs and those of the solve.

    b_t = β_t (v_t − r_t [D_t0 W_0ᵀk_t + Σ_{i<t} D_ti (k_tᵀk_i) b_i])          r = recall_scale, or 1
    """
    recalled = jnp.matmul(key * decays.from_start, fast_weights, precision=precision)
    overlaps = decays.products(key, key, precision, strict=True)
    if recall_scale is not None:
        recalled, overlaps = recall_scale[:, None] * recalled, recall_scale[:, None] * overlaps
    return key, unit_lower_solve(beta[:, None] * overlaps, beta[:, None] * (value - recalled))


def oja_writes(fast_weights, key, value, beta, recall_scale, decays, precision):
    """b_t = v_t, and a solves a unit lower triangular system; a decay per channel is not defined here.

    a_t = β_t (k_t − D_t0 W_0 v_t − Σ_{i<t} D_ti (v_tᵀv_i) a_i)
    """
    recalled = jnp.matmul(value * decays.from_start, fast_weights.T, precision=precision)
    overlaps = decays.products(value, value, precision, strict=True)
    return unit_lower_solve(beta[:, None] * overlaps, beta[:, None] * (key - recalled)), value


def delta_chunks(
    fast_weights, query, key, value, beta, log_decay=None, reset=None, recall_scale=None, *, precision=HIGHEST
):
    """N chunks of the delta rule, with all but two products of each chunk for all chunks at once (Yang et al. 2024).

    The b of ``delta_writes`` is affine in the memory W_0 at the chunk's start. With L_ti = β_t r_t D_ti (k_tᵀk_i) for
    i < t:

        b = u − w W_0        u = (I + L)⁻¹ (β v)        w = (I + L)⁻¹ (β r D_t0 k)

    Cost for each chunk of T tokens: that of ``chunk``, and T²K FLOPs to solve for w. It takes memory for all chunks.

    Args:
      fast_weights: W_0 of the first chunk, ``[K, V]``.
      query, key, value, beta, log_decay, reset, recall_scale: ``[N, T, ...]``, else as in ``chunk``.
      precision: of the matrix products, as in ``jax.lax``.

    Returns:
      The reads y ``[N, T, V]``, or None, and the memory after the last chunk ``[K, V]``.
    """

    def factors(key, value, beta, recall_scale, decays):
        scale = beta if recall_scale is None else beta * recall_scale
        overlaps = decays.products(key, key, precision, strict=True)
        right = jnp.concatenate([beta[:, None] * value, scale[:, None] * key * decays.from_start], axis=1)
        solved = unit_lower_solve(scale[:, None] * overlaps, right)
        return solved[:, : value.shape[1]], solved[:, value.shape[1] :]

    def advance(start, tokens):
        of_start, a, u, w = tokens
        b = u - jnp.matmul(w, start, precision=precision)
        decayed = start if of_start is None else of_start * start
        return decayed + jnp.matmul(a.T, b, precision=precision), (start, b)

    def read(query, key, start, b, decays):
        scores = decays.products(query, key, precision)
        return decays.read(query * decays.from_start, start, scores, b, precision)

    decays = jax.vmap(decays_of)(key, log_decay, reset)
    u, w = jax.vmap(factors)(key, value, beta, recall_scale, decays)
    chunks = (decays.of_start, key * decays.to_end, u, w)
    fast_weights, (starts, b) = lax.scan(advance, fast_weights, chunks)
    return None if query is None else jax.vmap(read)(query, key, starts, b, decays), fast_weights


def check_shapes(fast_weights, query, key, value, beta, log_decay, reset, recall_scale=None):
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
