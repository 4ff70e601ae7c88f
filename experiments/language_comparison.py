"""Tables 2 and 5 of the paper at the size of a laptop: which rule and feature map models language best?

    python -m experiments.language_comparison --train TRAIN.txt --validation VALID.txt --test TEST.txt ...

trains models that differ in rule and feature map alone (4 layers, d_model 128, 8 heads of 16, 4 M parameters) on the
same words in the same order, and writes a table and a plot to runs/language_comparison/ (--out). Run again, it goes on
where it stopped. What it gave: experiments/README.md.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import multiprocessing
import os
import pathlib
import re
import threading
from concurrent.futures import ProcessPoolExecutor, as_completed

os.environ.setdefault("MPLBACKEND", "Agg")

import jax
import matplotlib.pyplot as plt
import numpy as np
import tyro
from flax import nnx

from experiments import command_line, run_folder, text, training
from experiments import language_model_evaluation as evaluation
from experiments.language_model_presets import DELTA, SOFTMAX, SUM, dpfp, performer
from experiments.language_modeling import loss
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
# Test perplexities of the small configuration: tables 2 and 5, where DPFP-1 is beside m = 16 as here beside m = 8.
PAPER = dict(zip(MODELS, (34.1, 38.3, 35.5, 38.8, 35.0, 39.6, 37.2), strict=True))
BASE = ModelConfig(vocab_size=1, num_layers=4, d_model=128, d_ff=512, num_heads=8, head_size=16)
CUTOFFS = (2000, 10_000)
# What the command line calls the settings in run.json
OPTIONS = {
    "training.steps": "--steps",
    "vocabulary": "the vocabulary of --train (SHA-256)",
    "text": "the text of --train (SHA-256)",
    "validation": "the text of --validation (SHA-256)",
}
BATCH, LENGTH, MIN_COUNT, WINDOWS = 8, 256, 3, 3000


@dataclasses.dataclass(frozen=True)
class Config:
    """On what, and how long."""

    train: pathlib.Path
    """Text to train on, UTF-8."""
    validation: pathlib.Path
    """Text to choose the best checkpoint by."""
    test: tuple[pathlib.Path, ...]
    """Texts to evaluate on."""
    out: pathlib.Path = pathlib.Path("runs/language_comparison")
    """Folder of the runs, the table and the plot."""
    steps: int = 1200
    """Of 8 x 256 tokens."""
    seeds: int = 1
    """Runs of each model, with seeds 1, 2, ..."""
    workers: int = os.cpu_count() or 1
    """Processes, one core each."""


def words_of(path: pathlib.Path) -> str:
    """A file with spaces between words and signs."""
    return separate(text.read_files([path]))


def separate(content: str) -> str:
    """Puts spaces between words and signs; WikiText's marks for signs inside words are taken out."""
    content = re.sub(r" @([-,.])@ ", r"\1", content)
    return (
        "\n".join(" ".join(re.findall(r"<unk>|\w+|[^\w\s]", line)) for line in content.removesuffix("\n").split("\n"))
        + "\n"
    )


