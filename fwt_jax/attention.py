"""``fast_weight_attention``: what ``jax.nn.dot_product_attention`` is for softmax, for the fast weight memory.

This file checks what users pass, casts, normalises, and calls one of the forms. The mathematics is in ``memory.py``.

Letters: B batch, T tokens, H heads, K key features, V value size.
"""

from __future__ import annotations

import functools
import math
from numbers import Integral, Real
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fwt_jax import memory as memory_lib
from fwt_jax.chunkwise import chunkwise, over_heads, recurrent
from fwt_jax.kernels import tpu
from fwt_jax.memory import Memory, Rule

Form = Literal["chunkwise", "recurrent", "parallel"]
Normalize = Literal[False, "read", "retrieval"]


def init_memory(batch_size: int, num_heads: int, key_size: int, value_size: int, dtype=jnp.float32) -> Memory:
    """An empty memory: W_0 = 0 ``[B, H, K, V]`` and z_0 = 0 ``[B, H, K]``.

    Args:
      batch_size, num_heads, key_size, value_size: B, H, K (features, after the feature map) and V.
      dtype: float32, or float64 where the inputs are float64.

    Returns:
      A ``Memory``, the default of ``fast_weight_attention``.
    """
    return Memory(
        fast_weights=jnp.zeros((batch_size, num_heads, key_size, value_size), dtype),
        key_sum=jnp.zeros((batch_size, num_heads, key_size), dtype),
    )


