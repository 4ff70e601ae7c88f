"""The output layer of a language model: log p of words, by a softmax or an adaptive softmax (Grave et al. 2017).

    output = (embedding [V, D], bias [V])                       of a softmax
    output = (embedding, bias, kernel [c, D], bias [c])         of an adaptive one with c clusters, beside its cutoffs

Words are numbers from 0 to V − 1. A negative target is ignored: its loss is 0, and so is the gradient. Any other number
raises a ValueError where it is known, and gives NaN where it is traced (``jax.jit``), since nothing can raise there.

Letters: B batch, T tokens, N tokens of all sequences, V vocabulary, D d_model. Everything that comes out is float32.
"""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fwt_jax.sharding import over_batch

BLOCK = 256  # tokens whose logits exist at once


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
    if not isinstance(x, jax.core.Tracer) and x.size:
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


def embed(embedding: jax.Array, tokens: jax.Array) -> jax.Array:
    """Rows of the embedding ``[V, D]`` for int32 tokens ``[...]``: ``[..., D]``, NaN for no number of a word."""
    return embedding.at[tokens].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)


def losses(x: jax.Array, targets: jax.Array, output: tuple[jax.Array, ...], cutoffs: tuple[int, ...] = ()) -> jax.Array:
    """−log p of ``targets``, integers ``[B, T]``, from x ``[B, T, D]``: ``[B, T]``; 0 for a negative target.

    The logits exist for 256 tokens at a time, those of a cluster only for blocks of tokens with a target in it: 2VD
    FLOPs per token, or with clusters of n words that have a share p of the tokens 2D Σ pn.

    Raises:
      ValueError: targets that are not integers of these axes, or known to be above V − 1 (traced ones give NaN).
    """
    shape = x.shape[:-1]
    targets = integers("targets", targets, len(output[0]) - 1, axes=str(list(shape)), shape=shape, least=None)
    return _losses_of_batch(x, targets, output, cutoffs=tuple(cutoffs))


@functools.partial(jax.jit, static_argnames="cutoffs")  # else its scans compile anew at each call outside of jit
def _losses_of_batch(x, targets, output, *, cutoffs):
    def of_rows(rows, output):
        x, targets = rows
        return _losses(x.reshape(-1, x.shape[-1]), targets.reshape(-1), output, cutoffs).reshape(targets.shape)

    return over_batch(of_rows, (x, targets), output)


def log_probabilities(x: jax.Array, output: tuple[jax.Array, ...], cutoffs: tuple[int, ...] = ()) -> jax.Array:
    """log p of all words, ``[..., V]``, from x ``[..., D]``."""
    rows = _log_probabilities(x.reshape(-1, x.shape[-1]), output, cutoffs)
    return rows.reshape(*x.shape[:-1], -1)


def _head(x, output, cutoffs):
    """log p of the frequent words and, in the toolkit's order, of the clusters: the last first."""
    embedding, bias, *clusters = output
    if cutoffs:
        embedding = jnp.concatenate([embedding[: cutoffs[0]], clusters[0]])
        bias = jnp.concatenate([bias[: cutoffs[0]], clusters[1]])
    return _log_softmax(x, embedding, bias)


def _log_softmax(x, embedding, bias):
    logits = jnp.matmul(x, embedding.astype(x.dtype).T, preferred_element_type=jnp.float32) + bias[None]
    return jax.nn.log_softmax(logits, axis=-1)


def _clusters(cutoffs, vocab_size):
    """The column of the head, the first and the last word (exclusive) of each cluster of rarer words."""
    bounds = itertools.pairwise((*cutoffs, vocab_size) if cutoffs else ())
    return [(-1 - i, low, high) for i, (low, high) in enumerate(bounds)]


def _log_probabilities(x, output, cutoffs):
    embedding, bias, *_ = output
    head = _head(x, output, cutoffs)
    parts = [head[:, : cutoffs[0]] if cutoffs else head]
    for column, low, high in _clusters(cutoffs, len(embedding)):
        parts.append(head[:, column, None] + _log_softmax(x, embedding[low:high], bias[low:high]))
    return jnp.concatenate(parts, axis=-1)


def _losses(x, targets, output, cutoffs):
    embedding, bias, *_ = output
    counts = targets >= 0
    columns, rest = jnp.where(counts, targets, 0), jnp.zeros(len(targets), jnp.float32)
    for column, low, high in _clusters(cutoffs, len(embedding)):
        member = (low <= targets) & (targets < high)
        columns = jnp.where(member, cutoffs[0] + len(cutoffs) + column, columns)
        rows = embedding[low:high], bias[low:high]
        inside = jnp.clip(targets - low, 0, high - low - 1)
        rest += _in_blocks(lambda x, rows: _log_softmax(x, *rows), x, inside, member, rows)
    return rest + _in_blocks(lambda x, output: _head(x, output, cutoffs), x, columns, counts, output)


def _in_blocks(log_probabilities, x, columns, member, parameters):
    """−log p in one column for the tokens that are members, else 0; only blocks with a member are computed."""
    length = len(x)
    order = jnp.argsort(~member)  # members first
    padding = -length % min(BLOCK, length)
    pad = lambda x: jnp.pad(x[order], ((0, padding), *((0, 0),) * (x.ndim - 1)))  # noqa: E731
    blocks = jax.tree.map(lambda x: pad(x).reshape(-1, min(BLOCK, length), *x.shape[1:]), (x, columns, member))

    @jax.checkpoint
    def block(x, columns, member, parameters):
        x = jnp.where(member[:, None], x, 0)  # a gradient of 0 times what is not finite would be NaN
        taken = jnp.take_along_axis(log_probabilities(x, parameters), columns[:, None], axis=-1)[:, 0]
        return jnp.where(member, -taken, 0)

    def body(_, inputs):
        nothing = lambda x, columns, *_: 0.0 * columns.astype(jnp.float32)  # noqa: E731 -- of each device, as columns
        return None, lax.cond(jnp.any(inputs[2]), block, nothing, *inputs, parameters)

    _, losses = lax.scan(body, None, blocks)
    return jnp.zeros(length, jnp.float32).at[order].set(losses.reshape(-1)[:length])
