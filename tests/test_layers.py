"""The layers against loops over tokens in NumPy, fed in every way that a user may feed them."""

import dataclasses
import functools
from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from cases import some
from flax import linen, nnx
from jax import lax
from jax.sharding import AxisType

from fwt_jax import attention
from fwt_jax.attention import fast_weight_attention
from fwt_jax.feature_maps import dpfp, elu_plus_one, hedgehog, l2_normalize, sum_normalize, t2r, tanh
from fwt_jax.layers import (
    CrossAttention,
    FastWeightAttention,
    FavorPlus,
    RelativeAttention,
    SoftmaxAttention,
    TrainedFeatureMap,
)
from fwt_jax.memory import sum_step
from fwt_jax.models import DecoderLM, ModelConfig
from fwt_jax.rules import RULES, Rule

BATCH, LENGTH, D_MODEL, HEADS, HEAD_SIZE, VALUE_SIZE = 2, 8, 6, 3, 4, 5  # all different
SEGMENT_IDS = np.array([[0, 0, 1, 1, 1, 2, 2, 2], [5, 5, 5, 5, 5, 5, 3, 3]])  # none begins with the second half

dpfp2 = functools.partial(dpfp, nu=2)
sum_normalize_exactly = functools.partial(sum_normalize, eps=0.0)


def favor(rngs):
    return FavorPlus(HEAD_SIZE, 5, orthogonal="columns", eps=1e-4, rngs=rngs)


def trained(function):
    return lambda rngs: TrainedFeatureMap(function, HEADS, HEAD_SIZE, 4, rngs=rngs)


# The paper's language models, and the other rules, normalisers, feature maps and forms. A case has a class and its
# options; "make_map" makes a feature map that is a module.
CASES = {
    "sum, elu, read": dict(rule="sum", feature_normalization=None, normalize="read", eps=1e-5, output_scale=0.5),
    "sum, favor, read": dict(rule="sum", make_map=favor, feature_normalization=None, normalize="read"),
    "sum, dpfp-2": dict(rule="sum", feature_map=dpfp2, form="parallel"),
    "delta, elu": dict(feature_normalization=sum_normalize_exactly, output_scale=0.5, chunk_size=4),
    "delta, elu, read": dict(normalize="read", eps=1e-5, use_bias=True, chunk_size=4),
    "delta, dpfp-2, retrieval": dict(feature_map=dpfp2, normalize="retrieval", form="recurrent"),
    "delta, favor": dict(make_map=favor, feature_normalization=sum_normalize_exactly, chunk_size=2),
    "delta, silu, l2": dict(feature_map=jax.nn.silu, feature_normalization=l2_normalize, use_bias=True),
    "delta, t2r": dict(make_map=trained(t2r)),
    "sum, hedgehog": dict(rule="sum", make_map=trained(hedgehog), feature_normalization=None, use_bias=True),
    "fwm, tanh": dict(rule="fwm", feature_map=tanh, feature_normalization=None),
    "softmax": dict(kind=SoftmaxAttention),
    "softmax, bias": dict(kind=SoftmaxAttention, use_bias=True),
}
each_case = pytest.mark.parametrize("name", CASES)
some_cases = pytest.mark.parametrize("name", some(2, list(CASES)))


def make(name, seed=0, **more):
    """The layer of a case, with biases that are not the zeros they start from."""
    options, rngs = CASES[name] | more, nnx.Rngs(seed)
    kind, make_map = options.pop("kind", FastWeightAttention), options.pop("make_map", None)
    if make_map:
        options["feature_map"] = make_map(rngs)
    layer = kind(D_MODEL, HEADS, HEAD_SIZE, value_size=VALUE_SIZE, **options, rngs=rngs)
    for path, parameter in nnx.to_flat_state(nnx.state(layer, nnx.Param)):
        if path[-1] == "bias":
            parameter[...] = jax.random.normal(rngs.params(), parameter.shape, parameter.dtype)
    return layer


def inputs(batch=BATCH, length=LENGTH, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(batch, length, D_MODEL)))


def empty(layer, batch=BATCH, max_length=LENGTH):
    return layer.init_memory(batch, max_length) if isinstance(layer, SoftmaxAttention) else layer.init_memory(batch)


@nnx.jit
def call(layer, x, memory=None, **options):
    """Compiled once for layers and inputs that are alike."""
    return layer(x, memory, **options)


def stream(layer, x):
    def step(memory, x):
        y, memory = layer(x[:, None], memory)
        return memory, y

    memory, y = jax.jit(lambda x: lax.scan(step, empty(layer), jnp.swapaxes(x, 0, 1)))(x)
    return jnp.swapaxes(y[:, :, 0], 0, 1), memory


# --- the numbers, against loops over tokens in NumPy -----------------------------------------------------------------


def numpy_features(layer, u):
    """φ(u) and its normalisation, ``[B, T, H, D]`` -> ``[B, T, H, K]``."""
    if isinstance(layer.feature_map, TrainedFeatureMap):
        u = np.einsum("bthd,hdk->bthk", u, layer.feature_map.kernel[...]) + np.array(layer.feature_map.bias[...])
        if layer.feature_map.function is t2r:
            u = np.maximum(u, 0)
        else:
            u = np.exp(np.concatenate([u, -u], axis=-1))
            u = u / np.sum(u, axis=-1, keepdims=True)
    elif isinstance(layer.feature_map, FavorPlus):
        projected = u @ np.array(layer.feature_map.projection[...]).T
        norm = np.sum(u**2, axis=-1, keepdims=True) / 2
        u = (np.exp(np.concatenate([projected - norm, -projected - norm], axis=-1)) + 1e-4) / np.sqrt(10)
    elif layer.feature_map is dpfp2:
        r = np.concatenate([np.maximum(u, 0), np.maximum(-u, 0)], axis=-1)
        u = np.concatenate([r * np.roll(r, j, axis=-1) for j in (1, 2)], axis=-1)
    else:
        functions = {elu_plus_one: lambda u: np.where(u > 0, u + 1, np.exp(np.minimum(u, 0))), tanh: np.tanh}
        functions[jax.nn.silu] = lambda u: u / (1 + np.exp(-u))
        u = functions[layer.feature_map](u)
    if layer.feature_normalization in (sum_normalize, sum_normalize_exactly):
        u = u / np.sum(u, axis=-1, keepdims=True)
    elif layer.feature_normalization is l2_normalize:
        u = u / np.sqrt(np.sum(u**2, axis=-1, keepdims=True) + 1e-6)
    return u