def fast_weight_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    beta: jax.Array | None = None,
    log_decay: jax.Array | None = None,
    *,
    rule: Rule = "delta",
    memory: Memory | None = None,
    segment_ids: jax.Array | None = None,
    normalize: Normalize = False,
    eps: float = 1e-6,
    form: Form = "chunkwise",
    chunk_size: int | None = None,
    implementation: Literal[None, "xla", "pallas"] = None,
    precision: lax.PrecisionLike = None,
) -> tuple[jax.Array, Memory]:
    """Writes T tokens into a fast weight memory and reads it after each of them (causal linear attention).

    Per head, with W ``[K, V]``, α_t = exp(log_decay_t):

        sum      W_t = α_t W_{t−1} + β_t k_t v_tᵀ
        delta    W_t = α_t W_{t−1} + β_t k_t (v_t − (α_t W_{t−1})ᵀk_t)ᵀ
        fwm      delta, then W_t / max(1, ‖W_t‖_F)
        read     y_t = W_tᵀ q_t                                  divided by z_tᵀq_t + eps if normalised

    Feature maps and their normalisation are the caller's: query and key are features already.

    Args:
      query: φ(q), ``[B, T, H, K]``, floating point. No scale is applied.
      key: φ(k), ``[B, T, H, K]``, floating point.
      value: ``[B, T, H, V]``, floating point.
      beta: write strength, ``[B, T, H]``; in (0, 1) in the paper, up to 2 with unit keys. "delta" and "fwm" need it;
        1 for "sum" if not given.
      log_decay: log α, finite and ≤ 0, ``[B, T, H]`` (per head) or ``[B, T, H, K]`` (per key channel); no decay
        if not given. What is below −200 (float64: −1000) counts as that, and forgets all. (Attention normalisation
        alone knows what has decayed to less than float32 from what was never written, see ``normalize``.)
      rule: the update rule.
      memory: where to start, what an earlier call returned; empty if not given. For "fwm" in chunks ‖W‖ ≤ 1000.
      segment_ids: integers ``[B, T]``, for packed sequences. The memory is dropped before each token whose id differs
        from the one before it; the first token of a call always continues ``memory``. (A NaN or infinite value stays
        in its segment in the recurrent form alone; in the others it reaches its chunk and all after.)
      normalize: attention normalisation, with z_t = α_t z_{t−1} + k_t (+ β_t k_t for "sum"), which only calls that
        normalise advance: do not mix them. False; "read" divides the read by z_tᵀq_t + eps
        (eq. 28); "retrieval" (delta only) also divides what the key recalls, (α_t W_{t−1})ᵀk_t, by (α_t z_{t−1})ᵀk_t
        + eps (eq. 27), where that is d + eps. At the first token, where z is 0, d counts as 1; and the write is
        weakened by d/(d + eps), as in the authors' kernels. So a key that shares no feature with those before it is not
        written, and one that a strong decay leaves little of hardly is: eps = 0 writes them, with d = 0 as 1. (With
        eps = 0 float32 has nothing left of what has decayed to less than exp(−87), and d is 0 there.)
      eps: see ``normalize``; a Python number of at least 0. 1e-6 in the authors' retrieval program, 1e-5 in their
        language models.
      form: "chunkwise" trains; "recurrent" is the definition, and right for T = 1; "parallel" (sum, delta) is one
        chunk. All give the same numbers up to rounding.
      chunk_size: tokens per chunk of the chunkwise form. None picks: on CPU, for K·V ≤ 4096, one token at a time where
        no derivative is taken.
      implementation: "xla" is plain JAX, and what None picks; "pallas" is a kernel for TPU, of the chunkwise form of
        sum and delta with a decay per head or none. It must be inside ``jax.shard_map`` where the arrays are sharded,
        and has first derivatives by reverse mode only. On CPU it is interpreted, for tests; a GPU refuses it.
        It can be exported (``jax.export``) for one platform at a time.
      precision: of the matrix products of the chunkwise and parallel forms, as in ``jax.lax``. None: "highest", which
        keeps them exact where the hardware would round float32 to bfloat16 (TPU) or TF32 (GPU); but "default" if
        query, key and value are all bfloat16. A chunk's triangular system is solved more exactly.

    Returns:
      y ``[B, T, H, V]`` in value's dtype, and the memory after the last token: float32 (float64 for float64 inputs).

    Raises:
      ValueError: shapes or dtypes that do not fit together, T = 0, an unknown rule, form, normalisation or
        implementation, an eps below 0, "delta" or "fwm" without beta, a combination that is not defined ("fwm" in
        parallel form, normalised, or chunkwise with a decay per channel; "retrieval" for a rule other than delta), or
        that "pallas" does not have.

    Example:
      >>> y, memory = fast_weight_attention(q, k, v, beta)                    # a prompt
      >>> y, memory = fast_weight_attention(q1, k1, v1, beta1, memory=memory) # and its next token

    References:
      Schlag, Irie & Schmidhuber 2021 (eq. 17-28); Katharopoulos et al. 2020; Yang et al. 2024 (chunks), 2025 (decay).
    """
    query, key, value = _arrays(query=query, key=key, value=value)
    _check_qkv(query, key, value)
    batch, length, heads, key_size = key.shape
    if query.shape != key.shape:
        raise ValueError(
            f"query and key must have one shape [B, T, H, K], got {list(query.shape)} and {list(key.shape)}"
        )
    if value.shape[1] != length:
        raise ValueError(f"value must have the length {length} of key, got value {list(value.shape)}")
    check_options(rule, form, normalize, implementation, beta, log_decay, chunk_size, eps)
    _check_like(beta, "beta", [(batch, length, heads)])
    _check_like(log_decay, "log_decay", [(batch, length, heads), (batch, length, heads, key_size)])
    _check_memory(memory, key, value)
    return _attend(
        query,
        key,
        value,
        beta,
        log_decay,
        memory,
        resets(segment_ids, batch, length),
        rule=rule,
        normalize=normalize,
        eps=float(eps),
        form=form,
        chunk_size=None if chunk_size is None else int(chunk_size),
        implementation=implementation,
        precision=products_precision(precision, query, key, value),
    )


