"""``FastWeightAttention``: causal attention with a fast weight memory, from x to y."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from fwt_jax import arguments, attention, feature_maps, heads
from fwt_jax.attention_arguments import check_options
from fwt_jax.layers.common import (
    KERNEL_INIT,
    FeatureMap,
    at_least_float32,
    check_sizes,
    checked_input,
    count_features,
    draw_once,
    features,
    linear_layers,
    projections,
)
from fwt_jax.layers.convolution import Convolutions, ConvolvedMemory, check_memory
from fwt_jax.memory import Memory
from fwt_jax.precision import computation_dtype
from fwt_jax.rules import Rule, find_rule


class FastWeightAttention(nnx.Module):
    """Causal multi-head attention with a fast weight memory (Schlag, Irie & Schmidhuber 2021, eq. 20-28).

    For each head, with N the feature normalisation and s the output scale,

        k_t = N(φ(W_k x_t)),   q_t = N(φ(W_q x_t)),   v_t = W_v x_t,   β_t = sigmoid(w_βᵀx_t)        eq. 21, 29
        W_t = W_{t−1} + β_t k_t (v_t − W_{t−1}ᵀk_t)ᵀ        for rule "delta"; see ``rule``           eq. 24
        o_t = s · W_tᵀq_t                                   see ``normalize``                        eq. 25, 28

    and y_t = W_o [o_t of all heads]. Rule "sum" has no β. A token costs 6KV FLOPs per head beside the projections
    (4KV for "sum", in recurrent form). The memory is K·V numbers per head, however many tokens were read.

    A token's value is written under the key of the same token, so the layer alone does not know which tokens are
    neighbours. To bind a value to the key before it, add positions to x, or take ``conv_size=4``: queries, keys and
    values are then mixed over the last 4 tokens before φ, as in DeltaNet (Yang et al. 2024).
    The layer has no parameters of a decay: gated rules (Gated DeltaNet) pass ``log_decay`` to the call.

    Args:
      in_features: d_model, the size of x and y.
      num_heads, head_size: H, and D, the size of a query or key before the feature map.
      num_value_heads: HV, a multiple of H: the values, β and memories have HV heads, and HV/H of them share a query and
        a key head, see ``fast_weight_attention``. H if not given.
      value_size: V, the size of a value per head; head_size if not given.
      feature_map: φ, a callable ``[..., H, D] -> [..., H, K]``: a function of ``feature_maps``, a
        ``functools.partial`` of one (``partial(dpfp, nu=2)``), or a module, as ``FavorPlus``, of this layer alone.
        A map with a method ``draw(rngs)`` is random: see ``rngs`` of the call.
      feature_normalization: N, a callable ``[..., K] -> [..., K]``, or None: ``sum_normalize`` (eq. 29; features
        that are all zero stay zero) or ``l2_normalize`` (Yang et al. 2024).
      rule: "delta", "sum" (eq. 17), "oja" (with values scaled to length 1), "fwm" (delta with a clipped memory), or a
        ``Rule`` of your own.
      normalize, eps: attention normalisation: False, "read" (eq. 28) or "retrieval" (eq. 27-28).
      output_scale: s. The authors' language models have head_size**-0.5.
      conv_size: the number of tokens that a ``ShortConvolution`` of W_q x, W_k x and W_v x mixes; None: no convolution.
      use_bias: whether the projections, including the one of β, have biases.
      form, chunk_size, implementation, precision: how the memory is advanced. These, rule, normalize and eps are
        arguments of ``fast_weight_attention``. The projections follow ``jax.default_matmul_precision``.
      sequence_axis: the axis of the mesh that splits the tokens of x, see ``fast_weight_attention``. For one token at a
        time it only costs messages.
      dtype: of the computation outside the memory; if not given, the common dtype of x and the parameters.
      param_dtype, kernel_init, rngs: of the parameters of the projections; rngs' stream "params" is used.

    Attributes:
      query, key: projections with kernels ``[in_features, H, D]`` and biases ``[H, D]``.
      value: kernel ``[in_features, HV, V]``, bias ``[HV, V]``.
      convolutions: None without ``conv_size``, else three of type ``ShortConvolution``: query, key and value.
      beta: None for a rule that needs none ("sum"), else kernel ``[in_features, HV]``, bias ``[HV]``.
      out: kernel ``[HV, V, in_features]``, bias ``[in_features]``.
      num_features: K.

    Raises:
      ValueError: sizes that are not integers of at least 1, more heads than features (probably the order of
        ``nnx.MultiHeadAttention``), num_value_heads that H does not divide, rngs that are no ``nnx.Rngs``, a feature
        map that is no callable or gives features that are not finite, options that ``fast_weight_attention`` refuses.

    Example:
      >>> import functools, jax
      >>> from flax import nnx
      >>> from fwt_jax import FastWeightAttention, feature_maps
      >>> feature_map = functools.partial(feature_maps.dpfp, nu=1)
      >>> layer = FastWeightAttention(16, 2, 8, feature_map=feature_map, rngs=nnx.Rngs(0))
      >>> x = jax.random.normal(jax.random.key(0), (1, 5, 16))
      >>> y, memory = layer(x)
      >>> y.shape, memory.fast_weights.shape
      ((1, 5, 16), (1, 2, 16, 8))

      ``nnx.Sequential`` and ``nnx.tabulate`` take layers that return y alone:

      >>> class Reads(FastWeightAttention):
      ...     def __call__(self, x):
      ...         return super().__call__(x)[0]
      >>> model = nnx.Sequential(Reads(16, 2, 8, rngs=nnx.Rngs(0)), nnx.Linear(16, 4, rngs=nnx.Rngs(1)))
      >>> model(x).shape
      (1, 5, 4)
    """

    def __init__(
        self,
        in_features: int,
        num_heads: int,
        head_size: int,
        *,
        num_value_heads: int | None = None,
        value_size: int | None = None,
        feature_map: FeatureMap = feature_maps.elu_plus_one,
        feature_normalization: FeatureMap | None = feature_maps.sum_normalize,
        rule: str | Rule = "delta",
        normalize: attention.Normalize = False,
        eps: float = 1e-6,
        output_scale: float = 1.0,
        conv_size: int | None = None,
        use_bias: bool = False,
        form: attention.Form = None,
        chunk_size: int | None = None,
        implementation: Literal[None, "xla", "pallas", "triton"] = None,
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
        row = find_rule(rule)
        self.in_features = in_features
        self.num_heads = num_heads
        self.num_value_heads = num_value_heads
        self.value_size = value_size
        self.feature_map = feature_map
        self.feature_normalization = feature_maps.identity if feature_normalization is None else feature_normalization
        self.rule = rule
        self.normalize: attention.Normalize = normalize
        self.eps = eps
        self.output_scale = output_scale
        self.form: attention.Form = form
        self.chunk_size = chunk_size
        self.implementation: Literal[None, "xla", "pallas", "triton"] = implementation
        self.precision = precision
        self.sequence_axis = sequence_axis
        self.dtype = jnp.dtype(param_dtype if dtype is None else dtype)
        self.memory_dtype = computation_dtype(self.dtype)
        linear = linear_layers(
            use_bias=use_bias, dtype=dtype, param_dtype=param_dtype, kernel_init=kernel_init, rngs=rngs
        )
        sizes = (in_features, num_heads, head_size, value_size)
        self.query, self.key, self.value, self.out = projections(linear, *sizes, num_value_heads)
        self.beta = linear(in_features, num_value_heads) if row.needs_beta else None
        convolution_options = {"sequence_axis": sequence_axis, "param_dtype": param_dtype, "rngs": rngs}
        channels = (num_heads, head_size), (num_value_heads, value_size)
        self.convolutions = None if conv_size is None else Convolutions(*channels, conv_size, **convolution_options)
        check_options(row, form, normalize, implementation, self.beta, None, chunk_size, eps)
        self.num_features = count_features(feature_map, self.feature_normalization, num_heads, head_size)

    def __call__(
        self,
        x: jax.Array,
        memory: Memory | ConvolvedMemory | None = None,
        *,
        log_decay: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        lengths: jax.Array | None = None,
        memory_every: int | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> tuple[jax.Array, Memory | ConvolvedMemory]:
        """Writes T tokens into the memory and reads it after each of them.

        Args:
          x: ``[B, T, in_features]``, floating point, T ≥ 1.
          memory: what an earlier call returned; empty if not given. With an axis N behind B, one for each segment;
            not with convolutions, whose last inputs a row has once.
          log_decay: log α ≤ 0, ``[B, T, HV]`` or ``[B, T, HV, K]``: W_{t−1} is α_t W_{t−1} in the equations above. No
            decay if not given. See ``fast_weight_attention``.
          segment_ids: integers ``[B, T]``, for packed sequences: the memory is dropped where the id changes. The first
            token of a call always continues ``memory``. For padding in front, take an id that the text does not have.
            The first token of the text then drops the padding, and y and the memory do not depend on it.
            If there are N memories, a token advances and reads the one that its id names, from 0 to N − 1.
          lengths: integers ``[B]`` from 0 to T, for padding behind: row b has ``lengths[b]`` tokens, and its memory is
            that of the row cut there. The reads of the padding are 0. T for all rows if not given.
          memory_every: N: returns the memories after every N tokens and after the last one, ``[B, ⌈T/N⌉, HV, K, V]``.
          rngs: draws a new projection for a random feature map, from the stream "projection" (or "default"). Without
            it the map uses its own projection. Leave it out wherever a memory goes from one call to the next, because
            the features of two projections do not match.

        Returns:
          y, as x, and the memory after the last token: float32 whatever ``dtype`` is (float64 for float64). With
          convolutions it is a ``ConvolvedMemory``, which also holds their last inputs.

        Raises:
          ValueError: x, memory, log_decay, segment_ids or lengths of the wrong shape or dtype.
        """
        x, ids = checked_input(x, self.in_features, segment_ids)
        if memory is not None:
            got = getattr(getattr(memory, "key_sum", None), "shape", ())
            segments = got[1:2] if len(got) == 4 and self.convolutions is None else ()
            shape = (len(x), *segments, self.num_value_heads, self.num_features, self.value_size)
            check_memory(memory, shape, self.convolutions, f"layer.init_memory({len(x)}) makes an empty one")
        feature_map = draw_once(self.feature_map, rngs)
        query, key, value = self.query(x), self.key(x), self.value(x)
        inputs = ()
        if self.convolutions is not None:
            (query, key, value), inputs = self.convolutions(query, key, value, memory, ids, lengths, memory_every)
        if find_rule(self.rule).unit_values:
            value = feature_maps.l2_normalize(at_least_float32(value)).astype(value.dtype)
        y, after = attention.fast_weight_attention(
            features(query, feature_map, self.feature_normalization),
            features(key, feature_map, self.feature_normalization),
            value,
            None if self.beta is None else jax.nn.sigmoid(at_least_float32(self.beta(x))),
            log_decay,
            rule=self.rule,
            memory=None if memory is None else Memory(*memory[:2]),
            segment_ids=ids,
            lengths=lengths,
            memory_every=memory_every,
            normalize=self.normalize,
            eps=self.eps,
            form=self.form,
            chunk_size=self.chunk_size,
            implementation=self.implementation,
            precision=self.precision,
            sequence_axis=self.sequence_axis,
        )
        return self.out(self.output_scale * y), ConvolvedMemory(*after, *inputs) if inputs else after

    def init_memory(self, batch_size: int, max_length: int | None = None) -> Memory | ConvolvedMemory:
        """An empty memory, with which a call without one starts: W ``[B, HV, K, V]`` and z ``[B, HV, K]``.

        ``max_length`` is an argument of ``SoftmaxAttention.init_memory``. It has no effect on fast weights.
        """
        arguments.sizes(batch_size=batch_size)
        sizes = (self.num_value_heads, self.num_features, self.value_size)
        memory = heads.init_memory(batch_size, *sizes, self.memory_dtype)
        if self.convolutions is None:
            return memory
        return ConvolvedMemory(*memory, *self.convolutions.init_memory(batch_size, self.dtype))
