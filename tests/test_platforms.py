"""A program is that of the platform it is compiled or exported for, wherever it was traced."""

import dataclasses
import functools
import re

import jax
import jax.export
import jax.numpy as jnp
import pytest
from cases import some
from flax import nnx

import fwt_jax
from experiments.language import experiment as language
from experiments.language import presets as language_presets
from experiments.retrieval import experiment as retrieval
from experiments.retrieval.model import Task, make_trainer
from experiments.run import training
from experiments.translation import experiment as translation
from experiments.translation import presets as translation_presets
from fwt_jax.models import DecoderLM, EncoderDecoder

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
    """How often the loops of a module run: those of ``lax.scan``, which count in int32, as sums over tokens do not."""
    counts = []
    for function in module.split("func.func")[1:]:  # the names of values are those of a function
        constants = dict(re.findall(r"(%\w+) = stablehlo.constant dense<(\d+)> : tensor<i32>", function))
        bounds = re.findall(r"cond {\s+%\w+ = stablehlo.compare +LT, %\w+, (%\w+),.*tensor<i32>", function)
        counts += [int(constants[bound]) for bound in bounds]
    return sorted(counts)


@pytest.mark.parametrize("platform", ["cpu", "cuda", "rocm", "tpu"])
def test_the_default_form_takes_chunks_of_64_on_every_platform(platform):
    # GPUs take blocks of up to 16 chunks: a loop over the blocks, and in each a loop over its chunks.
    loops = [1, 4] if platform in ("cuda", "rocm") else [4]
    assert trip_counts(exported(attend, platform)) == loops


def test_a_gpu_takes_no_blocks_where_they_gain_little_or_need_much_memory():
    def with_decay_per_channel(query, key, value, beta):
        return attend(query, key, value, beta, log_decay=-key * key)

    assert trip_counts(exported(attend, "cuda", rule="sum")) == [4]
    assert trip_counts(exported(with_decay_per_channel, "cuda")) == [4]


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_a_gradient_takes_chunks_of_64_on_every_platform(platform):
    module = exported(gradient, platform)
    # There and back; a GPU recomputes the block in between.
    assert trip_counts(module) == ([1, 1, 4, 4, 4] if platform == "cuda" else [4, 4])
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


# --- the experiments -------------------------------------------------------------------------------------------------


def of_trainer(model, config, loss, settings, *names, shape):
    """A training step and its abstract inputs."""

    def make_model():
        return model(config, rngs=nnx.Rngs(0))

    state = jax.eval_shape(functools.partial(training.initial_state, make_model, settings))
    batch = {name: jax.ShapeDtypeStruct(shape, jnp.int32) for name in names}
    return training.make_step(training.graph_of(make_model), loss, settings), state, batch


def language_step(name):
    preset = language_presets.find(name)
    shape = (preset.batch_size, preset.length)
    model = dataclasses.replace(preset.model, num_layers=1)  # the others have the same operations
    return of_trainer(DecoderLM, model, language.loss, preset.training, "tokens", "targets", shape=shape)


def translation_step(name):
    size, model = translation_presets.find(name)
    model = dataclasses.replace(model, encoder_layers=1, decoder_layers=1)
    loss = functools.partial(translation.loss, size.label_smoothing)
    return of_trainer(EncoderDecoder, model, loss, size.training, "source", "target", shape=(16, 64))


def retrieval_step(number):
    start, advance = make_trainer(retrieval.UPDATE_RULE_MODELS[number], Task(20, True))
    return advance, start(0)


@pytest.mark.slow
@pytest.mark.parametrize(
    "make",
    [
        pytest.param(functools.partial(language_step, "demo"), marks=pytest.mark.exhaustive),
        functools.partial(language_step, "small-delta"),
        functools.partial(translation_step, "tiny-delta-dpfp-2"),
        functools.partial(translation_step, "tiny-performer-32"),
        *some(
            4,
            [
                functools.partial(retrieval_step, number)
                for number in reversed(range(len(retrieval.UPDATE_RULE_MODELS)))
            ],
        ),
    ],
    ids=lambda make: f"{make.func.__name__}, {make.args[0]}",
)
def test_the_training_steps_of_the_experiments_are_programs_of_a_gpu(make):
    # JAX refuses operations that only a CPU has, and here calls of the host.
    step, *inputs = make()
    with jax.numpy_rank_promotion("allow"):
        module = jax.jit(step).trace(*inputs).lower(lowering_platforms=("cuda",)).as_text()
    assert "lapack" not in module
