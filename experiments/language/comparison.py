"""Tables 2 and 5 of the paper at the size of a laptop: which rule and feature map models language best?

    python -m experiments.language.comparison --train TRAIN.txt --validation VALID.txt --test TEST.txt ...

This trains models that differ only in rule and feature map (4 layers, d_model 128, 8 heads of 16, 4 M parameters) on
the same words in the same order. It writes a table and a plot to runs/language_comparison/ (--out). The same command
continues an interrupted comparison. Results: experiments/language/README.md.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import pathlib
import re
from concurrent.futures import as_completed

os.environ.setdefault("MPLBACKEND", "Agg")

import jax
import matplotlib.pyplot as plt
import numpy as np
import tyro
from flax import nnx

from experiments.language import evaluation, text
from experiments.language.experiment import loss
from experiments.language.presets import DELTA, SOFTMAX, SUM, dpfp, performer
from experiments.run import command_line, files, significance, training, workers
from fwt_jax.models import DecoderLM, ModelConfig

MODELS = {
    "softmax": SOFTMAX,
    "sum, ELU+1": SUM,
    "delta, ELU+1": DELTA,
    "sum, DPFP-1": SUM | dpfp(1),
    "delta, DPFP-1": DELTA | dpfp(1),
    "sum, FAVOR+ 8": SUM | performer(8),
    "delta, FAVOR+ 8": DELTA | performer(8),
}
# The paper's test perplexities of its small models: table 2, and table 5 for DPFP-1.
PAPER = dict(zip(MODELS, (34.1, 38.3, 35.5, 38.8, 35.0, 39.6, 37.2), strict=True))
BASE = ModelConfig(vocab_size=1, num_layers=4, d_model=128, d_ff=512, num_heads=8, head_size=16)
CUTOFFS = (2000, 10_000)
# The options for settings in run.json
OPTIONS = {
    "training.steps": "--steps",
    "vocabulary": "the vocabulary of --train (SHA-256)",
    "text": "the text of --train (SHA-256)",
    "validation": "the text of --validation (SHA-256)",
}
BATCH, LENGTH, MIN_COUNT, WINDOWS = 8, 256, 3, 3000


@dataclasses.dataclass(frozen=True)
class Config:
    """The texts and the runs."""

    train: pathlib.Path
    """Text to train on, UTF-8."""
    validation: pathlib.Path
    """Text that chooses the best checkpoint."""
    test: tuple[pathlib.Path, ...]
    """Texts to evaluate on."""
    out: pathlib.Path = pathlib.Path("runs/language_comparison")
    """Folder of the runs, the table and the plot."""
    steps: int = 1200
    """Updates of the parameters, each on 8 x 256 words."""
    seeds: int = 1
    """Runs of each model, with seeds 1, 2, ..."""
    workers: int = os.cpu_count() or 1
    """Processes, with one core each on CPU. On a GPU they share it."""


def words_of(path: pathlib.Path) -> str:
    """The text of a file with spaces between words and punctuation marks."""
    return separate(text.read_files([path]))


def separate(content: str) -> str:
    """Puts spaces between words and punctuation marks. "@-@", WikiText's mark for a hyphen in a word, becomes "-"."""
    content = re.sub(r" @([-,.])@ ", r"\1", content).removesuffix("\n")
    return "".join(" ".join(re.findall(r"<unk>|\w+|[^\w\s]", line)) + "\n" for line in content.split("\n"))


def run(config: Config, name: str, seed: int) -> dict:
    """Trains and evaluates one model. Returns its row of results.json."""
    out = config.out / f"{re.sub('[^a-z0-9]+', '-', name.lower())}-{seed}"
    train, validation = words_of(config.train), words_of(config.validation)
    vocabulary = text.Vocabulary.words(train, min_count=MIN_COUNT)
    model_options = dataclasses.replace(BASE, vocab_size=len(vocabulary), cutoffs=CUTOFFS, **MODELS[name])
    settings = training.TrainConfig(
        steps=config.steps, learning_rate=1e-3, schedule="cosine", warmup=100, eval_every=200, save_every=100, seed=seed
    )
    identity = {"model": dataclasses.asdict(model_options), "vocabulary": vocabulary.digest()}
    identity |= {"text": files.digest(train), "validation": files.digest(validation)}
    tests = {path.stem: files.digest(words_of(path)) for path in config.test}
    digest = files.digest(json.dumps([identity, dataclasses.asdict(settings), tests, WINDOWS]))
    if (out / "results.json").exists():
        results = files.read_json(out / "results.json")
        if results.get("of") == digest:
            return results
    validation_tokens = vocabulary.encode(validation)

    def make_model():
        return DecoderLM(model_options, rngs=nnx.Rngs(seed))

    def evaluate(model):
        return {"loss": evaluation.segments(model, validation_tokens, LENGTH, 8)}

    batches = text.Segments(vocabulary.encode(train), BATCH, LENGTH)
    training.train(make_model, loss, batches, settings, out, evaluate=evaluate, identity=identity, words=OPTIONS)
    model, step = training.load(out, make_model)
    parameters = sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param)))
    results = {"model": name, "seed": seed, "step": step, "parameters": parameters, "vocabulary": len(vocabulary)}
    results |= {"tokens": config.steps * BATCH * LENGTH, "of": digest}
    results |= {path.stem: _evaluate(model, vocabulary, path) for path in (config.validation, *config.test)}
    files.write(out / "results.json", json.dumps(results, indent=1))
    return results


