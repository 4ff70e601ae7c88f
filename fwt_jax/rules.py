"""The update rules: a table. A new rule is one step and one row, here or in the caller's own file.

    def hebb_step(fast_weights, key, value, beta, decay=None):
        ...
    hebb = Rule(hebb_step)
    y, memory = fast_weight_attention(q, k, v, beta, rule=hebb)
    RULES["hebb"] = hebb  # from now on rule="hebb", also in a model's configuration; do not replace a row

Combinations that have names of their own:

    linear attention (Katharopoulos et al. 2020)       rule="sum"
    gated linear attention, GLA (Yang et al. 2024)     rule="sum", log_decay [B, T, H, K]
    RetNet, Mamba-2 (as a memory)                      rule="sum", log_decay [B, T, H]
    DeltaNet (Schlag et al. 2021; Yang et al. 2024)    rule="delta"
    Gated DeltaNet (Yang et al. 2025)                  rule="delta", log_decay [B, T, H]
    Kimi Delta Attention, KDA (2025)                   rule="delta", log_decay [B, T, H, K]
    DeltaProduct (Siems et al. 2025)                   rule="delta", with n tokens for each: see below

DeltaProduct writes n keys for each token and reads once. Reshape key, value and beta from [B, T, n, ...] to
[B, n·T, ...], repeat each query n times, put the decay on the first of the n, and take ``y[:, n - 1 :: n]``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, overload

from fwt_jax import clipped, memory


def _same(fast_weights):
    return fast_weights


class Rule(NamedTuple):
    """An update rule. It needs a step; the other fields say what else it can do.

    Make a rule once, outside of the functions that call it, because JAX compiles again for every new step. Its
    functions must not close over traced arrays. JAX compiles other arrays that they close over into the program.

    Attributes:
      step: the definition, (W ``[K, V]``, key ``[K]``, value ``[V]``, beta ``[]``, decay) -> W. The decay α is None,
        ``[]`` or ``[K]``, and the step multiplies W by it before the write. Matrix products in it are exact by default.
        At padding (``lengths``) key, value and beta are 0, the decay is 1, and its result is not used.
      chunk: many tokens at once, with the arguments of ``memory.chunk`` except ``writes``; ``linear`` makes one. Tokens
        whose arrays are all 0 must change nothing. None: the chunkwise form takes the step token by token, and the
        backward pass recomputes each chunk.
      start, end: from W to the carry of ``chunk``, and back.
      needs_beta: False if a call may leave beta out. It is then 1.
      parallel: True if ``chunk`` may take the whole sequence.
      decay_per_channel: True if ``chunk`` takes a decay per key channel. Otherwise ``form=None`` takes the step then.
      normalize: a tuple of the attention normalisations that are defined for the rule. z sums the keys, or β k if
        ``corrects`` is False. With "retrieval", ``step`` and ``chunk`` take a ``recall_scale``.
      corrects: True if the write is β k (v − Wᵀk)ᵀ, False if it is β k vᵀ, None if neither. ``read_weights``, the
        kernels and the chunkwise form on a GPU know these two writes. The kernels take W without ``start`` and ``end``.
      unit_values: True if layers scale values to length 1, because the rule looks values up as "delta" does keys.
      chunk_size: the largest size that ``chunk_size=None`` picks in plain JAX.
      piece: the kind of M in the map W ↦ M W + U of a stretch of tokens, see pieces.py: "diagonal"; "matrix";
        "transposed" for a map of Wᵀ; None if the rule is not linear in W, or has no chunk.
    """

    step: Callable[..., Any]
    chunk: Callable[..., Any] | None = None
    start: Callable[..., Any] = _same
    end: Callable[..., Any] = _same
    needs_beta: bool = True
    parallel: bool = False
    decay_per_channel: bool = False
    normalize: tuple = (False,)
    corrects: bool | None = None
    unit_values: bool = False
    chunk_size: int = 64
    piece: Literal[None, "diagonal", "matrix", "transposed"] = None


def linear(writes: Callable[..., Any]) -> Callable[..., Any]:
    """The ``chunk`` of a rule that is linear in W, from its ``writes``: see ``memory.chunk``."""
    return functools.partial(memory.chunk, writes=writes)


RULES = {
    "sum": Rule(
        memory.sum_step,
        linear(memory.sum_writes),
        needs_beta=False,
        parallel=True,
        decay_per_channel=True,
        normalize=(False, "read"),
        corrects=False,
        piece="diagonal",
    ),
    "delta": Rule(
        memory.delta_step,
        linear(memory.delta_writes),
        parallel=True,
        decay_per_channel=True,
        normalize=(False, "read", "retrieval"),
        corrects=True,
        piece="matrix",
    ),
    "oja": Rule(memory.oja_step, linear(memory.oja_writes), parallel=True, unit_values=True, piece="transposed"),
    "fwm": Rule(clipped.step, clipped.chunk, clipped.start, clipped.end, chunk_size=32),
}


@overload
def find_rule(rule: str | Rule) -> Rule: ...


@overload
def find_rule(rule: str | Rule, others: tuple[str, ...]) -> Rule | None: ...


def find_rule(rule, others=()):
    """The row of a name; a ``Rule`` is itself; None for a name of ``others``, which are no rules of a memory.

    Raises:
      ValueError: an unknown name, or something that is not a rule.
    """
    if isinstance(rule, Rule):
        _check_row(rule)
        return rule
    if isinstance(rule, str) and rule in (*others, *RULES):
        return RULES.get(rule)
    names = ", ".join(map(repr, (*others, *RULES)))
    raise ValueError(f"rule must be one of {names}, or a Rule of your own, as Rule(step), got {rule!r}")


def _check_row(rule):
    if not callable(rule.step):
        raise ValueError(f"the step of a Rule must be a function, got {rule.step!r}; a name is rule itself")
    if not isinstance(rule.normalize, tuple):
        raise ValueError(f'normalize of a Rule must be a tuple, as (False, "read"), got {rule.normalize!r}')
    try:
        hash(rule)
    except TypeError as error:
        raise ValueError(f"a Rule must be hashable, because JAX compiles once for each: {error}") from error


def name_of(rule: Rule) -> str:
    """The name in the table, in double quotes, or that of the step."""
    for name, row in RULES.items():
        if row == rule:
            return f'"{name}"'
    return getattr(rule.step, "__name__", repr(rule.step))