# Compiled as one: outside of jax.jit each operation and each scan would be dispatched by itself, and a scan, whose body
# is a new function at every call, compiled again. Inside of jax.jit it is a part of the caller's program.
@functools.partial(
    jax.jit,
    static_argnames=("rule", "normalize", "eps", "form", "chunk_size", "implementation", "precision"),
)
def _attend(
    query,
    key,
    value,
    beta,
    log_decay,
    memory,
    reset,
    *,
    rule,
    normalize,
    eps,
    form,
    chunk_size,
    implementation,
    precision,
):
    """``fast_weight_attention`` of arguments that fit together; ``reset``: bool ``[B, T]`` or None."""
    dtype = computation_dtype(query, key, value, memory)
    out_dtype = value.dtype
    if normalize or form != "chunkwise":  # which casts chunk by chunk
        query, key, value = (x.astype(dtype) for x in (query, key, value))
    # Zeros that are sharded as any argument is: with them so is all that a mesh of explicit axes has replicated.
    arrays = [x[..., 0] for x in (query, key, value)] + ([] if beta is None else [beta])
    arrays += [] if log_decay is None else [log_decay if log_decay.ndim == 3 else log_decay[..., 0]]
    arrays += ([] if reset is None else [reset[..., None]]) + (
        [] if memory is None else [memory.key_sum[:, None, :, 0]]
    )
    per_token = sum(jnp.zeros_like(x, dtype) for x in arrays)
    if any(jax.typeof(x).sharding.spec[:3] != jax.typeof(per_token).sharding.spec for x in (query, key, value)):
        query, key, value = (x + per_token[..., None].astype(x.dtype) for x in (query, key, value))
    beta = per_token + (jnp.ones((), dtype) if beta is None else beta.astype(dtype))
    if log_decay is not None:
        log_decay = log_decay.astype(dtype) + (per_token if log_decay.ndim == 3 else per_token[..., None])
    if reset is not None:
        reset = reset | jnp.zeros_like(jnp.sum(per_token, axis=-1), bool)

    memory = _start(memory, key, value, dtype)
    key_sum, recall_scale = memory.key_sum, None
    if normalize:
        query = _scaled_query(query, eps)
        summed = beta[..., None] * key if rule == "sum" else key
        found, left = over_heads(memory_lib.key_sums, out_axes=1)(key_sum, summed, log_decay, reset)
        key_sum = left[:, -1]
    if normalize == "retrieval":
        recall_scale, beta = _retrieval(memory.key_sum, found, key, beta, log_decay, reset, eps)
    inputs = (memory.fast_weights, query, key, value, beta, log_decay, reset, recall_scale)
    if form == "chunkwise":
        advance = tpu.chunkwise if implementation == "pallas" else chunkwise
        out, fast_weights = advance(*inputs, rule=rule, chunk_size=chunk_size, precision=precision)
    elif form == "parallel":
        out, fast_weights = over_heads(functools.partial(memory_lib.chunk, rule=rule, precision=precision))(*inputs)
    else:
        out, fast_weights = recurrent(*inputs, rule=rule)
    if normalize:
        out = _divided(out, jnp.sum(left * query, axis=-1, keepdims=True), eps)
    return out.astype(out_dtype), Memory(fast_weights, key_sum)


def _scaled_query(query, eps):
    """With eps = 0 a normalised read does not depend on the length of q: where that is tiny, zᵀq must not be zero."""
    if eps != 0:
        return query
    largest = lax.stop_gradient(jnp.max(jnp.abs(query), axis=-1, keepdims=True))
    return query / jnp.where(largest == 0, 1, largest)


def _divided(out, mass, eps):
    """out / (mass + eps); with eps = 0 its gradient has no square of a tiny mass, which would be zero."""
    scale = lax.stop_gradient(1 / mass) if eps == 0 else 1
    return out * scale / (mass * scale + eps)


def _retrieval(key_sum, found, key, beta, log_decay, reset, eps):
    """What the recalled value is multiplied by, and the write strength (eq. 27), both ``[B, T, H]``.

    With d = (α_t z_{t−1})ᵀk_t they are 1/(d + eps) and β d/(d + eps); where nothing was written before, 1 and β.
    """
    mass = jnp.sum(found * key, axis=-1)
    if eps == 0:
        nothing = mass == 0
    else:
        # A key sum of zero may be what has decayed to less than the smallest float32: then it counts as float64 has it.
        arrays = jax.tree.map(lax.stop_gradient, (key_sum, key, log_decay))
        largest = over_heads(memory_lib.log_of_largest_key, out_axes=1)(*arrays, reset)
        smallest = math.log(float(jnp.finfo(mass.dtype).tiny))
        nothing = jnp.all(found == 0, axis=-1) & ((largest > smallest) | (largest < math.log(math.ulp(0.0))))
    divisor = jnp.where(nothing, 1, mass + eps)
    # The gradient of 1/d has d² in it, which would overflow for what has decayed to less than 1e-19.
    scale = lax.stop_gradient(1 / divisor)
    share = divisor * scale
    return scale / share, beta * jnp.where(nothing, 1, mass * scale) / share


