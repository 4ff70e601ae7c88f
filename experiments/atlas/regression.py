"""In-context regression: a memory reads a linear map from noisy pairs; nothing is trained.

A head sees pairs (k_t, v_t) of an unknown map A ``[V, d]`` and is asked for A k_{t+1} before it sees that pair:

    v_t = A k_t + n_t        k_t uniform on the unit sphere of R^d,   A_ij ~ N(0, 1),   n_t ~ N(0, σ² I)
    score_t = mean (W_tᵀ k_{t+1} − A k_{t+1})²        1 for an empty memory, 0 for one that holds Aᵀ

k_{t+1} is independent of W_t, so that the score estimates ‖W_t − Aᵀ‖²_F / (d V). Settings: "clean", σ = 0; "noisy",
σ = ½; "change", σ = 0 and another map after half of the pairs.

Closed form. Let w = E‖W‖²/(dV) and c = E⟨W, Aᵀ⟩/(dV), s = 1 for the delta rule and s = 0 for the sum. A step is

    W' = α P W + β k (A k + n)ᵀ        P = I − s β k kᵀ

Unit keys give P² = I − s (2β − β²) k kᵀ and P k = (1 − sβ) k, and E k kᵀ = I/d. k_t is independent of W_{t−1}. So

    c' = (1 − sβ/d) α c + β/d
    w' = (1 − s(2β − β²)/d) α² w + 2αβ(1 − sβ) c/d + β²(1 + σ²)/d        c' uses c, w' uses c and w
    E score = g² w − 2 g c + 1        g: the gain of the read, 1, or c/w, which is the best one

exactly, from w = c = 0; c = 0 again where the map changes, because the new one is independent of W. Without decay

    delta   e' = (1 − (2β − β²)/d) e + β²σ²/d      normalised LMS: its floor is βσ²/(2 − β); β and 2 − β are as fast
    sum     e_t = (1 − t/d)² + (t/d)(1 − 1/d + σ²)  Hebb: it overshoots
            e_t = 1 − t/(d(1 + σ²) + t − 1)         with the best gain: 1/t, where LMS without noise is exponential

For given keys the same holds with matrices, before E k kᵀ = I/d is used. tests/test_atlas_memory.py has that form, and
finds the reads of ``fast_weight_attention`` equal to it to 1e-6. "oja" and "fwm" are not linear in these moments and
are simulated alone. Oja's rule learns the map from values to keys, and its read is right for orthogonal maps only. The
values of both are divided by √V: Oja's rule needs a length of about 1, and fwm clips ‖W‖ to 1. "least squares" is the
posterior mean of A given all pairs, which no reader can beat; after the change it starts anew, as if told. Without
noise its score is max(0, 1 − t/d).

A gain is a number for each t that fits all reads of a seed, as the output of a layer can be rescaled. Sum, fwm and oja
have one, except "sum, no gain". The number after "delta" is β, 1 if there is none. "gated" is a fixed α of 0.95.

Sources. The delta rule as LMS: Widrow & Hoff 1960, "Adaptive switching circuits" (the paper's own text: not found in
what could be searched; secondary sources name it as the origin of LMS). LMS and normalised LMS for independent keys:
Slock 1993, IEEE Trans. Signal Processing 41(9), 2811–2825 (its text: not found). The derivation above is ours and
stands alone. Memories as regression: Wang, Shi & Fox 2025, arXiv 2501.12352. The task: Garg et al. 2022, "What can
transformers learn in-context?", whose abstract says that a trained transformer is comparable to least squares; its
curves as numbers: not found. Their program (dtsip/in-context-learning) trains to 41 points. Ours differs: unit keys
instead of Gaussian ones, d = 16, 16 rows of A for each sequence of keys, no training, and no softmax.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.atlas import plot
from experiments.atlas.task import Point, Run, Task
from fwt_jax import fast_weight_attention

SIZE = 16  # d, and V
LENGTH = 128
HEADS = 256  # sequences of keys for each seed
XS = (1, 2, 4, *range(8, LENGTH + 1, 8))  # numbers of pairs that are in the results


@dataclasses.dataclass(frozen=True)
class Model:
    """An update rule with fixed numbers.

    Attributes:
      rule: a rule of the library, or "least squares".
      beta: β.
      decay: α.
      gain: whether the read is multiplied by the number that fits best.
      value_scale: the values are divided by it, and the read is multiplied by it.
    """

    rule: str
    beta: float = 1.0
    decay: float = 1.0
    gain: bool = False
    value_scale: float = 1.0


@dataclasses.dataclass(frozen=True)
class Setting:
    """``noise`` is σ. ``changes``: another map after half of the pairs."""

    noise: float = 0.0
    changes: bool = False


MODELS = {
    "sum": Model("sum", gain=True),
    "sum, no gain": Model("sum"),
    "gated sum": Model("sum", decay=0.95, gain=True),
    "delta 0.25": Model("delta", beta=0.25),
    "delta 0.5": Model("delta", beta=0.5),
    "delta": Model("delta"),
    "delta 1.5": Model("delta", beta=1.5),
    "gated delta": Model("delta", decay=0.95),
    "fwm": Model("fwm", gain=True, value_scale=SIZE**0.5),
    "oja": Model("oja", beta=0.5, gain=True, value_scale=SIZE**0.5),
    "least squares": Model("least squares"),
}
SETTINGS = {"clean": Setting(), "noisy": Setting(noise=0.5), "change": Setting(changes=True)}


# --- closed form -----------------------------------------------------------------------------------------------------


def expected(model: Model, setting: Setting, size: int = SIZE, length: int = LENGTH) -> np.ndarray | None:
    """The expected score after 1 … T pairs, ``[T]`` float64, by the recursion at the head of this file.

    Returns:
      None where there is no closed form: for "oja", "fwm", and for "least squares" with noise.
    """
    change = length // 2 if setting.changes else length
    if model.rule == "least squares":
        seen = np.arange(1, length + 1)
        since = np.where(seen > change, seen - change, seen)
        return None if setting.noise else np.maximum(0, 1 - since / size)
    if model.rule not in ("sum", "delta"):
        return None
    beta, decay, corrects = model.beta, model.decay, model.rule == "delta"
    w = c = 0.0
    scores = []
    for t in range(length):
        if t == change:
            c = 0.0
        kept = (1 - corrects * beta * (2 - beta) / size) * decay**2 * w
        w = kept + (2 * decay * beta * (1 - corrects * beta) * c + beta**2 * (1 + setting.noise**2)) / size
        c = (1 - corrects * beta / size) * decay * c + beta / size
        gain = c / w if model.gain else 1.0
        scores.append(gain**2 * w - 2 * gain * c + 1)
    return np.array(scores)


# --- simulation ------------------------------------------------------------------------------------------------------


class Pairs(NamedTuple):
    """Keys ``[T + 1, H, d]``, values ``[T, H, V]``, and A k_{t+1} ``[T, H, V]`` with the map of pair t."""

    keys: Any
    values: Any
    answers: Any


def draw_pairs(seed: int, setting: Setting, size: int = SIZE, length: int = LENGTH, heads: int = HEADS) -> Pairs:
    """The pairs of a seed. NumPy draws them, because JAX takes 8 s to compile a program that does."""
    rng = np.random.default_rng(seed)
    keys = rng.standard_normal((length + 1, heads, size))
    keys /= np.linalg.norm(keys, axis=-1, keepdims=True)
    maps = rng.standard_normal((2, heads, size, size))
    second = np.arange(length) >= (length // 2 if setting.changes else length)

    def mapped(keys):
        before, after = (np.einsum("hij,thj->thi", of_heads, keys) for of_heads in maps)
        return np.where(second[:, None, None], after, before)

    values = mapped(keys[:-1]) + setting.noise * rng.standard_normal((length, heads, size))
    return Pairs(keys, values, mapped(keys[1:]))


def reads(model: Model, keys, values):
    """The memory's answer W_tᵀ k_{t+1} after each pair, ``[T, H, V]``; keys ``[T + 1, H, K]``, values ``[T, H, V]``."""
    beta = jnp.full(values.shape[:2], model.beta, values.dtype)[None]
    log_decay = None if model.decay == 1 else jnp.full_like(beta, np.log(model.decay))
    arrays = (keys[1:], keys[:-1], values / model.value_scale)
    read, _ = fast_weight_attention(*(x[None] for x in arrays), beta, log_decay, rule=model.rule)
    return model.value_scale * read[0]


