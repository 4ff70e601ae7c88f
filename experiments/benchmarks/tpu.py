"""Estimates of the chunkwise form by XLA's TPU compiler, without a TPU: milliseconds, memory, compile time.

    pip install -e '.[experiments,tpu]'
    python -m experiments.benchmarks.tpu                     on a v6e
    python -m experiments.benchmarks.tpu --peers peers       with MaxText and tokamax, 17 minutes on two busy cores
    python -m experiments.benchmarks.tpu --sequence          1,048,576 tokens over several chips

ops.py says how to make the folder peers. tokamax (for v6e and v7x, from Python 3.12 and JAX 0.11.1 on) needs more:

    pip install --target peers jaxtyping pydantic
    pip install --target peers --no-deps tokamax==0.0.17 einshape qwix xprof fire termcolor

One chip, bfloat16, float32 gates, ``precision="default"``; B = 8, T = 4096, H = 16 and K = V = 128 unless a row says
otherwise. Arrays are ``[B, T, H, ·]``, but those of tokamax's own layout are ``[H, B, T, ·]``. A row has, for the
forward pass and then for both passes: milliseconds around the kernels + in the kernels = in all, MiB of temporary
memory, and seconds to compile. With kernels, the seconds include the time to write their schedules.

The compiler annotates its own kernels with estimates of their cycles. This program adds them up, counts the body of a
loop once per iteration (``cost_analysis`` counts it once in all), and divides by the nominal clock. Pallas kernels have
no such estimate. For them it counts the instructions of the final schedule, one per cycle, and those of a loop once
per iteration.

The estimates rank programs but are not measurements. Kernels that wait for memory are slower, and loops of small
kernels have overheads. Both sides of a branch count. No total is below the time to move the arguments and the results
once. Asynchronous copies do not count, nor do other custom calls, such as MaxText's triangular solve, nor messages
between chips.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import multiprocessing
import os
import pathlib
import re
import tempfile
import time
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import tyro
from jax.experimental import topologies
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import fwt_jax
from experiments.benchmarks import ops
from experiments.run import command_line

CHIPS = {  # topology, GHz, GB/s
    "v5e": ("v5e:2x2", 1.5, 819),
    "v5p": ("v5p:2x2x1", 1.75, 2765),
    "v6e": ("v6e:2x2", 1.75, 1640),
    "v7x": ("tpu7x:2x2x1", 1.9, 3690),
}
SLICES = {"v5e": ("v5e:4x4", 16), "v5p": ("v5p:2x2x2", 8), "v6e": ("v6e:4x4", 16)}  # topology, chips of a sequence
TOKAMAX_CHIPS = ("v6e", "v7x")


@dataclasses.dataclass(frozen=True)
class Config:
    """The chip to compile for."""

    chip: str = "v6e"
    """v5e, v5p, v6e or v7x."""
    peers: pathlib.Path | None = None
    """Folder with other libraries; the head of the file says how to make it."""
    sequence: bool = False
    """B = 1 and 1,048,576 tokens over 16 v5e, 16 v6e or 8 v5p chips, and one chip's share of them on one chip."""

    def __post_init__(self):
        if self.sequence and self.chip not in SLICES:
            raise ValueError(f"--sequence is for {', '.join(SLICES)}, got {self.chip!r}")
        if self.chip not in CHIPS:
            raise ValueError(f"chip must be one of {', '.join(CHIPS)}, got {self.chip!r}")


