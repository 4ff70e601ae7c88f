"""fwt_jax: linear transformers as fast weight programmers, in JAX and Flax."""

from fwt_jax import feature_maps
from fwt_jax.attention import (
    fast_weight_attention,
    fast_weight_cross_attention,
    init_memory,
    read,
)
from fwt_jax.layers import (
    FastWeightAttention,
    FavorPlus,
    KeyValueCache,
    SoftmaxAttention,
    TrainedFeatureMap,
)
from fwt_jax.memory import Memory, read_weights

__all__ = [
    "FastWeightAttention",
    "FavorPlus",
    "KeyValueCache",
    "Memory",
    "SoftmaxAttention",
    "TrainedFeatureMap",
    "fast_weight_attention",
    "fast_weight_cross_attention",
    "feature_maps",
    "init_memory",
    "read",
    "read_weights",
]
