"""The models of the atlas: one small network around one memory, and its training with several seeds at once.

The layer is made of the library's parts: projections, ``ShortConvolution``, a feature map, ``fast_weight_attention``,
``Decay`` and ``RMSNorm``. So a model of the atlas is a rule and a few choices around it, and all else is the same.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import lax

from fwt_jax import fast_weight_attention, feature_maps
from fwt_jax.layers import Decay, RMSNorm, ShortConvolution
from fwt_jax.rules import find_rule

FEATURES = {
    # name: φ, N
    "silu": (jax.nn.silu, feature_maps.l2_normalize),
    "elu": (feature_maps.elu_plus_one, feature_maps.sum_normalize),
    "dpfp": (functools.partial(feature_maps.dpfp, nu=1), feature_maps.sum_normalize),
}
IGNORED = -1  # a label that does not count
# K·V up to which a CPU trains token by token. With its gradient, a memory of 8 × 8 takes a third to a half of the time
# of chunks for delta, and a sixth for fwm. One of 16 × 16 takes one and a half times as long.
SMALL = 8 * 8


@dataclasses.dataclass(frozen=True)
class Model:
    """A network.

    Attributes:
      rule: an update rule, or "softmax" for attention to all tokens so far, without positions, instead of a memory.
      features: a key of ``FEATURES``. The paper's maps have features that sum to 1, silu has features of length 1.
      max_beta: b. With 2 a write can turn a stored value around.
      writes: n, how many keys are written for each token (DeltaProduct). The memory is read once, after the last.
      decay: whether the memory decays, by a factor for each head that depends on the token (Gated DeltaNet).
      conv_size: the tokens that a convolution mixes into a query, key and value; None: no convolution.
      vocabulary, classes: how many tokens there are, and how many labels.
      d_model, num_heads, head_size, num_layers: sizes.
      hidden: the size of the feed-forward layer; 0: none.
    """

    rule: str = "delta"
    features: str = "silu"
    max_beta: float = 1.0
    writes: int = 1
    decay: bool = False
    conv_size: int | None = None
    vocabulary: int = 2
    classes: int = 2
    d_model: int = 32
    num_heads: int = 2
    head_size: int = 16
    num_layers: int = 1
    hidden: int = 64


class FastWeights(nnx.Module):
    """n writes and one read of a memory for each token. For each head, with the names of ``Model``,

        k_ti = N(φ(c(W_ki x)_t)),   v_ti = c(W_vi x)_t,   β_ti = b σ(w_βiᵀx_t)        i = 1 … n
        y_t = W_o [rms(W_tᵀ q_t) of all heads],   q_t = N(φ(c(W_q x)_t))

    where W_t is the memory after the n writes of token t, and c a short convolution or nothing. Softmax attention takes
    the place of memory and features in the same layer.
    """

    def __init__(self, model: Model, rngs: nnx.Rngs):
        shape = (model.num_heads, model.head_size)
        linear = functools.partial(nnx.LinearGeneral, use_bias=False, rngs=rngs)
        self.model = model
        self.query = linear(model.d_model, shape)
        self.key = linear(model.d_model, (model.writes, *shape))
        self.value = linear(model.d_model, (model.writes, *shape))
        self.beta = linear(model.d_model, (model.writes, model.num_heads), use_bias=True)
        self.decay = Decay(model.d_model, model.num_heads, rngs=rngs) if model.decay else None
        if self.decay is not None:
            # Mostly α > 0.996. Where Decay starts, one head alone may forget at once, and then it never learns.
            self.decay.log_rate[...] = jnp.full(model.num_heads, -2.0, jnp.float32)
        channels = () if model.conv_size is None else (shape, (model.writes, *shape), (model.writes, *shape))
        self.convolutions = nnx.List([ShortConvolution(c, model.conv_size or 1, rngs=rngs) for c in channels])
        self.norm = RMSNorm(model.head_size, rngs=rngs)
        self.out = linear(shape, model.d_model, axis=(-2, -1))

    def __call__(self, x: jax.Array) -> jax.Array:
        """y, as x ``[B, T, d_model]``."""
        model, (batch, length) = self.model, x.shape[:2]
        query, key, value = self.query(x), self.key(x), self.value(x)
        if self.convolutions:
            query, key, value = (c(z)[0] for c, z in zip(self.convolutions, (query, key, value), strict=True))
        if model.rule == "softmax":
            y = jax.nn.dot_product_attention(query, key[:, :, 0], value[:, :, 0], is_causal=True)
            return self.out(self.norm(y))
        feature_map, normalize = FEATURES[model.features]
        query, key = normalize(feature_map(query)), normalize(feature_map(key))
        if find_rule(model.rule).unit_values:
            value = feature_maps.l2_normalize(value)
        beta = model.max_beta * jax.nn.sigmoid(self.beta(x))
        log_decay = None if self.decay is None else self.decay(x)
        if model.writes > 1:  # n tokens for each
            query = jnp.repeat(query, model.writes, axis=1)
            key, value, beta = (z.reshape(batch, length * model.writes, *z.shape[3:]) for z in (key, value, beta))
        else:
            key, value, beta = key[:, :, 0], value[:, :, 0], beta[:, :, 0]
        small = key.shape[-1] * value.shape[-1] <= SMALL and jax.default_backend() == "cpu"
        form = "recurrent" if small else None
        y, _ = fast_weight_attention(query, key, value, beta, log_decay, rule=model.rule, form=form)
        return self.out(self.norm(y[:, model.writes - 1 :: model.writes]))


class Network(nnx.Module):
    """Embedding, layers with residual connections (mixer, feed-forward), logits."""

    def __init__(self, model: Model, rngs: nnx.Rngs):
        def norm():
            return RMSNorm(model.d_model, rngs=rngs)

        def linear(a, b):
            return nnx.Linear(a, b, rngs=rngs)

        layers = range(model.num_layers)
        self.embedding = nnx.Embed(model.vocabulary, model.d_model, rngs=rngs)
        self.mixers = nnx.List([FastWeights(model, rngs) for _ in layers])
        self.norms = nnx.List([norm() for _ in layers])
        pairs = [
            (linear(model.d_model, model.hidden), linear(model.hidden, model.d_model)) for _ in layers if model.hidden
        ]
        self.feed_forward = nnx.List([nnx.Sequential(norm(), a, jax.nn.gelu, b) for a, b in pairs])
        self.out = nnx.Sequential(norm(), linear(model.d_model, model.classes))

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Logits ``[B, T, classes]`` of tokens ``[B, T]``."""
        x = self.embedding(tokens)
        for i, (norm, mixer) in enumerate(zip(self.norms, self.mixers, strict=True)):
            x = x + mixer(norm(x))
            if self.feed_forward:
                x = x + self.feed_forward[i](x)
        return self.out(x)