def numpy_softmax(query, key, value, segment_ids):
    """One head of one sequence, ``[T, D]``, ``[T, D]``, ``[T, V]``, ``[T]``."""
    reads, start = [], 0
    for t in range(len(query)):
        start = t if t > 0 and segment_ids[t] != segment_ids[t - 1] else start
        weights = np.exp(key[start : t + 1] @ query[t] / np.sqrt(key.shape[1]))
        reads.append(weights @ value[start : t + 1] / np.sum(weights))
    return (np.stack(reads),)


def numpy_layer(layer, x, segment_ids):
    """y ``[B, T, d_model]`` and, for fast weights, W ``[B, H, K, V]`` and z ``[B, H, K]``, from the parameters."""

    def project(linear, x, letters):
        y = np.einsum(letters, x, np.array(linear.kernel[...]))
        return y if linear.bias is None else y + np.array(linear.bias[...])

    x, segment_ids = np.array(x), np.array(segment_ids)
    query, key, value = (project(p, x, "btm,mhd->bthd") for p in (layer.query, layer.key, layer.value))
    if isinstance(layer, SoftmaxAttention):
        arrays = {"query": query, "key": key, "value": value}
        reads, *memory = reference.batched(numpy_softmax, arrays, segment_ids)
    else:
        query, key, beta = numpy_features(layer, query), numpy_features(layer, key), np.ones(key.shape[:3])
        if layer.beta is not None:
            beta = 1 / (1 + np.exp(-project(layer.beta, x, "btm,mh->bth")))
        arrays = {"query": query, "key": key, "value": value, "beta": beta}
        options = {"rule": layer.rule, "normalize": layer.normalize, "eps": layer.eps}
        reads, *memory = reference.batched(reference.attention, arrays, segment_ids, **options)
        reads = layer.output_scale * reads
    return project(layer.out, reads, "bthv,hvm->btm"), memory


def assert_equals_numpy(layer, x, y, memory, segment_ids=np.zeros((BATCH, LENGTH))):  # noqa: B008
    expected, expected_memory = numpy_layer(layer, x, segment_ids)
    np.testing.assert_allclose(y, expected, atol=1e-10)
    if isinstance(layer, FastWeightAttention):
        chex.assert_trees_all_close(tuple(memory), tuple(expected_memory), atol=1e-10)
    else:
        assert memory.key.shape[1] == LENGTH and list(memory.length) == [LENGTH] * BATCH


@some_cases
def test_training(x64, name):
    layer, x = make(name, param_dtype=jnp.float64), inputs()
    y, memory = jax.jit(lambda x: layer(x))(x)
    assert_equals_numpy(layer, x, y, memory)


@each_case
def test_streaming(x64, name):
    """Token after token, with the memory as the carry of a scan."""
    layer, x = make(name, param_dtype=jnp.float64), inputs()
    assert_equals_numpy(layer, x, *stream(layer, x))


@some_cases
def test_packed_prefix_and_suffix(x64, name):
    """Two calls and three segments. The id of a call's first token says nothing: it continues the memory."""
    layer, x = make(name, param_dtype=jnp.float64), inputs()
    call = jax.jit(lambda x, memory, segment_ids: layer(x, memory, segment_ids=segment_ids))
    half = LENGTH // 2
    prefix, memory = call(x[:, :half], empty(layer), SEGMENT_IDS[:, :half])
    suffix, memory = call(x[:, half:], memory, SEGMENT_IDS[:, half:] + 10)
    y = jnp.concatenate([prefix, suffix], axis=1)
    assert_equals_numpy(layer, x, y, memory, SEGMENT_IDS)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["delta, elu, read", "softmax"])
def test_packed_sequences_do_not_see_each_other(name):
    layer = make(name)

    def last(x):
        return jnp.sum(layer(x, segment_ids=SEGMENT_IDS)[0][:, -1])

    seen = np.any(jax.jit(jax.grad(last))(inputs()), axis=-1)
    np.testing.assert_array_equal(seen, SEGMENT_IDS == SEGMENT_IDS[:, -1:])


@pytest.mark.parametrize("form", ["chunkwise", "recurrent", "parallel"])
@pytest.mark.parametrize("length", [1, LENGTH])
def test_the_options_reach_the_operation_unchanged(monkeypatch, form, length):
    seen = {}

    def spy(*args, **options):
        seen.update(options)
        return fast_weight_attention(*args, **options)

    monkeypatch.setattr(attention, "fast_weight_attention", spy)
    options = dict(rule="delta", normalize="read", eps=0.25, form=form, implementation="xla", precision="highest")
    options["chunk_size"] = 3 if form == "chunkwise" else None
    jax.eval_shape(make("delta, elu", **options), inputs(length=length))
    assert {name: seen[name] for name in options} == options


# --- shapes and dtypes -----------------------------------------------------------------------------------------------


@each_case
def test_shapes(name):
    layer = make(name)
    y, memory = jax.eval_shape(layer, jax.ShapeDtypeStruct((BATCH, LENGTH, D_MODEL), jnp.float32))
    assert y.shape == (BATCH, LENGTH, D_MODEL)
    chex.assert_trees_all_equal_shapes_and_dtypes(memory, jax.eval_shape(lambda: empty(layer)))
    assert {leaf.shape[0] for leaf in jax.tree.leaves(memory)} == {BATCH}
    if isinstance(layer, FastWeightAttention):
        assert memory.fast_weights.shape == (BATCH, HEADS, layer.num_features, VALUE_SIZE)
        assert layer.num_features == {"dpfp": 16, "favor": 10, "t2r": 4, "hedgehog": 8}.get(
            next((m for m in ("dpfp", "favor", "t2r", "hedgehog") if m in name), None), HEAD_SIZE
        )
    assert layer.query.kernel.shape == layer.key.kernel.shape == (D_MODEL, HEADS, HEAD_SIZE)
    assert layer.value.kernel.shape == (D_MODEL, HEADS, VALUE_SIZE)
    assert layer.out.kernel.shape == (HEADS, VALUE_SIZE, D_MODEL)


