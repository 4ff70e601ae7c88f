"""What a family of public checkpoints is: its config.json, and a table from its tensors to the variables of a model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax

Tensors = Mapping[str, tuple[int, ...]]  # the shapes of the tensors on disk, by their names


class Entry(NamedTuple):
    """A row of a table of names: some tensors on disk <-> some variables of a model.

    The functions only move numbers (``jnp.reshape``, ``jnp.concatenate``, ...): what one does, the other undoes bit by
    bit.

    Attributes:
      disk: the names of the tensors.
      model: the paths of the variables, as "blocks.0.mixer.query.kernel".
      to_model: (array of each tensor) -> tuple of an array for each variable.
      to_disk: (array of each variable) -> tuple of an array for each tensor.
    """

    disk: tuple[str, ...]
    model: tuple[str, ...]
    to_model: Callable[..., tuple]
    to_disk: Callable[..., tuple]


class Family(NamedTuple):
    """The checkpoints of one ``model_type``.

    Attributes:
      config: the mapping in config.json, and the shapes of the tensors -> a frozen dataclass with a field ``options``,
        the text of config.json. The tensors tell apart folders of other programs that name them differently.
      entries: config, and the shapes and dtypes of the model's variables by their paths -> the rows of its table.
        They fill every variable.
      passed_over: a regular expression of the names on disk that the model does not need.
      model: (config, rngs=...) -> model. Its attribute ``config`` is the config.
    """

    config: Callable[[Mapping[str, Any], Tensors], Any]
    entries: Callable[[Any, Mapping[str, jax.ShapeDtypeStruct]], Iterable[Entry]]
    passed_over: str
    model: Callable[..., Any]
