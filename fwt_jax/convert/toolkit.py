"""The table: names, shapes and arguments of the authors' toolkit <-> those of ``DecoderLM``."""

from __future__ import annotations

import math
import numbers
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx

from fwt_jax.layers import FavorPlus
from fwt_jax.models import DecoderLM, ModelConfig


class Kind(NamedTuple):
    """The options of ``ModelConfig`` for an attn_type of the toolkit."""

    rule: str
    feature_map: str = "elu_plus_one"
    feature_normalization: Literal[None, "sum"] = None
    normalize: Literal[False, "read", "retrieval"] = False


ATTENTION = {0: Kind("softmax"), 2: Kind("softmax")}  # attn_type: 0 has relative positions, 2 has absolute ones
for _digit, _map in ((4, "elu_plus_one"), (5, "favor_plus"), (6, "dpfp")):
    ATTENTION[_digit] = Kind("sum", _map, None, "read")
    ATTENTION[20 + _digit] = Kind("delta", _map, "sum", "read")
    ATTENTION[40 + _digit] = Kind("delta", _map, "sum", "retrieval")
    if _map != "dpfp":  # The toolkit has no attn_type 36.
        ATTENTION[30 + _digit] = Kind("sum", _map, None, "read")

# Feature maps with a size -> the toolkit's argument for it, and its default
FEATURE_SIZES = {"favor_plus": ("performer_proj_dim", 16), "dpfp": ("dpfp_n_roll", 2)}
# The toolkit's arguments -> the options of ``ModelConfig``
FIELDS = {
    "n_layer": "num_layers",
    "n_head": "num_heads",
    "d_model": "d_model",
    "d_head": "head_size",
    "d_inner": "d_ff",
    "n_token": "vocab_size",
}
REQUIRED = ("attn_type", *FIELDS, "cutoffs")
TYPES: dict[str, Any] = typing.get_type_hints(ModelConfig) | dict.fromkeys(("attn_type", *FIELDS), int)
TYPES |= dict.fromkeys(("performer_proj_dim", "dpfp_n_roll", "mem_len", "clamp_len"), int)
TYPES |= dict.fromkeys(("pre_lnorm", "no_pos", "skip_attn_normalization"), bool)
DERIVED = ("pos_emb.inv_freq",)  # a constant that the toolkit saves with the weights


# --- arguments -------------------------------------------------------------------------------------------------------


def config_from_toolkit(arguments: Mapping) -> ModelConfig:
    """The configuration of a model of the toolkit.

    Args:
      arguments: by the toolkit's names: attn_type, n_layer, n_head, d_model, d_head, d_inner, n_token, cutoffs, and
        where they matter pre_lnorm, no_pos, skip_attn_normalization, performer_proj_dim, dpfp_n_roll, mem_len,
        clamp_len, dropout.

    Raises:
      ValueError: an attn_type that is not of the paper; an argument that is missing, or of another type.
    """
    attn_type, kind = _kind_of(arguments)
    options: dict[str, Any] = {ours: arguments[theirs] for theirs, ours in FIELDS.items()} | kind._asdict()
    if attn_type > 20 and arguments.get("skip_attn_normalization"):
        options["normalize"] = False
    if attn_type in (4, 5, 6):  # These scale the numerator and the denominator of the read.
        options |= {"eps": 1e-5 * arguments["d_head"] ** 0.5, "output_scale": 1.0}
    if attn_type == 0:
        clamp_length = max(0, arguments.get("clamp_len", 0))  # The toolkit also writes -1 for no clamp.
        options |= {"memory_length": arguments.get("mem_len", 0), "clamp_length": clamp_length}
        options["positions"] = "relative"
    else:
        options["positions"] = None if arguments.get("no_pos") else "descending"
    if kind.feature_map in FEATURE_SIZES:
        name, default = FEATURE_SIZES[kind.feature_map]
        options["feature_size"] = arguments.get(name, default)
    return ModelConfig(
        norm="pre" if arguments.get("pre_lnorm") else "post",
        cutoffs=tuple(arguments["cutoffs"]),
        dropout=arguments.get("dropout", 0.1),
        **options,
    )


