"""Transformer-XL (Dai et al. 2019): softmax attention by relative positions, with a memory of hidden states.

The baseline of table 4: it reads a text in segments, and sees M tokens of what came before.
Letters: B batch, T tokens, M memory length, S = M + T, H heads, D head size, E d_model.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from fwt_jax.layers import DEFAULT_INIT, _check_kind, _check_shapes, _check_sizes, _checked_input


class SegmentMemory(NamedTuple):
    """What was fed to a layer before.

    It cannot go back: with each new token the oldest one is gone, and a smaller length hides the oldest tokens, not the
    newest. To take tokens back, keep the memory from before them.

    Attributes:
      hidden: the last M inputs ``[B, M, E]``, the newest last.
      length: how many of them there are, int32 ``[B]``, at most M.
    """

    hidden: jax.Array
    length: jax.Array


class RelativeAttention(nnx.Module):
    """Causal multi-head attention in which the distance of two tokens counts, not their places.

        o_t = Σ_i softmax_i([(q_t + u)ᵀk_i + (q_t + w)ᵀr_{t−i}] / √D) v_i,     r_n = W_r sinusoid(n)
        y_t = W_o [o_t of all heads]

    over i from t − M − (place in the segment) to t. k and v are also those of the memory, without gradient. Scores and
    softmax are float32. A token costs 6SD FLOPs per head beside the projections; the keys and values of the memory
    are computed anew in each call, 4·M·E·H·D FLOPs for each sequence.

    Args:
      in_features, num_heads, head_size: E, H, D.
      memory_length: M.
      clamp_length: distances above it count as it; 0: none.
      dtype, kernel_init, rngs: of the projections, which have no biases; rngs' stream "params" is used.

    Raises:
      ValueError: sizes that are not integers of at least 1, lengths that are not integers of at least 0. When called:
        an x, memory, positions or biases of other shapes.

    Attributes:
      query, key, value: kernels ``[E, H, D]``; position, of r: the same; out: ``[H, D, E]``.

    References:
      Dai et al. 2019, section 3.3; u and w are shared by all layers of a model, so they are arguments of the call.
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
        kernel_init: nnx.Initializer = DEFAULT_INIT,
        rngs: nnx.Rngs,
    ):
        _check_sizes(in_features=in_features, num_heads=num_heads, head_size=head_size)
        _check_sizes(0, memory_length=memory_length, clamp_length=clamp_length)
        self.in_features, self.memory_length, self.clamp_length = in_features, memory_length, clamp_length
        options = {"use_bias": False, "dtype": dtype, "kernel_init": kernel_init, "rngs": rngs}
        for name in ("query", "key", "value", "position"):
            setattr(self, name, nnx.LinearGeneral(in_features, (num_heads, head_size), **options))
        self.out = nnx.LinearGeneral((num_heads, head_size), in_features, axis=(-2, -1), **options)

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
          memory: what an earlier call returned; empty and of x's dtype if not given.
          positions: sinusoids of the distances S − 1, …, 0, ``[S, E]``, as ``distances`` gives.
          content_bias, position_bias: u and w, ``[H, D]``.

        Returns:
          y, as x, and the memory: the last M of the tokens before and these, in the dtype of the memory before.
        """
        x, _ = _checked_input(x, self.in_features)
        batch, way_out = len(x), f"layer.init_memory({len(x)}) makes an empty one"
        memory = self.init_memory(batch, x.dtype) if memory is None else memory
        _check_kind(memory, SegmentMemory, way_out)
        _check_shapes(memory, ((batch, self.memory_length, self.in_features), (batch,)), way_out)
        seen_tokens, heads = self.memory_length + x.shape[1], self.query.out_features
        for name, array, shape in (
            ("positions", positions, (seen_tokens, self.in_features)),
            ("content_bias", content_bias, heads),
            ("position_bias", position_bias, heads),
        ):
            if array.shape != shape:
                raise ValueError(f"{name} must be {list(shape)} for {x.shape[1]} tokens, got {list(array.shape)}")
        content_bias, position_bias = content_bias.astype(jnp.float32), position_bias.astype(jnp.float32)
        seen = jnp.concatenate([lax.stop_gradient(memory.hidden).astype(x.dtype), x], axis=1)
        query, key, value = (
            layer(inputs).astype(jnp.float32)
            for layer, inputs in ((self.query, x), (self.key, seen), (self.value, seen))
        )
        relative = self.position(positions).astype(jnp.float32)
        scores = jnp.einsum("bthd,bshd->bhts", query + content_bias[None, None], key)
        scores += _by_distance(jnp.einsum("bthd,shd->bhts", query + position_bias[None, None], relative))
        tokens, slots = x.shape[1], seen.shape[1]
        slot = jnp.arange(slots, dtype=jnp.int32)[None, None]
        place = jnp.arange(tokens, dtype=jnp.int32)[None, :, None] + self.memory_length
        visible = (slot <= place) & (slot >= self.memory_length - memory.length[:, None, None])
        scores = jnp.where(visible[:, None], scores * query.shape[-1] ** -0.5, -jnp.inf)
        read = jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(scores, axis=-1), value)
        length = jnp.minimum(memory.length + tokens, self.memory_length)
        kept = lax.stop_gradient(seen[:, slots - self.memory_length :]).astype(memory.hidden.dtype)
        return self.out(read.astype(x.dtype)).astype(x.dtype), SegmentMemory(kept, length)

    def distances(self, num_tokens: int) -> jax.Array:
        """Of S tokens from the last one, S − 1, …, 0, clamped: int32 ``[S]``."""
        distances = jnp.arange(self.memory_length + num_tokens, dtype=jnp.int32)[::-1]
        return jnp.minimum(distances, self.clamp_length) if self.clamp_length else distances

    def init_memory(self, batch_size: int, dtype: jax.typing.DTypeLike = jnp.float32) -> SegmentMemory:
        """An empty memory."""
        _check_sizes(batch_size=batch_size)
        hidden = jnp.zeros((batch_size, self.memory_length, self.in_features), dtype)
        return SegmentMemory(hidden, jnp.zeros(batch_size, jnp.int32))


def _by_distance(scores):
    """Scores ``[..., T, S]`` of query t with distance S − 1 − j -> with slot i, at the distance M + t − i.

    Row t is rolled left by T − 1 − t: padded by one, the rows of the flattened array start one later each.
    """
    *batch, tokens, slots = scores.shape
    padded = jnp.pad(scores, [(0, 0)] * (len(batch) + 1) + [(1, 0)])
    return padded.reshape(*batch, slots + 1, tokens)[..., 1:, :].reshape(scores.shape)
