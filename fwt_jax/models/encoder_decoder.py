"""The translation models of Schlag, Irie & Schmidhuber 2021 (section 6.2): a Transformer with any attention.

    model = EncoderDecoder(TranslationConfig(vocab_size=8000), rngs=nnx.Rngs(0))
    losses = model.losses(source, targets, label_smoothing=0.1)     # [B, T]: training
    memory = model.encode(source, max_length=100)                   # decoding: reads the source once,
    hidden, memory = model.decode(tokens, memory)                   # then any number of tokens per call

Letters: B sentences, S tokens of the source, T of the target, V vocabulary, D d_model, R hypotheses for each sentence.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, NamedTuple, overload

import jax
import jax.numpy as jnp
from flax import nnx

from fwt_jax import arguments
from fwt_jax.layers import CrossAttention, Decay, FastWeightAttention, FavorPlus, SoftmaxAttention
from fwt_jax.layers.common import check_rngs
from fwt_jax.models import output_layer
from fwt_jax.models.blocks import (
    FEATURE_MAPS,
    FeedForward,
    dropout,
    features,
    layer_norm,
    residual,
    sinusoids,
    sublayer_input,
    through_blocks,
)
from fwt_jax.rules import Rule, find_rule, name_of

INIT = nnx.initializers.xavier_uniform()


@dataclasses.dataclass(frozen=True)
class Attention:
    """How one of the three attentions of a translation model works.

    Attributes:
      rule: "softmax" or "sum"; in the decoder's self-attention also any other rule of a fast weight memory.
      feature_map, feature_size, feature_normalization: as in ``ModelConfig``. Only "favor_plus" differs: it estimates
        the kernel of softmax attention, exp(kᵀq / √D). So x is divided by D^¼, and nothing is added to the features.
      normalize, eps: attention normalisation, see ``fast_weight_attention``; eps is above 0.
      decay: whether the memory decays, by a factor for each head from x (``layers.Decay``); only in the decoder's
        self-attention. With rule "delta" it is the gated delta rule (Yang et al. 2025).

    Raises:
      ValueError: an unknown name, a feature_size below 1, an eps of 0, features or a decay for softmax, or "delta" with
        features that are not normalised, because the delta rule diverges with features of long keys (section 4.2).

    Example:
      >>> from fwt_jax.models import Attention
      >>> delta = Attention("delta", feature_normalization="sum", normalize=False)
    """

    rule: str | Rule = "softmax"
    feature_map: str = "elu_plus_one"
    feature_size: int = 1
    feature_normalization: Literal[None, "sum", "l2"] = None
    normalize: Literal[False, "read"] = "read"
    eps: float = 1e-6
    decay: bool = False

    def __post_init__(self):
        arguments.one_of(FEATURE_MAPS, feature_map=self.feature_map)
        arguments.one_of((None, "sum", "l2"), feature_normalization=self.feature_normalization)
        arguments.one_of((False, "read"), normalize=self.normalize)
        arguments.at_least(1, feature_size=self.feature_size)
        if not self.eps > 0:
            raise ValueError(f"eps must be above 0, because a sentence may be padding alone, got {self.eps}")
        rule = self.memory_rule
        if rule is not None and rule.corrects and self.feature_normalization is None:
            raise ValueError(
                f"rule {name_of(rule)} diverges with features that are not normalised, got feature_normalization=None; "
                'take "sum", with normalize=False, or "l2"'
            )
        _, *memory_options = dataclasses.fields(self)
        changed = [field.name for field in memory_options if getattr(self, field.name) != field.default]
        if rule is None and changed:
            raise ValueError(f'rule "softmax" has no memory to which {", ".join(changed)} could apply; take rule "sum"')

    @property
    def memory_rule(self) -> Rule | None:
        """The rule of the fast weight memory; None with softmax attention."""
        return find_rule(self.rule, others=("softmax",))


@dataclasses.dataclass(frozen=True)
class TranslationConfig:
    """A Transformer with encoder and decoder. The defaults are the base model of Vaswani et al. 2017.

    Attributes:
      vocab_size: V, of both languages together.
      encoder_layers, decoder_layers, d_model, d_ff, num_heads: num_heads divides d_model; d_model is even.
      encoder, decoder, cross: the attention of source to source, of target to target (causal), and of target to source.
      norm: layer normalisation after each residual connection ("post"), or before each sublayer and at the end of
        encoder and decoder ("pre").
      dropout: rate, after the embeddings and after each sublayer.
      remat, scan: as in ``ModelConfig``.
      dtype: as in ``ModelConfig``.
      pad_id, bos_id, eos_id: tokens of the vocabulary: padding, and the marks of a sentence's begin and end.

    Raises:
      ValueError: an unknown name, a size below 1, heads that do not divide d_model, a rule that an encoder or
        cross-attention cannot have, special tokens that are not three of the vocabulary.
    """

    vocab_size: int
    encoder_layers: int = 6
    decoder_layers: int = 6
    d_model: int = 512
    d_ff: int = 2048
    num_heads: int = 8
    encoder: Attention = Attention()
    decoder: Attention = Attention()
    cross: Attention = Attention()
    norm: Literal["post", "pre"] = "post"
    dropout: float = 0.1
    remat: bool = False
    scan: bool = False
    dtype: Literal["float32", "bfloat16"] = "float32"
    pad_id: int = 0
    bos_id: int = 2
    eos_id: int = 3

    def __post_init__(self):
        for name in ("vocab_size", "encoder_layers", "decoder_layers", "d_model", "d_ff", "num_heads"):
            arguments.at_least(1, **{name: getattr(self, name)})
        if self.d_model % self.num_heads or self.d_model % 2:
            raise ValueError(f"d_model must be even and a multiple of num_heads {self.num_heads}, got {self.d_model}")
        for name in ("encoder", "decoder", "cross"):
            attention = getattr(self, name)
            if not isinstance(attention, Attention):
                raise ValueError(f'{name} must be an Attention, as Attention("sum"), got {attention!r}')
            rule = attention.memory_rule
            if name != "decoder" and rule is not None and rule.corrects is not False:
                raise ValueError(
                    f'{name}.rule must be "softmax" or "sum", got {name_of(rule)}, which depends on the order in which '
                    "the source is written; only the decoder's attention is causal"
                )
            if name != "decoder" and attention.decay:
                raise ValueError(
                    f"{name}.decay must be False, got True: a decay depends on the order in which the source is "
                    "written; only the decoder's attention is causal"
                )
        arguments.one_of(("post", "pre"), norm=self.norm)
        arguments.one_of(("float32", "bfloat16"), dtype=self.dtype)
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")
        special = (self.pad_id, self.bos_id, self.eos_id)
        if len(set(special)) < 3 or not all(0 <= token < self.vocab_size for token in special):
            raise ValueError(
                f"pad_id, bos_id and eos_id must be three tokens of the vocabulary of {self.vocab_size}, got {special}"
            )

    @property
    def head_size(self) -> int:
        """The size of a query, key or value in all attentions."""
        return self.d_model // self.num_heads

    @property
    def draws(self) -> bool:
        """Whether the blocks draw random numbers when they are given rngs."""
        attentions = (self.encoder, self.decoder, self.cross)
        return self.dropout > 0 or any(attention.feature_map == "favor_plus" for attention in attentions)

    @overload
    def make_attention(self, place: Literal["decoder"], rngs: nnx.Rngs) -> FastWeightAttention | SoftmaxAttention: ...

    @overload
    def make_attention(self, place: Literal["encoder", "cross"], rngs: nnx.Rngs) -> CrossAttention: ...

    def make_attention(self, place, rngs):
        """One attention layer; the decoder's is causal."""
        attention: Attention = getattr(self, place)
        sizes = (self.d_model, self.num_heads, self.head_size)
        options: dict[str, Any] = {"kernel_init": INIT, "use_bias": True, "dtype": jnp.dtype(self.dtype), "rngs": rngs}
        if attention.memory_rule is None:
            return SoftmaxAttention(*sizes, **options) if place == "decoder" else CrossAttention(*sizes, **options)
        options |= features(attention, self.head_size, rngs, _SoftmaxFeatures)
        options |= {"rule": attention.rule, "normalize": attention.normalize, "eps": attention.eps}
        return FastWeightAttention(*sizes, **options) if place == "decoder" else CrossAttention(*sizes, **options)

    def make_decay(self, rngs: nnx.Rngs) -> Decay:
        """The decay of the memory of the decoder's self-attention."""
        return Decay(self.d_model, self.num_heads, kernel_init=INIT, dtype=jnp.dtype(self.dtype), rngs=rngs)


