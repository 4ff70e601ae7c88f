"""Translation (section 6.2, table 1): train, translate by beam search, score with BLEU and chrF.

    python -m experiments.translation                        a tiny model on sentence pairs that ship
    python -m experiments.translation --preset tiny-dpfp-2 --parallel train.en train.de \\
        --validation val.en val.de --test test.en test.de    on your own files
    python -m experiments.translation --preset big-dpfp-4    a row of the paper's table 1, WMT14 from TFDS
    python -m experiments.translation --table                all finished runs beside the paper's numbers, and which
                                                             models they tell apart
    python -m experiments.translation translate RUN < FILE   a finished run translates your sentences

A run is a folder: runs/translation/PRESET/, PRESET-seed-N/ with --seed N, or --out. After an interruption the same
command goes on. The folder holds checkpoints/, metrics.jsonl, tensorboard/, subwords.model, loss.png,
translations.{validation,test}.txt, bleu.test.csv, results.json.
An option whose default is None has the preset's value. Training leaves out pairs with an empty side, and pairs with
more than --max-length tokens on a side. Translating keeps an empty line empty, and cuts a sentence after 1,024 tokens.
The program prints how many it left out or cut.
Times, numbers and their machine: experiments/translation/README.md. The presets: presets.py.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import pathlib
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments.run import devices, files, folder, log, loss_curve, training
from experiments.translation import pairs
from experiments.translation.pairs import Pairs, Sentences, Subwords
from experiments.translation.presets import Size, find
from experiments.translation.results import STATISTICS, score, table, verdict, write_statistics
from experiments.translation.translate import check_search, translate
from fwt_jax.models import EncoderDecoder

RUNS = pathlib.Path("runs/translation")
# The command line's names for the settings in run.json. The other settings are those of --preset.
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
    "text.train": "the text to train on (SHA-256)",
    "text.validation": "the text of validation (SHA-256)",
}
LEAST = {  # the smallest value of each number of the command line
    "steps": 1,
    "tokens": 1,
    "max_length": 2,
    "learning_rate": 0,
    "warmup": 0,
    "accumulate": 1,
    "seed": 0,
    "vocabulary": 1,
    "average": 1,
}


@dataclasses.dataclass(frozen=True)
class Config:
    """The model, its text and its folder. An option whose default is None has the preset's value."""

    preset: str = "demo"
    """demo, or SIZE-ATTENTION: big-softmax, tiny-dpfp-2, ... (an unknown name lists all)."""
    parallel: tuple[pathlib.Path, ...] = ()
    """Two UTF-8 files to train on, whose lines belong together, source first; or one with tabs between the two."""
    validation: tuple[pathlib.Path, ...] = ()
    """Pairs to choose the best checkpoint by; the first hundredth of --parallel, at least 100, if not given."""
    test: tuple[pathlib.Path, ...] = ()
    """Pairs to score; the next hundredth of --parallel, at least 100, if not given."""
    pair: str | None = None
    """Source and target of WMT14, en-de if not given."""
    data_dir: pathlib.Path | None = None
    """Folder where TFDS has prepared WMT14."""
    out: pathlib.Path | None = None
    """Folder of the run; with --table, folder of the runs."""
    steps: int | None = None
    """Updates of the parameters."""
    tokens: int | None = None
    """Tokens of a batch, on its longer side and with padding, at most."""
    max_length: int | None = None
    """Tokens of a sentence to train on, at most."""
    learning_rate: float | None = None
    """The highest learning rate."""
    warmup: int | None = None
    """Updates in which the learning rate rises; with fewer --steps than the preset's, fewer in proportion."""
    dropout: float | None = None
    """Share of the activations that training drops."""
    accumulate: int | None = None
    """Splits a batch into so many, computed one after another, which needs less memory."""
    seed: int | None = None
    """Seed of the parameters, of dropout and of the order of the batches; names the folder, too."""
    vocabulary: int | None = None
    """Number of subwords, of both languages together."""
    average: int = 1
    """Evaluates the mean of so many last checkpoints; 1: the checkpoint with the best loss of validation."""
    beam_size: int = 4
    """Hypotheses of the beam search."""
    length_penalty: float = 0.6
    """A translation of n tokens has the score log p / n^this: a larger penalty favours longer translations."""
    fsdp: int = 1
    """Devices that share the parameters of one copy of the model."""
    tensor: int = 1
    """Devices that share the heads and feed-forward layers of one copy."""
    distributed: bool = False
    """Several processes, one for each host of a TPU slice or cluster."""
    table: bool = False
    """Only print the results of all runs in runs/translation/, or --out, beside the paper's."""


