"""The translation models of Schlag, Irie & Schmidhuber 2021 (section 6.2): a Transformer with any attention.

    model = EncoderDecoder(TranslationConfig(vocab_size=8000), rngs=nnx.Rngs(0))
    losses = model.losses(source, targets, label_smoothing=0.1)     # [B, T]: training
    memory = model.encode(source, max_length=100)                   # decoding: the source is read once,
    hidden, memory = model.decode(tokens, memory)                   # then any number of tokens at a time

Letters: B sentences, S tokens of the source, T of the target, V vocabulary, D d_model, R hypotheses for each sentence.
"""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from fwt_jax import output_layer
from fwt_jax.cross_attention import CrossAttention
from fwt_jax.layers import FastWeightAttention, FavorPlus, SoftmaxAttention
from fwt_jax.models import FEATURE_MAPS, FeedForward, dropout, features, sinusoids, through_blocks


@dataclasses.dataclass(frozen=True)
class Attention:
    """How one of the three attentions of a translation model works.

    Attributes:
      rule: "softmax", or the rule of a fast weight memory: "sum", and "delta" in the decoder's self-attention.
      feature_map, feature_size, feature_normalization: as in ``ModelConfig``, but that "favor_plus" estimates the
        kernel of softmax attention, exp(kᵀq / √D): x is divided by D^¼, and nothing is added to its features.
      normalize, eps: attention normalisation, see ``fast_weight_attention``; eps is above 0.

    Raises:
      ValueError: an unknown name, a feature_size below 1, an eps of 0, features for softmax, "delta" with features that
        are not normalised: with those of long keys the delta rule diverges (section 4.2).

    Example:
      >>> delta = Attention("delta", feature_normalization="sum", normalize=False)
    """

    rule: Literal["softmax", "sum", "delta"] = "softmax"
    feature_map: str = "elu_plus_one"
    feature_size: int = 1
    feature_normalization: Literal[None, "sum", "l2"] = None
    normalize: Literal[False, "read"] = "read"
    eps: float = 1e-6

    def __post_init__(self):
        for name, options in (
            ("rule", ("softmax", "sum", "delta")),
            ("feature_map", FEATURE_MAPS),
            ("feature_normalization", (None, "sum", "l2")),
            ("normalize", (False, "read")),
        ):
            if getattr(self, name) not in options:
                raise ValueError(f"{name} must be one of {', '.join(map(repr, options))}, got {getattr(self, name)!r}")
        if self.feature_size < 1:
            raise ValueError(f"feature_size must be at least 1, got {self.feature_size}")
        if not self.eps > 0:
            raise ValueError(f"eps must be above 0, for sentences that are padding alone, got {self.eps}")
        if self.rule == "delta" and self.feature_normalization is None:
            raise ValueError(
                'rule "delta" diverges with features that are not normalised, got feature_normalization=None; '
                'take "sum", with normalize=False, or "l2"'
            )
        others = [f.name for f in dataclasses.fields(self)[1:] if getattr(self, f.name) != f.default]
        if self.rule == "softmax" and others:
            raise ValueError(
                f'rule "softmax" has no features to which {", ".join(others)} could apply; take rule "sum"'
            )


