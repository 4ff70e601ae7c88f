"""Multi-query associative recall (MQAR): how many pairs does a memory of a given size recall, after it has learned how?

A sequence is N pairs of a key and a value, as two tokens, and then keys of these pairs, drawn with replacement. After
each of these the network names the value. It learns with 4 to 64 pairs and is asked with 4 to 256. A setting is the
feature map, the width d, which is also the size of the one head's keys and values, and whether short convolutions of 4
tokens mix queries, keys and values. A memory has d × d numbers (2d × d with DPFP-1). The score is the accuracy.

A layer alone writes the value of a token under the key of the same token, so one of two things has to bring a key to
the next token: the convolution, or a first layer. Networks have one layer with convolutions, and two without. A network
without convolutions has the same 700 steps, so its score says how fast two layers learn it, not what they can do.

Source: Arora, Eyuboglu, Timalsina, Johnson, Poli, Zou, Rudra & Ré 2023, "Zoology: measuring and improving recall in
efficient language models" (arXiv 2312.04927; code: HazyResearch/zoology). The sweep of its figure 2 (their file
iclr24_zoology_figure2/configs.py): vocabulary 8192, 100,000 sequences; length 64 with 4 pairs, 128 with 8, 256 with 16
(512 with 64 is in the file, as a comment); widths 64 to 512; the best of four learning rates from 1e-4 to 1e-2. Its
numbers: a plot of accuracy over width. Numbers in text: not found.

Recipe: Adam (see ``model.Recipe``) with a rate of 0.01 for 500 steps and 200 more in which it falls to 0, or earlier if
all seeds are below a loss of 0.003; batches of 16 sequences of 160 tokens, with 4, 8, 16, 32 or 64 pairs. The first 250
steps have 64 sequences of 4 pairs and 40 tokens: else some seeds never do better than a guess. With 4 pairs 152 of the
160 tokens are queries that count, with 64 pairs 32, all alike. A test has 32 sequences of 64 queries, the same for all
seeds, and up to 576 tokens. At most three seeds.

Ours differs: a vocabulary of 512, batches that are drawn anew, one training for all numbers of pairs, one learning
rate, fewer steps (theirs: up to 64 epochs), one or two layers (theirs: four, for attention two), attention without
positions (theirs has them), widths 32 to 128, tests beyond the trained number of pairs; a value may occur twice in a
sequence, and queries follow each other without filling (theirs come sooner more often than later).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from experiments.atlas import model, plot
from experiments.atlas.model import IGNORED, Model, Recipe
from experiments.atlas.task import Point, Run, Task

KEYS = 256  # and as many values
PAIRS, TEST_PAIRS = (4, 8, 16, 32, 64), (4, 8, 16, 32, 64, 128, 256)
LENGTH, QUERIES = 160, 64
BATCH, TEST_BATCH = 16, 32
EASY_BATCH, EASY_LENGTH = 64, 40  # of the smallest number of pairs
RECIPE = Recipe(rate=1e-2, steps=500, end=200, enough=0.003, easy=250)
SEEDS = 3

RULES = {"softmax": {"rule": "softmax"}, "sum": {"rule": "sum"}, "delta": {}, "gated delta": {"decay": True}}
MEMORIES = ("sum", "delta", "gated delta")
FEATURES = {"silu": "silu", "ELU+1": "elu", "DPFP-1": "dpfp"}
SETTINGS = {
    # setting: the models in it, and their options; softmax has no features, and stands beside silu
    **{
        f"{name}, d = {width}": (
            tuple(RULES) if features == "silu" else MEMORIES,
            {"features": features, "d_model": width, "conv_size": 4},
        )
        for width in (32, 64)
        for name, features in FEATURES.items()
    },
    "silu, d = 128": (("sum", "delta"), {"d_model": 128, "conv_size": 4}),
    "silu, d = 32, no convolution": (tuple(RULES), {"d_model": 32, "num_layers": 2}),
}


def network(run: Run) -> Model:
    """The network of a run: one head, as wide as the network, and no feed-forward layer."""
    options = SETTINGS[run.setting][1]
    width = options["d_model"]
    return Model(
        vocabulary=2 * KEYS, classes=KEYS, num_heads=1, head_size=width, hidden=0, **options, **RULES[run.model]
    )


@functools.cache  # the same object each time, which is compiled once
def sample(pairs: Sequence[int], sequences: int, length: int) -> Callable:
    """key -> tokens and labels ``[sequences, length]``: N pairs, with N drawn from ``pairs``, and then queries."""

    def draw(key):
        number, keys, values, queries = jax.random.split(key, 4)
        number = jax.random.choice(number, jnp.array(pairs), (sequences, 1))
        keys = jnp.argsort(jax.random.uniform(keys, (sequences, KEYS)), axis=1)  # each at most once
        values = jax.random.randint(values, (sequences, KEYS), 0, KEYS)
        asked = (jax.random.uniform(queries, (sequences, length)) * number).astype(int)
        place = jnp.arange(length)[None]
        is_query = place >= 2 * number
        pair = jnp.where(is_query, asked, place // 2)
        key, value = (jnp.take_along_axis(x, jnp.minimum(pair, KEYS - 1), axis=1) for x in (keys, values))
        return jnp.where(is_query | (place % 2 == 0), key, KEYS + value), jnp.where(is_query, value, IGNORED)

    return draw


@functools.cache
def tests() -> list[tuple[np.ndarray, np.ndarray]]:
    """Tokens and labels for each of ``TEST_PAIRS``, all padded behind to one length, so that one program reads all."""
    drawn = [jax.jit(sample((n,), TEST_BATCH, 2 * n + QUERIES))(jax.random.key(2**31)) for n in TEST_PAIRS]
    longest = max(tokens.shape[1] for tokens, _ in drawn)

    def padded(x, filler):
        return np.pad(x, ((0, 0), (0, longest - x.shape[1])), constant_values=filler)

    return [(padded(tokens, 0), padded(labels, IGNORED)) for tokens, labels in drawn]


def execute(run: Run, report) -> list[Point]:
    net, points = network(run), []
    easier = sample(PAIRS[:1], EASY_BATCH, EASY_LENGTH)
    parameters, _ = model.train(net, sample(PAIRS, BATCH, LENGTH), RECIPE, run.seeds, report, easier)
    for pairs, (tokens, labels) in zip(TEST_PAIRS, tests(), strict=True):
        right = model.predict(net, parameters, tokens, TEST_BATCH // 2) == labels
        scores = right.sum((1, 2)) / np.sum(labels != IGNORED)
        points += [Point(seed, pairs, float(score)) for seed, score in enumerate(scores)]
    return points


def solved(points: list[Point]) -> float:
    """The mean accuracy of all seeds at the largest trained number of pairs."""
    return float(np.mean([point.score for point in points if point.x == max(PAIRS)]))


def seconds(run: Run) -> float:
    """Fitted to runs with three seeds on one core."""
    net = network(run)
    of_rule = {"softmax": 0.65, "sum": 0.85, "gated delta": 1.25}.get(run.model, 1.0)
    return of_rule * (40 + 1.6 * net.d_model) * (1.2 if net.num_layers > 1 else 1)


def draw(figure, rows):
    plot.panels(figure, rows, TASK)
    for axes in figure.axes:
        axes.set_xscale("log", base=2)
        axes.set_xticks(TEST_PAIRS, [str(n) for n in TEST_PAIRS], fontsize=8)
        axes.axvline(max(PAIRS), color="#888888", linewidth=0.9, linestyle=":", zorder=1)


TASK = Task(
    name="recall",
    question="How many pairs does a memory recall?",
    x="pairs (trained with 4 to 64, dotted)",
    score="accuracy",
    runs=lambda seeds: [
        Run("recall", name, setting, min(seeds, SEEDS)) for setting, (names, _) in SETTINGS.items() for name in names
    ],
    execute=execute,
    seconds=seconds,
    solved=solved,
    draw=draw,
    overview=("silu, d = 32", "ELU+1, d = 32", "DPFP-1, d = 32", "silu, d = 64", "silu, d = 32, no convolution"),
)
