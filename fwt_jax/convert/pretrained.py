"""Public checkpoints in their own format: ``from_pretrained``, ``save_pretrained`` and their tokenizers.

model = from_pretrained("Qwen3.5-0.8B")                     # a folder, or a name of the hub, "organisation/model"
tokenizer = load_tokenizer("Qwen3.5-0.8B", model.config.vocab_size)
save_pretrained(model, "tuned", base="Qwen3.5-0.8B")        # for transformers and fla, too
"""

from __future__ import annotations

import dataclasses
import fnmatch
import os
import pathlib
import re
import shutil
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fwt_jax import arguments
from fwt_jax.convert import checkpoint
from fwt_jax.convert.checkpoint import Tensor
from fwt_jax.convert.families import FAMILIES, Entry, Family
from fwt_jax.convert.toolkit import check_names
from fwt_jax.sharding import partition

INSTALL = "pip install -e '.[hub]'"
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
# Tokenizer, chat template and generation options, and the code that some folders have for transformers.
SIDE_FILES = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.py")


def from_pretrained(
    name: str | os.PathLike,
    *,
    dtype: jax.typing.DTypeLike | None = None,
    mesh: jax.sharding.Mesh | None = None,
    **changes: Any,
) -> Any:
    """The model of a public checkpoint.

    The tensors are read one after another, the largest first, so that at no time more than one copy of the weights and
    one tensor are in memory.

    Args:
      name: a folder with config.json and model.safetensors (or model.safetensors.index.json and the files it names), or
        a name of the hub, "organisation/model".
      dtype: of all variables; the one that each tensor has on disk if not given. On a CPU, float32 generates faster:
        XLA computes bfloat16 in float32 there, and a generation holds a float32 copy of the weights.
      mesh: splits every variable as ``sharding.partition`` says.
      changes: other values for fields of the model's config, as ``remat=True``.

    Raises:
      ValueError: a folder that is incomplete or damaged; an unknown ``model_type``; missing, unused and misshapen
        tensors, all of them; numbers that are not float32, bfloat16 or float16; NaN and infinite numbers; a dtype that
        is not floating point.
    """
    if dtype is not None and not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"dtype must be floating point, as bfloat16, or None, got {dtype!r}")
    folder = local_folder(name)
    config, family, tensors = _read_model_config(folder, changes)
    try:
        graph, state = nnx.split(nnx.eval_shape(lambda: family.model(config, rngs=nnx.Rngs(0))))
    except ValueError as error:  # of a layer, about its sizes
        raise ValueError(f"{folder / checkpoint.CONFIG}: {error}") from error
    variables = nnx.to_flat_state(state)
    shapes = {_dotted(path): jax.ShapeDtypeStruct(x.shape, x.dtype) for path, x in variables}
    entries = list(family.entries(config, shapes))
    _check_tensors(folder, tensors, entries, shapes, family)
    values = _read_values(folder, tensors, entries, dtype, mesh)
    return nnx.merge(graph, nnx.from_flat_state([(path, x.replace(values[_dotted(path)])) for path, x in variables]))


def read_config(name: str | os.PathLike, **changes: Any) -> Any:
    """The config of the model that ``from_pretrained`` makes. It reads no weights.

    Args:
      name: as for ``from_pretrained``.
      changes: other values for fields of the config.

    Raises:
      ValueError: see ``from_pretrained``.
    """
    return _read_model_config(local_folder(name), changes)[0]


def _read_model_config(folder, changes) -> tuple[Any, Family, dict[str, Tensor]]:
    """The config of a folder's model, its family and its tensors."""
    text, options, family = _read_config(folder)
    tensors = checkpoint.read_headers(folder)
    try:
        config = family.config(options, {name: x.shape for name, x in tensors.items()})
        return dataclasses.replace(config, options=text, **changes), family, tensors
    except ValueError as error:
        raise ValueError(f"{folder / checkpoint.CONFIG}: {error}") from error


def _dotted(path):
    return ".".join(map(str, path))


def _read_config(folder) -> tuple[str, dict[str, Any], Family]:
    """The text of a config.json, the mapping in it, and its family."""
    path = folder / checkpoint.CONFIG
    if not path.is_file():
        raise ValueError(f"{folder} has no {checkpoint.CONFIG}; put the model's own there")
    text = path.read_bytes()
    options = checkpoint.parse_object(text, str(path))
    return text.decode(), options, _find_family(options, str(path))


def _find_family(options, where) -> Family:
    name = options.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        got = "has no model_type" if name is None else f"has model_type {name!r}"
        raise ValueError(f"{where} {got}; it must be one of {known}")
    return FAMILIES[name]


# --- weights ---------------------------------------------------------------------------------------------------------


