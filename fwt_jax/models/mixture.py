"""Feed-forward layers of public language models: ``SwiGLU`` and ``MixtureOfExperts``."""

from __future__ import annotations

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from fwt_jax import arguments
from fwt_jax.layers.common import KERNEL_INIT, at_least_float32, check_rngs, promote_to_float32
from fwt_jax.sharding import TOKENS, over_batch


class SwiGLU(nnx.Module):
    """y = W_d (silu(W_g x) ⊙ W_u x) (Shazeer 2020, eq. 6), without biases.

    Args:
      d_model, d_ff: the sizes of x and of W_u x.
      dtype: of the computation; if not given, the common dtype of x and the parameters.
      param_dtype, kernel_init, rngs: of the parameters.

    Attributes:
      gate, up: W_g and W_u, kernels ``[d_model, d_ff]``.
      down: W_d, kernel ``[d_ff, d_model]``.

    Raises:
      ValueError: sizes that are not integers of at least 1, rngs that are no ``nnx.Rngs``.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from fwt_jax.models import SwiGLU
      >>> SwiGLU(8, 24, rngs=nnx.Rngs(0))(jnp.ones((1, 5, 8))).shape
      (1, 5, 8)
    """

    def __init__(
        self,
        d_model: int,
        d_ff: int,
        *,
        dtype: jax.typing.DTypeLike | None = None,
        param_dtype: jax.typing.DTypeLike = jnp.float32,
        kernel_init: nnx.Initializer = KERNEL_INIT,
        rngs: nnx.Rngs,
    ):
        check_rngs(rngs)
        arguments.sizes(d_model=d_model, d_ff=d_ff)
        linear = functools.partial(
            nnx.Linear, use_bias=False, dtype=dtype, param_dtype=param_dtype, kernel_init=kernel_init, rngs=rngs
        )
        self.gate = linear(d_model, d_ff)
        self.up = linear(d_model, d_ff)
        self.down = linear(d_ff, d_model)

    def __call__(self, x: jax.Array) -> jax.Array:
        """y ``[..., d_model]`` of x ``[..., d_model]``."""
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))


class ExpertBias(nnx.Variable):
    """Added to the scores by which experts are chosen. It has no gradient: the load of the experts changes it."""