def test_value_size_is_head_size_by_default():
    assert FastWeightAttention(D_MODEL, HEADS, HEAD_SIZE, rngs=nnx.Rngs(0)).value.kernel.shape[-1] == HEAD_SIZE
    assert SoftmaxAttention(D_MODEL, HEADS, HEAD_SIZE, rngs=nnx.Rngs(0)).value.kernel.shape[-1] == HEAD_SIZE


@pytest.mark.parametrize("name", ["sum, favor, read", "delta, elu, read", "softmax"])
def test_bfloat16_computation(name):
    layer, x = make(name, dtype=jnp.bfloat16), inputs().astype(jnp.bfloat16)
    y, memory = jax.jit(lambda x: layer(x))(x)
    assert y.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(layer, nnx.Param))} == {jnp.dtype("float32")}
    cache = dict(key=jnp.bfloat16, value=jnp.bfloat16, start=jnp.int32, length=jnp.int32)
    expected = cache if "softmax" in name else dict(fast_weights=jnp.float32, key_sum=jnp.float32)
    assert {field: leaf.dtype for field, leaf in memory._asdict().items()} == expected
    chex.assert_trees_all_equal_dtypes(memory, empty(layer))
    streamed, streamed_memory = stream(layer, x)
    chex.assert_trees_all_equal_dtypes(streamed_memory, memory)
    assert streamed.dtype == jnp.bfloat16
    np.testing.assert_allclose(streamed.astype(float), y.astype(float), atol=0.05)
    precise = make(name)
    np.testing.assert_allclose(y.astype(float), jax.jit(lambda x: precise(x)[0])(inputs()), atol=0.1)


@pytest.mark.parametrize("feature_map", ["elu_plus_one", "favor_plus"])
def test_float16_computation_has_the_features_of_float32(feature_map):
    """Most of them are below 6e-8 before they are normalised, and would be zero in float16."""

    def evaluate(dtype):
        rngs = nnx.Rngs(0)
        favor_plus = FavorPlus(16, 5, rngs=rngs)
        options = {"feature_map": favor_plus if feature_map == "favor_plus" else lambda x: elu_plus_one(x - 100)}
        layer = FastWeightAttention(D_MODEL, HEADS, 16, **options, dtype=dtype, rngs=rngs)

        def loss(x):
            return jnp.sum(jnp.square(layer(x)[0].astype(jnp.float32)))

        return jax.jit(jax.value_and_grad(loss))((4 * inputs()).astype(dtype))

    (want, want_gradient), (got, gradient) = evaluate(jnp.float32), evaluate(jnp.float16)
    np.testing.assert_allclose(got, want, rtol=0.02)
    scale = jnp.max(jnp.abs(want_gradient))
    np.testing.assert_allclose(gradient.astype(jnp.float32) / scale, want_gradient / scale, atol=0.02)


# --- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", some(3, list(CASES)))
def test_gradients_reach_every_parameter(name):
    graphdef, params, rest = nnx.split(make(name), nnx.Param, ...)

    def loss(params, x):
        return jnp.sum(jnp.square(nnx.merge(graphdef, params, rest)(x)[0]))

    grads = jax.jit(jax.grad(loss))(params, inputs())
    chex.assert_trees_all_equal_shapes(grads, params)
    for path, grad in nnx.to_flat_state(grads):
        assert np.all(np.isfinite(grad[...])), path
        # The key bias shifts all scores of a query alike, and softmax does not see it.
        assert np.any(grad[...]) or (path == ("key", "bias") and "softmax" in name), path


@pytest.mark.parametrize(("name", "graph"), [("delta, favor", True), ("delta, favor", False), ("softmax", True)])
def test_a_step_of_training_lowers_the_loss(name, graph):
    layer, x, target = make(name), inputs(), inputs(seed=1)
    optimizer = nnx.Optimizer(layer, optax.adam(1e-2), wrt=nnx.Param, graph=graph)

    @functools.partial(nnx.jit, graph=graph)
    def step(layer, optimizer, rngs):
        def loss(layer, rngs):
            return jnp.mean(jnp.square(layer(x, rngs=rngs)[0] - target))

        value, grads = nnx.value_and_grad(loss, graph=graph)(layer, rngs)
        optimizer.update(layer, grads)
        return value

    rngs = nnx.Rngs(0)
    before = jax.tree.map(np.array, nnx.state(layer, nnx.Not(nnx.Param)))
    losses = [step(layer, optimizer, rngs) for _ in range(20)]
    assert losses[-1] < 0.95 * losses[0]
    chex.assert_trees_all_equal(before, nnx.state(layer, nnx.Not(nnx.Param)))


def recalled(config, steps=500, pairs=4, kinds=8):
    """Share of values that a trained model recalls, in rows of four pairs (key, value), which are then shuffled."""
    rng, rows = np.random.default_rng(0), (steps, 16)
    keys, order = (rng.permuted(np.broadcast_to(np.arange(n), (*rows, n)), axis=-1) for n in (kinds, pairs))
    written = np.stack([keys[..., :pairs], kinds + rng.integers(kinds, size=(*rows, pairs))], axis=-1)
    asked = np.take_along_axis(written, order[..., None], axis=2)
    batches = jnp.asarray(np.concatenate([written, asked], axis=2).reshape(*rows, -1))
    graph, params = nnx.split(DecoderLM(config, rngs=nnx.Rngs(0)))
    optimizer = optax.adam(1e-2)

    def loss(params, tokens):
        log_p = nnx.merge(graph, params)(tokens)[0][:, 2 * pairs : -1 : 2]  # after the keys that are asked
        values = tokens[:, 2 * pairs + 1 :: 2]
        losses = optax.softmax_cross_entropy_with_integer_labels(log_p, values)
        return jnp.mean(losses), jnp.mean(jnp.argmax(log_p, axis=-1) == values)

    def step(carry, tokens):
        params, moments = carry
        grads, share = jax.grad(loss, has_aux=True)(params, tokens)
        updates, moments = optimizer.update(grads, moments)
        return (optax.apply_updates(params, updates), moments), share

    _, shares = jax.jit(functools.partial(lax.scan, step))((params, optimizer.init(params)), batches)
    return np.mean(shares[-20:])


