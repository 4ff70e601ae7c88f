"""The calls of the kernels of triton_kernels.py and triton_channels.py, forward and backward, and what is around them.

Letters: B batch, T tokens, H heads, K key features, V value size, n chunks of C tokens, whose last one is filled up.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from fwt_jax.decays import cumulative_log_decay
from fwt_jax.kernels.gpu_settings import Settings, power_of_2, program_of
from fwt_jax.kernels.over_mesh import over_batch_and_mesh

RESET = -200.0  # a log decay whose exponential is 0 in float32
# P, S, T, W and N of every chunk. S, which the gradient needs with a decay per channel, is None without.
_RESIDUALS = ("b h n c i", "b h n c i", "b h n c i", "b h n v k", "b h n v c")
OUTPUTS = ("b t h v", "b h k v")


def axes_of_inputs(settings: Settings) -> tuple[str, ...]:
    """The axes of a start, of query, key, value, beta, log_decay, reset and recall_scale, see over_mesh.py."""
    per_token = "b t h"
    log_decay = "b t h k" if settings.channels else per_token
    return "b h k v", "b t h k", "b t h k", "b t h v", per_token, log_decay, "b t", per_token


def forward(settings: Settings, keep: bool, *inputs):
    """The reads, W_T and the residuals, which are None without ``keep``; inputs as in ``gpu.chunkwise``."""
    on_mesh = over_batch_and_mesh(axes_of_inputs(settings), (*OUTPUTS, *_RESIDUALS))
    return on_mesh(_forward)((settings, keep), *inputs)


def backward(settings: Settings, inputs, residuals, outputs_grad):
    """The gradients in the inputs; that in the resets is None."""
    axes = axes_of_inputs(settings)
    on_mesh = over_batch_and_mesh((*axes, *_RESIDUALS, *OUTPUTS), axes)
    return on_mesh(_backward)(settings, *inputs, *residuals, *outputs_grad)


def _forward(static, memory, query, key, value, beta, log_decay, reset, recall_scale):
    settings, keep = static
    gates = _gates(settings, beta, log_decay, reset, recall_scale)
    scores, similarities, inverse = _scores(settings, query, key, value, gates)
    tokens = _tokens(settings, query, key, gates)
    chunks, dtype = scores.shape[:3], query.dtype
    stored = [
        jax.ShapeDtypeStruct((*chunks, value.shape[-1], size), dtype) for size in (key.shape[-1], scores.shape[-1])
    ]
    unused = _unused(query, dtype)
    out_shapes = [_like(value), _like(memory), *(stored if keep else [unused, unused])]
    inputs = [memory, tokens.query, tokens.key, tokens.written_key, value, gates.beta, tokens.recall]
    inputs += [tokens.from_start, tokens.to_end, tokens.of_start, scores, inverse]
    reads, end, starts, writes = _call("forward", settings, query, value, inputs, out_shapes, KEEP=keep)
    return reads, end, *((scores, similarities, inverse, starts, writes) if keep else (None,) * 5)


def _scores(settings, query, key, value, gates):
    """P, S and T of every chunk; S is None without a decay per channel, and T in the sum rule."""
    batch, length, heads, _ = query.shape
    size, corrects = settings.chunk_size, settings.rule.corrects
    square = jax.ShapeDtypeStruct((batch, heads, -(-length // size), size, size), query.dtype)
    unused = _unused(query, query.dtype)
    if not settings.channels:
        inputs = [query, key, gates.correction, gates.decay, gates.fine]
        scores, inverse = _call("scores", settings, query, value, inputs, [square, square if corrects else unused])
        return scores, None, inverse if corrects else None
    inputs = [query, key, gates.decay, gates.fine]
    exact = jax.ShapeDtypeStruct(square.shape, jnp.float32)  # If S were rounded, T would be less exact.
    out_shapes = [square, exact if corrects else unused]
    scores, similarities = _call("channel_scores", settings, query, value, inputs, out_shapes)
    if not corrects:
        return scores, None, None
    (inverse,) = _call("inverse", settings, query, value, [similarities, gates.correction], [square])
    return scores, similarities, inverse


def _backward(
    settings,
    memory, query, key, value, beta, log_decay, reset, recall_scale,
    scores, similarities, inverse, starts, writes,
    reads_grad, end_grad,
):  # fmt: skip
    def gates_of(beta, log_decay, recall_scale):
        return _gates(settings, beta, log_decay, reset, recall_scale)

    gates, pull = jax.vjp(gates_of, beta, log_decay, recall_scale)
    tokens = _tokens(settings, query, key, gates)
    out_shapes = [_like(end_grad), _like(starts), _like(writes)]
    inputs = [tokens.query, tokens.key, tokens.written_key, tokens.recall, tokens.from_start, tokens.to_end]
    inputs += [tokens.of_start, scores, inverse, reads_grad, end_grad]
    memory_grad, ends_grad, solved = _call("backward", settings, query, value, inputs, out_shapes)
    gradient = _gradient_per_channel if settings.channels else _gradient
    chunks = _Chunks(similarities, starts, writes, ends_grad, solved)
    *tokens_grad, gates_grad = gradient(settings, query, key, value, gates, chunks, reads_grad)
    beta_grad, log_decay_grad, recall_scale_grad = pull(gates_grad)
    return memory_grad, *tokens_grad, beta_grad, log_decay_grad, None, recall_scale_grad


class _Chunks(NamedTuple):
    """S, W, N, G and X of every chunk."""

    similarities: jax.Array | None
    starts: jax.Array
    writes: jax.Array
    ends_grad: jax.Array
    solved: jax.Array


def _gradient(settings, query, key, value, gates, chunks, reads_grad):
    """The gradients in query, key, value and the gates, by kernel 4."""
    batch, length, heads, key_size = query.shape
    num_parts = -(-key_size // min(settings.kernels[3].keys, power_of_2(key_size)))
    by_part = jax.ShapeDtypeStruct((batch, heads, num_parts, length), jnp.float32)
    unused = _unused(query, jnp.float32)
    out_shapes = [*map(_like, (query, key, value, gates.beta))]
    out_shapes += [by_part if settings.rule.corrects else unused, by_part if settings.decays else unused]
    _, from_start, to_end = _factors(settings, gates)
    inputs = [query, key, value, gates.beta, gates.correction, from_start, to_end, gates.decay, gates.fine]
    inputs += [*chunks[1:], reads_grad]
    outputs = _call("gradient", settings, query, value, inputs, out_shapes)
    *tokens_grad, beta_grad, correction_grad, decay_grad = outputs
    correction_grad = jnp.sum(correction_grad, axis=2) if settings.rule.corrects else jnp.zeros_like(beta_grad)
    decay_grad = jnp.sum(decay_grad, axis=2) if settings.decays else None
    fine_grad = None if gates.fine is None else decay_grad
    return *tokens_grad, _Gates(beta_grad, correction_grad, None, decay_grad, fine_grad)


def _gradient_per_channel(settings, query, key, value, gates, chunks, reads_grad):
    """As ``_gradient``, by the equations of triton_channels.py: products of XLA, and the kernel for P' and S'."""
    product = functools.partial(_product, settings)
    reads_grad, values = (_in_chunks(settings, x) for x in (reads_grad, value))

    def tokens(x):  # [B, n, C, H, ...] -> [B, T, H, ...]
        return x.reshape(x.shape[0], -1, *x.shape[3:])[:, : query.shape[1]]

    _, to_end, _ = _decays(settings, gates, axis=1)

    def tokens_of(query, key, decay, fine):
        scaled = _tokens(settings, query, key, gates._replace(decay=decay, fine=fine), rounded=False)
        # e is a constant here. It is a difference of two entries of g, and ``passing`` has its gradient as a sum.
        return scaled.query, scaled.key, key.astype(jnp.float32) * to_end, scaled.of_start

    (_, scaled_key, written_key, _), pull = jax.vjp(tokens_of, query, key, gates.decay, gates.fine)
    query_grad = tokens(product("bnchv,bhnvk->bnchk", reads_grad, chunks.starts))  # Y'Wᵀ
    written_grad = tokens(product("bhnvc,bhnvk->bnchk", chunks.writes, chunks.ends_grad))  # NGᵀ
    of_start_grad = product("bhnvk,bhnvk->bhnk", chunks.starts, chunks.ends_grad)  # rowsum(W ∘ G)
    scaled_key_grad, correction_grad, pairs_grad = None, jnp.zeros_like(gates.correction), None
    if scaled_key is not None:
        recalled_grad = tokens(product("bhnvc,bhnvk->bnchk", chunks.solved, chunks.starts))  # XWᵀ
        scaled_key_grad = -jnp.moveaxis(gates.correction, 1, 2)[..., None] * recalled_grad
        correction_grad, pairs_grad = _similarities_gradient(settings, gates, chunks)
        correction_grad -= jnp.moveaxis(jnp.sum(scaled_key * recalled_grad, axis=-1), 1, 2)
    query_grad, key_grad, *decays_grad = pull((query_grad, scaled_key_grad, written_grad, of_start_grad))

    scores_grad = jnp.tril(product("bnchv,bhnvi->bhnci", reads_grad, chunks.writes)).astype(query.dtype)  # P'
    like_tokens = jax.ShapeDtypeStruct(query.shape, jnp.float32)
    inputs = [query, key, gates.decay, gates.fine, scores_grad, pairs_grad]
    of_pairs = _call("channel_gradient", settings, query, value, inputs, [like_tokens] * 3)
    # A decay acts on what the tokens before it have written: a running sum of e K ∘ NGᵀ within the chunk.
    passing = jnp.cumsum(_in_chunks(settings, written_key * written_grad), axis=2)
    passing = tokens(jnp.pad(passing[:, :, :-1], ((0, 0), (0, 0), (1, 0), (0, 0), (0, 0))))

    beta = jnp.moveaxis(_in_chunks(settings, jnp.moveaxis(gates.beta, 1, 2)), 3, 1)
    value_grad = beta[..., None, :] * chunks.solved.astype(jnp.float32)  # βX
    value_grad = tokens(jnp.moveaxis(value_grad, (1, 4), (3, 2)))
    beta_grad = product("bhnvc,bnchv->bhnc", chunks.solved, values).reshape(*gates.beta.shape[:2], -1)
    beta_grad = beta_grad[..., : query.shape[1]]
    tokens_grad = (query_grad + of_pairs[0], key_grad + of_pairs[1], value_grad)
    tokens_grad = (x.astype(query.dtype) for x in tokens_grad)
    return *tokens_grad, _Gates(beta_grad, correction_grad, of_pairs[2] + passing, *decays_grad)


def _similarities_gradient(settings, gates, chunks):
    """Of A: its part of ρ' ``[B, H, T]``, and S' + S'ᵀ of every chunk."""
    lower_grad = -jnp.tril(_product(settings, "bhnvc,bhnvi->bhnci", chunks.solved, chunks.writes), -1)  # A'
    correction_grad = jnp.sum(lower_grad * chunks.similarities, axis=-1)
    correction_grad = correction_grad.reshape(*correction_grad.shape[:2], -1)[..., : gates.correction.shape[-1]]
    correction = jnp.moveaxis(_in_chunks(settings, jnp.moveaxis(gates.correction, 1, 2)), 3, 1)
    lower_grad *= correction[..., None]
    return correction_grad, (lower_grad + jnp.swapaxes(lower_grad, -1, -2)).astype(chunks.solved.dtype)


