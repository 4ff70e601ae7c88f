"""Checks of arguments, one function for each kind of mistake. An error says what came and what was expected."""

from __future__ import annotations

import operator
from numbers import Integral
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer


def one_of(options, **given):
    """Refuses what is none of the options. Strings are compared by value; False, True and None by identity."""
    for name, got in given.items():
        if not any(got is option or (isinstance(got, str) and got == option) for option in options):
            raise ValueError(f"{name} must be one of {', '.join(map(repr, options))}, got {got!r}")


def at_least(least, **numbers):
    """Refuses numbers below ``least``."""
    for name, got in numbers.items():
        if not got >= least:
            raise ValueError(f"{name} must be at least {least}, got {got}")


def sizes(least=1, **given):
    """Refuses what is no integer of at least ``least``."""
    wrong = {name: size for name, size in given.items() if not isinstance(size, Integral)}
    if wrong:
        raise ValueError(f"sizes must be integers, got {wrong}; int(...) makes one of a whole number")
    wrong = {name: size for name, size in given.items() if size < least}
    if wrong:
        raise ValueError(f"sizes must be at least {least}, got {wrong}")


def arrays(**given) -> tuple[Any, ...]:
    """The arguments as JAX arrays; None stays."""
    for name, x in given.items():
        if x is not None and not (hasattr(x, "shape") and hasattr(x, "dtype")):
            raise ValueError(f"{name} must be an array, got {type(x).__name__}; jnp.asarray makes one")
    return tuple(None if x is None else jnp.asarray(x) for x in given.values())


def floating(**given):
    """Refuses arrays that are not floating point."""
    for name, x in given.items():
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(f"{name} must be floating point, got {x.dtype}; cast it, e.g. {name}.astype(jnp.float32)")


def integers(name: str, x, most: int, *, axes: str = "[B, T]", shape=None, least: int | None = 0) -> jax.Array:
    """Integers, or lists of them, as int32: words, targets, lengths.

    Numbers that are not traced are read, which waits for the device that holds them.

    Args:
      name, axes: how an error calls x and its shape.
      most, least: the range of x; ``least`` None: negative ones are ignored targets.
      shape: of x; any two axes that are not empty if not given.

    Raises:
      ValueError: no integers, another shape, known numbers outside of the range.
    """
    if not isinstance(x, (jax.Array, np.ndarray)):
        try:
            x = np.asarray(x)
        except ValueError:
            raise ValueError(f"{name} must be integers {axes}, got rows of different lengths; pad them") from None
    fits = x.ndim == 2 and 0 not in x.shape if shape is None else x.shape == shape
    if not fits or not jnp.issubdtype(x.dtype, jnp.integer):
        raise ValueError(f"{name} must be integers {axes}, got {x.dtype}{list(x.shape)}")
    if not isinstance(x, Tracer) and x.size:
        with jax.ensure_compile_time_eval():  # known numbers stay known inside of jax.jit
            low, high = int(x.min()), int(x.max())
        if least is None and high > most:
            raise ValueError(f"{name} must be at most {most}, or negative where a token is not to count, got {high}")
        if least is not None and (low < least or high > most):
            raise ValueError(f"{name} must be from {least} to {most}, got {low} to {high}")
    info = jnp.iinfo(x.dtype)
    if info.max > jnp.iinfo(jnp.int32).max:  # int32 would make other words of numbers that are too large
        x = x.clip(max(info.min, -1), jnp.iinfo(jnp.int32).max)
    return jnp.asarray(x, jnp.int32)


def static_size(name, value):
    """A number that shapes depend on."""
    try:
        size = operator.index(value)
    except TypeError:  # a tracer's is one, too
        raise ValueError(f"{name} must be an integer that is not traced, at least 1, got {value!r}") from None
    if size < 1:
        raise ValueError(f"{name} must be at least 1, got {size}")
    return size


def number(name, value, wanted, good, dtype=jnp.float32):
    """A number of a program, ``[]``: another one compiles nothing. It is checked where it is known."""
    traced = isinstance(value, Tracer)
    array = value if traced else np.asarray(value)
    kinds = (jnp.integer,) if dtype == jnp.int32 else (jnp.integer, jnp.floating)
    fits = array.ndim == 0 and any(jnp.issubdtype(array.dtype, kind) for kind in kinds)
    if not fits or not (traced or good(array.item())):
        kind = "an integer " if dtype == jnp.int32 else ""
        raise ValueError(f"{name} must be {kind if not fits else ''}{wanted}, got {value}")
    return jnp.asarray(array, dtype)


def refuse_broken_rows(broken, rows):
    """Raises a ValueError where a row of a result, bool ``[B]``, is broken and known to be."""
    if isinstance(broken, Tracer) or not (count := int(jnp.sum(broken))):
        return
    raise ValueError(
        f"the model's log-probabilities are NaN for {count} of {len(broken)} {rows}: its parameters are not finite, or "
        "its memory has grown beyond float32; call the model itself on them to see where"
    )
