"""Milliseconds per training step of the retrieval experiment, data included, beside the authors' program.

    python -m experiments.benchmarks.retrieval              the table (about five minutes on two cores)
    python -m experiments.benchmarks.retrieval --parts      the time of each part of a step at S = 600

The authors' column is their PyTorch program (Python loops over batch and time, batch 32): medians, measured in turns
with ours on two cores of an AMD EPYC. Our columns are the minimum and the median of ``--repeats`` jitted scans of
``--steps`` steps, on all cores of the process. ``taskset -c 0`` in front gives it one core, as a worker of a sweep has.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
import time

import jax
import jax.numpy as jnp
import optax
import tyro

from experiments.retrieval.model import Model, Task, draw_projection, make_step, predict, sample_pairs, with_gradient
from experiments.run import command_line

# For each model, and whether the setting is 2: the authors' milliseconds per step for each S, or None if not measured.
AUTHORS = {
    (Model("softmax", "softmax"), False): {20: 5.1, 200: 45, 600: 444},
    (Model("linear", "sum"), False): {20: 6.2, 200: 49, 600: 548},
    (Model("dpfp", "sum", 1), False): {20: 8.0, 200: 60, 600: 619},
    (Model("dpfp", "sum", 2), False): {20: None, 200: None, 600: None},
    (Model("dpfp", "sum", 3), False): {20: 11.3, 200: 87, 600: 822},
    (Model("favor", "sum", 64), False): {20: None, 200: None, 600: None},
    (Model("favor", "sum", 128), False): {20: None, 200: None, 600: None},
    (Model("favor", "sum", 512), False): {20: 16.1, 200: 224, 600: 1570},
    (Model("dpfp", "sum", 1), True): {200: None},
    (Model("linear", "delta"), True): {200: None},
    (Model("dpfp", "delta", 1), True): {20: 70, 100: 1100, 200: 3276},
    (Model("dpfp", "delta", 2), True): {200: None},
    (Model("favor", "delta", 64), True): {200: None},
    (Model("favor", "delta", 128), True): {200: None},
    (Model("dpfp", "fwm", 1), True): {200: None},
    (Model("tanh", "fwm"), True): {20: None, 100: None, 200: None},  # batch 128
}


@dataclasses.dataclass(frozen=True)
class Config:
    """The benchmark."""

    parts: bool = False
    """Time the parts of a step instead of whole steps."""
    steps: int = 20
    """Steps in one jitted scan."""
    repeats: int = 5
    """Scans timed, after one that is not."""

    def __post_init__(self):
        for name in ("steps", "repeats"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


def milliseconds(function, *args, steps: int, repeats: int) -> tuple[float, float]:
    """Minimum and median per step of a jitted function that makes ``steps`` steps."""
    function = jax.jit(function)
    jax.block_until_ready(function(*args))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(function(*args))
        times.append((time.perf_counter() - start) / steps * 1e3)
    return min(times), statistics.median(times)


def time_steps(config: Config):
    print(f"{'model':10} {'rule':8} {'S':>4} {'ours min':>9} {'median':>8} {'authors':>8} {'ratio':>6}   ms per step")
    for (model, replace), rows in AUTHORS.items():
        for num_keys, authors in rows.items():
            init, step = make_step(model, Task(num_keys, replace))
            keys = jax.random.split(jax.random.key(0), config.steps)
            scan = functools.partial(jax.lax.scan, step)
            best, median = milliseconds(scan, init(0), keys, steps=config.steps, repeats=config.repeats)
            line = f"{model.name:10} {model.rule:8} {num_keys:4} {best:9.2f} {median:8.2f}"
            print(f"{line} {authors:8.1f} {authors / median:6.0f}" if authors else line, flush=True)


def time_parts(config: Config):
    print(f"{'part, S = 600, batch 32':30} {'min':>8} {'median':>8}   ms per step")
    for name, (step, start) in step_parts().items():
        scan = functools.partial(jax.lax.scan, step, length=config.steps)
        best, median = milliseconds(scan, start, steps=config.steps, repeats=config.repeats)
        print(f"{name:30} {best:8.2f} {median:8.2f}", flush=True)


def step_parts(num_keys: int = 600, batch: int = 32) -> dict:
    """Each part of a step by itself: a body for ``lax.scan`` and its start. Parts with a gradient take it, too.

    The carry of each scan has the size of the part's result, so that no step allocates memory.
    """
    task, key = Task(num_keys, False), jax.random.key(0)
    values = sample_pairs(key, task, (batch,), num_keys)[1]
    embedding = jax.random.normal(key, (num_keys, task.embedding_size))
    twice = jnp.concatenate([embedding, embedding])  # with the rows that the authors' vocabulary has and never uses
    kernel = jax.random.normal(key, (task.embedding_size, 64)) * 0.01
    table, hidden = jax.random.normal(key, (num_keys, 64)), jax.random.normal(key, (batch, num_keys, 64))
    project = _descend(lambda x: jnp.sum(jnp.square(x @ kernel)))
    optimizer = optax.adam(1e-3)
    adam = functools.partial(_adam, optimizer)
    favor = Model("favor", "sum", 512)
    projection = _projection(key, favor)
    return {
        "permutations": (functools.partial(_sample, task, batch), key),
        "gather of values, scatter": (_descend(lambda x: jnp.sum(jnp.square(x[values]))), table),
        "W_K e of all keys": (project, embedding),
        "W_K e with unused rows": (project, twice),
        "Adam over the embeddings": (adam, (embedding, optimizer.init(embedding))),
        "Adam with unused rows": (adam, (twice, optimizer.init(twice))),
        "ELU+1 and read": (_read(Model("linear", "sum"), values), hidden),
        "DPFP-1 and read": (_read(Model("dpfp", "sum", 1), values), hidden),
        "DPFP-3 and read": (_read(Model("dpfp", "sum", 3), values), hidden),
        "FAVOR+ 512 projection": (functools.partial(_draw, favor), key),
        "FAVOR+ 512 and read": (_read(favor, values, projection), hidden),
    }


def _descend(loss):
    return lambda x, _: (x - 1e-3 * jax.grad(loss)(x), None)


def _read(model, values, projection=None):
    num_values = values.shape[-1]

    @with_gradient
    def one(key, values):
        return jnp.sum(jnp.square(predict(model, num_values, key, None, values, key[:1], projection))), None

    return _descend(lambda keys: jnp.sum(jax.lax.map(lambda pair: one(*pair)[0], (keys, values))))


def _adam(optimizer, carry, _):
    updates, moments = optimizer.update(carry[0], carry[1])
    return (optax.apply_updates(carry[0], updates), moments), None


def _sample(task, batch, key, _):
    return jax.random.fold_in(key, sample_pairs(key, task, (batch,), 0)[1][0, 0]), None


def _draw(model, key, _):
    return jax.random.fold_in(key, _projection(key, model)[0, 0].astype(int)), None


def _projection(key, model) -> jax.Array:
    projection = draw_projection(key, model)
    assert projection is not None, f"{model} has no projection"
    return projection


if __name__ == "__main__":
    with command_line.one_line():
        settings = tyro.cli(Config, description=__doc__)
        program = time_parts if settings.parts else time_steps
        program(settings)