def posterior_variance(keys, setting: Setting) -> np.ndarray:
    """k_{t+1}ᵀ Cov(A_i | pairs 1 … t) k_{t+1} for keys ``[T + 1, H, d]``: the expected score of the posterior mean.

    Returns:
      ``[T, H]`` float64. Without noise, float32 would miss a direction that a key holds a thousandth of.
    """
    length, heads, size = len(keys) - 1, *keys.shape[1:]
    variances = np.empty((length, heads))
    covariance = prior = np.broadcast_to(np.eye(size), (heads, size, size))
    for t in range(length):
        if setting.changes and t == length // 2:
            covariance = prior
        column = np.einsum("hij,hj->hi", covariance, keys[t])
        variance = np.sum(keys[t] * column, axis=-1, keepdims=True) + setting.noise**2
        scaled = np.where(variance > 1e-12, column / np.maximum(variance, 1e-12), 0)  # 0: the key says nothing new
        covariance = covariance - scaled[:, :, None] * column[:, None]
        variances[t] = np.maximum(0, np.einsum("hi,hij,hj->h", keys[t + 1], covariance, keys[t + 1]))  # rounding
    return variances


@functools.partial(jax.jit, static_argnums=1)
@functools.partial(jax.vmap, in_axes=(0, None))
def scores(pairs: Pairs, model: Model):
    """The score after 1 … T pairs, the mean over heads and rows of A: pairs of N seeds -> ``[N, T]``."""
    read = reads(model, pairs.keys, pairs.values)
    if model.gain:
        fit = jnp.sum(read * pairs.answers, axis=(1, 2)) / jnp.sum(jnp.square(read), axis=(1, 2))
        read = fit[:, None, None] * read
    return jnp.mean(jnp.square(read - pairs.answers), axis=(1, 2))


