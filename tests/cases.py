"""What the tests of ``fast_weight_attention`` share: the table of cases, random inputs, and how to compile quickly."""

import dataclasses
import functools
import itertools
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fwt_jax
from fwt_jax.rules import RULES

# For the goldens and the memory that a gradient needs, which are to be those of users: not as conftest.py compiles.
AS_USERS = {"xla_backend_optimization_level": 3}
if "xla_cpu_use_fusion_emitters" in os.environ["XLA_FLAGS"]:
    AS_USERS["xla_cpu_use_fusion_emitters"] = True


def some(every, cases):
    """Parameters of a test: one in ``every`` of the cases, from the first on; the others are exhaustive."""
    marks = [() if i % every == 0 else pytest.mark.exhaustive for i in range(len(cases))]
    return [pytest.param(case, marks=mark) for case, mark in zip(cases, marks, strict=True)]


@dataclasses.dataclass(frozen=True)
class Case:
    rule: str = "delta"
    normalize: str | bool = False
    decay: str | None = None  # None, "head" or "channel"
    form: str | None = "recurrent"
    chunk_size: int | None = None
    length: int = 100
    packed: bool = False
    start: bool = False  # from a memory that is not empty
    padded: bool = False  # behind, see ``row_lengths``
    implementation: str | None = None
    sizes: tuple = (2, 3, 8, 5)  # B, H, K, V: all different, as is T, so that an axis in another's place shows

    def __str__(self):
        """The pytest id, e.g. delta-retrieval-channel-chunkwise16-T100-packed-start."""
        form = f"{self.form or 'default form'}{self.chunk_size or ''}"
        words = [self.rule, self.normalize, self.decay and f"{self.decay} decay", form]
        words += [
            f"T{self.length}",
            self.packed and "packed",
            self.start and "start",
            self.padded and "padded",
            self.implementation,
        ]
        words += [self.sizes != Case.sizes and "x".join(map(str, self.sizes))]
        return "-".join(str(word).replace(" ", "_") for word in words if word)

    @property
    def defined(self):
        rule = RULES[self.rule]
        by_channel = self.decay != "channel" or rule.decay_per_channel
        return self.form in (None, "recurrent") or (by_channel and (self.form == "chunkwise" or rule.parallel))

    @property
    def options(self):
        chunk_size = {"chunk_size": self.chunk_size} if self.form == "chunkwise" else {}
        implementation = {"implementation": self.implementation} if self.implementation else {}
        return {"rule": self.rule, "normalize": self.normalize, "form": self.form, **chunk_size, **implementation}


NORMALIZED_RULES = [(name, normalize) for name, rule in RULES.items() for normalize in rule.normalize]
FORMS = [("recurrent", None), ("parallel", None), ("chunkwise", 16), ("chunkwise", None)]
DECAYS = [None, "head", "channel"]
LENGTHS = [100, 37, 64, 1]


def every_case():
    """Iterates over the full product."""
    kinds = itertools.product(NORMALIZED_RULES, DECAYS, FORMS, LENGTHS, (True, False), (True, False))
    for (rule, normalize), decay, (form, chunk_size), length, packed, start in kinds:
        # Every two of packed, start and padded meet, in half of the product of the three.
        case = Case(rule, normalize, decay, form, chunk_size, length, packed, start, padded=packed == start)
        if case.defined and (length > 1 or not packed):
            yield case


def pairs(case):
    """Every two choices that meet in a case: of the rule with its normalisation, decay, form, length and context."""
    choices = {
        "rule": (case.rule, case.normalize),
        "decay": case.decay,
        "form": (case.form, case.chunk_size),
        "length": case.length,
        "packed": case.packed,
        "start": case.start,
        "padded": case.padded,
    }
    return set(itertools.combinations(choices.items(), 2))


@functools.cache
def covering_cases():
    """Some thirty cases in which every two choices meet that meet in the full product: see ``pairs``.

    Greedy: the next case is one of those in which most pairs meet that have not met yet.
    """
    cases = list(every_case())
    order = np.random.default_rng(0).permutation(len(cases))  # else the last choices are those that come first above
    missing = {cases[i]: pairs(cases[i]) for i in order}
    covering = []
    while missing:
        covering.append(max(missing, key=lambda case: len(missing[case])))
        met = missing.pop(covering[-1])
        missing = {case: rest for case, has in missing.items() if (rest := has - met)}
    return covering


