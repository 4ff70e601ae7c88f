"""Transformer-XL (Dai et al. 2019): softmax attention by relative positions, with a memory of hidden states.

The baseline of table 4: it reads a text in segments, and remembers the M tokens before a segment.
Letters: B batch, T tokens, M memory length, S = M + T, H heads, D head size, E d_model.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from fwt_jax import arguments
from fwt_jax.layers.common import (
    KERNEL_INIT,
    check_kind,
    check_shapes,
    check_sizes,
    checked_input,
    linear_layers,
    softmax_read,
)


class SegmentMemory(NamedTuple):
    """The last inputs of a layer.

    Tokens cannot be taken back: each new token pushes out the oldest one, and a smaller length hides the oldest tokens.
    To take tokens back, keep the memory from before they were read.

    Attributes:
      hidden: the last M inputs ``[B, M, E]``, the newest last.
      length: how many of them there are, int32 ``[B]``, at most M.
    """

    hidden: jax.Array
    length: jax.Array


class RelativeAttention(nnx.Module):
    """Causal multi-head attention that knows the distance between two tokens, not their positions.

        o_t = Σ_i softmax_i([(q_t + u)ᵀk_i + (q_t + w)ᵀr_{t−i}] / √D) v_i,     r_n = W_r sinusoid(n)
        y_t = W_o [o_t of all heads]

    over i from the oldest token of the memory to t. Keys and values of the memory have no gradient. Scores and softmax
    are float32. A token costs 6SD FLOPs per head beside the projections. Each call computes the keys and values of the
    memory again: 4·M·E·H·D FLOPs per sequence.

    Args:
      in_features, num_heads, head_size: E, H, D.
      memory_length: M.
      clamp_length: a larger distance counts as this one; 0: every distance counts as itself.
      dtype, kernel_init, rngs: of the projections, which have no biases; rngs' stream "params" is used.

    Raises:
      ValueError: sizes that are not integers of at least 1, lengths that are not integers of at least 0, more heads
        than features, rngs that are no ``nnx.Rngs``. When called: x, memory, positions or biases of other shapes.

    Attributes:
      query, key, value, position: kernels ``[E, H, D]``; the last one is W_r.
      out: kernel ``[H, D, E]``.

    References:
      Dai et al. 2019, section 3.3. All layers of a model share u and w, so they are arguments of the call.
    """

    def __init__(
        self,
        in_features: int,
        num_heads: int,
        head_size: int,
        memory_length: int,
        clamp_length: int = 0,
        *,
        dtype: jax.typing.DTypeLike | None = None,
        kernel_init: nnx.Initializer = KERNEL_INIT,
        rngs: nnx.Rngs,
    ):
        check_sizes(in_features, num_heads, head_size, head_size)
        arguments.sizes(0, memory_length=memory_length, clamp_length=clamp_length)
        self.in_features = in_features
        self.memory_length = memory_length
        self.clamp_length = clamp_length
        linear = linear_layers(use_bias=False, dtype=dtype, kernel_init=kernel_init, rngs=rngs)
        self.query = linear(in_features, (num_heads, head_size))
        self.key = linear(in_features, (num_heads, head_size))
        self.value = linear(in_features, (num_heads, head_size))
        self.position = linear(in_features, (num_heads, head_size))
        self.out = linear((num_heads, head_size), in_features, axis=(-2, -1))

    def __call__(
        self,
        x: jax.Array,
        memory: SegmentMemory | None = None,
        *,
        positions: jax.Array,
        content_bias: jax.Array,
        position_bias: jax.Array,
    ) -> tuple[jax.Array, SegmentMemory]:
        """Reads T tokens.

        Args:
          x: ``[B, T, E]``, floating point, T ≥ 1.
          memory: the memory of an earlier call; if not given, an empty one of x's dtype.
          positions: sinusoids of ``distances``, S − 1, …, 0: ``[S, E]``.
          content_bias, position_bias: u and w, ``[H, D]``.

        Returns:
          y, as x, and the last M tokens of the memory and x, in the dtype of the memory.
        """
        x, _ = checked_input(x, self.in_features)
        memory = self.init_memory(len(x), dtype=x.dtype) if memory is None else memory
        self._check(x, memory, positions, content_bias, position_bias)
        num_tokens, slots = x.shape[1], self.memory_length + x.shape[1]
        hidden = jnp.concatenate([lax.stop_gradient(memory.hidden).astype(x.dtype), x], axis=1)
        query = self.query(x).astype(jnp.float32)
        key = self.key(hidden).astype(jnp.float32)
        value = self.value(hidden).astype(jnp.float32)
        relative = self.position(positions).astype(jnp.float32)
        content_query = query + content_bias.astype(jnp.float32)[None, None]
        position_query = query + position_bias.astype(jnp.float32)[None, None]
        position_scores = _by_distance(jnp.einsum("bthd,shd->bhts", position_query, relative))

        key_slot = jnp.arange(slots, dtype=jnp.int32)[None, None]
        query_slot = jnp.arange(num_tokens, dtype=jnp.int32)[None, :, None] + self.memory_length
        visible = (key_slot <= query_slot) & (key_slot >= self.memory_length - memory.length[:, None, None])
        y = softmax_read(content_query, key, value, visible, lax.Precision.DEFAULT, position_scores)
        length = jnp.minimum(memory.length + num_tokens, self.memory_length)
        last_hidden = lax.stop_gradient(hidden[:, num_tokens:]).astype(memory.hidden.dtype)
        return self.out(y.astype(x.dtype)).astype(x.dtype), SegmentMemory(last_hidden, length)

    def distances(self, num_tokens: int) -> jax.Array:
        """The distances from the last of S tokens to each of them, S − 1, …, 0, clamped: int32 ``[S]``."""
        distances = jnp.arange(self.memory_length + num_tokens, dtype=jnp.int32)[::-1]
        return jnp.minimum(distances, self.clamp_length) if self.clamp_length else distances

    def init_memory(
        self, batch_size: int, max_length: int | None = None, *, dtype: jax.typing.DTypeLike = jnp.float32
    ) -> SegmentMemory:
        """An empty memory. ``max_length`` has no effect: the memory holds ``memory_length`` tokens."""
        arguments.sizes(batch_size=batch_size)
        hidden = jnp.zeros((batch_size, self.memory_length, self.in_features), dtype)
        return SegmentMemory(hidden, jnp.zeros(batch_size, jnp.int32))

    def _check(self, x, memory, positions, content_bias, position_bias):
        batch, num_tokens, _ = x.shape
        way_out = f"layer.init_memory({batch}) makes an empty one"
        check_kind(memory, SegmentMemory, way_out)
        check_shapes(memory, ((batch, self.memory_length, self.in_features), (batch,)), way_out)
        heads = self.query.out_features
        expected = {
            "positions": (positions, (self.memory_length + num_tokens, self.in_features)),
            "content_bias": (content_bias, heads),
            "position_bias": (position_bias, heads),
        }
        for name, (array, shape) in expected.items():
            if array.shape != shape:
                raise ValueError(f"{name} must be {list(shape)} for {num_tokens} tokens, got {list(array.shape)}")


def _by_distance(scores):
    """Scores ``[..., T, S]`` of queries and distances -> of queries and tokens.

    Column j of the scores is the distance S − 1 − j. Query t and token i have the distance M + t − i, so row t moves
    left by T − 1 − t columns. With one column of padding, each row of the flattened array begins one column later.
    """
    *batch, num_tokens, slots = scores.shape
    padded = jnp.pad(scores, [(0, 0)] * (len(batch) + 1) + [(1, 0)])
    return padded.reshape(*batch, slots + 1, num_tokens)[..., 1:, :].reshape(scores.shape)
