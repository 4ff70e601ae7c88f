"""``DeltaNet``, ``GatedDeltaNet`` and ``KimiDeltaAttention``: the delta rule as today's language models use it."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from fwt_jax import arguments, attention, feature_maps, heads
from fwt_jax.layers.common import (
    KERNEL_INIT,
    FeatureMap,
    at_least_float32,
    check_sizes,
    checked_input,
    features,
    linear_layers,
    projections,
)
from fwt_jax.layers.convolution import Convolutions, ConvolvedMemory, check_memory
from fwt_jax.layers.norms import RMSNorm
from fwt_jax.memory import Memory
from fwt_jax.precision import computation_dtype

Activation = Callable[[jax.Array], jax.Array]


class DeltaNet(nnx.Module):
    """Causal attention with the delta rule, short convolutions and normalised outputs (Yang et al. 2024).

    For each head, with c a ``ShortConvolution`` and N the feature normalisation,

        q_t = N(φ(c(W_q x)_t)) / √K,   k_t = N(φ(c(W_k x)_t)),   v_t = silu(c(W_v x)_t),   β_t = b · sigmoid(w_βᵀx_t)
        W_t = α_t W_{t−1} + β_t k_t (v_t − (α_t W_{t−1})ᵀk_t)ᵀ,   o_t = W_tᵀq_t
        y_t = W_o [rms(o_t) ∘ g_t of all heads]

    The decay α_t and the gate g_t are 1 unless ``decay`` and ``gate`` make them.

    Args:
      in_features: d_model, the size of x and y.
      num_heads, head_size: H, and K, the size of a query or key.
      value_size: V; head_size if not given.
      num_value_heads: HV, a multiple of H; H if not given. Query and key head h serve the value heads h·HV/H up to
        (h+1)·HV/H − 1.
      conv_size: W, the number of tokens that the convolutions mix, or None: no convolutions.
      feature_map: φ, element by element; ``jax.nn.silu`` in the published models.
      feature_normalization: N, ``[..., K] -> [..., K]``; ``l2_normalize`` in the published models.
      use_beta: False: β = b.
      max_beta: b; with 2, W can turn a key's value around (negative eigenvalues, Grazzi et al. 2025).
      decay: a module x ``[B, T, D]`` -> log α ``[B, T, HV]`` or ``[B, T, HV, K]``, as ``Decay``, or None.
      gate: a module x -> g ``[B, T, HV, V]``, as ``OutputGate``, or None.
      norm_eps: of rms, an ``RMSNorm`` over V.
      form, chunk_size, implementation, precision, sequence_axis: see ``fast_weight_attention``.
      dtype: of the computation outside the memory; if not given, the common dtype of x and the parameters.
      param_dtype, kernel_init, rngs: of the parameters; rngs' stream "params" is used.

    Attributes:
      query, key, value: projections with kernels ``[D, H, K]`` twice, and ``[D, HV, V]``.
      convolutions: ``Convolutions`` with taps ``[W, H, K]`` twice and ``[W, HV, V]``, or None.
      beta: a projection with a kernel ``[D, HV]``, or None.
      decay, gate: as given.
      norm: an ``RMSNorm`` with a scale ``[V]``, one for all heads.
      out: a projection with a kernel ``[HV, V, D]``.

    Raises:
      ValueError: sizes that are not integers of at least 1 or do not fit together, rngs that are no ``nnx.Rngs``,
        options that ``fast_weight_attention`` refuses.

    Example:
      >>> import jax
      >>> from flax import nnx
      >>> from fwt_jax.layers import DeltaNet
      >>> layer = DeltaNet(16, 2, 8, rngs=nnx.Rngs(0))
      >>> y, memory = layer(jax.random.normal(jax.random.key(0), (1, 5, 16)))
      >>> y.shape, memory.fast_weights.shape, memory.key_inputs.shape
      ((1, 5, 16), (1, 2, 8, 8), (1, 3, 2, 8))
    """

    def __init__(
        self,
        in_features: int,
        num_heads: int,
        head_size: int,
        *,
        value_size: int | None = None,
        num_value_heads: int | None = None,
        conv_size: int | None = 4,
        feature_map: FeatureMap = jax.nn.silu,
        feature_normalization: FeatureMap = feature_maps.l2_normalize,
        use_beta: bool = True,
        max_beta: float = 1.0,
        decay: Activation | None = None,
        gate: Activation | None = None,
        norm_eps: float = 1e-6,
        form: attention.Form = None,
        chunk_size: int | None = None,
        implementation: attention.Implementation = None,
        precision: lax.PrecisionLike = None,
        sequence_axis: str | None = None,
        dtype: jax.typing.DTypeLike | None = None,
        param_dtype: jax.typing.DTypeLike = jnp.float32,
        kernel_init: nnx.Initializer = KERNEL_INIT,
        rngs: nnx.Rngs,
    ):
        value_size = head_size if value_size is None else value_size
        num_value_heads = num_heads if num_value_heads is None else num_value_heads
        check_sizes(in_features, num_heads, head_size, value_size, num_value_heads)
        self.in_features = in_features
        self.key_shape = (num_heads, head_size)
        self.value_shape = (num_value_heads, value_size)
        self.feature_map = feature_map
        self.feature_normalization = feature_normalization
        self.max_beta = max_beta
        self.form: attention.Form = form
        self.chunk_size = chunk_size
        self.implementation: attention.Implementation = implementation
        self.precision = precision
        self.sequence_axis = sequence_axis
        self.dtype = jnp.dtype(param_dtype if dtype is None else dtype)
        linear = linear_layers(use_bias=False, dtype=dtype, param_dtype=param_dtype, kernel_init=kernel_init, rngs=rngs)
        self.query, self.key, self.value, self.out = projections(
            linear, in_features, num_heads, head_size, value_size, num_value_heads
        )
        convolution_options = {"sequence_axis": sequence_axis, "param_dtype": param_dtype, "rngs": rngs}
        self.convolutions = (
            Convolutions(self.key_shape, self.value_shape, conv_size, **convolution_options)
            if conv_size is not None
            else None
        )
        self.beta = linear(in_features, num_value_heads) if use_beta else None
        self.decay = decay
        self.gate = gate
        self.norm = RMSNorm(value_size, norm_eps, param_dtype=param_dtype, rngs=rngs)

    def __call__(
        self,
        x: jax.Array,
        memory: Memory | ConvolvedMemory | None = None,
        *,
        segment_ids: jax.Array | None = None,
        lengths: jax.Array | None = None,
        memory_every: int | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> tuple[jax.Array, Memory | ConvolvedMemory]:
        """Writes T tokens into the memory and reads it after each of them.

        Args:
          x: ``[B, T, in_features]``, floating point, T ≥ 1.
          memory: what an earlier call returned; empty if not given.
          segment_ids, lengths, memory_every: as in ``FastWeightAttention``. They hold for the convolutions, too.
          rngs: not used, because nothing in this layer is random.

        Returns:
          y, as x, and the memory after the last token: a ``ConvolvedMemory``, or a ``Memory`` without convolutions.

        Raises:
          ValueError: x, memory, segment_ids or lengths of the wrong shape or dtype.
        """
        x, ids = checked_input(x, self.in_features, segment_ids)
        self._check_memory(memory, len(x))
        query, key, value = self.query(x), self.key(x), self.value(x)
        inputs = ()
        if self.convolutions is not None:
            (query, key, value), inputs = self.convolutions(query, key, value, memory, ids, lengths, memory_every)
        y, after = attention.fast_weight_attention(
            features(query, self.feature_map, self.feature_normalization),
            features(key, self.feature_map, self.feature_normalization),
            jax.nn.silu(at_least_float32(value)).astype(value.dtype),
            self._write_strength(x),
            None if self.decay is None else self.decay(x),
            memory=None if memory is None else Memory(*memory[:2]),
            segment_ids=ids,
            lengths=lengths,
            memory_every=memory_every,
            form=self.form,
            chunk_size=self.chunk_size,
            implementation=self.implementation,
            precision=self.precision,
            sequence_axis=self.sequence_axis,
        )
        out = self.norm(at_least_float32(y) * self.key_shape[1] ** -0.5)
        if self.gate is not None:
            out = out * self.gate(x)
        return self.out(out.astype(y.dtype)), ConvolvedMemory(*after, *inputs) if inputs else after

    def init_memory(self, batch_size: int, max_length: int | None = None) -> Memory | ConvolvedMemory:
        """An empty memory, with which a call without one starts. ``max_length`` has no effect."""
        arguments.sizes(batch_size=batch_size)
        key_size, dtype = self.key_shape[1], computation_dtype(self.dtype)
        memory = heads.init_memory(batch_size, self.value_shape[0], key_size, self.value_shape[1], dtype)
        if self.convolutions is None:
            return memory
        return ConvolvedMemory(*memory, *self.convolutions.init_memory(batch_size, self.dtype))

    def _write_strength(self, x):
        if self.beta is None:
            return jnp.full((*x.shape[:2], self.value_shape[0]), self.max_beta, computation_dtype(x.dtype))
        return self.max_beta * jax.nn.sigmoid(at_least_float32(self.beta(x)))

    def _check_memory(self, memory, batch):
        if memory is not None:
            fast_weights = (batch, self.value_shape[0], self.key_shape[1], self.value_shape[1])
            check_memory(memory, fast_weights, self.convolutions, f"layer.init_memory({batch}) makes an empty one")


class GatedDeltaNet(DeltaNet):
    """``DeltaNet`` with a decay per head and a gate, both from x (Yang et al. 2025, "Gated Delta Networks").

        α_t = exp(−exp(a) · softplus(w_αᵀx_t + b)),   g_t = act(W_g x_t)

    Args:
      in_features, num_heads, head_size: as in ``DeltaNet``, as are the other options; value_size is 2·head_size if not
        given, as in the published models.
      gate: act, or None: no gate. ``jax.nn.silu`` in the published models.

    Example:
      >>> import jax
      >>> from flax import nnx
      >>> from fwt_jax.layers import GatedDeltaNet
      >>> layer = GatedDeltaNet(16, 2, 8, num_value_heads=4, rngs=nnx.Rngs(0))
      >>> y, memory = layer(jax.random.normal(jax.random.key(0), (1, 5, 16)))
      >>> y.shape, memory.fast_weights.shape
      ((1, 5, 16), (1, 4, 8, 16))
    """

    def __init__(
        self,
        in_features: int,
        num_heads: int,
        head_size: int,
        *,
        value_size: int | None = None,
        num_value_heads: int | None = None,
        gate: Activation | None = jax.nn.silu,
        rngs: nnx.Rngs,
        **options,
    ):
        value_size = 2 * head_size if value_size is None else value_size
        num_value_heads = num_heads if num_value_heads is None else num_value_heads
        check_sizes(in_features, num_heads, head_size, value_size, num_value_heads)
        linear_options = {name: options[name] for name in ("dtype", "param_dtype", "kernel_init") if name in options}
        super().__init__(
            in_features,
            num_heads,
            head_size,
            value_size=value_size,
            num_value_heads=num_value_heads,
            decay=Decay(in_features, num_value_heads, rngs=rngs, **linear_options),
            gate=None
            if gate is None
            else OutputGate(in_features, num_value_heads, value_size, gate, rngs=rngs, **linear_options),
            rngs=rngs,
            **options,
        )


class KimiDeltaAttention(DeltaNet):
    """``DeltaNet`` with a decay per key channel and a gate, both from x by products of low rank (Kimi Linear, 2025).

        α_t = exp(−exp(a) · softplus(W₂W₁x_t + b)) ``[K]``,   g_t = sigmoid(W₄W₃x_t + d)

    Args:
      in_features, num_heads, head_size: as in ``DeltaNet``, as are the other options.
      rank: of W₂W₁ and W₄W₃; value_size if not given, as in the published models.
      gate_bias: whether there is a d.
      lower_bound: L < 0: the decay is α_t = exp(L · sigmoid(exp(a) · (W₂W₁x_t + b))) instead, which is at least exp(L).

    Example:
      >>> import jax
      >>> from flax import nnx
      >>> from fwt_jax.layers import KimiDeltaAttention
      >>> layer = KimiDeltaAttention(16, 2, 8, rngs=nnx.Rngs(0))
      >>> layer.decay(jax.random.normal(jax.random.key(0), (1, 5, 16))).shape
      (1, 5, 2, 8)
    """

    def __init__(
        self,
        in_features: int,
        num_heads: int,
        head_size: int,
        *,
        value_size: int | None = None,
        num_value_heads: int | None = None,
        rank: int | None = None,
        gate_bias: bool = True,
        lower_bound: float | None = None,
        rngs: nnx.Rngs,
        **options,
    ):
        value_size = head_size if value_size is None else value_size
        num_value_heads = num_heads if num_value_heads is None else num_value_heads
        check_sizes(in_features, num_heads, head_size, value_size, num_value_heads)
        low_rank = {name: options[name] for name in ("dtype", "param_dtype", "kernel_init") if name in options}
        low_rank |= {"rank": value_size if rank is None else rank, "rngs": rngs}
        shape = (num_value_heads, value_size)
        super().__init__(
            in_features,
            num_heads,
            head_size,
            value_size=value_size,
            num_value_heads=num_value_heads,
            decay=Decay(in_features, num_value_heads, channels=head_size, lower_bound=lower_bound, **low_rank),
            gate=OutputGate(in_features, *shape, jax.nn.sigmoid, use_bias=gate_bias, **low_rank),
            rngs=rngs,
            **options,
        )


class Decay(nnx.Module):
    """log α_t = −exp(a) · softplus(W x_t + b), float32: a decay for each head, or for each of its key channels.

    Args:
      in_features: the size of x.
      num_heads: of the memory.
      channels: K, for a decay of each key channel; None: one for each head.
      rank: of W = W₂W₁; None: W is one matrix.
      lower_bound: L < 0: log α_t = L · sigmoid(exp(a) · (W x_t + b)) instead.
      dtype, param_dtype, kernel_init, rngs: as in ``DeltaNet``.

    Attributes:
      projection: W, ``nnx.LinearGeneral`` or a ``LowRank``.
      log_rate: a ``[H]``; exp(a) is uniform in (1, 16) at the start.
      bias: b ``[H]`` or ``[H, K]``; softplus(b) is log-uniform in (0.001, 0.1) at the start (Gu & Dao 2023).
    """

    def __init__(
        self,
        in_features: int,
        num_heads: int,
        *,
        channels: int | None = None,
        rank: int | None = None,
        lower_bound: float | None = None,
        dtype: jax.typing.DTypeLike | None = None,
        param_dtype: jax.typing.DTypeLike = jnp.float32,
        kernel_init: nnx.Initializer = KERNEL_INIT,
        rngs: nnx.Rngs,
    ):
        if lower_bound is not None and not lower_bound < 0:
            raise ValueError(f"lower_bound must be below 0, as −5.0, or None, got {lower_bound!r}")
        shape = (num_heads,) if channels is None else (num_heads, channels)
        linear = linear_layers(use_bias=False, dtype=dtype, param_dtype=param_dtype, kernel_init=kernel_init, rngs=rngs)
        self.projection = (
            linear(in_features, shape) if rank is None else LowRank(linear, linear, in_features, rank, shape)
        )
        self.lower_bound = lower_bound
        rate = jax.random.uniform(rngs.params(), (num_heads,), jnp.float32, 1, 16)
        step = jnp.exp(jax.random.uniform(rngs.params(), shape, jnp.float32, jnp.log(0.001), jnp.log(0.1)))
        self.log_rate = nnx.Param(jnp.log(rate).astype(param_dtype))
        self.bias = nnx.Param((step + jnp.log(-jnp.expm1(-step))).astype(param_dtype))

    def __call__(self, x: jax.Array) -> jax.Array:
        """log α ``[B, T, H]`` or ``[B, T, H, K]``, at least float32, of x ``[B, T, in_features]``."""
        step = at_least_float32(self.projection(x)) + at_least_float32(self.bias[...])[None, None]
        rate = jnp.exp(at_least_float32(self.log_rate[...]))
        rate = rate.reshape(1, 1, -1, *(1,) * (step.ndim - 3))
        if self.lower_bound is not None:
            return self.lower_bound * jax.nn.sigmoid(rate * step)
        return -rate * jax.nn.softplus(step)


class OutputGate(nnx.Module):
    """g_t = act(W x_t + d), float32, for each head and value.

    Args:
      in_features, num_heads, value_size: D, H and V.
      activation: act, as ``jax.nn.silu`` or ``jax.nn.sigmoid``.
      rank: of W = W₂W₁; None: W is one matrix.
      use_bias: whether there is a d.
      dtype, param_dtype, kernel_init, rngs: as in ``DeltaNet``.

    Attributes:
      projection: W and d, ``nnx.LinearGeneral`` or a ``LowRank``.
    """

    def __init__(
        self,
        in_features: int,
        num_heads: int,
        value_size: int,
        activation: Activation = jax.nn.silu,
        *,
        rank: int | None = None,
        use_bias: bool = False,
        dtype: jax.typing.DTypeLike | None = None,
        param_dtype: jax.typing.DTypeLike = jnp.float32,
        kernel_init: nnx.Initializer = KERNEL_INIT,
        rngs: nnx.Rngs,
    ):
        self.activation = activation
        options = {"dtype": dtype, "param_dtype": param_dtype, "kernel_init": kernel_init, "rngs": rngs}
        linear = linear_layers(use_bias=use_bias, **options)
        shape = (num_heads, value_size)
        if rank is None:
            self.projection = linear(in_features, shape)
        else:
            self.projection = LowRank(linear_layers(use_bias=False, **options), linear, in_features, rank, shape)

    def __call__(self, x: jax.Array) -> jax.Array:
        """g ``[B, T, H, V]``, at least float32, of x ``[B, T, in_features]``."""
        return self.activation(at_least_float32(self.projection(x)))


class LowRank(nnx.Module):
    """W₂ W₁ x + d: ``down`` (W₁) to ``rank`` features, and ``up`` (W₂, d) to ``shape``."""

    def __init__(self, down_linear, up_linear, in_features: int, rank: int, shape: tuple[int, ...]):
        arguments.sizes(rank=rank)
        self.down = down_linear(in_features, rank)
        self.up = up_linear(rank, shape)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.up(self.down(x))
