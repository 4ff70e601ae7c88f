"""Memories after every N tokens, ``memory_every``: what a prefix cache stores."""

import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from cases import DECAYS, NORMALIZED_RULES, Case, attend, random_inputs, random_segments, row_lengths, some
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

LENGTH = 19
FORMS = [("recurrent", None), ("chunkwise", None), ("parallel", None), ("chunkwise", 3)]


def mixed_cases():
    """Every rule with each normalisation and decay, in forms and contexts that take turns."""
    for i, ((rule, normalize), decay) in enumerate(itertools.product(NORMALIZED_RULES, DECAYS)):
        form, chunk_size = FORMS[i % 4]
        case = Case(rule, normalize, decay, form, chunk_size, LENGTH, i % 2 == 0, i % 3 == 0, i % 5 < 2)
        yield case if case.defined else Case(rule, normalize, decay, None, None, LENGTH, True, True)


@pytest.mark.parametrize("case", some(3, list(mixed_cases())), ids=str)
def test_the_memories_are_those_of_calls_that_end_there(case, x64):
    """Against the reference, after 8, 16 and 19 tokens, or where a padded row ends before."""
    arrays, ids, lengths = random_inputs(case), random_segments(LENGTH), row_lengths(case)
    context = {"segment_ids": ids if case.packed else None}
    y, *memories = jax.jit(functools.partial(attend, lengths=lengths, memory_every=8, **context, **case.options))(
        arrays
    )
    options = {"rule": case.rule, "normalize": case.normalize, **context}
    lengths = np.full(2, LENGTH) if lengths is None else lengths
    for i, stop in enumerate((8, 16, LENGTH)):
        want_y, *want = reference.batched(reference.attention, arrays, lengths=np.minimum(lengths, stop), **options)
        chex.assert_trees_all_close([x[:, i] for x in memories], want, rtol=1e-9, atol=1e-9)
    chex.assert_trees_all_close(y, want_y, rtol=1e-9, atol=1e-9)


GRADIENTS = [
    {"rule": "sum", "form": "recurrent", "normalize": "read"},
    {"rule": "delta", "form": "chunkwise", "chunk_size": 4, "normalize": "retrieval"},
    {"rule": "fwm", "form": "chunkwise"},
]


@pytest.mark.exhaustive
@pytest.mark.parametrize("options", GRADIENTS, ids=str)
def test_their_gradients_are_those_of_one_call_after_the_other(options, x64):
    case = Case(normalize=options.get("normalize", False), decay="head", length=LENGTH, start=True)
    arrays = {name: jnp.asarray(x) for name, x in random_inputs(case).items()}

    def at_once(arrays):
        return attend(arrays, memory_every=8, **options)

    def one_by_one(arrays):
        memory, outputs = {name: arrays.pop(name) for name in ("fast_weights", "key_sum")}, []
        for start in range(0, LENGTH, 8):
            outputs.append(attend({name: x[:, start : start + 8] for name, x in arrays.items()} | memory, **options))
            memory = dict(zip(memory, outputs[-1][1:], strict=True))
        y, *memories = zip(*outputs, strict=True)
        return jnp.concatenate(y, axis=1), *(jnp.stack(x, axis=1) for x in memories)

    def gradient(function):
        def loss(arrays):
            outputs = function(dict(arrays))
            return sum(jnp.sum(jnp.sin((i + 1) * x)) for i, x in enumerate(outputs)), outputs

        return jax.grad(loss, has_aux=True)(arrays)

    got, want = jax.jit(lambda: (gradient(at_once), gradient(one_by_one)))()
    chex.assert_trees_all_close(got, want, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("options", some(3, [{}, {"implementation": "pallas"}, {"implementation": "triton"}]), ids=str)
def test_memories_of_a_shard_and_of_a_kernel(options):
    """β is replicated beside keys that are sharded, so the memory has to become sharded before its first stretch."""
    if options.get("implementation") == "triton":
        pytest.importorskip("jax_triton")
    arrays = random_inputs(Case(length=LENGTH))
    tokens = {name: jnp.asarray(arrays[name], jnp.float32) for name in ("query", "key", "value")}

    def run(tokens, **options):
        beta = jnp.full(tokens["key"].shape[:3], 0.5)
        return attend(tokens | {"beta": beta}, memory_every=16, **options)

    mesh = jax.make_mesh((2,), ("batch",), (AxisType.Auto,), devices=jax.devices()[:2])
    sharded = jax.shard_map(functools.partial(run, **options), mesh=mesh, in_specs=P("batch"), out_specs=P("batch"))
    want = jax.jit(functools.partial(run, form="recurrent"))(tokens)
    chex.assert_trees_all_close(jax.jit(sharded)(tokens), want, rtol=1e-5, atol=1e-5)