def settings(config: Config) -> Size:
    """The preset with the changes of the command line. Its model lacks the size of the vocabulary.

    Raises:
      ValueError: an unknown preset; an option out of its range.
    """
    size, model = find(config.preset)
    _check_numbers(config)
    recipe = dataclasses.replace(size.training, **_given(config, "steps", "accumulate"))
    warmup = size.training.warmup * min(recipe.steps, size.training.steps) // size.training.steps
    options = {"warmup": warmup} | _given(config, "warmup", "learning_rate", "seed")
    recipe = dataclasses.replace(recipe, keep=max(config.average, recipe.keep), **options)
    saved = len(_saved_steps(recipe))
    if config.average > saved:
        raise ValueError(
            f"--average must be at most {saved}, the checkpoints of {recipe.steps} steps, got {config.average}"
        )
    model = dataclasses.replace(model, **_given(config, "dropout"))
    changes = _given(config, "tokens", "vocabulary", "max_length")
    return dataclasses.replace(size, model=model, training=recipe, **changes)


def _check_numbers(config):
    for name, least in LEAST.items():
        value = getattr(config, name)
        if value is not None and not least <= value < math.inf:
            raise ValueError(f"--{name.replace('_', '-')} must be at least {least}, got {value}")
    if config.dropout is not None and not 0 <= config.dropout < 1:
        raise ValueError(f"--dropout must be in [0, 1), got {config.dropout}")
    check_search(config.beam_size, config.length_penalty)


def _given(config, *names):
    """The options of these names that the command line gives."""
    return {name: getattr(config, name) for name in names if getattr(config, name) is not None}


def _saved_steps(recipe):
    return [step for step in range(1, recipe.steps + 1) if recipe.saves(step)]


# --- text ------------------------------------------------------------------------------------------------------------


def read_data(config: Config) -> dict[str, Pairs]:
    """Sentence pairs for training, validation and test.

    Raises:
      ValueError: a text is missing, with the place to put it; options that do not belong together.
    """
    demo = config.preset.startswith("demo")
    if (config.parallel or demo) and (config.pair or config.data_dir):
        raise ValueError("--pair and --data-dir are of WMT14; leave them out with --parallel, and with the demo's text")
    if config.parallel:
        return _read_parallel(config)
    if config.validation or config.test:
        raise ValueError("--validation and --test belong to --parallel; name the pairs to train on, too")
    return pairs.demo_pairs() if demo else pairs.load_wmt14(config.pair or "en-de", config.data_dir)


