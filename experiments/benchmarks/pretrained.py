"""A public checkpoint on a CPU: seconds and memory to load it, to read a prompt and to generate, beside transformers.

    python -m experiments.benchmarks.pretrained                                ours alone
    python -m experiments.benchmarks.pretrained --peer peer/bin/python         beside transformers

These commands make the other interpreter.

    python -m venv peer
    peer/bin/pip install torch==2.13.0 transformers==5.24.0 --extra-index-url https://download.pytorch.org/whl/cpu

Without ``--folder``, the program writes a checkpoint of Qwen3.5-0.8B's sizes with random weights (1.5 GB), and removes
it at the end. The sizes are those of the published model card: d_model 1024, 24 layers of which each fourth is softmax
attention (8 heads of 256 on 2 of keys and values, a quarter of each rotated, θ = 10⁷), the others gated delta rule (16
heads of 128 with 128 values), d_ff 3584, 248,320 tokens, output layer and embedding one, bfloat16.

Each library has a process of its own. After one round that is not counted, which compiles, they take turns: each
generates 1 token, which is reading the prompt, and then 1 + N tokens. The table has the least of all rounds: seconds by
the clock, and in brackets those of processors, in all threads. A token takes 1/N of the difference. The memory is the
peak of the process, less what it had before loading. "equal" is how many tokens are those of the row above.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import IO, Literal

import jax
import numpy as np
import tyro
from flax import nnx

from experiments.run import command_line
from fwt_jax.convert import checkpoint
from fwt_jax.convert.families import FAMILIES

ROOT = pathlib.Path(__file__).parents[2]
WORKER = "from experiments.benchmarks import pretrained_worker as worker; worker.serve()"
SIZES = {
    "model_type": "qwen3_5_text",
    "vocab_size": 248_320,
    "hidden_size": 1024,
    "intermediate_size": 3584,
    "num_hidden_layers": 24,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 16,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25},
    "layer_types": [*["linear_attention"] * 3, "full_attention"] * 6,
    "tie_word_embeddings": True,
    "dtype": "bfloat16",
}
TINY = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "layer_types": ["linear_attention", "full_attention"],
}


@dataclasses.dataclass(frozen=True)
class Config:
    """What to load and to generate."""

    folder: pathlib.Path | None = None
    """A checkpoint; one with random weights if not given."""
    peer: pathlib.Path | None = None
    """A Python interpreter with torch and transformers."""
    dtypes: tuple[Literal["bfloat16", "float32"], ...] = ("bfloat16", "float32")
    """The dtypes to load it in."""
    prompt: int = 1024
    """Tokens of the prompt."""
    tokens: int = 16
    """N, tokens that are generated after the first one."""
    rounds: int = 3
    """Rounds that count."""
    tiny: bool = False
    """A checkpoint of two small layers, for a test of this program."""

    def __post_init__(self):
        command_line.check_at_least(self, prompt=1, tokens=1, rounds=1)
        if self.peer is not None and not os.access(self.peer, os.X_OK):
            raise ValueError(f"--peer must be a Python interpreter, got {self.peer}; the head of {__file__} makes one")


def write_random(folder: pathlib.Path, options: dict):
    """A checkpoint with these options. Its matrices are normal, and all else is 0, which no speed depends on."""
    folder.mkdir(exist_ok=True)
    (folder / checkpoint.CONFIG).write_text(json.dumps(options, indent=2) + "\n")
    family, random = FAMILIES[options["model_type"]], np.random.default_rng(0)
    config = family.config(options, {})
    state = nnx.eval_shape(lambda: nnx.state(family.model(config, rngs=nnx.Rngs(0))))
    shapes = {".".join(map(str, path)): x.get_value() for path, x in nnx.to_flat_state(state)}
    tensors = {}
    for entry in family.entries(config, shapes):
        arrays = jax.eval_shape(entry.to_disk, *(shapes[path] for path in entry.model))
        for name, x in zip(entry.disk, arrays, strict=True):
            tensors[name] = checkpoint.Tensor("BF16", x.shape, 2 * x.size)

    def contents():
        for name, tensor in tensors.items():
            x = np.zeros(tensor.shape, np.float32)
            if x.ndim > 1:
                random.standard_normal(out=x, dtype=np.float32)
                x *= 0.02 if x.ndim == 2 else 0.3
            yield name, x.astype(checkpoint.DTYPES["BF16"]).reshape(-1).view(np.uint8)

    checkpoint.write_tensors(folder, tensors, contents(), 5_000_000_000)


@contextlib.contextmanager
def library(name: str, interpreter: str, folder: pathlib.Path, dtype: str, prompt: int) -> Iterator[subprocess.Popen]:
    """A process of ``pretrained_worker``, which ends at the end of the block."""
    command = [interpreter, "-c", WORKER, name, str(folder.resolve()), dtype, str(prompt)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            _stream(process.stdin).close()


def _stream(stream: IO[str] | None) -> IO[str]:
    assert stream is not None
    return stream


def answer(process: subprocess.Popen, number: int | None = None) -> dict:
    """What the process says of ``number`` tokens, or of loading."""
    if number is not None:
        _stream(process.stdin).write(f"{number}\n")
        _stream(process.stdin).flush()
    line = _stream(process.stdout).readline()
    if not line:
        raise ValueError(f"a library's process ended with code {process.wait()}; its own words are above")
    return json.loads(line)


def compare(folder: pathlib.Path, dtype: str, config: Config):
    """Prints a row for each library."""
    interpreters = {"ours": sys.executable}
    if config.peer is not None:
        interpreters["transformers"] = str(config.peer.absolute())
    with contextlib.ExitStack() as stack:
        processes, loads = {}, {}
        for name, interpreter in interpreters.items():
            process = stack.enter_context(library(name, interpreter, folder, dtype, config.prompt))
            processes[name], loads[name] = process, answer(process)
        runs = {name: [] for name in processes}
        for _ in range(1 + config.rounds):
            for name, process in processes.items():
                runs[name].append([answer(process, number) for number in (1, 1 + config.tokens)])
    num_bytes = sum(x.size for x in checkpoint.read_headers(folder).values()) * (1 if dtype == "bfloat16" else 2)
    first = runs["ours"][0][1]["tokens"]
    for name, (compiling, *rounds) in runs.items():
        print(_row(name, dtype, loads[name], compiling, rounds, num_bytes, first, config.tokens), flush=True)


def _row(name, dtype, load, compiling, rounds, num_bytes, first, num_tokens):
    def least(key):
        prompt, all_tokens = (min(pair[i][key] for pair in rounds) for i in (0, 1))
        return prompt, 1000 * (all_tokens - prompt) / num_tokens

    (prompt, token), (prompt_processor, token_processor) = least("seconds"), least("processor")
    peaks = [(x["peak"] - load["before"]) / num_bytes for x in (load, rounds[-1][1])]
    compiled = sum(x["seconds"] for x in compiling)
    equal = sum(x == y for x, y in zip(first, compiling[1]["tokens"], strict=True))
    return (
        f"{dtype:9} {name:13} {load['seconds']:7.1f} {peaks[0]:6.2f} {peaks[1]:6.2f} {compiled:9.1f} "
        f"{prompt:8.2f} ({prompt_processor:6.2f}) {token:8.0f} ({token_processor:6.0f}) {equal:4} of {len(first)}"
    )


def main(config: Config):
    names = "load, s | peak/bytes: loading, all | first round, s | prompt, s | token, ms | equal"
    print(
        f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, prompt of {config.prompt} tokens; {names}", flush=True
    )
    with tempfile.TemporaryDirectory() as temporary:
        folder = config.folder
        if folder is None:
            folder = pathlib.Path(temporary) / "model"
            write_random(folder, SIZES | TINY if config.tiny else SIZES)
        for dtype in config.dtypes:
            compare(folder, dtype, config)


if __name__ == "__main__":
    with command_line.one_line():
        main(tyro.cli(Config, description=__doc__))