def _product(settings, names, *operands):
    precision = lax.Precision.DEFAULT if settings.precision == "tf32" else lax.Precision.HIGHEST
    return jnp.einsum(names, *operands, precision=precision, preferred_element_type=jnp.float32)


def _call(name, settings, query, value, inputs, out_shapes, **constants):
    """The outputs of a kernel."""
    from fwt_jax.kernels import triton_call, triton_channels, triton_kernels

    batch, length, heads, key_size = query.shape
    num_programs, compiled, constants_of_all = program_of(name, settings, (length, heads, key_size, value.shape[-1]))
    kernel = (vars(triton_kernels) | vars(triton_channels))[f"{name}_kernel"]
    constants |= {name: x for name, x in constants_of_all.items() if name in kernel.arg_names}
    return triton_call.triton_call(
        kernel,
        batch * heads * num_programs,
        inputs,
        (length,),
        out_shapes,
        num_warps=compiled.num_warps,
        num_stages=compiled.num_stages,
        compute_capability=settings.compute_capability,
        **constants,
    )


class _Gates(NamedTuple):
    """Numbers of each token.

    Attributes:
      beta, correction: β and ρ, ``[B, H, T]``.
      log_decay: with a decay per channel, that of each token, ``[B, T, H, K]``; else None.
      decay, fine: g in one or two parts, ``[B, H, T]``, or ``[B, T, H, K]`` per channel; None without decays.
    """

    beta: jax.Array
    correction: jax.Array
    log_decay: jax.Array | None
    decay: jax.Array | None
    fine: jax.Array | None