def fast_weight_cross_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    key_mask: jax.Array | None = None,
    memory: Memory | None = None,
    normalize: Literal[False, "read"] = False,
    eps: float = 1e-6,
    precision: lax.PrecisionLike = None,
) -> tuple[jax.Array, Memory]:
    """Non-causal linear attention, for encoders and cross-attention: all keys are written, then every query reads.

        W = W_0 + Σ_i k_i v_iᵀ,   z = z_0 + Σ_i k_i,   y_t = Wᵀq_t,  divided by zᵀq_t + eps if normalised

    In 2·H·K·V FLOPs per token that is written and as many per token that is read, without a query-by-key matrix; but
    where that matrix is smaller work, 2·H·S·(K + V) per token that reads, as for short sentences, y comes from it (and
    under jit the memory costs nothing unless it is used).

    Args:
      query: φ(q), ``[B, T, H, K]``, floating point.
      key: φ(k), ``[B, S, H, K]``, floating point.
      value: ``[B, S, H, V]``, floating point.
      key_mask: bool ``[B, S]``, False for padding: what is not to be written.
      memory: where to start; empty if not given. To read again what was written, call ``read``.
      normalize: False, or "read" (eq. 18-19).
      eps: added to the divisor.
      precision: of the matrix products, see ``fast_weight_attention``.

    Returns:
      y ``[B, T, H, V]`` in value's dtype, and the memory of all keys: float32 (float64 for float64 inputs).

    Raises:
      ValueError: shapes or dtypes that do not fit together, T = 0 or S = 0, an unknown normalisation.

    References:
      Katharopoulos et al. 2020; Schlag, Irie & Schmidhuber 2021 (eq. 17-19).
    """
    query, key, value, key_mask = _arrays(query=query, key=key, value=value, key_mask=key_mask)
    _check_qkv(query, key, value)
    _check_read(normalize, eps)
    _check_memory(memory, key, value)
    batch, length = key.shape[:2]
    if value.shape[1] != length:
        raise ValueError(
            f"key and value must have one length S, got key {list(key.shape)} and value {list(value.shape)}"
        )
    dtype = computation_dtype(query, key, value, memory)
    of_all, memory = memory is None, _start(memory, key, value, dtype)
    written = key.astype(dtype)
    if key_mask is not None:
        if key_mask.shape != (batch, length) or key_mask.dtype != bool:
            raise ValueError(
                f"key_mask must be bool [B, S] = [{batch}, {length}], got {key_mask.dtype}{list(key_mask.shape)}"
            )
        written = jnp.where(key_mask[:, :, None, None], written, 0)
        value = jnp.where(key_mask[:, :, None, None], value, 0)
    precision = products_precision(precision, query, key, value)
    query = _scaled_query(query.astype(dtype), eps) if normalize else query
    outer = jnp.einsum("bshk,bshv->bhkv", written, value.astype(dtype), precision=precision)
    after = Memory(memory.fast_weights + outer, memory.key_sum + jnp.sum(written, axis=1))
    reads, key_size, value_size = query.shape[1], key.shape[-1], value.shape[-1]
    if of_all and reads * length * (key_size + value_size) < (reads + length) * key_size * value_size:
        scores = jnp.einsum("bthk,bshk->bhts", query.astype(dtype), written, precision=precision)
        out = jnp.einsum("bhts,bshv->bthv", scores, value.astype(dtype), precision=precision)
        if normalize:
            out = _divided(out, jnp.swapaxes(jnp.sum(scores, axis=-1), 1, 2)[..., None], eps)
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
    (query,) = _arrays(query=query)
    return _read(query, memory, normalize, eps, products_precision(precision, query)).astype(query.dtype)


