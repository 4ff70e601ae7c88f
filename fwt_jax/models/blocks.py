"""Parts of both models: features by name, feed-forward layer, residual connection, a pass through all blocks."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from fwt_jax import feature_maps
from fwt_jax.layers import FavorPlus

FEATURE_MAPS = ("identity", "relu", "relu_squared", "tanh", "elu_plus_one", "softmax", "taylor", "dpfp", "favor_plus")
INIT = nnx.initializers.normal(0.02)
TOOLKIT_FAVOR_PLUS = functools.partial(FavorPlus, orthogonal="columns", eps=1e-4)
# Equal partials must be one object, so that equal models are compiled once.
partial = functools.cache(functools.partial)


def features(
    options, head_size: int, rngs: nnx.Rngs, favor_plus: Callable[..., FavorPlus] = TOOLKIT_FAVOR_PLUS
) -> dict:
    """feature_map and feature_normalization of a layer.

    Args:
      options: a configuration with the attributes feature_map, feature_size and feature_normalization.
      head_size, rngs: of FAVOR+.
      favor_plus: makes its feature map.
    """
    feature_map = getattr(feature_maps, options.feature_map)
    if options.feature_map == "dpfp":
        feature_map = partial(feature_map, nu=options.feature_size)
    elif options.feature_map == "favor_plus":
        feature_map = favor_plus(head_size, options.feature_size, rngs=rngs)
    normalizations = {None: None, "sum": feature_maps.sum_normalize, "l2": feature_maps.l2_normalize}
    return {
        "feature_map": feature_map,
        "feature_normalization": normalizations[options.feature_normalization],
    }


class FeedForward(nnx.Module):
    """W₂ dropout(relu(W₁x + b₁)) + b₂ (Vaswani et al. 2017, eq. 2)."""

    def __init__(self, config, rngs: nnx.Rngs, *, kernel_init=INIT, dropout: float | None = None):
        linear = functools.partial(nnx.Linear, kernel_init=kernel_init, dtype=jnp.dtype(config.dtype), rngs=rngs)
        self.hidden = linear(config.d_model, config.d_ff)
        self.out = linear(config.d_ff, config.d_model)
        self.dropout = config.dropout if dropout is None else dropout

    def __call__(self, x: jax.Array, rngs: nnx.Rngs | None = None) -> jax.Array:
        return self.out(dropout(jax.nn.relu(self.hidden(x)), self.dropout, rngs))


def layer_norm(config, rngs: nnx.Rngs, **options) -> nnx.LayerNorm:
    return nnx.LayerNorm(config.d_model, epsilon=1e-5, use_fast_variance=False, rngs=rngs, **options)


def sublayer_input(x, norm, placement):
    """x, after layer normalisation with placement "pre"."""
    return norm(x) if placement == "pre" else x


def residual(x, y, norm, placement, rate, rngs):
    """x + dropout(y) of a sublayer's output y, float32, before layer normalisation with placement "post"."""
    x = x + dropout(y.astype(jnp.float32), rate, rngs)
    return norm(x) if placement == "post" else x


def dropout(x: jax.Array, rate: float, rngs: nnx.Rngs | None) -> jax.Array:
    """x / (1 − rate), but 0 for a random share ``rate`` of the entries (stream "dropout"). Without rngs: x."""
    if rngs is None or rate == 0:
        return x
    survives = jax.random.bernoulli(rngs.dropout(), 1 - rate, x.shape)
    return jnp.where(survives, x / (1 - rate), 0)


def sinusoids(positions: jax.Array, size: int) -> jax.Array:
    """[sin(t ω); cos(t ω)] ``[..., size]``, float32, of t ``[...]``, ωᵢ = 10000^(−2i/size) (Vaswani et al. 2017)."""
    frequencies = 10000.0 ** (-jnp.arange(0, size, 2, dtype=jnp.float32) / size)
    angles = jnp.outer(positions.astype(jnp.float32), frequencies).reshape(*positions.shape, -1)
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Static:
    """A number on which shapes depend, and which ``jax.jit`` and ``jax.checkpoint`` must not trace."""

    value: int | None


def through_blocks(blocks, x, memories, shared, rngs: nnx.Rngs | None, *, scan: bool, remat: bool):
    """x through all blocks, one after another: ``x, memory = block(x, memory, shared, rngs)``.

    Args:
      blocks: modules. With ``scan``, all have the same structure.
      x: ``[B, T, D]``.
      memories: one tree for each block. With ``scan``, all have the same structure.
      shared: a tree that every block takes.
      rngs: must be None if the blocks draw nothing: the counts of an outer trace (``jax.jit``) cannot be changed.
      scan: a ``lax.scan`` over the stacked parameters, so that one block is compiled instead of all. Its random numbers
        differ. A single token takes the loop, because stacking costs more than its blocks.
      remat: recompute each block in the backward pass.

    Returns:
      x, and a tuple of the memories after the call.
    """
    if scan and x.shape[1] > 1:
        return _scanned(blocks, x, tuple(memories), shared, rngs, remat)
    memories_after = []
    for block, memory in zip(blocks, memories, strict=True):
        x, memory = _recomputed(block, x, memory, shared, rngs) if remat else block(x, memory, shared, rngs)
        memories_after.append(memory)
    return x, tuple(memories_after)


def _scanned(blocks, x, memories, shared, rngs, remat):
    graphs, states = zip(*(nnx.split(block) for block in blocks), strict=True)
    keys = {}
    if rngs is not None:
        names = [name for name in ("dropout", "projection") if name in rngs or "default" in rngs]
        keys = {name: jax.random.split(rngs[name](), len(graphs)) for name in names}
    return _scan(states, x, memories, shared, keys, graph=graphs[0], remat=remat)


# Outside of jax.jit, JAX would compile the scan again at every call.
@functools.partial(jax.jit, static_argnames=("graph", "remat"))
def _scan(states, x, memories, shared, keys, *, graph, remat):
    def body(x, inputs):
        state, memory, keys = inputs
        block = nnx.merge(graph, state)
        return block(x, memory, shared, nnx.Rngs(**keys) if keys else None)

    stacked_states, stacked_memories = (
        jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees) for trees in (states, memories)
    )
    x, after = lax.scan(jax.checkpoint(body) if remat else body, x, (stacked_states, stacked_memories, keys))
    return x, tuple(jax.tree.map(lambda leaf, i=i: leaf[i], after) for i in range(len(states)))


def _recomputed(block, x, memory, shared, rngs):
    """``block(x, memory, shared, rngs)``, which the backward pass computes again.

    ``jax.checkpoint`` sees arrays alone. ``nnx.remat`` would write to the variables of the block, and a variable of an
    outer trace (``jax.jit``, a scan) refuses that.
    """
    graph, state = nnx.split((block, rngs))

    @jax.checkpoint
    def call_merged(state, x, memory, shared):
        block, rngs = nnx.merge(graph, state)
        x, memory = block(x, memory, shared, rngs)
        return x, memory, nnx.state(rngs, nnx.RngCount)

    x, memory, counts = call_merged(state, x, memory, shared)
    if rngs is not None:
        nnx.update(rngs, counts)
    return x, memory
