"""Where arrays lie on many devices: a mesh, and one table from the path of an array to its partition.

    mesh = make_mesh(fsdp=4)                                # the remaining devices are data parallel
    state = jax.device_put(state, partition(mesh, state))   # parameters, optimizer state, memories: one table for all
    with jax.set_mesh(mesh):
        ...                                                 # jit does the rest

The batch is split over "data" and "fsdp". Parameters are split over "fsdp" (gathered where they are used: fully sharded
data parallel) and over "tensor" (heads, and what is inside the feed-forward layer; Shoeybi et al. 2019).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

BATCH = ("data", "fsdp")  # the axes of the mesh that the batch is split over

# The first row whose expression is found in the path of an array, as "params/blocks/0/attention/query/kernel", counts;
# what no row fits is whole on every device. Moments of an optimizer have the paths of their parameters at their end.
RULES: tuple[tuple[str, P], ...] = (
    (r"(^|/)embedding$", P("tensor", "fsdp")),  # [V, D]
    (r"/(query|key|value|position)/kernel$", P("fsdp", "tensor", None)),  # [D, H, K]
    (r"/beta/kernel$", P("fsdp", "tensor")),  # [D, H]
    (r"attention/out/kernel$", P("tensor", None, "fsdp")),  # [H, V, D]
    (r"/hidden/kernel$", P("fsdp", "tensor")),  # [D, F]
    (r"/hidden/bias$", P("tensor")),  # [F]
    (r"/out/kernel$", P("tensor", "fsdp")),  # [F, D]
    (r"/(fast_weights|key_sum)$", P(BATCH, "tensor")),  # memories [B, H, ...]
    (r"^memory/", P(BATCH)),
)


def make_mesh(
    data: int | None = None, fsdp: int = 1, tensor: int = 1, *, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """A mesh with the axes "data", "fsdp" and "tensor".

    Args:
      data: copies of the model, each with a part of the batch; all remaining devices if not given.
      fsdp: parts of each copy's parameters, which also split the batch.
      tensor: parts of the heads and of the feed-forward layers.
      devices: all of ``jax.devices()`` if not given.

    Raises:
      ValueError: sizes below 1, or whose product is not the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    if min(fsdp, tensor, 1 if data is None else data) < 1:
        raise ValueError(f"the axes of a mesh must be at least 1, got data={data}, fsdp={fsdp}, tensor={tensor}")
    data = max(1, len(devices) // (fsdp * tensor)) if data is None else data
    if data * fsdp * tensor != len(devices):
        raise ValueError(
            f"data · fsdp · tensor must be the number of devices, {len(devices)}, got {data} · {fsdp} · {tensor}"
        )
    return jax.make_mesh((data, fsdp, tensor), (*BATCH, "tensor"), (AxisType.Auto,) * 3, devices=devices)


def partition(mesh: Mesh, tree: Any, rules: Sequence[tuple[str, P]] = RULES) -> Any:
    """The ``NamedSharding`` of every array of a tree (or ``ShapeDtypeStruct``), by its path.

    An axis of the mesh that does not divide its dimension is left out: a vocabulary of 267,735 words stays whole, as
    does what has no axes.

    Raises:
      ValueError: a rule with more axes than its array.
    """

    def of(path, x):
        path = jax.tree_util.keystr(path, simple=True, separator="/")
        spec = next((spec for expression, spec in rules if x.ndim and re.search(expression, path)), P())
        if len(spec) > x.ndim:
            raise ValueError(f"{path} is split by {spec}, and has only {x.ndim} axes, {list(x.shape)}; mend the rules")
        fits = (
            axes if axes and size % _size(mesh, axes) == 0 else None for axes, size in zip(spec, x.shape, strict=False)
        )
        return NamedSharding(mesh, P(*fits))

    return jax.tree_util.tree_map_with_path(of, tree)


def batch_partition(mesh: Mesh, tree: Any) -> Any:
    """The ``NamedSharding`` of the arrays of a batch: their first axis is split; numbers are everywhere.

    Raises:
      ValueError: a first axis that data · fsdp does not divide.
    """

    def of(x):
        if x.ndim and x.shape[0] % _size(mesh, BATCH):
            raise ValueError(
                f"the batch has {x.shape[0]} rows, which the mesh of data={mesh.shape['data']} and "
                f"fsdp={mesh.shape['fsdp']} cannot split evenly; take a multiple of {_size(mesh, BATCH)}"
            )
        return NamedSharding(mesh, P(BATCH) if x.ndim else P())

    return jax.tree.map(of, tree)


def over_batch(function, rows, shared):
    """``function(rows, shared)``, on each device for its own rows where ``jax.set_mesh`` has set a mesh.

    For what the compiler would not split by itself, as a loop over the tokens of all rows. The gradient of ``shared``
    is the sum over all devices.

    Args:
      function: of rows and shared to arrays whose first axis is that of rows, each row by itself.
      rows: arrays ``[B, ...]``.
      shared: arrays that every row needs.
    """
    mesh = jax.sharding.get_abstract_mesh()
    axes = tuple(
        name
        for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
        if name in BATCH and kind == AxisType.Auto
    )
    if not axes or len(jax.tree.leaves(rows)[0]) % _size(mesh, axes):
        return function(rows, shared)

    def of_device(rows, shared):
        # The gradient of shared is summed over the devices where it becomes each device's own. That is here and not
        # where it is first used, which may be a branch that other devices do not take: they would wait for ever.
        return function(rows, jax.lax.pcast(shared, axes, to="varying"))

    return jax.shard_map(of_device, in_specs=(P(axes), P()), out_specs=P(axes), axis_names=set(axes))(rows, shared)


def _size(mesh, axes):
    size = 1
    for name in (axes,) if isinstance(axes, str) else axes:
        size *= mesh.shape[name]
    return size
