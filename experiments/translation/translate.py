"""A trained translation model translates lines by beam search.

python -m experiments.translation translate runs/translation/demo < sentences.txt > translations.txt

Standard input has one sentence a line. Standard output gets one translation a line, and nothing else.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import math
import pathlib
import sys
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx
from tqdm import tqdm

from experiments.run import devices, files, folder, training
from experiments.translation import pairs
from experiments.translation.pairs import Subwords
from fwt_jax import decode
from fwt_jax.models import Attention, EncoderDecoder, TranslationConfig

MEMORY_BYTES = 2**30  # of a device, that the memories of a batch of translations may take


class Translated(NamedTuple):
    """Translated sentences.

    Attributes:
      lines: the translations, in the order of the sentences.
      cut: the number of sentences that were cut.
      sentences_per_second: without the time of compiling; 0 if no size of batch had a second full batch.
    """

    lines: list[str]
    cut: int
    sentences_per_second: float


def translate(
    model: EncoderDecoder,
    subwords: Subwords,
    lines: list[str],
    *,
    beam_size: int = 4,
    length_penalty: float = 0.6,
    tokens: int = 4096,
    multiple: int = 1,
    mesh: jax.sharding.Mesh | None = None,
    label: str | None = "translating",
) -> Translated:
    """Translates sentences.

    An empty line stays an empty line. A sentence longer than the last of ``pairs.SIZES`` is cut to it. A translation
    has at most 10 tokens more than 1.5 times the padded length of its sentence.

    Args:
      tokens: of a batch of sentences with their padding, at most.
      multiple: the number of rows of a batch is a multiple of it, for a mesh.
      label: of the progress bar; None: no bar.
    """
    source = subwords.encode(lines)
    rows = np.flatnonzero(source.lengths > 1)
    translations = [""] * len(lines)

    @functools.cache
    def max_rows(size):
        return MEMORY_BYTES * multiple // _bytes_of_memory(model, size, beam_size)

    plan = pairs.plan(source.lengths, rows, tokens, multiple, None, max_rows)
    timed = []  # (sentences, seconds) of the full batches that compile nothing
    with tqdm(total=len(rows), desc=label, unit="sentence", disable=label is None) as progress:
        for i, (size, members) in enumerate(plan):
            start = time.perf_counter()
            count = pairs.rows_of(size, tokens, multiple, max_rows)
            batch = devices.place({"source": pairs.pad(source, members, size, count)}, mesh)
            best = _search(model, batch["source"], beam_size, length_penalty, mesh)
            for row, text in zip(members, subwords.decode(best[: len(members)]), strict=True):
                translations[row] = text
            if i and plan[i - 1][0] == size and len(members) == count:
                timed.append((len(members), time.perf_counter() - start))
            progress.update(len(members))
    sentences, seconds = np.sum(timed, axis=0) if timed else (0, math.inf)
    return Translated(translations, int(np.sum(source.lengths > pairs.SIZES[-1])), float(sentences / seconds))


def _search(model, source, beam_size, length_penalty, mesh):
    """The best translation of each row, int ``[B, T]``."""
    options = {"beam_size": beam_size, "length_penalty": length_penalty, "max_length": _max_length(source.shape[1])}
    best = decode.beam_search(model, source, **options).tokens[:, 0]
    if mesh is not None:
        best = jax.device_put(best, jax.NamedSharding(mesh, jax.P()))  # Each process needs all rows.
    return np.asarray(best)


def _max_length(size):
    return size * 3 // 2 + 10


def _bytes_of_memory(model, size, beam_size):
    """The memory that a sentence of ``size`` tokens and its hypotheses take."""

    def encode(model):
        return model.encode(jnp.zeros((1, size), jnp.int32), _max_length(size), beam_size)

    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(nnx.eval_shape(encode, model)))


# --- the command line ------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Config:
    """The run whose model translates, and the search."""

    run: tyro.conf.Positional[pathlib.Path]
    """Folder of a run of ``python -m experiments.translation``."""
    beam_size: int = 4
    """Hypotheses of the beam search."""
    length_penalty: float = 0.6
    """A translation of n tokens has the score log p / n^this: a larger penalty favours longer translations."""


def check_search(beam_size: int, length_penalty: float):
    """Raises a ``ValueError`` for an option of the beam search that is out of range."""
    if beam_size < 1:
        raise ValueError(f"--beam-size must be at least 1, got {beam_size}")
    if not 0 <= length_penalty < math.inf:
        raise ValueError(f"--length-penalty must be at least 0, got {length_penalty}")


def load(run: pathlib.Path) -> tuple[EncoderDecoder, Subwords]:
    """The best model of a run, and its subwords.

    Raises:
      ValueError: the folder holds no run of a translation model that this version can read.
    """
    path = run / "run.json"
    if not path.exists():
        raise ValueError(f"{run} holds no run: {path} is not there; train one with python -m experiments.translation")
    settings = files.read_json(path)
    if "subwords" not in settings:
        raise ValueError(f"{run} holds no translation model: {path} has no subwords; name a run of translation")
    try:
        attentions = {name: Attention(**settings["model"][name]) for name in ("encoder", "decoder", "cross")}
        config = TranslationConfig(**settings["model"] | attentions)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"the model of {path} is not one of this version: {error}") from error
    subwords = Subwords.load(run / "subwords.model")
    model, _ = training.load(folder.folder(run), lambda: EncoderDecoder(config, rngs=nnx.Rngs(0)))
    return model, subwords


def main(config: Config):
    check_search(config.beam_size, config.length_penalty)
    with contextlib.redirect_stdout(sys.stderr):  # Standard output is for translations.
        model, subwords = load(config.run)
    if sys.stdin.isatty():
        print("Type one sentence a line. Ctrl-D ends the input.", file=sys.stderr)
    stream = io.TextIOWrapper(sys.stdin.buffer, encoding="utf-8-sig", newline="\n")
    lines = pairs.read_lines(stream, "standard input")
    if not lines:
        raise ValueError("standard input is empty; give sentences, one a line, e.g. with < sentences.txt")
    try:
        options = {"beam_size": config.beam_size, "length_penalty": config.length_penalty}
        translations, cut, _ = translate(model, subwords, lines, **options)
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt("interrupted; no translation was written") from error
    if cut:
        print(f"{cut:,} of {len(lines):,} sentences were cut to {pairs.SIZES[-1]:,} tokens", file=sys.stderr)
    sys.stdout.buffer.write("".join(line + "\n" for line in translations).encode())
    sys.stdout.flush()
