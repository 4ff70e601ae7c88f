"""The kernels for GPUs, interpreted on a CPU; skipped without jax-triton (the extra ``cuda``).

Triton's interpreter multiplies float32 numbers exactly, as no GPU does, and bfloat16 numbers as a GPU does.
"""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import some
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import fwt_jax
from fwt_jax.kernels import gpu, gpu_calls, over_mesh
from fwt_jax.rules import RULES

pytest.importorskip("jax_triton", reason="pip install jax-triton, for Python 3.12 or later")
from fwt_jax.kernels import triton_arrays

NAMES = ("query", "key", "value", "beta", "log_decay", "fast_weights")
F32, BF16 = "float32", "bfloat16"


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def random_arrays(shape, *, dtype=F32, keys="random", most_beta=1.0, decay=0.0, channels=False, seed=0):
    """Float64 arrays by name, of query, key and value already rounded to dtype.

    Args:
      shape: B, T, H, K and V.
      decay: the mean of −log_decay.
      channels: whether every key channel has a decay of its own.
    """
    batch, length, heads, key_size, value_size = shape
    rng = np.random.default_rng(seed)
    tokens = (batch, length, heads)
    query, key = rng.normal(size=(2, *tokens, key_size))
    if keys == "correlated":
        query, key = np.abs(query) + 0.1, np.abs(key) + 0.1
    if keys == "equal":
        key = np.broadcast_to(key[:, :1], key.shape)
    arrays = {"query": unit(query), "key": unit(key), "value": rng.normal(size=(*tokens, value_size))}
    arrays = {name: np.asarray(jnp.asarray(x, dtype), np.float64) for name, x in arrays.items()}
    arrays["beta"] = rng.uniform(0, most_beta, tokens)
    arrays["log_decay"] = -rng.exponential(decay, (*tokens, key_size) if channels else tokens) if decay else None
    arrays["fast_weights"] = 0.3 * rng.normal(size=(batch, heads, key_size, value_size))
    arrays["key_sum"] = rng.uniform(0.5, 1.5, (batch, heads, key_size))
    return {name: None if x is None else np.float32(x) for name, x in arrays.items()}


def segments(shape):
    batch, length, *_ = shape
    return np.cumsum(np.random.default_rng(7).random((batch, length)) < 0.04, axis=1).astype(np.int32)


def outputs_and_gradients(arrays, dtype, computed_in, *, packed=False, **options):
    """y and W_T, and the gradients of their products with random cotangents; float64 arrays by name."""
    (batch, length, heads, key_size), value_size = arrays["key"].shape, arrays["value"].shape[-1]
    rng = np.random.default_rng(1)
    y_weights = np.asarray(jnp.asarray(rng.normal(size=(batch, length, heads, value_size)), dtype), np.float64)
    end_weights = rng.normal(size=(batch, heads, key_size, value_size))
    segment_ids = segments((batch, length)) if packed else None
    given = {name: jnp.asarray(arrays[name], computed_in) for name in NAMES if arrays[name] is not None}

    def attend(given):
        given = dict(given)
        key_sum = jnp.asarray(arrays["key_sum"], computed_in)
        memory = fwt_jax.Memory(given.pop("fast_weights"), key_sum)
        inputs = {n: x.astype(dtype) if computed_in == F32 and n in NAMES[:3] else x for n, x in given.items()}
        y, memory = fwt_jax.fast_weight_attention(**inputs, memory=memory, segment_ids=segment_ids, **options)
        return y.astype(computed_in), memory.fast_weights

    outputs, pull = jax.vjp(attend, given)
    (gradients,) = pull((jnp.asarray(y_weights, computed_in), jnp.asarray(end_weights, computed_in)))
    results = dict(zip(("y", "W"), outputs, strict=True)) | {f"gradient of {n}": x for n, x in gradients.items()}
    return {name: np.asarray(x, np.float64) for name, x in results.items()}


def check(shape, tolerance, *, dtype=F32, keys="random", most_beta=1.0, decay=0.0, channels=False, **options):
    """Against the recurrent form in float64, relative to the norm of each array."""
    arrays = random_arrays(shape, dtype=dtype, keys=keys, most_beta=most_beta, decay=decay, channels=channels)
    with jax.enable_x64(True):
        reference = {k: v for k, v in options.items() if k not in ("chunk_size", "precision")}
        want = outputs_and_gradients(arrays, "float64", "float64", form="recurrent", **reference)
    got = outputs_and_gradients(arrays, dtype, F32, implementation="triton", **options)
    errors = {name: np.linalg.norm(got[name] - x) / np.linalg.norm(x) for name, x in want.items()}
    assert all(error < tolerance for error in errors.values()), errors


