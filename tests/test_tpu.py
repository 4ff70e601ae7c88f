"""Compiled ahead of time for TPUs that are not there: libtpu's compiler needs none (the extra ``tpu``)."""

import functools
import os

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import fwt_jax

pytest.importorskip("libtpu", reason="pip install -e '.[tpu]'")
pytestmark = pytest.mark.tpu_aot

COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")


@functools.cache
def mesh(topology):
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"  # do not ask a metadata server what machine this is
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # no TPU is used that several processes could quarrel about
    devices = topologies.get_topology_desc(topology, platform="tpu").devices[:4]
    return jax.make_mesh((2, 2), ("batch", "heads"), (AxisType.Auto, AxisType.Auto), devices=devices)


@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"])
@pytest.mark.parametrize("options", [{}, {"log_decay": True, "segment_ids": True}], ids=["plain", "gated, packed"])
def test_a_gradient_compiles_and_shards_of_batch_and_heads_do_not_communicate(topology, options, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")  # what the library asks when it is traced on a TPU

    def both(query, key, value, beta, log_decay, segment_ids, weights):
        attention = functools.partial(fwt_jax.fast_weight_attention, segment_ids=segment_ids)
        reads, pull = jax.vjp(lambda *inputs: attention(*inputs)[0], query, key, value, beta, log_decay)
        return reads, pull(weights)

    def array(shape, dtype, spec):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh(topology), spec))

    tokens, per_head = (4, 200, 2), P("batch", None, "heads")
    query, value = (array((*tokens, size), jnp.bfloat16, per_head) for size in (128, 64))
    beta = array(tokens, jnp.float32, per_head)
    log_decay = beta if options.get("log_decay") else None
    segment_ids = array(tokens[:2], jnp.int32, P("batch")) if options.get("segment_ids") else None
    compiled = jax.jit(both).lower(query, query, value, beta, log_decay, segment_ids, value).compile()
    text = compiled.as_text()
    assert "T(8,128)" in text  # the tiles of a TPU
    assert not [word for word in COLLECTIVES if word in text]
