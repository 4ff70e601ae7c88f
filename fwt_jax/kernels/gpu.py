"""The chunkwise form of the sum and delta rules on NVIDIA GPUs, by kernels in the Triton language.

The mathematics is in triton_kernels.py, and for a decay per channel also in triton_channels.py. This file checks the
arguments and gives the kernels, which gpu_calls.py calls, their derivative. They need jax-triton (the extra ``cuda``),
which is imported when a kernel is called.

First derivatives in reverse mode are kernels too. Derivatives of a gradient are those of the plain JAX form.
"""

from __future__ import annotations

import functools
import importlib.util

import jax
import jax.extend
import jax.numpy as jnp
from jax import lax

from fwt_jax.chunkwise import chunkwise as chunkwise_of_head
from fwt_jax.heads import over_heads
from fwt_jax.kernels import gpu_calls
from fwt_jax.kernels.gpu_settings import settings_of
from fwt_jax.kernels.over_mesh import over_explicit_axes
from fwt_jax.kernels.refused import refused, zero_of
from fwt_jax.recurrent import with_derivatives_of
from fwt_jax.rules import name_of

REFUSAL = 'implementation="triton" is for NVIDIA GPUs, got {platforms}; use implementation="xla"'
CHUNK_SIZES = {"bfloat16": (16, 32, 64), "float32": (16, 32)}


def chunkwise(
    fast_weights,
    query,
    key,
    value,
    beta,
    log_decay=None,
    reset=None,
    recall_scale=None,
    *,
    rule,
    chunk_size=None,
    precision,
    fallback=False,
) -> tuple[jax.Array, jax.Array]:
    """``chunkwise`` of a batch of heads on an NVIDIA GPU. With TRITON_INTERPRET=1, a CPU interprets the kernels.

    The delta rule takes 6KV + 4C(K + V) FLOPs per token and head, and 80C for the inverse if C = 64. The gradient takes
    about twice as many. Forward, the kernels move 4K + 2V + 4C numbers per token to or from the GPU's memory, and
    with a gradient 6K + 8V + 4KV/C + 2C more. The gradient keeps KV/C + V + 2C numbers per token.

    A decay per channel takes 4CK log₂(C) FLOPs for the scores instead of 4CK, and twice as many for their gradient. It
    keeps C float32 numbers more. It moves several float32 arrays as large as the keys: the cumulative decays, and in
    the backward pass the gradients in a ∘ Q, a ∘ K, e ∘ K and the decays.

    Args:
      fast_weights, query, key, value, beta, log_decay, reset, recall_scale, rule, chunk_size, precision: see
        ``why_not``.
      fallback: on other platforms, plain JAX; if False, an error.

    Returns:
      The reads ``[B, T, H, V]`` in value's dtype and W_T ``[B, H, K, V]``.

    Raises:
      ValueError: arguments for which ``why_not`` has a reason; compiled for another platform without ``fallback``.
    """
    options = {"rule": rule, "chunk_size": chunk_size, "precision": precision}
    reason = why_not(fast_weights, query, key, value, **options)
    if reason:
        raise ValueError(f'implementation="triton" {reason}; use implementation="xla"')
    dtype = _products_dtype(query, key, value, precision)
    settings = settings_of(
        rule,
        dtype,
        fast_weights.shape,
        decays=log_decay is not None or reset is not None,
        channels=log_decay is not None and log_decay.ndim == 4,
        chunk_size=chunk_size,
        exact=lax.Precision(precision) != lax.Precision.DEFAULT,
        compute_capability=min(_compute_capabilities(), default=90),
        fallback=fallback,
    )
    tokens = (x.astype(dtype) for x in (query, key, value))
    inputs = (fast_weights.astype(jnp.float32), *tokens, beta, log_decay, reset, recall_scale)
    advance = functools.partial(_advance, settings)
    axes = gpu_calls.axes_of_inputs(settings)
    reads, end = over_explicit_axes(advance, inputs, axes, gpu_calls.OUTPUTS)(*inputs)
    return reads.astype(value.dtype), end


def why_not(fast_weights, query, key, value, *, rule, chunk_size, precision) -> str | None:
    """The reason why the kernels cannot take these arguments of ``chunkwise``, or None.

    They take float32 and bfloat16; sum, delta and rules with the same write (``Rule.corrects``); K and V up to 256 and
    chunks of up to 64 tokens; where products are of float32 numbers, K and V up to 64 and chunks of up to 32 tokens;
    GPUs of compute capability 8.0 on, all of one kind.
    """
    dtypes = {x.dtype for x in (fast_weights, query, key, value)}
    if rule.corrects is None:
        return f"has no rule {name_of(rule)}"
    if not dtypes <= {jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16)}:
        return f"takes float32 and bfloat16, got {', '.join(sorted(map(str, dtypes)))}"
    try:
        lax.Precision(precision)
    except ValueError:
        return f'takes precision "default", "high" or "highest", got {precision!r}'
    dtype = _products_dtype(query, key, value, precision)
    if max(fast_weights.shape[2:]) > (256 if dtype == jnp.bfloat16 else 64):
        sizes = f"got K = {fast_weights.shape[2]}, V = {fast_weights.shape[3]}"
        return f"takes K and V up to 256 for bfloat16, and up to 64 for products of float32, {sizes}"
    chunk_sizes = CHUNK_SIZES[dtype.name]
    if chunk_size not in (None, *chunk_sizes):
        sizes = ", ".join(map(str, chunk_sizes))
        return f"takes chunk_size {sizes} or None for products of {dtype.name}, got {chunk_size}"
    capabilities = sorted(_compute_capabilities())
    if len(capabilities) > 1 or min(capabilities, default=80) < 80:
        return f"needs GPUs of one compute capability, 8.0 or higher, got {capabilities} (80 for 8.0)"
    if not importlib.util.find_spec("jax_triton"):
        return "needs jax-triton, of the extra cuda (pip install jax-triton, for Python 3.12 or later)"
    return None