class _SoftmaxFeatures(FavorPlus):
    """FAVOR+ of x / D^¼: E[φ(k)ᵀφ(q)] = exp(kᵀq / √D), as softmax attention weighs (Choromanski et al. 2021)."""

    def __call__(self, x, projection=None):
        return super().__call__(x * self.head_size**-0.25, projection)


class _Sublayers(nnx.Module):
    """Residual connections with layer normalisation before ("pre") or after ("post") them."""

    def __init__(self, config: TranslationConfig, rngs: nnx.Rngs, count: int):
        self.norms = nnx.List([layer_norm(config, rngs) for _ in range(count)])
        self.feed_forward = FeedForward(config, rngs, kernel_init=INIT, dropout=0.0)
        self.norm = config.norm
        self.dropout = config.dropout

    def _input(self, index, x):
        return sublayer_input(x, self.norms[index], self.norm)

    def _add(self, index, x, y, rngs):
        return residual(x, y, self.norms[index], self.norm, self.dropout, rngs)


class EncoderBlock(_Sublayers):
    """Attention among all tokens of the source, and a feed-forward layer."""

    def __init__(self, config: TranslationConfig, rngs: nnx.Rngs):
        super().__init__(config, rngs, 2)
        self.attention = config.make_attention("encoder", rngs)

    def __call__(self, x: jax.Array, memory: None, mask: jax.Array, rngs: nnx.Rngs | None):
        """x ``[B, S, D]``, float32, and its mask ``[B, S]`` -> x. An encoder has no memory."""
        x_in = self._input(0, x)
        x = self._add(0, x, self.attention(x_in, x_in, mask, rngs=rngs), rngs)
        return self._add(1, x, self.feed_forward(self._input(1, x), rngs), rngs), memory


