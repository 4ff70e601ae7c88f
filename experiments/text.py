"""Text as tokens: vocabularies, the authors' batches, the windows of their evaluation, and a text that ships."""

from __future__ import annotations

import array
import base64
import collections
import dataclasses
import functools
import gzip
import hashlib
import io
import json
import pathlib
from collections.abc import Iterator, Sequence

import numpy as np

from experiments.run_folder import write_atomically

END, UNKNOWN = "<eos>", "<unk>"


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """What a text is cut into, and the numbers of the pieces.

    Attributes:
      kind: "word", "character" or "sentencepiece".
      pieces: by number. Of words, number 0 is the end of a line.
      model: of sentencepiece, in base 64; empty for the other kinds.
    """

    kind: str
    pieces: tuple[str, ...]
    model: str = ""

    @classmethod
    def words(cls, text: str, *, min_count: int = 1, max_size: int | None = None) -> Vocabulary:
        """What stands between spaces, as the authors have it: the end of each line, then words by their frequency.

        Args:
          text: of training, and of nothing else.
          min_count: rarer words are "<unk>", unknown.
          max_size: so many words at most, all others are unknown. None: all; others are an error, if none is unknown.
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
        """The characters of a text, and one for all others."""
        _check_text(text)
        return cls("character", (UNKNOWN, *sorted(set(text))))

    @classmethod
    def sentencepiece(cls, text: str, size: int) -> Vocabulary:
        """Parts of words, by byte-pair encoding of the text of training; bytes for all that it does not have.

        Raises:
          ValueError: a size that the text is too short for.
        """
        import sentencepiece

        _check_text(text)
        lines = [line.rstrip("\n") for line in _lines(text)]
        longest = max(len(line.encode()) for line in lines) + 1  # what is longer would be skipped
        model = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(lines),
                max_sentence_length=longest,
                model_writer=model,
                vocab_size=size,
                model_type="bpe",
                byte_fallback=True,
                character_coverage=0.9999,
                normalization_rule_name="identity",
                remove_extra_whitespaces=False,
                bos_id=-1,
                minloglevel=2,
            )
        except RuntimeError as error:
            raise ValueError(f"no {size} pieces can be made of this text; take a smaller size. ({error})") from error
        processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
        pieces = tuple(processor.id_to_piece(i) for i in range(processor.vocab_size()))
        return cls("sentencepiece", pieces, base64.b64encode(model.getvalue()).decode())

    def __len__(self) -> int:
        return len(self.pieces)

    @functools.cached_property
    def _numbers(self):
        return {piece: i for i, piece in enumerate(self.pieces)}

    @functools.cached_property
    def _processor(self):
        import sentencepiece

        return sentencepiece.SentencePieceProcessor(model_proto=base64.b64decode(self.model))

    def encode(self, text: str) -> np.ndarray:
        """The numbers of a text, int32 ``[T]``; words and sentencepiece end every line.

        Raises:
          ValueError: a word that is not in the vocabulary, where that has no "<unk>".
        """
        numbers, out = self._numbers, array.array("i")
        if self.kind == "character":
            return np.fromiter((numbers.get(c, 0) for c in text), np.int32, len(text))
        if self.kind == "sentencepiece":
            end = self._processor.eos_id()
            for line in _lines(text):
                out.extend(self._processor.encode(line.rstrip("\n")))
                out.append(end)
            return np.asarray(out, np.int32)
        unknown = numbers.get(UNKNOWN)
        for line in _lines(text):
            for word in line.split():
                number = numbers.get(word, unknown)
                if number is None:
                    raise ValueError(
                        f"the word {word!r} is not in the vocabulary, which has no {UNKNOWN!r}; make it with a "
                        "min_count or max_size, or encode the text that it was made of"
                    )
                out.append(number)
            out.append(0)
        return np.asarray(out, np.int32)

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
        """A short name of this very vocabulary."""
        content = json.dumps([self.kind, self.pieces, self.model]).encode()
        return hashlib.sha256(content).hexdigest()[:16]

    def save(self, path: pathlib.Path):
        """Writes it as JSON."""
        write_atomically(path, json.dumps(dataclasses.asdict(self), ensure_ascii=False))

    @classmethod
    def load(cls, path: pathlib.Path) -> Vocabulary:
        """What ``save`` wrote.

        Raises:
          ValueError: a file that is none.
        """
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
            if fields["kind"] not in ("word", "character", "sentencepiece") or not isinstance(fields["model"], str):
                raise ValueError(f"it has the kind {fields['kind']!r}")
            if not isinstance(fields["pieces"], list) or not all(isinstance(piece, str) for piece in fields["pieces"]):
                raise ValueError("its pieces must be texts")
            vocabulary = cls(fields["kind"], tuple(fields["pieces"]), fields["model"])
            if vocabulary.kind == "sentencepiece":
                vocabulary.encode("")  # which reads the model
            return vocabulary
        except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
            raise ValueError(f"{path} is not a vocabulary: {type(error).__name__}: {error}") from error


def plain(content: str) -> str:
    """The content of a file without a byte order mark; its lines, which "\\n" or "\\r\\n" ends, end with "\\n".

    A lone "\\r", as web text has, ends no line: a space between words.
    """
    return content.removeprefix("\ufeff").replace("\r\n", "\n")


def _lines(text):
    """The lines of a text; what follows the last line break is one only if there is anything."""
    return io.StringIO(text, newline="\n")


def _check_text(text):
    if not text.strip():
        raise ValueError("the text is empty; name files with some words in them")


def count_words(text: str) -> int:
    """Words, and one for the end of each line: what a perplexity per word divides by."""
    return sum(len(line.split()) + 1 for line in _lines(text))


# --- batches ---------------------------------------------------------------------------------------------------------


class Segments:
    """The authors' batches, for ever: rows are contiguous parts of the text, each batch goes on where the last ended.

    Each batch has tokens and targets, int32 ``[B, T]``, and whether the text starts anew. The last of an epoch may be
    shorter; what does not fill the rows is left out. Its state is a number.

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
                "take more text or a smaller batch_size"
            )
        self.length, self.step = length, 0
        self.rows = np.asarray(tokens[: len(tokens) // batch_size * batch_size], np.int32).reshape(batch_size, -1)

    def __len__(self) -> int:
        """Batches of one epoch."""
        return -(-(self.rows.shape[1] - 1) // self.length)

    def __iter__(self) -> Segments:
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        place = self.step % len(self)
        self.step += 1
        part = self.rows[:, place * self.length : (place + 1) * self.length + 1]
        return {"tokens": part[:, :-1], "targets": part[:, 1:], "start": np.asarray(place == 0)}

    def get_state(self) -> dict[str, int]:
        """Where it is, for JSON."""
        return {"step": self.step}

    def set_state(self, state: dict[str, int]):
        """Goes where ``get_state`` was called."""
        self.step = state["step"]


Window = tuple[np.ndarray, np.ndarray]


def windows(tokens: np.ndarray, length: int, batch_size: int) -> tuple[Window, Iterator[dict[str, np.ndarray]], int]:
    """The windows of the authors' evaluation: the first scores all its tokens, each further one its last.

    Args:
      tokens: integers ``[N]``, N ≥ 2.
      length: T of a window; N − 1 if that is less.
      batch_size: B.

    Returns:
      Tokens and targets of the first window ``[1, T]``; batches of the others, tokens ``[B, T]``, targets ``[B]`` and
      weights ``[B]``, which are 0 for the rows that fill up the last batch; and the number of these batches.

    Raises:
      ValueError: fewer than two tokens.
    """
    if len(tokens) < 2:
        raise ValueError(f"to score a token takes at least two, got {len(tokens)}")
    length = min(length, len(tokens) - 1)
    view = np.lib.stride_tricks.sliding_window_view(np.asarray(tokens, np.int32), length + 1)

    def rest():
        for start in range(1, len(view), batch_size):
            rows = np.minimum(np.arange(start, start + batch_size), len(view) - 1)
            weights = (np.arange(start, start + batch_size) < len(view)).astype(np.float32)
            yield {"tokens": view[rows, :-1], "targets": view[rows, -1], "weights": weights}

    return (view[:1, :-1], view[:1, 1:]), rest(), -(-(len(view) - 1) // batch_size)


# --- texts -----------------------------------------------------------------------------------------------------------


def read_files(paths: Sequence[pathlib.Path]) -> str:
    """The ``plain`` text of files, and of the .txt files in folders, in the order of their names.

    Raises:
      ValueError: a path that is not there, a folder without .txt files, text that is empty or not UTF-8.
    """
    parts = []
    for path in map(pathlib.Path, paths):
        files = sorted(path.glob("*.txt")) if path.is_dir() else [path]
        if not files:
            raise ValueError(f"{path} has no .txt files")
        for file in files:
            if not file.is_file():
                raise ValueError(f"{file} is not there")
            try:
                parts.append(plain(file.read_bytes().decode("utf-8")))
            except UnicodeDecodeError as error:
                raise ValueError(f"{file} is not UTF-8: {error}; convert it first") from error
    _check_text("".join(parts))
    return "".join(part if part.endswith("\n") else part + "\n" for part in parts)


def split(text: str, validation: float = 0.05, test: float = 0.05) -> dict[str, str]:
    """The first lines for training, the next for validation, the last for testing, by their characters.

    What follows is harder to guess than what lies between lines that were trained on, and more like new text.

    Raises:
      ValueError: a text with too few lines.
    """
    ends = np.cumsum([len(line) for line in _lines(text)])
    cuts = [int(ends[np.searchsorted(ends, part * len(text))]) for part in (1 - validation - test, 1 - test)]
    parts = {"train": text[: cuts[0]], "validation": text[cuts[0] : cuts[1]], "test": text[cuts[1] :]}
    empty = [name for name, part in parts.items() if not part.strip()]
    if empty:
        raise ValueError(f"nothing is left for {' and '.join(empty)} in a text of {len(ends)} lines; take more text")
    return parts


def demo_text() -> str:
    """The text that ships; its origin is in data/README.md."""
    path = pathlib.Path(__file__).parent / "data" / "demo.txt.gz"
    return gzip.decompress(path.read_bytes()).decode("ascii")
