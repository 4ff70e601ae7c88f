"""Value heads in groups that share a query and a key head, against queries and keys that are repeated."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import (
    Case,
    compiled_attend,
    outputs_and_gradients,
    random_cotangents,
    random_inputs,
    random_segments,
    row_lengths,
    some,
)
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import fwt_jax
from fwt_jax import FastWeightAttention, chunkwise, convert
from fwt_jax.models import DecoderLM, ModelConfig
from fwt_jax.rules import Rule

SHARED = ("query", "key")
Of13Tokens = functools.partial(Case, form="chunkwise", chunk_size=5, length=13, sizes=(2, 6, 8, 5))


def hebb_step(fast_weights, key, value, beta, decay):
    return decay * fast_weights + beta * jnp.outer(key, jnp.tanh(value))


def repeated(arrays, group):
    return arrays | {name: np.repeat(arrays[name], group, axis=2) for name in SHARED}


def summed(gradients, group):
    """The gradients, with those of queries and keys summed over each group."""

    def sum_of(x):
        return jnp.sum(x.reshape(*x.shape[:2], -1, group, x.shape[-1]), axis=3)

    return gradients | {name: sum_of(gradients[name]) for name in SHARED}


def outputs(arrays, cotangents, *, segment_ids, lengths, **options):
    """As ``outputs_and_gradients``, without gradients."""
    ids = {"segment_ids": segment_ids, "lengths": lengths}
    return compiled_attend(**options)(arrays | {name: x for name, x in ids.items() if x is not None}), {}


def check(case, divided=outputs_and_gradients, *, whole=outputs_and_gradients, group=3, tolerance=1e-11, **options):
    """Grouped heads in ``divided`` against repeated ones in ``whole``, functions like ``outputs_and_gradients``."""
    cotangents = random_cotangents(case)
    arrays = {name: x for name, x in random_inputs(case).items() if x is not None}
    arrays |= {name: arrays[name][:, :, ::group] for name in SHARED}
    segment_ids = random_segments(case.length) if case.packed else None
    options = case.options | {"segment_ids": segment_ids, "lengths": row_lengths(case)} | options
    want, want_gradients = whole(repeated(arrays, group), cotangents, **options)
    got, gradients = divided(arrays, cotangents, **options)
    if gradients:
        want = (want, summed(want_gradients, group))
        got = (got, gradients)
    for x, right in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert np.linalg.norm(x - right) <= tolerance * np.linalg.norm(right)


PLAIN = Of13Tokens("delta", decay="head")
CASES = [
    PLAIN,
    Of13Tokens("delta", decay="head", packed=True, start=True),
    Of13Tokens("delta", decay="channel", padded=True, start=True),
    Of13Tokens("delta", "retrieval", "head", packed=True, padded=True, start=True),
    Of13Tokens("oja", decay="channel", form="recurrent", packed=True),
    Of13Tokens("fwm", decay="head", padded=True, start=True),
    Of13Tokens("sum", "read", "channel", start=True),
    Of13Tokens("sum", decay="head", form="parallel", packed=True),
    Of13Tokens("oja", decay="head", start=True),
    Of13Tokens("delta", form=None, length=1, start=True),
]


@pytest.mark.parametrize("case", some(len(CASES), CASES[1:]), ids=str)
def test_a_key_head_serves_a_group_of_value_heads(case, x64):
    check(case, outputs, whole=outputs)


@pytest.mark.slow
@pytest.mark.parametrize("case", some(len(CASES), CASES), ids=str)
def test_the_gradient_of_a_key_is_the_sum_over_its_group(case, x64):
    check(case)


def test_the_products_of_queries_and_keys_are_made_once():
    def flops(heads):
        shapes = [
            jax.ShapeDtypeStruct((1, 64, *of_token), jnp.float32) for of_token in ((heads, 32), (heads, 32), (6, 5))
        ]
        operation = jax.jit(functools.partial(fwt_jax.fast_weight_attention, rule="sum", form="parallel"))
        return operation.lower(*shapes).cost_analysis()["flops"]

    products = 2 * 64 * 64 * 32
    assert flops(6) - flops(2) >= 4 * products


def test_a_step_of_the_user_gets_the_key_of_the_group(x64):
    check(Of13Tokens(decay="head"), outputs, whole=outputs, rule=Rule(hebb_step))


@pytest.mark.exhaustive
def test_the_blocks_of_a_gpu_take_groups(x64, monkeypatch):
    monkeypatch.setattr(chunkwise, "_by_platform", lambda scan, on_gpu: on_gpu)
    jax.clear_caches()
    check(PLAIN, chunk_size=4)
    jax.clear_caches()


def in_plain_jax(arrays, cotangents, run=outputs, **options):
    return run(arrays, cotangents, **options | {"implementation": "xla", "chunk_size": None})


def test_a_gpu_kernel_gets_repeated_queries_and_keys():
    pytest.importorskip("jax_triton")
    case = Of13Tokens(decay="head", form=None, sizes=(1, 4, 8, 5), implementation="triton")
    check(case, outputs, whole=in_plain_jax, group=2, tolerance=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    "heads_group_decay_key_size",
    some(
        3,
        [
            (6, 3, "head", 8),
            (4, 2, "channel", 8),
            (8, 8, None, 8),
            (9, 3, "channel", 300),  # which are too large for one step
            (4, 4, "head", 300),
            (32, 2, "head", 8),  # two steps of eight key heads
        ],
    ),
    ids=str,
)
def test_the_value_heads_of_a_tpu_kernel_share_queries_and_keys(heads_group_decay_key_size):
    heads, group, decay, key_size = heads_group_decay_key_size
    case = Case("delta", decay=decay, form=None, length=37, packed=True, start=True, sizes=(2, heads, key_size, 5))
    run = functools.partial(outputs_and_gradients, chunk_size=16, implementation="pallas")
    whole = functools.partial(in_plain_jax, run=outputs_and_gradients)
    check(case, run, whole=whole, group=group, tolerance=3e-6, precision="highest")


def kernel_operands(jaxpr):
    """The shapes of the arguments of each Pallas kernel in a program."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "pallas_call":
            yield [x.aval.shape for x in eqn.invars]
        for inner in jax.tree.leaves(eqn.params, is_leaf=lambda x: hasattr(x, "jaxpr") or hasattr(x, "eqns")):
            if hasattr(inner, "jaxpr") or hasattr(inner, "eqns"):
                yield from kernel_operands(getattr(inner, "jaxpr", inner))


