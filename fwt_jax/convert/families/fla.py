"""The families of flash-linear-attention: delta_net, gated_deltanet, kda, linear_attn."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from fwt_jax import feature_maps
from fwt_jax.convert.families.names import Shapes, rows
from fwt_jax.convert.families.options import read_options
from fwt_jax.convert.families.table import Entry, Family, Tensors
from fwt_jax.layers import (
    DeltaNet,
    GatedDeltaNet,
    GroupedQueryAttention,
    KimiDeltaAttention,
    LinearAttention,
    OutputGate,
)
from fwt_jax.layers.common import promote_to_float32
from fwt_jax.models import BlockConfig, HybridConfig, HybridLM, SwiGLU
from fwt_jax.models.blocks import partial

REQUIRED = ("vocab_size", "hidden_size", "num_hidden_layers", "num_heads")
DEFAULTS = {
    "attn": None,
    "hidden_ratio": 4.0,
    "intermediate_size": None,
    "norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
ONLY = {
    "attnres_block_size": (None,),
    "conv_bias": (False,),
    "elementwise_affine": (True,),
    "hidden_act": ("swish", "silu"),
    "norm_first": (False,),
    "share_conv_kernel": (False,),
    "use_l2warp": (False,),
    "use_output_norm": (True, False),  # the programs do not read it
}
# How the original programs compute: it changes no number beyond rounding.
INERT = ("attn_mode", "fuse_cross_entropy", "fuse_linear_cross_entropy", "fuse_norm", "fuse_swiglu")

NAMES = {"model.embeddings.weight": "embedding", "model.norm.weight": "norm.scale", "lm_head.weight": "head"}
BLOCK_NAMES = {
    "attn_norm.weight": "mixer_norm.scale",
    "mlp_norm.weight": "feed_forward_norm.scale",
    "mlp.gate_proj.weight": "feed_forward.gate.kernel",
    "mlp.up_proj.weight": "feed_forward.up.kernel",
    "mlp.down_proj.weight": "feed_forward.down.kernel",
}
# Of all mixers: a table of a layer takes the rows of the variables that the layer has.
MIXER_NAMES = {
    "q_proj.weight": "query.kernel",
    "q_proj.bias": "query.bias",
    "k_proj.weight": "key.kernel",
    "k_proj.bias": "key.bias",
    "v_proj.weight": "value.kernel",
    "v_proj.bias": "value.bias",
    "q_conv1d.weight": "convolutions.query.taps",
    "k_conv1d.weight": "convolutions.key.taps",
    "v_conv1d.weight": "convolutions.value.taps",
    "b_proj.weight": "beta.kernel",
    "a_proj.weight": "decay.projection.kernel",
    "f_proj.0.weight": "decay.projection.down.kernel",
    "f_proj.1.weight": "decay.projection.up.kernel",
    "A_log": "decay.log_rate",
    "dt_bias": "decay.bias",
    "g_proj.weight": "gate.projection.kernel",
    "g_proj.0.weight": "gate.projection.down.kernel",
    "g_proj.1.weight": "gate.projection.up.kernel",
    "g_proj.1.bias": "gate.projection.up.bias",
    "o_norm.weight": "norm.scale",
    "o_proj.weight": "out.kernel",
}
LINEAR_ATTENTION_NAMES = MIXER_NAMES | {"norm.weight": "norm.scale"}
del LINEAR_ATTENTION_NAMES["o_norm.weight"]
for _map in ("query", "key"):
    for _layer in ("layer", "layer1", "layer2"):
        LINEAR_ATTENTION_NAMES |= {
            f"feature_map_{_map[0]}.{_layer}.weight": f"{_map}_map.{_layer}.kernel",
            f"feature_map_{_map[0]}.{_layer}.bias": f"{_map}_map.{_layer}.bias",
        }


def entries(config: HybridConfig, shapes: Shapes, mixer_names: Mapping[str, str] = MIXER_NAMES) -> Iterator[Entry]:
    """The table of names of a model."""
    yield from rows(NAMES, "", "", shapes)
    for i in range(len(config.blocks)):
        disk, model = f"model.layers.{i}.", f"blocks.{i}."
        yield from rows(BLOCK_NAMES, disk, model, shapes)
        yield from rows(mixer_names, f"{disk}attn.", f"{model}mixer.", shapes)


def _config(options: Mapping[str, Any], mixer: Callable[..., Any]) -> HybridConfig:
    """The model of options that ``read_options`` has read; ``mixer`` makes the other layers."""
    hidden = options["hidden_size"]
    d_ff = options["intermediate_size"]
    if d_ff is None:
        d_ff = -(-int(hidden * options["hidden_ratio"] * 2 / 3) // 256) * 256
    feed_forward = partial(SwiGLU, d_ff=d_ff)
    attentions = _attentions(options["attn"], hidden, options["norm_eps"])
    number = options["num_hidden_layers"]
    outside = sorted(i for i in attentions if not 0 <= i < number)
    if outside:
        raise ValueError(f"the layers of attn must be from 0 to {number - 1}, got {outside}")
    return HybridConfig(
        vocab_size=options["vocab_size"],
        d_model=hidden,
        blocks=tuple(BlockConfig(attentions.get(i, mixer), feed_forward) for i in range(number)),
        norm_eps=options["norm_eps"],
        tied=options["tie_word_embeddings"],
    )


def _attentions(attn, hidden, norm_eps) -> dict[int, Callable[..., Any]]:
    """The layers that are softmax attention, by their numbers."""
    attentions = {}
    specifications = [] if attn is None else attn if isinstance(attn, list) else [attn]
    if not all(isinstance(options, Mapping) for options in specifications):
        raise ValueError(f"attn must be a mapping or a list of mappings, got {attn!r}")
    for options in specifications:
        try:
            read = read_options(
                options,
                required=("layers", "num_heads"),
                defaults={"num_kv_heads": None, "qkv_bias": False, "rope_theta": 10000.0, "window_size": None},
                only={"qk_norm": (False,)},
            )
        except ValueError as error:
            raise ValueError(f"attn: {error}") from error
        layer = partial(
            GroupedQueryAttention,
            num_heads=read["num_heads"],
            head_size=_divided(hidden, read["num_heads"], "attn: num_heads must divide hidden_size"),
            num_key_value_heads=read["num_kv_heads"],
            rotary_theta=float(read["rope_theta"]),
            window=read["window_size"],
            use_bias=read["qkv_bias"],
            norm_eps=norm_eps,
        )
        attentions |= dict.fromkeys(read["layers"], layer)
    return attentions


def _divided(size, number, rule):
    if size % number:
        raise ValueError(f"{rule}, got {number} and {size}")
    return size // number


def _size(factor, size, name):
    """size · factor, which must be an integer up to rounding."""
    result = round(size * factor)
    if result < 1 or not math.isclose(result, size * factor):
        raise ValueError(f"{name} must give a size that is an integer, got {factor} · {size}")
    return result


# --- delta_net -------------------------------------------------------------------------------------------------------


def _sum_normalize(x):
    """x / max(Σ|x|, 10⁻⁶)."""
    return x / jnp.maximum(jnp.sum(jnp.abs(x), axis=-1, keepdims=True), 1e-6)


ACTIVATIONS = {
    "silu": jax.nn.silu,
    "relu": feature_maps.relu,
    "elu": feature_maps.elu_plus_one,
    "identity": feature_maps.identity,
}
NORMALIZATIONS = {"l2": feature_maps.l2_normalize, "sum": _sum_normalize}


def delta_net(options: Mapping[str, Any], tensors: Tensors) -> HybridConfig:
    """The configuration of a DeltaNet (Yang et al. 2024)."""
    read = read_options(
        options,
        required=REQUIRED,
        defaults=DEFAULTS
        | {
            "allow_neg_eigval": False,
            "conv_size": 4,
            "expand_k": 1.0,
            "expand_v": 1.0,
            "use_beta": True,
            "use_gate": False,
            "use_short_conv": True,
        },
        only=ONLY | {"qk_activation": ("silu", "relu", "elu", "identity"), "qk_norm": ("l2", "sum")},
        inert=INERT,
    )
    hidden, heads = read["hidden_size"], read["num_heads"]
    sizes = [
        _divided(_size(read[name], hidden, name), heads, f"num_heads must divide hidden_size · {name}")
        for name in ("expand_k", "expand_v")
    ]
    mixer = partial(
        _delta_net_layer,
        num_heads=heads,
        head_size=sizes[0],
        value_size=sizes[1],
        conv_size=read["conv_size"] if read["use_short_conv"] else None,
        feature_map=ACTIVATIONS[read["qk_activation"]],
        feature_normalization=NORMALIZATIONS[read["qk_norm"]],
        use_beta=read["use_beta"],
        max_beta=2.0 if read["allow_neg_eigval"] else 1.0,
        use_gate=read["use_gate"],
        norm_eps=read["norm_eps"],
    )
    return _config(read, mixer)


def _delta_net_layer(d_model, *, use_gate, num_heads, value_size, **options):
    gate = None
    if use_gate:
        linear_options = {name: options[name] for name in ("dtype", "param_dtype", "kernel_init", "rngs")}
        gate = OutputGate(d_model, num_heads, value_size, jax.nn.silu, **linear_options)
    return DeltaNet(d_model, num_heads=num_heads, value_size=value_size, gate=gate, **options)


# --- gated_deltanet --------------------------------------------------------------------------------------------------


def gated_deltanet(options: Mapping[str, Any], tensors: Tensors) -> HybridConfig:
    """The configuration of a Gated DeltaNet (Yang et al. 2025)."""
    read = read_options(
        options,
        required=(*REQUIRED, "head_dim"),
        defaults=DEFAULTS
        | {
            "allow_neg_eigval": False,
            "conv_size": 4,
            "expand_v": 2.0,
            "num_v_heads": None,
            "use_gate": True,
            "use_short_conv": True,
        },
        only=ONLY | {"output_gate_activation": ("swish", "silu", "sigmoid")},
        inert=INERT,
    )
    activation = jax.nn.sigmoid if read["output_gate_activation"] == "sigmoid" else jax.nn.silu
    mixer = partial(
        GatedDeltaNet,
        gate=activation if read["use_gate"] else None,
        **_gated_options(read),
    )
    return _config(read, mixer)


def _gated_options(read) -> dict[str, Any]:
    return {
        "num_heads": read["num_heads"],
        "head_size": read["head_dim"],
        "value_size": _size(read["expand_v"], read["head_dim"], "expand_v"),
        "num_value_heads": read["num_v_heads"],
        "conv_size": read["conv_size"] if read["use_short_conv"] else None,
        "max_beta": 2.0 if read["allow_neg_eigval"] else 1.0,
        "norm_eps": read["norm_eps"],
    }


# --- kda -------------------------------------------------------------------------------------------------------------


def kda(options: Mapping[str, Any], tensors: Tensors) -> HybridConfig:
    """The configuration of a model of Kimi Delta Attention."""
    read = read_options(
        options,
        required=(*REQUIRED, "head_dim"),
        defaults=DEFAULTS
        | {
            "allow_neg_eigval": False,
            "conv_size": 4,
            "expand_v": 1.0,
            "lower_bound": None,
            "num_v_heads": None,
            "safe_gate": False,
            "use_short_conv": True,
        },
        only=ONLY,
        inert=INERT,
    )
    if read["safe_gate"] and read["lower_bound"] is None:
        raise ValueError("safe_gate needs a lower_bound below 0, got null")
    return _config(read, partial(KimiDeltaAttention, lower_bound=read["lower_bound"], **_gated_options(read)))


# --- linear_attn -----------------------------------------------------------------------------------------------------


def linear_attn(options: Mapping[str, Any], tensors: Tensors) -> HybridConfig:
    """The configuration of a model of linear attention (Katharopoulos et al. 2020)."""
    read = read_options(
        options,
        required=REQUIRED,
        defaults=DEFAULTS
        | {
            "expand_k": 1.0,
            "expand_v": 1.0,
            "norm_feature_map": False,
            "norm_k": False,
            "norm_q": False,
            "num_kv_heads": None,
            "tie_feature_map_qk": False,
        },
        only=ONLY | {"feature_map": ("elementwise_product", *FEATURES)},
        inert=INERT,
    )
    if read["tie_feature_map_qk"] and FEATURES[read["feature_map"]][1]:
        raise ValueError(f"tie_feature_map_qk must be False for the feature_map {read['feature_map']!r}, got True")
    hidden, heads = read["hidden_size"], read["num_heads"]
    key_size, value_size = (
        _divided(_size(read[name], hidden, name), heads, f"num_heads must divide hidden_size · {name}")
        for name in ("expand_k", "expand_v")
    )
    mixer = partial(
        _linear_attention_layer,
        num_heads=heads,
        head_size=key_size,
        value_size=value_size,
        num_key_value_heads=read["num_kv_heads"],
        feature_map=read["feature_map"],
        norm_query=read["norm_q"],
        norm_key=read["norm_k"],
        normalize=read["norm_feature_map"],
        norm_eps=read["norm_eps"],
    )
    return _config(read, mixer)


class TrainedMap(nnx.Module):
    """A feature map with weights that all heads share: f of one or two layers of x; see ``FEATURES``."""

    def __init__(self, name: str, head_size: int, is_normalized: bool, *, dtype, param_dtype, kernel_init, rngs):
        self.function, self.layers = FEATURES[name]
        self.is_normalized = is_normalized
        options = {"dtype": dtype, "param_dtype": param_dtype, "kernel_init": kernel_init, "rngs": rngs}
        for layer, has_bias in self.layers:
            linear = nnx.Linear(head_size, head_size, use_bias=has_bias, promote_dtype=promote_to_float32, **options)
            setattr(self, layer, linear)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.function(*(getattr(self, layer)(x) for layer, _ in self.layers)) if self.layers else self.function(x)
        return y / (jnp.sum(y, axis=-1, keepdims=True) + 1e-4) if self.is_normalized else y


def _hedgehog(x):
    return jax.nn.softmax(jnp.concatenate([2 * x, -2 * x], axis=-1), axis=-1)


# The maps by their names: f, and the layers before it, each with whether it has a bias.
FEATURES: dict[str, tuple[Callable[..., jax.Array], tuple[tuple[str, bool], ...]]] = {
    "elementwise_product": (jnp.multiply, (("layer1", True), ("layer2", True))),
    "hedgehog": (_hedgehog, (("layer", True),)),
    "t2r": (jax.nn.relu, (("layer", False),)),
    "dpfp": (functools.partial(feature_maps.dpfp, nu=4), ()),
    "elu": (feature_maps.elu_plus_one, ()),
    "relu": (feature_maps.relu, ()),
    "identity": (feature_maps.identity, ()),
}


def _linear_attention_layer(d_model, *, feature_map, head_size, norm_query, norm_key, dtype, **options):
    linear_options = {name: options[name] for name in ("param_dtype", "kernel_init", "rngs")} | {"dtype": dtype}
    query_map, key_map = (TrainedMap(feature_map, head_size, norm, **linear_options) for norm in (norm_query, norm_key))
    return LinearAttention(d_model, head_size=head_size, query_map=query_map, key_map=key_map, dtype=dtype, **options)


FAMILIES = {
    "delta_net": Family(delta_net, entries, r"", HybridLM),
    "gated_deltanet": Family(gated_deltanet, entries, r"", HybridLM),
    "kda": Family(kda, entries, r"", HybridLM),
    "linear_attn": Family(linear_attn, functools.partial(entries, mixer_names=LINEAR_ATTENTION_NAMES), r"", HybridLM),
}
