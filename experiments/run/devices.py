"""Arrays on several devices and in several processes."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from fwt_jax import sharding


def make_mesh(fsdp: int, tensor: int, sequence: int = 1) -> Mesh | None:
    """All devices, see ``sharding.make_mesh``; None if there is one.

    Raises:
      ValueError: the product of the axes is not the number of devices.
    """
    if jax.device_count() == fsdp == tensor == sequence == 1:
        return None
    return sharding.make_mesh(fsdp=fsdp, tensor=tensor, sequence=sequence)


def place(batch: dict[str, np.ndarray], mesh: Mesh | None, *, whole: bool = False) -> dict[str, jax.Array]:
    """The arrays of a batch on the devices of a mesh, split over them or ``whole``; all processes have all rows."""
    if mesh is None:
        return jax.tree.map(jnp.asarray, batch)
    batch = jax.tree.map(np.asarray, batch)
    replicated = NamedSharding(mesh, PartitionSpec())
    shardings = jax.tree.map(lambda _: replicated, batch) if whole else sharding.batch_partition(mesh, batch)
    return jax.tree.map(lambda x, s: jax.make_array_from_callback(x.shape, s, lambda i: x[i]), batch, shardings)


def abstract(tree: dict[str, Any], mesh: Mesh | None) -> dict[str, Any]:
    """The shapes of the arrays of a tree, with the devices that they belong on."""
    if mesh is None:
        device = SingleDeviceSharding(jax.devices()[0])
        shardings = jax.tree.map(lambda _: device, tree)
    else:
        shardings = sharding.partition(mesh, tree)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)


def of_first_process(data: bytes) -> bytes:
    """The bytes that the first process passes, in all processes; the others may pass b""."""
    if jax.process_count() == 1:
        return data
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(data))))
    return multihost_utils.broadcast_one_to_all(np.frombuffer(data.ljust(size, b"\0"), np.uint8)).tobytes()


def wait_for_all(name: str):
    """Returns when all processes have called it with this name."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)
