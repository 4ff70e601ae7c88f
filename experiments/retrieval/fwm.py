"""The memory of the fwm rule (Schlag, Munkhdalai & Schmidhuber 2021) after the pairs of one sequence.

    W̃_t = W_{t−1} + β_t k_t e_tᵀ,   e_t = v_t − W_{t−1}ᵀk_t,   n_t = ‖W̃_t‖²,   W_t = s_t W̃_t,   s_t = 1/max(1, √n_t).

It starts empty. As in the authors' program the first write is not clipped: s_1 = 1. Values are one-hot and take no
gradient. ``fwt_jax.clipped`` is the rule for every other use. It also has decays, resets, reads within the sequence and
derivatives of every kind.

In a chunk, b_i = β_i e_i, and M is the memory at its start. S_ti = s_i ⋯ s_{t−1} are the clips between write i and
token t, S_t0 all before t, and S_Ct = s_t ⋯ s_C those from write t to the chunk's end. With n′_t = s_t² n_t = ‖W_t‖²,

    e_t = v_t − S_t0 Mᵀk_t − Σ_{i<t} S_ti (k_tᵀk_i) b_i,     n_t = n′_{t−1} + β_t e_tᵀ(2 v_t − (2 − β_t‖k_t‖²) e_t).

A bar is the gradient of the loss in what is below it, G that in the memory at the chunk's end, of C tokens. From the
last token to the first, with n′_t as a variable of its own and n̄′ = 0 after the last token,

    b̄_t = S_Ct Gᵀk_t + Σ_{i>t} S_it (k_iᵀk_t) m̄_i,                      m = v − e, what a key recalls
    n̄_t = −d_t/(2n_t) if the token is clipped, else n̄′_t = n̄_{t+1},    d_t = ⟨W̄_t, W_t⟩
    v̄_t = β_t (b̄_t + 2 n̄_t (v_t − (1 − β_t‖k_t‖²) e_t)),   m̄_t = 2 n̄_t b_t − v̄_t.

All clips together cost a number for each token: W̃_t is linear in (W_{t−1}, v_t), and n_t − n′_{t−1} is quadratic, so

    d_{t−1} = d_t − v̄_tᵀv_t + 2 n̄_t (n_t − n′_{t−1}).

In the end, with ∂n_t/∂(β_t‖k_t‖²) = β_t ‖e_t‖²,

    β̄_t = b̄_tᵀe_t + n̄_t ((n_t − n′_{t−1})/β_t + β_t‖k_t‖² ‖e_t‖²)
    k̄_t = S_Ct G b_t + S_t0 M m̄_t + Σ_{i<t} S_ti (m̄_tᵀb_i) k_i + Σ_{i>t} S_it (m̄_iᵀb_t) k_i + 2 n̄_t β_t² ‖e_t‖² k_t.

They are exact relative to the largest gradient of a sequence, because d is a sum of differences.

2·L·F·S FLOPs for each of six products of the tokens with a memory: two forward and four backward. JAX's derivative of
``fwt_jax.clipped`` takes seven, and several times as many products within a chunk. A training step of the retrieval
experiment takes 0.6 of its time with that derivative.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax

CHUNK_SIZE = 40  # 24 to 50 tokens take the same time on a CPU, within its noise
_matmul = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def write(num_values: int, key, beta, values):
    """W_L ``[F, S]`` of S ``num_values``, keys ``[L, F]``, β ``[L]`` and the ids of the values ``[L]``, in 0 … S−1.

    Float32 or float64. For the backward pass the memories at the start of each chunk and at the end are stored, and
    S + 2C numbers for each token besides the inputs.
    """
    return _forward(num_values, key, beta, values)[0]


def _forward(num_values, key, beta, values):
    """W_L, and what the backward pass needs."""
    length = len(key)
    num_chunks = -(-length // CHUNK_SIZE)
    size = -(-length // num_chunks)

    def split(x):  # the last chunk is filled up with tokens that write nothing
        x = jnp.pad(x, ((0, num_chunks * size - length), *((0, 0),) * (x.ndim - 1)))
        return x.reshape(num_chunks, size, *x.shape[1:])

    chunks = jax.tree.map(split, (key, beta, values, jnp.arange(length) == 0))
    empty = jnp.zeros((key.shape[-1], num_values), key.dtype)
    (fast_weights, _), saved = lax.scan(_advance, (empty, jnp.zeros_like(beta[0])), chunks)
    return fast_weights, (fast_weights, key, chunks, saved)


def _advance(carry, chunk):
    """A chunk: (M, n′) at its start -> at its end; and M, k_tᵀk_i, e, S, S_C, n. The first token has a mark."""
    fast_weights, squared_norm = carry
    key, beta, values, is_first = chunk
    recalled, overlaps = _matmul(key, fast_weights), jnp.tril(_matmul(key, key.T), -1)
    size, num_values = recalled.shape

    def advance(carry, token):
        writes, since_write, since_start, squared_norm = carry
        at, overlap, recalled, beta, value, key_norm, is_first = token
        recall = since_start * recalled + _matmul(overlap * since_write, writes)
        error = jnp.where(jnp.arange(num_values) == value, 1, 0) - recall
        new_norm = squared_norm + beta * jnp.sum(error * (2 * recall + beta * key_norm * error))
        clip = jnp.where(is_first, 1, lax.rsqrt(jnp.maximum(1, new_norm)))
        writes = lax.dynamic_update_slice(writes, (beta * error)[None], (at, 0))
        after = jnp.where(jnp.arange(size) <= at, clip * since_write, 1)
        carry = writes, after, clip * since_start, jnp.where(is_first, new_norm, jnp.minimum(1, new_norm))
        return carry, (error, (since_write, since_start), new_norm)

    tokens = (jnp.arange(size), overlaps, recalled, beta, values, _dot(key, key), is_first)
    start = (jnp.zeros_like(recalled), jnp.ones_like(beta), jnp.ones_like(beta[0]), squared_norm)
    (writes, *clips_to_end, squared_norm), (errors, clips, new_norms) = lax.scan(advance, start, tokens)
    to_end, start_to_end = clips_to_end
    after = start_to_end * fast_weights + _matmul(_transposed(key * to_end[:, None]), writes)
    return (after, squared_norm), (fast_weights, overlaps, errors, clips, clips_to_end, new_norms)


def _backward(num_values, saved, gradient):
    fast_weights, key, chunks, chunks_saved = saved
    start = (gradient, jnp.sum(gradient * fast_weights), jnp.zeros_like(gradient[0, 0]))
    _, gradients = lax.scan(_go_back, start, (chunks, chunks_saved), reverse=True)
    of_key, of_beta = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[: len(key)], gradients)
    return of_key, of_beta, None


write.defvjp(_forward, _backward)


def _go_back(carry, chunk):
    """A chunk: (G, d, n̄′) at its end -> at its start; and the gradients of its keys and of β.

    ``of_x`` is x̄, ``of_scale`` d, ``shrink`` β‖k‖², and ``at_value`` eᵀv.
    """
    gradient, of_scale, of_norm = carry
    (key, beta, values, is_first), (fast_weights, overlaps, errors, clips, clips_to_end, new_norms) = chunk
    (since_write, since_start), (to_end, start_to_end), num_values = clips, clips_to_end, errors.shape[-1]
    writes, shrink = beta[:, None] * errors, beta * _dot(key, key)
    at_value = jnp.take_along_axis(errors, values[:, None], axis=-1, mode="promise_in_bounds")[:, 0]
    squared_errors = _dot(errors, errors)
    gain = 2 * (at_value - squared_errors) + shrink * squared_errors  # (n_t − n′_{t−1})/β_t
    clipped = jnp.where(is_first, 0, (1 + jnp.sign(new_norms - 1)) / 2)  # one half at a tie, as for jnp.maximum
    by_scale = -clipped / (2 * jnp.maximum(1, new_norms))

    def go_back(carry, token):
        of_recalls, of_scale, of_norm = carry
        at, overlap, from_end, to_end, error, beta, value, shrink, at_value, gain, by_scale, clipped = token
        of_write = to_end * from_end + _matmul(overlap, of_recalls)
        of_norm = by_scale * of_scale + (1 - clipped) * of_norm
        is_value = jnp.arange(num_values) == value
        of_recall = beta * (2 * of_norm * ((2 - shrink) * error - jnp.where(is_value, 1, 0)) - of_write)
        of_own_value = jnp.sum(jnp.where(is_value, of_write, 0)) + 2 * of_norm * (1 - (1 - shrink) * at_value)
        of_scale = of_scale + beta * (2 * of_norm * gain - of_own_value)
        of_recalls = lax.dynamic_update_slice(of_recalls, of_recall[None], (at, 0))
        return (of_recalls, of_scale, of_norm), (jnp.sum(of_write * error), of_norm)

    per_token = (to_end, errors, beta, values, shrink, at_value, gain, by_scale, clipped)
    tokens = (jnp.arange(len(key)), (since_write * overlaps).T, _matmul(key, gradient), *per_token)
    start = (jnp.zeros_like(errors), of_scale, of_norm)
    (of_recalls, of_scale, of_norm), (of_beta, of_norms) = lax.scan(go_back, start, tokens, reverse=True)
    of_beta += of_norms * (gain + shrink * squared_errors)
    of_overlaps = jnp.tril(since_write * _matmul(of_recalls, writes.T), -1)
    of_overlaps += of_overlaps.T + jnp.diag(2 * of_norms * jnp.square(beta) * squared_errors)  # the diagonal is of ‖k‖²
    of_recalled = since_start[:, None] * of_recalls
    of_key = _matmul(to_end[:, None] * writes, gradient.T) + _matmul(of_recalled, fast_weights.T)
    of_key += _matmul(of_overlaps, key)
    gradient = start_to_end * gradient + _matmul(_transposed(key), of_recalled)
    return (gradient, of_scale, of_norm), (of_key, of_beta)


def _dot(a, b):
    return jnp.sum(a * b, axis=-1)


def _transposed(x):
    """The barrier makes XLA copy. Without it, a CPU multiplies with a transposed first operand in twice the time."""
    return lax.optimization_barrier(x.T)
