"""The evaluations of the paper's tables 2 to 5 (section 6.3 and appendix F).

Each function returns the mean of −log p over the tokens that it scores, in nats. Its exponential is the perplexity.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from tqdm import tqdm

from experiments.language.text import Segments, windows
from experiments.run.devices import place
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
    """Reads the text in segments of ``length`` tokens, as training does. This is the fastest evaluation.

    Args:
      model: the model.
      tokens: integers ``[N]``, N ≥ 2.
      length: tokens of a segment.
      batch_size: the number of rows, each a contiguous part of the tokens; fewer for a short text. Tokens that do not
        fill the rows are not scored. On a mesh every device reads all rows, because they take a small part of the time.
      carry: whether a segment starts from the memory of the segment before it.
      mesh: the devices; one device if not given.
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
    """Adds a loss that a device still computes, and waits for the loss before it.

    A CPU may stand for several devices. With more programs at the same time, all its threads may wait for each other.
    """
    losses[-1:] = [np.float64(before) for before in losses[-1:]]
    losses.append(loss)


def _sum(losses):
    """The sum in float64. In float32, a long text's sum loses terms below a ten-millionth of it."""
    return float(np.sum([np.float64(loss) for loss in losses]))


@nnx.jit
def _segment_loss(model, tokens, targets, memory):
    losses, memory = model.losses(tokens, targets, memory)
    return jnp.sum(losses), memory


def carried(model: DecoderLM, tokens: np.ndarray, length: int, *, mesh: Mesh | None = None) -> float:
    """Reads the whole text as one sequence, as table 4 does. It scores all tokens but the first.

    The text is cut into segments of ``length`` tokens, and each starts from the memory of the segment before it.
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
    """Scores each token from the ``length`` tokens before it and an empty memory, as tables 2, 3 and 5 do.

    The first window scores all its tokens, every other window its last. So each scored token costs ``length`` tokens.
    The authors read one window at a time. Here the output layer only reads the last tokens of a batch of windows.

    Args:
      model: the model.
      tokens: integers ``[N]``, N ≥ 2.
      length: tokens of a window.
      batch_size: windows in a batch. The default is 64 on accelerators, because one window leaves them idle. On CPUs
        it is 4, because more do not fit into the caches. It is rounded up to a multiple of the devices of a mesh.
      mesh: the devices; one device if not given.
      progress: whether to show a progress bar.

    Raises:
      ValueError: fewer than two tokens.
    """
    if batch_size is None:
        batch_size = 64 if jax.default_backend() != "cpu" else 4
        rows = 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]
        batch_size = -(-batch_size // rows) * rows
    (first, targets), further, number = windows(tokens, length, batch_size)
    first = place({"tokens": first, "targets": targets}, mesh, whole=True)
    loss, _ = _segment_loss(model, first["tokens"], first["targets"], None)
    losses = [loss]
    for batch in tqdm(further, "sliding window", number, unit="batch", disable=not progress, dynamic_ncols=True):
        batch = place(batch, mesh)
        _add(losses, _last_loss(model, batch["tokens"], batch["targets"], batch["weights"]))
    return _sum(losses) / int(np.sum(np.asarray(tokens)[1:] >= 0))


@nnx.jit
def _last_loss(model, tokens, targets, weights):
    hidden, _ = model.hidden(tokens)
    return jnp.sum(weights * model.losses_of(hidden[:, -1:], targets[:, None])[:, 0])


def with_config(model: DecoderLM, config) -> DecoderLM:
    """A model with the same parameters and another configuration, for instance a longer memory."""
    other = nnx.eval_shape(lambda: DecoderLM(config, rngs=nnx.Rngs(0)))
    graph, _ = nnx.split(other)
    return nnx.merge(graph, nnx.state(model))
