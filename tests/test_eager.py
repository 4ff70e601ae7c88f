"""Calls outside of jax.jit: each compiles once for its shapes, and keeps no memory."""

import contextlib
import functools
import gc
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import some
from flax import nnx
from jax import lax

import fwt_jax
from fwt_jax import feature_maps, memory
from fwt_jax.models import DecoderLM, EncoderDecoder, ModelConfig, TranslationConfig
from fwt_jax.recurrent import checkpointed_scan


@contextlib.contextmanager
def compilations():
    """A list of the log messages of all compilations within the context."""
    names, logger = [], logging.getLogger("jax._src.dispatch")

    class Handler(logging.Handler):
        def emit(self, record):
            if "Finished XLA compilation" in record.getMessage():
                names.append(record.getMessage())

    handler, level = Handler(), logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    try:
        yield names
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def live_objects():
    gc.collect()
    return len(gc.get_objects())


def check_that_it_compiles_once(call, state, times=100):
    """``call`` takes and returns a state. From the third call on, it compiles no program and leaves no object alive."""
    for _ in range(2):
        state = call(state)
    before = live_objects()
    with compilations() as names:
        for _ in range(times):
            state = call(state)
    assert not names
    assert live_objects() - before < max(times, 20)  # at most the odd object of the interpreter


def one_token(length=1):
    rng = np.random.default_rng(0)
    query, key = rng.random((2, 2, length, 3, 8))
    value, beta = rng.random((2, length, 3, 5)), rng.random((2, length, 3))
    return [jnp.asarray(x, jnp.float32) for x in (query, key, value, beta)]


def test_compilations_are_counted():
    with compilations() as names:
        jax.jit(lambda x: jnp.sin(x) + 0.123)(jnp.ones(3)).block_until_ready()
    assert names


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"form": "recurrent"},
        pytest.param({"form": "parallel"}, marks=pytest.mark.exhaustive),
        pytest.param({"chunk_size": 2}, marks=pytest.mark.exhaustive),
        pytest.param({"rule": "sum", "normalize": "read"}, marks=pytest.mark.exhaustive),
        {"normalize": "retrieval"},
        {"rule": "fwm"},
        {"implementation": "pallas"},
    ],
    ids=str,
)
def test_the_operation_compiles_once(options):
    inputs = one_token()
    attend = functools.partial(fwt_jax.fast_weight_attention, *inputs, **options)
    check_that_it_compiles_once(lambda memory: attend(memory=memory)[1], None)


@pytest.mark.slow
@pytest.mark.parametrize("options", some(2, [{}, {"form": "recurrent"}, {"rule": "fwm"}]), ids=str)
def test_its_gradient_compiles_once(options):
    query, key, value, beta = one_token(length=7)

    def loss(key):
        out, memory = fwt_jax.fast_weight_attention(query, key, value, beta, **options)
        return jnp.sum(out) + jnp.sum(memory.fast_weights)

    check_that_it_compiles_once(lambda key: key - 0.01 * jax.grad(loss)(key), key, times=20)


def test_weights_of_a_read_compile_once():
    query, key, _, beta = one_token(length=7)

    def call(query):
        return fwt_jax.read_weights(query, key[0, :, 0], beta[0, :, 0], rule="delta")[1]

    check_that_it_compiles_once(call, query[0, 0, 0])


@pytest.mark.parametrize("scan", [lax.scan, checkpointed_scan])
def test_the_form_of_one_head_compiles_once(scan):
    query, key, value, beta = (x[0, :, 0] for x in one_token(length=7))

    def call(fast_weights):
        return memory.recurrent(fast_weights, query, key, value, beta, step=memory.delta_step, scan=scan)[1]

    check_that_it_compiles_once(call, jnp.zeros((8, 5)), times=5)


@pytest.mark.slow
@pytest.mark.parametrize("rule", some(2, ["delta", "sum"]))
def test_a_layer_that_streams_compiles_once(rule):
    normalization = feature_maps.sum_normalize
    feature_map = functools.partial(feature_maps.dpfp, nu=1)
    options = {"rule": rule, "feature_map": feature_map, "feature_normalization": normalization}
    layer = fwt_jax.FastWeightAttention(12, num_heads=3, head_size=4, **options, rngs=nnx.Rngs(0))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 1, 12)), jnp.float32)
    check_that_it_compiles_once(lambda memory: layer(x, memory)[1], None)


MODELS = [{}, {"scan": True}, {"scan": True, "remat": True}, {"cutoffs": (8, 15)}]


@pytest.mark.slow
@pytest.mark.parametrize("options", some(2, MODELS), ids=str)
def test_a_language_model_compiles_once(options):
    sizes = {"vocab_size": 23, "num_layers": 2 if "scan" in options else 1, "d_model": 12, "d_ff": 20}
    sizes |= {"num_heads": 3, "head_size": 4}
    model = DecoderLM(ModelConfig(**sizes, positions=None, dropout=0.0, **options), rngs=nnx.Rngs(0))
    tokens = jnp.arange(14, dtype=jnp.int32).reshape(2, 7)
    check_that_it_compiles_once(lambda memory: model.losses(tokens, tokens, memory)[1], None, times=5)


@pytest.mark.slow
@pytest.mark.parametrize("scan", some(2, [True, False]))
def test_a_translation_model_compiles_once(scan):
    layers = 2 if scan else 1
    sizes = {"vocab_size": 23, "encoder_layers": layers, "decoder_layers": layers, "d_model": 12, "d_ff": 20}
    model = EncoderDecoder(TranslationConfig(**sizes, num_heads=3, dropout=0.0, scan=scan), rngs=nnx.Rngs(0))
    tokens = jnp.arange(4, 18, dtype=jnp.int32).reshape(2, 7)
    check_that_it_compiles_once(lambda _: model.losses(tokens, tokens), None, times=5)