class Encoded(NamedTuple):
    """The states of an encoder, ``[B, S, D]``, and a mask ``[B, S]``, False for padding."""

    states: jax.Array
    mask: jax.Array


class DecoderBlock(_Sublayers):
    """Causal attention among the tokens of the target, attention to the source, and a feed-forward layer."""

    def __init__(self, config: TranslationConfig, rngs: nnx.Rngs):
        super().__init__(config, rngs, 3)
        self.attention = config.make_attention("decoder", rngs)
        self.decay = config.make_decay(rngs) if config.decoder.decay else None
        self.cross_attention = config.make_attention("cross", rngs)

    def __call__(self, x: jax.Array, memory: tuple[Any, Any], encoded: Encoded | None, rngs: nnx.Rngs | None):
        """Reads more tokens of the target.

        Args:
          x: ``[N, T, D]``, float32; N is B, or B·R in decoding.
          memory: the memory of the target, and the memory of the source, which ``cross_attention.write`` makes.
          encoded: the source, for training. Then the memory of the source is not used.

        Returns:
          x, and the memory of the target.
        """
        target, source = memory
        y, target = self._read_target(self._input(0, x), target, rngs)
        x = self._add(0, x, y, rngs)
        y = self._read_source(self._input(1, x), source, encoded, rngs)
        x = self._add(1, x, y, rngs)
        return self._add(2, x, self.feed_forward(self._input(2, x), rngs), rngs), target

    def _read_target(self, x, target, rngs):
        options: dict[str, Any] = {} if self.decay is None else {"log_decay": self.decay(x)}
        return self.attention(x, target, rngs=rngs, **options)

    def _read_source(self, x, source, encoded, rngs):
        if encoded is not None:
            return self.cross_attention(x, *encoded, rngs=rngs)
        # Cross-attention has no order among its queries. So the R hypotheses of a sentence share one source: they are
        # folded into the axis of the queries.
        sentences = len(jax.tree.leaves(source)[0])
        return self.cross_attention.read(x.reshape(sentences, -1, x.shape[-1]), source).reshape(x.shape)


class TranslationMemory(NamedTuple):
    """The state of decoding.

    Attributes:
      position: the number of tokens of the target so far, int32 ``[]``. To take tokens back, set it back with the
        lengths of the caches.
      decoder: for each block the memory of its self-attention, ``[B·R, ...]``, which differs between hypotheses.
      source: for each block the memory of the source, ``[B, ...]``, which the hypotheses of a sentence share.
    """

    position: jax.Array
    decoder: tuple[Any, ...]
    source: tuple[Any, ...]


