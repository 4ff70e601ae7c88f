"""Generation: the numbers of the full forward pass, and what is drawn."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fwt_jax import decode
from fwt_jax.models import DecoderLM, ModelConfig

CONFIG = dict(vocab_size=30, num_layers=2, d_model=16, d_ff=32, num_heads=2, head_size=8, positions=None)


def sharp(**options):
    """A model that is sure of itself, so that its likeliest tokens do not hang on rounding."""
    model = DecoderLM(ModelConfig(**CONFIG | options), rngs=nnx.Rngs(0))
    model.embedding[...] = 50 * model.embedding[...]
    return model


PROMPTS = jnp.asarray(np.random.default_rng(0).integers(0, 30, (3, 9)), jnp.int32)


@pytest.mark.parametrize("options", [{"rule": "softmax"}, {"rule": "delta", "cutoffs": (10, 20)}], ids=str)
def test_the_likeliest_tokens_are_those_of_the_full_forward_pass_whatever_the_prompts_lengths(options):
    model, lengths = sharp(**options), jnp.array([9, 4, 1])
    got = decode.generate(model, PROMPTS, 4, lengths=lengths, temperature=0)
    forward = nnx.jit(lambda model, tokens: jnp.argmax(model(tokens)[0][0, -1]))
    for row, (prompt, length) in enumerate(zip(PROMPTS, lengths, strict=True)):
        tokens = prompt[-int(length) :]
        for token in got[row]:
            assert token == forward(model, tokens[None])
            tokens = jnp.append(tokens, token)


def test_transformer_xl_goes_on_from_its_memory_and_refuses_lengths():
    model = sharp(rule="softmax", positions="relative", memory_length=15)
    got = decode.generate(model, PROMPTS, 4, temperature=0)
    tokens, forward = PROMPTS, nnx.jit(lambda model, tokens: jnp.argmax(model(tokens)[0][:, -1], axis=-1))
    for i in range(4):
        chex.assert_trees_all_equal(got[:, i], forward(model, tokens).astype(jnp.int32))
        tokens = jnp.concatenate([tokens, got[:, i, None]], axis=1)
    with pytest.raises(ValueError, match=r"lengths are not for positions=.relative., .*; take equal prompts"):
        decode.generate(model, PROMPTS, 4, lengths=jnp.array([9, 4, 1]), temperature=0)


@pytest.mark.parametrize("options", [{"rule": "delta"}, {"rule": "softmax", "scan": True}], ids=str)
def test_a_model_that_recomputes_its_blocks_goes_on_as_one_that_does_not(options):
    want, got = (decode.generate(sharp(remat=remat, **options), PROMPTS, 4, temperature=0) for remat in (False, True))
    chex.assert_trees_all_equal(got, want)


def test_tokens_are_drawn_in_proportion_and_by_the_key():
    model = DecoderLM(ModelConfig(**CONFIG), rngs=nnx.Rngs(1))
    model.embedding[...] = 10 * model.embedding[...]
    prompt = jnp.broadcast_to(PROMPTS[:1], (4000, 9))
    first, second = (decode.generate(model, prompt, 2, key=jax.random.key(seed), temperature=2.0) for seed in (0, 1))
    assert jnp.any(first != second)
    chex.assert_trees_all_equal(first, decode.generate(model, prompt, 2, key=jax.random.key(0), temperature=2.0))
    want = jax.nn.softmax(model(PROMPTS[:1])[0][0, -1] / 2)
    share = jnp.bincount(first[:, 0], length=30) / 4000
    assert jnp.max(jnp.abs(share - want)) < 5 * (0.25 / 4000) ** 0.5


def test_filters_keep_the_likeliest():
    scores = jnp.log(jnp.array([0.1, 0.4, 0.2, 0.3]))
    kept = lambda **options: (decode.filtered(scores, **{"top_k": None, "top_p": None} | options) > -jnp.inf).tolist()  # noqa: E731
    assert kept() == [True] * 4
    assert kept(top_k=1) == [False, True, False, False]
    assert kept(top_k=3) == [False, True, True, True]
    assert kept(top_p=0.4) == [False, True, False, False]
    assert kept(top_p=0.41) == [False, True, False, True]
    assert kept(top_p=1.0) == [True] * 4
    assert kept(top_k=2, top_p=0.6) == [False, True, False, True]
    assert kept(top_k=2, top_p=0.5) == [False, True, False, False]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"temperature": -1.0}, "temperature must be at least 0, got -1.0"),
        ({"temperature": 1.0}, "key must be given for a temperature above 0"),
        ({"top_k": 31}, "top_k must be from 1 to 30, got 31"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\], got 0.0"),
        ({"prompts": PROMPTS[:, :0]}, r"prompts must be integers \[B, T\], T ≥ 1, got int32\[3, 0\]"),
        ({"prompts": PROMPTS + 0.5}, r"prompts must be integers .* got float32\[3, 9\]"),
        ({"lengths": jnp.ones(2, int)}, r"lengths must be integers \[3\], got int32\[2\]"),
        ({"lengths": jnp.array([0, 9, 1])}, "lengths must be from 1 to 9, got 0 to 9"),
        ({"lengths": jnp.array([10, 9, 1])}, "lengths must be from 1 to 9, got 1 to 10"),
        ({"prompts": PROMPTS + 30}, "prompts must be from 0 to 29, got 3[0-9] to [0-9]+"),
        ({"prompts": PROMPTS - 30}, "prompts must be from 0 to 29, got -"),
    ],
)
def test_what_cannot_be_generated(options, words):
    model = DecoderLM(ModelConfig(**CONFIG), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=words):
        decode.generate(model, **{"prompts": PROMPTS, "max_new_tokens": 2, "temperature": 0} | options)


def test_positions_that_count_from_the_end_are_refused():
    model = DecoderLM(ModelConfig(**CONFIG | {"positions": "descending"}), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"generate needs a model with positions=None or .relative., got 'descending'"):
        decode.generate(model, PROMPTS, 2, temperature=0)