def _kind_of(arguments):
    check_types(arguments, "the arguments of the toolkit")
    missing = [name for name in REQUIRED if name not in arguments]
    if missing:
        raise ValueError(f"arguments lack {', '.join(missing)}; the toolkit saves them beside the weights")
    attn_type = arguments["attn_type"]
    if attn_type not in ATTENTION:
        raise ValueError(f"attn_type must be one of {sorted(ATTENTION)}, got {attn_type!r}")
    if arguments.get("pre_lnorm") and attn_type < 20:
        raise ValueError(
            f"pre_lnorm with attn_type {attn_type} normalises keys and values but not queries; there is no such model "
            "here"
        )
    return attn_type, ATTENTION[attn_type]


def arguments_of(config: ModelConfig) -> dict[str, Any]:
    """The toolkit's arguments of a model.

    Raises:
      ValueError: no attn_type is this model.
    """
    arguments = {theirs: getattr(config, ours) for theirs, ours in FIELDS.items()} | {
        "cutoffs": list(config.cutoffs),
        "dropout": config.dropout,
        "no_pos": config.positions is None,
        "mem_len": config.memory_length,
        "clamp_len": config.clamp_length,
        "pre_lnorm": config.norm == "pre",
        **{name: config.feature_size for name, _ in FEATURE_SIZES.values()},
    }
    compared = ("rule", "normalize", "feature_map", "feature_normalization", "output_scale", "eps", "norm")
    compared = (*compared, "num_value_heads", "conv_size")
    if config.memory_rule is None:
        compared = ("rule", "norm", "positions")
    for attn_type in sorted(ATTENTION, key=lambda attn_type: (attn_type < 20, attn_type)):
        if attn_type < 20 and arguments["pre_lnorm"]:
            continue
        for skip in (False, True):
            candidate = arguments | {"attn_type": attn_type, "skip_attn_normalization": skip}
            other = config_from_toolkit(candidate)
            if all(_effective(config, name) == _effective(other, name) for name in compared):
                return candidate
    asked = ", ".join(f"{name}={getattr(config, name)!r}" for name in compared)
    raise ValueError(f"the toolkit has no such model: {asked}")


def _effective(config, name):
    """An option, so that options with the same effect are equal."""
    value = getattr(config, name)
    if name in ("num_value_heads", "conv_size") and value is None:
        return config.num_heads
    if name == "output_scale" and value is None:
        return config.head_size**-0.5
    if name == "eps" and not config.normalize:
        return None
    return value


def check_types(config, where):
    """Raises a ``ValueError`` if a config is no JSON object, or a value in it has the wrong type."""
    if not isinstance(config, Mapping):
        raise ValueError(f"{where} must be a JSON object, got {type(config).__name__}")
    for name, value in config.items():
        if name in TYPES and not _fits(value, TYPES[name]):
            expected = getattr(TYPES[name], "__name__", TYPES[name]) if isinstance(TYPES[name], type) else TYPES[name]
            raise ValueError(f"{where}: {name} must be {str(expected).replace('typing.', '')}, got {value!r}")


def _fits(value, kind):
    if typing.get_origin(kind) is typing.Literal:
        return isinstance(value, str | bool | None) and value in typing.get_args(kind)
    if typing.get_origin(kind) is tuple:
        return isinstance(value, list | tuple) and all(_fits(x, int) for x in value)
    if kind is int:
        return isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if kind is float:
        return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)
    return any(_fits(value, one) for one in typing.get_args(kind)) if typing.get_args(kind) else isinstance(value, kind)


# --- weights ---------------------------------------------------------------------------------------------------------