@pytest.mark.exhaustive
def test_a_short_convolution_binds_a_value_to_the_key_before_it():
    """Without it, one layer knows at best which four values the row has."""
    sizes = {"vocab_size": 16, "num_layers": 1, "d_model": 32, "d_ff": 32, "num_heads": 2, "head_size": 16}
    options = {"norm": "pre", "positions": None, "dropout": 0.0, "feature_normalization": "l2"}
    config = ModelConfig(**sizes, **options, output_scale=1.0, conv_size=4)
    assert recalled(config) > 0.9
    assert recalled(dataclasses.replace(config, conv_size=None)) < 0.4


@pytest.mark.parametrize("name", ["delta, favor", "softmax"])
def test_one_sequence_under_vmap(name):
    layer, x = make(name), inputs()
    y, _ = jax.jit(jax.vmap(lambda x: layer(x[None])))(x)
    chex.assert_trees_all_close(y[:, 0], jax.jit(lambda x: layer(x)[0])(x), atol=1e-5)


# --- feature maps with variables -------------------------------------------------------------------------------------


def test_favor_plus_is_redrawn_with_rngs_and_fixed_without():
    layer, x, rngs = make("delta, favor"), inputs(), nnx.Rngs(1)
    own = np.array(layer.feature_map.projection[...])
    call = nnx.jit(lambda layer, rngs=None: layer(x, rngs=rngs)[0])
    fixed, first, second = call(layer), call(layer, rngs), call(layer, rngs)
    assert np.max(np.abs(first - fixed)) > 1e-4 and np.max(np.abs(second - first)) > 1e-4
    np.testing.assert_array_equal(call(layer, nnx.Rngs(1)), first)
    np.testing.assert_array_equal(layer.feature_map.projection[...], own)
    np.testing.assert_array_equal(call(layer), fixed)
    assert np.max(np.abs(make("delta, favor", seed=1).feature_map.projection[...] - own)) > 1e-2


