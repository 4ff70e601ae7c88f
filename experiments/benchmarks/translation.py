"""Translation models: the cost of a decoded token at different lengths, and of a training step.

    python -m experiments.benchmarks.translation [--rounds 5]

The models are the tiny ones (4 + 4 layers, d_model 128, 4 heads of 32, d_ff 256), with softmax, sum (ELU+1, DPFP-2) and
delta in the decoder. They run in turns, so that a change in the machine's speed affects all of them alike. The program
prints medians. experiments/translation/README.md has the results.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx

from experiments.benchmarks.language_models import timed
from experiments.run import command_line, training
from experiments.translation.experiment import loss
from experiments.translation.presets import find
from fwt_jax.decode import take_rows
from fwt_jax.models import EncoderDecoder

PRESETS = ("tiny-softmax", "tiny-elu", "tiny-dpfp-2", "tiny-delta")
LENGTHS = (64, 512, 4096)
STEPS = 32  # tokens decoded in one timed call


@dataclasses.dataclass(frozen=True)
class Config:
    """The benchmark."""

    rounds: int = 5
    """How often each call is timed."""
    parts: tuple[Literal["train", "decode"], ...] = ("train", "decode")
    """The parts to time."""

    def __post_init__(self):
        if self.rounds < 1:
            raise ValueError(f"rounds must be at least 1, got {self.rounds}")


def model_of(preset: str) -> EncoderDecoder:
    """The model of a preset, with 4,000 subwords and random parameters."""
    return EncoderDecoder(dataclasses.replace(find(preset)[1], vocab_size=4000), rngs=nnx.Rngs(0))


def decode(rounds: int):
    """Milliseconds of a decoding step of 8 sentences and 4 hypotheses, at the end of translations of some lengths."""
    print(f"decoding, 8 sentences of 32 tokens x 4 hypotheses: ms per step (mean of {STEPS}) at the end of this length")
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
    # The hypotheses that each step continues.
    parents = jax.random.randint(jax.random.key(1), (8, 4), 0, 4)

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

    return functools.partial(decode, state, memory, parents)


def train(rounds: int):
    """Target tokens per second of a training step."""
    print("training step, 128 pairs of 24 tokens")
    tokens = np.random.default_rng(0).integers(4, 4000, (2, 128, 24), np.int32)
    batch, calls = {"source": jnp.asarray(tokens[0]), "target": jnp.asarray(tokens[1])}, {}
    for preset in PRESETS:
        make = functools.partial(model_of, preset)
        settings = training.TrainConfig()
        step = jax.jit(training.make_step(training.graph_of(make), functools.partial(loss, 0.1), settings))
        calls[preset] = functools.partial(step, training.initial_state(make, settings), batch)
    for preset, seconds in timed(calls, rounds).items():
        print(f"  {preset:14} {1000 * seconds:8.1f} ms {tokens[1].size / seconds:10,.0f} tokens/s")


def main(config: Config):
    programs = {"train": train, "decode": decode}
    for part in config.parts:
        programs[part](config.rounds)


if __name__ == "__main__":
    with command_line.one_line():
        main(tyro.cli(Config, description=__doc__))
