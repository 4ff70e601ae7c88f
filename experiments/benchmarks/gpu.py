"""The operation on a GPU, beside other libraries and softmax attention, and the words per second of language models.

    python -m experiments.benchmarks.gpu                                    everything
    python -m experiments.benchmarks.gpu --rows kernels xla --shapes s1 s2 --presets small-delta
    python -m experiments.benchmarks.gpu --tiny                             sizes that a CPU runs; its times mean little

A library that is not installed is a row that says so. These commands install the two in an environment of JAX for CUDA:

    pip install 'torch>=2.14' flash-linear-attention==0.6.0        PyTorch 2.11 pins a triton too old for jax-triton
    pip install --no-deps jax-linear-attention==0.1.0

Rows: our kernels and our plain JAX ("xla"), jax-linear-attention's kernels ("jla") and its plain JAX ("jla-plain"),
softmax attention of cuDNN, and flash-linear-attention ("fla", in PyTorch). Query and key have length 1, values are
normal, and β is uniform in (0, 1). A decay is exp(−0.05 u) with a uniform u: one per head for "gated-delta", one per
key channel for "kda". The sum rule has no β. "both" takes the gradient of ⟨y, w⟩ for a normal w in all inputs.

A time is the median of ``--rounds`` rounds, with minimum and maximum. A round is 3 to 200 calls in a row, about 40 ms,
by the clock of the host (JAX) or by events (PyTorch). So it is the device's time, unless the host takes longer to start
a call than the device to make it, as it may at s3 and s6. MiB is JAX's temporary memory; for PyTorch it is the peak
above the inputs, with the results. The seconds to compile are those of a first call in PyTorch. The programs of an
implementation and a rule compile first, side by side. Errors are those of the reads and of the worst gradient, for at
most 330 tokens and correlated keys: norms of differences from the recurrent form in float64, relative to its norms.

A preset makes real training steps with dropout, on random words by Zipf's law.

Each row is written to gpu.json in the folder --out when it is measured. The same command goes on after the last row. It
measures a row again if an option --again is given, or if something in it was refused.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.metadata
import json
import os
import pathlib
import statistics
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx
from tqdm import tqdm

from experiments.benchmarks.ops import temporary_mib
from experiments.language.experiment import loss
from experiments.language.presets import find
from experiments.run import command_line, files, folder, tables, training
from fwt_jax import fast_weight_attention
from fwt_jax.models import DecoderLM


class Shape(NamedTuple):
    """B, T, H and K = V."""

    batch: int
    length: int
    heads: int
    size: int


SHAPES = {
    "s1": Shape(1, 8192, 96, 128),
    "s2": Shape(2, 16384, 16, 128),
    "s3": Shape(4, 2048, 16, 128),
    "s4": Shape(4, 4096, 64, 128),
    "s5": Shape(8, 2048, 32, 256),
    "s6": Shape(8, 1024, 8, 64),
    "long8": Shape(1, 32_768, 8, 128),
    "long2": Shape(1, 65_536, 2, 128),
}
TINY = Shape(1, 70, 2, 16)
CHECKED_LENGTH, CHECKED_HEADS = 330, 2  # are compared with float64


class Operation(NamedTuple):
    """A rule of ours, or None, and the inputs of a call; whether every key channel has a decay of its own."""

    rule: str | None
    inputs: tuple[str, ...]
    channels: bool = False


OPERATIONS = {
    "delta": Operation("delta", ("query", "key", "value", "beta")),
    "sum": Operation("sum", ("query", "key", "value")),
    "gated-delta": Operation("delta", ("query", "key", "value", "beta", "log_decay")),
    "kda": Operation("delta", ("query", "key", "value", "beta", "log_decay"), channels=True),
    "softmax": Operation(None, ("query", "key", "value")),
}


def ours(rule, implementation, **inputs):
    return fast_weight_attention(**inputs, rule=rule, implementation=implementation)[0]


def jla(kind, implementation, query, key, value, beta, log_decay=None):
    attend = importlib.import_module("jla.ops").linear_attention
    return attend(kind, query, key, value, impl=implementation, beta=beta, g=log_decay, scale=1.0)[0]


def fla(module, name, query, key, value, *, beta=None, log_decay=None, **options):
    gates = {name: gate for name, gate in (("beta", beta), ("g", log_decay)) if gate is not None}
    return getattr(importlib.import_module(f"fla.ops.{module}"), name)(
        query, key, value, **gates, scale=1.0, **options
    )[0]


def cudnn(query, key, value):
    return jax.nn.dot_product_attention(query, key, value, is_causal=True, implementation="cudnn")


def _ours(implementation):
    rules = {name: operation.rule for name, operation in OPERATIONS.items() if operation.rule}
    return {name: functools.partial(ours, rule, implementation) for name, rule in rules.items()}


def _jla(implementation):
    kinds = {"delta": "deltanet", "gated-delta": "gated_deltanet", "kda": "kda"}
    return {name: functools.partial(jla, kind, implementation) for name, kind in kinds.items()}


ROWS: dict[str, dict[str, Callable]] = {  # implementation -> operation -> its function of the inputs by name
    "kernels": _ours("triton"),
    "xla": _ours("xla"),
    "jla": _jla("mosaic_gpu"),
    "jla-plain": _jla("chunked"),
    "cudnn": {"softmax": cudnn},
    "fla": {
        "delta": functools.partial(fla, "delta_rule", "chunk_delta_rule"),
        "sum": functools.partial(fla, "linear_attn", "chunk_linear_attn", normalize=False),
        "gated-delta": functools.partial(fla, "gated_delta_rule", "chunk_gated_delta_rule"),
        "kda": functools.partial(fla, "kda", "chunk_kda"),
    },
}


@dataclasses.dataclass(frozen=True)
class Config:
    """What to measure."""

    rows: tuple[Literal["kernels", "xla", "jla", "jla-plain", "cudnn", "fla"], ...] = tuple(ROWS)
    """Implementations of the operation, in the order of their measurement."""
    rules: tuple[Literal["delta", "sum", "gated-delta", "kda", "softmax"], ...] = tuple(OPERATIONS)
    """Rules; gated-delta is delta with a decay per head, kda with one per key channel."""
    shapes: tuple[Literal["s1", "s2", "s3", "s4", "s5", "s6", "long8", "long2"], ...] = tuple(SHAPES)
    """Shapes: the table names their B, T, H and K = V."""
    presets: tuple[
        Literal["small-delta", "small-sum", "small-softmax", "medium-delta", "medium-sum", "medium-softmax"], ...
    ] = ("small-delta", "small-sum", "small-softmax", "medium-delta", "medium-sum", "medium-softmax")
    """Language models whose training steps are timed."""
    dtypes: tuple[Literal["bfloat16", "float32"], ...] = ("bfloat16", "float32")
    """Of queries, keys and values, and of the language models; all of the first comes before the second."""
    rounds: int = 7
    """Rounds of each timing."""
    out: pathlib.Path = pathlib.Path("runs/gpu")
    """Folder of gpu.json and table.txt."""
    again: bool = False
    """Measure rows again that are in gpu.json."""
    tiny: bool = False
    """Tiny sizes under the names of the shapes and presets, to try the program."""


# --- the operation ---------------------------------------------------------------------------------------------------


def with_gradient(attend):
    """(inputs by name, w) -> the reads y, and the gradients of ⟨y, w⟩ by name."""

    def both(inputs, weights):
        reads, pull = jax.vjp(lambda inputs: attend(**inputs), inputs)
        return reads, pull(weights)[0]

    return both


@functools.partial(jax.jit, static_argnames=("shape", "operation", "dtype", "correlated"))
def random_inputs(shape: Shape, operation: Operation, dtype: str, correlated: bool) -> dict[str, jax.Array]:
    """Inputs by name, and w as "weights". Gates are float32, β rounded to ``dtype``, which PyTorch takes it in.

    Correlated keys are non-negative, and the same for every second head, so that float64 is needed for two heads.
    """
    heads = CHECKED_HEADS if correlated else shape.heads
    gates = (*shape[:2], heads)
    drawn = jax.random.normal(jax.random.key(0), (4, *gates, shape.size))
    arrays = dict(zip(("query", "key", "value", "weights"), drawn, strict=True))
    for name in ("query", "key"):
        x = jnp.abs(arrays[name]) + 0.1 if correlated else arrays[name]
        arrays[name] = x / jnp.linalg.norm(x, axis=-1, keepdims=True)
    arrays = {name: x.astype(dtype) for name, x in arrays.items()}
    beta, decay = jax.random.uniform(jax.random.key(1), (2, *gates))
    if operation.channels:
        decay = jax.random.uniform(jax.random.key(2), (*gates, shape.size))
    arrays |= {"beta": beta.astype(dtype).astype(jnp.float32), "log_decay": -0.05 * decay}
    names = (*operation.inputs, "weights")
    return {name: jnp.concatenate([arrays[name]] * (shape.heads // heads), axis=2) for name in names}


@functools.cache
def exact(operation: Operation, dtype: str, shape: Shape) -> dict[str, np.ndarray]:
    """The reads and gradients by name, for correlated inputs, of the recurrent form in float64 on CPU."""
    inputs = random_inputs(shape, operation, dtype, correlated=True)
    inputs = {name: np.asarray(x).astype(np.float64) for name, x in inputs.items()}
    weights = inputs.pop("weights")
    attend = functools.partial(ours, operation.rule, "xla", form="recurrent")
    with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
        reads, gradients = jax.jit(with_gradient(attend))(inputs, weights)
    return {"reads": np.asarray(reads)} | {name: np.asarray(x) for name, x in gradients.items()}


def errors(operation: Operation, dtype: str, shape: Shape, reads, gradients) -> dict[str, Any]:
    """The errors of results for correlated ``random_inputs``, and the name of the worst gradient."""
    results = {"reads": reads} | gradients
    relative = {}
    for name, right in exact(operation, dtype, shape._replace(heads=CHECKED_HEADS)).items():
        result = np.asarray(results[name]).astype(np.float64)[:, :, :CHECKED_HEADS]
        relative[name] = float(np.linalg.norm(result - right) / np.linalg.norm(right))
    read_error = relative.pop("reads")
    worst = max(relative, key=lambda name: np.nan_to_num(relative[name], nan=np.inf))
    return {"reads": read_error, "gradient": relative[worst], "worst": worst}


def rounds(run: Callable[[int], float], number: int) -> dict[str, float]:
    """Milliseconds of a call. ``run`` makes so many calls in a row, and returns the seconds that they took."""
    run(2)
    calls = int(min(max(0.04 / run(1), 3), 200))
    times = sorted(1e3 * run(calls) / calls for _ in range(number))
    return {"ms": statistics.median(times), "min": times[0], "max": times[-1]}


def attempt(action: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The numbers of a cell, or why there are none: memory, a missing library, something that is not supported."""
    try:
        return action()
    except ModuleNotFoundError as error:
        return {"refused": f"{error.name} is not installed"}
    # Libraries raise errors of any class where they, or JAX, or a card, do not support a call. The table shows them.
    except Exception as error:
        return {"refused": command_line.in_short(error)}


