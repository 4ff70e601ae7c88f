"""Weights of the authors' language-model toolkit (IDSIA/lmtool-fwp) <-> ``DecoderLM``, by a table.

config = config_from_toolkit(arguments)             # the toolkit's own: attn_type, n_layer, d_model, ...
model = from_toolkit(state_dict, arguments)         # arrays by the toolkit's names
state_dict = to_toolkit(model, arguments)

model = load("model.safetensors")                   # what the toolkit saved, or save(model, path) of this file
python -m fwt_jax.convert SRC DST                   # the toolkit's .pt, .npz or .safetensors to ours, or ours back
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import numbers
import os
import pathlib
import pickle
import typing
import zipfile
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fwt_jax.models import DecoderLM, ModelConfig

# attn_type -> rule, feature map, whether features are normalised by their sum, attention normalisation
ATTENTION = {0: ("softmax", "elu_plus_one", False, False), 2: ("softmax", "elu_plus_one", False, False)}
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
        where they matter pre_lnorm, no_pos, skip_attn_normalization, performer_proj_dim, dpfp_n_roll, mem_len,
        clamp_len, dropout.

    Raises:
      ValueError: an attn_type that is none of the paper's, an argument that is missing, or of another type.
    """
    _check_types(arguments, "the arguments of the toolkit")
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
    if relative := arguments["attn_type"] == 0:
        clamp_length = max(0, arguments.get("clamp_len", 0))  # -1 is none, too
        scale = {"memory_length": arguments.get("mem_len", 0), "clamp_length": clamp_length}
    size, default = SIZES.get(feature_map, (None, 1))
    return ModelConfig(
        **{ours: arguments[theirs] for theirs, ours in FIELDS.items()},
        rule=rule,
        feature_map=feature_map,
        feature_size=arguments.get(size, default),
        feature_normalization="sum" if by_sum else None,
        normalize=normalize,
        positions="relative" if relative else None if arguments.get("no_pos") else "descending",
        norm="pre" if arguments.get("pre_lnorm") else "post",
        cutoffs=tuple(arguments["cutoffs"]),
        dropout=arguments.get("dropout", 0.1),
        **scale,
    )


SIZES = {"favor_plus": ("performer_proj_dim", 16), "dpfp": ("dpfp_n_roll", 2)}  # and the toolkit's defaults
FIELDS = {"n_layer": "num_layers", "n_head": "num_heads", "d_model": "d_model", "d_head": "head_size"}
FIELDS |= {"d_inner": "d_ff", "n_token": "vocab_size"}
REQUIRED = ("attn_type", *FIELDS, "cutoffs")
TYPES = typing.get_type_hints(ModelConfig) | dict.fromkeys(("attn_type", *FIELDS), int)
TYPES |= dict.fromkeys(("performer_proj_dim", "dpfp_n_roll", "mem_len", "clamp_len"), int)
TYPES |= dict.fromkeys(("pre_lnorm", "no_pos", "skip_attn_normalization"), bool)


def _check_types(config, where):
    """Raises a ``ValueError`` for what is no JSON object, or has values of another type than ours or the toolkit's."""
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


def from_toolkit(state: Mapping[str, np.ndarray], arguments: Mapping, projections=None) -> DecoderLM:
    """A model with the weights of the toolkit.

    Args:
      state: its state_dict, arrays by name. The output matrix must be the embedding (``--tied``).
      arguments: see ``config_from_toolkit``.
      projections: for each layer that of FAVOR+, ``[d_head, m]``; drawn anew if not given, as the toolkit, which does
        not save them, does.

    Raises:
      ValueError: names that are missing or not used, all of them, and arrays of another shape; numbers that are not
        real, or too large for float32.
    """
    config = config_from_toolkit(arguments)
    _check_numbers(state)
    _check_numbers({f"projection/{i}": x for i, x in enumerate(projections or ())})
    model = DecoderLM(config, rngs=nnx.Rngs(0))
    state = {name: np.asarray(x) for name, x in state.items() if name not in DERIVED}
    tied = state.pop("crit.out_layers.0.weight", None)
    if tied is not None and not np.array_equal(tied, state.get("word_emb.emb_layers.0.weight")):
        raise ValueError("crit.out_layers.0.weight must be word_emb.emb_layers.0.weight: only tied models are known")
    wanted = to_toolkit(model, arguments)
    del wanted["crit.out_layers.0.weight"]
    _check_names(wanted, state, "the weights do not fit the arguments")
    for name, variable, take, _ in _table(model, arguments):
        variable[...] = jnp.asarray(take(state[name]), jnp.float32)
    for block, projection in zip(model.blocks, projections or (), strict=projections is not None):
        chosen, projection = block.attention.feature_map.projection, np.asarray(projection, np.float32)
        if projection.shape != chosen.shape[::-1]:
            wanted = f"[{config.head_size}, {config.feature_size}] for performer_proj_dim={config.feature_size}"
            raise ValueError(f"a projection must be {wanted}, got {list(projection.shape)}")
        chosen[...] = jnp.asarray(projection.T)
    return model