def _read(query, memory, normalize, eps, precision):
    _check_read(normalize, eps)
    _check_is_memory(memory)
    batch, heads, key_size, _ = memory.fast_weights.shape
    if query.ndim != 4 or query.shape[0] != batch or query.shape[2:] != (heads, key_size):
        raise ValueError(
            f"query must be [{batch}, T, {heads}, {key_size}] for a memory of {list(memory.fast_weights.shape)}, "
            f"got {list(query.shape)}"
        )
    if not jnp.issubdtype(query.dtype, jnp.floating):
        raise ValueError(f"query must be floating point, got {query.dtype}; cast it, e.g. query.astype(jnp.float32)")
    if memory.key_sum.shape != memory.fast_weights.shape[:-1]:
        raise ValueError(
            f"key_sum must be {list(memory.fast_weights.shape[:-1])}, the first axes of fast_weights, "
            f"got {list(memory.key_sum.shape)}"
        )
    dtype = memory.fast_weights.dtype
    query = _scaled_query(query.astype(dtype), eps) if normalize else query
    out = jnp.einsum("bthk,bhkv->bthv", query.astype(dtype), memory.fast_weights, precision=precision)
    if normalize:
        mass = jnp.einsum("bthk,bhk->bth", query.astype(dtype), memory.key_sum, precision=lax.Precision.HIGHEST)
        out = _divided(out, mass[..., None], eps)
    return out


def computation_dtype(*trees):
    """float32, or float64 if an array or dtype in them is: of a memory, and of what is computed with it."""
    dtypes = {jnp.result_type(x) for x in jax.tree.leaves(trees)}
    return jnp.dtype("float64" if jnp.dtype("float64") in dtypes else "float32")


def products_precision(precision, *inputs):
    """What None means: bfloat16 inputs are rounded already, and the hardware's products of them are fast."""
    if precision is not None:
        return tuple(precision) if isinstance(precision, list) else precision
    rounded = all(x.dtype == jnp.bfloat16 for x in inputs)
    return lax.Precision.DEFAULT if rounded else lax.Precision.HIGHEST


# --- checks: what came, what was expected, the way out ---------------------------------------------------------------


def _arrays(**arguments):
    """The arguments as JAX arrays; None stays."""
    for name, x in arguments.items():
        if x is not None and not (hasattr(x, "shape") and hasattr(x, "dtype")):
            raise ValueError(f"{name} must be an array, got {type(x).__name__}; jnp.asarray makes one")
    return tuple(None if x is None else jnp.asarray(x) for x in arguments.values())


def _check_read(normalize, eps):
    if not (normalize is False or (isinstance(normalize, str) and normalize == "read")):
        raise ValueError(f'normalize must be False or "read" where nothing is retrieved by key, got {normalize!r}')
    _check_eps(eps)


def _check_eps(eps):
    if not (isinstance(eps, Real) and 0 <= eps < float("inf")):
        raise ValueError(f"eps must be a number of at least 0, as 1e-6, got {eps!r}")


def _check_qkv(query, key, value):
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.ndim != 4:
            raise ValueError(
                f"{name} must be [B, T, H, size], got {list(x.shape)}; "
                "for one sequence or one head add axes of length 1, e.g. x[None, :, None, :]"
            )
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(f"{name} must be floating point, got {x.dtype}; cast it, e.g. {name}.astype(jnp.float32)")
        if 0 in x.shape:
            raise ValueError(f"{name} must not be empty, got {list(x.shape)}; a call takes at least one token (T = 1)")
    if query.shape[0::2] != key.shape[0::2] or query.shape[3] != key.shape[3]:
        raise ValueError(
            f"query and key must agree in B, H and K, got query {list(query.shape)} and key {list(key.shape)}; "
            "with grouped heads, repeat the smaller of them"
        )
    if value.shape[0] != key.shape[0] or value.shape[2] != key.shape[2]:
        raise ValueError(f"value must agree with key in B and H, got value {list(value.shape)}, key {list(key.shape)}")


