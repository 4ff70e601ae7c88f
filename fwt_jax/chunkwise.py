"""The form that trains: a scan over chunks of tokens, each advanced at once (Yang et al. 2024).

Between the extremes of ``memory.recurrent`` (T steps in sequence, O(TKV)) and one chunk of length T (none, O(T²)) stand
T/C steps in sequence of O(C²(K+V) + CKV) each. Its parts are those of ``memory.chunk``.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero

from fwt_jax import memory

SMALL = 64 * 64  # numbers of a memory: on CPU it stays in the cache, and tokens go faster one by one than in chunks


def chunkwise(fast_weights, query, key, value, beta, log_decay=None, reset=None, *, rule, chunk_size=None, precision):
    """Advances the memories of a batch of heads over T tokens, chunk by chunk.

    On CPU, without a ``chunk_size``, and for K·V ≤ 4096, tokens go one by one, and only derivatives take chunks.

    Args:
      fast_weights: W_0, ``[B, H, K, V]``, float32 or float64; all is computed in its dtype.
      query, key: ``[B, T, H, K]``; without a query nothing is read.
      value: ``[B, T, H, V]``.
      beta: ``[B, T, H]``.
      log_decay: None, ``[B, T, H]`` or ``[B, T, H, K]``.
      reset: None or bool ``[B, T]``.
      rule, chunk_size, precision: see ``one_head``.

    Returns:
      The reads ``[B, T, H, V]`` in value's dtype, or None, and W_T ``[B, H, K, V]``.
    """
    arrays = (fast_weights, query, key, value, beta, log_decay, reset)
    in_chunks = over_heads(functools.partial(one_head, rule=rule, chunk_size=chunk_size, precision=precision))
    small = fast_weights.shape[-2] * fast_weights.shape[-1] <= SMALL
    if query is None or chunk_size is not None or not small or jax.default_backend() != "cpu":
        return in_chunks(*arrays)

    @jax.custom_jvp
    def by_token(*arrays):
        cast = jax.tree.map(lambda x: x if x.dtype == bool else x.astype(fast_weights.dtype), arrays)
        reads, end = over_heads(functools.partial(memory.recurrent, rule=rule))(*cast)
        return reads.astype(value.dtype), end

    @functools.partial(by_token.defjvp, symbolic_zeros=True)
    def _(primals, tangents):
        moving = [i for i, x in enumerate(tangents) if not isinstance(x, (SymbolicZero, type(None)))]

        def function(*moved):
            return in_chunks(*(moved[moving.index(i)] if i in moving else x for i, x in enumerate(primals)))

        return jax.jvp(function, [primals[i] for i in moving], [tangents[i] for i in moving])

    return by_token(*arrays)


def one_head(
    fast_weights,
    query,
    key,
    value,
    beta,
    log_decay=None,
    reset=None,
    *,
    rule: memory.Rule,
    chunk_size: int | None = None,
    precision=lax.Precision.HIGHEST,
):
    """``chunkwise`` of one head of one sequence: the shapes are those of ``memory.chunk``.

    The last chunk is filled up with tokens that write nothing. The gradient keeps the inputs, copied into the order of
    chunks (on CPU in float32), and the memory at the start of each chunk, T/C in all (for "fwm" also what its tokens
    found in sequence, V + C numbers each), and computes the chunk anew. It is the derivative that JAX makes of the
    scan, so that forward mode and higher derivatives work too.

    Args:
      fast_weights, query, key, value, beta, log_decay, reset: see ``chunkwise``, without B and H.
      rule: "sum", "delta" or "fwm".
      chunk_size: C, never more than T. None takes as few chunks of at most 64 tokens (32 for "fwm" and where CPU is the
        default backend) as cover T, all of one size, a multiple of 4 (other sizes take up to twice as long on CPU).
      precision: of the matrix products, as in ``jax.lax``.

    Returns:
      The reads ``[T, V]``, or None, and W_T ``[K, V]``.
    """
    on_cpu, dtype, length = jax.default_backend() == "cpu", fast_weights.dtype, key.shape[0]
    if chunk_size is None:
        most = 32 if rule == "fwm" or on_cpu else 64
        chunk_size = -(-length // -(-length // most) // 4) * 4
    chunk_size = min(chunk_size, length)
    num_chunks = -(-length // chunk_size)
    padding = num_chunks * chunk_size - length

    def cast(x):
        return x if x.dtype == bool else x.astype(dtype)

    def split(x):
        if on_cpu:  # where XLA widens all of a bfloat16 array to write a slice of it, so that time would go with T²
            x = cast(x)
        if padding:
            x = jnp.pad(x, ((0, padding), *((0, 0),) * (x.ndim - 1)))
        return x.reshape(num_chunks, chunk_size, *x.shape[1:])

    @functools.partial(jax.checkpoint, prevent_cse=False, policy=memory.KEPT)
    def body(carry, chunk):
        reads, *carry = memory.advance(*carry, *jax.tree.map(cast, chunk), rule=rule, precision=precision)
        _, _, value, *_ = chunk
        return tuple(carry), None if reads is None else reads.astype(value.dtype)

    clip = memory.start_clip(fast_weights) if rule == "fwm" else None
    chunks = jax.tree.map(split, (query, key, value, beta, log_decay, reset))
    (fast_weights, clip), reads = lax.scan(body, (fast_weights, clip), chunks)
    reads = None if reads is None else reads.reshape(num_chunks * chunk_size, -1)[:length].astype(value.dtype)
    return reads, memory.end_clip(fast_weights, clip)


def over_heads(one_head, out_axes=(1, 0)):
    """Maps ``one_head(start, *inputs, reset)``, of one sequence, over [B, H, ·], [B, T, H, ·] and [B, T]."""

    def mapped(start, *inputs):
        in_axes = (0, *(1,) * (len(inputs) - 1), None)
        return jax.vmap(jax.vmap(one_head, in_axes, out_axes))(start, *inputs)

    return mapped
