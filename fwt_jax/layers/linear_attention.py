"""``LinearAttention``: the sum rule with feature maps of its own for queries and keys, and normalised outputs."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from fwt_jax import arguments, attention, feature_maps, heads
from fwt_jax.layers.common import (
    KERNEL_INIT,
    FeatureMap,
    at_least_float32,
    check_kind,
    check_shapes,
    check_sizes,
    checked_input,
    count_features,
    features,
    linear_layers,
    projections,
)
from fwt_jax.layers.norms import RMSNorm
from fwt_jax.memory import Memory
from fwt_jax.precision import computation_dtype


class LinearAttention(nnx.Module):
    """Causal linear attention (Katharopoulos et al. 2020) as today's language models use it.

        W_t = W_{t−1} + φ_k(k_t) v_tᵀ,   o_t = W_tᵀφ_q(q_t) / √F,   y_t = W_o [rms(o_t) of all heads]

    with F features, and with ``normalize`` o_t / (z_tᵀφ_q(q_t) / √F + eps), z_t = Σ_{i≤t} φ_k(k_i).

    Args:
      in_features, num_heads, head_size, value_size: as in ``FastWeightAttention``.
      num_key_value_heads: a divisor of num_heads, for keys and values that consecutive query heads share; num_heads if
        not given.
      query_map, key_map: φ_q and φ_k, callables ``[..., H, D] -> [..., H, F]``; modules are trained.
      normalize, eps: whether reads are normalised, see above.
      norm_eps: of rms, an ``RMSNorm`` over V.
      form, chunk_size, implementation, precision, sequence_axis, dtype, param_dtype, kernel_init, rngs: as in
        ``FastWeightAttention``.

    Attributes:
      query, key, value, out: as in ``FastWeightAttention``, but for the number of heads of key and value.
      norm: an ``RMSNorm`` with a scale ``[V]``, one for all heads.

    Raises:
      ValueError: as ``FastWeightAttention``.

    Example:
      >>> import jax
      >>> from flax import nnx
      >>> from fwt_jax.layers import LinearAttention
      >>> layer = LinearAttention(16, 4, 8, num_key_value_heads=2, rngs=nnx.Rngs(0))
      >>> y, memory = layer(jax.random.normal(jax.random.key(0), (1, 5, 16)))
      >>> y.shape, memory.fast_weights.shape
      ((1, 5, 16), (1, 4, 8, 8))
    """

    def __init__(
        self,
        in_features: int,
        num_heads: int,
        head_size: int,
        *,
        value_size: int | None = None,
        num_key_value_heads: int | None = None,
        query_map: FeatureMap = feature_maps.elu_plus_one,
        key_map: FeatureMap = feature_maps.elu_plus_one,
        normalize: bool = False,
        eps: float = 1e-10,
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
        key_value_heads = num_heads if num_key_value_heads is None else num_key_value_heads
        check_sizes(in_features, num_heads, head_size, value_size)
        arguments.sizes(num_key_value_heads=key_value_heads)
        if num_heads % key_value_heads:
            raise ValueError(f"num_key_value_heads must divide num_heads {num_heads}, got {key_value_heads}")
        self.in_features = in_features
        self.num_heads = num_heads
        self.value_size = value_size
        self.groups = num_heads // key_value_heads
        self.query_map = query_map
        self.key_map = key_map
        self.normalize = normalize
        self.eps = eps
        self.form: attention.Form = form
        self.chunk_size = chunk_size
        self.implementation: attention.Implementation = implementation
        self.precision = precision
        self.sequence_axis = sequence_axis
        self.memory_dtype = computation_dtype(param_dtype if dtype is None else dtype)
        linear = linear_layers(use_bias=False, dtype=dtype, param_dtype=param_dtype, kernel_init=kernel_init, rngs=rngs)
        self.query, _, _, self.out = projections(linear, in_features, num_heads, head_size, value_size)
        self.key = linear(in_features, (key_value_heads, head_size))
        self.value = linear(in_features, (key_value_heads, value_size))
        self.norm = RMSNorm(value_size, norm_eps, param_dtype=param_dtype, rngs=rngs)
        self.num_features = count_features(key_map, feature_maps.identity, num_heads, head_size)

    def __call__(
        self,
        x: jax.Array,
        memory: Memory | None = None,
        *,
        segment_ids: jax.Array | None = None,
        lengths: jax.Array | None = None,
        memory_every: int | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> tuple[jax.Array, Memory]:
        """Writes T tokens into the memory and reads it after each of them. As ``FastWeightAttention``."""
        x, ids = checked_input(x, self.in_features, segment_ids)
        if memory is not None:
            way_out = f"layer.init_memory({len(x)}) makes an empty one"
            shape = (len(x), self.num_heads, self.num_features, self.value_size)
            check_kind(memory, Memory, way_out)
            check_shapes(memory, (shape, shape[:-1]), way_out)
        key = features(self.key(x), self.key_map, feature_maps.identity)
        query = at_least_float32(features(self.query(x), self.query_map, feature_maps.identity))
        y, memory = attention.fast_weight_attention(
            (query * self.num_features**-0.5).astype(key.dtype),
            jnp.repeat(key, self.groups, axis=2),
            jnp.repeat(self.value(x), self.groups, axis=2),
            rule="sum",
            memory=memory,
            segment_ids=ids,
            lengths=lengths,
            memory_every=memory_every,
            normalize="read" if self.normalize else False,
            eps=self.eps,
            form=self.form,
            chunk_size=self.chunk_size,
            implementation=self.implementation,
            precision=self.precision,
            sequence_axis=self.sequence_axis,
        )
        return self.out(self.norm(y)), memory

    def init_memory(self, batch_size: int, max_length: int | None = None) -> Memory:
        """An empty memory, with which a call without one starts. ``max_length`` has no effect."""
        arguments.sizes(batch_size=batch_size)
        return heads.init_memory(batch_size, self.num_heads, self.num_features, self.value_size, self.memory_dtype)
