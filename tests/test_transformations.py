"""What JAX people will do to the attention: jit, vmap, grad, checkpoint, jvp, second derivatives and shards."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import Case, attend, random_inputs, some
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from wrappers import MEMORY, wrap

import fwt_jax
from fwt_jax import recurrent

# Most are left to -m exhaustive: tests/test_fuzz.py draws a rule, a form and transformations for each of its calls.
FORMS = [
    {"rule": "delta", "form": "recurrent"},
    {"rule": "delta", "form": "chunkwise"},
    {"rule": "fwm", "form": "chunkwise", "chunk_size": 3},
    {"rule": "delta", "form": "chunkwise", "chunk_size": 4, "normalize": "retrieval"},
    {"rule": "sum", "form": "parallel", "normalize": "read"},
]
EVERY_FORM = [
    {"rule": "delta", "form": "chunkwise"},
    {"rule": "sum", "form": "recurrent"},
    {"rule": "sum", "form": "chunkwise"},
    {"rule": "fwm", "form": "chunkwise"},
    {"rule": "fwm", "form": "recurrent"},
    {"rule": "sum", "form": "parallel"},
    {"rule": "delta", "form": "recurrent"},
    {"rule": "delta", "form": "parallel"},
]


def names(options):
    return "-".join(map(str, options.values()))


some_forms = pytest.mark.parametrize("options", some(3, FORMS), ids=names)


def float64_inputs(options, length=10, **kwargs):
    case = Case(normalize=options.get("normalize", False), decay="head", length=length, start=True)
    return {name: jnp.asarray(x) for name, x in random_inputs(case, **kwargs).items()}


def like(outputs, seed=1):
    """A random cotangent for every entry, so that no entry passes for another."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), outputs)


def weighted(outputs, weights):
    return sum(jnp.sum(x * weight) for x, weight in zip(*map(jax.tree.leaves, (outputs, weights)), strict=True))


def loss(arrays, options):
    outputs = attend(arrays, **options)
    return weighted(outputs, like(outputs))


def value_and_gradient(attention, arrays):
    """Outputs and gradients of a loss outside of what wraps the attention."""

    def loss(arrays):
        outputs = attention(arrays, None)
        return weighted(outputs, like(outputs)), outputs

    return jax.grad(loss, has_aux=True)(arrays)


@pytest.mark.parametrize("wrapper", [jax.jit, jax.checkpoint])
def test_a_derivative_program_may_leave_the_axis_of_a_vmap_elsewhere(wrapper):
    """Transposing puts the axis in front, adding leaves it at the end, and JAX takes either for the other's."""
    rng = np.random.default_rng(0)
    x, weights = (rng.normal(size=shape).astype(np.float32) for shape in ((2, 3, 4), (4, 2, 3)))
    identity = wrapper(recurrent.with_derivatives_of(lambda x: x + 0, lambda x: x.T.T))

    def loss(x):
        y = jax.vmap(identity, in_axes=-1)(x)
        return jnp.sum(weights * y), y

    gradient, y = jax.grad(loss, has_aux=True)(x)
    np.testing.assert_array_equal(y, np.moveaxis(x, -1, 0))
    np.testing.assert_array_equal(gradient, np.moveaxis(weights, 0, -1))


@pytest.mark.slow
@pytest.mark.parametrize("options", some(4, EVERY_FORM), ids=names)
def test_no_wrapper_changes_values_gradients_or_tangents(options, x64):
    arrays, directions = (float64_inputs(options, length=14, seed=seed) for seed in (0, 4))

    def attention(arrays, context):
        return attend(arrays, **options)

    def push(f):
        return jax.jvp(lambda arrays: f(arrays, None), (arrays,), (directions,))

    wrapped = {name: wrap(attention, name) for name in ("jit", "checkpoint", "scan", "cond", "shard_map")}

    want = jax.jit(functools.partial(value_and_gradient, attention))(arrays), jax.jit(lambda: push(attention))()
    got = jax.jit(lambda arrays: {name: value_and_gradient(f, arrays) for name, f in wrapped.items()})(arrays)
    for name in wrapped:
        chex.assert_trees_all_close({name: got[name]}, {name: want[0]}, rtol=1e-10, atol=1e-11)
    chex.assert_trees_all_close(push(wrapped["jit"]), want[1], rtol=1e-10, atol=1e-11)


