"""Compiled ahead of time for TPUs that are not there: libtpu's compiler needs none (the extra ``tpu``)."""

import functools
import math
import os

import jax
import jax.numpy as jnp
import pytest
from cases import some
from flax import nnx
from jax.experimental import topologies
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import fwt_jax
from experiments.language import experiment as language_modeling
from experiments.language.presets import find
from experiments.run import training
from experiments.translation import experiment as translation
from experiments.translation import pairs as parallel_text
from experiments.translation import presets as translation_presets
from fwt_jax import sharding
from fwt_jax.layers import GatedDeltaNet
from fwt_jax.models import BlockConfig, DecoderLM, EncoderDecoder, HybridConfig, HybridLM, SwiGLU

pytest.importorskip("libtpu", reason="pip install -e '.[tpu]'")
pytestmark = pytest.mark.tpu_aot

COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")


def devices_of(topology):
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"  # do not ask a metadata server what machine this is
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # no TPU is used that several processes could quarrel about
    return topologies.get_topology_desc(topology, platform="tpu").devices


@functools.cache
def mesh(topology, shape=(2, 2)):
    devices = devices_of(topology)[: math.prod(shape)]
    return jax.make_mesh(shape, ("batch", "heads"), (AxisType.Auto, AxisType.Auto), devices=devices)


def compiled_text(function, inputs, mesh):
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # from which Pallas learns what TPU it is
        return jax.jit(function).lower(*inputs).compile().as_text()


@pytest.mark.parametrize(
    ("implementation", "topology", "gated_and_packed"),
    [
        ("pallas", "v6e:2x2", True),
        ("pallas", "tpu7x:2x2x1", True),
        ("xla", "v5e:2x2", True),  # plain JAX does not depend on which TPU it is
        pytest.param("pallas", "v5e:2x2", False, marks=pytest.mark.exhaustive),
        pytest.param("pallas", "v5p:2x2x1", True, marks=pytest.mark.exhaustive),
        pytest.param("pallas", "v5e:2x2", True, marks=pytest.mark.exhaustive),
        pytest.param("xla", "tpu7x:2x2x1", False, marks=pytest.mark.exhaustive),
    ],
)
def test_a_gradient_compiles_and_shards_do_not_communicate(implementation, topology, gated_and_packed):

    def both(query, key, value, beta, log_decay, segment_ids, weights):
        attention = functools.partial(
            fwt_jax.fast_weight_attention, segment_ids=segment_ids, implementation=implementation
        )
        reads, pull = jax.vjp(lambda *inputs: attention(*inputs)[0], query, key, value, beta, log_decay)
        return reads, pull(weights)

    def array(shape, dtype, spec):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh(topology), spec))

    tokens, per_head = (4, 200, 2), P("batch", None, "heads")
    query, value = (array((*tokens, size), jnp.bfloat16, per_head) for size in (128, 64))
    beta = array(tokens, jnp.float32, per_head)
    log_decay = beta if gated_and_packed else None
    segment_ids = array(tokens[:2], jnp.int32, P("batch")) if gated_and_packed else None
    inputs = (query, query, value, beta, log_decay, segment_ids, value)
    if implementation == "pallas":
        specs = jax.tree.map(lambda x: x.sharding.spec, inputs)
        out_specs = (per_head, (per_head, per_head, per_head, per_head, None if log_decay is None else per_head))
        both = jax.shard_map(both, mesh=mesh(topology), in_specs=specs, out_specs=out_specs)
    text = compiled_text(both, inputs, mesh(topology))
    assert "T(8,128)" in text  # the tiles of a TPU
    assert text.count("tpu_custom_call") >= 2 if implementation == "pallas" else "tpu_custom_call" not in text
    assert not [word for word in COLLECTIVES if word in text]


