"""Language models of Schlag, Irie & Schmidhuber 2021 (section 6.3): a Transformer decoder around any attention layer.

    model = DecoderLM(ModelConfig(vocab_size=1000, rule="delta"), rngs=nnx.Rngs(0))
    logits, memory = model(tokens)                      # [B, T, V], and what the next call takes
    losses, memory = model.losses(tokens, targets)      # [B, T], without the array of all logits

Letters: B batch, T tokens, V vocabulary, D d_model, N tokens of all sequences.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from fwt_jax import feature_maps, output_layer
from fwt_jax.layers import FastWeightAttention, FavorPlus, SoftmaxAttention
from fwt_jax.relative import RelativeAttention

FEATURE_MAPS = ("identity", "relu", "relu_squared", "tanh", "elu_plus_one", "softmax", "taylor", "dpfp", "favor_plus")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder. The defaults are the paper's small configuration of WikiText-103 with the delta rule.

    Attributes:
      vocab_size: V.
      num_layers, d_model, d_ff: of the decoder; ``d_model`` is even.
      num_heads, head_size: of the attention.
      rule: "softmax", or the rule of a fast weight memory: "sum", "delta" or "fwm".
      feature_map: φ, the name of a function of ``feature_maps``; "favor_plus" with the authors' constants.
      feature_size: ν of "dpfp", M (half the number of features) of "favor_plus".
      feature_normalization: None, "sum" (eq. 29; features that are all zero stay zero) or "l2".
      normalize, eps: attention normalisation, see ``fast_weight_attention``.
      output_scale: of what is read; None: head_size**-0.5, as the authors' kernels have it.
      positions: "descending" adds sinusoids of the number of tokens that follow in the call (the authors count so);
        None adds nothing, which a memory that is carried from call to call needs; "relative", of rule "softmax", is
        Transformer-XL (Dai et al. 2019).
      memory_length, clamp_length: of "relative": tokens seen beside those of the call, and the largest distance that
        is told apart (0: all are).
      norm: "post" (the paper), or "pre" as the authors' toolkit has it: the residual of an attention layer is what
        its normalisation gives.
      cutoffs: of an adaptive softmax: the first words of the clusters of rarer words; () for a plain softmax.
      dropout: rate, after the embedding, the attention, inside and after the feed-forward layer, and before the output.
      remat: recompute each block in the backward pass.
      scan: compile one block for all, by ``lax.scan``: for many layers, of which compiling would take minutes.
      dtype: of the computation; float32 or bfloat16. Parameters, fast weights, normalisations, the output layer and
        losses are float32; keys and values that softmax attention keeps are of dtype.
      implementation: of the memory, see ``fast_weight_attention``.

    Raises:
      ValueError: an unknown name, a size below 1, an odd d_model, a dropout outside of [0, 1), cutoffs that do not rise
        between 0 and V.
    """

    vocab_size: int
    num_layers: int = 16
    d_model: int = 128
    d_ff: int = 2048
    num_heads: int = 8
    head_size: int = 16
    rule: Literal["softmax", "sum", "delta", "fwm"] = "delta"
    feature_map: str = "elu_plus_one"
    feature_size: int = 1
    feature_normalization: Literal[None, "sum", "l2"] = "sum"
    normalize: Literal[False, "read", "retrieval"] = False
    eps: float = 1e-5
    output_scale: float | None = None
    positions: Literal[None, "descending", "relative"] = "descending"
    memory_length: int = 0
    clamp_length: int = 0
    norm: Literal["post", "pre"] = "post"
    cutoffs: tuple[int, ...] = ()
    dropout: float = 0.1
    remat: bool = False
    scan: bool = False
    dtype: str = "float32"
    implementation: Literal[None, "xla", "pallas"] = None

    def __post_init__(self):
        def one_of(name, options):
            if getattr(self, name) not in options:
                raise ValueError(f"{name} must be one of {', '.join(map(repr, options))}, got {getattr(self, name)!r}")

        one_of("rule", ("softmax", "sum", "delta", "fwm"))
        one_of("feature_map", FEATURE_MAPS)
        one_of("feature_normalization", (None, "sum", "l2"))
        one_of("positions", (None, "descending", "relative"))
        one_of("norm", ("post", "pre"))
        one_of("dtype", ("float32", "bfloat16"))
        for name in ("vocab_size", "num_layers", "d_model", "d_ff", "num_heads", "head_size", "feature_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if min(self.memory_length, self.clamp_length) < 0:
            raise ValueError(
                f"memory_length and clamp_length must not be negative, got {self.memory_length}, {self.clamp_length}"
            )
        relative = self.positions == "relative"
        if (relative and (self.rule != "softmax" or self.norm != "post")) or (
            not relative and (self.memory_length or self.clamp_length)
        ):
            raise ValueError(
                'positions="relative", memory_length and clamp_length belong together, to rule="softmax" and '
                f'norm="post"; got positions={self.positions!r}, rule={self.rule!r}, norm={self.norm!r}, '
                f"memory_length={self.memory_length}, clamp_length={self.clamp_length}"
            )
        if self.d_model % 2:
            raise ValueError(f"d_model must be even, half of it sines and half cosines, got {self.d_model}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")
        bounds = (0, *self.cutoffs, self.vocab_size)
        if any(low >= high for low, high in itertools.pairwise(bounds)):
            raise ValueError(f"cutoffs must rise between 0 and vocab_size {self.vocab_size}, got {self.cutoffs}")

    @property
    def draws(self) -> bool:
        """Whether the blocks draw random numbers where they are given rngs."""
        return self.dropout > 0 or (self.rule != "softmax" and self.feature_map == "favor_plus")

    def make_attention(self, rngs: nnx.Rngs) -> FastWeightAttention | SoftmaxAttention | RelativeAttention:
        """The attention layer of one block."""
        if self.positions == "relative":
            sizes = (self.d_model, self.num_heads, self.head_size, self.memory_length, self.clamp_length)
            return RelativeAttention(*sizes, dtype=jnp.dtype(self.dtype), kernel_init=INIT, rngs=rngs)
        shared = {"kernel_init": INIT, "use_bias": False, "dtype": jnp.dtype(self.dtype), "rngs": rngs}
        if self.rule == "softmax":
            return SoftmaxAttention(self.d_model, self.num_heads, self.head_size, **shared)
        return FastWeightAttention(
            self.d_model,
            self.num_heads,
            self.head_size,
            **features(self, rngs),
            rule=self.rule,
            normalize=self.normalize,
            eps=self.eps,
            output_scale=self.head_size**-0.5 if self.output_scale is None else self.output_scale,
            implementation=self.implementation,
            **shared,
        )


INIT = nnx.initializers.normal(0.02)


TOOLKIT_FAVOR_PLUS = functools.partial(FavorPlus, orthogonal="columns", eps=1e-4)
_partial = functools.cache(functools.partial)  # equal ones are one object, so that equal models are compiled once


def features(config, rngs: nnx.Rngs, favor_plus: Callable[..., FavorPlus] = TOOLKIT_FAVOR_PLUS) -> dict:
    """feature_map and feature_normalization of a layer, from feature_map, feature_size, feature_normalization and
    head_size of a configuration."""
    feature_map = getattr(feature_maps, config.feature_map)
    if config.feature_map == "dpfp":
        feature_map = _partial(feature_map, nu=config.feature_size)
    elif config.feature_map == "favor_plus":
        feature_map = favor_plus(config.head_size, config.feature_size, rngs=rngs)
    normalization = {
        None: None,
        "sum": feature_maps.sum_normalize,
        "l2": feature_maps.l2_normalize,
    }[config.feature_normalization]
    return {"feature_map": feature_map, "feature_normalization": normalization}


def _layer_norm(config, rngs):
    options = {"epsilon": 1e-5, "scale_init": _init_scale, "use_fast_variance": False, "rngs": rngs}
    return nnx.LayerNorm(config.d_model, **options)


def _init_scale(*args):
    """Of the module, since a layer may keep it: equal models must have equal attributes."""
    return 1 + INIT(*args)


class FeedForward(nnx.Module):
    """W₂ dropout(relu(W₁x + b₁)) + b₂ (Vaswani et al. 2017, eq. 2)."""

    def __init__(self, config, rngs: nnx.Rngs, *, kernel_init=INIT, dropout: float | None = None):
        options = {"kernel_init": kernel_init, "dtype": jnp.dtype(config.dtype), "rngs": rngs}
        self.hidden = nnx.Linear(config.d_model, config.d_ff, **options)
        self.out = nnx.Linear(config.d_ff, config.d_model, **options)
        self.dropout = config.dropout if dropout is None else dropout

    def __call__(self, x: jax.Array, rngs: nnx.Rngs | None = None) -> jax.Array:
        return self.out(dropout(jax.nn.relu(self.hidden(x)), self.dropout, rngs))


class Block(nnx.Module):
    """An attention and a feed-forward layer, each with its residual connection and layer normalisation."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.attention = config.make_attention(rngs)
        self.feed_forward = FeedForward(config, rngs)
        self.attention_norm, self.feed_forward_norm = _layer_norm(config, rngs), _layer_norm(config, rngs)
        self.norm, self.dropout = config.norm, config.dropout

    def __call__(self, x: jax.Array, memory=None, *, rngs: nnx.Rngs | None = None, **options):
        """x ``[B, T, D]``, float32 -> the same, and the memory. ``options``: of the attention layer."""
        if self.norm == "pre":
            x = self.attention_norm(x)
        if isinstance(self.attention, FastWeightAttention):
            options["rngs"] = rngs
        y, memory = self.attention(x, memory, **options)
        x = x + dropout(y.astype(jnp.float32), self.dropout, rngs)
        if self.norm == "pre":
            y = self.feed_forward(self.feed_forward_norm(x), rngs)
            return x + dropout(y.astype(jnp.float32), self.dropout, rngs), memory
        x = self.attention_norm(x)
        y = self.feed_forward(x, rngs)
        return self.feed_forward_norm(x + dropout(y.astype(jnp.float32), self.dropout, rngs)), memory


class DecoderLM(nnx.Module):
    """A causal language model whose output matrix is its embedding.

    Attributes:
      embedding: ``[V, D]``; output_bias ``[V]``.
      cluster_kernel, cluster_bias: ``[c, D]`` and ``[c]``, of the adaptive softmax; None without.
      content_bias, position_bias: ``[H, head_size]``, of positions "relative"; None without.
      blocks: of type ``Block``.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.embedding = nnx.Param(INIT(rngs.params(), (config.vocab_size, config.d_model), jnp.float32))
        self.output_bias = nnx.Param(jnp.zeros(config.vocab_size, jnp.float32))
        clusters = len(config.cutoffs)
        self.cluster_kernel = (
            nnx.Param(INIT(rngs.params(), (clusters, config.d_model), jnp.float32)) if clusters else None
        )
        self.cluster_bias = nnx.Param(jnp.zeros(clusters, jnp.float32)) if clusters else None
        bias = lambda: nnx.Param(INIT(rngs.params(), (config.num_heads, config.head_size), jnp.float32))  # noqa: E731
        self.content_bias = bias() if config.positions == "relative" else None
        self.position_bias = bias() if config.positions == "relative" else None
        self.blocks = nnx.List([Block(config, rngs) for _ in range(config.num_layers)])

    def __call__(self, tokens, memory=None, *, segment_ids=None, rngs=None):
        """Log-probabilities of the token after each.

        Args:
          tokens: integers ``[B, T]``, from 0 to V − 1. Numbers that are not traced are checked, which waits for the
            device; of traced ones (``jax.jit``) another number gives NaN.
          memory: what an earlier call returned, a tuple with one for each block; empty if not given.
          segment_ids: integers ``[B, T]``, see ``fast_weight_attention``. (Positions do not start anew.) Pad a shorter
            row in front, with a segment id of its own, e.g. 0 for padding and 1 for the text: the first token of the
            text drops the padding, and memory and log p after it are those of the row alone. Never pad behind: there
            is no mask, and the memory that is returned would have read the padding.
          rngs: for dropout, and for the projections of "favor_plus" (streams "dropout" and "projection", or
            "default"); without, there is no dropout: evaluation.

        Returns:
          ``[B, T, V]``, float32, and the memories.

        Raises:
          ValueError: tokens that are not integers ``[B, T]`` from 0 to V − 1, another number of memories than blocks.
        """
        x, memory = self.hidden(tokens, memory, segment_ids=segment_ids, rngs=rngs)
        return self.log_probabilities(x), memory

    def losses(self, tokens, targets, memory=None, *, segment_ids=None, rngs=None):
        """−log p of ``targets`` after each token: ``[B, T]``, float32, and the memories.

        The loss of a negative target (−1, −100) is 0 and has no gradient: a mean over tokens must not count it, as
        ``jnp.sum(losses) / jnp.sum(targets >= 0)``.

        Args:
          targets: integers ``[B, T]``, up to V − 1. Where they are traced, a larger one gives NaN.
          tokens, memory, segment_ids, rngs: as in ``__call__``. The cost of the output layer: ``output_layer.losses``.

        Raises:
          ValueError: targets that are not integers of the shape of tokens, or known to be above V − 1; and as
            ``__call__``.
        """
        last = self.config.vocab_size - 1
        tokens = output_layer.integers("tokens", tokens, last)
        options = {"axes": f"as tokens, {list(tokens.shape)}", "shape": tokens.shape, "least": None}
        targets = output_layer.integers("targets", targets, last, **options)
        x, memory = self.hidden(tokens, memory, segment_ids=segment_ids, rngs=rngs)
        return self.losses_of(x, targets), memory

    def losses_of(self, hidden, targets):
        """What ``hidden`` returns, or a part of it, ``[B, T, D]``, to the losses of ``targets``: ``[B, T]``, float32.

        Targets and errors as in ``losses``.
        """
        return output_layer.losses(hidden, targets, self._output(), self.config.cutoffs)

    def hidden(self, tokens, memory=None, *, segment_ids=None, rngs=None):
        """What the output layer sees, ``[B, T, D]``, and the memories. Arguments as in ``__call__``."""
        config = self.config
        tokens = output_layer.integers("tokens", tokens, config.vocab_size - 1)
        x = output_layer.embed(self.embedding[...], tokens) * config.d_model**0.5
        if config.positions == "descending":
            x = x + sinusoids(jnp.arange(tokens.shape[1])[::-1], config.d_model)[None]
        x = dropout(x, config.dropout, rngs)
        options = {"segment_ids": segment_ids}
        if config.positions == "relative":
            options = self._relative_options(tokens.shape[1], segment_ids, rngs)
        memory = (None,) * config.num_layers if memory is None else memory
        if len(memory) != config.num_layers:
            raise ValueError(f"memory must have one for each of {config.num_layers} blocks, got {len(memory)}")

        how = {"scan": config.scan, "remat": config.remat}
        of_blocks = rngs if config.draws else None
        x, memories = through_blocks(_read_block, self.blocks, x, memory, options, of_blocks, **how)
        return dropout(x, config.dropout, rngs), memories

    def log_probabilities(self, hidden):
        """What ``hidden`` returns, ``[..., D]``, to log p ``[..., V]``, float32."""
        return output_layer.log_probabilities(hidden, self._output(), self.config.cutoffs)

    def init_memory(self, batch_size: int, max_length: int | None = None):
        """Empty memories of all blocks. max_length: tokens that softmax attention has room for; else without effect."""
        cached = self.config.rule == "softmax" and self.config.positions != "relative"
        sizes = (batch_size, max_length) if cached else (batch_size,)
        return tuple(block.attention.init_memory(*sizes) for block in self.blocks)

    def _relative_options(self, num_tokens, segment_ids, rngs):
        if segment_ids is not None:
            raise ValueError('segment_ids are not for positions="relative", whose memory is not cut; leave them out')
        positions = sinusoids(self.blocks[0].attention.distances(num_tokens), self.config.d_model)
        return {
            "positions": dropout(positions, self.config.dropout, rngs),
            "content_bias": self.content_bias[...],
            "position_bias": self.position_bias[...],
        }

    def _output(self):
        clusters = () if self.cluster_kernel is None else (self.cluster_kernel[...], self.cluster_bias[...])
        return self.embedding[...], self.output_bias[...], *clusters


def _read_block(block, x, before, options, rngs):
    return block(x, before, rngs=rngs, **options)


def through_blocks(call, blocks, x, memories, shared, rngs, *, scan: bool, remat: bool):
    """x through all blocks, one after another: ``x, after = call(block, x, before, shared, rngs)`` -> x, (after, ...).

    Args:
      call: a function that is the same object in every call, or what is scanned is compiled anew outside of jax.jit.
      memories: what each block takes, trees of one shape.
      shared: what all of them take, a tree.
      rngs: None where nothing is drawn: those of an outer trace (``jax.jit``) could not be counted on.
      scan: by ``lax.scan`` over the parameters of equal blocks, put into one array: one block is compiled instead of
        all. Random numbers are others. Not for a single token, where putting memories together costs more than the
        blocks themselves.
      remat: recompute each block in the backward pass.
    """
    if not scan or x.shape[1] == 1:
        call, after = _recomputed(call) if remat else call, []
        for block, before in zip(blocks, memories, strict=True):
            x, memory = call(block, x, before, shared, rngs)
            after.append(memory)
        return x, tuple(after)
    graphs, states = zip(*(nnx.split(block) for block in blocks), strict=True)
    names = [name for name in ("dropout", "projection") if rngs is not None and (name in rngs or "default" in rngs)]
    keys = {name: jax.random.split(rngs[name](), len(graphs)) for name in names}
    return _scan_blocks(states, x, tuple(memories), shared, keys, call=call, graph=graphs[0], remat=remat)


@functools.partial(jax.jit, static_argnames=("call", "graph", "remat"))
def _scan_blocks(states, x, memories, shared, keys, *, call, graph, remat):
    def body(x, inputs):
        state, before, keys = inputs
        return call(nnx.merge(graph, state), x, before, shared, nnx.Rngs(**keys) if keys else None)

    stacked, before = (jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees) for trees in (states, memories))
    x, after = lax.scan(jax.checkpoint(body) if remat else body, x, (stacked, before, keys))
    return x, tuple(jax.tree.map(lambda leaf, i=i: leaf[i], after) for i in range(len(states)))


