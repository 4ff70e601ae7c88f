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

TINY = 32 * 32  # numbers of a memory: the triangular system of 64 tokens is more work than all else
SMALL = 64 * 64  # numbers of a memory: on CPU it stays in the cache, and tokens go faster one by one than in chunks


def chunkwise(
    fast_weights,
    query,
    key,
    value,
    beta,
    log_decay=None,
    reset=None,
    recall_scale=None,
    *,
    rule,
    chunk_size=None,
    precision,
):
    """Advances the memories of a batch of heads over T tokens, chunk by chunk.

    On CPU, without a ``chunk_size``, and for K·V ≤ 4096, tokens go one by one, and only derivatives take chunks.

    Args:
      fast_weights: W_0, ``[B, H, K, V]``, float32 or float64; all is computed in its dtype.
      query, key: ``[B, T, H, K]``; without a query nothing is read.
      value: ``[B, T, H, V]``.
      beta: ``[B, T, H]``.
      log_decay: None, ``[B, T, H]`` or ``[B, T, H, K]``.
      reset: None or bool ``[B, T]``.
      recall_scale: None or ``[B, T, H]``.
      rule, chunk_size, precision: see ``one_head``.

    Returns:
      The reads ``[B, T, H, V]`` in value's dtype, or None, and W_T ``[B, H, K, V]``.
    """
    arrays = (fast_weights, query, key, value, beta, log_decay, reset, recall_scale)
    in_chunks = over_heads(functools.partial(one_head, rule=rule, chunk_size=chunk_size, precision=precision))
    small = fast_weights.shape[-2] * fast_weights.shape[-1] <= SMALL
    if query is None or chunk_size is not None or not small:
        return in_chunks(*arrays)

    def by_token(*arrays):
        cast = jax.tree.map(lambda x: x if x.dtype == bool else x.astype(fast_weights.dtype), arrays)
        reads, end = over_heads(functools.partial(memory.recurrent, rule=rule))(*cast)
        return reads.astype(value.dtype), end

    def values(*arrays):
        return lax.platform_dependent(*arrays, cpu=by_token, default=in_chunks)

    return with_derivatives_of(in_chunks, values)(*arrays)


def recurrent(fast_weights, query, key, value, beta, log_decay=None, reset=None, recall_scale=None, *, rule):
    """``memory.recurrent`` of a batch of heads; shapes as in ``chunkwise``. Its gradient keeps 2√T memories."""
    values, in_blocks = (
        over_heads(functools.partial(one_head, rule=rule))
        for one_head in (memory.recurrent, memory.recurrent_in_blocks)
    )
    arrays = (fast_weights, query, key, value, beta, log_decay, reset, recall_scale)
    return with_derivatives_of(in_blocks, values)(*arrays)


def with_derivatives_of(differentiated, function):
    """``function``, but where a derivative is taken ``differentiated``, which must have the same values.

    Not to be called under ``jax.vmap`` of ours. Where a user's vmap meets a custom_jvp inside of jit, checkpoint or
    scan, JAX (0.8 to 0.12) takes the batch axes of the function for those of the rule, and exchanges axes of the
    results if they differ. Here both have that axis in front, where the rule of ``expand_dims`` puts it.
    """

    def with_axis(function):
        return lambda *arrays: jax.tree.map(lambda x: lax.expand_dims(x, (0,)), function(*arrays))

    call = jax.custom_jvp(with_axis(function))

    @functools.partial(call.defjvp, symbolic_zeros=True)
    def _(primals, tangents):
        moving = [i for i, x in enumerate(tangents) if not isinstance(x, (SymbolicZero, type(None)))]

        def of_moving(*moved):
            arrays = (moved[moving.index(i)] if i in moving else x for i, x in enumerate(primals))
            return with_axis(differentiated)(*arrays)

        return jax.jvp(of_moving, [primals[i] for i in moving], [tangents[i] for i in moving])

    return lambda *arrays: jax.tree.map(lambda x: lax.squeeze(x, (0,)), call(*arrays))


