"""A trained language model continues a prompt, which is printed with its continuation.

python -m experiments.language generate runs/language/demo --prompt "ROMEO:"
"""

from __future__ import annotations

import dataclasses
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx

from experiments.language import text
from experiments.run import command_line, files, folder, training
from fwt_jax import decode
from fwt_jax.models import DecoderLM, ModelConfig


@dataclasses.dataclass(frozen=True)
class Config:
    """The run, the prompt and the draws."""

    run: tyro.conf.Positional[pathlib.Path]
    """Folder of a run of ``python -m experiments.language``."""
    prompt: str | None = None
    """The text to continue; standard input if not given."""
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


def load(run: str | pathlib.Path) -> tuple[DecoderLM, text.Vocabulary]:
    """The best model of a run, and its vocabulary.

    Raises:
      ValueError: a folder without a run of a language model, or without checkpoints.
    """
    run = pathlib.Path(run)
    settings = _settings(run)
    try:
        config = ModelConfig(**settings["model"] | {"cutoffs": tuple(settings["model"]["cutoffs"])})
    except (TypeError, KeyError) as error:
        raise ValueError(f"the model in {run / 'run.json'} is not one of this version: {error}") from error
    vocabulary = text.Vocabulary.load(run / "vocabulary.json")
    model, _ = training.load(folder.folder(run), lambda: DecoderLM(config, rngs=nnx.Rngs(0)))
    return model, vocabulary


def _settings(run):
    """The content of run.json."""
    path = run / "run.json"
    if not path.exists():
        raise ValueError(f"{run} holds no run: {path} is not there; train one with python -m experiments.language")
    settings = files.read_json(path)
    if not (run / "vocabulary.json").exists() or not isinstance(settings.get("model"), dict):
        raise ValueError(f"{run} is not a run of python -m experiments.language; it has no vocabulary.json")
    return settings


def encode(vocabulary: text.Vocabulary, prompt: str) -> np.ndarray:
    """The tokens of a prompt ``[T]``, T ≥ 1. The end of its last line is a token only if the prompt ends with it.

    Raises:
      ValueError: a prompt without tokens.
    """
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
    prompt = text.plain(sys.stdin.read() if config.prompt is None else config.prompt)
    model, vocabulary = load(config.run)
    if model.config.positions == "descending":
        raise ValueError(
            f"the model of {config.run} cannot generate: its positions count the tokens that follow; "
            "train the demo, or a preset whose name ends with -nopos or -whole"
        )
    tokens = encode(vocabulary, prompt)
    missing = vocabulary.missing(prompt)
    if missing:
        names = ", ".join(map(repr, missing[:10]))
        print(f"note: the text of this run lacks {names}; the model reads <unk> instead", file=sys.stderr)
    more = decode.generate(
        model,
        jnp.asarray(tokens)[None],
        config.tokens,
        key=jax.random.key(config.seed),
        temperature=config.temperature,
        top_k=None if config.top_k is None else min(config.top_k, len(vocabulary)),
        top_p=config.top_p,
    )
    # The prompt is printed as it is given, because the vocabulary may lack some of it.
    read, whole = vocabulary.decode(tokens), vocabulary.decode([*tokens, *np.asarray(more[0])])
    print(prompt + whole.removeprefix(read))
