"""Language models (section 6.3, tables 2 to 5): train, evaluate, generate.

    python -m experiments.language                             a small delta network on nine plays of Shakespeare
    python -m experiments.language --text book.txt             the same model on your own text
    python -m experiments.language --preset small-delta --wikitext DIR        a row of the paper's table 2
    python -m experiments.language --table                     the results of all finished runs
    python -m experiments.language --from FOLDER --text book.txt              a public checkpoint trains on your text
    python -m experiments.language generate RUN --prompt "..."                a run, or a checkpoint, continues a text

A run is a folder, runs/language/<preset or text>/ or --out. Nothing is written outside of it. The same command
continues an interrupted run. The folder has checkpoints/, metrics.jsonl, tensorboard/, run.json, vocabulary.json,
loss.png, samples.txt and results.json. With --from it also has pretrained/, the model in the format of FOLDER. Times
and results: experiments/language/README.md.

Options that are None are the preset's own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import pathlib
import sys
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx
from jax.sharding import Mesh

from experiments.language import evaluation, pretrained, text, wikitext
from experiments.language.presets import PRESETS, Checkpoint, Preset, describe, find
from experiments.run import command_line, devices, files, folder, loss_curve, tables, training
from experiments.run.log import read_metrics
from fwt_jax import decode, sharding
from fwt_jax.models import DecoderLM, HybridLM, ModelConfig

EVALUATED = ("validation", "test")
RUNS = pathlib.Path("runs/language")
# The options for settings in run.json. All other settings depend on --preset.
OPTIONS = {
    "training.steps": "--steps",
    "training.learning_rate": "--learning-rate",
    "training.warmup": "--warmup",
    "training.accumulate": "--accumulate",
    "training.seed": "--seed",
    "model.num_layers": "--layers",
    "model.d_model": "--d-model",
    "model.num_heads": "--heads",
    "model.dropout": "--dropout",
    "model.dtype": "--dtype",
    "model.config": "config.json of --from (SHA-256)",
    "model.weights": "the sizes of the weights of --from (SHA-256)",
    "batch.rows": "--batch-size",
    "batch.length": "--length",
    "vocabulary.kind": "--vocabulary",
    "vocabulary.size": "the number of words in the vocabulary",
    "vocabulary.sha256": "the vocabulary (SHA-256)",
    "asked for.vocabulary_size": "--vocabulary-size",
    "text.tokens": "the number of tokens to train on",
    "text.sha256": "the training text (SHA-256)",
    "text.validation": "the validation text (SHA-256)",
}
MANY_EPOCHS = 20  # A small text that is read more often is learned by heart.


@dataclasses.dataclass(frozen=True)
class Config:
    """The model, its text and its folder. Options that are None are the preset's own."""

    preset: str | None = None
    """demo, or a row of the paper's tables; with --from, finetune. All presets are listed above."""
    text: tuple[pathlib.Path, ...] = ()
    """UTF-8 files, or folders of .txt files, instead of the preset's text."""
    wikitext: pathlib.Path | None = None
    """Folder of wiki.train.tokens, wiki.valid.tokens and wiki.test.tokens of WikiText-103."""
    from_: Annotated[str | None, tyro.conf.arg(name="from")] = None
    """Folder of a public checkpoint, or its name on the hub, "organisation/model", to train on --text."""
    vocabulary: Literal["word", "character", "sentencepiece"] | None = None
    """How the text is cut into tokens."""
    vocabulary_size: int = 8000
    """Number of pieces for --vocabulary sentencepiece. For words, the largest number beside <unk> (0: all)."""
    out: pathlib.Path | None = None
    """Folder of the run; with --table, of the runs."""
    steps: int | None = None
    """Updates of the parameters."""
    learning_rate: float | None = None
    """Highest learning rate."""
    warmup: int | None = None
    """Updates in which the learning rate rises."""
    batch_size: int | None = None
    """Sequences in a batch."""
    length: int | None = None
    """Tokens in a sequence."""
    layers: int | None = None
    """Blocks of attention and feed-forward layer."""
    d_model: int | None = None
    """Features of a token. The width of the feed-forward layers changes in proportion."""
    heads: int | None = None
    """Heads of the attention, each of d_model / heads features."""
    dropout: float | None = None
    """Share of the activations that are dropped in training."""
    accumulate: int | None = None
    """Parts that a batch is computed in, to need less memory."""
    seed: int | None = None
    """Seed of the parameters and of dropout."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Data type of the computation; parameters and memories stay float32."""
    fsdp: int = 1
    """Devices that share the parameters of one copy of the model."""
    tensor: int = 1
    """Devices that share the heads and feed-forward layers of one copy."""
    sequence: int = 1
    """Devices that share the tokens of each sequence; for --length beyond the memory of one."""
    distributed: bool = False
    """Several processes, one for each host of a TPU slice or cluster."""
    sample: int = 500
    """Tokens to generate at the end, from models without positions."""
    table: bool = False
    """Only print the results of all runs in runs/language/, or --out, beside the paper's."""

    @property
    def preset_name(self) -> str:
        """The preset that is asked for, or the one that is taken without --preset."""
        return self.preset or ("demo" if self.from_ is None else "finetune")


