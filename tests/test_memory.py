"""The memory of one head: steps, nasty numbers, and what its gradient keeps."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from cases import AS_USERS, Case, attend, compiled_attend, outputs_and_gradients, random_inputs, some

import fwt_jax
from fwt_jax import normalization, triangular
from fwt_jax.kernels import tpu
from fwt_jax.rules import RULES


def one_head(**kwargs):
    """Arrays by name of the first sequence and head of ``random_inputs``; no memory, unless it has a start."""
    arrays = random_inputs(Case(**kwargs))

    def take(name, x):
        return x[0, 0] if name in ("fast_weights", "key_sum") else x[0, :, 0]

    return {name: take(name, x) for name, x in arrays.items() if x is not None}


# --- steps, weights of a read, key sums ------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", [None, "head", "channel"])
@pytest.mark.parametrize("rule", RULES)
def test_a_step_is_the_equation(rule, decay, x64):
    arrays = one_head(rule=rule, decay=decay, length=1, start=True)
    key, value, beta = (jnp.asarray(arrays[name][0]) for name in ("key", "value", "beta"))
    alpha = None if decay is None else jnp.exp(jnp.asarray(arrays["log_decay"][0]))
    got = RULES[rule].step(jnp.asarray(arrays["fast_weights"]), key, value, beta, alpha)
    chex.assert_trees_all_close(got, reference.attention(**arrays, rule=rule)[1], rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("decay", [None, "head", "channel"])
@pytest.mark.parametrize("rule", ["sum", "delta"])
def test_read_weights_are_the_last_read(rule, decay, packed, x64):
    """W_Tᵀq = Σ w_t v_t + W_0ᵀr."""
    arrays = one_head(rule=rule, decay=decay, length=12, start=True)
    ids = (np.arange(12) >= 7).astype(int) if packed else None
    out, _, _ = reference.attention(**arrays, segment_ids=ids, rule=rule)
    reset = None if ids is None else jnp.arange(12) == 7
    inputs = [None if name not in arrays else jnp.asarray(arrays[name]) for name in ("key", "beta", "log_decay")]
    weights, rest = fwt_jax.read_weights(jnp.asarray(arrays["query"][-1]), *inputs, reset, rule=rule)
    got = weights @ arrays["value"] + rest @ arrays["fast_weights"]
    chex.assert_trees_all_close(got, out[-1], rtol=1e-11, atol=1e-12)
    if packed:
        chex.assert_trees_all_equal((weights[:7], rest), (jnp.zeros(7), jnp.zeros(8)))


@pytest.mark.parametrize("decay", [None, "head", "channel"])
def test_key_sums_before_and_after_each_token(decay, x64):
    arrays = one_head(normalize="read", decay=decay, length=12, start=True)
    reset = np.arange(12) == 5
    log_decay = jnp.asarray(arrays["log_decay"]) if decay else None
    before, after = normalization.key_sums(
        jnp.asarray(arrays["key_sum"]), jnp.asarray(arrays["key"]), log_decay, jnp.asarray(reset)
    )
    z = arrays["key_sum"]
    for t in range(12):
        z = 0 * z if reset[t] else z
        z = z * (np.exp(arrays["log_decay"][t]) if decay else 1)
        chex.assert_trees_all_close(before[t], z, rtol=1e-12)
        z = z + arrays["key"][t]
        chex.assert_trees_all_close(after[t], z, rtol=1e-12)


# --- nasty numbers ---------------------------------------------------------------------------------------------------


def unit_keys(kind, length, size=8):
    rng = np.random.default_rng(0)
    keys = {
        "equal": np.ones((length, size)),
        "random": rng.normal(size=(length, size)),
        "correlated, non-negative": 1 + 0.1 * rng.random((length, size)),
        "opposite": np.ones((length, size)) * np.where(np.arange(length) % 2, 1, -1)[:, None],
    }[kind]
    return keys / np.linalg.norm(keys, axis=-1, keepdims=True)


KINDS = ["equal", "random", "correlated, non-negative", "opposite"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("beta", [0.5, 1.0, 1.9, 2.0])
@pytest.mark.parametrize("length", [1, 7, 64, 100])
def test_the_triangular_inverse_is_as_good_as_a_solve(length, beta, kind):
    """In float32, against NumPy in float64, for the systems of the delta rule. Powers of L alone lose everything."""
    keys = unit_keys(kind, length)
    lower = np.float64(np.float32(beta * np.tril(keys @ keys.T, -1)))
    exact = np.linalg.inv(np.eye(length) + lower)
    # What lies on or above the diagonal must not matter.
    inverse = triangular.unit_lower_inverse(jnp.asarray(lower + np.triu(np.ones_like(lower)), jnp.float32))
    assert inverse.dtype == jnp.float32
    chex.assert_trees_all_equal(jnp.triu(inverse), jnp.eye(length))
    # The entries are at most 2 for β ≤ 2 and unit keys. Up to β = 1 the error is that of 64 float32 additions; above,
    # sums are larger before they cancel: a float32 substitution row by row is 341 units of 2⁻²³ off at T = 100.
    tolerance = 64 * 2**-23 if beta <= 1 else 8 * 3**4 * 2**-23
    chex.assert_trees_all_close(np.float64(inverse), exact, rtol=0, atol=tolerance)


def test_what_lies_on_or_above_the_diagonal_of_a_system_has_no_gradient(x64):
    lower, right, weights = (np.random.default_rng(0).normal(size=(40, size)) * 0.2 for size in (40, 3, 3))

    def loss(lower, right):
        return jnp.sum(weights * triangular.unit_lower_solve(lower, right))

    got = jax.grad(loss, (0, 1))(jnp.asarray(lower), jnp.asarray(right))
    inverse = np.linalg.inv(np.eye(40) + np.tril(lower, -1))
    want_right = inverse.T @ weights
    want = -np.tril(want_right @ (inverse @ right).T, -1), want_right
    chex.assert_trees_all_close(got, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("beta", [1.0, 2.0])
def test_chunks_of_the_delta_rule_bear_correlated_keys_and_strong_writes(kind, beta):
    """Float32 chunks of 64 against the float64 loop of the reference, of the same rounded inputs."""
    keys = np.float32(unit_keys(kind, 128))
    arrays = {"query": keys, "key": keys, "value": np.float32(np.random.default_rng(1).normal(size=(128, 5)))}
    arrays["beta"] = np.full(128, beta, np.float32)
    want = reference.attention(**{name: np.float64(x) for name, x in arrays.items()}, rule="delta")
    batched = {name: jnp.asarray(x)[None, :, None] for name, x in arrays.items()}
    out, fast_weights, _ = compiled_attend(rule="delta", form="chunkwise", chunk_size=64)(batched)
    scale = max(np.max(np.abs(want[0])), np.max(np.abs(want[1])))
    tolerance = 1e-5 if beta <= 1 else 1e-4  # as for the inverse
    chex.assert_trees_all_close((out[0, :, 0], fast_weights[0, 0]), want[:2], rtol=0, atol=tolerance * scale)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("beta", some(2, [2.0, 1.0]))
def test_kernels_bear_correlated_keys_and_strong_writes(kind, beta):
    """Interpreted; bfloat16 inputs, and products of one pass but for the triangular system, to two digits."""
    keys = unit_keys(kind, 256)[None, :, None]
    value = np.random.default_rng(1).normal(size=(1, 256, 1, 5))
    arrays = {"query": np.roll(keys, 1, axis=1), "key": keys, "value": value}
    arrays = {name: jnp.asarray(x, jnp.bfloat16) for name, x in arrays.items()} | {"beta": jnp.full((1, 256, 1), beta)}
    exact = {name: x.astype(jnp.float32) for name, x in arrays.items()}
    shapes = jax.eval_shape(lambda arrays: attend(arrays, form="recurrent"), exact)
    cotangents = [np.random.default_rng(3).normal(size=x.shape) for x in shapes]
    want = outputs_and_gradients(exact, cotangents, rule="delta", form="recurrent")
    for inputs, precision, tolerance in ((arrays, None, 0.1 * beta), (exact, "highest", 5e-4 * beta)):
        got = outputs_and_gradients(inputs, cotangents, implementation="pallas", precision=precision)
        for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            chex.assert_trees_all_close(np.float32(x), np.float32(y), rtol=0, atol=tolerance * np.max(np.abs(y)))


@pytest.mark.slow
@pytest.mark.parametrize("decay", ["head", "channel"])
def test_kernels_bear_strong_decays_beside_none(decay):
    """Interpreted, over nine heads and two chunks, the second not full: a tenth of the decays is exp(−30)."""
    rng = np.random.default_rng(0)
    keys = np.abs(rng.normal(size=(1, 40, 9, 16)))
    keys /= np.linalg.norm(keys, axis=-1, keepdims=True)
    shape = keys.shape if decay == "channel" else keys.shape[:3]
    log_decay = np.select([rng.random(shape) < 0.1, rng.random(shape) < 0.5], [-30.0, 0.0], -rng.random(shape))
    arrays = {"query": rng.normal(size=keys.shape), "key": keys, "value": rng.normal(size=(1, 40, 9, 5))}
    arrays |= {"beta": 2 * rng.random(keys.shape[:3]), "log_decay": log_decay}
    arrays = {name: jnp.asarray(x, jnp.float32) for name, x in arrays.items()}
    shapes = jax.eval_shape(lambda arrays: attend(arrays, form="recurrent"), arrays)
    cotangents = [rng.normal(size=x.shape) for x in shapes]
    want = outputs_and_gradients(arrays, cotangents, rule="delta", form="recurrent")
    got = outputs_and_gradients(arrays, cotangents, implementation="pallas", chunk_size=32)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        chex.assert_trees_all_close(x, y, rtol=0, atol=5e-6 * np.max(np.abs(y)))


@pytest.mark.slow
@pytest.mark.parametrize(("limit", "size"), [("BLOCK_BYTES", 2**18), ("NUMBERS", 2 * 128**2)])
def test_kernels_take_as_many_heads_at_a_time_as_fit(limit, size, monkeypatch):
    """In blocks, and of the heads of a block."""
    query, key, value = jax.random.normal(jax.random.key(0), (3, 2, 20, 6, 8))
    inputs = jnp.ones((2, 6, 8, 5)), query, key / 3, value[..., :5], jnp.ones((2, 20, 6))
    reset = jnp.arange(40).reshape(2, 20) % 7 == 0

    def results():
        def loss(*inputs):
            outputs = tpu.chunkwise(*inputs, reset=reset, rule=RULES["delta"], precision="highest")
            return sum(jnp.sum(jnp.sin(x)) for x in outputs), outputs

        return jax.jit(jax.grad(loss, (0, 1, 2, 3, 4), has_aux=True))(*inputs)

    want = results()
    monkeypatch.setattr(tpu, limit, size)
    chex.assert_trees_all_close(results(), want, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("chunk_size", some(2, [64, 32]))
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("beta", some(3, ["2", "1", "0 to 2"]))
def test_long_sequences_of_correlated_keys_keep_three_digits(kind, beta, chunk_size, x64):
    """8192 tokens: reads, memory and gradients of float32 chunks against the float64 recurrence.

    With β = 2 and one key for all, W → −(1 + 2ε) W + …, where ε is the rounding of ‖k‖², the same for all pairs of a
    chunk: nothing decays, and 2εT = 1e-3 is what float32 can do.
    """
    random, shape = np.random.default_rng(2), (1, 8192, 1)
    keys = unit_keys(kind, 8192)[None, :, None]
    arrays = {"query": np.roll(keys, 1, axis=1), "key": keys, "value": random.normal(size=(*shape, 5))}
    arrays["beta"] = random.uniform(0, 2, shape) if beta == "0 to 2" else np.full(shape, float(beta))
    arrays = {name: np.float32(x) for name, x in arrays.items()}
    cotangents = [random.normal(size=size) for size in ((*shape, 5), (1, 1, keys.shape[-1], 5), (1, 1, keys.shape[-1]))]
    exact = {name: np.float64(x) for name, x in arrays.items()}
    want = outputs_and_gradients(exact, cotangents, rule="delta", form="recurrent")
    got = outputs_and_gradients(arrays, [np.float32(x) for x in cotangents], rule="delta", chunk_size=chunk_size)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        tolerance = 3e-3 if (beta, kind) == ("2", "equal") else 1e-3
        chex.assert_trees_all_close(np.float64(x), np.float64(y), rtol=0, atol=tolerance * np.max(np.abs(y)))


EXTREMES = [("sum", "recurrent"), ("sum", "chunkwise"), ("delta", "recurrent"), ("delta", "chunkwise")]
EXTREMES += [("delta", "parallel"), ("fwm", "recurrent"), ("fwm", "chunkwise")]


@functools.cache
def loss_and_gradients(rule, form):
    def loss(arrays):
        out, fast_weights, _ = attend(arrays, rule=rule, form=form)
        return jnp.sum(out**2) + jnp.sum(fast_weights**2), out

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


def float32_inputs(**kwargs):
    return {name: jnp.asarray(x, jnp.float32) for name, x in random_inputs(Case(**kwargs)).items() if x is not None}


@pytest.mark.parametrize(("rule", "form"), EXTREMES)
def test_strong_decays_neither_overflow_nor_leak(rule, form):
    """exp(50·t) is not a float32; each token must read what itself wrote, to exp(−50)."""
    arrays = float32_inputs(rule=rule, length=20)
    arrays["log_decay"] = jnp.full(arrays["beta"].shape, -50.0)
    (loss, out), gradients = loss_and_gradients(rule, form)(arrays)
    chex.assert_tree_all_finite((loss, out, gradients))
    if rule != "fwm":
        own = jnp.sum(arrays["query"] * arrays["key"], -1) * arrays["beta"]
        chex.assert_trees_all_close(out, own[..., None] * arrays["value"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("strong", [-1e2, -1e4, -1e9])
@pytest.mark.parametrize("rule", RULES)
def test_mild_decays_after_a_strong_one_keep_their_digits(rule, strong):
    arrays = float32_inputs(rule=rule, length=20)
    arrays["log_decay"] = jnp.full(arrays["beta"].shape, -0.3).at[:, 3].set(strong)
    results = [loss_and_gradients(rule, form)(arrays) for form in ("recurrent", "chunkwise")]
    chex.assert_trees_all_close(*results, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("decay", ["head", "channel"])
@pytest.mark.parametrize("strong", [-41.0, -1e4])
def test_mild_decays_between_many_strong_ones_keep_their_digits(decay, strong):
    """What forgets all is not in the cumulative sum, which would else be of 32 times its size."""
    arrays = float32_inputs(length=64, decay=decay)
    strong_ones = np.random.default_rng(0).random(arrays["log_decay"].shape) < 0.5
    arrays["log_decay"] = jnp.where(strong_ones, strong, -0.05)
    want, *_ = compiled_attend(form="recurrent")(arrays)
    got, *_ = compiled_attend(form="chunkwise", chunk_size=64)(arrays)
    chex.assert_trees_all_close(got, want, rtol=0, atol=2e-6 * float(jnp.max(jnp.abs(want))))


@pytest.mark.parametrize("form", ["recurrent", "chunkwise", "parallel"])
@pytest.mark.parametrize("decay", ["head", "channel"])
def test_strong_decays_that_are_not_yet_nothing_keep_all_digits(decay, form):
    """exp(−17) to exp(−40): what is left is below the rounding of what is written next, and not of what is read."""
    arrays = random_inputs(Case(length=130, decay=decay))
    rng = np.random.default_rng(0)
    shape = arrays["log_decay"].shape
    arrays["log_decay"] = np.where(rng.random(shape) < 0.15, rng.uniform(-40, -17, shape), arrays["log_decay"])
    arrays = {name: np.float32(x) for name, x in arrays.items() if x is not None}
    exact = {name: np.float64(x) for name, x in arrays.items()}
    want, fast_weights, _ = reference.batched(reference.attention, exact, rule="delta")
    got, got_fast_weights, _ = compiled_attend(rule="delta", form=form)(arrays)
    chex.assert_trees_all_close(np.float64(got), want, rtol=0, atol=1e-6 * np.abs(want).max())
    chex.assert_trees_all_close(np.float64(got_fast_weights), fast_weights, rtol=0, atol=1e-6)


@functools.cache
def gradients_and_retrieved(form, eps):
    """Compiled once for all strengths of the decay."""
    options = {"implementation": "pallas"} if form == "pallas" else {"form": form}

    def call(moved, inputs):
        out, *_ = attend(inputs | moved, normalize="retrieval", eps=eps, **options)
        return jnp.sum(out), out

    return jax.jit(jax.grad(call, has_aux=True))


@pytest.mark.parametrize("form", some(2, ["chunkwise", "recurrent", "pallas", "parallel"]))
@pytest.mark.parametrize("eps", [1e-6, 0.0])
@pytest.mark.parametrize("strong", [-30.0, -41.0, -60.0, -80.0, -90.0, -600.0, -1e4])
def test_retrieval_divides_what_has_decayed_by_what_has_decayed(strong, eps, form):
    """Keys of three features, some of them written twice, after one strong decay: as float64 has it.

    With eps = 0 and below exp(−87) float32 has nothing left to divide, and takes what float64 takes below exp(−745).
    """
    keys = np.eye(3)[[0, 1, 0, 0, 2, 1]]
    value = np.random.default_rng(0).normal(size=(6, 2))
    log_decay = np.where(np.arange(6) == 2, strong, -0.1)
    arrays = {"query": keys, "key": keys, "value": value, "beta": np.full(6, 0.7), "log_decay": log_decay}
    expected = dict(arrays)
    if eps == 0 and strong < -87:
        expected["log_decay"] = np.where(log_decay < -87, -1e4, log_decay)
    with np.errstate(under="ignore"):
        want, _, _ = reference.attention(**expected, rule="delta", normalize="retrieval", eps=eps)
    if eps == 0:  # the last token reads what only the strong decay left
        want[5] = np.where(np.isfinite(want[5]), want[5], 0)

    inputs = {name: jnp.asarray(x, jnp.float32)[None, :, None] for name, x in arrays.items()}
    moved = {name: inputs.pop(name) for name in ("value", "log_decay")}
    gradients, out = gradients_and_retrieved(form, eps)(moved, inputs)
    chex.assert_trees_all_close(np.float64(out[0, :, 0]), want, rtol=1e-5, atol=1e-6)
    chex.assert_tree_all_finite(gradients)


@pytest.mark.slow
def test_clips_keep_their_digits_where_keys_are_short_and_values_long():
    """The norm grows by eᵀ(2m + β‖k‖²e), which for m ≪ v is a small difference of vᵀe and ‖e‖²."""
    arrays = float32_inputs(rule="fwm", length=100)
    arrays |= {"key": 0.003 * arrays["key"], "value": 100 * arrays["value"]}
    (_, want), wants = loss_and_gradients("fwm", "recurrent")(arrays)
    (_, got), gots = loss_and_gradients("fwm", "chunkwise")(arrays)
    chex.assert_trees_all_close(got, want, rtol=0, atol=1e-5 * float(jnp.abs(want).max()))
    for name in gots:
        chex.assert_trees_all_close(gots[name], wants[name], rtol=0, atol=2e-5 * float(jnp.abs(wants[name]).max()))


def test_a_norm_of_exactly_one_has_the_same_gradient_in_both_forms():
    one = jnp.eye(2)[None, :1, None]  # the first write makes ‖W‖ = 1

    def loss(value, form):
        arguments = (one, one, value, jnp.ones((1, 1, 1)))
        return jnp.sum(jnp.sin(fwt_jax.fast_weight_attention(*arguments, rule="fwm", form=form)[0]))

    gradients = [jax.grad(loss)(one, form) for form in ("recurrent", "chunkwise")]
    chex.assert_trees_all_close(*gradients, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("size", [1.0, 64.0, 1600.0])
def test_long_keys_do_not_overflow_between_the_clips_of_fwm(size):
    """β‖k‖² of many hundreds: what is not clipped grows so much with every token, and must not be kept that way."""
    arrays = float32_inputs(rule="fwm", length=20)
    arrays["key"] = arrays["key"] * (size / jnp.sum(jnp.square(arrays["key"]), -1, keepdims=True)) ** 0.5
    (_, want), wants = loss_and_gradients("fwm", "recurrent")(arrays)
    (_, got), gots = loss_and_gradients("fwm", "chunkwise")(arrays)
    chex.assert_tree_all_finite((want, wants))
    chex.assert_trees_all_close(got, want, rtol=0, atol=1e-5 * float(jnp.abs(want).max()))
    for name in gots:  # beside float64, the gradients of both forms are wrong by up to 2e-4 for the longest keys
        chex.assert_trees_all_close(gots[name], wants[name], rtol=0, atol=4e-4 * float(jnp.abs(wants[name]).max()))


@pytest.mark.parametrize(("rule", "form"), EXTREMES)
@pytest.mark.parametrize("what", ["key", "value", "query", "beta"])
def test_zeros_have_finite_gradients(what, rule, form):
    """Zero keys and values and an empty memory, which is where norms and square roots have none."""
    arrays = float32_inputs(rule=rule, length=20)
    arrays[what] = jnp.zeros_like(arrays[what])
    arrays["log_decay"] = jnp.full(arrays["beta"].shape, -0.1)
    chex.assert_tree_all_finite(loss_and_gradients(rule, form)(arrays))


@pytest.mark.parametrize("form", ["recurrent", "chunkwise", "parallel"])
def test_nothing_is_retrieved_before_the_first_key_nor_by_a_zero_key(form):
    """Eq. 27 with v̄_1 = 0: without a mass to divide by, the write is that of the plain rule. Gradients are finite."""
    arrays = float32_inputs(normalize="retrieval", length=6)
    arrays["key"] = arrays["key"].at[:, 3].set(0)

    def loss(arrays):
        out, _, _ = attend(arrays, rule="delta", normalize="retrieval", form=form)
        return jnp.sum(out**2), out

    (_, out), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(arrays)
    chex.assert_tree_all_finite((out, gradients))
    mass = jnp.sum(arrays["key"][:, 0] * arrays["query"][:, 0], -1, keepdims=True)
    first = arrays["beta"][:, 0, :, None] * arrays["value"][:, 0] * mass / (mass + 1e-6)
    chex.assert_trees_all_close(out[:, 0], first, rtol=1e-5)


# --- what a gradient keeps -------------------------------------------------------------------------------------------

LENGTH, SIZE = 1024, 32


def long_inputs():
    shape = (1, LENGTH, 1)
    return {name: jnp.zeros((*shape, SIZE)) for name in ("query", "key", "value")} | {"beta": jnp.zeros(shape)}


def gradient_at_length(rule, form):
    def loss(arrays):
        out, memory = fwt_jax.fast_weight_attention(**arrays, rule=rule, form=form)
        return jnp.sum(out**2) + jnp.sum(memory.fast_weights**2)

    return jax.jit(jax.grad(loss))


@pytest.mark.parametrize("form", ["recurrent", "chunkwise"])
@pytest.mark.parametrize("rule", RULES)
def test_a_gradient_keeps_the_inputs_and_the_memory_at_the_start_of_each_chunk(rule, form):
    """√T memories, or T/32 (for fwm as much again for e and for all [C, C] matrices of clips), and a mask."""
    kept = 32 + 32 + 32 if (rule, form) == ("fwm", "chunkwise") else 32
    chunk = {"chunk_size": 32} if form == "chunkwise" else {}
    attention = functools.partial(fwt_jax.fast_weight_attention, rule=rule, form=form, **chunk)
    residuals = jax.eval_shape(lambda arrays: jax.vjp(lambda arrays: attention(**arrays), arrays)[1], long_inputs())
    inputs = sum(x.size for x in long_inputs().values())
    assert sum(x.size for x in jax.tree.leaves(residuals)) <= 1.02 * (inputs + kept * SIZE * SIZE + 64 * 64)


def test_the_clips_of_fwm_are_found_once_and_not_again_for_the_gradient():
    jaxpr = str(gradient_at_length("fwm", "chunkwise").trace(long_inputs()).jaxpr)
    assert jaxpr.count("rsqrt") == 1  # one for each clip, and nowhere else


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("rule", "form"), [*EXTREMES, ("sum", "parallel")])
def test_products_of_float32_are_exact_on_all_hardware_and_those_of_bfloat16_are_fast(rule, form, dtype):
    """The solve of the delta rule, the clips of fwm and single steps are exact in any case."""
    inputs = jax.tree.map(lambda x: x.astype(dtype), float32_inputs(rule=rule, length=64, decay="head"))
    gradient = jax.jit(jax.grad(lambda arrays: jnp.sum(attend(arrays, rule=rule, form=form)[0])))
    products = re.findall(r"stablehlo.dot_general.*", gradient.lower(inputs).as_text())
    exact = ["precision = [HIGHEST, HIGHEST]" in product for product in products]
    if dtype == "float32" or form == "recurrent":
        assert len(exact) >= 2 and all(exact)
    else:
        assert exact.count(False) >= 5 and (exact.count(True) >= 6) == (rule != "sum")


@pytest.mark.parametrize("form", ["recurrent", "chunkwise"])
@pytest.mark.parametrize("rule", RULES)
def test_no_array_of_a_gradient_holds_a_memory_per_token(rule, form):
    jaxpr = str(gradient_at_length(rule, form).trace(long_inputs()).jaxpr)
    shapes = set(re.findall(r"\bf32\[([\d,]+)\]", jaxpr))
    sizes = [np.prod([int(size) for size in shape.split(",")]) for shape in shapes]
    assert max(sizes) >= LENGTH * SIZE  # the inputs themselves: the pattern still finds shapes
    assert max(sizes) <= LENGTH * SIZE * SIZE / 8


@pytest.mark.exhaustive
def test_a_gradient_through_131072_tokens_fits_in_two_gibibytes_and_grows_linearly():
    """Of four heads with K = V = 64: the inputs are 0.4 GiB."""

    def temporary(length):
        tokens = jax.ShapeDtypeStruct((1, length, 4, 64), jnp.float32)
        arrays = dict.fromkeys(("query", "key", "value"), tokens)
        arrays["beta"] = jax.ShapeDtypeStruct((1, length, 4), jnp.float32)
        return (
            gradient_at_length("delta", "chunkwise")
            .lower(arrays)
            .compile(AS_USERS)
            .memory_analysis()
            .temp_size_in_bytes
        )

    assert temporary(8192) < temporary(131_072) < min(2**31, 16.5 * temporary(8192))


@pytest.mark.slow
def test_two_gradients_in_one_program_finish():
    """Two triangular solves of XLA would dead-lock its thread pool on two cores (jaxlib 0.10)."""
    inputs = float32_inputs(length=300)
    gradient = gradient_at_length("delta", "chunkwise")
    both = jax.jit(lambda a, b: (gradient(a), gradient(b)))
    for _ in range(3):
        first, second = both(inputs, jax.tree.map(lambda x: x / 2, inputs))
    chex.assert_trees_all_close(first, gradient(inputs), rtol=1e-5, atol=1e-5)
    chex.assert_tree_all_finite(second)


@pytest.mark.parametrize("rule", RULES)
def test_the_recurrent_gradient_needs_far_less_than_a_memory_per_token(rule):
    """About 2√T = 64 of them, and some copies of the inputs, each of which is worth 32 memories."""
    temporary = (
        gradient_at_length(rule, "recurrent")
        .lower(long_inputs())
        .compile(AS_USERS)
        .memory_analysis()
        .temp_size_in_bytes
    )
    per_memory = SIZE * SIZE * 4
    assert 0 < temporary < LENGTH * per_memory / 3
