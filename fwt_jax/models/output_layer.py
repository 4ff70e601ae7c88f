"""The output layer of a language model: log p of words, by a softmax or an adaptive softmax (Grave et al. 2017).

    output = (embedding [V, D], bias [V])                       softmax
    output = (embedding, bias, kernel [c, D], bias [c])         adaptive softmax with c clusters, beside its cutoffs

Words are numbers from 0 to V − 1. A negative target is ignored: its loss is 0, and so is the gradient. Any other number
raises a ValueError. A traced number (``jax.jit``) cannot raise, so it gives NaN.

Letters: B batch, T tokens, N tokens of all sequences, V vocabulary, D d_model. All results are float32.
"""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
from jax import lax

from fwt_jax import arguments
from fwt_jax.sharding import over_batch

BLOCK = 256  # the number of tokens whose logits exist together


def embed(embedding: jax.Array, tokens: jax.Array) -> jax.Array:
    """Rows of the embedding ``[V, D]`` for int32 tokens ``[...]``: ``[..., D]``; NaN for a number that is no word."""
    return embedding.at[tokens].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)


def losses(x: jax.Array, targets: jax.Array, output: tuple[jax.Array, ...], cutoffs: tuple[int, ...] = ()) -> jax.Array:
    """−log p of ``targets``, integers ``[B, T]``, from x ``[B, T, D]``: ``[B, T]``; 0 for a negative target.

    The logits exist for 256 tokens at a time. The logits of a cluster are computed only for blocks with a target in it.
    Cost: 2VD FLOPs per token. With clusters: 2D Σ pn, where a cluster has n words and a share p of the tokens.

    Raises:
      ValueError: targets that are not integers of these axes, or known to be above V − 1 (traced ones give NaN).
    """
    shape = x.shape[:-1]
    targets = arguments.integers("targets", targets, len(output[0]) - 1, axes=str(list(shape)), shape=shape, least=None)
    return _losses_of_batch(x, targets, output, cutoffs=tuple(cutoffs))


# Outside of jax.jit, JAX would compile the scans again at every call.
@functools.partial(jax.jit, static_argnames="cutoffs")
def _losses_of_batch(x, targets, output, *, cutoffs):
    def losses_of_rows(rows, output):
        x, targets = rows
        return _losses(x.reshape(-1, x.shape[-1]), targets.reshape(-1), output, cutoffs).reshape(targets.shape)

    return over_batch(losses_of_rows, (x, targets), output)


def log_probabilities(x: jax.Array, output: tuple[jax.Array, ...], cutoffs: tuple[int, ...] = ()) -> jax.Array:
    """log p of all words, ``[..., V]``, from x ``[..., D]``."""
    rows = _log_probabilities(x.reshape(-1, x.shape[-1]), output, cutoffs)
    return rows.reshape(*x.shape[:-1], -1)


def _head(x, output, cutoffs):
    """log p of the frequent words, then of the clusters, the last one first, as in the authors' toolkit."""
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
    columns = [head[:, : cutoffs[0]] if cutoffs else head]
    for column, low, high in _clusters(cutoffs, len(embedding)):
        columns.append(head[:, column, None] + _log_softmax(x, embedding[low:high], bias[low:high]))
    return jnp.concatenate(columns, axis=-1)


def _losses(x, targets, output, cutoffs):
    """−log p of a target: −log p of its column of the head, and in a cluster −log p of the word within the cluster."""
    embedding, bias, *_ = output
    counts = targets >= 0
    head_columns = jnp.where(counts, targets, 0)
    losses = jnp.zeros(len(targets), jnp.float32)
    for column, low, high in _clusters(cutoffs, len(embedding)):
        member = (low <= targets) & (targets < high)
        head_columns = jnp.where(member, cutoffs[0] + len(cutoffs) + column, head_columns)
        word = jnp.clip(targets - low, 0, high - low - 1)
        cluster = embedding[low:high], bias[low:high]
        losses += _in_blocks(lambda x, cluster: _log_softmax(x, *cluster), x, word, member, cluster)
    return losses + _in_blocks(lambda x, output: _head(x, output, cutoffs), x, head_columns, counts, output)


def _in_blocks(log_probabilities, x, columns, member, parameters):
    """−log p of one column per token, for the tokens that are members, and 0 for the others.

    Members come first, and blocks without a member are not computed.

    Args:
      log_probabilities: (x ``[n, D]``, parameters) -> log p ``[n, columns]``.
      x, columns, member: ``[N, D]``, int32 ``[N]`` and bool ``[N]``.
    """
    length, size = len(x), min(BLOCK, len(x))
    members_first = jnp.argsort(~member)
    padding = -length % size

    def in_blocks(x):
        padded = jnp.pad(x[members_first], ((0, padding), *((0, 0),) * (x.ndim - 1)))
        return padded.reshape(-1, size, *x.shape[1:])

    @jax.checkpoint
    def losses_of_block(x, columns, member, parameters):
        # The gradient of a number that is not finite, times 0, would be NaN.
        x = jnp.where(member[:, None], x, 0)
        log_p = jnp.take_along_axis(log_probabilities(x, parameters), columns[:, None], axis=-1)[:, 0]
        return jnp.where(member, -log_p, 0)

    def zeros_of_block(x, columns, member, parameters):
        # Made from the columns, so that in shard_map they vary over the same axes as the losses.
        return 0.0 * columns.astype(jnp.float32)

    def body(_, block):
        _, _, member = block
        return None, lax.cond(jnp.any(member), losses_of_block, zeros_of_block, *block, parameters)

    _, losses = lax.scan(body, None, tuple(map(in_blocks, (x, columns, member))))
    return jnp.zeros(length, jnp.float32).at[members_first].set(losses.reshape(-1)[:length])
