"""``HybridLM``: today's language models, blocks of any mixer of tokens and any feed-forward layer.

    model = from_pretrained("folder")                   # of fwt_jax.convert: DeltaNet, Qwen3-Next, Kimi Linear, …
    logits, memory = model(tokens)                      # [B, T, V], and the memory for the next call
    losses, memory = model.losses(tokens, targets)      # [B, T], without the array of all logits

Letters: B batch, T tokens, V vocabulary, D d_model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from fwt_jax import arguments
from fwt_jax.layers.common import check_rngs
from fwt_jax.layers.grouped import GroupedQueryAttention
from fwt_jax.layers.latent import LatentAttention
from fwt_jax.layers.norms import RMSNorm
from fwt_jax.models import output_layer
from fwt_jax.models.blocks import INIT, Static, through_blocks


@dataclasses.dataclass(frozen=True)
class BlockConfig:
    """A block: a layer that mixes tokens, and a feed-forward layer.

    Attributes:
      mixer: makes a layer as ``DeltaNet``, from (d_model, dtype=, param_dtype=, kernel_init=, rngs=).
      feed_forward: makes a layer x ``[B, T, D]`` -> ``[B, T, D]``, from the same arguments.
      placement: "pre": x + layer(norm(x)); "post": x + norm(layer(x)).
    """

    mixer: Callable[..., Any]
    feed_forward: Callable[..., Any]
    placement: Literal["pre", "post"] = "pre"

    def __post_init__(self):
        arguments.one_of(("pre", "post"), placement=self.placement)


@dataclasses.dataclass(frozen=True)
class HybridConfig:
    """A language model of blocks.

    Equal configurations are compiled once, so make equal blocks of the same functions.

    Attributes:
      vocab_size, d_model: V and D.
      blocks: one ``BlockConfig`` for each.
      norm_eps, zero_centered: of every ``RMSNorm`` of the residual stream.
      tied: whether the output layer is the embedding.
      options: the text of the config.json that this model has on disk; "" for a model of your own.
      layout: how the names on disk differ from the published ones, see ``convert.families``.
      dtype: of the computation, "float32" or "bfloat16"; None: that of the parameters.
      param_dtype: of the parameters of a new model. Those of a checkpoint have the dtype that they have on disk.
      remat: recompute each block in the backward pass.
      scan: compile one block for all, by ``lax.scan``; for blocks that are all alike. None: if they are.
    """

    vocab_size: int
    d_model: int
    blocks: tuple[BlockConfig, ...]
    norm_eps: float = 1e-6
    zero_centered: bool = False
    tied: bool = False
    options: str = ""
    layout: frozenset[str] = frozenset()
    dtype: Literal[None, "float32", "bfloat16"] = None
    param_dtype: str = "float32"
    remat: bool = False
    scan: bool | None = None

    positions: ClassVar[None] = None  # nothing is added to the embedding, so that a memory goes from call to call

    def __post_init__(self):
        arguments.sizes(vocab_size=self.vocab_size, d_model=self.d_model)
        arguments.one_of((None, "float32", "bfloat16"), dtype=self.dtype)
        if not self.blocks:
            raise ValueError("blocks must hold at least one BlockConfig, got none")
        if self.scan and len(set(self.blocks)) > 1:
            raise ValueError("scan=True needs blocks that are all alike; leave scan out to scan where they are")

    @property
    def scans(self) -> bool:
        """Whether one block is compiled for all."""
        return len(set(self.blocks)) == 1 if self.scan is None else self.scan


class HybridBlock(nnx.Module):
    """A mixer and a feed-forward layer, each with its residual connection and normalisation."""

    def __init__(self, block: BlockConfig, config: HybridConfig, rngs: nnx.Rngs):
        options: dict[str, Any] = {"param_dtype": jnp.dtype(config.param_dtype), "rngs": rngs}
        norm_options = {"zero_centered": config.zero_centered, **options}
        self.mixer_norm = RMSNorm(config.d_model, config.norm_eps, **norm_options)
        self.feed_forward_norm = RMSNorm(config.d_model, config.norm_eps, **norm_options)
        options |= {"dtype": None if config.dtype is None else jnp.dtype(config.dtype), "kernel_init": INIT}
        self.mixer = block.mixer(config.d_model, **options)
        self.feed_forward = block.feed_forward(config.d_model, **options)
        self.placement = block.placement

    def __call__(self, x: jax.Array, memory, options: dict[str, Any], rngs: nnx.Rngs | None):
        """x ``[B, T, D]`` -> the same, and the memory. ``options``: of the mixer."""
        options = {name: x.value if isinstance(x, Static) else x for name, x in options.items()}
        if self.placement == "pre":
            y, memory = self.mixer(self.mixer_norm(x), memory, **options)
            x = x + y.astype(x.dtype)
            return x + self.feed_forward(self.feed_forward_norm(x)).astype(x.dtype), memory
        y, memory = self.mixer(x, memory, **options)
        x = x + self.mixer_norm(y.astype(x.dtype))
        return x + self.feed_forward_norm(self.feed_forward(x).astype(x.dtype)), memory


class HybridLM(nnx.Module):
    """A language model of blocks, with the methods of ``DecoderLM``, so that ``generate`` takes it.

    Args:
      config: a ``HybridConfig``.
      rngs: the stream "params" (or "default") draws the parameters.

    Attributes:
      embedding: ``[V, D]``.
      blocks: of type ``HybridBlock``.
      norm: an ``RMSNorm`` before the output layer.
      head: the output layer ``[V, D]``, or None if the embedding is it.
    """

    def __init__(self, config: HybridConfig, *, rngs: nnx.Rngs):
        check_rngs(rngs)
        dtype = jnp.dtype(config.param_dtype)
        shape = (config.vocab_size, config.d_model)
        self.config = config
        self.embedding = nnx.Param(INIT(rngs.params(), shape, dtype))
        self.blocks = nnx.List([HybridBlock(block, config, rngs) for block in config.blocks])
        self.norm = RMSNorm(
            config.d_model, config.norm_eps, zero_centered=config.zero_centered, param_dtype=dtype, rngs=rngs
        )
        self.head = None if config.tied else nnx.Param(INIT(rngs.params(), shape, dtype))

    def __call__(self, tokens, memory=None, *, segment_ids=None, lengths=None, memory_every=None, rngs=None):
        """Logits of the token after each.

        Args:
          tokens: integers ``[B, T]``, from 0 to V − 1. Numbers that are not traced are checked, which waits for the
            device; of traced ones (``jax.jit``) another number gives NaN.
          memory: the memories of an earlier call, a tuple with one for each block; empty if not given. To go on after
            blocks with softmax attention, start from ``init_memory``.
          segment_ids: integers ``[B, T]``, see ``fast_weight_attention``. For padding in front, take 0 for padding and
            1 for the text: an attention mask is such an array.
          lengths: integers ``[B]`` from 0 to T, for padding behind, see ``fast_weight_attention``.
          memory_every: see ``fast_weight_attention``; only for models without softmax attention.
          rngs: not used, because nothing in this model is random.

        Returns:
          ``[B, T, V]``, float32, and the memories.

        Raises:
          ValueError: tokens that are not integers ``[B, T]`` from 0 to V − 1, another number of memories than blocks,
            memory_every with softmax attention.
        """
        options = {"segment_ids": segment_ids, "lengths": lengths, "memory_every": memory_every}
        x, memory = self.hidden(tokens, memory, **options)
        return self.logits(x), memory

    def losses(self, tokens, targets, memory=None, *, segment_ids=None, lengths=None, rngs=None):
        """−log p of ``targets`` after each token, ``[B, T]``, float32, and the memories; as ``DecoderLM.losses``."""
        tokens = arguments.integers("tokens", tokens, self.config.vocab_size - 1)
        x, memory = self.hidden(tokens, memory, segment_ids=segment_ids, lengths=lengths)
        return self.losses_of(x, targets), memory

    def losses_of(self, hidden, targets):
        """The losses of ``targets``, ``[B, T]``, float32, from (a part of) the result of ``hidden``, ``[B, T, D]``.

        Targets are integers up to V − 1. A negative one has the loss 0 and no gradient.
        """
        bias = jnp.zeros(self.config.vocab_size, jnp.float32)
        return output_layer.losses(hidden, targets, (self._rows(hidden), bias))

    def hidden(self, tokens, memory=None, *, segment_ids=None, lengths=None, memory_every=None, rngs=None):
        """The input of the output layer, ``[B, T, D]``, and the memories. Arguments as in ``__call__``."""
        config = self.config
        tokens = arguments.integers("tokens", tokens, config.vocab_size - 1)
        x = output_layer.embed(self.embedding[...], tokens)
        x = x if config.dtype is None else x.astype(config.dtype)
        options: dict[str, Any] = {"segment_ids": segment_ids, "lengths": lengths}
        if memory_every is not None:
            kinds = (GroupedQueryAttention, LatentAttention)
            attentions = [i for i, block in enumerate(self.blocks) if isinstance(block.mixer, kinds)]
            if attentions:
                raise ValueError(
                    f"memory_every is for fast weights, and the blocks {attentions} have softmax attention"
                )
            options["memory_every"] = Static(memory_every)
        memory = (None,) * len(self.blocks) if memory is None else memory
        if len(memory) != len(self.blocks):
            raise ValueError(f"memory must have one for each of {len(self.blocks)} blocks, got {len(memory)}")
        x, memories = through_blocks(self.blocks, x, memory, options, None, scan=config.scans, remat=config.remat)
        return self.norm(x), memories

    def logits(self, hidden):
        """``[..., V]``, float32, from the result of ``hidden``, ``[..., D]``."""
        return jnp.einsum("...d,vd->...v", hidden, self._rows(hidden), preferred_element_type=jnp.float32)

    def log_probabilities(self, hidden):
        """log p ``[..., V]``, float32, from the result of ``hidden``, ``[..., D]``."""
        return jax.nn.log_softmax(self.logits(hidden), axis=-1)

    def init_memory(self, batch_size: int, max_length: int | None = None):
        """Empty memories of all blocks. max_length: the number of tokens that a cache of softmax attention holds; other
        memories do not need it."""
        return tuple(block.mixer.init_memory(batch_size, max_length) for block in self.blocks)

    def _rows(self, hidden):
        """The output layer's weights ``[V, D]``, in the dtype of ``hidden``."""
        return (self.embedding if self.head is None else self.head)[...].astype(hidden.dtype)
