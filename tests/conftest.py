"""Strict JAX for every test: eight CPU devices, no silent rank promotion; warnings are errors (pyproject.toml)."""

import os

import hypothesis
import jax
import pytest

os.environ["JAX_PLATFORMS"] = "cpu"  # of the processes that tests start
# Most of the time goes into compiling what runs for milliseconds: a tenth of it is left without LLVM's optimisations,
# with XLA's older way to write fusions, and with programs compiled in one piece.
QUICK = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
PIECES = "--xla_cpu_parallel_codegen_split_count=1"
os.environ["XLA_FLAGS"] = f"{QUICK} {PIECES} {os.environ.get('XLA_FLAGS', '')}"
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")

# Reproducible, and without a time limit per example: the first one compiles.
hypothesis.settings.register_profile("fwt_jax", deadline=None, derandomize=True, database=None, max_examples=25)
hypothesis.settings.load_profile("fwt_jax")


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
