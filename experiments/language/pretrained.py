"""Public checkpoints: their text, and the checkpoint that a run begins from."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from experiments.language import presets
from experiments.run import files
from fwt_jax import convert
from fwt_jax.convert import checkpoint
from fwt_jax.convert.pretrained import HUB_NAME, local_folder
from fwt_jax.models import HybridConfig, HybridLM

BLOCK = 100_000  # characters that are encoded at a time; the package holds more about a token than its number


class Tokenizer:
    """The tokenizer of a checkpoint, with the methods of ``text.Vocabulary`` that a run needs.

    Args:
      folder: of the checkpoint.
      vocab_size: of its model.

    Raises:
      ValueError: see ``convert.load_tokenizer``.
    """

    kind = "tokenizer"

    def __init__(self, folder: pathlib.Path, vocab_size: int):
        self._tokenizer = convert.load_tokenizer(folder, vocab_size)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._json = (folder / "tokenizer.json").read_bytes()

    def __len__(self) -> int:
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str) -> np.ndarray:
        """The numbers of a text, int32 ``[T]``, without the tokens that begin or end a prompt."""
        blocks, lines, size = [], [], 0
        for line in text.splitlines(keepends=True):
            lines.append(line)
            size += len(line)
            if size >= BLOCK:
                blocks.append(self._encode("".join(lines)))
                lines, size = [], 0
        blocks.append(self._encode("".join(lines)))
        return np.concatenate(blocks)

    def encode_prompt(self, prompt: str) -> np.ndarray:
        """The numbers of a prompt, int32 ``[T]``, with the tokens that the tokenizer puts around it."""
        return self._encode(prompt, special=True)

    def _encode(self, text, *, special=False):
        return np.asarray(self._tokenizer.encode(text, add_special_tokens=special).ids, np.int32)

    def decode(self, numbers: Sequence[int]) -> str:
        """The text of tokens."""
        return self._tokenizer.decode([int(i) for i in numbers])

    def missing(self, text: str) -> list[str]:
        """Nothing: tokenizers have bytes for characters that they lack."""
        return []

    def digest(self) -> str:
        """A short digest of tokenizer.json."""
        return files.digest(self._json)

    def save(self, path: pathlib.Path):
        """Writes tokenizer.json under another name."""
        files.write(path, self._json)


def is_checkpoint(name: str) -> bool:
    """Whether a name is the folder of a public checkpoint, or may be one of the hub."""
    path = pathlib.Path(name)
    return (path / checkpoint.CONFIG).is_file() or (not path.exists() and bool(HUB_NAME.fullmatch(name)))


def load(name: str | pathlib.Path, dtype: str | None = None) -> tuple[HybridLM, Tokenizer]:
    """The model and the tokenizer of a public checkpoint.

    Args:
      name: a folder, or a name of the hub.
      dtype: of the parameters; that on disk if not given.

    Raises:
      ValueError: see ``convert.from_pretrained`` and ``convert.load_tokenizer``.
    """
    folder = local_folder(name)
    tokenizer = Tokenizer(folder, convert.read_config(folder).vocab_size)  # before the weights, which take longer
    return convert.from_pretrained(folder, dtype=None if dtype is None else jnp.dtype(dtype)), tokenizer


def stop_tokens(config: Any) -> set[int]:
    """The tokens that end a text: ``eos_token_id`` of config.json; none of a model that has no config.json."""
    options = json.loads(getattr(config, "options", "") or "{}")
    for place in (options, options.get("text_config") or {}):
        stops = place.get("eos_token_id")
        if stops is not None:
            return {stops} if isinstance(stops, int) else {*stops}
    return set()


@dataclasses.dataclass(frozen=True)
class Base:
    """The checkpoint that a run begins from.

    Attributes:
      folder: of the checkpoint.
      config: of its model in training.
      tokenizer: its own.
    """

    folder: pathlib.Path
    config: HybridConfig
    tokenizer: Tokenizer

    @classmethod
    def open(cls, name: str, model: presets.Checkpoint) -> Base:
        """Reads all but the weights.

        Raises:
          ValueError: see ``convert.from_pretrained`` and ``convert.load_tokenizer``.
        """
        folder = local_folder(name)
        config = convert.read_config(folder, **dataclasses.asdict(model))
        return cls(folder, config, Tokenizer(folder, config.vocab_size))

    def make_model(self) -> HybridLM:
        """A new model of this config, for its shapes."""
        return HybridLM(self.config, rngs=nnx.Rngs(0))

    def load(self, mesh: Mesh | None) -> HybridLM:
        """The weights, as float32: bfloat16 would round most updates of fine-tuning away."""
        return convert.from_pretrained(self.folder, dtype=jnp.float32, mesh=mesh)

    def identity(self) -> dict[str, str]:
        """Digests of config.json and of the sizes of the files of weights, which may have too many bytes to read."""
        sizes = [[path.name, path.stat().st_size] for path in sorted(self.folder.glob("model*.safetensors"))]
        return {"config": files.digest(self.config.options), "weights": files.digest(json.dumps(sizes))}

    def save(self, model: HybridLM, out: pathlib.Path):
        """Writes a model as a public checkpoint, with this one's tokenizer, templates and options."""
        convert.save_pretrained(model, out, base=self.folder)
