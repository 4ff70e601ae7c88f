"""The scores of translations, the table of all runs, and which models they tell apart."""

from __future__ import annotations

import collections
import csv
import functools
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

HEADINGS = ("model", "text", "seeds", "nats", "valid BLEU", "chrF", "test BLEU", "chrF", "paper's valid", "test")
HEADINGS += ("checkpoint", "beam", "sentences/s")
EVALUATED = ("validation", "test")
Runs = Mapping[pathlib.Path, dict]  # the results of runs, by folder


def table(runs: Runs) -> str:
    """The nats of a token of validation, BLEU and chrF. Runs of WMT14 En-De have the paper's BLEU beside theirs.

    A row is a model: the runs of one preset with the same settings and search. With several seeds it has their mean,
    ± the standard deviation of the seeds.
    """
    rows = [HEADINGS, *itertools.starmap(_row, _models(runs).items())]
    if not any(row[8] for row in rows[1:]):  # The paper has none of these runs.
        rows = [row[:8] + row[10:] for row in rows]
    return tables.text(rows, right=range(2, len(HEADINGS)))


def _models(runs: Runs) -> dict[str, dict[pathlib.Path, dict]]:
    """{name of a model: its runs, in the order of seeds}. The name is the preset; the folder too, if others have it.

    Two runs with one seed are two models.
    """
    models, seen = {}, collections.Counter()
    for path, result in sorted(runs.items(), key=lambda run: run[1].get("seed", 0)):
        settings = [str(result.get(name)) for name in ("preset", "settings", "data", "references", *SEARCH)]
        seed = result.get("seed")  # older runs have none
        seen[(*settings, seed)] += 1
        models.setdefault((*settings, seed is None, seen[(*settings, seed)]), {})[path] = result
    presets = collections.Counter(key[0] for key in models)
    names = {key: key[0] if presets[key[0]] == 1 else f"{key[0]} in {next(iter(models[key]))}" for key in models}
    return {names[key]: models[key] for key in sorted(models)}


SEARCH = ("average", "beam_size", "length_penalty")


def _row(name, runs):
    results = [*runs.values()]
    first = results[0]
    scores = (_mean([r[name][metric] for r in results], ".2f") for name in EVALUATED for metric in ("bleu", "chrf"))
    paper = PAPER.get(first["preset"]) if first["data"] == "wmt14 en-de" else None
    average, steps = first["average"], sorted({result["step"] for result in results})
    checkpoint = "–".join(map(str, dict.fromkeys((steps[0], steps[-1]))))
    speed = np.mean([result["test"]["sentences_per_second"] for result in results])
    return (
        name,
        first["data"],
        " ".join(str(result.get("seed", "?")) for result in results),
        _mean([result["nats"] for result in results], ".3f"),
        *scores,
        *(paper or ("", "")),
        f"mean of {average}, to {checkpoint}" if average > 1 else checkpoint,
        f"{first['beam_size']}, {first['length_penalty']}",
        f"{speed:.1f}" if speed else "",  # 0 if there were too few sentences to measure it
    )


def _mean(values, form):
    mean = format(float(np.mean(values)), form)
    return mean if len(values) == 1 else f"{mean} ± {np.std(values, ddof=1):{form}}"


def verdict(runs: Runs) -> str:
    """Which models differ by more than chance in BLEU of test and in nats of validation, in lines of text.

    Two models are compared if they have two or more seeds in common. BLEU is compared with one test set and search, and
    its interval also counts the chance that lies in the sentences, by the runs' ``STATISTICS``. Nats are compared with
    one set of subwords and one text of validation. See ``significance.difference``.

    Returns:
      "" without two models to compare.
    """
    models, resampled = _models(runs), functools.cache(lambda path: resampled_bleu(read_statistics(path / STATISTICS)))
    order = sorted(models, key=lambda name: -np.mean([result["test"]["bleu"] for result in models[name].values()]))
    scores, nats = {}, {}
    for names in itertools.combinations(order, 2):
        first, second = ({result.get("seed"): path for path, result in models[name].items()} for name in names)
        seeds = [seed for seed in first if seed in second and seed is not None]
        paths = [[by_seed[seed] for seed in seeds] for by_seed in (first, second)]
        if len(seeds) < 2:
            continue

        def numbers(pick, paths=paths):
            return ([pick(runs[path]) for path in side] for side in paths)

        def agree(*keys, paths=paths):
            found = [[runs[path].get(key) for key in keys] for side in paths for path in side]
            return None not in found[0] and all(values == found[0] for values in found)  # older runs lack some keys

        if agree("references", *SEARCH) and all((path / STATISTICS).exists() for side in paths for path in side):
            draws = [np.mean([resampled(path) for path in side], axis=0) for side in paths]
            error = float(np.std(draws[0] - draws[1]))
            scores[names] = significance.difference(*numbers(lambda result: result["test"]["bleu"]), error)
        if agree("validation_tokens", "average"):
            nats[names] = significance.difference(*numbers(lambda result: result["nats"]))
    reports = {"BLEU of test": (scores, ".2f"), "nats of validation": (nats, ".3f")}
    return "\n\n".join(significance.report(title, *report) for title, report in reports.items() if report[0])
