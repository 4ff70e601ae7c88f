"""Sentence pairs: files, WMT14 from TFDS, a small set that ships, subwords, and batches of similar lengths."""

from __future__ import annotations

import dataclasses
import gzip
import io
import itertools
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import grain
import numpy as np
from tqdm import tqdm

PAD, UNKNOWN, BOS, EOS = range(4)
SENTENCES = 2_000_000  # from which subwords are made, at most
SIZES = (8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)  # tokens; longer sentences are cut


class Pairs(NamedTuple):
    """Sentences and their translations, in order."""

    source: Sequence[str]
    target: Sequence[str]

    def part(self, rows: slice) -> Pairs:
        """Some of them."""
        return Pairs(self.source[rows], self.target[rows])


def read_pairs(paths: Sequence[pathlib.Path]) -> Pairs:
    """Pairs from two UTF-8 files, whose lines belong together, or from one with a tab between them.

    Raises:
      ValueError: files that are not there, not UTF-8, empty, of different line counts, or lines without one tab.
    """
    if len(paths) not in (1, 2):
        raise ValueError(f"pairs are in two files, or in one with tabs, got {len(paths)}: {', '.join(map(str, paths))}")
    files = [_lines(pathlib.Path(path)) for path in paths]
    if len(files) == 2:
        if len(files[0]) != len(files[1]):
            raise ValueError(
                f"the lines of two files must belong together: {paths[0]} has {len(files[0]):,} and {paths[1]} "
                f"{len(files[1]):,}"
            )
        return Pairs(*files)
    return _split_tabs(files[0], paths[0])


def _split_tabs(lines, name):
    fields = [line.split("\t") if line else ["", ""] for line in lines]
    for i, row in enumerate(fields):
        if len(row) != 2:
            line = lines[i] if len(lines[i]) <= 100 else lines[i][:100] + "…"
            raise ValueError(f"line {i + 1} of {name} must be a sentence, a tab and its translation: {line!r}")
    return Pairs([row[0] for row in fields], [row[1] for row in fields])


def _lines(path):
    if not path.exists() or path.is_dir():
        raise ValueError(
            f"{path} is {'a folder' if path.is_dir() else 'not there'}; name a file with a sentence a line"
        )
    try:
        with path.open(encoding="utf-8-sig", newline="\n") as file:  # as ``text.plain`` has it, but line by line
            lines = [line.removesuffix("\n").removesuffix("\r") for line in file]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error}; convert it first") from error
    if not any(line.strip() for line in lines):
        raise ValueError(f"{path} is empty; name a file with some sentences in it")
    return lines


def demo_pairs() -> dict[str, Pairs]:
    """The English and German sentences that ship, in three parts; their origin is in data/README.md."""
    path = pathlib.Path(__file__).parent / "data" / "demo.en-de.tsv.gz"
    pairs = _split_tabs(gzip.decompress(path.read_bytes()).decode("utf-8").removesuffix("\n").split("\n"), path)
    parts = {"train": slice(400, None), "validation": slice(200), "test": slice(200, 400)}
    return {name: pairs.part(rows) for name, rows in parts.items()}


WMT14 = ("cs-en", "de-en", "fr-en", "hi-en", "ru-en")


