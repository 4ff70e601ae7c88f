"""The folder of a run: where it is, which run it holds, and the results of all runs in a folder."""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
import re
import time
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax

from experiments.run import devices, files
from experiments.run.command_line import in_short


def folder(path: pathlib.Path) -> pathlib.Path:
    """The absolute path of the folder of a run.

    Raises:
      ValueError: the address of a bucket, which would become a folder of that name on each machine; a file.
    """
    if re.match("[a-z0-9]{2,}:/", str(path)):
        raise ValueError(f"the folder of a run must be on a file system, got {path}; mount the bucket (gcsfuse) first")
    if path.is_file():
        raise ValueError(f"the folder of a run must be a folder, and {path} is a file; name another")
    return path.absolute()


def check_that_all_see(path: pathlib.Path):
    """Checks, with several processes, that each sees a file that the first one wrote.

    Raises:
      ValueError: in a process that does not see it within a minute.
    """
    if jax.process_count() == 1:
        return
    devices.wait_for_all("the folder of a run")
    end = time.monotonic() + 60  # network file systems may take a while
    while not path.exists():
        if time.monotonic() > end:
            raise ValueError(
                f"process {jax.process_index()} does not see {path}, which the first one wrote; the folder of a run "
                "must be on storage that all machines share"
            )
        time.sleep(1)


def check_identity(
    path: pathlib.Path, identity: dict[str, Any], free: Collection[str] = (), words: Mapping[str, str] | None = None
):
    """Writes the settings of a new run to a file; checks that a run that goes on has the same.

    Args:
      path: the file.
      identity: the settings by name, as JSON can hold them; the settings in a dict are named "dict.setting".
      free: names of settings that may change.
      words: the user's name for a setting, by its name.

    Raises:
      ValueError: other settings, with each that differs; a number that is not finite, which would differ from itself.
    """
    bad = [f"{name} is {x}" for name, x in _leaves(identity) if isinstance(x, float) and not math.isfinite(x)]
    if bad:
        raise ValueError(f"the settings of a run must be finite numbers: {'; '.join(bad)}")
    if not path.exists():
        files.write(path, json.dumps(identity, indent=1))
        return
    before = dict(_leaves(files.read_json(path)))
    now = dict(_leaves(json.loads(json.dumps(identity))))
    words = words or {}
    names = [name for name in sorted({*before, *now} - {*free}) if before.get(name) != now.get(name)]
    if names:
        changes = [f"{words.get(name, name)} was {before.get(name)!r} and is {now.get(name)!r}" for name in names]
        raise ValueError(
            f"{path.parent} holds another run: {'; '.join(changes)}. Name another folder, or delete this one"
        )


def words(config: Any, identity: dict[str, Any], options: Mapping[str, str]) -> dict[str, str]:
    """The user's name for each setting of a program: an option, or a setting of the preset.

    Args:
      config: the ``TrainConfig``.
      identity: the other settings.
      options: the options that set a setting, by its name in run.json; the preset sets the others.
    """
    names = [name for name, _ in _leaves({"training": dataclasses.asdict(config), **identity})]
    return {name: f"{name.rpartition('.')[2]} of --preset" for name in names} | dict(options)


def results(folder: pathlib.Path, mark: str, check: Callable[[dict], object]) -> dict[pathlib.Path, dict]:
    """The results of all runs below a folder, by the run's own folder.

    These are the results that have the key ``mark``; each experiment has its own.

    Raises:
      ValueError: a file that is damaged, or in which ``check`` misses something.
    """
    rows = {}
    for path in sorted(folder.glob("**/results.json")):
        row = files.read_json(path)
        if mark in row:
            try:
                check(row)
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(f"{path} is not whole ({in_short(error)}); run its command again") from error
            rows[path.parent] = row
    return rows


def _leaves(settings, prefix=""):
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
