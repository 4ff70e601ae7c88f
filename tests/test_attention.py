"""Every form of every rule against the equations and against the numbers of other programs."""

import functools
import itertools
import json
import pathlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from cases import (
    AS_USERS,
    DECAYS,
    FORMS,
    LENGTHS,
    NORMALIZED_RULES,
    Case,
    attend,
    compiled_attend,
    covering_cases,
    every_case,
    outputs_and_gradients,
    pairs,
    random_cotangents,
    random_inputs,
    random_segments,
    row_lengths,
    some,
)

import fwt_jax
from fwt_jax.rules import RULES

GOLDEN = pathlib.Path(__file__).parent / "golden" / "fla"
OUTPUTS = ("y", "fast_weights", "key_sum")


# --- the forms, the rules and the reference --------------------------------------------------------------------------


def reference_outputs(case, arrays):
    segment_ids = random_segments(case.length) if case.packed else None
    options = {"rule": case.rule, "normalize": case.normalize, "segment_ids": segment_ids}
    options["lengths"] = row_lengths(case)
    return reference.batched(reference.attention, arrays, **options)


@functools.cache
def expected(case):
    """Outputs of the reference and, by name, its derivatives along a random direction, one per batch row and head."""
    arrays, cotangents = random_inputs(case), random_cotangents(case)
    outputs = functools.partial(reference_outputs, case)

    def losses(arrays):
        return sum(_per_head(name, x * c) for name, x, c in zip(OUTPUTS, outputs(arrays), cotangents, strict=True))

    directions = _directions(arrays)
    derivatives = {
        name: reference.derivative_along(losses, arrays, name, direction) for name, direction in directions.items()
    }
    return outputs(arrays), derivatives


def _directions(arrays):
    rng = np.random.default_rng(2)
    return {name: rng.normal(size=x.shape) for name, x in arrays.items() if x is not None}


def _per_head(name, x):
    """[B, T, H, ·], or for a memory [B, H, ·], -> [B, H]."""
    heads = 1 if name in ("fast_weights", "key_sum") else 2
    return np.sum(x, axis=tuple(axis for axis in range(1, x.ndim) if axis != heads))


def check_against_reference(case, dtype, rtol, gradient_rtol, output_rtol=None, **options):
    arrays = random_inputs(case)
    rounded = {name: None if x is None else jnp.asarray(x, dtype) for name, x in arrays.items()}
    for name in ("fast_weights", "key_sum"):  # the memory is never kept in less than float32
        rounded[name] = None if arrays[name] is None else jnp.asarray(arrays[name], jnp.promote_types(dtype, "float32"))
    segment_ids = jnp.asarray(random_segments(case.length))[: case.sizes[0]] if case.packed else None
    outputs, gradients = outputs_and_gradients(
        rounded,
        random_cotangents(case),
        segment_ids=segment_ids,
        lengths=row_lengths(case),
        **case.options,
        **options,
    )
    assert outputs[0].dtype == dtype and outputs[1].dtype == outputs[2].dtype == jnp.promote_types(dtype, "float32")
    expected_outputs, expected_derivatives = expected(case)
    for name, got, want in zip(OUTPUTS, outputs, expected_outputs, strict=True):
        assert_relative(name, got, want, (output_rtol or rtol) if name == "y" else rtol)
    directions = _directions(arrays)
    assert set(gradients) == set(expected_derivatives)
    for name, gradient in gradients.items():
        derivative = _per_head(name, np.asarray(gradient, np.float64) * directions[name])
        assert_relative(f"gradient of {name}", derivative, expected_derivatives[name], gradient_rtol)


def assert_relative(name, got, want, rtol):
    """Relative to the largest entry: sums of many terms are no more exact than their largest term."""
    got, scale = np.asarray(got, np.float64), np.max(np.abs(want))
    chex.assert_trees_all_close({name: got}, {name: want}, rtol=0, atol=rtol * (scale + 1e-3))


