"""``LatentAttention``: softmax attention whose cache holds one small vector for the keys and values of all heads."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from fwt_jax import arguments
from fwt_jax.layers.cache import KeyValueCache, appended, empty_cache, finished, places, visible_slots
from fwt_jax.layers.common import KERNEL_INIT, check_sizes, checked_input, linear_layers, softmax_read
from fwt_jax.layers.norms import RMSNorm


class LatentAttention(nnx.Module):
    """Causal softmax attention over a latent vector of each token (DeepSeek-V2 2024), without positions (Kimi Linear).

        c_i = norm(W_c x_i),    s_i = W_s x_i              for all heads
        k_i = [W_k c_i; s_i],   v_i = W_v c_i              for each head
        o_t = Σ_{i≤t} softmax_i(k_iᵀq_t / √(D + P)) v_i,   q_t = W_q x_t;    y_t = W_o [o_t of all heads]

    Scores and softmax are float32 (float64 for float64). The memory is S·(R + P) numbers. A call computes the keys and
    values of all S slots from them, with 2S·R·(D + V) FLOPs per head.

    Args:
      in_features, num_heads: of x and y; H.
      head_size: D, the size of a head's own part of a key (qk_nope_head_dim).
      shared_size: P, the size of the part of a key that all heads share (qk_rope_head_dim).
      latent_size: R, the size of the latent vector (kv_lora_rank).
      value_size: V; head_size if not given.
      norm_eps: of the latent's norm.
      precision, dtype, param_dtype, kernel_init, rngs: as in ``FastWeightAttention``.

    Attributes:
      query: W_q, kernel ``[in_features, H, D + P]``.
      latent, shared_key: W_c and W_s, kernels ``[in_features, R]`` and ``[in_features, P]``.
      latent_norm: ``RMSNorm`` of size R.
      key, value: W_k and W_v, kernels ``[R, H, D]`` and ``[R, H, V]``.
      out: W_o, kernel ``[H, V, in_features]``.

    Raises:
      ValueError: sizes that are not integers of at least 1, more heads than features, rngs that are no ``nnx.Rngs``.

    Example:
      >>> import jax
      >>> from flax import nnx
      >>> from fwt_jax.layers import LatentAttention
      >>> layer = LatentAttention(16, 4, 8, shared_size=2, latent_size=6, rngs=nnx.Rngs(0))
      >>> prompt = jax.random.normal(jax.random.key(0), (1, 5, 16))
      >>> y, cache = layer(prompt, layer.init_memory(batch_size=1, max_length=100))
      >>> y.shape, cache.key.shape, cache.value.shape
      ((1, 5, 16), (1, 100, 1, 6), (1, 100, 1, 2))
    """

    def __init__(
        self,
        in_features: int,
        num_heads: int,
        head_size: int,
        *,
        shared_size: int,
        latent_size: int,
        value_size: int | None = None,
        norm_eps: float = 1e-6,
        precision: lax.PrecisionLike = None,
        dtype: jax.typing.DTypeLike | None = None,
        param_dtype: jax.typing.DTypeLike = jnp.float32,
        kernel_init: nnx.Initializer = KERNEL_INIT,
        rngs: nnx.Rngs,
    ):
        value_size = head_size if value_size is None else value_size
        check_sizes(in_features, num_heads, head_size, value_size)
        arguments.sizes(shared_size=shared_size, latent_size=latent_size)
        self.in_features = in_features
        self.precision = precision
        self.latent_shape = (1, latent_size)
        self.shared_shape = (1, shared_size)
        self.memory_dtype = jnp.dtype(param_dtype if dtype is None else dtype)
        linear = linear_layers(use_bias=False, dtype=dtype, param_dtype=param_dtype, kernel_init=kernel_init, rngs=rngs)
        self.query = linear(in_features, (num_heads, head_size + shared_size))
        self.latent = linear(in_features, latent_size)
        self.shared_key = linear(in_features, shared_size)
        self.latent_norm = RMSNorm(latent_size, norm_eps, param_dtype=param_dtype, rngs=rngs)
        self.key = linear(latent_size, (num_heads, head_size))
        self.value = linear(latent_size, (num_heads, value_size))
        self.out = linear((num_heads, value_size), in_features, axis=(-2, -1))

    def __call__(
        self,
        x: jax.Array,
        memory: KeyValueCache | None = None,
        *,
        segment_ids: jax.Array | None = None,
        lengths: jax.Array | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> tuple[jax.Array, KeyValueCache]:
        """Appends T tokens to the cache and attends from each of them.

        Args:
          x, segment_ids, lengths, rngs: as in ``SoftmaxAttention``.
          memory: as in ``SoftmaxAttention``, but the field ``key`` holds the latents c after their norm,
            ``[B, S, 1, R]``, and the field ``value`` the shared parts s of the keys, ``[B, S, 1, P]``.

        Returns:
          y, as x, and the cache with the T tokens in it.

        Raises:
          ValueError: as ``SoftmaxAttention``.
        """
        x, ids = checked_input(x, self.in_features, segment_ids)
        place = places(x, memory, self.latent_shape, self.shared_shape, ids, lengths)
        latent = self.latent_norm(self.latent(x))
        after = appended(memory, latent[:, :, None], self.shared_key(x)[:, :, None], place)
        read = self._read_latents if x.shape[1] == 1 else self._read_heads
        y, after = finished(read(self.query(x), after, visible_slots(after, place)), after, place)
        return self.out(y), after

    def _read_heads(self, query, cache, visible):
        """Reads ``[B, T, H, V]`` by the keys and values of all heads, which are made from the latents."""
        latent = cache.key[:, :, 0]
        key = self.key(latent)
        shared_key = jnp.broadcast_to(cache.value, (*key.shape[:-1], cache.value.shape[-1]))
        key = jnp.concatenate([key, shared_key.astype(key.dtype)], axis=-1)
        return softmax_read(query, key, self.value(latent), visible, self.precision)

    def _read_latents(self, query, cache, visible):
        """As ``_read_heads``: W_k goes to the query and W_v to the read, so that no token of the cache is expanded.

        For one token this takes a third of the time (CPU, S = 1024), for many tokens twice as much.
        """
        head_size = self.key.kernel.shape[-1]
        own = jnp.einsum("bthk,rhk->bthr", query[..., :head_size], self.key.kernel[...].astype(query.dtype))
        absorbed = jnp.concatenate([own, query[..., head_size:]], axis=-1)
        scale = (absorbed.shape[-1] / query.shape[-1]) ** 0.5  # softmax_read divides by the root of the size it sees
        key = jnp.concatenate([cache.key, cache.value.astype(cache.key.dtype)], axis=-1)
        latent = softmax_read(scale * absorbed, key, cache.key, visible, self.precision)
        return jnp.einsum("bthr,rhv->bthv", latent, self.value.kernel[...].astype(latent.dtype))

    def init_memory(self, batch_size: int, max_length: int | None) -> KeyValueCache:
        """An empty cache with room for ``max_length`` tokens."""
        return empty_cache(batch_size, max_length, self.latent_shape, self.shared_shape, self.memory_dtype)