EXACT = {
    "a chunk": dict(shape=(2, 32, 2, 16, 16)),
    "one token": dict(shape=(2, 1, 2, 16, 16), decay=0.1),
    "a token less than two chunks": dict(shape=(1, 63, 2, 32, 16)),
    "a token more than two chunks": dict(shape=(1, 65, 2, 32, 16), decay=0.1),
    "sizes that are no power of 2": dict(shape=(1, 70, 2, 24, 40), decay=0.1, packed=True),
    "blocks of values and of keys": dict(shape=(1, 70, 1, 64, 64), decay=0.1),
    "sum": dict(shape=(2, 70, 2, 32, 16), rule="sum"),
    "sum, decay and segments": dict(shape=(2, 70, 1, 16, 24), rule="sum", decay=0.1, packed=True),
    "segments": dict(shape=(2, 100, 1, 32, 16), packed=True),
    "decay and segments": dict(shape=(2, 100, 2, 16, 16), decay=0.2, packed=True),
    "strong decay": dict(shape=(1, 100, 1, 16, 16), decay=30.0),
    "chunks of 32": dict(shape=(1, 100, 1, 16, 16), decay=0.1, chunk_size=32),
    "chunks of 16": dict(shape=(1, 40, 1, 16, 16), decay=0.1, chunk_size=16),
    "correlated keys": dict(shape=(1, 130, 1, 16, 16), keys="correlated"),
    "strong writes": dict(shape=(1, 130, 1, 16, 16), keys="correlated", most_beta=2.0),
    "equal keys": dict(shape=(1, 130, 1, 16, 16), keys="equal", most_beta=2.0),
    "retrieval normalised": dict(shape=(1, 70, 1, 16, 16), keys="correlated", decay=0.1, normalize="retrieval"),
    "read normalised": dict(shape=(1, 70, 1, 16, 16), keys="correlated", normalize="read"),
    "bfloat16, computed in float32": dict(shape=(1, 70, 1, 16, 16), precision="highest"),
} | {
    f"channels, {name}": dict(channels=True, **options)
    for name, options in {
        "one token": dict(shape=(2, 1, 2, 16, 16), decay=0.1),
        "a token less than two chunks": dict(shape=(1, 63, 2, 32, 16), decay=0.1),
        "sizes that are no power of 2": dict(shape=(1, 40, 2, 24, 20), decay=0.1, packed=True, chunk_size=16),
        "a token more than two chunks": dict(shape=(1, 65, 2, 32, 16), decay=0.1),
        "correlated keys": dict(shape=(1, 130, 1, 16, 16), keys="correlated", decay=0.02),
        "retrieval normalised": dict(
            shape=(1, 40, 1, 16, 16), keys="correlated", decay=0.1, normalize="retrieval", chunk_size=16
        ),
        "strong decay": dict(shape=(1, 100, 1, 16, 16), decay=30.0),
        "chunks of 16": dict(shape=(1, 40, 1, 16, 16), decay=0.1, chunk_size=16),
        "blocks of values and of keys": dict(shape=(1, 40, 1, 64, 32), decay=0.1),
        "sum": dict(shape=(2, 70, 1, 16, 24), rule="sum", decay=0.1, packed=True),
    }.items()
}
# With one key for all tokens and β = 2 the entries of matrices grow, and with them rounding errors.
GROWING = ("strong writes", "equal keys", "retrieval normalised")


@pytest.mark.parametrize("name", some(4, list(EXACT)))
def test_float32_is_the_float64_recurrence(name):
    options = dict(EXACT[name])
    check(options.pop("shape"), 1e-5 if name.removeprefix("channels, ") in GROWING else 2e-6, **options)


