"""Translation models: the cost of a decoded token at different lengths, and of a training step.

    python -m experiments.benchmarks.translation [--rounds 5]

The tiny model (4 + 4 layers, d_model 128, 4 heads of 32, d_ff 256), softmax beside sum (ELU+1, DPFP-2) and delta in the
decoder, taken in turns, so that a machine whose speed wanders is the same for all. Medians; results:
experiments/README.md.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx

from experiments import command_line, training
from experiments.benchmarks.language_models import timed
from experiments.translation import loss
from experiments.translation_presets import find
from fwt_jax.decode import take_rows
from fwt_jax.encoder_decoder import EncoderDecoder

PRESETS = ("tiny-softmax", "tiny-elu", "tiny-dpfp-2", "tiny-delta")
LENGTHS = (64, 512, 4096)
STEPS = 32  # tokens decoded in one timed call


@dataclasses.dataclass(frozen=True)
class Config:
    """What to time."""

    rounds: int = 5
    """How often each is timed."""
    parts: tuple[Literal["train", "decode"], ...] = ("train", "decode")
    """Which of the two."""

    def __post_init__(self):
        if self.rounds < 1:
            raise ValueError(f"rounds must be at least 1, got {self.rounds}")


def model_of(preset: str) -> EncoderDecoder:
    """Of 4,000 subwords, with random parameters."""
    return EncoderDecoder(dataclasses.replace(find(preset)[1], vocab_size=4000), rngs=nnx.Rngs(0))


def decode(rounds: int):
    """Milliseconds of a step of beam search's model, 8 sentences and 4 hypotheses, at the end of a translation."""
    print(f"decoding, 8 sentences of 32 tokens x 4 hypotheses: ms per step (mean of {STEPS}) at the end of that length")
    source = jax.random.randint(jax.random.key(0), (8, 32), 4, 4000)
    calls = {}
    for preset in PRESETS:
        model = model_of(preset)
        for length in LENGTHS:
            memory = nnx.jit(EncoderDecoder.encode, static_argnums=(2, 3))(model, source, length, 4)
            memory = memory._replace(position=jnp.asarray(length - STEPS, jnp.int32))
            if model.config.decoder.rule == "softmax":
                full = jnp.full(32, length - STEPS, jnp.int32)
                memory = memory._replace(decoder=tuple(cache._replace(length=full) for cache in memory.decoder))
            calls[preset, length] = _decoding(model, memory)
    for (preset, length), seconds in timed(calls, rounds).items():
        print(f"  {preset:14} {length:6,} {1000 * seconds / STEPS:8.2f} ms")


def _decoding(model, memory):
    graph, state = nnx.split(model)
    parents = jax.random.randint(jax.random.key(1), (8, 4), 0, 4)  # of the hypotheses that go on

    @jax.jit
    def decode(state, memory, parents):
        def step(carry, _):
            tokens, memory = carry
            model = nnx.merge(graph, state)
            hidden, memory = model.decode(tokens, memory)
            memory = memory._replace(decoder=jax.tree.map(lambda x: take_rows(x, parents), memory.decoder))
            tokens = jnp.argmax(model.log_probabilities(hidden), axis=-1).astype(jnp.int32)
            return (tokens, memory), None

        return jax.lax.scan(step, (jnp.full((32, 1), 5, jnp.int32), memory), length=STEPS)[0][0]

    return lambda: decode(state, memory, parents)


def train(rounds: int):
    """Tokens of the target per second of a training step."""
    print("training step, 128 pairs of 24 tokens")
    tokens = np.random.default_rng(0).integers(4, 4000, (2, 128, 24), np.int32)
    batch, calls = {"source": jnp.asarray(tokens[0]), "target": jnp.asarray(tokens[1])}, {}
    for preset in PRESETS:

        def make(preset=preset):
            return model_of(preset)

        def smoothed(*args):
            return loss(0.1, *args)

        settings = training.TrainConfig()
        step = jax.jit(training.make_step(training.graph_of(make), smoothed, settings))
        state = training.initial_state(make, settings)
        calls[preset] = lambda step=step, state=state: step(state, batch)
    for preset, seconds in timed(calls, rounds).items():
        print(f"  {preset:14} {1000 * seconds:8.1f} ms {tokens[1].size / seconds:10,.0f} tokens/s")


def main(config: Config):
    for part in config.parts:
        {"train": train, "decode": decode}[part](config.rounds)


if __name__ == "__main__":
    with command_line.one_line():
        main(tyro.cli(Config, description=__doc__))
