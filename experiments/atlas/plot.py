"""The tables and figures of the atlas, from its results files."""

from __future__ import annotations

import pathlib
from collections.abc import Iterable

import numpy as np

from experiments.atlas.task import Point, Task
from experiments.run import files, tables

COLUMNS = ("model", "setting", "seed", "x", "score", "seconds")  # of a results file

# model: colour and marker; in the order of the legend and of the overview. Most colours are of Okabe and Ito, for the
# colour-blind. Where two are near to each other for them, markers and dashes differ.
LOOKS = {
    "softmax": ("#000000", "p"),
    "sum": ("#E69F00", "X"),
    "gated sum": ("#7A5200", "P"),
    "fwm": ("#882255", "D"),
    "oja": ("#999999", "h"),
    "delta": ("#009E73", "s"),
    "gated delta": ("#56B4E9", "o"),
    "delta β<2": ("#0072B2", "^"),
    "delta β<2, 2 writes": ("#D55E00", "v"),
    "delta β<2, 3 writes": ("#332288", "<"),
    "delta β<2, 4 writes": ("#661100", ">"),
}
FIXED_DECAY = {"sum, decay 0.95": ("#D55E00", "*"), "delta, decay 0.95": ("#1F3A68", "x")}  # not in the overview
OTHER = ("#777777", ".")


def unique(values: Iterable) -> list:
    """Each value once, in the order of the first."""
    return list(dict.fromkeys(values))


def models(rows: list[dict[str, str]]) -> list[str]:
    """The models of rows, in the order of the legend."""
    rank = {model: i for i, model in enumerate(LOOKS | FIXED_DECAY)}
    return sorted(unique(row["model"] for row in rows), key=lambda model: rank.get(model, len(rank)))


def scores(rows: list[dict[str, str]]) -> dict[float, np.ndarray]:
    """{x: the scores of all seeds} of the rows of one run."""
    by_x = {}
    for row in rows:
        by_x.setdefault(float(row["x"]), []).append(float(row["score"]))
    return {x: np.array(by_x[x]) for x in sorted(by_x)}


def table(task: Task, rows: list[dict[str, str]]) -> str:
    """The score of each model and setting over x: mean ± standard deviation of the seeds."""
    xs = sorted(unique(float(row["x"]) for row in rows))
    lines = [["setting", "model", *(f"{x:g}" for x in xs), "seconds"]]
    for setting in unique(row["setting"] for row in rows):
        for model in models(rows):
            run = [row for row in rows if (row["model"], row["setting"]) == (model, setting)]
            by_x = scores(run)
            if run:
                cells = [_spread(by_x[x]) if x in by_x else "" for x in xs]
                lines.append([setting, model, *cells, f"{float(run[0]['seconds']):.0f}"])
    head = f"{task.name}: {task.question}\n{task.score} by {task.x}; mean ± standard deviation of the seeds"
    return head + "\n\n" + tables.text(lines, right=range(2, len(lines[0])), rule_after=1)


def _spread(values):
    deviation = f" ± {values.std(ddof=1):.1g}" if len(values) > 1 else ""
    return f"{values.mean():.3g}{deviation}"


# --- figures ---------------------------------------------------------------------------------------------------------


def new_figure(width: float = 8, height: float = 5):
    from matplotlib.figure import Figure  # not above: every worker imports this file, and none draws

    return Figure(figsize=(width, height), dpi=150, layout="constrained")


def dashes(model: str) -> str:
    """The line of a model: dashed with a learned decay, dotted with a fixed one."""
    return "--" if model.startswith("gated") else ":" if model in FIXED_DECAY else "-"