SPLIT = P(("data", "fsdp"), None, "tensor")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("axes", "spec", "kind", "is_kernel"),
    [
        ({"fsdp": 1}, P(), AxisType.Auto, True),  # one chip
        ({"fsdp": 2, "tensor": 2}, SPLIT, AxisType.Auto, True),
        ({"fsdp": 2, "tensor": 2}, SPLIT, AxisType.Explicit, True),
        ({"fsdp": 4}, SPLIT, AxisType.Auto, False),  # of two rows
        ({"sequence": 2, "fsdp": 2}, P("fsdp", "sequence"), AxisType.Auto, False),
        ({"sequence": 4}, P(None, "sequence"), AxisType.Auto, False),  # in a partial shard_map of the operation
    ],
    ids=str,
)
def test_a_kernel_is_the_default_where_a_mesh_splits_rows_and_heads_alone(axes, spec, kind, is_kernel):
    mesh = sharding.make_mesh(**axes, devices=devices_of("v5e:2x2")[: math.prod(axes.values())])
    mesh = jax.sharding.Mesh(mesh.devices, mesh.axis_names, axis_types=(kind,) * 4)

    def gradient(*inputs):
        attention = functools.partial(fwt_jax.fast_weight_attention, sequence_axis=sequence_axis)
        reads, pull = jax.vjp(lambda *inputs: attention(*inputs)[0], *inputs)
        return pull(reads)

    sequence_axis = "sequence" if axes == {"sequence": 4} else None
    rows = P() if axes == {"fsdp": 4} else spec
    shapes = ((2, 40, 2, 16),) * 2 + ((2, 40, 4, 16), (2, 40, 4))
    inputs = [jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, rows)) for shape in shapes]
    with jax.set_mesh(mesh):
        text = jax.jit(gradient).lower(*inputs).compile().as_text()
    assert ("tpu_custom_call" in text) == is_kernel
    assert not is_kernel or not [word for word in COLLECTIVES if word in text]


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["xla", "pallas"])
def test_gradients_are_added_up_where_values_alone_are_sharded(implementation):

    def both(query, key, value, beta):
        attention = functools.partial(fwt_jax.fast_weight_attention, implementation=implementation)
        reads, pull = jax.vjp(lambda *inputs: attention(*inputs)[0], query, key, value, beta)
        return reads, pull(reads)

    two = mesh("v5e:2x2", (1, 2))
    specs = (P(), P(), P(None, None, None, "heads"), P())
    mapped = jax.shard_map(both, mesh=two, in_specs=specs, out_specs=(specs[2], specs))
    shapes = ((1, 40, 1, 64),) * 3 + ((1, 40, 1),)
    inputs = [
        jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(two, spec))
        for shape, spec in zip(shapes, specs, strict=True)
    ]
    assert "all-reduce" in compiled_text(mapped, inputs, two)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("key_size", "value_size", "dtype", "matmul_precision"),
    [
        (512, 512, "bfloat16", None),
        (24, 40, "bfloat16", "highest"),
        (512, 128, "float32", None),
        (64, 256, "float32", None),
        pytest.param(256, 256, "bfloat16", None, marks=pytest.mark.exhaustive),
        pytest.param(24, 40, "bfloat16", None, marks=pytest.mark.exhaustive),
        pytest.param(256, 256, "float32", None, marks=pytest.mark.exhaustive),
        pytest.param(64, 256, "float32", "highest", marks=pytest.mark.exhaustive),
    ],
)
def test_kernels_compile_for_other_sizes_an_odd_number_of_heads_and_whatever_jax_is_configured_to(
    key_size, value_size, dtype, matmul_precision
):

    def both(query, value, beta):
        attention = functools.partial(fwt_jax.fast_weight_attention, implementation="pallas")
        return jax.vjp(lambda *inputs: attention(*inputs)[0], query, query, value, beta)[1](value)

    one = mesh("v5e:2x2", (1, 1))
    shapes = (1, 300, 3, key_size), (1, 300, 3, value_size), (1, 300, 3)
    inputs = [jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(one, P())) for shape in shapes]
    with jax.default_matmul_precision(matmul_precision):
        assert compiled_text(both, inputs, one).count("tpu_custom_call") >= 2


