"""Files: .npz and .safetensors, and (to read, with PyTorch) the toolkit's .pt."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import pickle
import zipfile
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fwt_jax.convert.checkpoint import CONFIG, parse_object
from fwt_jax.convert.toolkit import (
    arguments_of,
    check_names,
    check_numbers,
    check_types,
    from_toolkit,
    random_projections,
    to_toolkit,
)
from fwt_jax.models import DecoderLM, ModelConfig
from fwt_jax.rules import Rule

INSTALL = "pip install -e '.[convert]'"


def load(path: str | os.PathLike, arguments: Mapping | None = None) -> DecoderLM:
    """A model from a file that ``save`` wrote, or from weights of the toolkit.

    Args:
      path: .npz or .safetensors: arrays by name (the toolkit's may also be behind "state/"), and "config", a text of
        JSON. Or .pt, which PyTorch reads: a state_dict, or a dict of "state_dict" and "config".
      arguments: of the toolkit, if the file does not have them as "config".

    Raises:
      ValueError: a file of another kind, or without arguments; names and shapes that do not fit the arguments, all of
        them; numbers that are not real, or too large for float32.
    """
    path = pathlib.Path(path)
    arrays, config = read_file(path)
    config = arguments or config
    if config is None:
        raise ValueError(f"{path} has no arguments of the toolkit; give them as JSON with --config")
    check_types(config, f"the config of {path}" if arguments is None else "the arguments")
    if "vocab_size" not in config:  # Only our configs have it.
        return _toolkit_model(path, arrays, config)
    options: dict[str, Any] = {**config, "cutoffs": tuple(config.get("cutoffs", ()))}
    try:
        config = ModelConfig(**options)
    except (TypeError, ValueError) as error:  # An option that this version does not have, or a value out of its range.
        raise ValueError(f"the config of {path} is no ModelConfig of this version: {error}") from error
    model = DecoderLM(config, rngs=nnx.Rngs(0))
    variables = _by_name(model)
    check_names(variables, arrays, f"{path} does not fit its config")
    try:
        check_numbers(arrays)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    for name, variable in variables.items():
        variable[...] = jnp.asarray(arrays[name], variable.dtype)
    return model


def _toolkit_model(path, arrays, config):
    projections = [arrays[name] for name in sorted(arrays, key=_layer_number) if name.startswith("projection/")]
    prefix = "state/" if any(name.startswith("state/") for name in arrays) else ""
    state = {name.removeprefix(prefix): x for name, x in arrays.items() if name.startswith(prefix)}
    state = {name.removeprefix("module."): x for name, x in state.items() if not name.startswith("projection/")}
    try:
        return from_toolkit(state, config, projections or None)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _layer_number(name):
    tail = name.rpartition("/")[2]
    return (int(tail), name) if tail.isdigit() else (-1, name)


def save(model: DecoderLM, path: str | os.PathLike, *, toolkit: bool = False):
    """Writes a model as .npz or .safetensors. At any moment the file is whole, or not there.

    Args:
      toolkit: with the names and arguments of the authors' toolkit, and FAVOR+'s projections as "projection/i".

    Raises:
      ValueError: another suffix; a folder that is not there; a model that the toolkit does not have; a rule
        without a name.
    """
    path = pathlib.Path(path)
    if path.suffix not in (".npz", ".safetensors"):
        raise ValueError(f"{path} must end in .npz or .safetensors; .pt and .pth can only be read")
    if not path.parent.is_dir():
        raise ValueError(f"{path} cannot be written: the folder {path.parent} is not there; make it first")
    if toolkit:
        config = arguments_of(model.config)
        arrays = to_toolkit(model, config)
        for i, projection in enumerate(random_projections(model)):
            arrays[f"projection/{i}"] = np.asarray(projection[...]).T.copy()
    else:
        if isinstance(model.config.rule, Rule):
            raise ValueError(
                "the rule of a saved model must be a name; add the Rule to fwt_jax.RULES, and use its name"
            )
        config = dataclasses.asdict(model.config)
        arrays = {name: np.asarray(variable[...]) for name, variable in _by_name(model).items()}
    contents: dict[str, Any] = arrays | {"config": json.dumps(config)}
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        if path.suffix == ".npz":
            np.savez(file, **contents)
        else:
            file.write(_safetensors().numpy.save(arrays, metadata={"config": json.dumps(config)}))
    os.replace(temporary, path)


def _by_name(model):
    """Every variable of a model, the random projections too."""
    leaves = jax.tree_util.tree_leaves_with_path(nnx.state(model), is_leaf=lambda x: isinstance(x, nnx.Variable))
    names = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in leaves]
    flat = dict(nnx.to_flat_state(nnx.state(model)))
    return dict(zip(names, flat.values(), strict=True))


# --- reading ---------------------------------------------------------------------------------------------------------


def read_file(path: pathlib.Path) -> tuple[dict[str, Any], Any]:
    """The arrays and the config of a file; None if it has no config.

    Raises:
      ValueError: a file that is missing, damaged or of another kind; a package that is not installed.
    """
    if path.is_dir():
        raise ValueError(_folder_message(path))
    if not path.is_file():
        raise ValueError(f"{path} is not there")
    if path.suffix == ".npz":
        return _read_npz(path)
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    if path.suffix in (".pt", ".pth"):
        return _read_torch(path)
    raise ValueError(f"{path} must end in .pt, .npz or .safetensors")


def _folder_message(path):
    if (path / "run.json").exists():
        return (
            f"{path} is the folder of a run; save a language model to a file in Python: model, _ = "
            f"experiments.language.generate.load(pathlib.Path({str(path)!r})); fwt_jax.convert.save(model, "
            "'model.safetensors')"
        )
    if (path / CONFIG).exists():
        return f"{path} is a public checkpoint; load it with fwt_jax.convert.from_pretrained({str(path)!r})"
    return f"{path} is a folder; name a file in .pt, .npz or .safetensors"


def _read_npz(path):
    try:
        with path.open("rb") as opened:
            file = np.load(opened)
            if isinstance(file, np.ndarray):
                raise ValueError("it holds one array, as .npy does")
            arrays = {name: file[name] for name in file.files}
    except DAMAGED_ZIP as error:
        raise ValueError(f"{path} is not a whole .npz file of arrays ({error})") from error
    config = arrays.pop("config", None)
    return arrays, None if config is None else parse_json(str(config), f"the config of {path}")


def _read_safetensors(path):
    package = _safetensors()
    try:
        with package.safe_open(path, "numpy") as file:
            metadata = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}
    except package.SafetensorError as error:
        raise ValueError(f"{path} is not a whole .safetensors file ({error})") from error
    return arrays, parse_json(metadata["config"], f"the config of {path}") if "config" in metadata else None


# NumPy and zipfile raise these for files that are cut off or have wrong bytes.
DAMAGED_ZIP = (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError, LookupError, AttributeError, TypeError)
DAMAGED_ZIP += (NotImplementedError, RuntimeError, OverflowError, MemoryError, SyntaxError)


def parse_json(text, where):
    """The object in a JSON text. ``where``: the name of the text, for an error.

    Raises:
      ValueError: the text is not JSON, holds NaN or an infinity, or a value of the wrong type.
    """

    config = parse_object(text, where)
    check_types(config, where)
    return config


def _read_torch(path):
    try:
        import torch  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ValueError(f"{path} takes PyTorch to read: {INSTALL}") from error
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
    narrow = {name for name, x in state.items() if x.is_floating_point() and x.dtype != torch.float64}
    arrays = {name: (x.float() if name in narrow else x).numpy() for name, x in state.items()}  # NumPy has no bfloat16.
    return arrays, content.get("config")


def _safetensors():
    try:
        import safetensors
        import safetensors.numpy
    except ImportError as error:
        raise ValueError(f"this file takes safetensors: {INSTALL}") from error
    return safetensors
