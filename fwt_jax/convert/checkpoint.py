"""Folders of public checkpoints: config.json, and tensors by name in a .safetensors file, or in several with an index.

A .safetensors file is a number n (8 bytes, little endian), a header of n bytes, and the bytes of the tensors. The
header is JSON: the dtype, shape and place of each tensor (https://huggingface.co/docs/safetensors). All headers are
read first, and each tensor when it is asked for.

The package safetensors is not used. It maps a file into the memory of the process, which then has the weights twice.
Its version 0.4 reads no bfloat16 into NumPy, and 0.8 no float8, which a file may hold beside the weights of a model.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import pathlib
import re
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
ANY_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json")
DTYPES = {"F32": np.dtype(np.float32), "BF16": np.dtype(jnp.bfloat16), "F16": np.dtype(np.float16)}


class Tensor(NamedTuple):
    """A tensor of a .safetensors file.

    Attributes:
      dtype: as the file calls it: "BF16", "F32", "F8_E4M3", ...
      shape: its axes.
      size: the number of its bytes.
      path, start: the file that has it, and where its bytes begin; not known of a tensor to be written.
    """

    dtype: str
    shape: tuple[int, ...]
    size: int
    path: pathlib.Path = pathlib.Path()
    start: int = 0


# --- reading ---------------------------------------------------------------------------------------------------------


def parse_object(text: str | bytes, where: str) -> dict[str, Any]:
    """The object in a JSON text in UTF-8. ``where``: the name of the text, for an error.

    Raises:
      ValueError: the text is not JSON, holds NaN or an infinity, or is another value than an object.
    """

    def refuse(name):
        raise ValueError(f"{name} is no number of JSON")

    try:
        value = json.loads(text if isinstance(text, str) else text.decode(), parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not whole JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{where} must be a JSON object, got {type(value).__name__}")
    return value


def read_headers(folder: pathlib.Path) -> dict[str, Tensor]:
    """The tensors of a folder by their names, without their numbers.

    Raises:
      ValueError: no .safetensors files; a file that is cut off or damaged; an index that is damaged, that names a file
        that is not there, or that does not name the same tensors as its files.
    """
    if (folder / WEIGHTS).is_file():
        return _read_header(folder / WEIGHTS)
    if (folder / INDEX).is_file():
        return _read_shards(folder / INDEX)
    others = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
    if others:
        raise ValueError(
            f"{folder} has its weights as {', '.join(others)}, which only PyTorch reads, and {WEIGHTS} is needed; load "
            "it with transformers, and write it with save_pretrained of transformers"
        )
    raise ValueError(f"{folder} has neither {WEIGHTS} nor {INDEX}; put the weights there")


def _read_shards(index):
    """The tensors of all files that an index names."""
    places = parse_object(index.read_bytes(), str(index)).get("weight_map")
    if not isinstance(places, dict) or any(not _is_file_name(shard) for shard in places.values()):
        raise ValueError(f"{index} must have a weight_map from names of tensors to names of files beside it")
    shards = sorted(set(places.values()))
    missing = [shard for shard in shards if not (index.parent / shard).is_file()]
    if missing:
        raise ValueError(f"{index} names files that are not there: {', '.join(missing)}; download or copy them")
    headers = {shard: _read_header(index.parent / shard) for shard in shards}
    wrong = [f"{name} is not in {shard}" for name, shard in places.items() if name not in headers[shard]]
    for shard, header in headers.items():
        wrong += [f"{name} of {shard} is not in the index" for name in header if places.get(name) != shard]
    if wrong:
        raise ValueError(f"{index} does not fit its files: {'; '.join(wrong)}; download or copy all of them again")
    return {name: headers[shard][name] for name, shard in places.items()}


def _is_file_name(name):
    """Whether a name stays in its folder, unlike "../x"."""
    return isinstance(name, str) and pathlib.PurePath(name).name == name


def _read_header(path):
    """The tensors of a .safetensors file."""

    def damaged(why):
        return ValueError(f"{path} is not a whole .safetensors file ({why}); download or copy it again")

    length = path.stat().st_size
    with path.open("rb") as file:
        header_length = int.from_bytes(file.read(8), "little")
        if header_length > length - 8:
            raise damaged(f"{length} bytes, and its header alone should have {header_length}")
        header = parse_object(file.read(header_length), f"the header of {path}")
    header.pop("__metadata__", None)
    try:
        tensors = {name: _tensor(fields, path, 8 + header_length) for name, fields in header.items()}
    except (KeyError, TypeError, ValueError) as error:
        raise damaged("its header is not one of tensors") from error
    end = 8 + header_length
    for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.start, tensor.size)):
        if tensor.start != end:
            raise damaged("the bytes of its tensors do not follow one another")
        end += tensor.size
    if end != length:
        raise damaged(f"{length} bytes, and its header names {end}")
    return tensors


def _tensor(fields, path, data):
    """The tensor that an entry of a header describes; ``data``: where the bytes of all tensors begin."""
    dtype, shape, (first, end) = fields["dtype"], tuple(fields["shape"]), fields["data_offsets"]
    if not all(type(number) is int and number >= 0 for number in (*shape, first, end - first)):
        raise ValueError(f"sizes must be integers that are not negative, got {fields}")
    if dtype in DTYPES and math.prod(shape) * DTYPES[dtype].itemsize != end - first:
        raise ValueError(f"the number of bytes must fit the shape, got {fields}")
    return Tensor(str(dtype), shape, end - first, path, data + first)


def read_bytes(tensor: Tensor) -> np.ndarray:
    """The bytes of a tensor, uint8 ``[size]``."""
    return np.fromfile(tensor.path, np.uint8, tensor.size, offset=tensor.start)


def read_array(tensor: Tensor) -> np.ndarray:
    """The numbers of a tensor whose dtype is in ``DTYPES``."""
    return read_bytes(tensor).view(DTYPES[tensor.dtype]).reshape(tensor.shape)


# --- writing ---------------------------------------------------------------------------------------------------------


def write_tensors(
    folder: pathlib.Path,
    tensors: Mapping[str, Tensor],
    contents: Iterable[tuple[str, np.ndarray]],
    max_shard_bytes: int,
):
    """Writes model.safetensors; if the tensors have more bytes than ``max_shard_bytes``, several files and their index.

    Args:
      tensors: what to write.
      contents: the name and the bytes of each tensor, in the same order.
    """
    shards = list(_shards(tensors, max_shard_bytes))
    contents, places = iter(contents), {}
    for i, names in enumerate(shards, 1):
        shard = WEIGHTS if len(shards) == 1 else f"model-{i:05}-of-{len(shards):05}.safetensors"
        wanted = {name: tensors[name] for name in names}
        _write_file(folder / shard, wanted, itertools.islice(contents, len(names)))
        places |= dict.fromkeys(names, shard)
    if len(shards) > 1:
        metadata = {"total_size": sum(tensor.size for tensor in tensors.values())}
        index = {"metadata": metadata, "weight_map": dict(sorted(places.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _shards(tensors, max_shard_bytes) -> Iterator[list[str]]:
    """The names of the tensors of each file."""
    names, size = [], 0
    for name, tensor in tensors.items():
        if names and size + tensor.size > max_shard_bytes:
            yield names
            names, size = [], 0
        names.append(name)
        size += tensor.size
    yield names


def _write_file(path, tensors, contents):
    def width_and_name(name):  # With the widest numbers first, every number lies at a multiple of its width.
        return -tensors[name].size / max(math.prod(tensors[name].shape), 1), name

    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers refuses a file without a format
    end = 0
    for name in sorted(tensors, key=width_and_name):
        dtype, shape, size, *_ = tensors[name]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": (end, end + size)}
        end += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, data in contents:
            file.seek(8 + len(text) + header[name]["data_offsets"][0])
            file.write(data)


@contextlib.contextmanager
def whole_folder(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """A new folder that takes the place of ``folder`` at the end of the block, and is removed after an error."""
    folder = folder.resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    before = temporary.with_name(f"{temporary.name}.before")
    temporary.mkdir()
    try:
        yield temporary
        if folder.exists():
            os.rename(folder, before)
        os.rename(temporary, folder)
    except BaseException:
        if before.exists():
            os.rename(before, folder)
        shutil.rmtree(temporary)
        raise
    if before.exists():
        shutil.rmtree(before)


def check_replaceable(folder: pathlib.Path, names: Iterable[str]):
    """Raises a ``ValueError`` if a folder holds more than ``names`` and weights: that would be lost."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; name a folder")
    names = set(names)
    others = sorted(path.name for path in folder.glob("*") if path.name not in names and not _is_weights(path))
    if others:
        raise ValueError(f"{folder} holds files that would be lost: {', '.join(others)}; name another folder")


def _is_weights(path):
    return bool(ANY_WEIGHTS.fullmatch(path.name))
