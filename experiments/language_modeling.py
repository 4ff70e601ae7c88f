"""Language models (section 6.3, tables 2 to 5): train, evaluate by sliding window, generate.

    python -m experiments.language_modeling                           a small delta network on a text that ships
    python -m experiments.language_modeling --text book.txt           the same on your own text
    python -m experiments.language_modeling --preset small-delta --wikitext DIR      a row of the paper's table 2
    python -m experiments.language_modeling --table                   all finished runs beside the paper's numbers

A run is a folder, runs/language_modeling/<preset>/ (--out), and the same command goes on where it was interrupted:
checkpoints/, metrics.jsonl, tensorboard/, vocabulary.json, loss.png, samples.txt, results.json.
Times and numbers, and on what machine: experiments/README.md. The rows are in language_model_presets.py.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import pathlib
import sys
from typing import Literal

os.environ.setdefault("MPLBACKEND", "Agg")

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import tyro
from flax import nnx

from experiments import command_line, run_folder, text, training, wikitext
from experiments import language_model_evaluation as evaluation
from experiments.language_model_presets import PRESETS, Preset, find
from fwt_jax import decode
from fwt_jax.models import DecoderLM, ModelConfig

PARTS = ("validation", "test")
RUNS = pathlib.Path("runs/language_modeling")
# What the command line calls the settings in run.json; of others, --preset decides.
OPTIONS = {
    "training.steps": "--steps",
    "training.accumulate": "--accumulate",
    "training.seed": "--seed",
    "model.dtype": "--dtype",
    "batch.rows": "--batch-size",
    "batch.length": "--length",
    "vocabulary.kind": "--vocabulary",
    "vocabulary.size": "the number of words in the vocabulary",
    "vocabulary.sha256": "the vocabulary (SHA-256)",
    "asked for.vocabulary_size": "--vocabulary-size",
    "text.tokens": "the number of tokens to train on",
    "text.sha256": "the text to train on (SHA-256)",
    "text.validation": "the text of validation (SHA-256)",
}


@dataclasses.dataclass(frozen=True)
class Config:
    """What to train, on what, and where. What is left out is the preset's own."""

    preset: str = "demo"
    """demo, or a row of the paper's tables: small-delta, medium-softmax, ... (an unknown name lists all)."""
    text: tuple[pathlib.Path, ...] = ()
    """UTF-8 files, or folders of .txt files, instead of the preset's data."""
    wikitext: pathlib.Path | None = None
    """Folder with wiki.train.tokens, wiki.valid.tokens and wiki.test.tokens of WikiText-103."""
    vocabulary: Literal["word", "character", "sentencepiece"] | None = None
    """Of --text."""
    vocabulary_size: int = 8000
    """Of --vocabulary sentencepiece; of words, at most so many beside <unk> (0: all)."""
    out: pathlib.Path | None = None
    """Folder of the run; with --table, of the runs."""
    steps: int | None = None
    """Updates of the parameters."""
    batch_size: int | None = None
    """Sequences in a batch."""
    length: int | None = None
    """Tokens in a sequence."""
    accumulate: int | None = None
    """Parts that a batch is computed in, to need less memory."""
    seed: int | None = None
    """Of the parameters and of dropout."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Of the computation; parameters and memories stay float32."""
    fsdp: int = 1
    """Devices that share the parameters of one copy of the model."""
    tensor: int = 1
    """Devices that share the heads and feed-forward layers of one copy."""
    distributed: bool = False
    """Several processes, one for each host of a TPU slice or cluster."""
    sample: int = 500
    """Tokens to generate at the end, from models without positions."""
    table: bool = False
    """Only print the results of all runs in runs/language_modeling/, or --out, beside the paper's."""


@dataclasses.dataclass(frozen=True)
class Data:
    """A text in three parts, as tokens."""

    vocabulary: text.Vocabulary
    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray
    words: tuple[int, int]  # of validation and test, with one for the end of each line


def read_data(config: Config, preset: Preset, out: pathlib.Path) -> Data:
    """The texts that a run is about, and its vocabulary, which is written down with the first run.

    Raises:
      ValueError: missing or empty texts.
    """
    if config.text:
        parts = text.split(text.read_files(config.text))
    elif preset.data == "demo":
        parts = text.split(text.demo_text())
    else:
        parts = wikitext.load(config.wikitext)
    train, validation, test = (parts[name] for name in ("train", "validation", "test"))
    path = out / "vocabulary.json"
    kept = path.exists() and (out / "run.json").exists()  # a start that failed may have left that of another text
    vocabulary = _vocabulary(config, preset, train, path if kept else None)
    if jax.process_index() == 0 and not kept:
        vocabulary.save(path)
    arrays = (vocabulary.encode(part) for part in (train, validation, test))
    return Data(vocabulary, *arrays, (text.count_words(validation), text.count_words(test)))


