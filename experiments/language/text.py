"""Texts as tokens: vocabularies, the authors' batches, the windows of their evaluation, and the demo's text."""

from __future__ import annotations

import array
import base64
import collections
import dataclasses
import functools
import gzip
import io
import json
import math
import pathlib
import re
from collections.abc import Iterator, Sequence

import numpy as np

from experiments.run import files, subwords

END, UNKNOWN = "<eos>", "<unk>"
LONGEST_LINE = 10_000  # characters that sentencepiece reads as one line in training


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """The pieces that a text is cut into, and their numbers.

    Attributes:
      kind: "word", "character" or "sentencepiece".
      pieces: the pieces in the order of their numbers. In a vocabulary of words, number 0 is the end of a line.
      model: the model of sentencepiece in base 64; empty for the other kinds.
    """

    kind: str
    pieces: tuple[str, ...]
    model: str = ""

    @classmethod
    def words(cls, text: str, *, min_count: int = 1, max_size: int | None = None) -> Vocabulary:
        """The words between spaces, as the authors cut them: the end of a line, then all words by their frequency.

        Args:
          text: the training text, without validation and test.
          min_count: words that occur less often become "<unk>".
          max_size: the largest number of words beside "<unk>"; the rarest become "<unk>". None: all words. With None
            and min_count 1, "<unk>" is in the vocabulary only if the text contains it.

        Raises:
          ValueError: an empty text.
        """
        _check_text(text)
        counts = collections.Counter()
        for line in _lines(text):
            counts.update(line.split())
        words = [word for word, count in counts.most_common() if count >= min_count and word != END]
        if min_count > 1 or max_size is not None:
            words = [UNKNOWN, *(word for word in words if word != UNKNOWN)]
        words = words if max_size is None else words[: max_size + 1]
        return cls("word", (END, *words))

    @classmethod
    def characters(cls, text: str) -> Vocabulary:
        """The characters of a text, and "<unk>" for all others.

        Raises:
          ValueError: an empty text.
        """
        _check_text(text)
        return cls("character", (UNKNOWN, *sorted(set(text))))

    @classmethod
    def sentencepiece(cls, text: str, size: int) -> Vocabulary:
        """Parts of words: a byte-pair encoding of the training text. Bytes stand for characters that it lacks.

        Raises:
          ValueError: an empty text, or one that is too short for this size.
        """
        _check_text(text)
        lines = [piece for line in _lines(text) for piece in _short_lines(line.rstrip("\n"))]
        options = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "bos_id": -1}
        model = subwords.train(lines, size, "pieces (--vocabulary-size)", **options)
        processor = _processor_of(model)
        pieces = tuple(processor.id_to_piece(i) for i in range(processor.vocab_size()))
        return cls("sentencepiece", pieces, base64.b64encode(model).decode())

    def __len__(self) -> int:
        return len(self.pieces)

    @functools.cached_property
    def _numbers(self):
        return {piece: i for i, piece in enumerate(self.pieces)}

    @functools.cached_property
    def _processor(self):
        return _processor_of(base64.b64decode(self.model))

    def encode(self, text: str) -> np.ndarray:
        """The numbers of a text, int32 ``[T]``. Words and sentencepiece add the end of a line to every line.

        Raises:
          ValueError: a word that is not in the vocabulary, if the vocabulary lacks "<unk>".
        """
        if self.kind == "character":
            return np.fromiter((self._numbers.get(c, 0) for c in text), np.int32, len(text))
        encode_line = self._encode_words if self.kind == "word" else self._encode_pieces
        numbers = array.array("i")
        for line in _lines(text):
            numbers.extend(encode_line(line))
        return np.asarray(numbers, np.int32)

    def _encode_pieces(self, line):
        return [*self._processor.encode(line.rstrip("\n")), self._processor.eos_id()]

    def _encode_words(self, line):
        words, unknown = line.split(), self._numbers.get(UNKNOWN)
        numbers = [self._numbers.get(word, unknown) for word in words]
        if None in numbers:
            word = words[numbers.index(None)]
            raise ValueError(
                f"the word {word!r} is not in the vocabulary, which has no {UNKNOWN!r}; make it with a "
                "min_count or max_size, or encode the text that it was made of"
            )
        return [*numbers, 0]

    def missing(self, text: str) -> list[str]:
        """The characters or words of a text that become "<unk>", sorted. Sentencepiece has bytes for all."""
        if self.kind == "sentencepiece":
            return []
        return sorted(set(text if self.kind == "character" else text.split()) - {*self.pieces})

    def decode(self, numbers: Sequence[int]) -> str:
        """The text of tokens."""
        numbers = [int(i) for i in numbers]
        if self.kind == "character":
            return "".join(self.pieces[i] if i else "\ufffd" for i in numbers)
        if self.kind == "sentencepiece":
            end, lines = self._processor.eos_id(), [[]]
            for i in numbers:
                lines.append([]) if i == end else lines[-1].append(i)
            return "\n".join(self._processor.decode(line) for line in lines)
        lines = " ".join(self.pieces[i] for i in numbers).split(END)
        return "\n".join(line.strip() for line in lines)

    def digest(self) -> str:
        """A short digest, which differs from every other vocabulary's."""
        return files.digest(json.dumps([self.kind, self.pieces, self.model]))

    def save(self, path: pathlib.Path):
        """Writes the vocabulary as JSON."""
        files.write(path, json.dumps(dataclasses.asdict(self), ensure_ascii=False))

    @classmethod
    def load(cls, path: pathlib.Path) -> Vocabulary:
        """The vocabulary that ``save`` wrote.

        Raises:
          ValueError: a file without a vocabulary.
        """
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
            if fields["kind"] not in ("word", "character", "sentencepiece") or not isinstance(fields["model"], str):
                raise ValueError(f"its kind is {fields['kind']!r}")
            if not isinstance(fields["pieces"], list) or not all(isinstance(piece, str) for piece in fields["pieces"]):
                raise ValueError("its pieces must be strings")
            vocabulary = cls(fields["kind"], tuple(fields["pieces"]), fields["model"])
            if vocabulary.kind == "sentencepiece":
                vocabulary.encode("\n")  # This reads the model, so that a damaged one is an error here.
            return vocabulary
        except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
            raise ValueError(f"{path} is not a vocabulary: {type(error).__name__}: {error}") from error


