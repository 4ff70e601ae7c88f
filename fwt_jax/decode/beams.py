"""Beam search: a translation model translates sentences."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from fwt_jax import arguments, sharding
from fwt_jax.models import EncoderDecoder, TranslationMemory


class Translations(NamedTuple):
    """The result of ``beam_search``, the best translation first.

    Attributes:
      tokens: int32 ``[B, R, L]``, each with its eos_id, then pad_id.
      scores: log p / length^length_penalty, float32 ``[B, R]``; −∞ for each translation that is missing. Where an error
        cannot be raised, a sentence whose log-probabilities are NaN has tokens −1 and scores NaN.
    """

    tokens: jax.Array
    scores: jax.Array


class _Beams(NamedTuple):
    """The state of a search.

    Attributes:
      step: the number of tokens in each hypothesis, int32 ``[]``.
      tokens: the live hypotheses, int32 ``[B, R, L]``.
      scores: their log p, float32 ``[B, R]``.
      ended: the best hypotheses that ended.
      memory: a ``TranslationMemory`` of the live hypotheses.
    """

    step: jax.Array
    tokens: jax.Array
    scores: jax.Array
    ended: Translations
    memory: TranslationMemory


def beam_search(
    model: EncoderDecoder,
    source: jax.Array,
    *,
    max_length: int,
    beam_size: int = 4,
    length_penalty: float = 1.0,
    early_stop: bool = True,
) -> Translations:
    """Translates sentences by a beam search in one compiled loop. With beam_size 1 and early_stop it is greedy.

    Each step extends every hypothesis by every token. The R best extensions without eos_id are the next hypotheses. An
    extension with eos_id is a translation if it is among the R best of all. Fast weight memories have a constant size;
    with softmax attention the cost of a step is proportional to max_length.

    Args:
      model: its results do not depend on the padding of the source.
      source: integers ``[B, S]``, from 0 to vocab_size − 1, padded with pad_id behind; a row of pad_id alone has no
        translation.
      max_length: L, the largest number of tokens of a translation, with its eos_id; at least 1, not traced. A longer
        translation ends there.
      beam_size: R, at least 1, not traced.
      length_penalty: the score of a translation of n tokens is log p / n^length_penalty. At least 0.
      early_stop: True: a sentence is done when R translations have ended. False: it is done when no hypothesis can
        become better than the R best translations, which takes longer.

    Raises:
      ValueError: numbers out of their ranges, a source that is not integers ``[B, S]``, log-probabilities that are
        NaN. The last error needs the result: outside of ``jax.jit`` the call waits for it.

    References:
      Graves 2012; Wu et al. 2016, section 7.
    """
    max_length = arguments.static_size("max_length", max_length)
    beam_size = arguments.static_size("beam_size", beam_size)
    penalty = arguments.number("length_penalty", length_penalty, "at least 0", lambda x: x >= 0)
    last_word = model.config.vocab_size - 1
    source = arguments.integers("source", source, last_word, axes="[rows ≥ 1, length ≥ 1]")
    translations = _beam_search(
        *nnx.split(model),
        source,
        penalty,
        max_length=max_length,
        beam_size=beam_size,
        early_stop=bool(early_stop),
    )
    arguments.refuse_broken_rows(jnp.isnan(translations.scores[:, 0]), "sentences")
    return translations


@functools.partial(jax.jit, static_argnames=("graph", "max_length", "beam_size", "early_stop"))
def _beam_search(graph, state, source, length_penalty, *, max_length, beam_size, early_stop):
    model = nnx.merge(graph, state)

    def done(beams):
        """Whether a sentence needs no further step, ``[B]``."""
        best, worst = jnp.max(beams.scores, axis=1), jnp.min(beams.ended.scores, axis=1)
        if early_stop:
            enough = (worst > -jnp.inf) | (best == -jnp.inf)
        else:
            # log p only falls, and the score of a negative log p is largest at the largest length.
            enough = best / _penalty(max_length, length_penalty) <= worst
        return enough | jnp.isnan(worst)

    def goes_on(beams):
        return (beams.step < max_length) & ~jnp.all(done(beams))

    def step(beams):
        scores, memory = _next_scores(model, beams)
        finished = done(beams)
        wrong = jnp.isnan(jnp.max(scores, axis=(1, 2))) | ~(length_penalty >= 0)
        broken = jnp.isnan(beams.ended.scores[:, 0]) | (wrong & ~finished)
        scores = _allowed(scores, model.config, last=beams.step == max_length - 1)
        extended, scores, parents, ends = _extensions(beams, scores, model.config)
        # A translation must be among the R best of all extensions.
        counts = ends & (jnp.arange(2 * beam_size) < beam_size)[None] & ~finished[:, None]
        new_scores = jnp.where(counts, scores / _penalty(beams.step + 1, length_penalty), -jnp.inf)
        ended = _best(beams.ended, Translations(extended, new_scores), broken)

        live_scores, live = _top_k(jnp.where(ends, -jnp.inf, scores), beam_size)
        rows = jnp.take_along_axis(parents, live, axis=1)
        memories = jax.tree.map(lambda x: take_rows(x, rows), memory.decoder)
        return _Beams(beams.step + 1, _take(extended, live), live_scores, ended, memory._replace(decoder=memories))

    return lax.while_loop(goes_on, step, _start(model, source, max_length, beam_size)).ended


def _start(model, source, max_length, beam_size):
    pad_id, batch = model.config.pad_id, len(source)
    memory = model.encode(source, max_length, beam_size)
    padding = jnp.full((batch, beam_size, max_length), pad_id, jnp.int32)
    no_scores = jnp.full((batch, beam_size), -jnp.inf, jnp.float32)
    # All hypotheses are equal at first, so only one counts. A sentence that is padding alone has none.
    first_scores = no_scores.at[:, 0].set(jnp.where(jnp.any(source != pad_id, axis=1), 0.0, -jnp.inf))
    return _Beams(jnp.zeros((), jnp.int32), padding, first_scores, Translations(padding, no_scores), memory)


def _penalty(length, length_penalty):
    return jnp.asarray(length, jnp.float32) ** length_penalty


def _next_scores(model, beams):
    """log p of each hypothesis with each next token, ``[B, R, V]``, and the memory after the hypotheses."""
    last = beams.tokens[:, :, jnp.maximum(beams.step - 1, 0)]
    last = jnp.where(beams.step == 0, model.config.bos_id, last).reshape(-1, 1)
    hidden, memory = model.decode(last, beams.memory)
    log_p = model.log_probabilities(hidden[:, 0]).reshape(*beams.scores.shape, -1)
    return log_p + beams.scores[..., None], memory


def _allowed(scores, config, last):
    """Scores ``[B, R, V]`` with −∞ for padding, and in the last step for all tokens but eos_id."""
    scores = scores.at[..., config.pad_id].set(-jnp.inf)
    ends = jnp.arange(config.vocab_size) == config.eos_id
    return jnp.where(last & ~ends[None, None], -jnp.inf, scores)


def _extensions(beams, scores, config):
    """The 2R best hypotheses with one more token. Each hypothesis can end in one way, so at least R stay live.

    Args:
      beams: R hypotheses.
      scores: ``[B, R, V]``.

    Returns:
      Tokens ``[B, 2R, L]``, scores ``[B, 2R]``, the hypothesis that each extends, int32 ``[B, 2R]``, and whether it
      ends, bool ``[B, 2R]``.
    """
    batch, beam_size, vocab_size = scores.shape
    scores, places = _top_k(scores.reshape(batch, -1), 2 * beam_size)
    parents, tokens = places // vocab_size, (places % vocab_size).astype(jnp.int32)
    extended = _take(beams.tokens, parents).at[:, :, beams.step].set(tokens)
    return extended, scores, parents, tokens == config.eos_id


def _best(ended, new, broken):
    """The R best of two ``Translations``; tokens −1 and scores NaN in broken rows, bool ``[B]``."""
    tokens = jnp.concatenate([ended.tokens, new.tokens], axis=1)
    scores, best = _top_k(jnp.concatenate([ended.scores, new.scores], axis=1), ended.scores.shape[1])
    return Translations(
        jnp.where(broken[:, None, None], -1, _take(tokens, best)),
        jnp.where(broken[:, None], jnp.nan, scores),
    )


def _top_k(scores, k):
    """The k best scores of each row of ``[B, N]`` and their places, ``[B, k]``.

    Each device takes its own rows. The compiler alone would bring all rows to all devices.
    """
    return sharding.over_batch(lambda scores, _: lax.top_k(scores, k), scores, ())


def _take(x, rows):
    """x ``[B, R, ...]`` and rows ``[B, R']`` -> ``[B, R', ...]``."""
    return jax.vmap(lambda x, rows: x[rows])(x, rows)


def take_rows(x, rows):
    """Selects hypotheses sentence by sentence, so that each stays on its device.

    Args:
      x: ``[B·R, ...]``, the hypotheses of a sentence one after another.
      rows: for each new hypothesis the one that it extends, ``[B, R]``.

    Returns:
      ``[B·R, ...]``.
    """
    return _take(x.reshape(*rows.shape, *x.shape[1:]), rows).reshape(x.shape)
