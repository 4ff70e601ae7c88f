"""Generation from a ``DecoderLM``: the prompt at once, then token by token from a memory of constant size."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

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

    first, *rest = jax.random.split(key, max_new_tokens)
    first = choose(hidden[:, -1], first)
    if not rest:
        return first[:, None]
    _, tokens = lax.scan(step, (first, memory), jnp.stack(rest))
    return jnp.concatenate([first[None], tokens]).T


def filtered(scores: jax.Array, top_k: int | None, top_p: float | None) -> jax.Array:
    """Scores ``[..., V]`` with −∞ for all tokens but the likeliest; see ``generate``. Ties stay in."""
    if top_k is not None:
        least = lax.top_k(scores, top_k)[0][..., -1:]
        scores = jnp.where(scores < least, -jnp.inf, scores)
    if top_p is not None:
        ranked = jnp.sort(scores, axis=-1, descending=True)
        probabilities = jax.nn.softmax(ranked, axis=-1)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        least = jnp.min(jnp.where(before < top_p, ranked, jnp.inf), axis=-1, keepdims=True)
        scores = jnp.where(scores < least, -jnp.inf, scores)
    return scores
