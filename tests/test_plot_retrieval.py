"""The authors' numbers that ship with the retrieval experiment, its table and its figures."""

import collections
import math
import os
import re

import numpy as np
import pytest

from experiments.retrieval import plot as plot_retrieval
from experiments.retrieval.plot import CAPACITY, FIGURES, RESULTS, TASKS, UPDATE_RULES, draw, read, table, verdict

AUTHORS = {(row["model"], row["rule"], row["S"], row["replace"]): row for row in read(RESULTS / "authors.csv")}


def row(model, rule, num_keys, replace, losses, seed=1):
    """A row of a results file with these evaluation losses."""
    finite = [loss for loss in losses if not math.isnan(loss)]
    best = min(finite) if finite else math.nan
    values = {
        "model": model,
        "rule": rule,
        "S": num_keys,
        "replace": int(replace),
        "seed": seed,
        "best_loss": best,
        "best_step": 100 * (losses.index(best) + 1 if finite else 1),
        "last_loss": losses[-1],
        "steps": 100 * len(losses),
        "seconds": 12.3,
        "losses": " ".join(f"{loss:.4g}" for loss in losses),
    }
    return {name: str(value) for name, value in values.items()}


def rows_of(experiment):
    """One row for every line of an experiment's figures at S = 20 and 600 (setting 1) or 200 (setting 2)."""
    settings = {setting for setting, _, _ in FIGURES[experiment].values()}
    one = [row(*line, num_keys, False, [0.5, 0.2, 0.1]) for line in CAPACITY for num_keys in (20, 600)]
    two = [row(*line, num_keys, True, [9.0, 0.2, 0.001]) for line in UPDATE_RULES for num_keys in (20, 200)]
    return (one if "1" in settings else []) + (two if "2" in settings else [])


def fields(text):
    """The lines of a table without its header, each as a list of its cells."""
    return [re.split("  +", line) for line in text.splitlines()[3:]]


# --- the authors' numbers --------------------------------------------------------------------------------------------


def test_every_run_of_the_authors_is_there():
    assert len(read(RESULTS / "authors.csv")) == len(AUTHORS) == 320
    sizes = collections.defaultdict(list)
    for model, rule, num_keys, replace in AUTHORS:
        sizes[model, rule, replace].append(int(num_keys))
    favor = {("favor64", "delta"), ("favor128", "delta")}
    assert set(sizes) == {(*line, "0") for line in CAPACITY} | {(*line, "1") for line in UPDATE_RULES.keys() | favor}
    for (_, _, replace), found in sizes.items():
        assert found == list(range(20, 601 if replace == "0" else 201, 20))


@pytest.mark.parametrize(
    ("point", "best", "last", "steps"),
    [
        (("linear", "sum", "60", "0"), 0.02451, 0.02465, 4200),
        (("softmax", "softmax", "500", "0"), 0.008928, 0.1741, 4000),
        (("dpfp1", "sum", "120", "0"), 0.008329, 0.008624, 7000),
        (("dpfp3", "sum", "600", "0"), 0.1984, 0.2014, 6500),
        (("favor512", "sum", "20", "0"), 0.0241, 0.04527, 3900),
        (("dpfp1", "delta", "20", "1"), 0.0007664, 0.0007664, 700),
        (("dpfp1", "sum", "20", "1"), 0.09727, 0.1048, 1300),
        (("dpfp1", "fwm", "20", "1"), 0.04036, 0.05053, 3900),
        (("tanh", "fwm", "20", "1"), 1.497, 1.692, 15400),
        (("dpfp2", "delta", "100", "1"), 0.003565, 0.004902, 2800),  # its log is cut off at the published commit
    ],
)
def test_numbers_of_the_authors(point, best, last, steps):
    found = AUTHORS[point]
    assert float(found["best_loss"]) == pytest.approx(best, rel=1e-3)
    assert float(found["last_loss"]) == pytest.approx(last, rel=1e-3)
    assert int(found["steps"]) == steps


def test_the_note_on_the_figure_about_favor_is_true():
    runs = [row for (model, rule, _, _), row in AUTHORS.items() if model.startswith("favor") and rule == "delta"]
    assert (sum(row["last_loss"] == "nan" for row in runs), len(runs)) == (18, 20)


def test_only_the_mended_run_did_not_follow_the_log():
    noted = [point for point, row in AUTHORS.items() if "927b5ee" in row["note"]]
    assert noted == [("dpfp2", "delta", "100", "1")]