def test_every_two_choices_meet_in_some_case_of_every_run():
    """Except: a rule without a parallel form does not meet it, and a single token is no second document."""
    contexts = {"length": LENGTHS} | dict.fromkeys(("packed", "start", "padded"), (True, False))
    choices = {"rule": NORMALIZED_RULES, "decay": DECAYS, "form": FORMS} | contexts
    defined = {
        ((first, x), (second, y))
        for first, second in itertools.combinations(choices, 2)
        for x, y in itertools.product(choices[first], choices[second])
    }
    defined -= {(("length", 1), ("packed", True))}
    for name, normalize in NORMALIZED_RULES:
        if not RULES[name].parallel:
            defined -= {(("rule", (name, normalize)), ("form", ("parallel", None)))}
    assert len(covering_cases()) < 1.2 * len(NORMALIZED_RULES) * len(FORMS)
    assert set().union(*map(pairs, covering_cases())) == defined


@pytest.mark.parametrize("case", covering_cases(), ids=str)
def test_every_form_of_every_rule_is_the_reference(case, x64):
    check_against_reference(case, jnp.float64, rtol=1e-9, gradient_rtol=1e-9)


@pytest.mark.exhaustive
@pytest.mark.parametrize("case", list(every_case()), ids=str)
def test_the_full_product_of_forms_rules_and_contexts_is_the_reference(case, x64):
    check_against_reference(case, jnp.float64, rtol=1e-9, gradient_rtol=1e-9)


ROUNDED = [
    Case(*kind, length=100, packed=True, start=True)
    for kind in [
        ("sum", "read", "channel", "recurrent", None),
        ("sum", False, None, "chunkwise", 16),
        ("fwm", False, "head", "chunkwise", None),
        ("delta", False, "head", "chunkwise", None),
        ("delta", "retrieval", None, "chunkwise", 16),
        ("fwm", False, None, "recurrent", None),
        ("delta", False, None, "parallel", None),
    ]
]


@pytest.mark.slow
@pytest.mark.parametrize("case", some(4, ROUNDED), ids=str)
def test_float32_is_the_float64_reference_to_its_own_rounding(case):
    """Tolerances: 2⁻²⁴ per operation, a hundred steps of them, and sums over tokens in the gradients."""
    check_against_reference(case, jnp.float32, rtol=5e-6, gradient_rtol=2e-5)


@pytest.mark.slow
# The cases that are left out have a form, and a normalisation or none, of which another case is rounded alike.
@pytest.mark.parametrize("case", some(3, ROUNDED), ids=str)
def test_bfloat16_loses_no_more_than_the_rounding_of_inputs_and_outputs(case):
    """Tolerances: inputs, outputs and gradients carry 2⁻⁹ = 0.2 % each; what lies between is float32."""
    check_against_reference(case, jnp.bfloat16, rtol=3e-2, gradient_rtol=6e-2)


# As users compile and at their sizes, where XLA fuses what it does not in small programs.
LARGE = [
    Case(rule, False, decay, form, chunk_size, length=128, sizes=(1, 3, 64, 48))
    for rule, decay in itertools.product(RULES, DECAYS)
    for form, chunk_size in [("recurrent", None), ("parallel", None), ("chunkwise", 64), ("chunkwise", None)]
]
LARGE = [case for case in LARGE if case.defined and (case.chunk_size or case.form != "chunkwise" or not case.decay)]
LARGE += [
    Case("sum", "read", "channel", "parallel", length=128, sizes=(1, 3, 64, 48)),
    Case("sum", False, "channel", "chunkwise", 128, length=128, sizes=(1, 3, 64, 48)),
    Case("delta", "retrieval", "channel", "chunkwise", 128, length=128, packed=True, start=True, sizes=(1, 3, 64, 48)),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    some(8, [case for case in reversed(LARGE) if case.decay])
    + [pytest.param(case, marks=pytest.mark.exhaustive) for case in LARGE if not case.decay],
    ids=str,
)
def test_large_jitted_programs_are_the_float64_reference(case):
    """Without derivatives. Tolerance: see above."""
    arrays = {name: jnp.asarray(x, jnp.float32) for name, x in random_inputs(case).items() if x is not None}
    segment_ids = jnp.asarray(random_segments(case.length))[: case.sizes[0]] if case.packed else None
    attention = functools.partial(attend, segment_ids=segment_ids, **case.options)
    outputs = jax.jit(attention, compiler_options=AS_USERS)(arrays)
    for name, got, want in zip(OUTPUTS, outputs, reference_outputs(case, random_inputs(case)), strict=True):
        assert_relative(name, got, want, 5e-6)


