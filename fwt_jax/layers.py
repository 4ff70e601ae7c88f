"""Flax NNX layers: what stands between a residual stream ``[B, T, d_model]`` and a memory.

``FastWeightAttention`` and its baseline ``SoftmaxAttention`` are called alike, and return what the next call takes:

    y, memory = layer(x, memory)        training: all tokens, memory left out; streaming: one token after another

Every leaf of a memory leads with the batch axis, so ``jax.tree.map(lambda leaf: leaf[rows], memory)`` selects rows.
Letters: B batch, T tokens, H heads, D head size, K key features, V value size, S capacity of a cache.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from numbers import Integral
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from fwt_jax import attention, feature_maps
from fwt_jax.memory import Memory, Rule

FeatureMap = Callable[[jax.Array], jax.Array]
DEFAULT_INIT = nnx.initializers.lecun_normal()
DEFAULT_INIT_PER_HEAD = nnx.initializers.lecun_normal(batch_axis=0)


class FastWeightAttention(nnx.Module):
    """Causal multi-head attention with a fast weight memory (Schlag, Irie & Schmidhuber 2021, eq. 20-28).

    For each head, with N the feature normalisation and s the output scale,

        k_t = N(φ(W_k x_t)),   q_t = N(φ(W_q x_t)),   v_t = W_v x_t,   β_t = sigmoid(w_βᵀx_t)        eq. 21, 29
        W_t = W_{t−1} + β_t k_t (v_t − W_{t−1}ᵀk_t)ᵀ        for rule "delta"; see ``rule``           eq. 24
        o_t = s · W_tᵀq_t                                   see ``normalize``                        eq. 25, 28

    and y_t = W_o [o_t of all heads]. Rule "sum" has no β. A token costs 6KV FLOPs per head beside the projections
    (4KV for "sum", in recurrent form), and the memory is K·V numbers per head however many tokens were read.

    Args:
      in_features: d_model, the size of x and y.
      num_heads, head_size: H, and D, the size of a query or key before the feature map.
      value_size: V, the size of a value per head; head_size if not given.
      feature_map: φ, a callable ``[..., H, D] -> [..., H, K]``: a function of ``feature_maps``, a
        ``functools.partial`` of one (``partial(dpfp, nu=2)``), or a module, as ``FavorPlus``, of this layer alone.
        A map with a method ``draw(rngs)`` is random: see ``rngs`` of the call.
      feature_normalization: N, a callable ``[..., K] -> [..., K]``, or None: ``sum_normalize`` (eq. 29, and features
        that are all zero stay zero) or ``l2_normalize`` (Yang et al. 2024).
      rule: "delta", "sum" (eq. 17) or "fwm" (delta with a clipped memory).
      normalize, eps: attention normalisation: False, "read" (eq. 28) or "retrieval" (eq. 27-28).
      output_scale: s. The authors' language models have head_size**-0.5.
      use_bias: whether the projections, that of β among them, have biases.
      form, chunk_size, implementation, precision: how the memory is advanced; with rule, normalize and eps, these are
        the arguments of ``fast_weight_attention``. The projections follow ``jax.default_matmul_precision``.
      dtype: of the computation outside the memory; that of x and the parameters together if not given.
      param_dtype, kernel_init, rngs: of the parameters of the projections; rngs' stream "params" is used.

    Attributes:
      query, key, value: projections with kernels ``[in_features, H, D or V]`` and biases ``[H, D or V]``.
      beta: None for rule "sum", else kernel ``[in_features, H]``, bias ``[H]``.
      out: kernel ``[H, V, in_features]``, bias ``[in_features]``.
      num_features: K.

    Raises:
      ValueError: sizes that are not integers of at least 1, a feature map that is none or divides by zero (ReLU and
        DPFP with eps 0), options that ``fast_weight_attention`` refuses.

    Example:
      >>> layer = FastWeightAttention(512, 8, 64, feature_map=functools.partial(dpfp, nu=1), rngs=nnx.Rngs(0))
      >>> y, memory = layer(x)
    """

    def __init__(
        self,
        in_features: int,
        num_heads: int,
        head_size: int,
        *,
        value_size: int | None = None,
        feature_map: FeatureMap = feature_maps.elu_plus_one,
        feature_normalization: FeatureMap | None = feature_maps.sum_normalize,
        rule: Rule = "delta",
        normalize: attention.Normalize = False,
        eps: float = 1e-6,
        output_scale: float = 1.0,
        use_bias: bool = False,
        form: attention.Form = "chunkwise",
        chunk_size: int | None = None,
        implementation: Literal[None, "xla", "pallas"] = None,
        precision: lax.PrecisionLike = None,
        dtype: jax.typing.DTypeLike | None = None,
        param_dtype: jax.typing.DTypeLike = jnp.float32,
        kernel_init: nnx.Initializer = DEFAULT_INIT,
        rngs: nnx.Rngs,
    ):
        value_size = head_size if value_size is None else value_size
        self.in_features, self.num_heads, self.value_size = in_features, num_heads, value_size
        feature_normalization = feature_maps.identity if feature_normalization is None else feature_normalization
        self.feature_map, self.feature_normalization = feature_map, feature_normalization
        self.rule, self.normalize, self.eps, self.output_scale = rule, normalize, eps, output_scale
        self.form, self.chunk_size, self.implementation, self.precision = form, chunk_size, implementation, precision
        self.memory_dtype = attention.computation_dtype(param_dtype if dtype is None else dtype)
        options = dict(use_bias=use_bias, dtype=dtype, param_dtype=param_dtype, kernel_init=kernel_init, rngs=rngs)
        sizes = (in_features, num_heads, head_size, value_size)
        self.query, self.key, self.value, self.out = _projections(*sizes, **options)
        self.beta = None if rule == "sum" else nnx.LinearGeneral(in_features, num_heads, **options)
        attention.check_options(rule, form, normalize, implementation, self.beta, None, chunk_size)
        self.num_features = _count_features(feature_map, feature_normalization, num_heads, head_size)

    def __call__(
        self,
        x: jax.Array,
        memory: Memory | None = None,
        *,
        segment_ids: jax.Array | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> tuple[jax.Array, Memory]:
        """Writes T tokens into the memory and reads it after each of them.

        Args:
          x: ``[B, T, in_features]``, floating point, T ≥ 1.
          memory: what an earlier call returned; empty if not given.
          segment_ids: integers ``[B, T]``, for packed sequences: the memory is dropped where the id changes. The first
            token of a call always continues ``memory``. Rows of different lengths are padded in front, with an id
            that the text has not: its first token drops what the padding wrote, and y and the memory are those of the
            row alone. Padding behind is written into the memory, whatever its numbers and ids are.
          rngs: draws the random map of this call, if the feature map is one, from the stream "projection" (or
            "default"). Without it the map's own draw is used: leave it out wherever a memory goes from one call to
            another, for the features of two draws do not match.

        Returns:
          y, as x, and the memory after the last token: float32 whatever ``dtype`` is (float64 for float64).

        Raises:
          ValueError: x, memory or segment_ids of the wrong shape or dtype.
        """
        x, segment_ids = _checked_input(x, self.in_features, segment_ids)
        if memory is not None:
            batch, way_out = len(x), f"layer.init_memory({len(x)}) makes an empty one"
            _check_kind(memory, Memory, way_out)
            shape = (batch, self.num_heads, self.num_features, self.value_size)
            _check_shapes(memory, (shape, shape[:-1]), way_out)
        feature_map = self.feature_map
        if rngs is not None and hasattr(feature_map, "draw"):
            feature_map = feature_map.draw(rngs)  # once: keys and queries must share it
        y, memory = attention.fast_weight_attention(
            _features(self.query(x), feature_map, self.feature_normalization),
            _features(self.key(x), feature_map, self.feature_normalization),
            self.value(x),
            None if self.beta is None else jax.nn.sigmoid(_at_least_float32(self.beta(x))),
            rule=self.rule,
            memory=memory,
            segment_ids=segment_ids,
            normalize=self.normalize,
            eps=self.eps,
            form=self.form,
            chunk_size=self.chunk_size,
            implementation=self.implementation,
            precision=self.precision,
        )
        return self.out(self.output_scale * y), memory

    def init_memory(self, batch_size: int) -> Memory:
        """An empty memory: fast weights ``[B, H, K, V]`` and key sums ``[B, H, K]``. A call without one starts here."""
        _check_sizes(batch_size=batch_size)
        return attention.init_memory(batch_size, self.num_heads, self.num_features, self.value_size, self.memory_dtype)


# --- feature maps with something to keep -----------------------------------------------------------------------------


class RandomProjection(nnx.Variable):
    """A random matrix that is saved with the model, and neither trained nor updated."""


class FavorPlus(nnx.Module):
    """FAVOR+ as a feature map (Choromanski et al. 2021; Schlag et al. 2021, eq. 31-32), with its projection R.

    Called, it uses the R that it was made with: evaluation. ``draw`` makes the map of another R: training, where the
    paper redraws it for every batch, as ``FastWeightAttention`` does when called with ``rngs``. One R serves all heads.

    Args:
      head_size, num_features: D, and M, the number of rows of R; K = 2·M.
      orthogonal: "rows" is the paper; "columns" the authors' language-model toolkit. See ``orthogonal_projection``.
      eps: see ``feature_maps.favor_plus``; 0 is the paper, 1e-4 the authors' language-model toolkit.
      rngs: the stream "params" is used.

    Example:
      >>> feature_map = FavorPlus(64, 128, rngs=rngs)
      >>> layer = FastWeightAttention(512, 8, 64, feature_map=feature_map, rngs=rngs)
    """

    def __init__(
        self, head_size: int, num_features: int, *, orthogonal: str = "rows", eps: float = 0.0, rngs: nnx.Rngs
    ):
        self.head_size, self.num_features, self.orthogonal, self.eps = head_size, num_features, orthogonal, eps
        self.projection = RandomProjection(self._project(rngs.params()))

    def __call__(self, x: jax.Array, projection: jax.Array | None = None) -> jax.Array:
        """φ(x) ``[..., 2·M]`` of x ``[..., D]``, with the projection that is kept if none is given."""
        return feature_maps.favor_plus(x, self.projection[...] if projection is None else projection, eps=self.eps)

    def draw(self, rngs: nnx.Rngs) -> FeatureMap:
        """The same map with a new projection, from the stream "projection" (or "default"); the kept one stays."""
        return functools.partial(self, projection=self._project(rngs.projection()))

    def _project(self, key):
        return feature_maps.orthogonal_projection(key, self.num_features, self.head_size, orthogonal=self.orthogonal)


class TrainedFeatureMap(nnx.Module):
    """φ(x) = f(x, A, b) with a trained A and b for each head, shared by keys and queries.

    Args:
      function: f, ``feature_maps.t2r`` (Kasai et al. 2021) or ``feature_maps.hedgehog`` (Zhang et al. 2024).
      num_heads, head_size, num_features: A is ``[H, D, num_features]``; K is num_features, twice that with hedgehog.
      kernel_init, param_dtype, rngs: of A and b, which starts from 0; rngs' stream "params" is used.

    Example:
      >>> feature_map = TrainedFeatureMap(feature_maps.t2r, 8, 64, 32, rngs=rngs)
    """

    def __init__(
        self,
        function: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
        num_heads: int,
        head_size: int,
        num_features: int,
        *,
        kernel_init: nnx.Initializer = DEFAULT_INIT_PER_HEAD,
        param_dtype: jax.typing.DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        _check_sizes(num_heads=num_heads, head_size=head_size, num_features=num_features)
        self.function = function
        self.kernel = nnx.Param(kernel_init(rngs.params(), (num_heads, head_size, num_features), param_dtype))
        self.bias = nnx.Param(jnp.zeros((num_heads, num_features), param_dtype))

    def __call__(self, x: jax.Array) -> jax.Array:
        """φ(x) ``[..., H, K]`` of x ``[..., H, D]``."""
        return jax.vmap(self.function, in_axes=(-2, 0, 0), out_axes=-2)(x, self.kernel[...], self.bias[...])


# --- the baseline ----------------------------------------------------------------------------------------------------


class KeyValueCache(NamedTuple):
    """What a softmax attention layer remembers: all keys and values, up to a capacity S.

    Attributes:
      key, value: ``[B, S, H, D]`` and ``[B, S, H, V]``, in the dtype of the computation.
      start: for each token the first one that it may see, where its segment began, int32 ``[B, S]``.
      length: tokens written so far, int32 ``[B]``. Set it back to take tokens back: nothing else depends on them, and
        the next call overwrites them.
    """

    key: jax.Array
    value: jax.Array
    start: jax.Array
    length: jax.Array


class SoftmaxAttention(nnx.Module):
    """Causal multi-head softmax attention, the baseline (Vaswani et al. 2017; Schlag et al. 2021, eq. 4-7).

        o_t = Σ_{i≤t} softmax_i(k_iᵀq_t / √D) v_i        for each head;   y_t = W_o [o_t of all heads]

    Scores and softmax are float32 (float64 for float64). A token costs 2S(D+V) FLOPs per head beside the projections,
    and the memory is S·(D+V) numbers per head.

    Args:
      in_features, num_heads, head_size, value_size, use_bias, precision, dtype, param_dtype, kernel_init, rngs: as in
        ``FastWeightAttention``, whose attributes query, key, value and out are here too.

    Raises:
      ValueError: sizes that are not integers of at least 1.

    Example:
      >>> layer = SoftmaxAttention(512, 8, 64, rngs=nnx.Rngs(0))
      >>> y, cache = layer(prompt, layer.init_memory(batch_size, max_length=1024))
    """

    def __init__(
        self,
        in_features: int,
        num_heads: int,
        head_size: int,
        *,
        value_size: int | None = None,
        use_bias: bool = False,
        precision: lax.PrecisionLike = None,
        dtype: jax.typing.DTypeLike | None = None,
        param_dtype: jax.typing.DTypeLike = jnp.float32,
        kernel_init: nnx.Initializer = DEFAULT_INIT,
        rngs: nnx.Rngs,
    ):
        value_size = head_size if value_size is None else value_size
        self.in_features, self.precision = in_features, precision
        self.key_shape, self.value_shape = (num_heads, head_size), (num_heads, value_size)
        self.memory_dtype = jnp.dtype(param_dtype if dtype is None else dtype)
        options = dict(use_bias=use_bias, dtype=dtype, param_dtype=param_dtype, kernel_init=kernel_init, rngs=rngs)
        sizes = (in_features, num_heads, head_size, value_size)
        self.query, self.key, self.value, self.out = _projections(*sizes, **options)

    def __call__(
        self,
        x: jax.Array,
        memory: KeyValueCache | None = None,
        *,
        segment_ids: jax.Array | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> tuple[jax.Array, KeyValueCache]:
        """Appends T tokens to the cache and attends from each of them.

        Args:
          x: ``[B, T, in_features]``, floating point, T ≥ 1.
          memory: a cache with room for T tokens. If not given, the tokens of x are all there is, and the cache that
            comes out is full: to go on after them, start with ``init_memory``.
          segment_ids: integers ``[B, T]``: a token sees no further back than the last change of the id. The first
            token of a call always continues ``memory``. Rows of different lengths may be padded behind: set the
            length of their cache back, ``cache._replace(length=lengths)``.
          rngs: not used, for nothing here is random.

        Returns:
          y, as x, and the cache with the T tokens in it.

        Raises:
          ValueError: x, memory or segment_ids of the wrong shape or dtype, or a full cache. Where the length is traced
            (``jax.jit``) nothing can raise: there y is NaN for the rows whose cache is full.
        """
        x, segment_ids = _checked_input(x, self.in_features, segment_ids)
        batch, num_tokens, _ = x.shape
        reset = attention.resets(segment_ids, batch, num_tokens)
        query, key, value = self.query(x), self.key(x), self.value(x)
        length = goes_on = jnp.zeros(batch, jnp.int32)
        if memory is not None:
            self._check_cache(memory, batch, num_tokens)
            length = memory.length.astype(jnp.int32)
            before = jnp.take_along_axis(memory.start, jnp.maximum(length - 1, 0)[:, None], axis=1)[:, 0]
            goes_on = jnp.where(length == 0, 0, before)

        last = length[:, None] + jnp.arange(num_tokens, dtype=jnp.int32)[None]
        first = jnp.broadcast_to(goes_on[:, None], last.shape)
        if reset is not None:
            first = lax.cummax(jnp.where(reset, last, first), axis=1)
        start = first
        if memory is not None:
            append = jax.vmap(functools.partial(lax.dynamic_update_slice_in_dim, axis=0))
            key = append(memory.key, key.astype(memory.key.dtype), length)
            value = append(memory.value, value.astype(memory.value.dtype), length)
            start = append(memory.start, start, length)
        precision = attention.products_precision(self.precision, query, key, value)
        y = _softmax_read(query, key, value, first, last, precision)
        length = length + num_tokens
        y = jnp.where((length <= key.shape[1])[:, None, None, None], y, jnp.nan)
        return self.out(y), KeyValueCache(key, value, start, length)

    def init_memory(self, batch_size: int, max_length: int) -> KeyValueCache:
        """An empty cache with room for ``max_length`` tokens."""
        _check_sizes(batch_size=batch_size, max_length=max_length)
        key = jnp.zeros((batch_size, max_length, *self.key_shape), self.memory_dtype)
        value = jnp.zeros((batch_size, max_length, *self.value_shape), self.memory_dtype)
        return KeyValueCache(key, value, jnp.zeros(key.shape[:2], jnp.int32), jnp.zeros(batch_size, jnp.int32))

    def _check_cache(self, memory, batch, num_tokens):
        way_out = f"layer.init_memory({batch}, max_length) makes an empty one"
        _check_kind(memory, KeyValueCache, way_out)
        capacity = (*np.shape(memory.key), 0, 0)[1]
        slots = (batch, capacity)
        _check_shapes(memory, ((*slots, *self.key_shape), (*slots, *self.value_shape), slots, (batch,)), way_out)
        used = 0 if isinstance(memory.length, jax.core.Tracer) else np.asarray(memory.length).max()
        if used + num_tokens > capacity:
            raise ValueError(
                f"the cache holds {used} of at most {capacity} tokens and has no room for {num_tokens} more; "
                "start with layer.init_memory(batch_size, max_length) and a larger max_length"
            )


def _softmax_read(query, key, value, first, last, precision):
    """o_t = Σᵢ softmaxᵢ(kᵢᵀq_t/√D) vᵢ over ``first_t`` ≤ i ≤ ``last_t``, both ``[B, T]``."""
    slot = jnp.arange(key.shape[1], dtype=jnp.int32)[None, None]
    visible = (first[..., None] <= slot) & (slot <= last[..., None])
    scores = jnp.einsum("bthd,bshd->bhts", _at_least_float32(query), _at_least_float32(key), precision=precision)
    weights = jax.nn.softmax(jnp.where(visible[:, None], scores * query.shape[-1] ** -0.5, -jnp.inf), axis=-1)
    return jnp.einsum("bhts,bshv->bthv", weights, _at_least_float32(value), precision=precision).astype(value.dtype)


# --- shared parts and checks -----------------------------------------------------------------------------------------


def _projections(in_features, num_heads, head_size, value_size, **options):
    """W_q, W_k, W_v: d_model -> [H, ·] and W_o: [H, V] -> d_model."""
    _check_sizes(in_features=in_features, num_heads=num_heads, head_size=head_size, value_size=value_size)
    linear = functools.partial(nnx.LinearGeneral, **options)
    heads = [linear(in_features, (num_heads, size)) for size in (head_size, head_size, value_size)]
    return *heads, linear((num_heads, value_size), in_features, axis=(-2, -1))


def _check_sizes(least=1, **sizes):
    wrong = {name: size for name, size in sizes.items() if not isinstance(size, Integral)}
    if wrong:
        raise ValueError(f"sizes must be integers, got {wrong}; int(...) makes one of a whole number")
    wrong = {name: size for name, size in sizes.items() if size < least}
    if wrong:
        raise ValueError(f"sizes must be at least {least}, got {wrong}")


def _features(x, feature_map, feature_normalization):
    """N(φ(x)), float32 until it is normalised: float16 does not have the range of features that are not."""
    return feature_normalization(feature_map(_at_least_float32(x))).astype(x.dtype)


def _count_features(feature_map, feature_normalization, num_heads, head_size):
    if not callable(feature_map) or not callable(feature_normalization):
        raise ValueError(
            "feature_map must be a callable, and feature_normalization one or None, "
            f"got {feature_map!r} and {feature_normalization!r}; take them from fwt_jax.feature_maps"
        )
    heads = jax.ShapeDtypeStruct((1, 1, num_heads, head_size), jnp.float32)
    features = jax.eval_shape(lambda x: feature_normalization(feature_map(x)), heads)
    if features.ndim != 4 or features.shape[:-1] != heads.shape[:-1]:
        raise ValueError(
            "feature_map and feature_normalization must change the last axis only, "
            f"got {heads.shape} -> {features.shape}"
        )
    alternating = np.where(np.arange(head_size) % 2, 1, -1)
    relu = "those of ReLU, and of DPFP of an odd size, can be all zeros; take others, or sum_normalize without its eps"
    zeros = "they are divided by a sum or norm that is 0; take sum_normalize without its eps, or an eps above 0"
    trials = [("[−1, −1, −1, …]", -np.ones(head_size), relu), ("[0, 0, 0, …]", np.zeros(head_size), zeros)]
    if head_size % 2:
        trials.insert(1, ("[−1, 1, −1, …]", alternating, relu))
    for name, x, reason in trials:
        with jax.ensure_compile_time_eval(), jax.debug_nans(False), jax.debug_infs(False):
            extreme = feature_normalization(feature_map(jnp.broadcast_to(jnp.asarray(x, heads.dtype), heads.shape)))
        if not isinstance(extreme, jax.core.Tracer) and not np.all(np.isfinite(extreme)):
            raise ValueError(f"the features of {name}, of head_size {head_size}, are not finite: {reason}")
    return features.shape[-1]


def _at_least_float32(x):
    return x.astype(attention.computation_dtype(x.dtype))


def _checked_input(x, in_features, segment_ids=None):
    """x, ``[B, T, in_features]``, and segment_ids as arrays."""
    x = jnp.asarray(x)
    if segment_ids is not None and not hasattr(segment_ids, "shape"):
        segment_ids = np.asarray(segment_ids)
    if x.ndim != 3 or x.shape[-1] != in_features or x.shape[1] == 0 or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(
            f"x must be floating point and [B, T, {in_features}] with T ≥ 1, got {x.dtype}{list(x.shape)}; "
            "for one token or one sequence add an axis of length 1, e.g. x[:, None]"
        )
    return x, segment_ids


def _check_kind(memory, kind, way_out):
    if not isinstance(memory, kind):
        raise ValueError(
            f"memory must be a {kind.__name__}, as this layer returns it, got {type(memory).__name__}; {way_out}"
        )


def _check_shapes(memory, shapes, way_out):
    """shapes: those of the arrays of memory, in their order."""
    got = [list(x.shape) if hasattr(x, "shape") else type(x).__name__ for x in memory]
    expected = [list(shape) for shape in shapes]
    if got != expected:
        expected, got = (", ".join(f"{n} {x}" for n, x in zip(memory._fields, y, strict=True)) for y in (expected, got))
        raise ValueError(f"memory must hold {expected}, got {got}; {way_out}")
