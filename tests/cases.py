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

# For the goldens and the memory that a gradient needs, which are to be those of users: not as conftest.py compiles.
AS_USERS = {"xla_backend_optimization_level": 3}
if "xla_cpu_use_fusion_emitters" in os.environ["XLA_FLAGS"]:
    AS_USERS["xla_cpu_use_fusion_emitters"] = True


def some(every, cases):
    """Parameters of a test: one in ``every`` of the cases, from the first on; the others run with -m exhaustive."""
    marks = [() if i % every == 0 else pytest.mark.exhaustive for i in range(len(cases))]
    return [pytest.param(case, marks=mark) for case, mark in zip(cases, marks, strict=True)]


BATCH, HEADS, KEY_SIZE, VALUE_SIZE = 2, 2, 8, 5


@dataclasses.dataclass(frozen=True)
class Case:
    rule: str = "delta"
    normalize: str | bool = False
    decay: str | None = None  # None, "head" or "channel"
    form: str = "recurrent"
    chunk_size: int | None = None
    length: int = 100
    packed: bool = False
    start: bool = False  # from a memory that is not empty
    implementation: str | None = None

    def __str__(self):
        """The pytest id, e.g. delta-retrieval-channel-chunkwise16-T100-packed-start."""
        words = [self.rule, self.normalize, self.decay and f"{self.decay} decay", f"{self.form}{self.chunk_size or ''}"]
        words += [f"T{self.length}", self.packed and "packed", self.start and "start", self.implementation]
        return "-".join(str(word).replace(" ", "_") for word in words if word)

    @property
    def defined(self):
        return self.rule != "fwm" or self.form == "recurrent" or (self.form == "chunkwise" and self.decay != "channel")

    @property
    def options(self):
        chunk_size = {"chunk_size": self.chunk_size} if self.form == "chunkwise" else {}
        implementation = {"implementation": self.implementation} if self.implementation else {}
        return {"rule": self.rule, "normalize": self.normalize, "form": self.form, **chunk_size, **implementation}


RULES = [("sum", False), ("sum", "read"), ("delta", False), ("delta", "read"), ("delta", "retrieval"), ("fwm", False)]
FORMS = [("recurrent", None), ("parallel", None), ("chunkwise", 5), ("chunkwise", 16), ("chunkwise", None)]
DECAYS = [None, "head", "channel"]
LENGTHS = [100, 37, 64, 1]


def every_case():
    """Iterates over the full product."""
    kinds = itertools.product(RULES, DECAYS, FORMS, LENGTHS, (True, False), (True, False))
    for (rule, normalize), decay, (form, chunk_size), length, packed, start in kinds:
        case = Case(rule, normalize, decay, form, chunk_size, length, packed, start)
        if case.defined and (length > 1 or not packed):
            yield case


def covering_cases():
    """Every rule with every normalisation, decay and form; lengths, chunk sizes, packing and start take turns."""
    # Turns of 7, 5 and 4: without a common factor, among them or with the three forms and decays, so that all meet.
    lengths = itertools.cycle([100, 37, 64, 100, 1, 37, 64])
    chunk_sizes = itertools.cycle([16, 5, None, 16, 5])
    contexts = itertools.cycle([(True, True), (True, False), (False, True), (False, False)])
    for (rule, normalize), decay, form in itertools.product(RULES, DECAYS, ("recurrent", "parallel", "chunkwise")):
        chunk_size = next(chunk_sizes) if form == "chunkwise" else None
        case = Case(rule, normalize, decay, form, chunk_size, next(lengths), *next(contexts))
        if case.defined:
            yield case


def random_segments(length):
    """Documents that end inside of chunks and at their ends, and one of a single, the last, token."""
    row = [np.searchsorted([1, 16, 23, 64], np.arange(length), side="right"), np.arange(length) >= 5]
    segments = np.stack(row).astype(np.int32)
    segments[1, -1] += 1
    return segments


def random_inputs(case, seed=0):
    """float64 arrays by the name of the argument; keys of length about one, positive where they are normalised by."""
    rng = np.random.default_rng(seed)
    tokens = (BATCH, case.length, HEADS)
    if case.normalize:
        features = lambda: rng.random((*tokens, KEY_SIZE)) * 0.6  # noqa: E731
    else:
        features = lambda: rng.normal(size=(*tokens, KEY_SIZE)) * KEY_SIZE**-0.5  # noqa: E731
    decays = {None: None, "head": tokens, "channel": (*tokens, KEY_SIZE)}[case.decay]
    memory = (BATCH, HEADS, KEY_SIZE)
    return {
        "query": features(),
        "key": features(),
        "value": rng.normal(size=(*tokens, VALUE_SIZE)),
        "beta": rng.uniform(0.1, 0.9, tokens),
        "log_decay": None if decays is None else -rng.exponential(0.2, decays),
        "fast_weights": rng.normal(size=(*memory, VALUE_SIZE)) if case.start else None,
        "key_sum": rng.uniform(0.5, 1.5, memory) if case.start else None,
    }


def random_cotangents(case, seed=1):
    rng = np.random.default_rng(seed)
    shapes = [(BATCH, case.length, HEADS, VALUE_SIZE), (BATCH, HEADS, KEY_SIZE, VALUE_SIZE), (BATCH, HEADS, KEY_SIZE)]
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


def outputs_and_gradients(arrays, cotangents, compiler_options=None, segment_ids=None, **options):
    """y, fast_weights and key_sum, and the gradient of their inner product with ``cotangents``, by name."""

    def loss(arrays):
        outputs = attend(arrays, segment_ids=segment_ids, **options)
        return sum(jnp.sum(x.astype(c.dtype) * c) for x, c in zip(outputs, cotangents, strict=True)), outputs

    arrays = {name: jnp.asarray(x) for name, x in arrays.items() if x is not None}
    cotangents = jax.tree.map(jnp.asarray, cotangents)
    gradient = jax.jit(jax.grad(loss, has_aux=True), compiler_options=compiler_options)
    gradients, outputs = gradient(arrays)
    return outputs, gradients