def is_default(*arguments, **options) -> bool:
    """Whether JAX's default device is an NVIDIA GPU and ``why_not`` has no reason against these arguments."""
    return _is_cuda(jax.extend.backend.get_backend()) and not why_not(*arguments, **options)


def num_processors() -> int:
    """The streaming multiprocessors of JAX's default device; 0 if that is no NVIDIA GPU."""
    backend = jax.extend.backend.get_backend()
    return backend.local_devices()[0].core_count if _is_cuda(backend) else 0


def _is_cuda(backend):
    return backend.platform == "gpu" and "cuda" in backend.platform_version


def _products_dtype(query, key, value, precision):
    """bfloat16 if query, key and value are, and no more than that is asked for; else float32."""
    rounded = all(x.dtype == jnp.bfloat16 for x in (query, key, value))
    return jnp.dtype(jnp.bfloat16 if rounded and lax.Precision(precision) == lax.Precision.DEFAULT else jnp.float32)


@functools.cache
def _compute_capabilities():
    """Those of the NVIDIA GPUs of this process, 90 for Hopper; none without a GPU."""
    try:
        devices = jax.local_devices(backend="cuda")
    except RuntimeError:
        return frozenset()
    return frozenset(int(device.compute_capability.replace(".", "")) for device in devices)


# --- the derivative --------------------------------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _advance(settings, *inputs):
    """Reads ``[B, T, H, V]`` and W_T; inputs as in ``chunkwise``."""
    return _forward(settings, False, *inputs)[0]


def _advance_forward(settings, *inputs):
    outputs, residuals = _forward(settings, True, *inputs)
    return outputs, (inputs, residuals)


def _forward(settings, keep, *inputs):
    """Reads and W_T, and the residuals, see ``gpu_calls`` (None without a gradient)."""

    def kernels(*inputs):
        reads, end, *residuals = gpu_calls.forward(settings, keep, *inputs)
        return (reads, end), residuals

    def plain(*inputs):
        outputs = _in_plain_jax(settings, *inputs)
        return outputs, _zeros(residuals, inputs)

    def differentiated(*inputs):
        return _in_plain_jax(settings, *inputs), call(*lax.stop_gradient(inputs))[1]

    residuals = jax.eval_shape(kernels, *inputs)[1]
    call = _on_gpu(settings, kernels, plain)
    return with_derivatives_of(differentiated, call)(*inputs)


def _advance_backward(settings, residuals, outputs_grad):
    """The gradients in the inputs."""
    inputs, residuals = residuals

    def kernels(inputs, residuals, outputs_grad):
        return gpu_calls.backward(settings, inputs, residuals, outputs_grad)

    def plain(inputs, residuals, outputs_grad):
        differentiable = [i for i, x in enumerate(inputs) if x is not None and x.dtype != bool]

        def of_differentiable(*arrays):
            return _in_plain_jax(settings, *(_replaced(inputs, differentiable, arrays)))

        _, pull = jax.vjp(of_differentiable, *(inputs[i] for i in differentiable))
        return tuple(_replaced([None] * len(inputs), differentiable, pull(outputs_grad)))

    arrays, structure = jax.tree.flatten((inputs, residuals, outputs_grad))

    def of_arrays(function):
        return lambda *arrays: function(*jax.tree.unflatten(structure, arrays))

    call = _on_gpu(settings, of_arrays(kernels), of_arrays(plain))
    return with_derivatives_of(of_arrays(plain), call)(*arrays)


_advance.defvjp(_advance_forward, _advance_backward)


def _replaced(items, indices, others):
    items = list(items)
    for i, x in zip(indices, others, strict=True):
        items[i] = x
    return items


def _in_plain_jax(settings, *inputs):
    precision = lax.Precision.DEFAULT if settings.precision == "tf32" else lax.Precision.HIGHEST
    options = {"rule": settings.rule, "chunk_size": settings.chunk_size, "precision": precision}
    return over_heads(functools.partial(chunkwise_of_head, **options), inputs)(*inputs)


def _zeros(shapes, inputs):
    """Zeros that, in shard_map, vary over the mesh as the inputs do."""
    zero = zero_of([x for x in jax.tree.leaves(inputs) if x.dtype != bool])
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype) + zero.astype(x.dtype), shapes)


def _on_gpu(settings, kernels, plain):
    """``kernels`` in programs for NVIDIA GPUs, and elsewhere ``plain`` or an error, see ``Settings.fallback``."""

    def refuse(*arguments):
        inputs = [x for x in jax.tree.leaves(arguments) if x.dtype != bool]
        return refused(REFUSAL, jax.eval_shape(plain, *arguments), inputs)

    from fwt_jax.kernels.triton_arrays import INTERPRETED

    on_cpu = {"cpu": kernels} if INTERPRETED else {}

    def call(*arguments):
        default = plain if settings.fallback else refuse
        return lax.platform_dependent(*arguments, cuda=kernels, **on_cpu, default=default)

    return call
