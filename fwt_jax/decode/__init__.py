"""Generation: a model reads a prompt or a source in one call, then writes token by token from its memory.

    tokens = generate(model, prompts, 100, key=key)                          # a DecoderLM continues prompts
    translations = beam_search(model, source, beam_size=4, max_length=50)    # an EncoderDecoder translates

Both leave the model unchanged. They compile one program for equal models and shapes, whatever the temperature, top_k,
top_p or length penalty. Inside ``jax.jit`` and ``jax.vmap`` these numbers and all arrays may be traced. A traced number
cannot raise: there, tokens are −1 if the log-probabilities are NaN or the number is out of its range.
"""

from fwt_jax.decode.beams import Translations, beam_search, take_rows
from fwt_jax.decode.sampling import filtered, generate

__all__ = ["Translations", "beam_search", "filtered", "generate", "take_rows"]