@pytest.mark.exhaustive
@pytest.mark.parametrize("options", FORMS, ids=names)
def test_jit_and_vmap_change_nothing(options, x64):
    arrays = float64_inputs(options)
    gradient = jax.grad(lambda arrays: loss(arrays, options))

    def run(arrays):
        return (attend(arrays, **options), gradient(arrays))

    want = jax.jit(run)(arrays)
    if options["form"] == "recurrent":
        chex.assert_trees_all_close(attend(arrays, **options), want[0], rtol=1e-11, atol=1e-12)

    pair = jax.tree.map(lambda x, y: jnp.stack([y, x]), arrays, float64_inputs(options, seed=3))
    both = jax.jit(jax.vmap(run))(pair)
    chex.assert_trees_all_close(jax.tree.map(lambda x: x[1], both), want, rtol=1e-11, atol=1e-12)


@pytest.mark.slow
@some_forms
def test_forward_mode_is_reverse_mode_and_second_derivatives_are_differences_of_first(options, x64):
    arrays, direction = float64_inputs(options), float64_inputs(options, seed=4)
    gradient = jax.jit(jax.grad(lambda arrays: loss(arrays, options)))

    _, forward = jax.jit(lambda x, v: jax.jvp(lambda x: loss(x, options), (x,), (v,)))(arrays, direction)
    reverse = sum(jnp.vdot(gradient(arrays)[name], direction[name]) for name in arrays)
    chex.assert_trees_all_close(forward, reverse, rtol=1e-10)

    product = jax.jit(lambda x, v: jax.jvp(jax.grad(lambda x: loss(x, options)), (x,), (v,))[1])(arrays, direction)
    step = 1e-5
    ahead, behind = (
        gradient(jax.tree.map(lambda x, v, sign=sign: x + sign * step * v, arrays, direction)) for sign in (1, -1)
    )
    differences = jax.tree.map(lambda a, b: (a - b) / (2 * step), ahead, behind)
    for name in arrays:  # the error of a central difference is of the order step²
        scale = jnp.max(jnp.abs(differences[name]))
        chex.assert_trees_all_close(product[name], differences[name], rtol=0, atol=1e-6 * float(scale) + 1e-12)


@pytest.mark.slow
@some_forms
def test_shards_of_the_batch_and_of_the_heads_give_the_same_numbers(options, x64):
    """jit with sharded arguments, and shard_map, on a mesh of four by two devices, with gradients."""
    packed = options["rule"] != "delta"  # else from an empty memory
    case = Case(normalize=options.get("normalize", False), decay="head", length=6, start=packed)
    arrays = {name: jnp.asarray(x) for name, x in random_inputs(case).items() if x is not None}
    two_heads = {name: x[:, :2] if name in MEMORY else x[:, :, :2] for name, x in arrays.items()}
    arrays = {name: jnp.concatenate([x, 0.5 * x]) for name, x in two_heads.items()}
    weights = like(jax.eval_shape(lambda arrays: attend(arrays, **options), arrays))
    segment_ids = jnp.broadcast_to(jnp.arange(6)[None] // 4, (4, 6)) if packed else None

    def run(arrays, weights, segment_ids):
        def losses(arrays):
            outputs = attend(arrays, segment_ids=segment_ids, **options)
            return weighted(outputs, weights), outputs

        gradients, outputs = jax.grad(losses, has_aux=True)(arrays)
        return outputs, gradients

    want = jax.jit(run)(arrays, weights, segment_ids)
    mesh = jax.make_mesh((4, 2), ("batch", "heads"), axis_types=(AxisType.Auto, AxisType.Auto))
    tokens, memory = P("batch", None, "heads"), P("batch", "heads")
    specs = {name: memory if name in MEMORY else tokens for name in arrays}
    in_specs = (specs, (tokens, memory, memory), P("batch") if packed else None)
    inputs = (arrays, weights, segment_ids)
    placed = jax.tree.map(lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)), inputs, in_specs)
    chex.assert_trees_all_close(jax.jit(run)(*placed), want, rtol=1e-10, atol=1e-12)
    out_specs = ((tokens, memory, memory), specs)
    mapped = jax.shard_map(run, mesh=mesh, in_specs=in_specs, out_specs=out_specs)
    chex.assert_trees_all_close(jax.jit(mapped)(*inputs), want, rtol=1e-10, atol=1e-12)


