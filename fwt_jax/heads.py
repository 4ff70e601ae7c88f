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
        array ``[B, T]``. An array of fewer heads has one for each group of H, and nothing repeats it.
      out_axes: where each result has its axis of heads: 1 behind T, 0 in a memory.
    """
    in_axes = (0, *(None if x is None or x.ndim == 2 else 1 for x in inputs[1:]))
    groups = min(x.shape[2] for x in inputs[1:] if x is not None and x.ndim > 2)
    if groups == inputs[0].shape[1]:
        return jax.vmap(jax.vmap(one_head, in_axes, out_axes))
    # What the heads of a group share is not mapped over them: the products of queries and keys are made once.
    is_shared = [axis is not None and x.shape[axis + 1] == groups for axis, x in zip(in_axes, inputs, strict=True)]
    in_group = [None if shared else axis for axis, shared in zip(in_axes, is_shared, strict=True)]
    mapped = jax.vmap(jax.vmap(jax.vmap(one_head, in_group, out_axes), in_axes, out_axes))

    def split(x, axis):
        if axis is None:
            return x
        return x.reshape(*x.shape[: axis + 1], groups, -1, *x.shape[axis + 2 :])

    def join(axis, tree):
        return jax.tree.map(lambda x: x.reshape(*x.shape[: axis + 1], -1, *x.shape[axis + 3 :]), tree)

    return lambda *inputs: jax.tree.map(join, out_axes, mapped(*map(split, inputs, in_group)))


def of_value_heads(x, heads: int, axis: int = 2):
    """x with as many heads along an axis as values have: each query or key head h repeated for those that it serves."""
    if x.shape[axis] == heads:
        return x
    # As jnp.repeat, which asks for the sharding of its result on a mesh of explicit axes.
    before, after = x.shape[: axis + 1], x.shape[axis + 1 :]
    repeated = jnp.broadcast_to(jnp.expand_dims(x, axis + 1), (*before, heads // x.shape[axis], *after))
    return repeated.reshape(*before[:-1], heads, *after)


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
      memory: W_0 ``[B, HV, K, V]`` and z_0 ``[B, HV, K]``, or None.
      key, value: ``[B, T, H, K]`` and ``[B, T, HV, V]``, see ``fast_weight_attention``.
      dtype: float32 or float64.
    """
    no_key = of_value_heads(jnp.zeros_like(key[:, 0], dtype), value.shape[2], axis=1)
    empty = Memory(no_key[..., None] + jnp.zeros_like(value[:, 0], dtype)[..., None, :], no_key)
    if memory is None:
        return empty
    return jax.tree.map(lambda x, zeros: x.astype(dtype) + zeros, memory, empty)
