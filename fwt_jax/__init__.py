"""fwt_jax: linear transformers as fast weight programmers, in JAX and Flax."""

from fwt_jax import feature_maps
from fwt_jax.attention import fast_weight_attention
from fwt_jax.attention_weights import read_weights
from fwt_jax.cross_attention import fast_weight_cross_attention, read
from fwt_jax.heads import init_memory
from fwt_jax.layers import (
    FastWeightAttention,
    FavorPlus,
    KeyValueCache,
    SoftmaxAttention,
    TrainedFeatureMap,
)
from fwt_jax.memory import Memory
from fwt_jax.rules import RULES, Rule

__version__ = "0.1.0"

__all__ = [
    "RULES",
    "FastWeightAttention",
    "FavorPlus",
    "KeyValueCache",
    "Memory",
    "Rule",
    "SoftmaxAttention",
    "TrainedFeatureMap",
    "fast_weight_attention",
    "fast_weight_cross_attention",
    "feature_maps",
    "init_memory",
    "read",
    "read_weights",
]
