"""Rows that are padded behind: what ``cases`` does not ask, where every form of every rule meets padded rows."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import Case, attend, random_inputs, some
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import fwt_jax
from fwt_jax.rules import RULES, Rule

LENGTH, LENGTHS = 9, np.array([6, 0])
TOKENS = ("query", "key", "value", "beta", "log_decay")


def leaky_step(fast_weights, key, value, beta, decay=None):
    """A rule outside of the library, that forgets even where nothing is written."""
    return 0.9 * fast_weights + beta * jnp.outer(key, value)


leaky = Rule(leaky_step)


def inputs(normalize=False, dtype=np.float32):
    arrays = random_inputs(Case(normalize=normalize, decay="head", length=LENGTH, start=True))
    return {name: jnp.asarray(x, dtype) for name, x in arrays.items()}


def padded_with(arrays, filler):
    padding = np.arange(LENGTH)[None] >= LENGTHS[:, None]
    mask = {name: np.expand_dims(padding, tuple(range(2, arrays[name].ndim))) for name in TOKENS}
    return arrays | {name: jnp.where(mask[name], filler, arrays[name]) for name in TOKENS}


@pytest.mark.parametrize("rule", [*RULES, leaky], ids=[*RULES, "leaky"])
def test_token_by_token_a_padded_row_is_bit_for_bit_the_row_cut_at_its_length(rule):
    arrays = inputs()
    run = jax.jit(functools.partial(attend, rule=rule, form="recurrent"))
    y, *memory = run(arrays | {"lengths": LENGTHS})
    cut_y, *cut = run({name: x[:, : LENGTHS[0]] if name in TOKENS else x for name, x in arrays.items()})
    chex.assert_trees_all_equal(y[0, : LENGTHS[0]], cut_y[0])
    chex.assert_trees_all_equal([x[0] for x in memory], [x[0] for x in cut])
    chex.assert_trees_all_equal([x[1] for x in memory], [arrays[name][1] for name in ("fast_weights", "key_sum")])


FORMS = [
    {"rule": "delta", "form": "chunkwise", "chunk_size": 4, "normalize": "retrieval", "eps": 0.0},
    {"rule": "delta", "implementation": "pallas", "normalize": "read"},
    {"rule": "fwm", "form": "recurrent"},
    {"rule": leaky, "form": "chunkwise", "chunk_size": 4},
    {"rule": "fwm", "form": "chunkwise", "chunk_size": 4},
    {"rule": "delta", "form": "recurrent", "normalize": "retrieval"},
    {"rule": "sum", "form": "parallel", "normalize": "read", "eps": 0.0},
    {"rule": "delta", "implementation": "triton"},
]


@pytest.mark.slow
# A rule that is no name has an address in its text, which differs between the processes of pytest-xdist.
@pytest.mark.parametrize(
    "options", some(3, FORMS), ids=lambda options: str(options | {"rule": str(options["rule"])[:5]})
)
def test_what_padding_holds_reaches_no_output_and_no_gradient(options):
    if options.get("implementation") == "triton":
        pytest.importorskip("jax_triton")
    arrays = inputs(options.get("normalize", False))

    def run(arrays):
        def loss(arrays):
            outputs = attend(arrays, lengths=jnp.asarray(LENGTHS), segment_ids=ids, **options)
            return sum(jnp.sum(jnp.sin(x)) for x in outputs), outputs

        ids = jnp.asarray(np.arange(LENGTH)[None] >= LENGTHS[:, None], jnp.int32)  # padding of another document
        return jax.grad(loss, has_aux=True)(arrays)

    results = [jax.jit(run)(padded_with(arrays, filler)) for filler in (0.0, np.nan)]
    chex.assert_trees_all_equal(*results)
    gradients, (y, *_) = results[0]
    chex.assert_tree_all_finite(gradients)
    chex.assert_trees_all_equal(y, padded_with({name: y for name in TOKENS}, 0.0)["query"])
    chex.assert_trees_all_equal(gradients, padded_with(gradients, 0.0))


@pytest.mark.slow
def test_lengths_may_be_traced_mapped_and_sharded():
    """A traced length outside of the range counts as 0 or T."""
    arrays, lengths = inputs("read"), jnp.asarray(LENGTHS)
    options = {"chunk_size": 4, "normalize": "read"}

    def run(arrays, lengths):
        return attend(arrays, lengths=lengths, **options)

    want = jax.jit(run)(arrays, lengths)
    one = jax.tree.map(lambda x: x[:, None], (arrays, lengths))
    mapped = jax.tree.map(lambda x: x[:, 0], jax.jit(jax.vmap(run))(*one))
    mesh = jax.make_mesh((2,), ("batch",), (AxisType.Auto,), devices=jax.devices()[:2])
    shards = jax.shard_map(run, mesh=mesh, in_specs=P("batch"), out_specs=P("batch"))
    sharded = jax.jit(shards)(arrays, lengths)
    chex.assert_trees_all_close(mapped, want, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(sharded, want, rtol=1e-5, atol=1e-6)
    outside, inside = (jax.jit(run)(arrays, jnp.array(x)) for x in ([LENGTH + 5, -3], [LENGTH, 0]))
    chex.assert_trees_all_equal(outside, inside)


def test_a_row_without_a_token_waits():
    """In a batch of streams, as a server has: a token for one row, none for the other."""
    arrays = inputs()
    token = {name: x[:, :1] if name in TOKENS else x for name, x in arrays.items()}
    y, fast_weights, _ = attend(token, lengths=np.array([0, 1]))
    want_y, want, _ = attend(token)
    chex.assert_trees_all_equal(fast_weights, jnp.stack([arrays["fast_weights"][0], want[1]]))
    chex.assert_trees_all_equal(y, jnp.stack([jnp.zeros_like(y[0]), want_y[1]]))
    assert fwt_jax.fast_weight_attention(*[token[name] for name in TOKENS], lengths=[0, 1])[0].shape == y.shape