def test_keys_and_queries_share_the_projection_that_is_drawn():
    """A call draws once. Its memory and reads are those of a layer whose own projection is the drawn one."""
    layer, x = make("sum, favor, read"), inputs()
    drawn = layer.feature_map.draw(nnx.Rngs(projection=3)).keywords["projection"]
    y, memory = jax.jit(lambda key: layer(x, rngs=nnx.Rngs(projection=key)))(jax.random.key(3))
    layer.feature_map.projection[...] = drawn
    chex.assert_trees_all_close((y, memory), jax.jit(lambda x: layer(x))(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("orthogonal", "gram"), [("rows", lambda r: r @ r.T), ("columns", lambda r: r.T @ r)])
def test_favor_plus_options_reach_the_projection(orthogonal, gram):
    feature_map = FavorPlus(4, 4, orthogonal=orthogonal, eps=0.5, rngs=nnx.Rngs(0))
    for projection in (feature_map.projection[...], feature_map.draw(nnx.Rngs(0)).keywords["projection"]):
        products = gram(projection)
        np.testing.assert_allclose(products, jnp.diag(jnp.diag(products)), atol=1e-5)
    assert feature_map(jnp.full(4, 30.0)).min() == feature_map.draw(nnx.Rngs(0))(jnp.full(4, 30.0)).min()
    np.testing.assert_allclose(feature_map(jnp.full(4, 30.0)).min(), 0.5 * 8**-0.5, rtol=1e-6)


def test_a_trained_feature_map_has_a_kernel_for_each_head():
    feature_map = TrainedFeatureMap(t2r, HEADS, HEAD_SIZE, 7, rngs=nnx.Rngs(0))
    feature_map.bias[...] = jax.random.normal(jax.random.key(0), (HEADS, 7))
    x = jax.random.normal(jax.random.key(1), (BATCH, LENGTH, HEADS, HEAD_SIZE))
    y = jax.jit(lambda x: feature_map(x))(x)
    for head in range(HEADS):
        expected = np.maximum(
            np.array(x[:, :, head]) @ feature_map.kernel[head] + feature_map.bias[head][None, None], 0
        )
        np.testing.assert_allclose(y[:, :, head], expected, atol=1e-5)


# --- the key-value cache ---------------------------------------------------------------------------------------------


def test_a_full_cache_is_refused_or_reads_nan():
    layer, x = make("softmax"), inputs()
    full = empty(layer)._replace(length=jnp.full(BATCH, LENGTH))
    with pytest.raises(ValueError, match=r"holds 8 of at most 8 tokens and has no room for 1 more; start with layer"):
        layer(x[:, :1], full)
    with pytest.raises(ValueError, match=r"holds 0 of at most 4 tokens and has no room for 8 more"):
        layer(x, layer.init_memory(BATCH, 4))
    with pytest.raises(ValueError, match=r"has no room for 8 more"):
        jax.jit(layer)(x, layer.init_memory(BATCH, 4))  # shapes alone say so
    one_full = full._replace(length=jnp.array([LENGTH - 1, LENGTH]))
    y, after = jax.jit(lambda x, memory: layer(x, memory))(x[:, :1], one_full)
    assert np.all(np.isfinite(y[0])) and np.all(np.isnan(y[1]))
    assert np.all(np.isnan(jax.jit(lambda x, memory: layer(x, memory))(x[:, :1], after)[0]))


def test_a_cache_in_a_jitted_function_may_be_a_constant():
    layer, x = make("softmax"), inputs()
    _, memory = call(layer, x[:, :5], empty(layer))
    y, _ = jax.jit(lambda x: layer(x, memory))(x[:, 5:])
    np.testing.assert_allclose(y, call(layer, x)[0][:, 5:], atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["delta, elu, read", "delta, dpfp-2, retrieval", "fwm, tanh", "sum, dpfp-2", "softmax"]
)
def test_rows_are_padded_in_front(name):
    """A row of 5 tokens after 3 of padding with another segment id has the reads and the memory of the 5 alone."""
    layer, x = make(name), inputs()
    padded = jnp.concatenate([100 * x[:1, :3], x[:1, :5]], axis=1)
    ids = jnp.array([[-1, -1, -1, 0, 0, 0, 0, 0]])
    (y, memory), (want, wanted_memory) = call(layer, padded, segment_ids=ids), call(layer, x[:1, :5])
    np.testing.assert_allclose(y[:, 3:], want, atol=1e-5)
    if isinstance(layer, FastWeightAttention):
        chex.assert_trees_all_close(memory, wanted_memory, atol=1e-5)


@pytest.mark.parametrize("name", some(4, ["softmax, bias", "delta, silu, l2", "delta, elu, read", "fwm, tanh"]))
def test_rows_are_padded_behind(name):
    """With lengths, two calls read and leave what the rows cut at their lengths do: 3 + 3 and 5 + 0 tokens."""
    layer, x = make(name), inputs()
    call = jax.jit(lambda x, memory, lengths=None: layer(x, memory, lengths=lengths))
    first, memory = call(x[:, :5], empty(layer, max_length=10), jnp.array([3, 5]))
    second, memory = call(x[:, 5:], memory, jnp.array([3, 0]))
    after, _ = call(x[:, :1], memory)
    want, _ = jax.jit(lambda x: layer(x))(jnp.concatenate([x[:1, :3], x[:1, 5:], x[:1, :1]], axis=1))
    np.testing.assert_allclose(jnp.concatenate([first[:1, :3], second[:1], after[:1]], axis=1), want, atol=1e-5)
    want, _ = jax.jit(lambda x: layer(x))(jnp.concatenate([x[1:, :5], x[1:, :1]], axis=1))
    np.testing.assert_allclose(jnp.concatenate([first[1:], after[1:]], axis=1), want, atol=1e-5)
    bias = 0 if layer.out.bias is None else np.array(layer.out.bias[...])
    np.testing.assert_allclose(np.array(first[0, 3:]) - bias, 0, atol=1e-6)
    with pytest.raises(ValueError, match=r"lengths must be from 0 to 8, got 1 to 9"):
        layer(x, lengths=[1, 9])


def test_rows_of_a_cache_may_have_different_lengths():
    """Prompts of 3 and 5 tokens, padded to 5 on the right: the lengths are set back, and the padding is overwritten."""
    layer, x = make("softmax"), inputs()
    _, memory = call(layer, x[:, :5], empty(layer))
    y, memory = call(layer, x[:, 5:], memory._replace(length=jnp.array([3, 5])))
    np.testing.assert_allclose(y[1], call(layer, x)[0][1, 5:], atol=1e-5)
    np.testing.assert_allclose(y[0], call(layer, jnp.delete(x, np.array([3, 4]), axis=1))[0][0, 3:], atol=1e-5)
    assert list(memory.length) == [6, 8]


@pytest.mark.parametrize("back", [0, 1, 2, 3, 4, 5, 8])
def test_tokens_are_taken_back_from_a_cache_with_their_segments(back):
    """After 3 + 5 tokens and a step back, the next token reads as after 8 − back tokens, in each row."""
    layer, x = make("softmax"), inputs(length=9)
    ids = jnp.array([[0, 0, 0, 0, 0, 0, 1, 1], [0, 0, 1, 1, 2, 2, 2, 3]])
    _, memory = call(layer, x[:, :3], empty(layer, max_length=9), segment_ids=ids[:, :3])
    _, memory = call(layer, x[:, 3:8], memory, segment_ids=ids[:, 3:])
    rest = 8 - back
    # The id of a call's first token says nothing, so the reference is one call; the token goes on in its segment. What
    # stands behind it fills the call up to 9 tokens.
    last = np.maximum(np.minimum(np.arange(9), rest) - (np.arange(9) >= rest), 0)
    whole = jnp.concatenate([x[:, :rest], x[:, 8:], x[:, rest:8]], axis=1)
    want, _ = call(layer, whole, segment_ids=ids[:, last])
    got, after = call(layer, x[:, 8:], memory._replace(length=memory.length - back))
    np.testing.assert_allclose(got[:, 0], want[:, rest], atol=1e-5)
    assert list(after.length) == [rest + 1] * 2


@pytest.mark.parametrize("name", ["delta, elu, read", "softmax"])
def test_rows_of_a_memory_can_be_selected(name):
    layer, x, rows = make(name), inputs(), np.array([1, 1, 0])
    _, memory = call(layer, x[:, :5], empty(layer))
    y, _ = call(layer, x[rows, 5:], jax.tree.map(lambda leaf: leaf[rows], memory))
    np.testing.assert_allclose(y, call(layer, x[:, 5:], memory)[0][rows], atol=1e-5)


# --- inside a Linen model --------------------------------------------------------------------------------------------


class LinenBlock(linen.Module):
    """A layer inside a model in Linen; ``make_layer(rngs=...)`` is a class with its options, or a function."""

    make_layer: Callable

    @linen.compact
    def __call__(self, x, memory=None):
        attention = nnx.bridge.ToLinen(self.make_layer)
        rngs = nnx.Rngs(self.make_rng("dropout")) if self.has_rng("dropout") else None
        y, memory = attention(linen.LayerNorm()(x), memory, rngs=rngs)
        return x + y, memory


def favor_attention(rngs):
    feature_map = FavorPlus(HEAD_SIZE, 5, rngs=rngs)
    return FastWeightAttention(D_MODEL, HEADS, HEAD_SIZE, feature_map=feature_map, rngs=rngs)


@pytest.mark.slow
@pytest.mark.parametrize(
    "make_layer", [functools.partial(FastWeightAttention, D_MODEL, HEADS, HEAD_SIZE), favor_attention]
)
def test_a_layer_in_a_linen_model(make_layer):
    model, x = LinenBlock(make_layer), inputs()
    variables = jax.jit(model.init)(jax.random.key(0), x)
    assert set(variables) == ({"params"} if make_layer is not favor_attention else {"params", "RandomProjection"})
    assert variables["params"]["ToLinen_0"]["query"]["kernel"].shape == (D_MODEL, HEADS, HEAD_SIZE)
    y, memory = jax.jit(model.apply)(variables, x)
    step, carried, steps = jax.jit(model.apply), None, []
    for t in range(LENGTH):
        y_t, carried = step(variables, x[:, t : t + 1], carried)
        steps.append(y_t)
    chex.assert_trees_all_close((jnp.concatenate(steps, axis=1), carried), (y, memory), atol=1e-5)

    def loss(variables):
        return jnp.sum(jnp.square(model.apply(variables, x)[0]))

    grads = jax.jit(jax.grad(loss))(variables)
    assert all(np.all(np.isfinite(grad)) and np.any(grad) for grad in jax.tree.leaves(grads["params"]))
    chex.assert_trees_all_equal_shapes(grads, variables)
    drawn, _ = jax.jit(lambda key: model.apply(variables, x, rngs={"dropout": key}))(jax.random.key(1))
    assert (np.max(np.abs(drawn - y)) > 1e-4) == (make_layer is favor_attention)


def test_a_softmax_layer_in_a_linen_model():
    model, x = nnx.bridge.to_linen(SoftmaxAttention, D_MODEL, HEADS, HEAD_SIZE), inputs()
    (y, _), variables = jax.jit(model.init_with_output)(jax.random.key(0), x)
    memory = model.apply(variables, BATCH, LENGTH, nnx_method="init_memory")
    prefix, memory = jax.jit(model.apply)(variables, x[:, :4], memory)
    suffix, memory = jax.jit(model.apply)(variables, x[:, 4:], memory)
    np.testing.assert_allclose(jnp.concatenate([prefix, suffix], axis=1), y, atol=1e-5)


# --- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(rule="hebb"), "rule must be one of 'sum', 'delta', 'oja', 'fwm', or a Rule of your own, .* got 'hebb'"),
        (dict(form="fast"), "form must be one of None, 'chunkwise', 'recurrent', 'parallel', got 'fast'"),
        (dict(normalize=True), "normalize must be one of False, 'read', 'retrieval', got True"),
        (dict(implementation="cuda"), "implementation must be one of None, 'xla', 'pallas', 'triton', got 'cuda'"),
        (dict(rule="sum", normalize="retrieval"), 'rule "sum" has no attention normalisation'),
        (dict(rule="fwm", form="parallel"), 'rule "fwm" has no parallel form'),
        (
            dict(form="recurrent", chunk_size=8),
            'chunk_size must be an integer above 0 and goes with form="chunkwise"',
        ),
        (dict(feature_map="dpfp"), r"feature_map must be a callable.* got 'dpfp' and <.*; take them from fwt_jax"),
        (dict(feature_normalization="sum"), r"feature_normalization one or None, got <.* and 'sum'; take them from"),
        (dict(feature_map=lambda x: x[0]), r"must change the last axis only.* got \(1, 1, 3, 4\) -> \(1, 3, 4\)"),
        (dict(feature_map=functools.partial(dpfp, nu=8)), "dpfp of vectors of size 4 takes nu from 1 to 7, got nu=8"),
        (
            dict(head_size=3, feature_map=dpfp, feature_normalization=sum_normalize_exactly),
            "of head_size 3, are not finite: ReLU, and DPFP of an odd size, can give zeros alone; take another map",
        ),
        (dict(feature_map=dpfp, feature_normalization=sum_normalize_exactly), r"features of \[0, .* an eps above 0"),
        (dict(feature_map=tanh, feature_normalization=functools.partial(l2_normalize, eps=0)), "or norm that is 0"),
        (dict(value_size=0), "sizes must be at least 1, got .*'value_size': 0"),
        (dict(head_size=8.0), r"sizes must be integers, got \{'head_size': 8.0, 'value_size': 8.0\}; int"),
        (dict(num_heads="2"), r"sizes must be integers, got \{'num_heads': '2'\}"),
        (dict(in_features=None), r"sizes must be integers, got \{'in_features': None\}"),
        (dict(num_heads=-1), "sizes must be at least 1, got .*'num_heads': -1"),
        (dict(eps=-1.0), "eps must be a number of at least 0, as 1e-6, got -1.0"),
        (dict(rngs=0), r"rngs must be an nnx.Rngs, got int; nnx.Rngs\(0\) makes one"),
        (dict(rngs=jax.random.key(0)), r"rngs must be an nnx.Rngs, got \w*Array"),
    ],
)
def test_configuration_mistakes(options, message):
    with pytest.raises(ValueError, match=message):
        FastWeightAttention(
            **{"in_features": D_MODEL, "num_heads": HEADS, "head_size": HEAD_SIZE, "rngs": nnx.Rngs(0), **options}
        )


