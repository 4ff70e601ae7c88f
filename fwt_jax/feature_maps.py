"""Feature maps φ: ℝᴰ → ℝᶠ of linear attention, as pure functions ``[..., D] -> [..., F]``.

A feature map replaces the exponential kernel of softmax attention: exp(qᵀk) ≈ φ(k)ᵀφ(q). The memory sees φ(x)
only. So it holds at most F key-value pairs without interference (Schlag, Irie & Schmidhuber 2021, section 4.1).

Every map returns the dtype of its input. Exponentials, norms and sums over features are computed in float32 (float64
for float64 input), so bfloat16 inputs lose their own rounding only. In float16, features below 6e-8 become 0 and
features above 65504 become infinite. If x is float16, map and normalise in float32, as the layers do.

Normalisation needs the ratios of a token's features, however small they are. So the two maps of exponentials,
``elu_plus_one`` and ``favor_plus``, raise a token whose largest feature is below exp(−60) (exp(−500) for float64) to
that (``favor_plus``: over √(2M)), by one common factor. No feature changes by more than exp(−60), and no other token
changes. The products of ``relu_squared``, ``dpfp`` and ``taylor`` have no such bound: they are 0 for |x| below 1e-19,
and infinite above 1e19.

=================  =========  ==============================================================
map                F          source
=================  =========  ==============================================================
``identity``       D          Schmidhuber 1992; RetNet, DeltaNet with l2-normalised keys
``relu``           D          Kasai et al. 2021
``relu_squared``   D          Hua et al. 2022; So et al. 2021
``tanh``           D          Schlag, Munkhdalai & Schmidhuber 2021 (fast weight memory)
``elu_plus_one``   D          Katharopoulos et al. 2020; Schlag et al. 2021, eq. 30
``softmax``        D          Irie et al. 2021, 2022
``dpfp``           2·D·ν      Schlag, Irie & Schmidhuber 2021, eq. 37
``favor_plus``     2·M        Choromanski et al. 2021; Schlag et al. 2021, eq. 31-32
``taylor``         ≈ D²/2     Zhang et al. 2024 (Hedgehog, section 4.1); Arora et al. 2024
``t2r``            F          Kasai et al. 2021
``hedgehog``       2·F        Zhang et al. 2024
=================  =========  ==============================================================

``sum_normalize`` and ``l2_normalize`` are applied to features, after the map.
"""

import functools
import math
from numbers import Integral

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


def _accumulation_dtype(x: jax.Array) -> jnp.dtype:
    """float32, or float64 for float64 input; raises a ValueError for other than floating-point input."""
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(
            f"a feature map takes floating-point input, got {x.dtype}{list(x.shape)}; "
            "cast it first, e.g. x.astype(jnp.float32)"
        )
    return jnp.dtype("float64" if x.dtype == jnp.float64 else "float32")


def _least_exponent(x: jax.Array) -> float:
    """The least logarithm of a token's largest feature. From there, smaller features still have all their digits."""
    return -60.0 if x.dtype == jnp.float32 else -500.0


def _in_float32(feature_map):
    """Evaluates ``feature_map(x, ...)`` in float32 (or float64) and casts the result back to x.dtype."""

    @functools.wraps(feature_map)
    def wrapped(x, *args, **kwargs):
        x = jnp.asarray(x)
        return feature_map(x.astype(_accumulation_dtype(x)), *args, **kwargs).astype(x.dtype)

    return wrapped


def identity(x: jax.Array) -> jax.Array:
    """φ(x) = x.

    Args:
      x: ``[..., D]``, floating point.

    Returns:
      ``x`` itself.
    """
    x = jnp.asarray(x)
    _accumulation_dtype(x)
    return x


@_in_float32
def relu(x: jax.Array) -> jax.Array:
    """φ(x) = max(x, 0), element-wise (Kasai et al. 2021, "Finetuning Pretrained Transformers into RNNs").

    Args:
      x: ``[..., D]``, floating point.

    Returns:
      ``[..., D]`` in x's dtype, all entries ≥ 0.
    """
    return jnp.maximum(x, 0)


@_in_float32
def relu_squared(x: jax.Array) -> jax.Array:
    """φ(x) = max(x, 0)², element-wise (So et al. 2021, "Primer"; Hua et al. 2022, "FLASH").

    Args:
      x: ``[..., D]``, floating point.

    Returns:
      ``[..., D]`` in x's dtype, all entries ≥ 0.
    """
    return jnp.square(jnp.maximum(x, 0))


