"""A language model continues prompts, which are printed with their continuations.

    python -m experiments.language generate runs/language/demo --prompt "ROMEO:"            a run
    python -m experiments.language generate FOLDER --prompt "The fox" --prompt "Why"        a public checkpoint

FOLDER has config.json, model.safetensors and tokenizer.json, or is a name of the hub, "organisation/model". Several
prompts are read as one batch. The printed text of a checkpoint ends at the first eos_token_id of its config.json.
"""

from __future__ import annotations

import dataclasses
import itertools
import pathlib
import sys
from typing import Literal

import jax
import numpy as np
import tyro
from flax import nnx

from experiments.language import pretrained, text
from experiments.run import command_line, files, training
from experiments.run import folder as run_folder
from fwt_jax import decode
from fwt_jax.models import DecoderLM, HybridLM, ModelConfig


@dataclasses.dataclass(frozen=True)
class Config:
    """The model, the prompts and the draws."""

    model: tyro.conf.Positional[str]
    """Folder of a run of ``python -m experiments.language``, folder of a public checkpoint, or its name on the hub."""
    prompt: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A text to continue; may be given several times. Standard input if not given."""
    tokens: int = 300
    """How many tokens to generate."""
    temperature: float = 0.8
    """0 takes the likeliest token, and larger numbers draw less likely ones more often."""
    top_k: int | None = None
    """Draws from the k likeliest tokens."""
    top_p: float | None = None
    """Draws from the likeliest tokens that have this probability together."""
    seed: int = 0
    """Seed of the draws."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Data type of the computation; as trained, or as on disk, if not given."""


def load(
    folder: str | pathlib.Path, dtype: Literal["float32", "bfloat16"] | None = None
) -> tuple[DecoderLM | HybridLM, text.Vocabulary | pretrained.Tokenizer]:
    """The best model of a run, or the model of a public checkpoint, and its vocabulary.

    Raises:
      ValueError: a folder without a run of a language model, or without checkpoints; see also ``pretrained.load``.
    """
    if pretrained.is_checkpoint(str(folder)):
        return pretrained.load(folder, dtype)
    run = pathlib.Path(folder)
    settings = _settings(run)
    if "weights" in settings["model"]:
        if not (run / "pretrained").exists():
            raise ValueError(f"the run in {run} has not ended; the same command goes on, and writes {run}/pretrained")
        return pretrained.load(run / "pretrained", dtype)
    try:
        config = ModelConfig(**settings["model"] | {"cutoffs": tuple(settings["model"]["cutoffs"])})
    except (TypeError, KeyError) as error:
        raise ValueError(f"the model in {run / 'run.json'} is not one of this version: {error}") from error
    config = config if dtype is None else dataclasses.replace(config, dtype=dtype)
    vocabulary = text.Vocabulary.load(run / "vocabulary.json")
    model, _ = training.load(run_folder.folder(run), lambda: DecoderLM(config, rngs=nnx.Rngs(0)))
    return model, vocabulary


def _settings(run):
    """The content of run.json."""
    path = run / "run.json"
    if not path.exists():
        raise ValueError(
            f"{run} holds no run: {path} is not there; train one with python -m experiments.language, or name the "
            "folder of a public checkpoint, with its config.json"
        )
    settings = files.read_json(path)
    if not (run / "vocabulary.json").exists() or not isinstance(settings.get("model"), dict):
        raise ValueError(f"{run} is not a run of python -m experiments.language; it has no vocabulary.json")
    return settings


def encode(vocabulary: text.Vocabulary | pretrained.Tokenizer, prompt: str) -> np.ndarray:
    """The tokens of a prompt ``[T]``, T ≥ 1. The end of its last line is a token only if the prompt ends with it.

    Raises:
      ValueError: a prompt without tokens.
    """
    if isinstance(vocabulary, pretrained.Tokenizer):
        tokens = vocabulary.encode_prompt(prompt)
    else:
        tokens = vocabulary.encode(prompt)
        if vocabulary.kind != "character" and not prompt.endswith("\n"):
            tokens = tokens[:-1]
    if not len(tokens):
        raise ValueError(f'the prompt {prompt!r} has no tokens; give some text with --prompt, e.g. --prompt "The "')
    return tokens


def main(config: Config):
    command_line.check_at_least(config, tokens=1, temperature=0, top_k=1, seed=0)
    if config.top_p is not None and not 0 < config.top_p <= 1:
        raise ValueError(f"--top-p must be above 0 and at most 1, got {config.top_p}")
    prompts = [text.plain(prompt) for prompt in config.prompt or (sys.stdin.read(),)]
    model, vocabulary = load(config.model, config.dtype)
    if model.config.positions == "descending":
        raise ValueError(
            f"the model of {config.model} cannot generate: its positions count the tokens that follow; "
            "train the demo, or a preset whose name ends with -nopos or -whole"
        )
    rows = [encode(vocabulary, prompt) for prompt in prompts]
    missing = sorted({name for prompt in prompts for name in vocabulary.missing(prompt)})
    if missing:
        names = ", ".join(map(repr, missing[:10]))
        print(f"note: the text of this run lacks {names}; the model reads <unk> instead", file=sys.stderr)
    more = _continuations(config, model, rows)
    texts = []
    for prompt, row, tokens in zip(prompts, rows, more, strict=True):
        # The prompt is printed as it is given, because the vocabulary may lack some of it.
        read, whole = vocabulary.decode(row), vocabulary.decode([*row, *tokens])
        texts.append(prompt + whole.removeprefix(read))
    print("\n---\n".join(texts))


def _continuations(config, model, rows):
    """The new tokens of each row, without the first that ends a text and those after it."""
    lengths = np.array([len(row) for row in rows])
    prompts = np.zeros((len(rows), max(lengths)), np.int32)
    for prompt, row in zip(prompts, rows, strict=True):
        prompt[: len(row)] = row
    more = decode.generate(
        model,
        prompts,
        config.tokens,
        lengths=None if len({*lengths}) == 1 else lengths,
        padding="behind",
        key=jax.random.key(config.seed),
        temperature=config.temperature,
        top_k=None if config.top_k is None else min(config.top_k, model.config.vocab_size),
        top_p=config.top_p,
    )
    stops = pretrained.stop_tokens(model.config)
    return [list(itertools.takewhile(lambda token: token not in stops, row)) for row in np.asarray(more).tolist()]
