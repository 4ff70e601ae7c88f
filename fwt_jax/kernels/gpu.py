"""The chunkwise form of the sum and delta rules on NVIDIA GPUs, by the kernels of triton_kernels.py.

The mathematics is there. This file checks the arguments, chooses the settings of the kernels, and gives them their
derivative. It needs jax-triton (the extra ``cuda``), which it imports when a kernel is called.

First derivatives in reverse mode are kernels too. Derivatives of a gradient are those of the plain JAX form.
"""

from __future__ import annotations

import functools
import importlib.util
from typing import Any, NamedTuple

import jax
import jax.extend
import jax.numpy as jnp
from jax import lax

from fwt_jax.chunkwise import chunkwise as chunkwise_of_head
from fwt_jax.decays import cumulative_log_decay
from fwt_jax.heads import over_heads
from fwt_jax.kernels.over_mesh import over_batch_and_mesh, over_explicit_axes
from fwt_jax.kernels.refused import refused, zero_of
from fwt_jax.recurrent import with_derivatives_of
from fwt_jax.rules import name_of

REFUSAL = 'implementation="triton" is for NVIDIA GPUs, got {platforms}; use implementation="xla"'
CHUNK_SIZES = {"bfloat16": (16, 32, 64), "float32": (16, 32)}
# The axes of a start, of query, key, value, beta, log_decay, reset and recall_scale.
_INPUTS = ("b h k v", "b t h k", "b t h k", "b t h v", "b t h", "b t h", "b t", "b t h")
RESET = -200.0  # a log decay whose exponential is 0 in float32


class KernelSettings(NamedTuple):
    """How a kernel is compiled.

    Attributes:
      num_warps, num_stages: the warps of a program, and the number of chunks whose loads are under way.
      values: V columns that a program takes at a time.
      keys: K features that a program takes at a time. The second and the third kernel take all.
    """

    num_warps: int
    num_stages: int
    values: int = 64
    keys: int = 64


class Settings(NamedTuple):
    """The static arguments of the kernels.

    Attributes:
      rule: see ``rules.Rule``.
      chunk_size: C.
      decays: 0 without decays and resets, or the number of arrays for the log decay: see triton_kernels.py.
      precision: of products of float32 numbers: "tf32" or "tf32x3". bfloat16 numbers are multiplied as they are.
      inverse_precision: of the products of the triangular inverse, which are float32 for bfloat16 inputs too.
      compute_capability: of the GPU, 90 for Hopper.
      kernels: the settings of the four kernels.
      fallback: on other platforms, plain JAX; if False, an error.
    """

    rule: Any
    chunk_size: int
    decays: int
    precision: str
    inverse_precision: str
    compute_capability: int
    kernels: tuple[KernelSettings, ...]
    fallback: bool


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
    reason = why_not(fast_weights, query, key, value, beta, log_decay, **options)
    if reason:
        raise ValueError(f'implementation="triton" {reason}; use implementation="xla"')
    dtype = _products_dtype(query, key, value, precision)
    settings = settings_of(
        rule,
        dtype,
        fast_weights.shape,
        decays=log_decay is not None or reset is not None,
        chunk_size=chunk_size,
        exact=lax.Precision(precision) != lax.Precision.DEFAULT,
        compute_capability=min(_compute_capabilities(), default=90),
        fallback=fallback,
    )
    tokens = (x.astype(dtype) for x in (query, key, value))
    inputs = (fast_weights.astype(jnp.float32), *tokens, beta, log_decay, reset, recall_scale)
    advance = functools.partial(_advance, settings)
    reads, end = over_explicit_axes(advance, inputs, _INPUTS, (_INPUTS[3], _INPUTS[0]))(*inputs)
    return reads.astype(value.dtype), end


def why_not(fast_weights, query, key, value, beta, log_decay, *, rule, chunk_size, precision) -> str | None:
    """The reason why the kernels cannot take these arguments of ``chunkwise``, or None.

    They take float32 and bfloat16; sum, delta and rules with the same write (``Rule.corrects``); no decay or one per
    head; K and V up to 256 and chunks of up to 64 tokens; where products are of float32 numbers, K and V up to 64 and
    chunks of up to 32 tokens; GPUs of compute capability 8.0 on, all of one kind.
    """
    dtypes = {x.dtype for x in (fast_weights, query, key, value)}
    if rule.corrects is None:
        return f"has no rule {name_of(rule)}"
    if log_decay is not None and log_decay.ndim != 3:
        return "has no decay per key channel"
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
    backend = jax.extend.backend.get_backend()
    return backend.platform == "gpu" and "cuda" in backend.platform_version and not why_not(*arguments, **options)


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


