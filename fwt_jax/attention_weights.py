"""The weight of each value in a read, like a row of an attention matrix, without forming the memory."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax

from fwt_jax.memory import HIGHEST
from fwt_jax.rules import Rule, find_rule, name_of


def read_weights(query, key, beta, log_decay=None, reset=None, *, rule: str | Rule):
    """The weight of each value in a read after the last write: w with W_Tᵀq = Σ_t w_t v_t + W_0ᵀr, without forming W.

    The recurrence runs backwards on the query, from r = q: w_t = β_t k_tᵀr, then r ← α_t r for sum and
    r ← α_t (r − w_t k_t) for delta. It takes O(TK), and advancing the memory takes O(TKV). These are the "attention
    weights" of a fast weight memory: βkᵀq for sum. For delta, later writes reduce the weight of a token whose key they
    share.

    Args:
      query: ``[K]``, the one read.
      key, beta, log_decay, reset: see the head of ``memory.py``.
      rule: "sum" or "delta", or a rule with the same write (``Rule.corrects``).

    Returns:
      The weights w ``[T]``, and r ``[K]``, the query that reads the initial memory.

    Raises:
      ValueError: another rule, or arrays that do not fit together.
    """
    row = find_rule(rule)
    if row.corrects is None:
        raise ValueError(
            f'read_weights is for rule "sum" or "delta", whose reads are linear in the values, got {name_of(row)}'
        )
    arrays = {"query": query, "key": key, "beta": beta, "log_decay": log_decay, "reset": reset}
    for name, x in arrays.items():
        if (x is None and name in ("query", "key", "beta")) or (x is not None and not hasattr(x, "shape")):
            raise ValueError(f"{name} must be an array, got {type(x).__name__}; jnp.asarray makes one of numbers")
    if key.ndim != 2:
        raise ValueError(f"key must be [T, K], of one head and sequence, got {list(key.shape)}; take jax.vmap for more")
    length, key_size = key.shape
    expected = {
        "query": [(key_size,)],
        "beta": [(length,)],
        "log_decay": [(length,), (length, key_size)],
        "reset": [(length,)],
    }
    for name, shapes in expected.items():
        x = arrays[name]
        if x is not None and x.shape not in shapes:
            words = " or ".join(str(list(shape)) for shape in shapes)
            raise ValueError(f"{name} must be {words} to go with key {list(key.shape)}, got {list(x.shape)}")
    return _read_weights(query, key, beta, log_decay, reset, corrects=row.corrects)


# Outside of jit, JAX would compile the scan again at each call.
@functools.partial(jax.jit, static_argnames="corrects")
def _read_weights(query, key, beta, log_decay, reset, *, corrects):
    if not corrects and log_decay is None and reset is None:
        return beta * jnp.matmul(key, query, precision=HIGHEST), query

    def body(query, inputs):
        key, beta, log_decay, reset = inputs
        weight = beta * jnp.dot(key, query, precision=HIGHEST)
        if corrects:
            query = query - weight * key
        if log_decay is not None:
            query = jnp.exp(log_decay) * query
        if reset is not None:
            query = jnp.where(reset, 0, query)
        return query, weight

    query, weights = lax.scan(body, query, (key, beta, log_decay, reset), reverse=True)
    return weights, query
