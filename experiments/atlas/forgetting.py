"""Overwriting and forgetting, in a memory that is carried on to 16 times the trained length.

A stream of pairs (key, value) is written. After each piece of 64 pairs, keys are asked for: which value does the key
have now, or has it none? Keys are fixed vectors of length 1 in 32 dimensions, values are one-hot, and the answer is the
largest of the 32 numbers of the read and of one logit for "none". Settings:

    reassign           32 orthonormal keys; pairs are drawn with replacement, and the last value of a key counts. This
                       is the paper's setting 2 (Schlag et al. 2021, section 6.1) at S = 32 without its learned keys
    contexts           after every 16 pairs nothing written before counts any more: a decay is needed. Half of the keys
                       asked for have no value. The first token of a context is marked, and a gate can see the mark
    crowded contexts   the same with 64 random keys: more than dimensions, so that stale pairs interfere
    hold               8 pairs are written first and asked for ever after, while 8 other keys are reassigned: a decay
                       hurts. The 16 keys are random, so that each write disturbs the others

Recipe. A model is a rule and at most five numbers: β before its sigmoid (not for "sum"), the gain of the read, the
logit for "none", and the a and b of a gate, α = sigmoid(a − b·mark). They are learned for each seed with Adam, rate
0.05, on 300 batches of 32 streams of one piece, 64 pairs. The test streams 64 sequences of 16 pieces. The memory that a
piece leaves is the start of the next: x is the length divided by the trained one, the score is the share of right
answers. "decay 0.95" is a fixed α. A seed draws keys and streams; models of a setting see the same. Guessing a value
gets 1/32, and who always says "none" gets ½ in the contexts.

Expected: sum never removes a value; delta with β = 1 and orthonormal keys replaces it exactly, and also keeps what
another context left. Oja's rule replaces the key of a value, not the value of a key.

Published, and where ours differs.
Schlag et al. 2021, figures 3 and 5, S = 20 keys, DPFP-1, the best evaluation loss of the authors' program
(experiments/results/authors.csv): delta 0.00077, fwm 0.040, sum 0.097; 0.5 is an empty memory. There keys are learned;
ours are fixed, and only the numbers above are learned.
Yang, Kautz & Hatamizadeh 2025, "Gated Delta Networks", table 2 in section 3.2, 1.3B parameters trained at 4K tokens,
accuracy in % at 2K, 4K, 8K tokens: "decay hurts memory retention", S-NIAH-1: DeltaNet 96.8, 99.0, 98.8, Mamba2 98.8,
65.4, 30.4, Gated DeltaNet 88.4, 91.4, 91.8; "gating facilitates filtering", S-NIAH-2: DeltaNet 45.6, 18.6, 14.4, Gated
DeltaNet 99.8, 92.2, 29.6. (From transcriptions that agree with each other. The paper itself was not at hand.) Ours asks
the same two questions of the memory alone.
Buitrago & Gu 2025, arXiv 2507.02782: recurrent models fail beyond the trained length because they never saw the states
that arise there. A number that compares with ours: not found.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from experiments.atlas import plot
from experiments.atlas.task import Point, Run, Task
from fwt_jax import Memory, fast_weight_attention

SIZE = 32  # d
VALUES = 32  # V; the answer V is "none"
LENGTH = 64  # the trained length; the tokens of a piece
PIECES = 16
XS = (1, 2, 4, 8, 16)  # the pieces after which the memory is asked
QUESTIONS = 16
BATCH = 32
STEPS = 300
TESTS = 64
RATE = 0.05


@dataclasses.dataclass(frozen=True)
class Model:
    """An update rule.

    Attributes:
      rule: a rule of the library.
      decay: α of each token; None: no decay; "gate": α = sigmoid(a − b·mark), a and b learned.
    """

    rule: str
    decay: float | str | None = None


@dataclasses.dataclass(frozen=True)
class Setting:
    """A stream of pairs.

    Attributes:
      keys: S, the number of keys.
      orthonormal: the keys are orthonormal; else random unit vectors.
      context: n: the stream is made of contexts of n pairs with different keys, and pairs of an earlier one do not
        count any more; 0: no contexts.
      held: the first ``held`` tokens write a key each, no later token writes these keys, and questions are for them.
    """

    keys: int
    orthonormal: bool = False
    context: int = 0
    held: int = 0


MODELS = {
    "sum": Model("sum"),
    "sum, decay 0.95": Model("sum", 0.95),
    "gated sum": Model("sum", "gate"),
    "delta": Model("delta"),
    "delta, decay 0.95": Model("delta", 0.95),
    "gated delta": Model("delta", "gate"),
    "fwm": Model("fwm"),
    "oja": Model("oja"),
}
SETTINGS = {
    "reassign": Setting(keys=32, orthonormal=True),
    "contexts": Setting(keys=32, orthonormal=True, context=16),
    "crowded contexts": Setting(keys=64, context=16),
    "hold": Setting(keys=16, held=8),
}


# --- data ------------------------------------------------------------------------------------------------------------


class Streams(NamedTuple):
    """N streams of P pieces of L tokens.

    Attributes:
      keys, values: ids, ``[N, P, L]``.
      marks: 1 where a context begins, ``[N, P, L]`` float32.
      questions: ids of keys, after each piece, ``[N, P, Q]``.
      answers: the value that the key has now, or V for none, ``[N, P, Q]``.
    """

    keys: Any
    values: Any
    marks: Any
    questions: Any
    answers: Any


def draw_table(rng, setting: Setting) -> np.ndarray:
    """The vectors of the keys, ``[S, d]``, of length 1."""
    table = rng.standard_normal((setting.keys, SIZE))
    if setting.orthonormal:
        table = np.linalg.qr(table.T)[0].T
    return (table / np.linalg.norm(table, axis=-1, keepdims=True)).astype(np.float32)


def draw_streams(rng, setting: Setting, number: int, pieces: int = 1) -> Streams:
    """Draws streams, and answers their questions with a table of what each key has now."""
    length = pieces * LENGTH
    values = rng.integers(VALUES, size=(number, length))
    if setting.context:
        order = np.argsort(rng.random((number, length // setting.context, setting.keys)), axis=-1)
        keys = order[..., : setting.context].reshape(number, length)
    else:
        keys = rng.integers(setting.held, setting.keys, size=(number, length))
        keys[:, : setting.held] = np.arange(setting.held)
    marks = np.zeros((number, length), np.float32)
    if setting.context:
        marks[:, :: setting.context] = 1
    rows, now = np.arange(number), np.full((number, setting.keys), VALUES)
    questions, answers = [], []
    for t in range(length):
        if marks[0, t]:
            now[:] = VALUES
        now[rows, keys[:, t]] = values[:, t]
        if (t + 1) % LENGTH == 0:
            questions.append(_questions(rng, setting, keys[:, : t + 1], now))
            answers.append(np.take_along_axis(now, questions[-1], axis=1))
    pieced = (x.reshape(number, pieces, LENGTH) for x in (keys, values, marks))
    return Streams(*pieced, np.stack(questions, axis=1), np.stack(answers, axis=1))


def _questions(rng, setting, keys, now):
    """``[N, Q]``: keys that are held, or keys of late positions; with contexts, half of them have no value now."""
    size = (len(keys), QUESTIONS)
    if setting.held:
        return rng.integers(setting.held, size=size)
    positions = rng.integers(1, 1 + (setting.context or LENGTH), size=size)
    asked = np.take_along_axis(keys, keys.shape[1] - positions, axis=1)
    if setting.context:
        absent = np.argsort(rng.random(now.shape) + (now != VALUES), axis=1)
        asked[:, ::2] = absent[:, : QUESTIONS // 2]
    return asked


# --- model -----------------------------------------------------------------------------------------------------------


def init_parameters(model: Model) -> dict[str, float]:
    """The numbers that are learned: β before its sigmoid, the gate's a and b, the logit of "none", log of the gain."""
    parameters = {"none": 0.5, "gain": 1.0}
    parameters |= {} if model.rule == "sum" else {"beta": 0.0}
    return parameters | ({"keep": 3.0, "mark": 0.0} if model.decay == "gate" else {})


