"""The paper's synthetic retrieval (figures 2 to 5): how much a memory holds, and which update rule corrects it.

    python -m experiments.retrieval                 figure 3 and a coarse figure 2, drawn over the authors' points
    python -m experiments.retrieval capacity        figures 2 and 4: 8 models, S = 20 … 600
    python -m experiments.retrieval update_rules    figures 3 and 5: 8 models, S = 20 … 200

Results and figures go to runs/retrieval/ (--out). Every finished run is saved at once, an unfinished one once a minute,
and a sweep that was interrupted goes on where it stopped. Times and numbers, measured on two cores:
experiments/README.md. The task and the models are in retrieval_model.py, the figures in plot_retrieval.py.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import multiprocessing
import os
import pathlib
import queue
import threading
import time
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from typing import Literal

import filelock
import tyro
from tqdm import tqdm

from experiments import command_line, plot_retrieval
from experiments.plot_retrieval import COLUMNS
from experiments.retrieval_model import EVAL_EVERY, MAX_STEPS, Model, Task, is_finished, read_unfinished, replace, train

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
        """What tells the rows of a results file apart: its first five columns, as text."""
        fields = (self.model.name, self.model.rule, self.task.num_keys, int(self.task.replace), self.seed)
        return tuple(map(str, fields))

    @property
    def cost(self) -> float:
        """A rough measure of the time it takes, to start the longest first."""
        features = {"favor": 10 * self.model.size, "dpfp": 128 * self.model.size}.get(self.model.feature_map, 64)
        rule = 3 * self.model.recipe[1] if self.model.rule == "fwm" else 1  # its tokens go in sequence
        return self.task.num_keys * (1000 + features) * rule


# --- running and saving ----------------------------------------------------------------------------------------------


def load(path: pathlib.Path) -> dict[tuple[str, ...], dict[str, str]]:
    """The finished runs of a results file by ``Run.id``; none if there is no file.

    Raises:
      ValueError: see ``plot_retrieval.read_runs``.
    """
    rows = plot_retrieval.read_runs(path) if path.exists() else []
    return {tuple(row[column] for column in COLUMNS[:5]): row for row in rows}


def save(path: pathlib.Path, rows: dict[tuple[str, ...], dict[str, str]]):
    """Writes a results file whole and then puts it in place, so that at any moment there is a complete one.

    Raises:
      OSError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    content = io.StringIO()
    writer = csv.DictWriter(content, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows[key] for key in sorted(rows, key=lambda key: (key[0], key[1], int(key[2]), int(key[4]))))
    replace(path, content.getvalue().encode())


_progress = None  # in a worker: where it reports its evaluations


def _start_worker(progress, cores):
    """One core for each worker: the products here are too small for two to be worth the waiting."""
    global _progress
    _progress = progress
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {cores.get()})


def _end_with_parent():
    multiprocessing.parent_process().join()
    os._exit(1)  # nobody is left to take a result


def _execute(run: Run, max_steps: int, checkpoint: pathlib.Path) -> dict[str, str]:
    def report(step, loss):
        _progress.put((run.id, step, loss))

    losses, seconds = train(run.model, run.task, run.seed, max_steps, report, checkpoint)
    return row(run, losses, seconds)