def test_curves_of_the_authors_end_where_their_runs_do():
    curves = collections.defaultdict(list)
    for point in read(RESULTS / "authors_curves.csv"):
        key = tuple(point[column] for column in ("model", "rule", "S", "replace"))
        curves[key].append((int(point["step"]), point["loss"]))
    assert len(curves) == len(CAPACITY) + 4
    for point, curve in curves.items():
        assert [step for step, _ in curve] == list(range(100, int(AUTHORS[point]["steps"]) + 1, 100))
        assert curve[-1][1] == AUTHORS[point]["last_loss"]


# --- the table -------------------------------------------------------------------------------------------------------


def test_table_sets_our_numbers_beside_the_authors():
    (line,) = fields(table([row("linear", "sum", 60, False, [0.3, 0.02, 0.025])]))
    expected = "every key once, Linear (ELU+1), 60, 0.02, 0.025, 300 (cut), 0.02451, 0.02465, 4200, 12.3"
    assert line == expected.split(", ")


def test_table_prints_nan_as_nan_and_a_missing_run_as_a_dash():
    lines = fields(table([row("dpfp1", "sum", 30, False, [math.nan]), row("favor64", "delta", 200, True, [math.nan])]))
    assert lines[0][1:] == ["DPFP-1", "30", "nan", "nan", "100 (cut)", *"- - - 12.3".split()]
    assert lines[1][1:] == ["FAVOR+, 64, delta rule", "200", "nan", "nan", "100 (cut)", *"nan nan 1100 12.3".split()]


def test_table_shows_mean_and_range_of_several_seeds():
    losses = ([0.4, 0.1], [0.4, 0.2], [0.4, 0.6, 0.3, 0.3])
    lines = fields(table([row("dpfp1", "sum", 40, False, losses, seed) for seed, losses in enumerate(losses)]))
    assert " ".join(lines[0][3:6]) == "0.2 (0.1–0.3) 0.2 (0.1–0.3) 267 (200–400) (cut)"
    lines = fields(
        table([row("dpfp1", "sum", 40, False, [0.4, last], seed) for seed, last in enumerate((math.nan, 0.2))])
    )
    assert " ".join(lines[0][3:6]) == "0.3 (0.2–0.4) nan (0.2–nan) 200 (cut)"


def test_table_is_aligned_and_ordered_by_setting_legend_and_size():
    rows = rows_of("update_rules") + rows_of("capacity")
    lines = table(rows[::-1]).splitlines()
    labels = [look[0] for look in CAPACITY.values()], [look[0] for look in UPDATE_RULES.values()]
    want = [[TASKS["1"], label, str(size)] for label in labels[0] for size in (20, 600)]
    want += [[TASKS["2"], label, str(size)] for label in labels[1] for size in (20, 200)]
    assert [line[:3] for line in fields("\n".join(lines))] == want
    assert len({len(line) for line in lines[1:]}) == 1
    assert len(table([]).splitlines()) == 3


def finished(model, rule, num_keys, replace, last, seed=1):
    """A row of a run that the stopping rule ended: eleven evaluations without a better one."""
    return row(model, rule, num_keys, replace, [last] if last <= 1e-3 else [last] * 12, seed)


def test_the_verdict_names_what_each_memory_holds():
    rows = [finished("dpfp1", "sum", *point) for point in ((20, False, 1e-4), (60, False, 1e-3), (120, False, 0.1))]
    rows += [finished("linear", "sum", size, False, 0.3) for size in (20, 60)]
    rows += [finished("dpfp2", "sum", 60, False, last, seed) for seed, last in enumerate((1e-3, 1e-3, 0.5))]
    rows += [finished("softmax", "softmax", 20, False, 1e-4), finished("favor64", "sum", 20, False, math.nan)]
    rows += [row("dpfp3", "sum", 20, False, [0.5, 0.4])]  # max_steps ended it
    headline, line, *rest = verdict(rows).splitlines()
    assert headline == "Pairs held (last loss below 0.01; an empty memory has 0.5)"
    capacities = "DPFP-1 about 90; DPFP-2 at least 60; Linear (ELU+1) fewer than 20; FAVOR+, 64 fewer than 20."
    assert " ".join(" ".join([line, *rest]).split()) == (
        f"every key once: {capacities} Not counted, because --max-steps ended them: DPFP-3."
    )


def test_the_verdict_names_the_rule_that_reassigns_keys():
    rows = [finished("dpfp1", "delta", 20, True, 1e-3), finished("dpfp1", "sum", 20, True, 0.1)]
    assert " ".join(verdict(rows).split()).endswith("fewer than 20. Only the delta rule reassigns keys.")
    assert "Only" not in verdict(rows[:1]) and "Only" not in verdict(rows[1:])
    assert "Only" not in verdict([*rows, finished("tanh", "fwm", 20, True, 1e-3)])
    assert verdict([]) == ""
    words = "keys are reassigned: none. Not counted, because --max-steps ended them: DPFP-1, delta rule."
    assert " ".join(verdict([row("dpfp1", "delta", 20, True, [0.5])]).split()).endswith(words)


