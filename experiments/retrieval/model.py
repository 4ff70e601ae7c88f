"""The task, the models and one training run of the paper's synthetic retrieval (Schlag et al. 2021, section 6.1).

A sequence of L (key, value) pairs is written to a memory. Then one key is asked for: which value came with it last?
There are S keys and S values. Setting 1 (capacity): L = S, every key and every value once. Setting 2 (update rules):
L = 2S, keys and values are drawn with replacement, so that keys are reassigned. Keys are learned embeddings of size
⌊2.2·S⌋, values are one-hot vectors;

    k = W_K [v; e(key)] + b_K,   q = W_Q e(key) + b_Q   of size 64,   loss = ½ ‖v* − v̂‖².

Five things make it fast. W_K e and W_β e are computed once for each of the S vocabulary entries and then gathered.
W_K v is a row of W_K, because v is one-hot. The one query is read by its weight for each position
(``fwt_jax.read_weights``, O(L·F)) instead of from a memory (O(L·F·S)), with DPFP and FAVOR+ without an array of all
features. Each sequence's gradient is computed right after its loss, while its arrays are in the cache. And the fwm rule
has a gradient by hand (fwm.py).
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
import pathlib
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import serialization

from experiments.retrieval import fwm
from experiments.run import files
from fwt_jax import feature_maps, read_weights
from fwt_jax.chunkwise import chunkwise
from fwt_jax.rules import RULES, Rule

HEAD_SIZE = 64
EVAL_EVERY = 100
EVAL_SEQUENCES = 20
EVAL_QUERIES = 200
STOP_LOSS = 1e-3
MAX_STRIKES = 10
MAX_STEPS = 100_000
CHECKPOINT_SECONDS = 60
_matmul = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


class Recipe(NamedTuple):
    """How the authors' program uses an update rule.

    Attributes:
      sum_normalize: keys and queries are divided by the sum of their features.
      layer_norm: the read is normalised to mean 0 and variance 1.
    """

    sum_normalize: bool = False
    layer_norm: bool = False


FEATURE_MAPS = ("softmax", "linear", "tanh", "dpfp", "favor")
RECIPES = {
    "softmax": Recipe(),
    "sum": Recipe(),
    "delta": Recipe(sum_normalize=True),
    "fwm": Recipe(layer_norm=True),
}
# Learning rate and batch size. The fast weight memory with tanh needs its own (authors' program).
OPTIMIZATION = {("tanh", "fwm"): (1e-4, 128)}
USUAL_OPTIMIZATION = (1e-3, 32)


@dataclasses.dataclass(frozen=True)
class Model:
    """One line of the figures: a feature map (with ν of DPFP or M of FAVOR+) and an update rule.

    Attributes:
      feature_map: "softmax" (with rule "softmax"), "linear" (ELU+1), "tanh", "dpfp" or "favor".
      rule: "softmax", "sum", "delta" or "fwm".
      size: ν for "dpfp", M (half the number of features) for "favor".
    """

    feature_map: str
    rule: str
    size: int = 0

    def __post_init__(self):
        if self.feature_map not in FEATURE_MAPS or self.rule not in RECIPES:
            raise ValueError(f"feature_map must be one of {FEATURE_MAPS} and rule one of {tuple(RECIPES)}, got {self}")
        if (self.feature_map == "softmax") != (self.rule == "softmax"):
            raise ValueError(f'feature_map "softmax" goes with rule "softmax", and no other, got {self}')
        if (self.size > 0) != (self.feature_map in ("dpfp", "favor")):
            raise ValueError(f'size is ν of "dpfp" or M of "favor", at least 1, and 0 for the others, got {self}')

    @property
    def name(self) -> str:
        return self.feature_map + (str(self.size) if self.size else "")

    @property
    def update(self) -> Rule | None:
        """The rule of the memory; None for softmax, which has no memory."""
        return RULES.get(self.rule)

    @property
    def needs_beta(self) -> bool:
        return self.update is not None and self.update.needs_beta

    @property
    def reads_by_weights(self) -> bool:
        """Whether a read is Σ_l w_l v_l with weights that depend on the query and the key of position l only."""
        return self.update is None or self.update.corrects is False

    @property
    def optimization(self) -> tuple[float, int]:
        """Learning rate and batch size."""
        return OPTIMIZATION.get((self.feature_map, self.rule), USUAL_OPTIMIZATION)


@dataclasses.dataclass(frozen=True)
class Task:
    """``num_keys`` is S; ``replace`` is True in setting 2, where keys and values are drawn with replacement."""

    num_keys: int
    replace: bool

    def __post_init__(self):
        if self.num_keys < 1:
            raise ValueError(f"num_keys, S, must be at least 1, got {self.num_keys}")

    @property
    def embedding_size(self) -> int:
        return int((self.num_keys + self.num_keys) * 1.1)

    @property
    def train_length(self) -> int:
        return self.num_keys * (2 if self.replace else 1)


# --- data ------------------------------------------------------------------------------------------------------------


def sample_pairs(key, task: Task, shape: tuple[int, ...], length: int):
    """Keys and values of sequences, ids in 0 … S−1, each ``[*shape, length]``; keys None where it is position = key.

    Without replacement both are permutations. The order of the pairs does not matter to a sum. So the keys can stand
    in their own order, a permutation of the values gives the same distribution, and no array is gathered by key.
    """
    if task.replace:
        pairs = jax.random.randint(key, (2, *shape, length), 0, task.num_keys)
        return pairs[0], pairs[1]
    # Random bits are sorted that carry their position in the low bits. This is four times as fast as an argsort.
    low = max(1, (task.num_keys - 1).bit_length())
    bits = jax.random.bits(key, (*shape, task.num_keys), jnp.uint32) >> low << low
    order = jnp.sort(bits | jnp.arange(task.num_keys, dtype=jnp.uint32), axis=-1)
    return None, (order & ((1 << low) - 1)).astype(jnp.int32)


def sample_batch(key, task: Task, batch_size: int):
    """A training batch: keys, values ``[B, L]``, the query's key and its value, ``[B]``, at its last occurrence."""
    pairs_key, query_key = jax.random.split(key)
    keys, values = sample_pairs(pairs_key, task, (batch_size,), task.train_length)
    position = jax.random.randint(query_key, (batch_size, 1), 0, task.train_length)
    if keys is None:
        return keys, values, position[:, 0], jnp.take_along_axis(values, position, axis=1)[:, 0]
    query = jnp.take_along_axis(keys, position, axis=1)
    last = jnp.max(jnp.where(keys == query, jnp.arange(task.train_length), -1), axis=1, keepdims=True)
    return keys, values, query[:, 0], jnp.take_along_axis(values, last, axis=1)[:, 0]


