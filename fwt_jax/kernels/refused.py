"""What a kernel's program is on platforms that the kernel does not run on: an error when it is compiled."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import mlir


def refused(message, out_shapes, inputs):
    """Zeros in the place of results, so that the program can be traced. A ValueError when it is compiled.

    Args:
      message: the error, with ``{platforms}`` where the names of the platforms go.
      out_shapes: a tree of arrays or ``jax.ShapeDtypeStruct``.
      inputs: arrays. In shard_map the zeros vary over every axis of the mesh that one of these varies over.
    """
    zero = _refused.bind(message=message) + zero_of(inputs)
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype) + zero.astype(x.dtype), out_shapes)


def zero_of(arrays):
    """A zero that, in shard_map, varies over every mesh axis that any of the arrays varies over."""
    return sum((jnp.zeros_like(x[(0,) * x.ndim], jnp.float32) for x in arrays), jnp.zeros((), jnp.float32))


_refused = Primitive("refused")  # a zero that cannot be compiled
_refused.def_abstract_eval(lambda message: ShapedArray((), jnp.float32))


def _refuse(context, *, message):
    raise ValueError(message.format(platforms=", ".join(context.module_context.platforms)))


mlir.register_lowering(_refused, _refuse)
