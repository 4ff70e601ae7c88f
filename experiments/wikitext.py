"""WikiText-103 (Merity et al. 2017) from the user's own files, through TFDS, without network and without TensorFlow.

parts = load(pathlib.Path("wikitext-103"))     # {"train": ..., "validation": ..., "test": ...}
"""

from __future__ import annotations

import functools
import hashlib
import os
import pathlib
import re

from experiments.text import plain

FILES = {"train": "wiki.train.tokens", "validation": "wiki.valid.tokens", "test": "wiki.test.tokens"}


def load(folder: pathlib.Path | None, data_dir: pathlib.Path | None = None) -> dict[str, str]:
    """The texts of the three splits, ``plain`` (see text.py). The first call prepares an array_record copy.

    Args:
      folder: with the files; if None, that where TFDS looks for what users put there themselves.
      data_dir: of TFDS, where the copy goes; ~/tensorflow_datasets if not given.

    Raises:
      ValueError: files that are not there. The network is never tried.
    """
    home = data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    home = pathlib.Path(home).expanduser()
    folder = pathlib.Path(folder or home / "downloads" / "manual").expanduser()
    missing = [name for name in FILES.values() if not (folder / name).is_file()]
    if missing:
        raise ValueError(
            f"WikiText-103 is not in {folder}: put {', '.join(missing)} of wikitext-103-v1 (the word-level version) "
            "there, or name the folder that has them with --wikitext"
        )
    import tensorflow_datasets as tfds

    # By what the files hold, so that others of the same name are prepared anew.
    digest = hashlib.sha256(b"".join(_digest(folder / name) for name in FILES.values())).hexdigest()[:16]
    data = _builder()(data_dir=home / "wikitext" / digest, file_format="array_record")
    data.download_and_prepare(download_config=tfds.download.DownloadConfig(manual_dir=folder, num_shards=1))
    return {split: plain("".join(map(_text, data.as_data_source(split)))) for split in FILES}


def _digest(path):
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def _text(example):
    text = example["text"]
    return text if isinstance(text, str) else text.decode("utf-8")


def articles(text: str) -> list[str]:
    """A text cut before each title, " = Title = "; together they are the text."""
    return re.split(r"(?m)^(?= = [^=\n]+ = *$)", text)


@functools.cache  # TFDS knows each class by its name, and two of one name are an error
def _builder():
    import tensorflow_datasets as tfds

    class Wikitext103(tfds.core.GeneratorBasedBuilder):
        """One example for each article, in the order of the files."""

        VERSION = tfds.core.Version("1.0.0")
        MANUAL_DOWNLOAD_INSTRUCTIONS = f"Put {', '.join(FILES.values())} into manual_dir."

        def _info(self):
            features = tfds.features.FeaturesDict({"text": tfds.features.Text()})
            return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

        def _split_generators(self, dl_manager):
            folder = pathlib.Path(dl_manager.manual_dir)
            return {split: self._generate_examples(folder / name) for split, name in FILES.items()}

        def _generate_examples(self, path):
            # newline="": TFDS gets, and gives back, the line breaks that the file has
            with path.open(encoding="utf-8", newline="") as file:
                parts = articles(file.read())
            for i, part in enumerate(parts):
                if part:
                    yield i, {"text": part}

    return Wikitext103