# --- settings --------------------------------------------------------------------------------------------------------


def settings(config: Config) -> Preset:
    """The preset with the options of the command line.

    Raises:
      ValueError: an unknown preset, options out of their ranges, options that do not fit together.
    """
    preset = find(config.preset_name)
    least = {"steps": 1, "learning_rate": 0, "warmup": 0, "batch_size": 1, "length": 1, "layers": 1, "d_model": 2}
    least |= {"heads": 1, "dropout": 0, "accumulate": 1, "seed": 0, "fsdp": 1, "tensor": 1, "sequence": 1, "sample": 0}
    command_line.check_at_least(config, **least, vocabulary_size=0)
    _check_from(config, preset)
    if config.wikitext and (config.text or preset.data == "demo"):
        raise ValueError("--wikitext needs a --preset of the paper's tables, and no --text")
    with _naming("--learning-rate"):  # the only option that may still be out of its range, by infinity
        recipe = _given(config, "steps", "learning_rate", "warmup", "accumulate", "seed")
        recipe = dataclasses.replace(preset.training, **recipe)
    changed = dataclasses.replace(
        preset,
        model=_model(config, preset.model),
        training=recipe,
        **_given(config, "batch_size", "length"),
    )
    if changed.batch_size % changed.training.accumulate:
        raise ValueError(
            f"--accumulate must divide the {changed.batch_size} rows of a batch (--batch-size), "
            f"got {changed.training.accumulate}"
        )
    return changed


def _check_from(config, preset):
    """Refuses options that do not fit --from, or need it."""
    if config.from_ is None:
        if isinstance(preset.model, Checkpoint):
            raise ValueError(f"--preset {config.preset} needs --from, the folder of a public checkpoint")
        return
    if not isinstance(preset.model, Checkpoint):
        names = " or ".join(name for name, other in PRESETS.items() if isinstance(other.model, Checkpoint))
        raise ValueError(f"--from takes --preset {names}, got {config.preset}")
    own = ("wikitext", "vocabulary", "layers", "d_model", "heads", "dropout")
    given = [command_line.option(name) for name in _given(config, *own)]
    if given:
        raise ValueError(
            f"--from does not go with {', '.join(given)}: the checkpoint has a model and a tokenizer of its own; "
            "leave them out"
        )
    if config.sequence > 1 or config.distributed:
        raise ValueError("--from trains in one process, without --distributed and --sequence; take --fsdp and --tensor")
    if not config.text:
        raise ValueError("--from needs --text, the files to train on")