def _vocabulary(config, preset, train, kept):
    kind, size = config.vocabulary or preset.vocabulary, config.vocabulary_size
    if size < 0:
        raise ValueError(f"vocabulary_size must be a number of words or pieces, or 0 for all words, got {size}")
    if kind == "character":
        return text.Vocabulary.characters(train)
    if kind == "sentencepiece":  # which takes long, and another version of it may find other pieces
        before = kept and text.Vocabulary.load(kept)
        if before and before.kind == kind:
            return before
        return text.Vocabulary.sentencepiece(train, size)
    if preset.data == "demo" or config.text:
        return text.Vocabulary.words(train, max_size=size or sys.maxsize)  # with one for unknown words
    return text.Vocabulary.words(train)  # WikiText-103 has its own


def settings(config: Config) -> Preset:
    """The preset with what the command line changes."""
    preset = find(config.preset)
    if config.sample < 0:
        raise ValueError(f"sample must be a number of tokens to generate, or 0, got {config.sample}")
    given = lambda **options: {name: x for name, x in options.items() if x is not None}  # noqa: E731
    train = given(steps=config.steps, accumulate=config.accumulate, seed=config.seed)
    return dataclasses.replace(
        preset,
        model=dataclasses.replace(preset.model, **given(dtype=config.dtype)),
        training=dataclasses.replace(preset.training, **train),
        **given(batch_size=config.batch_size, length=config.length),
    )


def model_config(preset: Preset, vocab_size: int) -> ModelConfig:
    """The preset's model for a vocabulary; clusters of words that there are not are left out."""
    cutoffs = tuple(cutoff for cutoff in preset.model.cutoffs if cutoff < vocab_size)
    return dataclasses.replace(preset.model, vocab_size=vocab_size, cutoffs=cutoffs)


def loss(model, batch, memory, rngs):
    """Sum of −log p; memories, where the run carries them, start from zero with the text."""
    if memory is not None:
        memory = jax.tree.map(lambda x: jnp.where(batch["start"], jnp.zeros_like(x), x), memory)
    losses, after = model.losses(batch["tokens"], batch["targets"], memory, rngs=rngs)
    return jnp.sum(losses), jnp.sum(batch["targets"] >= 0), None if memory is None else after


def run(config: Config) -> dict:
    """Trains what is not trained yet, evaluates, generates, and draws. Returns what results.json holds."""
    preset = settings(config)
    out = run_folder.folder(config.out or RUNS / "-".join((config.preset, *(path.stem for path in config.text[:1]))))
    out.mkdir(parents=True, exist_ok=True)
    data = read_data(config, preset, out)
    model_options = model_config(preset, len(data.vocabulary))
    mesh = training.make_mesh(config.fsdp, config.tensor)

    def make_model():
        return DecoderLM(model_options, rngs=nnx.Rngs(preset.training.seed))

    def evaluate(model):
        nats = evaluation.segments(model, data.validation, preset.length, carry=preset.carry, mesh=mesh)
        return {"loss": nats, "perplexity": training.perplexity(nats)}

    identity = {
        "model": dataclasses.asdict(model_options),
        "batch": {"rows": preset.batch_size, "length": preset.length, "carry": preset.carry},
        "vocabulary": {"kind": data.vocabulary.kind, "size": len(data.vocabulary), "sha256": data.vocabulary.digest()},
        "asked for": {"vocabulary_size": config.vocabulary_size},
        "text": {"tokens": len(data.train), "sha256": _digest(data.train), "validation": _digest(data.validation)},
    }
    _describe(config, preset, data, model_options, out)
    memory = make_model().init_memory(preset.batch_size) if preset.carry else None
    batches = text.Segments(data.train, preset.batch_size, preset.length)
    words = run_folder.words(preset.training, identity, OPTIONS)
    options = {"memory": memory, "evaluate": evaluate, "identity": identity, "words": words, "mesh": mesh}
    training.train(make_model, loss, batches, preset.training, out, **options)
    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
        model, step = training.load(out, make_model, mesh=mesh)
        results = _evaluate(config, preset, data, model, mesh) | {"step": step}
        sample = _sample(config, data, model, mesh)
    if jax.process_index() == 0:
        run_folder.write_atomically(out / "results.json", json.dumps(results, indent=1))
        draw(run_folder.read_metrics(out / "metrics.jsonl"), out / "loss.png", config.preset)
        if sample:
            run_folder.write_atomically(out / "samples.txt", sample)
            print(f"--- a sample: what stands before | was given\n{sample}---")
        print(table([results]))
        print(f"wrote {out}/: results.json, loss.png, metrics.jsonl, checkpoints")
    return results


