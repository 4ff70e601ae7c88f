"""The paper's synthetic retrieval (figures 2 to 5): how much a memory holds, and which update rule corrects it.

    python -m experiments.retrieval                 figure 3 and a coarse figure 2, drawn over the authors' points
    python -m experiments.retrieval capacity        figures 2 and 4: 8 models, S = 20 … 600
    python -m experiments.retrieval update_rules    figures 3 and 5: 8 models, S = 20 … 200

Results and figures go to runs/retrieval/ (--out). A finished run is saved when it ends, an unfinished one every minute.
The same command goes on with a sweep that was interrupted. README.md in this folder has measured times and numbers. The
task and the models are in model.py, the memory of fwm in fwm.py, and the figures in plot.py.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import io
import pathlib
import time
from typing import Literal

import filelock
import tyro

from experiments.retrieval import plot
from experiments.retrieval.model import EVAL_EVERY, MAX_STEPS, Model, Task, is_finished, read_unfinished, train
from experiments.retrieval.plot import COLUMNS
from experiments.run import command_line, files
from experiments.run import sweep as sweeps
from experiments.run.workers import cores

CAPACITY_MODELS = (
    Model("softmax", "softmax"),
    Model("linear", "sum"),
    *(Model("favor", "sum", m) for m in (64, 128, 512)),
    *(Model("dpfp", "sum", nu) for nu in (1, 2, 3)),
)
UPDATE_RULE_MODELS = (
    Model("dpfp", "sum", 1),
    Model("linear", "delta"),
    Model("dpfp", "delta", 1),
    Model("dpfp", "delta", 2),
    *(Model("favor", "delta", m) for m in (64, 128)),
    Model("dpfp", "fwm", 1),
    Model("tanh", "fwm"),
)


@dataclasses.dataclass(frozen=True)
class Run:
    """One point of a figure."""

    model: Model
    task: Task
    seed: int = 1

    @property
    def id(self) -> tuple[str, ...]:
        """The first five columns of a results file, as text; no two rows have the same."""
        fields = (self.model.name, self.model.rule, self.task.num_keys, int(self.task.replace), self.seed)
        return tuple(map(str, fields))

    @property
    def cost(self) -> float:
        """A rough estimate of its seconds on one core, to start the longest first and to show the progress.

        It counts 4 s of compilation, and a time that grows with S and with the features. For a rule that writes token
        by token it grows faster than the batch, because a larger batch goes with a smaller learning rate. The 240 runs
        of results/capacity.csv with seed 2 took 6,470 s on an Intel Xeon; the estimates add up to 7,260 s. The 80 runs
        of results/update_rules.csv with seed 1 took 8,180 s there; the estimates add up to 7,430 s.
        """
        of_features = {"favor": self.model.size / 6000, "dpfp": 0.04 * self.model.size}
        sequential = self.model.update is not None and not self.model.update.parallel
        rule = self.model.optimization[1] ** 1.5 / 12 if sequential else 1
        return 4 + (0.04 + of_features.get(self.model.feature_map, 0)) * self.task.num_keys * rule


# --- running and saving ----------------------------------------------------------------------------------------------


def load(path: pathlib.Path) -> dict[tuple[str, ...], dict[str, str]]:
    """The finished runs of a results file by ``Run.id``; none if there is no file.

    Raises:
      ValueError: see ``plot.read_runs``.
    """
    rows = plot.read_runs(path) if path.exists() else []
    return {tuple(row[column] for column in COLUMNS[:5]): row for row in rows}


def save(path: pathlib.Path, rows: dict[tuple[str, ...], dict[str, str]]):
    """Writes a results file, see ``files.write``.

    Raises:
      OSError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    content = io.StringIO()
    writer = csv.DictWriter(content, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows[key] for key in sorted(rows, key=lambda key: (key[0], key[1], int(key[2]), int(key[4]))))
    files.write(path, content.getvalue())


def _execute(max_steps: int, path: pathlib.Path, run: Run) -> dict[str, str]:
    def report(step, loss=None):
        sweeps.report(run, f"step {step}")

    losses, seconds = train(run.model, run.task, run.seed, max_steps, report, _checkpoint(path, run))
    return row(run, losses, seconds)


def _checkpoint(path, run):
    """The file of an unfinished run, beside the results file."""
    return path.with_name("-".join((path.stem, *run.id)) + ".unfinished")


def row(run: Run, losses: list[float], seconds: float) -> dict[str, str]:
    """The row of a run in the results file."""
    best = min(range(len(losses)), key=lambda i: (losses[i] != losses[i], losses[i]))
    numbers = (
        f"{losses[best]:.7g}",
        (best + 1) * EVAL_EVERY,
        f"{losses[-1]:.7g}",
        len(losses) * EVAL_EVERY,
        f"{seconds:.1f}",
        " ".join(f"{loss:.7g}" for loss in losses),
    )
    return dict(zip(COLUMNS, (*run.id, *map(str, numbers)), strict=True))


