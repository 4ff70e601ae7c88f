"""Translation (section 6.2, table 1): train, translate by beam search, score with BLEU and chrF.

    python -m experiments.translation                        a tiny model on sentence pairs that ship
    python -m experiments.translation --preset tiny-dpfp-2 --parallel train.en train.de \\
        --validation val.en val.de --test test.en test.de    on your own files
    python -m experiments.translation --preset big-dpfp-4    a row of the paper's table 1, WMT14 from TFDS
    python -m experiments.translation --table                all finished runs beside the paper's numbers

A run is a folder, runs/translation/<preset>/ (--out), and the same command goes on where it was interrupted:
checkpoints/, metrics.jsonl, tensorboard/, subwords.model, loss.png, translations.{validation,test}.txt, results.json.
Options that are None are the preset's own. Pairs with an empty side, or with more than --max-length tokens, are not
trained on; to translate, an empty line stays empty, and a sentence is cut after 1,024 tokens. Both are counted.
Times and numbers, and on what machine: experiments/README.md. The presets are in translation_presets.py.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import os
import pathlib
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import sacrebleu
import tyro
from flax import nnx
from tqdm import tqdm

from experiments import command_line, parallel_text, run_folder, training
from experiments.language_modeling import draw
from experiments.parallel_text import Pairs, Sentences, Subwords
from experiments.translation_presets import PAPER, Size, find
from fwt_jax import decode
from fwt_jax.encoder_decoder import EncoderDecoder

RUNS = pathlib.Path("runs/translation")
# What the command line calls the settings in run.json; of others, --preset decides.
OPTIONS = {
    "training.steps": "--steps",
    "training.learning_rate": "--learning-rate",
    "training.warmup": "--warmup",
    "training.accumulate": "--accumulate",
    "training.seed": "--seed",
    "model.dropout": "--dropout",
    "model.vocab_size": "the number of subwords",
    "batch.tokens": "--tokens",
    "batch.max_length": "--max-length",
    "rows.multiple": "the number of devices, times --accumulate,",
    "subwords.asked for": "--vocabulary",
    "subwords.sha256": "subwords.model (SHA-256)",
    "text.train": "the pairs to train on (SHA-256)",
    "text.validation": "the pairs of validation (SHA-256)",
}
MEMORY = 2**30  # bytes of a device that the memories of a batch of translations may take


@dataclasses.dataclass(frozen=True)
class Config:
    """What to train, on what, and where."""

    preset: str = "demo"
    """demo, or SIZE-ATTENTION: big-softmax, tiny-dpfp-2, ... (an unknown name lists all)."""
    parallel: tuple[pathlib.Path, ...] = ()
    """Two UTF-8 files whose lines belong together, source first, or one with a tab between the two."""
    validation: tuple[pathlib.Path, ...] = ()
    """The same, to choose the best checkpoint by; the first hundredth of --parallel, at least 100, if not given."""
    test: tuple[pathlib.Path, ...] = ()
    """The same, to score; the next hundredth of --parallel if not given."""
    pair: str | None = None
    """Source and target of WMT14, en-de if not given."""
    data_dir: pathlib.Path | None = None
    """Of TFDS, where it has prepared WMT14."""
    out: pathlib.Path | None = None
    """Folder of the run; with --table, of the runs."""
    steps: int | None = None
    """Updates of the parameters."""
    tokens: int | None = None
    """Of a batch, on the longer side, with padding."""
    max_length: int | None = None
    """Tokens of a sentence that is trained on, at most."""
    learning_rate: float | None = None
    """The highest."""
    warmup: int | None = None
    """Updates in which the learning rate rises; with fewer --steps than the preset's, fewer in proportion."""
    dropout: float | None = None
    """Share of the activations that are dropped in training."""
    accumulate: int | None = None
    """Parts that a batch is computed in, to need less memory."""
    seed: int | None = None
    """Of the parameters, of dropout and of the order."""
    vocabulary: int | None = None
    """Subwords of both languages together."""
    average: int = 1
    """Last checkpoints whose mean is evaluated (a run keeps so many); 1: the best one by the loss of validation."""
    beam_size: int = 4
    """Hypotheses of the beam search."""
    length_penalty: float = 0.6
    """A translation of n tokens is judged by log p / n^this: more favours longer ones."""
    fsdp: int = 1
    """Devices that share the parameters of one copy of the model."""
    tensor: int = 1
    """Devices that share the heads and feed-forward layers of one copy."""
    distributed: bool = False
    """Several processes, one for each host of a TPU slice or cluster."""
    table: bool = False
    """Only print the results of all runs in runs/translation/, or --out, beside the paper's."""