@dataclasses.dataclass(frozen=True)
class Job:
    """One row: an operation in JAX at one shape."""

    implementation: str
    operation: str
    shape_name: str
    dtype: str
    tiny: bool

    @property
    def key(self) -> str:
        return f"{self.shape_name} {self.operation} {self.implementation} {self.dtype}"

    @property
    def shape(self) -> Shape:
        return TINY if self.tiny else SHAPES[self.shape_name]

    @property
    def checked_shape(self) -> Shape:
        return self.shape._replace(batch=1, length=min(self.shape.length, CHECKED_LENGTH))

    @property
    def function(self) -> Callable:
        return ROWS[self.implementation][self.operation]

    def inputs(self, shape: Shape, correlated: bool) -> dict[str, jax.Array]:
        return random_inputs(shape, OPERATIONS[self.operation], self.dtype, correlated)

    def compile(self) -> dict[str, dict[str, Any]]:
        """The programs of the forward pass, of both passes, and of both for the comparison with float64."""

        def forward(inputs, weights):
            return self.function(**inputs)

        def compiled(function, shape):
            inputs = jax.eval_shape(functools.partial(self.inputs, shape, False))
            weights = inputs.pop("weights")
            start = time.perf_counter()
            program = jax.jit(function).lower(inputs, weights).compile()
            return {"program": program, "seconds": time.perf_counter() - start}

        both = with_gradient(self.function)
        programs = {"forward": (forward, self.shape), "both": (both, self.shape), "check": (both, self.checked_shape)}
        return {name: attempt(functools.partial(compiled, *which)) for name, which in programs.items()}

    def measure(self, programs: dict[str, dict[str, Any]], number: int) -> dict[str, Any]:
        """The cells of the row."""

        def timed(name):
            if "refused" in programs[name]:
                return programs[name]
            program, inputs = programs[name]["program"], self.inputs(self.shape, False)
            times = rounds(functools.partial(_calls, program, inputs, inputs.pop("weights")), number)
            return times | {"mib": temporary_mib(program), "compile_s": programs[name]["seconds"]}

        def checked():
            if "refused" in programs["check"]:
                return programs["check"]
            inputs = self.inputs(self.checked_shape, True)
            results = programs["check"]["program"](inputs, inputs.pop("weights"))
            return errors(OPERATIONS[self.operation], self.dtype, self.checked_shape, *results)

        row = {name: attempt(functools.partial(timed, name)) for name in ("forward", "both")}
        return row | ({"errors": attempt(checked)} if OPERATIONS[self.operation].rule else {})


