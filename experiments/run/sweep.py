"""A sweep: many runs in worker processes, the longest first, with one progress bar over their estimated seconds."""

from __future__ import annotations

import multiprocessing
import queue
import time
from collections.abc import Callable, Collection, Hashable, Sequence
from concurrent.futures import FIRST_COMPLETED, wait
from typing import Any

from tqdm import tqdm

from experiments.run.workers import cores, pool

_reports = None  # in a worker: the queue of (run, words)


def _start_worker(reports):
    global _reports
    _reports = reports


def report(run: Hashable, words: str):
    """Says in a worker how far a run is; the bar shows it."""
    if _reports is not None:
        _reports.put((run, words))


def _execute(function, run):
    started = time.process_time()
    report(run, "compiling")
    return function(run), time.process_time() - started


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
    done, workers = set(seconds) - set(todo), min(workers, len(todo))
    print(f"{len(todo)} runs, {workers} at a time; {duration([seconds[run] for run in todo], workers)}", flush=True)
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


def duration(seconds: Sequence[float], workers: int) -> str:
    """The estimated time of runs that take so many seconds of one core each, in words."""
    total = max(sum(seconds) / min(workers, len(cores())), *seconds)
    if total < 90:
        return f"about {total:.0f} seconds"
    return f"about {total / 60:.0f} minutes" if total < 90 * 60 else f"about {total / 3600:.0f} hours"


class _Progress:
    """The bar. A run advances it by its estimated seconds, with the clock while it is unfinished.

    The text beside the bar names one unfinished run and what it reported last, until that run ends.
    """

    def __init__(self, name, seconds, done, words):
        self.name, self.seconds, self.done, self.words = name, seconds, done, words
        self.started, self.reported = {}, {}  # of the runs of this sweep, in the order of their start

    def __enter__(self):
        total, initial = sum(self.seconds.values()), sum(self.seconds[run] for run in self.done)
        layout = "{desc}: {percentage:3.0f}%|{bar}| [{elapsed}{postfix}]"
        self.bar = tqdm(desc=self.name, total=total, initial=initial, bar_format=layout, dynamic_ncols=True)
        return self

    def __exit__(self, *_):
        self.bar.close()

    def show(self, reports):
        """Takes the reports of the workers, and shows the bar."""
        while True:
            try:
                run, words = reports.get_nowait()
            except queue.Empty:
                break
            self.started.setdefault(run, time.monotonic())
            self.reported[run] = words
        now = time.monotonic()
        running = [run for run in self.started if run not in self.done]
        self.bar.n = sum(self.seconds[run] for run in self.done)
        self.bar.n += sum(min(now - self.started[run], 0.9 * self.seconds[run]) for run in running)
        self.bar.set_description_str(f"{self.name}, {len(self.done)}/{len(self.seconds)} runs", refresh=False)
        one = [f"{self.words(run)}: {self.reported[run]}" for run in running[:1]]
        self.bar.set_postfix_str(", ".join([*self._remaining(), *one]))

    def _remaining(self):
        """The remaining time, from the speed so far; none in the first seconds."""
        advanced = self.bar.n - self.bar.initial
        if advanced > 5:
            left = self.bar.format_dict["elapsed"] / advanced * (self.bar.total - self.bar.n)
            yield f"{self.bar.format_interval(left)} to go"
