"""A process of ``pretrained.py``: one library, which loads a checkpoint and generates at each line of its input.

It runs in the other library's interpreter too, so it imports nothing else of this repository at its head.

Its arguments are the library, the folder, the dtype and the number of tokens of the prompt.

It answers each line, a number N, with one line of JSON: what it took to continue the prompt by N tokens, greedily. The
first line that it writes is what it took to load.
"""

from __future__ import annotations

import json
import pathlib
import random
import sys
import time
from collections.abc import Callable
from typing import Any

VOCABULARY_OF_PROMPT = 90  # any model has these tokens


def serve():
    """Loads, and then answers until its input ends."""
    library, folder, dtype, num_tokens = sys.argv[1:]
    answers, sys.stdout = sys.stdout, sys.stderr  # what a library prints must not be taken for an answer
    random.seed(0)
    prompt = [random.randrange(VOCABULARY_OF_PROMPT) for _ in range(int(num_tokens))]
    load = {"ours": ours, "transformers": transformers}[library]()
    before = peak_bytes()
    generate, took = measured(load, folder, dtype, prompt)
    print(json.dumps({"before": before, **took}), file=answers, flush=True)
    for line in sys.stdin:
        tokens, took = measured(generate, int(line))
        print(json.dumps({"tokens": tokens, **took}), file=answers, flush=True)


def peak_bytes() -> int:
    """The most memory that this process has had, on Linux. ``getrusage`` counts that of the process before it, too."""
    status = pathlib.Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


def measured(call: Callable[..., Any], *arguments: Any) -> tuple[Any, dict[str, float]]:
    """What a call returns; its seconds by the clock and of processors in all threads, and the peak of memory since."""
    start, processor = time.perf_counter(), time.process_time()
    result = call(*arguments)
    seconds, processor = time.perf_counter() - start, time.process_time() - processor
    return result, {"seconds": seconds, "processor": processor, "peak": peak_bytes()}


def ours():
    """A function (folder, dtype, prompt) -> (function N -> N tokens), with the imports done."""
    import jax.numpy as jnp
    import numpy as np

    from fwt_jax.convert import from_pretrained
    from fwt_jax.decode import generate

    def load(folder, dtype, prompt):
        model = from_pretrained(folder, dtype=jnp.dtype(dtype))
        tokens = jnp.asarray([prompt], jnp.int32)
        return lambda number: np.asarray(generate(model, tokens, number, temperature=0))[0].tolist()

    return load


def transformers():
    """As ``ours``, for transformers on PyTorch."""
    import torch  # pyright: ignore[reportMissingImports]
    from transformers import AutoModelForCausalLM  # pyright: ignore[reportMissingImports]

    def load(folder, dtype, prompt):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
        tokens = torch.tensor([prompt])

        def generate(number):
            options = {"max_new_tokens": number, "min_new_tokens": number, "do_sample": False}
            with torch.inference_mode():
                return model.generate(tokens, attention_mask=torch.ones_like(tokens), **options)[0, -number:].tolist()

        return generate

    return load
