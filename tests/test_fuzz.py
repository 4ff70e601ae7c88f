"""Random calls of ``fast_weight_attention`` in random wrappers against the float64 loop: outputs and gradients.

    python -m pytest tests/test_fuzz.py                                              every second of 25 cases
    python -m pytest tests/test_fuzz.py -m exhaustive                                the others
    python -m pytest tests/test_fuzz.py -n 2 --dist load --fuzz 5000 --fuzz-seed 1   thousands of others

Case i of a seed depends on these two numbers alone, so that a case that fails can be run again by itself. Programs are
compiled as conftest.py says, some as users compile them; with XLA_FLAGS=--xla_backend_optimization_level=3 all are.
"""

import contextlib
import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from cases import AS_USERS, attend
from wrappers import AXES, MEMORY, OUTPUTS, axis_of, tie, wrap

from fwt_jax.rules import RULES

COUNT, SEED = 25, 3756  # the cases of this seed have what the test below asks of them


def pytest_generate_tests(metafunc):
    if "number" in metafunc.fixturenames:
        count, seed = metafunc.config.getoption("--fuzz"), metafunc.config.getoption("--fuzz-seed")
        seed = SEED if seed is None else seed
        others = pytest.mark.exhaustive if count is None else ()
        cases = [pytest.param(seed, i, marks=others if i % 2 else ()) for i in range(COUNT if count is None else count)]
        metafunc.parametrize("seed, number", cases)


@pytest.fixture(autouse=True)
def forget_now_and_then(request, count=itertools.count(1)):  # noqa: B008
    """A process may map some 65,000 regions of memory; thousands of programs would take more."""
    yield
    if next(count) % 25 == 0:
        jax.clear_caches()


# --- what is drawn ---------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Call:
    """What is passed, in which wrappers (the outermost first), and what is asked of the wrapped function."""

    rule: str
    normalize: str | bool
    eps: float
    form: str
    chunk_size: int | None
    implementation: str | None
    decay: str | None  # None, "head" or "channel"
    decays: str  # "mild", "strong", "forgetting", "mixed" or "rare"
    beta: str  # "none", "one", "to one" or "to two"
    dtype: str
    gates_dtype: str  # of beta and log_decay
    x64: bool
    packed: bool
    padded: bool
    start: bool
    pieces: int
    memory_every: int | None  # the memories are then summed, the i-th i times
    sparse: bool  # features with zeros among them
    batch: int
    length: int
    heads: int
    key_size: int
    value_size: int
    wrappers: tuple  # of (name, number of parts, names of arguments that all parts of a vmap share)
    asked: str
    moving: tuple  # names of the arguments that are differentiated
    as_users: bool  # compiled as users compile

    @property
    def options(self):
        options = {"rule": self.rule, "normalize": self.normalize, "eps": self.eps, "form": self.form}
        return options | {
            "chunk_size": self.chunk_size,
            "implementation": self.implementation,
            "pieces": self.pieces,
            "memory_every": self.memory_every,
        }

    @property
    def sizes(self):
        return self.batch, self.length, self.heads, self.key_size, self.value_size


def defined(rule, normalize, form, decay, beta, chunk_size=None, implementation=None, dtype="float32"):
    """Whether the operation has this combination; where it has not, it raises a ValueError."""
    rule = RULES[rule]
    if normalize not in rule.normalize or (rule.needs_beta and beta == "none"):
        return False
    if form == "parallel" and not rule.parallel:
        return False
    if form in ("chunkwise", "parallel") and decay == "channel" and not rule.decay_per_channel:
        return False
    if implementation == "pallas" and (rule.corrects is None or form not in (None, "chunkwise")):
        return False
    if implementation == "pallas" and (dtype == "float64" or chunk_size not in (None, 16, 32, 64, 128)):
        return False
    return chunk_size is None or form in (None, "chunkwise")


def pick(rng, weights):
    """One of the keys, with probabilities in proportion to the values."""
    probabilities = np.array(list(weights.values()))
    return list(weights)[rng.choice(len(weights), p=probabilities / np.sum(probabilities))]


