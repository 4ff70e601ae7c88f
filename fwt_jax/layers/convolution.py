"""``ShortConvolution``: each channel is mixed over the last few tokens, causally."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from fwt_jax import arguments
from fwt_jax.attention_arguments import resets
from fwt_jax.layers.common import check_kind, check_rngs, check_shapes
from fwt_jax.memory import Memory
from fwt_jax.pieces import from_previous, is_axis
from fwt_jax.precision import computation_dtype


class ShortConvolution(nnx.Module):
    """A causal depthwise convolution: y_t = Σ_j w_j ∘ x_{t−W+1+j}, j = 0 … W−1.

    The last tap is that of the current token. Tokens before the sequence, and of other segments, count as 0. A token
    costs 2W FLOPs per channel. The memory is the last W − 1 inputs.

    Args:
      channels: the shape of x behind ``[B, T]``, as ``(H, K)``.
      size: W, at least 1.
      sequence_axis: the axis of the mesh that splits the tokens; see ``fast_weight_attention``. In ``jax.shard_map``
        each device gets the W − 1 tokens before its own from its neighbour, so it needs at least as many. Elsewhere
        the compiler exchanges them.
      param_dtype, rngs: of the taps, which start uniform in ±1/√W, as those of PyTorch.

    Attributes:
      taps: w, ``[W, *channels]``.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from fwt_jax.layers import ShortConvolution
      >>> convolution = ShortConvolution((1,), 2, rngs=nnx.Rngs(0))
      >>> convolution.taps[...] = jnp.array([[1.0], [10.0]])
      >>> y, inputs = convolution(jnp.array([1.0, 2.0, 3.0]).reshape(1, 3, 1))
      >>> y[0, :, 0].tolist(), inputs.tolist()
      ([10.0, 21.0, 32.0], [[[3.0]]])
    """

    def __init__(
        self,
        channels: tuple[int, ...],
        size: int,
        *,
        sequence_axis: str | None = None,
        param_dtype: jax.typing.DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        check_rngs(rngs)
        arguments.sizes(size=size)
        self.channels = tuple(channels)
        self.size = size
        self.sequence_axis = sequence_axis
        bound = size**-0.5
        self.taps = nnx.Param(jax.random.uniform(rngs.params(), (size, *self.channels), param_dtype, -bound, bound))

    def __call__(
        self,
        x: jax.Array,
        inputs: jax.Array | None = None,
        *,
        reset: jax.Array | None = None,
        ends: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """Mixes T tokens. Sums are float32 (float64 for float64).

        Args:
          x: ``[B, T, *channels]``, floating point.
          inputs: the W − 1 tokens before them, ``[B, W−1, *channels]``, as an earlier call returned them; 0 if not
            given.
          reset: bool ``[B, T]``: where a segment begins, which sees no token before. None: nowhere.
          ends: int ``[B, n]``, from 0 to T: after how many tokens the memories are returned, each with an axis n. None:
            one memory, after all tokens. In ``jax.shard_map``, T is the length of the whole sequence.

        Returns:
          y, as x; and the last W − 1 inputs, ``[B, W−1, *channels]``, or ``[B, n, W−1, *channels]`` for ``ends``.
          Inputs of earlier segments are 0 in it.
        """
        batch, length = x.shape[:2]
        size = self.size
        inputs = self.init_memory(batch, x.dtype) if inputs is None else inputs.astype(x.dtype)
        inputs = inputs + jnp.zeros_like(x[:, :1])  # on a mesh of explicit axes sharded as x
        axis = self.sequence_axis if self.sequence_axis is not None and is_axis(self.sequence_axis) else None
        is_hidden = _false(x)  # by a segment that begins after the token
        before = is_hidden | jnp.zeros((batch, size - 1), bool)
        if axis is not None:
            inputs, before = _halo(x, reset, inputs, axis)
        x = jnp.concatenate([inputs, x], axis=1)
        begins = None if reset is None else jnp.concatenate([before, reset | _false(x)], axis=1)
        taps = self.taps[...]
        y = jnp.zeros(x[:, :length].shape, computation_dtype(x.dtype))
        for j in reversed(range(size)):
            tokens = x[:, j : j + length]
            if begins is not None:
                tokens = jnp.where(lax.expand_dims(is_hidden, range(2, x.ndim)), 0, tokens)
                is_hidden = is_hidden | begins[:, j : j + length]
            y = y + tokens.astype(y.dtype) * taps[j].astype(y.dtype)[None, None]
        return y.astype(x.dtype), _last_inputs(x, begins, ends, length, size, axis)

    def init_memory(self, batch_size: int, dtype=jnp.float32) -> jax.Array:
        """Inputs of no token: zeros ``[B, W−1, *channels]``."""
        return jnp.zeros((batch_size, self.size - 1, *self.channels), dtype)


def _halo(x, reset, inputs, axis):
    """The W − 1 tokens before this piece, and where segments begin in them; ``inputs`` in the first piece."""
    count = inputs.shape[1]
    if x.shape[1] < count:
        raise ValueError(
            f"each piece of the sequence must have at least the {count} tokens that a convolution looks back, "
            f"got {x.shape[1]}; split it over fewer devices"
        )
    is_first = lax.axis_index(axis) == 0
    received = from_previous(x[:, x.shape[1] - count :], axis)
    begins = jnp.zeros(x.shape[:2], bool) if reset is None else reset
    begins = from_previous(begins[:, x.shape[1] - count :], axis) & ~is_first
    return jnp.where(is_first, inputs, received), begins


def _false(x):
    """False, ``[B, 1]``, sharded as x ``[B, T, ...]`` is."""
    return jnp.any(jnp.zeros_like(x[:, :1], bool), axis=tuple(range(2, x.ndim)))


def _last_inputs(x, begins, ends, length, size, axis):
    """The W − 1 inputs before each of ``ends``, ``[B, n, W−1, ...]``, with zeros for those of other segments.

    x ``[B, W−1+T, ...]``, and where segments begin in it, start W − 1 tokens before the call.
    """
    first = 0 if axis is None else length * lax.axis_index(axis)
    if ends is None and axis is None and begins is None:
        return x[:, length:]
    after_all = length if axis is None else length * lax.axis_size(axis)
    places = (after_all if ends is None else ends.astype(jnp.int32)) + _false(x).astype(jnp.int32)
    local = jnp.clip(places - first, 0, length)
    indices = local[..., None] + jnp.arange(size - 1, dtype=jnp.int32)[None, None]
    gather = jax.vmap(lambda rows, index: rows[index])
    result = gather(x, indices)
    if begins is not None:
        begins = gather(begins, indices).astype(jnp.int32)
        is_hidden = lax.cumsum(begins, axis=2, reverse=True) > begins
        result = jnp.where(lax.expand_dims(is_hidden, range(3, result.ndim)), 0, result)
    if axis is not None:
        is_own = (jnp.maximum(places - 1, 0) // length) == lax.axis_index(axis)
        result = lax.psum(jnp.where(lax.expand_dims(is_own, range(2, result.ndim)), result, 0), axis)
    return result[:, 0] if ends is None else result


class ConvolvedMemory(NamedTuple):
    """The memory of a layer with short convolutions: a ``Memory``, and the last W − 1 inputs of each convolution.

    Attributes:
      fast_weights, key_sum: ``[B, HV, K, V]`` and ``[B, HV, K]``, as in ``Memory``.
      query_inputs, key_inputs, value_inputs: ``[B, W−1, H, D]`` twice, and ``[B, W−1, HV, V]``.

    Of ``memory_every``, all have an axis of the memories behind B.
    """

    fast_weights: jax.Array
    key_sum: jax.Array
    query_inputs: jax.Array
    key_inputs: jax.Array
    value_inputs: jax.Array


class Convolutions(nnx.Module):
    """The short convolutions of queries, keys and values: ``ShortConvolution`` three times."""

    def __init__(self, query_channels, value_channels, conv_size: int, **options):
        arguments.sizes(conv_size=conv_size)
        self.query = ShortConvolution(query_channels, conv_size, **options)
        self.key = ShortConvolution(query_channels, conv_size, **options)
        self.value = ShortConvolution(value_channels, conv_size, **options)

    def all(self) -> tuple[ShortConvolution, ShortConvolution, ShortConvolution]:
        """Of queries, keys and values."""
        return self.query, self.key, self.value

    def __call__(self, query, key, value, memory: Any, segment_ids, lengths, memory_every):
        """Query, key and value ``[B, T, ...]``, mixed; and the inputs of a ``ConvolvedMemory``, as ``memory`` is."""
        batch, length = query.shape[:2]
        axis = self.query.sequence_axis
        axis = axis if axis is not None and is_axis(axis) else None
        options = {
            "reset": resets(segment_ids, batch, length, axis),
            "ends": _ends(batch, length if axis is None else length * lax.axis_size(axis), lengths, memory_every),
        }
        inputs = (None,) * 3 if memory is None else memory[2:]
        mixed = [
            convolution(x, before, **options)
            for convolution, x, before in zip(self.all(), (query, key, value), inputs, strict=True)
        ]
        outputs, inputs = zip(*mixed, strict=True)
        if memory_every is None and lengths is not None:
            inputs = tuple(x[:, 0] for x in inputs)
        return outputs, inputs

    def init_memory(self, batch_size: int, dtype) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Inputs of no token."""
        query, key, value = (x.init_memory(batch_size, dtype) for x in self.all())
        return query, key, value


def check_memory(memory, fast_weights: tuple[int, ...], convolutions: Convolutions | None, way_out: str):
    """Refuses what is no memory with fast weights of this shape: a ``ConvolvedMemory``, or without convolutions a
    ``Memory``."""
    shapes = [fast_weights, fast_weights[:-1]]
    if convolutions is not None:
        shapes += [(fast_weights[0], part.size - 1, *part.channels) for part in convolutions.all()]
    check_kind(memory, Memory if convolutions is None else ConvolvedMemory, way_out)
    check_shapes(memory, shapes, way_out)


def _ends(batch, length, lengths, memory_every):
    """After how many tokens memories are returned, int ``[B, n]``; None for the last alone."""
    if lengths is not None:
        lengths = arguments.integers("lengths", lengths, length, axes=f"[B] = [{batch}]", shape=(batch,))[:, None]
    if memory_every is None:
        return lengths
    size = arguments.static_size("memory_every", memory_every)
    ends = jnp.minimum(size * jnp.arange(1, -(-length // size) + 1, dtype=jnp.int32), length)[None]
    return jnp.broadcast_to(ends, (batch, ends.shape[1])) if lengths is None else jnp.minimum(ends, lengths)