DERIVED = ("pos_emb.inv_freq",)  # a constant


def _check_numbers(arrays):
    """Raises a ``ValueError`` for arrays that float32 cannot stand for: complex, integers, 1e300, ..."""
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


def _check_names(wanted, given, what):
    """Raises a ``ValueError`` that lists every name that is missing, or not used, and every wrong shape."""
    wrong = [f"{name} is missing" for name in wanted if name not in given]
    wrong += [f"{name} is not used" for name in given if name not in wanted]
    both = [(name, list(wanted[name].shape), list(x.shape)) for name, x in given.items() if name in wanted]
    wrong += [f"{name} must be {shape}, got {got}" for name, shape, got in both if shape != got]
    if wrong:
        raise ValueError(f"{what}: " + "; ".join(wrong))


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
    if model.content_bias is not None:
        yield "r_w_bias", model.content_bias, *same
        yield "r_r_bias", model.position_bias, *same
    if model.cluster_kernel is not None:
        yield "crit.cluster_weight", model.cluster_kernel, *same
        yield "crit.cluster_bias", model.cluster_bias, *same
    for i, block in enumerate(model.blocks):
        attention, layer = block.attention, f"layers.{i}."
        heads, size = attention.query.kernel.shape[1:]
        separate = 0 < arguments["attn_type"] < 20  # q_net and kv_net, else one matrix, head by head
        parts = [("query", size), ("key", size), ("value", size)]
        parts += [("beta", 1)] if getattr(attention, "beta", None) is not None else []
        for index, (part, rows) in enumerate(parts):
            name = f"{layer}dec_attn." + ("qkvb" if len(parts) == 4 else "qkv") + "_net.weight"
            take, put = _head_by_head(index * size, rows, sum(rows for _, rows in parts), heads)
            if separate:
                name = f"{layer}dec_attn." + ("q" if part == "query" else "kv") + "_net.weight"
                take, put = _one_after_another(max(0, index - 1), 1 if part == "query" else 2, heads)
            elif arguments["attn_type"] == 0:
                take, put = _one_after_another(index, 3, heads)
            yield name, getattr(attention, part).kernel, take, put
        if arguments["attn_type"] == 0:
            yield f"{layer}dec_attn.r_net.weight", attention.position.kernel, *_one_after_another(0, 1, heads)
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


# --- files -----------------------------------------------------------------------------------------------------------


def load(path: str | os.PathLike, arguments: Mapping | None = None) -> DecoderLM:
    """A model from a file: what ``save`` wrote, or weights of the toolkit.

    Args:
      path: .npz or .safetensors, arrays by name (the toolkit's also behind "state/") and "config", a text of JSON; or
        .pt, which takes PyTorch to read: a state_dict, or a dict of "state_dict" and "config".
      arguments: of the toolkit, where the file does not have them as "config".

    Raises:
      ValueError: a file of another kind, without arguments, or whose names and shapes do not fit them, all named;
        numbers that are not real, or too large for float32.
    """
    path = pathlib.Path(path)
    arrays, config = _read(path)
    config = arguments or config
    if config is None:
        raise ValueError(f"{path} has no arguments of the toolkit; give them as JSON with --config")
    _check_types(config, f"the config of {path}" if arguments is None else "the arguments")
    if "vocab_size" not in config:  # which only ours have
        projections = [arrays[name] for name in sorted(arrays, key=_number) if name.startswith("projection/")]
        prefix = "state/" if any(name.startswith("state/") for name in arrays) else ""
        state = {name.removeprefix(prefix): x for name, x in arrays.items() if name.startswith(prefix)}
        state = {name.removeprefix("module."): x for name, x in state.items() if not name.startswith("projection/")}
        try:
            return from_toolkit(state, config, projections or None)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
    try:
        config = ModelConfig(**config | {"cutoffs": tuple(config.get("cutoffs", ()))})
    except (TypeError, ValueError) as error:  # names that this version does not have; values out of their ranges
        raise ValueError(f"the config of {path} is no ModelConfig of this version: {error}") from error
    model = DecoderLM(config, rngs=nnx.Rngs(0))
    variables = _by_name(model)
    _check_names(variables, arrays, f"{path} does not fit its config")
    try:
        _check_numbers(arrays)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    for name, variable in variables.items():
        variable[...] = jnp.asarray(arrays[name], variable.dtype)
    return model


