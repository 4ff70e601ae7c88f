"""Models of Schlag, Irie & Schmidhuber 2021: for language (section 6.3) and for translation (section 6.2)."""

from fwt_jax.models.decoder_lm import DecoderLM, ModelConfig
from fwt_jax.models.encoder_decoder import Attention, EncoderDecoder, TranslationConfig, TranslationMemory

__all__ = ["Attention", "DecoderLM", "EncoderDecoder", "ModelConfig", "TranslationConfig", "TranslationMemory"]
