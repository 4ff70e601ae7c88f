"""Generation: what was given at once, then token by token from a memory, with fast weights of constant size.

tokens = generate(model, prompts, 100, key=key)                          # a DecoderLM goes on
translations = beam_search(model, source, beam_size=4, max_length=50)    # an EncoderDecoder translates

Both leave the model as it was. They compile one program for equal models and shapes, whatever the temperature, top_k,
top_p or length penalty. Inside of ``jax.jit`` and ``jax.vmap`` these numbers and all arrays may be traced. Nothing can
raise there: tokens are −1 where the log-probabilities are NaN, or a traced number is out of its range.
"""

from __future__ import annotations

import functools
import operator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from fwt_jax import output_layer, sharding
from fwt_jax.encoder_decoder import EncoderDecoder
from fwt_jax.models import DecoderLM


def generate(
    model: DecoderLM,
    prompts: jax.Array,
    max_new_tokens: int,
    *,
    lengths: jax.Array | None = None,
    key: jax.Array | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> jax.Array:
    """Continues prompts, each drawn from p(token | all before), in one compiled loop.

    A step costs the same however much was read, and so does the memory (with softmax attention both grow with
    T + max_new_tokens). The prompt takes the chunkwise form.

    Args:
      model: with ``positions`` None or "relative": what it has read must not depend on what follows.
      prompts: integers ``[B, T]`` from 0 to V − 1; those shorter than T end at its end: ``prompts[b, -lengths[b]:]``
        counts, so pad in front. What stands behind a prompt would be read as a part of it.
      max_new_tokens: at least 1, not traced.
      lengths: integers ``[B]``, from 1 to T; T if not given.
      key: of ``jax.random``, for temperatures above 0.
      temperature: p ∝ p^(1/temperature); 0 takes the likeliest token, and so does a number below 1.2e-38, the smallest
        that float32 can divide by.
      top_k: draws from the k likeliest tokens alone, and from those as likely as the last of them.
      top_p: draws from the likeliest tokens alone that have p of the probability together (Holtzman et al. 2020), in
        (0, 1]; after top_k.

    Returns:
      The new tokens, int32 ``[B, max_new_tokens]``; −1 from where on something is wrong, if nothing can raise.

    Raises:
      ValueError: a model with positions "descending", lengths with "relative", numbers out of their ranges, a
        temperature above 0 without a key, prompts that are not integers ``[B, T]``, log-probabilities that are NaN. The
        last is seen in the result: outside of ``jax.jit`` the call waits for it.
    """
    if model.config.positions == "descending":
        raise ValueError(
            "generate needs a model with positions=None or 'relative', got 'descending', which counts the tokens that "
            "follow, so that each new one would change what all before it wrote"
        )
    if model.config.positions == "relative" and lengths is not None:
        raise ValueError('lengths are not for positions="relative", whose memory is not cut; take equal prompts')
    vocab_size = model.config.vocab_size
    prompts = output_layer.integers("prompts", prompts, vocab_size - 1, axes="[B, T], T ≥ 1")
    batch, length = prompts.shape
    lengths = np.full(batch, length) if lengths is None else lengths
    lengths = output_layer.integers("lengths", lengths, length, axes=f"[{batch}]", shape=(batch,), least=1)
    max_new_tokens = _size("max_new_tokens", max_new_tokens)
    number = _number("temperature", temperature, "at least 0", lambda x: x >= 0)
    if key is None and (isinstance(temperature, jax.core.Tracer) or np.asarray(temperature) != 0):
        raise ValueError(
            "key must be given for a temperature above 0, or one that is traced, e.g. jax.random.key(0); "
            "temperature=0 needs none"
        )
    if key is not None and not isinstance(key, (jax.Array, np.ndarray)):
        raise ValueError(f"key must be one of jax.random, e.g. jax.random.key(0), got {key!r}")
    key = jax.random.key(0) if key is None else key
    if top_k is not None:
        top_k = _number("top_k", top_k, f"from 1 to {vocab_size}", lambda x: 1 <= x <= vocab_size, jnp.int32)
    if top_p is not None:
        top_p = _number("top_p", top_p, "in (0, 1]", lambda x: 0 < x <= 1)
    options = {"max_new_tokens": max_new_tokens}
    tokens = _generate(*nnx.split(model), prompts, lengths, key, number, top_k, top_p, **options)
    _check_known(tokens[:, -1] < 0, "prompts")
    return tokens


def _size(name, value):
    """A number that shapes depend on."""
    try:
        size = operator.index(value)
    except TypeError:  # a tracer's is one, too
        raise ValueError(f"{name} must be an integer that is not traced, at least 1, got {value!r}") from None
    if size < 1:
        raise ValueError(f"{name} must be at least 1, got {size}")
    return size


def _number(name, value, wanted, good, dtype=jnp.float32):
    """A number of a program, ``[]``: another one compiles nothing. It is checked where it is known."""
    traced = isinstance(value, jax.core.Tracer)
    array = value if traced else np.asarray(value)
    kinds = (jnp.integer,) if dtype == jnp.int32 else (jnp.integer, jnp.floating)
    fits = array.ndim == 0 and any(jnp.issubdtype(array.dtype, kind) for kind in kinds)
    if not fits or not (traced or good(array.item())):
        kind = "an integer " if dtype == jnp.int32 else ""
        raise ValueError(f"{name} must be {kind if not fits else ''}{wanted}, got {value}")
    return jnp.asarray(array, dtype)


def _check_known(broken, rows):
    """Raises a ValueError where a row of a result, bool ``[B]``, is broken and known to be."""
    if isinstance(broken, jax.core.Tracer) or not (count := int(jnp.sum(broken))):
        return
    raise ValueError(
        f"the model's log-probabilities are NaN for {count} of {len(broken)} {rows}: its parameters are not finite, or "
        "its memory has grown beyond float32; call the model itself on them to see where"
    )


@functools.partial(jax.jit, static_argnames=("graph", "max_new_tokens"))
def _generate(graph, state, prompts, lengths, key, temperature, top_k, top_p, *, max_new_tokens):
    model = nnx.merge(graph, state)
    batch, length = prompts.shape
    # What stands before a prompt is a document of its own, which its first token drops.
    segment_ids = (jnp.arange(length, dtype=lengths.dtype)[None] >= length - lengths[:, None]).astype(jnp.int32)
    segment_ids = None if model.config.positions == "relative" else segment_ids
    memory = model.init_memory(batch, length + max_new_tokens)
    hidden, memory = model.hidden(prompts, memory, segment_ids=segment_ids)
    good = (temperature >= 0) & (1 <= lengths) & (lengths <= length)  # for those that were traced
    good &= True if top_k is None else (1 <= top_k) & (top_k <= model.config.vocab_size)
    good &= True if top_p is None else (0 <= top_p) & (top_p <= 1)

    def choose(hidden, key):
        scores = model.log_probabilities(hidden)
        highest = jnp.max(scores, axis=-1)

        def draw():
            tempered = (scores - highest[:, None]) / temperature  # the likeliest have 0, which nothing overflows
            return jax.random.categorical(key, filtered(tempered, top_k, top_p)).astype(jnp.int32)

        def take():
            return jnp.argmax(scores, axis=-1).astype(jnp.int32)

        tokens = lax.cond(temperature >= jnp.finfo(jnp.float32).tiny, draw, take)
        return jnp.where(good & ~jnp.isnan(highest), tokens, -1)

    def step(carry, key):
        tokens, memory = carry
        hidden, memory = model.hidden(tokens[:, None], memory)  # of −1, NaN: all that follow are −1
        tokens = choose(hidden[:, -1], key)
        return (tokens, memory), tokens

    keys = jax.random.split(key, max_new_tokens)
    first = choose(hidden[:, -1], keys[0])
    if max_new_tokens == 1:
        return first[:, None]
    _, tokens = lax.scan(step, (first, memory), keys[1:])
    return jnp.concatenate([first[None], tokens]).T


def filtered(scores: jax.Array, top_k: jax.Array | int | None, top_p: jax.Array | float | None) -> jax.Array:
    """Scores ``[..., V]`` with −∞ for all tokens but the likeliest; see ``generate``. Ties stay in."""
    if top_k is None and top_p is None:
        return scores
    ranked = jnp.sort(scores, axis=-1, descending=True)
    least = ranked[..., -1:]
    if top_k is not None:
        least = jnp.take(ranked, top_k - 1, axis=-1)[..., None]
        ranked = jnp.where(ranked < least, -jnp.inf, ranked)
    if top_p is not None:
        probabilities = jax.nn.softmax(ranked, axis=-1)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        enough = jnp.min(jnp.where(before < top_p, ranked, jnp.inf), axis=-1, keepdims=True)
        enough = jnp.minimum(enough, ranked[..., :1])  # the likeliest stays in, however small top_p is
        least = jnp.where(top_p < 1, jnp.maximum(least, enough), least)  # at 1 rounding would cut off the rarest
    return jnp.where(scores < least, -jnp.inf, scores)


# --- translation -----------------------------------------------------------------------------------------------------


class Translations(NamedTuple):
    """What ``beam_search`` found, the best first.

    Attributes:
      tokens: int32 ``[B, R, L]``, each with its eos_id, then pad_id.
      scores: log p / length^length_penalty, float32 ``[B, R]``; −∞ where fewer than R were found. Where nothing can
        raise, tokens are −1 and scores NaN of a sentence whose log-probabilities are NaN.
    """

    tokens: jax.Array
    scores: jax.Array


class _Beams(NamedTuple):
    step: jax.Array  # []
    tokens: jax.Array  # of hypotheses that go on, [B, R, L]
    scores: jax.Array  # their log p, [B, R]
    found: Translations  # those that ended
    memory: object


def beam_search(
    model: EncoderDecoder,
    source: jax.Array,
    *,
    max_length: int,
    beam_size: int = 4,
    length_penalty: float = 1.0,
    early_stop: bool = True,
) -> Translations:
    """Translates sentences: a beam search in one compiled loop. beam_size 1 is greedy, with early_stop.

    Each step extends every hypothesis by every token, and keeps the R best that do not end; of those that end, the ones
    among the R best of all count. The memories of the hypotheses go with them: fast weights are of constant size, with
    softmax attention a step costs in proportion to max_length.

    Args:
      model: its numbers do not depend on the padding of the source.
      source: integers ``[B, S]``, from 0 to vocab_size − 1, padded with pad_id behind; a row of pad_id alone has no
        translation.
      max_length: L, tokens of a translation with its eos_id, at least 1, not traced; what is longer is ended there.
      beam_size: R, at least 1, not traced.
      length_penalty: a translation of n tokens is judged by log p / n^length_penalty; 0: by log p. At least 0.
      early_stop: a sentence is done when R translations of it ended; else when no hypothesis can become better than
        the R best that ended, which takes longer.

    Raises:
      ValueError: numbers out of their ranges, a source that is not integers ``[B, S]``, log-probabilities that are
        NaN. The last is seen in the result: outside of ``jax.jit`` the call waits for it.

    References:
      Graves 2012; Wu et al. 2016, section 7.
    """
    max_length, beam_size = _size("max_length", max_length), _size("beam_size", beam_size)
    length_penalty = _number("length_penalty", length_penalty, "at least 0", lambda x: x >= 0)
    most = model.config.vocab_size - 1
    source = output_layer.integers("source", source, most, axes="[rows ≥ 1, length ≥ 1]")
    options = {"max_length": max_length, "beam_size": beam_size, "early_stop": bool(early_stop)}
    found = _beam_search(*nnx.split(model), source, length_penalty, **options)
    _check_known(jnp.isnan(found.scores[:, 0]), "sentences")
    return found


@functools.partial(jax.jit, static_argnames=("graph", "max_length", "beam_size", "early_stop"))
def _beam_search(graph, state, source, length_penalty, *, max_length, beam_size, early_stop):
    model = nnx.merge(graph, state)
    config, batch = model.config, len(source)
    memory = model.encode(source, max_length, beam_size)
    nothing = jnp.full((batch, beam_size, max_length), config.pad_id, jnp.int32)
    unknown = jnp.full((batch, beam_size), -jnp.inf, jnp.float32)
    # All hypotheses are equal at first, so only one may count, and none of what is padding alone.
    first = unknown.at[:, 0].set(jnp.where(jnp.any(source != config.pad_id, axis=1), 0.0, -jnp.inf))
    start = _Beams(jnp.zeros((), jnp.int32), nothing, first, Translations(nothing, unknown), memory)

    def done(beams):
        """Which sentences are, ``[B]``."""
        best, worst = jnp.max(beams.scores, axis=1), jnp.min(beams.found.scores, axis=1)
        if early_stop:
            over = (worst > -jnp.inf) | (best == -jnp.inf)
        else:
            over = best / penalty(max_length) <= worst  # log p only falls, and no length makes it smaller
        return over | jnp.isnan(worst)

    def penalty(length):
        return jnp.asarray(length, jnp.float32) ** length_penalty

    def step(beams):
        last = beams.tokens[:, :, jnp.maximum(beams.step - 1, 0)]
        last = jnp.where(beams.step == 0, config.bos_id, last).reshape(-1, 1)
        hidden, memory = model.decode(last, beams.memory)
        scores = model.log_probabilities(hidden[:, 0]).reshape(batch, beam_size, -1) + beams.scores[..., None]
        finished = done(beams)
        wrong = jnp.isnan(jnp.max(scores, axis=(1, 2))) | ~(length_penalty >= 0)
        broken = jnp.isnan(beams.found.scores[:, 0]) | (wrong & ~finished)
        scores = scores.at[..., config.pad_id].set(-jnp.inf)
        ends = jnp.arange(config.vocab_size) == config.eos_id
        scores = jnp.where((beams.step == max_length - 1) & ~ends[None, None], -jnp.inf, scores)

        # Each hypothesis can end in one way, so that of the 2R best at least R go on.
        scores, places = _top_k(scores.reshape(batch, -1), 2 * beam_size)
        parents, tokens = places // config.vocab_size, (places % config.vocab_size).astype(jnp.int32)
        extended = _take(beams.tokens, parents).at[:, :, beams.step].set(tokens)
        ended = tokens == config.eos_id
        counts = ended & (jnp.arange(2 * beam_size) < beam_size)[None] & ~finished[:, None]
        new = jnp.where(counts, scores / penalty(beams.step + 1), -jnp.inf)
        found = Translations(
            jnp.concatenate([beams.found.tokens, extended], axis=1), jnp.concatenate([beams.found.scores, new], axis=1)
        )
        best_scores, best = _top_k(found.scores, beam_size)
        found = Translations(
            jnp.where(broken[:, None, None], -1, _take(found.tokens, best)),
            jnp.where(broken[:, None], jnp.nan, best_scores),
        )

        live_scores, live = _top_k(jnp.where(ended, -jnp.inf, scores), beam_size)
        rows = jnp.take_along_axis(parents, live, axis=1)
        memories = jax.tree.map(lambda x: take_rows(x, rows), memory.decoder)
        return _Beams(beams.step + 1, _take(extended, live), live_scores, found, memory._replace(decoder=memories))

    def goes_on(beams):
        return (beams.step < max_length) & ~jnp.all(done(beams))

    return lax.while_loop(goes_on, step, start).found


def _top_k(scores, k):
    """Of each row ``[B, N]``: ``[B, k]``. By itself the compiler brings all rows to all devices."""
    return sharding.over_batch(lambda scores, _: lax.top_k(scores, k), scores, ())


def _take(x, rows):
    """x ``[B, R, ...]`` and rows ``[B, R']`` -> ``[B, R', ...]``."""
    return jax.vmap(lambda x, rows: x[rows])(x, rows)


def take_rows(x, rows):
    """x ``[B·R, ...]``, the hypotheses of a sentence one after another, and which of them each extends, ``[B, R]`` ->
    ``[B·R, ...]``; sentence by sentence, so that each stays on its device."""
    return _take(x.reshape(*rows.shape, *x.shape[1:]), rows).reshape(x.shape)
