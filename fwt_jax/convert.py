"""Weights of the authors' language-model toolkit (IDSIA/lmtool-fwp) <-> ``DecoderLM``, by a table.

config = config_from_toolkit(arguments)             # the toolkit's own: attn_type, n_layer, d_model, ...
model = from_toolkit(state_dict, arguments)         # arrays by the toolkit's names
state_dict = to_toolkit(model, arguments)
"""

from __future__ import annotations

from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
from flax import nnx

from fwt_jax.models import DecoderLM, ModelConfig

# attn_type -> rule, feature map, whether features are normalised by their sum, attention normalisation
ATTENTION = {2: ("softmax", "elu_plus_one", False, False)}
for _last, _map in ((4, "elu_plus_one"), (5, "favor_plus"), (6, "dpfp")):
    ATTENTION[_last] = ("sum", _map, False, "read")
    ATTENTION[20 + _last] = ("delta", _map, True, "read")
    ATTENTION[40 + _last] = ("delta", _map, True, "retrieval")
    if _map != "dpfp":  # which the toolkit does not have for the sum rule
        ATTENTION[30 + _last] = ("sum", _map, False, "read")


def config_from_toolkit(arguments: Mapping) -> ModelConfig:
    """The configuration of a model of the toolkit.

    Args:
      arguments: by the toolkit's names: attn_type, n_layer, n_head, d_model, d_head, d_inner, n_token, cutoffs, and
        where they matter pre_lnorm, no_pos, skip_attn_normalization, performer_proj_dim, dpfp_n_roll, dropout.

    Raises:
      ValueError: an attn_type that is none of the paper's, an argument that is missing.
    """
    missing = [name for name in REQUIRED if name not in arguments]
    if missing:
        raise ValueError(f"arguments lack {', '.join(missing)}; the toolkit saves them beside the weights")
    if arguments["attn_type"] not in ATTENTION:
        raise ValueError(f"attn_type must be one of {sorted(ATTENTION)}, got {arguments['attn_type']!r}")
    rule, feature_map, by_sum, normalize = ATTENTION[arguments["attn_type"]]
    if arguments["attn_type"] > 20 and arguments.get("skip_attn_normalization"):
        normalize = False
    quadratic = arguments["attn_type"] in (4, 5, 6)  # these scale the numerator and the denominator of the read
    scale = {"eps": 1e-5 * arguments["d_head"] ** 0.5, "output_scale": 1.0} if quadratic else {}
    if arguments.get("pre_lnorm") and arguments["attn_type"] < 20:
        raise ValueError(
            f"pre_lnorm with attn_type {arguments['attn_type']} normalises keys and values but not queries; "
            "there is no such model here"
        )
    size = {"favor_plus": "performer_proj_dim", "dpfp": "dpfp_n_roll"}.get(feature_map)
    return ModelConfig(
        vocab_size=arguments["n_token"],
        num_layers=arguments["n_layer"],
        d_model=arguments["d_model"],
        d_ff=arguments["d_inner"],
        num_heads=arguments["n_head"],
        head_size=arguments["d_head"],
        rule=rule,
        feature_map=feature_map,
        feature_size=arguments[size] if size else 1,
        feature_normalization="sum" if by_sum else None,
        normalize=normalize,
        positions=None if arguments.get("no_pos") else "descending",
        norm="pre" if arguments.get("pre_lnorm") else "post",
        cutoffs=tuple(arguments["cutoffs"]),
        dropout=arguments.get("dropout", 0.1),
        **scale,
    )


REQUIRED = ("attn_type", "n_layer", "n_head", "d_model", "d_head", "d_inner", "n_token", "cutoffs")


def from_toolkit(state: Mapping[str, np.ndarray], arguments: Mapping, projections=None) -> DecoderLM:
    """A model with the weights of the toolkit.

    Args:
      state: its state_dict, arrays by name. The output matrix must be the embedding (``--tied``).
      arguments: see ``config_from_toolkit``.
      projections: for each layer that of FAVOR+, ``[d_head, m]``; drawn anew if not given, as the toolkit, which does
        not save them, does.

    Raises:
      ValueError: names that are missing or not used, all of them, and arrays of another shape.
    """
    config = config_from_toolkit(arguments)
    model = DecoderLM(config, rngs=nnx.Rngs(0))
    state = {name: np.asarray(x) for name, x in state.items() if name not in DERIVED}
    tied = state.pop("crit.out_layers.0.weight", None)
    if tied is not None and not np.array_equal(tied, state.get("word_emb.emb_layers.0.weight")):
        raise ValueError("crit.out_layers.0.weight must be word_emb.emb_layers.0.weight: only tied models are known")
    wanted = to_toolkit(model, arguments)
    wrong = [f"{name} is missing" for name in wanted if name not in state and name != "crit.out_layers.0.weight"]
    wrong += [f"{name} is not used" for name in state if name not in wanted]
    wrong += [
        f"{name} must be {list(wanted[name].shape)}, got {list(x.shape)}"
        for name, x in state.items()
        if name in wanted and x.shape != wanted[name].shape
    ]
    if wrong:
        raise ValueError("the weights do not fit the arguments: " + "; ".join(wrong))
    for name, variable, take, _ in _table(model, arguments):
        variable[...] = jnp.asarray(take(state[name]), jnp.float32)
    for block, projection in zip(model.blocks, projections or (), strict=projections is not None):
        block.attention.feature_map.projection[...] = jnp.asarray(projection, jnp.float32).T
    return model