ORDERS = {
    "fast weights": FastWeightAttention,
    "softmax": SoftmaxAttention,
    "cross": CrossAttention,
    "relative": functools.partial(RelativeAttention, memory_length=3),
}


@pytest.mark.parametrize("kind", ORDERS.values(), ids=ORDERS)
def test_the_order_of_arguments_of_flax_is_refused(kind):
    with pytest.raises(ValueError, match=r"num_heads 64 is larger than in_features 8: the order .* \(in_features, num"):
        kind(8, 64, 8, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("rule", [RULES["sum"], Rule(sum_step, corrects=False)], ids=["of the table", "of ones own"])
def test_cross_attention_takes_a_rule_that_does_not_depend_on_the_order(rule):
    x = inputs()
    want = CrossAttention(D_MODEL, HEADS, HEAD_SIZE, rule="sum", rngs=nnx.Rngs(0))(x, x)
    layer = CrossAttention(D_MODEL, HEADS, HEAD_SIZE, rule=rule, rngs=nnx.Rngs(0))
    chex.assert_trees_all_close(layer(x, x), want, atol=1e-6)
    chex.assert_trees_all_close(layer.read(x, layer.write(x)), want, atol=1e-5)


@pytest.mark.parametrize("rule", ["delta", "fwm", Rule(sum_step)], ids=["delta", "fwm", "of ones own"])
def test_cross_attention_refuses_a_rule_that_depends_on_the_order(rule):
    with pytest.raises(ValueError, match=r'rule must be "softmax" or "sum" .* which depends on the order'):
        CrossAttention(D_MODEL, HEADS, HEAD_SIZE, rule=rule, rngs=nnx.Rngs(0))


class Reads(FastWeightAttention):
    """The recipe of the docstring: a layer that returns y alone."""

    def __call__(self, x):
        return super().__call__(x)[0]


def test_a_layer_that_returns_y_alone_goes_into_sequential_and_tabulate():
    layer, x = Reads(D_MODEL, HEADS, HEAD_SIZE, rngs=nnx.Rngs(0)), inputs().astype(jnp.float32)
    linear = nnx.Linear(D_MODEL, 4, rngs=nnx.Rngs(1))
    y, _ = FastWeightAttention(D_MODEL, HEADS, HEAD_SIZE, rngs=nnx.Rngs(0))(x)
    model = nnx.Sequential(layer, linear)
    chex.assert_trees_all_close(model(x), linear(y), atol=1e-6)
    chex.assert_trees_all_close(layer(x) + x, y + x, atol=1e-6)
    table = nnx.tabulate(model, x, console_kwargs={"width": 200})
    assert "Reads" in table and "query" in table


def test_every_layer_makes_its_memory_from_the_same_arguments():
    for layer in (make("delta, elu"), make("softmax"), relative()):
        memory = layer.init_memory(BATCH, LENGTH)
        assert {leaf.shape[0] for leaf in jax.tree.leaves(memory)} == {BATCH}


def test_features_that_are_not_finite_are_refused_where_jax_looks_for_nan():
    options = dict(feature_map=dpfp, feature_normalization=sum_normalize_exactly, rngs=nnx.Rngs(0))
    with jax.debug_nans(True), jax.debug_infs(True), pytest.raises(ValueError, match="of head_size 5, are not finite"):
        FastWeightAttention(D_MODEL, HEADS, 5, **options)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("feature_map", "normalize"),
    [
        ("dpfp", False),
        pytest.param("dpfp", "read", marks=pytest.mark.exhaustive),
        ("dpfp", "retrieval"),
        pytest.param("relu", False, marks=pytest.mark.exhaustive),
        ("identity", "retrieval"),
    ],
)
def test_a_model_may_have_features_that_are_all_zero(feature_map, normalize):
    """One word has an embedding of zero, and all queries are zero. All gradients are finite."""
    config = ModelConfig(11, 1, 8, 12, 2, 4, feature_map=feature_map, normalize=normalize, positions=None)
    if feature_map == "identity":
        config = dataclasses.replace(config, feature_normalization="l2")
    model, tokens = DecoderLM(config, rngs=nnx.Rngs(0)), jnp.array([[5, 1, 5, 5, 2]])
    model.embedding[5] = jnp.zeros(8)
    model.blocks[0].attention.query.kernel[...] *= 0

    def loss(model):
        return jnp.sum(model.losses(tokens, tokens)[0])

    chex.assert_tree_all_finite(nnx.jit(nnx.value_and_grad(loss))(model))