@pytest.mark.slow
@pytest.mark.parametrize(
    "key_heads_heads_size_of_kernel",
    some(3, [(8, 32, 128, 8), (1, 4, 256, 2), (1, 4, 128, 1), (8, 64, 128, 16), (8, 16, 128, 8), (2, 32, 64, 4)]),
    ids=str,
)
def test_a_tpu_kernel_gets_each_query_and_key_once_as_long_as_a_step_has_room(key_heads_heads_size_of_kernel):
    key_heads, heads, key_size, of_kernel = key_heads_heads_size_of_kernel
    shapes = [(2, 256, key_heads, key_size)] * 2 + [(2, 256, heads, key_size), (2, 256, heads), (2, 256, heads)]
    inputs = [jnp.zeros(shape, jnp.bfloat16 if len(shape) == 4 else jnp.float32) for shape in shapes]

    def gradient(*inputs):
        reads, pull = jax.vjp(lambda *x: fwt_jax.fast_weight_attention(*x, implementation="pallas")[0], *inputs)
        return pull(reads)

    operands = list(kernel_operands(jax.make_jaxpr(gradient)(*inputs).jaxpr))
    assert len(operands) >= 2
    for kernel in operands:
        tokens = [shape for shape in kernel if shape[:2] == (2, 256)]  # as they are, in no groups of their own
        assert tokens.count((2, 256, of_kernel, key_size)) >= 2 and (2, 256, heads, key_size) in tokens


# --- pieces, meshes and vmap -----------------------------------------------------------------------------------------