def save(model: DecoderLM, path: str | os.PathLike, *, toolkit: bool = False):
    """Writes a model as .npz or .safetensors, whole or not at all.

    Args:
      toolkit: with the names and arguments of the authors' toolkit, and FAVOR+'s projections as "projection/i".

    Raises:
      ValueError: another suffix; a model that the toolkit does not have.
    """
    if toolkit:
        config = arguments_of(model.config)
        arrays = to_toolkit(model, config)
        if model.config.feature_map == "favor_plus" and model.config.rule != "softmax":
            for i, block in enumerate(model.blocks):  # which the toolkit does not save; ``load`` takes them
                arrays[f"projection/{i}"] = np.asarray(block.attention.feature_map.projection[...]).T.copy()
    else:
        config = dataclasses.asdict(model.config)
        arrays = {name: np.asarray(variable[...]) for name, variable in _by_name(model).items()}
    path = pathlib.Path(path)
    if path.suffix not in (".npz", ".safetensors"):
        raise ValueError(f"{path} must end in .npz or .safetensors")
    temporary = path.with_name(path.name + ".tmp" + path.suffix)
    if path.suffix == ".npz":
        np.savez(temporary, config=json.dumps(config), **arrays)
    else:
        _safetensors().numpy.save_file(arrays, temporary, metadata={"config": json.dumps(config)})
    os.replace(temporary, path)


def arguments_of(config: ModelConfig) -> dict[str, Any]:
    """The toolkit's arguments of a model.

    Raises:
      ValueError: a model that no attn_type is.
    """
    sizes = {"performer_proj_dim": config.feature_size, "dpfp_n_roll": config.feature_size}
    arguments = {theirs: getattr(config, ours) for theirs, ours in FIELDS.items()} | {
        "cutoffs": list(config.cutoffs),
        "dropout": config.dropout,
        "no_pos": config.positions is None,
        "mem_len": config.memory_length,
        "clamp_len": config.clamp_length,
        "pre_lnorm": config.norm == "pre",
    }
    same = ("rule", "normalize", "feature_map", "feature_normalization", "output_scale", "eps", "norm")
    if config.rule == "softmax":
        same = ("rule", "norm", "positions")
    for attn_type in sorted(ATTENTION, key=lambda attn_type: (attn_type < 20, attn_type)):
        for skip in (False, True):
            given = arguments | sizes | {"attn_type": attn_type, "skip_attn_normalization": skip}
            if attn_type < 20 and given["pre_lnorm"]:
                continue
            other = config_from_toolkit(given)
            if all(_plain(config, name) == _plain(other, name) for name in same):
                return given
    asked = ", ".join(f"{name}={getattr(config, name)!r}" for name in same)
    raise ValueError(f"the toolkit has no such model: {asked}")


def _plain(config, name):
    value = getattr(config, name)
    if name == "output_scale" and value is None:
        return config.head_size**-0.5
    if name == "eps" and not config.normalize:
        return None
    return value


def _by_name(model):
    """Every variable of a model, the random projections too."""
    leaves = jax.tree_util.tree_leaves_with_path(nnx.state(model), is_leaf=lambda x: isinstance(x, nnx.Variable))
    names = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in leaves]
    flat = dict(nnx.to_flat_state(nnx.state(model)))
    return dict(zip(names, flat.values(), strict=True))


def _number(name):
    tail = name.rpartition("/")[2]
    return (int(tail), name) if tail.isdigit() else (-1, name)


