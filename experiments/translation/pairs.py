"""Sentence pairs: files, WMT14 from TFDS, a small set that ships, subwords, and batches of similar lengths."""

from __future__ import annotations

import dataclasses
import functools
import gzip
import itertools
import os
import pathlib
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import grain
import numpy as np
from tqdm import tqdm

from experiments.run import subwords

PAD, UNK, BOS, EOS = range(4)
MAX_SENTENCES = 2_000_000  # that subwords are made from
SIZES = (8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)  # tokens of a padded sentence


class Pairs(NamedTuple):
    """Sentences and their translations, in order."""

    source: Sequence[str]
    target: Sequence[str]

    def part(self, rows: slice) -> Pairs:
        """Some of the pairs."""
        return Pairs(self.source[rows], self.target[rows])


# --- text ------------------------------------------------------------------------------------------------------------


def read_pairs(paths: Sequence[pathlib.Path]) -> Pairs:
    """Pairs from two UTF-8 files, whose lines belong together, or from one with a tab between them.

    Raises:
      ValueError: a file is missing, not UTF-8 or empty; two files have different numbers of lines; a line of one file
        has not exactly one tab.
    """
    if len(paths) not in (1, 2):
        names = ", ".join(map(str, paths))
        raise ValueError(f"pairs must be in two files, or in one with tabs, got {len(paths)} files: {names}")
    columns = [_lines(pathlib.Path(path)) for path in paths]
    if len(columns) == 1:
        return _split_tabs(columns[0], paths[0])
    source, target = columns
    if len(source) != len(target):
        raise ValueError(
            f"the lines of two files must belong together: {paths[0]} has {len(source):,} and {paths[1]} "
            f"{len(target):,}"
        )
    return Pairs(source, target)


def _split_tabs(lines, name):
    rows = [line.split("\t") if line else ["", ""] for line in lines]
    for i, row in enumerate(rows):
        if len(row) != 2:
            line = lines[i] if len(lines[i]) <= 100 else lines[i][:100] + "…"
            raise ValueError(f"line {i + 1} of {name} must be a sentence, a tab and its translation: {line!r}")
    return Pairs([row[0] for row in rows], [row[1] for row in rows])


def _lines(path):
    if not path.exists():
        raise ValueError(f"{path} is not there; name a file with one sentence a line")
    if path.is_dir():
        raise ValueError(f"{path} is a folder; name a file with one sentence a line")
    with path.open(encoding="utf-8-sig", newline="\n") as file:
        lines = read_lines(file, path)
    if not any(line.strip() for line in lines):
        raise ValueError(f"{path} is empty; name a file with sentences")
    return lines


def read_lines(file: Iterable[str], name: object) -> list[str]:
    """The lines of an open file without their ends, ``\\n`` or ``\\r\\n``. ``name``: of the file, for an error.

    Raises:
      ValueError: the file is not UTF-8.
    """
    try:
        return [line.removesuffix("\n").removesuffix("\r") for line in file]
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8: {error}; convert it first") from error


def demo_pairs() -> dict[str, Pairs]:
    """The English and German sentences that ship, in three parts. data/README.md says where they are from."""
    path = pathlib.Path(__file__).parent.parent / "data" / "demo.en-de.tsv.gz"
    demo = _split_tabs(gzip.decompress(path.read_bytes()).decode("utf-8").removesuffix("\n").split("\n"), path)
    splits = {"train": slice(400, None), "validation": slice(200), "test": slice(200, 400)}
    return {name: demo.part(rows) for name, rows in splits.items()}


WMT14 = ("cs-en", "de-en", "fr-en", "hi-en", "ru-en")


