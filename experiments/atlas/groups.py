"""Word problems of groups: can a rule multiply permutations along a sequence?

A network reads elements of a group and says after each the product of all so far. It learns products of up to 24
elements and is tested to 120. The score is the accuracy in windows of 24, scaled as in languages.py.

    S3   all 6 permutations of three things
    A4   the 12 even permutations of four things
    S5   the 120 permutations of five things; the elements read are one transposition, one 5-cycle and its inverse

Recipe: one layer of 64 features with eight heads of 8 and a feed-forward layer of 128; Adam (see ``model.Recipe``) with
a rate of 0.01 for 1,500 steps and 300 more in which it falls to 0, or earlier if all seeds are below a loss of 0.005;
batches of 32 words, drawn anew. The test has 128 words, the same for all seeds.

Theory: a write with β = 2 reflects the memory, and a permutation with c cycles of n things is a product of n − c
reflections (transpositions), and of no fewer, because it differs from 1 by a matrix of rank n − c. So one layer follows
S3 and A4 with two writes for each token, and S5 with four (Siems et al. 2025). One write for each token follows none of
them. With β < 1 nothing is turned around.

Source: Siems, Carstensen, Zela, Hutter, Pontil & Grazzi 2025, "DeltaProduct: improving state-tracking in linear RNNs
via Householder products" (arXiv 2502.10297; code: automl/DeltaProduct). The README of their code, section "Example:
training on sequences of S3", says of one layer that is trained on 128 tokens and tested on 512: one write with
eigenvalues in [−1, 1] "is not expected to converge", two writes are "expected to train successfully", and neither with
eigenvalues in [0, 1]. Accuracies: not found as numbers.

Ours differs: 24 tokens and not 128, tested to five times that and not four; A4 in place of S4 and A5; S5 from three
elements and not from all 120; products of batches that are drawn anew; learning rate 0.01 and not 0.001.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from experiments.atlas import model, plot
from experiments.atlas.languages import solved, windows
from experiments.atlas.model import IGNORED, Model, Recipe
from experiments.atlas.task import Point, Run, Task

LENGTH, TEST_LENGTH = 24, 120
BATCH, TEST_BATCH = 32, 128
RECIPE = Recipe(rate=1e-2, steps=1500, end=300, enough=5e-3)


class Group(NamedTuple):
    """A group of permutations.

    Attributes:
      things: how many things are permuted.
      even: whether it has only the even permutations.
      read: the elements that occur in a word; all if not given.
      writes: the largest number of writes for each token that is tried.
    """

    things: int
    even: bool = False
    read: tuple[tuple[int, ...], ...] = ()
    writes: int = 4

    def elements(self) -> list[tuple[int, ...]]:
        """All permutations; the first is the identity."""
        return [p for p in itertools.permutations(range(self.things)) if not self.even or is_even(p)]


def is_even(permutation: tuple[int, ...]) -> bool:
    """Whether an even number of pairs is in the wrong order."""
    return sum(a > b for a, b in itertools.combinations(permutation, 2)) % 2 == 0


GROUPS = {
    "S3": Group(3, writes=2),
    "A4": Group(4, even=True, writes=3),
    "S5": Group(5, read=((1, 0, 2, 3, 4), (1, 2, 3, 4, 0), (4, 0, 1, 2, 3))),
}
MODELS = {
    "softmax": {"rule": "softmax"},
    "gated sum": {"rule": "sum", "decay": True},
    "delta": {},
    "delta β<2": {"max_beta": 2.0},
    "delta β<2, 2 writes": {"max_beta": 2.0, "writes": 2},
    "delta β<2, 3 writes": {"max_beta": 2.0, "writes": 3},
    "delta β<2, 4 writes": {"max_beta": 2.0, "writes": 4},
}


def products(group: Group) -> np.ndarray:
    """``[i, j]`` is the number of p∘q, where p is the i-th element that is read and q the j-th of all."""
    everything = group.elements()
    number = {p: i for i, p in enumerate(everything)}
    return np.array([[number[tuple(p[i] for i in q)] for q in everything] for p in group.read or everything])


@functools.cache  # the same object each time, which is compiled once
def sample(group: str, words: int, length: int) -> Callable:
    """key -> tokens and labels ``[words, length + 1]``; the first token is no element and has no label."""
    table = jnp.asarray(products(GROUPS[group]))

    def draw(key):
        symbols = jax.random.randint(key, (length, words), 0, len(table))

        def step(product, symbol):
            product = table[symbol, product]
            return product, product

        _, after = lax.scan(step, jnp.zeros(words, int), symbols)  # element 0 is the identity
        front = ((0, 0), (1, 0))
        tokens = jnp.pad(symbols.T, front, constant_values=len(table))
        return tokens, jnp.pad(after.T, front, constant_values=IGNORED)

    return draw


def network(run: Run) -> Model:
    """The network of a run: an embedding for each element that it reads and one for the start, a class for each."""
    read, classes = products(GROUPS[run.setting]).shape
    sizes = {"d_model": 64, "hidden": 128, "num_heads": 8, "head_size": 8}
    return Model(vocabulary=read + 1, classes=classes, **sizes, **MODELS[run.model])


def runs(seeds: int) -> list[Run]:
    return [
        Run("groups", name, setting, seeds)
        for setting, group in GROUPS.items()
        for name, options in MODELS.items()
        if options.get("writes", 1) <= group.writes
    ]


def execute(run: Run, report) -> list[Point]:
    parameters, _ = model.train(network(run), sample(run.setting, BATCH, LENGTH), RECIPE, run.seeds, report)
    tokens, labels = jax.jit(sample(run.setting, TEST_BATCH, TEST_LENGTH))(jax.random.key(2**31))
    predicted = model.predict(network(run), parameters, tokens)[:, :, 1:]
    return windows(predicted, np.asarray(labels)[:, 1:], LENGTH)


def seconds(run: Run) -> float:
    """Measured with five seeds on one core."""
    return {"softmax": 83, "gated sum": 121}.get(run.model, 62 + 56 * MODELS[run.model].get("writes", 1))


TASK = Task(
    name="groups",
    question="Which rule multiplies the elements of a group to five times the trained length?",
    x=f"elements read (trained on {LENGTH})",
    score="scaled accuracy",
    runs=runs,
    execute=execute,
    seconds=seconds,
    solved=solved,
    draw=lambda figure, rows: plot.panels(figure, rows, TASK, columns=2),
)
