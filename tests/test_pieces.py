"""Pieces of a sequence: their maps, on one device and over the devices of a mesh, against the whole sequence."""

import dataclasses
import functools
import itertools
import re

import chex
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import Case, attend, outputs_and_gradients, random_cotangents, random_inputs, random_segments, some
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import fwt_jax
from fwt_jax import pieces
from fwt_jax.kernels import gpu
from fwt_jax.rules import RULES, Rule

LINEAR = [name for name, rule in RULES.items() if rule.piece]
DECAYS = (None, "head", "channel")
CASES = [
    Case(rule, normalize, decay, "chunkwise", 5, length, packed, start)
    for rule, normalize, decay, (length, packed, start) in itertools.product(
        LINEAR, (False, "read", "retrieval"), DECAYS, [(40, False, False), (37, True, True)]
    )
    if normalize in RULES[rule].normalize and (decay != "channel" or RULES[rule].decay_per_channel)
]
MESHES = [(1, 8), (2, 4), (4, 2)]  # of rows and of pieces


def piece_of(case, arrays, first, last):
    """The map of the tokens from ``first`` to before ``last``."""
    inputs = {name: jnp.asarray(x[:, first:last]) for name, x in arrays.items() if x is not None}
    batch, heads, key_size, value_size = case.sizes
    empty = jnp.zeros((batch, heads, key_size, value_size))
    rest = (inputs["beta"], inputs.get("log_decay"), None)
    options = dict(rule=RULES[case.rule], chunk_size=5, precision="highest")
    return pieces.piece_of(empty, inputs["key"], inputs["value"], *rest, **options)


@pytest.mark.parametrize("case", some(4, [case for case in CASES if case.packed and not case.normalize]), ids=str)
def test_maps_compose_in_any_grouping(case, x64):
    case = dataclasses.replace(case, length=20)
    arrays = random_inputs(case)
    start, _ = jnp.asarray(arrays.pop("fast_weights")), arrays.pop("key_sum")
    cuts = [0, 1, 2, 9, 20]  # pieces of one token, of less than a chunk, and of several chunks
    maps = [piece_of(case, arrays, *cut) for cut in itertools.pairwise(cuts)]
    from_left = functools.reduce(pieces.compose, maps)
    from_right = functools.reduce(lambda later, earlier: pieces.compose(earlier, later), reversed(maps))
    want = attend(arrays | {"fast_weights": start, "key_sum": jnp.zeros(start.shape[:-1])}, rule=case.rule)[1]
    for whole in (piece_of(case, arrays, 0, 20), from_left, from_right):
        transposed = RULES[case.rule].piece == "transposed"
        got = pieces.advance(whole, jnp.swapaxes(start, -1, -2) if transposed else start)
        np.testing.assert_allclose(jnp.swapaxes(got, -1, -2) if transposed else got, want, rtol=1e-11, atol=1e-12)


@functools.cache
def map_of(first, last):
    case = Case(decay="head", length=7, sizes=(1, 1, 3, 2))
    return jax.jit(functools.partial(piece_of, case, random_inputs(case), first, last))()


@pytest.mark.slow
@hypothesis.given(st.data())
def test_any_cut_and_any_order_of_grouping_give_the_map_of_the_whole(data):
    cuts = [0, *sorted(data.draw(st.sets(st.integers(1, 6)))), 7]
    with jax.enable_x64(True):
        maps = [map_of(*cut) for cut in itertools.pairwise(cuts)]
        while len(maps) > 1:
            i = data.draw(st.integers(0, len(maps) - 2))
            maps[i : i + 2] = [pieces.compose(*maps[i : i + 2])]
        for x, right in zip(maps[0], map_of(0, 7), strict=True):
            np.testing.assert_allclose(x, right, rtol=1e-12, atol=1e-14)