@contextlib.contextmanager
def _naming(option):
    """Names the option in the message of a ``ValueError``."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{option}: {error}") from error


def _given(config, *names):
    """The options that are not None."""
    return {name: getattr(config, name) for name in names if getattr(config, name) is not None}


def _model(config, model):
    """The model of a preset with the options of the command line."""
    if config.dropout is not None and config.dropout >= 1:
        raise ValueError(f"--dropout must be at least 0 and below 1, got {config.dropout}")
    model = dataclasses.replace(model, **_given(config, "dropout", "dtype"))
    if config.layers is not None:
        model = dataclasses.replace(model, num_layers=config.layers)
    if config.d_model is None and config.heads is None:
        return model
    d_model, heads = config.d_model or model.d_model, config.heads or model.num_heads
    if d_model % 2 or d_model % heads:
        raise ValueError(f"--d-model must be even and a multiple of --heads, got {d_model} and {heads}")
    d_ff = model.d_ff * d_model // model.d_model
    return dataclasses.replace(model, d_model=d_model, d_ff=d_ff, num_heads=heads, head_size=d_model // heads)


def model_config(preset: Preset, vocab_size: int) -> ModelConfig:
    """The preset's model for a vocabulary, without the clusters of words beyond it."""
    cutoffs = tuple(cutoff for cutoff in preset.model.cutoffs if cutoff < vocab_size)
    return dataclasses.replace(preset.model, vocab_size=vocab_size, cutoffs=cutoffs)


# --- the text --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Data:
    """A text in three splits, as tokens."""

    vocabulary: text.Vocabulary | pretrained.Tokenizer
    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray
    words: dict[str, int]  # words and line ends in each split


def read_data(
    config: Config, preset: Preset, out: pathlib.Path, vocabulary: pretrained.Tokenizer | None = None
) -> Data:
    """The text of a run, and its vocabulary if none is given. Nothing is written.

    Raises:
      ValueError: missing or empty texts, or too short ones.
    """
    if config.text:
        splits = text.split(text.read_files(config.text))
    elif preset.data == "demo":
        splits = text.split(text.demo_text())
    else:
        splits = wikitext.load(config.wikitext)
    if vocabulary is None:
        vocabulary = _vocabulary(config, preset, splits["train"], out)
    tokens = {name: vocabulary.encode(split) for name, split in splits.items()}
    for name in EVALUATED:
        if len(tokens[name]) < 2:
            raise ValueError(f"the text is too short: {len(tokens[name])} token for {name}; take more text")
    return Data(vocabulary, **tokens, words={name: text.count_words(split) for name, split in splits.items()})


def _vocabulary(config, preset, train, out):
    kind, size = config.vocabulary or preset.vocabulary, config.vocabulary_size
    if kind == "character":
        return text.Vocabulary.characters(train)
    if kind == "sentencepiece":
        # Making pieces takes long, and another version of sentencepiece may make others: a run keeps its own.
        saved = text.Vocabulary.load(_vocabulary_path(out)) if _has_vocabulary(out) else None
        return saved if saved and saved.kind == kind else text.Vocabulary.sentencepiece(train, size)
    if preset.data == "demo" or config.text:
        return text.Vocabulary.words(train, max_size=size or sys.maxsize)  # a max_size adds <unk>
    return text.Vocabulary.words(train)  # WikiText-103 contains <unk>


def _vocabulary_path(out):
    return out / "vocabulary.json"


def _has_vocabulary(out):
    """Whether a run has started in a folder. A vocabulary without run.json is from a start that failed."""
    return _vocabulary_path(out).exists() and (out / "run.json").exists()


def _text_name(paths):
    """The name of the user's own text: the first file's, without its ending."""
    first = paths[0].resolve().stem
    return first if len(paths) == 1 else f"{first} and {len(paths) - 1} more"


def _folder_name(config, preset):
    """The folder of a run: the preset's or checkpoint's name, and that of the user's own text.

    The text's name takes the demo's place.
    """
    names = [path.resolve().stem for path in config.text[:1]]
    return "-".join(names if names and preset.data == "demo" else [_model_name(config), *names])


def _model_name(config):
    """The name of the preset, or of the checkpoint."""
    return config.preset_name if config.from_ is None else pathlib.Path(config.from_).resolve().name