def _read(path):
    """The arrays and the config of a file."""
    if not path.is_file():
        raise ValueError(f"{path} is not there")
    if path.suffix == ".npz":
        try:
            with path.open("rb") as opened:
                file = np.load(opened)
                if isinstance(file, np.ndarray):
                    raise ValueError("it holds one array, as .npy does")
                arrays = {name: file[name] for name in file.files}
        except DAMAGED_ZIP as error:
            raise ValueError(f"{path} is not a whole .npz file of arrays ({error})") from error
        config = arrays.pop("config", None)
        return arrays, None if config is None else _parse(str(config), f"the config of {path}")
    if path.suffix == ".safetensors":
        try:
            with _safetensors().safe_open(path, "numpy") as file:
                metadata = file.metadata() or {}
                arrays = {name: file.get_tensor(name) for name in file.keys()}
        except _safetensors().SafetensorError as error:
            raise ValueError(f"{path} is not a whole .safetensors file ({error})") from error
        return arrays, _parse(metadata["config"], f"the config of {path}") if "config" in metadata else None
    if path.suffix in (".pt", ".pth"):
        return _read_torch(path)
    raise ValueError(f"{path} must end in .pt, .npz or .safetensors")


# what NumPy and zipfile raise of files that are cut off, or have other bytes
DAMAGED_ZIP = (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError, LookupError, AttributeError, TypeError)
DAMAGED_ZIP += (NotImplementedError, RuntimeError, OverflowError, MemoryError, SyntaxError)


def _parse(text, where):
    """The object of a JSON text, in which all numbers are finite."""

    def refuse(name):
        raise ValueError(f"{name} is no number of JSON")

    try:
        config = json.loads(text, parse_constant=refuse)
    except ValueError as error:
        raise ValueError(f"{where} is not whole JSON: {error}") from error
    _check_types(config, where)
    return config


def _read_torch(path):
    try:
        import torch
    except ImportError as error:
        raise ValueError(f"{path} takes PyTorch to read: pip install 'fwt-jax[convert]'") from error
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(content, Mapping):
            raise ValueError(f"it holds a {type(content).__name__}")
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, LookupError, AttributeError) as error:
        raise ValueError(
            f"{path} is not a whole state_dict. The toolkit saves the whole module: in its folder, load it and write "
            "torch.save({'state_dict': model.state_dict(), 'config': {'attn_type': ..., ...}}, path). "
            f"({type(error).__name__}: {(str(error) or 'no message').splitlines()[0][:200]})"
        ) from error
    state = content.get("state_dict", content.get("model_state_dict", content))
    state = {name: x.detach() for name, x in state.items() if hasattr(x, "numpy")}
    narrow = {name for name, x in state.items() if x.is_floating_point() and x.dtype != torch.float64}  # bfloat16, ...
    return {name: (x.float() if name in narrow else x).numpy() for name, x in state.items()}, content.get("config")


def _safetensors():
    try:
        import safetensors
        import safetensors.numpy
    except ImportError as error:
        raise ValueError("this file takes safetensors: pip install 'fwt-jax[convert]'") from error
    return safetensors


def main(args: list[str] | None = None):
    """The command line: SRC to DST, each in its own format; of ours, to the toolkit's."""
    parser = argparse.ArgumentParser("python -m fwt_jax.convert", description=main.__doc__)
    parser.add_argument("source", type=pathlib.Path, help="the toolkit's .pt, .npz or .safetensors, or one of ours")
    parser.add_argument("destination", type=pathlib.Path, help=".npz or .safetensors")
    parser.add_argument("--config", type=pathlib.Path, help="JSON of the toolkit's arguments, if SRC has none")
    options = parser.parse_args(args)
    try:
        arguments = None
        if options.config is not None:
            arguments = _parse(options.config.read_bytes().decode("utf-8", "replace"), str(options.config))
        if options.destination.exists() and options.destination.samefile(options.source):
            raise ValueError(f"{options.destination} would be overwritten with itself; name another destination")
        _, config = _read(options.source)
        model = load(options.source, arguments)
        back = "vocab_size" in (arguments or config)
        save(model, options.destination, toolkit=back)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    count = sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param)))
    print(f"wrote {options.destination}: {count:,} parameters, {'of the toolkit' if back else 'of fwt_jax'}")


if __name__ == "__main__":
    main()
