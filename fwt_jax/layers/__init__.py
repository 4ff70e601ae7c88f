"""Flax NNX layers: from a residual stream ``[B, T, d_model]`` to a memory and back.

``FastWeightAttention`` and its baseline ``SoftmaxAttention`` are called alike:

    y, memory = layer(x)                                    training: all tokens in one call
    memory = layer.init_memory(batch_size, max_length)      streaming: one call after another
    y, memory = layer(x, memory)

Every leaf of a memory leads with the batch axis, so ``jax.tree.map(lambda leaf: leaf[rows], memory)`` selects rows.
Letters: B batch, T tokens, H heads, D head size, K key features, V value size, S capacity of a cache.
"""

from fwt_jax.layers.cache import KeyValueCache
from fwt_jax.layers.convolution import ConvolvedMemory, ShortConvolution
from fwt_jax.layers.cross import CrossAttention, Source
from fwt_jax.layers.delta_net import Decay, DeltaNet, GatedDeltaNet, KimiDeltaAttention, OutputGate
from fwt_jax.layers.fast_weight import FastWeightAttention
from fwt_jax.layers.feature_maps import FavorPlus, RandomProjection, TrainedFeatureMap
from fwt_jax.layers.grouped import GroupedQueryAttention
from fwt_jax.layers.latent import LatentAttention
from fwt_jax.layers.linear_attention import LinearAttention
from fwt_jax.layers.norms import RMSNorm
from fwt_jax.layers.relative import RelativeAttention, SegmentMemory
from fwt_jax.layers.softmax import SoftmaxAttention

__all__ = [
    "ConvolvedMemory",
    "CrossAttention",
    "Decay",
    "DeltaNet",
    "FastWeightAttention",
    "FavorPlus",
    "GatedDeltaNet",
    "GroupedQueryAttention",
    "KeyValueCache",
    "KimiDeltaAttention",
    "LatentAttention",
    "LinearAttention",
    "OutputGate",
    "RMSNorm",
    "RandomProjection",
    "RelativeAttention",
    "SegmentMemory",
    "ShortConvolution",
    "SoftmaxAttention",
    "Source",
    "TrainedFeatureMap",
]
