"""A prefix cache: prompts that begin with the same tokens read them once.

The memories after every N tokens of a prompt come from the pass that reads it. They are stored under the tokens up to
there. A later prompt goes on from the longest prefix that it shares. A stored prefix takes K·V + K numbers for each
head of each layer, whatever its length.

    python -m experiments.serving.prefix_cache
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fwt_jax.models import DecoderLM, ModelConfig


@functools.partial(nnx.jit, static_argnames="every")
def read(model, tokens, memory=None, every=None):
    return model(tokens, memory, memory_every=every)


class PrefixCache:
    """Memories of ``model`` after prefixes of ``every``, 2·``every``, … tokens."""

    def __init__(self, model: DecoderLM, every: int):
        self.model, self.every = model, every
        self.memories = {(): None}

    def read(self, prompt: tuple[int, ...]):
        """log p of the token after the prompt ``[V]``, the memory after it, and the number of tokens it had to read."""
        known = max(n for n in range(0, len(prompt), self.every) if prompt[:n] in self.memories)
        rest = jnp.asarray(prompt[known:])[None]
        log_p, memories = read(self.model, rest, self.memories[prompt[:known]], self.every)
        for i, stop in enumerate(range(known + self.every, len(prompt) + 1, self.every)):
            self.memories[prompt[:stop]] = jax.tree.map(lambda x, i=i: x[:, i], memories)
        return log_p[0, -1], jax.tree.map(lambda x: x[:, -1], memories), rest.size


def main():
    config = ModelConfig(vocab_size=100, num_layers=1, d_model=32, d_ff=64, num_heads=2, positions=None)
    model = DecoderLM(config, rngs=nnx.Rngs(0))
    cache, words = PrefixCache(model, every=16), np.random.default_rng(0).integers(0, 100, 60).tolist()
    first, second = tuple(words[:45]), tuple(words[:35] + words[50:])  # 35 tokens in common
    for prompt, expected in ((first, 45), (second, 45 - 32)):
        log_p, _, count = cache.read(prompt)
        whole, _ = read(model, jnp.asarray(prompt)[None])
        assert count == expected
        np.testing.assert_allclose(log_p, whole[0, -1], rtol=1e-5, atol=1e-5)
        print(f"a prompt of {len(prompt)} tokens: {count} were read")


if __name__ == "__main__":
    main()
