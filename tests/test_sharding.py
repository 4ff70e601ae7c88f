"""The mesh, the table of partitions, and that eight devices give the numbers of one."""

import dataclasses
import functools
import math
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import some
from flax import nnx
from jax.sharding import PartitionSpec as P

from experiments.language import text
from experiments.run import devices, training
from fwt_jax import FastWeightAttention, sharding
from fwt_jax.models import DecoderLM, ModelConfig, output_layer

TINY = ModelConfig(vocab_size=96, cutoffs=(32,), num_layers=2, d_model=32, d_ff=64, num_heads=4, head_size=8, dropout=0)
CONFIG = training.TrainConfig(steps=5, learning_rate=1e-2, schedule="constant", warmup=1)
MESHES = [{}, {"fsdp": 8}, {"fsdp": 2, "tensor": 2}, {"data": 2, "tensor": 4}]
SEQUENCES = [{"sequence": 8}, {"fsdp": 2, "sequence": 2, "tensor": 2}]


def loss(model, batch, memory, rngs):
    losses, after = model.losses(batch["tokens"], batch["targets"], memory, rngs=rngs)
    return jnp.sum(losses), jnp.asarray(losses.size), None if memory is None else after


def batch_of(seed, rows=8):
    tokens = np.random.default_rng(seed).integers(0, 96, (rows, 25), np.int32)
    return {"tokens": tokens[:, :-1], "targets": tokens[:, 1:]}


def maker(config):
    return lambda: DecoderLM(config, rngs=nnx.Rngs(0))


def three_steps(config, mesh):
    """Losses, and what is left behind, of a model that carries its memory, where that is of constant size."""
    make = maker(config)
    memory = None if config.rule == "softmax" else make().init_memory(8)
    state = training.initial_state(make, CONFIG, memory)
    if mesh is not None:
        state = training.State(**jax.device_put(state._asdict(), sharding.partition(mesh, state._asdict())))
    step = jax.jit(training.make_step(training.graph_of(make), loss, CONFIG))
    losses = []
    with jax.set_mesh(mesh) if mesh is not None else jax.default_device(jax.devices()[0]):
        for number in range(3):
            state, metrics = step(state, devices.place(batch_of(number), mesh))
            losses.append(metrics["loss"])
    return losses, state


on_one_device = functools.cache(lambda config: three_steps(config, None))


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("axes", "rule"),
    [(MESHES[2], "softmax"), (SEQUENCES[1], "softmax"), *((axes, "delta") for axes in MESHES + SEQUENCES)],
    ids=str,
)
def test_eight_devices_train_as_one(axes, rule):
    config = dataclasses.replace(TINY, rule=rule, positions=None)
    want, state = on_one_device(config)
    config = dataclasses.replace(config, sequence_axis="sequence" if axes in SEQUENCES else None)
    got, sharded = three_steps(config, sharding.make_mesh(**axes))
    chex.assert_trees_all_close(got, want, rtol=1e-5)
    chex.assert_trees_all_close(jax.device_get(sharded.memory), jax.device_get(state.memory), rtol=1e-3, atol=1e-4)
    chex.assert_trees_all_close(jax.device_get(sharded.params), jax.device_get(state.params), atol=1e-3)


@pytest.mark.slow
def test_a_layer_with_split_tokens_is_one_device_in_float64(x64):
    layer = FastWeightAttention(8, 2, 4, normalize="retrieval", param_dtype=jnp.float64, rngs=nnx.Rngs(0))
    x, cotangent = jax.random.normal(jax.random.key(1), (2, 4, 12, 8), jnp.float64)
    memory = nnx.jit(lambda layer, x: layer(x)[1])(layer, x)

    def gradients(layer, x, memory):
        def total(layer, x, memory):
            y, after = layer(x, memory)
            return jnp.sum(cotangent * y) + jnp.sum(jnp.sin(after.fast_weights)), (y, after)

        return nnx.jit(nnx.grad(total, argnums=(0, 1, 2), has_aux=True))(layer, x, memory)

    want = gradients(layer, x, memory)
    layer.sequence_axis = "sequence"
    mesh = sharding.make_mesh(data=2, sequence=4)
    with jax.set_mesh(mesh):
        got = gradients(layer, jax.device_put(x, sharding.batch_partition(mesh, x)), memory)
    for ours, right in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert jnp.linalg.norm(ours - right) <= 1e-9 * jnp.linalg.norm(right)