def curves(axes, rows: list[dict[str, str]]):
    """A line for each model, the mean of the seeds, and a band from the least to the largest of them.

    Each line is thinner than those below it, so that lines in one place are all seen.
    """
    widths = dict(zip(LOOKS | FIXED_DECAY, np.linspace(4, 1.2, len(LOOKS | FIXED_DECAY)), strict=True))
    for model in models(rows):
        width = widths.get(model, 1.2)
        by_x = scores([row for row in rows if row["model"] == model])
        color, marker = (LOOKS | FIXED_DECAY).get(model, OTHER)
        pick = {name: [getattr(values, name)() for values in by_x.values()] for name in ("mean", "min", "max")}
        axes.plot(
            list(by_x),
            pick["mean"],
            dashes(model),
            color=color,
            marker=marker,
            markersize=3 + width,
            linewidth=width,
            label=model,
        )
        axes.fill_between(list(by_x), pick["min"], pick["max"], color=color, alpha=0.15, linewidth=0)
    axes.grid(color="#E4E4E4", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def panels(figure, rows: list[dict[str, str]], task: Task, columns: int = 3):
    """The figure of a task: one panel of curves for each setting, and one legend."""
    settings = unique(row["setting"] for row in rows)
    columns = min(columns, len(settings))
    height = -(-len(settings) // columns)
    figure.set_size_inches(8, 0.9 + 2.3 * height)
    grid = figure.subplots(height, columns, sharex=True, sharey=True, squeeze=False)
    for axes, setting in zip(grid.flat, settings, strict=False):
        curves(axes, [row for row in rows if row["setting"] == setting])
        axes.set_title(setting, loc="left", fontsize=11)
    for axes in grid.flat[len(settings) :]:
        axes.set_visible(False)
    grid[0, 0].set_ylim(bottom=max(-0.3, grid[0, 0].get_ylim()[0]))  # of all panels; far below chance is no news
    for i, axes in enumerate(grid.flat[: len(settings)]):
        axes.tick_params(labelbottom=i + columns >= len(settings))
    figure.supxlabel(task.x, fontsize=11)
    figure.supylabel(task.score, fontsize=11)
    handles = {}
    for axes in grid.flat:
        handles |= {label: handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    order = [model for model in models(rows) if model in handles]
    figure.legend(
        [handles[m] for m in order],
        order,
        loc="outside upper center",
        ncols=min(4, len(order)),
        frameon=False,
        fontsize=10,
    )


def overview(figure, results: dict[str, tuple[Task, list[dict[str, str]]]]):
    """What each rule solves: ``Task.solved`` of each run, from 0 to 1, as numbers and colours."""
    everything = [row for _, rows in results.values() for row in rows]
    columns = [model for model in models(everything) if model in LOOKS]
    names, cells = [], []
    for task, rows in results.values():
        for setting in unique(row["setting"] for row in rows):
            if task.overview is None or setting in task.overview:
                names.append(": ".join(filter(None, (task.name, setting))))
                cells.append([_solved(task, rows, model, setting) for model in columns])
    figure.set_size_inches(8, 1.6 + 0.33 * len(names))
    axes = figure.subplots()
    axes.imshow(np.array(cells), cmap="YlGnBu", vmin=0, vmax=1.2, aspect="auto")
    for i, line in enumerate(cells):
        for j, value in enumerate(line):
            if np.isfinite(value):
                color = "white" if value > 0.7 else "black"
                axes.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=10, color=color)
    axes.set_yticks(range(len(names)), names, fontsize=10)
    labels = [column.removeprefix("delta β<2, ") for column in columns]
    axes.set_xticks(range(len(columns)), labels, fontsize=10, rotation=40, ha="left")
    axes.tick_params(top=True, labeltop=True, bottom=False, labelbottom=False, length=0)
    axes.spines[:].set_visible(False)


def _solved(task, rows, model, setting):
    run = [row for row in rows if (row["model"], row["setting"]) == (model, setting)]
    if not run:
        return np.nan
    return task.solved([Point(int(row["seed"]), float(row["x"]), float(row["score"])) for row in run])


def draw(results: dict[str, tuple[Task, list[dict[str, str]]]], folder: pathlib.Path) -> list[pathlib.Path]:
    """Prints the table of each task that has rows, and draws its figure and the overview.

    Returns:
      The files written.

    Raises:
      ValueError: no task has rows.
    """
    results = {name: (task, rows) for name, (task, rows) in results.items() if rows}
    if not results:
        raise ValueError(f"{folder} holds no results of the atlas; make them first, or name another --out")
    figures = {}
    for name, (task, rows) in results.items():
        print(table(task, rows), end="\n\n")
        figures[name] = new_figure()
        task.draw(figures[name], rows)
    figures["overview"] = new_figure()
    overview(figures["overview"], results)
    written = []
    for name, figure in figures.items():
        written.append(folder / f"{name}.png")
        with files.replacing(written[-1]) as temporary:
            figure.savefig(temporary, format="png", metadata={"Software": None})
    return written
