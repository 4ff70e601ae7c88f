"""A kernel of many rows and heads under ``jax.vmap``, and on the devices of a mesh.

Each argument and result of a function has a string that names its axes, as "b t h k". Two axes may be split: the rows
b, which come first, and the heads h. An argument may be None.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from fwt_jax.sharding import BATCH, HEADS


def over_batch_and_mesh(inputs, outputs):
    """A decorator of ``function(static, *arrays)``. Its vmap is a larger b.

    In a program for several devices that is not in shard_map, each device computes the rows and the heads that it has.
    """

    def decorator(function):
        def call(static, *arrays):
            from fwt_jax.kernels.triton_arrays import INTERPRETED

            over_rows = functools.partial(function, static)
            # JAX forgets the callback of an interpreted kernel if it is called in a partitioned function.
            over_rows = over_rows if INTERPRETED else over_mesh(over_rows, inputs, outputs)
            mapped = jax.custom_batching.custom_vmap(over_rows)

            @mapped.def_vmap
            def _(axis_size, batched, *arrays):
                batched = tuple(batched)
                first = next(x for x, is_batched in zip(arrays, batched, strict=True) if is_batched is True)

                def as_rows(*arrays):
                    mapped = next(x for x, is_batched in zip(arrays, batched, strict=True) if is_batched is True)
                    size, varying = len(mapped), jax.typeof(mapped).manual_axis_type.varying

                    def merge(x, is_batched):
                        if not is_batched:
                            x = jnp.broadcast_to(x, (size, *x.shape))
                            missing = tuple(varying - jax.typeof(x).manual_axis_type.varying)
                            x = jax.lax.pcast(x, missing, to="varying") if missing else x
                        return x.reshape(size * x.shape[1], *x.shape[2:])

                    results = call(static, *jax.tree.map(merge, arrays, batched))
                    return jax.tree.map(lambda x: x.reshape(size, x.shape[0] // size, *x.shape[1:]), results)

                results = _over_explicit_axis(as_rows, first, batched)(*arrays)
                return results, jax.tree.map(lambda _: True, results)

            return mapped(*arrays)

        return call

    return decorator


def over_mesh(function, inputs, outputs):
    """``function`` of arrays, of which the compiler splits the axes b and h over the devices of a program."""

    def call(*arrays):
        given = [x is not None for x in arrays]
        results = jax.eval_shape(function, *arrays)
        used = [names for names, is_given in zip(inputs, given, strict=True) if is_given]
        produced = [names for names, x in zip(outputs, results, strict=True) if x is not None]

        def of_given(*some):
            some = iter(some)
            return function(*(next(some) if is_given else None for is_given in given))

        def partition(mesh, arguments, results):
            structure = jax.tree.structure(results)
            leaves = [*arguments, *jax.tree.leaves(results)]
            split = _split(mesh, used + produced, leaves)
            of_arguments, of_results = ([_sharding(mesh, split, names) for names in tree] for tree in (used, produced))
            return mesh, of_given, jax.tree.unflatten(structure, of_results), tuple(of_arguments)

        axes = dict.fromkeys(" ".join(used + produced).split())  # in the order in which they first appear
        partitioned = custom_partitioning(of_given)
        partitioned.def_partition(
            partition,
            sharding_rule=f"{', '.join(used)} -> {', '.join(produced)}",
            need_replication_factors=tuple(axis for axis in axes if axis not in ("b", "h")),
        )
        return partitioned(*(x for x in arrays if x is not None))

    return call


def _split(mesh, names, arrays):
    """The axes of the mesh that split b and h: those of the first array that is split so. The others are made alike."""
    split, taken = {}, set()
    for axes, x in zip(names, arrays, strict=True):
        spec = (*x.sharding.spec, *(None,) * len(x.shape))
        for axis, size, parts in zip(axes.split(), x.shape, spec, strict=False):
            parts = (parts,) if isinstance(parts, str) else tuple(parts or ())
            divides = size % math.prod(mesh.shape[name] for name in parts) == 0
            if parts and axis in ("b", "h") and axis not in split and divides and not taken & set(parts):
                split[axis] = parts
                taken |= set(parts)
    return split


def _sharding(mesh, split, axes):
    return NamedSharding(mesh, PartitionSpec(*(split.get(axis) for axis in axes.split())))


def _over_explicit_axis(function, first, batched):
    """``function`` in shard_map over the explicit axes of a mesh, if any, that split the axis of vmap."""
    kind = jax.typeof(first).sharding
    parts = kind.spec[0] if AxisType.Explicit in kind.mesh.axis_types else None
    if parts is None:
        return function
    specs = jax.tree.map(lambda is_batched: PartitionSpec(parts if is_batched else None), batched)
    names = {parts} if isinstance(parts, str) else set(parts)
    return jax.shard_map(function, in_specs=specs, out_specs=PartitionSpec(parts), axis_names=names)


def over_explicit_axes(function, arrays, inputs, outputs):
    """``function`` in shard_map over the explicit axes of a mesh that split b and h of the second array."""
    kind = jax.typeof(arrays[1]).sharding
    if AxisType.Explicit not in kind.mesh.axis_types:
        return function
    split = {axis: parts for axis, parts in zip(inputs[1].split(), kind.spec, strict=True) if axis in ("b", "h")}

    def spec(axes):
        return PartitionSpec(*(split.get(axis) for axis in axes.split()))

    in_specs = tuple(None if x is None else spec(axes) for axes, x in zip(inputs, arrays, strict=True))
    placed = jax.shard_map(function, in_specs=in_specs, out_specs=tuple(map(spec, outputs)))

    def call(*arrays):
        return placed(*(x if x is None else jax.sharding.reshard(x, s) for x, s in zip(arrays, in_specs, strict=True)))

    return call


def over_axes_of_mesh(function, arrays, inputs, outputs):
    """``function`` in shard_map over the automatic axes of the mesh (see ``axes_of_mesh``), or over explicit ones."""
    split = axes_of_mesh(arrays[0].shape[0], arrays[0].shape[1])
    if not split:
        return over_explicit_axes(function, arrays, inputs, outputs)

    def spec(axes):
        return PartitionSpec(*(split.get(axis) or None for axis in axes.split()))

    in_specs = tuple(None if x is None else spec(axes) for axes, x in zip(inputs, arrays, strict=True))
    names = set(_automatic_axes(jax.sharding.get_abstract_mesh()))
    return jax.shard_map(function, in_specs=in_specs, out_specs=tuple(map(spec, outputs)), axis_names=names)


def axes_of_mesh(rows: int, heads: int) -> dict[str, tuple[str, ...]] | None:
    """The automatic axes of the mesh of ``jax.set_mesh`` that split b and h, by the names of ``sharding.make_mesh``.

    Empty without automatic axes. None if there is one of another name and of several devices, or if they do not divide
    the rows or the heads. None beside axes of other kinds: in shard_map over some axes JAX has no gradient of another
    shard_map.
    """
    mesh = jax.sharding.get_abstract_mesh()
    axes = _automatic_axes(mesh)
    if not axes:
        return {}
    if len(axes) < len(mesh.axis_names):
        return None
    split = {"b": tuple(x for x in axes if x in BATCH), "h": tuple(x for x in axes if x == HEADS)}
    others = [x for x in axes if x not in (*BATCH, HEADS) and mesh.shape[x] > 1]
    sizes = {axis: math.prod(mesh.shape[x] for x in names) for axis, names in split.items()}
    return None if others or rows % sizes["b"] or heads % sizes["h"] else split


def _automatic_axes(mesh):
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return [name for name, kind in kinds if kind == AxisType.Auto]
