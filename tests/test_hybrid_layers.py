"""Grouped and latent attention, SwiGLU and mixtures against loops over tokens and heads in NumPy."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec as P

from fwt_jax import sharding
from fwt_jax.layers import GatedDeltaNet, GroupedQueryAttention, KimiDeltaAttention, LatentAttention
from fwt_jax.models import MixtureOfExperts, SwiGLU

BATCH, LENGTH, D_MODEL, HEADS, HEAD_SIZE = 2, 8, 7, 4, 6
HALF = LENGTH // 2
# The first row has two tokens of padding in front, the second four documents.
SEGMENT_IDS = np.array([[0, 0, 1, 1, 1, 1, 1, 1], [5, 5, 5, 2, 2, 2, 9, 4]])

ATTENTIONS = {
    "qwen": dict(
        num_key_value_heads=2,
        qk_norm="head",
        zero_centered=True,
        rotary_size=3,
        gate=True,
        use_bias=True,
        out_bias=True,
    ),
    "olmo": dict(qk_norm="all", num_key_value_heads=1, rotary_size=0, norm_eps=1e-5),
    "window": dict(num_key_value_heads=2, use_bias=True, rotary_theta=50.0, window=3),
    "latent": dict(kind=LatentAttention, shared_size=3, latent_size=5, value_size=2),
}
MIXTURES = {
    "qwen": dict(num_experts=5, experts_per_token=2, shared_d_ff=3, shared_gate=True),
    "not normalised": dict(num_experts=3, experts_per_token=1, normalize=False),
    "kimi": dict(num_experts=8, experts_per_token=3, router="sigmoid", scaling=2.5, shared_d_ff=3),
    "groups": dict(num_experts=6, experts_per_token=2, router="sigmoid", groups=3, groups_per_token=2, normalize=False),
    "all experts": dict(num_experts=3, experts_per_token=3),
}
each_attention = pytest.mark.parametrize("name", ATTENTIONS)


def with_random_numbers(make):
    """The module with random numbers in all its variables, which costs no compilation."""
    rng = np.random.default_rng(1)
    graph, state = nnx.split(nnx.eval_shape(make))
    return nnx.merge(graph, jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape) * 0.5, x.dtype), state))


def attention(name, **more):
    options = {"kind": GroupedQueryAttention} | ATTENTIONS[name] | more
    make = functools.partial(options.pop("kind"), D_MODEL, HEADS, HEAD_SIZE, **options)
    return with_random_numbers(lambda: make(rngs=nnx.Rngs(0)))


def mixture(name, **more):
    return with_random_numbers(lambda: MixtureOfExperts(D_MODEL, d_ff=4, **MIXTURES[name], **more, rngs=nnx.Rngs(0)))


def inputs(batch=BATCH, length=LENGTH):
    return jnp.asarray(np.random.default_rng(0).normal(size=(batch, length, D_MODEL)))


# --- in NumPy, of one sequence ---------------------------------------------------------------------------------------


def project(linear, x, letters="tm,mhd->thd"):
    y = np.einsum(letters, x, np.array(linear.kernel[...]))
    return y if linear.bias is None else y + np.array(linear.bias[...])


def root_mean_square(norm, x):
    scale = np.array(norm.scale[...]) + norm.zero_centered
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + norm.eps) * scale


def rotated(x, theta, size):
    """Two halves of the features ``[T, H, size]`` are the real and the imaginary parts of complex numbers."""
    half = (size + 1) // 2
    angles = np.arange(len(x))[:, None, None] * theta ** (-2 * np.arange(half) / max(size, 1))
    z = (x[..., :half] + 1j * x[..., half : 2 * half]) * np.exp(1j * angles)
    return np.concatenate([z.real, z.imag, x[..., 2 * half :]], axis=-1)


def softmax_reads(query, key, value, window=None):
    """``[T, H, K]``, ``[T, G, K]``, ``[T, G, V]``."""
    reads = np.zeros((*query.shape[:2], value.shape[-1]))
    for t, head in np.ndindex(*reads.shape[:2]):
        first, group = 0 if window is None else max(0, t - window + 1), head * key.shape[1] // query.shape[1]
        weights = np.exp(key[first : t + 1, group] @ query[t, head] / np.sqrt(query.shape[-1]))
        reads[t, head] = weights @ value[first : t + 1, group] / np.sum(weights)
    return reads


def numpy_grouped(layer, x):
    query, key = project(layer.query, x), project(layer.key, x)
    if layer.qk_norm is not None:
        shapes, flat = (query.shape, key.shape), (len(x), -1)
        pairs = ((layer.query_norm, query), (layer.key_norm, key))
        if layer.qk_norm == "all":
            pairs = [(norm, heads.reshape(flat)) for norm, heads in pairs]
        normalized = [root_mean_square(norm, heads) for norm, heads in pairs]
        query, key = (heads.reshape(shape) for heads, shape in zip(normalized, shapes, strict=True))
    query, key = (rotated(heads, layer.rotary_theta, layer.rotary_size) for heads in (query, key))
    reads = softmax_reads(query, key, project(layer.value, x), layer.window)
    if layer.gate is not None:
        reads = reads / (1 + np.exp(-project(layer.gate, x)))
    return project(layer.out, reads, "thv,hvm->tm")


def numpy_latent(layer, x):
    latent = root_mean_square(layer.latent_norm, project(layer.latent, x, "tm,mr->tr"))
    shared = np.repeat(project(layer.shared_key, x, "tm,mr->tr")[:, None], HEADS, axis=1)
    key = np.concatenate([project(layer.key, latent), shared], axis=-1)
    return project(layer.out, softmax_reads(project(layer.query, x), key, project(layer.value, latent)), "thv,hvm->tm")


def numpy_attention(layer, x, segment_ids=None):
    """y ``[B, T, D]`` of each document alone."""
    function = numpy_latent if isinstance(layer, LatentAttention) else numpy_grouped
    ids = np.zeros(x.shape[:2]) if segment_ids is None else segment_ids
    cuts = [np.flatnonzero(np.diff(row)) + 1 for row in ids]
    return np.stack(
        [
            np.concatenate([function(layer, piece) for piece in np.split(row, cut)])
            for row, cut in zip(np.array(x), cuts, strict=True)
        ]
    )


def numpy_swiglu(gate, up, down, x):
    hidden = gate.T @ x
    return down.T @ (hidden / (1 + np.exp(-hidden)) * (up.T @ x))


def numpy_mixture(layer, x):
    """y ``[D]`` of one token."""
    logits = np.array(layer.router.kernel[...]).T @ x
    if layer.bias is None:
        scores = order = np.exp(logits) / np.sum(np.exp(logits))
    else:
        scores = 1 / (1 + np.exp(-logits))
        order = scores + np.array(layer.bias[...])
    size = len(scores) // layer.groups
    sums = [sum(sorted(order[size * g : size * (g + 1)])[-2:]) for g in range(layer.groups)]
    groups = np.argsort(sums)[-layer.groups_per_token :] if layer.groups > 1 else [0]
    candidates = [e for e in range(len(scores)) if e // size in groups]
    chosen = sorted(candidates, key=lambda e: order[e])[-layer.experts_per_token :]
    weights = scores[chosen] / np.sum(scores[chosen]) if layer.normalize else scores[chosen]
    gate, up, down = (np.array(variable[...]) for variable in (layer.gate, layer.up, layer.down))
    y = sum(layer.scaling * w * numpy_swiglu(gate[e], up[e], down[e], x) for w, e in zip(weights, chosen, strict=True))
    if layer.shared is None:
        return y
    kernels = (np.array(linear.kernel[...]) for linear in (layer.shared.gate, layer.shared.up, layer.shared.down))
    shared = numpy_swiglu(*kernels, x)
    if layer.shared_gate is None:
        return y + shared
    return y + shared / (1 + np.exp(-np.array(layer.shared_gate.kernel[...])[:, 0] @ x))


def numpy_mixtures(layer, x):
    return np.stack([[numpy_mixture(layer, token) for token in row] for row in np.array(x)])


# --- attention, fed in every way -------------------------------------------------------------------------------------


@each_attention
def test_all_at_once_and_token_by_token(x64, name):
    layer, x = attention(name, param_dtype=jnp.float64), inputs()

    @jax.jit
    def both(x):
        def step(memory, token):
            y, memory = layer(token[:, None], memory)
            return memory, y[:, 0]

        memory, y = lax.scan(step, layer.init_memory(BATCH, LENGTH + 2), jnp.swapaxes(x, 0, 1))
        return layer(x), (jnp.swapaxes(y, 0, 1), memory)

    (y, cache), (streamed, streamed_cache) = both(x)
    expected = numpy_attention(layer, x)
    np.testing.assert_allclose(y, expected, atol=1e-12)
    np.testing.assert_allclose(streamed, expected, atol=1e-12)
    cut = streamed_cache._replace(**{f: getattr(streamed_cache, f)[:, :LENGTH] for f in ("key", "value", "start")})
    chex.assert_trees_all_close(cut, cache, atol=1e-12)


@each_attention
def test_padding_and_packed_documents(x64, name):
    layer, x = attention(name, param_dtype=jnp.float64), inputs()
    call = jax.jit(lambda x, memory, ids, lengths: layer(x, memory, segment_ids=ids, lengths=lengths))

    def calls(ids, lengths):
        """Two calls of half of the tokens each."""
        first, memory = call(x[:, :HALF], layer.init_memory(BATCH, LENGTH), ids[:, :HALF], lengths[0])
        second, memory = call(x[:, HALF:], memory, ids[:, HALF:], lengths[1])
        return np.array(first), np.array(second), memory

    first, second, memory = calls(SEGMENT_IDS, np.full((2, BATCH), HALF))
    np.testing.assert_allclose(np.hstack([first, second]), numpy_attention(layer, x, SEGMENT_IDS), atol=1e-12)
    np.testing.assert_array_equal(memory.length, [LENGTH] * BATCH)
    first, second, memory = calls(np.zeros_like(SEGMENT_IDS), np.array([[3, 0], [2, 3]]))
    expected = numpy_attention(layer, np.hstack([x[:1, :3], x[:1, HALF : HALF + 2]]))[0]
    np.testing.assert_allclose(np.vstack([first[0, :3], second[0, :2]]), expected, atol=1e-12)
    np.testing.assert_allclose(second[1, :3], numpy_attention(layer, x[1:, HALF : HALF + 3])[0], atol=1e-12)
    np.testing.assert_array_equal(memory.length, [5, 3])


# --- mixtures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "length"), [*((name, LENGTH) for name in MIXTURES), ("kimi", 1)])
def test_mixtures(x64, name, length):
    """Blocks of several rows, that are padded; and with one token, fewer rows than experts."""
    layer, x = mixture(name, param_dtype=jnp.float64), inputs(length=length)[:length]
    np.testing.assert_allclose(jax.jit(lambda x: layer(x))(x), numpy_mixtures(layer, x), atol=1e-12)


def test_the_choice_of_experts(x64):
    """All tokens choose one expert; and experts that no token chooses do not compute."""
    layer, x = mixture("kimi", param_dtype=jnp.float64), inputs()
    graph, _ = nnx.split(layer)
    call = jax.jit(lambda state, x: nnx.merge(graph, state)(x))
    for favourite in (0, 4, 7):
        layer.bias.set_value(jnp.asarray(np.where(np.arange(8) == favourite, 10, 0), jnp.float32))
        np.testing.assert_allclose(call(nnx.state(layer), x), numpy_mixtures(layer, x), atol=1e-12)
    unused = np.isin(np.arange(8), [2, 7])
    layer.bias.set_value(jnp.asarray(np.where(unused, -10, 0), jnp.float32))
    expected = call(nnx.state(layer), x)
    for matrices in (layer.gate, layer.up, layer.down):
        matrices.set_value(jnp.asarray(np.where(unused[:, None, None], np.nan, matrices.get_value())))
    np.testing.assert_array_equal(call(nnx.state(layer), x), expected)


def test_the_bias_has_no_gradient():
    bias = mixture("kimi").bias
    assert isinstance(bias, nnx.Variable) and not isinstance(bias, nnx.Param)


def test_swiglu(x64):
    layer, x = with_random_numbers(lambda: SwiGLU(D_MODEL, 5, param_dtype=jnp.float64, rngs=nnx.Rngs(0))), inputs()
    kernels = [np.array(linear.kernel[...]) for linear in (layer.gate, layer.up, layer.down)]
    expected = [[numpy_swiglu(*kernels, token) for token in row] for row in np.array(x)]
    np.testing.assert_allclose(layer(x), expected, atol=1e-12)


def test_eight_devices_compute_a_mixture_as_one():
    layer, x = mixture("qwen"), inputs(4, 8).astype(jnp.float32)
    mesh = sharding.make_mesh(fsdp=2, sequence=2, tensor=2)
    graph, state = nnx.split(layer)
    tree = {"feed_forward": nnx.as_pure(state)}
    partition = sharding.partition(mesh, tree)

    def loss(tree, x):
        return jnp.mean(jnp.square(nnx.merge(graph, tree["feed_forward"])(x)))

    expected = jax.jit(jax.value_and_grad(loss, (0, 1)))(tree, x)
    with jax.set_mesh(mesh):
        x = jax.device_put(x, sharding.batch_partition(mesh, x))
        result = jax.jit(jax.value_and_grad(loss, (0, 1)))(jax.device_put(tree, partition), x)
    chex.assert_trees_all_close(jax.device_get(result), jax.device_get(expected), atol=1e-6)


# --- gradients, dtypes, partitions, errors ---------------------------------------------------------------------------

LAYERS = ["qwen", "latent", "mixture qwen"]


def layer_and_reference(name, **options):
    if name.startswith("mixture "):
        return mixture(name.removeprefix("mixture "), **options), numpy_mixtures
    return attention(name, **options), numpy_attention


@pytest.mark.parametrize("name", LAYERS)
def test_gradients_are_the_differences_of_the_reference(x64, name):
    """Along a random direction of x and all parameters."""
    layer, reference = layer_and_reference(name, param_dtype=jnp.float64)
    x, rng = inputs(length=5), np.random.default_rng(2)
    graph, params, rest = nnx.split(layer, nnx.Param, ...)
    params, x = jax.tree.map(np.array, (params, x))
    cotangent = rng.normal(size=x.shape)
    step = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape), (params, x))

    def loss(arrays):
        y = nnx.merge(graph, arrays[0], rest)(arrays[1])
        return jnp.sum(cotangent * (y[0] if isinstance(y, tuple) else y))

    def loss_of_step(size):
        state, x_after = jax.tree.map(lambda leaf, direction: leaf + size * direction, (params, x), step)
        return np.sum(cotangent * reference(nnx.merge(graph, state, rest), x_after))

    gradient = jax.jit(jax.grad(loss))((params, x))
    slope = sum(np.sum(a * b) for a, b in zip(*map(jax.tree.leaves, (gradient, step)), strict=True))
    np.testing.assert_allclose(slope, (loss_of_step(1e-6) - loss_of_step(-1e-6)) / 2e-6, rtol=1e-6)


@pytest.mark.parametrize("name", LAYERS)
def test_bfloat16(name):
    x = inputs().astype(jnp.bfloat16)
    layer, reference = layer_and_reference(name, dtype=jnp.bfloat16)
    result = jax.jit(lambda x: layer(x))(x)
    y = result[0] if isinstance(result, tuple) else result
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.array(y, np.float64), reference(layer, np.array(x, np.float64)), atol=0.1)
    if isinstance(result, tuple):
        chex.assert_trees_all_equal_shapes_and_dtypes(result[1], layer.init_memory(BATCH, LENGTH))
        assert result[1].key.dtype == jnp.bfloat16


def partitions(**modules):
    """The partition of every variable of abstract modules, by its path."""
    tree = nnx.as_pure({name: nnx.state(module) for name, module in modules.items()})
    shardings = sharding.partition(sharding.make_mesh(fsdp=2, tensor=4), tree)
    leaves = jax.tree_util.tree_leaves_with_path(shardings)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): x.spec for path, x in leaves}


def test_every_kernel_has_its_partition():
    options = dict(shared_d_ff=8, router="sigmoid")
    mixer = nnx.eval_shape(lambda: GroupedQueryAttention(8, 4, 8, gate=True, rngs=nnx.Rngs(0)))
    feed_forward = nnx.eval_shape(lambda: MixtureOfExperts(8, 3, 2, 8, **options, rngs=nnx.Rngs(0)))
    assert partitions(mixer=mixer, feed_forward=feed_forward) == {
        "mixer/query/kernel": P("fsdp", "tensor", None),
        "mixer/key/kernel": P("fsdp", "tensor", None),
        "mixer/value/kernel": P("fsdp", "tensor", None),
        "mixer/gate/kernel": P("fsdp", "tensor", None),
        "mixer/out/kernel": P("tensor", None, "fsdp"),
        "feed_forward/bias": P(),
        "feed_forward/router/kernel": P("fsdp"),
        "feed_forward/gate": P(None, "fsdp", "tensor"),
        "feed_forward/up": P(None, "fsdp", "tensor"),
        "feed_forward/down": P(None, "tensor", "fsdp"),
        "feed_forward/shared/gate/kernel": P("fsdp", "tensor"),
        "feed_forward/shared/up/kernel": P("fsdp", "tensor"),
        "feed_forward/shared/down/kernel": P("tensor", "fsdp"),
    }


@pytest.mark.parametrize("layer", [GatedDeltaNet, KimiDeltaAttention])
def test_every_variable_of_a_delta_layer_has_its_partition(layer):
    expected = {f"mixer/{name}/kernel": P("fsdp", "tensor", None) for name in ("query", "key", "value")}
    expected |= {f"mixer/convolutions/{name}/taps": P(None, "tensor") for name in ("query", "key", "value")}
    expected |= {"mixer/out/kernel": P("tensor", None, "fsdp"), "mixer/beta/kernel": P("fsdp", "tensor")}
    expected |= {"mixer/norm/scale": P(), "mixer/decay/log_rate": P("tensor"), "mixer/decay/bias": P("tensor")}
    if layer is GatedDeltaNet:
        expected["mixer/gate/projection/kernel"] = P("fsdp", "tensor", None)
        expected["mixer/decay/projection/kernel"] = P("fsdp", "tensor")
    else:
        for name in ("gate", "decay"):
            expected[f"mixer/{name}/projection/down/kernel"] = P("fsdp")
            expected[f"mixer/{name}/projection/up/kernel"] = P("fsdp", "tensor")
        expected["mixer/gate/projection/up/bias"] = P()
    assert partitions(mixer=nnx.eval_shape(lambda: layer(8, 4, 8, rngs=nnx.Rngs(0)))) == expected


GROUPED = functools.partial(GroupedQueryAttention, 8, 4, 6, rngs=nnx.Rngs(0))
LATENT = functools.partial(LatentAttention, 8, 4, 6, rngs=nnx.Rngs(0))
MIXTURE = functools.partial(MixtureOfExperts, 8, 6, d_ff=4, rngs=nnx.Rngs(0))
MISTAKES = {
    "groups": (lambda: GROUPED(num_key_value_heads=3), "num_key_value_heads must divide num_heads, 4, got 3"),
    "norm": (lambda: GROUPED(qk_norm="heads"), "qk_norm must be one of None, 'head', 'all', got 'heads'"),
    "large": (lambda: GROUPED(rotary_size=7), "rotary_size must be from 0 to head_size, 6, and below it if odd, got 7"),
    "theta": (lambda: GROUPED(rotary_theta=0.0), r"rotary_theta must be above 0, as 10000, got 0\.0"),
    "window": (lambda: GROUPED(window=0), "sizes must be at least 1, got {'window': 0}"),
    "order": (lambda: GroupedQueryAttention(8, 64, 8, rngs=nnx.Rngs(0)), "num_heads 64 is larger than in_features 8"),
    "latent": (lambda: LATENT(shared_size=2, latent_size=0), "sizes must be at least 1, got {'latent_size': 0}"),
    "rngs": (lambda: SwiGLU(8, 4, rngs=0), "rngs must be an nnx.Rngs, got int"),
    "router": (lambda: MIXTURE(2, router="relu"), "router must be one of 'softmax', 'sigmoid', got 'relu'"),
    "too many": (lambda: MIXTURE(7), "experts_per_token must be at most the 6 experts that a token may use, got 7"),
    "too many in groups": (lambda: MIXTURE(3, router="sigmoid", groups=3), "at most the 2 experts .* got 3"),
    "small groups": (lambda: MIXTURE(1, router="sigmoid", groups=6), "groups must divide num_experts, 6, .* got 6"),
    "softmax groups": (lambda: MIXTURE(2, groups=3), "groups of experts go with router=.sigmoid., got groups=3"),
    "shared gate": (lambda: MIXTURE(2, shared_gate=True), "shared_gate needs a shared expert, got shared_d_ff=0"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(name):
    call, message = MISTAKES[name]
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("name", ["qwen", "latent"])
def test_caches_that_do_not_fit(name):
    layer, x = attention(name), inputs()
    with pytest.raises(ValueError, match=r"the cache holds 0 of at most 4 tokens .* layer\.init_memory"):
        layer(x, layer.init_memory(BATCH, 4))
    with pytest.raises(ValueError, match=r"memory must hold key \[2, 8, .*, got key .*; layer\.init_memory\(2"):
        layer(x, layer.init_memory(BATCH, LENGTH)._replace(key=jnp.zeros((BATCH, LENGTH, HEADS, HEAD_SIZE))))


def test_a_row_without_room_is_nan_where_the_length_is_traced():
    layer = attention("olmo")
    memory = layer.init_memory(BATCH, LENGTH)._replace(length=jnp.array([0, 1]))
    y, _ = jax.jit(lambda x, memory: layer(x, memory))(inputs(), memory)
    assert np.all(np.isfinite(y[0])) and np.all(np.isnan(y[1]))
