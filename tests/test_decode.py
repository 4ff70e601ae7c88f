"""Generation: the numbers of the full forward pass, drawn tokens, filters, and mistakes."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import some
from flax import nnx

from fwt_jax import decode
from fwt_jax.models import DecoderLM, ModelConfig

CONFIG = dict(vocab_size=30, num_layers=1, d_model=16, d_ff=32, num_heads=2, head_size=8, positions=None)


def sharp(**options):
    """A model whose likeliest tokens depend on all earlier ones, because its kernels are large, and not on rounding."""
    model = DecoderLM(ModelConfig(**CONFIG | options), rngs=nnx.Rngs(0))
    for path, parameter in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        if path[-1] in ("kernel", "embedding"):
            parameter[...] = 50 * parameter[...]
    return model


PROMPTS = jnp.asarray(np.random.default_rng(0).integers(0, 30, (3, 9)), jnp.int32)


@nnx.jit
def likeliest(model, tokens):
    """The likeliest token after each, ``[B, T]``, from one pass."""
    return jnp.argmax(model(tokens)[0], axis=-1).astype(jnp.int32)


@pytest.mark.slow
@pytest.mark.parametrize("options", some(2, [{"rule": "delta", "cutoffs": (10, 20)}, {"rule": "softmax"}]), ids=str)
def test_the_likeliest_tokens_are_those_of_the_full_forward_pass_whatever_the_prompts_lengths(options):
    model, lengths = sharp(num_layers=2, **options), jnp.array([9, 4, 1])
    got = decode.generate(model, PROMPTS, 4, lengths=lengths, temperature=0)
    behind = jnp.stack([jnp.roll(prompt, length) for prompt, length in zip(PROMPTS, lengths, strict=True)])
    again = decode.generate(model, behind, 4, lengths=lengths, padding="behind", temperature=0)
    chex.assert_trees_all_equal(again, got)
    assert jnp.any(got != jnp.concatenate([PROMPTS[:, -1:], got[:, :-1]], axis=1))  # else no memory would be needed
    for prompt, length, generated in zip(PROMPTS, lengths.tolist(), got, strict=True):
        tokens = jnp.concatenate([prompt[-length:], generated, prompt[length:]])  # the last ones change no earlier one
        chex.assert_trees_all_equal(likeliest(model, tokens[None])[0, length - 1 : length + 3], generated)


def test_transformer_xl_goes_on_from_its_memory_and_refuses_lengths():
    model = sharp(rule="softmax", positions="relative", memory_length=15)
    got = decode.generate(model, PROMPTS, 4, temperature=0)
    tokens = jnp.concatenate([PROMPTS, got], axis=1)
    chex.assert_trees_all_equal(likeliest(model, tokens)[:, 8:-1], got)
    with pytest.raises(ValueError, match=r"lengths are not for positions=.relative., .*; take prompts of one length"):
        decode.generate(model, PROMPTS, 4, lengths=jnp.array([9, 4, 1]), temperature=0)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"rule": "delta"}, {"rule": "softmax", "num_layers": 2, "scan": True}], ids=str)
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
    want = nnx.jit(lambda model: jax.nn.softmax(model(PROMPTS[:1])[0][0, -1] / 2))(model)
    share = jnp.bincount(first[:, 0], length=30) / 4000
    assert jnp.max(jnp.abs(share - want)) < 5 * (0.25 / 4000) ** 0.5


@pytest.mark.slow
def test_a_row_with_a_key_of_its_own_draws_what_it_draws_alone():
    model, keys, lengths = sharp(), jax.random.split(jax.random.key(5), 3), [9, 4, 6]
    options = {"temperature": 3.0, "top_p": 0.9}
    got = decode.generate(model, PROMPTS, 4, lengths=lengths, padding="behind", key=keys, **options)
    data = jax.random.key_data(keys)
    chex.assert_trees_all_equal(
        decode.generate(model, PROMPTS, 4, lengths=lengths, padding="behind", key=data, **options), got
    )
    chex.assert_trees_all_equal(decode.generate(model, PROMPTS[1:2, :4], 4, key=keys[1], **options), got[1:2])


def test_filters_keep_the_likeliest():
    scores = jnp.log(jnp.array([0.1, 0.4, 0.2, 0.3]))

    def passed(top_k=None, top_p=None):
        return (decode.filtered(scores, top_k, top_p) > -jnp.inf).tolist()

    assert passed() == [True] * 4
    assert passed(top_k=1) == [False, True, False, False]
    assert passed(top_k=3) == [False, True, True, True]
    assert passed(top_p=0.4) == [False, True, False, False]
    assert passed(top_p=0.41) == [False, True, False, True]
    assert passed(top_p=1.0) == [True] * 4
    assert passed(top_k=2, top_p=0.6) == [False, True, False, True]
    assert passed(top_k=2, top_p=0.5) == [False, True, False, False]


@pytest.mark.slow
def test_generating_inside_of_transformations_gives_the_same_tokens_and_leaves_the_model():
    model, key = sharp(), jax.random.key(3)
    before = nnx.to_pure_dict(nnx.state(model))
    likeliest = decode.generate(model, PROMPTS, 4, temperature=0)
    drawn = decode.generate(model, PROMPTS, 4, key=key, temperature=3.0, top_k=7, top_p=0.9)

    def take(prompts):
        return decode.generate(model, prompts, 4, temperature=0)

    chex.assert_trees_all_equal(jax.jit(take)(PROMPTS), likeliest)
    chex.assert_trees_all_equal(jax.jit(lambda: take(PROMPTS))(), likeliest)
    chex.assert_trees_all_equal(jax.vmap(take)(PROMPTS[:, None])[:, 0], likeliest)

    def draw(key, *numbers):
        temperature, top_k, top_p = numbers
        return decode.generate(model, PROMPTS, 4, key=key, temperature=temperature, top_k=top_k, top_p=top_p)

    keys = jnp.stack([key, jax.random.key(4)])
    numbers = jnp.array([3.0, 0.0]), jnp.array([7, 30]), jnp.array([0.9, 1.0])
    chex.assert_trees_all_equal(jax.jit(jax.vmap(draw))(keys, *numbers), jnp.stack([drawn, likeliest]))
    with pytest.raises(ValueError, match=r"lengths must be integers \[3\]"):
        jax.jit(lambda lengths: decode.generate(model, PROMPTS, 4, lengths=lengths, temperature=0))(jnp.ones(2, int))
    chex.assert_trees_all_equal(nnx.to_pure_dict(nnx.state(model)), before)


def test_equal_models_and_other_numbers_compile_nothing():
    options = {"key": jax.random.key(0), "top_k": np.int64(5), "lengths": [9, 4, 1]}
    first = decode.generate(sharp(), PROMPTS, 2, temperature=0.5, top_p=0.7, **options)
    count = decode.sampling._generate._cache_size()
    for temperature in (jnp.float32(0.5), np.float64(0.5)):
        options |= {"top_k": jnp.int32(5), "lengths": jnp.array([9, 4, 1])}
        got = decode.generate(sharp(), PROMPTS.tolist(), np.int32(2), temperature=temperature, top_p=0.7, **options)
        chex.assert_trees_all_equal(got, first)
    other = DecoderLM(ModelConfig(**CONFIG), rngs=nnx.Rngs(1))
    for temperature, top_k, top_p in ((0, 30, 1), (2, 1, jnp.float32(0.1)), (0.1, 2, np.float32(0.9))):
        options |= {"top_k": top_k, "top_p": top_p}
        decode.generate(other, PROMPTS, 2, temperature=temperature, **options)
    assert decode.sampling._generate._cache_size() == count


def test_a_temperature_that_float32_cannot_divide_by_takes_the_likeliest():
    model, key = sharp(), jax.random.key(0)
    want = decode.generate(model, PROMPTS, 4, temperature=0)
    for temperature in (1e-300, 1e-45, 1e-38, 1.18e-38, 1e-30, jnp.float32(1e-38)):
        for top_p in (None, 1e-300, 0.5):
            got = decode.generate(model, PROMPTS, 4, key=key, temperature=temperature, top_p=top_p)
            chex.assert_trees_all_equal(got, want)


def test_traced_numbers_out_of_their_ranges_give_no_token():
    model, key = sharp(), jax.random.key(0)
    want = decode.generate(model, PROMPTS, 4, temperature=0)
    take = jax.jit(lambda prompts, lengths: decode.generate(model, prompts, 4, lengths=lengths, temperature=0))
    got = take(PROMPTS.at[1, 8].set(-1), jnp.array([9, 9, 10]))
    chex.assert_trees_all_equal(got, jnp.where(jnp.arange(3)[:, None] == 0, want, -1))

    @jax.jit
    def draw(temperature, top_k, top_p):
        options = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
        return decode.generate(model, PROMPTS, 4, key=key, **options)

    assert jnp.all(draw(1.0, 3, 0.5) >= 0)
    for numbers in ((-1.0, 3, 0.5), (jnp.nan, 3, 0.5), (1.0, 0, 0.5), (1.0, 31, 0.5), (1.0, 3, 1.5), (1.0, 3, jnp.nan)):
        assert jnp.all(draw(*numbers) == -1)


def test_a_model_that_gives_nan_generates_nothing():
    model = sharp()
    model.output_bias[...] = model.output_bias[...].at[3].set(jnp.nan)
    for temperature in (0, 1.0):
        with pytest.raises(ValueError, match="log-probabilities are NaN for 3 of 3 prompts: its parameters"):
            decode.generate(model, PROMPTS, 4, key=jax.random.key(0), temperature=temperature)
    assert jnp.all(jax.jit(lambda prompts: decode.generate(model, prompts, 4, temperature=0))(PROMPTS) == -1)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"temperature": -1.0}, "temperature must be at least 0, got -1.0"),
        ({"temperature": 1.0}, "key must be given for a temperature above 0"),
        ({"key": 0}, r"key must be one of jax.random, e.g. jax.random.key\(0\), got 0"),
        ({"key": jax.random.split(jax.random.key(0))}, r"key must be one, or one for each of 3 rows, got \[2\]"),
        ({"padding": "left"}, "padding must be one of 'front', 'behind', got 'left'"),
        ({"top_k": 31}, "top_k must be from 1 to 30, got 31"),
        ({"temperature": jnp.nan}, "temperature must be at least 0, got nan"),
        ({"temperature": jnp.ones(3)}, "temperature must be at least 0, got "),
        ({"temperature": "warm"}, "temperature must be at least 0, got warm"),
        ({"max_new_tokens": 2.5}, "max_new_tokens must be an integer that is not traced, at least 1, got 2.5"),
        ({"top_k": 2.5}, "top_k must be an integer from 1 to 30, got 2.5"),
        ({"prompts": [[1, 2], [3]]}, "prompts must be integers .* got rows of different lengths; pad them"),
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
def test_calls_that_are_refused(options, words):
    model = DecoderLM(ModelConfig(**CONFIG), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=words):
        decode.generate(model, **{"prompts": PROMPTS, "max_new_tokens": 2, "temperature": 0} | options)


def test_positions_that_count_from_the_end_are_refused():
    model = DecoderLM(ModelConfig(**CONFIG | {"positions": "descending"}), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"generate needs a model with positions=None or .relative., got 'descending'"):
        decode.generate(model, PROMPTS, 2, temperature=0)