def test_the_verdict_of_the_results_that_ship():
    words = " ".join(verdict(read(RESULTS / "quick.csv")).split())
    assert "DPFP-1 about 120; Linear (ELU+1) about 50;" in words and "Only the delta rule" in words


# --- the figures -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("experiment", FIGURES)
def test_draw_writes_the_figures_and_nothing_else(experiment, tmp_path):
    folder = tmp_path / "new" / "folder"
    written = draw(rows_of(experiment), folder, experiment)
    assert written == [folder / name for name in FIGURES[experiment]]
    assert sorted(os.listdir(folder)) == sorted(FIGURES[experiment])
    for path in written:
        assert path.read_bytes().startswith(b"\x89PNG")


def test_draw_takes_partial_rows_several_seeds_and_nan(tmp_path):
    rows = [row("tanh", "fwm", 20, True, [9.0, math.nan, math.nan])]
    rows += [row("dpfp1", "delta", 20, True, [0.1, last], seed) for seed, last in enumerate((5e-5, 0.0, math.inf, 1e4))]
    written = draw(rows, tmp_path, "update_rules")
    assert [path.name for path in written] == ["figure5.png", "figure3.png"]
    assert sorted(os.listdir(tmp_path)) == ["figure3.png", "figure5.png"]


def test_several_seeds_are_a_line_of_medians_in_a_band_of_all():
    lasts = {20: (0.1, 0.4, 0.2), 40: (1.0, math.nan, 7.0), 60: (0.3, 0.3, 0.3)}
    rows = [row("dpfp1", "delta", size, True, [last], seed) for size, x in lasts.items() for seed, last in enumerate(x)]
    (axes,) = plot_retrieval._draw_losses(
        plot_retrieval._by_point(rows), "2", {("dpfp1", "delta"): ("DPFP-1", "red", "o")}
    ).axes
    band, ranges = axes.collections
    (medians,) = (line for line in axes.lines if line.get_linestyle() == "-" and len(line.get_xdata()) == 3)
    np.testing.assert_allclose(medians.get_xydata(), [(20, 0.2), (40, 4), (60, 0.3)])
    corners = {*map(tuple, band.get_paths()[0].vertices)}
    assert corners == {(20, 0.1), (20, 0.4), (40, 1), (40, 7), (60, 0.3)}
    ends = [path.vertices.tolist() for path in ranges.get_paths()]  # a band of one S alone has no area
    assert ends == [[[20, 0.1], [20, 0.4]], [[40, 1], [40, 7]], [[60, 0.3], [60, 0.3]]]


def test_draw_leaves_out_a_figure_without_rows(tmp_path):
    rows = [row("dpfp1", "sum", 40, False, [0.7, 0.6])]
    assert [path.name for path in draw(rows, tmp_path, "capacity")] == ["figure2.png"]
    assert [path.name for path in draw(rows, tmp_path, "quick")] == ["figure2_coarse.png"]
    assert draw(rows, tmp_path, "update_rules") == draw([], tmp_path, "quick") == []
    assert sorted(os.listdir(tmp_path)) == ["figure2.png", "figure2_coarse.png"]


def test_draw_names_the_experiments_it_knows(tmp_path):
    with pytest.raises(ValueError, match=r"experiment must be one of .*'update_rules'.*got 'figure2'"):
        draw([], tmp_path, "figure2")


def test_main_names_what_it_cannot_draw(tmp_path):
    with pytest.raises(ValueError, match=r"has none of quick.csv, capacity.csv, update_rules.csv; name another folder"):
        plot_retrieval.main(tmp_path)
    run = row("dpfp1", "sum", 580, False, [0.5, 0.4])
    (tmp_path / "capacity.csv").write_text(",".join(run) + "\n" + ",".join(run.values())[:-9])
    with pytest.raises(ValueError, match=r"line 2 of .*capacity.csv is not a whole run"):
        plot_retrieval.main(tmp_path)


def test_the_results_that_ship_are_whole():
    for experiment in FIGURES:
        assert plot_retrieval.read_runs(RESULTS / f"{experiment}.csv")


def test_main_redraws_from_the_files_there_are(tmp_path, capsys):
    run = row("dpfp1", "sum", 580, False, [0.5, 0.4])
    (tmp_path / "capacity.csv").write_text(",".join(run) + "\n" + ",".join(run.values()) + "\n")
    plot_retrieval.main(tmp_path)
    printed = capsys.readouterr().out
    assert printed.count("wrote ") == 1 and "0.3903" in printed
    assert sorted(os.listdir(tmp_path)) == ["capacity.csv", "figure2.png"]
