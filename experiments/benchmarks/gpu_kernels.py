"""The GPU kernels compiled for cards that are not there: registers, spills, shared memory, tensor-core instructions.

    pip install -e '.[experiments]' 'jax-triton>=0.4.1'                 no GPU and no CUDA; Python 3.12 or later
    python -m experiments.benchmarks.gpu_kernels                        minutes on two cores
    python -m experiments.benchmarks.gpu_kernels --cards 90 --key-sizes 128 --lengths exact masked

The program traces calls of ``implementation="triton"`` and their gradients, with the settings that a call gets if its
user sets nothing. jax-triton compiles each kernel in them to PTX, as it does for a call. So what is compiled is what is
called. ``ptxas``, which lies in Triton's package, then assembles the PTX and counts registers and spills. On a machine
with a GPU another version of it may do so. The shared memory is what Triton asks for. Nothing here says how fast a
kernel is.

A row is one kernel: "forward, keep" also stores what the gradient reads. "decays" is DECAYS of triton_kernels.py, and
the blocks are VALUES and KEYS. A thread stores "spilled" bytes of its registers to memory. "KiB" is the shared memory
of a program, and how much the card has for it. Instructions are counted in the PTX, not in what runs.

The exit code is 1 if a kernel spills, does not fit into its card's shared memory or does not compile, and the last line
names it. Lengths that are no multiple of the chunk, "masked", are extra: they are in the table, and their spills do not
change the exit code. The kernels refuse float32 with K or V above 64, and the table has no such rows.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import importlib.util
import itertools
import multiprocessing
import os
import pathlib
import re
import subprocess
import tempfile
import time
from collections.abc import Iterator
from typing import Literal, NamedTuple

import jax
import jax.extend
import jax.numpy as jnp
import tyro

from experiments.run import command_line, tables
from fwt_jax.kernels import gpu
from fwt_jax.kernels.derivatives import advance
from fwt_jax.rules import RULES

Card = Literal[80, 86, 89, 90, 100, 120]
SHARED_KIB: dict[Card, int] = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}  # that one program may take
INSTRUCTIONS = {"wgmma": "wgmma.mma_async", "tcgen05": "tcgen05.mma", "mma.sync": "mma.sync", "cp.async": "cp.async.c"}
BATCHES = (32, 1)  # many and few programs for a card's processors: the settings differ


@dataclasses.dataclass(frozen=True)
class Config:
    """The cards, and the calls whose kernels are compiled."""

    cards: tuple[Card, ...] = (80, 90, 100, 120)
    """Compute capabilities, 90 for Hopper."""
    key_sizes: tuple[int, ...] = (64, 128, 256)
    """K."""
    value_sizes: tuple[int, ...] = ()
    """V, each with each K. If none is given, V = K."""
    dtypes: tuple[Literal["bfloat16", "float32", "tf32"], ...] = ("bfloat16", "float32")
    """Of query, key and value. float32 has precision "highest"; tf32 is float32 with precision "default"."""
    rules: tuple[Literal["delta", "sum"], ...] = ("delta",)
    """Rules."""
    decays: tuple[Literal["none", "per-head", "per-channel"], ...] = ("none", "per-head", "per-channel")
    """Without and with decays."""
    lengths: tuple[Literal["exact", "masked"], ...] = ("exact",)
    """A multiple of the chunk, or one token less."""
    heads: tuple[int, ...] = (16,)
    """H, which is a constant of the kernels."""

    def __post_init__(self):
        command_line.check_at_least(self, key_sizes=1, value_sizes=1, heads=1)


class Case(NamedTuple):
    """One kind of call on one card."""

    card: Card
    dtype: str
    key_size: int
    value_size: int
    rule: str
    decays: str
    length: str
    heads: int


def cases(config: Config) -> list[Case]:
    """All that the kernels take."""
    sizes = [(key, value) for key in config.key_sizes for value in config.value_sizes or (key,)]
    calls = list(itertools.product(config.dtypes, sizes, config.rules, config.decays, config.lengths, config.heads))
    every = (Case(card, dtype, *size, *more) for card in config.cards for dtype, size, *more in calls)
    return [case for case in every if not gpu.why_not(*_inputs(case, 1)[:4], chunk_size=None, **_options(case))]


def _options(case):
    return {"rule": RULES[case.rule], "precision": "highest" if case.dtype == "float32" else "default"}


def _inputs(case, batch):
    """Shapes of the inputs of ``gpu.chunkwise`` as it gets them."""
    length = 4096 if case.length == "exact" else 4095
    dtype = jnp.bfloat16 if case.dtype == "bfloat16" else jnp.float32
    query, value = (
        jax.ShapeDtypeStruct((batch, length, case.heads, size), dtype) for size in (case.key_size, case.value_size)
    )
    memory = jax.ShapeDtypeStruct((batch, case.heads, case.key_size, case.value_size), jnp.float32)
    beta = jax.ShapeDtypeStruct((batch, length, case.heads), jnp.float32)
    per_channel = jax.ShapeDtypeStruct(query.shape, jnp.float32)
    log_decay = {"none": None, "per-head": beta, "per-channel": per_channel}[case.decays]
    return memory, query, query, value, beta, log_decay, None, None


# --- the kernels of a call -------------------------------------------------------------------------------------------


def kernel_calls(case: Case) -> list[jax.extend.core.JaxprEqn]:
    """The different calls of kernels in a forward pass and in a gradient."""
    calls = {}
    for batch in BATCHES:
        inputs = _inputs(case, batch)
        settings = gpu.settings_of(
            RULES[case.rule],
            inputs[1].dtype,
            inputs[0].shape,
            decays=case.decays != "none",
            channels=case.decays == "per-channel",
            exact=case.dtype == "float32",
            compute_capability=case.card,
        )
        forward = functools.partial(advance, gpu.KERNELS, settings)

        def both(inputs, outputs_grad, forward=forward):
            return jax.vjp(forward, *inputs)[1](outputs_grad)

        outputs = jax.eval_shape(forward, *inputs)
        for jaxpr in (jax.make_jaxpr(forward)(*inputs), jax.make_jaxpr(both)(inputs, outputs)):
            for call in _calls_in(jaxpr.jaxpr):
                calls.setdefault((call.params["metaparams"], call.params["backend_options"]), call)
    return list(calls.values())


def _calls_in(jaxpr) -> Iterator[jax.extend.core.JaxprEqn]:
    for equation in jaxpr.eqns:
        if equation.primitive.name == "triton_kernel_call":
            yield equation
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else [value]:
                if isinstance(inner, jax.extend.core.ClosedJaxpr):
                    yield from _calls_in(inner.jaxpr)


class Compiled(NamedTuple):
    """What the compiler says of a kernel: registers of a thread, bytes of them in memory, bytes of shared memory."""

    registers: int
    spilled: int
    shared: int
    counts: tuple[int, ...]
    seconds: float


class Row(NamedTuple):
    """One kernel with its settings; the result is the error's text if it does not compile."""

    case: Case
    name: str
    values: int | None
    keys: int | None
    num_warps: int
    num_stages: int
    result: Compiled | str

    @property
    def fault(self) -> str:
        """Why the kernel must not be used, or ""."""
        if isinstance(self.result, str):
            return self.result
        shared, most = self.result.shared / 1024, SHARED_KIB[self.case.card]
        faults = [f"spills {self.result.spilled} bytes"] if self.result.spilled else []
        return ", ".join([*faults, f"takes {shared:.0f} of {most} KiB"] if shared > most else faults)

    def cells(self) -> tuple:
        """In the order of ``HEADINGS``."""
        _, *call = self.case
        settings = ("-" if x is None else x for x in self[2:6])
        if isinstance(self.result, str):
            numbers = ("-",) * (len(INSTRUCTIONS) + 4)
        else:
            registers, spilled, shared, counts, seconds = self.result
            shared = f"{shared / 1024:.0f}/{SHARED_KIB[self.case.card]}"
            numbers = (registers, spilled, shared, *counts, f"{seconds:.0f}")
        return (f"sm_{self.case.card}", self.name, *call, *settings, *numbers, self.fault)