# --- model -----------------------------------------------------------------------------------------------------------


def init_params(seed: int, model: Model, task: Task) -> dict:
    """The authors' initial values. Only the S used rows of their 2S key embeddings exist; kernels are [in, out]."""
    rng = np.random.default_rng(seed)
    size, inputs = task.embedding_size, task.num_keys + task.embedding_size

    def linear(fan_in, fan_out, bound):
        kernel = rng.uniform(-bound, bound, (fan_in, fan_out)).astype(np.float32)
        return {"kernel": kernel, "bias": rng.uniform(-(fan_in**-0.5), fan_in**-0.5, fan_out).astype(np.float32)}

    def bound(fan_in):  # Xavier for softmax
        return math.sqrt(6 / (fan_in + HEAD_SIZE)) if model.update is None else HEAD_SIZE**-0.5

    params = {
        "embedding": rng.standard_normal((task.num_keys, size), np.float32),
        "key": linear(inputs, HEAD_SIZE, bound(inputs)),
        "query": linear(size, HEAD_SIZE, bound(size)),
    }
    params |= {"beta": linear(inputs, 1, inputs**-0.5)} if model.needs_beta else {}
    return jax.tree.map(jnp.asarray, params)


def params_from_torch(state: dict, model: Model) -> dict:
    """The authors' ``state_dict`` (arrays by name; Linear weights are [out, in]) as ours, for any map, rule and size.

    Left out are W_v and W_f, which their program makes and never uses, and the embeddings of ids that never occur.

    Raises:
      ValueError: an array is missing.
    """
    names = {"key": "W_k", "query": "W_q"} | ({"beta": "W_b"} if model.needs_beta else {})
    needed = {"embeddingK.weight", *(f"{name}.{array}" for name in names.values() for array in ("weight", "bias"))}
    if needed - set(state):
        raise ValueError(f"not a state_dict of {model}: {sorted(needed - set(state))} missing from {sorted(state)}")

    def linear(name):
        return {"kernel": jnp.asarray(state[f"{name}.weight"]).T, "bias": jnp.asarray(state[f"{name}.bias"])}

    embedding = jnp.asarray(state["embeddingK.weight"])
    return {"embedding": embedding[: len(embedding) // 2]} | {ours: linear(theirs) for ours, theirs in names.items()}


def draw_projection(key, model: Model, shape: tuple[int, ...] = (), size: int = HEAD_SIZE):
    """FAVOR+'s random matrices ``[*shape, M, size]``, drawn for every forward call; None for other maps."""
    if model.feature_map != "favor":
        return None
    draw = functools.partial(feature_maps.orthogonal_projection, num_features=model.size, dim=size)
    keys = jax.random.split(key, math.prod(shape))
    return jax.lax.map(draw, keys, batch_size=64).reshape(*shape, model.size, size)


def _features(model: Model, x, projection):
    if model.feature_map == "dpfp":
        return feature_maps.dpfp(x, model.size)
    if model.feature_map == "favor":
        return feature_maps.favor_plus(x, projection)
    return {"linear": feature_maps.elu_plus_one, "tanh": feature_maps.tanh}[model.feature_map](x)


def project(params, keys, values, queries):
    """From ids: keys ``[..., L, 64]``, β before its sigmoid ``[..., L]`` (or None) and queries ``[..., Q, 64]``."""
    num_keys, head_size = len(params["embedding"]), params["key"]["bias"].size
    query = params["embedding"][queries] @ params["query"]["kernel"] + params["query"]["bias"]
    kernels = [params[name]["kernel"][num_keys:] for name in ("key", "beta") if name in params]
    table = params["embedding"] @ jnp.concatenate(kernels, axis=1)

    def by_key(columns):
        return columns if keys is None else columns[keys]

    key = by_key(table[:, :head_size]) + params["key"]["kernel"][:num_keys][values] + params["key"]["bias"]
    if "beta" not in params:
        return key, None, query
    beta = by_key(table[:, -1]) + params["beta"]["kernel"][:num_keys, 0][values] + params["beta"]["bias"]
    return key, beta, query


def predict(model: Model, num_values: int, key, beta, values, query, projection):
    """v̂ ``[Q, S]`` for queries ``[Q, D]`` to one sequence: keys ``[L, D]``, β ``[L]`` before its sigmoid, value ids."""
    if model.reads_by_weights:
        weights = _weights(model, key, query, projection)
        read = _sum_by_value(weights, values, num_values)
        return read if model.update is None else read / (jnp.sum(weights, axis=-1, keepdims=True) + 1e-6)
    recipe, beta = RECIPES[model.rule], jax.nn.sigmoid(beta)
    key, query = _features(model, key, projection), _features(model, query, projection)
    if recipe.sum_normalize:
        key = feature_maps.sum_normalize(key, eps=0.0)
        query = feature_maps.sum_normalize(query, eps=1e-6)
    if len(query) == 1 and model.update.corrects is not None:
        weights, _ = read_weights(query[0], key, beta, rule=model.rule)
        return _sum_by_value(weights[None], values, num_values)
    if model.rule == "fwm":
        out = fwm.read(num_values, key, beta, values, query)
    else:
        empty = jnp.zeros((key.shape[-1], num_values))
        out = query @ chunkwise(empty, None, key, jax.nn.one_hot(values, num_values), beta, rule=model.update)[1]
    if not recipe.layer_norm:
        return out
    mean, var = jnp.mean(out, axis=-1, keepdims=True), jnp.var(out, axis=-1, keepdims=True)
    return (out - mean) * jax.lax.rsqrt(var + 1e-5)


def _weights(model: Model, key, query, projection):
    """The weight of each position of a sequence for each query ``[Q, D]``, ``[Q, L]``.

    Those of a memory are not normalised.
    """
    if model.update is None:
        return jax.nn.softmax(query @ key.T * key.shape[-1] ** -0.5, axis=-1)
    if len(query) == 1:  # Many queries share the features of the keys.
        if model.feature_map == "dpfp":
            return _dpfp_weights(model.size, key, query[0])[None]
        if model.feature_map == "favor":
            return _favor_weights(key, query[0], projection)[None]
    key, query = _features(model, key, projection), _features(model, query, projection)
    return jax.vmap(lambda q: read_weights(q, key, jnp.ones(len(key), key.dtype), rule=model.rule)[0])(query)


def _dpfp_weights(nu, key, query):
    """``_weights`` of DPFP-ν for one query, without an array of the features of the keys.

    With u = relu([k; −k]), N entries, and the features qⱼ[i] of the query:

        φ(k)ᵀφ(q) = Σⱼ Σᵢ u[i] u[i − j mod N] qⱼ[i],   j = 1 … ν.
    """
    u = jax.nn.relu(jnp.concatenate([key, -key], axis=-1))
    return _quadratic_form(u, feature_maps.dpfp(query, nu).reshape(nu, u.shape[-1]))


@jax.custom_vjp
def _quadratic_form(u, q):
    """Σⱼ Σᵢ u[i] u[i − j mod N] q[j, i] of each row u[l]: ``[L]``, of u ``[L, N]`` and q ``[ν, N]``."""
    return _quadratic_form_forward(u, q)[0]


def _quadratic_form_forward(u, q):
    """The gradient p in u is computed first, because it is what the value takes: w = ½ uᵀp."""
    nu, size = q.shape
    # A roll of u is a slice of this array. The barrier makes XLA compute it once, see ``feature_maps.dpfp``.
    wide = jax.lax.optimization_barrier(jnp.concatenate([u[:, size - nu :], u, u[:, :nu]], axis=-1))
    rolls = {j: wide[:, nu - j : nu - j + size] for j in range(-nu, nu + 1)}
    p = sum(rolls[j] * row + rolls[-j] * jnp.roll(row, -j) for j, row in enumerate(q, 1))
    # A product with ones is a sum. On a CPU, jnp.sum took 3 of the 19 ms of a step with DPFP-3 and S = 600.
    return 0.5 * _matmul(u * p, jnp.ones(size, u.dtype)), (p, rolls)


def _quadratic_form_backward(residuals, gradient):
    p, rolls = residuals
    of_q = [_matmul(gradient, rolls[0] * rolls[j]) for j in range(1, len(rolls) // 2 + 1)]
    return gradient[:, None] * p, jnp.stack(of_q)


_quadratic_form.defvjp(_quadratic_form_forward, _quadratic_form_backward)


@jax.custom_vjp
def _favor_weights(key, query, projection):
    """``_weights`` of FAVOR+ for one query ``[D]``, without features. The projection R takes no gradient.

    The features are exponentials of R k and −R k, so that their products are exponentials of sums:

        φ(k)ᵀφ(q) = Σᵢ [exp(Rᵢ(k + q) − c) + exp(−Rᵢ(k + q) − c)],   c = (‖k‖² + ‖q‖²)/2 + log(2M).

    ``favor_plus`` raises the features of very long tokens to about exp(−60). Here their weights stay smaller. Both are
    far below the 1e-6 that ``predict`` adds to the sum of the weights.
    """
    return _favor_weights_forward(key, query, projection)[0]


def _favor_weights_forward(key, query, projection):
    """The gradient in k + q with c fixed, Σᵢ [exp(Rᵢ(k + q) − c) − exp(−Rᵢ(k + q) − c)] Rᵢ, has the same terms."""
    projected = _matmul(key + query, projection.T)
    offset = 0.5 * (jnp.sum(jnp.square(key), axis=-1, keepdims=True) + jnp.sum(jnp.square(query)))
    offset += math.log(2 * len(projection))
    rising, falling = jnp.exp(projected - offset), jnp.exp(-projected - offset)
    weights = _matmul(rising + falling, jnp.ones(len(projection), key.dtype))
    return weights, (key, query, weights, _matmul(rising - falling, projection))


def _favor_weights_backward(residuals, gradient):
    key, query, weights, slope = residuals
    of_key = gradient[:, None] * (slope - weights[:, None] * key)
    return of_key, _matmul(gradient, slope - weights[:, None] * query), None


_favor_weights.defvjp(_favor_weights_forward, _favor_weights_backward)


def _sum_by_value(weights, values, num_values):
    """Σ_l w_l onehot(v_l), ``[Q, S]``."""
    return jax.ops.segment_sum(weights.T, values, num_values, mode="promise_in_bounds").T


def batch_loss(params, batch, projection, model: Model):
    """The training loss: mean over sequences of ½ ‖v* − v̂‖²; and v̂ ``[B, S]``, which is not differentiated.

    A CPU takes one sequence after another, because its features and its memory fit into the cache. The gradient of each
    is computed with its loss. So no array of all sequences is stored for a backward pass, and none is computed again.
    """
    keys, values, query, target = batch
    num_values = params["embedding"].shape[0]
    key, beta, query = project(params, keys, values, query[:, None])

    @with_gradient
    def loss(projected, ids):
        (key, beta, query), (values, target) = projected, ids
        (predicted,) = predict(model, num_values, key, beta, values, query, projection)
        return 0.5 * jnp.sum(jnp.square(predicted - jax.nn.one_hot(target, num_values))), predicted

    at_once = None if jax.default_backend() == "cpu" else len(values)
    sequences = (key, beta, query), (values, target)
    losses, predicted = jax.lax.map(lambda sequence: loss(*sequence), sequences, batch_size=at_once)
    return jnp.mean(losses), predicted


def with_gradient(function):
    """A function whose derivative in x is computed with its value, and not in a backward pass.

    Args:
      function: (x, constants) -> (scalar, others), trees of arrays. Only the scalar is differentiated, and only in x.
    """

    def forward(x, constants):
        return jax.value_and_grad(function, has_aux=True)(x, constants)

    def backward(gradient, cotangents):
        return jax.tree.map(lambda x: cotangents[0] * x, gradient), None

    differentiable = jax.custom_vjp(function)
    differentiable.defvjp(forward, backward)
    return differentiable


def eval_loss(params, key, model: Model, task: Task, batch_size: int):
    """Mean over 20 sequences of length S × chunks of their queries, weighted like the authors' evaluation.

    Each distinct key of a sequence is asked for, in sorted order, at most 200. They go through the model in chunks of
    the batch size, and a short last chunk weighs as much as a full one. FAVOR+ draws a projection for each chunk.
    """
    num_keys, num_queries = task.num_keys, min(task.num_keys, EVAL_QUERIES)
    num_chunks = -(-num_queries // batch_size)
    pairs_key, projection_key = jax.random.split(key)
    keys, values = sample_pairs(pairs_key, task, (EVAL_SEQUENCES,), num_keys)
    projections = draw_projection(projection_key, model, (EVAL_SEQUENCES, num_chunks), params["key"]["bias"].size)

    def one_sequence(inputs):
        keys, values, projections = inputs
        queries, targets, asked = _eval_queries(keys, values, num_keys, num_queries)
        key, beta, query = project(params, keys, values, queries)

        def answer(query, projection):
            return predict(model, num_keys, key, beta, values, query, projection)

        if projections is None:
            predicted = answer(query, None)
        else:
            chunks = jnp.pad(query, ((0, num_chunks * batch_size - num_queries), (0, 0)))
            chunks = chunks.reshape(num_chunks, batch_size, -1)
            predicted = jax.lax.map(lambda chunk: answer(*chunk), (chunks, projections))
            predicted = predicted.reshape(-1, num_keys)[:num_queries]
        errors = 0.5 * jnp.sum(jnp.square(predicted - jax.nn.one_hot(targets, num_keys)), axis=-1)
        chunk_ids = jnp.arange(num_queries) // batch_size
        totals = jax.ops.segment_sum(jnp.where(asked, errors, 0), chunk_ids, num_chunks)
        counts = jax.ops.segment_sum(asked.astype(jnp.float32), chunk_ids, num_chunks)
        return jnp.sum(totals / jnp.maximum(counts, 1)), jnp.sum(counts > 0)

    sums, counts = jax.lax.map(one_sequence, (keys, values, projections))
    return jnp.sum(sums) / jnp.sum(counts)


def _eval_queries(keys, values, num_keys: int, num_queries: int):
    """The keys that are asked for, their last values, and which of the ``num_queries`` places are used."""
    if keys is None:
        return jnp.arange(num_queries), values[:num_queries], jnp.ones(num_queries, bool)
    ids = jnp.arange(num_keys)
    last = jnp.max(jnp.where(keys[None] == ids[:, None], jnp.arange(num_keys), -1), axis=1)
    queries = jnp.sort(jnp.where(last >= 0, ids, num_keys))[:num_queries]
    asked = queries < num_keys
    queries = jnp.minimum(queries, num_keys - 1)
    return queries, values[last[queries]], asked


# --- training --------------------------------------------------------------------------------------------------------


def make_step(model: Model, task: Task):
    """``init(seed) -> (params, moments)`` and ``step((params, moments), key)``: a new batch and one step of Adam."""
    learning_rate, batch_size = model.optimization
    optimizer = optax.adam(learning_rate)

    def init(seed):
        params = init_params(seed, model, task)
        return params, optimizer.init(params)

    def step(carry, key):
        params, moments = carry
        batch_key, projection_key = jax.random.split(key)
        batch, projection = sample_batch(batch_key, task, batch_size), draw_projection(projection_key, model)
        grads, _ = jax.grad(batch_loss, has_aux=True)(params, batch, projection, model)
        updates, moments = optimizer.update(grads, moments)
        return (optax.apply_updates(params, updates), moments), None

    return init, step


def make_trainer(model: Model, task: Task):
    """``start(seed) -> state`` and ``advance(state) -> state, eval loss``: 100 steps and an evaluation in one jit."""
    init, step = make_step(model, task)

    @functools.partial(jax.jit, donate_argnums=0)
    def advance(state):
        carry, key = state
        key, eval_key, *step_keys = jax.random.split(key, EVAL_EVERY + 2)
        carry, _ = jax.lax.scan(step, carry, jnp.stack(step_keys))
        return (carry, key), eval_loss(carry[0], eval_key, model, task, model.optimization[1])

    def start(seed):
        return init(seed), jax.random.key(seed)

    return start, advance


def train(
    model: Model,
    task: Task,
    seed: int = 1,
    max_steps: int = MAX_STEPS,
    report=None,
    checkpoint: pathlib.Path | None = None,
) -> tuple[list[float], float]:
    """One run to the paper's stopping rule; the evaluation loss after every 100 steps, and the seconds it took.

    It stops when the loss is at most 0.001, or was not below the best 11 times in a row, or after ``max_steps``.

    Args:
      model: feature map and rule.
      task: S and the setting.
      seed: of the initial weights and the data.
      max_steps: at least 100.
      report: if given, called with the step and the loss after each evaluation.
      checkpoint: if given, a file to which the run is saved once a minute. If it exists, the run goes on from it.

    Returns:
      The losses: their minimum is the "best", and the paper's figures show the last one. The seconds are processor
      time with compilation, of all processes that worked on the run; other work on the machine does not count.

    Raises:
      ValueError: ``max_steps`` is too small, or the checkpoint is damaged.
      OSError: the checkpoint cannot be written.
    """
    if max_steps < EVAL_EVERY:
        raise ValueError(f"max_steps must be at least {EVAL_EVERY}, the steps between evaluations, got {max_steps}")
    start, saved = time.process_time(), time.monotonic()
    begin, advance = make_trainer(model, task)
    state, losses = begin(seed), []
    if checkpoint and checkpoint.exists():
        state, losses, seconds = _restore(checkpoint, state)
        start -= seconds
    while not is_finished(losses, max_steps):
        state, loss = advance(state)
        losses.append(float(loss))
        if report:
            report(len(losses) * EVAL_EVERY, losses[-1])
        if checkpoint and time.monotonic() - saved > CHECKPOINT_SECONDS:
            _save(checkpoint, state, losses, time.process_time() - start)
            saved = time.monotonic()
    return losses, time.process_time() - start


def is_finished(losses, max_steps: int) -> bool:
    """Whether a run with these evaluation losses has stopped, by the paper's rule or at ``max_steps``."""
    best, strikes = np.inf, 0
    for loss in losses:
        strikes = 0 if loss < best else strikes + 1
        best = np.fmin(best, loss)
    reached = bool(losses) and losses[-1] <= STOP_LOSS
    return reached or strikes > MAX_STRIKES or (len(losses) + 1) * EVAL_EVERY > max_steps


def _save(path, state, losses, seconds):
    carry, key = state
    data = {"carry": carry, "key": jax.random.key_data(key), "losses": np.array(losses), "seconds": seconds}
    data = serialization.to_bytes(data)
    files.write(path, data + hashlib.sha256(data).digest())


def read_unfinished(path: pathlib.Path) -> bytes:
    """The content of a checkpoint of ``train``, after a check of its digest.

    Raises:
      ValueError: a file that was cut off, is damaged, or is something else.
    """
    content = path.read_bytes()
    data, digest = content[:-32], content[-32:]
    if hashlib.sha256(data).digest() != digest:
        raise _damaged(path)
    return data


def _damaged(path):
    return ValueError(f"{path} is not an unfinished run of this program; delete it to start the run again")


def _restore(path, state):
    carry, key = state
    target = {"carry": carry, "key": jax.random.key_data(key), "losses": np.zeros(0), "seconds": 0.0}
    try:
        data = serialization.from_bytes(target, read_unfinished(path))
    except (ValueError, KeyError) as error:  # other fields, too
        raise _damaged(path) from error
    carry = jax.tree.map(jnp.asarray, data["carry"])
    return (carry, jax.random.wrap_key_data(jnp.asarray(data["key"]))), data["losses"].tolist(), data["seconds"]