def _processor_of(model):
    import sentencepiece

    return sentencepiece.SentencePieceProcessor(model_proto=model)


def _short_lines(line):
    """A line cut into pieces of at most ``LONGEST_LINE`` characters: at spaces, or anywhere in a longer word."""
    start = 0
    while len(line) - start > LONGEST_LINE:
        space = line.rfind(" ", start + 1, start + LONGEST_LINE + 1)
        yield line[start : space if space > 0 else start + LONGEST_LINE]
        start = space + 1 if space > 0 else start + LONGEST_LINE
    yield line[start:]


def plain(content: str) -> str:
    """The content of a file without a byte order mark, with "\\n" at the end of every line instead of "\\r\\n".

    A lone "\\r", as texts from the web have it, ends no line. It is a space between words.
    """
    return content.removeprefix("\ufeff").replace("\r\n", "\n")


def _lines(text):
    """The lines of a text with their line breaks; only the last line may have none."""
    return io.StringIO(text, newline="\n")


def _check_text(text):
    if not text.strip():
        raise ValueError("the text is empty; name files with some words in them")


def count_words(text: str) -> int:
    """The number of words and line ends: the divisor of a perplexity per word."""
    return sum(len(line.split()) + 1 for line in _lines(text))


# --- batches ---------------------------------------------------------------------------------------------------------