@pytest.mark.parametrize("name", ["delta, elu", "softmax"])
def test_call_mistakes(name):
    layer, x = make(name), inputs()
    with pytest.raises(ValueError, match=r"x must be .*\[B, T, 6\] .*, got float32\[2, 6\]; for one token"):
        layer(x[:, 0])
    with pytest.raises(ValueError, match=r"\[B, T, 6\] .*, got float32\[2, 8, 5\]"):
        layer(x[..., :5])
    with pytest.raises(ValueError, match=r"with T ≥ 1, got float32\[2, 0, 6\]"):
        layer(x[:, :0])
    with pytest.raises(ValueError, match=r"x must be floating point .*, got int32\[2, 8, 6\]"):
        layer(x.astype(jnp.int32))
    with pytest.raises(ValueError, match=r"segment_ids must be integers \[B, T\] = \[2, 8\], got int64\[2, 7\]"):
        layer(x, segment_ids=SEGMENT_IDS[:, 1:])
    with pytest.raises(ValueError, match=r"memory must hold .*, got .*; layer\.init_memory\(2"):
        layer(x, empty(layer, batch=3))


SIZES = {
    "softmax": lambda: SoftmaxAttention(6, 2.0, 4, rngs=nnx.Rngs(0)),
    "value": lambda: SoftmaxAttention(6, 2, 4, value_size=3.5, rngs=nnx.Rngs(0)),
    "cross": lambda: CrossAttention(6.0, 2, 4, rngs=nnx.Rngs(0)),
    "relative": lambda: RelativeAttention(6, 2, 4.0, 3, rngs=nnx.Rngs(0)),
    "relative memory": lambda: RelativeAttention(6, 2, 4, 3.0, rngs=nnx.Rngs(0)),
    "favor": lambda: FavorPlus(4.0, 5, rngs=nnx.Rngs(0)),
    "favor features": lambda: FavorPlus(4, 5.0, rngs=nnx.Rngs(0)),
    "trained": lambda: TrainedFeatureMap(t2r, 2, 4, 5.0, rngs=nnx.Rngs(0)),
    "dpfp": lambda: dpfp(jnp.ones(4), nu=1.0),
    "batch": lambda: make("delta, elu").init_memory(2.0),
    "value heads": lambda: FastWeightAttention(6, 2, 4, num_value_heads=4.0, rngs=nnx.Rngs(0)),
    "cache": lambda: make("softmax").init_memory(2, 8.0),
    "segment memory": lambda: relative().init_memory(2.0),
}


@pytest.mark.parametrize("make_it", SIZES.values(), ids=SIZES)
def test_sizes_are_integers(make_it):
    with pytest.raises(ValueError, match=r"integers|takes nu from 1 to 7, got nu=1.0"):
        make_it()


def test_value_heads_are_a_multiple_of_heads():
    with pytest.raises(ValueError, match=r"num_value_heads must be a multiple of num_heads 3, got 4, .*; leave it out"):
        FastWeightAttention(D_MODEL, HEADS, HEAD_SIZE, num_value_heads=4, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"num_value_heads must be a multiple of num_heads 3, got 4; leave it out"):
        ModelConfig(vocab_size=9, num_heads=3, num_value_heads=4)


@pytest.mark.parametrize("options", [{"num_value_heads": 16}, {"conv_size": 4}], ids=str)
def test_a_model_of_softmax_attention_refuses_the_options_of_fast_weights(options):
    with pytest.raises(ValueError, match=rf"are for fast weights, got {options} with rule='softmax'; leave them out"):
        ModelConfig(vocab_size=9, rule="softmax", **options)