def settings(config: Config) -> Size:
    """The preset with what the command line changes; its model lacks the size of the vocabulary.

    Raises:
      ValueError: an unknown preset, numbers out of their ranges.
    """
    size, model = find(config.preset)
    given = lambda **options: {name: x for name, x in options.items() if x is not None}  # noqa: E731
    for name, least in (
        ("average", 1),
        ("tokens", 1),
        ("max_length", 2),
        ("vocabulary", 1),
        ("beam_size", 1),
        ("length_penalty", 0),
        ("seed", 0),
    ):
        value = getattr(config, name)
        if value is not None and not least <= value < math.inf:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    recipe = dataclasses.replace(size.training, **given(steps=config.steps, accumulate=config.accumulate))
    warmup = size.training.warmup * min(recipe.steps, size.training.steps) // size.training.steps
    options = {"warmup": warmup} | given(warmup=config.warmup, learning_rate=config.learning_rate, seed=config.seed)
    recipe = dataclasses.replace(recipe, keep=max(config.average, recipe.keep), **options)
    if config.average > len(_saved(recipe)):
        raise ValueError(
            f"average must be at most {len(_saved(recipe))}, the checkpoints of {recipe.steps} steps, "
            f"got {config.average}"
        )
    model = dataclasses.replace(model, **given(dropout=config.dropout))
    changes = given(tokens=config.tokens, vocabulary=config.vocabulary, max_length=config.max_length)
    return dataclasses.replace(size, model=model, training=recipe, **changes)


def _saved(recipe):
    return [step for step in range(1, recipe.steps + 1) if recipe.saves(step)]


def read_data(config: Config) -> dict[str, Pairs]:
    """Sentence pairs for training, validation and test.

    Raises:
      ValueError: what is missing, and where to put it; see ``parallel_text``.
    """
    if (config.parallel or config.preset.startswith("demo")) and (config.pair or config.data_dir):
        raise ValueError("--pair and --data-dir are of WMT14; leave them out with --parallel, and with the demo's text")
    if not config.parallel:
        if config.validation or config.test:
            raise ValueError("--validation and --test belong to --parallel; name the pairs to train on, too")
        if config.preset.startswith("demo"):
            return parallel_text.demo_pairs()
        return parallel_text.load_wmt14(config.pair or "en-de", config.data_dir)
    train, parts = parallel_text.read_pairs(config.parallel), {}
    for name, paths in (("validation", config.validation), ("test", config.test)):
        if paths:
            parts[name] = parallel_text.read_pairs(paths)
            continue
        count = max(100, len(train.source) // 100)
        if len(train.source) < 3 * count:
            raise ValueError(f"{len(train.source)} pairs are too few to hold some out; name files with --{name}")
        parts[name], train = train.part(slice(count)), train.part(slice(count, None))
    return {"train": train, **parts}


def loss(label_smoothing, model, batch, memory, rngs):
    """Sum of the cross-entropies, and the number of tokens."""
    losses = model.losses(batch["source"], batch["target"], label_smoothing=label_smoothing, rngs=rngs)
    counts = (batch["target"] != model.config.pad_id) & (batch["target"] >= 0)
    return jnp.sum(losses), jnp.sum(counts), None


@nnx.jit
def _nats(model, batch):
    return loss(0.0, model, batch, None, None)[:2]


def nats(
    model: EncoderDecoder, source: Sentences, target: Sentences, rows: np.ndarray, multiple: int, mesh=None
) -> float:
    """Cross-entropy of a token of the target, without label smoothing, over some pairs."""
    sums = np.zeros(2)
    for batch in parallel_text.batches(source, target, rows, 4096, multiple, None):
        sums += [float(x) for x in _nats(model, training.place(batch, mesh))]
    return float(sums[0] / sums[1])


def translate(
    model: EncoderDecoder,
    subwords: Subwords,
    lines: list[str],
    *,
    beam_size: int = 4,
    length_penalty: float = 0.6,
    tokens: int = 4096,
    multiple: int = 1,
    mesh=None,
    label: str | None = "translating",
) -> Translated:
    """Translates sentences.

    An empty line is translated as an empty line. A sentence of more tokens than ``parallel_text.SIZES`` ends at is cut
    there. A translation has at most 1.5 times as many tokens as its source is padded to, and ten.

    Args:
      tokens: of a batch of sources with their padding, at most.
      multiple: what the rows of a batch are a multiple of, for a mesh.
      label: of the progress bar; None: none.
    """
    source, timed = subwords.encode(lines), []  # (sentences, seconds) of full batches that nothing is compiled for
    written = np.flatnonzero(source.lengths > 1)
    out, longest = [""] * len(lines), parallel_text.SIZES[-1]

    @functools.cache
    def most(size):
        return MEMORY * multiple // _bytes_of_memory(model, size, beam_size)

    plan = parallel_text.plan(source.lengths, written, tokens, multiple, None, most)
    with tqdm(total=len(written), desc=label, unit="sentence", disable=label is None) as bar:
        for i, (size, rows) in enumerate(plan):
            start = time.perf_counter()
            count = parallel_text.rows_of(size, tokens, multiple, most)
            batch = training.place({"source": parallel_text.pad(source, rows, size, count)}, mesh)
            options = {"beam_size": beam_size, "max_length": _longest(size), "length_penalty": length_penalty}
            best = decode.beam_search(model, batch["source"], **options).tokens[:, 0]
            if mesh is not None:
                best = jax.device_put(best, jax.NamedSharding(mesh, jax.P()))  # each process needs all
            for row, text in zip(rows, subwords.decode(np.asarray(best)[: len(rows)]), strict=True):
                out[row] = text
            if i and plan[i - 1][0] == size and len(rows) == count:
                timed.append((len(rows), time.perf_counter() - start))
            bar.update(len(rows))
    sentences, seconds = np.sum(timed, axis=0) if timed else (0, math.inf)
    return Translated(out, int(np.sum(source.lengths > longest)), float(sentences / seconds))


def _longest(size):
    return size * 3 // 2 + 10


def _bytes_of_memory(model, size, beam_size):
    """Of a sentence of so many tokens and its hypotheses."""
    read = lambda model: model.encode(jnp.zeros((1, size), jnp.int32), _longest(size), beam_size)  # noqa: E731
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(nnx.eval_shape(read, model)))