class Segments:
    """The authors' batches, without end. Each row is a contiguous part of the text, cut into segments.

    A batch has the tokens and targets of the next segment of every row, int32 ``[B, T]``, and ``start``: whether it is
    the first of an epoch. The last batch of an epoch may be shorter. Tokens that do not fill the rows are not used.
    The state is one number.

    Args:
      tokens: integers ``[N]``, N ≥ 2B.
      batch_size, length: B, T.

    Raises:
      ValueError: sizes below 1, or too few tokens.
    """

    def __init__(self, tokens: np.ndarray, batch_size: int, length: int):
        if batch_size < 1 or length < 1:
            raise ValueError(f"batch_size and length must be at least 1, got {batch_size} and {length}")
        if len(tokens) < 2 * batch_size:
            raise ValueError(
                f"a batch of {batch_size} rows needs at least {2 * batch_size} tokens, got {len(tokens)}; "
                "take more text or a smaller batch"
            )
        self.length, self.step = length, 0
        self.rows = np.asarray(tokens[: len(tokens) // batch_size * batch_size], np.int32).reshape(batch_size, -1)

    def __len__(self) -> int:
        """The number of batches in an epoch."""
        return -(-(self.rows.shape[1] - 1) // self.length)

    def __iter__(self) -> Segments:
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        place = self.step % len(self)
        self.step += 1
        segment = self.rows[:, place * self.length : (place + 1) * self.length + 1]
        return {"tokens": segment[:, :-1], "targets": segment[:, 1:], "start": np.asarray(place == 0)}

    def get_state(self) -> dict[str, int]:
        """The position, for JSON."""
        return {"step": self.step}

    def set_state(self, state: dict[str, int]):
        """Goes to a position that ``get_state`` returned."""
        self.step = state["step"]


Window = tuple[np.ndarray, np.ndarray]


def windows(tokens: np.ndarray, length: int, batch_size: int) -> tuple[Window, Iterator[dict[str, np.ndarray]], int]:
    """The windows of the authors' evaluation: the first scores all its tokens, each further window its last token.

    Args:
      tokens: integers ``[N]``, N ≥ 2.
      length: T of a window, reduced to N − 1 if it is larger.
      batch_size: B.

    Returns:
      Tokens and targets of the first window, ``[1, T]``. Batches of the further windows: tokens ``[B, T]``, targets
      ``[B]`` and weights ``[B]``; the weight is 0 for rows that only fill up the last batch. The number of batches.

    Raises:
      ValueError: fewer than two tokens.
    """
    if len(tokens) < 2:
        raise ValueError(f"to score a token takes at least two, got {len(tokens)}")
    length = min(length, len(tokens) - 1)
    view = np.lib.stride_tricks.sliding_window_view(np.asarray(tokens, np.int32), length + 1)

    def further():
        for start in range(1, len(view), batch_size):
            rows = np.minimum(np.arange(start, start + batch_size), len(view) - 1)
            weights = (np.arange(start, start + batch_size) < len(view)).astype(np.float32)
            yield {"tokens": view[rows, :-1], "targets": view[rows, -1], "weights": weights}

    return (view[:1, :-1], view[:1, 1:]), further(), -(-(len(view) - 1) // batch_size)


# --- texts -----------------------------------------------------------------------------------------------------------


def read_file(path: pathlib.Path) -> str:
    """The ``plain`` text of one file.

    Raises:
      ValueError: a path that is not a file, a file that is not UTF-8.
    """
    if not path.is_file():
        raise ValueError(f"{path} is not there")
    try:
        return plain(path.read_bytes().decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error}; convert it first") from error


def read_files(paths: Sequence[pathlib.Path]) -> str:
    """The ``plain`` text of files, and of the .txt files in folders in the order of their names.

    Raises:
      ValueError: a path that does not exist, a folder without .txt files, an empty text, and all files that are not
        UTF-8.
    """
    texts, errors = [], []
    for path in paths:
        if (path / "run.json").exists():
            raise ValueError(f"{path} is the folder of a run, not of texts; name a folder of .txt files, or a file")
        folder = sorted(path.glob("*.txt")) if path.is_dir() else [path]
        if not folder:
            raise ValueError(f"{path} has no .txt files")
        for file in folder:
            try:
                texts.append(read_file(file))
            except ValueError as error:
                errors.append(str(error))
    if errors:
        raise ValueError("; ".join(errors))
    _check_text("".join(texts))
    return "".join(text if text.endswith("\n") else text + "\n" for text in texts)


def split(text: str, validation: float = 0.05, test: float = 0.05) -> dict[str, str]:
    """The beginning of a text for training, the next characters for validation, and the end for testing.

    A continuous end is harder to guess than lines between trained lines, and more like a new text. The cuts are at
    line ends. If the lines are too long, they are after spaces; if the words are, between any two characters.

    Raises:
      ValueError: a text that is too short.
    """
    starts = [(1 - validation - test) * len(text), (1 - test) * len(text)]
    for separator in ("\n", r"\s", "(?s:.)"):
        first, second = (_end_of(separator, text, start) for start in starts)
        splits = {"train": text[:first], "validation": text[first:second], "test": text[second:]}
        wanted = {"train": starts[0], "validation": validation * len(text), "test": test * len(text)}
        if all(splits[name].strip() and len(splits[name]) > size / 5 for name, size in wanted.items()):
            return splits
    raise ValueError(f"a text of {len(text)} characters is too short for training, validation and test; take more text")


def _end_of(separator, text, start):
    """The end of the first separator that ends at ``start`` or later."""
    match = re.compile(separator).search(text, max(0, math.ceil(start) - 1))
    return match.end() if match else len(text)


def demo_text() -> str:
    """The text of the demo; data/README.md names its origin."""
    path = pathlib.Path(__file__).parent.parent / "data" / "demo.txt.gz"
    return gzip.decompress(path.read_bytes()).decode("ascii")