def _calls(program, inputs, weights, count):
    """Seconds of calls in a row."""
    start = time.perf_counter()
    for _ in range(count):
        results = program(inputs, weights)
    jax.block_until_ready(results)
    return time.perf_counter() - start


class TorchJob(Job):
    """One row: an operation in PyTorch."""

    def compile(self):
        return {}  # a first call compiles

    def inputs(self, shape, correlated):
        torch, inputs = importlib.import_module("torch"), super().inputs(shape, correlated)
        tensors = {name: torch.from_numpy(np.array(x, np.float32)).cuda() for name, x in inputs.items()}
        return {name: x if name == "log_decay" else x.to(getattr(torch, self.dtype)) for name, x in tensors.items()}

    def calls(self, tensors):
        """The forward pass, and both passes, as functions without arguments."""
        torch, weights = importlib.import_module("torch"), tensors["weights"]
        inputs = {name: x.requires_grad_() for name, x in tensors.items() if name != "weights"}

        def forward():
            with torch.no_grad():
                return self.function(**inputs)

        def both():
            reads = self.function(**inputs)
            gradients = torch.autograd.grad(reads, list(inputs.values()), weights)
            return reads.detach(), dict(zip(inputs, gradients, strict=True))

        return {"forward": forward, "both": both}

    def measure(self, programs, number):
        def timed(name):
            torch = importlib.import_module("torch")
            call = self.calls(self.inputs(self.shape, False))[name]
            torch.cuda.empty_cache()
            start = time.perf_counter()
            call()
            torch.cuda.synchronize()
            seconds, before = time.perf_counter() - start, torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            call()
            mib = (torch.cuda.max_memory_allocated() - before) / 2**20
            return rounds(functools.partial(_torch_calls, call), number) | {"mib": mib, "compile_s": seconds}

        def checked():
            reads, gradients = self.calls(self.inputs(self.checked_shape, True))["both"]()
            gradients = {name: x.double().cpu().numpy() for name, x in gradients.items()}
            reads = reads.double().cpu().numpy()
            return errors(OPERATIONS[self.operation], self.dtype, self.checked_shape, reads, gradients)

        row = {name: attempt(functools.partial(timed, name)) for name in ("forward", "both")}
        return row | {"errors": attempt(checked)}


