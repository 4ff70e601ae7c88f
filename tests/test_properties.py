"""What must hold of a fast weight memory whatever it is fed."""

import functools

import chex
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import attend, compiled_attend, some
from hypothesis import strategies as st

import fwt_jax
from fwt_jax.rules import RULES

MEMORY = ("fast_weights", "key_sum")
LENGTH, KEY_SIZE, VALUE_SIZE = 12, 6, 4
FORMS = {
    "sum recurrent": {"rule": "sum", "form": "recurrent", "normalize": "read"},
    "sum chunkwise": {"rule": "sum", "form": "chunkwise", "chunk_size": 4},
    "delta recurrent": {"rule": "delta", "form": "recurrent"},
    "delta chunkwise": {"rule": "delta", "form": "chunkwise", "chunk_size": 5, "normalize": "retrieval"},
    "delta parallel": {"rule": "delta", "form": "parallel", "normalize": "read"},
    "fwm recurrent": {"rule": "fwm", "form": "recurrent"},
    "fwm chunkwise": {"rule": "fwm", "form": "chunkwise", "chunk_size": 3},
}
every_form = pytest.mark.parametrize("options", FORMS.values(), ids=FORMS)


@st.composite
def sequences(draw, decay=True):
    """Inputs of one sequence and two heads: keys may be equal, zero, sparse or large, and writes none or in full."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    tokens = (1, LENGTH, 2)
    keys = rng.random((*tokens, KEY_SIZE))
    kind = draw(st.sampled_from(["positive", "sparse", "equal", "with zeros", "large"]))
    if kind == "sparse":
        keys = keys * (rng.random(keys.shape) < 0.4)
    elif kind == "equal":
        keys = np.broadcast_to(keys[:, :1], keys.shape)
    elif kind == "with zeros":
        keys = keys * (rng.random(tokens) < 0.7)[..., None]
    scale = 10.0 if kind == "large" else 1.0
    keys = scale * keys / np.maximum(1, np.linalg.norm(keys, axis=-1, keepdims=True))
    beta = draw(st.sampled_from([0.0, 0.5, 1.0, None]))
    arrays = {
        "query": rng.random((*tokens, KEY_SIZE)),
        "key": keys,
        "value": scale * rng.normal(size=(*tokens, VALUE_SIZE)),
        "beta": (rng.random(tokens) if beta is None else np.full(tokens, beta)) / scale**2,
        "fast_weights": rng.normal(size=(1, 2, KEY_SIZE, VALUE_SIZE)),
        "key_sum": rng.random((1, 2, KEY_SIZE)),
    }
    if decay:
        arrays["log_decay"] = -rng.exponential(draw(st.sampled_from([0.0, 0.3, 5.0])), tokens)
    return arrays


def tokens(arrays, start, stop):
    """A stretch of the sequence, without the memory."""
    return {name: x[:, start:stop] for name, x in arrays.items() if name not in MEMORY}


def assert_same(got, want, rtol=1e-9):
    for x, y in zip(got, want, strict=True):
        chex.assert_trees_all_close(x, y, rtol=0, atol=rtol * (1 + float(jnp.max(jnp.abs(y)))))


@every_form
@hypothesis.given(sequences())
def test_a_prefix_and_then_the_rest_is_the_whole(options, arrays):
    """The memory carries all that matters: fast weights and key sum."""
    with jax.enable_x64(True):
        run = compiled_attend(**options)
        whole = run(arrays)
        for split in (1, 7):
            memory = {name: arrays[name] for name in MEMORY}
            first, *memory = run(tokens(arrays, 0, split) | memory)
            rest, *memory = run(
                tokens(arrays, split, LENGTH) | dict(zip(("fast_weights", "key_sum"), memory, strict=True))
            )
            assert_same((jnp.concatenate([first, rest], axis=1), *memory), whole)


@pytest.mark.slow
@every_form
@hypothesis.given(sequences())
def test_packed_documents_are_separate_documents(options, arrays):
    """Ids may be any integers and come again; the first document continues the memory, the last one leaves it."""
    with jax.enable_x64(True):
        run = compiled_attend(**options)
        ids = np.array([[7] * 4 + [0] * 1 + [7] * 7])
        packed = run(arrays | {"segment_ids": ids})
        memory = {name: arrays[name] for name in MEMORY}
        empty = {name: np.zeros_like(x) for name, x in memory.items()}
        if not options.get("normalize"):  # without a normalisation the key sum is passed through
            empty["key_sum"] = arrays["key_sum"]
        parts = [
            run(tokens(arrays, 0, 4) | memory),
            run(tokens(arrays, 4, 5) | empty),
            run(tokens(arrays, 5, 12) | empty),
        ]
        assert_same(packed, (jnp.concatenate([part[0] for part in parts], axis=1), *parts[-1][1:]))


@pytest.mark.parametrize("rule", RULES)
@hypothesis.given(sequences())
def test_the_form_and_the_size_of_its_chunks_do_not_matter(rule, arrays):
    with jax.enable_x64(True):
        want = compiled_attend(rule=rule, form="recurrent")(arrays)
        for chunk_size in (1, 2, 5, LENGTH, 3 * LENGTH):
            got = compiled_attend(rule=rule, form="chunkwise", chunk_size=chunk_size)(arrays)
            assert_same(got, want, rtol=1e-8)


@functools.cache
def gradients_of_early_reads(**options):
    """Of what is read before token 7, with respect to every input."""

    def early(arrays):
        return jnp.sum(jnp.sin(attend(arrays, **options)[0][:, :7]))

    return jax.jit(jax.grad(early))


@functools.cache
def gradients_behind_a_reset(**options):
    """Of what is read and left from token 7 on, where a new document begins."""

    def late(arrays):
        out, fast_weights, key_sum = attend(arrays, segment_ids=jnp.arange(LENGTH)[None] // 7, **options)
        key_sum = key_sum if options.get("normalize") else 0.0
        return jnp.sum(jnp.sin(out[:, 7:])) + jnp.sum(jnp.sin(fast_weights)) + jnp.sum(key_sum)

    return jax.jit(jax.grad(late))


@pytest.mark.slow
@pytest.mark.parametrize("options", some(3, list(FORMS.values())), ids=FORMS)
@hypothesis.given(sequences())
def test_no_gradient_flows_from_the_past_to_the_future_nor_across_documents(options, arrays):
    """Exact zeros, not small numbers; but for log_decay, whose cumulative sums leave their rounding behind."""
    with jax.enable_x64(True):
        arrays = jax.tree.map(jnp.asarray, arrays)
        early, late = gradients_of_early_reads(**options)(arrays), gradients_behind_a_reset(**options)(arrays)
        future = tokens(early, 7, LENGTH)
        past = tokens(late, 0, 7) | {name: late[name] for name in MEMORY}
        for gradients, total in ((future, early), (past, late)):
            rounding = 1e-13 * (1 + jnp.max(jnp.abs(total["log_decay"])))
            assert jnp.max(jnp.abs(gradients.pop("log_decay"))) <= rounding
            chex.assert_trees_all_equal(gradients, jax.tree.map(jnp.zeros_like, gradients))
            assert any(jnp.any(gradient != 0) for gradient in total.values())


def in_form(form):
    return {"form": form, "chunk_size": 3 if form == "chunkwise" else None}


@pytest.mark.parametrize("form", ["recurrent", "chunkwise", "parallel"])
@hypothesis.given(st.integers(0, 2**32 - 1))
def test_orthonormal_keys_recall_their_values_exactly(form, seed):
    """K keys of size K and β = 1, with either rule; eq. 25."""
    with jax.enable_x64(True):
        rng = np.random.default_rng(seed)
        key = np.linalg.qr(rng.normal(size=(KEY_SIZE, KEY_SIZE)))[0][None, :, None]
        value = rng.normal(size=(1, KEY_SIZE, 1, VALUE_SIZE))
        for rule in ("sum", "delta"):
            inputs = {"query": key, "key": key, "value": value, "beta": np.ones((1, KEY_SIZE, 1))}
            out, fast_weights, key_sum = compiled_attend(rule=rule, **in_form(form))(inputs)
            recalled = fwt_jax.read(jnp.asarray(key), fwt_jax.Memory(fast_weights, key_sum))
            chex.assert_trees_all_close((out, recalled), (value, value), rtol=0, atol=1e-13)


@pytest.mark.parametrize("form", ["recurrent", "chunkwise", "parallel"])
@hypothesis.given(sequences(decay=False), st.integers(1, LENGTH - 1))
def test_a_second_write_to_a_key_replaces_or_adds(form, arrays, last):
    """With β = 1 the delta rule leaves the value at the key whatever came before; the sum rule adds it to the rest."""
    with jax.enable_x64(True):
        key = np.eye(KEY_SIZE)[last % KEY_SIZE]
        arrays["key"][:, last] = arrays["query"][:, last] = key
        arrays["beta"][:, last] = 1
        out, _, _ = compiled_attend(rule="delta", **in_form(form))(arrays)
        chex.assert_trees_all_close(out[:, last], arrays["value"][:, last], rtol=1e-9, atol=1e-9)

        arrays["query"][:, last - 1] = key
        out, _, _ = compiled_attend(rule="sum", **in_form(form))(arrays)
        want = out[:, last - 1] + arrays["value"][:, last]
        chex.assert_trees_all_close(out[:, last], want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("form", ["recurrent", "chunkwise"])
@hypothesis.given(sequences())
def test_the_fwm_memory_never_exceeds_norm_one(form, arrays):
    """After every step, the first too, though the memory starts larger."""
    with jax.enable_x64(True):
        run = compiled_attend(rule="fwm", form=form, **({"chunk_size": 3} if form == "chunkwise" else {}))
        for stop in (1, 7, LENGTH):
            memory = {name: 3 * arrays[name] for name in MEMORY}
            _, fast_weights, _ = run(tokens(arrays, 0, stop) | memory)
            assert jnp.all(jnp.linalg.norm(fast_weights, axis=(-2, -1)) <= 1 + 1e-12)


# What is not finite stays in its segment in the recurrent form alone: 0 · NaN is NaN, and products take whole chunks.
GARBAGE = {name: (1e15, np.nan, np.inf) if "recurrent" in name else (1e15,) for name in FORMS}


@pytest.mark.parametrize("name, garbage", [(name, garbage) for name in FORMS for garbage in GARBAGE[name]])
def test_a_reset_drops_even_garbage(name, garbage):
    options = FORMS[name]
    rng = np.random.default_rng(0)
    arrays = {
        "query": rng.random((1, LENGTH, 2, KEY_SIZE)),
        "key": rng.random((1, LENGTH, 2, KEY_SIZE)),
        "value": rng.normal(size=(1, LENGTH, 2, VALUE_SIZE)),
        "beta": rng.random((1, LENGTH, 2)),
        "segment_ids": np.arange(LENGTH)[None] // 7,
    }
    clean_out, *clean_memory = compiled_attend(**options)(arrays)
    arrays["value"][:, :7] = garbage
    out, *memory = compiled_attend(**options)(arrays)
    chex.assert_trees_all_equal((out[:, 7:], memory), (clean_out[:, 7:], clean_memory))
