"""Reading the options of a config.json: none is ignored silently."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# These change no number of a model: they are of generation, of training from the start, or of the program that wrote
# the file.
INERT = frozenset(
    """_name_or_path add_cross_attention architectures auto_map bos_token_id chunk_size_feed_forward dtype eos_token_id
    finetuning_task id2label initializer_range is_decoder is_encoder_decoder label2id max_position_embeddings model_type
    output_attentions output_hidden_states pad_token_id problem_type return_dict task_specific_params tokenizer_class
    torch_dtype torchscript transformers_version use_cache""".split()
)


def read_options(
    options: Mapping[str, Any],
    *,
    required: tuple[str, ...],
    defaults: Mapping[str, Any],
    only: Mapping[str, tuple],
    inert: tuple[str, ...] = (),
) -> dict[str, Any]:
    """The options that a model needs, with the defaults of the program that wrote them.

    An option that is null has its default, if it has one.

    Args:
      options: the mapping in config.json.
      required: options that must be there.
      defaults: options that may be there, and their values if they are not.
      only: options that may be there with certain values; the first one is the default.
      inert: options that change nothing, beside ``INERT``.

    Raises:
      ValueError: missing options, values that are not supported, unknown options that are not null: all of them.
    """
    problems = []
    missing = [name for name in required if options.get(name) is None]
    if missing:
        problems.append(f"these options are missing: {', '.join(missing)}")
    for name, values in only.items():
        got = options.get(name, values[0])
        if not any(got is value or (type(got) is type(value) and got == value) for value in values):
            problems.append(f"{name} must be {' or '.join(map(repr, values))}, got {got!r}")
    known = {*required, *defaults, *only, *inert, *INERT}
    unknown = [name for name, value in options.items() if name not in known and value is not None]
    if unknown:
        problems.append(
            f"these options are unknown: {', '.join(f'{name}={options[name]!r}' for name in unknown)}; delete them "
            "if they do not change the model's numbers"
        )
    if problems:
        raise ValueError("; ".join(problems))
    read = {name: default if options.get(name) is None else options[name] for name, default in defaults.items()}
    return read | {name: options[name] for name in required} | {name: options.get(name, only[name][0]) for name in only}