def _torch_calls(call, count):
    """Seconds of calls in a row, by events on the device."""
    torch = importlib.import_module("torch")
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(count):
        call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3


# --- language models -------------------------------------------------------------------------------------------------

TINY_MODEL = {"vocab_size": 100, "cutoffs": (20, 50), "num_layers": 2, "d_model": 16, "d_ff": 16, "head_size": 4}


@dataclasses.dataclass(frozen=True)
class PresetJob:
    """One row: the training step of a preset of ``experiments.language``."""

    preset: str
    dtype: str
    tiny: bool

    @property
    def key(self) -> str:
        return f"{self.preset} {self.dtype}"

    @property
    def shape(self) -> tuple[int, int]:
        preset = find(self.preset)
        return (2, 16) if self.tiny else (preset.batch_size, preset.length)

    def make_model(self) -> DecoderLM:
        options = {"dtype": self.dtype, **(TINY_MODEL if self.tiny else {})}
        return DecoderLM(dataclasses.replace(find(self.preset).model, **options), rngs=nnx.Rngs(0))

    def initial_state(self) -> training.State:
        return training.initial_state(self.make_model, find(self.preset).training)

    def batch(self) -> dict[str, np.ndarray]:
        """Words by Zipf's law: word r of the vocabulary, which is in the order of frequency, is as frequent as 1/r."""
        size = nnx.eval_shape(self.make_model).config.vocab_size
        frequency = 1 / np.arange(1, size + 1)
        rows, length = self.shape
        words = np.random.default_rng(0).choice(size, (rows, length + 1), p=frequency / frequency.sum())
        return {"tokens": np.int32(words[:, :-1]), "targets": np.int32(words[:, 1:])}

    def compile(self) -> dict[str, dict[str, Any]]:
        def compiled():
            step = training.make_step(training.graph_of(self.make_model), loss, find(self.preset).training)
            inputs = jax.eval_shape(self.initial_state), jax.eval_shape(self.batch)
            start = time.perf_counter()
            program = jax.jit(step, donate_argnums=0).lower(*inputs).compile()
            return {"program": program, "seconds": time.perf_counter() - start}

        return {"step": attempt(compiled)}

    def measure(self, programs: dict[str, dict[str, Any]], number: int) -> dict[str, Any]:
        """The cell of the row."""

        def timed():
            if "refused" in programs["step"]:
                return programs["step"]
            program, batch = programs["step"]["program"], jax.tree.map(jnp.asarray, self.batch())
            state = jax.jit(self.initial_state)()

            def run(count):
                nonlocal state
                start = time.perf_counter()
                for _ in range(count):
                    state, metrics = program(state, batch)
                jax.block_until_ready(metrics)
                return time.perf_counter() - start

            times = rounds(run, number)
            speed = 1e3 * self.shape[0] * self.shape[1] / times["ms"]
            numbers = {"words_per_s": speed, "mib": temporary_mib(program), "compile_s": programs["step"]["seconds"]}
            return times | numbers

        return {"step": attempt(timed)}