def row(run: Run, losses: list[float], seconds: float) -> dict[str, str]:
    """What the results file keeps of a run."""
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
    """Executes the runs that ``path`` does not hold yet, on several cores, saving each as it finishes.

    Args:
      runs: what to execute, in any order.
      path: the results file.
      workers: processes, one core each.
      max_steps: of a run that does not stop by itself. Those of ``runs`` that were cut off earlier are run anew.

    Returns:
      The rows of ``path``, by ``Run.id``.
    """
    rows = load(path)
    for run in runs:
        if run.id in rows and not is_finished([*map(float, rows[run.id]["losses"].split())], max_steps):
            del rows[run.id]
    todo = sorted((run for run in runs if run.id not in rows), key=lambda run: -run.cost)
    bar = tqdm(total=len(runs), initial=len(runs) - len(todo), unit="run", desc=path.stem, dynamic_ncols=True)
    if not todo:
        bar.close()
        return rows
    path.parent.mkdir(parents=True, exist_ok=True)
    checkpoints = {run.id: path.with_name("-".join((path.stem, *run.id)) + ".unfinished") for run in todo}
    for checkpoint in checkpoints.values():
        if checkpoint.exists():
            read_unfinished(checkpoint)  # what is damaged is said now, and not after hours
    context = multiprocessing.get_context("spawn")
    progress, cores = context.Queue(), context.Queue()
    for worker in range(workers):
        cores.put(_cores()[worker % len(_cores())])
    with bar, ProcessPoolExecutor(min(workers, len(todo)), context, _start_worker, (progress, cores)) as pool:
        try:
            pending = {pool.submit(_execute, run, max_steps, checkpoints[run.id]) for run in todo}
            while pending:
                done, pending = wait(pending, timeout=0.5, return_when=FIRST_COMPLETED)
                for future in sorted(done, key=lambda future: future.exception() is not None):
                    row = future.result()
                    run_id = tuple(row[column] for column in COLUMNS[:5])
                    rows[run_id] = row
                    save(path, rows)
                    checkpoints[run_id].unlink(missing_ok=True)
                    bar.update()
                _show_progress(bar, progress)
        except BaseException:
            processes = list(pool._processes.values())  # which shutdown forgets
            pool.shutdown(wait=False, cancel_futures=True)
            for process in processes:
                process.terminate()
            raise
    return rows


def _cores() -> list[int]:
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))


def _show_progress(bar, progress):
    latest = None
    while True:
        try:
            latest = progress.get_nowait()
        except queue.Empty:
            break
    if latest:
        (model, rule, num_keys, _, seed), step, loss = latest
        bar.set_postfix_str(f"{model} {rule} S={num_keys} seed {seed}: step {step}, loss {loss:.4f}")


# --- command line ----------------------------------------------------------------------------------------------------

EXPERIMENTS = {
    # name: [(models, S, setting 2?)]
    "quick": [
        ((UPDATE_RULE_MODELS[0], UPDATE_RULE_MODELS[2], *UPDATE_RULE_MODELS[6:]), (20,), True),
        (tuple(model for model in CAPACITY_MODELS if model.size not in (128, 512)), (20, 60, 120, 200), False),
    ],
    "capacity": [(CAPACITY_MODELS, tuple(range(20, 601, 20)), False)],
    "update_rules": [(UPDATE_RULE_MODELS, tuple(range(20, 201, 20)), True)],
}


@dataclasses.dataclass(frozen=True)
class Config:
    """What to run, and how."""

    experiment: tyro.conf.Positional[Literal["quick", "capacity", "update_rules"]] = "quick"
    """quick: figure 3 and a coarse figure 2, in minutes. capacity: figures 2 and 4. update_rules: figures 3 and 5."""
    out: pathlib.Path = pathlib.Path("runs/retrieval")
    """Folder for results and figures; the runs that its results file holds are not repeated."""
    seeds: int = 1
    """Runs per point, with seeds 1, 2, ...; more than one draws error bars."""
    sizes: tuple[int, ...] = ()
    """Numbers of keys, S, instead of the experiment's own."""
    workers: int = len(_cores())
    """Processes, one core each."""
    max_steps: int = MAX_STEPS
    """Of a run that does not stop by itself."""

    def __post_init__(self):
        for name, least in (("seeds", 1), ("workers", 1), ("max_steps", EVAL_EVERY)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")

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
    start = time.perf_counter()
    path = config.out / f"{config.experiment}.csv"
    config.out.mkdir(parents=True, exist_ok=True)
    try:
        with filelock.FileLock(path.with_suffix(".lock"), timeout=0):  # each sweep writes all rows that it knows of
            rows = sweep(config.runs, path, workers=config.workers, max_steps=config.max_steps)
    except filelock.Timeout as error:
        raise ValueError(f"another sweep writes {path}: wait for its end, or name another place with --out") from error
    rows = [rows[run.id] for run in config.runs]
    print(plot_retrieval.table(rows))
    for figure in plot_retrieval.draw(rows, config.out, config.experiment):
        print(f"wrote {figure}")
    print(f"{len(rows)} runs in {path}, {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    with command_line.one_line():
        main(tyro.cli(Config, description=__doc__))