class Translated(NamedTuple):
    """Translations in the order of the sentences, how many sentences were cut, and how many were translated a second,
    without the time of compiling; 0 where there was not a second full batch of a size."""

    lines: list[str]
    cut: int
    sentences_per_second: float


def score(translations: list[str], references: list[str]) -> dict:
    """BLEU and chrF of sacrebleu with their signatures."""
    out = {}
    for name, metric in (("bleu", sacrebleu.BLEU()), ("chrf", sacrebleu.CHRF())):
        out[name] = metric.corpus_score(translations, [references]).score
        out[f"{name}_signature"] = str(metric.get_signature())
    return out


def run(config: Config) -> dict:
    """Trains what is not trained yet, translates, and scores. Returns what results.json holds."""
    size = settings(config)
    out = run_folder.folder(config.out or RUNS / config.preset)
    mesh = training.make_mesh(config.fsdp, config.tensor)
    nnx.eval_shape(lambda: EncoderDecoder(size.model, rngs=nnx.Rngs(0)))  # what is wrong is said before all work
    pairs = read_data(config)
    out.mkdir(parents=True, exist_ok=True)
    subwords = _subwords(out / "subwords.model", pairs["train"], size.vocabulary)
    data = {
        name: (subwords.encode(part.source, f"{name}, source"), subwords.encode(part.target, f"{name}, target"))
        for name, part in pairs.items()
        if name != "test"
    }
    rows, left_out = parallel_text.usable(*data["train"], size.max_length)
    del pairs["train"]  # of WMT14, gigabytes
    held_out, of_held_out = parallel_text.usable(*data["validation"], parallel_text.SIZES[-1])
    options = dataclasses.replace(size.model, vocab_size=len(subwords))
    multiple = 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]

    def make_model():
        return EncoderDecoder(options, rngs=nnx.Rngs(size.training.seed))

    def evaluate(model):
        value = nats(model, *data["validation"], held_out, multiple, mesh)
        return {"loss": value, "perplexity": training.perplexity(value)}

    if jax.process_index() == 0:
        shapes = nnx.eval_shape(make_model)
        count = sum(math.prod(x.shape) for x in jax.tree.leaves(nnx.state(shapes, nnx.Param)))
        print(f"{config.preset}: {count:,} parameters, {len(subwords):,} subwords; {left_out}")
        print(f"for the loss of validation, {of_held_out}")
        print(f"{size.training.steps:,} steps of at most {size.tokens:,} tokens, in {out}/")
    identity = {
        "model": dataclasses.asdict(options),
        "batch": {"tokens": size.tokens, "max_length": size.max_length, "label_smoothing": size.label_smoothing},
        "rows": {"multiple": multiple * size.training.accumulate},  # on other devices, batches are others
        "subwords": {"asked for": size.vocabulary, "sha256": _digest(subwords.model)},
        "text": {name: _digest(b"".join(x.tokens.tobytes() for x in part)) for name, part in data.items()},
    }
    batches = parallel_text.batches(
        *data["train"], rows, size.tokens, multiple * size.training.accumulate, size.training.seed
    )
    training.train(
        make_model,
        functools.partial(loss, size.label_smoothing),
        batches,
        size.training,
        out,
        evaluate=evaluate,
        identity=identity,
        words=run_folder.words(size.training, identity, OPTIONS),
        mesh=mesh,
    )
    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
        average = _saved(size.training)[-config.average :] if config.average > 1 else ()
        model, step = training.load(out, make_model, average=average, mesh=mesh)
        results = {"preset": config.preset, "step": step, "average": config.average, "vocabulary": len(subwords)}
        results |= {"nats": evaluate(model)["loss"]}
        results |= {"data": _data_name(config), "references": _digest("\n".join(pairs["test"].target).encode())}
        results |= {"beam_size": config.beam_size, "length_penalty": config.length_penalty}
        if jax.process_index() == 0:
            (out / "results.json").unlink(missing_ok=True)  # until the new ones are complete
        for name in ("validation", "test"):
            results[name] = _score_part(config, model, subwords, pairs[name], name, multiple, mesh, out)
    if jax.process_index() == 0:
        run_folder.write_atomically(out / "results.json", json.dumps(results, indent=1))
        draw(run_folder.read_metrics(out / "metrics.jsonl"), out / "loss.png", config.preset)
        print(table([results]))
        print(f"BLEU {results['test']['bleu_signature']}\nchrF {results['test']['chrf_signature']}")
        if config.preset.startswith("demo") and not config.parallel:
            print("This is a demo: a few thousand sentences of one manual, minutes of training. The BLEU says little.")
        print(f"wrote {out}/: results.json, translations.test.txt, loss.png, metrics.jsonl, checkpoints")
    return results


