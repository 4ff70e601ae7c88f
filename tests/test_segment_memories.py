"""A memory for each segment of a packed row, given and returned: ``memory`` with an axis N."""

import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from cases import (
    DECAYS,
    NORMALIZED_RULES,
    Case,
    attend,
    outputs_and_gradients,
    random_inputs,
    row_lengths,
    some,
)
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from fwt_jax import FastWeightAttention
from fwt_jax.models import DecoderLM, ModelConfig
from fwt_jax.segments import layout

LENGTH, NUM_SEGMENTS = 27, 6
MEMORY = ("fast_weights", "key_sum")
# Documents of one token, in any order; a document that comes back; segments 1, 3 and 5, or 0, 3, 4 and 5, without one.
IDS = np.array([[2] * 9 + [0] * 11 + [4] + [2] * 6, [1] * 17 + [2, 1, 2, 1, 1, 2, 1, 1, 1, 2]])
FORMS = [("recurrent", None), ("chunkwise", 4), ("parallel", None), ("chunkwise", None)]


def inputs_of(case):
    """``random_inputs`` with six memories in each row."""
    arrays, rng = random_inputs(case), np.random.default_rng(3)
    batch, heads, key_size, value_size = case.sizes
    shape = (batch, NUM_SEGMENTS, heads, key_size)
    return arrays | {"fast_weights": rng.normal(size=(*shape, value_size)), "key_sum": rng.uniform(0.5, 1.5, shape)}


def each_alone(arrays, ids, lengths=None, **options):
    """Each segment's tokens as a row of its own, by the reference."""
    tokens = {name: x for name, x in arrays.items() if x is not None and name not in MEMORY}
    dtype = np.result_type(*tokens.values(), *(arrays[name] for name in MEMORY))
    y, *memory = (np.array(x, dtype) for x in (0 * arrays["value"], *(arrays[name] for name in MEMORY)))
    for b, segment in np.ndindex(memory[0].shape[:2]):
        rows = np.s_[b : b + 1]
        chosen = np.flatnonzero(ids[b, : None if lengths is None else lengths[b]] == segment)
        alone = {name: x[rows, chosen] for name, x in tokens.items()}
        start = {name: arrays[name][rows, segment] for name in MEMORY}
        y[rows, chosen], *ends = reference.batched(reference.attention, alone | start, **options)
        for x, end in zip(memory, ends, strict=True):
            x[rows, segment] = end
    return y, *memory