class Recipe(NamedTuple):
    """How the models of a task are trained: Adam with a warm-up of 50 steps, a constant rate, and a linear end.

    Gradients are clipped to a norm of 1. Adam has β₁ = 0.9 and β₂ = 0.98.

    All numbers of steps are multiples of ``EVERY``.

    Attributes:
      rate: the largest learning rate.
      steps: after which the end begins, at the latest. It begins earlier if the loss of every seed is below ``enough``.
      end: the steps in which the rate then falls to 0.
      enough: a loss, the mean of the last ``EVERY`` steps.
      easy: the first steps, with easier sequences.
    """

    rate: float = 3e-3
    steps: int = 1000
    end: int = 200
    enough: float = 0.01
    easy: int = 0


EVERY = 50  # steps in one call
WARM_UP = 50


def _loss(logits, labels):
    """The mean cross-entropy of the labels that count."""
    counts = labels != IGNORED
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.where(counts, labels, 0))
    return jnp.sum(losses * counts) / jnp.maximum(1, jnp.sum(counts))


def apply(model: Model, parameters: Any, tokens: jax.Array) -> jax.Array:
    """The logits of a network with these parameters."""
    return nnx.merge(nnx.graphdef(nnx.eval_shape(lambda: Network(model, nnx.Rngs(0)))), parameters)(tokens)


OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam(b2=0.98))


class _Programs(NamedTuple):
    """What is compiled for a model.

    Attributes:
      steps: (parameters, optimizer's state, batches, rates) -> ((parameters, state), losses ``[steps, seeds]``), with
        batches of tokens and labels ``[steps, seeds, B, T]``.
      labels: (parameters, tokens) -> the most probable labels ``[seeds, B, T]``.
    """

    steps: Callable
    labels: Callable