def check(case, divided, tolerance=1e-9, lengths=None):
    """Outputs and gradients of ``divided``, a function like ``attend``, against one piece."""
    arrays, cotangents = random_inputs(case), random_cotangents(case)
    dtype = jnp.zeros(()).dtype
    arrays = {name: None if x is None else x.astype(dtype) for name, x in arrays.items()}
    options = dict(rule=case.rule, normalize=case.normalize, chunk_size=case.chunk_size)
    segment_ids = random_segments(case.length) if case.packed else None
    want = outputs_and_gradients(arrays, cotangents, segment_ids=segment_ids, lengths=lengths, **options)
    got = divided(arrays, cotangents, segment_ids=segment_ids, **options)
    for x, right in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert np.linalg.norm(x - right) <= tolerance * np.linalg.norm(right)


@pytest.mark.parametrize("case", CASES[::17], ids=str)
def test_pieces_are_the_whole_sequence(case, x64):
    check(case, functools.partial(outputs_and_gradients, pieces=3))


@pytest.mark.slow
@pytest.mark.parametrize("number", some(2, [40, 2]))
def test_any_number_of_pieces_in_float32(number):
    check(Case(length=40, decay="head"), functools.partial(outputs_and_gradients, pieces=number), 2e-6)


def test_derivatives_of_pieces_in_forward_mode_and_of_gradients(x64):
    arrays = {name: jnp.asarray(x) for name, x in random_inputs(Case(length=9)).items() if x is not None}

    def derivatives(number):
        def loss(arrays):
            y, *memory = attend(arrays, pieces=number)
            return jnp.sum(jnp.sin(y)) + sum(jnp.sum(jnp.sin(x)) for x in memory)

        return jax.jit(lambda: jax.jvp(jax.grad(loss), [arrays], [jax.tree.map(jnp.cos, arrays)]))()

    chex.assert_trees_all_close(derivatives(3), derivatives(1), rtol=1e-9, atol=1e-10)


def program_of(length=64, **options):
    token = jax.ShapeDtypeStruct((2, length, 3, 8), jnp.float32)
    beta = jax.ShapeDtypeStruct((2, length, 3), jnp.float32)
    return jax.jit(functools.partial(fwt_jax.fast_weight_attention, **options)).lower(token, token, token, beta)


def test_pieces_in_a_shard_map_over_the_batch():
    """JAX's check of varying axes knows no messages along an axis of vmap."""
    x = jax.random.normal(jax.random.key(0), (2, 8, 1, 4))
    beta = jnp.full((2, 8, 1), 0.5)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])

    def y(x, beta, pieces=2):
        return fwt_jax.fast_weight_attention(x, x, x, beta, pieces=pieces)[0]

    with pytest.raises(ValueError, match="vary over axes of a mesh, got data"):
        jax.shard_map(y, mesh=mesh, in_specs=P("data"), out_specs=P("data"))(x, beta)
    unchecked = jax.shard_map(y, mesh=mesh, in_specs=P("data"), out_specs=P("data"), check_vma=False)
    np.testing.assert_allclose(jax.jit(unchecked)(x, beta), y(x, beta, 1), rtol=1e-5, atol=1e-5)


def test_no_number_of_pieces_is_one_piece_on_a_cpu():
    assert program_of(pieces=None, chunk_size=1).as_text() == program_of(chunk_size=1).as_text()


@pytest.mark.parametrize(
    ("options", "number"),
    [
        ({"chunk_size": 1}, 4),
        ({"chunk_size": 1, "rule": "oja", "implementation": "xla"}, 4),
        ({"chunk_size": 4}, 1),  # too few chunks
        ({"form": "recurrent"}, 1),
        ({"rule": "fwm", "chunk_size": 1}, 1),
        ({"memory_every": 64, "chunk_size": 1}, 1),
    ],
    ids=str,
)
def test_no_number_of_pieces_is_one_where_plain_jax_runs_on_a_gpu(options, number, monkeypatch):
    monkeypatch.setattr(gpu, "num_processors", lambda: 132)
    assert program_of(pieces=None, **options).as_text() == program_of(pieces=number, **options).as_text()


def test_pieces_are_for_few_programs_and_many_chunks():
    number = pieces.number_of_pieces
    assert [number(programs, 132, 512) for programs in (1, 8, 16, 32, 64, 1000)] == [32, 16, 8, 1, 1, 1]
    assert [number(1, 132, chunks) for chunks in (1, 31, 63, 64, 512)] == [1, 1, 1, 4, 32]
    assert number(16, 16, 512) == 1 and number(16, 148, 512) >= 8