def load_wmt14(pair: str, data_dir: pathlib.Path | None = None) -> dict[str, Pairs]:
    """WMT14 as TFDS has prepared it, read without TensorFlow and without network.

    Args:
      pair: source and target, as "en-de".
      data_dir: of TFDS; $TFDS_DATA_DIR or ~/tensorflow_datasets if not given.

    Raises:
      ValueError: a pair that WMT14 does not have, data that is not prepared, or in a format that needs TensorFlow.
    """
    source, _, target = pair.partition("-")
    config = next((name for name in WMT14 if sorted(name.split("-")) == sorted((source, target))), None)
    if config is None:
        either = ", ".join(f"{name} and {'-'.join(reversed(name.split('-')))}" for name in WMT14)
        raise ValueError(f"WMT14 has the pairs {either}, got {pair!r}")
    home = pathlib.Path(data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()
    folder = home / "wmt14_translate" / config / "1.0.0"
    if not (folder / "dataset_info.json").is_file():
        raise ValueError(
            f"{folder} is not there: prepare WMT14 once, on a machine with network and TensorFlow, by tfds.builder("
            f'"wmt14_translate/{config}", file_format="array_record").download_and_prepare(), and put it there; or '
            "name other files with --parallel"
        )
    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(folder)
    if builder.info.file_format.value != "array_record":
        raise ValueError(
            f"{folder} is in the format {builder.info.file_format.value}, which takes TensorFlow to read; prepare it "
            'with file_format="array_record"'
        )

    def pairs(split):
        rows = builder.as_data_source(split)
        texts = [(_text(row[source]), _text(row[target])) for row in tqdm(rows, f"reading {split}", disable=None)]
        return Pairs(*zip(*texts, strict=True))

    return {split: pairs(split) for split in ("train", "validation", "test")}


def _text(value):
    return value if isinstance(value, str) else value.decode("utf-8")


# --- subwords --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Subwords:
    """Parts of words by byte-pair encoding (Sennrich et al. 2016), of both languages together.

    Padding is 0, unknown 1, the start of a sentence 2 and its end 3; what the text of training did not have is bytes.
    Text is normalised first as sentencepiece does by default (NFKC: "½" and "…" become "1⁄2" and "..."; spaces are
    joined), so that translations are normal text; references are scored as they are.
    """

    model: bytes

    @classmethod
    def train(cls, pairs: Pairs, size: int) -> Subwords:
        """Makes ``size`` of them from the text of training, of at most two million sentences: the same every time.

        Raises:
          ValueError: a size that the text is too short, or too varied, for.
        """
        import sentencepiece

        model, lines = io.BytesIO(), [*pairs.source, *pairs.target]
        if len(lines) > SENTENCES:  # its own choice would be another one in every process
            chosen = np.random.default_rng(0).choice(len(lines), SENTENCES, replace=False)
            lines = [lines[i] for i in np.sort(chosen)]
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(lines),
                max_sentence_length=1 + max(len(line.encode()) for line in lines),  # longer ones are skipped
                model_writer=model,
                vocab_size=size,
                model_type="bpe",
                byte_fallback=True,
                character_coverage=0.9999,
                pad_id=PAD,
                unk_id=UNKNOWN,
                bos_id=BOS,
                eos_id=EOS,
                minloglevel=2,
            )
        except RuntimeError as error:
            raise ValueError(f"no {size} subwords can be made of this text; take another number. ({error})") from error
        return cls(model.getvalue())

    def __len__(self) -> int:
        return self._processor().vocab_size()

    def _processor(self):
        import sentencepiece

        return sentencepiece.SentencePieceProcessor(model_proto=self.model)

    def encode(self, lines: Iterable[str], label: str | None = None) -> Sentences:
        """Tokens of sentences, each with its end. ``label``: of a progress bar."""
        processor, lengths, flat = self._processor(), [], []
        lines = iter(lines) if label is None else iter(tqdm(lines, label, disable=None))
        while part := list(itertools.islice(lines, 10_000)):
            rows = processor.encode(part)
            lengths += [len(row) + 1 for row in rows]
            flat.append(np.fromiter(itertools.chain.from_iterable((*row, EOS) for row in rows), np.int32))
        ends = np.cumsum([0, *lengths])
        return Sentences(np.concatenate(flat) if flat else np.zeros(0, np.int32), ends)

    def decode(self, rows: Iterable[Sequence[int]]) -> list[str]:
        """The sentences of tokens, which end at their first end."""
        cut = [list(itertools.takewhile(lambda token: token != EOS, map(int, row))) for row in rows]
        lines = self._processor().decode([[token for token in row if token > UNKNOWN] for row in cut])
        return [" ".join(line.split()) for line in lines]  # the byte of a line's end is a token, too