ROUNDED = {
    "delta": dict(shape=(1, 128, 2, 32, 32)),
    "a token more than a chunk": dict(shape=(1, 65, 1, 32, 48)),
    "a token less than a chunk": dict(shape=(1, 63, 1, 48, 32), decay=0.05),
    "correlated keys": dict(shape=(1, 200, 1, 64, 64), keys="correlated"),
    "correlated keys, decay": dict(shape=(1, 200, 1, 64, 64), keys="correlated", decay=0.05),
    "correlated keys, slow decay and segments": dict(
        shape=(1, 200, 1, 64, 64), keys="correlated", decay=0.01, packed=True
    ),
    "large": dict(shape=(1, 130, 1, 256, 32), keys="correlated", decay=0.05),
    "large values": dict(shape=(1, 130, 1, 32, 256), keys="correlated"),
    "sum": dict(shape=(1, 192, 1, 64, 64), rule="sum", keys="correlated", decay=0.05),
    "channels, slow decay": dict(shape=(1, 192, 1, 64, 64), keys="correlated", decay=0.01, channels=True),
    "channels, strong decay": dict(shape=(1, 100, 1, 32, 64), decay=30.0, channels=True, packed=True),
    "channels, sum": dict(shape=(1, 100, 1, 64, 32), rule="sum", keys="correlated", decay=0.05, channels=True),
    "channels": dict(shape=(1, 129, 1, 48, 32), keys="correlated", decay=0.05, channels=True),
}


def test_small_gradients_of_decays_keep_their_digits():
    """As sums of what passes a decay. As differences of sums, some would be wrong by a factor of 500."""
    arrays = random_arrays((1, 32, 1, 16, 16), decay=3.0, channels=True)
    with jax.enable_x64(True):
        want = outputs_and_gradients(arrays, "float64", "float64", form="recurrent")["gradient of log_decay"]
    got = outputs_and_gradients(arrays, F32, F32, implementation="triton")["gradient of log_decay"]
    np.testing.assert_array_less(np.abs(got - want), 1e-3 * np.abs(want) + 1e-15)


@pytest.mark.slow
@pytest.mark.parametrize("name", some(4, list(ROUNDED)))
def test_bfloat16_is_the_float64_recurrence_to_its_rounding(name):
    """As all kernels that multiply bfloat16 numbers: 1.2e-2 for correlated keys."""
    options = dict(ROUNDED[name])
    check(options.pop("shape"), 1.2e-2, dtype=BF16, **options)


def arguments(batch=(2,), heads=2, seed=3):
    rng = np.random.default_rng(seed)
    tokens = (*batch, 40, heads)
    query, key, value = (jnp.asarray(x, F32) / 4 for x in rng.normal(size=(3, *tokens, 16)))
    return query, key, value, jnp.asarray(rng.random(tokens), F32), jnp.asarray(-rng.random(tokens), F32)


def attention(*inputs, implementation="triton", **options):
    return fwt_jax.fast_weight_attention(*inputs, implementation=implementation, **options)[0]


def gradient(*inputs, **options):
    def loss(*inputs):
        return jnp.sum(jnp.sin(attention(*inputs, **options)))

    return jax.grad(loss, argnums=tuple(range(len(inputs))))(*inputs)


@pytest.mark.slow
def test_vmap_is_a_larger_batch():
    inputs = arguments((3, 1), 1)
    got = jax.vmap(gradient)(*inputs)
    want = gradient(*(x.reshape(3, *x.shape[2:]) for x in inputs))
    chex.assert_trees_all_equal(got, jax.tree.map(lambda x: x.reshape(3, 1, *x.shape[1:]), want))


@pytest.mark.slow
@pytest.mark.parametrize("unbatched", some(2, [4, None]), ids=["all but the decay", "all"])
def test_vmap_over_an_axis_that_a_mesh_splits(unbatched):
    mesh = jax.make_mesh((2, 2), ("rows", "heads"), axis_types=(AxisType.Explicit,) * 2, devices=jax.devices()[:4])
    inputs = arguments((2, 1))
    inputs = [x[0] if i == unbatched else x for i, x in enumerate(inputs)]
    in_axes = [None if i == unbatched else 0 for i in range(5)]
    want = jax.vmap(gradient, in_axes)(*inputs)
    specs = [P("rows") if axis == 0 else P() for axis in in_axes]
    placed = [jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in zip(inputs, specs, strict=True)]
    with jax.set_mesh(mesh):
        got = jax.jit(jax.vmap(gradient, in_axes))(*placed)
    assert got[0].sharding.spec[0] == "rows"
    chex.assert_trees_all_close(got, want, rtol=1e-6, atol=1e-7)