def _check_tensors(folder, tensors, entries, shapes, family):
    """Raises a ``ValueError`` that lists all tensors that are missing, unused, or of another shape or dtype."""
    wanted = {name: x for entry in entries for name, x in _disk_shapes(entry, shapes, tensors).items()}
    given = {name: x for name, x in tensors.items() if name in wanted or not re.fullmatch(family.passed_over, name)}
    used = {name: tensors[name] for name in wanted if name in tensors}
    wrong = [f"{name} is {x.dtype}" for name, x in used.items() if x.dtype not in checkpoint.DTYPES]
    if wrong:
        raise ValueError(
            f"the weights of {folder} must be {', '.join(checkpoint.DTYPES)}, and {'; '.join(wrong)}; take the "
            "checkpoint that is not quantised"
        )
    check_names(wanted, given, f"the weights of {folder} do not fit its {checkpoint.CONFIG}")


def _disk_shapes(entry: Entry, shapes, tensors):
    """The shapes that the tensors of an entry must have: their own ones, if these give variables of the right shape."""
    variables = [shapes[path] for path in entry.model]
    wanted = dict(zip(entry.disk, jax.eval_shape(entry.to_disk, *variables), strict=True))
    given = [tensors.get(name) for name in entry.disk]
    if any(x is None or x.dtype not in checkpoint.DTYPES for x in given):
        return wanted
    if [x.shape for x in given] == [x.shape for x in wanted.values()]:
        return wanted
    own = [jax.ShapeDtypeStruct(x.shape, checkpoint.DTYPES[x.dtype]) for x in given]
    try:
        result = jax.eval_shape(entry.to_model, *own)
    except (TypeError, ValueError):  # JAX, of an array that cannot be cut or reshaped so
        return wanted
    return (
        dict(zip(entry.disk, own, strict=True)) if [x.shape for x in result] == [x.shape for x in variables] else wanted
    )


def _read_values(folder, tensors, entries: list[Entry], dtype, mesh) -> dict[str, jax.Array]:
    """The value of each variable by its path. The largest come first, while the memory is empty."""
    values, wrong = {}, []
    for entry in sorted(entries, key=lambda entry: -sum(tensors[name].size for name in entry.disk)):
        placed, not_finite = _read_entry(entry, tensors, dtype, mesh)
        values |= placed
        wrong += not_finite
    if wrong:
        kind = "" if dtype is None else f" in {jnp.dtype(dtype)}"
        raise ValueError(f"the weights of {folder} have NaN or infinite numbers{kind}: {', '.join(sorted(wrong))}")
    return values


def _read_entry(entry: Entry, tensors, dtype, mesh) -> tuple[dict[str, jax.Array], list[str]]:
    """The values of the variables of an entry, and the names of its tensors that are not finite.

    The entry gets arrays of NumPy, whose transposes need no memory. Each result is copied once, to its devices.
    """
    arrays = [checkpoint.read_array(tensors[name]) for name in entry.disk]
    if dtype is not None:
        with np.errstate(over="ignore"):  # what is too large for the dtype is refused below
            arrays = [array.astype(dtype) for array in arrays]
    placed = {}
    for path, value in zip(entry.model, entry.to_model(*arrays), strict=True):
        name = path.replace(".", "/")
        sharding = None if mesh is None else partition(mesh, {name: value})[name]
        placed[path] = jax.device_put(value, sharding)
    if all([_all_finite(value) for value in placed.values()]):
        return placed, []
    return placed, [name for name, array in zip(entry.disk, arrays, strict=True) if not np.isfinite(array).all()]


@jax.jit
def _all_finite(x):
    return jnp.isfinite(x.max()) & jnp.isfinite(x.min())  # without an array of bool as large as x


def save_pretrained(
    model: Any,
    folder: str | os.PathLike,
    *,
    base: str | os.PathLike | None = None,
    max_shard_bytes: int = 5_000_000_000,
):
    """Writes a model as a public checkpoint. ``from_pretrained`` is its inverse, bit by bit.

    config.json is the one that the model came from, its ``dtype`` too. Each tensor has the dtype of its variable. At
    any moment ``folder`` is whole, or not there. One that is there is replaced, if it holds nothing but a checkpoint.

    Args:
      base: the checkpoint that the model came from, as for ``from_pretrained``. Its tensors that the model does not
        need, its tokenizer and its other options are copied.
      max_shard_bytes: of a file; a larger model is written as several files and an index.

    Raises:
      ValueError: a model without ``config.options``; a base of another ``model_type``; a folder with other files.
    """
    arguments.sizes(max_shard_bytes=max_shard_bytes)
    folder, options = pathlib.Path(folder), _model_options(model)
    family = _find_family(options, "model.config.options")
    variables = {_dotted(path): x for path, x in nnx.to_flat_state(nnx.state(model))}
    shapes = {path: jax.ShapeDtypeStruct(x.shape, x.dtype) for path, x in variables.items()}
    entries = list(family.entries(model.config, shapes))
    tensors = _written_tensors(entries, variables)
    copied, files = {}, []
    if base is not None:
        base = local_folder(base)
        copied = _passed_over(base, options["model_type"], tensors)
        files = [path for path in base.iterdir() if _is_side_file(path)]
    checkpoint.check_replaceable(folder, [checkpoint.CONFIG, *(path.name for path in files)])
    with checkpoint.whole_folder(folder) as temporary:
        (temporary / checkpoint.CONFIG).write_bytes(model.config.options.encode())
        for path in files:
            shutil.copyfile(path, temporary / path.name)
        contents = _contents(entries, variables, copied)
        checkpoint.write_tensors(temporary, tensors | copied, contents, max_shard_bytes)


