"""Flax NNX layers: from a residual stream ``[B, T, d_model]`` to a memory and back.

``FastWeightAttention`` and its baseline ``SoftmaxAttention`` are called alike:

    y, memory = layer(x)                                    training: all tokens in one call
    memory = layer.init_memory(batch_size, max_length)      streaming: one call after another
    y, memory = layer(x, memory)

Every leaf of a memory leads with the batch axis, so ``jax.tree.map(lambda leaf: leaf[rows], memory)`` selects rows.
Letters: B batch, T tokens, H heads, D head size, K key features, V value size, S capacity of a cache.
"""

from fwt_jax.layers.cross import CrossAttention, Source
from fwt_jax.layers.fast_weight import FastWeightAttention
from fwt_jax.layers.feature_maps import FavorPlus, RandomProjection, TrainedFeatureMap
from fwt_jax.layers.relative import RelativeAttention, SegmentMemory
from fwt_jax.layers.softmax import KeyValueCache, SoftmaxAttention

__all__ = [
    "CrossAttention",
    "FastWeightAttention",
    "FavorPlus",
    "KeyValueCache",
    "RandomProjection",
    "RelativeAttention",
    "SegmentMemory",
    "SoftmaxAttention",
    "Source",
    "TrainedFeatureMap",
]