# --- the table -------------------------------------------------------------------------------------------------------


def groups(config: Config) -> list[list[Any]]:
    """The rows in the order of their measurement; the programs of a group compile side by side."""
    result = []
    for dtype in config.dtypes:
        for implementation in config.rows:
            job = TorchJob if implementation == "fla" else Job
            for rule in [rule for rule in config.rules if rule in ROWS[implementation]]:
                result.append([job(implementation, rule, name, dtype, config.tiny) for name in config.shapes])
        result.append([PresetJob(preset, dtype, config.tiny) for preset in config.presets])
    return result


def header(config: Config) -> dict[str, str]:
    """The card and the versions, with which all rows of a folder are measured."""

    def version(package):
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return "not installed"

    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        driver = "unknown"
    packages = ("fwt-jax", "jax", "jaxlib", "jax-triton", "triton", "torch")
    packages += ("flash-linear-attention", "jax-linear-attention")
    sizes = {"sizes": "tiny"} if config.tiny else {}
    return {"card": jax.devices()[0].device_kind, "driver": driver} | sizes | {name: version(name) for name in packages}


def table(head: dict[str, str], rows: dict[str, dict[str, Any]]) -> str:
    """The card and versions, the rows of the operation, and those of the language models."""
    timing = ("min", "max", "MiB", "s to compile")
    heads = (
        "shape",
        "rule",
        "row",
        "dtype",
        "ms forward",
        *timing,
        "ms both",
        *timing,
        "error of y",
        "of gradients",
        "",
    )
    operations, presets = [heads], [("preset", "dtype", "words/s", "ms", *timing, "")]
    for key, row in rows.items():
        if "step" in row:
            presets.append((*key.split(), *_numbers(row["step"], "words_per_s", *TIMING), _notes(row)))
            continue
        error = _numbers(row["errors"], "reads", "gradient") if "errors" in row else ("-", "-")
        cells = (*_numbers(row["forward"], *TIMING), *_numbers(row["both"], *TIMING), *error)
        operations.append((*key.split(), *cells, _notes(row)))
    shapes = ", ".join(f"{name} {' x '.join(map(str, shape))}" for name, shape in SHAPES.items())
    lines = [", ".join(f"{name} {value}" for name, value in head.items()), f"B x T x H x K = V: {shapes}"]
    for cells, words in ((operations, 4), (presets, 2)):
        if len(cells) > 1:
            lines.append(tables.text(cells, right=range(words, len(cells[0]) - 1), rule_after=1))
    return "\n\n".join(lines) + "\n"