# --- a run -----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Run:
    """A run before training: all that its options and its text decide."""

    config: Config
    preset: Preset  # with the options of the command line, and the size of the vocabulary
    data: Data
    out: pathlib.Path
    mesh: Mesh | None
    model_name: str
    text_name: str
    base: pretrained.Base | None  # the checkpoint of --from

    def make_model(self) -> DecoderLM | HybridLM:
        """The model before training; that of a checkpoint has its shapes alone."""
        if self.base is not None:
            return self.base.make_model()
        # The axis is not in the settings of the run, which may go on with other devices.
        axis = "sequence" if self.config.sequence > 1 else None
        config = dataclasses.replace(self.preset.model, sequence_axis=axis)
        return DecoderLM(config, rngs=nnx.Rngs(self.preset.training.seed))

    def title(self) -> str:
        """The name of the model, and of its text where that is another name."""
        return self.model_name if self.text_name == self.model_name else f"{self.model_name} on {self.text_name}"

    def identity(self) -> dict[str, Any]:
        """The settings, beside those of training, that a run in the same folder must have."""
        preset, data = self.preset, self.data
        vocabulary = {"kind": data.vocabulary.kind, "size": len(data.vocabulary), "sha256": data.vocabulary.digest()}
        digests = {"sha256": files.digest(data.train.tobytes()), "validation": files.digest(data.validation.tobytes())}
        return {
            "model": dataclasses.asdict(preset.model) | (self.base.identity() if self.base else {}),
            "batch": {"rows": preset.batch_size, "length": preset.length, "carry": preset.carry},
            "vocabulary": vocabulary,
            "asked for": {"vocabulary_size": self.config.vocabulary_size},
            "text": {"tokens": len(data.train), **digests},
        }


def prepare(config: Config) -> Run:
    """Reads the text and checks all options. Nothing is written.

    Raises:
      ValueError: options or a text that cannot be trained on, a folder that holds a run of another text.
    """
    preset = settings(config)
    out = folder.folder(config.out or RUNS / _folder_name(config, preset))
    with _naming("--fsdp, --tensor and --sequence"):
        mesh = devices.make_mesh(config.fsdp, config.tensor, config.sequence)
    base = None if config.from_ is None else pretrained.Base.open(config.from_, preset.model)
    data = read_data(config, preset, out, base.tokenizer if base else None)
    with _naming("--batch-size"):
        batches = text.Segments(data.train, preset.batch_size, preset.length)
        if mesh is not None:
            sharding.batch_partition(mesh, batches.rows)  # raises for rows that the devices cannot share
    model_name, text_name = _model_name(config), _text_name(config.text) if config.text else preset.data
    if base is None:
        own = dataclasses.replace(find(config.preset_name).model, dtype=preset.model.dtype)
        if preset.model != own or (config.text and preset.data == "demo"):
            model_name = f"{preset.model.rule}-{preset.model.num_layers}x{preset.model.d_model}"
        preset = dataclasses.replace(preset, model=model_config(preset, len(data.vocabulary)))
    run = Run(config, preset, data, out, mesh, model_name, text_name, base)
    _check_same_run(run)
    return run


def _check_same_run(run):
    """Refuses a folder of a run with another text or more steps, in fewer words than ``folder.check_identity``."""
    path = run.out / "run.json"
    if not path.exists():
        return
    before, now = files.read_json(path), run.identity()
    change = _change_of_text(before, now)
    if change:
        raise ValueError(f"{run.out} holds a run {change}; name another folder with --out, or delete this one")
    recipe, steps = dataclasses.asdict(run.preset.training), before.get("training", {}).get("steps")
    same_but_steps = json.loads(json.dumps({"training": recipe | {"steps": steps}, **now}))
    if steps != recipe["steps"] and before == same_but_steps and recipe["schedule"] in ("authors", "cosine"):
        raise ValueError(
            f"the run in {run.out} has --steps {steps}, and its learning rate falls to 0 at that step. "
            f"A run of {recipe['steps']} steps has other learning rates from the start, so it cannot continue this "
            "one: name another folder with --out, or delete this one"
        )


