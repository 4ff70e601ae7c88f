"""Worker processes: what they share, and what their environment says."""

import os
import subprocess
import sys

import pytest

from experiments.run import workers

PREALLOCATE = "XLA_PYTHON_CLIENT_PREALLOCATE"
pytestmark = pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no cores to choose")


@pytest.mark.parametrize(("users", "workers_"), [(None, "false"), ("true", "true")])
def test_a_worker_leaves_the_memory_of_a_gpu_to_others_unless_told_otherwise(users, workers_, monkeypatch):
    monkeypatch.delenv(PREALLOCATE, raising=False)
    if users:
        monkeypatch.setenv(PREALLOCATE, users)
    with workers.pool(1) as pool:
        assert pool.submit(os.getenv, PREALLOCATE).result() == workers_
        assert len(pool.submit(os.sched_getaffinity, 0).result()) == 1
    assert os.environ.get(PREALLOCATE) == users


@pytest.mark.parametrize(("backend", "all_cores"), [("cpu", False), ("gpu", True)])
def test_a_worker_has_one_core_on_cpu_and_all_on_a_gpu(backend, all_cores):
    program = f"""
import os, threading
import jax
from experiments.run import workers
before, end, of_thread = workers.cores(), threading.Event(), []
jax.default_backend = lambda: threading.Thread(target=see).start() or "{backend}"  # starts a thread, as JAX does
see = lambda: end.wait() and of_thread.extend(os.sched_getaffinity(0))
workers._share_machine(before[-1])
end.set()
while threading.active_count() > 1: pass
after = before if {all_cores} else before[-1:]
assert (workers.cores(), sorted(of_thread)) == (after, after)
"""
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["retrieval.experiment", "language.comparison"])
def test_a_program_that_starts_workers_takes_no_memory_of_a_gpu_itself(name):
    program = (
        f"import experiments.{name}; from jax._src import xla_bridge as x; assert not x.backends_are_initialized()"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