@pytest.mark.slow
def test_a_step_with_split_tokens_is_that_of_one_device_and_gathers_no_tokens():
    config = dataclasses.replace(TINY, num_layers=1, normalize="retrieval", dropout=0.1)
    batch, memory = batch_of(0), maker(config)().init_memory(8)
    memory = jax.tree.map(lambda x: x + jnp.cos(jnp.arange(x.size, dtype=x.dtype).reshape(x.shape)) + 1, memory)

    def gradients(config, mesh):
        graph, params = nnx.split(maker(config)(), nnx.Param)

        def total(params, batch, memory):
            losses, _, after = loss(nnx.merge(graph, params), batch, memory, nnx.Rngs(0))
            return losses, after

        inputs = {"params": nnx.as_pure(params), "memory": memory}
        if mesh is not None:
            inputs = jax.device_put(inputs, sharding.partition(mesh, inputs))
        inputs = (inputs["params"], devices.place(batch, mesh), inputs["memory"])
        compiled = jax.jit(jax.value_and_grad(total, has_aux=True)).lower(*inputs).compile()
        return compiled(*inputs), compiled.as_text()

    want, _ = gradients(config, None)
    mesh = sharding.make_mesh(data=2, sequence=4)
    with jax.set_mesh(mesh):
        got, text = gradients(dataclasses.replace(config, sequence_axis="sequence"), mesh)
    assert "collective-permute" in text and "all-gather" not in text and "all-to-all" not in text
    for ours, right in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert np.linalg.norm(ours - right) <= 1e-5 * np.linalg.norm(right)


@pytest.mark.slow
def test_devices_exchange_only_the_tokens_that_a_convolution_looks_back():
    """And with segments, whether one begins at a token, which is one bool each."""

    def split(axis):
        return nnx.split(FastWeightAttention(8, 2, 4, conv_size=4, sequence_axis=axis, rngs=nnx.Rngs(0)))

    def gradient(graph, params, x, ids):
        def total(params, x):
            y, after = nnx.merge(graph, params)(x, segment_ids=ids)
            return sum(jnp.sum(jnp.sin(x)) for x in (y, *after))

        return jax.grad(total, argnums=(0, 1))(params, x)

    mesh = sharding.make_mesh(data=2, sequence=4)
    x, ids = jnp.cos(jnp.arange(2 * 64 * 8.0)).reshape(2, 64, 8), jnp.arange(128).reshape(2, 64) // 7
    (whole, params), (graph, _) = split(None), split("sequence")
    want = jax.jit(gradient, static_argnums=0)(whole, params, x, ids)
    with jax.set_mesh(mesh):
        inputs = (params, *jax.device_put((x, ids), sharding.batch_partition(mesh, (x, ids))))
        compiled = jax.jit(gradient, static_argnums=0).lower(graph, *inputs).compile()
        got = compiled(*inputs)
    chex.assert_trees_all_close(got, want, rtol=1e-4, atol=1e-5)
    gathered = re.findall(r"= (\w+)\[([\d,]+)\]\S* all-(?:gather|to-all)\(", compiled.as_text())
    assert all(kind == "pred" or math.prod(map(int, shape.split(","))) <= 4 * 8 for kind, shape in gathered)
    assert "collective-permute" in compiled.as_text()


