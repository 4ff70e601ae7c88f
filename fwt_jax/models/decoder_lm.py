"""Language models of Schlag, Irie & Schmidhuber 2021 (section 6.3): a Transformer decoder around any attention layer.

    model = DecoderLM(ModelConfig(vocab_size=1000, rule="delta"), rngs=nnx.Rngs(0))
    log_p, memory = model(tokens)                       # [B, T, V], and the memory for the next call
    losses, memory = model.losses(tokens, targets)      # [B, T], without the array of all logits

Letters: B batch, T tokens, V vocabulary, D d_model, N tokens of all sequences.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from fwt_jax import arguments
from fwt_jax.layers import FastWeightAttention, RelativeAttention, SoftmaxAttention
from fwt_jax.layers.common import check_rngs
from fwt_jax.models import output_layer
from fwt_jax.models.blocks import (
    FEATURE_MAPS,
    INIT,
    FeedForward,
    Static,
    dropout,
    features,
    layer_norm,
    residual,
    sinusoids,
    sublayer_input,
    through_blocks,
)
from fwt_jax.rules import Rule, find_rule


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder. The defaults are the paper's small configuration of WikiText-103 with the delta rule.

    Attributes:
      vocab_size: V.
      num_layers, d_model, d_ff: of the decoder; ``d_model`` is even.
      num_heads, head_size: of the attention.
      num_value_heads: of fast weights, a multiple of num_heads, see ``FastWeightAttention``; num_heads if None.
      rule: "softmax", or the rule of a fast weight memory: a name of ``RULES``, or a ``Rule`` of your own.
      feature_map: φ, the name of a function of ``feature_maps``; "favor_plus" with the authors' constants.
      feature_size: ν of "dpfp", M (half the number of features) of "favor_plus".
      feature_normalization: None, "sum" (eq. 29; features that are all zero stay zero) or "l2".
      normalize, eps: attention normalisation, see ``fast_weight_attention``.
      conv_size: of the short convolutions of a fast weight layer, see ``FastWeightAttention``; None: none.
      output_scale: a factor of the reads; None: head_size**-0.5, as in the authors' kernels.
      positions: "descending" adds sinusoids of the number of tokens that follow in the call, as the authors do. None
        adds nothing: a memory that is carried from call to call needs this. "relative" is Transformer-XL (Dai et al.
        2019), of rule "softmax".
      memory_length, clamp_length: of "relative": the number of tokens seen before the call, and the largest
        distance (larger ones count as it; 0: no largest).
      norm: the layer normalisation: "post" (the paper), or "pre" as in the authors' toolkit, where an attention layer
        is added to its normalised input.
      cutoffs: of an adaptive softmax: the first word of each cluster of rarer words; () for a plain softmax.
      dropout: rate, after the embedding, the attention, inside and after the feed-forward layer, and before the output.
      remat: recompute each block in the backward pass.
      scan: compile one block for all, by ``lax.scan``. Without it, compiling many layers takes minutes.
      dtype: of the computation; float32 or bfloat16. Parameters, fast weights, normalisations and losses are float32.
        The cache of softmax attention has this dtype.
      implementation: of the memory, see ``fast_weight_attention``.
      sequence_axis: the axis of the mesh of ``jax.set_mesh`` that splits the tokens, see ``fast_weight_attention``. The
        layers of rule "softmax" have no such argument: the compiler gathers their keys and values.

    Raises:
      ValueError: an unknown name, a size below 1, num_value_heads or conv_size with rule "softmax", an odd d_model, a
        dropout outside of [0, 1), cutoffs that do not rise between 0 and V.
    """

    vocab_size: int
    num_layers: int = 16
    d_model: int = 128
    d_ff: int = 2048
    num_heads: int = 8
    head_size: int = 16
    num_value_heads: int | None = None
    rule: str | Rule = "delta"
    feature_map: str = "elu_plus_one"
    feature_size: int = 1
    feature_normalization: Literal[None, "sum", "l2"] = "sum"
    normalize: Literal[False, "read", "retrieval"] = False
    eps: float = 1e-5
    output_scale: float | None = None
    conv_size: int | None = None
    positions: Literal[None, "descending", "relative"] = "descending"
    memory_length: int = 0
    clamp_length: int = 0
    norm: Literal["post", "pre"] = "post"
    cutoffs: tuple[int, ...] = ()
    dropout: float = 0.1
    remat: bool = False
    scan: bool = False
    dtype: str = "float32"
    implementation: Literal[None, "xla", "pallas", "triton"] = None
    sequence_axis: str | None = None

    def __post_init__(self):
        rule = self.memory_rule
        arguments.one_of(FEATURE_MAPS, feature_map=self.feature_map)
        arguments.one_of((None, "sum", "l2"), feature_normalization=self.feature_normalization)
        arguments.one_of((None, "descending", "relative"), positions=self.positions)
        arguments.one_of(("post", "pre"), norm=self.norm)
        arguments.one_of(("float32", "bfloat16"), dtype=self.dtype)
        for name in ("vocab_size", "num_layers", "d_model", "d_ff", "num_heads", "head_size", "feature_size"):
            arguments.at_least(1, **{name: getattr(self, name)})
        if min(self.memory_length, self.clamp_length) < 0:
            raise ValueError(
                f"memory_length and clamp_length must not be negative, got {self.memory_length}, {self.clamp_length}"
            )
        self._check_sizes_of_fast_weights()
        if self.positions == "relative":
            fits = rule is None and self.norm == "post"
        else:
            fits = self.memory_length == self.clamp_length == 0
        if not fits:
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

    def _check_sizes_of_fast_weights(self):
        sizes = {name: getattr(self, name) for name in ("num_value_heads", "conv_size")}
        given = {name: size for name, size in sizes.items() if size is not None}
        arguments.sizes(**given)
        if given and self.memory_rule is None:
            raise ValueError(
                f"num_value_heads and conv_size are for fast weights, got {given} with rule={self.rule!r}; "
                "leave them out, or take another rule"
            )
        if given.get("num_value_heads", self.num_heads) % self.num_heads:
            raise ValueError(
                f"num_value_heads must be a multiple of num_heads {self.num_heads}, got {self.num_value_heads}; "
                "leave it out for one each"
            )

    @property
    def memory_rule(self) -> Rule | None:
        """The rule of the fast weight memory; None with softmax attention."""
        return find_rule(self.rule, others=("softmax",))

    @property
    def draws(self) -> bool:
        """Whether the blocks draw random numbers when they are given rngs."""
        return self.dropout > 0 or (self.memory_rule is not None and self.feature_map == "favor_plus")

    def make_attention(self, rngs: nnx.Rngs) -> FastWeightAttention | SoftmaxAttention | RelativeAttention:
        """The attention layer of one block."""
        sizes = (self.d_model, self.num_heads, self.head_size)
        shared: dict[str, Any] = {"kernel_init": INIT, "dtype": jnp.dtype(self.dtype), "rngs": rngs}
        if self.positions == "relative":
            return RelativeAttention(*sizes, self.memory_length, self.clamp_length, **shared)
        if self.memory_rule is None:
            return SoftmaxAttention(*sizes, **shared)
        return FastWeightAttention(
            *sizes,
            num_value_heads=self.num_value_heads,
            **features(self, self.head_size, rngs),
            rule=self.rule,
            normalize=self.normalize,
            eps=self.eps,
            output_scale=self.head_size**-0.5 if self.output_scale is None else self.output_scale,
            conv_size=self.conv_size,
            implementation=self.implementation,
            sequence_axis=self.sequence_axis,
            **shared,
        )