def test_a_kernel_for_tpu_takes_pieces_as_more_heads():
    """One call with pieces x heads programs, each with fewer chunks in sequence."""
    token, beta = jnp.zeros((2, 64, 3, 8)), jnp.zeros((2, 64, 3))
    attention = functools.partial(fwt_jax.fast_weight_attention, implementation="pallas", chunk_size=16)

    def grids(number):  # of the call for a TPU, and of the interpreted one
        program = jax.make_jaxpr(functools.partial(attention, pieces=number))(token, token, token, beta)
        return re.findall(r"\bgrid=\(([\d, ]+)\)", str(program))

    heads = grids(1)[0].removesuffix(", 4")  # in blocks
    assert grids(1) == [f"{heads}, 4"] * 2
    assert grids(4) == [f"4, {heads}, 1"] * 2


def on_mesh(shape, arrays, cotangents, **options):
    mesh = jax.make_mesh(shape, ("data", "sequence"), axis_types=(AxisType.Auto,) * 2)
    by_row = NamedSharding(mesh, P("data" if shape[0] == 2 else None))
    arrays = {name: None if x is None else jax.device_put(x, by_row) for name, x in arrays.items()}
    with jax.set_mesh(mesh):
        return outputs_and_gradients(arrays, cotangents, sequence_axis="sequence", **options)


# The cases of one device: what is expected is compiled for both.
@pytest.mark.parametrize(("case", "mesh"), list(zip(CASES[::17], [(1, 8), (2, 4)], strict=True)), ids=str)
def test_the_devices_of_a_mesh_are_one_device(case, mesh, x64):
    check(case, functools.partial(on_mesh, mesh))


@pytest.mark.exhaustive
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("mesh", [None, *MESHES], ids=str)
def test_full_product_of_pieces(case, mesh, x64):
    check(case, functools.partial(on_mesh, mesh) if mesh else functools.partial(outputs_and_gradients, pieces=3))


def test_messages_are_maps_and_no_tokens_are_gathered():
    mesh = jax.make_mesh((8,), ("sequence",), axis_types=(AxisType.Auto,))
    token = jax.ShapeDtypeStruct((1, 640, 2, 16), jnp.float32, sharding=NamedSharding(mesh, P(None, "sequence")))
    beta = jax.ShapeDtypeStruct((1, 640, 2), jnp.float32, sharding=token.sharding)

    def gradient(*inputs):
        def loss(*inputs):
            return jnp.sum(fwt_jax.fast_weight_attention(*inputs, sequence_axis="sequence")[0])

        return jax.grad(loss, argnums=range(4))(*inputs)

    with jax.set_mesh(mesh):
        text = jax.jit(gradient).lower(token, token, token, beta).compile().as_text()
    rounds = 3 + 1  # log₂ 8, and one to the next piece
    messages = text.count(" collective-permute(") + text.count(" collective-permute-start(")
    assert messages == 2 * rounds  # M and U in one message, forward and backward
    assert "all-gather" not in text and "all-to-all" not in text


def test_the_piece_of_a_device_in_shard_map():
    """Also of a document that begins where a piece does: the second row's, at token 5."""
    mesh = jax.make_mesh((8,), ("sequence",), axis_types=(AxisType.Auto,))
    arrays = {name: jnp.asarray(x, jnp.float32) for name, x in random_inputs(Case(length=40)).items() if x is not None}
    segment_ids = jnp.asarray(random_segments(40))

    def of_piece(arrays, segment_ids):
        return fwt_jax.fast_weight_attention(**arrays, segment_ids=segment_ids, sequence_axis="sequence")

    by_token = P(None, "sequence")
    mapped = jax.shard_map(of_piece, mesh=mesh, in_specs=(by_token, by_token), out_specs=(by_token, P()))
    y, memory = jax.jit(mapped)(arrays, segment_ids)
    want, want_memory = fwt_jax.fast_weight_attention(**arrays, segment_ids=segment_ids)
    np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(memory.fast_weights, want_memory.fast_weights, rtol=1e-5, atol=1e-6)


