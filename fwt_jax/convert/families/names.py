"""Rows of tables of names: what a tensor on disk and a variable have in common, and how they differ."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import jax
import jax.numpy as jnp

from fwt_jax.convert.families.table import Entry

Shapes = Mapping[str, jax.ShapeDtypeStruct]


def rows(names: Mapping[str, str], disk: str, model: str, shapes: Shapes) -> Iterator[Entry]:
    """A row for each variable that the model has.

    Args:
      names: names on disk -> paths in the model, behind the prefixes ``disk`` and ``model``.
      disk, model: prefixes.
      shapes: of all variables of the model, by their paths.
    """
    for name, path in names.items():
        if model + path in shapes:
            yield row(disk + name, model + path, shapes[model + path].shape)


def row(name: str, path: str, shape: tuple[int, ...]) -> Entry:
    """The row of one tensor and one variable, by the kind of the variable.

    Kernels are ``[inputs, outputs]`` in the model and ``[outputs, inputs]`` on disk, where heads and their features are
    one axis. Taps are ``[W, channels]`` in the model and ``[channels, 1, W]`` on disk. Others are flat on disk.
    """
    kind = path.rpartition(".")[2]
    if kind == "kernel":
        inputs = len(shape) - 1 if path.endswith("out.kernel") else 1
        rows_in_model = math.prod(shape[:inputs])
        return one_to_one(name, path, lambda x: x.T.reshape(shape), lambda x: x.reshape(rows_in_model, -1).T)
    if kind == "taps":
        return one_to_one(name, path, lambda x: x[:, 0].T.reshape(shape), lambda x: x.reshape(len(x), -1).T[:, None])
    if kind == "embedding" or kind == "head":
        return one_to_one(name, path, lambda x: x, lambda x: x)
    return one_to_one(name, path, lambda x: x.reshape(shape), lambda x: x.reshape(-1))


def one_to_one(name: str, path: str, to_model, to_disk) -> Entry:
    """The row of one tensor and one variable, by functions of one array."""
    return Entry((name,), (path,), lambda x: (to_model(x),), lambda x: (to_disk(x),))


def joined(name: str, paths: tuple[str, ...], shapes: Shapes) -> Entry:
    """The row of one tensor that holds the tensors of several variables, one behind the other along the first axis."""
    entries = [row(name, path, shapes[path].shape) for path in paths]
    sizes = [
        jax.eval_shape(entry.to_disk, shapes[path])[0].shape[0] for entry, path in zip(entries, paths, strict=True)
    ]
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]

    def to_model(x):
        parts = jnp.split(x, ends[:-1])
        return tuple(entry.to_model(part)[0] for entry, part in zip(entries, parts, strict=True))

    def to_disk(*variables):
        return (jnp.concatenate([entry.to_disk(x)[0] for entry, x in zip(entries, variables, strict=True)]),)

    return Entry((name,), paths, to_model, to_disk)


def joined_by_head(name: str, paths: tuple[str, ...], num_heads: int, shapes: Shapes) -> Entry:
    """As ``joined``, but the first axis on disk is that of ``num_heads``, and then that of the variables.

    The variables are kernels ``[D, H', ...]``, or biases ``[H', ...]``, with a multiple H' of ``num_heads``.
    """
    inputs = 0 if name.endswith("bias") else 1
    widths = [math.prod(shapes[path].shape[inputs:]) // num_heads for path in paths]
    ends = [sum(widths[: i + 1]) for i in range(len(widths))]

    def to_model(x):
        columns = x.shape[1:]
        parts = jnp.split(x.reshape(num_heads, ends[-1], *columns), ends[:-1], axis=1)
        flat = [part.reshape(-1, *columns).T for part in parts]
        return tuple(part.reshape(shapes[path].shape) for part, path in zip(flat, paths, strict=True))

    def to_disk(*variables):
        flat = [x.reshape(*x.shape[:inputs], -1).T for x in variables]
        parts = [x.reshape(num_heads, -1, *x.shape[1:]) for x in flat]
        return (jnp.concatenate(parts, axis=1).reshape(-1, *flat[0].shape[1:]),)

    return Entry((name,), paths, to_model, to_disk)


def stacked(names: tuple[str, ...], path: str) -> Entry:
    """The row of one variable that stacks the kernels of several tensors, as those of experts: ``[E, D, F]``."""
    return Entry(
        names,
        (path,),
        lambda *arrays: (jnp.stack([x.T for x in arrays]),),
        lambda x: tuple(kernel.T for kernel in x),
    )