IN_PIECES = [
    Of13Tokens("delta", decay="head", packed=True, start=True),
    Of13Tokens("delta", "retrieval", "head", packed=True, padded=True, start=True),
    Of13Tokens("oja", decay="head", padded=True, start=True),
    Of13Tokens("sum", decay="channel", packed=True),
    Of13Tokens("delta", decay="channel", packed=True, padded=True),
]


@pytest.mark.exhaustive
@pytest.mark.parametrize("case", IN_PIECES, ids=str)
def test_pieces_take_groups(case, x64):
    check(case, functools.partial(outputs_and_gradients, pieces=3))


def on_mesh(arrays, cotangents, *, kind=AxisType.Auto, replicated=(), run=outputs_and_gradients, **options):
    """On a mesh that splits rows and heads, except of ``replicated``. The operation itself splits the tokens."""
    mesh = jax.make_mesh((2, 2, 2), ("rows", "sequence", "heads"), axis_types=(kind,) * 3)
    by_token, memory = P("rows", None, "heads"), P("rows", "heads")
    specs = {name: memory if name in ("fast_weights", "key_sum") else by_token for name in arrays}
    specs |= dict.fromkeys(replicated, P())
    with jax.set_mesh(mesh):
        arrays = {name: jax.device_put(x, NamedSharding(mesh, specs[name])) for name, x in arrays.items()}
        return run(arrays, cotangents, **options)


def test_a_mesh_splits_tokens_and_heads(x64):
    check(IN_PIECES[0], functools.partial(on_mesh, run=outputs, sequence_axis="sequence"), whole=outputs)


@pytest.mark.exhaustive
@pytest.mark.parametrize("case", IN_PIECES, ids=str)
def test_gradients_on_a_mesh_that_splits_tokens_and_heads(case, x64):
    check(case, functools.partial(on_mesh, sequence_axis="sequence"))


@pytest.mark.exhaustive
@pytest.mark.parametrize("replicated", [(), SHARED, ("value", "beta", "log_decay")], ids=["none", "keys", "values"])
def test_a_mesh_of_explicit_axes_splits_heads(replicated, x64):
    check(PLAIN, functools.partial(on_mesh, kind=AxisType.Explicit, replicated=replicated))


@pytest.mark.exhaustive
def test_shard_map_over_tokens_and_heads():
    mesh = jax.make_mesh((2, 2), ("sequence", "heads"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:4])
    arrays = random_inputs(Of13Tokens(decay="head", length=12))
    arrays = {name: jnp.asarray(x, jnp.float32) for name, x in arrays.items() if x is not None}
    arrays |= {name: arrays[name][:, :, ::3] for name in SHARED}
    tokens, memory = P(None, "sequence", "heads"), P(None, "heads")
    attend = functools.partial(fwt_jax.fast_weight_attention, sequence_axis="sequence")
    mapped = jax.shard_map(lambda x: attend(**x), mesh=mesh, in_specs=(tokens,), out_specs=(tokens, memory))
    want = fwt_jax.fast_weight_attention(**repeated(arrays, 3))
    for x, right in zip(jax.tree.leaves(jax.jit(mapped)(arrays)), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(x, right, rtol=1e-5, atol=1e-5)


def test_the_heads_of_a_mesh_are_not_gathered():
    mesh = jax.make_mesh((2,), ("heads",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])

    def array(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, P(None, None, "heads")))

    shapes = array(1, 40, 2, 8), array(1, 40, 2, 8), array(1, 40, 6, 5), array(1, 40, 6)
    text = jax.jit(fwt_jax.fast_weight_attention).lower(*shapes).compile().as_text()
    assert not [name for name in ("all-gather", "all-to-all", "collective-permute", "all-reduce") if name in text]


