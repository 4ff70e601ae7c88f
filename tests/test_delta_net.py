"""Layers with short convolutions, and LinearAttention: their numbers, and their streams."""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import some
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from fwt_jax import FastWeightAttention, feature_maps
from fwt_jax.layers import (
    Decay,
    DeltaNet,
    GatedDeltaNet,
    KimiDeltaAttention,
    LinearAttention,
    OutputGate,
    ShortConvolution,
)

GOLDEN = pathlib.Path(__file__).parent / "golden" / "fla"
CLOSE = {"rtol": 0, "atol": 2e-5}
SIZES = (16, 2, 8)
WITHOUT = "delta without convolutions"
LAYERS = {
    "delta": functools.partial(DeltaNet, *SIZES, value_size=6),
    WITHOUT: functools.partial(DeltaNet, *SIZES, conv_size=None, use_beta=False),
    "gated": functools.partial(GatedDeltaNet, *SIZES, value_size=6, num_value_heads=4, max_beta=2.0),
    "per channel": functools.partial(KimiDeltaAttention, *SIZES, num_value_heads=4, rank=5),
    "fast weights": functools.partial(
        FastWeightAttention, *SIZES, value_size=6, num_value_heads=4, conv_size=3, normalize="retrieval"
    ),
    "linear": functools.partial(LinearAttention, 16, 4, 8, num_key_value_heads=2, normalize=True),
}
T = 13
SEGMENT_IDS = jnp.array([[0] * 2 + [1] * 10 + [5], [3] * 1 + [2] * 2 + [4] * 10])


@functools.cache
def layer_and_input(name):
    layer = LAYERS[name](rngs=nnx.Rngs(3))
    if getattr(layer, "decay", None) is not None:  # decays that differ, and are far from 1
        layer.decay.bias[...] = jax.random.normal(jax.random.key(5), layer.decay.bias.shape) - 1
    return layer, jax.random.normal(jax.random.key(1), (2, T, 16))


@nnx.jit(static_argnames="memory_every")
def call(layer, x, memory=None, segment_ids=None, lengths=None, memory_every=None):
    return layer(x, memory, segment_ids=segment_ids, lengths=lengths, memory_every=memory_every)


def assert_close(actual, expected):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **CLOSE), actual, expected)


# --- numbers of other programs ---------------------------------------------------------------------------------------


def golden_layer(golden):
    """The layer of a file of flash-linear-attention, and its variables by the names there."""
    weights = {name.removeprefix("p/"): golden[name] for name in golden if name.startswith("p/")}
    is_gated = "A_log" in weights
    layer = (GatedDeltaNet if is_gated else DeltaNet)(32, 2, 16, value_size=16, norm_eps=1e-5, rngs=nnx.Rngs(0))
    variables = {
        "q_proj.weight": layer.query.kernel,
        "k_proj.weight": layer.key.kernel,
        "v_proj.weight": layer.value.kernel,
        "b_proj.weight": layer.beta.kernel,
        "o_norm.weight": layer.norm.scale,
        "o_proj.weight": layer.out.kernel,
    }
    if is_gated:
        variables |= {
            "A_log": layer.decay.log_rate,
            "dt_bias": layer.decay.bias,
            "a_proj.weight": layer.decay.projection.kernel,
            "g_proj.weight": layer.gate.projection.kernel,
        }
    for letter, name in zip("qkv", ("query", "key", "value"), strict=True):
        variables[f"{letter}_conv1d.weight"] = getattr(layer.convolutions, name).taps
    assert set(variables) == set(weights)
    for name, variable in variables.items():
        x = weights[name][:, 0] if "conv1d" in name else weights[name]
        variable[...] = jnp.asarray(x.T.reshape(variable.shape))
    return layer, variables