@_in_float32
def tanh(x: jax.Array) -> jax.Array:
    """φ(x) = tanh(x), element-wise: the map of the fast weight memory (Schlag, Munkhdalai & Schmidhuber 2021).

    Args:
      x: ``[..., D]``, floating point.

    Returns:
      ``[..., D]`` in x's dtype, entries in [−1, 1].
    """
    return jnp.tanh(x)


@_in_float32
def elu_plus_one(x: jax.Array) -> jax.Array:
    """φ(x) = x + 1 for x > 0, exp(x) otherwise (Katharopoulos et al. 2020; Schlag et al. 2021, eq. 30).

    The exponential is not computed as (exp(x) − 1) + 1, which is zero in bfloat16 for x < −6. If all x of a token are
    below −60, its features are exp(x − max(x) − 60), and ``sum_normalize`` turns them into softmax(x).

    Args:
      x: ``[..., D]``, floating point.

    Returns:
      ``[..., D]`` in x's dtype, all entries > 0 (until exp underflows).
    """
    largest = jnp.max(x, axis=-1 if x.ndim else None, keepdims=True, initial=-jnp.inf)
    exponents = jnp.minimum(x, 0) - jnp.minimum(largest - _least_exponent(x), 0)
    return jnp.where(x > 0, x + 1, jnp.exp(exponents))


@_in_float32
def softmax(x: jax.Array) -> jax.Array:
    """φ(x) = exp(x) / Σᵢ exp(xᵢ): features with a sum of 1 (Irie et al. 2021, 2022).

    Args:
      x: ``[..., D]``, floating point.

    Returns:
      ``[..., D]`` in x's dtype, entries in (0, 1) that sum to one.
    """
    return jax.nn.softmax(x, axis=-1)


@_in_float32
def dpfp(x: jax.Array, nu: int = 1) -> jax.Array:
    """Deterministic parameter-free projection, DPFP-ν (Schlag, Irie & Schmidhuber 2021, eq. 37, listing 1).

    With u = relu([x; −x]) of size 2D, and j = 1 … ν,

        φ(x)[(j−1)·2D + i] = u[i] · u[i − j mod 2D].

    The features are non-negative and sparse. Two vectors share an active feature only if the signs of the same two
    coordinates agree, so more than D keys can be (nearly) orthogonal.

    For even D, DPFP-1 of a vector without zero entries has at least one positive entry. For odd D, the two
    alternating sign patterns give all zeros, and ``sum_normalize(..., eps=0)`` makes NaN of them.

    Args:
      x: ``[..., D]``, floating point.
      nu: ν, from 1 to 2D − 1.

    Returns:
      ``[..., 2·D·nu]`` in x's dtype, all entries ≥ 0.

    Raises:
      ValueError: ``nu`` is not an integer in 1 … 2D − 1.

    Example:
      >>> import jax.numpy as jnp
      >>> from fwt_jax.feature_maps import dpfp
      >>> dpfp(jnp.array([1.0, -2.0]), nu=1)       # u = [1, 0, 0, 2]
      Array([2., 0., 0., 0.], dtype=float32)
    """
    size = x.shape[-1]
    if not isinstance(nu, Integral) or not 1 <= nu <= 2 * size - 1:
        raise ValueError(f"dpfp of vectors of size {size} takes nu from 1 to {2 * size - 1}, got nu={nu}")
    pair = jnp.concatenate([x, -x], axis=-1)
    # Each roll is a slice of u with its last nu entries put before its first. The barrier makes XLA compute this copy
    # once. Otherwise the CPU compiler fuses it into the products and branches on each entry, at three times the time.
    extended = lax.optimization_barrier(jnp.concatenate([pair[..., 2 * size - nu :], pair], axis=-1))
    extended = jnp.maximum(extended, 0)
    rolls = [extended[..., nu - j : nu - j + 2 * size] for j in range(nu + 1)]
    return jnp.concatenate([rolls[0] * roll for roll in rolls[1:]], axis=-1)


