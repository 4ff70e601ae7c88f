"""The dtype and the precision that computations with a memory have."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def computation_dtype(*trees):
    """The dtype of a memory and of computations with it: float64 if an array or dtype in the trees is; or float32."""
    dtypes = {jnp.result_type(x) for x in jax.tree.leaves(trees)}
    return jnp.dtype("float64" if jnp.dtype("float64") in dtypes else "float32")


def products_precision(precision: lax.PrecisionLike, *inputs) -> Any:
    """The default precision: DEFAULT for bfloat16 inputs (already rounded, and fast), HIGHEST otherwise."""
    if precision is not None:
        return tuple(precision) if isinstance(precision, list) else precision
    rounded = all(x.dtype == jnp.bfloat16 for x in inputs)
    return lax.Precision.DEFAULT if rounded else lax.Precision.HIGHEST