TIMING = ("ms", "min", "max", "mib", "compile_s")
FORMATS = {"mib": ",.0f", "compile_s": ".1f", "words_per_s": ",.0f", "reads": ".1e", "gradient": ".1e"}


def _numbers(cell, *names):
    if "refused" in cell:
        return ("refused", *("-" for _ in names[1:]))
    return tuple(format(cell[name], FORMATS.get(name, ".4g")) for name in names)


def _notes(row):
    """Why cells of a row were refused."""
    reasons = {}
    for name, cell in row.items():
        if "refused" in cell:
            reasons.setdefault(cell["refused"], []).append(name)
    return "; ".join(f"{', '.join(names)}: {reason}" for reason, names in reasons.items())


def main(config: Config):
    command_line.check_at_least(config, rounds=1)
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch needs memory of the card, too
    if jax.default_backend() == "cpu" and not config.tiny:
        raise ValueError("the shapes need a GPU, and JAX has a CPU only; --tiny tries the program on a CPU")
    head = header(config)
    config.out.mkdir(parents=True, exist_ok=True)
    folder.check_identity(config.out / "run.json", head)
    path = config.out / "gpu.json"
    rows = files.read_json(path)["rows"] if path.exists() else {}
    todo = [[job for job in group if config.again or not _complete(rows.get(job.key))] for group in groups(config)]
    threads = 1 if jax.default_backend() == "cpu" else min(16, os.cpu_count() or 1)
    with (
        ThreadPoolExecutor(threads) as pool,
        tqdm(total=sum(map(len, todo)), unit="row", dynamic_ncols=True) as progress,
    ):
        for group in todo:
            progress.set_postfix_str(f"compiling {group[0].key} …" if group else "")
            for job, programs in list(zip(group, pool.map(lambda job: job.compile(), group), strict=True)):
                progress.set_postfix_str(f"timing {job.key}")
                rows[job.key] = job.measure(programs, config.rounds)
                files.write(path, json.dumps({"header": head, "rows": rows}, indent=1))
                files.write(config.out / "table.txt", table(head, rows))
                progress.update()
    print(table(head, rows))
    print(f"wrote {config.out}/: gpu.json, table.txt")


def _complete(row):
    return row is not None and not any("refused" in cell for cell in row.values())


if __name__ == "__main__":
    with command_line.one_line():
        main(tyro.cli(Config, prog="python -m experiments.benchmarks.gpu", description=__doc__))