def _model_options(model):
    if not model.config.options:
        raise ValueError("the model must have the text of a config.json as config.options, got none")
    return checkpoint.parse_object(model.config.options, "model.config.options")


def _written_tensors(entries, variables) -> dict[str, Tensor]:
    letters = {dtype: letter for letter, dtype in checkpoint.DTYPES.items()}
    used = {path: variables[path] for entry in entries for path in entry.model}
    wrong = [f"{path} is {x.dtype}" for path, x in used.items() if x.dtype not in letters]
    if wrong:
        raise ValueError(f"the variables must be {', '.join(map(str, letters))}, and {'; '.join(wrong)}; cast them")
    tensors = {}
    for entry in entries:
        shapes = [jax.ShapeDtypeStruct(used[path].shape, used[path].dtype) for path in entry.model]
        for name, x in zip(entry.disk, jax.eval_shape(entry.to_disk, *shapes), strict=True):
            tensors[name] = Tensor(letters[x.dtype], x.shape, x.size * x.dtype.itemsize)
    return tensors


def _passed_over(base, model_type, written) -> dict[str, Tensor]:
    """The tensors of a folder that its model does not need."""
    _, options, family = _read_config(base)
    if options["model_type"] != model_type:
        raise ValueError(f"base must be the {model_type} that the model came from, got {options['model_type']}, {base}")
    tensors = checkpoint.read_headers(base).items()
    return {name: x for name, x in tensors if name not in written and re.fullmatch(family.passed_over, name)}


def _is_side_file(path):
    """Whether a file of a checkpoint is neither its weights nor its config."""
    if not path.is_file() or path.name == checkpoint.CONFIG or path.name.endswith(".index.json"):
        return False
    return any(fnmatch.fnmatchcase(path.name, pattern) for pattern in SIDE_FILES)


def _contents(entries, variables, copied) -> Iterator[tuple[str, np.ndarray]]:
    """The name and the bytes of each tensor, computed when it is asked for."""
    for entry in entries:
        arrays = entry.to_disk(*(variables[path][...] for path in entry.model))
        for name, x in zip(entry.disk, arrays, strict=True):
            yield name, np.asarray(x).reshape(-1).view(np.uint8)
    for name, tensor in copied.items():
        yield name, checkpoint.read_bytes(tensor)


# --- names of the hub, and tokenizers --------------------------------------------------------------------------------


def local_folder(name: str | os.PathLike) -> pathlib.Path:
    """The folder of a checkpoint. One of the hub is downloaded, if ``huggingface_hub`` does not have it on disk yet.

    Raises:
      ValueError: no folder; a name of the hub, without network or without the package.
    """
    folder = pathlib.Path(name)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise ValueError(f"{folder} is a file; name the folder with {checkpoint.CONFIG} and {checkpoint.WEIGHTS}")
    if not (isinstance(name, str) and HUB_NAME.fullmatch(name)):
        raise ValueError(f"{folder} is not there; name a folder with {checkpoint.CONFIG} and {checkpoint.WEIGHTS}")
    way_out = (
        f"put its {checkpoint.CONFIG}, model*.safetensors, {checkpoint.INDEX} (if it has one) and tokenizer.json into "
        "a folder, and name that"
    )
    try:
        import huggingface_hub  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ValueError(f"{name} is no folder, and a name of the hub takes {INSTALL}; or {way_out}") from error
    patterns = [*SIDE_FILES, "model*.safetensors"]
    try:
        # A repository may have further copies of the weights in folders of their own.
        return pathlib.Path(huggingface_hub.snapshot_download(name, allow_patterns=patterns, ignore_patterns=["*/*"]))
    # Of the package, of the disk, or of its client for HTTP: another one in each major version (requests, httpx), whose
    # errors share no class below Exception. The reason is reported.
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{name} is no folder, and could not be downloaded ({reason}); {way_out}") from error


def load_tokenizer(name: str | os.PathLike, vocab_size: int) -> Any:
    """The ``tokenizers.Tokenizer`` of a checkpoint, from its tokenizer.json.

    Args:
      name: as for ``from_pretrained``.
      vocab_size: of the model. A tokenizer may have fewer tokens, because published models pad their embeddings.

    Raises:
      ValueError: no tokenizer.json, or a damaged one; tokens that the model does not have; no package ``tokenizers``.
    """
    path = local_folder(name) / "tokenizer.json"
    try:
        import tokenizers  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ValueError(f"{path} takes tokenizers: {INSTALL}") from error
    if not path.is_file():
        raise ValueError(f"{path} is not there; put the model's own there, or call fwt_jax.decode.generate with tokens")
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the package raises nothing more special
        raise ValueError(f"{path} is not a whole tokenizer.json ({error})") from error
    largest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
    if largest >= vocab_size:
        raise ValueError(
            f"{path} has tokens up to {largest}, and the model {vocab_size}; take the model's own tokenizer"
        )
    return tokenizer