def execute(run: Run, report: Callable[[float], Any]) -> list[Point]:
    """All seeds of a run in one program. Models of a setting see the same pairs."""
    model, setting = MODELS[run.model], SETTINGS[run.setting]
    pairs = [draw_pairs(seed, setting) for seed in range(run.seeds)]
    if model.rule == "least squares":
        curves = np.array([np.mean(posterior_variance(seed.keys, setting), axis=1) for seed in pairs])
    else:
        curves = np.asarray(scores(jax.tree.map(lambda *seeds: np.stack(seeds), *pairs), model))
    report(1.0)
    return [Point(seed, x, float(curve[x - 1])) for seed, curve in enumerate(curves) for x in XS]


def runs(seeds: int) -> list[Run]:
    return [Run("regression", model, setting, seeds) for setting in SETTINGS for model in MODELS]


def seconds(run: Run) -> float:
    return 1.0


def solved(points: list[Point]) -> float:
    """1 − the score after all pairs; 0 for a memory that is no better than an empty one."""
    last = max(point.x for point in points)
    return float(np.clip(1 - np.mean([point.score for point in points if point.x == last]), 0, 1))


# --- figure ----------------------------------------------------------------------------------------------------------

# model: colour, marker
LOOKS = {
    "sum, no gain": ("#D55E00", "x"),
    "sum": plot.LOOKS["sum"],
    "gated sum": plot.LOOKS["gated sum"],
    "delta 0.25": ("#0072B2", "v"),
    "delta 0.5": ("#332288", "^"),
    "delta": plot.LOOKS["delta"],
    "delta 1.5": ("#661100", "<"),
    "gated delta": plot.LOOKS["gated delta"],
    "fwm": plot.LOOKS["fwm"],
    "oja": plot.LOOKS["oja"],
    "least squares": ("#000000", "*"),
}
PANELS = {
    # setting: title, limits of the score
    "clean": ("The map, read from clean pairs", (1e-4, 100)),
    "noisy": ("Noise of variance ¼ on the values", (2e-2, 10)),
    "change": ("Another map after 64 pairs", (1e-2, 30)),
}


