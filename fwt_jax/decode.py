"""Generation: what was given at once, then token by token from a memory, with fast weights of constant size.

tokens = generate(model, prompts, 100, key=key)                          # a DecoderLM goes on
translations = beam_search(model, source, beam_size=4, max_length=50)    # an EncoderDecoder translates
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from fwt_jax import sharding
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
      prompts: integers ``[B, T]``; those shorter than T end at its end: ``prompts[b, -lengths[b]:]`` counts.
      max_new_tokens: at least 1.
      lengths: integers ``[B]``, from 1 to T; T if not given.
      key: of ``jax.random``, for temperatures above 0.
      temperature: p ∝ p^(1/temperature); 0 takes the likeliest token.
      top_k: draws from the k likeliest tokens alone.
      top_p: draws from the likeliest tokens alone that have p of the probability together (Holtzman et al. 2020), in
        (0, 1]; after top_k.

    Returns:
      The new tokens, int32 ``[B, max_new_tokens]``.

    Raises:
      ValueError: a model with positions "descending", lengths with "relative", numbers out of their ranges, a
        temperature above 0 without a key, prompts that are not integers ``[B, T]``.
    """
    if model.config.positions == "descending":
        raise ValueError(
            "generate needs a model with positions=None or 'relative', got 'descending', which counts the tokens that "
            "follow, so that each new one would change what all before it wrote"
        )
    if model.config.positions == "relative" and lengths is not None:
        raise ValueError('lengths are not for positions="relative", whose memory is not cut; take equal prompts')
    if prompts.ndim != 2 or 0 in prompts.shape or not jnp.issubdtype(prompts.dtype, jnp.integer):
        raise ValueError(f"prompts must be integers [B, T], T ≥ 1, got {prompts.dtype}{list(prompts.shape)}")
    if lengths is not None and (lengths.shape != prompts.shape[:1] or not jnp.issubdtype(lengths.dtype, jnp.integer)):
        raise ValueError(f"lengths must be integers [{len(prompts)}], got {lengths.dtype}{list(lengths.shape)}")
    vocab_size = model.config.vocab_size
    _check_range("prompts", prompts, 0, vocab_size - 1)
    _check_range("lengths", lengths, 1, prompts.shape[1])
    for name, value, good in (
        ("max_new_tokens must be at least 1", max_new_tokens, max_new_tokens >= 1),
        ("temperature must be at least 0", temperature, temperature >= 0),
        (f"top_k must be from 1 to {vocab_size}", top_k, top_k is None or 1 <= top_k <= vocab_size),
        ("top_p must be in (0, 1]", top_p, top_p is None or 0 < top_p <= 1),
    ):
        if not good:
            raise ValueError(f"{name}, got {value}")
    if key is None and temperature > 0:
        raise ValueError(
            "key must be given for a temperature above 0, e.g. jax.random.key(0); temperature=0 needs none"
        )
    lengths = jnp.full(len(prompts), prompts.shape[1], jnp.int32) if lengths is None else lengths
    key = jax.random.key(0) if key is None else key
    greedy = temperature == 0
    temperature = jnp.asarray(temperature, jnp.float32)
    return _generate(model, prompts, lengths, key, temperature, max_new_tokens, greedy, top_k, top_p)


def _check_range(name, x, low, high):
    if x is None or isinstance(x, jax.core.Tracer) or x.size == 0:  # of a tracer no numbers are known yet
        return
    least, most = int(jnp.min(x)), int(jnp.max(x))
    if least < low or most > high:
        raise ValueError(f"{name} must be from {low} to {high}, got {least} to {most}")


@functools.partial(nnx.jit, static_argnums=(5, 6, 7, 8))
def _generate(model, prompts, lengths, key, temperature, max_new_tokens, greedy, top_k, top_p):
    batch, length = prompts.shape
    # What stands before a prompt is a document of its own, which its first token drops.
    segment_ids = (jnp.arange(length)[None] >= length - lengths[:, None]).astype(jnp.int32)
    segment_ids = None if model.config.positions == "relative" else segment_ids
    memory = model.init_memory(batch, length + max_new_tokens)
    hidden, memory = model.hidden(prompts, memory, segment_ids=segment_ids)
    graph, state = nnx.split(model)

    def choose(hidden, key):
        scores = model.log_probabilities(hidden)
        if greedy:
            return jnp.argmax(scores, axis=-1).astype(jnp.int32)
        return jax.random.categorical(key, filtered(scores / temperature, top_k, top_p)).astype(jnp.int32)

    def step(carry, key):
        tokens, memory = carry
        hidden, memory = nnx.merge(graph, state).hidden(tokens[:, None], memory)
        tokens = choose(hidden[:, -1], key)
        return (tokens, memory), tokens

    keys = jax.random.split(key, max_new_tokens)
    first = choose(hidden[:, -1], keys[0])
    if max_new_tokens == 1:
        return first[:, None]
    _, tokens = lax.scan(step, (first, memory), keys[1:])
    return jnp.concatenate([first[None], tokens]).T