def write(model: Model, parameters, table, keys, values, marks, memory: Memory | None) -> Memory:
    """The memory after a piece: ids and marks ``[N, L]``."""
    beta = jnp.full(keys.shape, jax.nn.sigmoid(parameters["beta"]) if "beta" in parameters else 1.0)
    log_decay = None
    if model.decay == "gate":
        log_decay = jax.nn.log_sigmoid(parameters["keep"] - parameters["mark"] * marks)[..., None]
    elif model.decay is not None:
        log_decay = jnp.full((*keys.shape, 1), np.log(model.decay))
    key, value = table[keys][:, :, None], jax.nn.one_hot(values, VALUES)[:, :, None]
    return fast_weight_attention(key, key, value, beta[..., None], log_decay, rule=model.rule, memory=memory)[1]


def logits(parameters, table, questions, memory: Memory):
    """``[N, Q, V + 1]``: the reads and the logit of "none", times a gain."""
    read = jnp.einsum("nqk,nkv->nqv", table[questions], memory.fast_weights[:, 0])
    none = jnp.full((*questions.shape, 1), parameters["none"])
    return jnp.exp(parameters["gain"]) * jnp.concatenate([read, none], axis=-1)


def loss(parameters, model: Model, table, streams: Streams):
    """The cross-entropy of the answers after one piece."""
    keys, values, marks, questions, answers = (x[:, 0] for x in streams)
    memory = write(model, parameters, table, keys, values, marks, None)
    found = logits(parameters, table, questions, memory)
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(found, answers))


