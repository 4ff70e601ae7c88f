"""The losses of the output layer against log p of all words in float64, their derivatives, and their memory."""

import functools

import chex
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from cases import some
from jax import lax

from fwt_jax.models import output_layer

SIZE = 6  # d_model
CUTOFFS = (150, 400)


@pytest.fixture(autouse=True, scope="module")
def several_blocks():
    """So few logits exist together that a block has 128 words, and a vocabulary of 700 words six blocks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(output_layer, "LOGITS", {"cpu": 1, "default": 1})
        jax.clear_caches()
        yield
    jax.clear_caches()


def output_of(vocab_size, cutoffs, rng):
    shapes = [(vocab_size, SIZE), (vocab_size,), *([(len(cutoffs), SIZE), (len(cutoffs),)] if cutoffs else [])]
    return tuple(jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)


def reference(x, targets, output, cutoffs):
    """−log p in float64, token by token."""

    def log_softmax(logits):
        return logits - np.logaddexp.reduce(logits)

    embedding, bias, *clusters = (np.asarray(a, np.float64) for a in output)
    losses = []
    for row, target in zip(np.asarray(x, np.float64), targets, strict=True):
        logits = embedding @ row + bias
        if target < 0:
            losses.append(0.0)
        elif not cutoffs:
            losses.append(-log_softmax(logits)[target])
        else:
            kernel, cluster_bias = clusters
            head = log_softmax(np.concatenate([logits[: cutoffs[0]], kernel @ row + cluster_bias]))
            number = np.searchsorted(cutoffs, target, side="right")
            if number == 0:
                losses.append(-head[target])
            else:
                low, high = (*cutoffs, len(embedding))[number - 1 : number + 1]
                losses.append(-head[-number] - log_softmax(logits[low:high])[target - low])
    return np.array(losses)


def all_words(x, targets, output, cutoffs):
    """The same from ``log_probabilities``, which JAX differentiates by itself."""
    log_p = output_layer.log_probabilities(x, output, cutoffs)
    picked = jnp.take_along_axis(log_p, jnp.maximum(targets, 0)[..., None], axis=-1)[..., 0]
    return jnp.where(targets >= 0, -picked, 0)


def members(number, num_tokens):
    """Targets of which ``number`` are of the second cluster, and the others are frequent words or ignored."""

    def targets(rng):
        targets = rng.integers(-2, CUTOFFS[0], num_tokens)
        targets[rng.permutation(num_tokens)[:number]] = rng.integers(CUTOFFS[1], 700, number)
        return targets

    return targets


CASES = {
    "softmax": (700, (), lambda rng: rng.integers(-2, 700, 300)),
    "softmax, whole blocks": (256, (), lambda rng: rng.integers(-2, 256, 70)),
    "softmax, one token": (700, (), lambda rng: rng.integers(0, 700, 1)),
    "one word more than a block": (129, (), lambda rng: rng.integers(0, 129, 9)),
    "clusters": (700, CUTOFFS, lambda rng: rng.integers(-2, 700, 300)),
    "clusters, one token": (700, CUTOFFS, lambda rng: rng.integers(400, 700, 1)),
    "all tokens in one cluster": (700, CUTOFFS, members(300, 300)),
    "no token in any cluster": (700, CUTOFFS, members(0, 300)),
    "as many members as a branch takes": (700, CUTOFFS, members(75, 300)),
    "one member more than a branch takes": (700, CUTOFFS, members(76, 300)),
    "all tokens ignored": (700, CUTOFFS, lambda rng: np.full(300, -1)),
}


def case(name, seed=0):
    vocab_size, cutoffs, targets_of = CASES[name]
    rng = np.random.default_rng(seed)
    targets = targets_of(rng).astype(np.int32)[None]
    x = jnp.asarray(rng.normal(size=(*targets.shape, SIZE)), jnp.float32)
    weights = jnp.asarray(rng.normal(size=targets.shape), jnp.float32)
    return x, jnp.asarray(targets), output_of(vocab_size, cutoffs, rng), cutoffs, weights


def total(losses, targets, cutoffs, weights, x, output):
    return jnp.sum(weights * losses(x, targets, output, cutoffs))


@functools.partial(jax.jit, static_argnums=(0, 2))
def gradient(losses, targets, cutoffs, weights, x, output):
    return jax.grad(total, argnums=(4, 5))(losses, targets, cutoffs, weights, x, output)


@pytest.mark.parametrize("name", some(2, list(CASES)))
def test_losses_and_gradients_are_those_of_float64(name):
    x, targets, output, cutoffs, weights = case(name)
    losses = output_layer.losses(x, targets, output, cutoffs)[0]
    chex.assert_trees_all_close(
        losses, reference(x[0], targets[0], output, cutoffs).astype(np.float32), rtol=2e-6, atol=2e-6
    )
    got, want = (gradient(losses, targets, cutoffs, weights, x, output) for losses in (output_layer.losses, all_words))
    chex.assert_trees_all_close(got, want, rtol=1e-5, atol=1e-5)
    # A difference quotient in float64 along random tangents, so that the gradient has a reference of its own.
    rng = np.random.default_rng(1)
    tangents = jax.tree.map(lambda a: rng.normal(size=a.shape), (x, output))
    ends = []
    for step in (1e-5, -1e-5):
        x_moved, *output_moved = jax.tree.map(
            lambda a, t, step=step: np.asarray(a, np.float64) + step * t, (x, *output), (tangents[0], *tangents[1])
        )
        ends.append(np.sum(np.asarray(weights[0]) * reference(x_moved[0], targets[0], output_moved, cutoffs)))
    slope = sum(np.vdot(g, t) for g, t in zip(jax.tree.leaves(got), jax.tree.leaves(tangents), strict=True))
    np.testing.assert_allclose(slope, (ends[0] - ends[1]) / 2e-5, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", some(2, ["clusters", "softmax"]))
def test_forward_mode_and_second_derivatives(name):
    x, targets, output, cutoffs, weights = case(name)
    rng = np.random.default_rng(1)
    tangents = jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape), jnp.float32), (x, output))

    @functools.partial(jax.jit, static_argnums=0)
    def derivatives(losses, targets, weights, x, output):
        function = functools.partial(total, losses, targets, cutoffs, weights)

        def slope(*inputs):
            return jax.jvp(function, inputs, tangents)[1]

        forward_over_reverse = jax.jvp(jax.grad(function, argnums=(0, 1)), (x, output), tangents)[1]
        return slope(x, output), forward_over_reverse, jax.grad(slope, argnums=(0, 1))(x, output)

    got, want = (derivatives(losses, targets, weights, x, output) for losses in (output_layer.losses, all_words))
    chex.assert_trees_all_close(got[0], want[0], rtol=1e-4)
    chex.assert_trees_all_close(got[1:], want[1:], rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["softmax", "clusters"])
def test_bfloat16_is_rounded_and_its_sums_are_float32(name):
    x, targets, output, cutoffs, weights = case(name)
    # Numbers that bfloat16 holds: then the logits differ from those of float32 by the order of sums alone.
    x, output = jax.tree.map(lambda a: a.astype(jnp.bfloat16).astype(jnp.float32), (x, output))
    function = functools.partial(total, output_layer.losses)
    both = jax.jit(jax.value_and_grad(function, argnums=(3, 4)), static_argnums=1)
    want, (want_x, want_output) = both(targets, cutoffs, weights, x, output)
    got, (got_x, got_output) = both(targets, cutoffs, weights, x.astype(jnp.bfloat16), output)
    assert got.dtype == jnp.float32 and got_x.dtype == jnp.bfloat16
    chex.assert_trees_all_close(got, want, rtol=1e-5)
    chex.assert_trees_all_close((got_x.astype(jnp.float32), got_output), (want_x, want_output), rtol=2e-2, atol=2e-2)

    def products(x):
        text = both.lower(targets, cutoffs, weights, x, output).as_text()
        return [line for line in text.splitlines() if "dot_general" in line]

    assert all("algorithm = <lhs_precision_type = bf16" in line for line in products(x.astype(jnp.bfloat16)))
    assert not any("algorithm" in line for line in products(x))


def test_the_loss_of_a_sure_word_is_not_below_zero():
    """The logit of the target is that of the sum, and not the rounding of another product."""
    rng = np.random.default_rng(0)
    x, (embedding, bias) = jnp.asarray(rng.normal(size=(1, 300, SIZE)), jnp.bfloat16), output_of(700, (), rng)
    output = 30 * embedding, bias
    best = jnp.argmax(output_layer.log_probabilities(x, output), axis=-1)
    assert jnp.min(output_layer.losses(x, best, output)) >= 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["softmax", "all tokens in one cluster"])
def test_the_logits_of_all_words_never_exist(name, monkeypatch):
    monkeypatch.setattr(output_layer, "LOGITS", {"cpu": 2**17, "default": 2**26})
    jax.clear_caches()
    num_tokens, vocab_size = 1024, 16_384
    cutoffs = () if name == "softmax" else (64,)
    rng = np.random.default_rng(0)
    output = output_of(vocab_size, cutoffs, rng)
    x, targets = jnp.ones((1, num_tokens, SIZE)), jnp.full((1, num_tokens), vocab_size - 1)

    def temporary_bytes(losses):
        both = jax.jit(jax.value_and_grad(total, argnums=(4, 5)), static_argnums=(0, 2))
        compiled = both.lower(losses, targets, cutoffs, jnp.ones(targets.shape), x, output).compile()
        memory = compiled.memory_analysis()
        assert memory is not None
        return memory.temp_size_in_bytes

    logits = 4 * num_tokens * vocab_size
    assert temporary_bytes(all_words) > logits
    assert temporary_bytes(output_layer.losses) < logits / 8


@pytest.mark.parametrize(("platform", "blocks"), [("cpu", "16x1024"), ("tpu", "4x4096"), ("cuda", "1x16384")])
def test_blocks_are_those_of_the_platform_the_program_is_for(platform, blocks, monkeypatch):
    monkeypatch.setattr(output_layer, "LOGITS", {"cpu": 2**20, "tpu": 2**22, "default": 2**26})
    jax.clear_caches()
    x, targets = jax.ShapeDtypeStruct((1, 1024, SIZE), jnp.float32), jax.ShapeDtypeStruct((1, 1024), jnp.int32)
    output = jax.ShapeDtypeStruct((16_384, SIZE), jnp.float32), jax.ShapeDtypeStruct((16_384,), jnp.float32)
    exported = jax.export.export(jax.jit(output_layer.losses), platforms=[platform])(x, targets, output)
    assert f"tensor<{blocks}x{SIZE}xf32>" in exported.mlir_module()


@pytest.mark.slow
def test_a_vmap_gives_the_losses_of_each_output_layer():
    x, targets, output, cutoffs, _ = case("clusters")
    outputs = jax.tree.map(lambda a: jnp.stack([a, 2 * a]), output)
    got = jax.vmap(lambda output: output_layer.losses(x, targets, output, cutoffs))(outputs)
    want = lax.map(lambda output: output_layer.losses(x, targets, output, cutoffs), outputs)
    chex.assert_trees_all_close(got, want, rtol=1e-5, atol=1e-5)