@pytest.mark.parametrize(
    "make_it",
    [
        lambda **options: ModelConfig(vocab_size=9, **options),
        lambda **options: FastWeightAttention(D_MODEL, HEADS, HEAD_SIZE, rngs=nnx.Rngs(0), **options),
    ],
    ids=["model", "layer"],
)
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"conv_size": 0}, "at least 1, got {'conv_size': 0}"),
        ({"conv_size": 2.5}, "integers, got {'conv_size': 2.5}"),
        ({"num_value_heads": 0}, "at least 1, got {'num_value_heads': 0}"),
    ],
    ids=str,
)
def test_sizes_that_may_be_left_out_are_checked(make_it, options, words):
    with pytest.raises(ValueError, match=words):
        make_it(**options)


def test_a_rule_that_is_not_linear_has_no_pieces_on_a_mesh():
    layer = FastWeightAttention(D_MODEL, HEADS, HEAD_SIZE, rule="fwm", sequence_axis="tokens", rngs=nnx.Rngs(0))
    mesh = jax.make_mesh((2,), ("tokens",), (AxisType.Auto,), devices=jax.devices()[:2])
    with jax.set_mesh(mesh), pytest.raises(ValueError, match='"fwm" is not linear in the memory, so its tokens cannot'):
        layer(inputs())


def test_sizes_may_be_of_numpy():
    sizes = np.array([D_MODEL, HEADS, HEAD_SIZE])
    layer = FastWeightAttention(*sizes, rngs=nnx.Rngs(0))
    assert layer.init_memory(np.int32(2)).key_sum.shape == (2, HEADS, HEAD_SIZE)
    assert SoftmaxAttention(*sizes, rngs=nnx.Rngs(0)).init_memory(2, np.int64(3)).start.shape == (2, 3)


def relative():
    return RelativeAttention(D_MODEL, HEADS, HEAD_SIZE, 3, rngs=nnx.Rngs(0))


def read_relative(layer, x, memory, **options):
    tokens, bias = 3 + x.shape[1], jnp.zeros((HEADS, HEAD_SIZE))
    options = {"positions": jnp.zeros((tokens, D_MODEL)), "content_bias": bias, "position_bias": bias, **options}
    return layer(x, memory, **options)


MEMORIES = {
    "Memory": lambda batch=BATCH: make("delta, elu").init_memory(batch),
    "KeyValueCache": lambda batch=BATCH: make("softmax").init_memory(batch, LENGTH),
    "SegmentMemory": lambda batch=BATCH: relative().init_memory(batch),
    "Source": lambda batch=BATCH: CrossAttention(6, 2, 4, rngs=nnx.Rngs(0)).write(inputs(batch)),
    "tuple": lambda: (1, 2),
    "dict": lambda: {},
}
READERS = {
    "Memory": lambda: (make("delta, elu"), r"layer\.init_memory\(2\)"),
    "KeyValueCache": lambda: (make("softmax"), r"layer\.init_memory\(2, max_length\)"),
    "SegmentMemory": lambda: (functools.partial(read_relative, relative()), r"layer\.init_memory\(2\)"),
    "Source": lambda: (CrossAttention(6, 2, 4, rngs=nnx.Rngs(0)).read, r"layer\.write\(source\).*softmax"),
    "Memory, read": lambda: (
        CrossAttention(6, 2, 4, rule="sum", rngs=nnx.Rngs(0)).read,
        r"layer\.write\(source\).*sum",
    ),
}


@pytest.mark.parametrize("name", READERS)
def test_a_memory_of_another_layer_is_refused(name):
    layer, way_out = READERS[name]()
    kind = name.split(",")[0]
    for other, make_memory in MEMORIES.items():
        if other != kind:
            with pytest.raises(ValueError, match=rf"memory must be a {kind}, .* got {other}; {way_out}"):
                layer(inputs(), make_memory())
    memory = MEMORIES[kind]()
    for field in memory._fields:
        with pytest.raises(ValueError, match=rf"memory must hold .*{field} .*, got .*; {way_out}"):
            layer(inputs(), memory._replace(**{field: getattr(memory, field)[..., None]}))
        with pytest.raises(ValueError, match=rf"memory must hold .*, got .*{field} list.*; {way_out}"):
            layer(inputs(), memory._replace(**{field: [1, 2]}))
    with pytest.raises(ValueError, match=r"memory must hold|x must have the 3 rows of its source, got 2"):
        layer(inputs(), MEMORIES[kind](3))


@pytest.mark.parametrize("name", ["positions", "content_bias", "position_bias"])
def test_positions_and_biases_of_relative_attention_must_fit(name):
    with pytest.raises(ValueError, match=rf"{name} must be .* for 8 tokens, got \[5, 1\]"):
        read_relative(relative(), inputs(), None, **{name: jnp.zeros((5, 1))})


@pytest.mark.slow
def test_lists_and_numpy_arrays_are_arrays():
    ids, x = SEGMENT_IDS, inputs()
    for name in ("delta, elu", "softmax"):
        layer = make(name)
        want = layer(x, segment_ids=jnp.asarray(ids))
        chex.assert_trees_all_close(layer(np.array(x).tolist(), segment_ids=ids.tolist()), want, atol=1e-6)
        chex.assert_trees_all_close(layer(np.array(x), segment_ids=ids), want, atol=1e-6)
    layer, mask = CrossAttention(6, 2, 4, rule="sum", rngs=nnx.Rngs(0)), SEGMENT_IDS > 0
    want, lists = layer(x, x, mask), np.array(x).tolist()
    chex.assert_trees_all_close(layer(lists, lists, mask.tolist()), want, atol=1e-6)
    chex.assert_trees_all_close(layer.read(lists, layer.write(lists, mask.tolist())), want, atol=1e-6)
    read_relative(relative(), np.array(x), None)


@pytest.mark.parametrize("rule", ["softmax", "sum"])
def test_cross_attention_refuses_another_normalisation(rule):
    with pytest.raises(ValueError, match=r"normalize must be False or .read. .*, got 'retrieval'"):
        CrossAttention(6, 2, 4, rule=rule, normalize="retrieval", rngs=nnx.Rngs(0))


def test_a_random_map_needs_a_stream_to_draw_from():
    with pytest.raises(AttributeError, match="No RngStream named 'projection'"):
        make("delta, favor")(inputs(), rngs=nnx.Rngs(dropout=0))
    with pytest.raises(ValueError, match=r"rngs must be an nnx.Rngs, got int; nnx.Rngs\(0\) makes one"):
        make("delta, favor")(inputs(), rngs=0)
