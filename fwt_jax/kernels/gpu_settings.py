"""How the kernels for NVIDIA GPUs are compiled: blocks, warps and stages by card, dtype and sizes."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp


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
      channels: whether every key channel has a decay of its own.
      precision: of products of float32 numbers: "tf32" or "tf32x3". bfloat16 numbers are multiplied as they are.
      inverse_precision: of the products of the triangular inverse, which are float32 for bfloat16 inputs too.
      compute_capability: of the GPU, 90 for Hopper.
      kernels: the settings of the four kernels. With a decay per channel, those of triton_channels.py are in the place
        of the first and the fourth.
      fallback: on other platforms, plain JAX; if False, an error.
    """

    rule: Any
    chunk_size: int
    decays: int
    channels: bool
    precision: str
    inverse_precision: str
    compute_capability: int
    kernels: tuple[KernelSettings, ...]
    fallback: bool


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
_LARGE_SUM = (*_LARGE[:3], (8, 2, 64, 32))  # on 80, the fourth kernel of the sum rule spills with one stage
_FLOAT32 = (1, 1, 64, 32), (4, 2, 16), (4, 2, 16), (4, 1, 16, 16)  # chunks of 32 tokens
# With a decay per channel: in the place of the first kernel and of the fourth.
_WIDE_CHANNELS = (8, 1, 64, 64), (8, 1, 64, 32)
_NARROW_CHANNELS = (8, 1, 64, 32), (8, 1, 64, 16)
_FLOAT32_CHANNELS = (4, 1, 64, 32), (4, 1, 64, 16)
_NUM_PROCESSORS = {80: 108, 90: 132, 100: 148}  # streaming multiprocessors; of an H100 for capability 90


def settings_of(
    rule, dtype, shape, *, decays, channels=False, chunk_size=None, exact=False, compute_capability=90, fallback=False
) -> Settings:
    """The ``Settings`` for products of ``dtype`` and memories of ``shape`` [B, H, K, V].

    Args:
      rule, channels, compute_capability, fallback: see ``Settings``.
      chunk_size: see ``Settings``; None is 64, and 32 for float32.
      decays: whether there are decays or resets.
      exact: float32 products are made of three products of TF32 numbers, not of one.
    """
    batch, heads, key_size, value_size = shape
    rounded = dtype == jnp.bfloat16
    if not rounded:
        kernels = _FLOAT32
    elif max(key_size, value_size) > 128:
        kernels = _LARGE if rule.corrects else _LARGE_SUM
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
    if channels:
        _, forward, backward, _ = kernels
        is_wide = compute_capability in (90, 100)
        scores, gradient = (_WIDE_CHANNELS if is_wide else _NARROW_CHANNELS) if rounded else _FLOAT32_CHANNELS
        if max(key_size, value_size) > 128 and not is_wide:
            forward = (8, 1, 16)  # 99 KiB have no room for a second stage of three arrays of tokens.
        kernels = scores, forward, backward, gradient
    return Settings(
        rule=rule,
        chunk_size=chunk_size or (64 if rounded else 32),
        decays=0 if not decays else 1 if rounded else 2,
        channels=channels,
        precision="tf32x3" if exact else "tf32",
        inverse_precision="tf32" if rounded else "tf32x3",
        compute_capability=compute_capability,
        kernels=tuple(KernelSettings(*numbers) for numbers in kernels),
        fallback=fallback,
    )


def program_of(name, settings, shape):
    """The number of programs per head, the ``KernelSettings`` and the constants of a kernel, for shape [T, H, K, V].

    A kernel takes those of the constants that it has an argument for.
    """
    length, heads, key_size, value_size = shape
    if name == "inverse":
        compiled = KernelSettings(num_warps=1, num_stages=1)
    else:
        names = "scores", "forward", "backward", "gradient"
        compiled = settings.kernels[names.index(name.removeprefix("channel_"))]
    keys, values = power_of_2(key_size), min(compiled.values, power_of_2(value_size))
    by_value = name in ("forward", "backward")
    if not by_value:
        keys = min(compiled.keys, keys)
    num_chunks, num_parts = -(-length // settings.chunk_size), -(-key_size // keys)
    num_programs = {
        "scores": num_chunks * (2 if settings.rule.corrects else 1),
        "channel_scores": num_chunks,
        "inverse": num_chunks,
        "gradient": num_chunks * num_parts,
        "channel_gradient": num_chunks * num_parts,
    }
    constants = {
        "heads": heads,
        "K": key_size,
        "V": value_size,
        "KEYS": keys,
        "VALUES": values,
        "CHUNK": settings.chunk_size,
        "LEVELS": settings.chunk_size.bit_length() - 1,
        "CORRECTS": bool(settings.rule.corrects),
        "DECAYS": 0 if by_value and settings.channels else settings.decays,
        "CHANNELS": settings.channels,
        "EXACT": length % settings.chunk_size == 0,
        "PRECISION": settings.precision,
        "INVERSE_PRECISION": settings.inverse_precision,
    }
    return num_programs.get(name, -(-value_size // values)), compiled, constants


def power_of_2(size):
    """The least power of 2 from 16 on that is not below size: the sides of products in the Triton language."""
    return max(16, 1 << (size - 1).bit_length())
