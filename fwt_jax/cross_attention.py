"""Linear attention without an order of the tokens: all keys are written, then every query reads."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax

from fwt_jax import arguments, normalization
from fwt_jax.attention_arguments import check_axis, check_is_memory, check_key_mask, check_memory, check_qkv, check_read
from fwt_jax.heads import of_value_heads, start_of
from fwt_jax.memory import Memory
from fwt_jax.precision import computation_dtype, products_precision


def fast_weight_cross_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    key_mask: jax.Array | None = None,
    memory: Memory | None = None,
    normalize: Literal[False, "read"] = False,
    eps: float = 1e-6,
    sequence_axis: str | None = None,
    precision: lax.PrecisionLike = None,
) -> tuple[jax.Array, Memory]:
    """Non-causal linear attention, for encoders and cross-attention: all keys are written, then every query reads.

        W = W_0 + Σ_i k_i v_iᵀ,   z = z_0 + Σ_i k_i,   y_t = Wᵀq_t,  divided by zᵀq_t + eps if normalised

    Cost: 2·H·K·V FLOPs per token that is written and as many per token that reads, without a query-by-key matrix. For
    short sources that matrix is less work, 2·H·S·(K + V) FLOPs per token that reads. Then, without a ``memory`` and a
    ``sequence_axis``, y comes from it, and under jit the memory costs nothing unless it is used.

    Args:
      query: φ(q), ``[B, T, H, K]``, floating point.
      key: φ(k), ``[B, S, H, K]``, floating point.
      value: ``[B, S, HV, V]``, floating point; HV is H, or a multiple as in ``fast_weight_attention``.
      key_mask: bool ``[B, S]``, False for padding, which is not written; of lengths ``[B]`` it is
        ``jnp.arange(S)[None] < lengths[:, None]``.
      memory: the start; empty if not given. To read the result again, call ``read``.
      normalize: False, or "read" (eq. 18-19).
      eps: added to the divisor.
      sequence_axis: in ``jax.shard_map``, the name of the axis of the mesh that splits the keys: the memory is that of
        the keys of all devices, by one all-reduce of K(V + 1) numbers per head. Queries may be split or not. Under jit
        XLA does the same for keys that are sharded, without this argument.
      precision: of the matrix products, see ``fast_weight_attention``.

    Returns:
      y ``[B, T, HV, V]`` in value's dtype, and the memory of all keys: float32 (float64 for float64 inputs).

    Raises:
      ValueError: shapes or dtypes that do not fit together, T = 0 or S = 0, an unknown normalisation.

    References:
      Katharopoulos et al. 2020; Schlag, Irie & Schmidhuber 2021 (eq. 17-19).
    """
    query, key, value, key_mask = arguments.arrays(query=query, key=key, value=value, key_mask=key_mask)
    check_qkv(query, key, value)
    check_read(normalize, eps)
    check_memory(memory, key, value)
    query, key = (of_value_heads(x, value.shape[2]) for x in (query, key))
    batch, length = key.shape[:2]
    if value.shape[1] != length:
        raise ValueError(
            f"key and value must have one length S, got key {list(key.shape)} and value {list(value.shape)}"
        )
    dtype = computation_dtype(query, key, value, memory)
    start = start_of(memory, key, value, dtype)
    written = key.astype(dtype)
    if key_mask is not None:
        check_key_mask(key_mask, batch, length)
        written = jnp.where(key_mask[:, :, None, None], written, 0)
        value = jnp.where(key_mask[:, :, None, None], value, 0)
    precision = products_precision(precision, query, key, value)
    query = normalization.scaled_query(query.astype(dtype), eps) if normalize else query
    outer = jnp.einsum("bshk,bshv->bhkv", written, value.astype(dtype), precision=precision)
    written_by_all = Memory(outer, jnp.sum(written, axis=1))
    if sequence_axis is not None:
        check_axis(sequence_axis)
        # The same on all devices. The start that is added to it must not vary over the axis, as ``start_of``'s does.
        written_by_all = lax.psum(written_by_all, sequence_axis)
        start = jax.tree.map(jnp.zeros_like, written_by_all) if memory is None else memory
    after = jax.tree.map(lambda x, y: x.astype(dtype) + y, start, written_by_all)
    reads, key_size, value_size = query.shape[1], key.shape[-1], value.shape[-1]
    by_scores = reads * length * (key_size + value_size) < (reads + length) * key_size * value_size
    if by_scores and memory is None and sequence_axis is None:
        scores = jnp.einsum("bthk,bshk->bhts", query.astype(dtype), written, precision=precision)
        out = jnp.einsum("bhts,bshv->bthv", scores, value.astype(dtype), precision=precision)
        if normalize:
            out = normalization.divided(out, jnp.swapaxes(jnp.sum(scores, axis=-1), 1, 2)[..., None], eps)
    else:
        out = _read(query, after, normalize, eps, precision)
    return out.astype(value.dtype), after


def read(
    query: jax.Array,
    memory: Memory,
    *,
    normalize: Literal[False, "read"] = False,
    eps: float = 1e-6,
    precision: lax.PrecisionLike = None,
) -> jax.Array:
    """Reads a memory without writing: y_t = Wᵀq_t, divided by zᵀq_t + eps if normalised (eq. 19, 25, 28).

    Args:
      query: φ(q), ``[B, T, H, K]``, floating point.
      memory: W ``[B, H, K, V]`` and z ``[B, H, K]``. z is only kept by calls that normalise.
      normalize: False, or "read".
      eps: added to the divisor.
      precision: of the matrix products, see ``fast_weight_attention``.

    Returns:
      y ``[B, T, H, V]`` in query's dtype.

    Raises:
      ValueError: shapes or dtypes that do not fit together, an unknown normalisation.
    """
    (query,) = arguments.arrays(query=query)
    return _read(query, memory, normalize, eps, products_precision(precision, query)).astype(query.dtype)


def _read(query, memory, normalize, eps, precision):
    check_read(normalize, eps)
    check_is_memory(memory)
    batch, heads, key_size, _ = memory.fast_weights.shape
    if query.ndim != 4 or query.shape[0] != batch or query.shape[2:] != (heads, key_size):
        raise ValueError(
            f"query must be [{batch}, T, {heads}, {key_size}] for a memory of {list(memory.fast_weights.shape)}, "
            f"got {list(query.shape)}"
        )
    arguments.floating(query=query)
    if memory.key_sum.shape != memory.fast_weights.shape[:-1]:
        raise ValueError(
            f"key_sum must be {list(memory.fast_weights.shape[:-1])}, the first axes of fast_weights, "
            f"got {list(memory.key_sum.shape)}"
        )
    dtype = memory.fast_weights.dtype
    query = normalization.scaled_query(query.astype(dtype), eps) if normalize else query
    out = jnp.einsum("bthk,bhkv->bthv", query.astype(dtype), memory.fast_weights, precision=precision)
    if normalize:
        mass = jnp.einsum("bthk,bhk->bth", query.astype(dtype), memory.key_sum, precision=lax.Precision.HIGHEST)
        out = normalization.divided(out, mass[..., None], eps)
    return out