def _digest(tokens):
    return hashlib.sha256(tokens.tobytes()).hexdigest()[:16]


def _describe(config, preset, data, options, out):
    if jax.process_index():
        return
    shapes = nnx.eval_shape(lambda: DecoderLM(options, rngs=nnx.Rngs(0)))
    count = sum(math.prod(x.shape) for x in jax.tree.leaves(nnx.state(shapes, nnx.Param)))
    print(
        f"{config.preset}: {count:,} parameters, {options.num_layers} layers, rule {options.rule}, "
        f"{len(data.train):,} tokens of {len(data.vocabulary):,} kinds ({data.vocabulary.kind}), "
        f"{preset.training.steps:,} steps of {preset.batch_size} x {preset.length} tokens, in {out}/"
    )


def _evaluate(config, preset, data, model, mesh):
    """The numbers of the paper's tables, for the best checkpoint."""
    results = {"preset": config.preset, "data": "text" if config.text else preset.data}
    results |= {"vocabulary": data.vocabulary.kind, "evaluation": preset.evaluation}
    for name, tokens, words in (("validation", data.validation, data.words[0]), ("test", data.test, data.words[1])):
        if preset.evaluation == "sliding_window":
            nats = evaluation.sliding_window(model, tokens, preset.length, mesh=mesh, progress=True)
        elif preset.evaluation == "carried":
            nats = evaluation.carried(model, tokens, preset.length, mesh=mesh)
        else:
            nats = evaluation.segments(model, tokens, preset.length, mesh=mesh)
        results[name] = {
            "nats": nats,
            "perplexity": training.perplexity(nats),
            "word_perplexity": training.perplexity(nats * (len(tokens) - 1) / words),
            "tokens": len(tokens) - 1,
        }
        for memory_length, length, _ in preset.contexts:
            other = evaluation.with_config(model, dataclasses.replace(model.config, memory_length=memory_length))
            nats = evaluation.carried(other, tokens, length, mesh=mesh)
            results[name][f"perplexity, memory {memory_length}, length {length}"] = training.perplexity(nats)
    return results


def _sample(config, data, model, mesh):
    """Continues the first lines of the test text."""
    if model.config.positions == "descending" or config.sample == 0:
        return None
    prompt = data.test[: min(len(data.test), 128)]
    prompts = training.place({"prompts": prompt[None]}, mesh, whole=True)["prompts"]
    tokens = decode.generate(model, prompts, config.sample, key=jax.random.key(0), temperature=0.8)
    return f"{data.vocabulary.decode(prompt)}|{data.vocabulary.decode(np.asarray(tokens[0]))}\n"


def draw(lines: list[dict], path: pathlib.Path, title: str):
    """The losses of training and validation over the steps."""
    figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    for name, label, style in (("loss", "training", "-"), ("validation_loss", "validation", "o-")):
        points = [(line["step"], line[name]) for line in lines if name in line]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label, markersize=4)
    axes.set(xlabel="step", ylabel="loss, nats per token", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def table(results: list[dict]) -> str:
    """Perplexities, those of WikiText-103 beside the paper's."""
    rows = [("preset", "table", "evaluation", "valid", "test", "paper's valid", "test", "step")]
    for row in results:
        preset = PRESETS.get(row["preset"])
        same = preset is not None and row["data"] == "wikitext-103" and row["vocabulary"] == "word"
        paper = preset.paper if same and preset.paper else ("", "")
        ours = (f"{row[name]['perplexity']:.2f}" for name in PARTS)
        number = preset.table if preset and preset.table else ""
        rows.append((row["preset"], number, row["evaluation"], *ours, *paper, row["step"]))
        for memory, length, of_paper in preset.contexts if preset else ():
            paper = of_paper if same else ("", "")
            ours = (f"{row[name][f'perplexity, memory {memory}, length {length}']:.2f}" for name in PARTS)
            rows.append((row["preset"], number, f"memory {memory}, length {length}", *ours, *paper, row["step"]))
    widths = [max(len(str(row[i])) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(str(x).ljust(width) for x, width in zip(row, widths, strict=True)) for row in rows)


def main(config: Config):
    if config.table:
        print(table(run_folder.results(config.out or RUNS, "evaluation", table)))
        return
    find(config.preset)
    if config.distributed:
        jax.distributed.initialize()
    run(config)


if __name__ == "__main__":
    with command_line.one_line():
        main(tyro.cli(Config, description=__doc__))
