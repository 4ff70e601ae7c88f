"""Formal languages: which state can a rule track along a sequence that is five times longer than those it learned from?

A network reads a word and says after each symbol what state an automaton is in. All words have 50 symbols in training,
and all their prefixes count, so it learns lengths 1 to 50. It is tested on words of 250 symbols.

    parity       0, 1     is the number of ones odd?
    modulo 3     0, 1     the number of ones modulo 3
    (aa)*        a        is the length even?
    reset Dyck-1 ( ) #    is a bracket open? # closes all of them
    shuffle-2    ( ) [ ]  is a round bracket open, and is a square one? Two counters, in any order

The score is the accuracy in windows of 50 symbols, scaled so that 1 is no error and 0 the most frequent answer of that
window (Grazzi et al. 2025 scale theirs by chance).

Recipe: one layer of 32 features with four heads of 8 and a feed-forward layer of 64; Adam (see ``model.Recipe``) with a
rate of 0.01 for 600 steps and 200 more in which it falls to 0, or earlier if all seeds are below a loss of 1e-6;
batches of 32 words, drawn anew. The test has 128 words, the same for all seeds.

Theory: in one layer a symbol that comes again and again multiplies the memory by the same 1 − β k kᵀ, whose eigenvalues
are real, from 1 − b to 1. So b = 1 cannot count modulo 2, and b = 2 can. Modulo 3 takes complex eigenvalues, which a
product of two writes for each token has. A sum counts up and down, but it cannot drop what it does not know, as a reset
must.

Sources:
  Irie, Csordás & Schmidhuber 2023, "Practical computational power of linear Transformers and their recurrent and
  self-referential extensions" (arXiv 2310.16076; code: IDSIA/fwp-formal-lang), for parity, (aa)*, reset Dyck-1 and
  shuffle-2. Its abstract says that recurrent and self-referential extensions overcome limits of linear Transformers,
  "e.g., allowing for generalisation on the parity problem". The README of the code says: data of Bhattamishra et al.
  2020, trained to length 50, no positions, at most 300 epochs, one seed. The table of accuracies: not found.
  Grazzi, Siems, Zela, Franke, Hutter & Pontil 2025, "Unlocking state-tracking in linear RNNs through negative
  eigenvalues" (arXiv 2411.12537), for β up to 2. Its abstract says that models with positive eigenvalues "cannot solve
  parity, while non-triangular matrices are needed to count modulo 3". The tables of accuracies: not found.

Ours differs: one small layer; words are drawn anew for each batch, and do not come from files; labels are states, not
sets of next symbols; words have no end; the accuracy counts symbols, not whole words.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from experiments.atlas import model, plot
from experiments.atlas.model import IGNORED, Model, Recipe
from experiments.atlas.task import Point, Run, Task

LENGTH, TEST_LENGTH, WINDOW = 50, 250, 50
BATCH, TEST_BATCH = 32, 128
START = 4  # the token in front of each word
RECIPE = Recipe(rate=1e-2, steps=600, end=200, enough=1e-6)


# --- languages: (key, words, length) -> symbols and states [words, length] -------------------------------------------


def parity(key, words, length):
    ones = jax.random.bernoulli(key, 0.5, (words, length)).astype(int)
    return ones, jnp.cumsum(ones, 1) % 2


def modulo_3(key, words, length):
    ones = jax.random.bernoulli(key, 0.5, (words, length)).astype(int)
    return ones, jnp.cumsum(ones, 1) % 3


def even_length(key, words, length):
    return jnp.zeros((words, length), int), jnp.broadcast_to(jnp.arange(1, length + 1) % 2, (words, length))


def reset_dyck(key, words, length):
    """A symbol in ten is a reset; of the others half open a bracket, or all where none is open."""

    def step(depth, number):
        symbol = jnp.where(number < 0.1, 2, jnp.where((number < 0.55) | (depth == 0), 0, 1))
        depth = jnp.where(symbol == 2, 0, depth + 1 - 2 * symbol)
        return depth, (symbol, depth > 0)

    _, (symbols, is_open) = lax.scan(step, jnp.zeros(words, int), jax.random.uniform(key, (length, words)))
    return symbols.T, is_open.T.astype(int)


def shuffle_2(key, words, length):
    """Each symbol belongs to one of two kinds of brackets, and opens one with probability ½, or if none is open."""

    def step(depths, numbers):
        kind, opens = numbers
        opens = opens | (jnp.take_along_axis(depths, kind[:, None], 1)[:, 0] == 0)
        depths = depths + jnp.where(opens, 1, -1)[:, None] * jax.nn.one_hot(kind, 2, dtype=int)
        return depths, (2 * kind + 1 - opens, (depths > 0) @ jnp.array([1, 2]))

    kinds, opens = jax.random.bernoulli(key, 0.5, (2, length, words))
    _, (symbols, states) = lax.scan(step, jnp.zeros((words, 2), int), (kinds.astype(int), opens))
    return symbols.T, states.T


LANGUAGES: dict[str, Callable] = {
    "parity": parity,
    "modulo 3": modulo_3,
    "(aa)*": even_length,
    "reset Dyck-1": reset_dyck,
    "shuffle-2": shuffle_2,
}
MODELS = {
    name: Model(vocabulary=5, classes=4, num_heads=4, head_size=8, **options)
    for name, options in {
        "softmax": {"rule": "softmax"},
        "sum": {"rule": "sum"},
        "gated sum": {"rule": "sum", "decay": True},
        "fwm": {"rule": "fwm"},
        "oja": {"rule": "oja"},
        "delta": {},
        "gated delta": {"decay": True},
        "delta β<2": {"max_beta": 2.0},
        "delta β<2, 2 writes": {"max_beta": 2.0, "writes": 2},
    }.items()
}


@functools.cache  # the same object each time, which is compiled once
def sample(language: str, words: int, length: int) -> Callable:
    """key -> tokens and labels ``[words, length + 1]``; the first token is START, which has no label."""

    def draw(key):
        symbols, states = LANGUAGES[language](key, words, length)
        front = ((0, 0), (1, 0))
        return jnp.pad(symbols, front, constant_values=START), jnp.pad(states, front, constant_values=IGNORED)

    return draw


def execute(run: Run, report) -> list[Point]:
    network = MODELS[run.model]
    parameters, _ = model.train(network, sample(run.setting, BATCH, LENGTH), RECIPE, run.seeds, report)
    tokens, labels = jax.jit(sample(run.setting, TEST_BATCH, TEST_LENGTH))(jax.random.key(2**31))
    predicted = model.predict(network, parameters, tokens)[:, :, 1:]
    return windows(predicted, np.asarray(labels)[:, 1:], WINDOW)


def windows(predicted: np.ndarray, labels: np.ndarray, window: int) -> list[Point]:
    """The scaled accuracy of each seed in each window of symbols; x is its last symbol.

    Args:
      predicted: ``[seeds, words, length]``.
      labels: ``[words, length]``.
    """
    points = []
    for end in range(window, labels.shape[1] + 1, window):
        part = labels[:, end - window : end]
        chance = np.bincount(part.ravel()).max() / part.size
        accuracy = (predicted[:, :, end - window : end] == part).mean((1, 2))
        points += [Point(seed, end, float(a - chance) / (1 - chance)) for seed, a in enumerate(accuracy)]
    return points


def solved(points: list[Point]) -> float:
    """The mean score of the seeds at the largest x, or 0 if it is below."""
    last = max(point.x for point in points)
    return max(0.0, float(np.mean([point.score for point in points if point.x == last])))


SECONDS = {
    "softmax": 47,
    "sum": 45,
    "gated sum": 50,
    "fwm": 59,
    "oja": 51,
    "delta": 49,
    "gated delta": 53,
    "delta β<2": 48,
    "delta β<2, 2 writes": 76,
}


def seconds(run: Run) -> float:
    """Measured with five seeds on one core. No two models have one time, so the runs of a model follow each other."""
    return SECONDS[run.model]


TASK = Task(
    name="languages",
    question="Which automata does a rule learn to follow to five times the trained length?",
    x="symbols read (trained on 50)",
    score="scaled accuracy",
    runs=lambda seeds: [Run("languages", name, language, seeds) for language in LANGUAGES for name in MODELS],
    execute=execute,
    seconds=seconds,
    solved=solved,
    draw=lambda figure, rows: plot.panels(figure, rows, TASK),
)
