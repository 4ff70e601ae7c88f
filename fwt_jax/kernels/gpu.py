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
from fwt_jax.kernels.derivatives import Kernels, advance
from fwt_jax.kernels.gpu_settings import settings_of
from fwt_jax.kernels.over_mesh import over_explicit_axes
from fwt_jax.kernels.refused import refused
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
    axes = gpu_calls.axes_of_inputs(settings)
    function = functools.partial(advance, KERNELS, settings)
    reads, end = over_explicit_axes(function, inputs, axes, gpu_calls.OUTPUTS)(*inputs)
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


# --- the kernels, and plain JAX --------------------------------------------------------------------------------------


def _forward(settings, keep, *inputs):
    reads, end, *residuals = gpu_calls.forward(settings, keep, *inputs)
    return (reads, end), residuals


def _in_plain_jax(settings, *inputs):
    precision = lax.Precision.DEFAULT if settings.precision == "tf32" else lax.Precision.HIGHEST
    options = {"rule": settings.rule, "chunk_size": settings.chunk_size, "precision": precision}
    return over_heads(functools.partial(chunkwise_of_head, **options), inputs)(*inputs)


def _on_gpu(settings, kernels, plain):
    """``kernels`` in programs for NVIDIA GPUs, and elsewhere ``plain`` or an error, see ``Settings.fallback``."""

    def refuse(*arguments):
        inputs = [x for x in jax.tree.leaves(arguments) if x.dtype != bool]
        return refused(REFUSAL, jax.eval_shape(plain, *arguments), inputs)

    from fwt_jax.kernels.triton_arrays import INTERPRETED

    kernels = functools.partial(kernels, settings)
    on_cpu = {"cpu": kernels} if INTERPRETED else {}

    def call(*arguments):
        default = plain if settings.fallback else refuse
        return lax.platform_dependent(*arguments, cuda=kernels, **on_cpu, default=default)

    return call


KERNELS = Kernels(_forward, gpu_calls.backward, _in_plain_jax, _on_gpu)
