"""The form that defines: ``memory.recurrent`` of a batch of heads, with a gradient that keeps 2√T memories, not T."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero

from fwt_jax import memory
from fwt_jax.heads import over_heads


def recurrent(
    fast_weights, query, key, value, beta, log_decay=None, reset=None, recall_scale=None, written=None, *, step
) -> tuple[Any, jax.Array]:
    """Advances the memories of a batch of heads token by token.

    Args:
      fast_weights: W_0, ``[B, H, K, V]``, float32 or float64; everything is computed in its dtype.
      query, key: ``[B, T, H, K]``; without a query nothing is read.
      value: ``[B, T, H, V]``.
      beta, recall_scale: ``[B, T, H]``; recall_scale may be None.
      log_decay: None, ``[B, T, H]`` or ``[B, T, H, K]``.
      reset, written: None or bool ``[B, T]``; see ``memory.recurrent``.
      step: the step of a rule, see ``rules.Rule``.

    Returns:
      The reads ``[B, T, H, V]`` in value's dtype, or None, and W_T ``[B, H, K, V]``.
    """
    tokens = (query, key, value, beta, log_decay, reset, recall_scale, written)
    cast = jax.tree.map(lambda x: x if x.dtype == bool else x.astype(fast_weights.dtype), tokens)
    inputs = (fast_weights, *cast)
    forward = over_heads(functools.partial(memory.recurrent, step=step, scan=lax.scan), inputs)
    differentiated = over_heads(functools.partial(memory.recurrent, step=step, scan=checkpointed_scan), inputs)
    reads, fast_weights = with_derivatives_of(differentiated, forward)(*inputs)
    return None if reads is None else reads.astype(value.dtype), fast_weights


def checkpointed_scan(body, carry, inputs, *, block=None):
    """``lax.scan`` over blocks of ``block`` tokens (√T if None); the backward pass recomputes each block.

    Its gradient keeps T/block + block carries, not T. Without a gradient it takes up to twice the time of ``lax.scan``.
    """
    length = len(jax.tree.leaves(inputs)[0])
    if length == 1:
        return lax.scan(body, carry, inputs)
    block = max(1, int(length**0.5)) if block is None else min(block, length)
    whole = length // block * block
    blocks = jax.tree.map(lambda x: x[:whole].reshape(-1, block, *x.shape[1:]), inputs)
    rest = jax.tree.map(lambda x: x[whole:], inputs)
    carry, outputs = lax.scan(_block_of(body), carry, blocks)
    carry, last_outputs = lax.scan(body, carry, rest)
    outputs = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), outputs)
    return carry, jax.tree.map(lambda x, last: jnp.concatenate([x, last]), outputs, last_outputs)


@functools.lru_cache(maxsize=64)  # outside of jit, JAX compiles a scan once per function
def _block_of(body):
    return jax.checkpoint(functools.partial(lax.scan, body), prevent_cse=False)


def with_derivatives_of(differentiated, function):
    """``function``, with the derivative of ``differentiated``, which must return the same values.

    Call it outside of this library's vmaps. Under a user's vmap inside of jit, checkpoint or scan, JAX (0.8 to 0.12)
    assumes that a custom_jvp and its rule return the axis of the batch in the same place. If they do not, it exchanges
    axes of the results. ``expand_dims`` adds a first axis to both, and puts the axis of the batch there.
    """

    def with_axis(function):
        return lambda *arrays: jax.tree.map(lambda x: lax.expand_dims(x, (0,)), function(*arrays))

    call = jax.custom_jvp(with_axis(function))

    @functools.partial(call.defjvp, symbolic_zeros=True)
    def _(primals, tangents):
        varying = [i for i, x in enumerate(tangents) if not isinstance(x, (SymbolicZero, type(None)))]

        def of_varying(*arguments):
            arrays = list(primals)
            for i, x in zip(varying, arguments, strict=True):
                arrays[i] = x
            return with_axis(differentiated)(*arrays)

        return jax.jvp(of_varying, [primals[i] for i in varying], [tangents[i] for i in varying])

    return lambda *arrays: jax.tree.map(lambda x: lax.squeeze(x, (0,)), call(*arrays))
