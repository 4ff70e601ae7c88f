"""WikiText-103 (Merity et al. 2017) from the user's own files. Nothing is downloaded and nothing is written."""

from __future__ import annotations

import pathlib

from experiments.language.text import read_file

FILES = {"train": "wiki.train.tokens", "validation": "wiki.valid.tokens", "test": "wiki.test.tokens"}


def load(folder: pathlib.Path | None) -> dict[str, str]:
    """The texts of the three splits, each read by ``text.read_file``.

    Args:
      folder: the folder of the three files.

    Raises:
      ValueError: no folder, a missing file, a file that is not UTF-8.
    """
    if folder is None:
        raise ValueError(
            f"WikiText-103 is needed: name the folder of {', '.join(FILES.values())} of wikitext-103-v1 "
            "(the word-level version) with --wikitext"
        )
    folder = folder.expanduser()
    missing = [name for name in FILES.values() if not (folder / name).is_file()]
    if missing:
        raise ValueError(
            f"WikiText-103 is not in {folder}: put {', '.join(missing)} of wikitext-103-v1 (the word-level version) "
            "there, or name the folder of these files with --wikitext"
        )
    return {split: read_file(folder / name) for split, name in FILES.items()}