@pytest.mark.parametrize("name", ["layer_deltanet_default", "layer_gated_deltanet_default"])
def test_a_layer_of_flash_linear_attention(name):
    with np.load(GOLDEN / f"{name}.npz") as file:
        golden = dict(file)
    layer, variables = golden_layer(golden)
    x = jnp.asarray(golden["x"])

    @nnx.jit
    def derivatives(layer, x):
        def loss(layer, x):
            y, _ = layer(x)
            return jnp.sum(y * jnp.asarray(golden["dy"])), y

        return nnx.grad(loss, argnums=(0, 1), has_aux=True)(layer, x)

    (layer_grad, x_grad), y = derivatives(layer, x)
    np.testing.assert_allclose(y, golden["y"], **CLOSE)
    np.testing.assert_allclose(x_grad, golden["dx"], **CLOSE)
    grads = {id(variable): key for key, variable in variables.items()}
    pairs = zip(jax.tree.leaves(nnx.state(layer)), jax.tree.leaves(layer_grad), strict=True)
    assert len(grads) == len(list(pairs))
    flat, flat_grads = (dict(nnx.to_flat_state(nnx.state(tree))) for tree in (layer, layer_grad))
    names = {path: grads[id(variable)] for path, variable in nnx.iter_graph(layer) if id(variable) in grads}
    for path, key in names.items():
        expected = golden[f"g/{key}"]
        expected = (expected[:, 0] if "conv1d" in key else expected).T.reshape(flat[path].shape)
        np.testing.assert_allclose(flat_grads[path][...], expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    mask = golden["attention_mask"]
    y_masked, _ = call(layer, x, segment_ids=jnp.asarray(mask))
    np.testing.assert_allclose(y_masked[mask == 1], golden["y_masked"][mask == 1], **CLOSE)
    prefill = json.loads(str(golden["meta"]))["prefill"]
    _, memory = call(layer, x[:, :prefill])
    np.testing.assert_allclose(
        memory.key_inputs.reshape(2, 3, -1).swapaxes(1, 2), golden["cache/conv_state_k"][..., 1:], **CLOSE
    )
    state = golden["cache/recurrent_state0"]
    state = state.swapaxes(2, 3) if isinstance(layer, GatedDeltaNet) else state  # values first there
    np.testing.assert_allclose(memory.fast_weights, state, **CLOSE)


# --- streams ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", some(3, ["gated", "delta", "per channel", "fast weights", "linear", WITHOUT]))
def test_calls_one_after_another_are_one_call(name):
    layer, x = layer_and_input(name)
    y, memory = call(layer, x)
    empty = layer.init_memory(2)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), empty) == jax.tree.map(lambda x: (x.shape, x.dtype), memory)
    outs, streamed = [], empty
    for tokens in (x[:, :6], x[:, 6:12], x[:, 12:]):
        out, streamed = call(layer, tokens, streamed)
        outs.append(out)
    assert_close((jnp.concatenate(outs, axis=1), streamed), (y, memory))


@pytest.mark.slow
@pytest.mark.parametrize("name", some(2, ["gated", "linear", "fast weights", "per channel"]))
def test_packed_documents_are_as_alone(name):
    layer, x = layer_and_input(name)
    y, memory = call(layer, x, segment_ids=SEGMENT_IDS)
    for row, documents in enumerate([[(0, 2), (2, 12), (12, 13)], [(0, 1), (1, 3), (3, 13)]]):
        for begin, end in documents:
            alone, last = call(layer, x[row : row + 1, begin:end])
            assert_close(y[row : row + 1, begin:end], alone)
        assert_close(jax.tree.map(lambda leaf, row=row: leaf[row : row + 1], memory), last)


@pytest.mark.parametrize("name", some(2, ["gated", "fast weights", "linear"]))
def test_padding_behind_changes_nothing(name):
    layer, x = layer_and_input(name)
    start = call(layer, x[:, ::-1])[1]
    y, memory = call(layer, x, start, lengths=jnp.array([4, 0]))
    alone, last = call(layer, x[:1, :4], jax.tree.map(lambda leaf: leaf[:1], start))
    assert_close(y[:1, :4], alone)
    assert_close(jax.tree.map(lambda leaf: leaf[:1], memory), last)
    assert_close(jax.tree.map(lambda leaf: leaf[1], memory), jax.tree.map(lambda leaf: leaf[1], start))