@pytest.mark.exhaustive
def test_a_group_of_more_value_heads_than_a_step_interleaves_fits_in_vmem():

    def gradient(*inputs):
        attention = functools.partial(fwt_jax.fast_weight_attention, implementation="pallas")
        reads, pull = jax.vjp(lambda *inputs: attention(*inputs)[0], *inputs)
        return pull(reads)

    one = mesh("v5e:2x2", (1, 1))
    key, value = (jax.ShapeDtypeStruct((1, 300, heads, 256), jnp.bfloat16) for heads in (1, 16))
    beta, log_decay = (jax.ShapeDtypeStruct((1, 300, 16, *size), jnp.float32) for size in ((), (256,)))
    inputs = [x.update(sharding=NamedSharding(one, P())) for x in (key, key, value, beta, log_decay)]
    assert compiled_text(gradient, inputs, one).count("tpu_custom_call") >= 2


@pytest.mark.exhaustive
@pytest.mark.parametrize("decay", [(), (64,)], ids=["head", "channel"])
@pytest.mark.parametrize("tensor", [2, 4])
def test_value_heads_share_the_queries_and_keys_of_a_chip(decay, tensor):
    """Of 2 key heads and 8 value heads. Four chips split the value heads alone, so each has its own copy of a key."""
    mesh = sharding.make_mesh(fsdp=4 // tensor, tensor=tensor, devices=devices_of("v5e:2x2"))

    def gradient(*inputs):
        reads, pull = jax.vjp(lambda *inputs: fwt_jax.fast_weight_attention(*inputs)[0], *inputs)
        return pull(reads)

    by_head = NamedSharding(mesh, SPLIT)
    of_keys = by_head if tensor == 2 else NamedSharding(mesh, P(SPLIT[0]))
    shapes = [(2, 256, heads, *size) for heads, size in ((2, (64,)), (2, (64,)), (8, (64,)), (8, ()), (8, decay))]
    kinds = [(jnp.bfloat16, of_keys)] * 2 + [(jnp.bfloat16, by_head)] + [(jnp.float32, by_head)] * 2
    inputs = [
        jax.ShapeDtypeStruct(shape, dtype, sharding=kind) for shape, (dtype, kind) in zip(shapes, kinds, strict=True)
    ]
    with jax.set_mesh(mesh):
        text = jax.jit(gradient).lower(*inputs).compile().as_text()
    assert text.count("tpu_custom_call") >= 2
    if tensor == 2:
        assert not [word for word in COLLECTIVES if word in text]


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    some(
        4,
        [
            ("v5e:2x2", 8, 512, 128, "float32"),
            ("v5e:2x2", 8, 128, 128, "float32"),
            ("tpu7x:2x2x1", 12, 256, 256, "bfloat16"),
            ("tpu7x:2x2x1", 8, 256, 128, "float32"),
        ],
    ),
    ids=str,
)
def test_kernels_with_a_decay_per_channel_fit_on_the_chip(case):
    topology, heads, key_size, value_size, dtype = case

    def gradient(query, value, beta, log_decay):
        attention = functools.partial(fwt_jax.fast_weight_attention, log_decay=log_decay, implementation="pallas")
        return jax.vjp(lambda *inputs: attention(*inputs)[0], query, query, value, beta)[1](value)

    one = mesh(topology, (1, 1))
    shapes = [(1, 256, heads, *size) for size in ((key_size,), (value_size,), (), (key_size,))]
    dtypes = (dtype, dtype, jnp.float32, jnp.float32)
    inputs = [
        jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(one, P()))
        for shape, dtype in zip(shapes, dtypes, strict=True)
    ]
    assert compiled_text(gradient, inputs, one).count("tpu_custom_call") >= 2