def sweep(runs: list[Run], path: pathlib.Path, *, workers: int, max_steps: int = MAX_STEPS) -> dict:
    """Executes the runs that ``path`` does not hold yet, on several cores, and saves each when it ends.

    Args:
      runs: the runs, in any order.
      path: the results file.
      workers: processes; see ``workers.pool``.
      max_steps: the end of a run that the stopping rule does not end. Rows of ``runs`` that an earlier, smaller limit
        ended are replaced.

    Returns:
      The rows of ``path``, by ``Run.id``.

    Raises:
      ValueError: the results file or an unfinished run is damaged.
      OSError: a file cannot be written.
      KeyboardInterrupt: Ctrl-C; the message says how to go on.
    """
    rows = load(path)
    for run in runs:
        if run.id in rows and not is_finished([*map(float, rows[run.id]["losses"].split())], max_steps):
            del rows[run.id]
    finished = {run for run in runs if run.id in rows}
    path.parent.mkdir(parents=True, exist_ok=True)
    for run in runs:
        if run not in finished and _checkpoint(path, run).exists():
            read_unfinished(_checkpoint(path, run))  # damage is reported now, and not after hours

    def save_run(run, row, _):
        rows[run.id] = row
        save(path, rows)
        _checkpoint(path, run).unlink(missing_ok=True)

    seconds, function = {run: run.cost for run in runs}, functools.partial(_execute, max_steps, path)
    try:
        sweeps.sweep(path.stem, seconds, finished, function, save_run, workers=workers, words=_words)
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt(f"{error}, with unfinished runs from where they were up to a minute ago") from error
    return rows


def _words(run):
    model, rule, num_keys, replace, _ = run.id
    return f"{plot.label(model, rule, replace)}, S = {num_keys}"


# --- command line ----------------------------------------------------------------------------------------------------

EXPERIMENTS = {
    # name: [(models, S, keys are reassigned)]
    "quick": [
        ((UPDATE_RULE_MODELS[0], UPDATE_RULE_MODELS[2], *UPDATE_RULE_MODELS[6:]), (20,), True),
        (tuple(model for model in CAPACITY_MODELS if model.size not in (128, 512)), (20, 60, 120, 200), False),
    ],
    "capacity": [(CAPACITY_MODELS, tuple(range(20, 601, 20)), False)],
    "update_rules": [(UPDATE_RULE_MODELS, tuple(range(20, 201, 20)), True)],
}


@dataclasses.dataclass(frozen=True)
class Config:
    """The runs, and how they are executed."""

    experiment: tyro.conf.Positional[Literal["quick", "capacity", "update_rules"]] = "quick"
    """quick: figure 3 and a coarse figure 2, in minutes. capacity: figures 2 and 4. update_rules: figures 3 and 5."""
    out: pathlib.Path = pathlib.Path("runs/retrieval")
    """Folder of results and figures. Runs in its results file are not repeated."""
    seeds: int = 1
    """Runs per point, with seeds 1, 2, ...; more than one gives error bars."""
    sizes: tuple[int, ...] = ()
    """Numbers of keys S, instead of those of the experiment."""
    workers: int = len(cores())
    """Processes, with one core each on CPU. On a GPU they share it."""
    max_steps: int = MAX_STEPS
    """Steps after which a run ends that the paper's stopping rule does not end before."""

    @property
    def runs(self) -> list[Run]:
        return [
            Run(model, Task(num_keys, replace), seed)
            for models, sizes, replace in EXPERIMENTS[self.experiment]
            for model in models
            for num_keys in self.sizes or sizes
            for seed in range(1, self.seeds + 1)
        ]


def main(config: Config):
    """Executes the runs, prints the table and its verdict, and draws the figures.

    Raises:
      ValueError: a wrong option, or a damaged file.
      OSError: a file cannot be written.
      KeyboardInterrupt: Ctrl-C.
    """
    command_line.check_at_least(config, seeds=1, sizes=1, workers=1, max_steps=EVAL_EVERY)
    start = time.perf_counter()
    path = config.out / f"{config.experiment}.csv"
    config.out.mkdir(parents=True, exist_ok=True)
    try:
        with filelock.FileLock(path.with_suffix(".lock"), timeout=0):  # a second sweep would overwrite the rows
            rows = sweep(config.runs, path, workers=config.workers, max_steps=config.max_steps)
    except filelock.Timeout as error:
        raise ValueError(f"another sweep writes {path}: wait for its end, or name another place with --out") from error
    rows = [rows[run.id] for run in config.runs]
    print(plot.report(rows))
    for figure in plot.draw(rows, config.out, config.experiment):
        print(f"wrote {figure}")
    print(f"{len(rows)} runs in {path}, {time.perf_counter() - start:.0f} s")