def _change_of_text(before, now):
    """The difference in the text of two runs, in words: an option, another text, or "" for the same text."""
    if all(before.get(name) == now[name] for name in ("text", "vocabulary", "asked for")):
        return ""
    if not all(isinstance(before.get(name), dict) for name in ("text", "vocabulary", "asked for")):
        return "of another program"
    if before["vocabulary"].get("kind") != now["vocabulary"]["kind"]:
        return f"with --vocabulary {before['vocabulary'].get('kind')}"
    if before["asked for"] != now["asked for"]:
        return f"with --vocabulary-size {before['asked for'].get('vocabulary_size')}"
    return "of another text"


def loss(model, batch, memory, rngs):
    """The sum of −log p, for ``training.train``. A memory that the run carries starts from zero with the text."""
    if memory is not None:
        memory = jax.tree.map(lambda x: jnp.where(batch["start"], jnp.zeros_like(x), x), memory)
    losses, after = model.losses(batch["tokens"], batch["targets"], memory, rngs=rngs)
    return jnp.sum(losses), jnp.sum(batch["targets"] >= 0), None if memory is None else after


def run(config: Config) -> dict:
    """Trains the steps that are missing, evaluates, generates a sample and draws. Returns the content of results.json.

    Raises:
      ValueError, OSError, FloatingPointError, KeyboardInterrupt: see ``prepare`` and ``training.train``.
    """
    run = prepare(config)
    if jax.process_index() == 0:
        _describe(run)
        if not _has_vocabulary(run.out):
            run.out.mkdir(parents=True, exist_ok=True)
            run.data.vocabulary.save(_vocabulary_path(run.out))
    _train(run)
    with contextlib.nullcontext() if run.mesh is None else jax.set_mesh(run.mesh):
        model, step = training.load(run.out, run.make_model, mesh=run.mesh)
        results = _evaluate(run, model) | {"step": step}
        sample = _sample(run, model)
        if run.base is not None:
            run.base.save(model, run.out / "pretrained")
    if jax.process_index() == 0:
        _report(run, results, sample)
    return results


def _describe(run):
    """Prints the sizes of the model, of its text and of its training."""
    preset, data = run.preset, run.data
    shapes = nnx.eval_shape(run.make_model)
    rule = "" if run.base else f"rule {preset.model.rule}, "
    count = sum(math.prod(x.shape) for x in jax.tree.leaves(nnx.state(shapes, nnx.Param)))
    print(
        f"{run.title()}: {count:,} parameters, {rule}{describe(preset)}, "
        f"{len(data.train):,} tokens of {len(data.vocabulary):,} kinds ({data.vocabulary.kind}), in {run.out}/"
    )
    epochs = preset.training.steps * preset.batch_size * preset.length / len(data.train)
    if run.config.text and epochs > MANY_EPOCHS:
        print(
            f"note: these steps read the {len(data.train):,} tokens {epochs:,.0f} times, so the model will learn them "
            "by heart; take more text or fewer --steps",
            file=sys.stderr,
        )


def _train(run):
    preset, data, identity = run.preset, run.data, run.identity()

    def evaluate(model):
        nats = evaluation.segments(model, data.validation, preset.length, carry=preset.carry, mesh=run.mesh)
        return {"loss": nats, "perplexity": training.perplexity(nats)}

    training.train(
        run.make_model,
        loss,
        text.Segments(data.train, preset.batch_size, preset.length),
        preset.training,
        run.out,
        pretrained=functools.partial(run.base.load, run.mesh) if run.base else None,
        memory=run.make_model().init_memory(preset.batch_size) if preset.carry else None,
        evaluate=evaluate,
        identity=identity,
        words=folder.words(preset.training, identity, OPTIONS),
        mesh=run.mesh,
    )


