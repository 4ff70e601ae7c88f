"""A program is that of the platform it is compiled or exported for, wherever it was traced."""

import functools
import re

import jax
import jax.export
import jax.numpy as jnp
import pytest

import fwt_jax

INPUTS = [jax.ShapeDtypeStruct((2, 256, 3, 64), jnp.float32)] * 3 + [jax.ShapeDtypeStruct((2, 256, 3), jnp.float32)]


def attend(query, key, value, beta, **options):
    return fwt_jax.fast_weight_attention(query, key, value, beta, **options)[0]


def gradient(*inputs, **options):
    return jax.grad(lambda *inputs: jnp.sum(attend(*inputs, **options)), argnums=(0, 1, 2, 3))(*inputs)


def exported(function, platform, **options):
    """The text of the module of a platform, traced on this machine's CPU."""
    program = jax.jit(functools.partial(function, **options))
    return jax.export.export(program, platforms=[platform])(*INPUTS).mlir_module()


def trip_counts(module):
    """How often the loops of a module run."""
    counts = []
    for function in module.split("func.func")[1:]:  # the names of values are those of a function
        constants = dict(re.findall(r"(%\w+) = stablehlo.constant dense<(\d+)> : tensor<i32>", function))
        bounds = re.findall(r"cond {\s+%\w+ = stablehlo.compare +LT, %\w+, (%\w+)", function)
        counts += [int(constants[bound]) for bound in bounds]
    return sorted(counts)


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_the_default_form_takes_chunks_of_64_on_every_platform(platform):
    assert trip_counts(exported(attend, platform)) == [4]


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_a_gradient_takes_chunks_of_64_on_every_platform(platform):
    module = exported(gradient, platform)
    assert trip_counts(module) == [4, 4]  # there and back
    in_halves = re.search(r"dot_general.* -> tensor<2x3x32x32xf32>", module)
    assert bool(in_halves) == (platform == "cpu")


@pytest.mark.parametrize("function", [attend, gradient])
def test_a_kernel_is_in_the_program_of_a_tpu_and_interpreted_in_that_of_a_cpu(function):
    for_tpu, for_cpu = (exported(function, platform, implementation="pallas") for platform in ("tpu", "cpu"))
    assert for_tpu.count("tpu_custom_call") == (1 if function is attend else 2)
    assert "while" not in for_tpu
    assert "tpu_custom_call" not in for_cpu and "while" in for_cpu


@pytest.mark.parametrize("function", [attend, gradient])
def test_kernels_are_refused_where_they_are_compiled_for_a_gpu(function):
    with pytest.raises(ValueError, match=r'"pallas" is for TPU, got cuda; use implementation="xla"'):
        exported(function, "cuda", implementation="pallas")