# The settings of the four kernels in bfloat16, for K and V up to 128, by compute capability and whether there are
# decays. None of these programs spills registers to memory or takes more shared memory than there is:
# experiments/benchmarks/gpu_kernels.py compiles them. They were not timed. Those for 90 are near the fastest of an
# earlier version of the kernels on an H100.
_WIDE = {
    (90, False): ((1, 1), (4, 2, 64), (4, 3, 64), (4, 1, 128, 64)),
    (90, True): ((1, 1), (4, 2, 64), (4, 3, 64), (4, 1, 64, 32)),
    (100, False): ((1, 1), (4, 3, 64), (4, 3, 64), (4, 1, 128, 64)),
    (100, True): ((1, 1), (8, 3, 64), (4, 3, 64), (4, 1, 64, 64)),
}
_NARROW = (1, 1), (8, 2, 32), (4, 2, 32), (4, 1, 64, 32)  # other cards: 99 KiB of shared memory, small products
_LARGE = (1, 1), (8, 2, 16), (8, 1, 32), (8, 1, 64, 32)  # K or V above 128
_FLOAT32 = (1, 1, 64, 32), (4, 2, 16), (4, 2, 16), (4, 1, 16, 16)  # chunks of 32 tokens
_NUM_PROCESSORS = {80: 108, 90: 132, 100: 148}  # streaming multiprocessors; of an H100 for capability 90


