"""Byte-pair encodings (Sennrich et al. 2016), made by sentencepiece."""

from __future__ import annotations

import io
from collections.abc import Sequence


def train(lines: Sequence[str], size: int, name: str, **options) -> bytes:
    """The model of ``size`` pieces of the lines; bytes stand for all characters that are too rare.

    Args:
      lines: the text, without line ends.
      size: the number of pieces.
      name: how an error calls the pieces.
      options: of ``sentencepiece.SentencePieceTrainer``.

    Raises:
      ValueError: a size that the text is too short, or too varied, for.
    """
    import sentencepiece

    model = io.BytesIO()
    # Sentencepiece skips longer lines, and refuses numbers below 10.
    longest = max(10, 1 + max(len(line.encode()) for line in lines))
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            max_sentence_length=longest,
            model_writer=model,
            vocab_size=size,
            model_type="bpe",
            byte_fallback=True,
            character_coverage=0.9999,
            minloglevel=2,
            **options,
        )
    except RuntimeError as error:
        raise ValueError(f"no {size} {name} can be made of this text; take another number. ({error})") from error
    return model.getvalue()