@pytest.mark.slow
@pytest.mark.parametrize("name", some(3, ["gated", "fast weights", "linear"]))
def test_memories_on_the_way(name):
    layer, x = layer_and_input(name)
    y, memories = call(layer, x, memory_every=5)
    expected, last = call(layer, x)
    assert_close(y, expected)
    assert_close(jax.tree.map(lambda leaf: leaf[:, 2], memories), last)
    assert_close(jax.tree.map(lambda leaf: leaf[:, 0], memories), call(layer, x[:, :5])[1])
    _, cut = call(layer, x, lengths=jnp.array([13, 7]), memory_every=5)
    seven = call(layer, x[:, :7])[1]
    assert_close(jax.tree.map(lambda leaf: leaf[1, 1:], cut), jax.tree.map(lambda leaf: leaf[1:].repeat(2, 0), seven))


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, is_packed",
    [
        pytest.param("gated", False, marks=pytest.mark.exhaustive),
        ("gated", True),
        pytest.param("fast weights", True, marks=pytest.mark.exhaustive),
        pytest.param("linear", True, marks=pytest.mark.exhaustive),
    ],
)
def test_the_tokens_of_a_mesh_axis(name, is_packed):
    layer, x = layer_and_input(name)
    x = jnp.concatenate([x, x[:, :7]], axis=1)  # 20 tokens, 5 on each device
    ids = jnp.array([[0] * 4 + [1] * 16, [0] * 6 + [2] * 14]) if is_packed else jnp.zeros((2, 20), int)
    lengths = jnp.array([20, 11])
    expected = call(layer, x, segment_ids=ids, lengths=lengths)
    layer = nnx.clone(layer)
    layer.sequence_axis = "sequence"
    for convolution in () if name == "linear" else layer.convolutions.all():
        convolution.sequence_axis = "sequence"
    mesh = jax.make_mesh((4,), ("sequence",), (AxisType.Auto,), devices=jax.devices()[:4])
    graph, state = nnx.split(layer)

    def of_piece(state, x, ids, lengths):
        return nnx.merge(graph, state)(x, segment_ids=ids, lengths=lengths)

    by_token = P(None, "sequence")
    specs = {"in_specs": (P(), by_token, by_token, P()), "out_specs": (by_token, P())}
    assert_close(jax.jit(jax.shard_map(of_piece, mesh=mesh, **specs))(state, x, ids, lengths), expected)
    with jax.set_mesh(mesh):
        assert_close(jax.jit(of_piece)(state, x, ids, lengths), expected)


@pytest.mark.slow
@pytest.mark.parametrize("replicated", some(4, ["segment_ids", "memory", "of nothing given", "lengths"]))
def test_the_rows_of_a_mesh_of_explicit_axes(replicated):
    layer, x = layer_and_input("fast weights")
    options = {"segment_ids": SEGMENT_IDS, "memory": call(layer, x[:, ::-1])[1], "lengths": jnp.array([13, 7])}
    options = {} if replicated == "of nothing given" else options
    expected = call(layer, x, memory_every=5, **options)
    mesh = jax.make_mesh((2,), ("rows",), (AxisType.Explicit,), devices=jax.devices()[:2])
    by_row = {name: NamedSharding(mesh, P() if name == replicated else P("rows")) for name in options}
    with jax.set_mesh(mesh):
        options = {name: jax.device_put(value, by_row[name]) for name, value in options.items()}
        x = jax.device_put(x, NamedSharding(mesh, P("rows")))
        assert_close(call(layer, x, memory_every=5, **options), expected)


# --- parts -----------------------------------------------------------------------------------------------------------


def test_a_short_convolution_is_that_of_numpy():
    convolution = ShortConvolution((3,), 4, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (1, 9, 3))
    y, inputs = convolution(x)
    taps = np.asarray(convolution.taps)
    for channel in range(3):
        expected = np.convolve(x[0, :, channel], taps[::-1, channel])[:9]
        np.testing.assert_allclose(y[0, :, channel], expected, **CLOSE)
    np.testing.assert_array_equal(inputs, x[:, -3:])


def test_writes_without_beta_have_its_maximum():
    x = jax.random.normal(jax.random.key(0), (1, 1, 16))
    one, two = (DeltaNet(*SIZES, use_beta=False, max_beta=b, rngs=nnx.Rngs(0))(x)[1] for b in (1.0, 2.0))
    assert_close(two.fast_weights, 2 * one.fast_weights)


def test_pieces_shorter_than_a_convolution_looks_back_are_refused():
    convolution = ShortConvolution((3,), 4, sequence_axis="sequence", rngs=nnx.Rngs(0))
    mesh = jax.make_mesh((4,), ("sequence",), (AxisType.Auto,), devices=jax.devices()[:4])
    by_token = P(None, "sequence")
    mapped = jax.shard_map(lambda x: convolution(x)[0], mesh=mesh, in_specs=by_token, out_specs=by_token)
    with pytest.raises(ValueError, match=r"at least the 3 tokens .*, got 2; split it over fewer devices"):
        mapped(jnp.ones((1, 8, 3)))