def check_options(rule, form, normalize, implementation, beta, log_decay, chunk_size, eps=0.0):
    def one_of(name, got, options):
        if not any(got is option or (got == option and isinstance(got, str)) for option in options):
            raise ValueError(f"{name} must be one of {', '.join(map(repr, options))}, got {got!r}")

    one_of("rule", rule, ("sum", "delta", "fwm"))
    one_of("form", form, ("chunkwise", "recurrent", "parallel"))
    one_of("normalize", normalize, (False, "read", "retrieval"))
    one_of("implementation", implementation, (None, "xla", "pallas"))
    _check_eps(eps)
    if implementation == "pallas" and form != "chunkwise":
        raise ValueError(f'implementation="pallas" is of form="chunkwise", got form={form!r}; use "xla" or None')
    if beta is None and rule != "sum":
        raise ValueError(
            f'rule "{rule}" needs beta, the write strength [B, T, H] (e.g. a sigmoid of a projection), got None; '
            'pass jnp.ones(...) to write in full, or use rule="sum"'
        )
    if rule == "fwm" and form == "parallel":
        raise ValueError(
            'rule "fwm" has no parallel form, for each clip depends on the one before; use "recurrent" or "chunkwise"'
        )
    if rule == "fwm" and form == "chunkwise" and log_decay is not None and log_decay.ndim == 4:
        raise ValueError('rule "fwm" has no chunkwise form with a decay per key channel; use form="recurrent"')
    if rule == "fwm" and normalize:
        raise ValueError(f'rule "fwm" clips its memory and has no attention normalisation, got normalize={normalize!r}')
    if normalize == "retrieval" and rule != "delta":
        raise ValueError(
            f'normalize="retrieval" is for rule "delta", which retrieves by key, got rule={rule!r}; use "read"'
        )
    if chunk_size is not None and (form != "chunkwise" or not isinstance(chunk_size, Integral) or chunk_size < 1):
        raise ValueError(
            f'chunk_size must be an integer above 0 and goes with form="chunkwise", got {chunk_size} and form="{form}"'
        )


def _check_like(x, name, shapes):
    if x is None:
        return
    if not hasattr(x, "shape") or x.shape not in shapes:
        expected = " or ".join(str(list(shape)) for shape in shapes)
        got = list(x.shape) if hasattr(x, "shape") else f"{x!r}; jnp.full makes an array of one number"
        raise ValueError(f"{name} must be {expected} to go with key, got {got}")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"{name} must be floating point, got {x.dtype}; cast it, e.g. {name}.astype(jnp.float32)")


def _check_is_memory(memory, shape=""):
    if not isinstance(memory, Memory):
        raise ValueError(
            f"memory must be a Memory, as a call returns it or init_memory{shape} makes it, got "
            f"{type(memory).__name__}; Memory(fast_weights, key_sum) makes one of two arrays"
        )
    for name, x in zip(memory._fields, _arrays(**memory._asdict()), strict=True):
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(f"{name} of memory must be floating point, got {x.dtype}")


def _check_memory(memory, key, value):
    if memory is None:
        return
    shape = (key.shape[0], *key.shape[2:], value.shape[-1])
    _check_is_memory(memory, shape)
    got = (memory.fast_weights.shape, memory.key_sum.shape)
    if got != (shape, shape[:-1]):
        raise ValueError(
            f"memory must hold fast_weights {list(shape)} and key_sum {list(shape[:-1])}, "
            f"got {list(got[0])} and {list(got[1])}; init_memory{shape} makes an empty one"
        )


def _start(memory, key, value, dtype):
    """The memory to start from, in the dtype of the computation."""
    # Zeros of the arguments: sharded over the mesh, or in shard_map varying over it, as what will be written is.
    no_key = jnp.zeros_like(key[:, 0], dtype)
    empty = Memory(no_key[..., None] + jnp.zeros_like(value[:, 0], dtype)[..., None, :], no_key)
    if memory is None:
        return empty
    return jax.tree.map(lambda x, zeros: x.astype(dtype) + zeros, memory, empty)


def resets(segment_ids, batch, length):
    """True where a token's segment differs from the one before it; None without segments."""
    if segment_ids is None:
        return None
    if not isinstance(segment_ids, np.ndarray):  # of which JAX would make int32, where some ids are the same
        (segment_ids,) = _arrays(segment_ids=segment_ids)
    if segment_ids.shape != (batch, length) or not jnp.issubdtype(segment_ids.dtype, jnp.integer):
        raise ValueError(
            f"segment_ids must be integers [B, T] = [{batch}, {length}], "
            f"got {segment_ids.dtype}{list(segment_ids.shape)}"
        )
    changes = segment_ids[:, 1:] != segment_ids[:, :-1]
    return jnp.concatenate([jnp.zeros_like(segment_ids[:, :1], bool), changes], axis=1)