def test_a_memory_that_decayed_to_zero_in_an_earlier_piece_is_not_empty():
    """In float32 the key sum is 0 then, and so a retrieval cannot tell it from an empty one by itself."""
    arrays = {name: jnp.asarray(x, jnp.float32) for name, x in random_inputs(Case(length=8)).items() if x is not None}
    arrays["key"] = jnp.abs(arrays["key"])
    arrays["log_decay"] = jnp.zeros((2, 8, 3), jnp.float32).at[:, 4].set(-110.0)  # the first token of the second piece
    want, cut = (attend(arrays, normalize="retrieval", pieces=number) for number in (1, 2))
    for x, right in zip(cut, want, strict=True):
        np.testing.assert_allclose(x, right, rtol=1e-4, atol=1e-5)


def test_keys_of_cross_attention_on_the_devices_of_a_mesh(x64):
    mesh = jax.make_mesh((4,), ("sequence",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    arrays = random_inputs(Case(rule="sum", normalize="read", length=40, start=True))
    inputs = [jnp.asarray(arrays[name]) for name in ("query", "key", "value", "fast_weights", "key_sum")]

    def both(attend, *inputs):
        (y, memory), pull = jax.vjp(attend, *inputs)
        return y, memory, pull((jnp.sin(y), jax.tree.map(jnp.sin, memory)))

    def attend(query, key, value, *memory, sequence_axis=None):
        options = dict(normalize="read", sequence_axis=sequence_axis)
        return fwt_jax.fast_weight_cross_attention(query, key, value, memory=fwt_jax.Memory(*memory), **options)

    by_token = P(None, "sequence")
    of_piece = functools.partial(attend, sequence_axis="sequence")
    divided = jax.shard_map(of_piece, mesh=mesh, in_specs=(*(by_token,) * 3, P(), P()), out_specs=(by_token, P()))
    got, want = (jax.jit(functools.partial(both, function))(*inputs) for function in (divided, attend))
    for x, right in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(x, right, rtol=1e-9, atol=1e-12)
    with pytest.raises(ValueError, match="sequence_axis must be the name of an axis"):
        of_piece(*inputs)


REFUSED = {
    "fwm": (dict(rule="fwm", pieces=2), 'rule "fwm" is not linear in the memory'),
    "a step": (dict(rule=Rule(lambda W, k, v, b, a=None: W), pieces=2), "is not linear in the memory"),
    "oja per channel": (dict(rule="oja", pieces=2, log_decay=np.zeros((2, 6, 3, 8), np.float32)), "per key channel"),
    "no piece": (dict(pieces=0), "pieces must be None or an integer from 1 to T = 6, got 0"),
    "too many": (dict(pieces=7), "pieces must be None or an integer from 1 to T = 6, got 7"),
    "both": (dict(pieces=2, sequence_axis="x"), "exclude each other"),
    "no mesh": (dict(sequence_axis="x"), "sequence_axis must be an axis of the mesh, got 'x' and a mesh of ()"),
    "no name": (dict(sequence_axis=3), "sequence_axis must be the name of an axis of the mesh, got 3"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_pieces_says_so(name):
    options, words = REFUSED[name]
    arrays = {n: jnp.asarray(x, jnp.float32) for n, x in random_inputs(Case(length=6)).items() if x is not None}
    with pytest.raises(ValueError) as error:
        fwt_jax.fast_weight_attention(**(arrays | options))
    assert words in str(error.value)


PADDED = [(CASES[17], (2, 4)), (CASES[27], (2, 4)), (CASES[27], None), (CASES[17], None)]


@pytest.mark.slow
@pytest.mark.parametrize("case_and_mesh", some(6, PADDED), ids=str)
def test_rows_padded_behind_are_cut_in_pieces(case_and_mesh, x64):
    """Lengths of no token, of a piece's end, and in the middle of pieces."""
    case, mesh = case_and_mesh
    divided = functools.partial(on_mesh, mesh) if mesh else functools.partial(outputs_and_gradients, pieces=4)
    for lengths in ([0, 10], [37, 13]):
        check(case, functools.partial(divided, lengths=np.asarray(lengths)), lengths=np.asarray(lengths))