def random_segments(length):
    """Documents that end inside of chunks and at their ends, and one of a single, the last, token."""
    row = [np.searchsorted([1, 16, 23, 64], np.arange(length), side="right"), np.arange(length) >= 5]
    segments = np.stack(row).astype(np.int32)
    segments[1, -1] += 1
    return segments


def row_lengths(case):
    """Of the two rows of a padded case: 67 and 36 of 100 tokens, 1 and 0 of one; else None."""
    return np.array([case.length - case.length // 3, max(0, case.length - 64)]) if case.padded else None


def random_inputs(case, seed=0):
    """float64 arrays by the name of the argument; keys of length about one, positive where they are normalised by."""
    rng = np.random.default_rng(seed)
    batch, heads, key_size, value_size = case.sizes
    tokens = (batch, case.length, heads)

    def features():
        numbers = rng.random((*tokens, key_size)) * 1.7 if case.normalize else rng.normal(size=(*tokens, key_size))
        return numbers * key_size**-0.5

    decays = {None: None, "head": tokens, "channel": (*tokens, key_size)}[case.decay]
    memory = (batch, heads, key_size)
    value = rng.normal(size=(*tokens, value_size))
    if RULES[case.rule].unit_values:  # else the memory diverges
        value /= np.linalg.norm(value, axis=-1, keepdims=True)
    return {
        "query": features(),
        "key": features(),
        "value": value,
        "beta": rng.uniform(0.1, 0.9, tokens),
        "log_decay": None if decays is None else -rng.exponential(0.2, decays),
        "fast_weights": rng.normal(size=(*memory, value_size)) if case.start else None,
        "key_sum": rng.uniform(0.5, 1.5, memory) if case.start else None,
    }


def random_cotangents(case, seed=1):
    rng = np.random.default_rng(seed)
    batch, heads, key_size, value_size = case.sizes
    shapes = [(batch, case.length, heads, value_size), (batch, heads, key_size, value_size), (batch, heads, key_size)]
    return tuple(rng.normal(size=shape) for shape in shapes)


def attend(arrays, **options):
    """``fast_weight_attention`` of arrays by name -> y, fast_weights, key_sum."""
    arrays = jax.tree.map(jnp.asarray, arrays)
    fast_weights, key_sum = arrays.pop("fast_weights", None), arrays.pop("key_sum", None)
    memory = None if fast_weights is None else fwt_jax.Memory(fast_weights, key_sum)
    out, memory = fwt_jax.fast_weight_attention(**arrays, memory=memory, **options)
    return out, *memory


@functools.cache
def compiled_attend(**options):
    """``attend`` compiled once per set of options (and per shape)."""
    return jax.jit(functools.partial(attend, **options))


def outputs_and_gradients(arrays, cotangents, compiler_options=None, segment_ids=None, lengths=None, **options):
    """y, fast_weights and key_sum, and the gradient of their inner product with ``cotangents``, by name."""

    arrays = {name: jnp.asarray(x) for name, x in arrays.items() if x is not None}
    cotangents, segment_ids, lengths = jax.tree.map(jnp.asarray, (tuple(cotangents), segment_ids, lengths))
    gradient = compiled_gradient(tuple((compiler_options or {}).items()), **options)
    gradients, outputs = gradient(arrays, cotangents, segment_ids, lengths)
    return outputs, gradients


@functools.cache
def compiled_gradient(compiler_options, **options):
    """Compiled once per set of options (and per shape)."""

    def loss(arrays, cotangents, segment_ids, lengths):
        outputs = attend(arrays, segment_ids=segment_ids, lengths=lengths, **options)
        return sum(jnp.sum(x.astype(c.dtype) * c) for x, c in zip(outputs, cotangents, strict=True)), outputs

    return jax.jit(jax.grad(loss, has_aux=True), compiler_options=dict(compiler_options))
