"""The output layer of a language model: log p of words, by a softmax or an adaptive softmax (Grave et al. 2017).

    output = (embedding [V, D], bias [V])                       softmax
    output = (embedding, bias, kernel [c, D], bias [c])         adaptive softmax with c clusters, beside its cutoffs

Words are numbers from 0 to V − 1. A negative target is ignored: its loss is 0, and so is the gradient. Any other number
raises a ValueError. A traced number (``jax.jit``) cannot raise, so it gives NaN.

Letters: B batch, T tokens, N tokens of all sequences, V vocabulary, D d_model. All results are float32. If x is
bfloat16, products have bfloat16 factors and float32 sums, also in the gradient.
"""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
from jax import lax

from fwt_jax import arguments
from fwt_jax.sharding import TOKENS, over_batch

# The number of logits that exist together, by the platform that the program is compiled for. On CPU and TPU they stay
# in fast memory. On GPU, which "default" is, few large products take fewer launches.
LOGITS = {"cpu": 2**20, "tpu": 2**22, "default": 2**26}
# Of how many tokens the logits are computed, as shares of all tokens: the least that is enough. Rare words are few, and
# batches of sentences have padding.
CLUSTER_SHARES, HEAD_SHARES = (0, 1 / 64, 1 / 16, 1 / 4, 1), (1 / 2, 3 / 4, 1)
TILE = 128  # the least number of words in a block: the width of a tile of TPU and GPU


def embed(embedding: jax.Array, tokens: jax.Array) -> jax.Array:
    """Rows of the embedding ``[V, D]`` for int32 tokens ``[...]``: ``[..., D]``; NaN for a number that is no word."""

    def of_part(tokens, embedding):
        return embedding.at[tokens].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)

    return over_batch(of_part, tokens, embedding, TOKENS)


def losses(x: jax.Array, targets: jax.Array, output: tuple[jax.Array, ...], cutoffs: tuple[int, ...] = ()) -> jax.Array:
    """−log p of ``targets``, integers ``[B, T]``, from x ``[B, T, D]``: ``[B, T]``; 0 for a negative target.

    The logits of all tokens exist for one block of words at a time, and the gradient computes them again. A block has
    up to 2^20 logits on CPU, 2^22 on TPU and 2^26 on GPU, twice that if the vocabulary does not divide well, and at
    least 128 words. Tokens that count are gathered: logits of words are computed for N/2, 3N/4 or N tokens, those of a
    cluster for 0, N/64, N/16, N/4 or N tokens, whichever is enough. Numbers below 64 are skipped.
    Cost: 2VD FLOPs per token. With clusters: 2D Σ pn, where a cluster of n words is computed for a share p of tokens.

    Raises:
      ValueError: targets that are not integers of these axes, or known to be above V − 1 (traced ones give NaN).
    """
    shape = x.shape[:-1]
    targets = arguments.integers("targets", targets, len(output[0]) - 1, axes=str(list(shape)), shape=shape, least=None)
    return _losses_of_batch(x, targets, output, cutoffs=tuple(cutoffs))


# Outside of jax.jit, JAX would compile the scans again at every call.
@functools.partial(jax.jit, static_argnames="cutoffs")
def _losses_of_batch(x, targets, output, *, cutoffs):
    def losses_of_part(part, output):
        x, targets = part
        options = {"cutoffs": cutoffs, "precision": _precision(x)}
        of_platform = {
            name: functools.partial(_losses, max_logits=number, **options) for name, number in LOGITS.items()
        }
        tokens = x.astype(jnp.float32).reshape(-1, x.shape[-1]), targets.reshape(-1)
        return lax.platform_dependent(*tokens, output, **of_platform).reshape(targets.shape)

    return over_batch(losses_of_part, (x, targets), output, TOKENS)


def log_probabilities(x: jax.Array, output: tuple[jax.Array, ...], cutoffs: tuple[int, ...] = ()) -> jax.Array:
    """log p of all words, ``[..., V]``, from x ``[..., D]``."""
    rows = _log_probabilities(x.astype(jnp.float32).reshape(-1, x.shape[-1]), output, cutoffs, _precision(x))
    return rows.reshape(*x.shape[:-1], -1)


