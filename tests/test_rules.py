"""A rule is a step and a row: a user's own rule, the table, and combinations that have names of their own."""

import ast
import functools
import pathlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import fwt_jax
from fwt_jax.models import DecoderLM, ModelConfig
from fwt_jax.rules import RULES, Rule, find_rule, linear

B, T, H, K, V = 2, 13, 3, 4, 5
FORMS = [{}, {"form": "recurrent"}, {"form": "chunkwise"}, {"form": "chunkwise", "chunk_size": 5}, {"chunk_size": 4}]


def leaky_step(fast_weights, key, value, beta, decay=None):
    """A rule outside of the library: bounded errors, and a leak that is there without a decay, too."""
    if decay is not None:
        fast_weights = jnp.reshape(decay, (-1, 1)) * fast_weights
    error = jnp.tanh(value - key @ fast_weights)
    return 0.9 * fast_weights + beta * jnp.outer(key, error)


LEAKY = Rule(leaky_step)


def random_inputs(decay=None):
    rng = np.random.default_rng(0)
    arrays = {name: rng.normal(size=(B, T, H, size)) for name, size in (("query", K), ("key", K), ("value", V))}
    arrays["beta"] = rng.uniform(0.1, 0.9, (B, T, H))
    if decay:
        arrays["log_decay"] = -rng.exponential(0.3, {"head": (B, T, H), "channel": (B, T, H, K)}[decay])
    memory = fwt_jax.Memory(jnp.asarray(rng.normal(size=(B, H, K, V))), jnp.zeros((B, H, K)))
    return jax.tree.map(jnp.asarray, arrays), memory


def loop(arrays, fast_weights, ids=None):
    """The rule, token by token, in NumPy."""
    arrays = jax.tree.map(np.float64, arrays)
    reads, end = np.zeros((B, T, H, V)), np.zeros((B, H, K, V))
    for b in range(B):
        for h in range(H):
            W = np.float64(fast_weights[b, h])
            for t in range(T):
                if ids is not None and t > 0 and ids[b, t] != ids[b, t - 1]:
                    W = 0 * W
                if "log_decay" in arrays:
                    W = np.exp(arrays["log_decay"][b, t, h]).reshape(-1, 1) * W
                key = arrays["key"][b, t, h]
                error = np.tanh(arrays["value"][b, t, h] - key @ W)
                W = 0.9 * W + arrays["beta"][b, t, h] * np.outer(key, error)
                reads[b, t, h] = arrays["query"][b, t, h] @ W
            end[b, h] = W
    return reads, end


@pytest.mark.parametrize("options", FORMS, ids=str)
@pytest.mark.parametrize("decay", [None, "head", "channel"])
def test_a_rule_of_ones_own_works_chunk_by_chunk_and_token_by_token_with_decays_and_documents(options, decay, x64):
    arrays, memory = random_inputs(decay)
    ids = np.stack([np.arange(T) >= 6, np.arange(T) >= 9]).astype(int)
    for segment_ids in (None, ids):
        y, after = fwt_jax.fast_weight_attention(
            **arrays, rule=LEAKY, memory=memory, segment_ids=segment_ids, **options
        )
        chex.assert_trees_all_close((y, after.fast_weights), loop(arrays, memory.fast_weights, segment_ids), rtol=1e-10)


@pytest.mark.parametrize("options", FORMS, ids=str)
def test_a_rule_of_ones_own_has_a_gradient_in_every_form(options, x64):
    arrays, memory = random_inputs()
    rng = np.random.default_rng(1)
    direction = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape)), arrays)
    weights = rng.normal(size=(B, T, H, V))

    def loss(arrays):
        return jnp.sum(weights * fwt_jax.fast_weight_attention(**arrays, rule=LEAKY, memory=memory, **options)[0])

    gradient = jax.grad(loss)(arrays)
    got = sum(jnp.sum(gradient[name] * direction[name]) for name in arrays)

    def loss_of_the_loop(step):
        moved = {name: x + step * direction[name] for name, x in arrays.items()}
        return np.sum(weights * loop(moved, memory.fast_weights)[0])

    np.testing.assert_allclose(got, (loss_of_the_loop(1e-5) - loss_of_the_loop(-1e-5)) / 2e-5, rtol=1e-6)