def filtered(scores: jax.Array, top_k: int | None, top_p: float | None) -> jax.Array:
    """Scores ``[..., V]`` with −∞ for all tokens but the likeliest; see ``generate``. Ties stay in."""
    if top_k is not None:
        least = lax.top_k(scores, top_k)[0][..., -1:]
        scores = jnp.where(scores < least, -jnp.inf, scores)
    if top_p is not None and top_p < 1:  # rounding would cut off the rarest of many
        ranked = jnp.sort(scores, axis=-1, descending=True)
        probabilities = jax.nn.softmax(ranked, axis=-1)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        least = jnp.min(jnp.where(before < top_p, ranked, jnp.inf), axis=-1, keepdims=True)
        scores = jnp.where(scores < least, -jnp.inf, scores)
    return scores


# --- translation -----------------------------------------------------------------------------------------------------


class Translations(NamedTuple):
    """What ``beam_search`` found, the best first.

    Attributes:
      tokens: int32 ``[B, R, L]``, each with its eos_id, then pad_id.
      scores: log p / length^length_penalty, float32 ``[B, R]``; −∞ where fewer than R were found.
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
      max_length: L, tokens of a translation with its eos_id, at least 1; what is longer is ended there.
      beam_size: R, at least 1.
      length_penalty: a translation of n tokens is judged by log p / n^length_penalty; 0: by log p. At least 0.
      early_stop: a sentence is done when R translations of it ended; else when no hypothesis can become better than
        the R best that ended, which takes longer.

    Raises:
      ValueError: numbers out of their ranges, a source that is not integers ``[B, S]``.

    References:
      Graves 2012; Wu et al. 2016, section 7.
    """
    for name, value, good in (
        ("max_length must be at least 1", max_length, max_length >= 1),
        ("beam_size must be at least 1", beam_size, beam_size >= 1),
        ("length_penalty must be at least 0", length_penalty, length_penalty >= 0),
    ):
        if not good:
            raise ValueError(f"{name}, got {value}")
    _check_range("source", source, 0, model.config.vocab_size - 1)
    return _beam_search(model, source, max_length, beam_size, float(length_penalty), early_stop)


@functools.partial(nnx.jit, static_argnums=(2, 3, 4, 5))
def _beam_search(model, source, max_length, beam_size, length_penalty, early_stop):
    config, batch = model.config, len(source)
    memory = model.encode(source, max_length, beam_size)
    graph, state = nnx.split(model)
    nothing = jnp.full((batch, beam_size, max_length), config.pad_id, jnp.int32)
    unknown = jnp.full((batch, beam_size), -jnp.inf)
    # All hypotheses are equal at first, so only one may count, and none of what is padding alone.
    first = unknown.at[:, 0].set(jnp.where(jnp.any(source != config.pad_id, axis=1), 0.0, -jnp.inf))
    start = _Beams(jnp.zeros((), jnp.int32), nothing, first, Translations(nothing, unknown), memory)

    def done(beams):
        """Which sentences are, ``[B]``."""
        best, worst = jnp.max(beams.scores, axis=1), jnp.min(beams.found.scores, axis=1)
        if early_stop:
            return (worst > -jnp.inf) | (best == -jnp.inf)
        return best / max_length**length_penalty <= worst  # log p only falls, and no length makes it smaller

    def step(beams):
        last = beams.tokens[:, :, jnp.maximum(beams.step - 1, 0)]
        last = jnp.where(beams.step == 0, config.bos_id, last).reshape(-1, 1)
        model = nnx.merge(graph, state)
        hidden, memory = model.decode(last, beams.memory)
        scores = model.log_probabilities(hidden[:, 0]).reshape(batch, beam_size, -1) + beams.scores[..., None]
        scores = scores.at[..., config.pad_id].set(-jnp.inf)
        ends = jnp.arange(config.vocab_size) == config.eos_id
        scores = jnp.where((beams.step == max_length - 1) & ~ends[None, None], -jnp.inf, scores)

        # Each hypothesis can end in one way, so that of the 2R best at least R go on.
        scores, places = _top_k(scores.reshape(batch, -1), 2 * beam_size)
        parents, tokens = places // config.vocab_size, (places % config.vocab_size).astype(jnp.int32)
        extended = _take(beams.tokens, parents).at[:, :, beams.step].set(tokens)
        ended = tokens == config.eos_id
        counts = ended & (jnp.arange(2 * beam_size) < beam_size)[None] & ~done(beams)[:, None]
        new = jnp.where(counts, scores / (beams.step + 1) ** length_penalty, -jnp.inf)
        found = Translations(
            jnp.concatenate([beams.found.tokens, extended], axis=1), jnp.concatenate([beams.found.scores, new], axis=1)
        )
        best_scores, best = _top_k(found.scores, beam_size)
        found = Translations(_take(found.tokens, best), best_scores)

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
