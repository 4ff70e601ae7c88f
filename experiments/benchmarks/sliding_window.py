"""The sliding window evaluation of tables 2, 3 and 5 beside the authors' own program, on the same weights and words.

    python -m experiments.benchmarks.sliding_window --toolkit lmtool-fwp [--windows 32] [--rounds 3]

``lmtool-fwp`` is a clone of IDSIA/lmtool-fwp, and PyTorch must be installed. The model is the small one of table 2 with
random weights. Zipf's law draws the text from 267,735 words. The authors' program reads one window of 256 words at a
time, computes the losses of all its words and uses the last. Ours reads a batch of windows, and its output layer
computes the last words only. The toolkit's delta rule is a CUDA kernel. A loop over the words in PyTorch replaces it
here; softmax and sum are the toolkit's own code. The programs run in turns. This program prints median windows per
second, and the nats of both. experiments/language/README.md has the results.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import pathlib
import sys
import types
from typing import Literal

import jax
import numpy as np
import torch
import tyro
from flax import nnx

from experiments.benchmarks.language_models import timed
from experiments.language import evaluation
from experiments.run import command_line
from fwt_jax import convert
from fwt_jax.models import DecoderLM

LENGTH = 256
NUM_WORDS = 267_735
SMALL = {"n_layer": 16, "n_head": 8, "d_model": 128, "d_head": 16, "d_inner": 2048, "n_token": NUM_WORDS}
SMALL |= {"cutoffs": [20_000, 40_000, 200_000], "skip_attn_normalization": True, "dropout": 0.0}
Name = Literal["softmax", "sum", "delta"]
ATTENTION_TYPES: dict[Name, int] = {"softmax": 2, "sum": 4, "delta": 24}  # the toolkit's attn_type


@dataclasses.dataclass(frozen=True)
class Config:
    """Where the toolkit is, and how much to evaluate."""

    toolkit: pathlib.Path
    """A clone of IDSIA/lmtool-fwp."""
    windows: int = 32
    """Windows in one timed call, without the first window."""
    rounds: int = 3
    """How often each call is timed."""
    batches: tuple[int, ...] = (1, 4, 16)
    """Windows in a batch of ours."""
    models: tuple[Name, ...] = tuple(ATTENTION_TYPES)
    """The models to time."""

    def __post_init__(self):
        for name in ("windows", "rounds"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


def delta(query, key, value, beta, old_value, inserted_value, fast_weights, out):
    """The toolkit's kernel, for arrays ``[B, H, T, ·]``. It writes the results to ``fast_weights`` and ``out``."""
    for t in range(query.shape[2]):
        k = key[:, :, t, :, None]
        error = beta[:, :, t, None] * (value[:, :, t, None] - k.mT @ fast_weights)
        fast_weights += k @ error
        out[:, :, t] = (query[:, :, t, None] @ fast_weights)[:, :, 0]


class _Kernels(types.SimpleNamespace):
    """A replacement of the toolkit's compiled CUDA code, with the only function that is called."""

    fast_weight_forward = staticmethod(delta)

    def __getattr__(self, name):
        return None


def toolkit_model(folder: pathlib.Path, arguments: dict, model: DecoderLM) -> torch.nn.Module:
    """The toolkit's model with our weights."""
    import torch.utils.cpp_extension

    if not (folder / "src" / "model_main.py").is_file():
        raise ValueError(f"{folder} is not a clone of IDSIA/lmtool-fwp: it has no src/model_main.py")
    torch.utils.cpp_extension.load = lambda **_: _Kernels()
    torch.version.cuda = torch.version.cuda or "12.0"  # the toolkit parses it, but needs no CUDA
    sys.path.insert(0, str(folder / "src"))
    from model_main import MemTransformerLM
    from utils.fast_fast_weight import DeltaFastWeight

    DeltaFastWeight.dot["cpu"] = delta
    sizes = {"tgt_len": LENGTH, "ext_len": 0, "mem_len": 0, "dropatt": 0.0, "device": "cpu"}
    with contextlib.redirect_stdout(io.StringIO()):
        theirs = MemTransformerLM(**arguments, **sizes)
    state = {name: torch.from_numpy(np.array(x)) for name, x in convert.to_toolkit(model, arguments).items()}
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    if set(missing) - set(convert.DERIVED) or unexpected:
        raise ValueError(
            f"the toolkit's model has other parameters than ours: it also needs {missing} and has no {unexpected}"
        )
    return theirs.eval()


def toolkit_nats(model: torch.nn.Module, tokens: np.ndarray) -> float:
    """Nats per word as in eval_sliding_window.py: all words of the first window, then the last word of each."""
    tokens, total = torch.from_numpy(tokens.astype(np.int64)), 0.0
    with torch.no_grad():
        for start in range(len(tokens) - LENGTH):
            window = tokens[start : start + LENGTH + 1, None]
            losses = model(window[:-1], window[1:], softmax_keep_order=True)[0]
            total += float(losses.sum() if start == 0 else losses[-1].sum())
    return total / (len(tokens) - 1)


def main(config: Config):
    rank = np.arange(NUM_WORDS)
    probability = 1 / (rank + 10) / np.sum(1 / (rank + 10))
    tokens = np.random.default_rng(0).choice(rank, LENGTH + 1 + config.windows, p=probability).astype(np.int32)
    calls, nats = {}, {}
    for name in config.models:
        arguments = SMALL | {"attn_type": ATTENTION_TYPES[name]}
        model = DecoderLM(convert.config_from_toolkit(arguments), rngs=nnx.Rngs(0))
        theirs = toolkit_model(config.toolkit, arguments, model)
        calls[name, "toolkit"] = functools.partial(toolkit_nats, theirs, tokens)
        for size in config.batches:
            calls[name, f"ours, {size}"] = functools.partial(evaluation.sliding_window, model, tokens, LENGTH, size)
        nats[name] = (calls[name, "toolkit"](), calls[name, f"ours, {config.batches[0]}"]())
    count = config.windows + 1
    print(f"{count} windows of {LENGTH} words on {jax.devices()[0].device_kind}, windows per second:")
    seconds = timed(calls, config.rounds)
    for (name, program), x in seconds.items():
        print(f"  {name:8} {program:12} {count / x:8.1f}   {seconds[name, 'toolkit'] / x:5.1f} times the toolkit's")
    for name, (theirs, ours) in nats.items():
        print(f"  {name:8} {theirs:.6f} nats by the toolkit, {ours:.6f} by us")


if __name__ == "__main__":
    with command_line.one_line():
        main(tyro.cli(Config, description=__doc__))