@pytest.mark.slow
@pytest.mark.parametrize("axis", some(2, ["tensor", "fsdp"]))
def test_a_mesh_with_one_axis_above_1_trains(axis):
    """XLA compiled no gradient of the output layer on a mesh of tensor=N alone."""
    batch = batch_of(0)
    graph, params = nnx.split(maker(TINY)(), nnx.Param)

    def total(params, batch):
        losses, _, _ = loss(nnx.merge(graph, params), batch, maker(TINY)().init_memory(8), nnx.Rngs(0))
        return losses

    gradient = jax.jit(jax.value_and_grad(total))
    params = nnx.as_pure(params)
    want = gradient(params, batch)
    mesh = sharding.make_mesh(**{axis: 2}, devices=jax.devices()[:2])
    with jax.set_mesh(mesh):
        got = gradient(jax.device_put(params, sharding.partition(mesh, params)), devices.place(batch, mesh))
    chex.assert_trees_all_close(got, want, rtol=1e-4, atol=1e-5)


def test_parameters_moments_and_memories_are_split_by_the_table():
    mesh = sharding.make_mesh(fsdp=2, tensor=2)
    make = maker(TINY)
    state = jax.eval_shape(lambda: training.initial_state(make, CONFIG, make().init_memory(8)))
    specs = jax.tree.map(lambda s: s.spec, sharding.partition(mesh, state._asdict()))
    attention, feed_forward = (specs["params"]["blocks"][0][name] for name in ("attention", "feed_forward"))
    assert attention["query"]["kernel"] == P("fsdp", "tensor", None)
    assert attention["out"]["kernel"] == P("tensor", None, "fsdp")
    assert attention["beta"]["kernel"] == P("fsdp", "tensor")
    assert feed_forward["hidden"]["kernel"] == P("fsdp", "tensor")
    assert feed_forward["out"]["kernel"] == P("tensor", "fsdp")
    assert specs["params"]["embedding"] == P("tensor", "fsdp")
    assert specs["memory"][0].fast_weights == P(("data", "fsdp"), "tensor", None, None)
    assert specs["memory"][0].key_sum == P(("data", "fsdp"), "tensor", None)
    assert sharding.partition(mesh, {"memory": {"position": jnp.zeros(())}})["memory"]["position"].spec == P()
    moments = [s for s in jax.tree.leaves(specs["optimizer"], is_leaf=lambda s: isinstance(s, P)) if s != P()]
    assert len(moments) == 2 * sum(s != P() for s in jax.tree.leaves(specs["params"]))


def test_several_memories_of_a_row_are_split_by_heads_as_one_is():
    """What a call with ``memory_every`` returns, whose axis of the memories lies between rows and heads."""
    mesh, model = sharding.make_mesh(fsdp=2, tensor=2), maker(dataclasses.replace(TINY, conv_size=4))()
    shapes = jax.eval_shape(lambda tokens: model(tokens, memory_every=8)[1], batch_of(0)["tokens"])
    memory = sharding.partition(mesh, {"memory": shapes})["memory"][0]
    assert memory.fast_weights.spec == P(("data", "fsdp"), None, "tensor", None, None)
    assert memory.key_sum.spec == P(("data", "fsdp"), None, "tensor", None)
    assert memory.value_inputs.spec == P(("data", "fsdp"), None, None, "tensor", None)


@pytest.mark.slow
def test_what_is_trained_stays_split_by_the_table_and_a_step_is_compiled_once(tmp_path, monkeypatch):
    make = maker(dataclasses.replace(TINY, num_layers=1, cutoffs=()))
    mesh, compiled, jit = sharding.make_mesh(fsdp=2, tensor=2), [], jax.jit

    def remember(function, **options):
        compiled.append(jit(function, **options))
        return compiled[-1]

    monkeypatch.setattr(jax, "jit", remember)
    batches = text.Segments(np.arange(8 * 13) % 96, 8, 4)
    model = training.train(make, loss, batches, dataclasses.replace(CONFIG, steps=3), tmp_path, mesh=mesh)
    params = nnx.as_pure(nnx.state(model, nnx.Param))
    jax.tree.map(lambda x, s: chex.assert_equal(x.sharding, s), params, sharding.partition(mesh, params))
    assert compiled[-1]._cache_size() == 1