class EncoderDecoder(nnx.Module):
    """A translation model; one embedding serves source, target and output (Vaswani et al. 2017, section 3).

    Attributes:
      embedding: ``[V, D]``.
      encoder, decoder: blocks; encoder_norm, decoder_norm: None with norm "post".
    """

    def __init__(self, config: TranslationConfig, *, rngs: nnx.Rngs):
        check_rngs(rngs)
        self.config = config
        init = nnx.initializers.normal(config.d_model**-0.5)
        self.embedding = nnx.Param(init(rngs.params(), (config.vocab_size, config.d_model), jnp.float32))
        self.encoder = nnx.List([EncoderBlock(config, rngs) for _ in range(config.encoder_layers)])
        self.decoder = nnx.List([DecoderBlock(config, rngs) for _ in range(config.decoder_layers)])
        self.encoder_norm = layer_norm(config, rngs) if config.norm == "pre" else None
        self.decoder_norm = layer_norm(config, rngs) if config.norm == "pre" else None

    def __call__(self, source: jax.Array, tokens: jax.Array, *, rngs: nnx.Rngs | None = None) -> jax.Array:
        """log p of the next token of the target, after each token.

        Args:
          source: integers ``[B, S]`` from 0 to V − 1, padded with pad_id behind. Numbers that are not traced are
            checked, which waits for the device; of traced ones (``jax.jit``) another number gives NaN.
          tokens: integers ``[B, T]`` from 0 to V − 1, as the source: bos_id and the target.
          rngs: for dropout and the projections of "favor_plus", see ``DecoderLM``. Evaluation leaves it out.

        Returns:
          ``[B, T, V]``, float32.

        Raises:
          ValueError: tokens that are not integers of two axes from 0 to V − 1, other numbers of sentences.
        """
        return self.log_probabilities(self._hidden(source, tokens, rngs))

    def losses(
        self, source: jax.Array, targets: jax.Array, *, label_smoothing: float = 0.0, rngs: nnx.Rngs | None = None
    ) -> jax.Array:
        """Cross-entropy of each token of the target: ``[B, T]``, float32; 0 for padding and for a negative target.

            (1 − ε)(−log p(target)) + ε/V Σ_v (−log p(v))       Szegedy et al. 2016, section 7

        The logits exist for one block of words at a time, see ``output_layer.losses``.

        Args:
          source, rngs: as in ``__call__``.
          targets: integers ``[B, T]``, up to V − 1, that end with eos_id, then padding. This method puts bos_id before
            them. A negative target (−1, −100) is not learnt: it costs 0, without gradient, and the decoder reads pad_id
            in its place. A mean over tokens must count neither it nor padding. A traced one above V − 1 gives NaN.
          label_smoothing: ε, from 0 to 1, a number that is not traced.

        Raises:
          ValueError: as ``__call__``; targets known to be above V − 1; a label_smoothing outside of its range.
        """
        label_smoothing = float(label_smoothing)
        if not 0 <= label_smoothing <= 1:
            raise ValueError(f"label_smoothing must be from 0 to 1, got {label_smoothing}")
        pad_id = self.config.pad_id
        targets = self._tokens("targets", targets, least=None)
        words = jnp.where(targets < 0, pad_id, targets)
        bos = jnp.full((len(words), 1), self.config.bos_id, words.dtype)
        hidden = self._hidden(source, jnp.concatenate([bos, words[:, :-1]], axis=1), rngs)
        counts = words != pad_id
        losses = output_layer.losses(hidden.astype(self.config.dtype), jnp.where(counts, targets, -1), self._output())
        if label_smoothing:
            # −log p(v) differs from −log p(target) by the difference of their logits, whose mean needs no logits.
            centred = output_layer.embed(self.embedding[...], words) - jnp.mean(self.embedding[...], axis=0)[None, None]
            smoothing = jnp.sum(jnp.where(counts[..., None], hidden, 0.0) * centred, axis=-1)
            losses += label_smoothing * smoothing
        return losses

    def encode(self, source: jax.Array, max_length: int, hypotheses: int = 1) -> TranslationMemory:
        """Reads the source, for decoding.

        Args:
          source: as in ``__call__``.
          max_length: the number of tokens of the target that a cache of softmax attention holds.
          hypotheses: R, the number of translations of each sentence that are decoded together.

        Raises:
          ValueError: a source as in ``__call__``, numbers below 1.
        """
        if min(max_length, hypotheses) < 1:
            raise ValueError(f"max_length and hypotheses must be at least 1, got {max_length} and {hypotheses}")
        source = self._tokens("source", source)
        encoded = self._encode(source, None)
        sources = tuple(block.cross_attention.write(*encoded) for block in self.decoder)
        rows = len(source) * hypotheses
        memories = tuple(block.attention.init_memory(rows, max_length) for block in self.decoder)
        return TranslationMemory(jnp.zeros((), jnp.int32), memories, sources)

    def decode(self, tokens: jax.Array, memory: TranslationMemory) -> tuple[jax.Array, TranslationMemory]:
        """Reads more tokens of the target: the input of the output layer, ``[B·R, T, D]``, and the memory.

        Args:
          tokens: integers ``[B·R, T]`` from 0 to V − 1, the hypotheses of a sentence one after another; T = 1 unless
            R = 1.
          memory: the result of ``encode``, or the memory of an earlier call.

        Raises:
          ValueError: tokens that are not integers of these shapes, of other rows than the memory's.
        """
        tokens = self._tokens("tokens", tokens)
        rows = len(jax.tree.leaves(memory.decoder)[0])
        sentences = len(jax.tree.leaves(memory.source)[0])
        if len(tokens) != rows:
            raise ValueError(f"tokens must have the {rows} rows of the memory, got {len(tokens)}")
        if rows != sentences and tokens.shape[1] != 1:
            raise ValueError(f"several hypotheses of a sentence take one token at a time, got {list(tokens.shape)}")
        hidden, after = self._decode(tokens, memory, None, None)
        return hidden, TranslationMemory(memory.position + tokens.shape[1], after, memory.source)

    def log_probabilities(self, hidden: jax.Array) -> jax.Array:
        """log p ``[..., V]``, float32, from the hidden states of ``decode``, ``[..., D]``."""
        return output_layer.log_probabilities(hidden.astype(self.config.dtype), self._output())

    def _hidden(self, source, tokens, rngs):
        source, tokens = self._tokens("source", source), self._tokens("the target", tokens)
        if len(tokens) != len(source):
            raise ValueError(f"source and target must have as many rows, got {len(source)} and {len(tokens)}")
        no_memory = (None,) * len(self.decoder)
        start = TranslationMemory(jnp.zeros((), jnp.int32), no_memory, no_memory)
        return self._decode(tokens, start, self._encode(source, rngs), rngs)[0]

    def _encode(self, source, rngs):
        mask = source != self.config.pad_id
        x = self._embed(source, 0, rngs)
        x, _ = self._through(self.encoder, x, (None,) * len(self.encoder), mask, rngs)
        return Encoded(x if self.encoder_norm is None else self.encoder_norm(x), mask)

    def _decode(self, tokens, memory, encoded, rngs):
        x = self._embed(tokens, memory.position, rngs)
        x, after = self._through(self.decoder, x, tuple(zip(memory.decoder, memory.source, strict=True)), encoded, rngs)
        return x if self.decoder_norm is None else self.decoder_norm(x), after

    def _embed(self, tokens, position, rngs):
        x = output_layer.embed(self.embedding[...], tokens) * self.config.d_model**0.5
        positions = position + jnp.arange(tokens.shape[1], dtype=jnp.int32)
        return dropout(x + sinusoids(positions, self.config.d_model)[None], self.config.dropout, rngs)

    def _tokens(self, name, x, least: int | None = 0):
        return arguments.integers(name, x, self.config.vocab_size - 1, axes="[rows ≥ 1, length ≥ 1]", least=least)

    def _through(self, blocks, x, memories, shared, rngs):
        rngs = rngs if self.config.draws else None
        return through_blocks(blocks, x, memories, shared, rngs, scan=self.config.scan, remat=self.config.remat)

    def _output(self):
        return self.embedding[...], jnp.zeros(self.config.vocab_size, jnp.float32)