def one_head(
    fast_weights,
    query,
    key,
    value,
    beta,
    log_decay=None,
    reset=None,
    recall_scale=None,
    *,
    rule: memory.Rule,
    chunk_size: int | None = None,
    precision=lax.Precision.HIGHEST,
):
    """``chunkwise`` of one head of one sequence: the shapes are those of ``memory.chunk``.

    The last chunk is filled up with tokens that write nothing. The gradient keeps the inputs, copied into the order of
    chunks, and the memory at the start of each chunk, T/C in all (for "fwm" also what its tokens found in sequence,
    V + C numbers each), and computes the chunk anew. It is the derivative that JAX makes of the scan, so that forward
    mode and higher derivatives work too. (On CPU a gradient of bfloat16 takes twice the time of float32 from about
    16,000 tokens on, for XLA widens the whole array to write each slice of it there.)

    Args:
      fast_weights, query, key, value, beta, log_decay, reset, recall_scale: see ``chunkwise``, without B and H.
      rule: "sum", "delta" or "fwm".
      chunk_size: C, never more than T. None takes as few chunks of at most 64 tokens (32 for "fwm" and for K·V ≤ 1024)
        as cover T, all of one size. For K·V ≤ 4096 those of 64 are computed in two halves on CPU, one after the other:
        a tenth less time, and twice the time to compile.
      precision: of the matrix products, as in ``jax.lax``.

    Returns:
      The reads ``[T, V]``, or None, and W_T ``[K, V]``.
    """
    dtype, length, numbers = fast_weights.dtype, key.shape[0], fast_weights.shape[0] * fast_weights.shape[1]
    halves = False
    if chunk_size is None:
        most = 32 if rule == "fwm" or numbers <= TINY else 64
        halves = most == 64 and numbers <= SMALL and length > 32
        multiple = 8 if halves else 4  # other sizes, and other halves, take up to twice as long on CPU
        chunk_size = -(-length // -(-length // most) // multiple) * multiple
    chunk_size = chunk_size if halves else min(chunk_size, length)
    num_chunks = -(-length // chunk_size)
    padding = num_chunks * chunk_size - length

    def split(x):
        if padding:
            x = jnp.pad(x, ((0, padding), *((0, 0),) * (x.ndim - 1)))
        return x.reshape(num_chunks, chunk_size, *x.shape[1:])

    def advance(carry, chunk):
        cast = jax.tree.map(lambda x: x if x.dtype == bool else x.astype(dtype), chunk)
        reads, *carry = memory.advance(*carry, *cast, rule=rule, precision=precision)
        return tuple(carry), None if reads is None else reads.astype(value.dtype)

    def advance_by_halves(carry, chunk):
        half = chunk_size // 2
        carry, first = advance(carry, jax.tree.map(lambda x: x[:half], chunk))
        carry, second = advance(carry, jax.tree.map(lambda x: x[half:], chunk))
        return carry, None if first is None else jnp.concatenate([first, second])

    @functools.partial(jax.checkpoint, prevent_cse=False, policy=memory.KEPT)
    def body(carry, chunk):
        if not halves:
            return advance(carry, chunk)
        return lax.platform_dependent(carry, chunk, cpu=advance_by_halves, default=advance)

    clip = memory.start_clip(fast_weights) if rule == "fwm" else None
    chunks = jax.tree.map(split, (query, key, value, beta, log_decay, reset, recall_scale))
    (fast_weights, clip), reads = lax.scan(body, (fast_weights, clip), chunks)
    reads = None if reads is None else reads.reshape(num_chunks * chunk_size, -1)[:length]
    return reads, memory.end_clip(fast_weights, clip)


def over_heads(one_head, out_axes=(1, 0)):
    """Maps ``one_head(start, *inputs)``, of one sequence, over [B, H, ·] and [B, T, H, ·]; heads share a [B, T]."""

    def of_sequence(start, *inputs):
        in_axes = (0, *(None if x is None or x.ndim == 1 else 1 for x in inputs))
        return jax.vmap(one_head, in_axes, out_axes)(start, *inputs)

    return jax.vmap(of_sequence)