@functools.partial(jax.jit, static_argnames=("num_features", "dim", "orthogonal", "dtype"))
def orthogonal_projection(
    key: jax.Array, num_features: int, dim: int, *, orthogonal: str = "rows", dtype=jnp.float32
) -> jax.Array:
    """Random matrix R for ``favor_plus``: Gaussian in law, with orthogonal rows (Choromanski et al. 2021, sec. 2.4).

    The rows within each block of min(M, D) are orthogonal. Their lengths are those of Gaussian vectors (χ with D
    degrees of freedom), so each row by itself is N(0, I).

    Args:
      key: a JAX random key.
      num_features: M, the number of rows of R; ``favor_plus`` then gives 2·M features.
      dim: D, the size of the vectors to project.
      orthogonal: "rows" is the estimator of the paper and of the authors' retrieval program. "columns" is drawn by
        the authors' language-model toolkit: the columns of R are orthogonal, in blocks of M, and have the lengths of
        Gaussian vectors of size M.
      dtype: dtype of R.

    Returns:
      R, ``[num_features, dim]``.

    Raises:
      ValueError: ``orthogonal`` is neither of the two, or a size is not an integer above 0.
    """
    if orthogonal not in ("rows", "columns"):
        raise ValueError(f'orthogonal must be "rows" or "columns", got {orthogonal!r}')
    if not all(isinstance(size, Integral) and size >= 1 for size in (num_features, dim)):
        raise ValueError(f"num_features and dim must be integers of at least 1, got {num_features} and {dim}")
    if orthogonal == "columns":
        return orthogonal_projection(key, dim, num_features, dtype=dtype).T
    num_blocks = -(-num_features // dim)
    gaussian = jax.random.normal(key, (num_blocks, dim, dim), dtype)
    # The columns of the triangle have the same lengths as these, which are therefore independent of the basis. The
    # lengths of the rows are not.
    lengths = jnp.linalg.norm(gaussian, axis=-2)
    basis, triangle = jnp.linalg.qr(gaussian)
    # The signs make the basis uniform (Haar), because those of QR depend on the algorithm.
    basis = basis * jnp.sign(jnp.diagonal(triangle, axis1=-2, axis2=-1))[:, None, :]
    rows = jnp.swapaxes(basis, -1, -2) * lengths[..., None]
    return rows.reshape(num_blocks * dim, dim)[:num_features]


@_in_float32
def favor_plus(x: jax.Array, projection: jax.Array, *, eps: float = 0.0) -> jax.Array:
    """FAVOR+ with the hyperbolic-cosine pair (Choromanski et al. 2021; Schlag et al. 2021, eq. 31-32).

        φ(x) = h(x)/√M · [exp(Rx); exp(−Rx)],   h(x) = exp(−‖x‖²/2) / √2,

    an unbiased positive estimate of the softmax kernel: E[φ(k)ᵀφ(q)] = exp(kᵀq).
    The exponents are added before exp, so features overflow only if φ itself does: for ‖Rᵢ‖²/2 > 88 in float32.
    ``sum_normalize(favor_plus(x, R))`` equals softmax([Rx; −Rx]) for all x, because h cancels.

    For long x, h(x) is smaller than any float32. If h would make the largest feature of a token smaller than
    exp(−60)/√(2M), another factor makes it equal to that (see the head of this file). Without ``sum_normalize``, such
    tokens are all equally small. Their sum is far below the eps of attention normalisation, so the read is about 0. Use
    x / D^¼ or ``sum_normalize`` for x as long as that.

    Args:
      x: ``[..., D]``, floating point.
      projection: R, ``[M, D]``, from ``orthogonal_projection``. Draw a new one for each training batch, and use one for
        all of evaluation. Keys and queries must share it.
      eps: added to both exponentials, before the factor 1/√(2M). The paper has 0. The authors' language-model toolkit
        has 1e-4, which makes all features of a long x equal, because their exponentials are far smaller.

    Returns:
      ``[..., 2·M]`` in x's dtype, all entries > 0 (until exp underflows).

    Raises:
      ValueError: ``projection`` is not ``[M, D]``.
    """
    if projection.ndim != 2 or projection.shape[-1] != x.shape[-1]:
        raise ValueError(
            f"projection must be [M, {x.shape[-1]}] for x of shape {list(x.shape)}, got {list(projection.shape)}; "
            f"draw it with orthogonal_projection(key, M, {x.shape[-1]})"
        )
    projected = jnp.matmul(x, projection.astype(x.dtype).T, precision=lax.Precision.HIGHEST)
    largest = jnp.max(jnp.abs(projected), axis=-1, keepdims=True)
    offset = 0.5 * jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    size = 2 * projection.shape[0]
    offset = jnp.minimum(offset, largest - _least_exponent(x)) + 0.5 * math.log(size)
    return jnp.concatenate([jnp.exp(projected - offset), jnp.exp(-projected - offset)], axis=-1) + eps * size**-0.5


@_in_float32
def taylor(x: jax.Array) -> jax.Array:
    """Second-order Taylor features of the exponential (Zhang et al. 2024, "Hedgehog"; Arora et al. 2024, "Based").

        φ(k)ᵀφ(q) = 1 + s + s²/2,   s = kᵀq / √D,
        φ(x) = [1; x / D^¼; (xᵢ²)ᵢ / √(2D); (xᵢxⱼ)_{i<j} / √D].

    Each product of two coordinates appears once, so F is about half of the 1 + D + D² of vec(x xᵀ).

    Args:
      x: ``[..., D]``, floating point.

    Returns:
      ``[..., 1 + D + D(D+1)/2]`` in x's dtype.
    """
    size = x.shape[-1]
    rows, columns = np.triu_indices(size, 1)
    squares = jnp.square(x) * (2 * size) ** -0.5
    products = x[..., rows] * x[..., columns] * size**-0.5
    return jnp.concatenate([jnp.ones_like(x[..., :1]), x * size**-0.25, squares, products], axis=-1)


def _affine(x: jax.Array, kernel: jax.Array, bias: jax.Array | None) -> jax.Array:
    if kernel.ndim != 2 or kernel.shape[0] != x.shape[-1]:
        raise ValueError(f"kernel must be [{x.shape[-1]}, F] for x of shape {list(x.shape)}, got {list(kernel.shape)}")
    y = jnp.matmul(x, kernel.astype(x.dtype), precision=lax.Precision.HIGHEST)
    return y if bias is None else y + jnp.broadcast_to(bias.astype(x.dtype), y.shape)


@_in_float32
def t2r(x: jax.Array, kernel: jax.Array, bias: jax.Array | None = None) -> jax.Array:
    """φ(x) = relu(x·A + b), with a trained A (Kasai et al. 2021, "Finetuning Pretrained Transformers into RNNs").

    Args:
      x: ``[..., D]``, floating point.
      kernel: A, ``[D, F]``.
      bias: b, ``[F]``, or None.

    Returns:
      ``[..., F]`` in x's dtype, all entries ≥ 0.

    Raises:
      ValueError: ``kernel`` is not ``[D, F]``.
    """
    return jnp.maximum(_affine(x, kernel, bias), 0)


@_in_float32
def hedgehog(x: jax.Array, kernel: jax.Array, bias: jax.Array | None = None) -> jax.Array:
    """φ(x) = softmax([u; −u]), u = x·A + b, with a trained A (Zhang et al. 2024, "The Hedgehog & the Porcupine").

    Args:
      x: ``[..., D]``, floating point.
      kernel: A, ``[D, F]``; the identity is the paper's initial value.
      bias: b, ``[F]``, or None.

    Returns:
      ``[..., 2·F]`` in x's dtype, entries in (0, 1) that sum to one.

    Raises:
      ValueError: ``kernel`` is not ``[D, F]``.
    """
    u = _affine(x, kernel, bias)
    return jax.nn.softmax(jnp.concatenate([u, -u], axis=-1), axis=-1)


@_in_float32
def sum_normalize(x: jax.Array, eps: float | None = None) -> jax.Array:
    """φ′ = φ / (Σᵢ φᵢ + eps), for non-negative features (Schlag, Irie & Schmidhuber 2021, eq. 29).

    With Σφ(k) = 1, the delta rule removes the old value with the weight with which it writes the new one (appendix
    A.2), and the memory stays bounded.

    φ′ does not change if the features are scaled. They are scaled to a maximum of 1 first, so that the sum, and its
    square in the gradient, stay in the range of float32. This holds for features from 1e-38 to 1e38.

    Args:
      x: features, ``[..., F]``, floating point, non-negative.
      eps: added to the sum. None adds nothing, and features that are all zero stay zero. 0 is the paper's equation: it
        adds nothing either, but gives NaN if all features are zero, as those of DPFP for x = 0.

    Returns:
      ``[..., F]`` in x's dtype.
    """
    largest = _or_one(lax.stop_gradient(jnp.max(jnp.abs(x), axis=-1, keepdims=True)))
    x = x / largest
    total = jnp.sum(x, axis=-1, keepdims=True)
    return x / (_or_one(total) if eps is None else total + eps / largest)


@_in_float32
def l2_normalize(x: jax.Array, eps: float = 1e-6) -> jax.Array:
    """φ′ = φ / √(Σᵢ φᵢ² + eps) (Yang et al. 2024): keeps I − βkkᵀ a contraction for β in [0, 2].

    The features are scaled to at most 1 before they are squared, as in ``sum_normalize``.

    Args:
      x: features, ``[..., F]``, floating point.
      eps: added to the sum of squares; 0 is NaN for a zero vector.

    Returns:
      ``[..., F]`` in x's dtype.
    """
    root = jnp.sqrt(jnp.asarray(eps, x.dtype))
    largest = _or_one(jnp.maximum(lax.stop_gradient(jnp.max(jnp.abs(x), axis=-1, keepdims=True)), root))
    x = x / largest
    return x * lax.rsqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True) + jnp.square(root / largest))


def _or_one(x):
    return jnp.where(x == 0, 1, x)