@dataclasses.dataclass(frozen=True)
class Row:
    """A function of query, key, value, beta and perhaps log_decay, and the sizes of these arrays."""

    name: str
    function: Callable
    decay: Literal["none", "head", "channel"] = "none"
    batch: int = 8
    length: int = 4096
    heads: int = 16
    key_size: int = 128
    value_size: int = 128
    heads_first: bool = False
    """[H, B, T, ·] instead of [B, T, H, ·]."""
    value_heads_per_key: int = 1
    """H is the number of value heads."""

    def shapes(self) -> tuple[list[jax.ShapeDtypeStruct], jax.ShapeDtypeStruct]:
        """The arguments, and the reads."""
        tokens = (self.batch, self.length, self.heads)
        tokens = (self.heads, self.batch, self.length) if self.heads_first else tokens
        of_keys = tokens if self.value_heads_per_key == 1 else (*tokens[:2], self.heads // self.value_heads_per_key)
        key = jax.ShapeDtypeStruct((*of_keys, self.key_size), jnp.bfloat16)
        value = jax.ShapeDtypeStruct((*tokens, self.value_size), jnp.bfloat16)
        gate = jax.ShapeDtypeStruct(tokens, jnp.float32)
        decays = {"none": [], "head": [gate], "channel": [jax.ShapeDtypeStruct((*tokens, self.key_size), jnp.float32)]}
        return [key, key, value, gate, *decays[self.decay]], value


def estimated_cycles(line: str) -> int:
    """XLA's estimate in a line of a compiled module. Pallas kernels and other custom calls have none."""
    own = re.search(r'"estimated_cycles":"(\d+)"', line)
    return int(own[1]) if own else 0


def cycles(text: str, cost: Callable[[str], int] = estimated_cycles) -> int:
    """The sum of the costs of the lines of a compiled module. A loop's body counts once per iteration."""
    computations: dict[str, list[str]] = {}
    name = None
    for line in text.splitlines():
        header = re.match(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{$", line)
        if header:
            name = "ENTRY" if line.startswith("ENTRY") else header[1]
            computations[name] = []
        elif name:
            computations[name].append(line)

    def bound(condition):
        """The number of iterations of a loop: the constant in its condition, or in a fusion that it calls."""
        text = "\n".join(computations[condition])
        text += "".join("\n".join(computations.get(called, ())) for called in re.findall(r"calls=%?([\w.\-]+)", text))
        numbers = re.findall(r"s32\[\]\S* constant\((\d+)\)", text)
        if len(numbers) != 1:
            raise ValueError(f"expected a loop over a known number of steps, found {numbers} in\n{text}")
        return int(numbers[0])

    def total(name):
        result = 0
        for line in computations.get(name, ()):
            loop = re.search(r" while\(.*condition=%?([\w.\-]+), body=%?([\w.\-]+)", line)
            if loop:
                result += bound(loop[1]) * total(loop[2])
                continue
            call = re.search(r" call\(.*to_apply=%?([\w.\-]+)", line)
            result += cost(line) + (total(call[1]) if call else 0)
        return result

    return total("ENTRY")


def kernel_cycles(text: str) -> int:
    """The instructions that a kernel executes, of the text of its final schedule, which has one instruction per row.

    "LB" marks the first row of a loop. It ends where its exit test's predicate, if false, branches back.
    """
    steps = dict(re.findall(r"%(\w+) = scmp\.ge\.s32\.totalorder %\w+, (\d+) /\* loop exit test \*/", text))
    rows = re.findall(r"^ *(?:0x[0-9a-f]+|0) +([A-Z]{2})? *:(.*)", text, re.M)
    ends = [re.search(r"sbr\.rel \(!%(\w+)\)", row) for _, row in rows]
    ends = [end[1] if end and end[1] in steps else None for end in ends]
    starts = [mark == "LB" for mark, _ in rows]
    if not sum(starts) == len(steps) == len(ends) - ends.count(None):
        raise ValueError(f"expected {sum(starts)} loops over known numbers of steps, found the numbers {steps}")
    counts = [0]  # of the kernel and of the loops around the row, from the outside
    for start, end in zip(starts, ends, strict=True):
        if start:
            counts.append(0)
        counts[-1] += 1
        if end:
            body = counts.pop()
            counts[-1] += int(steps[end]) * body
    return counts[0]


def scheduled_cycles(folder: pathlib.Path, line: str) -> int:
    """The cycles of the Pallas kernel that a line of a compiled module calls, by its schedule in ``folder``; or 0."""
    call = re.match(r' *(?:ROOT )?%?([\w.\-]+) = .* custom_call_target="tpu_custom_call"', line)
    if call is None:
        return 0
    paths = [x for x in folder.glob(f"*-{call[1]}-*-final_bundles.txt") if "schedule-analysis" not in x.name]
    if len(paths) != 1:
        raise RuntimeError(f"expected one schedule of {call[1]} from libtpu, found {len(paths)} in {folder}")
    return kernel_cycles(paths[0].read_text())


def report(row: Row, config: Config, folder: pathlib.Path, chips=1):
    """Compiles the forward pass, and both passes, and prints a row. Chips share the tokens."""
    topology, clock, bandwidth = CHIPS[config.chip]
    topology = topology if chips == 1 else SLICES[config.chip][0]
    devices = topologies.get_topology_desc(topology, platform="tpu").devices[:chips]
    mesh = jax.make_mesh((chips,), ("sequence",), (AxisType.Auto,), devices=devices)

    def both(weights, *inputs):
        reads, pull = jax.vjp(row.function, *inputs)
        return reads, pull(weights)

    sharding = NamedSharding(mesh, PartitionSpec(None, "sequence"))
    inputs, weights = jax.tree.map(lambda x: x.update(sharding=sharding), row.shapes())
    text = f"{row.name:32}"
    for program, arguments in ((row.function, inputs), (both, (weights, *inputs))):
        for path in folder.iterdir():
            path.unlink()
        start = time.perf_counter()
        with jax.set_mesh(mesh):  # it tells Pallas the kind of the TPU
            compiled = jax.jit(program).lower(*arguments).compile()
        seconds, memory, module = time.perf_counter() - start, compiled.memory_analysis(), compiled.as_text()
        if memory is None or module is None:
            raise RuntimeError("libtpu gave no memory analysis or no text of the compiled program")
        around = cycles(module) / clock / 1e6
        inside = cycles(module, functools.partial(scheduled_cycles, folder)) / clock / 1e6
        transfer = (memory.argument_size_in_bytes + memory.output_size_in_bytes) / bandwidth / 1e6
        text += f"{around:8.2f} + {inside:5.2f} = {max(around + inside, transfer):6.2f}"
        text += f"{memory.temp_size_in_bytes / 2**20:6.0f} {seconds:5.0f}"
        if chips > 1:
            text += f" ({len(re.findall(r' collective-permute(?:-start)?[(]', module))} messages)"
    print(text, flush=True)


def _ours(query, key, value, beta, log_decay=None, **options):
    return fwt_jax.fast_weight_attention(query, key, value, beta, log_decay, **options)[0]


def _tokamax(query, key, value, beta, log_decay):
    """Arrays are ``[H, B, T, ·]``."""
    tokamax = importlib.import_module("tokamax")
    kda = importlib.import_module("tokamax._src.ops.kda.api")
    with tokamax.config.cross_compile(True):  # without it, it looks for a TPU
        return kda.kimi_delta_attention(query, key, value, log_decay, beta, scale=1.0, implementation="mosaic")[0]


def _tokamax_transposed(*arrays):
    """Arrays are ``[B, T, H, ·]``."""
    return jnp.moveaxis(_tokamax(*(jnp.moveaxis(x, 2, 0) for x in arrays)), 0, 2)


def report_kernels(config: Config, folder: pathlib.Path):
    """Prints the rows with Pallas kernels. It runs in a process of its own, because libtpu reads its flags once.

    With these flags it would also write the schedules of all other programs, which takes minutes.
    """
    os.environ["LIBTPU_INIT_ARGS"] = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
    ours = functools.partial(_ours, implementation="pallas", precision="default")
    rows = [
        Row("delta", ours),
        Row("gated delta", ours, "head"),
        Row("gated delta, 8 key heads", ours, "head", value_heads_per_key=2),
        Row("delta, decay per channel", ours, "channel"),
        Row("delta, H = 8, K = V = 64", ours, heads=8, key_size=64, value_size=64),
        Row("delta, K = 256", ours, key_size=256),
    ]
    if config.peers and (config.peers / "tokamax").is_dir() and config.chip in TOKAMAX_CHIPS:
        rows.append(Row("tokamax, decay per channel", _tokamax_transposed, "channel"))
        rows.append(Row("tokamax, its own layout", _tokamax, "channel", heads_first=True))
    for row in rows:
        report(row, config, folder)


def report_sequence(config: Config, folder: pathlib.Path):
    """Prints the row of a sequence over several chips, and that of one chip's share of it, in plain JAX."""
    chips = SLICES[config.chip][1]
    for number, axis in ((chips, "sequence"), (1, None)):
        length = 2**20 * number // chips
        attention = functools.partial(_ours, implementation="xla", sequence_axis=axis)
        report(Row(f"{number} chips, {length} tokens", attention, batch=1, length=length), config, folder, number)


def main(config: Config):
    # libtpu then asks no metadata server for a machine, and several processes can load it.
    os.environ.update(TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")
    peers = ops.load_peers(config.peers, jnp.bfloat16) if config.peers else {}  # a new process gets their path too
    print(f"{config.chip}, estimates: ms around the kernels + in them = in all, MiB of temporary memory, s to compile")
    print(f"{'':32}{'forward':38}forward and backward")
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        if config.sequence:
            report_sequence(config, folder)
            return
        process = multiprocessing.get_context("spawn").Process(target=report_kernels, args=(config, folder))
        process.start()
        process.join()
        if process.exitcode:
            raise SystemExit(process.exitcode)
        ours = functools.partial(_ours, implementation="xla", precision="default")
        report(Row("delta, XLA", ours), config, folder)
        if "maxtext" in peers:
            report(Row("MaxText, delta, XLA", peers["maxtext"]), config, folder)


if __name__ == "__main__":
    with command_line.one_line():
        main(tyro.cli(Config, description=__doc__))
