"""Reads of the memory of the fwm rule (Schlag, Munkhdalai & Schmidhuber 2021) after the pairs of one sequence.

    W̃_t = W_{t−1} + β_t k_t e_tᵀ,   e_t = v_t − W_{t−1}ᵀk_t,   n_t = ‖W̃_t‖²,   W_t = s_t W̃_t,   s_t = 1/max(1, √n_t).

The memory starts empty, and is only read after the last token: o = W_Lᵀq. As in the authors' program the first write is
not clipped: s_1 = 1. Values are one-hot and take no gradient. ``fwt_jax.clipped`` is the rule for every other use. It
also has decays, resets, reads within the sequence and derivatives of every kind.

In a chunk, b_i = β_i e_i, and M is the memory at its start. S_ti = s_i ⋯ s_{t−1} are the clips between write i and
token t, S_t0 all before t, S_Ct = s_t ⋯ s_C those from write t to the chunk's end, and S_C0 all of the chunk. With
n′_t = s_t² n_t = ‖W_t‖²,

    e_t = v_t − S_t0 Mᵀk_t − Σ_{i<t} S_ti (k_tᵀk_i) b_i,     n_t = n′_{t−1} + β_t e_tᵀ(2 v_t − (2 − β_t‖k_t‖²) e_t).

A bar is the gradient of the loss in what is below it, G that in the memory at the chunk's end, of C tokens. From the
last token to the first, with n′_t as a variable of its own and n̄′ = 0 after the last token,

    b̄_t = S_Ct Gᵀk_t + Σ_{i>t} S_it (k_iᵀk_t) m̄_i,                      m = v − e, what a key recalls
    n̄_t = −d_t/(2n_t) if the token is clipped, else n̄′_t = n̄_{t+1},    d_t = ⟨W̄_t, W_t⟩
    v̄_t = β_t (b̄_t + 2 n̄_t (v_t − (1 − β_t‖k_t‖²) e_t)),   m̄_t = 2 n̄_t b_t − v̄_t.

All clips together cost a number for each token: W̃_t is linear in (W_{t−1}, v_t), and n_t − n′_{t−1} is quadratic, so

    d_{t−1} = d_t − v̄_tᵀv_t + 2 n̄_t (n_t − n′_{t−1}),     d_L = Σ ōᵀo over the reads.

In the end q̄ = W_L ō and, with ∂n_t/∂(β_t‖k_t‖²) = β_t ‖e_t‖²,

    β̄_t = b̄_tᵀe_t + n̄_t ((n_t − n′_{t−1})/β_t + β_t‖k_t‖² ‖e_t‖²)
    k̄_t = S_Ct G b_t + S_t0 M m̄_t + Σ_{i<t} S_ti (m̄_tᵀb_i) k_i + Σ_{i>t} S_it (m̄_iᵀb_t) k_i + 2 n̄_t β_t² ‖e_t‖² k_t.

They are exact relative to the largest gradient of a sequence, because d is a sum of differences.

A chunk takes six products with a memory, of at most 2·C·F·S FLOPs: two forward and four backward. The first chunk takes
three, because its M is empty. So does the last one, because its W_L is not formed, and its G = Σ q ōᵀ stays the product
of two thin matrices. A chunk alone takes none. JAX's derivative of ``fwt_jax.clipped`` takes seven in every chunk, and
several times as many products within a chunk.

In M, the column of a value is zero until the first write of that value, and its gradient is not needed before. So the
columns stand in the order of these writes, and chunk j takes the first min(S, j·C), the last one all. With L = 2S and
S = 200 the chunks take 80 % of the columns.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

CHUNK_SIZE = 40  # on a CPU 28, 34 and 50 tokens are no faster
_matmul = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST)


def read(num_values: int, key, beta, values, query):
    """W_Lᵀq ``[Q, S]`` for queries ``[Q, F]``, keys ``[L, F]``, β ``[L]`` and ids of values ``[L]``, in 0 … S−1.

    Float32 or float64. S is ``num_values``. Stored for the backward pass are the memory at the start of each chunk but
    the first, and about S + 2C numbers for each token besides the inputs.
    """
    length = len(key)
    num_chunks = -(-length // CHUNK_SIZE)
    size = -(-length // num_chunks)

    def split(x):  # the last chunk is filled up with tokens that write nothing
        x = jnp.pad(x, ((0, num_chunks * size - length), *((0, 0),) * (x.ndim - 1)))
        return list(x.reshape(num_chunks, size, *x.shape[1:]))

    ranks = _ranks(num_values, values)
    return _read(num_values, list(zip(split(key), split(beta), split(ranks[values]), strict=True)), query)[:, ranks]


def _ranks(num_values, values):
    """The column of each value: the number of values whose first write is earlier. Those never written share one."""
    length = len(values)
    first = jnp.full(num_values, length).at[values].min(jnp.arange(length), mode="promise_in_bounds")
    return jnp.sum(first < first[:, None], axis=1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _read(num_values, chunks, query):
    return _forward(num_values, chunks, query)[0]


class _Written(NamedTuple):
    """What a chunk leaves for its end and for the backward pass.

    M at its start, or None in the first chunk; and k_tᵀk_i, e, the clips S_ti, S_t0, S_Ct and S_C0, and n.
    """

    fast_weights: jax.Array | None
    overlaps: jax.Array
    errors: jax.Array
    since_write: jax.Array
    since_start: jax.Array
    to_end: jax.Array
    start_to_end: jax.Array
    new_norms: jax.Array


def _forward(num_values, chunks, query):
    """The reads, and what the backward pass needs.

    The chunks are a Python list. A ``lax.scan`` slices them and stacks what it saves, in about a tenth of the time.
    """
    *chunks, last = chunks
    carry, saved = (None, jnp.zeros_like(last[1][0])), []
    for number, chunk in enumerate(chunks, 1):
        carry, written = _advance(min(num_values, number * len(chunk[1])), carry, chunk)
        saved.append((chunk, written))
    (key, beta, _), (fast_weights, squared_norm) = last, carry
    _, written = _write(num_values, fast_weights, squared_norm, last)
    saved.append((last, written))
    out = _matmul(_matmul(query, key.T) * (written.to_end * beta), written.errors)
    if fast_weights is not None:
        out += written.start_to_end * _widened(_matmul(query, fast_weights), num_values)
    return out, (query, out, saved)


def _advance(width, carry, chunk):
    """A chunk: (M, n′) at its start -> at its end; and what it leaves. M is None at the start of the first.

    M has ``width`` columns at its end, and as many or fewer at its start.
    """
    (key, beta, _), (fast_weights, squared_norm) = chunk, carry
    squared_norm, written = _write(width, fast_weights, squared_norm, chunk)
    after = _matmul(_transposed((written.to_end * beta)[:, None] * key), written.errors)
    if fast_weights is not None:
        after += written.start_to_end * _widened(fast_weights, width)
    return (after, squared_norm), written


def _write(width, fast_weights, squared_norm, chunk):
    """n′ at the chunk's end, and what the chunk leaves. e has ``width`` columns."""
    key, beta, values = chunk
    size, overlaps = len(key), jnp.tril(_matmul(key, key.T), -1)
    recalled = jnp.zeros((size, 0), key.dtype) if fast_weights is None else _matmul(key, fast_weights)

    def advance(carry, token):
        errors, since_write, since_start, squared_norm = carry
        at, overlap, recalled, beta, value, key_norm = token
        recall = since_start * recalled + _matmul(overlap * since_write, errors)
        error = jnp.where(jnp.arange(width) == value, 1, 0) - recall
        new_norm = squared_norm + beta * jnp.sum(error * (2 * recall + beta * key_norm * error))
        clip, clipped_norm = lax.rsqrt(jnp.maximum(1, new_norm)), jnp.minimum(1, new_norm)
        if fast_weights is None:  # the first write is not clipped
            clip, clipped_norm = jnp.where(at == 0, 1, clip), jnp.where(at == 0, new_norm, clipped_norm)
        errors = lax.dynamic_update_slice(errors, error[None], (at, 0))
        after = jnp.where(jnp.arange(size) <= at, clip * since_write, 1)
        return (errors, after, clip * since_start, clipped_norm), (since_write, since_start, new_norm)

    tokens = (jnp.arange(size), beta * overlaps, _widened(recalled, width), beta, values, _dot(key, key))
    start = (jnp.zeros((size, width), key.dtype), jnp.ones_like(beta), jnp.ones_like(beta[0]), squared_norm)
    carry, (since_write, since_start, new_norms) = lax.scan(advance, start, tokens)
    errors, to_end, start_to_end, squared_norm = carry
    return squared_norm, _Written(
        fast_weights, overlaps, errors, since_write, since_start, to_end, start_to_end, new_norms
    )


