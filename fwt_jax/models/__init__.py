"""Models of Schlag, Irie & Schmidhuber 2021, for language (section 6.3) and for translation (section 6.2), and today's
language models."""

from fwt_jax.models.decoder_lm import DecoderLM, ModelConfig
from fwt_jax.models.encoder_decoder import Attention, EncoderDecoder, TranslationConfig, TranslationMemory
from fwt_jax.models.hybrid_lm import BlockConfig, HybridConfig, HybridLM
from fwt_jax.models.mixture import MixtureOfExperts, SwiGLU

__all__ = [
    "Attention",
    "BlockConfig",
    "DecoderLM",
    "EncoderDecoder",
    "HybridConfig",
    "HybridLM",
    "MixtureOfExperts",
    "ModelConfig",
    "SwiGLU",
    "TranslationConfig",
    "TranslationMemory",
]
