"""The GPU kernels compiled for cards that are not there; skipped without jax-triton (Python 3.12 or later)."""

import os
import subprocess
import sys

import pytest

from experiments.benchmarks import gpu_kernels

pytest.importorskip("jax_triton", reason="pip install jax-triton, for Python 3.12 or later")

CASE = gpu_kernels.Case(90, "bfloat16", 64, 64, "delta", "none", "exact", 16)
COMPILED = gpu_kernels.Compiled(registers=255, spilled=0, shared=227 * 1024, counts=(1, 2, 3, 4), seconds=1.0)
ROW = gpu_kernels.Row(CASE, "forward", 64, 64, 4, 2, COMPILED)


def run(*command, **more):
    """Runs Python in a process whose kernels are compiled. Those of this one are interpreted, see conftest.py."""
    environment = {name: x for name, x in os.environ.items() if name not in ("TRITON_INTERPRET", "XLA_FLAGS")}
    environment |= more
    return subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        ["--cards", "90", "--key-sizes", "64", "--dtypes", "bfloat16", "--decays", "none"],
        pytest.param(["--lengths", "exact", "masked"], marks=pytest.mark.exhaustive),
    ],
    ids=["a card", "all"],
)
def test_no_kernel_spills_or_takes_too_much_shared_memory(options):
    result = run("-m", "experiments.benchmarks.gpu_kernels", *options)
    assert result.returncode == 0, result.stdout + result.stderr
    kernels = [line.replace(", ", "-").split() for line in result.stdout.splitlines() if line.startswith("sm_")]
    all_kinds = {"forward", "forward-keep", "backward"}
    for card, decays in {(cells[0], cells[6]) for cells in kernels}:
        names = {cells[1] for cells in kernels if (cells[0], cells[6]) == (card, decays)}
        others = (
            ("channel_scores", "inverse", "channel_gradient") if decays == "per-channel" else ("scores", "gradient")
        )
        assert names == all_kinds.union(others)
    assert any(int(cells[16]) for cells in kernels if cells[0] == "sm_90")  # wgmma


@pytest.mark.parametrize(
    "result, fault",
    [
        (COMPILED, None),
        (COMPILED._replace(spilled=4), "spills 4 bytes"),
        (COMPILED._replace(shared=228 * 1024), "takes 228 of 227 KiB"),
        ("ValueError: refused", "ValueError: refused"),
    ],
)
def test_faults_of_exact_lengths_are_named_and_end_the_program(result, fault, capsys):
    masked = ROW._replace(case=CASE._replace(length="masked"), result=COMPILED._replace(spilled=4))
    rows = [masked, ROW._replace(result=result)]
    if fault:
        with pytest.raises(SystemExit, match="1"):
            gpu_kernels.report(rows)
        last = f"1 of 2 kernels must not be used: sm_90 forward bfloat16 64 x 64, decays none: {fault}"
    else:
        gpu_kernels.report(rows)
        last = "2 kernels, and none for exact lengths spills or takes too much shared memory"
    assert capsys.readouterr().out.splitlines()[-1] == last


def test_interpreted_kernels_are_refused():
    result = run("-m", "experiments.benchmarks.gpu_kernels", TRITON_INTERPRET="1")
    assert result.returncode == 2 and result.stderr.count("\n") == 1 and "unset it" in result.stderr


@pytest.mark.slow
def test_a_gradient_lowers_to_kernels_without_a_gpu():
    pytest.importorskip("jax_cuda13_plugin", reason="pip install --no-deps jax-cuda13-plugin")
    program = """
import functools
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from fwt_jax import fast_weight_attention

def attend(query, beta, log_decay, implementation):
    return fast_weight_attention(query, query, query, beta, log_decay, implementation=implementation)[0]

def both(implementation, *inputs):
    reads, pull = jax.vjp(lambda *inputs: attend(*inputs, implementation), *inputs)
    return pull(reads)

def count(function, *inputs):
    print(jax.jit(function).trace(*inputs).lower(lowering_platforms=("cuda",)).as_text().count("@triton_kernel_call"))

def inputs(*rows, decay=(4,), sharding=None):
    array = functools.partial(jax.ShapeDtypeStruct, sharding=sharding)
    beta = array((*rows, 256, 4), jnp.float32)
    return array((*rows, 256, 4, 64), jnp.bfloat16), beta, array((*rows, 256, *decay), jnp.float32)

count(functools.partial(both, "triton"), *inputs(2))
count(functools.partial(both, "triton"), *inputs(2, decay=(4, 64)))
count(functools.partial(both, None), *inputs(2))
mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(AxisType.Explicit,) * 2)
with jax.set_mesh(mesh):
    sharding = NamedSharding(mesh, PartitionSpec("x", None, None, "y"))
    count(jax.vmap(functools.partial(both, "triton")), *inputs(4, 1, sharding=sharding))
"""
    result = run("-c", program, XLA_FLAGS="--xla_force_host_platform_device_count=4")
    assert result.stdout.split() == ["4", "5", "0", "4"], result.stderr
