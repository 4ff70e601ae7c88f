"""Evaluation of language models: what tables 2 to 5 of the paper measure (section 6.3 and appendix F).

All three give the mean of −log p over the tokens that they score, in nats; its exponential is the perplexity.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from tqdm import tqdm

from experiments.text import Segments, windows
from experiments.training import place
from fwt_jax.models import DecoderLM


def segments(
    model: DecoderLM,
    tokens: np.ndarray,
    length: int,
    batch_size: int = 10,
    *,
    carry: bool = False,
    mesh: Mesh | None = None,
) -> float:
    """In segments of their own, as during training; fast. ``carry``: the memory goes on from one to the next.

    ``batch_size`` rows (fewer of a short text) are read at once, each a part of the tokens; the rest is not scored. On
    a mesh every device reads all rows: it is a small part of the time.
    """
    batch_size = max(1, min(batch_size, len(tokens) // 2))
    batches = Segments(tokens, batch_size, length)
    memory = model.init_memory(batch_size) if carry else None
    losses, count = [], 0
    for _ in range(len(batches)):
        batch = next(batches)
        placed = place({name: batch[name] for name in ("tokens", "targets")}, mesh, whole=True)
        loss, memory = _segment_loss(model, placed["tokens"], placed["targets"], memory)
        memory = memory if carry else None
        _add(losses, loss)
        count += int(np.sum(batch["targets"] >= 0))
    return _sum(losses) / count


def _add(losses, loss):
    """Adds the loss of a program that is under way, and waits for the one before it.

    With more of them at once, the threads of a CPU that stands for several devices may all wait for another device.
    """
    losses[-1:] = [np.float64(before) for before in losses[-1:]]
    losses.append(loss)


def _sum(losses):
    """In float64: in float32 a sum loses what is less than a ten-millionth of it, which segments of a long text are."""
    return float(np.sum([np.float64(loss) for loss in losses]))


@nnx.jit
def _segment_loss(model, tokens, targets, memory):
    losses, memory = model.losses(tokens, targets, memory)
    return jnp.sum(losses), memory


def carried(model: DecoderLM, tokens: np.ndarray, length: int, *, mesh: Mesh | None = None) -> float:
    """All in one piece: consecutive segments of ``length`` tokens, the memory of each where the next one starts.

    All tokens but the first are scored: table 4.
    """
    return segments(model, tokens, length, batch_size=1, carry=True, mesh=mesh)


def sliding_window(
    model: DecoderLM,
    tokens: np.ndarray,
    length: int,
    batch_size: int | None = None,
    *,
    mesh: Mesh | None = None,
    progress: bool = False,
) -> float:
    """Each token from the ``length`` tokens before it, and from an empty memory: tables 2, 3 and 5.

    The first window scores all its tokens, every other one its last. The authors read one window at a time; here
    ``batch_size`` of them go at once, and the output layer sees their last tokens alone. The cost is that of reading
    ``length`` tokens for each token that is scored. If not given, batch_size is 64 on accelerators, which one window
    leaves idle, and on CPUs, where more do not fit into the caches, 4; a multiple of what a mesh splits it in.

    Raises:
      ValueError: fewer than two tokens.
    """
    if batch_size is None:
        batch_size = 64 if jax.default_backend() != "cpu" else 4
        rows = 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]
        batch_size = -(-batch_size // rows) * rows
    (first, targets), rest, number = windows(tokens, length, batch_size)
    first = place({"tokens": first, "targets": targets}, mesh, whole=True)
    loss, _ = _segment_loss(model, first["tokens"], first["targets"], None)
    losses = [loss]
    for batch in tqdm(rest, "sliding window", number, unit="batch", disable=not progress, dynamic_ncols=True):
        batch = place(batch, mesh)
        _add(losses, _last_loss(model, batch["tokens"], batch["targets"], batch["weights"]))
    return _sum(losses) / int(np.sum(np.asarray(tokens)[1:] >= 0))


@nnx.jit
def _last_loss(model, tokens, targets, weights):
    hidden, _ = model.hidden(tokens)
    return jnp.sum(weights * model.losses_of(hidden[:, -1:], targets[:, None])[:, 0])


def with_config(model: DecoderLM, config) -> DecoderLM:
    """The same parameters in a model that reads otherwise, for instance with a longer memory."""
    other = nnx.eval_shape(lambda: DecoderLM(config, rngs=nnx.Rngs(0)))
    graph, _ = nnx.split(other)
    return nnx.merge(graph, nnx.state(model))
