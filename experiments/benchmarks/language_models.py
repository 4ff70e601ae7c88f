"""Language models: the cost of a training step, of a generated token, and of the sliding window.

    python -m experiments.benchmarks.language_models [--rounds 5]

The paper's small configuration with 4 layers (d_model 128, 8 heads of 16, d_ff 2048), softmax beside sum and delta,
taken in turns, so that a machine whose speed wanders is the same for all. Medians; results: experiments/README.md.
"""

from __future__ import annotations

import dataclasses
import time
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx

from experiments import command_line, training
from experiments import language_model_evaluation as evaluation
from experiments.language_model_presets import DELTA, NO_POSITIONS, SOFTMAX, SUM
from experiments.language_modeling import loss
from fwt_jax.models import DecoderLM, ModelConfig

BASE = ModelConfig(vocab_size=10_000, num_layers=4, **NO_POSITIONS)
MODELS = {"softmax": SOFTMAX, "sum": SUM, "delta": DELTA}
READ = (1024, 32_768, 524_288)
STEPS = 64  # tokens generated in one timed call


@dataclasses.dataclass(frozen=True)
class Config:
    """What to time."""

    rounds: int = 5
    """How often each is timed."""
    parts: tuple[Literal["train", "decode", "window"], ...] = ("train", "decode", "window")
    """Which of the three."""

    def __post_init__(self):
        if self.rounds < 1:
            raise ValueError(f"rounds must be at least 1, got {self.rounds}")


def timed(calls: dict, rounds: int) -> dict:
    """Median seconds of each call, taken in turns, after one that compiles."""
    for call in calls.values():
        jax.block_until_ready(call())
    seconds = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            jax.block_until_ready(call())
            seconds[name].append(time.perf_counter() - start)
    return {name: float(np.median(x)) for name, x in seconds.items()}


def train(rounds: int):
    """Tokens per second of a training step, T = 256, B = 8."""
    tokens = np.random.default_rng(0).integers(0, BASE.vocab_size, (8, 257), np.int32)
    batch = {"tokens": jnp.asarray(tokens[:, :-1]), "targets": jnp.asarray(tokens[:, 1:])}
    calls = {}
    for name, options in MODELS.items():
        config = dataclasses.replace(BASE, **options)

        def make(config=config):
            return DecoderLM(config, rngs=nnx.Rngs(0))

        settings = training.TrainConfig()
        step = jax.jit(training.make_step(training.graph_of(make), loss, settings))
        state = training.initial_state(make, settings)
        calls[name] = lambda step=step, state=state: step(state, batch)
    print("training step, d_model 128, 4 layers, d_ff 2048, T = 256, B = 8")
    for name, seconds in timed(calls, rounds).items():
        print(f"  {name:8} {1000 * seconds:8.1f} ms {8 * 256 / seconds:10,.0f} tokens/s")


def decode(rounds: int):
    """Milliseconds of a generated token after 1 k, 32 k and 512 k tokens were read."""
    print(f"decoding, batch 1: ms per token (mean of {STEPS}) after that many were read")
    calls = {}
    for name in ("softmax", "delta"):
        model = DecoderLM(dataclasses.replace(BASE, **MODELS[name]), rngs=nnx.Rngs(0))
        for read in READ:
            calls[name, read] = _generation(model, _memory(model, read))
    for (name, read), seconds in timed(calls, rounds).items():
        print(f"  {name:8} {read:8,} {1000 * seconds / STEPS:8.2f} ms")


def _memory(model, read):
    """What the model has after reading: fast weights of all tokens; for softmax a cache that is as full."""
    if model.config.rule == "softmax":
        memory = model.init_memory(1, read + STEPS)
        return tuple(cache._replace(length=jnp.full(1, read, jnp.int32)) for cache in memory)
    tokens = jax.random.randint(jax.random.key(0), (1, read), 0, model.config.vocab_size)
    hidden = nnx.jit(lambda model, tokens, memory: model.hidden(tokens, memory)[1])
    memory = model.init_memory(1)
    for start in range(0, read, 4096):
        memory = hidden(model, tokens[:, start : start + 4096], memory)
    return memory


def _generation(model, memory):
    graph, state = nnx.split(model)

    @jax.jit
    def generate(state, memory):
        def step(carry, _):
            token, memory = carry
            hidden, memory = nnx.merge(graph, state).hidden(token[:, None], memory)
            token = jnp.argmax(nnx.merge(graph, state).log_probabilities(hidden[:, -1]), axis=-1).astype(jnp.int32)
            return (token, memory), token

        return jax.lax.scan(step, (jnp.zeros(1, jnp.int32), memory), length=STEPS)[1]

    return lambda: generate(state, memory)


def window(rounds: int):
    """Windows of 256 tokens per second: one at a time, as the authors, beside 4 and 64 at once."""
    print("sliding window, 256 tokens: windows per second")
    tokens = np.random.default_rng(0).integers(0, BASE.vocab_size, 256 + 128, np.int32)
    calls, count = {}, len(tokens) - 256
    for name in ("softmax", "delta"):
        model = DecoderLM(dataclasses.replace(BASE, **MODELS[name]), rngs=nnx.Rngs(0))
        for size in (1, 4, 64):
            calls[name, size] = lambda model=model, size=size: evaluation.sliding_window(model, tokens, 256, size)
    for (name, size), seconds in timed(calls, rounds).items():
        print(f"  {name:8} {size:3} at once {count / seconds:8.1f}")


def main(config: Config):
    for part in config.parts:
        {"train": train, "decode": decode, "window": window}[part](config.rounds)


if __name__ == "__main__":
    with command_line.one_line():
        main(tyro.cli(Config, description=__doc__))
