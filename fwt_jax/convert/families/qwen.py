"""The families of Qwen: qwen3_next, qwen3_5_text and qwen3_5 (with images, of which the text model is read), dense and
with mixtures of experts."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp

from fwt_jax.convert.families.names import Shapes, joined, joined_by_head, one_to_one, rows, stacked
from fwt_jax.convert.families.options import read_options
from fwt_jax.convert.families.table import Entry, Family, Tensors
from fwt_jax.layers import GatedDeltaNet, GroupedQueryAttention
from fwt_jax.models import BlockConfig, HybridConfig, HybridLM, MixtureOfExperts, SwiGLU
from fwt_jax.models.blocks import partial

REQUIRED = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "linear_num_key_heads",
    "linear_num_value_heads",
    "linear_key_head_dim",
    "linear_value_head_dim",
)
DEFAULTS = {
    "attention_bias": False,
    "full_attention_interval": 4,
    "intermediate_size": None,
    "layer_types": None,
    "linear_conv_kernel_dim": 4,
    "partial_rotary_factor": 0.25,
    "rms_norm_eps": 1e-6,
    "rope_parameters": None,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
ONLY = {
    "attention_dropout": (0.0, 0),
    "attn_output_gate": (True,),
    "hidden_act": ("silu",),
    "mamba_ssm_dtype": ("float32",),
    "output_gate_type": ("swish", "silu"),
    "output_router_logits": (False,),
    "rope_scaling": (None,),
    "use_sliding_window": (False,),
}
MIXTURE = {
    "decoder_sparse_step": 1,
    "mlp_only_layers": (),
    "moe_intermediate_size": None,
    "norm_topk_prob": True,
    "num_experts": 0,
    "num_experts_per_tok": None,
    "shared_expert_intermediate_size": None,
}
# In Qwen3.5 with experts every layer is a mixture.
ALL_LAYERS = {"decoder_sparse_step": (1,), "mlp_only_layers": ([],), "norm_topk_prob": (True,)}
# Of training, and of the head that predicts several tokens, which is not read.
INERT = ("mtp_num_hidden_layers", "mtp_use_dedicated_embeddings", "router_aux_loss_coef", "sliding_window")

# What is beside the text_config of a model that reads images, too.
IMAGES = (
    "image_token_id",
    "language_model_only",
    "video_token_id",
    "vision_config",
    "vision_end_token_id",
    "vision_start_token_id",
)

NAMES = {"embed_tokens.weight": "embedding", "norm.weight": "norm.scale"}
BLOCK_NAMES = {
    "input_layernorm.weight": "mixer_norm.scale",
    "post_attention_layernorm.weight": "feed_forward_norm.scale",
    "mlp.gate_proj.weight": "feed_forward.gate.kernel",
    "mlp.up_proj.weight": "feed_forward.up.kernel",
    "mlp.down_proj.weight": "feed_forward.down.kernel",
    "mlp.gate.weight": "feed_forward.router.kernel",
    "mlp.shared_expert.gate_proj.weight": "feed_forward.shared.gate.kernel",
    "mlp.shared_expert.up_proj.weight": "feed_forward.shared.up.kernel",
    "mlp.shared_expert.down_proj.weight": "feed_forward.shared.down.kernel",
    "mlp.shared_expert_gate.weight": "feed_forward.shared_gate.kernel",
}
DELTA_NAMES = {
    "A_log": "decay.log_rate",
    "dt_bias": "decay.bias",
    "norm.weight": "norm.scale",
    "out_proj.weight": "out.kernel",
}
ATTENTION_NAMES = {
    "k_proj.weight": "key.kernel",
    "k_proj.bias": "key.bias",
    "v_proj.weight": "value.kernel",
    "v_proj.bias": "value.bias",
    "o_proj.weight": "out.kernel",
    "o_proj.bias": "out.bias",
    "q_norm.weight": "query_norm.scale",
    "k_norm.weight": "key_norm.scale",
}
PASSED_OVER = r"mtp\..*|model\.visual\..*"


def entries(config: HybridConfig, shapes: Shapes, *, fused: bool) -> Iterator[Entry]:
    """The table of names of a model. ``fused``: Qwen3-Next has the projections of a key head side by side."""
    prefix = "model.language_model." if "language_model" in config.layout else "model."
    yield from rows(NAMES, prefix, "", shapes)
    yield from rows({"lm_head.weight": "head"}, "", "", shapes)
    for i in range(len(config.blocks)):
        disk, model = f"{prefix}layers.{i}.", f"blocks.{i}."
        yield from rows(BLOCK_NAMES, disk, model, shapes)
        if f"{model}mixer.decay.bias" in shapes:
            yield from _delta_entries(f"{disk}linear_attn.", f"{model}mixer.", shapes, fused)
        else:
            yield from _attention_entries(f"{disk}self_attn.", f"{model}mixer.", shapes)
        if f"{model}feed_forward.router.kernel" in shapes:
            experts = f"{disk}mlp.experts.", f"{model}feed_forward."
            yield from expert_entries(*experts, shapes, "stacked_experts" in config.layout)


def _delta_entries(disk, model, shapes, fused):
    yield from rows(DELTA_NAMES, disk, model, shapes)
    convolutions = tuple(f"{model}convolutions.{name}.taps" for name in ("query", "key", "value"))
    yield joined(f"{disk}conv1d.weight", convolutions, shapes)
    kernels = tuple(f"{model}{name}.kernel" for name in ("query", "key", "value", "gate.projection"))
    numbers = (f"{model}beta.kernel", f"{model}decay.projection.kernel")
    if fused:
        num_heads = shapes[kernels[0]].shape[1]
        yield joined_by_head(f"{disk}in_proj_qkvz.weight", kernels, num_heads, shapes)
        yield joined_by_head(f"{disk}in_proj_ba.weight", numbers, num_heads, shapes)
        return
    yield joined(f"{disk}in_proj_qkv.weight", kernels[:3], shapes)
    names = {"in_proj_z.weight": kernels[3], "in_proj_b.weight": numbers[0], "in_proj_a.weight": numbers[1]}
    yield from rows(names, disk, "", shapes)


def _attention_entries(disk, model, shapes):
    num_heads = shapes[f"{model}query.kernel"].shape[1]
    for kind, name in (("kernel", "q_proj.weight"), ("bias", "q_proj.bias")):
        paths = (f"{model}query.{kind}", f"{model}gate.{kind}")
        if paths[0] in shapes:
            yield joined_by_head(disk + name, paths, num_heads, shapes)
    yield from rows(ATTENTION_NAMES, disk, model, shapes)


def expert_entries(
    disk: str,
    model: str,
    shapes: Shapes,
    is_stacked: bool = False,
    names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
) -> Iterator[Entry]:
    """The rows of the experts of a mixture: three tensors for each, or two that stack all of them."""
    paths = tuple(f"{model}{name}" for name in ("gate", "up", "down"))
    num_experts, _, d_ff = shapes[paths[0]].shape
    if not is_stacked:
        for name, path in zip(names, paths, strict=True):
            yield stacked(tuple(f"{disk}{e}.{name}.weight" for e in range(num_experts)), path)
        return

    def split(x):
        return x[:, :d_ff].swapaxes(1, 2), x[:, d_ff:].swapaxes(1, 2)

    def join(gate, up):
        return (jnp.concatenate([gate, up], axis=-1).swapaxes(1, 2),)

    yield Entry((f"{disk}gate_up_proj",), paths[:2], split, join)
    yield one_to_one(f"{disk}down_proj", paths[2], lambda x: x.swapaxes(1, 2), lambda x: x.swapaxes(1, 2))


# --- config.json -----------------------------------------------------------------------------------------------------


def text_config(options: Mapping[str, Any], tensors: Tensors, only: Mapping[str, tuple] = ONLY) -> HybridConfig:
    """The configuration of a text model.

    Args:
      options: the mapping in config.json.
      tensors: the shapes of the tensors on disk.
      only: see ``read_options``.
    """
    defaults = {name: value for name, value in (DEFAULTS | MIXTURE).items() if name not in only}
    read = read_options(options, required=REQUIRED, defaults=defaults, only=only, inert=INERT)
    kinds = layer_types(read)
    delta = partial(
        GatedDeltaNet,
        num_heads=read["linear_num_key_heads"],
        head_size=read["linear_key_head_dim"],
        value_size=read["linear_value_head_dim"],
        num_value_heads=read["linear_num_value_heads"],
        conv_size=read["linear_conv_kernel_dim"],
        norm_eps=read["rms_norm_eps"],
    )
    rope = _rope(read)
    full = partial(
        GroupedQueryAttention,
        num_heads=read["num_attention_heads"],
        head_size=read["head_dim"],
        num_key_value_heads=read["num_key_value_heads"],
        qk_norm="head",
        norm_eps=read["rms_norm_eps"],
        zero_centered=True,
        rotary_size=int(read["head_dim"] * rope["partial_rotary_factor"]),
        rotary_theta=float(rope["rope_theta"]),
        gate=True,
        use_bias=read["attention_bias"],
        out_bias=read["attention_bias"],
    )
    mixers = {"linear_attention": delta, "full_attention": full}
    layout = {"language_model"} if any(name.startswith("model.language_model.") for name in tensors) else set()
    if any(name.endswith(".mlp.experts.gate_up_proj") for name in tensors):
        layout.add("stacked_experts")
    return HybridConfig(
        vocab_size=read["vocab_size"],
        d_model=read["hidden_size"],
        blocks=tuple(BlockConfig(mixers[kind], _feed_forward(read, i)) for i, kind in enumerate(kinds)),
        norm_eps=read["rms_norm_eps"],
        zero_centered=True,
        tied=read["tie_word_embeddings"],
        layout=frozenset(layout),
    )


def layer_types(read: Mapping[str, Any], interval: str | None = "full_attention_interval") -> list[str]:
    """The kind of each layer."""
    number = read["num_hidden_layers"]
    kinds = read["layer_types"]
    if kinds is None:
        every = 4 if interval is None else read[interval]
        return ["full_attention" if (i + 1) % every == 0 else "linear_attention" for i in range(number)]
    if len(kinds) != number or set(kinds) - {"linear_attention", "full_attention"}:
        raise ValueError(
            f"layer_types must be linear_attention or full_attention for each of {number} layers, got {kinds}"
        )
    return list(kinds)


def _rope(read):
    """rope_theta and partial_rotary_factor, which older files have at the top level."""
    older = {name: read[name] for name in ("rope_theta", "partial_rotary_factor")}
    if read["rope_parameters"] is None:
        return older
    try:
        return read_options(
            read["rope_parameters"],
            required=(),
            defaults=older,
            only={"rope_type": ("default",), "type": ("default",)},
            inert=("mrope_interleaved", "mrope_section"),  # for images: all positions of a text are equal
        )
    except ValueError as error:
        raise ValueError(f"rope_parameters: {error}") from error


def _feed_forward(read, i):
    is_mixture = read["num_experts"] and (i + 1) % read["decoder_sparse_step"] == 0 and i not in read["mlp_only_layers"]
    names = ("moe_intermediate_size", "num_experts_per_tok", "shared_expert_intermediate_size")
    missing = [name for name in (names if is_mixture else ("intermediate_size",)) if read[name] is None]
    if missing:
        raise ValueError(f"layer {i} needs these options, which are missing: {', '.join(missing)}")
    if not is_mixture:
        return partial(SwiGLU, d_ff=read["intermediate_size"])
    return partial(
        MixtureOfExperts,
        num_experts=read["num_experts"],
        experts_per_token=read["num_experts_per_tok"],
        d_ff=read["moe_intermediate_size"],
        shared_d_ff=read["shared_expert_intermediate_size"],
        shared_gate=True,
        normalize=read["norm_topk_prob"],
    )


def multimodal_config(options: Mapping[str, Any], tensors: Tensors) -> HybridConfig:
    """The configuration of the text model of one that reads images, too."""
    only = {"tie_word_embeddings": (False, True)}
    read = read_options(options, required=("text_config",), defaults={}, only=only, inert=IMAGES)
    config = text_config(read["text_config"], tensors, ONLY | ALL_LAYERS)
    return dataclasses.replace(config, tied=read["tie_word_embeddings"])


_is_fused, _is_apart = (functools.partial(entries, fused=fused) for fused in (True, False))
_qwen3_5_text = functools.partial(text_config, only=ONLY | ALL_LAYERS)
FAMILIES = {
    "qwen3_next": Family(text_config, _is_fused, PASSED_OVER, HybridLM),
    "qwen3_5_text": Family(_qwen3_5_text, _is_apart, PASSED_OVER, HybridLM),
    "qwen3_5_moe_text": Family(_qwen3_5_text, _is_apart, PASSED_OVER, HybridLM),
    "qwen3_5": Family(multimodal_config, _is_apart, PASSED_OVER, HybridLM),
    "qwen3_5_moe": Family(multimodal_config, _is_apart, PASSED_OVER, HybridLM),
}
