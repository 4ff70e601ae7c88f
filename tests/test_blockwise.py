"""The scan over blocks of chunks, which a GPU takes, run on CPU: it gives the numbers of the definition.

tests/test_platforms.py checks which platform takes it.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import Case, attend, outputs_and_gradients, random_cotangents, random_inputs, random_segments, some

from fwt_jax import chunkwise, fast_weight_attention, memory
from fwt_jax.rules import RULES

OPTIONS = {"form": "chunkwise", "chunk_size": 4}
# With chunks of 4 tokens: two chunks, a block of 16, two blocks of 9, two of 10 with an empty chunk, and five blocks.
CASES = [
    Case(length=5),
    Case(length=64, decay="head", packed=True),
    Case(length=71, start=True, packed=True),
    Case(length=75, decay="head", start=True),
    Case(length=261, normalize="read", decay="head", start=True),
    Case(length=100, normalize="retrieval", decay="head", start=True, packed=True),
]


@pytest.fixture(autouse=True, scope="module")
def as_on_a_gpu():
    """The CPU takes the program of a GPU in this file."""

    def platform_dependent(*arguments, default, cuda=None, **others):
        return (default if cuda is None else cuda)(*arguments)

    jax.clear_caches()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunkwise.lax, "platform_dependent", platform_dependent)
        yield
    jax.clear_caches()


def test_the_program_is_that_of_a_gpu():
    arrays = random_inputs(Case(length=70))
    program = str(jax.make_jaxpr(functools.partial(attend, **OPTIONS))(arrays))
    assert "platform_index" not in program
    assert sorted(map(int, re.findall(r" length=(\d+)", program))) == [2, 9]  # 18 chunks


def assert_close(actual, expected, tolerance):
    """Largest errors relative to the largest entry, of all arrays of a tree."""
    for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * np.max(np.abs(y)))


@pytest.mark.parametrize("case", some(2, CASES), ids=str)
def test_values_and_gradients_are_those_of_the_recurrent_form(case, x64):
    arrays, cotangents = random_inputs(case), random_cotangents(case)
    segments = random_segments(case.length) if case.packed else None
    call = functools.partial(
        outputs_and_gradients, arrays, cotangents, segment_ids=segments, rule="delta", normalize=case.normalize
    )
    assert_close(call(**OPTIONS), call(form="recurrent"), 1e-11)


@pytest.mark.parametrize("keys", ["correlated", "equal", "random"])
@pytest.mark.parametrize(("strength", "tolerance"), [(1.0, 2e-6), (2.0, 1e-5)])
def test_float32_is_exact_for_keys_that_resemble_each_other(keys, strength, tolerance, x64):
    # For a write strength of 2 the system is worse conditioned: a scan over chunks has errors of up to 7e-6 too.
    case = Case(length=300, sizes=(1, 2, 16, 12))
    arrays, cotangents = random_inputs(case), random_cotangents(case)
    rng = np.random.default_rng(2)
    noise = {"correlated": 0.1, "equal": 0.0, "random": 3.0}[keys]
    key = np.abs(1 + noise * rng.normal(size=arrays["key"].shape))
    arrays |= {"key": key / np.linalg.norm(key, axis=-1, keepdims=True)}
    arrays |= {"beta": strength * rng.uniform(0.9, 1, arrays["beta"].shape)}
    rounded = jax.tree.map(lambda x: None if x is None else x.astype(np.float32), arrays)
    actual = outputs_and_gradients(rounded, cotangents, form="chunkwise")
    expected = outputs_and_gradients(jax.tree.map(lambda x: x.astype(float), rounded), cotangents, form="recurrent")
    assert_close(actual, expected, tolerance)


def test_a_memory_can_be_written_without_a_read():
    arrays = random_inputs(Case(length=70, start=True))
    one_head = [arrays["fast_weights"][0, 0]] + [arrays[name][0, :, 0] for name in ("key", "value", "beta")]
    start, key, value, beta = (jnp.asarray(x, jnp.float32) for x in one_head)
    reads, end = chunkwise.chunkwise(start, None, key, value, beta, rule=RULES["delta"], chunk_size=4)
    expected = memory.recurrent(start, None, key, value, beta, step=memory.delta_step)[1]
    assert reads is None
    assert_close(end, expected, 2e-6)


def test_reads_of_bfloat16_are_rounded_once():
    case = Case(length=150)
    arrays = {name: jnp.asarray(random_inputs(case)[name]) for name in ("query", "key", "value", "beta")}
    rounded = {name: x if name == "beta" else x.astype(jnp.bfloat16) for name, x in arrays.items()}
    reads = attend(rounded, **OPTIONS)[0]
    exact = attend({name: x.astype(jnp.float32) for name, x in rounded.items()}, **OPTIONS)[0]
    assert reads.dtype == jnp.bfloat16
    assert_close(reads.astype(jnp.float32), exact, 2**-8)


@pytest.mark.slow
def test_forward_mode_and_second_derivatives(x64):
    case = Case(length=70, decay="head", start=True)
    arrays = {name: jnp.asarray(x) for name, x in random_inputs(case).items()}
    tangents = {name: jnp.asarray(x) for name, x in random_inputs(case, seed=5).items()}

    def loss(options, arrays):
        return sum(jnp.sum(jnp.sin(x)) for x in attend(arrays, **options))

    def of(options):
        of_options = functools.partial(loss, options)
        first = jax.jvp(of_options, (arrays,), (tangents,))[1]
        return first, jax.jvp(jax.grad(of_options), (arrays,), (tangents,))[1]

    assert_close(of(OPTIONS), of({"form": "recurrent"}), 1e-11)


def test_under_vmap():
    query, key, value = np.random.default_rng(0).normal(size=(3, 5, 2, 70, 3, 8)).astype(np.float32) / 8**0.5
    beta = np.full((5, 2, 70, 3), 0.5, np.float32)
    call = functools.partial(fast_weight_attention, **OPTIONS)
    one_by_one = [call(*arrays) for arrays in zip(query, key, value, beta, strict=True)]
    assert_close(jax.vmap(call)(query, key, value, beta), jax.tree.map(lambda *x: np.stack(x), *one_by_one), 2e-6)
