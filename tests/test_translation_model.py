"""EncoderDecoder and beam search: streaming, padding, an exhaustive reference, other devices, what is refused."""

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
import reference
from cases import some
from flax import nnx
from hypothesis import strategies as st

from fwt_jax import decode, fast_weight_cross_attention, sharding
from fwt_jax.layers import CrossAttention
from fwt_jax.models import Attention, EncoderDecoder, TranslationConfig, blocks, encoder_decoder

TINY = TranslationConfig(
    vocab_size=20, encoder_layers=1, decoder_layers=1, d_model=16, d_ff=32, num_heads=2, dropout=0.0
)
SOFTMAX, SUM = Attention(), Attention("sum")
DPFP = Attention("sum", "dpfp", 2)
FAVOR = Attention("sum", "favor_plus", 8)
DELTA = Attention("delta", feature_normalization="sum", normalize=False)
GATED = dataclasses.replace(DELTA, decay=True)
MODELS = {
    "softmax": {},
    "sum": {"encoder": SUM, "decoder": SUM, "cross": SUM},
    "pre-norm, DPFP": {"encoder": DPFP, "decoder": DPFP, "cross": DPFP, "norm": "pre"},
    "FAVOR+": {"encoder": FAVOR, "decoder": FAVOR, "cross": FAVOR},
    "delta decoder": {"decoder": DELTA, "decoder_layers": 2, "scan": True},
    "gated delta decoder": {"decoder": GATED, "decoder_layers": 2, "scan": True},
    "each another": {"encoder": SUM, "decoder": SOFTMAX, "decoder_layers": 2, "cross": DPFP},
}
some_models = pytest.mark.parametrize("name", some(2, list(MODELS)))


@functools.cache
def make(name, **options):
    return EncoderDecoder(dataclasses.replace(TINY, **MODELS[name], **options), rngs=nnx.Rngs(1))