def _log_probabilities(x, output, cutoffs, precision):
    embedding, bias, *_ = output
    head = jax.nn.log_softmax(_logits(x, _head(output, cutoffs), precision), axis=-1)
    columns = [head[:, : cutoffs[0]] if cutoffs else head]
    for column, low, high in _clusters(cutoffs, len(embedding)):
        within = jax.nn.log_softmax(_logits(x, (embedding[low:high], bias[low:high]), precision), axis=-1)
        columns.append(head[:, column, None] + within)
    return jnp.concatenate(columns, axis=-1)


def _head(output, cutoffs):
    """Embedding and bias of the frequent words, then of the clusters, the last one first as in the authors' toolkit."""
    embedding, bias, *clusters = output
    if not cutoffs:
        return embedding, bias
    kernel, cluster_bias = clusters
    return jnp.concatenate([embedding[: cutoffs[0]], kernel]), jnp.concatenate([bias[: cutoffs[0]], cluster_bias])


def _clusters(cutoffs, vocab_size):
    """The column of the head, the first and the last word (exclusive) of each cluster of rarer words."""
    bounds = itertools.pairwise((*cutoffs, vocab_size) if cutoffs else ())
    return [(-1 - i, low, high) for i, (low, high) in enumerate(bounds)]


def _losses(x, targets, output, *, cutoffs, **options):
    """−log p of a target: −log p of its column of the head, and in a cluster −log p of the word within the cluster."""
    embedding, bias, *_ = output
    counts = targets >= 0
    # The gradient of a number that is not finite, times 0, would be NaN.
    x = jnp.where(counts[:, None], x, 0)
    columns = targets
    losses = jnp.zeros(len(targets), jnp.float32)
    for column, low, high in _clusters(cutoffs, len(embedding)):
        member = (low <= targets) & (targets < high)
        columns = jnp.where(member, cutoffs[0] + len(cutoffs) + column, columns)
        rows = embedding[low:high], bias[low:high]
        losses += _losses_of_members(CLUSTER_SHARES, x, targets - low, member, *rows, **options)
    losses += _losses_of_members(HEAD_SHARES, x, columns, counts, *_head(output, cutoffs), **options)
    return jnp.where(counts, jnp.where(targets < len(embedding), losses, jnp.nan), 0)


def _losses_of_members(shares, x, columns, member, embedding, bias, **options):
    """``_losses_of_all`` of the tokens that are members, bool ``[N]``, and 0 for the others.

    Members come first, and a branch computes a share of all tokens, the least that is enough. A scan over blocks of
    members would add a gradient of all words for each block, with and without members. A branch forms it once.
    """
    sizes = [int(share * len(x)) for share in shares]
    sizes = [size for size in sizes if size in (0, len(x)) or size >= 64]
    members_first = jnp.argsort(~member)

    def losses_of_first(size, x, columns, member, embedding, bias):
        rows = members_first[:size]
        losses = _losses_of_all(x[rows], columns[rows], embedding, bias, **options)
        return jnp.zeros_like(columns, jnp.float32).at[rows].set(jnp.where(member[rows], losses, 0))

    branches = [functools.partial(losses_of_first, size) for size in sizes]
    branch = jnp.sum(jnp.asarray(sizes) < jnp.sum(member))
    return lax.switch(branch, branches, x, columns, member, embedding, bias)


def _losses_of_all(x, columns, embedding, bias, *, max_logits, precision):
    log_sum, own = _log_sum_and_own(x, columns, embedding, bias, max_logits, precision)
    return log_sum - own


