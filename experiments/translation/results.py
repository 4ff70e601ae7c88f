"""The scores of translations, the table of all runs, and which models they tell apart."""

from __future__ import annotations

import csv
import io
import itertools
import pathlib
from collections.abc import Mapping

import numpy as np
import sacrebleu

from experiments.run import files, significance, tables
from experiments.translation.presets import PAPER

STATISTICS = "bleu.test.csv"  # in the folder of a run: of each sentence, what BLEU adds up over sentences
COLUMNS = (
    *(f"correct_{n}" for n in (1, 2, 3, 4)),
    *(f"ngrams_{n}" for n in (1, 2, 3, 4)),
    "length",
    "reference_length",
)
SAMPLES = 1000


def score(translations: list[str], references: list[str]) -> dict:
    """BLEU and chrF of sacrebleu with their signatures."""
    out = {}
    for name, metric in (("bleu", sacrebleu.BLEU()), ("chrf", sacrebleu.CHRF())):
        out[name] = metric.corpus_score(translations, [references]).score
        out[f"{name}_signature"] = str(metric.get_signature())
    return out


# --- of each sentence ------------------------------------------------------------------------------------------------


def write_statistics(translations: list[str], references: list[str], path: pathlib.Path):
    """Writes a row of ``COLUMNS`` for each sentence: its n-grams that are in the reference, all of them, its length."""
    bleu, content = sacrebleu.BLEU(effective_order=True), io.StringIO()
    writer = csv.writer(content, lineterminator="\n")
    writer.writerow(COLUMNS)
    for translation, reference in zip(translations, references, strict=True):
        scored = bleu.sentence_score(translation, [reference])
        writer.writerow([*scored.counts, *scored.totals, scored.sys_len, scored.ref_len])
    files.write(path, content.getvalue())


def read_statistics(path: pathlib.Path) -> np.ndarray:
    """The rows of ``write_statistics``, ``[sentences, 10]``.

    Raises:
      ValueError: another file.
    """
    try:
        head, *rows = csv.reader(path.read_text(encoding="utf-8").splitlines())
        statistics = np.array(rows, dtype=int)
    except ValueError as error:  # of bytes, of rows, of numbers, or of an empty file
        raise ValueError(f"{path} does not have the columns {', '.join(COLUMNS)}; run its command again") from error
    if tuple(head) != COLUMNS or statistics.shape[1:] != (len(COLUMNS),):
        raise ValueError(f"{path} does not have the columns {', '.join(COLUMNS)}; run its command again")
    return statistics


def bleu_of(statistics: np.ndarray) -> float:
    """The BLEU of ``score`` from statistics ``[10]`` that are added up."""
    correct, total, (length, reference_length) = np.split(statistics, (4, 8))
    return sacrebleu.BLEU.compute_bleu([*correct], [*total], length, reference_length, smooth_method="exp").score


def resampled_bleu(statistics: np.ndarray) -> np.ndarray:
    """The BLEU of ``SAMPLES`` test sets, whose sentences are drawn with replacement (Koehn 2004).

    All runs with as many sentences are drawn alike, so that their differences are those of one test set.
    """
    count = len(statistics)
    draws = np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), SAMPLES)
    return np.array([bleu_of(sums) for sums in draws @ statistics])


# --- of all runs -----------------------------------------------------------------------------------------------------

HEADINGS = ("preset", "text", "seeds", "nats", "valid BLEU", "chrF", "test BLEU", "chrF", "paper's valid", "test")
HEADINGS += ("checkpoint", "beam", "sentences/s")
Model = tuple[str, ...]  # what the seeds of a model have in common


def table(results: list[dict]) -> str:
    """The nats of a token of validation, BLEU and chrF. Runs of WMT14 En-De have the paper's BLEU beside theirs.

    A row is a model. With several seeds it has their mean, ± the standard deviation of the seeds.
    """
    rows = [HEADINGS, *map(_row, _by_model(results).values())]
    if not any(row[8] for row in rows[1:]):  # The paper has none of these runs.
        rows = [row[:8] + row[10:] for row in rows]
    return tables.text(rows, right=range(2, len(HEADINGS)))


def _by_model(results) -> dict[Model, list[dict]]:
    """{what the seeds of a model have in common: its results, in the order of seeds}."""
    models = {}
    for result in sorted(results, key=lambda result: result["seed"]):
        names = ("preset", "data", "references", "average", "beam_size", "length_penalty")
        models.setdefault(tuple(str(result[name]) for name in names), []).append(result)
    return dict(sorted(models.items()))


def _row(results):
    first = results[0]
    scores = (_mean([r[name][metric] for r in results], ".2f") for name in EVALUATED for metric in ("bleu", "chrf"))
    paper = PAPER.get(first["preset"]) if first["data"] == "wmt14 en-de" else None
    average, steps = first["average"], sorted({result["step"] for result in results})
    checkpoint = "–".join(map(str, dict.fromkeys((steps[0], steps[-1]))))
    speed = np.mean([result["test"]["sentences_per_second"] for result in results])
    return (
        first["preset"],
        first["data"],
        " ".join(str(result["seed"]) for result in results),
        _mean([result["nats"] for result in results], ".3f"),
        *scores,
        *(paper or ("", "")),
        f"mean of {average}, to {checkpoint}" if average > 1 else checkpoint,
        f"{first['beam_size']}, {first['length_penalty']}",
        f"{speed:.1f}" if speed else "",  # 0 if there were too few sentences to measure it
    )


EVALUATED = ("validation", "test")


def _mean(values, form):
    mean = format(float(np.mean(values)), form)
    return mean if len(values) == 1 else f"{mean} ± {np.std(values, ddof=1):{form}}"


def verdict(runs: Mapping[pathlib.Path, dict]) -> str:
    """Which models differ in nats of validation and in BLEU of test by more than chance, in lines of text.

    Two models are compared by the seeds that both have. Runs of other references, or with another search, are not
    compared. The interval of BLEU also counts the chance that lies in the sentences of the test set, if the runs'
    folders have ``STATISTICS``. See ``significance.difference``.

    Args:
      runs: results by folder.

    Returns:
      "" without two models to compare.
    """
    bleu = {}
    for path, result in runs.items():
        if (path / STATISTICS).exists():
            bleu[id(result)] = resampled_bleu(read_statistics(path / STATISTICS))
    models = _by_model(list(runs.values()))
    order = sorted(models, key=lambda model: -np.mean([result["test"]["bleu"] for result in models[model]]))
    nats, scores = {}, {}
    for first, second in itertools.combinations(order, 2):
        if first[1:] != second[1:]:
            continue
        seeds = [{result["seed"]: result for result in models[model]} for model in (first, second)]
        common = [[by_seed[seed] for seed in seeds[0] if seed in seeds[1]] for by_seed in seeds]
        names = first[0], second[0]
        if len(common[0]) > 1:
            nats[names] = significance.difference(*([result["nats"] for result in side] for side in common))
        if common[0] and all(id(result) in bleu for side in common for result in side):
            means = [np.mean([bleu[id(result)] for result in side], axis=0) for side in common]
            error = float(np.std(means[0] - means[1]))
            scores[names] = significance.difference(*([r["test"]["bleu"] for r in side] for side in common), error)
    reports = {"BLEU of test": (scores, ".2f"), "nats of validation": (nats, ".3f")}
    return "\n\n".join(significance.report(title, *report) for title, report in reports.items() if report[0])