def test_a_vocabulary_that_cannot_be_split_stays_whole():
    mesh = sharding.make_mesh(fsdp=2, tensor=4)
    shapes = {"embedding": jax.ShapeDtypeStruct((267_735, 256), jnp.float32)}
    assert sharding.partition(mesh, shapes)["embedding"].spec == P(None, "fsdp")


@pytest.mark.slow
def test_the_output_layer_is_computed_once_for_each_row():
    """Each device has an eighth of the products, or the scan over blocks would run on all of them."""

    def flops(mesh):
        config = dataclasses.replace(TINY, num_layers=1, vocab_size=2000, cutoffs=())
        params = nnx.as_pure(nnx.state(DecoderLM(config, rngs=nnx.Rngs(0)), nnx.Param))
        graph = training.graph_of(maker(config))

        def mean(params, batch):
            return jnp.mean(nnx.merge(graph, params).losses(**batch)[0])

        batch = devices.place(batch_of(0), mesh)
        with jax.set_mesh(mesh) if mesh is not None else jax.default_device(jax.devices()[0]):
            return jax.jit(jax.grad(mean)).lower(params, batch).compile().cost_analysis()["flops"]

    assert flops(sharding.make_mesh()) < flops(None) / 6


@pytest.mark.slow
@pytest.mark.parametrize("cutoffs", some(2, [(5, 11), ()]), ids=str)
def test_devices_may_differ_in_what_they_skip(cutoffs):
    """All targets of one device are ignored, and rare words are on another one alone."""
    keys = jax.random.split(jax.random.key(0), 5)
    targets = jax.random.randint(keys[0], (8, 3), 0, 5).at[2].set(-1).at[5, 1].set(17)
    x, weights = jax.random.normal(keys[1], (8, 3, 4)), jax.random.normal(keys[2], (8, 3))
    clusters = (jax.random.normal(keys[3], (len(cutoffs), 4)), jnp.zeros(len(cutoffs))) if cutoffs else ()
    output = (jax.random.normal(keys[4], (20, 4)), jnp.zeros(20), *clusters)

    def total(x, output):
        return jnp.sum(weights * output_layer.losses(x, targets, output, cutoffs))

    def gradients():
        return jax.jit(jax.value_and_grad(total, argnums=(0, 1)))(x, output)

    with jax.set_mesh(sharding.make_mesh()):
        spread = gradients()
    chex.assert_trees_all_close(spread, gradients(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("axes", "words"),
    [
        ({"fsdp": 3}, r"must be the number of devices, 8, got 2 · 3 · 1"),
        ({"data": 4}, r"must be the number of devices, 8, got 4 · 1 · 1"),
        ({"tensor": 0}, "must be at least 1, got .*tensor=0"),
    ],
)
def test_meshes_that_cannot_be(axes, words):
    with pytest.raises(ValueError, match=words):
        sharding.make_mesh(**axes)


def test_tokens_are_split_unless_their_number_does_not_divide():
    mesh = sharding.make_mesh(data=2, sequence=4)
    batch = {"tokens": np.zeros((2, 8)), "last": np.zeros((2, 6)), "weights": np.zeros(2), "start": np.zeros(())}
    specs = {name: s.spec for name, s in sharding.batch_partition(mesh, batch).items()}
    rows = ("data", "fsdp")
    assert specs == {"tokens": P(rows, "sequence"), "last": P(rows, None), "weights": P(rows), "start": P()}


def test_a_batch_that_the_mesh_cannot_split():
    with pytest.raises(ValueError, match=r"the batch has 6 rows, which the mesh of data=4 and fsdp=2 cannot .* of 8"):
        devices.place(batch_of(0, rows=6), sharding.make_mesh(fsdp=2))


def test_a_rule_with_more_axes_than_its_array():
    with pytest.raises(ValueError, match=r"a/b is split by .*, and has only 1 axes, \[8\]"):
        sharding.partition(sharding.make_mesh(), {"a": {"b": jnp.ones(8)}}, [("b$", P("data", "tensor"))])
