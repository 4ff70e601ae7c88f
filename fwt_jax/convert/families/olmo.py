"""The family olmo_hybrid."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp

from fwt_jax.convert.families.names import Shapes, row, rows
from fwt_jax.convert.families.options import read_options
from fwt_jax.convert.families.qwen import layer_types
from fwt_jax.convert.families.table import Entry, Family, Tensors
from fwt_jax.layers import GatedDeltaNet, GroupedQueryAttention
from fwt_jax.models import BlockConfig, HybridConfig, HybridLM, SwiGLU
from fwt_jax.models.blocks import partial

REQUIRED = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "intermediate_size",
    "num_attention_heads",
    "linear_num_key_heads",
    "linear_num_value_heads",
    "linear_key_head_dim",
    "linear_value_head_dim",
)
DEFAULTS = {
    "attention_bias": False,
    "layer_types": None,
    "linear_allow_neg_eigval": True,
    "linear_conv_kernel_dim": 4,
    "num_key_value_heads": None,
    "rms_norm_eps": 1e-6,
    "rope_parameters": None,
    "rope_theta": 1e4,
    "tie_word_embeddings": False,
}
ONLY = {"attention_dropout": (0.0, 0), "hidden_act": ("silu",), "rope_scaling": (None,)}
# Of new models
INERT = ("linear_a_log_max", "linear_a_log_min", "linear_dt_init_floor", "linear_dt_max", "linear_dt_min")
OUTPUT_NORM_EPS = 1e-5  # whatever rms_norm_eps is

NAMES = {"model.embed_tokens.weight": "embedding", "model.norm.weight": "norm.scale", "lm_head.weight": "head"}
LINEAR_NAMES = {
    "input_layernorm.weight": "mixer_norm.scale",
    "post_attention_layernorm.weight": "feed_forward_norm.scale",
}
FULL_NAMES = {
    "post_attention_layernorm.weight": "mixer_norm.scale",
    "post_feedforward_layernorm.weight": "feed_forward_norm.scale",
}
# As transformers 5.24 writes them
OTHER_LINEAR_NAMES = {
    "attention_layer_norm.weight": "mixer_norm.scale",
    "feedforward_layer_norm.weight": "feed_forward_norm.scale",
}
OTHER_FULL_NAMES = {
    "feedforward_layer_norm.weight": "mixer_norm.scale",
    "post_feedforward_layernorm.weight": "feed_forward_norm.scale",
}
BLOCK_NAMES = {
    "mlp.gate_proj.weight": "feed_forward.gate.kernel",
    "mlp.up_proj.weight": "feed_forward.up.kernel",
    "mlp.down_proj.weight": "feed_forward.down.kernel",
}
DELTA_NAMES = {
    "q_proj.weight": "query.kernel",
    "k_proj.weight": "key.kernel",
    "v_proj.weight": "value.kernel",
    "b_proj.weight": "beta.kernel",
    "a_proj.weight": "decay.projection.kernel",
    "A_log": "decay.log_rate",
    "dt_bias": "decay.bias",
    "g_proj.weight": "gate.projection.kernel",
    "o_norm.weight": "norm.scale",
    "o_proj.weight": "out.kernel",
}
ATTENTION_NAMES = {
    "q_proj.weight": "query.kernel",
    "q_proj.bias": "query.bias",
    "k_proj.weight": "key.kernel",
    "k_proj.bias": "key.bias",
    "v_proj.weight": "value.kernel",
    "v_proj.bias": "value.bias",
    "o_proj.weight": "out.kernel",
    "o_proj.bias": "out.bias",
    "q_norm.weight": "query_norm.scale",
    "k_norm.weight": "key_norm.scale",
}
CONVOLUTIONS = ("query", "key", "value")


def entries(config: HybridConfig, shapes: Shapes) -> Iterator[Entry]:
    """The table of names of a model."""
    yield from rows(NAMES, "", "", shapes)
    for i in range(len(config.blocks)):
        disk, model = f"model.layers.{i}.", f"blocks.{i}."
        yield from rows(BLOCK_NAMES, disk, model, shapes)
        if f"{model}mixer.decay.bias" in shapes:
            names = OTHER_LINEAR_NAMES if "other_linear_norms" in config.layout else LINEAR_NAMES
            yield from rows(names, disk, model, shapes)
            yield from rows(DELTA_NAMES, f"{disk}linear_attn.", f"{model}mixer.", shapes)
            yield from _convolution_entries(f"{disk}linear_attn.", f"{model}mixer.convolutions.", shapes, config.layout)
        else:
            names = OTHER_FULL_NAMES if "other_full_norms" in config.layout else FULL_NAMES
            yield from rows(names, disk, model, shapes)
            yield from rows(ATTENTION_NAMES, f"{disk}self_attn.", f"{model}mixer.", shapes)


def _convolution_entries(disk, model, shapes, layout):
    names = tuple(f"{disk}{name}_conv1d.weight" for name in "qkv")
    paths = tuple(f"{model}{name}.taps" for name in CONVOLUTIONS)
    apart = [row(name, path, shapes[path].shape) for name, path in zip(names, paths, strict=True)]
    if "equal_convolutions" not in layout:
        yield from apart
        return
    channels = [x.shape[1] * x.shape[2] for x in (shapes[path] for path in paths)]
    third = _third(*channels[1:])

    def to_model(*arrays):
        parts = jnp.split(jnp.concatenate(arrays), [channels[0], channels[0] + channels[1]])
        return tuple(entry.to_model(part)[0] for entry, part in zip(apart, parts, strict=True))

    def to_disk(*taps):
        whole = jnp.concatenate([entry.to_disk(x)[0] for entry, x in zip(apart, taps, strict=True)])
        return tuple(jnp.split(whole, [third, 2 * third]))

    yield Entry(names, paths, to_model, to_disk)


def _third(key_channels, value_channels):
    """The first two sizes of the joined convolution in three parts; the last one has the rest."""
    return -(-(2 * key_channels + value_channels) // 3)


def olmo_hybrid(options: Mapping[str, Any], tensors: Tensors) -> HybridConfig:
    """The configuration of an OLMo Hybrid."""
    read = read_options(options, required=REQUIRED, defaults=DEFAULTS, only=ONLY, inert=INERT)
    heads, hidden = read["num_attention_heads"], read["hidden_size"]
    if hidden % heads:
        raise ValueError(f"num_attention_heads must divide hidden_size {hidden}, got {heads}")
    delta = partial(
        GatedDeltaNet,
        num_heads=read["linear_num_key_heads"],
        head_size=read["linear_key_head_dim"],
        value_size=read["linear_value_head_dim"],
        num_value_heads=read["linear_num_value_heads"],
        conv_size=read["linear_conv_kernel_dim"],
        max_beta=2.0 if read["linear_allow_neg_eigval"] else 1.0,
        norm_eps=OUTPUT_NORM_EPS,
    )
    theta = _theta(options)
    full = partial(
        GroupedQueryAttention,
        num_heads=heads,
        head_size=hidden // heads,
        num_key_value_heads=read["num_key_value_heads"],
        qk_norm="all",
        norm_eps=read["rms_norm_eps"],
        rotary_size=0 if theta is None else None,
        rotary_theta=1e4 if theta is None else float(theta),
        use_bias=read["attention_bias"],
        out_bias=read["attention_bias"],
    )
    feed_forward = partial(SwiGLU, d_ff=read["intermediate_size"])
    blocks = {
        "linear_attention": BlockConfig(delta, feed_forward, "pre"),
        "full_attention": BlockConfig(full, feed_forward, "post"),
    }
    kinds = layer_types(read, interval=None)
    return HybridConfig(
        vocab_size=read["vocab_size"],
        d_model=hidden,
        blocks=tuple(blocks[kind] for kind in kinds),
        norm_eps=read["rms_norm_eps"],
        tied=read["tie_word_embeddings"],
        layout=_layout(kinds, read, tensors),
    )


def _theta(options):
    """rope_theta, which older files have at the top level; None: no positions. Absent, transformers takes 10,000."""
    rope = options.get("rope_parameters") or {}
    try:
        read_options(rope, required=(), defaults={"rope_theta": 1e4}, only={"rope_type": ("default",)})
    except ValueError as error:
        raise ValueError(f"rope_parameters: {error}") from error
    return next((x["rope_theta"] for x in (rope, options) if "rope_theta" in x), 1e4)


def _layout(kinds, read, tensors):
    """How the names of a folder differ from the published ones."""
    linear = [f"model.layers.{i}." for i, kind in enumerate(kinds) if kind == "linear_attention"]
    full = [f"model.layers.{i}." for i, kind in enumerate(kinds) if kind == "full_attention"]
    layout = set()
    if any(f"{layer}attention_layer_norm.weight" in tensors for layer in linear):
        layout.add("other_linear_norms")
    if any(f"{layer}feedforward_layer_norm.weight" in tensors for layer in full):
        layout.add("other_full_norms")
    key_channels = read["linear_num_key_heads"] * read["linear_key_head_dim"]
    value_channels = read["linear_num_value_heads"] * read["linear_value_head_dim"]
    third = _third(key_channels, value_channels)
    firsts = [tensors.get(f"{layer}linear_attn.q_conv1d.weight", (key_channels,))[0] for layer in linear]
    if third != key_channels and third in firsts:
        layout.add("equal_convolutions")
    return frozenset(layout)


FAMILIES = {"olmo_hybrid": Family(olmo_hybrid, entries, "", HybridLM)}
