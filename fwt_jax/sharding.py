"""How arrays are split over many devices: a mesh, and a table from the path of an array to its partition.

    mesh = make_mesh(fsdp=4)                                # the remaining devices are data parallel
    state = jax.device_put(state, partition(mesh, state))   # parameters, optimizer state and memories
    with jax.set_mesh(mesh):
        ...                                                 # jit does the rest

The batch is split over "data" and "fsdp". Parameters are split over "fsdp" and gathered before each use (fully sharded
data parallel). They are also split over "tensor": the heads, and the hidden units of the feed-forward layer (Shoeybi et
al. 2019). The tokens of each sequence are split over "sequence", for models with ``sequence_axis="sequence"``. Every
device of that axis has the same parameters and memories.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

BATCH = ("data", "fsdp")  # the axes of the mesh that split the batch
HEADS = "tensor"  # the axis that splits the heads
ROWS = P(BATCH)  # of arrays [B, ...]
TOKENS = P(BATCH, "sequence")  # of arrays [B, T, ...]

# The first row counts whose expression matches the path of an array, as "params/blocks/0/attention/query/kernel". An
# array that no row matches is whole on every device. Moments of an optimizer match like their parameters, because
# their paths end alike. An Ellipsis stands for any number of axes that are whole.
PARTITION_RULES: tuple[tuple[str, P], ...] = (
    (r"(^|/)(embedding|head)$", P("tensor", "fsdp")),  # [V, D]
    (r"/(query|key|value|position)/kernel$", P("fsdp", "tensor", None)),  # [D, H, K]
    (r"mixer/gate(/projection)?/kernel$", P("fsdp", "tensor", None)),  # [D, H, V]
    (r"/(beta|decay/projection)/kernel$", P("fsdp", "tensor")),  # [D, H], and [D, H, K] of a decay per channel
    (r"/decay/(log_rate|bias)$", P("tensor")),  # [H], [H, K]
    (r"/projection/down/kernel$", P("fsdp")),  # [D, R] of a low rank, whose [R, H, V] is a row below
    (r"/taps$", P(None, "tensor")),  # [W, H, K]
    (r"/(latent|shared_key|router)/kernel$", P("fsdp")),  # [D, R]
    (r"(attention|mixer)/out/kernel$", P("tensor", None, "fsdp")),  # [H, V, D]
    (r"feed_forward/(gate|up)$", P(None, "fsdp", "tensor")),  # experts [E, D, F]
    (r"feed_forward/down$", P(None, "tensor", "fsdp")),  # [E, F, D]
    (r"/(gate|up)/kernel$", P("fsdp", "tensor")),  # [D, F], and [R, H, V] of a low rank
    (r"/down/kernel$", P("tensor", "fsdp")),  # [F, D]
    (r"/hidden/kernel$", P("fsdp", "tensor")),  # [D, F]
    (r"/hidden/bias$", P("tensor")),  # [F]
    (r"/out/kernel$", P("tensor", "fsdp")),  # [F, D]
    (r"/fast_weights$", P(BATCH, ..., "tensor", None, None)),  # [B, H, K, V], several memories [B, N, H, K, V]
    (r"/key_sum$", P(BATCH, ..., "tensor", None)),  # [B, H, K] or [B, N, H, K]
    (r"/(query|key|value)_inputs$", P(BATCH, ..., "tensor", None)),  # [B, W−1, H, K] or [B, N, W−1, H, K]
    (r"^memory/", ROWS),
)


def make_mesh(
    data: int | None = None,
    fsdp: int = 1,
    tensor: int = 1,
    sequence: int = 1,
    *,
    # JAX binds the name Device without a type.
    devices: Sequence[jax.Device] | None = None,  # pyright: ignore[reportInvalidTypeForm]
) -> Mesh:
    """A mesh with the axes "data", "fsdp", "sequence" and "tensor".

    Args:
      data: the number of copies of the model, each for a part of the batch; all remaining devices if not given.
      fsdp: the number of parts of each copy's parameters, and of its part of the batch.
      tensor: the number of parts of the heads and of the feed-forward layers.
      sequence: the number of parts of the tokens of each sequence.
      devices: all of ``jax.devices()`` if not given.

    Raises:
      ValueError: sizes below 1, or whose product is not the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    devices_per_copy = fsdp * tensor * sequence
    if min(fsdp, tensor, sequence, 1 if data is None else data) < 1:
        sizes = f"data={data}, fsdp={fsdp}, tensor={tensor}, sequence={sequence}"
        raise ValueError(f"the axes of a mesh must be at least 1, got {sizes}")
    data = max(1, len(devices) // devices_per_copy) if data is None else data
    if data * devices_per_copy != len(devices):
        raise ValueError(
            f"data · fsdp · tensor · sequence must be the number of devices, {len(devices)}, "
            f"got {data} · {fsdp} · {tensor} · {sequence}"
        )
    shape, names = (data, fsdp, sequence, tensor), (*BATCH, "sequence", "tensor")
    return jax.make_mesh(shape, names, (AxisType.Auto,) * 4, devices=devices)


def partition(mesh: Mesh, tree: Any, rules: Sequence[tuple[str, P]] = PARTITION_RULES) -> Any:
    """The ``NamedSharding`` of every array of a tree (or ``ShapeDtypeStruct``), by its path.

    A dimension that its axis of the mesh does not divide stays whole, as a vocabulary of 267,735 words on two devices.
    So does an array without axes.

    Raises:
      ValueError: a rule with more axes than its array.
    """

    def sharding_of(path, x):
        path = jax.tree_util.keystr(path, simple=True, separator="/")
        spec = next((spec for expression, spec in rules if x.ndim and re.search(expression, path)), P())
        spec = _without_ellipsis(spec, x.ndim)
        if len(spec) > x.ndim:
            raise ValueError(f"{path} is split by {spec}, and has only {x.ndim} axes, {list(x.shape)}; correct its row")
        return NamedSharding(mesh, _that_divides(mesh, spec, x.shape))

    return jax.tree_util.tree_map_with_path(sharding_of, tree)


def batch_partition(mesh: Mesh, tree: Any) -> Any:
    """The ``NamedSharding`` of the arrays of a batch, ``[B]`` or ``[B, T, ...]``; numbers are on every device.

    Rows and tokens are split. A length that "sequence" does not divide stays whole.

    Raises:
      ValueError: data · fsdp does not divide the number of rows.
    """

    def sharding_of(x):
        if x.ndim and x.shape[0] % _size(mesh, BATCH):
            raise ValueError(
                f"the batch has {x.shape[0]} rows, which the mesh of data={mesh.shape['data']} and "
                f"fsdp={mesh.shape['fsdp']} cannot split evenly; take a multiple of {_size(mesh, BATCH)}"
            )
        return NamedSharding(mesh, _that_divides(mesh, TOKENS, x.shape))

    return jax.tree.map(sharding_of, tree)


def over_batch(function, arrays, shared, spec: P = ROWS):
    """``function(arrays, shared)``; if ``jax.set_mesh`` has set a mesh, each device computes its own part.

    The compiler does not split some programs by itself, such as a loop over the tokens of all rows. The gradient of
    ``shared`` is the sum over all devices.

    Args:
      function: (arrays, shared) -> arrays. Each row of the result depends on the same row of ``arrays`` only; with the
        spec ``TOKENS``, each token depends on the same token only.
      arrays: arrays ``[B, ...]``, or ``[B, T, ...]`` for ``TOKENS``.
      shared: arrays that every row needs.
      spec: ``ROWS`` or ``TOKENS``. What the mesh does not have or does not divide stays whole.
    """
    mesh = jax.sharding.get_abstract_mesh()
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    # XLA does not compile the gradient if an axis of size 1 is manual and the mesh has larger axes that are not.
    split = {name for name, kind in kinds if kind == AxisType.Auto and mesh.shape[name] > 1}
    spec = P(*(tuple(name for name in _names(axes) if name in split) for axes in spec))
    spec = _that_divides(mesh, spec, jax.tree.leaves(arrays)[0].shape)
    axes = tuple(itertools.chain.from_iterable(map(_names, spec)))
    if not axes:
        return function(arrays, shared)

    def on_device(arrays, shared):
        # The backward pass sums the gradient over the devices at this pcast. Without it, the sum would be at the first
        # use of ``shared``. In a branch of ``lax.cond`` that only some devices take, the sum would never end.
        return function(arrays, jax.lax.pcast(shared, axes, to="varying"))

    return jax.shard_map(on_device, in_specs=(spec, P()), out_specs=spec, axis_names=set(axes))(arrays, shared)


def _without_ellipsis(spec, ndim):
    """A partition of an array of so many axes, with None for each that the Ellipsis stands for."""
    axes = list(spec)
    if ... in axes:
        first = axes.index(...)
        axes[first : first + 1] = [None] * (ndim - len(axes) + 1)
    return P(*axes)


def _that_divides(mesh, spec, shape):
    """A partition of an array of this shape: a dimension that its axes of the mesh do not divide stays whole."""
    sizes = zip(spec, shape, strict=False)
    return P(*(axes if axes and size % _size(mesh, axes) == 0 else None for axes, size in sizes))


def _size(mesh, axes):
    """The number of parts into which an axis, or several, of the mesh split a dimension."""
    return math.prod(mesh.shape[name] for name in _names(axes))


def _names(axes):
    """The names in an entry of a ``PartitionSpec``."""
    return (axes,) if isinstance(axes, str) else tuple(axes or ())
