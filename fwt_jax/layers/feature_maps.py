"""Feature maps with variables of their own: a random projection that is drawn, and matrices that are trained."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from fwt_jax import arguments, feature_maps
from fwt_jax.layers.common import FeatureMap, check_rngs

KERNEL_INIT_PER_HEAD = nnx.initializers.lecun_normal(batch_axis=0)


class RandomProjection(nnx.Variable):
    """A random matrix that is saved with the model but not trained."""


class FavorPlus(nnx.Module):
    """FAVOR+ as a feature map (Choromanski et al. 2021; Schlag et al. 2021, eq. 31-32), with its projection R.

    Evaluation calls the map with the R that it was made with. In training the paper redraws R for every batch:
    ``draw`` gives the map of a new R, and ``FastWeightAttention`` uses it when called with ``rngs``. All heads share R.

    Args:
      head_size, num_features: D, and M, the number of rows of R; K = 2·M.
      orthogonal: "rows" (the paper) or "columns" (the authors' language-model toolkit). See ``orthogonal_projection``.
      eps: see ``feature_maps.favor_plus``; 0 (the paper) or 1e-4 (the authors' language-model toolkit).
      rngs: the stream "params" is used.

    Example:
      >>> from flax import nnx
      >>> from fwt_jax import FastWeightAttention, FavorPlus
      >>> feature_map = FavorPlus(8, 32, rngs=nnx.Rngs(0))
      >>> FastWeightAttention(16, 2, 8, feature_map=feature_map, rngs=nnx.Rngs(1)).num_features
      64
    """

    def __init__(
        self, head_size: int, num_features: int, *, orthogonal: str = "rows", eps: float = 0.0, rngs: nnx.Rngs
    ):
        check_rngs(rngs)
        self.head_size = head_size
        self.num_features = num_features
        self.orthogonal = orthogonal
        self.eps = eps
        self.projection = RandomProjection(self._project(rngs.params()))

    def __call__(self, x: jax.Array, projection: jax.Array | None = None) -> jax.Array:
        """φ(x) ``[..., 2·M]`` of x ``[..., D]``, with the map's own projection if none is given."""
        return feature_maps.favor_plus(x, self.projection[...] if projection is None else projection, eps=self.eps)

    def draw(self, rngs: nnx.Rngs) -> FeatureMap:
        """The map with a new projection, from the stream "projection" (or "default"). This map keeps its own."""
        return functools.partial(self, projection=self._project(rngs.projection()))

    def _project(self, key):
        return feature_maps.orthogonal_projection(key, self.num_features, self.head_size, orthogonal=self.orthogonal)


class TrainedFeatureMap(nnx.Module):
    """φ(x) = f(x, A, b) with a trained A and b for each head, shared by keys and queries.

    Args:
      function: f, ``feature_maps.t2r`` (Kasai et al. 2021) or ``feature_maps.hedgehog`` (Zhang et al. 2024).
      num_heads, head_size, num_features: A is ``[H, D, num_features]``. K is num_features, or 2·num_features with
        hedgehog.
      kernel_init, param_dtype, rngs: of A and b; b starts from 0, and rngs' stream "params" is used.

    Example:
      >>> from flax import nnx
      >>> from fwt_jax import FastWeightAttention, TrainedFeatureMap, feature_maps
      >>> feature_map = TrainedFeatureMap(feature_maps.t2r, 2, 8, 5, rngs=nnx.Rngs(0))
      >>> FastWeightAttention(16, 2, 8, feature_map=feature_map, rngs=nnx.Rngs(1)).num_features
      5
    """

    def __init__(
        self,
        function: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
        num_heads: int,
        head_size: int,
        num_features: int,
        *,
        kernel_init: nnx.Initializer = KERNEL_INIT_PER_HEAD,
        param_dtype: jax.typing.DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        check_rngs(rngs)
        arguments.sizes(num_heads=num_heads, head_size=head_size, num_features=num_features)
        self.function = function
        self.kernel = nnx.Param(kernel_init(rngs.params(), (num_heads, head_size, num_features), param_dtype))
        self.bias = nnx.Param(jnp.zeros((num_heads, num_features), param_dtype))

    def __call__(self, x: jax.Array) -> jax.Array:
        """φ(x) ``[..., H, K]`` of x ``[..., H, D]``."""
        return jax.vmap(self.function, in_axes=(-2, 0, 0), out_axes=-2)(x, self.kernel[...], self.bias[...])