@pytest.mark.slow
def test_kernels_bear_vmap_and_checkpoint_and_derivatives_of_their_gradient():
    x = jnp.asarray(np.random.default_rng(0).random((3, 2, 20, 4, 8)), jnp.float32)

    def attention(x, implementation):
        beta = jnp.full(x.shape[:3], 0.5)
        return fwt_jax.fast_weight_attention(x, x, x[..., :5], beta, implementation=implementation)[0]

    def gradient(x, implementation):
        checkpointed = jax.checkpoint(functools.partial(attention, implementation=implementation))
        return jax.grad(lambda x: weighted(checkpointed(x), like(x[..., :5])))(x)

    for function in (attention, gradient):
        got, want = (jax.jit(jax.vmap(functools.partial(function, implementation=i)))(x) for i in ("pallas", "xla"))
        chex.assert_trees_all_close(got, want, rtol=1e-5, atol=1e-5)
    got, want = (jax.jit(jax.grad(lambda x, i=i: jnp.sum(jnp.sin(gradient(x, i)))))(x[0]) for i in ("pallas", "xla"))
    chex.assert_trees_all_close(got, want, rtol=1e-5, atol=1e-5)


def test_what_a_kernel_keeps_for_its_gradient_has_a_name_for_checkpoint():
    """With it, the gradient runs no forward kernel again."""
    x = jnp.ones((1, 20, 2, 8))

    def loss(x):
        attention = functools.partial(fwt_jax.fast_weight_attention, implementation="pallas")
        return jnp.sum(jnp.sin(attention(x, x, x, x[..., 0])[0]))

    def count(policy):
        program = str(jax.make_jaxpr(jax.grad(jax.checkpoint(loss, policy=policy)))(x))
        return program.count("name=fast_weight_attention\n"), program.count("name=fast_weight_attention_gradient\n")

    keep = jax.checkpoint_policies.save_only_these_names("fast_weight_residuals")
    assert count(None)[1] == count(keep)[1] > 0 and count(None)[0] > count(keep)[0]


def constants_and(x, weights, segment_ids, options, start=True):
    """Gradient and outputs where β = 1/2 and an empty memory are made within."""

    def loss(x):
        memory = fwt_jax.init_memory(len(x), x.shape[2], 8, 5) if start else None
        inputs = x, x, x[..., :5], jnp.full(x.shape[:3], 0.5)
        outputs = fwt_jax.fast_weight_attention(*inputs, memory=memory, segment_ids=segment_ids, **options)
        return weighted(outputs, weights), outputs[0]

    return jax.grad(loss, has_aux=True)(x)


def sharded_inputs(axis_type):
    mesh = jax.make_mesh((4, 2), ("batch", "heads"), axis_types=(axis_type, axis_type))
    x = jnp.asarray(np.random.default_rng(0).random((4, 6, 2, 8)), jnp.float32)
    segment_ids = jnp.broadcast_to(jnp.arange(6)[None] // 4, (4, 6))
    weights = like((x[..., :5], fwt_jax.init_memory(4, 2, 8, 5)))
    tokens, memory = P("batch", None, "heads"), P("batch", "heads")
    inputs, specs = (x, weights, segment_ids), (tokens, (tokens, fwt_jax.Memory(memory, memory)), P("batch"))
    placed = jax.tree.map(lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)), inputs, specs)
    return mesh, specs, inputs, placed


