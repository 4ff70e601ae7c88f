"""An atlas of update rules: what each of them can and cannot do, on a laptop, with error bars.

    python -m experiments.atlas                    all tasks
    python -m experiments.atlas groups recall      some of them
    python -m experiments.atlas --draw             the figures and tables alone, from the results in --out

Results go to runs/atlas/ (--out): a csv file and a figure for each task, and overview.png. A finished run is saved when
it ends, and the same command goes on. README.md in this folder has measured times and numbers. task.py says what a task
is; model.py has the networks and their training.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import pathlib
import time
from typing import Annotated

import filelock
import tyro

from experiments.atlas import forgetting, groups, languages, plot, recall, regression
from experiments.atlas.task import Point, Run, Task
from experiments.run import command_line, files
from experiments.run.sweep import report, sweep
from experiments.run.workers import cores

TASKS: dict[str, Task] = {
    task.name: task for task in (regression.TASK, forgetting.TASK, recall.TASK, languages.TASK, groups.TASK)
}


@dataclasses.dataclass(frozen=True)
class Config:
    """The tasks, and how their runs are executed."""

    tasks: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Names of tasks to run; all of them if none is named. Tables and figures are of all results in --out."""
    out: pathlib.Path = pathlib.Path("runs/atlas")
    """Folder of results and figures. Runs in its results files are not repeated."""
    seeds: int = 5
    """Networks of each run, with other parameters and other training data. A run has all of them in one program."""
    workers: int = len(cores())
    """Processes, with one core each on CPU."""
    draw: bool = False
    """Make no runs: print the tables and draw the figures of what --out holds."""


def main(config: Config):
    """Executes the runs, prints the tables, and draws the figures.

    Raises:
      ValueError: a wrong option, or a damaged file.
      OSError: a file cannot be written.
      KeyboardInterrupt: Ctrl-C.
    """
    command_line.check_at_least(config, seeds=1, workers=1)
    tasks = [_task(name) for name in config.tasks or TASKS]
    start = time.perf_counter()
    if not config.draw:
        config.out.mkdir(parents=True, exist_ok=True)
        try:
            with filelock.FileLock(config.out / ".lock", timeout=0):  # a second sweep would overwrite the rows
                execute(tasks, config)
        except filelock.Timeout as error:
            raise ValueError(f"another sweep writes {config.out}: wait for its end, or name another --out") from error
    for path in plot.draw({name: (task, load(config.out / f"{name}.csv")) for name, task in TASKS.items()}, config.out):
        print(f"wrote {path}")
    print(f"{time.perf_counter() - start:.0f} s")


def _task(name):
    if name not in TASKS:
        raise ValueError(f"no task {name!r}; tasks are {', '.join(TASKS)}")
    return TASKS[name]


def execute(tasks: list[Task], config: Config):
    """Executes the runs of tasks that are not in ``config.out``, and saves each when it ends."""
    rows = {task.name: load(config.out / f"{task.name}.csv") for task in tasks}
    runs = {run: task.seconds(run) for task in tasks for run in task.runs(config.seeds)}
    finished = {run for run in runs if set(range(run.seeds)) <= seeds_of(run, rows[run.task])}

    def save(run, points, seconds):
        kept = [row for row in rows[run.task] if (row["model"], row["setting"]) != (run.model, run.setting)]
        rows[run.task] = in_order(kept + [as_row(run, point, seconds) for point in points], TASKS[run.task])
        write(config.out / f"{run.task}.csv", rows[run.task])

    sweep("atlas", runs, finished, run_one, save, workers=config.workers, words=_words)


def _words(run):
    return ", ".join(filter(None, (run.task, run.setting, run.model)))


def run_one(run: Run) -> list[Point]:
    """Executes one run, in a worker."""
    return TASKS[run.task].execute(run, lambda fraction: report(run, f"{fraction:.0%}"))


def seeds_of(run: Run, rows: list[dict[str, str]]) -> set[int]:
    """The seeds that a results file holds of a run."""
    return {int(row["seed"]) for row in rows if (row["model"], row["setting"]) == (run.model, run.setting)}


def as_row(run: Run, point: Point, seconds: float) -> dict[str, str]:
    """The row of one number in the results file; the seconds are those of the whole run."""
    cells = (run.model, run.setting, point.seed, f"{point.x:g}", f"{point.score:.6g}", f"{seconds:.1f}")
    return dict(zip(plot.COLUMNS, map(str, cells), strict=True))


def in_order(rows: list[dict[str, str]], task: Task) -> list[dict[str, str]]:
    """Rows in the order of the task's runs; figures and tables have it too. Rows of no run come last."""
    rank = {(run.model, run.setting): i for i, run in enumerate(task.runs(1))}
    return sorted(rows, key=lambda row: rank.get((row["model"], row["setting"]), len(rank)))


def load(path: pathlib.Path) -> list[dict[str, str]]:
    """The rows of a results file; none if there is no file.

    Raises:
      ValueError: other columns, or a row that is not whole.
    """
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        rows = list(reader)
    for number, row in enumerate(rows, 2):
        try:
            int(row["seed"]), float(row["x"]), float(row["score"]), float(row["seconds"]), row["model"] + row["setting"]
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"line {number} of {path} is damaged ({error}); delete the line, or the file") from error
    return rows


def write(path: pathlib.Path, rows: list[dict[str, str]]):
    """Writes a results file, see ``files.write``."""
    content = io.StringIO()
    writer = csv.DictWriter(content, plot.COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    files.write(path, content.getvalue())
