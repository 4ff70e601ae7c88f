"""Figures 2 to 5 of the paper, drawn from the results files of the retrieval experiment over the authors' own runs.

    python -m experiments.retrieval.plot                      redraws every figure from experiments/results/*.csv
    python -m experiments.retrieval.plot --results FOLDER     from the csv files in FOLDER

As in the paper, a point is the last evaluation loss of a run, not its best. experiment.py makes the runs. The authors'
numbers are in results/authors.csv and results/authors_curves.csv, and results/README.md says where they come from.
"""

from __future__ import annotations

import csv
import math
import pathlib
import textwrap

import numpy as np
import tyro

from experiments.retrieval.model import EVAL_EVERY, is_finished
from experiments.run import command_line, files, tables

RESULTS = pathlib.Path(__file__).parent.parent / "results"
SETTINGS = {"0": "1", "1": "2"}  # column "replace" -> setting
TASKS = {"1": "every key once", "2": "keys are reassigned"}
NO_BREAK = "\N{NO-BREAK SPACE}"
HELD = 0.01  # a memory that has a smaller loss holds its pairs; an empty memory has 0.5

# (model, rule): label, colour, marker; in the order of the legend. Colours for the colour-blind, after Okabe and Ito.
CAPACITY = {
    ("softmax", "softmax"): ("softmax", "#000000", "p"),
    ("linear", "sum"): ("Linear (ELU+1)", "#009E73", "s"),
    ("favor64", "sum"): ("FAVOR+, 64", "#56B4E9", "o"),
    ("favor128", "sum"): ("FAVOR+, 128", "#0072B2", "v"),
    ("favor512", "sum"): ("FAVOR+, 512", "#1F3A68", "^"),
    ("dpfp1", "sum"): ("DPFP-1", "#E69F00", "X"),
    ("dpfp2", "sum"): ("DPFP-2", "#D55E00", "P"),
    ("dpfp3", "sum"): ("DPFP-3", "#B5559B", "D"),
}
UPDATE_RULES = {
    ("tanh", "fwm"): ("Schlag (2021)", "#000000", "s"),
    ("dpfp1", "fwm"): ("Schlag (2021) with DPFP-1", "#B5559B", "D"),
    ("dpfp1", "sum"): ("DPFP-1, sum rule", "#E69F00", "X"),
    ("linear", "delta"): ("Linear (ELU+1), delta rule", "#009E73", "v"),
    ("dpfp1", "delta"): ("DPFP-1, delta rule", "#56B4E9", "o"),
    ("dpfp2", "delta"): ("DPFP-2, delta rule", "#0072B2", "^"),
    ("favor64", "delta"): ("FAVOR+, 64, delta rule", "#D55E00", "<"),
    ("favor128", "delta"): ("FAVOR+, 128, delta rule", "#8C510A", ">"),
}
FOUR_RULES = {line: look for line, look in UPDATE_RULES.items() if line[0] in ("tanh", "dpfp1")}
LABELS = {
    **{("1", *line): look[0] for line, look in CAPACITY.items()},
    **{("2", *line): look[0] for line, look in UPDATE_RULES.items()},
}
NUM_FEATURES = {64: "Linear", 128: "DPFP-1", 256: "DPFP-2", 384: "DPFP-3"}  # as many keys can be orthogonal
# The columns of a results file
COLUMNS = ("model", "rule", "S", "replace", "seed", "best_loss", "best_step", "last_loss", "steps", "seconds", "losses")

FIGURES = {
    # experiment: {file: (setting, lines, S of learning curves or None for the last loss over S)}
    "quick": {"figure3.png": ("2", FOUR_RULES, 20), "figure2_coarse.png": ("1", CAPACITY, None)},
    "capacity": {"figure2.png": ("1", CAPACITY, None), "figure4.png": ("1", CAPACITY, 600)},
    "update_rules": {"figure5.png": ("2", UPDATE_RULES, None), "figure3.png": ("2", FOUR_RULES, 20)},
}