def draw(rng):
    """A ``Call`` of what is defined, of unequal sizes. One in six is of a user's sizes, the others are small."""
    while True:
        large = rng.random() < 1 / 6
        call = _draw_any(rng, large)
        names = ("rule", "normalize", "form", "decay", "beta", "chunk_size", "implementation", "dtype")
        in_kernel = call.implementation == "pallas"
        tokens = call.batch * call.heads * call.length
        if (
            defined(**{name: getattr(call, name) for name in names})
            and len(set(call.sizes)) == 5
            and tokens <= (150 if in_kernel else 900)
            and not (call.packed and call.length == 1)
            and (call.pieces == 1 or has_pieces(call))
            # Kernels have no forward mode, and 64 bits are not theirs.
            and not (in_kernel and (call.x64 or call.asked in ("jvp", "jit jvp", "linearize")))
            # What β > 1 does to a rule whose recalled values are divided is to grow without bound.
            and not (call.normalize == "retrieval" and call.beta == "to two")
        ):
            return call


def has_pieces(call):
    rule = RULES[call.rule]
    return rule.piece is not None and (rule.decay_per_channel or call.decay != "channel") and call.memory_every is None


def _draw_any(rng, large):
    often = {"sum": 0.4, "delta": 0.3} if large else {"sum": 0.25, "delta": 0.3}
    rule = pick(rng, {name: 0.15 for name in RULES} | often)
    normalize = pick(rng, {False: 0.45, "read": 0.2, "retrieval": 0.35}) if len(RULES[rule].normalize) > 1 else False
    form = pick(rng, {None: 0.1, "recurrent": 0.3, "chunkwise": 0.35, "parallel": 0.25})
    dtype = pick(
        rng,
        {"float32": 0.6, "float64": 0.2, "bfloat16": 0.2}
        if not large
        else {"float32": 0.8, "float64": 0.1, "bfloat16": 0.1},
    )
    implementation = pick(rng, {None: 0.5, "xla": 0.1, "pallas": 0.4}) if form in (None, "chunkwise") else None
    asked = {"values": 0.1, "jit values": 0.2, "grad": 0.25, "jit grad": 0.2, "vjp": 0.05}
    asked = pick(rng, asked | {"jvp": 0.08, "jit jvp": 0.07, "linearize": 0.05})
    wrappers = _draw_wrappers(rng, large)
    batch, length, heads = 1 + rng.integers(2), 1 + rng.integers(40), 1 + rng.integers(3)
    key_size, value_size = 1 + rng.integers(16), 1 + rng.integers(12)
    if large:
        batch, length = 1, 64 + rng.integers(87)
        key_size, value_size = 32 + rng.integers(33), 16 + rng.integers(33)
        asked = pick(rng, {"jit values": 0.6, "jit grad": 0.3, "grad": 0.1})
    parts = {
        axis: math.prod(n for name, n, _ in wrappers if AXES[name] == axis) for axis in ("batch", "heads", "length")
    }
    length = max(1, length // parts["length"]) * parts["length"]
    chunk_size = None
    if form == "chunkwise" and rng.random() < 0.7:
        chunk_size = pick(rng, {1: 0.1, 2: 0.1, int(1 + rng.integers(length)): 0.4, 16: 0.1, 64: 0.2, 200: 0.1})
        chunk_size = pick(rng, {16: 0.5, 32: 0.5}) if implementation == "pallas" else chunk_size
        chunk_size = 64 if large and rng.random() < 0.6 else chunk_size
    pieces, memory_every = 1, None
    tokens = length // parts["length"]  # of one call
    if rng.random() < 0.2:
        pieces = int(1 + rng.integers(min(4, tokens)))
    if any(name == "shard_map" for name, *_ in wrappers):
        pieces = 1  # JAX's collectives over an axis of vmap fail an assertion in shard_map, unless check_vma=False
    if parts["length"] == 1 and rng.random() < 0.15:  # else the next call would begin with a sum of memories
        memory_every = int(1 + length // pick(rng, {1: 0.3, 2: 0.4, 3: 0.3}))
    start = rng.random() < 0.5
    names = ["query", "key", "value", "beta", "log_decay", *(MEMORY if start else ())]
    beta = pick(rng, {"none": 0.2, "one": 0.2, "to one": 0.4, "to two": 0.2})
    decay = pick(rng, {None: 0.2, "head": 0.2, "channel": 0.6} if large else {None: 0.3, "head": 0.3, "channel": 0.4})
    absent = {"beta" if beta == "none" else None, "log_decay" if decay is None else None}
    names = [name for name in names if name not in absent]
    kept = rng.permutation(names)[: 1 + rng.integers(len(names))]
    return Call(
        rule=rule,
        normalize=normalize,
        eps=pick(rng, {1e-6: 0.6, 0.0: 0.3, 1e-2: 0.1}) if normalize else 1e-6,
        form=form,
        chunk_size=chunk_size,
        implementation=implementation,
        decay=decay,
        decays=pick(rng, {"mild": 0.35, "strong": 0.15, "forgetting": 0.15, "mixed": 0.2, "rare": 0.15}),
        beta=beta,
        dtype=dtype,
        gates_dtype=pick(rng, {"float32": 0.5, dtype: 0.5}),
        x64=dtype == "float64" or rng.random() < 0.1,
        packed=rng.random() < 0.4,
        padded=rng.random() < 0.3,
        start=start,
        pieces=pieces,
        memory_every=memory_every,
        sparse=rng.random() < 0.3,
        batch=int(batch * parts["batch"]),
        length=int(length),
        heads=int(heads * parts["heads"]),
        key_size=int(key_size),
        value_size=int(value_size),
        wrappers=wrappers,
        asked=asked,
        moving=tuple(name for name in names if name in kept or rng.random() < 0.6),
        as_users=asked.startswith("jit") and rng.random() < (0.8 if large else 0.3),
    )


def _draw_wrappers(rng, large):
    names = {"jit": 0.3, "checkpoint": 0.15, "vmap of batch": 0.12, "vmap of heads": 0.12, "cond": 0.1, "scan": 0.1}
    names |= {"map": 0.06, "shard_map": 0.05}
    wrappers = []
    for _ in range(pick(rng, {0: 0.7, 1: 0.3} if large else {0: 0.2, 1: 0.4, 2: 0.25, 3: 0.15})):
        name = pick(rng, names)
        number = int(2 + rng.integers(2)) if AXES[name] else 1
        shared = ("query", "key", "value", "beta", "log_decay", *MEMORY)
        shared = tuple(x for x in shared if rng.random() < 0.1) if name.startswith("vmap") else ()
        if any(outer == "scan" for outer, *_ in wrappers):  # whose memories differ from part to part
            shared = tuple(x for x in shared if x not in MEMORY)
        wrappers.append((name, number, shared))
        if name in ("scan", "shard_map"):  # once is enough
            names.pop(name)
    return tuple(wrappers)


def random_arrays(call, rng):
    while True:
        arrays, context, *more = _draw_arrays(call, rng)
        if call.rule != "fwm" or not near_a_tie(arrays, context.get("segment_ids")):
            return arrays, context, *more


def _draw_arrays(call, rng):
    """Arrays by name in their dtypes, segment_ids and lengths by name, directions, and cotangents of the outputs."""
    batch, length, heads, key_size, value_size = call.sizes
    tokens, memory = (batch, length, heads), (batch, heads, key_size)

    def features():
        """Of length one, or of any length below."""
        x = rng.uniform(0.05, 1, (*tokens, key_size)) if call.normalize else rng.normal(size=(*tokens, key_size))
        if call.sparse and call.eps > 0:
            x *= (rng.random(x.shape) < 0.7) | (np.arange(call.key_size) == rng.integers(call.key_size))
        x /= np.linalg.norm(x, axis=-1, keepdims=True)
        return x * rng.uniform(0.1, 1, (*tokens, 1)) if rng.random() < 0.5 else x

    # A read that is divided does not depend on the β of a first write: its gradient is a difference of terms in 1/β.
    beta = {"one": np.ones(tokens), "to one": rng.uniform(0.05, 1, tokens), "to two": rng.uniform(0.05, 2, tokens)}
    value = rng.normal(size=(*tokens, value_size))
    if RULES[call.rule].unit_values:  # else the memory diverges
        value /= np.linalg.norm(value, axis=-1, keepdims=True)
    arrays = {
        "query": features(),
        "key": features(),
        "value": value,
        "beta": beta.get(call.beta),
        "log_decay": random_decays(call, rng),
        "fast_weights": rng.uniform(0.1, 1) * rng.normal(size=(*memory, value_size)) if call.start else None,
        "key_sum": rng.uniform(0.5, 1.5, memory) if call.start else None,
    }
    arrays = {name: x for name, x in arrays.items() if x is not None}
    wide = np.promote_types(call.dtype if call.dtype == "float64" else "float32", "float32")
    dtypes = dict.fromkeys(("beta", "log_decay"), call.gates_dtype) | dict.fromkeys(MEMORY, wide)

    def cast(name, x):
        return np.asarray(x, jnp.dtype(dtypes.get(name, call.dtype)))

    directions = {name: rng.normal(size=arrays[name].shape) for name in call.moving}
    if call.normalize == "retrieval" and "key" in directions:
        # A key without a feature is written in full where only that feature was left; with any of it, it is hardly
        # written at all. There is no derivative along that feature.
        directions["key"] *= arrays["key"] != 0
    for group in (arrays, directions):
        group |= {name: tie(call.wrappers, name, cast(name, x)) for name, x in group.items()}
    cotangents = [rng.normal(size=shape) for shape in ((*tokens, value_size), (*memory, value_size), memory)]
    cotangents = {name: cast(name, x) for name, x in zip(OUTPUTS, cotangents, strict=True)}

    changes = rng.random((batch, length)) < rng.choice([0.05, 0.3])
    parts = math.prod(number for name, number, _ in call.wrappers if name == "scan")
    changes[:, :: length // parts] = False  # the first token of a call continues the memory
    ids = (rng.integers(5) + np.cumsum(changes, axis=1, dtype=np.int32)) % 3
    context = {"segment_ids": ids.astype(np.int32)} if call.packed else {}
    if call.padded:
        context["lengths"] = rng.integers(length + 1, size=batch, dtype=np.int32)
    return arrays, context, directions, cotangents


def near_a_tie(arrays, segment_ids):
    """Whether a norm of the fwm rule is so near to one that float32 may not clip what float64 clips."""
    norms = []
    exact = {"beta": np.ones(arrays["key"].shape[:3])} | {name: np.float64(x) for name, x in arrays.items()}
    reference.batched(reference.attention, exact, segment_ids, rule="fwm", norms=norms)
    return np.min(np.abs(np.array(norms) - 1)) < 1e-5


def random_decays(call, rng):
    """log α: mild 0 to −1, strong −5 to −35, forgetting −40 to −1e4, tokens of all three, or rare strong ones."""
    if call.decay is None:
        return None
    shape = (call.batch, call.length, call.heads, *((call.key_size,) if call.decay == "channel" else ()))
    mild, strong = -rng.uniform(0, 1, shape) * (rng.random(shape) < 0.9), -rng.uniform(5, 35, shape)
    forgetting = -np.exp(rng.uniform(np.log(40), np.log(1e4), shape))
    if call.normalize == "retrieval":
        # Whether anything is left to retrieve is a matter of whether exp is zero: −745 in the float64 of the reference.
        # What is divided by 0 + what is left is a ratio, in float32 up to −87.
        least = 700 if call.eps else 75
        forgetting = np.where((forgetting < -least) & (forgetting > -1000), -least, forgetting)
    kinds = {"mild": mild, "strong": strong, "forgetting": forgetting}
    kinds["mixed"] = np.choose(rng.choice(3, shape, p=[0.7, 0.15, 0.15]), list(kinds.values()))
    kinds["rare"] = np.where(rng.random(shape) < 0.15, strong, 0.1 * mild)
    return kinds[call.decays]


# --- what is asked ---------------------------------------------------------------------------------------------------


def ask(call, function, arrays, context, directions, cotangents):
    """The outputs by name, and gradients by name or tangents of the outputs by name."""
    moving = {name: arrays[name] for name in call.moving}
    rest = {name: x for name, x in arrays.items() if name not in moving}

    def outputs(moving):
        return dict(zip(OUTPUTS, function(moving | rest, context), strict=True))

    def loss(moving):
        results = outputs(moving)
        return sum(jnp.sum(results[name].astype(c.dtype) * c) for name, c in cotangents.items()), results

    def gradient(moving):
        (_, results), gradients = jax.value_and_grad(loss, has_aux=True)(moving)
        return results, gradients

    def vjp(moving):
        results, pull = jax.vjp(outputs, moving)
        return results, pull(cotangents)[0]

    def linearize(moving):
        results, push = jax.linearize(outputs, moving)
        return results, push(directions)

    kinds = {"values": lambda moving: (outputs(moving), {}), "grad": gradient, "vjp": vjp, "linearize": linearize}
    kinds["jvp"] = lambda moving: jax.jvp(outputs, (moving,), (directions,))
    run = kinds[call.asked.removeprefix("jit ")]
    if call.asked.startswith("jit"):
        run = jax.jit(run, compiler_options=AS_USERS if call.as_users else None)
    return run(moving)


def run(call, rng, arrays, context, directions, cotangents):
    with jax.enable_x64(True) if call.x64 else contextlib.nullcontext():

        def on_device(tree):
            return jax.tree.map(jnp.asarray, tree)

        def function(arrays, context):
            y, *memory = attend(arrays, **(context or {}), **call.options)
            if call.memory_every is not None:
                memory = weighted(jnp.moveaxis(x, 1, 0) for x in memory)
            return y, *memory

        for name, parts, shared in reversed(call.wrappers):
            function = wrap(function, name, parts, shared, rng)
        inputs = on_device((arrays, context or None, directions, cotangents))
        results = ask(call, function, *inputs)
        return jax.tree.map(lambda x: np.asarray(x), results)


def weighted(memories):
    """For each array of several memories ``[N, ...]`` their sum, the i-th i times, so that their order shows."""
    return [sum((i + 1) * x[i] for i in range(len(x))) for x in memories]


# --- what is expected ------------------------------------------------------------------------------------------------


def errors(call, arrays, context, directions, cotangents, results, more):
    """Iterates over (what, error relative to the largest entry, tolerance)."""
    exact = {name: np.float64(x) for name, x in arrays.items()}
    directions = {name: np.float64(x) for name, x in directions.items()}
    options = {"rule": call.rule, "normalize": call.normalize, "eps": call.eps}
    options["segment_ids"] = context.get("segment_ids")
    lengths = context.get("lengths", np.full(call.batch, call.length))
    every = call.memory_every or call.length

    def outputs(arrays):
        arrays = {"beta": np.ones(arrays["key"].shape[:3])} | arrays
        memories = []
        for stop in (*range(every, call.length, every), call.length):
            stops = np.minimum(lengths, stop)
            y, *memory = reference.batched(reference.attention, arrays, lengths=stops, **options)
            memories.append(memory)
        return dict(zip(OUTPUTS, (y, *weighted(zip(*memories, strict=True))), strict=True))

    def per_head(x, name):
        """[B, T, H, ·], or for a memory [B, H, ·], -> [B, H]."""
        return np.sum(x, axis=tuple(axis for axis in range(1, x.ndim) if axis != axis_of(name, "heads")))

    want = outputs(exact)
    rtol, derivative_rtol = tolerances(call)

    def rounding(x):
        return 2 * float(jnp.finfo(x.dtype).eps)

    for name, x in want.items():
        scale = np.max(np.abs(x)) + 1e-3
        yield name, np.max(np.abs(np.float64(results[name]) - x)) / scale, rtol + rounding(results[name])
    if call.asked.endswith("values"):
        return
    if set(more) == set(OUTPUTS):
        moved = exact | {name: exact[name] + 1e-30j * direction for name, direction in directions.items()}
        for name, x in outputs(moved).items():
            tangent = np.imag(x) / 1e-30
            # A tangent may be a small difference, as a gradient below: that of a decay where reads are divided.
            scale = max(np.max(np.abs(tangent)), np.max(np.abs(want[name]))) + 1e-3
            error = np.max(np.abs(np.float64(more[name]) - tangent)) / scale
            yield f"tangent of {name}", error, derivative_rtol + rounding(more[name])
        return

    assert set(more) == set(call.moving)
    # A gradient may be a small difference of what each token's read contributes, as that of a decay, or as that of the
    # only query feature where reads are divided.
    through = np.sqrt(np.sum(np.sum(want["y"] * np.float64(cotangents["y"]), axis=-1) ** 2, axis=1))
    for name, direction in directions.items():

        def losses(arrays):
            return sum(per_head(x * np.float64(cotangents[name]), name) for name, x in outputs(arrays).items())

        derivative = reference.derivative_along(losses, exact, name, direction)
        gradient = np.float64(more[name])
        got, size = per_head(gradient * direction, name), np.sqrt(per_head(gradient**2, name))
        if any(name in shared for _, _, shared in call.wrappers):  # which part has it is not said
            derivative, got, size = (np.sum(x) for x in (derivative, got, size))
        scale = max(np.max(np.abs(derivative)), np.max(size), np.max(through)) + 1e-3
        yield f"gradient of {name}", np.max(np.abs(got - derivative)) / scale, derivative_rtol + rounding(more[name])


def tolerances(call):
    """Of outputs and of derivatives, relative to the largest entry, without the rounding to a dtype at the end.

    float64: 1e-9. Else float32, whatever the dtype of the inputs, which are rounded before they are passed: 2⁻²⁴ for
    each of a hundred operations in sequence, and sums over tokens in derivatives. Kernels multiply bfloat16 once.
    """
    if call.dtype == "float64":
        return 1e-9, 1e-9
    if (call.dtype, call.implementation) == ("bfloat16", "pallas"):
        return 4e-2, 8e-2
    return 5e-6, 2e-5


# --- the tests -------------------------------------------------------------------------------------------------------


def test_a_random_call_is_the_reference(seed, number):
    rng = np.random.default_rng([seed, number])
    call = draw(rng)
    again = f"--fuzz-seed {seed} --fuzz {number + 1} -k '[{seed}-{number}]'"
    print(f"{call}\nagain: python -m pytest tests/test_fuzz.py {again}")
    inputs = random_arrays(call, rng)
    measured = list(errors(call, *inputs, *run(call, rng, *inputs)))
    print(*(f"{what:>24}: {error:.1e} of {tolerance:.1e}" for what, error, tolerance in measured), sep="\n")
    assert not [what for what, error, tolerance in measured if not error <= tolerance]


def lacking(calls):
    """What no call has of what the calls of both runs are to have: every choice, and some programs."""
    lacks = {
        "rule": set(RULES),
        "normalize": {False, "read", "retrieval"},
        "form": {None, "recurrent", "chunkwise", "parallel"},
        "implementation": {"pallas"},
        "dtype": {"float32", "float64", "bfloat16"},
        "decays": {"mild", "strong", "forgetting", "mixed", "rare"},
        "asked": {"values", "jit values", "grad", "jit grad", "vjp", "jvp", "jit jvp", "linearize"},
        "packed": {True, False},
        "padded": {True, False},
        "start": {True, False},
        "wrapper": set(AXES),
        "program": {
            "gradient of jitted recurrent",
            "jitted sum with a decay per channel",
            "gradient of pieces",
            "several memories",
        },
    }
    for call in calls:
        wrappers = [name for name, *_ in call.wrappers]
        for name in wrappers:
            lacks["wrapper"].discard(name)
        for field in set(lacks) - {"wrapper", "program"}:
            lacks[field].discard(getattr(call, field))
        if call.form == "recurrent" and call.asked == "grad" and "jit" in wrappers:
            lacks["program"].discard("gradient of jitted recurrent")
        if call.pieces > 1 and "grad" in call.asked:
            lacks["program"].discard("gradient of pieces")
        if call.memory_every and call.memory_every < call.length:
            lacks["program"].discard("several memories")
        large = call.as_users and call.key_size >= 32 and call.length >= 128
        large &= call.form == "parallel" and not call.start
        if (call.rule, call.decay, call.asked, call.dtype) == ("sum", "channel", "jit values", "float32") and large:
            lacks["program"].discard("jitted sum with a decay per channel")
    return {field: left for field, left in lacks.items() if left}


def test_the_calls_of_the_default_and_the_exhaustive_run_have_every_choice():
    assert lacking(draw(np.random.default_rng([SEED, i])) for i in range(COUNT)) == {}


def test_what_is_not_defined_is_refused():
    """Of all combinations; those that are defined are drawn above."""
    x, gate = jnp.ones((1, 3, 2, 4)), jnp.ones((1, 3, 2))
    decays = {None: None, "head": -gate, "channel": -x}
    choices = {
        "rule": tuple(RULES),
        "normalize": (False, "read", "retrieval"),
        "form": (None, "recurrent", "chunkwise", "parallel"),
        "decay": decays,
        "beta": ("none", "one"),
        "chunk_size": (None, 3, 16),
        "implementation": (None, "xla", "pallas"),
    }
    refused = defined_ones = 0
    for combination in itertools.product(*choices.values()):
        options = dict(zip(choices, combination, strict=True))
        if not defined(**options):
            arrays = {"query": x, "key": x, "value": x, "log_decay": decays[options.pop("decay")]}
            arrays["beta"] = gate if options.pop("beta") == "one" else None
            with pytest.raises(ValueError, match=r"beta|form|rule|normalize|chunk_size|implementation"):
                attend(arrays, **options)
            refused += 1
        else:
            defined_ones += 1
    assert refused > defined_ones > 0