@pytest.mark.slow
def test_a_rule_of_ones_own_streams_in_a_layer_and_in_a_model():
    layer = fwt_jax.FastWeightAttention(8, num_heads=2, head_size=4, rule=LEAKY, rngs=nnx.Rngs(0))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 7, 8)), jnp.float32)
    whole, memory = layer(x)
    first, between = layer(x[:, :3])
    rest, after = layer(x[:, 3:], between)
    chex.assert_trees_all_close(jnp.concatenate([first, rest], 1), whole, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(after, memory, rtol=1e-5, atol=1e-6)

    sizes = {"vocab_size": 11, "num_layers": 1, "d_model": 8, "d_ff": 8, "num_heads": 2, "head_size": 4}
    model = DecoderLM(ModelConfig(**sizes, rule=LEAKY, positions=None, dropout=0.0, remat=True), rngs=nnx.Rngs(0))
    tokens = jnp.arange(12, dtype=jnp.int32).reshape(2, 6) % 11
    read = nnx.jit(lambda model, *inputs: model(*inputs))
    logits, _ = read(model, tokens)
    start, memory = read(model, tokens[:, :4])
    end, _ = read(model, tokens[:, 4:], memory)
    chex.assert_trees_all_close(jnp.concatenate([start, end], 1), logits, rtol=1e-4, atol=1e-5)
    gradient = nnx.jit(nnx.grad(lambda model: jnp.mean(model.losses(tokens, tokens)[0])))(model)
    assert all(jnp.any(x != 0) for x in jax.tree.leaves(gradient["blocks"]))


REFUSED = {
    "a parallel form": ({"form": "parallel"}, "rule leaky_step has no parallel form"),
    "a normalisation": ({"normalize": "read"}, "rule leaky_step has no attention normalisation 'read'"),
    "no beta": ({"beta": None}, "rule leaky_step needs beta"),
    "a kernel": ({"implementation": "pallas"}, "has no rule leaky_step"),
    "a step that is no rule": ({"rule": leaky_step}, r"a Rule of your own, as Rule\(step\), got <function leaky_step"),
    "an unknown name": ({"rule": "dleta"}, "rule must be one of 'sum', 'delta', .*, got 'dleta'"),
}


@pytest.mark.parametrize(("change", "message"), REFUSED.values(), ids=REFUSED)
def test_what_a_rule_of_ones_own_cannot_do_is_refused(change, message):
    arrays = jax.tree.map(lambda x: x.astype(jnp.float32), random_inputs()[0])
    with pytest.raises(ValueError, match=message):
        fwt_jax.fast_weight_attention(**{"rule": LEAKY, **arrays, **change})


def test_weights_of_a_read_are_of_rules_that_are_linear_in_the_values():
    with pytest.raises(ValueError, match="whose reads are linear in the values, got leaky_step"):
        fwt_jax.read_weights(jnp.ones(3), jnp.ones((2, 3)), jnp.ones(2), rule=LEAKY)


def test_the_table_names_what_it_holds():
    for name, rule in RULES.items():
        assert find_rule(name) is rule and find_rule(rule) is rule
        assert rule.normalize[0] is False and (rule.corrects is not None or rule.normalize == (False,))


def test_delta_product_is_the_delta_rule_with_several_writes_for_each_read(x64):
    """DeltaProduct (Siems et al. 2025), as the head of rules.py has it: n writes, then one read per token."""
    n = 3
    rng = np.random.default_rng(0)
    query, key, value = (rng.normal(size=(B, T, *writes, H, size)) for writes, size in (((), K), ((n,), K), ((n,), V)))
    key /= np.linalg.norm(key, axis=-1, keepdims=True)
    beta, log_decay = rng.uniform(0, 2, (B, T, n, H)), -rng.exponential(0.2, (B, T, H))

    def each_write(x):  # [B, T, n, ...] -> [B, n·T, ...]
        return x.reshape(B, T * n, *x.shape[3:])

    decays = np.zeros((B, T, n, H))
    decays[:, :, 0] = log_decay  # a token decays the memory once
    y, memory = fwt_jax.fast_weight_attention(
        each_write(np.repeat(query[:, :, None], n, axis=2)),
        each_write(key),
        each_write(value),
        each_write(beta),
        each_write(decays),
    )
    y = y[:, n - 1 :: n]

    for b in range(B):
        for h in range(H):
            W = np.zeros((K, V))
            for t in range(T):
                W = np.exp(log_decay[b, t, h]) * W
                for i in range(n):
                    k = key[b, t, i, h]
                    W = W + beta[b, t, i, h] * np.outer(k, value[b, t, i, h] - W.T @ k)
                np.testing.assert_allclose(y[b, t, h], W.T @ query[b, t, h], rtol=1e-9, atol=1e-11)
            np.testing.assert_allclose(memory.fast_weights[b, h], W, rtol=1e-9, atol=1e-11)


def test_a_learned_number_in_a_step_is_refused_for_it_would_have_no_gradient():
    arrays, _ = random_inputs()

    def loss(scale, **options):
        def step(fast_weights, key, value, beta, decay=None):
            return fast_weights + beta * jnp.outer(key, scale * value)

        return jnp.sum(fwt_jax.fast_weight_attention(**arrays, rule=Rule(step), **options)[0])

    assert loss(1.0) == pytest.approx(float(loss(jnp.ones(()))), rel=1e-5)  # arrays that are known are constants
    for options in FORMS:
        gradient = jax.grad(functools.partial(loss, **options))
        for transformed in (gradient, jax.jit(gradient)):
            with pytest.raises(ValueError, match=r"closes over a traced array, and would have no gradient"):
                transformed(1.0)


def test_a_row_that_a_caller_adds_to_the_table_is_checked_too(monkeypatch):
    arrays, _ = random_inputs()

    def loss(scale):
        monkeypatch.setitem(RULES, "own", Rule(lambda W, key, value, beta, decay: W + scale * jnp.outer(key, value)))
        return jnp.sum(fwt_jax.fast_weight_attention(**arrays, rule="own", form="recurrent")[0])

    with pytest.raises(ValueError, match="closes over a traced array"):
        jax.jit(jax.grad(loss))(1.0)


@pytest.mark.parametrize("rule", RULES)
def test_a_layer_of_every_rule_is_finite_at_its_defaults(rule):
    layer = fwt_jax.FastWeightAttention(64, num_heads=2, head_size=32, rule=rule, rngs=nnx.Rngs(0))
    y, memory = layer(jnp.asarray(np.random.default_rng(0).normal(size=(2, 300, 64)), jnp.float32))
    assert float(jnp.max(jnp.abs(y))) < 1e3 and bool(jnp.all(jnp.isfinite(memory.fast_weights)))


@pytest.mark.parametrize("name", ["sum", "delta"])
def test_normalisation_of_a_rule_of_ones_own_sums_what_its_row_says(name):
    arrays, _ = random_inputs()
    arrays = jax.tree.map(jnp.abs, arrays)
    row = Rule(RULES[name].step, normalize=(False, "read"), corrects=False if name == "sum" else None)
    own, table = (fwt_jax.fast_weight_attention(**arrays, rule=rule, normalize="read") for rule in (row, name))
    chex.assert_trees_all_close(own, table, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("step", "words"),
    [
        (lambda fast_weights, key, value, beta: fast_weights, "takes 4 positional arguments but 5"),
        (lambda fast_weights, key, value, beta, decay: None, r"returns None for W \[4, 5\]"),
        (lambda fast_weights, key, value, beta, decay: fast_weights.T, r"returns .*\(5, 4\)"),
        (lambda fast_weights, key, value, beta, decay: value @ fast_weights, "cannot be traced with K = 4, V = 5"),
        (lambda fast_weights, key, value, beta, decay: fast_weights.astype(jnp.bfloat16), "returns .*bfloat16"),
        ("leaky", "must be a function, got 'leaky'"),
    ],
)
def test_what_is_no_step_is_refused_in_a_sentence(step, words):
    with pytest.raises(ValueError, match=words):
        fwt_jax.fast_weight_attention(**random_inputs()[0], rule=Rule(step))


@pytest.mark.parametrize(("field", "words"), [({"normalize": False}, "must be a tuple"), ({"start": []}, "hashable")])
def test_what_is_no_row_is_refused_in_a_sentence(field, words):
    with pytest.raises(ValueError, match=words):
        fwt_jax.fast_weight_attention(**random_inputs()[0], rule=LEAKY._replace(**field))


def test_a_chunk_takes_no_decay_per_channel_unless_the_row_says_so():
    rule = Rule(fwt_jax.memory.oja_step, linear(fwt_jax.memory.oja_writes))
    arrays, _ = random_inputs("channel")
    stepped, chosen = (fwt_jax.fast_weight_attention(**arrays, rule=rule, form=form) for form in ("recurrent", None))
    chex.assert_trees_all_equal(stepped, chosen)
    with pytest.raises(ValueError, match="no chunkwise form with a decay per key channel"):
        fwt_jax.fast_weight_attention(**arrays, rule=rule, form="chunkwise")


@pytest.mark.parametrize(
    ("rule", "decay", "length", "picked"),
    [
        ("delta", None, T, "chunkwise"),
        ("oja", "head", T, "chunkwise"),
        ("sum", "channel", 1, "recurrent"),
        ("oja", "channel", T, "recurrent"),
        ("fwm", "channel", T, "recurrent"),
    ],
)
def test_no_form_is_one_program_with_and_without_a_gradient(rule, decay, length, picked):
    arrays, memory = random_inputs(decay)
    arrays = {name: x[:, :length] for name, x in arrays.items()}

    def attend(arrays, form):
        return fwt_jax.fast_weight_attention(**arrays, rule=rule, memory=memory, form=form)

    def value_and_gradient(arrays, form):
        return jax.value_and_grad(lambda arrays: jnp.sum(attend(arrays, form)[0] ** 2))(arrays)

    for function in (attend, value_and_gradient):
        programs = [jax.jit(function, static_argnums=1).lower(arrays, form).as_text() for form in (None, picked)]
        assert programs[0] == programs[1]


def test_products_of_a_step_are_exact_by_default():
    arrays, _ = random_inputs()
    for form in ("recurrent", "chunkwise"):
        text = str(jax.make_jaxpr(lambda form=form: fwt_jax.fast_weight_attention(**arrays, rule=LEAKY, form=form))())
        assert text.count("dot_general[") == text.count("Precision.HIGHEST, Precision.HIGHEST") > 0


def test_only_the_table_knows_the_rules_by_name():
    """So a new rule is a step and a row: nothing in the library compares with a name of the table."""
    comparisons = []
    for path in pathlib.Path(fwt_jax.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Compare | ast.MatchValue):
                names = {constant.value for constant in ast.walk(node) if isinstance(constant, ast.Constant)}
                if not names.isdisjoint(RULES):
                    comparisons.append(f"{path.name}:{node.lineno}: {ast.unparse(node)}")
    assert not comparisons
