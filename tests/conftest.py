"""Strict JAX for every test: eight CPU devices, no silent rank promotion; warnings are errors (pyproject.toml)."""

import gc
import os
import subprocess
import sys

import hypothesis
import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

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
jax.config.update("jax_traceback_in_locations_limit", 0)  # pytest's stack is deep, and no test looks at it in a program

# Reproducible, and without a time limit per example: the first one compiles.
hypothesis.settings.register_profile("fwt_jax", deadline=None, derandomize=True, database=None, max_examples=25)
hypothesis.settings.load_profile("fwt_jax")


def pytest_addoption(parser):
    parser.addoption("--fuzz", type=int, help="how many random calls tests/test_fuzz.py makes (25)")
    parser.addoption("--fuzz-seed", type=int, help="which ones: call i depends on the seed and i alone")


def pytest_collection_finish():
    """Tracing makes many objects, and to search all of them often took a tenth of the time.

    Not with ``gc.freeze``: the first test of hypothesis 6.100 in a process then fails as flaky.
    """
    gc.set_threshold(50_000, 20, 100)


@pytest.fixture(autouse=True, scope="module")
def forget_what_was_compiled():
    """After each file: a thousand tests compile more than a process may map into its memory."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="module")
def compiled_once(tmp_path_factory):
    """A program that is compiled again comes from a file: each run of an experiment makes its step anew."""
    options = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("programs")),
        "jax_persistent_cache_min_compile_time_secs": 0.3,
        "jax_persistent_cache_min_entry_size_bytes": 0,
    }
    before = {name: getattr(jax.config, name) for name in options}
    configure_cache(options)
    with pytest.MonkeyPatch.context() as environment:  # of the processes that tests start
        for name, value in options.items():
            environment.setenv(name.upper(), str(value))
        yield
    configure_cache(before)


def configure_cache(options):
    for name, value in options.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()  # else JAX goes on with what it read at its first compilation


@pytest.fixture
def x64():
    """float64 for the length of a test."""
    with jax.enable_x64(True):
        yield