def _backward(num_values, residuals, of_out):
    query, out, saved = residuals
    (key, beta, _), written = saved[-1]
    of_query = _matmul(_matmul(of_out, written.errors.T) * (written.to_end * beta), key)
    if (fast_weights := written.fast_weights) is not None:
        of_query += written.start_to_end * _matmul(of_out[:, : fast_weights.shape[1]], fast_weights.T)
    carry, of_chunks = ((query, of_out), jnp.sum(of_out * out), jnp.zeros_like(written.start_to_end)), []
    for chunk in reversed(saved):
        carry, of_chunk = _go_back(carry, chunk)
        of_chunks.append((*of_chunk, None))
    return of_chunks[::-1], of_query


_read.defvjp(_forward, _backward)


def _go_back(carry, chunk):
    """A chunk: (G, d, n̄′) at its end -> at its start, unless it is the first; and the gradients of its keys and of β.

    G has as many columns as M has there. ``of_x`` is x̄, ``of_scale`` d, ``shrink`` β‖k‖², and ``at_value`` eᵀv.
    """
    gradient, of_scale, of_norm = carry
    (key, beta, values), written = chunk
    fast_weights, overlaps, errors, since_write, since_start, to_end, start_to_end, new_norms = written
    width = errors.shape[1]
    shrink = beta * _dot(key, key)
    at_value = jnp.take_along_axis(errors, values[:, None], axis=-1, mode="promise_in_bounds")[:, 0]
    squared_errors = _dot(errors, errors)
    gain = 2 * (at_value - squared_errors) + shrink * squared_errors  # (n_t − n′_{t−1})/β_t
    clipped = (1 + jnp.sign(new_norms - 1)) / 2  # one half at a tie, as for jnp.maximum
    if fast_weights is None:
        clipped = clipped.at[0].set(0)
    by_scale = -clipped / (2 * jnp.maximum(1, new_norms))

    def go_back(carry, token):
        of_recalls, of_scale, of_norm = carry
        at, overlap, from_end, to_end, error, beta, value, shrink, at_value, gain, by_scale, clipped = token
        of_write = to_end * from_end + _matmul(overlap, of_recalls)
        of_norm = by_scale * of_scale + (1 - clipped) * of_norm
        is_value = jnp.arange(width) == value
        of_recall = beta * (2 * of_norm * ((2 - shrink) * error - jnp.where(is_value, 1, 0)) - of_write)
        of_own_value = jnp.sum(jnp.where(is_value, of_write, 0)) + 2 * of_norm * (1 - (1 - shrink) * at_value)
        of_scale = of_scale + beta * (2 * of_norm * gain - of_own_value)
        of_recalls = lax.dynamic_update_slice(of_recalls, of_recall[None], (at, 0))
        return (of_recalls, of_scale, of_norm), (jnp.sum(of_write * error), of_norm)

    per_token = (to_end, errors, beta, values, shrink, at_value, gain, by_scale, clipped)
    tokens = (jnp.arange(len(key)), (since_write * overlaps).T, _times(key, gradient), *per_token)
    start = (jnp.zeros_like(errors), of_scale, of_norm)
    (of_recalls, of_scale, of_norm), (of_beta, of_norms) = lax.scan(go_back, start, tokens, reverse=True)
    of_beta += of_norms * (gain + shrink * squared_errors)
    of_overlaps = jnp.tril(since_write * beta * _matmul(of_recalls, errors.T), -1)
    of_overlaps += of_overlaps.T + jnp.diag(2 * of_norms * jnp.square(beta) * squared_errors)  # the diagonal is of ‖k‖²
    of_key = (to_end * beta)[:, None] * _times_transposed(errors, gradient) + _matmul(of_overlaps, key)
    if fast_weights is None:
        return None, (of_key, of_beta)
    of_recalled = since_start[:, None] * of_recalls[:, : fast_weights.shape[1]]
    of_key += _matmul(of_recalled, fast_weights.T)
    gradient = start_to_end * _whole(gradient, fast_weights.shape[1]) + _matmul(_transposed(key), of_recalled)
    return (gradient, of_scale, of_norm), (of_key, of_beta)


def _times(x, gradient):
    """x G, where G is an array, or the pair (q, ō) of ``[Q, F]`` and ``[Q, S]`` that stands for qᵀō."""
    if not isinstance(gradient, tuple):
        return _matmul(x, gradient)
    query, of_out = gradient
    return _matmul(_matmul(x, query.T), of_out)


def _times_transposed(x, gradient):
    """x Gᵀ."""
    if not isinstance(gradient, tuple):
        return _matmul(x, gradient.T)
    query, of_out = gradient
    return _matmul(_matmul(x, of_out.T), query)


def _whole(gradient, width):
    """The first ``width`` columns of G, as an array."""
    if not isinstance(gradient, tuple):
        return gradient[:, :width]
    query, of_out = gradient
    return _matmul(query.T, of_out[:, :width])


def _widened(x, width):
    """x with columns of zeros on its right, to ``width``."""
    return jnp.pad(x, ((0, 0), (0, width - x.shape[1])))


def _dot(a, b):
    return jnp.sum(a * b, axis=-1)


def _transposed(x):
    """The barrier makes XLA copy. Without it, a CPU multiplies with a transposed first operand in twice the time."""
    return lax.optimization_barrier(x.T)
