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

# Options whose kind their default does not tell
LISTS = frozenset("full_attn_layers kda_layers layer_types layers mlp_layer_types mlp_only_layers".split())
MAPPINGS = frozenset("linear_attn_config rope_parameters text_config".split())
NOT_ZERO = frozenset("decoder_sparse_step full_attention_interval".split())


def read_options(
    options: Mapping[str, Any],
    *,
    required: tuple[str, ...],
    defaults: Mapping[str, Any],
    only: Mapping[str, tuple],
    inert: tuple[str, ...] = (),
) -> dict[str, Any]:
    """The options that a model needs, with the defaults of the program that wrote them.

    An option that is null has its default, if it has one. Values must be of the kind of their default. Those without
    one are integers, if no set above names them.

    Args:
      options: the mapping in config.json.
      required: options that must be there.
      defaults: options that may be there, and their values if they are not.
      only: options that may be there with certain values; the first one is the default, for null, too.
      inert: options that change nothing, beside ``INERT``.

    Raises:
      ValueError: missing options, values that are not supported or of another kind, unknown options that are not null:
        all of them.
    """
    problems = []
    missing = [name for name in required if options.get(name) is None]
    if missing:
        problems.append(f"these options are missing: {', '.join(missing)}")
    for name in (*required, *defaults):
        wanted = _wanted(name, options.get(name), defaults.get(name), 1 if name in required else 0)
        if wanted is not None:
            problems.append(f"{name} must be {wanted}, got {options[name]!r}")
    for name, values in only.items():
        got = options.get(name)
        if got is not None and not any(got is value or (type(got) is type(value) and got == value) for value in values):
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
    defaults = {**defaults, **{name: values[0] for name, values in only.items()}}
    read = {name: default if options.get(name) is None else options[name] for name, default in defaults.items()}
    return read | {name: options[name] for name in required}


def _wanted(name, value, default, least) -> str | None:
    """What a value must be; None if it is, or if it is null."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if value is None or name == "attn":
        return None
    if name in LISTS:
        kind = str if name.endswith("types") else int
        is_list = isinstance(value, list) and all(isinstance(x, kind) for x in value)
        return None if is_list else "a list of names" if kind is str else "a list of integers"
    if name in MAPPINGS:
        return None if isinstance(value, Mapping) else "a mapping"
    if isinstance(default, bool):
        return None if isinstance(value, bool) else "true or false"
    if isinstance(default, float) or name == "lower_bound":
        return None if is_number else "a number"
    least = 1 if name in NOT_ZERO else least
    return None if is_number and isinstance(value, int) and value >= least else f"an integer of at least {least}"
