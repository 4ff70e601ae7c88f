"""Attention normalisation (eq. 26-28): the running key sum z, and the divisions by zᵀq and zᵀk."""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

from fwt_jax.heads import over_heads
from fwt_jax.pieces import before_piece


def key_sums(key_sum, key, log_decay=None, reset=None, *, sequence_axis=None):
    """Running key sums of attention normalisation (eq. 26): z_t = α_t z_{t−1} + k_t, before and after each token.

    Args:
      key_sum: z_0, ``[K]``, of the whole sequence.
      key, log_decay, reset: see the head of ``memory.py``.
      sequence_axis: if not None, these tokens are one piece of the sequence, see ``pieces.py``.

    Returns:
      α_t z_{t−1}, before token t is added, and z_t; both ``[T, K]``.
    """
    decay = jnp.ones((len(key), 1), key.dtype) if log_decay is None else jnp.exp(log_decay.reshape(len(key), -1))
    decay = decay if reset is None else jnp.where(reset[:, None], 0, decay)
    decays, sums = lax.associative_scan(_combine_sums, (decay, key))
    if sequence_axis is not None:
        total = (decays[-1], sums[-1])
        nothing = (jnp.ones_like(decays[-1]), jnp.zeros_like(sums[-1]))
        decay_before, sum_before = before_piece(_combine_sums, total, nothing, sequence_axis)
        key_sum = decay_before * key_sum + sum_before
    after = decays * key_sum[None] + sums
    before = decay * jnp.concatenate([key_sum[None], after[:-1]])
    return before, after


def _combine_sums(first, second):
    return first[0] * second[0], second[0] * first[1] + second[1]


def log_of_largest_key(key_sum, key, log_decay=None, reset=None, *, sequence_axis=None):
    """The logarithm of the largest entry of any earlier key, decayed to token t: −∞ before the first write.

    A running key sum can be zero because nothing was written, or because all keys have decayed below the smallest
    float. This logarithm tells the two apart: m_t = max(m_{t−1} + log_decay_t, ln|k_t|). Arguments as in ``key_sums``.

    Returns:
      m_{t−1} + log_decay_t, the largest over the features, ``[T]``.
    """
    per_channel = log_decay is not None and log_decay.ndim == 2

    def log(x):
        return jnp.log(jnp.abs(x) if per_channel else jnp.max(jnp.abs(x), axis=-1, keepdims=True))

    decay = jnp.zeros((len(key), 1), key.dtype) if log_decay is None else log_decay.reshape(len(key), -1)
    decay = decay if reset is None else jnp.where(reset[:, None], -jnp.inf, decay)
    decays, largest = lax.associative_scan(_combine_maxima, (decay, log(key)))
    start = log(key_sum)
    if sequence_axis is not None:
        total = (decays[-1], largest[-1])
        nothing = (jnp.zeros_like(decays[-1]), jnp.full_like(largest[-1], -jnp.inf))
        decay_before, largest_before = before_piece(_combine_maxima, total, nothing, sequence_axis)
        start = jnp.maximum(decay_before + start, largest_before)
    after = jnp.maximum(decays + start[None], largest)
    before = decay + jnp.concatenate([start[None], after[:-1]])
    return jnp.max(before, axis=-1)


def _combine_maxima(first, second):
    return first[0] + second[0], jnp.maximum(first[1] + second[0], second[1])


def scaled_query(query, eps):
    """The query, scaled to a maximum of 1 if eps = 0: the read does not change, and a tiny zᵀq does not underflow."""
    if eps != 0:
        return query
    largest = lax.stop_gradient(jnp.max(jnp.abs(query), axis=-1, keepdims=True))
    return query / jnp.where(largest == 0, 1, largest)


def divided(reads, mass, eps):
    """reads / (mass + eps). If eps = 0, the mass is scaled to 1 first, because the gradient's mass² may underflow."""
    scale = lax.stop_gradient(1 / mass) if eps == 0 else 1
    return reads * scale / (mass * scale + eps)


def retrieval(key_sum, before, key, beta, log_decay, reset, eps, *, sequence_axis=None):
    """The scale of the recalled value and the write strength of eq. 27.

    With d = (α_t z_{t−1})ᵀk_t they are 1/(d + eps) and β d/(d + eps). If the memory is empty, they are 1 and β.

    Args:
      key_sum: z_0, ``[B, H, K]``.
      before: α_t z_{t−1}, ``[B, T, H, K]``.
      key, beta, log_decay, reset: see ``recurrent.recurrent``.
      eps: a Python number of at least 0.
      sequence_axis: see ``key_sums``.

    Returns:
      Both ``[B, T, H]``.
    """
    mass = jnp.sum(before * key, axis=-1)
    if eps == 0:
        empty = mass == 0
    else:
        # If all keys have decayed below the smallest float32, the key sum is zero there, but not in float64. The two
        # must agree, so such a memory does not count as empty.
        inputs = (*jax.tree.map(lax.stop_gradient, (key_sum, key, log_decay)), reset)
        logarithm = functools.partial(log_of_largest_key, sequence_axis=sequence_axis)
        largest = over_heads(logarithm, inputs, out_axes=1)(*inputs)
        smallest = math.log(float(jnp.finfo(mass.dtype).tiny))
        empty = jnp.all(before == 0, axis=-1) & ((largest > smallest) | (largest < math.log(math.ulp(0.0))))
    divisor = jnp.where(empty, 1, mass + eps)
    # The gradient of 1/d contains 1/d², which overflows for d < 1e-19. So scale d to 1 first.
    scale = lax.stop_gradient(1 / divisor)
    scaled_divisor = divisor * scale
    return scale / scaled_divisor, beta * jnp.where(empty, 1, mass * scale) / scaled_divisor
