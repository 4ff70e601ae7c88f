"""Language models: the cost of a training step, of a generated token, and of the sliding window.

    python -m experiments.benchmarks.language_models [--rounds 5]

The models are the paper's small configuration with 4 layers (d_model 128, 8 heads of 16, d_ff 2048), with softmax, sum
and delta. They train and evaluate in turns, so that a change in the machine's speed affects all of them alike. The
program prints medians. experiments/language/README.md has the results.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx

from experiments.language import evaluation
from experiments.language.experiment import loss
from experiments.language.presets import DELTA, NO_POSITIONS, SOFTMAX, SUM
from experiments.run import command_line, training
from fwt_jax.models import DecoderLM, ModelConfig

BASE = dataclasses.replace(ModelConfig(vocab_size=10_000, num_layers=4), **NO_POSITIONS)
MODELS = {"softmax": SOFTMAX, "sum": SUM, "delta": DELTA}
NUM_READ = (1024, 32_768, 524_288)  # tokens read before the timed call
STEPS = 64  # tokens generated in one timed call


@dataclasses.dataclass(frozen=True)
class Config:
    """The benchmark."""

    rounds: int = 5
    """How often each call is timed."""
    parts: tuple[Literal["train", "decode", "window"], ...] = ("train", "decode", "window")
    """The parts to time."""

    def __post_init__(self):
        if self.rounds < 1:
            raise ValueError(f"rounds must be at least 1, got {self.rounds}")


def _model(name: str) -> DecoderLM:
    return DecoderLM(dataclasses.replace(BASE, **MODELS[name]), rngs=nnx.Rngs(0))


def timed(calls: dict, rounds: int) -> dict:
    """Median seconds of each call. The calls run in turns, after a first round that compiles."""
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
    for name in MODELS:
        make = functools.partial(_model, name)
        settings = training.TrainConfig()
        step = jax.jit(training.make_step(training.graph_of(make), loss, settings))
        calls[name] = functools.partial(step, training.initial_state(make, settings), batch)
    print("training step, d_model 128, 4 layers, d_ff 2048, T = 256, B = 8")
    for name, seconds in timed(calls, rounds).items():
        print(f"  {name:8} {1000 * seconds:8.1f} ms {8 * 256 / seconds:10,.0f} tokens/s")


def decode(rounds: int):
    """Milliseconds of a generated token after 1 k, 32 k and 512 k tokens were read."""
    print(f"decoding, batch 1: ms per token (mean of {STEPS}) after this many tokens were read")
    for name in ("softmax", "delta"):
        model = _model(name)
        for num_read in NUM_READ:
            # Not in turns: what follows a call with gigabytes of cache is slower for it.
            seconds = timed({name: _generation(model, _memory(model, num_read))}, rounds)[name]
            print(f"  {name:8} {num_read:8,} {1000 * seconds / STEPS:8.2f} ms", flush=True)


def _memory(model, num_read):
    """The memory after reading random tokens. For softmax, it is a cache of that length with zeros in it."""
    if model.config.rule == "softmax":
        memory = model.init_memory(1, num_read + STEPS)
        return tuple(cache._replace(length=jnp.full(1, num_read, jnp.int32)) for cache in memory)
    tokens = jax.random.randint(jax.random.key(0), (1, num_read), 0, model.config.vocab_size)
    memory = model.init_memory(1)
    for start in range(0, num_read, 4096):
        memory = _read(model, tokens[:, start : start + 4096], memory)
    return memory


@nnx.jit
def _read(model, tokens, memory):
    return model.hidden(tokens, memory)[1]


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

    return functools.partial(generate, state, memory)


def window(rounds: int):
    """Windows of 256 tokens per second, in batches of 1 (as the authors), 4 and 64."""
    print("sliding window, 256 tokens: windows per second")
    tokens = np.random.default_rng(0).integers(0, BASE.vocab_size, 256 + 128, np.int32)
    calls, count = {}, len(tokens) - 256
    for name in ("softmax", "delta"):
        model = _model(name)
        for size in (1, 4, 64):
            calls[name, size] = functools.partial(evaluation.sliding_window, model, tokens, 256, size)
    for (name, size), seconds in timed(calls, rounds).items():
        print(f"  {name:8} batch {size:3} {count / seconds:8.1f}")


def main(config: Config):
    programs = {"train": train, "decode": decode, "window": window}
    for part in config.parts:
        programs[part](config.rounds)


if __name__ == "__main__":
    with command_line.one_line():
        main(tyro.cli(Config, description=__doc__))