def _digest(content):
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def run(config: Config, name: str, seed: int) -> dict:
    """One model: trained, evaluated on every test text, in segments (all) and by sliding window (its first words)."""
    out = config.out / f"{re.sub('[^a-z0-9]+', '-', name.lower())}-{seed}"
    train, validation = words_of(config.train), words_of(config.validation)
    vocabulary = text.Vocabulary.words(train, min_count=MIN_COUNT)
    model_options = dataclasses.replace(BASE, vocab_size=len(vocabulary), cutoffs=CUTOFFS, **MODELS[name])
    settings = training.TrainConfig(
        steps=config.steps, learning_rate=1e-3, schedule="cosine", warmup=100, eval_every=200, save_every=100, seed=seed
    )
    held_out = vocabulary.encode(validation)

    def make_model():
        return DecoderLM(model_options, rngs=nnx.Rngs(seed))

    def evaluate(model):
        return {"loss": evaluation.segments(model, held_out, LENGTH, 8)}

    batches = text.Segments(vocabulary.encode(train), BATCH, LENGTH)
    identity = {"model": dataclasses.asdict(model_options), "vocabulary": vocabulary.digest()}
    identity |= {"text": _digest(train), "validation": _digest(validation)}
    tests = {path.stem: _digest(words_of(path)) for path in config.test}
    of = _digest(json.dumps([identity, dataclasses.asdict(settings), tests, WINDOWS]))
    if (out / "results.json").exists():
        results = run_folder.read_json(out / "results.json")
        if results.get("of") == of:
            return results
    training.train(make_model, loss, batches, settings, out, evaluate=evaluate, identity=identity, words=OPTIONS)
    model, step = training.load(out, make_model)
    parameters = sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param)))
    results = {"model": name, "seed": seed, "step": step, "parameters": parameters, "vocabulary": len(vocabulary)}
    results |= {"tokens": config.steps * BATCH * LENGTH, "of": of}
    for path in (config.validation, *config.test):
        tokens = vocabulary.encode(words_of(path))
        results[path.stem] = {
            "segments": math.exp(evaluation.segments(model, tokens, LENGTH, 8)),
            "sliding_window": math.exp(evaluation.sliding_window(model, tokens[:WINDOWS], LENGTH, progress=True)),
            "tokens": len(tokens) - 1,
            "unknown": float(np.mean(tokens == vocabulary.pieces.index(text.UNKNOWN))),
        }
    run_folder.write_atomically(out / "results.json", json.dumps(results, indent=1))
    return results


def table(results: list[dict], texts: list[str]) -> str:
    """Markdown: perplexities of each model, mean over its seeds, and the paper's."""
    head = ["model", "parameters", *(f"{name}, {kind}" for name in texts for kind in ("segments", "windows"))]
    lines = [[*head, "seeds", "paper, test"], ["---"] * (len(head) + 2)]
    for name in MODELS:
        rows = [row for row in results if row["model"] == name]
        if rows:
            means = [np.mean([row[t][kind] for row in rows]) for t in texts for kind in ("segments", "sliding_window")]
            cells = [name, f"{rows[0]['parameters']:,}", *(f"{x:.1f}" for x in means), len(rows), PAPER[name]]
            lines.append(cells)
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n"


def draw(results: list[dict], texts: list[str], path: pathlib.Path):
    """The perplexities of the models on the test texts, beside the paper's, each against its softmax."""
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
        axes.bar_label(bars, [f"{np.mean(v):.0f}" for v in values], fontsize=6, padding=1)
    axes.set_xticks(x, [name.replace(", ", "\n") for name in names], fontsize=8)
    axes.set(ylabel="perplexity / softmax's", ylim=(0.85, None), title="By sliding window; numbers: perplexities")
    axes.legend(fontsize=7, loc="upper left")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _start_worker(cores):
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {cores.get()})


def _end_with_parent():
    multiprocessing.parent_process().join()
    os._exit(1)  # checkpoints are complete or not there


def main(config: Config):
    texts = [path.stem for path in (config.validation, *config.test)]
    if len(set(texts)) < len(texts):
        raise ValueError(f"the names of the texts must differ, for results go by them; got {', '.join(texts)}")
    config.out.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("spawn")
    cores = context.Queue()
    available = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    for worker in range(config.workers):
        cores.put(available[worker % len(available)])
    results = []
    for path in (config.validation, config.train, *config.test):
        words_of(path)  # what cannot be read is said at once
    with ProcessPoolExecutor(config.workers, context, _start_worker, (cores,)) as pool:
        runs = [pool.submit(run, config, name, seed) for seed in range(1, config.seeds + 1) for name in MODELS]
        for future in as_completed(runs):
            results.append(future.result())
            results.sort(key=lambda row: (list(MODELS).index(row["model"]), row["seed"]))
            run_folder.write_atomically(config.out / "results.json", json.dumps(results, indent=1))
            run_folder.write_atomically(config.out / "table.md", table(results, texts))
    draw(results, texts[1:], config.out / "language_comparison.png")
    print(table(results, texts))
    print(f"wrote {config.out}/: results.json, table.md, language_comparison.png")


if __name__ == "__main__":
    with command_line.one_line():
        main(tyro.cli(Config, description=__doc__))
