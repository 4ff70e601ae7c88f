"""The language models of the paper's tables 2 to 5, a preset for each row, a demo, and two for public checkpoints."""

from __future__ import annotations

import dataclasses
from typing import Literal

from experiments.run.training import TrainConfig
from fwt_jax.models import ModelConfig


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """The model of a public checkpoint, whose config.json has its sizes. Its parameters are float32 in training."""

    dtype: Literal["float32", "bfloat16"]  # of the computation
    remat: bool  # recompute each block in the backward pass


@dataclasses.dataclass(frozen=True)
class Preset:
    """A model, its training and evaluation, and the paper's perplexities."""

    model: ModelConfig | Checkpoint
    training: TrainConfig
    batch_size: int
    length: int  # tokens of a segment in training, and of a window in evaluation
    data: Literal["wikitext-103", "demo", "own"] = "wikitext-103"
    vocabulary: Literal["word", "character", "sentencepiece"] = "word"
    evaluation: Literal["sliding_window", "carried", "segments"] = "sliding_window"
    carry: bool = False  # whether a segment starts from the memory of the segment before it
    # Further evaluations: the memory length, the segment length, the paper's perplexities
    contexts: tuple[tuple[int, int, tuple[float, float]], ...] = ()
    table: int = 0  # the number of the paper's table
    paper: tuple[float, float] | None = None  # the paper's perplexities of validation and test

    def __post_init__(self):
        if isinstance(self.model, Checkpoint):
            return
        if self.carry and self.model.rule == "softmax" and self.model.positions != "relative":
            raise ValueError('carry needs a memory of constant size; softmax has one with positions="relative" only')
        if self.carry and self.model.feature_map == "favor_plus":
            raise ValueError("carry cannot be with favor_plus, which draws new features in every step of training")


SMALL = ModelConfig(vocab_size=267_735, cutoffs=(20_000, 40_000, 200_000), scan=True)
MEDIUM = dataclasses.replace(SMALL, d_model=256, head_size=32)

# Four independent choices: rule, feature map, normalisation of the features, normalisation of attention
SOFTMAX = {"rule": "softmax"}
SUM = {"rule": "sum", "feature_normalization": None, "normalize": "read"}
DELTA = {"rule": "delta", "feature_normalization": "sum", "normalize": False}
NORMALIZED = {"normalize": "retrieval"}  # attention normalisation for the delta rule, eq. 27 and 28
NO_POSITIONS = {"positions": None}


def performer(m):
    """FAVOR+ with 2m features."""
    return {"feature_map": "favor_plus", "feature_size": m}


def dpfp(nu):
    """DPFP with 2ν · head_size features."""
    return {"feature_map": "dpfp", "feature_size": nu}


def _small(table, paper, *choices):
    model = dataclasses.replace(SMALL, **{name: x for choice in choices for name, x in choice.items()})
    return Preset(model, TrainConfig(steps=500_000), 96, 256, table=table, paper=paper)


def _medium(table, paper, *choices, training=None, **options):
    model = dataclasses.replace(MEDIUM, **{name: x for choice in choices for name, x in choice.items()})
    training = TrainConfig(steps=400_000) if training is None else training
    return Preset(model, training, 56, 384, table=table, paper=paper, **options)


WHOLE = {"carry": True, "evaluation": "carried"}
# The demo is not in the paper. Keys of length 1 (Yang et al. 2024) and no dropout make it learn faster in its minutes.
DEMO_MODEL = ModelConfig(
    vocab_size=100,
    num_layers=3,
    d_model=128,
    d_ff=512,
    num_heads=4,
    head_size=32,
    rule="delta",
    feature_normalization="l2",
    output_scale=1.0,
    dropout=0.0,
    **dpfp(1),
    **NO_POSITIONS,
)
DEMO_TRAINING = TrainConfig(
    steps=1000, learning_rate=4e-3, schedule="cosine", warmup=50, eval_every=100, save_every=100, log_every=10
)

# Small updates keep what the checkpoint knows. A checkpoint of the run has 12 bytes for each parameter, so few stay.
FINETUNE = TrainConfig(
    steps=300,
    learning_rate=1e-5,
    schedule="cosine",
    warmup=30,
    clip=1.0,
    b2=0.95,
    weight_decay=0.01,
    eval_every=100,
    save_every=100,
    log_every=5,
    keep=1,
)
FINETUNE_LONGER = dataclasses.replace(FINETUNE, steps=1000, learning_rate=2e-5, warmup=100, eval_every=250)
OWN = {"data": "own", "evaluation": "segments"}