@dataclasses.dataclass(frozen=True)
class TranslationConfig:
    """A Transformer with encoder and decoder. The defaults are the base model of Vaswani et al. 2017.

    Attributes:
      vocab_size: V, of both languages together.
      encoder_layers, decoder_layers, d_model, d_ff, num_heads: num_heads divides d_model; d_model is even.
      encoder, decoder, cross: the attention among the tokens of the source, among those of the target (causal), and
        from target to source.
      norm: where the layer normalisations are: "post" (after the residual connection) or "pre" (inside of it, and one
        at the end of encoder and decoder).
      dropout: rate, after the embeddings and after each sublayer.
      remat, scan: as in ``ModelConfig``.
      dtype: as in ``ModelConfig``.
      pad_id, bos_id, eos_id: tokens of the vocabulary: padding, and what stands before and after each sentence.

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
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.d_model % self.num_heads or self.d_model % 2:
            raise ValueError(f"d_model must be even and a multiple of num_heads {self.num_heads}, got {self.d_model}")
        for name in ("encoder", "decoder", "cross"):
            if not isinstance(getattr(self, name), Attention):
                raise ValueError(f'{name} must be an Attention, as Attention("sum"), got {getattr(self, name)!r}')
            if name != "decoder" and getattr(self, name).rule == "delta":
                raise ValueError(
                    f'{name}.rule must be "softmax" or "sum", got "delta", which depends on the order in which the '
                    "source is written; only the decoder's attention is causal"
                )
        for name, options in (("norm", ("post", "pre")), ("dtype", ("float32", "bfloat16"))):
            if getattr(self, name) not in options:
                raise ValueError(f"{name} must be one of {', '.join(map(repr, options))}, got {getattr(self, name)!r}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")
        special = (self.pad_id, self.bos_id, self.eos_id)
        if len(set(special)) < 3 or not all(0 <= token < self.vocab_size for token in special):
            raise ValueError(
                f"pad_id, bos_id and eos_id must be three tokens of the vocabulary of {self.vocab_size}, got {special}"
            )

    @property
    def head_size(self) -> int:
        """Of all attentions."""
        return self.d_model // self.num_heads

    @property
    def draws(self) -> bool:
        """Whether the blocks draw random numbers where they are given rngs."""
        attentions = (self.encoder, self.decoder, self.cross)
        return self.dropout > 0 or any(attention.feature_map == "favor_plus" for attention in attentions)

    def make_attention(
        self, place: Literal["encoder", "decoder", "cross"], rngs: nnx.Rngs
    ) -> FastWeightAttention | SoftmaxAttention | CrossAttention:
        """One attention layer; that of the decoder is causal."""
        options, causal = getattr(self, place), place == "decoder"
        sizes = (self.d_model, self.num_heads, self.head_size)
        shared = {"kernel_init": INIT, "use_bias": True, "dtype": jnp.dtype(self.dtype), "rngs": rngs}
        if options.rule == "softmax":
            return SoftmaxAttention(*sizes, **shared) if causal else CrossAttention(*sizes, **shared)
        of_features = SimpleNamespace(head_size=self.head_size, **dataclasses.asdict(options))
        shared |= features(of_features, rngs, _SoftmaxFeatures)
        kind = FastWeightAttention if causal else CrossAttention
        return kind(*sizes, rule=options.rule, normalize=options.normalize, eps=options.eps, **shared)


class _SoftmaxFeatures(FavorPlus):
    """FAVOR+ of x / D^¼: E[φ(k)ᵀφ(q)] = exp(kᵀq / √D), as softmax attention weighs (Choromanski et al. 2021)."""

    def __call__(self, x, projection=None):
        return super().__call__(x * self.head_size**-0.25, projection)


INIT = nnx.initializers.xavier_uniform()


class _Sublayers(nnx.Module):
    """Residual connections with layer normalisation before ("pre") or after ("post") them."""

    def __init__(self, config: TranslationConfig, rngs: nnx.Rngs, count: int):
        self.norms = nnx.List([_layer_norm(config, rngs) for _ in range(count)])
        self.feed_forward = FeedForward(config, rngs, kernel_init=INIT, dropout=0.0)
        self.pre, self.dropout = config.norm == "pre", config.dropout

    def _add(self, index, x, sublayer, rngs):
        """x and what ``sublayer`` makes of it."""
        norm = self.norms[index]
        y = sublayer(norm(x) if self.pre else x).astype(jnp.float32)
        x = x + dropout(y, self.dropout, rngs)
        return x if self.pre else norm(x)


class EncoderBlock(_Sublayers):
    """Attention among all tokens of the source, and a feed-forward layer."""

    def __init__(self, config: TranslationConfig, rngs: nnx.Rngs):
        super().__init__(config, rngs, 2)
        self.attention = config.make_attention("encoder", rngs)

    def __call__(self, x: jax.Array, mask: jax.Array, rngs: nnx.Rngs | None = None) -> jax.Array:
        """x ``[B, S, D]``, float32, and its mask ``[B, S]`` -> the same."""
        x = self._add(0, x, lambda x: self.attention(x, x, mask, rngs=rngs), rngs)
        return self._add(1, x, self.feed_forward, rngs)


class Encoded(NamedTuple):
    """What an encoder made of sentences, ``[B, S, D]``, and where they are not padding, ``[B, S]``."""

    states: jax.Array
    mask: jax.Array


class DecoderBlock(_Sublayers):
    """Causal attention among the tokens of the target, attention to the source, and a feed-forward layer."""

    def __init__(self, config: TranslationConfig, rngs: nnx.Rngs):
        super().__init__(config, rngs, 3)
        self.attention = config.make_attention("decoder", rngs)
        self.cross_attention = config.make_attention("cross", rngs)

    def __call__(self, x: jax.Array, memory: Any, source: Any, rngs: nnx.Rngs | None = None):
        """x ``[N, T, D]``, float32, the memory of what came before, the source (``Encoded``, or what
        ``cross_attention.write`` made of it) -> x, memory."""

        def read_self(x):
            nonlocal memory
            y, memory = self.attention(x, memory, rngs=rngs)
            return y

        def read_source(x):
            if isinstance(source, Encoded):
                return self.cross_attention(x, *source, rngs=rngs)
            sentences = len(jax.tree.leaves(source)[0])
            # To attention that is not causal, the hypotheses of a sentence are tokens that read.
            return self.cross_attention.read(x.reshape(sentences, -1, x.shape[-1]), source).reshape(x.shape)

        x = self._add(0, x, read_self, rngs)
        x = self._add(1, x, read_source, rngs)
        return self._add(2, x, self.feed_forward, rngs), memory


class TranslationMemory(NamedTuple):
    """What decoding takes along.

    Attributes:
      position: tokens of the target so far, int32 ``[]``. To take tokens back, set it back with the caches' lengths.
      decoder: for each block the memory of its self-attention, ``[B·R, ...]``: what differs between hypotheses.
      source: for each block that of the source, ``[B, ...]``, which the hypotheses of a sentence share.
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
        self.config = config
        init = nnx.initializers.normal(config.d_model**-0.5)
        self.embedding = nnx.Param(init(rngs.params(), (config.vocab_size, config.d_model), jnp.float32))
        self.encoder = nnx.List([EncoderBlock(config, rngs) for _ in range(config.encoder_layers)])
        self.decoder = nnx.List([DecoderBlock(config, rngs) for _ in range(config.decoder_layers)])
        self.encoder_norm = _layer_norm(config, rngs) if config.norm == "pre" else None
        self.decoder_norm = _layer_norm(config, rngs) if config.norm == "pre" else None

    def __call__(self, source: jax.Array, tokens: jax.Array, *, rngs: nnx.Rngs | None = None) -> jax.Array:
        """log p of the token of the target after each.

        Args:
          source: integers ``[B, S]`` from 0 to V − 1, padded with pad_id behind. Numbers that are not traced are
            checked, which waits for the device; of traced ones (``jax.jit``) another number gives NaN.
          tokens: integers ``[B, T]`` from 0 to V − 1, as the source: bos_id and the target.
          rngs: for dropout and the projections of "favor_plus", see ``DecoderLM``; without: evaluation.

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

        The logits exist for 256 tokens at a time.

        Args:
          source, rngs: as in ``__call__``.
          targets: integers ``[B, T]``, up to V − 1, that end with eos_id, then padding; bos_id is put before them here.
            A negative one (−1, −100) is not learnt: it costs 0, without gradient, and the decoder reads pad_id in its
            place. A mean over tokens must count neither it nor padding. Where they are traced, one above V − 1 gives
            NaN.
          label_smoothing: ε, from 0 to 1, a number that is not traced.

        Raises:
          ValueError: as ``__call__``; targets known to be above V − 1; a label_smoothing outside of its range.
        """
        label_smoothing, pad_id = float(label_smoothing), self.config.pad_id
        if not 0 <= label_smoothing <= 1:
            raise ValueError(f"label_smoothing must be from 0 to 1, got {label_smoothing}")
        targets = self._tokens("targets", targets, least=None)
        read = jnp.where(targets < 0, pad_id, targets)
        bos = jnp.full((len(read), 1), self.config.bos_id, read.dtype)
        hidden = self._hidden(source, jnp.concatenate([bos, read[:, :-1]], axis=1), rngs)
        counts = read != pad_id
        losses = output_layer.losses(hidden, jnp.where(counts, targets, -1), self._output())
        if label_smoothing:
            # −log p(v) differs from −log p(target) by the difference of their logits, whose mean needs no logits.
            centred = output_layer.embed(self.embedding[...], read) - jnp.mean(self.embedding[...], axis=0)[None, None]
            smoothing = jnp.sum(jnp.where(counts[..., None], hidden, 0.0) * centred, axis=-1)
            losses += label_smoothing * smoothing
        return losses

    def encode(self, source: jax.Array, max_length: int, hypotheses: int = 1) -> TranslationMemory:
        """Reads the source, for decoding.

        Args:
          source: as in ``__call__``.
          max_length: tokens of the target that softmax attention has room for.
          hypotheses: R, in which each sentence is translated at once.

        Raises:
          ValueError: a source as in ``__call__``, numbers below 1.
        """
        if min(max_length, hypotheses) < 1:
            raise ValueError(f"max_length and hypotheses must be at least 1, got {max_length} and {hypotheses}")
        source = self._tokens("source", source)
        encoded = self._encode(source, None)
        sources = tuple(block.cross_attention.write(*encoded) for block in self.decoder)
        rows = len(source) * hypotheses
        size = (rows, max_length) if self.config.decoder.rule == "softmax" else (rows,)
        memories = tuple(block.attention.init_memory(*size) for block in self.decoder)
        return TranslationMemory(jnp.zeros((), jnp.int32), memories, sources)

    def decode(self, tokens: jax.Array, memory: TranslationMemory) -> tuple[jax.Array, TranslationMemory]:
        """What the output layer sees after more tokens, ``[B·R, T, D]``, and the memory after them.

        Args:
          tokens: integers ``[B·R, T]`` from 0 to V − 1, the hypotheses of a sentence one after another; T = 1 unless
            R = 1.
          memory: what ``encode`` or an earlier call returned.

        Raises:
          ValueError: tokens that are not integers of these shapes, of other rows than the memory's.
        """
        tokens = self._tokens("tokens", tokens)
        rows, sentences = (len(jax.tree.leaves(part)[0]) for part in (memory.decoder, memory.source))
        if len(tokens) != rows:
            raise ValueError(f"tokens must have the {rows} rows of the memory, got {len(tokens)}")
        if rows != sentences and tokens.shape[1] != 1:
            raise ValueError(f"several hypotheses of a sentence take one token at a time, got {list(tokens.shape)}")
        hidden, after = self._decode(tokens, memory.position, memory.decoder, memory.source, None)
        return hidden, TranslationMemory(memory.position + tokens.shape[1], after, memory.source)

    def log_probabilities(self, hidden: jax.Array) -> jax.Array:
        """What ``decode`` returns, ``[..., D]``, to log p ``[..., V]``, float32."""
        return output_layer.log_probabilities(hidden, self._output())

    def _hidden(self, source, tokens, rngs):
        source, tokens = self._tokens("source", source), self._tokens("the target", tokens)
        if len(tokens) != len(source):
            raise ValueError(f"source and target must have as many rows, got {len(source)} and {len(tokens)}")
        encoded = self._encode(source, rngs)
        return self._decode(tokens, 0, (None,) * len(self.decoder), encoded, rngs)[0]

    def _encode(self, source, rngs):
        mask = source != self.config.pad_id
        x = self._embed(source, 0, rngs)

        x, _ = self._through(_read_source, self.encoder, x, (None,) * len(self.encoder), mask, rngs)
        return Encoded(x if self.encoder_norm is None else self.encoder_norm(x), mask)

    def _decode(self, tokens, position, memory, sources, rngs):
        encoded = sources if isinstance(sources, Encoded) else None
        taken = tuple(zip(memory, sources if encoded is None else (None,) * len(memory), strict=True))
        x, memories = self._through(
            _read_target, self.decoder, self._embed(tokens, position, rngs), taken, encoded, rngs
        )
        return x if self.decoder_norm is None else self.decoder_norm(x), memories

    def _embed(self, tokens, position, rngs):
        x = output_layer.embed(self.embedding[...], tokens) * self.config.d_model**0.5
        positions = position + jnp.arange(tokens.shape[1], dtype=jnp.int32)
        return dropout(x + sinusoids(positions, self.config.d_model)[None], self.config.dropout, rngs)

    def _tokens(self, name, x, least=0):
        return output_layer.integers(name, x, self.config.vocab_size - 1, axes="[rows ≥ 1, length ≥ 1]", least=least)

    def _through(self, call, blocks, x, memories, shared, rngs):
        how = {"scan": self.config.scan, "remat": self.config.remat}
        return through_blocks(call, blocks, x, memories, shared, rngs if self.config.draws else None, **how)

    def _output(self):
        return self.embedding[...], jnp.zeros(self.config.vocab_size, jnp.float32)


def _read_source(block, x, before, mask, rngs):
    return block(x, mask, rngs), before


def _read_target(block, x, before, encoded, rngs):
    memory, source = before
    return block(x, memory, source if encoded is None else encoded, rngs)


def _layer_norm(config, rngs):
    return nnx.LayerNorm(config.d_model, epsilon=1e-5, use_fast_variance=False, rngs=rngs)