@pytest.mark.slow  # not exhaustive: delta in chunks, and fwm token by token with a decay
@pytest.mark.parametrize("case", some(18, [*LARGE[13:], *LARGE[:13]]), ids=str)
def test_large_jitted_gradients_are_the_float64_reference(case):
    check_against_reference(case, jnp.float32, rtol=5e-6, gradient_rtol=2e-5, compiler_options=AS_USERS)


KERNELS = [
    Case(*kind, implementation="pallas")
    for kind in [
        ("sum", False, None, "chunkwise", 16, 100, True, True, True),
        ("sum", "read", "head", "chunkwise", 32, 64, False, False),
        ("delta", False, None, "chunkwise", None, 37, False, True),
        ("delta", False, "head", "chunkwise", None, 150, True, True),
        ("delta", "read", "head", "chunkwise", 16, 100, False, True, True),
        ("delta", "retrieval", None, "chunkwise", 64, 1, False, True),
        ("delta", "retrieval", "head", "chunkwise", 32, 100, True, False),
        ("sum", "read", "channel", "chunkwise", 16, 37, True, True),
        ("delta", "retrieval", "channel", "chunkwise", 32, 50, True, True, True),
    ]
]


@pytest.mark.parametrize("precision", some(2, ["highest", "high"]))
@pytest.mark.parametrize("case", some(6, KERNELS), ids=str)
def test_a_kernel_is_the_float64_reference_to_its_rounding(case, precision):
    """Interpreted. Three passes of bfloat16 carry 2⁻¹⁶ for each product; and see float32 above."""
    rtol, gradient_rtol = (5e-6, 2e-5) if precision == "highest" else (1e-4, 2e-4)
    check_against_reference(case, jnp.float32, rtol, gradient_rtol, precision=precision)


@pytest.mark.slow
@pytest.mark.parametrize("case", some(8, KERNELS), ids=str)
def test_a_kernel_loses_no_more_in_bfloat16_than_inputs_outputs_and_operands(case):
    check_against_reference(case, jnp.bfloat16, rtol=4e-2, gradient_rtol=8e-2)


def test_bfloat16_inputs_are_computed_in_float32():
    """Without the rounding of the inputs themselves what remains is float32, and one rounding of y."""
    case = ROUNDED[3]
    arrays = {name: jnp.asarray(x, jnp.bfloat16) for name, x in random_inputs(case).items() if x is not None}
    exact = {name: x.astype(jnp.float32) for name, x in arrays.items()}
    out, *memory = compiled_attend(**case.options)(arrays)
    exact_out, *exact_memory = compiled_attend(**case.options)(exact)
    chex.assert_trees_all_close(memory, exact_memory, rtol=1e-6, atol=1e-6)
    chex.assert_trees_all_equal(out, exact_out.astype(jnp.bfloat16))


def test_dtypes_of_the_arguments_may_differ():
    """float32 decay and beta beside bfloat16 features are common; y has the dtype of value, the memory float32."""
    arrays = random_inputs(Case(length=4, decay="head"))
    dtypes = {"query": "bfloat16", "key": "bfloat16", "value": "float16", "beta": "float32", "log_decay": "float32"}
    for chunk_size in (None, 3):
        inputs = {name: jnp.asarray(arrays[name], dtype) for name, dtype in dtypes.items()}
        out, fast_weights, _ = attend(inputs, chunk_size=chunk_size)
        assert (out.dtype, fast_weights.dtype) == (jnp.float16, jnp.float32)