@functools.partial(jax.jit, static_argnums=0)
@functools.partial(jax.vmap, in_axes=(None, 0, 0))
def train(model: Model, table, batches: Streams):
    """The learned numbers, after a step for each batch ``[steps, N, 1, …]``; all arguments and results of each seed."""
    optimizer = optax.adam(RATE)
    parameters = jax.tree.map(jnp.float32, init_parameters(model))

    def step(carry, batch):
        parameters, state = carry
        updates, state = optimizer.update(jax.grad(loss)(parameters, model, table, batch), state)
        return (optax.apply_updates(parameters, updates), state), None

    return lax.scan(step, (parameters, optimizer.init(parameters)), batches)[0][0]


@functools.partial(jax.jit, static_argnums=0)
@functools.partial(jax.vmap, in_axes=(None, 0, 0, 0))
def accuracy(model: Model, parameters, table, streams: Streams):
    """The share of right answers after each piece, ``[P]``. The memory is carried from piece to piece."""

    def piece(memory, tokens):
        keys, values, marks, questions, answers = tokens
        memory = write(model, parameters, table, keys, values, marks, memory)
        found = jnp.argmax(logits(parameters, table, questions, memory), axis=-1)
        return memory, jnp.mean(found == answers)

    number = len(streams.keys)
    empty = Memory(jnp.zeros((number, 1, SIZE, VALUES)), jnp.zeros((number, 1, SIZE)))
    return lax.scan(piece, empty, jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), streams))[1]


def draw_seeds(setting: Setting, seeds: int, steps: int = STEPS):
    """Tables ``[seeds, S, d]``, batches for training and streams for the test. All models see the same."""

    def one(seed):
        rng = np.random.default_rng(seed)
        table = draw_table(rng, setting)
        batches = jax.tree.map(
            lambda x: x.reshape(steps, BATCH, *x.shape[1:]), draw_streams(rng, setting, steps * BATCH)
        )
        return table, batches, draw_streams(rng, setting, TESTS, PIECES)

    return jax.tree.map(lambda *x: np.stack(x), *map(one, range(seeds)))


def execute(run: Run, report: Callable[[float], Any]) -> list[Point]:
    """Learns the few numbers of all seeds in one program, and asks the memory as it is carried on."""
    model = MODELS[run.model]
    table, batches, tests = draw_seeds(SETTINGS[run.setting], run.seeds)
    report(0.1)
    parameters = train(model, table, batches)
    report(0.8)
    scores = np.asarray(accuracy(model, parameters, table, tests))
    report(1.0)
    return [Point(seed, x, float(row[x - 1])) for seed, row in enumerate(scores) for x in XS]


def runs(seeds: int) -> list[Run]:
    return [Run("forgetting", model, setting, seeds) for setting in SETTINGS for model in MODELS]


def seconds(run: Run) -> float:
    return 2 + 2 * run.seeds * (0.3 if MODELS[run.model].rule == "sum" else 1)


def solved(points: list[Point]) -> float:
    """The accuracy at 16 times the trained length."""
    last = max(point.x for point in points)
    return float(np.mean([point.score for point in points if point.x == last]))


# --- figure ----------------------------------------------------------------------------------------------------------

TITLES = {
    "reassign": "Keys are reassigned",
    "contexts": "Contexts: a decay is needed",
    "crowded contexts": "Contexts of 64 keys in 32 dimensions",
    "hold": "Old pairs are asked for: a decay hurts",
}


def draw(figure, rows):
    plot.panels(figure, rows, TASK, columns=2)
    for axes in figure.axes:
        axes.set_title(TITLES.get(axes.get_title(loc="left"), ""), loc="left", fontsize=11)
        axes.set_xscale("log", base=2)
        axes.set_xticks(XS, [f"{x}×" for x in XS])


TASK = Task(
    name="forgetting",
    question="Does the memory replace what changes, forget what no longer counts, and keep the rest?",
    x="length; 1× is the trained one",
    score="share of right answers",
    runs=runs,
    execute=execute,
    seconds=seconds,
    solved=solved,
    draw=draw,
)
