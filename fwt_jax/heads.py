"""From one head of one sequence to a batch of heads."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fwt_jax.memory import Memory


def over_heads(one_head, inputs, out_axes=(1, 0)) -> Callable[..., Any]:
    """``one_head`` mapped over the batch and the heads.

    Args:
      one_head: a function of a start without leading axes and of arrays ``[T, ...]`` (or None).
      inputs: what it will be called with: a start ``[B, H, ...]`` and arrays ``[B, T, H, ...]``. All heads share an
        array ``[B, T]``.
      out_axes: where each result has its axis of heads: 1 behind T, 0 in a memory.
    """
    in_axes = (0, *(None if x is None or x.ndim == 2 else 1 for x in inputs[1:]))
    return jax.vmap(jax.vmap(one_head, in_axes, out_axes))


def init_memory(batch_size: int, num_heads: int, key_size: int, value_size: int, dtype=jnp.float32) -> Memory:
    """An empty memory: W_0 = 0 ``[B, H, K, V]`` and z_0 = 0 ``[B, H, K]``.

    Args:
      batch_size, num_heads, key_size, value_size: B, H, K (features, after the feature map) and V.
      dtype: float32, or float64 where the inputs are float64.

    Returns:
      A ``Memory``, the default of ``fast_weight_attention``.
    """
    return Memory(
        fast_weights=jnp.zeros((batch_size, num_heads, key_size, value_size), dtype),
        key_sum=jnp.zeros((batch_size, num_heads, key_size), dtype),
    )


def start_of(memory, key, value, dtype) -> Memory:
    """The memory to start from, empty if None, in the dtype of the computation.

    It is built from the arguments, so that it has their sharding (under jit) and their varying axes (in shard_map).

    Args:
      memory: W_0 ``[B, H, K, V]`` and z_0 ``[B, H, K]``, or None.
      key, value: ``[B, T, H, K]`` and ``[B, T, H, V]``.
      dtype: float32 or float64.
    """
    no_key = jnp.zeros_like(key[:, 0], dtype)
    empty = Memory(no_key[..., None] + jnp.zeros_like(value[:, 0], dtype)[..., None, :], no_key)
    if memory is None:
        return empty
    return jax.tree.map(lambda x, zeros: x.astype(dtype) + zeros, memory, empty)
