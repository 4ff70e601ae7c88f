"""What a task of the atlas is: the runs that it wants, and how one of them is executed.

Each task has a file: regression.py, recall.py, languages.py, groups.py, forgetting.py. It defines a ``Task``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple


@dataclasses.dataclass(frozen=True)
class Run:
    """One model on one setting of a task, with several seeds at once.

    Attributes:
      task: the name of the task.
      model: the name of the model, a key of the task's table of models.
      setting: what is varied besides the model, such as "parity" or "width 64"; "" if nothing is.
      seeds: how many seeds, 0 to seeds − 1. All of them are trained in one program, by ``jax.vmap``.
    """

    task: str
    model: str
    setting: str = ""
    seeds: int = 5


class Point(NamedTuple):
    """One number: of one seed at one x, such as a length of a test or a number of pairs."""

    seed: int
    x: float
    score: float


class Task(NamedTuple):
    """A task of the atlas.

    Attributes:
      name: the subcommand, and the name of its results, ``name.csv`` and ``name.png``.
      question: one sentence that says what the task asks of a memory.
      x, score: the names of the two axes.
      runs: the number of seeds -> all runs.
      execute: (run, report) -> points. ``report(fraction)`` is called now and then with what is done, from 0 to 1.
      seconds: a run -> an estimate of its seconds on one core, to start the longest first.
      solved: the summary of a run for the overview figure, from its points, a number from 0 (fails) to 1 (solves it).
      draw: (figure, rows) -> None: the task's own figure, from rows of its csv, dicts of text with the keys model,
        setting, seed, x, score and seconds.
      overview: the settings that the overview figure shows; all of them if not given.
    """

    name: str
    question: str
    x: str
    score: str
    runs: Callable[[int], list[Run]]
    execute: Callable[[Run, Callable[[float], Any]], list[Point]]
    seconds: Callable[[Run], float]
    solved: Callable[[list[Point]], float]
    draw: Callable[..., None]
    overview: tuple[str, ...] | None = None