class MixtureOfExperts(nnx.Module):
    """Each token goes through the few experts that a router chooses for it, and through a shared expert.

        s = softmax(W_r x) or sigmoid(W_r x)                       the scores of E experts
        C = the experts_per_token best by s + bias                 bias = 0 for "softmax"
        w_e = scaling · s_e,   or  scaling · s_e / Σ_{c∈C} s_c     with ``normalize``
        y = Σ_{e∈C} w_e expert_e(x) + γ shared(x)                  γ = sigmoid(w_γᵀx) with ``shared_gate``, or 1

    Experts and shared expert are ``SwiGLU``. With more than one group, C lies in the groups whose two best experts
    have the largest sums of s + bias. The router and the sum over experts are float32 (float64 for float64). The
    gradient flows through w and the chosen experts, not through the choice. There is no loss that balances the load.

    Only chosen experts compute: a token costs 6·experts_per_token·d_model·d_ff FLOPs in them, at most doubled, because
    the tokens of an expert are padded to whole blocks.

    Args:
      d_model: the size of x and y.
      num_experts, experts_per_token: E, and the size of C.
      d_ff: of an expert.
      shared_d_ff: of the shared expert; 0: there is none.
      shared_gate: whether the shared expert has the gate γ.
      router: the function of the scores: "softmax" (Qwen3-Next) or "sigmoid" (Kimi Linear, DeepSeek-V3).
      normalize: whether the weights are divided by their sum.
      groups, groups_per_token: how many groups the experts are divided into, and how many of them a token may use;
        for "sigmoid" only.
      scaling: a factor of all weights.
      dtype: of the experts; if not given, the common dtype of x and the parameters.
      param_dtype, kernel_init, rngs: of the parameters.

    Attributes:
      router: ``nnx.Linear``, kernel ``[d_model, E]``.
      bias: ``ExpertBias`` ``[E]``, float32; None for "softmax".
      gate, up, down: the experts, ``[E, d_model, d_ff]``, the same, and ``[E, d_ff, d_model]``.
      shared: ``SwiGLU``, or None.
      shared_gate: ``nnx.Linear``, kernel ``[d_model, 1]``, or None.

    Raises:
      ValueError: sizes that are not integers of at least 1, more experts for a token than there are in its groups,
        groups that do not divide the experts or have less than two, groups with "softmax", a shared gate without a
        shared expert, an unknown router.

    References:
      Shazeer et al. 2017; Qwen3-Next; DeepSeek-V3 2024, eq. 12-16 (sigmoid, bias, groups); Gale et al. 2022 (blocks).

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from fwt_jax.models import MixtureOfExperts
      >>> layer = MixtureOfExperts(8, 4, 2, 16, shared_d_ff=16, shared_gate=True, rngs=nnx.Rngs(0))
      >>> layer(jnp.ones((1, 5, 8))).shape
      (1, 5, 8)
    """

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        experts_per_token: int,
        d_ff: int,
        *,
        shared_d_ff: int = 0,
        shared_gate: bool = False,
        router: Literal["softmax", "sigmoid"] = "softmax",
        normalize: bool = True,
        groups: int = 1,
        groups_per_token: int = 1,
        scaling: float = 1.0,
        dtype: jax.typing.DTypeLike | None = None,
        param_dtype: jax.typing.DTypeLike = jnp.float32,
        kernel_init: nnx.Initializer = KERNEL_INIT,
        rngs: nnx.Rngs,
    ):
        check_rngs(rngs)
        arguments.sizes(d_model=d_model, d_ff=d_ff)
        arguments.one_of(("softmax", "sigmoid"), router=router)
        _check_choice(num_experts, experts_per_token, groups, groups_per_token, router)
        _check_shared(shared_d_ff, shared_gate)
        self.experts_per_token = experts_per_token
        self.score = {"softmax": jax.nn.softmax, "sigmoid": jax.nn.sigmoid}[router]
        self.normalize = normalize
        self.groups = groups
        self.groups_per_token = groups_per_token
        self.scaling = scaling
        self.dtype = dtype
        options = {"param_dtype": param_dtype, "kernel_init": kernel_init, "rngs": rngs}
        linear = functools.partial(nnx.Linear, d_model, use_bias=False, promote_dtype=promote_to_float32, **options)
        self.router = linear(num_experts, precision=lax.Precision.HIGHEST)
        self.bias = ExpertBias(jnp.zeros(num_experts, jnp.float32)) if router == "sigmoid" else None

        def stacked(*shape):
            """One matrix for each expert: an initializer would take a stack of them for a convolution."""
            keys = jax.random.split(rngs.params(), num_experts)
            return nnx.Param(jax.vmap(lambda key: kernel_init(key, shape, param_dtype))(keys))

        self.gate = stacked(d_model, d_ff)
        self.up = stacked(d_model, d_ff)
        self.down = stacked(d_ff, d_model)
        self.shared = SwiGLU(d_model, shared_d_ff, dtype=dtype, **options) if shared_d_ff else None
        self.shared_gate = linear(1) if shared_gate else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """y ``[B, T, d_model]`` of x ``[B, T, d_model]``, in the dtype of the experts."""
        weights, chosen = self.choose(x)
        experts = (self.gate[...], self.up[...], self.down[...])
        rows = x.astype(jnp.result_type(x, *experts) if self.dtype is None else self.dtype)
        y = over_batch(_weighted_experts, (rows, weights, chosen), experts, TOKENS)
        if self.shared is not None:
            shared = at_least_float32(self.shared(x))
            gate = 1 if self.shared_gate is None else jax.nn.sigmoid(self.shared_gate(x))
            y = y + gate * shared
        return y.astype(rows.dtype)

    def choose(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The weights w of the chosen experts of x ``[B, T, d_model]``, and their indices: ``[B, T, chosen]``."""
        scores = self.score(self.router(x))
        order = scores if self.bias is None else scores + self.bias[...].astype(scores.dtype)[None, None]
        if self.groups > 1:
            order = _within_best_groups(order, self.groups, self.groups_per_token)
        _, chosen = lax.top_k(lax.stop_gradient(order), self.experts_per_token)
        weights = jnp.take_along_axis(scores, chosen, axis=-1)
        if self.normalize:
            weights = weights / (jnp.sum(weights, axis=-1, keepdims=True) + 1e-20)
        return self.scaling * weights, chosen


def _within_best_groups(scores, groups, groups_per_token):
    """Scores ``[..., E]``, −∞ outside of the groups whose two best scores have the largest sums."""
    grouped = scores.reshape(*scores.shape[:-1], groups, -1)
    sums = jnp.sum(lax.top_k(grouped, 2)[0], axis=-1)
    _, best = lax.top_k(sums, groups_per_token)
    allowed = jnp.any(jax.nn.one_hot(best, groups, dtype=bool), axis=-2)
    return jnp.where(allowed[..., None], grouped, -jnp.inf).reshape(scores.shape)


def _weighted_experts(arrays, experts):
    """Σ_{e∈C} w_e expert_e(x), at least float32.

    A block of rows has one expert, so that a loop over blocks computes no other expert. On a CPU ``lax.ragged_dot``
    masks all rows for every expert: with 64 experts it took nineteen times as long.

    Args:
      arrays: x ``[B, T, D]``, the weights ``[B, T, chosen]`` and the experts' indices.
      experts: their matrices, stacked.
    """
    x, weights, chosen = arrays
    num_experts, per_token = len(experts[0]), chosen.shape[-1]
    size, expert_of_block, place = _blocks(chosen.reshape(-1), num_experts)
    rows = jnp.zeros((size * len(expert_of_block), x.shape[-1]), x.dtype)
    rows = rows.at[place].set(jnp.repeat(x.reshape(-1, x.shape[-1]), per_token, axis=0))

    # Recomputed in the backward pass, which would otherwise hold a copy of the matrices for each block.
    @jax.checkpoint
    def through_expert(block):
        x, expert = block
        gate, up, down = (matrices[expert].astype(x.dtype) for matrices in experts)
        return (jax.nn.silu(x @ gate) * (x @ up)) @ down

    y = lax.map(through_expert, (rows.reshape(-1, size, x.shape[-1]), expert_of_block))
    y = y.reshape(rows.shape)[place].reshape(*chosen.shape, x.shape[-1])
    return jnp.einsum("btc,btcd->btd", weights, at_least_float32(y), precision=lax.Precision.HIGHEST)


def _blocks(chosen, num_experts):
    """Divides rows into blocks of one expert each.

    Args:
      chosen: the expert of each row, integers ``[N]``.

    Returns:
      The size of a block, the expert of each block, and each row's place in the blocks, ``[N]``.
    """
    num_rows = len(chosen)
    size = max(1, num_rows // num_experts)
    num_blocks = (num_rows + min(num_experts, num_rows) * (size - 1)) // size
    row_counts = jnp.bincount(chosen, length=num_experts)
    block_counts = -(-row_counts // size)
    last_block, last_row = jnp.cumsum(block_counts), jnp.cumsum(row_counts)
    order = jnp.argsort(chosen)
    # The n-th row of an expert takes the n-th place in the blocks of the expert.
    shift = (last_block - block_counts) * size - (last_row - row_counts)
    place = jnp.zeros_like(order).at[order].set(jnp.arange(num_rows) + shift[chosen[order]])
    # The blocks that are too many hold zeros, and any expert may compute them.
    expert_of_block = jnp.repeat(jnp.arange(num_experts), block_counts, total_repeat_length=num_blocks)
    return size, expert_of_block, place


def _check_choice(num_experts, experts_per_token, groups, groups_per_token, router):
    arguments.sizes(
        num_experts=num_experts, experts_per_token=experts_per_token, groups=groups, groups_per_token=groups_per_token
    )
    if groups > 1 and router == "softmax":
        raise ValueError(f'groups of experts go with router="sigmoid", got groups={groups} and router="softmax"')
    if num_experts % groups or groups_per_token > groups or (groups > 1 and num_experts < 2 * groups):
        raise ValueError(
            f"groups must divide num_experts, {num_experts}, into groups of at least two experts, and be at least "
            f"groups_per_token, {groups_per_token}, got {groups}"
        )
    available = num_experts // groups * groups_per_token
    if experts_per_token > available:
        raise ValueError(
            f"experts_per_token must be at most the {available} experts that a token may use, got {experts_per_token}"
        )


def _check_shared(shared_d_ff, shared_gate):
    arguments.sizes(0, shared_d_ff=shared_d_ff)
    if shared_gate and not shared_d_ff:
        raise ValueError("shared_gate needs a shared expert, got shared_d_ff=0")
