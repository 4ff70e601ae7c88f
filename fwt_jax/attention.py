"""``fast_weight_attention``: the counterpart of ``jax.nn.dot_product_attention`` for the fast weight memory.

This file checks the arguments, casts, normalises, and calls one of the forms. The mathematics is in ``memory.py``.

Letters: B batch, T tokens, H heads, HV value heads, K key features, V value size.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax

from fwt_jax import arguments, normalization
from fwt_jax.attention_arguments import (
    check_like,
    check_memory,
    check_options,
    check_pieces,
    check_qkv,
    check_segments,
    check_step,
    has_chunks,
    resets,
    segments_of,
    tokens_within,
)
from fwt_jax.chunkwise import chunkwise, size_of_chunks
from fwt_jax.heads import of_value_heads, over_heads, start_of
from fwt_jax.kernels import gpu, tpu
from fwt_jax.memory import Memory
from fwt_jax.pieces import in_pieces, is_axis, number_of_pieces, of_last, start_of_piece
from fwt_jax.precision import computation_dtype, products_precision
from fwt_jax.recurrent import recurrent
from fwt_jax.rules import Rule, find_rule
from fwt_jax.segments import by_segment

Form = Literal[None, "chunkwise", "recurrent", "parallel"]
Normalize = Literal[False, "read", "retrieval"]
Implementation = Literal[None, "xla", "pallas", "triton"]


def fast_weight_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    beta: jax.Array | None = None,
    log_decay: jax.Array | None = None,
    *,
    rule: str | Rule = "delta",
    memory: Memory | None = None,
    segment_ids: jax.Array | None = None,
    lengths: jax.Array | None = None,
    memory_every: int | None = None,
    normalize: Normalize = False,
    eps: float = 1e-6,
    form: Form = None,
    chunk_size: int | None = None,
    implementation: Implementation = None,
    pieces: int | None = 1,
    sequence_axis: str | None = None,
    precision: lax.PrecisionLike = None,
) -> tuple[jax.Array, Memory]:
    """Writes T tokens into a fast weight memory and reads it after each of them (causal linear attention).

    Per head, with W ``[K, V]``, α_t = exp(log_decay_t):

        sum      W_t = α_t W_{t−1} + β_t k_t v_tᵀ
        delta    W_t = α_t W_{t−1} + β_t k_t (v_t − (α_t W_{t−1})ᵀk_t)ᵀ
        oja      W_t = α_t W_{t−1} + β_t (k_t − α_t W_{t−1} v_t) v_tᵀ
        fwm      delta, then W_t / max(1, ‖W_t‖_F)
        read     y_t = W_tᵀ q_t                                  divided by z_tᵀq_t + eps if normalised

    Feature maps and their normalisation are the caller's: query and key are features already.

    Args:
      query: φ(q), ``[B, T, H, K]``, floating point. No scale is applied.
      key: φ(k), ``[B, T, H, K]``, floating point.
      value: ``[B, T, HV, V]``, floating point. HV is H, or a multiple r·H: query and key head h then serve the value
        heads h·r to h·r + r − 1 (Gated DeltaNet), as if ``jnp.repeat`` repeated them. In chunks of plain JAX nothing
        repeats them, and their products are made once: on CPU a tenth to a third less time for r = 4, and a third
        to half less memory for temporaries. In the kernels for TPU, up to eight value heads share a product (fewer if
        K or V is above 128), if the decay is one number per head. A decay per channel needs one for each head. Kernels
        for GPU, attention normalisation and the recurrent form repeat queries and keys.
      beta: write strength, ``[B, T, HV]``; in (0, 1) in the paper, up to 2 with unit keys (for "oja", with unit
        values: it diverges for β‖v‖² > 2). All rules but "sum" need it; 1 for "sum" if not given. It is no
        number per value channel: each channel would then have a triangular system of its own in each chunk.
      log_decay: log α, finite and ≤ 0, ``[B, T, HV]`` (per head) or ``[B, T, HV, K]`` (per key channel); no decay
        if not given. A value below −200 (float64: −1000) counts as −200: it forgets everything.
      rule: the update rule: a name of the table in ``rules.py``, or a ``Rule`` of your own.
      memory: the start, returned by an earlier call; empty if not given. For "fwm" in chunks ‖W‖ ≤ 1000.
        N memories for each row, ``[B, N, HV, K, V]`` and ``[B, N, HV, K]``, give each segment its own, see
        ``segment_ids``. Empty ones are ``init_memory(B * N, …)``, with arrays reshaped to ``[B, N, …]``.
      segment_ids: integers ``[B, T]``, for packed sequences. The memory is dropped before each token whose id differs
        from the one before it. The first token of a call always continues ``memory``. (In the recurrent form, a NaN or
        infinite value stays in its segment. In the other forms it reaches its whole chunk and all later ones.)
        With N memories, ids are from 0 to N − 1, in any order: each token advances and reads the memory that its id
        names, and no other. The memory returned has all N. Known ids are checked, which waits for the device; tokens
        with a traced id outside of the range count as padding. A form or a kernel takes one chunk of one segment at a
        time, of at most ⌈T/N⌉ tokens, rounded up to a multiple of 8: see segments.py. Not with ``memory_every``,
        ``pieces`` or ``sequence_axis``.
      lengths: integers ``[B]`` from 0 to T, for rows that are padded behind; T for all rows if not given. Row b writes
        and decays its first ``lengths[b]`` tokens, and its memory is that of the row cut there. Of the other tokens y
        and all gradients are 0, whatever their arrays hold. Numbers that are not traced are checked, which waits for
        the device; traced ones outside of the range count as 0 or T. Pad in front with ``segment_ids`` instead.
      memory_every: N: returns the memories after every N tokens and after the last one, ``[B, ⌈T/N⌉, HV, K, V]`` and
        ``[B, ⌈T/N⌉, HV, K]``, from one pass. A call goes on from memory i as ``jax.tree.map(lambda x: x[:, i], …)``.
        A form or a kernel advances N tokens at a time. Not traced.
      normalize: attention normalisation, with z_t = α_t z_{t−1} + k_t (+ β_t k_t for "sum"). Only calls that normalise
        advance z, so do not mix them with others.
        "read" divides the read by z_tᵀq_t + eps (eq. 28).
        "retrieval" (delta only) also divides the recalled value (α_t W_{t−1})ᵀk_t by d + eps, d = (α_t z_{t−1})ᵀk_t
        (eq. 27). With eps > 0 the write strength is multiplied by d/(d + eps), as in the authors' kernels: a key
        orthogonal to all earlier ones (d = 0) is not written. Only at the first token, where z = 0, it is written in
        full. With eps = 0 every key with d = 0 is written in full. (In float32, d is 0 after decays below exp(−87).)
      eps: see ``normalize``; a Python number of at least 0. 1e-6 in the authors' retrieval program, 1e-5 in their
        language models.
      form: "chunkwise" advances the memory chunk by chunk; "recurrent" token by token, which is the definition;
        "parallel" (sum, delta, oja) takes all tokens as one chunk. All give the same numbers up to rounding. None picks
        "chunkwise"; and "recurrent" for a single token and where the rule has no chunkwise form ("fwm" and "oja" with a
        decay per channel). (On CPU, for K·V ≤ 4096, "recurrent" takes a third to nine tenths of the time of "chunkwise"
        without a gradient, and up to five and a half times as much with one.)
      chunk_size: tokens per chunk of the chunkwise form. None picks 64 in plain JAX, or 32 for "fwm" and for
        K·V ≤ 1024; 64 in the GPU kernels, or 32 for products of float32; 128 in the TPU kernels; or fewer.
      implementation: "xla" is plain JAX. "pallas" is a kernel for TPU, "triton" one for NVIDIA GPUs, for the chunkwise
        form of sum and delta. None picks "triton" where JAX's default device is an NVIDIA GPU, ``fwt_jax[cuda]`` is
        installed, and ``kernels.gpu.why_not`` has no reason against it. It picks "pallas" for one TPU, in
        ``jax.shard_map`` over all axes, and under ``jax.set_mesh`` of TPUs where the mesh has explicit axes or those of
        ``sharding.make_mesh`` that split rows and heads, if ``kernels.tpu.why_not`` has no reason against it. Else it
        picks "xla".
        Kernels have first derivatives in reverse mode; derivatives of a gradient are those of "xla". Forward mode
        (``jax.jvp``) needs "xla". The policies of ``jax.checkpoint`` know y and what a kernel keeps for its gradient as
        "fast_weight_residuals". On CPU, "pallas" is interpreted, for tests; other platforms refuse a kernel that is not
        theirs. ``jax.export`` takes "pallas" for one platform at a time, and "triton" for CUDA alone and if its check
        of custom calls is disabled.
      pieces: the number of parts that each sequence is cut into, for "sum", "delta" and "oja". All of them advance at
        once, from the memory that composing the maps of the earlier ones gives: see pieces.py. It takes two to three
        times the FLOPs (up to 1.5 times for "sum"), and twice the memory or more. It is for few heads, long sequences
        and a device that they do not fill; never for a CPU. None picks a number for plain JAX where JAX's default
        device is an NVIDIA GPU: see ``number_of_pieces`` in pieces.py. It is 1 elsewhere, for a kernel, with a mesh or
        ``memory_every``, and for what has no pieces. 1 is the default because that number is computed and was never
        timed.
      sequence_axis: the name of an axis of the mesh that splits the tokens of each sequence into such pieces, in order.
        In ``jax.shard_map`` over it, the arguments are the piece of one device and W_0, and the results are its piece
        of y and W_T. Elsewhere the operation calls ``jax.shard_map`` itself, with the mesh of ``jax.set_mesh``.
      precision: of the matrix products of the chunkwise and parallel forms, as in ``jax.lax``. None: "default" if
        query, key and value are all bfloat16, else "highest", because TPUs would round float32 to bfloat16 and GPUs to
        TF32. A chunk's triangular system is solved more exactly.

    Returns:
      y ``[B, T, HV, V]`` in value's dtype, and the memory after the last token (or several, see ``segment_ids`` and
      ``memory_every``): float32 (float64 for float64 inputs).

    Raises:
      ValueError: shapes or dtypes that do not fit together, T = 0, an unknown rule, form, normalisation or
        implementation, lengths or ids of N memories out of their range, a memory_every below 1, pieces that are not
        from 1 to T, a sequence_axis that is no axis of the mesh, an eps below 0, no beta
        for a rule that needs it, a combination that the rule does not define (a form, a normalisation, a decay per
        channel in chunks), or that a kernel does not have.

    Example:
      >>> import jax
      >>> from fwt_jax import fast_weight_attention
      >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 7, 4, 8))  # [B, T, H, K or V]
      >>> beta = jax.numpy.full((2, 7, 4), 0.5)
      >>> y, memory = fast_weight_attention(q[:, :6], k[:, :6], v[:, :6], beta[:, :6])  # a prompt
      >>> y, memory = fast_weight_attention(q[:, 6:], k[:, 6:], v[:, 6:], beta[:, 6:], memory=memory)  # the next token
      >>> y.shape, memory.fast_weights.shape
      ((2, 1, 4, 8), (2, 4, 8, 8))

    References:
      Schlag, Irie & Schmidhuber 2021 (eq. 17-28); Katharopoulos et al. 2020; Yang et al. 2024 (chunks), 2025 (decay).
    """
    query, key, value = arguments.arrays(query=query, key=key, value=value)
    check_qkv(query, key, value)
    batch, length, _, key_size = key.shape
    heads = value.shape[2]
    if query.shape != key.shape:
        raise ValueError(
            f"query and key must have one shape [B, T, H, K], got {list(query.shape)} and {list(key.shape)}"
        )
    if value.shape[1] != length:
        raise ValueError(f"value must have the length {length} of key, got value {list(value.shape)}")
    rule = find_rule(rule)
    check_options(rule, form, normalize, implementation, beta, log_decay, chunk_size, eps)
    check_like(beta, "beta", [(batch, length, heads)])
    check_like(log_decay, "log_decay", [(batch, length, heads), (batch, length, heads, key_size)])
    check_memory(memory, key, value, segments=True)
    check_step(rule, key, value, log_decay, normalize, computation_dtype(query, key, value, memory))
    options = {
        "rule": rule,
        "normalize": normalize,
        "eps": float(eps),
        "form": form,
        "chunk_size": None if chunk_size is None else int(chunk_size),
        "implementation": implementation,
        "precision": products_precision(precision, query, key, value),
    }
    if memory is not None and memory.fast_weights.ndim == 5:
        check_segments(segment_ids, memory_every, pieces, sequence_axis)
        ids = segments_of(segment_ids, memory.key_sum.shape[1], lengths, batch, length)
        return _attend_by_segment(query, key, value, beta, log_decay, memory, ids, **options)
    if pieces is None:
        has_pieces = rule.piece and has_chunks(rule, log_decay) and form in (None, "chunkwise")
        alone = sequence_axis is None and memory_every is None and jax.sharding.get_abstract_mesh().empty
        dtype = computation_dtype(query, key, value, memory)
        pieces = _number_of_pieces(query, key, value, dtype, **options) if has_pieces and alone else 1
    check_pieces(pieces, sequence_axis, rule, log_decay, length, memory_every)
    if pieces != 1 or (sequence_axis is not None and not is_axis(sequence_axis)):
        attend = functools.partial(fast_weight_attention, **options)
        memory = start_of(memory, key, value, computation_dtype(query, key, value, memory))
        arrays = (query, key, value, beta, log_decay, segment_ids)
        if lengths is not None:
            tokens_within(lengths, batch, length)  # refuses what is no length
            lengths = jnp.asarray(lengths)
        return in_pieces(attend, arrays, memory, lengths, pieces, sequence_axis)
    reset = resets(segment_ids, batch, length, sequence_axis)
    written = tokens_within(lengths, batch, length, sequence_axis)
    inputs = (query, key, value, beta, log_decay, memory, reset, written)
    if memory_every is None:
        return _attend(*inputs, sequence_axis=sequence_axis, **options)
    return _attend_by_stretches(*inputs, size=arguments.static_size("memory_every", memory_every), **options)


def _number_of_pieces(query, key, value, dtype, *, rule, normalize, implementation, chunk_size, precision, **_):
    """What ``pieces=None`` picks for a rule that has pieces: 1 for a kernel, and 1 but on an NVIDIA GPU."""
    batch, length, heads, value_size = value.shape
    start = jax.ShapeDtypeStruct((batch, heads, key.shape[-1], value_size), dtype)
    tokens = [jax.ShapeDtypeStruct(x.shape, dtype if normalize else x.dtype) for x in (query, key, value)]
    by_kernel = gpu.is_default(start, *tokens, rule=rule, chunk_size=chunk_size, precision=precision)
    units = gpu.num_processors()
    if not units or implementation not in (None, "xla") or (implementation is None and by_kernel):
        return 1
    chunks = -(-length // (chunk_size or rule.chunk_size))
    return number_of_pieces(batch * heads * -(-value_size // 64), units, chunks)


OPTIONS = ("rule", "normalize", "eps", "form", "chunk_size", "implementation", "precision")


@functools.partial(jax.jit, static_argnames=("size", *OPTIONS))
def _attend_by_stretches(query, key, value, beta, log_decay, memory, reset, written, *, size, **options):
    """As ``_attend``, ``size`` tokens at a time, with the memory after each of these stretches."""
    batch, length = key.shape[:2]
    size = min(size, length)
    count = -(-length // size)
    padding = count * size - length
    if padding and written is None:
        written = jnp.ones((batch, length), bool)
    dtype = computation_dtype(query, key, value, memory)
    tokens = _sharded_alike(query, key, value, beta, log_decay, reset, written, memory, dtype)

    def split(x):
        x = jnp.pad(x, ((0, 0), (0, padding), *((0, 0),) * (x.ndim - 2)))
        return jnp.moveaxis(x.reshape(batch, count, size, *x.shape[2:]), 1, 0)

    def advance(memory, tokens):
        *tokens, reset, written = tokens
        out, memory = _attend(*tokens, memory, reset, written, sequence_axis=None, **options)
        return memory, (out, memory)

    start = start_of(memory, tokens[1], tokens[2], dtype)
    _, (out, memories) = lax.scan(advance, start, jax.tree.map(split, tokens))
    out, *memories = (jnp.moveaxis(x, 0, 1) for x in (out, *memories))
    return out.reshape(batch, count * size, *out.shape[3:])[:, :length], Memory(*memories)


@functools.partial(jax.jit, static_argnames=OPTIONS)
def _attend_by_segment(query, key, value, beta, log_decay, memories, ids, **options):
    """As ``_attend``, from memories ``[B, N, ...]``. ``ids [B, T]`` name the memory of each token; −1 names none."""
    length, num_segments = key.shape[1], memories.key_sum.shape[1]
    dtype = computation_dtype(query, key, value, memories)
    first = jax.tree.map(lambda x: x[:, 0], memories)
    *tokens, _, known = _sharded_alike(query, key, value, beta, log_decay, None, ids >= 0, first, dtype)
    assert known is not None
    empty = start_of(None, tokens[1], tokens[2], dtype)
    memories = jax.tree.map(lambda x, zeros: x.astype(dtype) + zeros[:, None], memories, empty)
    # A stretch that is longer than most documents is mostly padding.
    numbers = key.shape[-1] * value.shape[-1]
    size, _ = size_of_chunks(options["chunk_size"], -(-length // num_segments), numbers, options["rule"])

    def attend(tokens, memory, written):
        return _attend(*tokens, memory, None, written, sequence_axis=None, **options)

    return by_segment(attend, tuple(tokens), memories, jnp.where(known, ids, -1), min(size, length))


# Outside of jax.jit, JAX would dispatch each operation by itself, and would compile each scan again at every call,
# because its body is a new function. Inside of jax.jit this is a part of the caller's program.
@functools.partial(jax.jit, static_argnames=("sequence_axis", *OPTIONS))
def _attend(
    query,
    key,
    value,
    beta,
    log_decay,
    memory,
    reset,
    written,
    *,
    rule,
    normalize,
    eps,
    form,
    chunk_size,
    implementation,
    sequence_axis,
    precision,
):
    """``fast_weight_attention`` of arguments that fit together; ``reset`` and ``written``: bool ``[B, T]`` or None."""
    dtype, out_dtype = computation_dtype(query, key, value, memory), value.dtype
    form = _form(rule, key, log_decay, chunk_size, implementation) if form is None else form
    if normalize or form == "parallel":
        query, key, value = (x.astype(dtype) for x in (query, key, value))
    tokens = (query, key, value, beta, log_decay, reset)
    *tokens, written = _sharded_alike(*tokens, written, memory, dtype)
    query, key, value, beta, log_decay, reset = _without_padding(written, tokens)
    memory = start_of(memory, key, value, dtype)
    options = {"rule": rule, "chunk_size": chunk_size, "precision": precision}
    arrays = (memory.fast_weights, query, key, value)
    kernels = {"pallas": tpu, "triton": gpu}.get(implementation)
    by_default = implementation is None and form == "chunkwise"
    if by_default:
        kernels = next((x for x in (tpu, gpu) if x.is_default(*arrays, **options)), None)
    # A group shares the products within a chunk. Token by token it shares none, and takes up to 7 times as long on CPU.
    # A GPU's kernel takes as many keys as values. A key sum decays with its value head, so each has its own.
    in_chunks = form != "recurrent" and bool(rule.chunk)
    if not in_chunks or normalize or kernels is gpu:
        query, key = (of_value_heads(x, value.shape[2]) for x in (query, key))
    key_sum, recall_scale = memory.key_sum, None
    if normalize:
        query = normalization.scaled_query(query, eps)
        summed = beta[..., None] * key if rule.corrects is False else key
        inputs = (key_sum, summed, log_decay, reset)
        key_sums = functools.partial(normalization.key_sums, sequence_axis=sequence_axis)
        sums_before, sums = over_heads(key_sums, inputs, out_axes=1)(*inputs)
        key_sum = sums[:, -1]
    if normalize == "retrieval":
        recall_scale, beta = normalization.retrieval(
            memory.key_sum, sums_before, key, beta, log_decay, reset, eps, sequence_axis=sequence_axis
        )
    inputs = (memory.fast_weights, query, key, value, beta, log_decay, reset, recall_scale)
    if sequence_axis is not None:
        start, _, *tokens = inputs
        start = start_of_piece(start, *tokens, sequence_axis=sequence_axis, **options)
        inputs = (start, *inputs[1:])
    if kernels:
        out, fast_weights = kernels.chunkwise(*inputs, **options, fallback=by_default)
    elif form == "recurrent":
        out, fast_weights = recurrent(*inputs, written, step=rule.step)
    elif form == "parallel":
        out, fast_weights = over_heads(functools.partial(rule.chunk, precision=precision), inputs)(*inputs)
    else:
        inputs = (*inputs, written)
        out, fast_weights = over_heads(functools.partial(chunkwise, **options), inputs)(*inputs)
    if normalize:
        mass = jnp.sum(sums * query, axis=-1, keepdims=True)
        mass = mass if written is None else jnp.where(written[..., None, None], mass, 1)  # for eps = 0
        out = normalization.divided(out, mass, eps)
    if written is not None:  # "fwm" in chunks clips a large start even if no token follows
        fast_weights = jnp.where(jnp.any(written, axis=1)[:, None, None, None], fast_weights, inputs[0])
    end = Memory(fast_weights, key_sum)
    if sequence_axis is not None:
        end = of_last(end, sequence_axis)
    return out.astype(out_dtype), end


def _of_heads(zeros, heads):
    """Of zeros ``[B, T, HV]``, those of the first head of each group: as many as there are query or key heads."""
    return zeros if zeros.shape[2] == heads else zeros.reshape(*zeros.shape[:2], heads, -1)[..., 0]


def _without_padding(written, tokens) -> Sequence[Any]:
    """Arrays ``[B, T, ...]`` (or None) with zeros where ``written`` is False: tokens that change nothing."""
    if written is None:
        return tokens
    masks = {x.ndim: lax.expand_dims(written, range(2, x.ndim)) for x in tokens if x is not None}
    return [x if x is None else jnp.where(masks[x.ndim], x, jnp.zeros_like(x)) for x in tokens]


def _form(rule, key, log_decay, chunk_size, implementation):
    """The form that ``form=None`` picks, with and without a gradient."""
    if not has_chunks(rule, log_decay):
        return "recurrent"
    # On CPU, a step of one token takes a third to two thirds of the time of a chunk of one token.
    one_token = key.shape[1] == 1 and chunk_size is None and implementation in (None, "xla")
    return "recurrent" if one_token else "chunkwise"


def _sharded_alike(query, key, value, beta, log_decay, reset, written, memory, dtype):
    """The arguments, sharded over every axis of a mesh that any of them is sharded over; beta, 1 if None, in dtype.

    On a mesh of explicit axes, and in ``jax.shard_map``, some arguments may be sharded and others replicated. The sum
    of zeros shaped like each argument is sharded over the union of their axes. Added to an argument, it shards it so.
    """
    arrays = [of_value_heads(x[..., 0], value.shape[2]) for x in (query, key, value)]
    if beta is not None:
        arrays.append(beta)
    if log_decay is not None:
        arrays.append(log_decay if log_decay.ndim == 3 else log_decay[..., 0])
    arrays += [x[..., None] for x in (reset, written) if x is not None]
    if memory is not None:
        arrays.append(memory.key_sum[:, None, :, 0])
    zeros = functools.reduce(operator.add, (jnp.zeros_like(x, dtype) for x in arrays))
    if any(jax.typeof(x).sharding.spec[:3] != jax.typeof(zeros).sharding.spec for x in (query, key, value)):
        query, key, value = (x + _of_heads(zeros, x.shape[2])[..., None].astype(x.dtype) for x in (query, key, value))
    beta = zeros + (jnp.ones((), dtype) if beta is None else beta.astype(dtype))
    if log_decay is not None:
        log_decay = log_decay.astype(dtype) + (zeros if log_decay.ndim == 3 else zeros[..., None])
    never = jnp.zeros_like(jnp.sum(zeros, axis=-1), bool)
    reset, written = (x if x is None else x | never for x in (reset, written))
    return query, key, value, beta, log_decay, reset, written