@pytest.mark.parametrize("form", ["recurrent", "chunkwise"])
@pytest.mark.parametrize("rule", RULES)
def test_a_memory_may_have_more_digits_than_what_is_written(rule, form, x64):
    arrays = random_inputs(Case(length=4))
    (batch, _, heads, key_size), value_size = arrays["key"].shape, arrays["value"].shape[-1]
    memory = fwt_jax.init_memory(batch, heads, key_size, value_size, jnp.float64)
    inputs = [jnp.asarray(arrays[name], jnp.float32) for name in ("query", "key", "value", "beta")]
    chunk_size = 3 if form == "chunkwise" else None
    out, memory = fwt_jax.fast_weight_attention(*inputs, memory=memory, rule=rule, form=form, chunk_size=chunk_size)
    assert (out.dtype, memory.fast_weights.dtype) == (jnp.float32, jnp.float64)


# --- other people's programs -----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("form", some(4, ["chunkwise", "recurrent", "pallas", "parallel"]))
@pytest.mark.parametrize("golden", some(2, ["gated_delta_rule_base", "delta_rule_base", "linear_attn_sum"]))
def test_numbers_of_flash_linear_attention(golden, form):
    """Outputs, final states and all gradients of flash-linear-attention; it multiplies q by K^-½, we do not."""
    form = {"form": "chunkwise", "implementation": "pallas"} if form == "pallas" else {"form": form}
    rule = "sum" if golden == "linear_attn_sum" else "delta"
    golden = np.load(GOLDEN / f"op_{golden}.npz")
    assert json.loads(str(golden["meta"]))["scale"] == "K**-0.5"
    theirs = {"query": "q", "key": "k", "value": "v", "beta": "beta", "log_decay": "g", "fast_weights": "initial_state"}
    theirs = {ours: name for ours, name in theirs.items() if f"in_{name}" in golden}
    arrays = {ours: golden[f"in_{name}"] for ours, name in theirs.items()}
    scale = arrays["key"].shape[-1] ** -0.5
    arrays["query"] = arrays["query"] * scale
    arrays["key_sum"] = np.zeros(arrays["fast_weights"].shape[:-1], np.float32)
    cotangents = (golden["cot_o"], golden["cot_ht"], np.zeros_like(arrays["key_sum"]))
    (out, fast_weights, _), gradients = outputs_and_gradients(arrays, cotangents, AS_USERS, rule=rule, **form)
    gradients["query"] = gradients["query"] * scale
    assert_relative("y", out, golden["naive_o"], 1e-5)
    assert_relative("fast_weights", fast_weights, golden["naive_ht"], 1e-5)
    for ours, name in theirs.items():
        assert_relative(f"gradient of {ours}", gradients[ours], golden[f"naive_d{name}"], 1e-5)


def test_the_authors_removal_and_replacement_is_the_delta_rule(x64):
    """Eq. 20-23, as the paper derives the rule, against eq. 24 as it is computed."""
    arrays = random_inputs(Case(length=37))
    kept = {name: arrays[name] for name in ("query", "key", "value", "beta")}
    out, fast_weights, _ = compiled_attend(form="recurrent")(kept)
    want = reference.batched(reference.delta_by_replacement, kept)
    chex.assert_trees_all_close((out, fast_weights), want, rtol=1e-11, atol=1e-11)


# --- without causality -----------------------------------------------------------------------------------------------


def cross_inputs(normalize, start, dtype=np.float64):
    """T = 3 queries, S = 11 keys."""
    arrays = random_inputs(Case(normalize=normalize, length=11, start=start))
    arrays = {name: x if x is None else x.astype(dtype) for name, x in arrays.items()}
    memory = fwt_jax.Memory(jnp.asarray(arrays["fast_weights"]), jnp.asarray(arrays["key_sum"])) if start else None
    return arrays["query"][:, :3], arrays["key"], arrays["value"], memory


