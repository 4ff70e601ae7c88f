"""The paper's synthetic retrieval (figures 2 to 5): how much a memory holds, and which update rule corrects it.

    python -m experiments.retrieval                 figure 3 and a coarse figure 2, drawn over the authors' points
    python -m experiments.retrieval capacity        figures 2 and 4: 8 models, S = 20 … 600
    python -m experiments.retrieval update_rules    figures 3 and 5: 8 models, S = 20 … 200

Results and figures go to runs/retrieval/ (--out). A finished run is saved when it ends, an unfinished one every minute.
The same command goes on with a sweep that was interrupted. README.md in this folder has measured times and numbers. The
task and the models are in model.py, the figures in plot.py.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import multiprocessing
import pathlib
import queue
import time
from concurrent.futures import FIRST_COMPLETED, wait
from typing import Literal

import filelock
import tyro
from tqdm import tqdm

from experiments.retrieval import plot
from experiments.retrieval.model import EVAL_EVERY, MAX_STEPS, Model, Task, is_finished, read_unfinished, train
from experiments.retrieval.plot import COLUMNS
from experiments.run import command_line, files
from experiments.run.workers import cores, pool

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

        It counts 4 s of compilation, and steps whose number and time grow with S. The constant is fitted: the runs of
        results/quick.csv took 371 s in all, and their estimates add up to 382 s. The sum for update_rules.csv is half
        of the measured time.
        """
        features = {"favor": 10 * self.model.size, "dpfp": 128 * self.model.size}.get(self.model.feature_map, 64)
        sequential = self.model.update is not None and not self.model.update.parallel
        rule = self.model.optimization[1] if sequential else 1
        return 4 + 1.8e-5 * self.task.num_keys * (1 + self.task.num_keys / 60) * (1000 + features) * rule


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


_reports = None  # in a worker: the queue of (Run.id, step)


def _start_worker(reports):
    global _reports
    _reports = reports


def _execute(run: Run, max_steps: int, checkpoint: pathlib.Path) -> dict[str, str]:
    def report(step, loss=None):
        _reports.put((run.id, step))

    report(0)
    losses, seconds = train(run.model, run.task, run.seed, max_steps, report, checkpoint)
    return row(run, losses, seconds)


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
    todo = sorted((run for run in runs if run.id not in rows), key=lambda run: -run.cost)
    if not todo:
        return rows
    path.parent.mkdir(parents=True, exist_ok=True)
    checkpoints = {run.id: path.with_name("-".join((path.stem, *run.id)) + ".unfinished") for run in todo}
    for checkpoint in checkpoints.values():
        if checkpoint.exists():
            read_unfinished(checkpoint)  # damage is reported now, and not after hours
    workers = min(workers, len(todo))
    print(f"{len(todo)} runs, {workers} at a time; {duration(todo, workers)}", flush=True)
    reports = multiprocessing.get_context("spawn").Queue()
    try:
        with Progress(path.stem, runs, todo) as progress, pool(workers, _start_worker, (reports,)) as executor:
            pending = {executor.submit(_execute, run, max_steps, checkpoints[run.id]) for run in todo}
            while pending:
                done, pending = wait(pending, timeout=1, return_when=FIRST_COMPLETED)
                for future in sorted(done, key=lambda future: future.exception() is not None):
                    row = future.result()
                    run_id = tuple(row[column] for column in COLUMNS[:5])
                    rows[run_id] = row
                    save(path, rows)
                    checkpoints[run_id].unlink(missing_ok=True)
                    progress.finish(run_id)
                progress.show(reports)
    except KeyboardInterrupt as error:
        saved = sum(run.id in rows for run in runs)
        raise KeyboardInterrupt(
            f"stopped; {saved} of {len(runs)} runs are finished and saved. The same command goes on, with unfinished "
            "runs from where they were up to a minute ago"
        ) from error
    return rows


def duration(runs: list[Run], workers: int) -> str:
    """The estimated time of runs, in words."""
    seconds = sum(run.cost for run in runs) / min(workers, len(cores()))
    seconds = max(seconds, *(run.cost for run in runs))
    if seconds < 90:
        return f"about {seconds:.0f} seconds"
    return f"about {seconds / 60:.0f} minutes" if seconds < 90 * 60 else f"about {seconds / 3600:.0f} hours"


class Progress:
    """A progress bar for runs. A run advances it by its estimated seconds, with the clock while it is unfinished.

    The text beside the bar names one unfinished run and its step, until that run ends.
    """

    def __init__(self, name: str, runs: list[Run], todo: list[Run]):
        self.name, self.costs = name, {run.id: run.cost for run in runs}
        self.finished = set(self.costs) - {run.id for run in todo}
        self.started, self.steps = {}, {}  # of unfinished runs, in the order of their start

    def __enter__(self):
        total, initial = sum(self.costs.values()), sum(self.costs[run_id] for run_id in self.finished)
        layout = "{desc}: {percentage:3.0f}%|{bar}| [{elapsed}{postfix}]"
        self.bar = tqdm(desc=self._words(), total=total, initial=initial, bar_format=layout, dynamic_ncols=True)
        return self

    def __exit__(self, *_):
        self.bar.close()

    def _words(self):
        return f"{self.name}, {len(self.finished)}/{len(self.costs)} runs"

    def finish(self, run_id: tuple[str, ...]):
        self.finished.add(run_id)
        self.started.pop(run_id, None)
        self.bar.set_description_str(self._words(), refresh=False)

    def show(self, reports):
        """Takes the reports (Run.id, step) of the workers, and shows the bar."""
        while True:
            try:
                run_id, step = reports.get_nowait()
            except queue.Empty:
                break
            if run_id not in self.finished:  # a report may come after the end of its run
                self.started.setdefault(run_id, time.monotonic())
                self.steps[run_id] = step
        now = time.monotonic()
        self.bar.n = sum(self.costs[run_id] for run_id in self.finished)
        self.bar.n += sum(min(now - start, 0.9 * self.costs[run_id]) for run_id, start in self.started.items())
        self.bar.set_postfix_str(", ".join([*self._remaining(), *self._one_run()]))

    def _remaining(self):
        """The remaining time, from the speed so far; none in the first seconds."""
        done = self.bar.n - self.bar.initial
        if done > 5:
            seconds = self.bar.format_dict["elapsed"] / done * (self.bar.total - self.bar.n)
            yield f"{self.bar.format_interval(seconds)} to go"

    def _one_run(self):
        for run_id in [*self.started][:1]:
            model, rule, num_keys, replace, _ = run_id
            step = f"step {self.steps[run_id]}" if self.steps[run_id] else "compiling"
            yield f"{plot.label(model, rule, replace)}, S = {num_keys}: {step}"


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