def load_wmt14(pair: str, data_dir: pathlib.Path | None = None) -> dict[str, Pairs]:
    """WMT14 as TFDS has prepared it, read without TensorFlow and without network.

    Args:
      pair: source and target, as "en-de".
      data_dir: the folder of TFDS; $TFDS_DATA_DIR or ~/tensorflow_datasets if not given.

    Raises:
      ValueError: WMT14 does not have the pair; the data is not prepared, or in a format that needs TensorFlow;
        tensorflow-datasets is not installed.
    """
    configs = {name: config for config in WMT14 for name in (config, "-".join(reversed(config.split("-"))))}
    if pair not in configs:
        raise ValueError(f"--pair must be one of WMT14's, {', '.join(configs)}, got {pair!r}")
    source, _, target = pair.partition("-")
    home = pathlib.Path(data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()
    builder = _wmt14_builder(home / "wmt14_translate" / configs[pair] / "1.0.0", configs[pair])

    def read(split):
        rows = tqdm(builder.as_data_source(split), f"reading {split}", disable=None)
        return Pairs(*zip(*((_text(row[source]), _text(row[target])) for row in rows), strict=True))

    return {split: read(split) for split in ("train", "validation", "test")}


def _wmt14_builder(path, config):
    if not (path / "dataset_info.json").is_file():
        raise ValueError(
            f"{path} is not there: prepare WMT14 once, on a machine with network and TensorFlow, by tfds.builder("
            f'"wmt14_translate/{config}", file_format="array_record").download_and_prepare(), and put it there; or '
            "name other files with --parallel"
        )
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise ValueError(f"WMT14 is read by tensorflow-datasets: pip install -e '.[wmt14]' ({error})") from error
    builder = tfds.builder_from_directory(path)
    if builder.info.file_format.value != "array_record":
        raise ValueError(
            f"{path} is in the format {builder.info.file_format.value}, which takes TensorFlow to read; prepare it "
            'with file_format="array_record"'
        )
    return builder


def _text(value):
    return value if isinstance(value, str) else value.decode("utf-8")


# --- subwords --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Subwords:
    """Parts of words of both languages together, by byte-pair encoding (Sennrich et al. 2016).

    Padding is 0, unknown 1, the start of a sentence 2 and its end 3. Characters that the text of training did not have
    are encoded as bytes. Sentencepiece normalises text before it encodes it: NFKC, and spaces are joined ("½" and "…"
    become "1⁄2" and "..."). So translations are normal text, while references are scored as they are.
    """

    model: bytes

    @classmethod
    def train(cls, pairs: Pairs, size: int) -> Subwords:
        """Makes ``size`` subwords from the text of training, of at most ``MAX_SENTENCES`` sentences.

        The same text gives the same subwords every time.

        Raises:
          ValueError: the text is too short, or too varied, for the size.
        """
        lines = [*pairs.source, *pairs.target]
        if len(lines) > MAX_SENTENCES:  # Sentencepiece would choose other sentences in every process.
            chosen = np.random.default_rng(0).choice(len(lines), MAX_SENTENCES, replace=False)
            lines = [lines[i] for i in np.sort(chosen)]
        return cls(subwords.train(lines, size, "subwords", pad_id=PAD, unk_id=UNK, bos_id=BOS, eos_id=EOS))

    @classmethod
    def load(cls, path: pathlib.Path) -> Subwords:
        """The subwords in a file.

        Raises:
          ValueError: the file is missing or damaged.
        """
        if not path.is_file():
            raise ValueError(f"{path} is not there; put back a copy, or name the folder of another run")
        loaded = cls(path.read_bytes())
        try:
            len(loaded)
        except RuntimeError as error:
            raise ValueError(f"{path} is damaged ({error}); put back a copy") from error
        return loaded

    def __len__(self) -> int:
        return self._processor().vocab_size()

    def _processor(self):
        import sentencepiece

        return sentencepiece.SentencePieceProcessor(model_proto=self.model)

    def encode(self, lines: Iterable[str], label: str | None = None) -> Sentences:
        """Tokens of sentences, each with its end. ``label``: of a progress bar, if it takes more than a second."""
        processor, lengths, flat = self._processor(), [], []
        lines = iter(lines) if label is None else iter(tqdm(lines, label, disable=None, delay=1))
        while chunk := list(itertools.islice(lines, 10_000)):
            rows = processor.encode(chunk)
            lengths += [len(row) + 1 for row in rows]
            flat.append(np.fromiter(itertools.chain.from_iterable((*row, EOS) for row in rows), np.int32))
        ends = np.cumsum([0, *lengths])
        return Sentences(np.concatenate(flat) if flat else np.zeros(0, np.int32), ends)

    def decode(self, rows: Iterable[Sequence[int]]) -> list[str]:
        """The sentences of rows of tokens. A sentence stops at its first end token."""
        before_end = [list(itertools.takewhile(lambda token: token != EOS, map(int, row))) for row in rows]
        lines = self._processor().decode([[token for token in row if token > UNK] for row in before_end])
        return [" ".join(line.split()) for line in lines]  # A line break has a token too, and must not break a line.


class Sentences(NamedTuple):
    """Many sentences as one array: sentence i is ``tokens[ends[i]:ends[i + 1]]``."""

    tokens: np.ndarray
    ends: np.ndarray

    def __len__(self) -> int:
        return len(self.ends) - 1

    def row(self, i: int) -> np.ndarray:
        """The tokens of sentence i."""
        return self.tokens[self.ends[i] : self.ends[i + 1]]

    @property
    def lengths(self) -> np.ndarray:
        """The numbers of tokens of all sentences, with their end tokens."""
        return np.diff(self.ends)


# --- batches ---------------------------------------------------------------------------------------------------------


def usable(source: Sentences, target: Sentences, max_length: int) -> tuple[np.ndarray, str]:
    """The rows of the pairs that have no empty side and at most max_length tokens, and a sentence that counts the rest.

    Raises:
      ValueError: there is no such pair.
    """
    empty = (source.lengths < 2) | (target.lengths < 2)
    long = ~empty & (np.maximum(source.lengths, target.lengths) > max_length)
    rows = np.flatnonzero(~empty & ~long)
    counts = f"{empty.sum():,} with an empty side and {long.sum():,} of more than {max_length} tokens"
    if not len(rows):
        raise ValueError(f"all {len(source):,} pairs are left out: {counts}; take other text, or a larger --max-length")
    return rows, f"{len(source):,} pairs, without {counts}"


Batch = tuple[int, np.ndarray]  # the size that sentences are padded to, and their rows
MaxRows = Callable[[int], int]  # of a batch of that size


def plan(
    lengths: np.ndarray,
    rows: np.ndarray,
    tokens: int,
    multiple: int,
    seed: np.random.Generator | int | None,
    max_rows: MaxRows | None = None,
) -> list[Batch]:
    """Batches of sentences of similar lengths.

    There are few sizes, so that few shapes are compiled. A sentence longer than the largest size is cut. The last batch
    of a size may have fewer rows.

    Args:
      lengths: the tokens of each sentence.
      rows: the sentences to use.
      tokens: of a batch with its padding, at most; but a batch has at least ``multiple`` rows.
      multiple: the number of rows of a full batch is a multiple of it, e.g. the number of devices.
      seed: of the order within a size; None keeps the order.
      max_rows: a second limit of a batch, by its size; but a batch has at least ``multiple`` rows.
    """
    if seed is not None:
        rows = np.random.default_rng(seed).permutation(rows)
    bucket = np.searchsorted(SIZES, np.minimum(lengths[rows], SIZES[-1]))
    batches = []
    for index, size in enumerate(SIZES):
        members, count = rows[bucket == index], rows_of(size, tokens, multiple, max_rows)
        batches += [(size, members[start : start + count]) for start in range(0, len(members), count)]
    return batches


def rows_of(size: int, tokens: int, multiple: int, max_rows: MaxRows | None = None) -> int:
    """The number of rows of a full batch of a size; see ``plan``."""
    rows = tokens // size if max_rows is None else min(tokens // size, max_rows(size))
    return max(multiple, rows // multiple * multiple)


def pad(sentences: Sentences, rows: np.ndarray, size: int, count: int) -> np.ndarray:
    """Some sentences, cut to ``size`` tokens where they are longer, then empty rows: int32 ``[count, size]``."""
    out = np.full((count, size), PAD, np.int32)
    for i, row in enumerate(rows):
        tokens = sentences.row(row)
        out[i, : len(tokens)] = tokens if len(tokens) <= size else (*tokens[: size - 1], EOS)
    return out


class Epochs:
    """An endless sequence of batches, which grain reads by number. Each epoch has batches of its own, in its own order.

    Args:
      plan_epoch: the batches of an epoch, see ``plan``. Their number is the same in each.
      seed: of all epochs.
    """

    def __init__(self, plan_epoch: Callable[[np.random.Generator], list[Batch]], seed: int):
        self._plan, self._seed = plan_epoch, seed
        self._epochs = {}
        self._lock = threading.Lock()  # grain reads in threads
        self._size = len(self._of_epoch(0))

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, number: int) -> Batch:
        epoch, place = divmod(int(number), self._size)
        return self._of_epoch(epoch)[place]

    def _of_epoch(self, epoch):
        with self._lock:
            if epoch not in self._epochs:
                rng = np.random.default_rng((self._seed, epoch))
                planned = self._plan(rng)
                # At the end of an epoch, grain's threads read from it and from the next one in turn.
                self._epochs = {n: batches for n, batches in self._epochs.items() if n == epoch - 1}
                self._epochs[epoch] = [planned[i] for i in rng.permutation(len(planned))]
            return self._epochs[epoch]


def batches(
    source: Sentences, target: Sentences, rows: np.ndarray, tokens: int, multiple: int, seed: int | None
) -> Iterator[dict[str, np.ndarray]]:
    """The batches {"source", "target"} of ``plan``, int32 ``[rows, size]``.

    With a seed the iterator has no end, makes other batches in each epoch, and can save and restore its position.
    Without one it gives each batch once, in order.
    """

    def collate(batch):
        size, members = batch
        count = rows_of(size, tokens, multiple)
        return {"source": pad(source, members, size, count), "target": pad(target, members, size, count)}

    lengths = np.maximum(source.lengths, target.lengths)
    planned = functools.partial(plan, lengths, rows, tokens, multiple)
    data = grain.MapDataset.source(planned(None) if seed is None else Epochs(planned, seed))
    return iter(data.map(collate).to_iter_dataset())