def sentences(batch, length, seed=0, lengths=None):
    """Tokens with an eos_id at their end, then padding."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(4, TINY.vocab_size, (batch, length))
    lengths = rng.integers(1, length + 1, batch) if lengths is None else np.asarray(lengths)
    places = np.arange(length)[None]
    tokens = np.where(places == lengths[:, None] - 1, TINY.eos_id, tokens)
    return jnp.asarray(np.where(places < lengths[:, None], tokens, TINY.pad_id), jnp.int32)


@nnx.jit
def score(model, source, target):
    return model.losses(source, target, label_smoothing=0.1)


@nnx.jit
def plain(model, source, target, rngs=None):
    return model.losses(source, target, rngs=rngs)


@nnx.jit
def log_probabilities(model, source, tokens):
    return model(source, tokens)


# --- the model -------------------------------------------------------------------------------------------------------


def array(parameter):
    return np.asarray(parameter[...], np.float64)


def numpy_attention(layer, options, x, source, seen, decay=None):
    q, k, v = (
        np.einsum("td,dhk->htk", y, array(projection.kernel)) + array(projection.bias)[:, None]
        for y, projection in ((x, layer.query), (source, layer.key), (source, layer.value))
    )
    if options.memory_rule is None:
        weights = seen * np.exp(q @ np.swapaxes(k, 1, 2) / np.sqrt(q.shape[-1]))
        out = weights @ v / weights.sum(axis=-1, keepdims=True)
    else:
        q, k = (np.where(y > 0, y + 1, np.exp(y)) for y in (q, k))  # ELU + 1
        if options.memory_rule.corrects:
            beta = 1 / (1 + np.exp(-x @ array(layer.beta.kernel) - array(layer.beta.bias)))
            q, k = (y / y.sum(axis=-1, keepdims=True) for y in (q, k))
            log_decay = np.zeros_like(beta)
            if decay is not None:
                softplus = np.log1p(np.exp(x @ array(decay.projection.kernel) + array(decay.bias)))
                log_decay = -np.exp(array(decay.log_rate)) * softplus
            heads = zip(q, k, v, beta.T, log_decay.T, strict=True)
            out = [reference.attention(*head, rule=options.rule)[0] for head in heads]
        else:
            weights = seen * (q @ np.swapaxes(k, 1, 2))
            out = weights @ v / weights.sum(axis=-1, keepdims=True)
    return np.einsum("htv,hvd->td", np.stack(out), array(layer.out.kernel)) + array(layer.out.bias)


def numpy_layer_norm(x, norm):
    centred = x - x.mean(axis=-1, keepdims=True)
    variance = (centred**2).mean(axis=-1, keepdims=True)
    return centred / np.sqrt(variance + 1e-5) * array(norm.scale) + array(norm.bias)


def numpy_feed_forward(layer, x):
    hidden = np.maximum(x @ array(layer.hidden.kernel) + array(layer.hidden.bias), 0)
    return hidden @ array(layer.out.kernel) + array(layer.out.bias)


def numpy_log_probabilities(model, source, tokens, dropout=1.0):
    """log p of one sentence, by the equations (Vaswani et al. 2017, section 3). Dropout multiplies by a factor."""
    config = model.config

    def add(x, norm, sublayer):
        if config.norm == "pre":
            return x + dropout * sublayer(numpy_layer_norm(x, norm))
        return numpy_layer_norm(x + dropout * sublayer(x), norm)

    def embed(tokens):
        angles = np.arange(len(tokens))[:, None] / 10000 ** (np.arange(0, config.d_model, 2) / config.d_model)
        x = array(model.embedding)[tokens] * np.sqrt(config.d_model)
        return dropout * (x + np.hstack([np.sin(angles), np.cos(angles)]))

    def attend(layer, options, seen, source=None, decay=None):
        return lambda x: numpy_attention(layer, options, x, x if source is None else source, seen, decay)

    seen, causal = source != config.pad_id, np.tri(len(tokens))
    y, x = embed(source), embed(tokens)
    for block in model.encoder:
        y = add(y, block.norms[0], attend(block.attention, config.encoder, seen))
        y = add(y, block.norms[1], functools.partial(numpy_feed_forward, block.feed_forward))
    y = numpy_layer_norm(y, model.encoder_norm) if config.norm == "pre" else y
    for block in model.decoder:
        x = add(x, block.norms[0], attend(block.attention, config.decoder, causal, decay=block.decay))
        x = add(x, block.norms[1], attend(block.cross_attention, config.cross, seen, y))
        x = add(x, block.norms[2], functools.partial(numpy_feed_forward, block.feed_forward))
    x = numpy_layer_norm(x, model.decoder_norm) if config.norm == "pre" else x
    logits = x @ array(model.embedding).T
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


@pytest.mark.parametrize(
    ("name", "norm", "factor"),
    [
        ("softmax", "post", 1.0),
        pytest.param("softmax", "pre", 2.0, marks=pytest.mark.exhaustive),
        ("sum", "post", 2.0),
        ("delta decoder", "post", 1.0),
        pytest.param("delta decoder", "pre", 1.0, marks=pytest.mark.exhaustive),
        ("gated delta decoder", "pre", 1.0),
    ],
)
def test_the_model_is_that_of_its_equations(name, norm, factor, monkeypatch):
    """All parameters are drawn, and dropout multiplies by a factor."""
    options = MODELS[name] | {"decoder_layers": 2, "norm": norm, "dropout": 0.5}
    model = EncoderDecoder(dataclasses.replace(TINY, **options), rngs=nnx.Rngs(1))
    draw = np.random.default_rng(2)
    for _, parameter in nnx.iter_graph(model):
        if isinstance(parameter, nnx.Param):
            parameter[...] += jnp.asarray(draw.normal(0, 0.1, parameter.shape), jnp.float32)
    for module in (blocks, encoder_decoder):
        monkeypatch.setattr(module, "dropout", lambda x, rate, rngs: factor * x if rate else x)
    source, tokens = sentences(2, 6, lengths=[6, 4]), sentences(2, 5, seed=1, lengths=[5, 5])
    got = nnx.jit(lambda model: model(source, tokens))(model)
    for row in range(2):
        expected = numpy_log_probabilities(model, np.asarray(source[row]), np.asarray(tokens[row]), factor)
        np.testing.assert_allclose(got[row], expected, atol=2e-5)


def test_equal_models_are_one_to_the_compiler():
    config = dataclasses.replace(TINY, cross=DPFP, decoder=DELTA)
    one, other = (nnx.split(EncoderDecoder(config, rngs=nnx.Rngs(seed)))[0] for seed in (0, 1))
    assert one == other and hash(one) == hash(other)


@pytest.mark.parametrize("name", some(4, list(MODELS)))
def test_decoding_token_by_token_equals_all_at_once(name):
    model, source, target = make(name), sentences(3, 7), sentences(3, 9, seed=1, lengths=[9, 9, 9])
    empty, steps = nnx.jit(lambda model: model.encode(source, max_length=9))(model), []
    memory, whole = empty, log_probabilities(model, source, target)

    @nnx.jit
    def step(model, tokens, memory):
        hidden, memory = model.decode(tokens, memory)
        return model.log_probabilities(hidden), memory

    for i in range(9):
        scores, memory = step(model, target[:, i : i + 1], memory)
        steps.append(scores)
    chex.assert_trees_all_close(jnp.concatenate(steps, axis=1), whole, atol=1e-5)
    scores, _ = step(model, target[:, :5], empty)
    chex.assert_trees_all_close(scores, whole[:, :5], atol=1e-5)


# A read is divided by zᵀq, which may be small: float32 leaves 8e-5 there, and one token of padding would leave 1e-2.
PADDED = 5e-4


@pytest.mark.slow
@pytest.mark.parametrize("name", some(4, list(MODELS)))
@hypothesis.given(st.lists(st.integers(1, 6), min_size=4, max_size=4), st.integers(0, 99))
@hypothesis.settings(max_examples=8, deadline=None)
def test_padding_changes_nothing(name, lengths, seed):
    model, source, target = make(name), sentences(2, 6, seed, lengths[:2]), sentences(2, 6, seed + 1, lengths[2:])

    def more(tokens, count):
        return jnp.pad(tokens, ((0, 0), (0, count)), constant_values=TINY.pad_id)

    smoothed = score(model, source, target)
    padded = score(model, more(source, 5), more(target, 3))
    chex.assert_trees_all_close(padded[:, :6], smoothed, atol=PADDED)
    assert not np.any(padded[:, 6:]) and not np.any(smoothed[target == TINY.pad_id])
    alone = score(model, jnp.broadcast_to(source[:1], (2, 6)), jnp.broadcast_to(target[:1], (2, 6)))
    chex.assert_trees_all_close(alone[0], smoothed[0], atol=PADDED)


@some_models
def test_the_decoder_is_causal_and_sees_the_source(name):
    model, source, target = make(name), sentences(1, 6, lengths=[6]), sentences(1, 6, seed=1, lengths=[6])
    before = log_probabilities(model, source, target)
    after = log_probabilities(model, source, target.at[0, 3].set(5 + (target[0, 3] == 5)))
    chex.assert_trees_all_close(before[:, :3], after[:, :3], atol=1e-6)
    assert np.abs(before[:, 3:] - after[:, 3:]).max() > 1e-4
    for place in range(6):
        other = log_probabilities(model, source.at[0, place].set(5 + (source[0, place] == 5)), target)
        assert np.abs(before - other).max(axis=-1).min() > 1e-6


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_is_the_cross_entropy_with_smoothed_labels(smoothing):
    model, source, target = make("sum"), sentences(3, 5), sentences(3, 6, seed=1)
    before = jnp.pad(target[:, :-1], ((0, 0), (1, 0)), constant_values=TINY.bos_id)
    log_p = np.asarray(log_probabilities(model, source, before))
    labels = (1 - smoothing) * np.eye(TINY.vocab_size)[np.asarray(target)] + smoothing / TINY.vocab_size
    expected = -np.sum(labels * log_p, axis=-1) * (np.asarray(target) != TINY.pad_id)
    losses = (score if smoothing else plain)(model, source, target)
    chex.assert_trees_all_close(losses, expected, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("smoothing", some(2, [0.1, 0.0]))
def test_a_negative_target_costs_nothing_and_teaches_nothing(smoothing):
    """The decoder reads padding in its place, and padding costs nothing."""
    graph, state = nnx.split(make("sum"))
    source, target = sentences(3, 5), np.array(sentences(3, 6, seed=1, lengths=[6, 4, 3]))
    target[0, 1], target[1, 2] = TINY.pad_id, TINY.pad_id
    ignored, weights = np.array(target), jax.random.normal(jax.random.key(0), target.shape)
    ignored[0, 1], ignored[1, 2], ignored[2, 4:] = -1, -100, -1

    @functools.partial(jax.value_and_grad, has_aux=True)
    def total(state, target):
        losses = nnx.merge(graph, state).losses(source, target, label_smoothing=smoothing)
        return jnp.sum(weights * losses), losses

    got, want = (jax.jit(total)(state, x) for x in (ignored, target))
    chex.assert_trees_all_close(got, want, atol=1e-6)
    assert not np.any(got[0][1][target == TINY.pad_id]) and np.all(got[0][1][target != TINY.pad_id])


@pytest.mark.slow
def test_words_outside_of_the_vocabulary_are_refused_or_nan():
    model, source, target = make("sum"), sentences(2, 4, lengths=[4, 4]), sentences(2, 5, seed=1, lengths=[5, 4])
    losses = jax.jit(lambda source, target: model.losses(source, target, label_smoothing=0.1))
    for value in (-1, 20):
        with pytest.raises(ValueError, match="source must be from 0 to 19, got"):
            model.losses(source.at[1, 2].set(value), target)
        with pytest.raises(ValueError, match="the target must be from 0 to 19, got"):
            model(source, target.at[1, 2].set(value))
        with pytest.raises(ValueError, match="tokens must be from 0 to 19, got"):
            model.decode(target.at[1, 2].set(value), model.encode(source, max_length=5))
        got = losses(source.at[1, 2].set(value), target)
        assert jnp.all(jnp.isnan(got[1, :4])) and jnp.all(jnp.isfinite(got[0])) and got[1, 4] == 0
    with pytest.raises(ValueError, match=r"targets must be at most 19, or negative .*, got 20"):
        model.losses(source, target.at[1, 2].set(20))
    got = losses(source, target.at[1, 2].set(20))
    assert jnp.all(jnp.isnan(got[1, 2:4])) and jnp.all(jnp.isfinite(got[0])) and got[1, 4] == 0


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ["each another", "FAVOR+"])
def test_recomputing_blocks_changes_nothing_and_all_parameters_learn(name):
    source, target = sentences(2, 5), sentences(2, 5, seed=1)

    gradient = nnx.jit(nnx.grad(lambda model: jnp.mean(model.losses(source, target))))
    gradients = [gradient(make(name, **options)) for options in ({}, {"remat": True}, {"scan": True})]
    chex.assert_trees_all_close(*gradients, atol=1e-5)
    silent = [
        jax.tree_util.keystr(path) for path, x in jax.tree_util.tree_leaves_with_path(gradients[0]) if not x.any()
    ]
    assert not silent


@pytest.mark.slow
def test_dropout_and_random_features_come_from_rngs():
    model, source, target = make("FAVOR+", dropout=0.5), sentences(2, 5), sentences(2, 5, seed=1)
    one, same, other = (plain(model, source, target, nnx.Rngs(seed)) for seed in (0, 0, 1))
    chex.assert_trees_all_equal(one, same)
    assert np.abs(one - other).max() > 1e-3
    without = make("FAVOR+", dropout=0.0)
    drawn, own = plain(without, source, target, nnx.Rngs(0)), plain(without, source, target)
    assert np.abs(drawn - own).max() > 1e-4


@pytest.mark.parametrize("heads", some(2, [8, 16]))
def test_the_weights_of_random_features_have_sum_one_from_the_start(heads):
    """The inputs are normalised. With the kernel exp(kᵀq), too many weights would be less than eps."""
    config = TranslationConfig(vocab_size=20, d_model=512, num_heads=heads, cross=Attention("sum", "favor_plus", 32))
    layer = config.make_attention("cross", nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (1, 24, 512))
    query, key = (layer.feature_map(projection(x)) for projection in (layer.query, layer.key))
    ones = jnp.ones((1, 24, heads, 1))
    weights, _ = fast_weight_cross_attention(query, key, ones, normalize="read")
    np.testing.assert_allclose(weights, 1, atol=1e-3)


def test_bfloat16_computes_in_it_and_keeps_float32_outside():
    model = make("each another", dtype="bfloat16")
    losses = plain(model, sentences(2, 5), sentences(2, 5, seed=1))
    exact = plain(make("each another"), sentences(2, 5), sentences(2, 5, seed=1))
    assert losses.dtype == jnp.float32 and all(x.dtype == jnp.float32 for x in jax.tree.leaves(nnx.state(model)))
    chex.assert_trees_all_close(losses, exact, atol=0.1)
    assert np.abs(losses - exact).max() > 1e-5


def test_the_sizes_of_the_papers_models():
    """Vaswani et al. 2017, table 3, with 37,000 tokens: 65 and 213 million parameters."""
    base = TranslationConfig(vocab_size=37_000)
    big = TranslationConfig(vocab_size=37_000, d_model=1024, d_ff=4096, num_heads=16)
    for config, millions in ((base, 63.1), (big, 214.2)):
        shapes = nnx.eval_shape(lambda config=config: EncoderDecoder(config, rngs=nnx.Rngs(0)))
        count = sum(int(np.prod(x.shape)) for x in jax.tree.leaves(nnx.state(shapes, nnx.Param)))
        assert round(count / 1e6, 1) == millions


# --- beam search -----------------------------------------------------------------------------------------------------

SMALL = TranslationConfig(
    vocab_size=6, encoder_layers=1, decoder_layers=1, d_model=8, d_ff=16, num_heads=2, dropout=0.0, decoder=DELTA
)


def all_translations(length):
    """Every sequence of at most ``length`` tokens that ends with eos_id, padded."""
    tokens = [token for token in range(6) if token not in (SMALL.pad_id, SMALL.eos_id)]
    words = [words for n in range(length) for words in itertools.product(tokens, repeat=n)]
    return np.asarray([(*row, SMALL.eos_id, *(SMALL.pad_id,) * (length - 1 - len(row))) for row in words], np.int32)


@pytest.mark.slow
@pytest.mark.parametrize("decoder", some(3, [DELTA, SOFTMAX, SUM]), ids=lambda attention: attention.rule)
@pytest.mark.parametrize("penalty", [0.0, 0.6, 1.0])
def test_a_beam_that_holds_everything_finds_the_best_of_all(decoder, penalty):
    model = EncoderDecoder(dataclasses.replace(SMALL, decoder=decoder), rngs=nnx.Rngs(3))
    source = jnp.asarray([[4, 5, 3, 0], [5, 1, 4, 3]], jnp.int32)
    options = {"beam_size": 85, "max_length": 4, "length_penalty": penalty, "early_stop": False}
    translations = decode.beam_search(model, source, **options)
    everything = all_translations(4)
    assert len(everything) == 85
    for row in range(2):
        losses = plain(model, jnp.broadcast_to(source[row], (85, 4)), jnp.asarray(everything))
        judged = -np.sum(losses, axis=1) / np.sum(everything != SMALL.pad_id, axis=1) ** penalty
        order = np.argsort(-judged)
        np.testing.assert_allclose(translations.scores[row], judged[order], atol=1e-5)
        np.testing.assert_array_equal(translations.tokens[row, :5], everything[order[:5]])


def searched(log_p, beam_size, length, penalty, early_stop):
    """The beam search that ``beam_search`` describes, in plain Python; log_p: of all next tokens after some."""
    live, ended = [((), 0.0)], []
    for step in range(1, length + 1):
        new = [
            ((*tokens, token), score + after[token])
            for tokens, score in live
            for after in [log_p(tokens)]
            for token in range(SMALL.vocab_size)
            if token != SMALL.pad_id and (step < length or token == SMALL.eos_id)
        ]
        new.sort(key=lambda row: -row[1])
        ended += [(t, s / len(t) ** penalty) for t, s in new[:beam_size] if t[-1] == SMALL.eos_id]
        ended = sorted(ended, key=lambda row: -row[1])[:beam_size]
        live = [row for row in new if row[0][-1] != SMALL.eos_id][:beam_size]
        if not live or (early_stop and len(ended) == beam_size):
            break
    return ended


@pytest.mark.slow
@pytest.mark.parametrize("beam", some(3, [(2, True), (2, False), (3, True), (3, False)]), ids=str)
def test_a_beam_is_that_of_plain_python(beam):
    """The logits of the model are sharp, so that translations of many lengths end in the beam."""
    model = EncoderDecoder(SMALL, rngs=nnx.Rngs(2))
    model.embedding[...] *= 3
    source, length = sentences(6, 4, seed=8) % SMALL.vocab_size, 7
    beam_size, early_stop = beam
    source = jnp.where(source == SMALL.pad_id, 4, source)
    options = {"beam_size": beam_size, "max_length": length, "length_penalty": 0.8, "early_stop": early_stop}
    translations = decode.beam_search(model, source, **options)
    lengths = set()
    for row in range(6):

        def log_p(tokens, row=row):
            before = np.full((1, length + 1), SMALL.bos_id)
            before[0, 1 : len(tokens) + 1] = tokens
            scores = log_probabilities(model, source[row : row + 1], jnp.asarray(before, jnp.int32))
            return np.asarray(scores[0, len(tokens)])

        expected = searched(log_p, beam_size, length, 0.8, early_stop)
        got = [[token for token in tokens if token] for tokens in translations.tokens[row].tolist()]
        assert [tuple(tokens) for tokens in got if tokens] == [tokens for tokens, _ in expected]
        np.testing.assert_allclose(translations.scores[row, : len(expected)], [s for _, s in expected], atol=1e-4)
        lengths |= {len(tokens) for tokens, _ in expected}
    assert len(lengths) > 1


@pytest.mark.slow
def test_a_model_that_recomputes_its_blocks_translates_as_one_that_does_not():
    source, target = sentences(3, 6, seed=4), sentences(3, 5, seed=1)
    results = []
    for remat in (False, True):
        model = make("each another", remat=remat)
        losses = jax.jit(lambda source, model=model: model.losses(source, target))(source)
        results.append((losses, decode.beam_search(model, source, beam_size=2, max_length=6)))
    chex.assert_trees_all_close(*results, atol=1e-5)


@pytest.mark.slow
def test_a_search_inside_of_transformations_is_the_same_and_leaves_the_model():
    model, source = make("each another"), sentences(3, 6, seed=4)
    options = {"beam_size": 2, "max_length": 6}
    before = model.losses(source, source)
    want = decode.beam_search(model, source, length_penalty=0.6, **options)
    count = decode.beams._beam_search._cache_size()

    def search(source, length_penalty):
        return decode.beam_search(model, source, length_penalty=length_penalty, beam_size=2, max_length=6)

    chex.assert_trees_all_close(jax.jit(search)(source, 0.6), want, atol=1e-5)
    got = jax.vmap(search, in_axes=(0, None))(source[:, None], 0.6)
    chex.assert_trees_all_close(jax.tree.map(lambda x: x[:, 0], got), want, atol=1e-5)
    chex.assert_trees_all_equal(model.losses(source, source), before)
    broken = jax.jit(search)(source.at[1, 0].set(-1), 0.6)
    assert jnp.all(broken.tokens[1] == -1) and jnp.all(jnp.isnan(broken.scores[1]))
    chex.assert_trees_all_close(*(jax.tree.map(lambda x: x[::2], x) for x in (broken, want)), atol=1e-5)
    assert jnp.all(jnp.isnan(jax.jit(search)(source, -0.5).scores))
    # Other numbers and other arrays compile nothing.
    options = {"beam_size": np.int64(2), "max_length": jnp.int32(6), "early_stop": np.bool_(True)}
    for penalty in (jnp.float32(0.6), np.float64(0.6)):
        chex.assert_trees_all_equal(decode.beam_search(model, source.tolist(), length_penalty=penalty, **options), want)
    decode.beam_search(model, np.asarray(source), length_penalty=1, **options)
    assert decode.beams._beam_search._cache_size() == count


def test_a_model_that_gives_nan_translates_nothing():
    model = EncoderDecoder(dataclasses.replace(TINY, decoder=DELTA), rngs=nnx.Rngs(1))
    model.decoder[0].feed_forward.out.bias[...] += jnp.nan
    with pytest.raises(ValueError, match="log-probabilities are NaN for 2 of 2 sentences: its parameters"):
        decode.beam_search(model, [[4, 5, 3], [5, 3, 0]], beam_size=2, max_length=4)


def test_padding_of_the_source_changes_no_translation_and_padding_alone_has_none():
    model, source = make("each another"), sentences(3, 6, seed=4, lengths=[6, 2, 4])
    options = {"beam_size": 2, "max_length": 6}
    want = decode.beam_search(model, source, **options)
    got = decode.beam_search(model, jnp.pad(source, ((0, 1), (0, 3))), **options)
    np.testing.assert_array_equal(got.tokens[:3], want.tokens)
    chex.assert_trees_all_close(got.scores[:3], want.scores, atol=1e-5)
    assert not np.any(got.tokens[3]) and np.all(np.isneginf(got.scores[3]))


def greedy(model, source, length):
    """One sentence, with the whole model called again for each token."""
    tokens = np.full((1, length + 1), TINY.bos_id, np.int32)
    for i in range(length):
        scores = np.array(log_probabilities(model, source, jnp.asarray(tokens))[0, i])
        scores[TINY.pad_id] = -np.inf
        tokens[0, i + 1] = np.argmax(scores) if i < length - 1 else TINY.eos_id
        if tokens[0, i + 1] == TINY.eos_id:
            break
    return tokens[0, 1 : i + 2].tolist()


@pytest.mark.slow
@pytest.mark.parametrize("name", some(3, ["delta decoder", "softmax", "sum", "each another", *list(MODELS)[2:4]]))
def test_beam_one_is_greedy_whatever_stands_beside_a_sentence(name):
    model, source = make(name), sentences(3, 6, seed=4)
    translations = decode.beam_search(model, source, beam_size=1, max_length=8)
    for row in range(3):
        expected = greedy(model, source[row : row + 1], 8)
        assert [int(token) for token in translations.tokens[row, 0] if token != TINY.pad_id] == expected


@pytest.mark.slow
@pytest.mark.parametrize("name", some(2, ["each another", "FAVOR+"]))
def test_the_scores_are_those_of_the_teacher_forced_model_and_better_with_a_larger_beam(name):
    model, source = make(name), sentences(4, 6, seed=5)
    best = []
    for beam_size in (1, 4):
        options = {"beam_size": beam_size, "max_length": 7, "length_penalty": 0.6}
        tokens, scores = decode.beam_search(model, source, **options, early_stop=False)
        assert np.all(np.diff(scores, axis=1) <= 0)
        losses = plain(model, source, tokens[:, 0])
        lengths = jnp.sum(tokens[:, 0] != TINY.pad_id, axis=1)
        chex.assert_trees_all_close(-jnp.sum(losses, axis=1) / lengths**0.6, scores[:, 0], atol=1e-5)
        best.append(scores[:, 0])
    assert np.mean(best[1] - best[0]) >= -1e-6


# --- many devices ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("axes", some(2, [{"fsdp": 2, "tensor": 2}, {}]), ids=str)
@pytest.mark.parametrize("name", some(4, ["each another", "softmax", "delta decoder", "gated delta decoder"]))
def test_eight_devices_decode_and_score_as_one(name, axes):
    model, source, target = make(name), sentences(8, 6, seed=6), sentences(8, 6, seed=7)
    expected = score(model, source, target), decode.beam_search(model, source, max_length=6, beam_size=3)
    mesh = sharding.make_mesh(**axes)
    graph, state = nnx.split(model)
    state = nnx.to_pure_dict(nnx.as_pure(state))
    state = jax.device_put(state, sharding.partition(mesh, state))
    assert any(not x.sharding.is_fully_replicated for x in jax.tree.leaves(state)) == bool(axes)
    source, target = jax.device_put((source, target), sharding.batch_partition(mesh, (source, target)))
    with jax.set_mesh(mesh):
        spread = nnx.merge(graph, nnx.State(state))
        got = score(spread, source, target), decode.beam_search(spread, source, max_length=6, beam_size=3)
    chex.assert_trees_all_close(got, expected, atol=1e-5)


def test_no_scores_leave_their_device():
    """The scores of all tokens have the size of the vocabulary. Each device chooses among its own."""
    model, source = make("delta decoder"), sentences(8, 6)
    mesh = sharding.make_mesh()
    source = jax.device_put(source, sharding.batch_partition(mesh, source))
    options = {"max_length": 6, "beam_size": 3, "early_stop": True}
    with jax.set_mesh(mesh):
        text = decode.beams._beam_search.lower(*nnx.split(model), source, jnp.float32(1), **options).compile().as_text()
    gathered = re.findall(r"= \(?(\w+\[[\d,]*\])\S* all-gather", text)
    assert not [shape for shape in gathered if shape != "pred[8]"], gathered


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"d_model": 18, "num_heads": 4}, "even and a multiple of num_heads 4, got 18"),
        ({"encoder": DELTA}, "encoder.rule must be .*depends on the order"),
        ({"cross": DELTA}, "cross.rule must be"),
        ({"encoder": dataclasses.replace(SUM, decay=True)}, "encoder.decay must be False, got True: .*order"),
        ({"cross": "sum"}, r'cross must be an Attention, as Attention\("sum"\), got .sum'),
        ({"norm": "both"}, "norm must be one of 'post', 'pre', got 'both'"),
        ({"dropout": 1.0}, "dropout must be in"),
        ({"decoder_layers": 0}, "decoder_layers must be at least 1, got 0"),
        ({"eos_id": 2}, "three tokens of the vocabulary of 20, got"),
        ({"pad_id": 20}, "three tokens of the vocabulary of 20, got"),
    ],
)
def test_configurations_that_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(TINY, **options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rule": "dleta"}, "rule must be one of"),
        ({"feature_map": "sigmoid"}, "feature_map must be one of"),
        ({"feature_size": 0}, "feature_size must be at least 1, got 0"),
        ({"eps": 0.0}, "eps must be above 0, because .*, got 0.0"),
        ({"rule": "delta"}, 'diverges .* feature_normalization=None; take "sum"'),
        ({"feature_map": "dpfp", "feature_size": 2}, "softmax.*has no memory to which feature_map, feature_size"),
        ({"decay": True}, "softmax.*has no memory to which decay could apply"),
    ],
)
def test_attentions_that_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        Attention(**options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_length": 0}, "max_length must be at least 1, got 0"),
        ({"beam_size": 0}, "beam_size must be at least 1, got 0"),
        ({"max_length": 1.5}, "max_length must be an integer that is not traced, at least 1, got 1.5"),
        ({"length_penalty": -1}, "length_penalty must be at least 0, got -1"),
        ({"length_penalty": jnp.nan}, "length_penalty must be at least 0, got nan"),
    ],
)
def test_numbers_of_a_beam_search_that_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        decode.beam_search(make("sum"), sentences(1, 3), **{"max_length": 5} | options)


def test_tokens_that_are_refused():
    model, source = make("sum"), sentences(2, 4)
    with pytest.raises(ValueError, match="source must be from 0 to 19, got 0 to 20"):
        decode.beam_search(model, jnp.asarray([[0, 20]]), max_length=3)
    with pytest.raises(ValueError, match=r"source must be integers \[rows ≥ 1, length ≥ 1\], got int32\[2, 0\]"):
        decode.beam_search(model, source[:, :0], max_length=3)
    with pytest.raises(ValueError, match=r"source must be integers \[rows ≥ 1, length ≥ 1\], got float32\[2, 4\]"):
        model(source.astype(jnp.float32), source)
    with pytest.raises(ValueError, match="source and target must have as many rows, got 2 and 3"):
        model(source, sentences(3, 4))
    with pytest.raises(ValueError, match=r"targets must be integers .*got int32\[4\]"):
        model.losses(source, source[0])
    with pytest.raises(ValueError, match="label_smoothing must be from 0 to 1, got 5"):
        model.losses(source, source, label_smoothing=5)
    with pytest.raises(ValueError, match="max_length and hypotheses must be at least 1, got 4 and 0"):
        model.encode(source, max_length=4, hypotheses=0)
    memory = model.encode(source, max_length=4, hypotheses=2)
    with pytest.raises(ValueError, match="tokens must have the 4 rows of the memory, got 2"):
        model.decode(jnp.zeros((2, 1), jnp.int32), memory)
    with pytest.raises(ValueError, match=r"tokens must be integers .*got int32\[4\]"):
        model.decode(jnp.zeros(4, jnp.int32), memory)
    with pytest.raises(ValueError, match=r"one token at a time, got \[4, 2\]"):
        model.decode(jnp.zeros((4, 2), jnp.int32), memory)


X, MASK = jnp.ones((2, 3, 8)), jnp.ones((2, 3), bool)


@pytest.mark.parametrize("rule", ["softmax", "sum"])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x": X[0]}, r"x must be floating point and \[B, tokens, 8\].*got float32\[3, 8\]"),
        ({"x": X.astype(int)}, r"x must be floating point .*got int32\[2, 3, 8\]"),
        ({"x": X[:1]}, "x must have the 2 rows of its source, got 1"),
        ({"source": X[:, :0], "mask": None}, r"source must be .*at least one token, got float32\[2, 0, 8\]"),
        ({"mask": jnp.zeros((2, 3))}, r"mask must be bool \[2, 3\].*got float32\[2, 3\].*mask == 0"),
        ({"mask": MASK[:1]}, r"mask must be bool \[2, 3\].*got bool\[1, 3\]"),
    ],
)
def test_sources_that_are_refused(rule, change, words):
    layer, call = CrossAttention(8, 2, 4, rule=rule, rngs=nnx.Rngs(0)), {"x": X, "source": X, "mask": MASK} | change
    with pytest.raises(ValueError, match=words):
        layer(**call)
    with pytest.raises(ValueError, match=words):
        layer.read(call["x"], layer.write(call["source"], call["mask"]))


@pytest.mark.slow
@pytest.mark.parametrize("name", some(2, ["relu", "relu_squared"]))
def test_features_that_are_all_zero_stay_zero(name):
    """The features of negative keys, and of zeros, are all zero. No division by zero follows."""
    config = dataclasses.replace(TINY, decoder=Attention("delta", name, feature_normalization="sum", normalize=False))
    model = EncoderDecoder(config, rngs=nnx.Rngs(0))
    for block in model.decoder:
        block.attention.key.kernel[...] *= 0
        block.attention.key.bias[...] -= 1
        block.attention.query.kernel[...] *= 0
    tokens = jnp.array([[5, 6, 7, 3]])

    def loss(model):
        return jnp.sum(model.losses(tokens, tokens))

    chex.assert_tree_all_finite(nnx.jit(nnx.value_and_grad(loss))(model))