def from_toolkit(
    state: Mapping[str, np.ndarray], arguments: Mapping, projections: Sequence[np.ndarray] | None = None
) -> DecoderLM:
    """A model with the weights of the toolkit.

    Args:
      state: its state_dict, arrays by name. The output matrix must be the embedding (``--tied``).
      arguments: see ``config_from_toolkit``.
      projections: of FAVOR+, ``[d_head, m]`` for each layer. The toolkit does not save them; new ones are drawn if not
        given.

    Raises:
      ValueError: missing and unused names, all of them; arrays of another shape; numbers that are not real, or too
        large for float32; projections for a model without FAVOR+.
    """
    config = config_from_toolkit(arguments)
    check_numbers(state)
    check_numbers({f"projection/{i}": x for i, x in enumerate(projections or ())})
    model = DecoderLM(config, rngs=nnx.Rngs(0))
    state = {name: np.asarray(x) for name, x in state.items() if name not in DERIVED}
    output = state.pop("crit.out_layers.0.weight", None)
    embedding = state.get("word_emb.emb_layers.0.weight")
    if output is not None and (embedding is None or not np.array_equal(output, embedding)):
        raise ValueError("crit.out_layers.0.weight must be word_emb.emb_layers.0.weight: only tied models are known")
    wanted = to_toolkit(model, arguments)
    del wanted["crit.out_layers.0.weight"]
    check_names(wanted, state, "the weights do not fit the arguments")
    for name, variable, take, _ in _table(model, arguments):
        variable[...] = jnp.asarray(take(state[name]), jnp.float32)
    if projections is not None:
        _set_projections(model, projections)
    return model


def _set_projections(model, projections):
    config, variables = model.config, random_projections(model)
    if len(projections) != len(variables):
        raise ValueError(
            f"the model must have a projection for each layer with FAVOR+, {len(variables)}, got {len(projections)}"
        )
    for variable, projection in zip(variables, projections, strict=True):
        projection = np.asarray(projection, np.float32)
        if projection.shape != variable.shape[::-1]:
            wanted = f"[{config.head_size}, {config.feature_size}] for performer_proj_dim={config.feature_size}"
            raise ValueError(f"a projection must be {wanted}, got {list(projection.shape)}")
        variable[...] = jnp.asarray(projection.T)


def random_projections(model: DecoderLM) -> list[nnx.Variable]:
    """The projections of FAVOR+, one for each layer that has it; the toolkit does not save them."""
    maps = (getattr(block.attention, "feature_map", None) for block in model.blocks)
    return [feature_map.projection for feature_map in maps if isinstance(feature_map, FavorPlus)]


def check_numbers(arrays):
    """Raises a ``ValueError`` for an array that float32 cannot represent: complex numbers, integers, 1e300, ..."""
    for name, x in arrays.items():
        x = np.asarray(x)
        if x.dtype.kind == "V":
            raise ValueError(
                f"{name} must be floating-point numbers, got bytes without a type ({x.dtype}), as .npz keeps bfloat16; "
                "save it as float32, or as .safetensors"
            )
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(f"{name} must be real floating-point numbers, got {x.dtype}")
        if x.dtype == np.float64:
            with np.errstate(over="ignore"):
                large = np.isinf(x.astype(np.float32)) & np.isfinite(x)
            if large.any():
                raise ValueError(f"{name} must be numbers that float32 has, got {x[large][0]}")


def check_names(wanted, given, what):
    """Raises a ``ValueError`` that lists every missing or unused name and every wrong shape. ``what``: its subject."""
    wrong = [f"{name} is missing" for name in wanted if name not in given]
    wrong += [f"{name} is not used" for name in given if name not in wanted]
    both = [(name, list(wanted[name].shape), list(x.shape)) for name, x in given.items() if name in wanted]
    wrong += [f"{name} must be {shape}, got {got}" for name, shape, got in both if shape != got]
    if wrong:
        raise ValueError(f"{what}: " + "; ".join(wrong))


