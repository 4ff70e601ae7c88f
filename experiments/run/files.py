"""Files that are whole at any moment, JSON objects, and digests."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pathlib
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A temporary path beside ``path``, which replaces ``path`` when the block ends without an error.

    So at any moment ``path`` is the old file or the new one, and never a part of one.

    Raises:
      OSError: the file cannot be written; the message names ``path``.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:  # the message of a full disk does not name the file
        raise OSError(f"{path} cannot be written: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)  # after an error


def write(path: pathlib.Path, content: str | bytes):
    """Writes a whole file, see ``replacing``.

    Raises:
      OSError: it cannot be written.
    """
    with replacing(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
      ValueError: a file that is damaged, or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # a file that is not UTF-8, too
        raise ValueError(f"{path} is not whole JSON: {error}; put back a copy") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(content).__name__}; put back a copy")
    return content


def digest(content: str | bytes) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of a text (UTF-8) or of bytes."""
    return hashlib.sha256(content.encode() if isinstance(content, str) else content).hexdigest()[:16]