def settings_of(
    rule, dtype, shape, *, decays, chunk_size=None, exact=False, compute_capability=90, fallback=False
) -> Settings:
    """The ``Settings`` for products of ``dtype`` and memories of ``shape`` [B, H, K, V].

    Args:
      rule, chunk_size, compute_capability, fallback: see ``Settings``; chunk_size None is 64, and 32 for float32.
      decays: whether there are decays or resets.
      exact: float32 products are made of three products of TF32 numbers, not of one.
    """
    batch, heads, key_size, value_size = shape
    rounded = dtype == jnp.bfloat16
    if not rounded:
        kernels = _FLOAT32
    elif max(key_size, value_size) > 128:
        kernels = _LARGE
    else:
        kernels = _WIDE.get((compute_capability, decays), _NARROW)
        scores, (num_warps, num_stages, values), *backward = kernels
        num_programs = batch * heads * -(-value_size // 64)
        if kernels is not _NARROW and num_programs <= _NUM_PROCESSORS[compute_capability] // 2:
            # Half of the processors would idle. So each head gets twice as many programs.
            num_warps, num_stages, values = 4, 2, 32
        if not rule.corrects:
            num_warps = 8  # With four, the sum rule spills a few registers.
        kernels = scores, (num_warps, num_stages, values), *backward
    return Settings(
        rule=rule,
        chunk_size=chunk_size or (64 if rounded else 32),
        decays=0 if not decays else 1 if rounded else 2,
        precision="tf32x3" if exact else "tf32",
        inverse_precision="tf32" if rounded else "tf32x3",
        compute_capability=compute_capability,
        kernels=tuple(KernelSettings(*numbers) for numbers in kernels),
        fallback=fallback,
    )


# --- the derivative --------------------------------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _advance(settings, *inputs):
    """Reads ``[B, T, H, V]`` and W_T; inputs as in ``chunkwise``."""
    return _forward(settings, False, *inputs)[0]


def _advance_forward(settings, *inputs):
    outputs, residuals = _forward(settings, True, *inputs)
    return outputs, (inputs, residuals)


def _forward(settings, keep, *inputs):
    """Reads and W_T, and the residuals: P, T, W and N of every chunk (None without a gradient)."""

    def kernels(*inputs):
        reads, end, *residuals = _forward_kernels((settings, keep), *inputs)
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
        return _backward_kernels(settings, *inputs, *residuals, *outputs_grad)

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

    from fwt_jax.kernels.triton_kernels import INTERPRETED

    on_cpu = {"cpu": kernels} if INTERPRETED else {}

    def call(*arguments):
        default = plain if settings.fallback else refuse
        return lax.platform_dependent(*arguments, cuda=kernels, **on_cpu, default=default)

    return call


# --- the calls of the kernels ----------------------------------------------------------------------------------------


_RESIDUALS = ("b h n c i", "b h n c i", "b h n v k", "b h n v c")


@over_batch_and_mesh(_INPUTS, ("b t h v", "b h k v", *_RESIDUALS))
def _forward_kernels(static, memory, query, key, value, beta, log_decay, reset, recall_scale):
    settings, keep = static
    gates = _gates(settings, beta, log_decay, reset, recall_scale)
    recall, from_start, to_end = _factors(settings, gates)
    batch, length, heads, key_size = query.shape
    value_size, chunk_size, dtype = value.shape[-1], settings.chunk_size, query.dtype
    chunks = (batch, heads, -(-length // chunk_size))
    square = jax.ShapeDtypeStruct((*chunks, chunk_size, chunk_size), dtype)
    unused = jax.ShapeDtypeStruct((batch, 1), dtype)  # in the place of what a kernel does not write
    inputs = [query, key, gates.correction, gates.decay, gates.fine]
    out_shapes = [square, square if settings.rule.corrects else unused]
    scores, inverse = _call("scores", settings, query, value, inputs, out_shapes)
    inverse = inverse if settings.rule.corrects else None
    stored = [jax.ShapeDtypeStruct((*chunks, value_size, size), dtype) for size in (key_size, chunk_size)]
    out_shapes = [_like(value), _like(memory), *(stored if keep else [unused, unused])]
    inputs = [memory, query, key, value, gates.beta, recall, from_start, to_end, scores, inverse]
    reads, end, starts, writes = _call("forward", settings, query, value, inputs, out_shapes, KEEP=keep)
    return reads, end, *((scores, inverse, starts, writes) if keep else (None,) * 4)


@over_batch_and_mesh((*_INPUTS, *_RESIDUALS, "b t h v", "b h k v"), _INPUTS)
def _backward_kernels(
    settings,
    memory, query, key, value, beta, log_decay, reset, recall_scale,
    scores, inverse, starts, writes,
    reads_grad, end_grad,
):  # fmt: skip
    def gates_of(beta, log_decay, recall_scale):
        return _gates(settings, beta, log_decay, reset, recall_scale)

    gates, pull = jax.vjp(gates_of, beta, log_decay, recall_scale)
    recall, from_start, to_end = _factors(settings, gates)
    out_shapes = [_like(end_grad), _like(starts), _like(writes)]
    inputs = [query, key, recall, from_start, to_end, scores, inverse, reads_grad, end_grad]
    memory_grad, ends_grad, solved = _call("backward", settings, query, value, inputs, out_shapes)

    batch, length, heads, key_size = query.shape
    num_parts = -(-key_size // min(settings.kernels[3].keys, _power_of_2(key_size)))
    by_part = jax.ShapeDtypeStruct((batch, heads, num_parts, length), jnp.float32)
    unused = jax.ShapeDtypeStruct((batch, 1), jnp.float32)  # in the place of what the kernel does not write
    out_shapes = [*map(_like, (query, key, value, gates.beta))]
    out_shapes += [by_part if settings.rule.corrects else unused, by_part if settings.decays else unused]
    inputs = [query, key, value, gates.beta, gates.correction, from_start, to_end, gates.decay, gates.fine]
    inputs += [starts, writes, ends_grad, solved, reads_grad]
    outputs = _call("gradient", settings, query, value, inputs, out_shapes)
    *tokens_grad, beta_grad, correction_grad, decay_grad = outputs
    correction_grad = jnp.sum(correction_grad, axis=2) if settings.rule.corrects else jnp.zeros_like(beta_grad)
    decay_grad = jnp.sum(decay_grad, axis=2) if settings.decays else None
    gates_grad = _Gates(beta_grad, correction_grad, decay_grad, None if gates.fine is None else decay_grad)
    beta_grad, log_decay_grad, recall_scale_grad = pull(gates_grad)
    return memory_grad, *tokens_grad, beta_grad, log_decay_grad, None, recall_scale_grad


def _call(name, settings, query, value, inputs, out_shapes, **constants):
    """The outputs of a kernel."""
    from fwt_jax.kernels import triton_call, triton_kernels

    batch, length, heads, key_size = query.shape
    num_programs, compiled, more = program_of(name, settings, (length, heads, key_size, value.shape[-1]))
    return triton_call.triton_call(
        getattr(triton_kernels, f"{name}_kernel"),
        batch * heads * num_programs,
        inputs,
        (length,),
        out_shapes,
        num_warps=compiled.num_warps,
        num_stages=compiled.num_stages,
        compute_capability=settings.compute_capability,
        **constants,
        **more,
    )


def program_of(name, settings, shape):
    """The number of programs per head, the ``KernelSettings`` and the constants of a kernel, for shape [T, H, K, V]."""
    length, heads, key_size, value_size = shape
    compiled = settings.kernels[("scores", "forward", "backward", "gradient").index(name)]
    keys, values = _power_of_2(key_size), min(compiled.values, _power_of_2(value_size))
    if name in ("scores", "gradient"):
        keys = min(compiled.keys, keys)
    num_chunks, num_blocks = -(-length // settings.chunk_size), -(-value_size // values)
    constants = {"heads": heads, "K": key_size, "KEYS": keys, "CHUNK": settings.chunk_size}
    constants |= {"CORRECTS": bool(settings.rule.corrects), "DECAYS": settings.decays}
    constants |= {"EXACT": length % settings.chunk_size == 0, "PRECISION": settings.precision}
    if name == "scores":
        constants |= {"INVERSE_PRECISION": settings.inverse_precision}
        return num_chunks * (2 if settings.rule.corrects else 1), compiled, constants
    constants |= {"V": value_size, "VALUES": values}
    return num_chunks * -(-key_size // keys) if name == "gradient" else num_blocks, compiled, constants


class _Gates(NamedTuple):
    """One number per token, ``[B, H, T]`` each: β, ρ, and one or two parts of g (None without decays)."""

    beta: jax.Array
    correction: jax.Array
    decay: jax.Array | None
    fine: jax.Array | None


def _gates(settings, beta, log_decay, reset, recall_scale):
    """The ``_Gates`` of β, log decay and recall_scale ``[B, T, H]`` and of resets ``[B, T]``."""
    beta = _by_head(beta)
    correction = beta if recall_scale is None else beta * _by_head(recall_scale)
    if not settings.decays:
        return _Gates(beta, correction, None, None)
    log_decay = jnp.zeros_like(beta) if log_decay is None else _by_head(log_decay)
    if reset is not None:
        log_decay = jnp.where(reset[:, None], RESET, log_decay)
    length, chunk_size = beta.shape[-1], settings.chunk_size
    padded = jnp.pad(log_decay, ((0, 0), (0, 0), (0, -length % chunk_size)))
    by_place = jnp.moveaxis(padded.reshape(*beta.shape[:2], -1, chunk_size), -1, 0)
    coarse, fine = (jnp.moveaxis(x, 0, -1).reshape(padded.shape)[..., :length] for x in cumulative_log_decay(by_place))
    if settings.decays == 1:
        return _Gates(beta, correction, coarse + fine, None)
    return _Gates(beta, correction, coarse, fine)


def _by_head(x):
    """``[B, T, H]`` -> ``[B, H, T]``, float32."""
    return jnp.moveaxis(x.astype(jnp.float32), 1, 2)


def _factors(settings, gates):
    """ρ a, a and e of triton_kernels.py, ``[B, H, T]`` each; without decays a and e are None."""
    if not settings.decays:
        return gates.correction, None, None
    parts = [x for x in (gates.decay, gates.fine) if x is not None]
    length, chunk_size = gates.beta.shape[-1], settings.chunk_size
    place = jnp.arange(length)
    last = jnp.minimum(place // chunk_size * chunk_size + chunk_size, length) - 1
    from_start, to_end = jnp.exp(sum(parts)), jnp.exp(sum(x[..., last] - x for x in parts))
    return gates.correction * from_start, from_start, to_end


def _like(x):
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def _power_of_2(size):
    """The least power of 2 from 16 on that is not below size: the sides of products in the Triton language."""
    return max(16, 1 << (size - 1).bit_length())
