"""Calls a kernel of the Triton language from JAX: compiled by jax-triton, or interpreted on a CPU for tests.

Triton interprets kernels if TRITON_INTERPRET=1 is set before they are imported. Its interpreter takes tensors of
PyTorch. Here it takes arrays of NumPy that pretend to be such.
"""

from __future__ import annotations

import functools
import threading

import jax
import numpy as np

from fwt_jax.kernels.triton_arrays import INTERPRETED


def triton_call(kernel, grid, inputs, scalars, out_shapes, *, num_warps, num_stages, compute_capability, **constants):
    """The outputs of a kernel.

    Args:
      kernel: a function of ``triton_kernels`` or ``triton_channels``.
      grid: the number of programs.
      inputs: arrays. The kernel gets another input's pointer for one that is None, and must not read it.
      scalars: integers that follow the inputs.
      out_shapes: ``jax.ShapeDtypeStruct`` of each output. Their pointers follow the integers.
      num_warps, num_stages: for the compiler.
      compute_capability: of the GPU, 90 for Hopper.
      constants: the kernel's ``tl.constexpr`` arguments.

    Returns:
      A list of arrays. In shard_map they vary over every axis of the mesh that an input varies over.
    """
    unread = next(x for x in inputs if x is not None)
    inputs = [unread if x is None else x for x in inputs]
    if INTERPRETED:
        interpret = functools.partial(_interpret, kernel, grid, scalars, out_shapes, constants)
        outputs = jax.pure_callback(interpret, out_shapes, *inputs)
    else:
        import jax_triton

        outputs = jax_triton.triton_call(
            *inputs,
            *scalars,
            kernel=kernel,
            out_type=out_shapes,
            grid=(grid,),
            name=kernel.fn.__name__,
            num_warps=num_warps,
            num_stages=num_stages,
            compute_capability=compute_capability,
            # ptxas would choose 32 registers for the fourth kernel on sm_80, and spill.
            backend_options={"maxnreg": 255, "enable_fp_fusion": True},
            **constants,
        )
    axes = frozenset().union(*(jax.typeof(x).manual_axis_type.varying for x in inputs))
    return [jax.lax.pcast(x, tuple(axes), to="varying") for x in outputs] if axes else list(outputs)


class _Tensor:
    """An array of NumPy with the methods of a tensor that Triton's interpreter calls."""

    def __init__(self, array):
        names = {"float32": "fp32", "bfloat16": "bf16", "int32": "i32"}
        self.array, self.dtype = array, names[array.dtype.name]

    def data_ptr(self):
        return self.array.ctypes.data

    def untyped_storage(self):
        return self

    def _ignored(self, *_):
        return None

    cpu = untyped_storage
    storage_offset = size = stride = copy_ = set_ = _ignored

    def new_empty(self, *_, **__):
        return self


_LOCK = threading.Lock()  # The interpreter patches Triton while it runs, and JAX calls back once per device.


def _interpret(kernel, grid, scalars, out_shapes, constants, *inputs):
    inputs = [np.array(x) for x in inputs]
    outputs = [np.zeros(x.shape, x.dtype) for x in out_shapes]
    with _LOCK:
        kernel[(grid,)](*map(_Tensor, inputs), *scalars, *map(_Tensor, outputs), **constants)
    return outputs