def memory_of_a_train_step(make, loss, settings, batch, topology, axes):
    """Compiles a whole step for TPUs. With -s, its bytes and FLOPs are seen."""
    mesh = sharding.make_mesh(**axes, devices=devices_of(topology))

    def placed(tree, shardings):
        return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)

    state = jax.eval_shape(lambda: training.initial_state(make, settings))._asdict()
    state = training.State(**placed(state, sharding.partition(mesh, state)))
    step = training.make_step(training.graph_of(make), loss, settings)
    with jax.set_mesh(mesh):
        batch = placed(batch, sharding.batch_partition(mesh, batch))
        compiled = jax.jit(step, donate_argnums=0).lower(state, batch).compile()
    memory = compiled.memory_analysis()
    peak = memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.output_size_in_bytes
    peak -= memory.alias_size_in_bytes
    flops = compiled.cost_analysis()["flops"]
    print(f"{topology} {dict(mesh.shape)}: {peak / 2**20:.0f} MiB and {flops / 1e9:.0f} GFLOP a chip")
    assert memory.alias_size_in_bytes > 0.9 * memory.output_size_in_bytes  # the state is updated in place
    return peak


@pytest.mark.exhaustive  # minutes of compiling
@pytest.mark.parametrize(
    ("topology", "axes", "gigabytes"),
    [("v5e:4x4", {"fsdp": 4, "tensor": 2}, 16), ("v5p:2x2x2", {"fsdp": 4}, 95)],
    ids=["v5e 4x4", "v5p 2x2x2"],
)
def test_the_train_step_of_the_medium_model_fits(topology, axes, gigabytes):
    """Table 2, medium, delta rule: 56 x 384 tokens a step."""
    preset = find("medium-delta")
    tokens = jax.ShapeDtypeStruct((preset.batch_size, preset.length), jnp.int32)
    batch = {"tokens": tokens, "targets": tokens, "start": jax.ShapeDtypeStruct((), bool)}

    def make():
        return DecoderLM(preset.model, rngs=nnx.Rngs(0))

    peak = memory_of_a_train_step(make, language_modeling.loss, preset.training, batch, topology, axes)
    assert peak < gigabytes * 2**30


@pytest.mark.exhaustive  # minutes of compiling
@pytest.mark.parametrize(
    ("topology", "rows", "gigabytes"), [("v5e:4x4", 16, 16), ("v5p:2x2x2", 32, 95)], ids=["v5e 4x4", "v5p 2x2x2"]
)
def test_the_train_step_of_a_gated_deltanet_of_1_3_billion_fits(topology, rows, gigabytes):
    """The sizes of fla's GatedDeltaNetConfig, AdamW, bfloat16 with float32 parameters: rows of 4,096 tokens a step."""
    make_mixer = functools.partial(GatedDeltaNet, num_heads=6, head_size=256, value_size=512)
    block = BlockConfig(make_mixer, functools.partial(SwiGLU, d_ff=5632))
    config = HybridConfig(32_000, 2048, (block,) * 21, dtype="bfloat16", remat=True)
    settings = training.TrainConfig(weight_decay=0.1)
    tokens = jax.ShapeDtypeStruct((rows, 4096), jnp.int32)

    def make():
        return HybridLM(config, rngs=nnx.Rngs(0))

    chips = {"fsdp": 16 if topology == "v5e:4x4" else 8}
    batch = {"tokens": tokens, "targets": tokens}
    peak = memory_of_a_train_step(make, language_modeling.loss, settings, batch, topology, chips)
    assert peak < gigabytes * 2**30


@pytest.mark.exhaustive  # minutes of compiling
@pytest.mark.parametrize("name", ["big-softmax", "big-dpfp-4"])
def test_the_train_step_of_the_big_translation_model_fits(name):
    """Table 1: 16 parts of 3 x 3584 tokens a step, here in sentences of 48."""
    size, model = translation_presets.find(name)
    tokens = jax.ShapeDtypeStruct((parallel_text.rows_of(48, size.tokens, 16 * 16), 48), jnp.int32)
    loss = functools.partial(translation.loss, size.label_smoothing)

    def make():
        return EncoderDecoder(model, rngs=nnx.Rngs(0))

    batch = {"source": tokens, "target": tokens}
    peak = memory_of_a_train_step(make, loss, size.training, batch, "v5e:4x4", {"fsdp": 4, "tensor": 2})
    assert peak < 16 * 2**30