PRESETS = {
    "demo": Preset(DEMO_MODEL, DEMO_TRAINING, 8, 256, data="demo", vocabulary="character", evaluation="segments"),
    # table 2
    "small-softmax": _small(2, (33.0, 34.1), SOFTMAX),
    "small-sum": _small(2, (37.1, 38.3), SUM),
    "small-delta": _small(2, (34.1, 35.5), DELTA),
    "small-performer-sum": _small(2, (39.0, 39.6), SUM, performer(8)),
    "small-performer-delta": _small(2, (36.1, 37.2), DELTA, performer(8)),
    "medium-softmax": _medium(2, (27.9, 29.6), SOFTMAX),
    "medium-sum": _medium(2, (31.1, 33.0), SUM),
    "medium-delta": _medium(2, (29.7, 31.5), DELTA),
    "medium-performer-sum": _medium(2, (32.2, 33.8), SUM, performer(16)),
    "medium-performer-delta": _medium(2, (30.0, 31.8), DELTA, performer(16)),
    # table 3, whose third row is medium-delta
    "medium-delta-normalized": _medium(3, (30.4, 32.1), DELTA, NORMALIZED),
    "medium-delta-normalized-nopos": _medium(3, (29.2, 31.2), DELTA, NORMALIZED, NO_POSITIONS),
    "medium-delta-nopos": _medium(3, (28.1, 31.1), DELTA, NO_POSITIONS),
    # table 4: the whole text as one sequence; the paper has "> 260" for the sum rule
    "medium-sum-whole": _medium(4, (260.0, 260.0), SUM, NO_POSITIONS, **WHOLE),
    "medium-delta-whole": _medium(4, (27.8, 29.4), DELTA, NO_POSITIONS, **WHOLE),
    "medium-xl": _medium(
        4,
        (24.6, 25.5),
        SOFTMAX,
        {"positions": "relative", "memory_length": 384},
        training=TrainConfig(steps=200_000, warmup=1000),
        contexts=((15, 1, (65.7, 65.5)), (64, 64, (29.3, 30.1)), (128, 128, (26.4, 27.4))),
        **WHOLE,
    ),
    # table 5
    "small-performer16-sum": _small(5, (38.0, 38.8), SUM, performer(16)),
    "small-performer16-delta": _small(5, (36.0, 37.0), DELTA, performer(16)),
    # small-dpfp-sum is the toolkit's attn_type 6, which scales the numerator and the denominator of the read.
    "small-dpfp-sum": _small(5, (37.7, 38.8), SUM, dpfp(1), {"output_scale": 1.0, "eps": 1e-5 * 16**0.5}),
    "small-dpfp-delta": _small(5, (33.9, 35.0), DELTA, dpfp(1)),
    # --from, on a laptop and on one accelerator
    "finetune": Preset(Checkpoint("float32", remat=False), FINETUNE, 2, 256, **OWN),
    "finetune-accelerator": Preset(Checkpoint("bfloat16", remat=True), FINETUNE_LONGER, 8, 2048, **OWN),
}


def find(name: str) -> Preset:
    """The preset of a name.

    Raises:
      ValueError: an unknown name.
    """
    if name not in PRESETS:
        raise ValueError(f"--preset must be one of {', '.join(PRESETS)}, got {name!r}")
    return PRESETS[name]


def describe(preset: Preset) -> str:
    """The sizes of a preset in words."""
    model, training = preset.model, preset.training
    if isinstance(model, Checkpoint):
        sizes = f"the model of --from, computed in {model.dtype}{' with blocks recomputed' if model.remat else ''}"
    else:
        sizes = (
            f"{model.num_layers} layers, d_model {model.d_model}, {model.num_heads} heads of {model.head_size}, "
            f"dropout {model.dropout:g}"
        )
    return (
        f"{sizes}, {training.steps:,} steps of {preset.batch_size} x {preset.length} tokens, "
        f"learning rate {training.learning_rate:g}, warmup {training.warmup:,}"
    )


def overview() -> str:
    """All presets, those of the same sizes in one paragraph."""
    names = {}
    for name, preset in PRESETS.items():
        names.setdefault(describe(preset), []).append(name)
    return "\n\n".join(f"{', '.join(group)}: {sizes}." for sizes, group in names.items())