COLUMNS = ("card", "kernel", "dtype", "K", "V", "rule", "decays", "length", "heads", "V block", "K block", "warps")
HEADINGS = (*COLUMNS, "stages", "registers", "spilled", "KiB", *INSTRUCTIONS, "s", "")
RIGHT = (3, 4, *range(8, len(HEADINGS) - 1))


def rows_of(case: Case) -> list[Row]:
    """Compiles the kernels of a case. It runs in a process that ``start`` has prepared."""
    rows = []
    for call in kernel_calls(case):
        constants, options = call.params["metaparams"], call.params["backend_options"]
        name = call.params["name"].removesuffix("_kernel") + (", keep" if constants.get("KEEP") else "")
        blocks = constants.get("VALUES"), constants.get("KEYS")
        try:
            result = compiled(call)
        # Errors of Triton and of ptxas share no class below Exception. The row shows the reason as its fault.
        except Exception as error:
            result = command_line.in_short(error)
        rows.append(Row(case, name, *blocks, options["num_warps"], options["num_stages"], result))
    return rows


def compiled(call: jax.extend.core.JaxprEqn) -> Compiled:
    """Compiles a kernel."""
    start = time.perf_counter()
    ptx, shared = to_ptx(call)
    registers, spilled = assembled(ptx)
    counts = tuple(ptx.count(text) for text in INSTRUCTIONS.values())
    return Compiled(registers, spilled, shared, counts, time.perf_counter() - start)


