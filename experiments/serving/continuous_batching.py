"""Continuous batching: when a row of the batch is done, the next prompt takes its place while the others go on.

A memory has one size whatever its row has read, so a new prompt's memory is set into the row of the batch. Prompts are
padded behind to one length and read with ``lengths``, so that two programs are compiled in all.

    python -m experiments.serving.continuous_batching
"""

from collections import deque

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fwt_jax.decode import generate
from fwt_jax.models import DecoderLM, ModelConfig


@nnx.jit
def read(model, prompt, length, memories, row):
    """The likeliest token after a prompt ``[T]`` of ``length`` tokens, and the memories with that of the prompt."""
    log_p, memory = model(prompt[None], lengths=length[None])
    return jnp.argmax(log_p[0, length - 1]), jax.tree.map(lambda all, x: all.at[row].set(x[0]), memories, memory)


@nnx.jit
def step(model, tokens, memories):
    """The likeliest token after each row's ``tokens`` ``[B]``, and the memories."""
    log_p, memories = model(tokens[:, None], memories)
    return jnp.argmax(log_p[:, 0], axis=-1), memories


def serve(model, requests, batch_size, max_length):
    """The likeliest continuations of requests (prompt, number of tokens), in their order."""
    waiting, answers = deque(enumerate(requests)), [[] for _ in requests]
    memories, tokens, served = model.init_memory(batch_size), np.zeros(batch_size, np.int32), [None] * batch_size
    while True:
        for row in range(batch_size):
            if served[row] is not None and len(answers[served[row]]) == requests[served[row]][1]:
                served[row] = None
            if served[row] is None and waiting:
                served[row], (prompt, _) = waiting.popleft()
                padded = np.pad(prompt, (0, max_length - len(prompt)))
                tokens[row], memories = read(model, padded, np.int32(len(prompt)), memories, row)
                answers[served[row]].append(int(tokens[row]))
        if not any(number is not None for number in served):
            return answers
        likeliest, memories = step(model, tokens, memories)
        tokens = np.array(likeliest)
        for token, number in zip(tokens, served, strict=True):
            if number is not None and len(answers[number]) < requests[number][1]:
                answers[number].append(int(token))


def main():
    config = ModelConfig(vocab_size=30, num_layers=1, d_model=16, d_ff=32, num_heads=2, head_size=8, positions=None)
    model, rng = DecoderLM(config, rngs=nnx.Rngs(0)), np.random.default_rng(0)
    # The model is not trained. Large parameters make its likeliest tokens depend on all earlier ones, not on rounding.
    nnx.update(model, jax.tree.map(lambda x: 50 * x, nnx.state(model, nnx.Param)))
    requests = [(rng.integers(0, 30, length), count) for length, count in ((3, 4), (7, 1), (5, 6), (8, 3), (1, 2))]
    answers = serve(model, requests, batch_size=2, max_length=8)
    prompts = np.stack([np.pad(prompt, (0, 8 - len(prompt))) for prompt, _ in requests])
    lengths = [len(prompt) for prompt, _ in requests]
    want = generate(model, prompts, 6, lengths=lengths, padding="behind", temperature=0)
    assert answers == [row[:count].tolist() for row, (_, count) in zip(np.array(want), requests, strict=True)]
    print(f"{len(requests)} prompts in a batch of 2: {answers}")


if __name__ == "__main__":
    main()