def _evaluate(model, vocabulary, path):
    """The perplexities of one text: of all its segments, and of windows over its first words."""
    tokens = vocabulary.encode(words_of(path))
    return {
        "segments": math.exp(evaluation.segments(model, tokens, LENGTH, 8)),
        "sliding_window": math.exp(evaluation.sliding_window(model, tokens[:WINDOWS], LENGTH, progress=True)),
        "tokens": len(tokens) - 1,
        "unknown": float(np.mean(tokens == vocabulary.pieces.index(text.UNKNOWN))),
    }


def table(results: list[dict], texts: list[str]) -> str:
    """A Markdown table of each model's perplexities, mean ± standard deviation of its seeds, and the paper's."""
    head = ["model", "parameters", *(f"{name}, {kind}" for name in texts for kind in ("segments", "windows"))]
    lines = [[*head, "seeds", "paper, test"], ["---"] * (len(head) + 2)]
    for name in MODELS:
        rows = [row for row in results if row["model"] == name]
        if rows:
            values = ([row[t][kind] for row in rows] for t in texts for kind in ("segments", "sliding_window"))
            lines.append([name, f"{rows[0]['parameters']:,}", *map(_mean, values), len(rows), PAPER[name]])
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n"


def _mean(values):
    return f"{np.mean(values):.1f}" + (f" ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else "")


def verdict(results: list[dict], texts: list[str]) -> str:
    """Which models differ by more than chance, in nats of a word of each text by segments, in lines of text.

    Two models are compared by the seeds that both have, at least two. See ``significance.difference``.
    """
    reports = []
    for name in texts:
        nats = {
            model: {r["seed"]: math.log(r[name]["segments"]) for r in results if r["model"] == model}
            for model in MODELS
        }
        order = sorted((model for model in MODELS if nats[model]), key=lambda model: np.mean([*nats[model].values()]))
        differences = {}
        for first, second in itertools.combinations(order, 2):
            seeds = sorted(nats[first].keys() & nats[second].keys())
            if len(seeds) > 1:
                sides = ([nats[model][seed] for seed in seeds] for model in (first, second))
                differences[first, second] = significance.difference(*sides)
        if differences:
            reports.append(significance.report(f"nats of a word of {name}", differences, ".3f"))
    return "\n\n".join(reports)


def draw(results: list[dict], texts: list[str], path: pathlib.Path):
    """Plots perplexities on the test texts, and the paper's, each divided by the perplexity of softmax.

    A line on a bar is the range of several seeds.
    """
    names = [name for name in MODELS if any(row["model"] == name for row in results)]
    figure, axes = plt.subplots(figsize=(7.5, 3.8), layout="constrained")
    x, width = np.arange(len(names)), 0.8 / (len(texts) + 1)
    for i, label in enumerate([*texts, "paper, small, WikiText-103"]):
        if label in texts:
            values = [[row[label]["sliding_window"] for row in results if row["model"] == name] for name in names]
        else:
            values = [[PAPER[name]] for name in names]
        base = np.mean(values[names.index("softmax")]) if "softmax" in names else np.mean(values[0])
        bars = axes.bar(x + (i - len(texts) / 2) * width, [np.mean(v) / base for v in values], width, label=label)
        for bar, seeds in zip(bars, values, strict=True):
            middle, top = bar.get_x() + width / 2, max(seeds) / base
            if len(seeds) > 1:
                axes.vlines(middle, min(seeds) / base, top, color="black", linewidth=0.8)
            place = {"textcoords": "offset points", "ha": "center", "fontsize": 6}
            axes.annotate(f"{np.mean(seeds):.0f}", (middle, top), (0, 1.5), **place)
    axes.set_xticks(x, [name.replace(", ", "\n") for name in names], fontsize=8)
    axes.set(ylabel="perplexity / softmax's", ylim=(0.85, None), title="By sliding window; numbers: perplexities")
    axes.legend(fontsize=7, loc="upper left")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(config: Config):
    command_line.check_at_least(config, steps=1, seeds=1, workers=1)
    texts = [path.stem for path in (config.validation, *config.test)]
    if len(set(texts)) < len(texts):
        raise ValueError(f"the names of the texts must differ, because results go by them; got {', '.join(texts)}")
    for path in (config.validation, config.train, *config.test):
        words_of(path)  # An unreadable text is an error before any training.
    size = len(text.Vocabulary.words(words_of(config.train), min_count=MIN_COUNT))
    if size <= CUTOFFS[-1]:
        raise ValueError(
            f"the comparison needs more than {CUTOFFS[-1]:,} words that occur at least {MIN_COUNT} times, "
            f"got {size:,} in {config.train}; take more text"
        )
    config.out.mkdir(parents=True, exist_ok=True)
    results = []
    runs = [(name, seed) for seed in range(1, config.seeds + 1) for name in MODELS]
    with workers.pool(min(config.workers, len(runs))) as pool:
        for future in as_completed(pool.submit(run, config, *which) for which in runs):
            results.append(future.result())
            results.sort(key=lambda row: (list(MODELS).index(row["model"]), row["seed"]))
            files.write(config.out / "results.json", json.dumps(results, indent=1))
            files.write(config.out / "table.md", table(results, texts))
    draw(results, texts[1:], config.out / "language_comparison.png")
    print("\n".join(filter(None, (table(results, texts), verdict(results, texts[1:])))))
    print(f"wrote {config.out}/: results.json, table.md, language_comparison.png")


if __name__ == "__main__":
    with command_line.one_line():
        main(tyro.cli(Config, prog="python -m experiments.language.comparison", description=__doc__))
