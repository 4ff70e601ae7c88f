"""Weights of others: public checkpoints, and the authors' language-model toolkit (IDSIA/lmtool-fwp) <-> ``DecoderLM``.

A public checkpoint is a folder in its own format:

    model = from_pretrained(folder)                     # or a name of the hub, "organisation/model"
    tokenizer = load_tokenizer(folder, model.config.vocab_size)
    save_pretrained(model, "tuned", base=folder)        # for transformers and fla, too

The toolkit's weights, by a table:

    config = config_from_toolkit(arguments)             # the toolkit's own: attn_type, n_layer, d_model, ...
    model = from_toolkit(state_dict, arguments)         # arrays by the toolkit's names
    state_dict = to_toolkit(model, arguments)

    model = load("model.safetensors")                   # weights of the toolkit, or a file of save(model, path)
    python -m fwt_jax.convert SRC DST                   # the toolkit's .pt, .npz or .safetensors to ours, or ours back

.pt files can only be read, with PyTorch.
"""

from fwt_jax.convert.files import load, save
from fwt_jax.convert.pretrained import from_pretrained, load_tokenizer, read_config, save_pretrained
from fwt_jax.convert.toolkit import (
    ATTENTION,
    DERIVED,
    arguments_of,
    config_from_toolkit,
    from_toolkit,
    gradients_to_toolkit,
    to_toolkit,
)

__all__ = [
    "ATTENTION",
    "DERIVED",
    "arguments_of",
    "config_from_toolkit",
    "from_pretrained",
    "from_toolkit",
    "gradients_to_toolkit",
    "load",
    "load_tokenizer",
    "read_config",
    "save",
    "save_pretrained",
    "to_toolkit",
]
