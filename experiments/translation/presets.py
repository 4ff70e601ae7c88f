"""The translation models of the paper's table 1, and smaller ones for a laptop."""

from __future__ import annotations

import dataclasses
import re

from experiments.run.training import TrainConfig
from fwt_jax.models import Attention, TranslationConfig


@dataclasses.dataclass(frozen=True)
class Size:
    """A Transformer and its training.

    big and base have the recipe of fairseq (Ott et al. 2018): post-norm, and a learning rate that falls with 1/√step.
    tiny and demo are for few epochs: pre-norm, and a learning rate that falls to 0.
    """

    model: TranslationConfig
    training: TrainConfig
    vocabulary: int  # subwords of both languages together
    tokens: int  # of a batch, on its longer side and with padding, at most
    max_length: int = 256  # tokens of a sentence to train on, at most
    label_smoothing: float = 0.1


_ADAM = {"b2": 0.98, "clip": 0.0, "schedule": "inverse_sqrt"}
_SHORT = _ADAM | {"clip": 1.0, "schedule": "cosine", "seed": 1}
_WMT = TrainConfig(
    steps=40_000, learning_rate=1e-3, warmup=4000, accumulate=16, eval_every=1000, log_every=50, seed=1, **_ADAM
)
BASE = TranslationConfig(vocab_size=32_768)
# Without scan, XLA's CPU compiler computes the sum of all layers' residual gradients again in each layer. With scan a
# step of the tiny model takes a fifth less time.
_PRE = {"norm": "pre", "scan": True}
SIZES = {
    # 45 epochs of WMT14
    "big": Size(
        dataclasses.replace(BASE, d_model=1024, d_ff=4096, num_heads=16, dropout=0.3, scan=True),
        _WMT,
        32_768,
        3 * 3584 * 16,
    ),
    "base": Size(dataclasses.replace(BASE, scan=True), dataclasses.replace(_WMT, accumulate=4), 32_768, 8 * 4096),
    # The size of Wu et al. 2021, for 29,000 captions
    "tiny": Size(
        dataclasses.replace(
            BASE, encoder_layers=4, decoder_layers=4, d_model=128, d_ff=256, num_heads=4, dropout=0.1, **_PRE
        ),
        TrainConfig(
            steps=9000, learning_rate=2.5e-3, warmup=900, eval_every=750, save_every=250, log_every=50, **_SHORT
        ),
        4000,
        1024,
        max_length=64,
    ),
    "demo": Size(
        dataclasses.replace(
            BASE, encoder_layers=2, decoder_layers=2, d_model=128, d_ff=256, num_heads=4, dropout=0.2, **_PRE
        ),
        TrainConfig(steps=1500, learning_rate=4e-3, warmup=200, eval_every=375, save_every=375, log_every=25, **_SHORT),
        2500,
        1024,
        max_length=48,
    ),
}

# Table 1 of the paper: BLEU of newstest2013 and newstest2014
PAPER = {
    "big-softmax": (26.6, 27.7),
    "big-elu": (25.5, 26.8),
    "big-performer-32": (24.2, 24.4),
    "big-performer-128": (24.9, 25.3),
    "big-performer-256": (26.7, 27.7),
    "big-dpfp-2": (26.2, 26.9),
    "big-dpfp-4": (26.2, 27.1),
}
NAMES = "SIZE-softmax, SIZE-elu, SIZE-performer-M, SIZE-dpfp-NU, SIZE-[gated-]delta, SIZE-[gated-]delta-dpfp-NU"


def find(name: str) -> tuple[Size, TranslationConfig]:
    """The size and the model of a preset.

    "elu", "performer-M" (2M features) and "dpfp-NU" (2·NU·head_size features) use the sum rule in all three attentions,
    because the paper does not say which of them it replaced. "delta" and "delta-dpfp-NU" are "elu" and "dpfp-NU" with
    the delta rule in the decoder. "gated-" adds a decay to its memory.

    Raises:
      ValueError: there is no preset of this name.
    """
    name = "demo-delta" if name == "demo" else name
    size, _, kind = name.partition("-")
    match = re.fullmatch(
        r"(?P<softmax>softmax)|elu|performer-(?P<m>\d+)|dpfp-(?P<nu>\d+)"
        r"|(?P<gated>gated-)?(?P<delta>delta)(-dpfp-(?P<delta_nu>\d+))?",
        kind,
    )
    if size not in SIZES or not match:
        raise ValueError(
            f"--preset must be one of {NAMES}, or the preset demo; SIZE is one of {', '.join(SIZES)}; got {name!r}"
        )
    base = SIZES[size].model
    if match["softmax"]:
        return SIZES[size], base
    features = {}
    if nu := match["nu"] or match["delta_nu"]:
        features = {"feature_map": "dpfp", "feature_size": int(nu)}
    elif match["m"]:
        features = {"feature_map": "favor_plus", "feature_size": int(match["m"])}
    attention = decoder = Attention("sum", **features)
    if match["delta"]:
        gated = match["gated"] is not None
        decoder = Attention("delta", **features, feature_normalization="sum", normalize=False, decay=gated)
    return SIZES[size], dataclasses.replace(base, encoder=attention, cross=attention, decoder=decoder)