def draw(figure, rows: list[dict[str, str]]) -> None:
    """A panel for each setting: points are simulated (± 2 standard errors over seeds), lines are the closed form.

    A dotted line joins points without a closed form.

    Args:
      figure: an empty matplotlib figure, at least 7 inches wide.
      rows: of the csv, with columns model, setting, seed, x and score.
    """
    from matplotlib.lines import Line2D  # not above, because no worker draws

    figure.set_size_inches(8, 10)
    shown = [setting for setting in SETTINGS if any(row["setting"] == setting for row in rows)]
    found = [model for model in LOOKS if any(row["model"] == model for row in rows)]
    panels = figure.subplots(len(shown), 1, squeeze=False, sharex=True)[:, 0]
    for axes, setting in zip(panels, shown, strict=True):
        for model in found:
            curves = {}
            for row in rows:
                if (row["model"], row["setting"]) == (model, setting):
                    curves.setdefault(float(row["x"]), []).append(float(row["score"]))
            _draw_model(axes, model, setting, dict(sorted(curves.items())))
        title, limits = PANELS[setting]
        axes.set_title(title, loc="left", fontsize=11)
        axes.set_yscale("log")
        axes.set_ylim(limits)
        axes.set_ylabel("squared error", fontsize=10)
        axes.axhline(1, color="#888888", linewidth=0.8, linestyle=(0, (1, 2)))
        axes.grid(color="#E4E4E4", linewidth=0.7)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    meaning = "points: simulation, lines: closed form, dotted: no closed form"
    panels[-1].set_xlabel(f"pairs seen (d = {SIZE}); {meaning}", fontsize=10)
    handles = [Line2D([], [], label=m, color=LOOKS[m][0], marker=LOOKS[m][1], markersize=5) for m in found]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False, fontsize=10)


def _draw_model(axes, model: str, setting: str, scores: dict[float, list[float]]):
    """The closed form and the simulated ``scores`` {x: one for each seed} of a model; nothing without scores."""
    color, marker = LOOKS[model]
    look = {"color": color, "marker": marker, "markersize": 4.5, "linestyle": ":"}
    line = expected(MODELS[model], SETTINGS[setting])
    if line is not None and scores:
        dashes = (0, (3, 2)) if model == "delta 1.5" else "-"  # without noise it lies on the line of 0.5
        seen, line = np.arange(1, LENGTH + 1), np.where(line > 1e-6, line, np.nan)
        axes.plot(seen, line, color=color, linewidth=1.4, linestyle=dashes)
        look["linestyle"] = ""
    mean = [np.mean(seeds) for seeds in scores.values()]
    errors = [2 * np.std(seeds, ddof=1) / len(seeds) ** 0.5 if len(seeds) > 1 else 0 for seeds in scores.values()]
    axes.errorbar(list(scores), mean, errors, **look, linewidth=1, elinewidth=1, capsize=1.5)


TASK = Task(
    name="regression",
    question="Does the memory hold the linear map behind the pairs, and does it follow when the map changes?",
    x="pairs",
    score="squared error of the read, 1 for an empty memory",
    runs=runs,
    execute=execute,
    seconds=seconds,
    solved=solved,
    draw=draw,
)