def _evaluate(run, model):
    """The numbers of the paper's tables, from the best checkpoint."""
    preset, data, mesh = run.preset, run.data, run.mesh
    evaluate = {
        "sliding_window": functools.partial(evaluation.sliding_window, progress=True),
        "carried": evaluation.carried,
        "segments": evaluation.segments,
    }[preset.evaluation]
    results = {"preset": run.model_name, "data": run.text_name}
    results |= {"vocabulary": data.vocabulary.kind, "evaluation": preset.evaluation}
    for name in EVALUATED:
        tokens = getattr(data, name)
        nats = evaluate(model, tokens, preset.length, mesh=mesh)
        results[name] = {
            "nats": nats,
            "perplexity": training.perplexity(nats),
            "word_perplexity": training.perplexity(nats * (len(tokens) - 1) / data.words[name]),
            "tokens": len(tokens) - 1,
        }
        for memory_length, length, _ in preset.contexts:
            other = evaluation.with_config(model, dataclasses.replace(model.config, memory_length=memory_length))
            nats = evaluation.carried(other, tokens, length, mesh=mesh)
            results[name][_context(memory_length, length)] = training.perplexity(nats)
    return results


def _context(memory_length, length):
    return f"perplexity, memory {memory_length}, length {length}"


def _sample(run, model):
    """A continuation of the first tokens of the test text; None for models that cannot generate."""
    if model.config.positions == "descending" or run.config.sample == 0:
        return None
    prompt, vocabulary = run.data.test[:128], run.data.vocabulary
    prompts = devices.place({"prompts": prompt[None]}, run.mesh, whole=True)["prompts"]
    if run.base is None:
        model = evaluation.with_config(model, run.preset.model)  # single tokens are not split
    tokens = decode.generate(model, prompts, run.config.sample, key=jax.random.key(0), temperature=0.8)
    return f"{vocabulary.decode(prompt)}|{vocabulary.decode(np.asarray(tokens[0]))}\n"


# --- results ---------------------------------------------------------------------------------------------------------


def _report(run, results, sample):
    """Writes and prints the results, the plot and the sample."""
    files.write(run.out / "results.json", json.dumps(results, indent=1))
    loss_curve.draw(read_metrics(run.out / "metrics.jsonl"), run.out / "loss.png", run.title())
    if sample:
        files.write(run.out / "samples.txt", sample)
        print(f"--- a sample: the text before | is from the test text\n{sample}---")
    print(table([results]))
    also = ", and pretrained, the model in its original format" if run.base else ""
    print(f"wrote {run.out}/: results.json, loss.png, metrics.jsonl, checkpoints{also}")
    if sample:
        print(f'to continue a text of yours: python -m experiments.language generate {run.out} --prompt "..."')


def table(results: list[dict]) -> str:
    """The perplexities of runs. If there are runs of the paper's rows, the paper's perplexities stand beside them."""
    heads = ("model", "text", "tokens", "evaluation", "valid perplexity", "test", "step")
    rows = [row for result in results for row in _rows(result)]
    if any(any(paper) for _, paper in rows):
        heads = (*heads, "table", "paper's valid", "test")
        return tables.text([heads, *((*ours, *paper) for ours, paper in rows)])
    return tables.text([heads, *(ours for ours, _ in rows)])


def _rows(result):
    """The rows of one run: our cells, and the paper's, which are empty for a model or text that is not the paper's."""
    preset = PRESETS.get(result["preset"])
    of_paper = preset and preset.paper and result["data"] == "wikitext-103" and result["vocabulary"] == "word"
    perplexities = [(result["evaluation"], "perplexity", preset.paper if of_paper else None)]
    for memory, length, paper in preset.contexts if preset else ():
        name = f"memory {memory}, length {length}"
        perplexities.append((name, _context(memory, length), paper if of_paper else None))
    for name, key, paper in perplexities:
        ours = (f"{result[split][key]:.2f}" for split in EVALUATED)
        about = (result["preset"], result["data"], result["vocabulary"], name)
        yield (*about, *ours, result["step"]), (preset.table, *paper) if paper else ("", "", "")


def main(config: Config):
    if config.table:
        out = config.out or RUNS
        results = [*folder.results(out, "evaluation", lambda row: table([row])).values()]
        print(table(results) if results else f"{out}/ has no results of language models; train first, or name --out")
        return
    settings(config)  # raises before several processes wait for each other
    if config.distributed:
        jax.distributed.initialize()
    run(config)
