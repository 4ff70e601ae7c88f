"""Dtypes are those of the docstrings with strict promotion, and where float64 exists but nobody asks for it."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import pytest
from cases import some
from flax import nnx

from fwt_jax import RULES, feature_maps, init_memory
from fwt_jax.attention import fast_weight_attention
from fwt_jax.convert.families import fla
from fwt_jax.decode import beam_search, generate
from fwt_jax.layers import (
    CrossAttention,
    DeltaNet,
    FastWeightAttention,
    FavorPlus,
    GatedDeltaNet,
    GroupedQueryAttention,
    KimiDeltaAttention,
    LatentAttention,
    LinearAttention,
    RandomProjection,
    ShortConvolution,
    SoftmaxAttention,
    TrainedFeatureMap,
)
from fwt_jax.models import (
    Attention,
    BlockConfig,
    DecoderLM,
    EncoderDecoder,
    HybridConfig,
    HybridLM,
    MixtureOfExperts,
    ModelConfig,
    SwiGLU,
    TranslationConfig,
)

TOKENS = jax.ShapeDtypeStruct((2, 5), jnp.int32)


@contextlib.contextmanager
def strict_and_x64():
    """With float64, for then an int64 or float64 that came up by accident cannot be promoted either."""
    with jax.numpy_dtype_promotion("strict"), jax.enable_x64(True):
        yield


MODES = {"x64": lambda: jax.enable_x64(True), "strict": strict_and_x64}
each_mode = pytest.mark.parametrize("mode", some(2, ["strict", "x64"]))


def dtypes(tree):
    return [x.dtype.name for x in jax.tree.leaves(tree)]


LANGUAGE = {
    "softmax": {"rule": "softmax"},
    "sum, favor, read": {"rule": "sum", "feature_map": "favor_plus", "feature_size": 3, "normalize": "read"},
    "delta, dpfp, retrieval, scan": {"feature_map": "dpfp", "normalize": "retrieval", "scan": True},
    "fwm, l2, pre": {"rule": "fwm", "feature_normalization": "l2", "norm": "pre", "feature_map": "taylor"},
    "relative": {"rule": "softmax", "positions": "relative", "memory_length": 4, "clamp_length": 3},
    "descending, clusters": {"positions": "descending", "cutoffs": (5, 10)},
    "softmax, bfloat16": {"rule": "softmax", "dtype": "bfloat16"},
    "delta, bfloat16": {"dtype": "bfloat16"},
    "relative, bfloat16": {"rule": "softmax", "positions": "relative", "memory_length": 4, "dtype": "bfloat16"},
}


@each_mode
@pytest.mark.parametrize("name", LANGUAGE)
def test_language_models(name, mode):
    """Traced, not run: promotion is done then."""
    options = {"positions": None, **LANGUAGE[name]}

    def evaluate(tokens, key):
        model = DecoderLM(ModelConfig(23, 2, 16, 32, 2, 8, **options), rngs=nnx.Rngs(key))
        start = model.init_memory(2, 12)
        losses, memory = model.losses(tokens, tokens, start)
        again, after = model.losses(tokens, tokens, memory)
        out, new = model(tokens)
        padded = None if options["positions"] == "relative" else model(tokens, lengths=tokens[:, 0])[0]

        def loss(model):
            return jnp.sum(model.losses(tokens, tokens, rngs=nnx.Rngs(key))[0])

        drawn = []
        if options["positions"] != "descending":
            greedy = generate(model, tokens, 3, temperature=0)
            drawn = [greedy, generate(model, tokens, 3, key=key, temperature=0.5, top_k=3, top_p=0.9)]
        state = nnx.state(model)
        floats = losses, again, out, padded, nnx.value_and_grad(loss)(model), nnx.filter_state(state, nnx.Param)
        return floats, nnx.filter_state(state, RandomProjection), (start, memory, after, new), drawn

    with MODES[mode]():
        floats, projections, memories, drawn = jax.eval_shape(evaluate, TOKENS, jax.random.key(0))
    assert set(dtypes((floats, projections))) == {"float32"}
    assert len({tuple(dtypes(memory)) for memory in memories}) == 1
    of_cache = {"bfloat16", "int32"} if name == "softmax, bfloat16" else {"float32", "int32"}
    assert set(dtypes(memories)) == (of_cache if options.get("rule") == "softmax" else {"float32"})
    assert set(dtypes(drawn)) <= {"int32"}


SWIGLU = functools.partial(SwiGLU, d_ff=8)
MIXTURE = functools.partial(MixtureOfExperts, d_ff=8, num_experts=4, experts_per_token=2)
HYBRID = {
    "delta": (functools.partial(DeltaNet, num_heads=2, head_size=8), SWIGLU),
    "gated delta, tied": (functools.partial(GatedDeltaNet, num_heads=2, head_size=8, num_value_heads=4), SWIGLU),
    "kimi, sigmoid router": (
        functools.partial(KimiDeltaAttention, num_heads=2, head_size=8),
        functools.partial(MIXTURE, router="sigmoid", groups=2, groups_per_token=1, shared_d_ff=8),
    ),
    "linear, post": (functools.partial(LinearAttention, num_heads=2, head_size=8), SWIGLU),
    "linear, hedgehog": (
        functools.partial(
            fla._linear_attention_layer,
            num_heads=2,
            head_size=8,
            feature_map="hedgehog",
            norm_query=True,
            norm_key=False,
        ),
        SWIGLU,
    ),
    "grouped, softmax router": (
        functools.partial(GroupedQueryAttention, num_heads=2, head_size=8, qk_norm="head", window=3, gate=True),
        functools.partial(MIXTURE, shared_d_ff=8, shared_gate=True),
    ),
    "latent": (functools.partial(LatentAttention, num_heads=2, head_size=8, shared_size=4, latent_size=4), SWIGLU),
}


@each_mode
@pytest.mark.parametrize(
    ("dtype", "param_dtype"), [("float32", "float32"), ("bfloat16", "float32"), (None, "bfloat16")], ids=str
)
@pytest.mark.parametrize("name", HYBRID)
def test_hybrid_models(name, dtype, param_dtype, mode):
    mixer, feed_forward = HYBRID[name]
    block = BlockConfig(mixer, feed_forward, placement="post" if "post" in name else "pre")
    every = {} if name in ("grouped, softmax router", "latent") else {"memory_every": 2}

    def evaluate(tokens, ids, key):
        config = HybridConfig(23, 16, (block,) * 2, tied="tied" in name, dtype=dtype, param_dtype=param_dtype)
        model = HybridLM(config, rngs=nnx.Rngs(key))
        start = model.init_memory(2, 12)
        losses, memory = model.losses(tokens, tokens, start)
        out, after = model(tokens, memory)
        packed, several = model(tokens, segment_ids=ids, lengths=ids[:, 0], **every)

        def loss(model):
            return jnp.sum(model.losses(tokens, tokens)[0])

        drawn = [generate(model, tokens, 3, temperature=0, lengths=lengths) for lengths in (None, ids[:, 0])]
        parameters = nnx.state(model, nnx.Param)
        return (losses, out, packed), (parameters, nnx.grad(loss)(model)), (start, memory, after, several), drawn

    with MODES[mode]():
        results, parameters, memories, drawn = jax.eval_shape(evaluate, TOKENS, TOKENS, jax.random.key(0))
    assert set(dtypes(results)) == {"float32"}
    assert dtypes(parameters[0]) == dtypes(parameters[1]) and param_dtype in dtypes(parameters)
    assert set(dtypes(parameters)) <= {param_dtype, "float32"}
    assert len({tuple(dtypes(memory)) for memory in memories}) == 1
    assert set(dtypes(memories)) <= {dtype or param_dtype, "float32", "int32"}
    assert set(dtypes(drawn)) == {"int32"}


TRANSLATION = {
    "softmax": {},
    "sum": {place: Attention("sum") for place in ("encoder", "decoder", "cross")},
    "delta, favor, pre": {
        "encoder": Attention("sum", feature_map="favor_plus", feature_size=3),
        "decoder": Attention("delta", feature_normalization="sum", normalize=False),
        "norm": "pre",
    },
    "softmax, bfloat16": {"dtype": "bfloat16"},
    "sum, bfloat16": {place: Attention("sum") for place in ("encoder", "decoder", "cross")} | {"dtype": "bfloat16"},
}


@each_mode
@pytest.mark.parametrize("name", TRANSLATION)
def test_translation_models(name, mode):
    def evaluate(tokens, key):
        model = EncoderDecoder(TranslationConfig(23, 1, 1, 16, 32, 2, **TRANSLATION[name]), rngs=nnx.Rngs(key))
        start = model.encode(tokens, 6)
        hidden, after = model.decode(tokens, start)

        def loss(model):
            return jnp.sum(model.losses(tokens, tokens, label_smoothing=0.1, rngs=nnx.Rngs(key)))

        found = [beam_search(model, tokens, max_length=4, beam_size=2, early_stop=early) for early in (True, False)]
        floats = model(tokens, tokens), model.losses(tokens, tokens), hidden, nnx.value_and_grad(loss)(model)
        return (floats, nnx.state(model, nnx.Param), [x.scores for x in found]), (start, after), found[0].tokens

    with MODES[mode]():
        floats, memories, tokens = jax.eval_shape(evaluate, TOKENS, jax.random.key(0))
    assert set(dtypes(floats)) == {"float32"} and tokens.dtype == "int32"
    assert dtypes(memories[0]) == dtypes(memories[1])
    kept = "bfloat16" if name == "softmax, bfloat16" else "float32"
    assert set(dtypes(memories)) - {"int32", "bool"} == {kept}


LAYERS = {
    "delta": lambda dtype, rngs: FastWeightAttention(6, 2, 4, use_bias=True, dtype=dtype, rngs=rngs),
    "favor": lambda dtype, rngs: FastWeightAttention(
        6, 2, 4, feature_map=FavorPlus(4, 5, rngs=rngs), rule="sum", normalize="read", dtype=dtype, rngs=rngs
    ),
    "hedgehog": lambda dtype, rngs: FastWeightAttention(
        6, 2, 4, feature_map=TrainedFeatureMap(feature_maps.hedgehog, 2, 4, 3, rngs=rngs), dtype=dtype, rngs=rngs
    ),
    "softmax": lambda dtype, rngs: SoftmaxAttention(6, 2, 4, dtype=dtype, rngs=rngs),
}


@each_mode
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", LAYERS)
def test_layers(name, dtype, mode):
    def evaluate(x, ids, key):
        layer = LAYERS[name](dtype, nnx.Rngs(key))
        start = layer.init_memory(2, 12) if name == "softmax" else layer.init_memory(2)

        def loss(x):
            return jnp.sum(layer(x, segment_ids=ids, rngs=nnx.Rngs(key))[0].astype(jnp.float32))

        y, after = layer(x, start, segment_ids=ids)
        cross = CrossAttention(6, 2, 4, rule="softmax" if name == "softmax" else "sum", dtype=dtype, rngs=nnx.Rngs(key))
        read = cross.read(x, cross.write(x, ids > 0)), cross(x, x)
        return (y, jax.grad(loss)(x), read), (start, after), nnx.state((layer, cross))

    with MODES[mode]():
        computed, memories, state = jax.eval_shape(
            evaluate, jax.ShapeDtypeStruct((2, 5, 6), dtype), TOKENS, jax.random.key(0)
        )
    assert set(dtypes(computed)) == {dtype} and set(dtypes(state)) == {"float32"}
    assert dtypes(memories[0]) == dtypes(memories[1])
    assert set(dtypes(memories)) - {"int32"} == {dtype if name == "softmax" else "float32"}


@each_mode
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("form", ["chunkwise", "recurrent", "parallel"])
def test_the_operation(form, dtype, mode):
    def evaluate(x, beta, log_decay, ids):
        def function(x, normalize):
            options = {"form": form, "normalize": normalize, "segment_ids": ids}
            y, memory = fast_weight_attention(x, x, x[..., :3], beta, log_decay, **options)
            _, memory = fast_weight_attention(x, x, x[..., :3], beta, log_decay, memory=memory, **options)
            return jnp.sum(y.astype(jnp.float32)), (y, memory)

        of = [jax.grad(functools.partial(function, normalize=n), has_aux=True)(x) for n in (False, "read", "retrieval")]
        return [(gradient, y) for gradient, (y, _) in of], [memory for _, (_, memory) in of]

    x, beta = jax.ShapeDtypeStruct((2, 5, 3, 4), dtype), jax.ShapeDtypeStruct((2, 5, 3), "float32")
    with MODES[mode]():
        computed, memories = jax.eval_shape(evaluate, x, beta, beta, TOKENS)
    assert set(dtypes(computed)) == {dtype} and set(dtypes(memories)) == {"float32"}


@each_mode
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rule", RULES)
def test_the_operation_in_pieces_and_with_a_memory_for_each_segment(rule, dtype, mode):
    def evaluate(x, beta, ids):
        options = {"rule": rule, "normalize": False}
        of_rows = fast_weight_attention(x, x, x[..., :3], beta, lengths=ids[:, 0], **options)
        in_pieces = of_rows
        if RULES[rule].piece is not None:
            in_pieces = fast_weight_attention(x, x, x[..., :3], beta, lengths=ids[:, 0], pieces=2, **options)
        memories = jax.tree.map(lambda m: m.reshape(2, 3, *m.shape[1:]), init_memory(6, 3, 4, 3))
        of_segments = fast_weight_attention(x, x, x[..., :3], beta, memory=memories, segment_ids=ids, **options)
        outputs, after = zip(of_rows, in_pieces, of_segments, strict=True)
        return outputs, after

    x, beta = jax.ShapeDtypeStruct((2, 5, 3, 4), dtype), jax.ShapeDtypeStruct((2, 5, 3), "float32")
    with MODES[mode]():
        outputs, memories = jax.eval_shape(evaluate, x, beta, TOKENS)
    assert set(dtypes(outputs)) == {dtype} and set(dtypes(memories)) == {"float32"}


@each_mode
def test_a_router_in_float64_and_the_ends_of_a_convolution_in_int64(mode):
    def evaluate(x, ends):
        rngs, sizes = nnx.Rngs(0), {"d_ff": 8, "num_experts": 4, "experts_per_token": 2}
        mixture = MixtureOfExperts(6, **sizes, router="sigmoid", param_dtype=jnp.float64, rngs=rngs)
        convolution = ShortConvolution((6,), 3, param_dtype=jnp.float64, rngs=rngs)
        return mixture(x), convolution(x, ends=ends)

    with MODES[mode]():
        x, ends = jax.ShapeDtypeStruct((2, 5, 6), "float64"), jax.ShapeDtypeStruct((2, 2), "int64")
        assert set(dtypes(jax.eval_shape(evaluate, x, ends))) == {"float64"}