def test_decays_are_below_one_and_those_with_a_bound_above_it():
    x = 10 * jax.random.normal(jax.random.key(0), (2, 5, 16))
    per_head, bounded = Decay(16, 3, rngs=nnx.Rngs(0)), Decay(16, 3, channels=4, lower_bound=-5.0, rngs=nnx.Rngs(0))
    assert per_head(x).shape == (2, 5, 3) and bounded(x).shape == (2, 5, 3, 4)
    assert np.all(per_head(x) <= 0) and np.all(bounded(x) <= 0) and np.all(bounded(x) >= -5)
    rate, step = jnp.exp(bounded.log_rate[...]), bounded.projection(x) + bounded.bias[...][None, None]
    np.testing.assert_allclose(bounded(x), -5 / (1 + jnp.exp(-rate[None, None, :, None] * step)), rtol=1e-5)


def test_the_start_of_a_decay():
    decay = Decay(16, 1000, rngs=nnx.Rngs(0))
    rate, step = jnp.exp(decay.log_rate[...]), jax.nn.softplus(decay.bias[...])
    assert 1 <= rate.min() < 1.2 and 15.8 < rate.max() <= 16
    assert 0.00099 < step.min() < 0.0012 and 0.09 < step.max() < 0.101


def test_a_convolution_keeps_the_dtype_of_its_input():
    """With taps of float32: the layer behind it is to multiply in bfloat16."""
    y, inputs = ShortConvolution((3,), 4, rngs=nnx.Rngs(0))(jnp.ones((1, 9, 3), jnp.bfloat16))
    assert y.dtype == inputs.dtype == jnp.bfloat16


def test_bfloat16_is_near_float32():
    layer, x = layer_and_input("gated")
    half = LAYERS["gated"](dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    nnx.update(half, nnx.state(layer))
    (y, memory), (expected, _) = call(half, x.astype(jnp.bfloat16)), call(layer, x)
    assert y.dtype == jnp.bfloat16 and memory.fast_weights.dtype == jnp.float32
    # The output norm of a short vector amplifies rounding, so single numbers can be further away.
    assert np.linalg.norm(y.astype(jnp.float32) - expected) < 0.05 * np.linalg.norm(expected)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda r: DeltaNet(16, 2, 8, num_value_heads=3, rngs=r), "multiple of num_heads 2, got 3"),
        (lambda r: DeltaNet(16, 2, 8, conv_size=0, rngs=r), "sizes must be at least 1"),
        (lambda r: DeltaNet(16, 2, 8, rngs=0), "nnx.Rngs"),
        (lambda r: LinearAttention(16, 4, 8, num_key_value_heads=3, rngs=r), "divide num_heads 4, got 3"),
        (lambda r: Decay(16, 2, lower_bound=5.0, rngs=r), "below 0"),
        (lambda r: KimiDeltaAttention(16, 2, 8, rank=0, rngs=r), "sizes must be at least 1"),
        (lambda r: DeltaNet(16, 2, 8, rngs=r)(jnp.zeros((1, 2, 15))), r"\[B, T, 16\]"),
        (lambda r: DeltaNet(16, 2, 8, rngs=r)(jnp.zeros((1, 2, 16)), lengths=jnp.array([3])), "from 0 to 2, got 3"),
        (
            lambda r: DeltaNet(16, 2, 8, rngs=r)(
                jnp.zeros((1, 2, 16)), DeltaNet(16, 2, 8, conv_size=None, rngs=r).init_memory(1)
            ),
            "must be a ConvolvedMemory",
        ),
        (
            lambda r: DeltaNet(16, 2, 8, rngs=r)(jnp.zeros((1, 2, 16)), DeltaNet(16, 2, 8, rngs=r).init_memory(2)),
            r"key_inputs \[1, 3, 2, 8\]",
        ),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make(nnx.Rngs(0))


def test_a_gate_of_low_rank():
    gate = OutputGate(16, 2, 6, jax.nn.sigmoid, rank=3, use_bias=True, rngs=nnx.Rngs(0))
    shapes = jax.tree.map(lambda x: x.shape, nnx.to_pure_dict(nnx.state(gate)))["projection"]
    assert shapes == {"down": {"kernel": (16, 3)}, "up": {"kernel": (3, 2, 6), "bias": (2, 6)}}


def test_features_of_a_users_own():
    layer = DeltaNet(
        *SIZES, feature_map=feature_maps.relu, feature_normalization=feature_maps.sum_normalize, rngs=nnx.Rngs(0)
    )
    y, _ = layer(jnp.ones((1, 3, 16)))
    assert np.isfinite(y).all()