def _read_parallel(config):
    train, held_out = pairs.read_pairs(config.parallel), {}
    for name, paths in (("validation", config.validation), ("test", config.test)):
        if paths:
            held_out[name] = pairs.read_pairs(paths)
            continue
        count = max(100, len(train.source) // 100)
        if len(train.source) < 3 * count:
            raise ValueError(f"{len(train.source)} pairs are too few to hold some out; name files with --{name}")
        held_out[name], train = train.part(slice(count)), train.part(slice(count, None))
    return {"train": train, **held_out}


class Data(NamedTuple):
    """The pairs of training or validation as tokens.

    Attributes:
      source, target: all sentences.
      rows: the pairs to use.
      summary: the number of pairs, and how many of them are not used.
    """

    source: Sentences
    target: Sentences
    rows: np.ndarray
    summary: str

    def digest(self) -> str:
        """Of all tokens."""
        return files.digest(self.source.tokens.tobytes() + self.target.tokens.tobytes())


def _encode(name, text, subwords, max_length):
    data = [subwords.encode(lines, f"encoding {name}, {side}") for side, lines in text._asdict().items()]
    return Data(*data, *pairs.usable(*data, max_length))


def _subwords(out, train, size):
    """The subwords of the run. The first process makes them for a new run, and all processes take its."""
    model = b""
    if jax.process_index() == 0:
        if (out / "run.json").exists():  # Without run.json, subwords.model may be of a start that failed.
            model = Subwords.load(out / "subwords.model").model
        else:
            print(f"making {size:,} subwords of {len(train.source):,} pairs")
            model = Subwords.train(train, size).model
    return Subwords(devices.of_first_process(model))


# --- training --------------------------------------------------------------------------------------------------------


def loss(label_smoothing, model, batch, memory, rngs):
    """Sum of the cross-entropies, number of tokens, and no memory. Negative targets and padding do not count."""
    losses = model.losses(batch["source"], batch["target"], label_smoothing=label_smoothing, rngs=rngs)
    counts = (batch["target"] != model.config.pad_id) & (batch["target"] >= 0)
    return jnp.sum(losses), jnp.sum(counts), None


@nnx.jit
def _nats(model, batch):
    return loss(0.0, model, batch, None, None)[:2]


def nats(
    model: EncoderDecoder, source: Sentences, target: Sentences, rows: np.ndarray, multiple: int, mesh=None
) -> float:
    """Mean cross-entropy of a token of the target, over some pairs and without label smoothing."""
    sums = np.zeros(2)
    for batch in pairs.batches(source, target, rows, 4096, multiple, None):
        sums += [float(x) for x in _nats(model, devices.place(batch, mesh))]
    return float(sums[0] / sums[1])


@dataclasses.dataclass(frozen=True)
class Task:
    """The model, the text and the devices of a run.

    Attributes:
      size: the settings, with the size of the vocabulary.
      out: the folder of the run.
      mesh: of the devices; None for one device.
      text: the pairs of validation and test.
      subwords: of the run.
      train, validation: the pairs as tokens.
    """

    size: Size
    out: pathlib.Path
    mesh: jax.sharding.Mesh | None
    text: dict[str, Pairs]
    subwords: Subwords
    train: Data
    validation: Data

    @property
    def multiple(self) -> int:
        """The number of devices that split the rows of a batch."""
        return 1 if self.mesh is None else self.mesh.shape["data"] * self.mesh.shape["fsdp"]

    @property
    def batch_multiple(self) -> int:
        """The number of rows of a batch to train on is a multiple of this."""
        return self.multiple * self.size.training.accumulate

    def make_model(self) -> EncoderDecoder:
        """The untrained model."""
        return EncoderDecoder(self.size.model, rngs=nnx.Rngs(self.size.training.seed))

    def batches(self) -> Iterator[dict[str, np.ndarray]]:
        """The batches to train on."""
        data, seed = self.train, self.size.training.seed
        return pairs.batches(data.source, data.target, data.rows, self.size.tokens, self.batch_multiple, seed)

    def evaluate(self, model: EncoderDecoder) -> dict[str, float]:
        """The loss of validation and its perplexity."""
        data = self.validation
        value = nats(model, data.source, data.target, data.rows, self.multiple, self.mesh)
        return {"loss": value, "perplexity": training.perplexity(value)}

    def identity(self) -> dict[str, dict]:
        """The settings for run.json: a run with other settings is another run."""
        size, model = self.size, dataclasses.asdict(self.size.model)
        for attention in (model["encoder"], model["decoder"], model["cross"]):
            if not attention["decay"]:
                del attention["decay"]  # Runs of before it existed can go on.
        return {
            "model": model,
            "batch": {"tokens": size.tokens, "max_length": size.max_length, "label_smoothing": size.label_smoothing},
            "rows": {"multiple": self.batch_multiple},  # Another number of devices makes other batches.
            "subwords": {"asked for": size.vocabulary, "sha256": files.digest(self.subwords.model)},
            "text": {"train": self.train.digest(), "validation": self.validation.digest()},
        }


def prepare(config: Config) -> Task:
    """Reads the text and makes or reads the subwords. Writes nothing, so that a refused start leaves no folder."""
    size = settings(config)
    seed = size.training.seed
    name = config.preset if seed == find(config.preset)[0].training.seed else f"{config.preset}-seed-{seed}"
    out = folder.folder(config.out or RUNS / name)
    mesh = devices.make_mesh(config.fsdp, config.tensor)
    nnx.eval_shape(lambda: EncoderDecoder(size.model, rngs=nnx.Rngs(0)))  # Refuses wrong options before the work.
    text = read_data(config)
    subwords = _subwords(out, text["train"], size.vocabulary)
    train = _encode("train", text.pop("train"), subwords, size.max_length)  # The text of WMT14 takes gigabytes.
    validation = _encode("validation", text["validation"], subwords, pairs.SIZES[-1])
    size = dataclasses.replace(size, model=dataclasses.replace(size.model, vocab_size=len(subwords)))
    return Task(size, out, mesh, text, subwords, train, validation)


def run(config: Config) -> dict:
    """Trains what is not trained yet, translates, and scores. Returns the content of results.json."""
    task = prepare(config)
    recipe, out = task.size.training, task.out
    if jax.process_index() == 0:
        _describe(config, task)
        out.mkdir(parents=True, exist_ok=True)
        files.write(out / "subwords.model", task.subwords.model)
    identity = task.identity()
    training.train(
        task.make_model,
        functools.partial(loss, task.size.label_smoothing),
        task.batches(),
        recipe,
        out,
        evaluate=task.evaluate,
        identity=identity,
        words=folder.words(recipe, identity, OPTIONS),
        mesh=task.mesh,
    )
    with contextlib.nullcontext() if task.mesh is None else jax.set_mesh(task.mesh):
        average = _saved_steps(recipe)[-config.average :] if config.average > 1 else ()
        model, step = training.load(out, task.make_model, average=average, mesh=task.mesh)
        results = {"preset": config.preset, "seed": recipe.seed, "step": step, "average": config.average}
        results |= {"settings": _digest_but_seed(recipe, identity)}
        results |= _translate_and_score(config, task, model)
    if jax.process_index() == 0:
        _write(config, results, out)
    return results


def _digest_but_seed(recipe, identity):
    """Of all settings that the seeds of a model have in common."""
    training = dataclasses.asdict(recipe)
    common = {name: training[name] for name in training if name not in ("seed", "log_every", "keep")}
    return files.digest(json.dumps([common, identity]))


def _describe(config, task):
    model, recipe = task.size.model, task.size.training
    parameters = jax.tree.leaves(nnx.state(nnx.eval_shape(task.make_model), nnx.Param))
    print(
        f"{config.preset}: {sum(math.prod(x.shape) for x in parameters):,} parameters, {model.encoder_layers} + "
        f"{model.decoder_layers} layers of width {model.d_model} with {model.num_heads} heads, "
        f"{model.vocab_size:,} subwords"
    )
    print(f"training: {task.train.summary}")
    print(f"validation: {task.validation.summary}")
    print(
        f"{recipe.steps:,} steps of at most {task.size.tokens:,} tokens, learning rate {recipe.learning_rate:g}, "
        f"warmup {recipe.warmup:,}, dropout {model.dropout:g}, in {task.out}/"
    )


# --- results ---------------------------------------------------------------------------------------------------------


def _translate_and_score(config, task, model):
    """The rest of results.json. Also writes the translations."""
    first, out = jax.process_index() == 0, task.out
    if first:
        print("evaluating the trained model")
        (out / "results.json").unlink(missing_ok=True)  # The old results are of other translations.
    results = {"vocabulary": len(task.subwords), "nats": task.evaluate(model)["loss"]}
    results |= {"validation_tokens": task.validation.digest()}
    results |= {"data": _data_name(config), "references": files.digest("\n".join(task.text["test"].target))}
    search = {"beam_size": config.beam_size, "length_penalty": config.length_penalty}
    results |= search
    for name in ("validation", "test"):
        label = f"translating {name}" if first else None
        options = {"multiple": task.multiple, "mesh": task.mesh, "label": label} | search
        translations, cut, speed = translate(model, task.subwords, task.text[name].source, **options)
        references = list(task.text[name].target)
        results[name] = score(translations, references)
        results[name] |= {"sentences": len(translations), "cut": cut, "sentences_per_second": round(speed, 1)}
        if first:
            files.write(out / f"translations.{name}.txt", "".join(line + "\n" for line in translations))
            if name == "test":
                write_statistics(translations, references, out / STATISTICS)
            if cut:
                print(f"{cut:,} of {len(translations):,} sentences were cut to {pairs.SIZES[-1]:,} tokens")
    if first:
        for source, target, ours in list(zip(*task.text["test"], translations, strict=True))[:5]:
            print(f"  source     {source}\n  reference  {target}\n  ours       {ours}\n")
    return results


def _data_name(config):
    if config.parallel:
        return "parallel"
    return "demo" if config.preset.startswith("demo") else f"wmt14 {config.pair or 'en-de'}"


def _write(config, results, out):
    files.write(out / "results.json", json.dumps(results, indent=1))
    text = config.parallel[0].name if config.parallel else results["data"]
    title = config.preset if text == config.preset else f"{config.preset} on {text}"
    loss_curve.draw(log.read_metrics(out / "metrics.jsonl"), out / "loss.png", title)
    print(table({out: results}))
    print(f"BLEU {results['test']['bleu_signature']}\nchrF {results['test']['chrf_signature']}")
    if results["data"] == "demo":
        print("This is a demo: a few thousand sentences of one manual, minutes of training. The BLEU says little.")
    print(f"wrote {out}/: results.json, translations.test.txt, loss.png, metrics.jsonl, checkpoints")


def main(config: Config):
    if config.table:
        out = config.out or RUNS
        runs = folder.results(out, "references", lambda row: table({out: row}))
        if not runs:
            print(f"{out}/ has no results of translation; train first, or name --out")
            return
        print("\n\n".join(filter(None, (table(runs), verdict(runs)))))
        return
    find(config.preset)
    if config.distributed:
        jax.distributed.initialize()
    run(config)