def mixed_cases():
    """Every rule with each normalisation and decay, in forms and contexts that take turns."""
    for i, ((rule, normalize), decay) in enumerate(itertools.product(NORMALIZED_RULES, DECAYS)):
        form, chunk_size = FORMS[i // 2 % 4]
        case = Case(rule, normalize, decay, form, chunk_size, LENGTH, True, True, i % 5 == 0)
        yield case if case.defined else Case(rule, normalize, decay, None, None, LENGTH, True, True, i % 5 == 0)


@pytest.mark.slow
@pytest.mark.parametrize("case", some(11, list(mixed_cases())), ids=str)
def test_each_segment_is_as_if_it_were_alone(case, x64):
    """Outputs, memories and the gradients in every argument, along a direction, against the reference."""
    arrays, lengths, rng = inputs_of(case), row_lengths(case), np.random.default_rng(1)
    options = {"rule": case.rule, "normalize": case.normalize, "lengths": lengths}
    want = each_alone(arrays, IDS, **options)
    cotangents = tuple(rng.normal(size=x.shape) for x in want)
    got, gradients = outputs_and_gradients(arrays, cotangents, segment_ids=IDS, lengths=lengths, **case.options)
    chex.assert_trees_all_close(got, want, rtol=1e-9, atol=1e-9)

    def loss(arrays):
        outputs = each_alone(arrays, IDS, **options)
        return sum(np.sum(c * x) for c, x in zip(cotangents, outputs, strict=True))

    for name, gradient in gradients.items():
        direction = rng.normal(size=gradient.shape)
        derivative = reference.derivative_along(loss, arrays, name, direction)
        np.testing.assert_allclose(np.sum(gradient * direction), derivative, rtol=1e-9, atol=1e-9, err_msg=name)


@pytest.mark.parametrize("size", [1, 4])
def test_every_token_has_a_place_in_a_stretch_of_its_segment(size):
    """In the order of the tokens; also where the stretches just suffice, and without a token of any segment."""
    rows = np.random.default_rng(0).integers(-2, 7, (20, 13))  # −2, −1 and 6: of no segment
    crowded = np.repeat([5, 3, 0, 1, 2, 4], [1, 1, 5, 1, 1, 4])  # with one token more than whole stretches in most
    rows = np.concatenate([rows, [crowded, np.full(13, -1), np.full(13, 3)]])
    laid_out = jax.jit(jax.vmap(functools.partial(layout, num_segments=6, size=size)))(jnp.asarray(rows))
    for ids, segment, token, place in zip(rows, *map(np.asarray, laid_out), strict=True):
        assert token.shape == (min(13, (13 + 6 * (size - 1)) // size), size)
        places = [(i, j) for i, j in np.ndindex(token.shape) if token[i, j] < 13]
        assert [ids[token[i, j]] for i, j in places] == [segment[i] for i, _ in places]
        assert [token[i, j] for i, j in places] == [t for n in range(6) for t in np.flatnonzero(ids == n)]
        inverse = {token[i, j]: i * size + j for i, j in places}
        np.testing.assert_array_equal(place, [inverse.get(t, token.size) for t in range(13)])


def float32_inputs():
    arrays = inputs_of(Case(length=LENGTH))
    return {name: jnp.asarray(x, jnp.float32) for name, x in arrays.items() if x is not None}


def run(arrays, ids, lengths=None):
    """With "fwm", which clips these memories where it takes an empty place for a token."""
    return attend(arrays, segment_ids=ids, lengths=lengths, rule="fwm", form="recurrent")


compiled = jax.jit(run)


def test_tokens_of_no_segment_are_padding():
    """Traced ids that are no memory's, and padding behind: y is 0, and a memory without a token is bit for bit the
    same."""
    arrays, lengths = float32_inputs(), jnp.array([20, 17])
    ids = jnp.where(IDS == 1, -1, IDS).at[0, 20].set(NUM_SEGMENTS)
    y, fast_weights, key_sum = compiled(arrays, ids, lengths)
    is_padding = (ids < 0) | (jnp.arange(LENGTH)[None] >= lengths[:, None])
    assert jnp.all(jnp.any(y != 0, axis=(2, 3)) != is_padding)
    untouched = np.array([[False, True, False, True, True, True], [True] * 6])
    for name, x in (("fast_weights", fast_weights), ("key_sum", key_sum)):
        chex.assert_trees_all_equal(x[untouched], arrays[name][untouched])
    assert jnp.all(jnp.any(fast_weights != arrays["fast_weights"], axis=(2, 3, 4)) != untouched)


@pytest.mark.slow
def test_calls_may_be_eager_mapped_and_sharded():
    arrays, ids = float32_inputs(), jnp.asarray(IDS, jnp.int32)
    want = compiled(arrays, ids)
    one = jax.tree.map(lambda x: x[:, None], (arrays, ids))
    mapped = jax.tree.map(lambda x: x[:, 0], jax.jit(jax.vmap(run))(*one))
    chex.assert_trees_all_close(run(arrays, IDS), want, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(mapped, want, rtol=1e-5, atol=1e-6)
    mesh = jax.make_mesh((2,), ("batch",), (AxisType.Auto,), devices=jax.devices()[:2])
    sharded = jax.jit(jax.shard_map(run, mesh=mesh, in_specs=P("batch"), out_specs=P("batch")))(arrays, ids)
    chex.assert_trees_all_close(sharded, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("replicated", some(3, [MEMORY, ("segment_ids",), ("query", "beta")]), ids=str)
def test_meshes_of_explicit_axes(replicated):
    arrays = float32_inputs() | {"segment_ids": jnp.asarray(IDS, jnp.int32)}
    mesh = jax.make_mesh((2,), ("batch",), (AxisType.Explicit,), devices=jax.devices()[:2])
    specs = {name: P() if name in replicated else P("batch") for name in arrays}
    placed = {name: jax.device_put(x, NamedSharding(mesh, specs[name])) for name, x in arrays.items()}
    with jax.set_mesh(mesh):
        got = jax.jit(lambda arrays: run(arrays, arrays.pop("segment_ids")))(placed)
    want = compiled(float32_inputs(), arrays["segment_ids"])
    chex.assert_trees_all_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.exhaustive
@pytest.mark.parametrize("implementation", ["pallas", "triton"])
def test_kernels_take_one_stretch_at_a_time(implementation):
    if implementation == "triton":
        pytest.importorskip("jax_triton")
    arrays = float32_inputs() | {"segment_ids": jnp.asarray(IDS, jnp.int32)}
    got = jax.jit(functools.partial(attend, implementation=implementation))(arrays)
    want = jax.jit(functools.partial(attend, form="recurrent"))(arrays)
    chex.assert_trees_all_close(got, want, rtol=1e-5, atol=1e-5)


def first_memories(layer, num_segments):
    """Empty memories ``[B, N, ...]``, as a caller makes them."""
    return jax.tree.map(lambda x: x.reshape(2, num_segments, *x.shape[1:]), layer.init_memory(2 * num_segments))


@pytest.mark.slow
def test_a_layer_streams_tokens_of_two_segments():
    """In two calls; each segment as if the layer read it alone."""
    layer = FastWeightAttention(8, num_heads=2, head_size=4, form="recurrent", rngs=nnx.Rngs(0))
    x, ids = jax.random.normal(jax.random.key(0), (2, 8, 8)), np.array([[0, 1, 1, 0, 1, 0, 0, 1]] * 2)
    call = nnx.jit(lambda layer, x, memory=None, ids=None: layer(x, memory, segment_ids=ids))
    first, memories = call(layer, x[:, :4], first_memories(layer, 2), ids[:, :4])
    second, memories = call(layer, x[:, 4:], memories, ids[:, 4:])
    y = jnp.concatenate([first, second], axis=1)
    for n in (0, 1):
        want, memory = call(layer, x[:, ids[0] == n])
        chex.assert_trees_all_close(y[:, ids[0] == n], want, rtol=1e-5, atol=1e-5)
        chex.assert_trees_all_close(jax.tree.map(lambda x, n=n: x[:, n], memories), memory, rtol=1e-5, atol=1e-5)


@pytest.mark.exhaustive
@pytest.mark.parametrize("scan", [False, True])
def test_a_model_reads_several_prompts_in_a_row(scan):
    config = ModelConfig(20, 2, 8, 16, 2, rule="delta", positions=None, scan=scan)
    model, tokens = DecoderLM(config, rngs=nnx.Rngs(0)), np.arange(14).reshape(2, 7)
    ids = np.array([[1] * 4 + [0] * 3] * 2)
    call = nnx.jit(lambda model, tokens, *rest: model(tokens, *rest[:1], segment_ids=rest[1] if rest else None))
    log_p, memories = call(model, tokens, first_memories(model, 2), ids)
    for n, chosen in ((0, np.s_[:, 4:]), (1, np.s_[:, :4])):
        want, memory = call(model, tokens[chosen])
        chex.assert_trees_all_close(log_p[chosen], want, rtol=1e-4, atol=1e-4)
        chex.assert_trees_all_close(jax.tree.map(lambda x, n=n: x[:, n], memories), memory, rtol=1e-4, atol=1e-4)