def _init_scale(*args):
    """A function of the module, not a closure, because equal models must have equal attributes."""
    return 1 + INIT(*args)


class Block(nnx.Module):
    """An attention and a feed-forward layer, each with its residual connection and layer normalisation."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.attention = config.make_attention(rngs)
        self.feed_forward = FeedForward(config, rngs)
        self.attention_norm = layer_norm(config, rngs, scale_init=_init_scale)
        self.feed_forward_norm = layer_norm(config, rngs, scale_init=_init_scale)
        self.norm = config.norm
        self.dropout = config.dropout

    def __call__(self, x: jax.Array, memory, options: dict[str, Any], rngs: nnx.Rngs | None):
        """x ``[B, T, D]``, float32 -> the same, and the memory. ``options``: of the attention layer."""
        # The authors' toolkit adds the attention to the normalised x.
        x = sublayer_input(x, self.attention_norm, self.norm)
        if isinstance(self.attention, FastWeightAttention):
            options = options | {"rngs": rngs, "memory_every": options["memory_every"].value}
        y, memory = self.attention(x, memory, **options)
        x = residual(x, y, self.attention_norm, self.norm, self.dropout, rngs)
        y = self.feed_forward(sublayer_input(x, self.feed_forward_norm, self.norm), rngs)
        return residual(x, y, self.feed_forward_norm, self.norm, self.dropout, rngs), memory


class DecoderLM(nnx.Module):
    """A causal language model whose output matrix is its embedding.

    Attributes:
      embedding: ``[V, D]``; output_bias ``[V]``.
      cluster_kernel, cluster_bias: ``[c, D]`` and ``[c]``, of the adaptive softmax; None without.
      content_bias, position_bias: ``[H, head_size]``, of positions "relative"; None without.
      blocks: of type ``Block``.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        check_rngs(rngs)

        def drawn(*shape):
            return nnx.Param(INIT(rngs.params(), shape, jnp.float32))

        clusters, relative = len(config.cutoffs), config.positions == "relative"
        self.config = config
        self.embedding = drawn(config.vocab_size, config.d_model)
        self.output_bias = nnx.Param(jnp.zeros(config.vocab_size, jnp.float32))
        self.cluster_kernel = drawn(clusters, config.d_model) if clusters else None
        self.cluster_bias = nnx.Param(jnp.zeros(clusters, jnp.float32)) if clusters else None
        self.content_bias = drawn(config.num_heads, config.head_size) if relative else None
        self.position_bias = drawn(config.num_heads, config.head_size) if relative else None
        self.blocks = nnx.List([Block(config, rngs) for _ in range(config.num_layers)])

    def __call__(self, tokens, memory=None, *, segment_ids=None, lengths=None, memory_every=None, rngs=None):
        """Log-probabilities of the token after each.

        Args:
          tokens: integers ``[B, T]``, from 0 to V − 1. Numbers that are not traced are checked, which waits for the
            device; of traced ones (``jax.jit``) another number gives NaN.
          memory: the memories of an earlier call, a tuple with one for each block; empty if not given. Fast weights may
            have an axis N behind B: a memory for each segment, whose ids are then from 0 to N − 1. Not with conv_size.
          segment_ids: integers ``[B, T]``, see ``fast_weight_attention``. Positions count on across segments. Padding
            in front has a segment id of its own, e.g. 0 for padding and 1 for the text. The first token of the text
            drops the padding, and later results do not depend on it.
          lengths: integers ``[B]`` from 0 to T, for padding behind: the results of row b's first ``lengths[b]`` tokens
            and its memories are those of the row cut there. T for all rows if not given. Give padding targets below 0.
          memory_every: N: returns the memories after every N tokens and after the last one, with an axis ⌈T/N⌉ behind
            B. Not for softmax attention: to take tokens back from its cache, set its lengths back.
          rngs: for dropout and the projections of "favor_plus" (streams "dropout" and "projection", or "default").
            Evaluation leaves it out.

        Returns:
          ``[B, T, V]``, float32, and the memories.

        Raises:
          ValueError: tokens that are not integers ``[B, T]`` from 0 to V − 1, another number of memories than blocks.
        """
        options = {"segment_ids": segment_ids, "lengths": lengths, "memory_every": memory_every}
        x, memory = self.hidden(tokens, memory, **options, rngs=rngs)
        return self.log_probabilities(x), memory

    def losses(self, tokens, targets, memory=None, *, segment_ids=None, lengths=None, rngs=None):
        """−log p of ``targets`` after each token: ``[B, T]``, float32, and the memories.

        The loss of a negative target (−1, −100) is 0 and has no gradient: a mean over tokens must not count it, as
        ``jnp.sum(losses) / jnp.sum(targets >= 0)``.

        Args:
          targets: integers ``[B, T]``, up to V − 1. Where they are traced, a larger one gives NaN.
          tokens, memory, segment_ids, lengths, rngs: as in ``__call__``. For the cost of the output layer see
            ``output_layer.losses``.

        Raises:
          ValueError: targets that are not integers of the shape of tokens, or known to be above V − 1; and as
            ``__call__``.
        """
        last = self.config.vocab_size - 1
        tokens = arguments.integers("tokens", tokens, last)
        options = {"axes": f"as tokens, {list(tokens.shape)}", "shape": tokens.shape, "least": None}
        targets = arguments.integers("targets", targets, last, **options)
        x, memory = self.hidden(tokens, memory, segment_ids=segment_ids, lengths=lengths, rngs=rngs)
        return self.losses_of(x, targets), memory

    def losses_of(self, hidden, targets):
        """The losses of ``targets``, ``[B, T]``, float32, from (a part of) the result of ``hidden``, ``[B, T, D]``.

        Targets and errors as in ``losses``.
        """
        return output_layer.losses(hidden.astype(self.config.dtype), targets, self._output(), self.config.cutoffs)

    def hidden(self, tokens, memory=None, *, segment_ids=None, lengths=None, memory_every=None, rngs=None):
        """The input of the output layer, ``[B, T, D]``, and the memories. Arguments as in ``__call__``."""
        config = self.config
        tokens = arguments.integers("tokens", tokens, config.vocab_size - 1)
        x = output_layer.embed(self.embedding[...], tokens) * config.d_model**0.5
        batch, length = tokens.shape
        if lengths is not None:
            lengths = arguments.integers("lengths", lengths, length, axes=f"[B] = [{batch}]", shape=(batch,))
        if config.positions == "descending":
            followers = jnp.arange(length, dtype=jnp.int32)[::-1][None]
            if lengths is not None:
                followers = jnp.maximum(followers - length + lengths[:, None], 0)
            x = x + sinusoids(followers, config.d_model)
        x = dropout(x, config.dropout, rngs)
        options: dict[str, Any] = {"segment_ids": segment_ids, "lengths": lengths}
        if config.memory_rule is not None:
            options["memory_every"] = Static(memory_every)
        elif memory_every is not None:
            raise ValueError(
                f"memory_every is for fast weights, got {memory_every} with rule={config.rule!r}; "
                "leave it out, and set the lengths of a cache back to take tokens back"
            )
        if config.positions == "relative":
            options = self._relative_options(length, segment_ids, lengths, rngs)
        memory = (None,) * config.num_layers if memory is None else memory
        if len(memory) != config.num_layers:
            raise ValueError(f"memory must have one for each of {config.num_layers} blocks, got {len(memory)}")

        block_rngs = rngs if config.draws else None
        x, memories = through_blocks(self.blocks, x, memory, options, block_rngs, scan=config.scan, remat=config.remat)
        return dropout(x, config.dropout, rngs), memories

    def log_probabilities(self, hidden):
        """log p ``[..., V]``, float32, from the result of ``hidden``, ``[..., D]``."""
        return output_layer.log_probabilities(hidden.astype(self.config.dtype), self._output(), self.config.cutoffs)

    def init_memory(self, batch_size: int, max_length: int | None = None):
        """Empty memories of all blocks. max_length: the number of tokens that a cache of softmax attention holds; other
        memories do not need it."""
        return tuple(block.attention.init_memory(batch_size, max_length) for block in self.blocks)

    def _relative_options(self, num_tokens, segment_ids, lengths, rngs):
        if segment_ids is not None or lengths is not None:
            raise ValueError(
                'segment_ids and lengths are not for positions="relative", whose memory is not cut; leave them out'
            )
        attention = self.blocks[0].attention
        assert isinstance(attention, RelativeAttention)
        assert self.content_bias is not None and self.position_bias is not None
        positions = sinusoids(attention.distances(num_tokens), self.config.d_model)
        return {
            "positions": dropout(positions, self.config.dropout, rngs),
            "content_bias": self.content_bias[...],
            "position_bias": self.position_bias[...],
        }

    def _output(self):
        if self.cluster_kernel is None or self.cluster_bias is None:
            return self.embedding[...], self.output_bias[...]
        return self.embedding[...], self.output_bias[...], self.cluster_kernel[...], self.cluster_bias[...]