def _gates(settings, beta, log_decay, reset, recall_scale):
    """The ``_Gates`` of β and recall_scale ``[B, T, H]``, of log_decay ``[B, T, H, (K)]`` and resets ``[B, T]``."""
    shape, length = beta.shape, beta.shape[1]
    beta = _by_head(beta)
    correction = beta if recall_scale is None else beta * _by_head(recall_scale)
    if not settings.decays:
        return _Gates(beta, correction, None, None, None)
    log_decay = jnp.zeros(shape, jnp.float32) if log_decay is None else log_decay.astype(jnp.float32)
    if reset is not None:
        reset = reset.reshape(*reset.shape, *(1,) * (log_decay.ndim - 2))
        log_decay = jnp.where(reset, RESET, log_decay)
    by_place = jnp.moveaxis(_in_chunks(settings, log_decay), 2, 0)
    by_place = cumulative_log_decay(by_place)
    coarse, fine = (jnp.moveaxis(x, 0, 2).reshape(shape[0], -1, *log_decay.shape[2:])[:, :length] for x in by_place)
    if not settings.channels:
        log_decay, coarse, fine = None, jnp.moveaxis(coarse, 1, 2), jnp.moveaxis(fine, 1, 2)
    if settings.decays == 1:
        return _Gates(beta, correction, log_decay, coarse + fine, None)
    return _Gates(beta, correction, log_decay, coarse, fine)