@pytest.mark.parametrize("normalize", [False, "read"])
@pytest.mark.parametrize("start", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_cross_attention_writes_all_keys_then_reads(normalize, start, masked, x64):
    query, key, value, memory = cross_inputs(normalize, start)
    mask = np.arange(11)[None] < np.array([[11], [4]]) if masked else None
    out, memory = fwt_jax.fast_weight_cross_attention(
        *map(jnp.asarray, (query, key, value)), key_mask=mask, memory=memory, normalize=normalize
    )
    arrays = random_inputs(Case(normalize=normalize, length=11, start=start))
    for b in range(query.shape[0]):
        for h in range(query.shape[2]):
            want = reference.cross_attention(
                query[b, :, h],
                key[b, :, h],
                value[b, :, h],
                None if mask is None else mask[b],
                arrays["fast_weights"][b, h] if start else None,
                arrays["key_sum"][b, h] if start else None,
                normalize=normalize,
            )
            got = (out[b, :, h], memory.fast_weights[b, h], memory.key_sum[b, h])
            chex.assert_trees_all_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("garbage", [np.nan, np.inf, 1e30])
def test_masked_keys_and_values_leak_neither_into_outputs_nor_into_gradients(garbage):
    query, key, value, _ = cross_inputs("read", start=False, dtype=np.float32)
    mask = np.arange(11)[None] < np.array([[9], [4]])

    def loss(key, value):
        out, memory = fwt_jax.fast_weight_cross_attention(
            jnp.asarray(query), key, value, key_mask=jnp.asarray(mask), normalize="read"
        )
        return jnp.sum(out**2) + jnp.sum(memory.fast_weights), (out, memory)

    results = []
    for filler in (0.0, garbage):
        filled = [jnp.where(mask[:, :, None, None], x, filler) for x in (key, value)]
        results.append(jax.grad(loss, (0, 1), has_aux=True)(*filled))
    chex.assert_tree_all_finite(results[1])
    chex.assert_trees_all_equal(*results)


def test_cross_attention_rounds_to_the_dtype_of_value_alone():
    one = jnp.ones((1, 1, 1, 1))
    out, _ = fwt_jax.fast_weight_cross_attention(one.astype(jnp.bfloat16), one, 1.2345678 * one)
    assert out.dtype == jnp.float32 and float(out[0, 0, 0, 0]) == np.float32(1.2345678)


def test_cross_attention_continues_a_memory(x64):
    """Writing in two calls is writing in one, and read gives what the call gave."""
    query, key, value, _ = (x if x is None else jnp.asarray(x) for x in cross_inputs("read", start=False))
    whole = fwt_jax.fast_weight_cross_attention(query, key, value, normalize="read")
    _, memory = fwt_jax.fast_weight_cross_attention(query, key[:, :4], value[:, :4])
    parts = fwt_jax.fast_weight_cross_attention(query, key[:, 4:], value[:, 4:], memory=memory, normalize="read")
    chex.assert_trees_all_close(parts, whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("normalize", [False, "read"])
@pytest.mark.parametrize("length", [1, 6, 7, 100])
def test_cross_attention_gives_what_its_memory_holds_at_every_length(length, normalize, x64):
    """Up to 6 keys and queries of K = 8 and V = 5 take a matrix of scores."""
    arrays = random_inputs(Case(normalize=normalize, length=length))
    query, key, value = (jnp.asarray(arrays[name]) for name in ("query", "key", "value"))

    def call(query, key, value):
        return fwt_jax.fast_weight_cross_attention(query, key, value, normalize=normalize)

    out, memory = call(query, key, value)
    chex.assert_trees_all_close(fwt_jax.read(query, memory, normalize=normalize), out, rtol=1e-11, atol=1e-12)
    scores = f"f64[2,3,{length},{length}]"
    assert (scores in str(jax.make_jaxpr(call)(query, key, value))) == (length <= 6)


@pytest.mark.parametrize("normalize", [False, "read"])
def test_read_is_the_last_read_of_a_causal_call(normalize, x64):
    case = Case(normalize=normalize, length=37, decay="head", start=True)
    arrays = random_inputs(case)
    out, fast_weights, key_sum = compiled_attend(**case.options)(arrays)
    memory = fwt_jax.Memory(fast_weights, key_sum)
    again = fwt_jax.read(jnp.asarray(arrays["query"][:, -1:]), memory, normalize=normalize)
    chex.assert_trees_all_close(again, out[:, -1:], rtol=1e-12, atol=1e-13)


def test_a_query_of_any_length_reads_the_same_with_eps_zero():
    """Features of FAVOR+ may be as small as exp(−60), and the product of two of them is no float32."""
    arrays = random_inputs(Case(normalize="read", length=11))
    query, key, value = (jnp.asarray(arrays[name], jnp.float32) for name in ("query", "key", "value"))
    tiny = float(np.exp(-60))

    def reads(query, key):
        options = {"normalize": "read", "eps": 0.0}
        out, memory = fwt_jax.fast_weight_attention(query, key, value, rule="sum", **options)
        cross, _ = fwt_jax.fast_weight_cross_attention(query, key, value, **options)
        return out, cross, fwt_jax.read(query, memory, **options)

    def gradient(query, key):
        return jax.grad(lambda query: sum(jnp.sum(jnp.sin(x)) for x in reads(query, key)))(query)

    want, want_gradient = jax.jit(reads)(query, key), jax.jit(gradient)(query, key)
    chex.assert_trees_all_close(jax.jit(reads)(tiny * query, tiny * key), want, rtol=1e-5, atol=1e-6)
    got = tiny * jax.jit(gradient)(tiny * query, tiny * key)
    chex.assert_trees_all_close(got, want_gradient, rtol=1e-4, atol=1e-5)


def test_segments_of_large_ids_are_told_apart():
    """2³² is 0 in the 32 bits that JAX keeps of it."""
    arrays = random_inputs(Case(length=6))
    tokens = [jnp.asarray(arrays[name], jnp.float32) for name in ("query", "key", "value", "beta")]
    ids = np.broadcast_to(np.array([0, 0, 2**32, 2**32, 0, 0]), (2, 6))
    out, _ = fwt_jax.fast_weight_attention(*tokens, segment_ids=ids)
    want, _ = fwt_jax.fast_weight_attention(*tokens, segment_ids=ids // 2**32)
    chex.assert_trees_all_equal(out, want)


@pytest.mark.parametrize("form", ["recurrent", "chunkwise", "parallel"])
def test_keys_that_cancel_leave_nothing_to_retrieve(form):
    """z = 0 again after k and −k: eq. 27 has nothing to divide by, as at the first token."""
    keys = np.array([[1.0, 0.0], [-1.0, 0.0], [1.0, 0.0], [0.5, 2.0]])
    arrays = {"query": keys, "key": keys, "value": np.arange(1.0, 5.0)[:, None], "beta": np.ones(4)}
    _, want, _ = reference.attention(**arrays, rule="delta", normalize="retrieval")
    inputs = {name: jnp.asarray(x, jnp.float32)[None, :, None] for name, x in arrays.items()}
    _, got, _ = attend(inputs, normalize="retrieval", form=form)
    chex.assert_trees_all_close(np.float64(got[0, 0]), want, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", some(2, ["float32", "bfloat16"]))
def test_kernels_do_not_mind_that_float64_is_there(dtype):
    """Under jax_enable_x64 a Python integer is an int64 beside the int32 of a kernel."""
    arrays = random_inputs(Case(length=20, decay="head"))
    names = ("query", "key", "value", "beta", "log_decay")
    tokens = [jnp.asarray(arrays[name], dtype) for name in names]

    def loss(*tokens):
        out, _ = fwt_jax.fast_weight_attention(*tokens, implementation="pallas")
        return jnp.sum(jnp.sin(out)), out

    results = []
    for x64 in (False, True):
        with jax.enable_x64(x64):
            results.append(jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3, 4), has_aux=True))(*tokens))
    chex.assert_trees_all_equal(*results)
    chex.assert_trees_all_equal_dtypes(*results)
