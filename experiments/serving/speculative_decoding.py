"""Speculative decoding without loss: a small model drafts n tokens, and one call of the large model checks them.

The call returns the memory after each token of the draft, so the next round goes on from the memory after the accepted
ones. It is the memory of a model that reads these tokens alone. The price is n + 1 memories of K·V numbers for each
head, written token by token. A second call with ``lengths=accepted`` would need none of them, but reads all parameters
again.

    python -m experiments.serving.speculative_decoding
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from fwt_jax.decode import generate
from fwt_jax.models import DecoderLM, ModelConfig


def read_one_by_one(model, token, memory, count):
    """The likeliest ``count`` tokens after ``token`` ``[B]``, and the memories after each, ``[count, B, ...]``."""

    def step(carry, _):
        token, memory = carry
        log_p, memory = model(token[:, None], memory)
        token = jnp.argmax(log_p[:, 0], axis=-1)
        return (token, memory), (token, memory)

    return jax.lax.scan(step, (token, memory), length=count)[1]


@functools.partial(nnx.jit, static_argnames="count")
def round_of(model, draft_model, token, memory, draft_memory, *, count):
    """The next tokens of each row, ``[B, count + 1]``, how many of them hold, the last of these, and both memories."""
    rows = jnp.arange(len(token))
    draft, draft_memories = read_one_by_one(draft_model, token, draft_memory, count + 1)
    draft = draft[:count].T
    log_p, memories = model(jnp.concatenate([token[:, None], draft], axis=1), memory, memory_every=1)
    likeliest = jnp.argmax(log_p, axis=-1)
    accepted = jnp.sum(jnp.cumprod(likeliest[:, :-1] == draft, axis=1), axis=1)
    memory = jax.tree.map(lambda x: x[rows, accepted], memories)
    draft_memory = jax.tree.map(lambda x: x[accepted, rows], draft_memories)
    return likeliest, accepted + 1, likeliest[rows, accepted], memory, draft_memory


def main():
    config = ModelConfig(vocab_size=30, num_layers=2, d_model=16, d_ff=32, num_heads=2, head_size=8, positions=None)
    model = DecoderLM(config, rngs=nnx.Rngs(0))
    # The model is not trained. Large parameters make its likeliest tokens depend on all earlier ones, not on rounding.
    nnx.update(model, jax.tree.map(lambda x: 50 * x, nnx.state(model, nnx.Param)))
    draft_model = nnx.clone(model)
    draft_model.blocks[1].feed_forward.out.kernel[...] *= 0.7  # so that it is often right, and not always
    prompts = jax.random.randint(jax.random.key(0), (3, 9), 0, 30)
    want = generate(model, prompts, 20, temperature=0)

    (log_p, memory), (_, draft_memory) = model(prompts), draft_model(prompts)
    token = jnp.argmax(log_p[:, -1], axis=-1)
    rows, calls = [[int(x)] for x in token], 1
    while min(map(len, rows)) < 20:
        likeliest, counts, token, memory, draft_memory = round_of(
            model, draft_model, token, memory, draft_memory, count=3
        )
        for row, new, length in zip(rows, likeliest.tolist(), counts.tolist(), strict=True):
            row.extend(new[:length])
        calls += 1
    assert [row[:20] for row in rows] == want.tolist()
    print(f"{list(map(len, rows))} tokens in {calls} calls of the model")


if __name__ == "__main__":
    main()