@pytest.mark.slow
@pytest.mark.parametrize("start", some(2, [False, True]), ids=["no memory", "empty memory"])
@pytest.mark.parametrize("options", some(4, [{"implementation": "pallas"}, *FORMS]), ids=str)
def test_constants_may_be_made_in_shard_map(options, start):
    mesh, specs, inputs, _ = sharded_inputs(AxisType.Auto)
    run = functools.partial(constants_and, options=options, start=start)
    mapped = jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=(specs[0], specs[0]))
    chex.assert_trees_all_close(jax.jit(mapped)(*inputs), jax.jit(run)(*inputs), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("start", some(2, [True, False]), ids=["empty memory", "no memory"])
@some_forms
def test_meshes_of_explicit_axes_keep_their_sharding(options, start):
    mesh, _, inputs, placed = sharded_inputs(AxisType.Explicit)
    run = functools.partial(constants_and, options=options, start=start)
    with jax.set_mesh(mesh):
        gradient, out = jax.jit(run)(*placed)
    chex.assert_trees_all_close((gradient, out), jax.jit(run)(*inputs), rtol=1e-5, atol=1e-5)
    for x in (gradient, out):
        assert x.sharding.is_equivalent_to(placed[0].sharding, 4)


@jax.jit
def in_chunks_of_four(arrays):
    return attend(arrays, form="chunkwise", chunk_size=4)


MESH_ARGUMENTS = ("query", "key", "value", "beta", "log_decay", "segment_ids", "lengths")


@pytest.mark.parametrize(
    "names", [MESH_ARGUMENTS[i : i + 1] for i in (0, 2, 5, 6)] + [("segment_ids", "key_sum")], ids=str
)
@pytest.mark.parametrize("replicated", some(2, [True, False]))
def test_arguments_may_be_replicated_beside_others_that_are_sharded(replicated, names):
    """On a mesh of explicit axes these, or all but these, have no sharding of their own."""
    mesh = jax.make_mesh((4, 2), ("batch", "heads"), axis_types=(AxisType.Explicit, AxisType.Explicit))
    arrays = random_inputs(Case(decay="channel", length=6, start=True))
    batch = {
        name: np.concatenate([x, x])[:, :, :2] for name, x in arrays.items() if name not in ("fast_weights", "key_sum")
    }
    memory = {name: np.concatenate([arrays[name]] * 2)[:, :2] for name in ("fast_weights", "key_sum")}
    arrays = {name: np.float32(x) for name, x in (batch | memory).items()}
    arrays["segment_ids"] = np.broadcast_to(np.arange(6)[None] // 4, (4, 6)).astype(np.int32)
    arrays["lengths"] = np.array([6, 0, 5, 3], np.int32)

    def place(name, x):
        heads = {"segment_ids": (), "lengths": (), "fast_weights": ("heads",), "key_sum": ("heads",)}.get(
            name, (None, "heads")
        )
        spec = P() if (name in names) == replicated else P("batch", *heads)
        return jax.device_put(x, NamedSharding(mesh, spec))

    with jax.set_mesh(mesh):
        got = in_chunks_of_four({name: place(name, x) for name, x in arrays.items()})
    chex.assert_trees_all_close(got, in_chunks_of_four(arrays), rtol=1e-5, atol=1e-6)


def test_a_shard_of_the_batch_does_not_gather_the_others():
    """Sequences and heads are independent: sharded over them, the program has no communication."""
    mesh = jax.make_mesh((4, 2), ("batch", "heads"), axis_types=(AxisType.Auto, AxisType.Auto))
    sharding = NamedSharding(mesh, P("batch", None, "heads"))
    x, beta = (jax.device_put(jnp.ones((4, 10, 2, *size)), sharding) for size in ((8,), ()))
    compiled = (
        jax.jit(lambda x, beta: fwt_jax.fast_weight_attention(x, x, x, beta, chunk_size=4)).lower(x, beta).compile()
    )
    text = compiled.as_text()
    assert not [word for word in ("all-gather", "all-reduce", "all-to-all", "collective-permute") if word in text]
    assert compiled(x, beta)[0].sharding.is_equivalent_to(sharding, 4)


def test_a_memory_is_a_tree_that_passes_through_scan():
    """Token by token under lax.scan, the memory being the carry, is the whole sequence at once."""
    arrays = {name: jnp.asarray(x, jnp.float32) for name, x in random_inputs(Case(length=6)).items() if x is not None}
    want, *_ = attend(arrays, form="recurrent")

    def step(memory, token):
        out, memory = fwt_jax.fast_weight_attention(
            **jax.tree.map(lambda x: x[:, None], token), memory=memory, form="recurrent"
        )
        return memory, out[:, 0]

    tokens = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), arrays)
    _, out = jax.lax.scan(step, fwt_jax.init_memory(2, 3, 8, 5), tokens)
    chex.assert_trees_all_close(jnp.moveaxis(out, 0, 1), want, rtol=1e-5, atol=1e-6)
    assert np.all(np.isfinite(out))
