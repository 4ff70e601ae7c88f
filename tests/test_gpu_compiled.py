"""The GPU kernels compiled for cards that are not there; skipped without jax-triton (Python 3.12 or later)."""

import os
import subprocess
import sys

import pytest

from experiments.benchmarks import gpu_kernels

pytest.importorskip("jax_triton", reason="pip install jax-triton, for Python 3.12 or later")

CASE = gpu_kernels.Case(90, "bfloat16", 64, 64, "delta", "none", "exact", 16)
COMPILED = gpu_kernels.Compiled(registers=255, spilled=0, shared=227 * 1024, counts=(1, 2, 3, 4), seconds=1.0)
ROW = gpu_kernels.Row(CASE, "forward", 0, 64, 64, 4, 2, COMPILED)


def run(*command, **more):
    """Runs Python in a process whose kernels are compiled. Those of this one are interpreted, see conftest.py."""
    environment = {name: x for name, x in os.environ.items() if name not in ("TRITON_INTERPRET", "XLA_FLAGS")}
    environment |= more
    return subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True)


@pytest.mark.parametrize(
    "options",
    [
        ["--cards", "90", "--key-sizes", "128", "--dtypes", "bfloat16", "--decays", "none"],
        pytest.param(["--lengths", "exact", "masked"], marks=pytest.mark.exhaustive),
    ],
    ids=["a card", "all"],
)
def test_no_kernel_spills_or_takes_too_much_shared_memory(options):
    result = run("-m", "experiments.benchmarks.gpu_kernels", *options)
    assert result.returncode == 0, result.stdout + result.stderr
    kernels = [line.replace(", ", "-").split() for line in result.stdout.splitlines() if line.startswith("sm_")]
    for card in {cells[0] for cells in kernels}:
        names = {cells[1] for cells in kernels if cells[0] == card}
        assert names == {"scores", "forward", "forward-keep", "backward", "gradient"}
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
        last = f"1 of 2 kernels must not be used: sm_90 forward bfloat16 64 x 64: {fault}"
    else:
        gpu_kernels.report(rows)
        last = "2 kernels, and none for exact lengths spills or takes too much shared memory"
    assert capsys.readouterr().out.splitlines()[-1] == last


def test_interpreted_kernels_are_refused():
    result = run("-m", "experiments.benchmarks.gpu_kernels", TRITON_INTERPRET="1")
    assert result.returncode == 2 and result.stderr.count("\n") == 1 and "unset it" in result.stderr


def test_a_gradient_lowers_to_four_kernels_without_a_gpu():
    pytest.importorskip("jax_cuda13_plugin", reason="pip install --no-deps jax-cuda13-plugin")
    program = """
import jax
import jax.numpy as jnp
from fwt_jax import fast_weight_attention

def both(query, beta, implementation):
    def loss(query, beta):
        return jnp.sum(fast_weight_attention(query, query, query, beta, implementation=implementation)[0])
    return jax.grad(loss, (0, 1))(query, beta)

inputs = jax.ShapeDtypeStruct((2, 256, 4, 64), jnp.bfloat16), jax.ShapeDtypeStruct((2, 256, 4), jnp.float32)
for implementation in ("triton", None):
    traced = jax.jit(both, static_argnums=2).trace(*inputs, implementation)
    print(traced.lower(lowering_platforms=("cuda",)).as_text().count("@triton_kernel_call"))
"""
    result = run("-c", program)
    assert result.stdout.split() == ["4", "0"], result.stderr
