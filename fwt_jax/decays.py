"""Decays and resets within a chunk of tokens, as factors of the memory, of the writes and of the scores."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


class Decays(NamedTuple):
    """Decays and resets within a chunk.

    Attributes:
      from_start: D_t0, ``[T, 1 or K]``; 0 after a reset.
      to_end: D_Ti, ``[T, 1 or K]``; 0 before a reset.
      of_start: D_T0, ``[1 or K, 1]``, or None if nothing decays or resets.
      log_alpha: the cumulative log decay in the two parts of ``cumulative_log_decay``, ``[T, 1 or K]`` each, or None.
      causal: bool ``[T, T]``, where i ≤ t and no reset lies between them.
    """

    from_start: jax.Array
    to_end: jax.Array
    of_start: jax.Array | None
    log_alpha: tuple[jax.Array, jax.Array] | None
    causal: jax.Array

    def products(self, rows, columns, precision, *, strict=False):
        """P_ti = Σ_c rows_tc columns_ic D_ti,c for i ≤ t, or for i < t if strict; ``[T, T]``."""
        mask = self.causal & ~jnp.eye(len(rows), dtype=bool) if strict else self.causal
        if self.log_alpha is None:
            return jnp.where(mask, jnp.matmul(rows, columns.T, precision=precision), 0)
        if self.log_alpha[0].shape[1] == 1:
            decays = jnp.exp(jnp.where(mask, sum(x - x.T for x in self.log_alpha), -jnp.inf))
            return jnp.matmul(rows, columns.T, precision=precision) * decays
        exponents = jnp.where(mask[:, :, None], sum(x[:, None] - x[None] for x in self.log_alpha), -jnp.inf)
        return jnp.sum(rows[:, None] * columns[None] * jnp.exp(exponents), axis=-1)

    def read(self, query, fast_weights, scores, b, precision):
        """query W_0 + scores b."""
        if self.log_alpha is not None and self.log_alpha[0].shape[1] > 1:
            # With a decay per channel, XLA for CPU (jaxlib 0.10) computes A B + C D wrongly: it fuses the sum over the
            # channels, which makes the scores C, into this sum. It computes [A C] [B; D] correctly.
            blocks = jnp.concatenate([query, scores], axis=1)
            return jnp.matmul(blocks, jnp.concatenate([fast_weights, b]), precision=precision)
        reads = jnp.matmul(query, fast_weights, precision=precision)
        return reads + jnp.matmul(scores, b, precision=precision)


def decays_of(key, log_decay, reset) -> Decays:
    """The ``Decays`` of T tokens."""
    length = len(key)
    resets = jnp.zeros(length, jnp.int32) if reset is None else jnp.cumsum(reset)
    sees_start, reaches_end = (resets == 0)[:, None], (resets == resets[-1])[:, None]
    causal = jnp.tri(length, dtype=bool) & (resets[:, None] == resets[None])
    if log_decay is None:
        from_start = sees_start.astype(key.dtype)
        of_start = None if reset is None else from_start[-1][:, None]
        return Decays(from_start, reaches_end.astype(key.dtype), of_start, None, causal)
    log_alpha = cumulative_log_decay(log_decay.reshape(length, -1))
    from_start = jnp.where(sees_start, jnp.exp(sum(log_alpha)), 0)
    to_end = jnp.where(reaches_end, jnp.exp(sum(x[-1:] - x for x in log_alpha)), 0)
    return Decays(from_start, to_end, from_start[-1][:, None], log_alpha, causal)


def cumulative_log_decay(log_decay):
    """Running sums over the tokens ``[T, ...]``, in two parts: s_t = Σ_{i≤t} log_decay_i is the sum of the two.

    The decay from token i to token t is exp(s_t − s_i). After a strong decay that is a small difference of large
    numbers. So the first part has multiples of 1/64, which floating point adds exactly up to 2¹⁸ in float32. The
    second part has the rest, at most 1/128 per token. A decay below −200 (−1000 in float64) counts as that: exp is 0.
    """
    bounded = jnp.maximum(log_decay, -200 if log_decay.dtype == jnp.float32 else -1000)
    coarse = lax.stop_gradient(jnp.round(64 * bounded) / 64)
    return jnp.cumsum(coarse, axis=0), jnp.cumsum(bounded - coarse, axis=0)
