"""A sweep: many runs in worker processes, the longest first, with one progress bar over their estimated seconds."""

from __future__ import annotations

import multiprocessing
import queue
import time
from collections.abc import Callable, Collection, Hashable
from concurrent.futures import FIRST_COMPLETED, wait
from typing import Any

from tqdm import tqdm

from experiments.run.workers import pool

_reports = None  # in a worker: the queue of (run, fraction)


def _start_worker(reports):
    global _reports
    _reports = reports


def _execute(function, run):
    started = time.process_time()
    report(run, 0.0)
    return function(run), time.process_time() - started


def report(run: Hashable, fraction: float):
    """Says in a worker how much of a run is done, from 0 to 1."""
    if _reports is not None:
        _reports.put((run, fraction))


def sweep(
    name: str,
    seconds: dict[Any, float],
    finished: Collection[Any],
    function: Callable[[Any], Any],
    save: Callable[[Any, Any, float], None],
    *,
    workers: int,
    words: Callable[[Any], str] = str,
):
    """Executes the runs that are not finished, and saves each when it ends.

    Args:
      name: what the bar says.
      seconds: all runs, with an estimate of their seconds on one core.
      finished: the runs that an earlier sweep has saved.
      function: run -> result, of the top level of a module. It may call ``report``.
      save: (run, result, seconds of the processor), called in this process.
      workers: processes; see ``workers.pool``.
      words: the name of a run.

    Raises:
      KeyboardInterrupt: Ctrl-C; the message says how to go on.
    """
    todo = sorted((run for run in seconds if run not in finished), key=lambda run: -seconds[run])
    if not todo:
        return
    done = set(seconds) - set(todo)
    workers = min(workers, len(todo))
    reports = multiprocessing.get_context("spawn").Queue()
    try:
        with _Progress(name, seconds, done, words) as progress, pool(workers, _start_worker, (reports,)) as executor:
            pending = {executor.submit(_execute, function, run): run for run in todo}
            while pending:
                ended, _ = wait(pending, timeout=1, return_when=FIRST_COMPLETED)
                for future in sorted(ended, key=lambda future: future.exception() is not None):
                    run = pending.pop(future)
                    save(run, *future.result())
                    done.add(run)
                progress.show(reports)
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt(
            f"stopped; {len(done)} of {len(seconds)} runs are finished and saved. The same command goes on"
        ) from error


class _Progress:
    """The bar. A run advances it by its estimated seconds; the text beside it names one unfinished run."""

    def __init__(self, name, seconds, done, words):
        self.name, self.seconds, self.done, self.words = name, seconds, done, words
        self.fractions = {}  # of the runs that have started, in the order of their start

    def __enter__(self):
        initial = sum(self.seconds[run] for run in self.done)
        layout = "{desc}: {percentage:3.0f}%|{bar}| [{elapsed}{postfix}]"
        total = sum(self.seconds.values())
        self.bar = tqdm(desc=self.name, total=total, initial=initial, bar_format=layout, dynamic_ncols=True)
        return self

    def __exit__(self, *_):
        self.bar.close()

    def show(self, reports):
        while True:
            try:
                run, fraction = reports.get_nowait()
            except queue.Empty:
                break
            self.fractions[run] = fraction
        running = {run: fraction for run, fraction in self.fractions.items() if run not in self.done}
        self.bar.n = sum(self.seconds[run] for run in self.done)
        self.bar.n += sum(fraction * self.seconds[run] for run, fraction in running.items())
        self.bar.set_description_str(f"{self.name}, {len(self.done)}/{len(self.seconds)} runs", refresh=False)
        self.bar.set_postfix_str(", ".join([*self._remaining(), *map(self.words, [*running][:1])]))

    def _remaining(self):
        """The remaining time, from the speed so far; none in the first seconds."""
        advanced = self.bar.n - self.bar.initial
        if advanced > 5:
            left = self.bar.format_dict["elapsed"] / advanced * (self.bar.total - self.bar.n)
            yield f"{self.bar.format_interval(left)} to go"
