"""Strict JAX for every test: eight CPU devices, no silent rank promotion; warnings are errors (pyproject.toml)."""

import os
import subprocess
import sys

import hypothesis
import jax
import pytest

os.environ["JAX_PLATFORMS"] = "cpu"  # of the processes that tests start
os.environ["TRITON_INTERPRET"] = "1"  # before the kernels for GPUs are imported
# Most of the time goes into compiling what runs for milliseconds: a tenth of it is left without LLVM's optimisations,
# with XLA's older way to write fusions, and with programs compiled in one piece.
QUICK = [
    "--xla_backend_optimization_level=0",
    "--xla_cpu_use_fusion_emitters=false",
    "--xla_cpu_parallel_codegen_split_count=1",
]


def known(flags):
    """The flags that this jaxlib knows: it ends a process that is given another one."""

    def starts(flags):
        environment = os.environ | {"XLA_FLAGS": " ".join(flags)}
        program = [sys.executable, "-c", "import jax; jax.devices()"]
        return subprocess.run(program, env=environment, capture_output=True).returncode == 0

    return flags if starts(flags) else [flag for flag in flags if starts([flag])]


if "PYTEST_XDIST_WORKER" not in os.environ:  # a worker has the flags of the process that started it
    os.environ["XLA_FLAGS"] = " ".join([*known(QUICK), os.environ.get("XLA_FLAGS", "")])
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")

# Reproducible, and without a time limit per example: the first one compiles.
hypothesis.settings.register_profile("fwt_jax", deadline=None, derandomize=True, database=None, max_examples=25)
hypothesis.settings.load_profile("fwt_jax")


def pytest_addoption(parser):
    parser.addoption("--fuzz", type=int, help="how many random calls tests/test_fuzz.py makes (25)")
    parser.addoption("--fuzz-seed", type=int, help="which ones: call i depends on the seed and i alone")


@pytest.fixture(autouse=True, scope="module")
def forget_what_was_compiled():
    """After each file: a thousand tests compile more than a process may map into its memory."""
    yield
    jax.clear_caches()


@pytest.fixture
def x64():
    """float64 for the length of a test."""
    with jax.enable_x64(True):
        yield
