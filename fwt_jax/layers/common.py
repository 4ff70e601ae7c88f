"""Code that all layers share: projections, features, the softmax read, and the checks of their arguments."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer

from fwt_jax import arguments
from fwt_jax.precision import computation_dtype, products_precision

FeatureMap = Callable[[jax.Array], jax.Array]
KERNEL_INIT = nnx.initializers.lecun_normal()


# --- construction ----------------------------------------------------------------------------------------------------


def check_rngs(rngs):
    if not isinstance(rngs, nnx.Rngs):
        raise ValueError(f"rngs must be an nnx.Rngs, got {type(rngs).__name__}; nnx.Rngs(0) makes one")


def check_sizes(in_features, num_heads, head_size, value_size, num_value_heads=None):
    num_value_heads = num_heads if num_value_heads is None else num_value_heads
    arguments.sizes(in_features=in_features, num_heads=num_heads, head_size=head_size, value_size=value_size)
    arguments.sizes(num_value_heads=num_value_heads)
    if num_value_heads % num_heads:
        raise ValueError(
            f"num_value_heads must be a multiple of num_heads {num_heads}, got {num_value_heads}, because each query "
            "and key head serves as many value heads; leave it out for one each"
        )
    if num_heads > in_features:
        raise ValueError(
            f"num_heads {num_heads} is larger than in_features {in_features}: the order of the arguments is "
            "(in_features, num_heads, head_size), and nnx.MultiHeadAttention has another; swap them or name them"
        )


def linear_layers(*, use_bias, dtype, param_dtype=jnp.float32, kernel_init, rngs):
    """``nnx.LinearGeneral`` with these options."""
    check_rngs(rngs)
    return functools.partial(
        nnx.LinearGeneral,
        use_bias=use_bias,
        dtype=dtype,
        param_dtype=param_dtype,
        kernel_init=kernel_init,
        rngs=rngs,
    )


def projections(linear, in_features, num_heads, head_size, value_size, num_value_heads=None):
    """W_q, W_k: d_model -> [H, D], W_v: d_model -> [HV, V] and W_o: [HV, V] -> d_model; HV is H if not given.

    ``linear`` is of ``linear_layers``.
    """
    value_heads = (num_heads if num_value_heads is None else num_value_heads, value_size)
    query, key = (linear(in_features, (num_heads, head_size)) for _ in range(2))
    return query, key, linear(in_features, value_heads), linear(value_heads, in_features, axis=(-2, -1))


# --- features --------------------------------------------------------------------------------------------------------


def draw_once(feature_map, rngs):
    """A random feature map with a new projection, which keys and queries must share; other maps as they are."""
    if rngs is None or not hasattr(feature_map, "draw"):
        return feature_map
    check_rngs(rngs)
    return feature_map.draw(rngs)


def features(x, feature_map, feature_normalization):
    """N(φ(x)) in the dtype of x; float32 until it is normalised, because φ(x) can leave the range of float16."""
    return feature_normalization(feature_map(at_least_float32(x))).astype(x.dtype)


def count_features(feature_map, feature_normalization, num_heads, head_size):
    """K.

    Raises:
      ValueError: no callables, other axes than the last one changed, or features that are not finite.
    """
    if not callable(feature_map) or not callable(feature_normalization):
        raise ValueError(
            "feature_map must be a callable, and feature_normalization one or None, "
            f"got {feature_map!r} and {feature_normalization!r}; take them from fwt_jax.feature_maps"
        )
    heads = jax.ShapeDtypeStruct((1, 1, num_heads, head_size), jnp.float32)
    shape = jax.eval_shape(lambda x: feature_normalization(feature_map(x)), heads).shape
    if len(shape) != 4 or shape[:-1] != heads.shape[:-1]:
        raise ValueError(
            f"feature_map and feature_normalization must change the last axis only, got {heads.shape} -> {shape}"
        )
    _check_finite(feature_map, feature_normalization, num_heads, head_size)
    return shape[-1]


def _check_finite(feature_map, feature_normalization, num_heads, head_size):
    """Tries the inputs that make all features of some map zero: a normalisation may divide by their sum or norm."""
    relu = "ReLU, and DPFP of an odd size, can give zeros alone; take another map, or sum_normalize without an eps"
    zeros = "they are divided by a sum or norm that is 0; take sum_normalize without an eps, or an eps above 0"
    inputs = [("[−1, −1, −1, …]", -np.ones(head_size), relu), ("[0, 0, 0, …]", np.zeros(head_size), zeros)]
    if head_size % 2:
        inputs.insert(1, ("[−1, 1, −1, …]", np.where(np.arange(head_size) % 2, 1, -1), relu))
    for name, vector, reason in inputs:
        with jax.ensure_compile_time_eval(), jax.debug_nans(False), jax.debug_infs(False):
            x = jnp.broadcast_to(jnp.asarray(vector, jnp.float32), (1, 1, num_heads, head_size))
            result = feature_normalization(feature_map(x))
        if not isinstance(result, Tracer) and not np.all(np.isfinite(result)):
            raise ValueError(f"the features of {name}, of head_size {head_size}, are not finite: {reason}")


# --- calls -----------------------------------------------------------------------------------------------------------


def softmax_read(query, key, value, visible, precision=None, added_scores=None):
    """o_t = Σ_i softmax_i((kᵢᵀq_t + added_ti) / √D) vᵢ over the visible tokens i, in value's dtype.

    Scores and softmax are float32 (float64 for float64). With H/G query heads to a head of keys and values, query head
    h reads head ⌊hG/H⌋ of them (Ainslie et al. 2023).

    Args:
      query, key, value: ``[B, T, H, D]``, ``[B, S, G, D]`` and ``[B, S, G, V]``, where G divides H.
      visible: bool ``[B or 1, T or 1, S]``.
      precision: of the products, see ``fast_weight_attention``.
      added_scores: None or ``[B, H, T, S]``.
    """
    precision = products_precision(precision, query, key, value)
    (batch, num_tokens, num_heads, head_size), num_groups = query.shape, key.shape[2]
    query = at_least_float32(query).reshape(batch, num_tokens, num_groups, -1, head_size)
    scores = jnp.einsum("btghd,bsgd->bghts", query, at_least_float32(key), precision=precision)
    scores = scores if added_scores is None else scores + added_scores.reshape(scores.shape)
    # The least float, not −∞: a query that sees no token then reads the mean of all values, not NaN.
    scores = jnp.where(visible[:, None, None], scores * head_size**-0.5, jnp.finfo(scores.dtype).min)
    weights = jax.nn.softmax(scores, axis=-1)
    y = jnp.einsum("bghts,bsgv->btghv", weights, at_least_float32(value), precision=precision)
    return y.reshape(batch, num_tokens, num_heads, -1).astype(value.dtype)


def at_least_float32(x):
    return x.astype(computation_dtype(x.dtype))


def promote_to_float32(arrays, *, dtype=None, inexact=True):
    """``promote_dtype`` of an ``nnx.Linear`` that computes in ``dtype``, or else in float32 (float64 for float64).

    Flax promotes x and the parameters to a common dtype, which strict promotion refuses where one of them is bfloat16.
    """
    dtype = computation_dtype(arrays) if dtype is None else dtype
    return jax.tree.map(lambda x: x.astype(dtype), arrays)  # without a bias, one of them is None


def checked_input(x, in_features, segment_ids: Any = None) -> tuple[jax.Array, Any]:
    """x, ``[B, T, in_features]``, and segment_ids as arrays, of JAX or NumPy."""
    x = jnp.asarray(x)
    if segment_ids is not None and not hasattr(segment_ids, "shape"):
        segment_ids = np.asarray(segment_ids)
    if x.ndim != 3 or x.shape[-1] != in_features or x.shape[1] == 0 or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(
            f"x must be floating point and [B, T, {in_features}] with T ≥ 1, got {x.dtype}{list(x.shape)}; "
            "for one token or one sequence add an axis of length 1, e.g. x[:, None]"
        )
    return x, segment_ids


def check_kind(memory, kind, way_out):
    if not isinstance(memory, kind):
        raise ValueError(
            f"memory must be a {kind.__name__}, as this layer returns it, got {type(memory).__name__}; {way_out}"
        )


def check_shapes(memory, shapes, way_out):
    """Refuses a memory, a NamedTuple, whose arrays have other shapes than these, in the order of its fields."""
    got = [list(x.shape) if hasattr(x, "shape") else type(x).__name__ for x in memory]
    expected = [list(shape) for shape in shapes]
    if got != expected:
        expected, got = (", ".join(f"{n} {x}" for n, x in zip(memory._fields, y, strict=True)) for y in (expected, got))
        raise ValueError(f"memory must hold {expected}, got {got}; {way_out}")
