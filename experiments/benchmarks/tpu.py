"""Estimates of the chunkwise form by XLA's TPU compiler, without a TPU: milliseconds, memory, compile time.

    pip install -e '.[experiments,tpu]'
    python -m experiments.benchmarks.tpu                     about a minute on two cores
    python -m experiments.benchmarks.tpu --peers peers       with MaxText's function; see ops.py
    python -m experiments.benchmarks.tpu --sequence          a sequence of 1,048,576 tokens over 16 v5e or 8 v5p chips

B = 8, H = 16, T = 4096, K = V = 128, bfloat16, one chip. The compiler annotates each of its kernels with an estimate of
its cycles. This program adds them up, counts the body of a loop once per iteration (``cost_analysis`` counts it once in
all), and divides by the nominal clock. Pallas kernels have no such estimate. For them it counts the instructions of the
final schedule, one per cycle, and those of the loop over the grid once per iteration.

The estimates rank programs but are not measurements. Kernels that wait for memory are slower, and loops of small
kernels have overheads. So no estimate is below the time to move the arguments and the results once. Other custom calls,
such as MaxText's triangular solve, do not count. Nor do messages between chips.
"""

from __future__ import annotations

import dataclasses
import functools
import multiprocessing
import os
import pathlib
import re
import tempfile
import time

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
}
SLICES = {"v5e": ("v5e:4x4", 16), "v5p": ("v5p:2x2x2", 8)}  # topology and chips that share a sequence


@dataclasses.dataclass(frozen=True)
class Config:
    """The chip to compile for."""

    chip: str = "v5e"
    """v5e, v5p or v6e."""
    peers: pathlib.Path | None = None
    """Folder with other libraries; see ops.py."""
    sequence: bool = False
    """B = 1 and 1,048,576 tokens over 16 v5e or 8 v5p chips, and one chip's share of them on one chip."""

    def __post_init__(self):
        if self.sequence and self.chip not in SLICES:
            raise ValueError(f"--sequence is for {' and '.join(SLICES)}, got {self.chip!r}")
        if self.chip not in CHIPS:
            raise ValueError(f"chip must be one of {', '.join(CHIPS)}, got {self.chip!r}")


def cycles(text: str) -> int:
    """The sum of ``estimated_cycles`` in a compiled module's text. A loop's body counts once per iteration."""
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
            own = re.search(r'"estimated_cycles":"(\d+)"', line)
            result += (total(call[1]) if call else 0) + (int(own[1]) if own else 0)
        return result

    return total("ENTRY")


def kernel_cycles(folder: pathlib.Path) -> int:
    """The cycles of our Pallas kernels, by the schedules that the compiler wrote to ``folder``. A grid is one loop."""
    result = 0
    for path in folder.glob("*fast_weight_attention*-final_bundles.txt"):
        text = path.read_text()
        (trips,) = re.findall(r"scmp\.ge\.s32\.totalorder %\w+, (\d+) /\* loop exit test \*/", text)
        rows = re.findall(r"^ *(?:0x[0-9a-f]+|0) +(?:[A-Z]{2})? *: *(>*)", text, re.M)
        if ">>" in rows:
            raise ValueError(f"expected one loop in {path}")
        result += rows.count("") + int(trips) * rows.count(">")
    return result


def report(name: str, function, config: Config, folder: pathlib.Path, shape=(8, 4096), chips=1):
    """Compiles the forward pass, and both passes, and prints a row. Chips share the tokens of ``shape`` [B, T]."""
    topology, clock, bandwidth = CHIPS[config.chip]
    topology = topology if chips == 1 else SLICES[config.chip][0]
    devices = topologies.get_topology_desc(topology, platform="tpu").devices[:chips]
    mesh = jax.make_mesh((chips,), ("sequence",), (AxisType.Auto,), devices=devices)

    def array(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec(None, "sequence")))

    def both(query, key, value, beta, weights):
        reads, pull = jax.vjp(function, query, key, value, beta)
        return reads, pull(weights)

    tokens = array(*shape, 16, 128)
    inputs = (tokens, tokens, tokens, array(*shape, 16, dtype=jnp.float32))
    row = f"{name:24}"
    for program, arguments in ((function, inputs), (both, (*inputs, tokens))):
        for path in folder.iterdir():
            path.unlink()
        start = time.perf_counter()
        with jax.set_mesh(mesh):  # it tells Pallas the kind of the TPU
            compiled = jax.jit(program).lower(*arguments).compile()
        seconds, memory, text = time.perf_counter() - start, compiled.memory_analysis(), compiled.as_text()
        if memory is None or text is None:
            raise RuntimeError("libtpu gave no memory analysis or no text of the compiled program")
        transfer = (memory.argument_size_in_bytes + memory.output_size_in_bytes) / bandwidth / 1e6
        ours = kernel_cycles(folder)
        if "fast_weight_attention" in text and "tpu_custom_call" in text and not ours:
            raise RuntimeError(f"libtpu wrote no schedule of our kernels to {folder}")
        milliseconds = max((cycles(text) + ours) / clock / 1e6, transfer)
        row += f"{milliseconds:10.1f} {memory.temp_size_in_bytes / 2**20:8.0f} {seconds:8.0f}"
        if chips > 1:
            row += f" ({len(re.findall(r' collective-permute(?:-start)?[(]', text))} messages)"
    print(row, flush=True)


def _no_tpu():
    """Makes libtpu ask no metadata server for a machine, and lets several processes load it."""
    os.environ.update(TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")


def report_ours(implementation, config: Config, folder: pathlib.Path):
    """Prints the rows of one implementation. It runs in a process of its own, because libtpu reads its flags once.

    With those of the kernels it would also write the schedules of all other programs, which takes minutes.
    """
    _no_tpu()
    if implementation == "pallas":
        os.environ["LIBTPU_INIT_ARGS"] = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
    for precision in ("default", "highest"):
        attention = functools.partial(_ours, implementation=implementation, precision=precision)
        report(f"ours, {implementation}, {precision}", attention, config, folder)


def report_sequence(config: Config, folder: pathlib.Path):
    """Prints the row of a sequence over several chips, and that of one chip's share of it."""
    _no_tpu()
    chips = SLICES[config.chip][1]
    for number, axis in ((chips, "sequence"), (1, None)):
        length = 2**20 * number // chips
        attention = functools.partial(_ours, sequence_axis=axis)
        report(f"{number} chips, {length} tokens", attention, config, folder, (1, length), number)


def _ours(query, key, value, beta, **options):
    return fwt_jax.fast_weight_attention(query, key, value, beta, **options)[0]


def main(config: Config):
    print(f"{config.chip}, estimates: ms, MiB of temporary memory, s to compile; forward, then forward and backward")
    with tempfile.TemporaryDirectory() as folder:
        if config.sequence:
            report_sequence(config, pathlib.Path(folder))
            return
        for implementation in ("pallas", "xla"):
            arguments = (implementation, config, pathlib.Path(folder))
            process = multiprocessing.get_context("spawn").Process(target=report_ours, args=arguments)
            process.start()
            process.join()
            if process.exitcode:
                raise SystemExit(process.exitcode)
        peers = ops.load_peers(config.peers, jnp.bfloat16) if config.peers else {}
        if "maxtext" in peers:
            _no_tpu()
            report("maxtext", peers["maxtext"], config, pathlib.Path(folder))


if __name__ == "__main__":
    with command_line.one_line():
        main(tyro.cli(Config, description=__doc__))
