"""The derivatives of a kernel: its gradient by another kernel, and all others by the same function in plain JAX."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from fwt_jax.kernels.refused import zero_of
from fwt_jax.recurrent import with_derivatives_of

RESIDUALS = "fast_weight_residuals"  # the name of the reads and residuals for the policies of jax.checkpoint


class Kernels(NamedTuple):
    """The functions for one kind of hardware. Inputs are those of ``gpu.chunkwise``, which may be None.

    Attributes:
      forward: (settings, keep, *inputs) -> (reads ``[B, T, H, V]``, W_T) and the residuals, a tree, without ``keep`` of
        None.
      backward: (settings, inputs, residuals, gradients in the reads and W_T) -> the gradients in the inputs.
      plain: (settings, *inputs) -> reads and W_T, in plain JAX.
      choose: (settings, kernels, plain) -> a function that calls the one or the other, by platform. Both are functions
        of the same arguments; that of the kernels takes the settings first.
    """

    forward: Callable
    backward: Callable
    plain: Callable
    choose: Callable


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def advance(hardware: Kernels, settings, *inputs):
    """Reads ``[B, T, H, V]`` and W_T. Derivatives in reverse mode only; those of a gradient are those of plain JAX."""
    return _forward(hardware, settings, False, *inputs)[0]


def _advance_forward(hardware, settings, *inputs):
    (reads, end), residuals = _forward(hardware, settings, True, *inputs)
    # The caller's next layer needs the reads. If they had no name, the kernel would run again for them.
    reads, residuals = jax.tree.map(lambda x: checkpoint_name(x, RESIDUALS), (reads, residuals))
    return (reads, end), (inputs, residuals)


def _forward(hardware, settings, keep, *inputs):

    def kernels(settings, *inputs):
        return hardware.forward(settings, keep, *inputs)

    def plain(*inputs):
        return hardware.plain(settings, *inputs), _zeros(residuals, inputs)

    def differentiated(*inputs):
        return hardware.plain(settings, *inputs), call(*lax.stop_gradient(inputs))[1]

    residuals = jax.eval_shape(functools.partial(kernels, settings), *inputs)[1]
    call = hardware.choose(settings, kernels, plain)
    return with_derivatives_of(differentiated, call)(*inputs)


def _advance_backward(hardware, settings, residuals, outputs_grad):
    """The gradients in the inputs."""
    inputs, residuals = residuals

    def kernels(settings, *arrays):
        return hardware.backward(settings, *jax.tree.unflatten(structure, arrays))

    def plain(*arrays):
        inputs, _, outputs_grad = jax.tree.unflatten(structure, arrays)
        differentiable = [i for i, x in enumerate(inputs) if x is not None and x.dtype != bool]

        def of_differentiable(*arrays):
            return hardware.plain(settings, *(_replaced(inputs, differentiable, arrays)))

        _, pull = jax.vjp(of_differentiable, *(inputs[i] for i in differentiable))
        return tuple(_replaced([None] * len(inputs), differentiable, pull(outputs_grad)))

    arrays, structure = jax.tree.flatten((inputs, residuals, outputs_grad))
    call = hardware.choose(settings, kernels, plain)
    return with_derivatives_of(plain, call)(*arrays)


advance.defvjp(_advance_forward, _advance_backward)


def _replaced(items, indices, others):
    items = list(items)
    for i, x in zip(indices, others, strict=True):
        items[i] = x
    return items


def _zeros(shapes, inputs):
    """Zeros that, in shard_map, vary over the mesh as the inputs do."""
    zero = zero_of([x for x in jax.tree.leaves(inputs) if x.dtype != bool])
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype) + zero.astype(x.dtype), shapes)