def _by_head(x):
    """``[B, T, H]`` -> ``[B, H, T]``, float32."""
    return jnp.moveaxis(x.astype(jnp.float32), 1, 2)


def _in_chunks(settings, x):
    """``[B, T, ...]`` -> ``[B, n, C, ...]``."""
    size = settings.chunk_size
    x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % size), *((0, 0),) * (x.ndim - 2)))
    return x.reshape(x.shape[0], -1, size, *x.shape[2:])


class _Tokens(NamedTuple):
    """What kernels 2 and 3 take: with a decay per channel the products a Q, a K and e K, ρ alone and c; else factors.

    Attributes:
      query, key, written_key: ``[B, T, H, K]``; key is None where nothing is recalled, written_key where it is the key.
      recall, from_start, to_end: ρ a, a and e, ``[B, H, T]``, or None where they are 1 or in the products.
      of_start: c, ``[B, H, n, K]``, or None where it is a of the last token.
    """

    query: jax.Array
    key: jax.Array | None
    written_key: jax.Array | None
    recall: jax.Array
    from_start: jax.Array | None
    to_end: jax.Array | None
    of_start: jax.Array | None


def _tokens(settings, query, key, gates, rounded=True):
    """The ``_Tokens``, whose products are rounded to the dtype of the query and the key, or left in float32."""
    if not settings.channels:
        return _Tokens(query, key, None, *_factors(settings, gates), None)
    from_start, to_end, of_start = _decays(settings, gates, axis=1)

    def scaled(x, factor):
        x = x.astype(jnp.float32) * factor
        return x.astype(query.dtype) if rounded else x

    recalled_key = scaled(key, from_start) if settings.rule.corrects else None
    products = scaled(query, from_start), recalled_key, scaled(key, to_end)
    return _Tokens(*products, gates.correction, None, None, jnp.moveaxis(of_start, 1, 2))


def _factors(settings, gates):
    """ρ a, a and e of triton_kernels.py, ``[B, H, T]`` each; without decays a and e are None."""
    if not settings.decays:
        return gates.correction, None, None
    from_start, to_end, _ = _decays(settings, gates, axis=2)
    return gates.correction * from_start, from_start, to_end


def _decays(settings, gates, axis):
    """a, e, and c with an axis of chunks in the place of the tokens, whose axis is ``axis``."""
    parts = [x for x in (gates.decay, gates.fine) if x is not None]
    size, length = settings.chunk_size, parts[0].shape[axis]
    last = [_last_of_chunks(x, size, axis) for x in parts]
    by_token = (lax.slice_in_dim(jnp.repeat(x, size, axis), 0, length, axis=axis) for x in last)
    to_end = sum(at_end - x for at_end, x in zip(by_token, parts, strict=True))
    return jnp.exp(sum(parts)), jnp.exp(to_end), jnp.exp(sum(last))


def _last_of_chunks(x, size, axis):
    """x at the last token of every chunk."""
    padding = [(0, 0)] * x.ndim
    padding[axis] = (0, -x.shape[axis] % size)
    x = jnp.pad(x, padding, mode="edge")
    return lax.slice_in_dim(x, size - 1, None, stride=size, axis=axis)


def _unused(query, dtype):
    """In the place of what a kernel does not write. It has the axis b, which may be split."""
    return jax.ShapeDtypeStruct((query.shape[0], 1), dtype)


def _like(x):
    return jax.ShapeDtypeStruct(x.shape, x.dtype)