@functools.partial(jax.custom_jvp, nondiff_argnums=(4, 5))
def _log_sum_and_own(x, columns, embedding, bias, max_logits, precision):
    """log Σ exp of a token's logits, and its logit of ``columns``, int32 ``[N]`` (0 if there is no such column)."""

    def body(carry, block):
        largest, total, own = carry
        start, rows = block
        logits = _logits(x, rows, precision)
        larger = jnp.maximum(largest, jnp.max(logits, axis=-1))
        total = total * jnp.exp(largest - larger) + jnp.sum(jnp.exp(logits - larger[:, None]), axis=-1)
        return (larger, total, own + _at(columns - start.astype(columns.dtype), logits)), None

    zeros = jnp.zeros_like(columns, jnp.float32)  # in shard_map, they vary over the same axes as the columns
    words = _words_of_a_block(len(x), len(embedding), max_logits)
    rows = _in_blocks((embedding, bias), words)
    (largest, total, own), _ = lax.scan(body, (zeros - jnp.inf, zeros, zeros), (_starts(rows), rows))
    return largest + jnp.log(total), own


@_log_sum_and_own.defjvp
def _log_sum_and_own_jvp(max_logits, precision, primals, tangents):
    """d log Σ exp l = Σ softmax(l) dl, with the logits l of a block computed again, as is the transpose of this."""
    x, columns, embedding, bias = primals
    dx, _, d_embedding, d_bias = tangents
    log_sum, own = _log_sum_and_own(x, columns, embedding, bias, max_logits, precision)

    # Without the checkpoint, the gradient would save softmax(l) of all blocks.
    @jax.checkpoint
    def body(carry, block):
        d_log_sum, d_own = carry
        start, rows, d_rows = block
        logits, d_logits = jax.jvp(functools.partial(_logits, precision=precision), (x, rows), (dx, d_rows))
        d_log_sum += jnp.sum(jnp.exp(logits - log_sum[:, None]) * d_logits, axis=-1)
        return (d_log_sum, d_own + _at(columns - start.astype(columns.dtype), d_logits)), None

    zeros = jnp.zeros_like(log_sum)
    words = _words_of_a_block(len(x), len(embedding), max_logits)
    rows, d_rows = jax.jvp(lambda *rows: _in_blocks(rows, words), (embedding, bias), (d_embedding, d_bias))
    return (log_sum, own), lax.scan(body, (zeros, zeros), (_starts(rows), rows, d_rows))[0]


def _logits(x, rows, precision):
    embedding, bias = rows
    return jnp.matmul(x, embedding.astype(x.dtype).T, precision=precision) + bias[None]


def _precision(x):
    """Of bfloat16, the factors are bfloat16 and the sums float32. Unlike dtypes, this holds in derivatives as well."""
    return lax.DotAlgorithmPreset.BF16_BF16_F32 if x.dtype == jnp.bfloat16 else None


def _at(column, logits):
    """The logit of a column ``[N]`` of ``[N, columns]``, or 0 if there is none."""
    columns = jnp.arange(logits.shape[1], dtype=column.dtype)
    return jnp.sum(jnp.where(columns[None] == column[:, None], logits, 0), axis=-1)


def _words_of_a_block(num_tokens, vocab_size, max_logits):
    most = max(max_logits // max(num_tokens, 1), TILE)
    if most >= vocab_size:
        return vocab_size
    # Blocks that divide the vocabulary need no padded copy of the embedding.
    dividing = (words for words in range(most - most % 8, most // 2, -8) if vocab_size % words == 0)
    number = -(-vocab_size // most)
    return next(dividing, -(-vocab_size // (number * TILE)) * TILE)


def _in_blocks(rows, words):
    """The embedding and the bias in blocks of words, ``[blocks, words, D]`` and ``[blocks, words]``."""
    embedding, bias = rows
    padding = -len(bias) % words
    if padding:
        embedding = jnp.pad(embedding, ((0, padding), (0, 0)))
        bias = jnp.pad(bias, (0, padding), constant_values=jnp.finfo(bias.dtype).min)  # words whose probability is 0
    return embedding.reshape(-1, words, embedding.shape[1]), bias.reshape(-1, words)


def _starts(rows):
    """The first word of each block."""
    number, words = rows[1].shape
    return words * jnp.arange(number, dtype=jnp.int32)