def _data_name(config):
    if config.parallel:
        return "parallel"
    return "demo" if config.preset.startswith("demo") else f"wmt14 {config.pair or 'en-de'}"


def _digest(data):
    return hashlib.sha256(data).hexdigest()[:16]


def _subwords(path, train, size):
    """Those of the run, which the first process makes with its first start."""
    model = b""
    if jax.process_index() == 0:
        if (path.parent / "run.json").exists():  # else there may be those of a start that failed
            if not path.exists():
                raise ValueError(f"{path.parent} holds another run, without {path.name}; name another folder")
            model = path.read_bytes()
            try:
                len(Subwords(model))
            except RuntimeError as error:
                raise ValueError(f"{path} is damaged ({error}); put back a copy") from error
        else:
            print(f"making {size:,} subwords of {len(train.source):,} pairs")
            model = Subwords.train(train, size).model
            path.with_suffix(".tmp").write_bytes(model)
            os.replace(path.with_suffix(".tmp"), path)
    return Subwords(run_folder.of_first_process(model))


def _score_part(config, model, subwords, pairs, name, multiple, mesh, out):
    translations, cut, speed = translate(
        model,
        subwords,
        pairs.source,
        beam_size=config.beam_size,
        length_penalty=config.length_penalty,
        multiple=multiple,
        mesh=mesh,
        label=f"translating {name}" if jax.process_index() == 0 else None,
    )
    if jax.process_index() == 0:
        if cut:
            print(f"{cut:,} of {len(translations):,} sentences were cut to {parallel_text.SIZES[-1]:,} tokens")
        run_folder.write_atomically(out / f"translations.{name}.txt", "".join(line + "\n" for line in translations))
        if name == "test":
            for source, target, ours in list(zip(*pairs, translations, strict=True))[:5]:
                print(f"  source     {source}\n  reference  {target}\n  ours       {ours}\n")
    results = score(translations, list(pairs.target))
    return results | {"sentences": len(translations), "cut": cut, "sentences_per_second": round(speed, 1)}


def table(results: list[dict]) -> str:
    """BLEU and chrF, those of WMT14 En-De beside the paper's BLEU; nats of a token of validation."""
    scores = ("nats", "valid BLEU", "chrF", "test BLEU", "chrF", "paper's valid", "test")
    rows = [("preset", "text", *scores, "checkpoint", "beam", "sentences/s")]
    for row in results:
        ours = (f"{row[name][metric]:.2f}" for name in ("validation", "test") for metric in ("bleu", "chrf"))
        paper = PAPER.get(row["preset"]) if row["data"] == "wmt14 en-de" else None
        search = f"{row['beam_size']}, {row['length_penalty']}"
        speed = row["test"]["sentences_per_second"] or ""  # too few to measure
        checkpoint = f"mean of {row['average']}, to {row['step']}" if row["average"] > 1 else row["step"]
        scores = (f"{row['nats']:.3f}", *ours, *(paper or ("", "")))
        rows.append((row["preset"], row["data"], *scores, checkpoint, search, speed))
    widths = [max(len(str(row[i])) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(str(x).ljust(width) for x, width in zip(row, widths, strict=True)) for row in rows)


def main(config: Config):
    if config.table:
        out = config.out or RUNS
        results = run_folder.results(out, "references", table)
        print(table(results) if results else f"{out}/ has no results of translation; train first, or name --out")
        return
    find(config.preset)
    if config.distributed:
        jax.distributed.initialize()
    run(config)


if __name__ == "__main__":
    with command_line.one_line():
        main(tyro.cli(Config, description=__doc__))
