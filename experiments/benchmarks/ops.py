"""Every form of the delta rule: ours, a plain scan, and other JAX libraries.

    python -m experiments.benchmarks.ops                     the table (about four minutes on two cores)
    python -m experiments.benchmarks.ops --peers peers       with the libraries in the folder peers

These commands make the folder. The program searches it after the environment, so the jax in it is not used.

    pip install --target peers ejkernel==0.0.80.3
    pip install --target peers --no-deps --ignore-requires-python maxtext==0.2.5 jax-linear-attention==0.1.0

On CPU the libraries need XLA_FLAGS=--xla_cpu_enable_concurrency_optimized_scheduler=false, because their triangular
solves can dead-lock jaxlib 0.10. Ours has none.

Inputs: float32, B = 2, H = 4, unit-norm queries and keys, normal values, β uniform in (0, 1). The gradient of ⟨y, w⟩
for a normal w is taken in q, k, v and β. All forms of a shape are compiled first. Then they run in turns, forwards and
backwards through the list, so that other load on the machine affects all of them alike. Columns: milliseconds (minimum
and median), seconds to compile the gradient, MiB of its temporary memory, and the largest error against float64,
relative to the largest entry.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib
import os
import pathlib
import statistics
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax import lax

import fwt_jax
from experiments.run import command_line

BATCH, HEADS = 2, 4


@dataclasses.dataclass(frozen=True)
class Config:
    """The shapes to time."""

    peers: pathlib.Path | None = None
    """Folder with other libraries, made as the head of this file says."""
    shapes: tuple[tuple[int, int], ...] = ((512, 64), (2048, 64), (2048, 128), (8192, 64))
    """Pairs of T and K = V."""
    repeats: int = 7
    """Timed calls of each form, after one that is not timed."""

    def __post_init__(self):
        if self.repeats < 1:
            raise ValueError(f"repeats must be at least 1, got {self.repeats}")


def naive_scan(query, key, value, beta):
    """The program that one writes without a library: a scan over tokens, with all heads in each step."""

    def step(fast_weights, token):
        query, key, value, beta = token
        error = value - jnp.einsum("bhk,bhkv->bhv", key, fast_weights)
        fast_weights += jnp.einsum("bhk,bhv->bhkv", beta[..., None] * key, error)
        return fast_weights, jnp.einsum("bhk,bhkv->bhv", query, fast_weights)

    tokens = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (query, key, value, beta))
    start = jnp.zeros((BATCH, HEADS, key.shape[-1], value.shape[-1]), key.dtype)
    return jnp.moveaxis(lax.scan(step, start, tokens)[1], 0, 1)


def ours(form):
    return lambda query, key, value, beta: fwt_jax.fast_weight_attention(query, key, value, beta, form=form)[0]


def load_peers(folder: pathlib.Path, dtype=jnp.float32) -> dict:
    """The libraries in ``folder``: name -> function (query, key, value, beta) -> reads. MaxText computes in dtype."""
    if not folder.is_dir():
        raise ValueError(f"no folder {folder}; the head of {__file__} says how to make it")
    sys.path.append(str(folder))

    def scaled(query):
        return query * query.shape[-1] ** 0.5  # they divide it by √K

    def ejkernel(query, key, value, beta):
        rule = importlib.import_module("ejkernel.kernels._xla.gated_delta_rule").gated_delta_rule
        return rule(scaled(query), key, value, beta, chunk_size=64, use_qk_l2norm=False)[0]

    def maxtext(query, key, value, beta):
        # The file imports all of MaxText, so only the one function is compiled.
        tree = ast.parse((folder / "maxtext/models/qwen3.py").read_text())
        tree.body = [x for x in tree.body if getattr(x, "name", "") == "jax_chunk_gated_delta_rule"]
        names = {"jax": jax, "jnp": jnp, "lax": lax, "Array": jax.Array}
        exec(compile(tree, "qwen3.py", "exec"), names)
        rule = functools.partial(names["jax_chunk_gated_delta_rule"], compute_dtype=dtype)
        return rule(scaled(query), key, value, jnp.zeros_like(beta), beta)[0]

    def jax_linear_attention(query, key, value, beta):
        return importlib.import_module("jla.ops.chunked").delta_rule(query, key, value, beta, scale=1.0)[0]

    peers = {"ejkernel": ejkernel, "maxtext": maxtext, "jla": jax_linear_attention}
    return {name: function for name, function in peers.items() if (folder / name).is_dir()}


def compare(length: int, size: int, forms: dict, repeats: int):
    """Prints the rows of one shape."""
    random = np.random.default_rng(0)
    query, key, value, weights = random.normal(size=(4, BATCH, length, HEADS, size))
    query, key = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (query, key))
    inputs = [np.float32(x) for x in (query, key, value, random.random((BATCH, length, HEADS)))]
    weights = np.float32(weights)
    with jax.enable_x64(True):
        exact = jax.jit(with_gradient(ours("recurrent"), weights))(*(jnp.asarray(x, jnp.float64) for x in inputs))
        exact = jax.tree.map(np.asarray, exact)
    programs, notes = {}, {}
    for name, function in forms.items():
        programs[name, "forward"] = jax.jit(function).lower(*inputs).compile()
        start = time.perf_counter()
        programs[name, "both"] = program = jax.jit(with_gradient(function, weights)).lower(*inputs).compile()
        seconds = time.perf_counter() - start
        errors = jax.tree.map(lambda x, y: np.max(np.abs(x - y)) / np.max(np.abs(y)), program(*inputs), exact)
        notes[name] = (seconds, temporary_mib(program), errors[0], max(errors[1]))
    times = milliseconds(programs, inputs, repeats)
    for name in forms:
        spans = [f"{f(times[name, part]):9.1f}" for part in ("forward", "both") for f in (min, statistics.median)]
        seconds, memory, error, gradient_error = notes[name]
        line = f"{length:6} {size:4} {name:20}{''.join(spans)} {seconds:8.1f} {memory:8.1f}"
        print(f"{line} {error:9.1e} {gradient_error:9.1e}", flush=True)


def with_gradient(function, weights):
    """inputs -> the reads y, and the gradient of ⟨y, w⟩."""

    def both(*inputs):
        reads, pull = jax.vjp(function, *inputs)
        return reads, pull(weights.astype(reads.dtype))

    return both


def temporary_mib(program) -> float:
    """The temporary memory of a compiled program, which CPU, GPU and TPU report."""
    return program.memory_analysis().temp_size_in_bytes / 2**20


def milliseconds(programs: dict, inputs: list, repeats: int) -> dict:
    """The times of each program, after a first call that is not timed."""
    times = {key: [] for key in programs}
    for part in ("forward", "both"):  # not in one loop, because after a gradient the cache holds other data
        keys = [key for key in programs if key[1] == part]
        for repeat in range(repeats + 1):
            for key in keys if repeat % 2 else reversed(keys):
                start = time.perf_counter()
                jax.block_until_ready(programs[key](*inputs))
                if repeat:
                    times[key].append((time.perf_counter() - start) * 1e3)
    return times


def main(config: Config):
    print(f"jax {jax.__version__}, {jax.default_backend()}, {os.cpu_count()} cores, B = {BATCH}, H = {HEADS}, float32")
    peers = load_peers(config.peers) if config.peers else {}
    header = "".join(f"{x:>9}" for x in ("forward", "median", "both", "median"))
    print(f"{'T':>6} {'K':>4} {'':20}{header} {'compile':>8} {'MiB':>8} {'error':>9} {'of grad':>9}")
    for length, size in config.shapes:
        forms = {"ours, chunkwise": ours("chunkwise"), "ours, recurrent": ours("recurrent")}
        if length <= 512:
            forms["ours, parallel"] = ours("parallel")  # O(T²)
        forms["naive scan"] = naive_scan  # its gradient keeps T memories
        compare(length, size, forms | peers, config.repeats)


if __name__ == "__main__":
    with command_line.one_line():
        main(tyro.cli(Config, description=__doc__))