def _recomputed(call):
    """``call`` of ``through_blocks``, which the backward pass computes again.

    ``jax.checkpoint`` sees arrays alone. ``nnx.remat`` would write to the variables of the block, and a variable of an
    outer trace (``jax.jit``, a scan) refuses that.
    """

    def of_modules(block, x, before, shared, rngs):
        graph, state = nnx.split((block, rngs))

        @jax.checkpoint
        def of_arrays(state, x, before, shared):
            block, rngs = nnx.merge(graph, state)
            x, memory = call(block, x, before, shared, rngs)
            return x, memory, nnx.state(rngs, nnx.RngCount)

        x, memory, counts = of_arrays(state, x, before, shared)
        if rngs is not None:
            nnx.update(rngs, counts)
        return x, memory

    return of_modules


def dropout(x: jax.Array, rate: float, rngs: nnx.Rngs | None) -> jax.Array:
    """x with a share ``rate`` of its entries 0 and the others larger, from the stream "dropout"; x without rngs."""
    if rngs is None or rate == 0:
        return x
    kept = jax.random.bernoulli(rngs.dropout(), 1 - rate, x.shape)
    return jnp.where(kept, x / (1 - rate), 0)


def sinusoids(positions: jax.Array, size: int) -> jax.Array:
    """[sin(t ω); cos(t ω)] ``[T, size]``, float32, of t ``[T]``, ωᵢ = 10000^(−2i/size) (Vaswani et al. 2017)."""
    frequencies = 10000.0 ** (-jnp.arange(0, size, 2, dtype=jnp.float32) / size)
    angles = jnp.outer(positions.astype(jnp.float32), frequencies)
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)