def to_toolkit(model: DecoderLM, arguments: Mapping) -> dict[str, np.ndarray]:
    """The toolkit's state_dict of a model: float32 arrays by name. ``from_toolkit`` is its inverse.

    Args:
      arguments: by the toolkit's names; only attn_type is used.
    """
    state = {}
    for name, variable, _, put in _table(model, arguments):
        array = np.asarray(variable[...])
        state[name] = put(array, state.get(name))
    return state | {"crit.out_layers.0.weight": state["word_emb.emb_layers.0.weight"]}


def gradients_to_toolkit(gradients, model: DecoderLM, arguments: Mapping) -> dict[str, np.ndarray]:
    """As ``to_toolkit``, for a gradient: a state with the names and shapes of the model's parameters."""
    graph, _, rest = nnx.split(model, nnx.Param, ...)
    return to_toolkit(nnx.merge(graph, gradients, rest), arguments)


def _table(model, arguments) -> Iterator[tuple[str, Any, Callable, Callable]]:
    """Rows (name, variable, take, put).

    ``take(array of the toolkit)`` is our array. ``put(our array, whole)`` is the toolkit's array; ``whole`` is the last
    result for the same name, or None.
    """
    yield "word_emb.emb_layers.0.weight", model.embedding, *_same()
    yield "crit.out_layers.0.bias", model.output_bias, *_same()
    optional = {
        "r_w_bias": model.content_bias,
        "r_r_bias": model.position_bias,
        "crit.cluster_weight": model.cluster_kernel,
        "crit.cluster_bias": model.cluster_bias,
    }
    for name, variable in optional.items():
        if variable is not None:
            yield name, variable, *_same()
    for i, block in enumerate(model.blocks):
        for name, kernel, take, put in _attention_table(block.attention, arguments["attn_type"]):
            yield f"layers.{i}.dec_attn.{name}", kernel, take, put
        for name, norm in (("dec_attn", block.attention_norm), ("pos_ff", block.feed_forward_norm)):
            yield f"layers.{i}.{name}.layer_norm.weight", norm.scale, *_same()
            yield f"layers.{i}.{name}.layer_norm.bias", norm.bias, *_same()
        for index, linear in ((0, block.feed_forward.hidden), (3, block.feed_forward.out)):
            yield f"layers.{i}.pos_ff.CoreNet.{index}.weight", linear.kernel, *_transposed()
            yield f"layers.{i}.pos_ff.CoreNet.{index}.bias", linear.bias, *_same()


def _attention_table(attention: Any, attn_type) -> Iterator[tuple[str, Any, Callable, Callable]]:
    heads, size = attention.query.kernel.shape[1:]
    sizes = {"query": size, "key": size, "value": size}
    if getattr(attention, "beta", None) is not None:
        sizes["beta"] = 1
    for index, (projection, rows) in enumerate(sizes.items()):
        kernel = getattr(attention, projection).kernel
        if attn_type == 0:
            yield "qkv_net.weight", kernel, *_one_after_another(index, 3, heads)
        elif attn_type >= 20:
            name = "qkvb_net.weight" if "beta" in sizes else "qkv_net.weight"
            yield name, kernel, *_head_by_head(index * size, rows, sum(sizes.values()), heads)
        elif projection == "query":
            yield "q_net.weight", kernel, *_one_after_another(0, 1, heads)
        else:
            yield "kv_net.weight", kernel, *_one_after_another(index - 1, 2, heads)
    if attn_type == 0:
        yield "r_net.weight", attention.position.kernel, *_one_after_another(0, 1, heads)
    yield "o_net.weight", attention.out.kernel, *_merged_heads(heads)


def _same():
    return lambda x: x, lambda x, _: x


def _transposed():
    return lambda x: x.T, lambda x, _: x.T


def _merged_heads(heads):
    """A matrix ``[D, H·D_head]`` <-> ``[H, D_head, D]``."""
    return lambda x: x.T.reshape(heads, -1, x.shape[0]), lambda x, _: x.reshape(-1, x.shape[-1]).T


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