def to_ptx(call: jax.extend.core.JaxprEqn) -> tuple[str, int]:
    """The PTX of a kernel, and the bytes of its shared memory, by the compiler and the options of jax-triton.

    Its lowering of a whole program would also need the plugin of JAX for CUDA.
    """
    import triton
    from jax_triton import triton_lib
    from triton._C.libtriton import ir
    from triton.backends.compiler import GPUTarget

    kernel, constants = call.params["fn"], call.params["metaparams"]
    arrays = iter([*(x.aval for x in call.invars), *(x.aval for x in call.outvars)])
    signature, attributes = {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_pointer"):
            signature[name] = triton_lib.get_type_id(next(arrays))
            attributes[i,] = [["tt.divisibility", 16]]  # jax-triton says so of arrays, and nothing of integers
        else:
            signature[name] = "i32"
    target = GPUTarget("cuda", call.params["compute_capability"], 32)
    backend = triton.compiler.make_backend(target)
    options = backend.parse_options(dict(call.params["backend_options"]))
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    source = triton.compiler.ASTSource(kernel, signature, dict(constants), attributes)
    functions = backend.get_codegen_implementation(options)
    module = source.make_ir(target, options, functions, backend.get_module_map(), context)
    result = triton_lib.compile_ttir_to_ptx_inplace(module, backend, options, target.arch)
    return result.binary, result.shared_mem_bytes


def assembled(ptx: str) -> tuple[int, int]:
    """Registers of a thread, and the bytes of them that it stores to memory, by Triton's ``ptxas`` for all cards."""
    import triton.backends.nvidia

    (backend,) = triton.backends.nvidia.__path__
    target = re.search(r"^\.target (\w+)", ptx, re.M)[1]
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        command = [pathlib.Path(backend) / "bin" / "ptxas-blackwell", "-v", f"-arch={target}", path]
        result = subprocess.run([*command, "-o", path.with_suffix(".cubin")], capture_output=True, text=True)
    if result.returncode:
        raise ValueError(f"ptxas: {result.stderr}")
    (registers,) = re.findall(r"Used (\d+) registers", result.stderr)
    return int(registers), sum(map(int, re.findall(r"(\d+) bytes spill stores", result.stderr)))


# --- all of them -----------------------------------------------------------------------------------------------------


def start():
    """Prepares a process that compiles."""
    os.environ["JAX_PLATFORMS"] = "cpu"


def main(config: Config):
    if os.environ.get("TRITON_INTERPRET"):
        raise ValueError("TRITON_INTERPRET is set, and interpreted kernels are not compiled; unset it")
    if not importlib.util.find_spec("jax_triton"):
        raise ValueError("jax-triton is not installed; pip install jax-triton, for Python 3.12 or later")
    with concurrent.futures.ProcessPoolExecutor(None, multiprocessing.get_context("spawn"), start) as pool:
        rows = list(itertools.chain(*pool.map(rows_of, cases(config))))
    report(rows)


def report(rows: list[Row]):
    """Prints the table. Ends the program with code 1 if a kernel for exact lengths has a fault."""
    print(tables.text([HEADINGS, *(row.cells() for row in rows)], right=RIGHT, rule_after=1))
    faults = [row for row in rows if row.fault and row.case.length == "exact"]
    if not faults:
        print(f"{len(rows)} kernels, and none for exact lengths spills or takes too much shared memory")
        return
    names = (
        f"sm_{row.case.card} {row.name} {row.case.dtype} {row.case.key_size} x {row.case.value_size}, "
        f"decays {row.case.decays}: {row.fault}"
        for row in faults
    )
    print(f"{len(faults)} of {len(rows)} kernels must not be used: {'; '.join(names)}")
    raise SystemExit(1)


if __name__ == "__main__":
    with command_line.one_line():
        main(tyro.cli(Config, description=__doc__))
