"""The form that trains: a scan over chunks of tokens, each advanced at once (Yang et al. 2024).

``memory.recurrent`` takes T steps in sequence, O(TKV). One chunk of T tokens takes no scan, O(T²). Chunks of C tokens
take T/C steps in sequence, of O(C²(K+V) + CKV) each.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from fwt_jax import clipped, memory
from fwt_jax.recurrent import checkpointed_scan
from fwt_jax.rules import Rule

TINY = 32 * 32  # K·V up to which chunks have 32 tokens: the triangular system of 64 costs more than all else
SMALL = 64 * 64  # K·V up to which a memory stays in a CPU's cache
START = "memory at the start of a chunk or a block"
BLOCK = 16  # chunks that a GPU prepares at once: more take more memory, fewer launch more kernels
# The outputs of the fwm rule's scan over tokens are saved, so that the backward pass does not run the scan again.
SAVED = jax.checkpoint_policies.save_only_these_names(clipped.SCANNED)


def chunkwise(
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
    rule: Rule,
    chunk_size: int | None = None,
    precision=lax.Precision.HIGHEST,
) -> tuple[Any, jax.Array]:
    """Advances the memory of one head over T tokens, chunk by chunk.

    The last chunk is filled up with tokens that write nothing. The backward pass stores the inputs, copied into the
    order of chunks, and the memory at each chunk's start, T/C in all, and recomputes the chunk. For fwm it also stores
    the scan's outputs, V + C numbers per token. The derivative is JAX's own, so forward mode and higher derivatives
    work too. (On CPU, a gradient of bfloat16 takes twice the time of float32 from about 16,000 tokens on, because XLA
    converts the whole array to write each slice of it.) On a GPU the delta rule takes ``blockwise`` instead, except
    with a decay per channel, whose gradient would keep C²K numbers for each chunk of a block.

    Args:
      fast_weights: W_0, ``[K, V]``, float32 or float64; everything is computed in its dtype.
      query, key, value, beta, log_decay, reset, recall_scale: see the head of ``memory.py``; without a query nothing is
        read.
      written: see ``memory.recurrent``; for a rule without a ``chunk``. Other rules take zeros as no token.
      rule: a row of the table of rules. If it has no ``chunk``, tokens go one by one, and each chunk is recomputed.
      chunk_size: C, or T if that is less. None takes as few chunks as cover T, all of one size, of at most
        ``rule.chunk_size`` tokens (32 if K·V ≤ 1024). If K·V ≤ 4096, a CPU computes those of 64 in two halves, one
        after the other: a tenth less time, and twice the time to compile.
      precision: of the matrix products, as in ``jax.lax``.

    Returns:
      The reads ``[T, V]`` in value's dtype, or None, and W_T ``[K, V]``.
    """
    dtype, length = fast_weights.dtype, key.shape[0]
    chunk_size, halves = size_of_chunks(chunk_size, length, fast_weights.size, rule)
    advance_chunk = rule.chunk
    if advance_chunk is None:
        scan = functools.partial(checkpointed_scan, block=chunk_size)
        tokens = (query, key, value, beta, log_decay, reset, recall_scale, written)
        reads, fast_weights = memory.recurrent(fast_weights, *_cast(tokens, dtype), step=rule.step, scan=scan)
        return None if reads is None else reads.astype(value.dtype), fast_weights
    num_chunks = -(-length // chunk_size)
    padding = num_chunks * chunk_size - length

    def split(x):
        if padding:
            x = jnp.pad(x, ((0, padding), *((0, 0),) * (x.ndim - 1)))
        return x.reshape(num_chunks, chunk_size, *x.shape[1:])

    def advance(carry, tokens):
        reads, carry = advance_chunk(carry, *_cast(tokens, dtype), precision=precision)
        return carry, None if reads is None else reads.astype(value.dtype)

    def advance_by_halves(carry, tokens):
        half = chunk_size // 2
        carry, first = advance(carry, jax.tree.map(lambda x: x[:half], tokens))
        carry, second = advance(carry, jax.tree.map(lambda x: x[half:], tokens))
        return carry, jax.tree.map(lambda *reads: jnp.concatenate(reads), first, second)

    def advance_by_halves_on_cpu(carry, tokens):
        return lax.platform_dependent(carry, tokens, cpu=advance_by_halves, default=advance)

    @functools.partial(jax.checkpoint, prevent_cse=False, policy=SAVED)
    def checkpointed(carry, tokens):
        return (advance_by_halves_on_cpu if halves else advance)(carry, tokens)

    def body(carry, tokens):
        return checkpointed(checkpoint_name(carry, START), tokens)

    chunks = jax.tree.map(split, (query, key, value, beta, log_decay, reset, recall_scale))
    scan = functools.partial(lax.scan, body)
    if rule.corrects and num_chunks > 1 and (log_decay is None or log_decay.ndim == 1):
        scan = _by_platform(scan, functools.partial(blockwise, precision=precision))
    carry, reads = scan(rule.start(fast_weights), chunks)
    reads = None if reads is None else reads.reshape(num_chunks * chunk_size, -1)[:length]
    return reads, rule.end(carry)


def blockwise(fast_weights, chunks, *, precision):
    """``lax.scan`` over the chunks of the delta rule, with two products of each chunk in sequence: the form for a GPU.

    A GPU launches some fifty small kernels for a chunk, which takes longer than to run them if the heads are few.
    ``memory.delta_chunks`` launches them once for all chunks of a block, and eight for each chunk. The backward pass
    stores the inputs and the memory at each block's start, and recomputes the block.

    Args:
      fast_weights: W_0, ``[K, V]``.
      chunks: query, key, value, beta, log_decay, reset and recall_scale, ``[N, C, ...]``: N chunks of C tokens.
      precision: of the matrix products, as in ``jax.lax``.

    Returns:
      W_T ``[K, V]``, and the reads ``[N, C, V]`` in value's dtype, or None.
    """
    value, dtype = chunks[2], fast_weights.dtype
    num_blocks = -(-len(value) // BLOCK)
    size = -(-len(value) // num_blocks)

    def split(x):
        x = jnp.pad(x, ((0, num_blocks * size - len(x)), *((0, 0),) * (x.ndim - 1)))
        return x.reshape(num_blocks, size, *x.shape[1:])

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def advance(carry, tokens):
        reads, carry = memory.delta_chunks(carry, *_cast(tokens, dtype), precision=precision)
        return carry, None if reads is None else reads.astype(value.dtype)

    def body(carry, tokens):
        return advance(checkpoint_name(carry, START), tokens)

    fast_weights, reads = lax.scan(body, fast_weights, jax.tree.map(split, chunks))
    return fast_weights, None if reads is None else reads.reshape(-1, *value.shape[1:])[: len(value)]


def _by_platform(scan, on_gpu):
    """``on_gpu`` where a GPU compiles it, else ``scan``.

    A derivative outside of jit stores what that of any platform needs. So it stores the chunks once for both, and the
    memories that both name ``START``.
    """
    either = functools.partial(lax.platform_dependent, cuda=on_gpu, rocm=on_gpu, default=scan)
    stored = jax.checkpoint_policies.save_only_these_names(START)
    return jax.checkpoint(either, policy=stored, prevent_cse=False)


def _cast(tokens, dtype):
    return jax.tree.map(lambda x: x if x.dtype == bool else x.astype(dtype), tokens)


def size_of_chunks(chunk_size, length, numbers, rule):
    """C, and whether a CPU takes each chunk in two halves; ``numbers`` is K·V."""
    if chunk_size is not None:
        return min(chunk_size, length), False
    largest = min(rule.chunk_size, 32) if numbers <= TINY else rule.chunk_size
    halves = largest == 64 and numbers <= SMALL and length > 32
    multiple = 8 if halves else 4  # other sizes, and other halves, take up to twice as long on CPU
    chunk_size = -(-length // -(-length // largest) // multiple) * multiple
    return (chunk_size if halves else min(chunk_size, length)), halves
