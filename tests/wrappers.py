"""JAX's transformations as functions from an attention to an attention that must give the same numbers.

An attention is a function of arrays by name and of integers by name, or None: segment_ids [B, T] and lengths [B]. It
returns y, the fast weights and key_sum.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

MEMORY = ("fast_weights", "key_sum")
OUTPUTS = ("y", *MEMORY)

# The axis that each of them cuts into parts.
AXES = {"jit": None, "checkpoint": None, "cond": None, "map": "batch", "shard_map": "batch", "scan": "length"}
AXES |= {"vmap of batch": "batch", "vmap of heads": "heads"}


def wrap(attention, name, parts=2, shared=(), rng=None):
    """The attention in the transformation of this name.

    Args:
      attention: see the head of this file.
      name: one of ``AXES``.
      parts: into how many the axis is cut.
      shared: names of the arguments that ``vmap`` does not map; ``tie`` makes equal what is shared.
      rng: where ``vmap`` puts its axis in each argument and output; in front if not given.
    """
    if name == "jit":
        return jax.jit(attention)
    if name == "checkpoint":
        return jax.checkpoint(attention)
    if name == "cond":
        return _conditional(attention)
    if name.startswith("vmap"):
        return _vectorized(attention, AXES[name], parts, shared, rng)
    return {"map": _mapped, "shard_map": _sharded, "scan": _scanned}[name](attention, parts)


def axis_of(name, cut):
    """Of [B, T, H, ·], or of a memory [B, H, ·], or of ids [B, T]."""
    return {"batch": 0, "length": 1, "heads": 1 if name in MEMORY else 2}[cut]


def tie(wrappers, name, x):
    """An argument, made equal where parts of a ``vmap`` share it. Wrappers: (name, parts, shared), outermost first."""
    outer = dict.fromkeys(AXES.values(), 1)
    for wrapper, number, shared in wrappers:
        cut = AXES[wrapper]
        if name in shared:
            axis = axis_of(name, cut)
            parts = x.reshape(*x.shape[:axis], outer[cut], number, -1, *x.shape[axis + 1 :])
            x = np.broadcast_to(np.take(parts, [0], axis + 1), parts.shape).reshape(x.shape)
        outer[cut] *= number
    return x


def _split(x, axis, parts, to=0):
    x = x.reshape(*x.shape[:axis], parts, -1, *x.shape[axis + 1 :])
    return jnp.moveaxis(x, axis, to)


def _join(x, axis, came_from=0):
    x = jnp.moveaxis(x, came_from, axis)
    return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])


def _conditional(attention):
    def nothing(*inputs):
        zero = jnp.zeros_like(inputs[0]["value"][0, 0, 0, 0])  # in shard_map varying over the mesh, as the outputs are
        outputs = jax.eval_shape(attention, *inputs)
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype) + zero.astype(x.dtype), outputs)

    def call(arrays, context):
        always = jnp.isfinite(jnp.sum(arrays["value"]))
        return jax.lax.cond(always, attention, nothing, arrays, context)

    return call


def _mapped(attention, parts):
    """One batch after the other."""

    def call(arrays, context):
        inputs = jax.tree.map(lambda x: _split(x, 0, parts), (arrays, context))
        return jax.tree.map(lambda x: _join(x, 0), jax.lax.map(lambda part: attention(*part), inputs))

    return call


def _sharded(attention, parts):
    mesh = jax.make_mesh((parts,), ("batch",), (AxisType.Auto,), devices=jax.devices()[:parts])
    return jax.jit(jax.shard_map(attention, mesh=mesh, in_specs=P("batch"), out_specs=P("batch")))


def _scanned(attention, parts):
    """One call after the other, each with a part of the tokens and the memory that the last one left."""

    def call(arrays, context):
        tokens = {name: x for name, x in arrays.items() if name not in MEMORY}
        if "key_sum" in arrays:
            memory = tuple(arrays[name] for name in MEMORY)
        else:
            like = jax.eval_shape(attention, arrays, context)[1:]
            zero = jnp.zeros_like(arrays["value"][0, 0, 0, 0])  # in shard_map varying over the mesh, as what is written
            memory = tuple(jnp.zeros(x.shape, x.dtype) + zero.astype(x.dtype) for x in like)

        def body(memory, part):
            tokens, context = part
            y, *memory = attention(tokens | dict(zip(MEMORY, memory, strict=True)), context)
            return tuple(memory), y

        context = dict(context or {})
        lengths = context.pop("lengths", None)
        inputs, context = jax.tree.map(lambda x: _split(x, 1, parts), (tokens, context))
        if lengths is not None:  # of each part; below 0 and above its tokens they count as 0 and as all of them
            size = arrays["value"].shape[1] // parts
            context["lengths"] = jnp.stack([lengths - i * size for i in range(parts)])
        memory, y = jax.lax.scan(body, memory, (inputs, context or None))
        return _join(y, 1), *memory

    return call


def _vectorized(attention, cut, parts, shared, rng):
    """Over a new axis, but for the arguments that are shared."""
    names = ("query", "key", "value", "beta", "log_decay", *MEMORY, "segment_ids", "lengths", "y")
    where = {name: 0 if rng is None else rng.random() for name in names}

    def place(name, ndim):
        return int(where[name] * (ndim + 1))

    def call(arrays, context):
        places = {name: place(name, x.ndim) for name, x in arrays.items()}
        inputs = {name: _split(x, axis_of(name, cut), parts, places[name]) for name, x in arrays.items()}
        for name in set(shared) & set(arrays):
            inputs[name], places[name] = jnp.take(inputs[name], 0, places[name]), None
        context_places = None
        if cut == "batch" and context is not None:
            context_places = {name: place(name, x.ndim) for name, x in context.items()}
            context = {name: _split(x, 0, parts, context_places[name]) for name, x in context.items()}
        out_places = tuple(place(name, ndim) for name, ndim in zip(OUTPUTS, (4, 4, 3), strict=True))
        outputs = jax.vmap(attention, (places, context_places), out_places)(inputs, context)
        axes = [axis_of(name, cut) for name in OUTPUTS]
        return tuple(_join(x, axis, place) for x, axis, place in zip(outputs, axes, out_places, strict=True))

    return call
