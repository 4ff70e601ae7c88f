"""The family kimi_linear."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from fwt_jax.convert.families.names import Shapes, joined, joined_by_head, one_to_one, rows
from fwt_jax.convert.families.options import read_options
from fwt_jax.convert.families.qwen import expert_entries, layer_types
from fwt_jax.convert.families.table import Entry, Family, Tensors
from fwt_jax.layers import KimiDeltaAttention, LatentAttention
from fwt_jax.models import BlockConfig, HybridConfig, HybridLM, MixtureOfExperts, SwiGLU
from fwt_jax.models.blocks import partial

REQUIRED = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "intermediate_size",
    "num_attention_heads",
    "kv_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
)
DEFAULTS = {
    "first_k_dense_replace": 1,
    "layer_types": None,
    "linear_attn_config": None,
    "linear_conv_kernel_dim": 4,
    "linear_head_dim": 128,
    "linear_num_heads": 32,
    "mlp_layer_types": None,
    "moe_intermediate_size": None,
    "moe_renormalize": True,
    "num_expert_group": 1,
    "num_experts": 0,
    "num_experts_per_token": None,
    "num_shared_experts": 1,
    "rms_norm_eps": 1e-5,
    "routed_scaling_factor": 2.446,
    "topk_group": 1,
}
ONLY = {
    "attention_bias": (False,),
    "attention_dropout": (0.0, 0),
    "hidden_act": ("silu",),
    "mla_use_nope": (True,),
    "moe_router_activation_func": ("sigmoid",),
    "num_nextn_predict_layers": (0,),
    "output_router_logits": (False,),
    "q_lora_rank": (None,),
    "rope_scaling": (None,),
    "tie_word_embeddings": (False,),
    "use_grouped_topk": (True,),
}
# Sizes that latent attention has from others, and what transformers 5.24 does not read
INERT = (
    "head_dim",
    "model_max_length",
    "moe_layer_freq",
    "num_key_value_heads",
    "pretraining_tp",
    "qk_head_dim",
    "rope_theta",
)
LATENT_NORM_EPS = 1e-6  # whatever rms_norm_eps is

NAMES = {"model.embed_tokens.weight": "embedding", "model.norm.weight": "norm.scale", "lm_head.weight": "head"}
BLOCK_NAMES = {
    "input_layernorm.weight": "mixer_norm.scale",
    "post_attention_layernorm.weight": "feed_forward_norm.scale",
    "block_sparse_moe.gate.weight": "feed_forward.router.kernel",
    "block_sparse_moe.gate.e_score_correction_bias": "feed_forward.bias",
    "block_sparse_moe.shared_experts.gate_proj.weight": "feed_forward.shared.gate.kernel",
    "block_sparse_moe.shared_experts.up_proj.weight": "feed_forward.shared.up.kernel",
    "block_sparse_moe.shared_experts.down_proj.weight": "feed_forward.shared.down.kernel",
}
DENSE_NAMES = {
    "gate_proj.weight": "feed_forward.gate.kernel",
    "up_proj.weight": "feed_forward.up.kernel",
    "down_proj.weight": "feed_forward.down.kernel",
}
DELTA_NAMES = {
    "q_proj.weight": "query.kernel",
    "k_proj.weight": "key.kernel",
    "v_proj.weight": "value.kernel",
    "q_conv1d.weight": "convolutions.query.taps",
    "k_conv1d.weight": "convolutions.key.taps",
    "v_conv1d.weight": "convolutions.value.taps",
    "b_proj.weight": "beta.kernel",
    "f_a_proj.weight": "decay.projection.down.kernel",
    "f_b_proj.weight": "decay.projection.up.kernel",
    "dt_bias": "decay.bias",
    "g_a_proj.weight": "gate.projection.down.kernel",
    "g_b_proj.weight": "gate.projection.up.kernel",
    "o_norm.weight": "norm.scale",
    "o_proj.weight": "out.kernel",
}
LATENT_NAMES = {
    "q_proj.weight": "query.kernel",
    "kv_a_layernorm.weight": "latent_norm.scale",
    "o_proj.weight": "out.kernel",
}


def entries(config: HybridConfig, shapes: Shapes) -> Iterator[Entry]:
    """The table of names of a model."""
    yield from rows(NAMES, "", "", shapes)
    for i in range(len(config.blocks)):
        disk, model = f"model.layers.{i}.", f"blocks.{i}."
        yield from rows(BLOCK_NAMES, disk, model, shapes)
        mixer = f"{disk}self_attn.", f"{model}mixer."
        if f"{model}mixer.decay.bias" in shapes:
            yield from rows(DELTA_NAMES, *mixer, shapes)
            yield _rate_entry(*mixer, shapes, "flat_rates" in config.layout)
        else:
            yield from _latent_entries(*mixer, shapes)
        if f"{model}feed_forward.router.kernel" in shapes:
            experts = f"{disk}block_sparse_moe.experts.", f"{model}feed_forward."
            yield from expert_entries(*experts, shapes, names=("w1", "w3", "w2"))
        else:
            dense = "block_sparse_moe" if "dense_in_mixture" in config.layout else "mlp"
            yield from rows(DENSE_NAMES, f"{disk}{dense}.", model, shapes)


def _rate_entry(disk, model, shapes, is_flat):
    name, path = f"{disk}A_log", f"{model}decay.log_rate"
    shape = shapes[path].shape
    disk_shape = shape if is_flat else (1, 1, *shape, 1)
    return one_to_one(name, path, lambda x: x.reshape(shape), lambda x: x.reshape(disk_shape))


def _latent_entries(disk, model, shapes):
    yield from rows(LATENT_NAMES, disk, model, shapes)
    latent = (f"{model}latent.kernel", f"{model}shared_key.kernel")
    yield joined(f"{disk}kv_a_proj_with_mqa.weight", latent, shapes)
    heads = (f"{model}key.kernel", f"{model}value.kernel")
    yield joined_by_head(f"{disk}kv_b_proj.weight", heads, shapes[heads[0]].shape[1], shapes)


def kimi_linear(options: Mapping[str, Any], tensors: Tensors) -> HybridConfig:
    """The configuration of a Kimi Linear."""
    read = read_options(options, required=REQUIRED, defaults=DEFAULTS, only=ONLY, inert=INERT)
    delta, kinds = _delta(read)
    full = partial(
        LatentAttention,
        num_heads=read["num_attention_heads"],
        head_size=read["qk_nope_head_dim"],
        shared_size=read["qk_rope_head_dim"],
        latent_size=read["kv_lora_rank"],
        value_size=read["v_head_dim"],
        norm_eps=LATENT_NORM_EPS,
    )
    mixers = {"linear_attention": delta, "full_attention": full}
    layout = set()
    if any(name.endswith(".block_sparse_moe.gate_proj.weight") for name in tensors):
        layout.add("dense_in_mixture")
    if any(name.endswith(".A_log") and len(shape) == 1 for name, shape in tensors.items()):
        layout.add("flat_rates")
    return HybridConfig(
        vocab_size=read["vocab_size"],
        d_model=read["hidden_size"],
        blocks=tuple(
            BlockConfig(mixers[kind], _feed_forward(read, is_mixture))
            for kind, is_mixture in zip(kinds, _are_mixtures(read), strict=True)
        ),
        norm_eps=read["rms_norm_eps"],
        layout=frozenset(layout),
    )


def _delta(read):
    """The layer with a fast weight memory, and the kind of each layer."""
    try:
        linear = read_options(
            read["linear_attn_config"] or {},
            required=(),
            defaults={
                "full_attn_layers": None,
                "head_dim": read["linear_head_dim"],
                "kda_layers": None,
                "num_heads": read["linear_num_heads"],
                "short_conv_kernel_size": read["linear_conv_kernel_dim"],
            },
            only={},
        )
    except ValueError as error:
        raise ValueError(f"linear_attn_config: {error}") from error
    layer = partial(
        KimiDeltaAttention,
        num_heads=linear["num_heads"],
        head_size=linear["head_dim"],
        conv_size=linear["short_conv_kernel_size"],
        gate_bias=False,
        norm_eps=read["rms_norm_eps"],
    )
    return layer, _kinds(read, linear["kda_layers"], linear["full_attn_layers"])


def _kinds(read, delta_layers, full_layers):
    """The kind of each layer. The two lists, which may be None, count layers from 1."""
    number = read["num_hidden_layers"]
    if read["layer_types"] is not None:
        return layer_types(read)
    if delta_layers is None or full_layers is None:
        return ["full_attention" if i > 0 and i % 4 == 0 else "linear_attention" for i in range(number)]
    if sorted([*delta_layers, *full_layers]) != list(range(1, number + 1)):
        raise ValueError(
            f"linear_attn_config: kda_layers and full_attn_layers must be the layers 1 to {number}, "
            f"got {delta_layers} and {full_layers}"
        )
    return ["full_attention" if i + 1 in full_layers else "linear_attention" for i in range(number)]


def _are_mixtures(read) -> list[bool]:
    """Whether the feed-forward layer of each block is a mixture of experts."""
    number, kinds = read["num_hidden_layers"], read["mlp_layer_types"]
    if kinds is None:
        return [bool(read["num_experts"]) and i >= read["first_k_dense_replace"] for i in range(number)]
    if len(kinds) != number or set(kinds) - {"dense", "sparse"}:
        raise ValueError(f"mlp_layer_types must be dense or sparse for each of {number} layers, got {kinds}")
    return [kind == "sparse" for kind in kinds]


def _feed_forward(read, is_mixture):
    if not is_mixture:
        return partial(SwiGLU, d_ff=read["intermediate_size"])
    missing = [name for name in ("num_experts", "moe_intermediate_size", "num_experts_per_token") if not read[name]]
    if missing:
        raise ValueError(f"mixtures of experts need these options, which are missing: {', '.join(missing)}")
    return partial(
        MixtureOfExperts,
        num_experts=read["num_experts"],
        experts_per_token=read["num_experts_per_token"],
        d_ff=read["moe_intermediate_size"],
        shared_d_ff=read["moe_intermediate_size"] * read["num_shared_experts"],
        router="sigmoid",
        normalize=read["moe_renormalize"],
        groups=read["num_expert_group"],
        groups_per_token=read["topk_group"],
        scaling=read["routed_scaling_factor"],
    )


FAMILIES = {"kimi_linear": Family(kimi_linear, entries, "", HybridLM)}