def label(model: str, rule: str, replace: str) -> str:
    """The name of a model in the legend, from three columns of a results file."""
    return LABELS.get((SETTINGS[replace], model, rule), f"{model}, {rule}")


def read(path: pathlib.Path) -> list[dict[str, str]]:
    """The rows of a csv file."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def read_runs(path: pathlib.Path) -> list[dict[str, str]]:
    """The rows of a results file, after a check of each.

    Raises:
      ValueError: other columns, or a line that is not whole.
    """
    try:
        rows = read(path)
        with path.open(newline="", encoding="utf-8") as file:
            columns = next(csv.reader(file), [])
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} is not a results file: {error}; move it away, or put back a copy") from error
    if tuple(columns) != COLUMNS:
        raise ValueError(
            f"{path} has the columns {columns}, expected {list(COLUMNS)}; "
            "move it away, or name another place with --out"
        )
    for number, row in enumerate(rows, 2):
        try:
            _check_run(row)
        except (ValueError, TypeError, AttributeError, IndexError) as error:  # missing fields are None
            raise ValueError(
                f"line {number} of {path} is not a whole run ({error}); delete that line, and the run is made again, "
                "or put back a copy"
            ) from error
    return rows


def _check_run(row):
    if list(row) != list(COLUMNS) or None in row.values():
        raise ValueError(f"it must have {len(COLUMNS)} fields")
    if row["replace"] not in SETTINGS:
        raise ValueError(f"replace must be 0 or 1, got {row['replace']!r}")
    for name, number in {"S": int, "seed": int, "best_step": int, "best_loss": float, "seconds": float}.items():
        number(row[name])
    losses, last = row["losses"].split(), float(row["last_loss"])
    for loss in losses:
        float(loss)
    if len(losses) * EVAL_EVERY != int(row["steps"]):
        raise ValueError(f"{row['steps']} steps have {int(row['steps']) // EVAL_EVERY} losses, got {len(losses)}")
    if losses[-1] not in (f"{last:.7g}", f"{last:.4g}"):  # older files have 4 digits
        raise ValueError(f"the last of its losses must be {row['last_loss']}, got {losses[-1]}")


def _by_point(rows):
    """{(setting, model, rule, S): rows}, a row for each seed; in the order of the legends and of S."""
    points = {}
    for row in rows:
        points.setdefault((SETTINGS[row["replace"]], row["model"], row["rule"], int(row["S"])), []).append(row)
    rank = {line: i for i, line in enumerate(LABELS)}
    return dict(sorted(points.items(), key=lambda item: (rank.get(item[0][:3], len(rank)), item[0])))


# --- the table and its verdict ---------------------------------------------------------------------------------------


def _mean_and_range(rows, column) -> str:
    """A NaN counts as the worst value of its range, and makes the mean NaN."""
    values = sorted((float(row[column] or "nan") for row in rows), key=lambda value: (math.isnan(value), value))
    form = ".0f" if column == "steps" else ".4g"
    mean, low, high = (format(float(value), form) for value in (np.mean(values), values[0], values[-1]))
    return mean if low == high else f"{mean} ({low}–{high})"


def report(rows: list[dict[str, str]]) -> str:
    """The table of the rows of a results file, and the verdict below it."""
    return "\n\n".join(filter(None, (table(rows), verdict(rows))))


def table(rows: list[dict[str, str]]) -> str:
    """Our runs beside the authors', one line for each point; several seeds as mean (min–max).

    Args:
      rows: of a results file.

    Returns:
      A text table of fixed width; "-" where the authors have no run.
    """
    authors, columns = _by_point(read(RESULTS / "authors.csv")), ("best_loss", "last_loss", "steps")
    lines = [["", "", "", "ours", "", "", "authors", "", "", ""]]
    lines += [["task", "model", "S", "best", "last", "steps", "best", "last", "steps", "seconds"]]
    for point, runs in _by_point(rows).items():
        ours = [_mean_and_range(runs, column) for column in columns]
        ours[-1] += " (cut)" if _is_cut(runs) else ""
        theirs = [_mean_and_range(authors[point], column) if point in authors else "-" for column in columns]
        seconds = np.mean([float(run["seconds"]) for run in runs])
        lines.append([TASKS[point[0]], _label(point), point[3], *ours, *theirs, f"{seconds:.1f}"])
    return tables.text(lines, right=range(2, 10), rule_after=2)


def _label(point):
    return LABELS.get(point[:3], ", ".join(point[1:3]))


def verdict(rows: list[dict[str, str]]) -> str:
    """How many pairs each model holds, and which rule reassigns keys, in words.

    A model holds S pairs if its last loss, the median of the seeds, is below 0.01. An empty memory has a loss of 0.5.
    The number is the largest such S, "at least" if it is the largest S of the rows. Otherwise it is where the logarithm
    of the loss, interpolated to the next S, reaches that of 0.01.

    A rule reassigns keys if a model with this rule holds some S in setting 2. Runs that max_steps ended do not count,
    and their models are named. Softmax is left out, because it has no memory of a fixed size.

    Returns:
      A headline, and a line for each setting of the rows; "" without rows of a memory.
    """
    lines = []
    for setting, task in TASKS.items():
        capacities, cut = _capacities(rows, setting)
        if not capacities and not cut:
            continue
        names = {line: _label((setting, *line)).replace(" ", NO_BREAK) for line in (*capacities, *cut)}
        order = sorted(capacities, key=lambda line: -capacities[line][0])
        words = "; ".join(f"{names[line]} {capacities[line][1]}" for line in order)
        sentence = f"{task}: {words or 'none'}."
        successful = {rule for (_, rule), (pairs, _) in capacities.items() if pairs}
        if setting == "2" and len({rule for _, rule in capacities}) > 1 and len(successful) == 1:
            sentence += f" Only the {successful.pop()} rule reassigns keys."
        if cut:
            sentence += f" Not counted, because --max-steps ended them: {', '.join(names[line] for line in cut)}."
        filled = textwrap.fill(sentence, 110, initial_indent="  ", subsequent_indent="    ")
        lines.append(filled.replace(NO_BREAK, " "))
    headline = f"Pairs held (last loss below {HELD}; an empty memory has 0.5)"
    return "\n".join([headline, *lines]) if lines else ""


def _capacities(rows, setting):
    """{(model, rule): (pairs, words)} of the finished runs of a setting, and the (model, rule) of the others."""
    losses, cut = {}, {}
    for (row_setting, *line, size), runs in _by_point(rows).items():
        if row_setting != setting or line == ["softmax", "softmax"]:
            continue
        if _is_cut(runs):
            cut[tuple(line)] = None
        else:
            losses.setdefault(tuple(line), {})[size] = float(np.median([float(run["last_loss"]) for run in runs]))
    return {line: _capacity(by_size) for line, by_size in losses.items()}, list(cut)


def _is_cut(runs):
    """Whether the largest number of steps ended a run, and not its loss."""
    return not all(is_finished([*map(float, run["losses"].split())], math.inf) for run in runs)


def _capacity(losses):
    """(pairs, words) from {S: last loss}, in the order of S."""
    sizes = list(losses)
    held = [size for size in sizes if losses[size] < HELD]
    if not held:
        return 0, f"fewer than {sizes[0]}"
    if held[-1] == sizes[-1]:
        return sizes[-1], f"at least {sizes[-1]}"
    size, following = held[-1], sizes[sizes.index(held[-1]) + 1]
    if math.isfinite(losses[following]):
        low, high = (math.log(max(losses[x], 1e-30)) for x in (size, following))
        size += (following - size) * (math.log(HELD) - low) / (high - low)
    return size, f"about {round(size, -1 if size >= 20 else 0):.0f}"


# --- the figures -----------------------------------------------------------------------------------------------------


def draw(rows: list[dict[str, str]], folder: pathlib.Path, experiment: str) -> list[pathlib.Path]:
    """Draws the figures of an experiment over the authors' runs, from as many rows as there are.

    Args:
      rows: of a results file, in any order; the rows of an interrupted sweep will do.
      folder: where to write; made if there is none.
      experiment: "quick" (figure3.png, figure2_coarse.png), "capacity" (figure2.png, figure4.png) or "update_rules"
        (figure5.png, figure3.png).

    Returns:
      The files written. A figure without rows is not touched. It shows only the models that have rows.

    Raises:
      ValueError: another experiment.
    """
    if experiment not in FIGURES:
        raise ValueError(f"experiment must be one of {tuple(FIGURES)}, got {experiment!r}")
    from matplotlib import style  # not above, because every worker process imports this file, and none draws

    written = []
    for name, (setting, lines, size) in FIGURES[experiment].items():
        points = {point: runs for point, runs in _by_point(rows).items() if point[0] == setting and point[1:3] in lines}
        points = {point: runs for point, runs in points.items() if size in (None, point[3])}
        if points:
            path = pathlib.Path(folder) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            lines = {line: look for line, look in lines.items() if any(point[1:3] == line for point in points)}
            with style.context("default"), files.replacing(path) as temporary:
                figure = _draw_curves(points, setting, lines, size) if size else _draw_losses(points, setting, lines)
                figure.savefig(temporary, format="png", metadata={"Software": None})
            written.append(path)
    return written


def _new_figure(title, xlabel, ylabel, log):
    from matplotlib.figure import Figure  # pyplot would need a window, or a figure to close

    figure = Figure(figsize=(8, 5.4), dpi=150, layout="constrained")
    axes = figure.subplots()
    axes.set_title(title, loc="left", fontsize=12, pad=8)
    axes.set_xlabel(xlabel, fontsize=11)
    axes.set_ylabel(ylabel, fontsize=11)
    axes.set_yscale("log" if log else "linear")
    axes.grid(color="#E4E4E4", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _finish(figure, lines, looks, paper_limits):
    """Sets the y axis of the paper, wider if a value lies outside, and puts the legend below the axes."""
    from matplotlib.lines import Line2D

    (axes,) = figure.axes
    bands = (path.vertices[:, 1] for band in axes.collections for path in band.get_paths())
    values = np.concatenate([*(line.get_ydata(orig=False) for line in axes.lines), *bands])
    values = values[np.isfinite(values) & ((values > 0) | (axes.get_yscale() == "linear"))]
    axes.set_ylim(np.min(0.8 * values, initial=paper_limits[0]), np.max(1.1 * values, initial=paper_limits[1]))
    solid = looks["this library"] | {"alpha": 1}
    styles = {label: solid | {"color": color, "marker": marker} for label, color, marker in lines.values()} | looks
    handles = [Line2D([], [], label=label, **{"color": "#777777"} | style) for label, style in styles.items()]
    short = len(lines) > 6 and max(len(label) for label, *_ in lines.values()) < 16
    layout = {"ncols": 5 if short else 3, "columnspacing": 1.4, "handlelength": 1.8}
    figure.legend(handles=handles, loc="outside lower center", frameon=False, fontsize=10, **layout)
    return figure


def _last_losses(points, line):
    return {
        point[3]: np.array([float(run["last_loss"]) for run in runs])
        for point, runs in points.items()
        if point[:3] == line
    }


def _draw_losses(points, setting, lines):
    """Figures 2 and 5: the last loss over S; of several seeds the median and range of those that did not end in NaN."""
    title = f"Setting {setting}: {TASKS[setting]}" + (" (dotted: capacity)" if setting == "1" else "")
    figure, axes = _new_figure(title, "number of keys S", "last evaluation loss", log=setting == "2")
    looks = {
        "this library": {"linewidth": 1.6, "marker": "o", "markersize": 4.5},
        "the authors' runs (hollow)": {"linestyle": "", "marker": "o", "markersize": 8.5, "markerfacecolor": "none"},
    }
    solid, hollow = looks.values()
    authors, failed = _by_point(read(RESULTS / "authors.csv")), []
    for line, (_, color, marker) in lines.items():
        look = {"color": color, "marker": marker}
        theirs, ours = (_last_losses(runs, (setting, *line)) for runs in (authors, points))
        axes.plot(list(theirs), [losses[0] for losses in theirs.values()], **hollow | look, alpha=0.85)
        failed += [(size, color) for size, losses in ours.items() if not np.all(np.isfinite(losses))]
        ours = {size: losses[np.isfinite(losses)] for size, losses in ours.items() if np.any(np.isfinite(losses))}
        median, low, high = ([pick(losses) for losses in ours.values()] for pick in (np.median, np.min, np.max))
        axes.plot(list(ours), median, **solid | look)
        if low != high:
            axes.fill_between(list(ours), low, high, color=color, alpha=0.2, linewidth=0)
            axes.vlines(list(ours), low, high, color=color, alpha=0.4, linewidth=2)
            looks["all seeds"] = {"linewidth": 8, "alpha": 0.2}
    if failed:
        looks["a run that ends in NaN"] = {"linestyle": "", "marker": "x"}
    _finish(figure, lines, looks, (1e-4, 1e3) if setting == "2" else (-0.015, 0.53))
    for size, color in failed:
        axes.annotate("×", (size, 0.965), color=color, fontsize=13, va="center", **_above(axes))
    if setting == "1":
        axes.set_title(title, loc="left", fontsize=12, pad=32)
        _mark_capacities(axes)
    else:
        axes.set_xticks(range(20, 201, 20))
        note = "18 of the authors' 20 runs\nwith FAVOR+ end in NaN"
        axes.set_title(note, loc="right", fontsize=9, color="#555555", pad=8)
    return figure


def _above(axes):
    return {"xycoords": axes.get_xaxis_transform(), "ha": "center"}


def _mark_capacities(axes):
    """A dotted line at each number of features."""
    for size, name in NUM_FEATURES.items():
        axes.axvline(size, color="#888888", linewidth=0.9, linestyle=":", zorder=1)
        axes.annotate(f"{name}\n{size}", (size, 1.01), fontsize=8.5, color="#555555", **_above(axes))


def _draw_curves(points, setting, lines, size):
    """Figures 3 and 4: learning curves at one S, for several seeds one each."""
    log = setting == "2"
    title = f"Setting {setting}: {TASKS[setting]}, S = {size}"
    figure, axes = _new_figure(title, "step", "evaluation loss", log)
    looks = {
        "this library": {"linewidth": 2.6, "alpha": 0.55},
        "the authors' runs": {"linewidth": 1.3, "linestyle": (0, (4, 1.5))},
    }
    ours, dashed = looks.values()
    authors = _by_point(read(RESULTS / "authors_curves.csv"))
    for line, (_, color, _) in lines.items():
        point = (setting, *line, size)
        for run in points.get(point, []):
            losses = [float(loss) for loss in run["losses"].split()]
            axes.plot(EVAL_EVERY * np.arange(1, len(losses) + 1), losses, color=color, **ours)
        steps, losses = zip(*((int(row["step"]), float(row["loss"])) for row in authors[point]), strict=True)
        axes.plot(steps, losses, color=color, zorder=3, **dashed)
    if log:
        axes.set_xscale("log")
    lines = {line: (label, color, "") for line, (label, color, _) in lines.items()}
    return _finish(figure, lines, looks, (5e-4, 100) if log else (-0.015, 0.53))


# --- command line ----------------------------------------------------------------------------------------------------


def main(results: pathlib.Path = RESULTS):
    """Redraws every figure from the csv files in a folder.

    Args:
      results: the folder of quick.csv, capacity.csv and update_rules.csv, or of some of them. The figures go there.

    Raises:
      ValueError: a folder without these files, or a damaged file.
    """
    paths = {experiment: results / f"{experiment}.csv" for experiment in FIGURES}
    if not any(path.exists() for path in paths.values()):
        raise ValueError(
            f"{results} has none of {', '.join(path.name for path in paths.values())}; name another folder"
        )
    for experiment, path in paths.items():
        if path.exists():
            rows = read_runs(path)
            print(f"{path}\n{report(rows)}")
            for figure in draw(rows, results, experiment):
                print(f"wrote {figure}")


if __name__ == "__main__":
    with command_line.one_line():
        tyro.cli(main, prog="python -m experiments.retrieval.plot")