@pytest.mark.slow
def test_vmap_of_a_value_alone():
    query, key, value, *gates = arguments()
    values = jnp.stack([value, 2 * value])
    got = jax.vmap(lambda value: attention(query, key, value, *gates))(values)
    chex.assert_trees_all_close(got[1], 2 * got[0], rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_checkpoint_scan_and_donation():
    inputs = arguments()

    def layers(*inputs):
        def layer(value, _):
            return attention(inputs[0], inputs[1], value, *inputs[3:]), None

        return jnp.sum(jax.lax.scan(jax.checkpoint(layer), inputs[2], None, length=2)[0])

    def plain(*inputs):
        value = inputs[2]
        for _ in range(2):
            value = attention(inputs[0], inputs[1], value, *inputs[3:], implementation="xla")
        return jnp.sum(value)

    want = jax.grad(plain, argnums=(0, 2))(*inputs)
    got = jax.jit(jax.grad(layers, argnums=(0, 2)), donate_argnums=2)(*inputs)
    chex.assert_trees_all_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_arrays_of_explicit_axes_are_sharded():
    mesh = jax.make_mesh((2, 2), ("rows", "heads"), axis_types=(AxisType.Explicit,) * 2, devices=jax.devices()[:4])
    inputs = arguments()
    want = gradient(*inputs)
    placed = [jax.device_put(x, NamedSharding(mesh, P("rows", None, "heads"))) for x in inputs]
    with jax.set_mesh(mesh):
        got = jax.jit(gradient)(*placed)
    assert got[0].sharding.spec[:3] == ("rows", None, "heads")
    chex.assert_trees_all_close(got, want, rtol=1e-6, atol=1e-7)


@pytest.mark.exhaustive
def test_shard_map():
    mesh = jax.make_mesh((2, 2), ("rows", "heads"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:4])
    inputs = arguments()
    spec = P("rows", None, "heads")
    got = jax.jit(jax.shard_map(gradient, mesh=mesh, in_specs=spec, out_specs=spec))(*inputs)
    chex.assert_trees_all_close(got, gradient(*inputs), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("channels", [False, True])
def test_axes_have_the_names_by_which_a_mesh_splits_them(channels):
    settings = gpu.settings_of(RULES["delta"], jnp.dtype(F32), (2, 5, 16, 24), decays=True, channels=channels)
    tokens, log_decay = (2, 70, 5), ((16,) if channels else ())
    shapes = [(2, 5, 16, 24), (*tokens, 16), (*tokens, 16), (*tokens, 24), tokens, (*tokens, *log_decay)]
    inputs = [jax.ShapeDtypeStruct(shape, F32) for shape in shapes]
    inputs += [jax.ShapeDtypeStruct(tokens[:2], bool), jax.ShapeDtypeStruct(tokens, F32)]
    results = jax.eval_shape(functools.partial(gpu_calls._forward, (settings, True)), *inputs)
    names = (*gpu_calls.axes_of_inputs(settings), *gpu_calls.OUTPUTS, *gpu_calls._RESIDUALS)
    sizes = {}
    for axes, x in zip(names, [*inputs, *results], strict=True):
        for axis, size in () if x is None else zip(axes.split(), x.shape, strict=True):
            assert sizes.setdefault(axis, size) == size, axes
    assert sizes == {"b": 2, "t": 70, "h": 5, "k": 16, "v": 24, "n": 3, "c": 32, "i": 32}


SPLIT = {
    "alike": (P("rows", "heads"), P("rows", None, "heads")),
    "the first alone": (P(None, "heads"), P()),
    "the second alone": (P(), P("rows")),
    "exchanged": (P("heads", "rows"), P("rows", None, "heads")),
    "tokens and features": (P(None, None, "heads"), P(None, "rows", None, "heads")),
}


@pytest.mark.parametrize("name", SPLIT)
def test_each_device_computes_the_rows_and_heads_that_it_has(name):
    """The partition of the kernels, of a function in their place: they cannot be called in it on a CPU."""
    mesh = jax.make_mesh((2, 2), ("rows", "heads"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:4])

    def function(memory, query, nothing):
        return jnp.einsum("bthk,bhkv->bthv", query, memory), None, 2 * memory

    on_mesh = over_mesh.over_mesh(function, ("b h k v", "b t h k", "b t"), ("b t h v", "b t", "b h k v"))
    shapes = ((4, 2, 8, 6), (4, 10, 2, 8))
    inputs = [jnp.asarray(np.random.default_rng(0).random(shape), F32) for shape in shapes]
    placed = [jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in zip(inputs, SPLIT[name], strict=True)]
    compiled = jax.jit(lambda *x: on_mesh(*x, None)).lower(*placed).compile()
    assert name != "alike" or "all-" not in compiled.as_text()
    chex.assert_trees_all_close(compiled(*placed), function(*inputs, None), rtol=1e-6)


@pytest.mark.parametrize("capabilities", [[75], [80, 90]])
def test_cards_without_kernels_take_plain_jax(capabilities, monkeypatch):
    monkeypatch.setattr(gpu, "_compute_capabilities", lambda: frozenset(capabilities))
    jax.clear_caches()
    with pytest.raises(ValueError, match=r'"triton" needs GPUs of one compute capability, 8.0 or higher, got \['):
        attention(*arguments())


@pytest.mark.slow
@pytest.mark.parametrize("derivative", some(2, ["forward over reverse", "reverse over reverse"]))
def test_derivatives_of_a_gradient_are_those_of_plain_jax(derivative):
    inputs = arguments((1,), 1)
    directions = arguments((1,), 1, seed=5)

    @functools.partial(jax.jit, static_argnums=0)
    def second(implementation):
        first = functools.partial(gradient, implementation=implementation)
        if derivative == "forward over reverse":
            return jax.jvp(first, inputs, directions)

        def products(*inputs):
            return sum(jnp.sum(g * d) for g, d in zip(first(*inputs), directions, strict=True))

        return jax.grad(products, argnums=tuple(range(5)))(*inputs)

    chex.assert_trees_all_close(second("triton"), second("xla"), rtol=1e-4, atol=1e-4)


def test_forward_mode_is_refused():
    inputs = arguments((1,), 1)
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(attention, inputs, inputs)


# --- the default ------------------------------------------------------------------------------------------------------


def test_the_default_on_a_cpu_is_plain_jax():
    program = jax.jit(functools.partial(attention, implementation=None)).lower(*arguments())
    assert "callback" not in program.as_text()


def test_the_default_on_a_gpu_is_a_kernel_wherever_it_can(monkeypatch):
    monkeypatch.setattr(jax.extend.backend, "get_backend", lambda: Backend())
    jax.clear_caches()
    inputs = arguments()
    try:
        of_kernel = jax.jit(functools.partial(attention, implementation=None)).lower(*inputs).as_text()
        plain = jax.jit(functools.partial(attention, implementation=None, rule="oja")).lower(*inputs).as_text()
        one_token = jax.jit(functools.partial(attention, implementation=None)).lower(*(x[:, :1] for x in inputs))
    finally:
        jax.clear_caches()
    assert "callback" in of_kernel
    assert "callback" not in plain and "callback" not in one_token.as_text()


class Backend:
    platform, platform_version = "gpu", "PJRT C API\ncuda 13000"


@pytest.mark.slow
def test_a_program_of_a_machine_with_gpu_that_is_compiled_for_its_cpu_is_plain_jax(monkeypatch):
    monkeypatch.setattr(triton_arrays, "INTERPRETED", False)
    inputs = arguments()
    options = {"rule": RULES["delta"], "precision": "highest"}
    start = jnp.zeros((2, 2, 16, 16), F32)

    def loss(*inputs):
        return jnp.sum(jnp.sin(gpu.chunkwise(start, *inputs, **options, fallback=True)[0]))

    got = jax.jit(jax.grad(loss, argnums=tuple(range(5))))(*inputs)
    chex.assert_trees_all_close(got, gradient(*inputs, implementation="xla"), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=r'"triton" is for NVIDIA GPUs, got cpu; use implementation="xla"'):
        jax.jit(functools.partial(gpu.chunkwise, **options))(start, *inputs)


REFUSED = {
    "rule": (dict(rule="oja"), 'has no rule "oja"'),
    "size": (dict(query=np.ones((2, 40, 2, 65), np.float32), key=np.ones((2, 40, 2, 65), np.float32)), "K = 65"),
    "dtype": (dict(value=np.ones((2, 40, 2, 16), np.float16)), "got float16, float32"),
    "chunk_size": (dict(chunk_size=64), "chunk_size 16, 32 or None for products of float32, got 64"),
    "precision": (dict(precision=("highest", "default")), "precision"),
    "form": (dict(form="parallel"), 'needs form="chunkwise"'),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_named_kernel_says_why_it_cannot(name):
    changed, words = REFUSED[name]
    given = dict(zip(NAMES[:5], arguments(), strict=True)) | changed
    with pytest.raises(ValueError, match='"triton"') as error:
        fwt_jax.fast_weight_attention(**given, implementation="triton")
    assert words in str(error.value) and '"xla"' in str(error.value)


def test_without_the_extra_a_named_kernel_names_it(monkeypatch):
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs jax-triton, of the extra cuda \(pip install jax-triton"):
        fwt_jax.fast_weight_attention(*arguments(), implementation="triton")