# A process that trains one model on several languages compiles its steps once. A few models and not all of them: the
# programs of a hundred networks are more than a process may map into its memory.
@functools.lru_cache(maxsize=4)
def _programs(model: Model) -> _Programs:
    def step(parameters, state, batch, rate):
        tokens, labels = batch
        loss, gradients = jax.value_and_grad(lambda p: _loss(apply(model, p, tokens), labels))(parameters)
        updates, state = OPTIMIZER.update(gradients, state, parameters)
        return optax.apply_updates(parameters, jax.tree.map(lambda u: -rate * u, updates)), state, loss

    @jax.jit
    def steps(parameters, state, batches, rates):
        def body(carry, now):
            *carry, loss = jax.vmap(step, (0, 0, 0, None))(*carry, *now)
            return tuple(carry), loss

        return lax.scan(body, (parameters, state), (batches, rates))

    @jax.jit
    def labels(parameters, tokens):
        return jax.vmap(lambda p: jnp.argmax(apply(model, p, tokens), -1))(parameters)

    return _Programs(steps, labels)


@functools.partial(jax.jit, static_argnums=0)
def _batches(sample, keys, numbers):
    """The tokens and labels of the steps with these numbers, ``[steps, seeds, B, T]``; keys: one for each seed."""
    return jax.vmap(lambda number: jax.vmap(lambda key: sample(jax.random.fold_in(key, number)))(keys))(numbers)


def start(model: Model, seeds: int) -> Any:
    """New parameters, with an axis of the seeds 0 to ``seeds`` − 1 in front."""
    networks = [nnx.state(Network(model, nnx.Rngs(seed)), nnx.Param) for seed in range(seeds)]
    return jax.tree.map(lambda *x: jnp.stack(x), *networks)


def train(
    model: Model,
    sample: Callable[[jax.Array], tuple[jax.Array, jax.Array]],
    recipe: Recipe,
    seeds: int,
    report: Callable[[float], Any] = lambda fraction: None,
    easier: Callable[[jax.Array], tuple[jax.Array, jax.Array]] | None = None,
) -> tuple[Any, np.ndarray]:
    """Trains a network with seeds 0 to ``seeds`` − 1, all at once.

    Args:
      sample: a key -> tokens and labels ``[B, T]`` of one batch. Every seed has its own batches.
      report: is called with what is done, from 0 to 1.
      easier: the ``sample`` of the first ``recipe.easy`` steps, if there are any.

    Returns:
      The parameters, with an axis of the seeds in front, and the mean losses ``[calls, seeds]``.

    Raises:
      ValueError: steps that are no multiples of ``EVERY``, or easy steps without easier sequences.
    """
    if recipe.steps % EVERY or recipe.end % EVERY or recipe.easy % EVERY:
        raise ValueError(f"steps, end and easy must be multiples of {EVERY}, got {recipe}")
    if (recipe.easy > 0) != (easier is not None):
        raise ValueError(f"easy steps and easier sequences go together, got {recipe.easy} steps and easier={easier}")
    keys = jax.vmap(jax.random.key)(jnp.arange(seeds))
    parameters = start(model, seeds)
    state = jax.vmap(OPTIMIZER.init)(parameters)
    losses, done, end = [], 0, recipe.steps
    while done < end + recipe.end:
        numbers = np.arange(done, done + EVERY)
        rates = recipe.rate * np.minimum(
            1, np.minimum((numbers + 1) / WARM_UP, (end + recipe.end - numbers) / recipe.end)
        )
        is_easy = easier is not None and done < recipe.easy
        batches = _batches(easier if is_easy else sample, keys, numbers)
        (parameters, state), loss = _programs(model).steps(parameters, state, batches, np.float32(rates))
        losses.append(np.asarray(loss).mean(0))
        done += EVERY
        if not is_easy and done < end and np.all(losses[-1] < recipe.enough):
            end = done
        report(done / (end + recipe.end))
    return parameters, np.array(losses)


def predict(model: Model, parameters: Any, tokens: jax.Array, batch: int = 64) -> np.ndarray:
    """The most probable labels ``[seeds, B, T]`` of tokens ``[B, T]``, from parameters of ``train``."""
    parts = [_programs(model).labels(parameters, tokens[i : i + batch]) for i in range(0, len(tokens), batch)]
    return np.concatenate(parts, axis=1)