class Sentences(NamedTuple):
    """Many sentences as one array: sentence i is ``tokens[ends[i]:ends[i + 1]]``."""

    tokens: np.ndarray
    ends: np.ndarray

    def __len__(self) -> int:
        return len(self.ends) - 1

    def row(self, i: int) -> np.ndarray:
        """One of them."""
        return self.tokens[self.ends[i] : self.ends[i + 1]]

    @property
    def lengths(self) -> np.ndarray:
        """Of all, with their ends."""
        return np.diff(self.ends)


# --- batches ---------------------------------------------------------------------------------------------------------


def usable(source: Sentences, target: Sentences, max_length: int) -> tuple[np.ndarray, str]:
    """Which pairs to train on, and what was left out and why: empty ones, and those of more than max_length tokens."""
    empty = (source.lengths < 2) | (target.lengths < 2)
    long = ~empty & (np.maximum(source.lengths, target.lengths) > max_length)
    rows = np.flatnonzero(~empty & ~long)
    counts = f"{len(source):,} pairs, of which {empty.sum():,} with an empty side and {long.sum():,} of more than "
    if not len(rows):
        raise ValueError(f"nothing is left of {counts}{max_length} tokens; take other text, or a larger --max-length")
    return rows, f"{counts}{max_length} tokens are left out"


Batch = tuple[int, np.ndarray]  # the size that sentences are padded to, and their numbers
Most = Callable[[int], int]


def plan(
    lengths: np.ndarray, rows: np.ndarray, tokens: int, multiple: int, seed: int | None, most: Most | None = None
) -> list[Batch]:
    """Batches of sentences of similar lengths.

    Few sizes, so that few shapes are compiled; sentences that are longer than the largest are cut. The last batch of a
    size may have fewer rows.

    Args:
      lengths: of all sentences.
      rows: those to use.
      tokens: of a batch with its padding, at most; but at least ``multiple`` rows.
      multiple: what the number of rows of a full batch is a multiple of, e.g. of the devices.
      seed: of the order within a size; None keeps it.
      most: rows of a batch of a size; but at least ``multiple``.
    """
    if seed is not None:
        rows = np.random.default_rng(seed).permutation(rows)
    bucket = np.searchsorted(SIZES, np.minimum(lengths[rows], SIZES[-1]))
    batches = []
    for index, size in enumerate(SIZES):
        members, count = rows[bucket == index], rows_of(size, tokens, multiple, most)
        batches += [(size, members[start : start + count]) for start in range(0, len(members), count)]
    return batches


def rows_of(size: int, tokens: int, multiple: int, most: Most | None = None) -> int:
    """Rows of a full batch."""
    rows = tokens // size if most is None else min(tokens // size, most(size))
    return max(multiple, rows // multiple * multiple)


def pad(sentences: Sentences, rows: np.ndarray, size: int, count: int) -> np.ndarray:
    """Rows of sentences, those that are longer than ``size`` cut, then empty ones: int32 ``[count, size]``."""
    out = np.full((count, size), PAD, np.int32)
    for i, row in enumerate(rows):
        tokens = sentences.row(row)
        out[i, : len(tokens)] = tokens if len(tokens) <= size else (*tokens[: size - 1], EOS)
    return out


def batches(
    source: Sentences, target: Sentences, rows: np.ndarray, tokens: int, multiple: int, seed: int | None
) -> Iterator[dict[str, np.ndarray]]:
    """Batches {"source", "target"} of ``plan``: for ever, the same batches in a new order each epoch, and able to say
    where it is; once and in order if seed is None."""

    def collate(batch):
        size, members = batch
        count = rows_of(size, tokens, multiple)
        return {"source": pad(source, members, size, count), "target": pad(target, members, size, count)}

    lengths = np.maximum(source.lengths, target.lengths)
    data = grain.MapDataset.source(plan(lengths, rows, tokens, multiple, seed))
    data = data if seed is None else data.seed(seed).shuffle().repeat(None)
    return iter(data.map(collate).to_iter_dataset())