DERIVED = ("pos_emb.inv_freq",)  # a constant


def to_toolkit(model: DecoderLM, arguments: Mapping) -> dict[str, np.ndarray]:
    """The toolkit's state_dict of a model: float32 arrays by name. ``arguments``: by the toolkit's names, of which
    attn_type alone is used. ``from_toolkit`` is its inverse."""
    state = {}
    for name, variable, _, put in _table(model, arguments):
        array = np.asarray(variable[...])
        state[name] = put(array, state.get(name))
    return state | {"crit.out_layers.0.weight": state["word_emb.emb_layers.0.weight"]}


def gradients_to_toolkit(gradients, model: DecoderLM, arguments: Mapping) -> dict[str, np.ndarray]:
    """As ``to_toolkit``, for a gradient: a state of the shape of the model's."""
    graph, _, rest = nnx.split(model, nnx.Param, ...)
    return to_toolkit(nnx.merge(graph, gradients, rest), arguments)


def _table(model, arguments):
    """(name, variable, array of the toolkit -> ours, (ours, what the toolkit's array is so far) -> the toolkit's)."""
    same = (lambda x: x, lambda x, _: x)
    transposed = (lambda x: x.T, lambda x, _: x.T)
    yield "word_emb.emb_layers.0.weight", model.embedding, *same
    yield "crit.out_layers.0.bias", model.output_bias, *same
    if model.cluster_kernel is not None:
        yield "crit.cluster_weight", model.cluster_kernel, *same
        yield "crit.cluster_bias", model.cluster_bias, *same
    for i, block in enumerate(model.blocks):
        attention, layer = block.attention, f"layers.{i}."
        heads, size = attention.query.kernel.shape[1:]
        separate = arguments["attn_type"] < 20  # q_net and kv_net, else one matrix, head by head
        parts = [("query", size), ("key", size), ("value", size)]
        parts += [("beta", 1)] if getattr(attention, "beta", None) is not None else []
        for index, (part, rows) in enumerate(parts):
            name = f"{layer}dec_attn." + ("qkvb" if len(parts) == 4 else "qkv") + "_net.weight"
            take, put = _head_by_head(index * size, rows, sum(rows for _, rows in parts), heads)
            if separate:
                name = f"{layer}dec_attn." + ("q" if part == "query" else "kv") + "_net.weight"
                take, put = _one_after_another(max(0, index - 1), 1 if part == "query" else 2, heads)
            yield name, getattr(attention, part).kernel, take, put
        yield (
            f"{layer}dec_attn.o_net.weight",
            attention.out.kernel,
            lambda x, heads=heads: x.T.reshape(heads, -1, x.shape[0]),
            lambda x, _: x.reshape(-1, x.shape[-1]).T,
        )
        for name, norm in (("dec_attn", block.attention_norm), ("pos_ff", block.feed_forward_norm)):
            yield f"{layer}{name}.layer_norm.weight", norm.scale, *same
            yield f"{layer}{name}.layer_norm.bias", norm.bias, *same
        for index, linear in ((0, block.feed_forward.hidden), (3, block.feed_forward.out)):
            yield f"{layer}pos_ff.CoreNet.{index}.weight", linear.kernel, *transposed
            yield f"{layer}pos_ff.CoreNet.{index}.bias", linear.bias, *same


def _head_by_head(start, rows, total, heads):
    """Rows of a matrix ``[H·total, D]`` <-> ``[D, H, rows]``, or ``[D, H]`` for a single one."""

    def take(x):
        x = np.moveaxis(x.reshape(heads, total, -1)[:, start : start + rows], -1, 0)
        return x[..., 0] if rows == 1 and start else x

    def put(x, whole):
        whole = np.zeros((heads, total, x.shape[0]), x.dtype) if whole is None else whole.reshape(heads, total, -1)
        whole[:, start : start + rows] = np.moveaxis(x.reshape(x.shape[0], heads, rows), 0, -1)
        return whole.reshape(heads * total, -1)

    return take, put


def _one_after_another(index, count, heads):
    """Part ``index`` of ``count`` of a matrix ``[count·H·D_head, D]`` <-> ``[D, H, D_head]``."""

    def take(x):
        part = np.split(x, count)[index]
        return part.T.reshape(x.shape[1], heads, -1)

    def put(x, whole):
        part = x.reshape(x.shape[0], -1).T
        whole = np.zeros((count * len(part), x.shape[0]), x.dtype) if whole is None else whole
        whole[index * len(part) : (index + 1) * len(part)] = part
        return whole

    return take, put
