"""Worker processes, with one core each on CPU. On a GPU they share it."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor

import jax


def cores() -> list[int]:
    """The cores that this process may use."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))


@contextlib.contextmanager
def pool(workers: int, start: Callable | None = None, arguments: tuple = ()) -> Iterator[ProcessPoolExecutor]:
    """A pool of new processes. On CPU each has one core: small matrix products gain nothing from a second core.

    On a GPU they have all cores, because a GPU's programs are compiled by several threads. They share its memory.
    JAX would give most of it to the first worker, so each takes what it needs, unless the user has set
    XLA_PYTHON_CLIENT_PREALLOCATE.

    An error or an interruption in the block ends the workers. Workers also end when this process dies. They get no
    Ctrl-C of the terminal, so that only this process reports it.

    Args:
      workers: the number of workers. If there are more workers than cores, they share cores.
      start: called in each worker with ``arguments`` before its first task; queues for it come from
        ``multiprocessing.get_context("spawn")``.
      arguments: the arguments of ``start``.
    """
    context = multiprocessing.get_context("spawn")
    available, numbers = cores(), context.Queue()
    for worker in range(workers):
        numbers.put(available[worker % len(available)])
    with ProcessPoolExecutor(workers, context, _start_worker, (numbers, start, arguments)) as executor:
        try:
            _spawn(executor, workers)
            yield executor
        except BaseException:
            processes = list(executor._processes.values())  # shutdown forgets them
            executor.shutdown(wait=False, cancel_futures=True)
            for process in processes:
                process.kill()  # libraries print a stack trace at SIGTERM; files are whole at any moment
            raise


def _spawn(executor, workers):
    """Starts all workers. They inherit the signals that are blocked here."""
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        for _ in range(workers):
            executor.submit(os.getpid)  # starts a worker
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def _start_worker(numbers, start, arguments):
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _share_machine(numbers.get())
    if start is not None:
        start(*arguments)


def _share_machine(core):
    """Leaves the memory of a GPU, and on CPU the other cores, to other workers. It is called before JAX starts."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    if not hasattr(os, "sched_setaffinity"):
        return
    available = cores()
    os.sched_setaffinity(0, {core})  # first, because JAX makes as many threads on CPU as the process has cores
    if jax.default_backend() != "cpu":
        for thread in os.listdir("/proc/self/task"):
            with contextlib.suppress(ProcessLookupError):  # the thread has ended
                os.sched_setaffinity(int(thread), available)


def _end_with_parent():
    multiprocessing.parent_process().join()
    os._exit(1)  # no process is left to take a result; files are written whole