def test_vmap_and_memories_at_chunks_take_groups():
    """Also of a query that vmap does not map."""
    case = Of13Tokens(decay="head", start=False)
    arrays = {name: jnp.asarray(x, jnp.float32) for name, x in random_inputs(case).items() if x is not None}
    arrays |= {name: arrays[name][:, :, ::3] for name in SHARED}

    def run(value, key, query):
        tokens = arrays | {"value": value, "key": key, "query": query}
        return fwt_jax.fast_weight_attention(**tokens, memory_every=5)

    values = jnp.stack([arrays["value"], -arrays["value"]])
    keys = jnp.stack([arrays["key"], arrays["key"][:, ::-1]])
    y, memories = jax.vmap(run, (0, 0, None))(values, keys, arrays["query"])
    for i in range(2):
        tokens = repeated(arrays | {"value": values[i], "key": keys[i]}, 3)
        want, memory = fwt_jax.fast_weight_attention(**tokens)
        np.testing.assert_allclose(y[i], want, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(memories.fast_weights[i, :, -1], memory.fast_weights, rtol=1e-5, atol=1e-5)
        assert memories.fast_weights.shape == (2, 2, 3, 6, 8, 5)


def test_cross_attention_takes_groups():
    case = Of13Tokens("sum", "read", start=True)
    arrays = random_inputs(case)
    start = fwt_jax.Memory(*(jnp.asarray(arrays[name], jnp.float32) for name in ("fast_weights", "key_sum")))
    query, key, value = (jnp.asarray(arrays[name], jnp.float32) for name in (*SHARED, "value"))
    query, key = query[:, :, ::3], key[:, :, ::3]
    for memory in (start, None):
        got = fwt_jax.fast_weight_cross_attention(query, key, value, memory=memory, normalize="read")
        whole = (jnp.repeat(x, 3, axis=2) for x in (query, key))
        want = fwt_jax.fast_weight_cross_attention(*whole, value, memory=memory, normalize="read")
        for x, right in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            np.testing.assert_array_equal(x, right)


# --- layers and models -----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("decay", some(2, [(6,), (6, 4)]), ids=["head", "channel"])
def test_a_layer_of_grouped_heads_with_decays(decay):
    """In two calls, against the operation between projections in NumPy."""
    layer = FastWeightAttention(5, 2, 4, num_value_heads=6, value_size=3, feature_map=jnp.tanh, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    x, log_decay = rng.normal(size=(2, 8, 5)), -rng.exponential(size=(2, 8, *decay))
    x, log_decay = (jnp.asarray(a, jnp.float32) for a in (x, log_decay))
    call = jax.jit(lambda x, log_decay, memory: layer(x, memory, log_decay=log_decay))
    first, memory = call(x[:, :4], log_decay[:, :4], layer.init_memory(2))
    second, memory = call(x[:, 4:], log_decay[:, 4:], memory)

    project = functools.partial(np.einsum, "btd,dhk->bthk", x)
    query, key, value = (project(linear.kernel[...]) for linear in (layer.query, layer.key, layer.value))
    query, key = (np.repeat(layer.feature_normalization(np.tanh(a)), 3, axis=2) for a in (query, key))
    beta = 1 / (1 + np.exp(-np.einsum("btd,dh->bth", x, layer.beta.kernel[...])))
    inputs = (jnp.asarray(a, jnp.float32) for a in (query, key, value, beta))
    want, want_memory = fwt_jax.fast_weight_attention(*inputs, log_decay)
    want = np.einsum("bthv,hvd->btd", want, layer.out.kernel[...])
    np.testing.assert_allclose(jnp.concatenate([first, second], axis=1), want, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(memory.fast_weights, want_memory.fast_weights, rtol=1e-4, atol=1e-5)


def test_a_model_of_grouped_heads_is_saved(tmp_path):
    sizes = {"vocab_size": 9, "num_layers": 1, "d_model": 8, "d_ff": 8, "num_heads": 2, "head_size": 4}
    model = DecoderLM(ModelConfig(**sizes, num_value_heads=4, positions=None), rngs=nnx.Rngs(0))
    _, memory = jax.eval_shape(model, jnp.zeros((1, 3), int))
    assert memory[0].fast_weights.shape == model.init_memory(1)[0].fast_weights.shape == (1, 4, 4, 4)
    convert.save(model, tmp_path / "model.npz")
    assert convert.load(tmp_path / "model.npz").config == model.config
    with pytest.raises(ValueError, match=r"the toolkit has no such model: .*num_value_heads=4"):
        convert.save(model, tmp_path / "model.npz", toolkit=True)
