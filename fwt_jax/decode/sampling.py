"""Sampling: a language model continues prompts."""

from __future__ import annotations

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.core import Tracer

from fwt_jax import arguments
from fwt_jax.models import DecoderLM


def generate(
    model: DecoderLM,
    prompts: jax.Array,
    max_new_tokens: int,
    *,
    lengths: jax.Array | None = None,
    padding: Literal["front", "behind"] = "front",
    key: jax.Array | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> jax.Array:
    """Continues prompts with tokens drawn from p(token | all before), in one compiled loop.

    With fast weights, the cost of a step and the memory do not depend on the number of tokens. With softmax attention
    both grow with T + max_new_tokens. The prompt is read in one call.

    Args:
      model: with ``positions`` None or "relative", because its memory must not depend on later tokens.
      prompts: integers ``[B, T]`` from 0 to V − 1, also where they are padding.
      max_new_tokens: at least 1, not traced.
      lengths: of the prompts, integers ``[B]`` from 1 to T; T if not given. A row goes on as its prompt does alone.
      padding: where shorter prompts are padded: "front", ``prompts[b, -lengths[b]:]`` counts, or "behind",
        ``prompts[b, :lengths[b]]`` counts.
      key: of ``jax.random``, for temperatures above 0: one, or one for each row, ``[B]``. With its own key, a row draws
        what it draws alone.
      temperature: p ∝ p^(1/temperature). 0 takes the likeliest token, and so does a number below 1.2e-38, the smallest
        by which float32 can divide.
      top_k: draws from the k likeliest tokens, and from those as likely as the k-th.
      top_p: draws from the fewest likeliest tokens whose probabilities sum to at least p (Holtzman et al. 2020), in
        (0, 1]; after top_k.

    Returns:
      The new tokens, int32 ``[B, max_new_tokens]``. Where an error cannot be raised, they are −1 from the error on.

    Raises:
      ValueError: a model with positions "descending", lengths with "relative", numbers out of their ranges, a
        temperature above 0 without a key, prompts that are not integers ``[B, T]``, log-probabilities that are NaN. The
        last error needs the result: outside of ``jax.jit`` the call waits for it.
    """
    _check_positions(model.config.positions, lengths)
    vocab_size = model.config.vocab_size
    prompts = arguments.integers("prompts", prompts, vocab_size - 1, axes="[B, T], T ≥ 1")
    batch, length = prompts.shape
    arguments.one_of(("front", "behind"), padding=padding)
    if lengths is not None:
        lengths = arguments.integers("lengths", lengths, length, axes=f"[{batch}]", shape=(batch,), least=1)
        if padding == "front":
            places = jnp.arange(length, dtype=jnp.int32)[None] - lengths[:, None]
            prompts = jnp.take_along_axis(prompts, places % length, axis=1)
    count = arguments.static_size("max_new_tokens", max_new_tokens)
    divisor = arguments.number("temperature", temperature, "at least 0", lambda x: x >= 0)
    key = _checked_key(key, temperature, batch)
    k = p = None
    if top_k is not None:
        k = arguments.number("top_k", top_k, f"from 1 to {vocab_size}", lambda x: 1 <= x <= vocab_size, jnp.int32)
    if top_p is not None:
        p = arguments.number("top_p", top_p, "in (0, 1]", lambda x: 0 < x <= 1)
    tokens = _generate(*nnx.split(model), prompts, lengths, key, divisor, k, p, max_new_tokens=count)
    arguments.refuse_broken_rows(tokens[:, -1] < 0, "prompts")
    return tokens


def _check_positions(positions, lengths):
    if positions == "descending":
        raise ValueError(
            "generate needs a model with positions=None or 'relative', got 'descending': it counts the tokens that "
            "follow, so a new token would change the writes of all earlier ones"
        )
    if positions == "relative" and lengths is not None:
        raise ValueError(
            'lengths are not for positions="relative", whose memory is not cut; take prompts of one length'
        )


def _checked_key(key, temperature, batch) -> Any:
    """A key ``[]`` or ``[B]`` of JAX's newer kind."""
    if key is None and (isinstance(temperature, Tracer) or np.asarray(temperature) != 0):
        raise ValueError(
            "key must be given for a temperature above 0, or one that is traced, e.g. jax.random.key(0); "
            "temperature=0 needs none"
        )
    if key is not None and not isinstance(key, (jax.Array, np.ndarray)):
        raise ValueError(f"key must be one of jax.random, e.g. jax.random.key(0), got {key!r}")
    if key is None:
        return jax.random.key(0)
    key = key if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else jax.random.wrap_key_data(jnp.asarray(key))
    if key.shape not in ((), (batch,)):
        raise ValueError(f"key must be one, or one for each of {batch} rows, got {list(key.shape)}")
    return key


@functools.partial(jax.jit, static_argnames=("graph", "max_new_tokens"))
def _generate(graph, state, prompts, lengths, key, temperature, top_k, top_p, *, max_new_tokens):
    model = nnx.merge(graph, state)
    batch, length = prompts.shape
    memory = model.init_memory(batch, length + max_new_tokens)
    hidden, memory = model.hidden(prompts, memory, lengths=lengths)
    lengths = jnp.full(batch, length) if lengths is None else lengths
    last = jnp.take_along_axis(hidden, lengths[:, None, None] - 1, axis=1)[:, 0]
    in_range = _in_range(lengths, length, temperature, top_k, top_p, model.config.vocab_size)

    def choose(hidden, key):
        scores = model.log_probabilities(hidden)
        tokens = _chosen(scores, key, temperature, top_k, top_p)
        return jnp.where(in_range & ~jnp.isnan(jnp.max(scores, axis=-1)), tokens, -1)

    def step(carry, key):
        tokens, memory = carry
        # The hidden state of token −1 is NaN, so all later tokens of the row are −1.
        hidden, memory = model.hidden(tokens[:, None], memory)
        tokens = choose(hidden[:, -1], key)
        return (tokens, memory), tokens

    split = functools.partial(jax.random.split, num=max_new_tokens)
    keys = jax.vmap(split, out_axes=1)(key) if key.ndim else split(key)
    first = choose(last, keys[0])
    if max_new_tokens == 1:
        return first[:, None]
    _, tokens = lax.scan(step, (first, memory), keys[1:])
    return jnp.concatenate([first[None], tokens]).T


def _in_range(lengths, length, temperature, top_k, top_p, vocab_size):
    """Whether numbers that may be traced are in their ranges, bool ``[B]``."""
    in_range = (temperature >= 0) & (1 <= lengths) & (lengths <= length)
    if top_k is not None:
        in_range &= (1 <= top_k) & (top_k <= vocab_size)
    if top_p is not None:
        in_range &= (0 <= top_p) & (top_p <= 1)
    return in_range


def _chosen(scores, key, temperature, top_k, top_p):
    """One token for each row of scores ``[B, V]``: drawn, or the likeliest if float32 cannot divide by temperature."""
    highest = jnp.max(scores, axis=-1)

    def draw():
        # The likeliest token has 0, so that no quotient overflows to ∞.
        tempered = (scores - highest[:, None]) / temperature
        draw_one = jax.vmap(jax.random.categorical) if key.ndim else jax.random.categorical
        return draw_one(key, filtered(tempered, top_k, top_p)).astype(jnp.int32)

    def take_likeliest():
        return jnp.argmax(scores, axis=-1).astype(jnp.int32)

    return lax.cond(temperature >= jnp.finfo(jnp.float32).tiny, draw, take_likeliest)


def filtered(scores: jax.Array, top_k: jax.Array | int | None, top_p: jax.Array | float | None) -> jax.Array:
    """Scores ``[..., V]`` with −∞ for the tokens that ``top_k`` and ``top_p`` of ``generate`` exclude. Ties stay in."""
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
        enough = jnp.minimum(enough, ranked[..., :1])  # The likeliest token stays in, however small top_p is.
        # With top_p = 1 nothing is cut, because rounding would cut off the rarest tokens.
        least = jnp.where(top_p < 1, jnp.maximum(least, enough), least)
    return jnp.where(scores < least, -jnp.inf, scores)
