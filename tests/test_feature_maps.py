"""The feature maps against their equations."""

import functools
import pathlib

import chex
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from test_errors import assert_message

from fwt_jax import feature_maps as fm

RNG = np.random.default_rng(0)
KERNEL, BIAS, PROJECTION = RNG.normal(size=(4, 6)), RNG.normal(size=6), RNG.normal(size=(3, 4))
MAPS = {
    "identity": fm.identity,
    "relu": fm.relu,
    "relu_squared": fm.relu_squared,
    "tanh": fm.tanh,
    "elu_plus_one": fm.elu_plus_one,
    "softmax": fm.softmax,
    "dpfp": functools.partial(fm.dpfp, nu=3),
    "favor_plus": lambda x: fm.favor_plus(x, jnp.asarray(PROJECTION)),
    "taylor": fm.taylor,
    "t2r": lambda x: fm.t2r(x, jnp.asarray(KERNEL), jnp.asarray(BIAS)),
    "hedgehog": lambda x: fm.hedgehog(x, jnp.asarray(KERNEL), jnp.asarray(BIAS)),
    "sum_normalize": fm.sum_normalize,
    "l2_normalize": fm.l2_normalize,
}


def equations(x):
    """Every map of one vector of size 4 in NumPy, from the equation of its paper."""

    def relu(u):
        return np.where(u > 0, u, 0)

    def softmax(u):
        return np.exp(u) / np.exp(u).sum()

    affine = KERNEL.T @ x + BIAS
    h = np.exp(-np.sum(x**2) / 2) / np.sqrt(2)
    return {
        "identity": x,
        "relu": relu(x),
        "relu_squared": relu(x) ** 2,
        "tanh": (np.exp(x) - np.exp(-x)) / (np.exp(x) + np.exp(-x)),
        "elu_plus_one": np.array([a + 1 if a > 0 else np.exp(a) for a in x]),
        "softmax": softmax(x),
        "dpfp": dpfp_loop(x, 3),
        "favor_plus": h / np.sqrt(3) * np.concatenate([np.exp(PROJECTION @ x), np.exp(-PROJECTION @ x)]),
        "t2r": relu(affine),
        "hedgehog": softmax(np.concatenate([affine, -affine])),
        "sum_normalize": x / x.sum(),
        "l2_normalize": x / np.sqrt((x**2).sum() + 1e-6),
    }


def dpfp_loop(x, nu):
    """Eq. 37, index by index, in the order of listing 1: a block of 2D features for each shift."""
    r = [max(a, 0.0) for a in x] + [max(-a, 0.0) for a in x]
    size = len(r)
    return np.array([r[i] * r[(i - j) % size] for j in range(1, nu + 1) for i in range(size)])


@pytest.mark.parametrize("name", [name for name in MAPS if name != "taylor"])
def test_a_map_is_its_equation(name, x64):
    x = np.random.default_rng(1).normal(size=(2, 3, 4))
    x = np.abs(x) if name == "sum_normalize" else x
    want = np.stack([[equations(vector)[name] for vector in row] for row in x])
    chex.assert_trees_all_close(MAPS[name](jnp.asarray(x)), want, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_a_map_keeps_the_dtype_and_loses_only_its_rounding(name, dtype, x64):
    x = jnp.asarray(np.abs(np.random.default_rng(1).normal(size=(7, 4))), dtype)
    features = MAPS[name](x)
    assert features.dtype == dtype
    exact = MAPS[name](x.astype(jnp.float64))
    eps = float(jnp.finfo(dtype).eps)
    # Half a unit in the last place from the one rounding at the end, and the rounding of float32 on the way.
    chex.assert_trees_all_close(features.astype(jnp.float64), exact, rtol=0.51 * eps + 2e-6 * (eps > 1e-10), atol=1e-6)


@pytest.mark.parametrize("name", MAPS)
def test_gradients_are_finite_at_zero_and_far_from_it(name):
    x = np.array([0.0, 1e-20, 1.0, 8.0], np.float32)[:, None] * np.array([[1.0, -1.0, 0.5, 0.0]], np.float32)
    x = jnp.asarray(np.abs(x) if name == "sum_normalize" else x)
    gradients = jax.jit(jax.vmap(jax.value_and_grad(lambda x: jnp.sum(MAPS[name](x) ** 2))))
    chex.assert_tree_all_finite(gradients(x))


@pytest.mark.parametrize("name", MAPS)
def test_integers_are_refused(name):
    assert_message(["floating-point", "int32[2, 4]", "astype"], MAPS[name], jnp.ones((2, 4), jnp.int32))


@pytest.mark.parametrize(
    ("words", "call"),
    [
        (["size 4", "1 to 7", "nu=0"], lambda x: fm.dpfp(x, nu=0)),
        (["size 4", "1 to 7", "nu=8"], lambda x: fm.dpfp(x, nu=8)),
        (["[M, 4]", "[3, 5]", "orthogonal_projection"], lambda x: fm.favor_plus(x, jnp.ones((3, 5)))),
        (["[M, 4]", "[4]", "orthogonal_projection"], lambda x: fm.favor_plus(x, jnp.ones(4))),
        (["kernel", "[4, F]", "[6, 4]"], lambda x: fm.t2r(x, jnp.ones((6, 4)))),
        (["kernel", "[4, F]", "[4]"], lambda x: fm.hedgehog(x, jnp.ones(4))),
        (["rows", "columns", "'both'"], lambda x: fm.orthogonal_projection(jax.random.key(0), 3, 4, orthogonal="both")),
        (["at least 1", "0 and 4"], lambda x: fm.orthogonal_projection(jax.random.key(0), 0, 4)),
        (["at least 1", "3 and 0"], lambda x: fm.orthogonal_projection(jax.random.key(0), 3, 0)),
    ],
)
def test_a_map_says_what_is_wrong(words, call):
    assert_message(words, call, jnp.ones((2, 4)))


# --- DPFP ------------------------------------------------------------------------------------------------------------


@hypothesis.given(st.data())
def test_dpfp_is_the_loop_of_the_paper(data):
    size = data.draw(st.sampled_from([1, 2, 5, 8]))
    nu = data.draw(st.sampled_from(sorted({1, size, 2 * size - 1})))
    number = st.floats(-10, 10, width=32, allow_subnormal=False)
    x = np.array(data.draw(st.lists(number, min_size=size, max_size=size)), np.float32)
    chex.assert_trees_all_close(
        fm.dpfp(jnp.asarray(x), nu=nu), dpfp_loop(x, nu).astype(np.float32), rtol=1e-6, atol=1e-37
    )


def test_dpfp_of_the_two_dimensional_example_has_one_active_feature_per_quadrant():
    """Eq. 33-36: four regions of the plane, four orthogonal features."""
    corners = jnp.array([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
    features = fm.dpfp(corners, nu=1)
    chex.assert_trees_all_equal(features @ features.T, jnp.eye(4))


def test_dpfp_of_even_size_is_never_all_zero_and_of_odd_size_for_alternating_signs_only():
    for size in (2, 3, 4, 5, 6):
        signs = np.array(np.meshgrid(*[[1.0, -1.0]] * size)).reshape(size, -1).T
        empty = np.all(np.asarray(fm.dpfp(jnp.asarray(signs), nu=1)) == 0, axis=-1)
        alternating = np.all(signs[:, 1:] == -signs[:, :-1], axis=-1)
        np.testing.assert_array_equal(empty, alternating if size % 2 else np.zeros_like(empty))


def test_all_zero_features_are_nan_for_eps_0_and_zero_by_default():
    features = fm.dpfp(jnp.array([1.0, -1.0, 1.0]), nu=1)
    assert jnp.all(jnp.isnan(fm.sum_normalize(features, eps=0)))
    chex.assert_trees_all_equal(fm.sum_normalize(features), jnp.zeros(6))
    chex.assert_tree_all_finite(jax.grad(lambda x: fm.sum_normalize(fm.dpfp(x))[0])(jnp.array([1.0, -1.0, 1.0])))
    gradient = jax.grad(lambda x: fm.sum_normalize(fm.relu(x))[0])(jnp.zeros(6))
    assert jnp.max(jnp.abs(gradient)) <= 1  # no division by next to nothing
    chex.assert_trees_all_close(fm.sum_normalize(jnp.full(4, 1e-30)), jnp.full(4, 0.25), rtol=1e-6)


# --- FAVOR+ ----------------------------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def projections(keys, num_features, dim, orthogonal="rows"):
    return jax.vmap(lambda key: fm.orthogonal_projection(key, num_features, dim, orthogonal=orthogonal))(keys)


@pytest.mark.parametrize(("num_features", "dim"), [(3, 8), (8, 8), (12, 5), (1, 4), (4, 1)])
def test_rows_of_a_projection_are_orthogonal_in_blocks(num_features, dim):
    projection = fm.orthogonal_projection(jax.random.key(0), num_features, dim)
    assert projection.shape == (num_features, dim)
    for start in range(0, num_features, dim):
        block = projection[start : start + dim]
        products = block @ block.T
        chex.assert_trees_all_close(products, jnp.diag(jnp.diagonal(products)), atol=2e-5)


@pytest.mark.parametrize(("num_features", "dim"), [(8, 3), (8, 8), (5, 12)])
def test_columns_of_the_other_projection_are_orthogonal_in_blocks(num_features, dim):
    projection = fm.orthogonal_projection(jax.random.key(0), num_features, dim, orthogonal="columns")
    assert projection.shape == (num_features, dim)
    for start in range(0, dim, num_features):
        block = projection[:, start : start + num_features]
        products = block.T @ block
        chex.assert_trees_all_close(products, jnp.diag(jnp.diagonal(products)), atol=2e-5)


@pytest.mark.parametrize("orthogonal", ["rows", "columns"])
def test_a_projection_is_gaussian_in_law(orthogonal):
    """Entries N(0, 1), lengths χ: means within four standard errors over 20 000 draws, which are fixed."""
    draws = 20_000
    drawn = projections(jax.random.split(jax.random.key(1), draws), 4, 4, orthogonal)
    drawn = np.asarray(drawn, np.float64)
    entries = drawn.reshape(draws, -1)
    assert np.all(np.abs(entries.mean(0)) < 4 * draws**-0.5)
    assert np.all(np.abs((entries**2).mean(0) - 1) < 4 * (2 / draws) ** 0.5)
    assert np.all(np.abs((entries**4).mean(0) - 3) < 4 * (96 / draws) ** 0.5)
    squared_lengths = np.sum(drawn**2, axis=-1 if orthogonal == "rows" else -2)  # χ² with 4 degrees of freedom
    assert np.all(np.abs(squared_lengths.mean(0) - 4) < 4 * (8 / draws) ** 0.5)
    # A sample variance has the variance (μ₄ − σ⁴)/n, here (384 − 64)/n.
    assert np.all(np.abs(squared_lengths.var(0) - 8) < 4 * (320 / draws) ** 0.5)


def test_favor_plus_estimates_the_softmax_kernel_without_bias():
    """The mean of φ(k)ᵀφ(q) over 20 000 projections is exp(kᵀq) within four of its standard errors (about 0.2 %)."""
    draws = 20_000
    drawn = projections(jax.random.split(jax.random.key(2), draws), 6, 4)
    key, query = jnp.array([0.3, -0.2, 0.5, 0.1]), jnp.array([0.4, 0.3, 0.2, -0.6])
    estimates = jax.vmap(lambda r: jnp.vdot(fm.favor_plus(key, r), fm.favor_plus(query, r)))(drawn)
    estimates = np.asarray(estimates, np.float64)
    standard_error = estimates.std() / draws**0.5
    assert standard_error < 5e-3
    assert abs(estimates.mean() - np.exp(float(jnp.vdot(key, query)))) < 4 * standard_error


def test_favor_plus_adds_eps_before_the_factor(x64):
    x = jnp.asarray(np.random.default_rng(1).normal(size=(3, 4)))
    difference = fm.favor_plus(x, jnp.asarray(PROJECTION), eps=1e-4) - fm.favor_plus(x, jnp.asarray(PROJECTION))
    chex.assert_trees_all_close(difference, jnp.full((3, 6), 1e-4 / 6**0.5), rtol=1e-9)


def test_favor_plus_does_not_overflow_where_only_its_factors_do():
    """exp(Rx) = exp(200) is not a float32, exp(Rx − ‖x‖²/2) = exp(0) is."""
    x = jnp.full((4,), 10.0)
    features = fm.favor_plus(x, jnp.full((1, 4), 5.0))
    chex.assert_trees_all_close(features, jnp.array([2**-0.5, 0.0]), rtol=1e-6)
    chex.assert_tree_all_finite(jax.grad(lambda x: jnp.sum(fm.favor_plus(x, jnp.full((1, 4), 5.0))))(x))


def test_favor_plus_in_bfloat16_is_stable():
    """A sum in bfloat16 would miss ‖x‖²/2 by whole units here."""
    x = jnp.asarray(np.random.default_rng(1).normal(size=(16, 64)), jnp.bfloat16)
    projection = fm.orthogonal_projection(jax.random.key(0), 32, 64)
    exact = fm.favor_plus(x.astype(jnp.float32), projection)
    chex.assert_trees_all_close(fm.favor_plus(x, projection).astype(jnp.float32), exact, rtol=2**-8)


def test_sum_normalised_favor_plus_is_a_softmax(x64):
    x, projection = jnp.asarray(np.random.default_rng(1).normal(size=(3, 4))), jnp.asarray(PROJECTION)
    want = jax.nn.softmax(jnp.concatenate([x @ projection.T, -x @ projection.T], axis=-1), axis=-1)
    chex.assert_trees_all_close(fm.sum_normalize(fm.favor_plus(x, projection), eps=0), want, rtol=1e-13)


def favor_plus_exponents(x, projection):
    projected = x @ projection.T
    return jnp.concatenate([projected, -projected], axis=-1)


@pytest.mark.parametrize("name", ["favor_plus", "elu_plus_one"])
@pytest.mark.parametrize("eps", [None, 0.0])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_normalised_exponentials_are_a_softmax_however_small_they_are(name, eps, dtype):
    """Standard deviations of 1, 2, 3, 10 and 100, where exp(−‖x‖²/2) is exp(−320 000); x + 1 of x > 0 is none."""
    projection = fm.orthogonal_projection(jax.random.key(0), 7, 64)
    feature_map, exponents = {
        "favor_plus": (lambda x: fm.favor_plus(x, projection), lambda x: favor_plus_exponents(x, projection)),
        "elu_plus_one": (fm.elu_plus_one, lambda x: x),
    }[name]
    x = jax.random.normal(jax.random.key(1), (5, 3, 64)) * jnp.array([1, 2, 3, 10, 100.0])[:, None, None]
    x = (x if name == "favor_plus" else x - 500).astype(dtype)
    functions = (
        lambda x: fm.sum_normalize(feature_map(x), eps).astype(jnp.float32),
        lambda x: jax.nn.softmax(exponents(x.astype(jnp.float32)), axis=-1),
    )
    (got, of_got), (want, of_want) = (jax.vjp(jax.jit(function), x) for function in functions)
    exact = dtype == jnp.float32
    chex.assert_trees_all_close(got, want, atol=2e-5 if exact else 0.01)
    chex.assert_trees_all_close(jnp.sum(got, axis=-1), jnp.ones(got.shape[:-1]), atol=1e-5 if exact else 0.02)
    got, want = (
        of(jax.random.normal(jax.random.key(2), want.shape))[0].astype(jnp.float32) for of in (of_got, of_want)
    )
    scale = jnp.maximum(jnp.max(jnp.abs(want), axis=-1, keepdims=True), 0.1)  # of a softmax that is 0 and 1, it is 0
    chex.assert_trees_all_close(got / scale, want / scale, atol=1e-4 if exact else 0.05)
    assert jnp.max(jnp.abs(want[1:3])) > 0.1


def test_exponentials_are_themselves_down_to_the_bound(x64):
    """float32 features are those of float64, whose bound is another, but for what is below exp(−60)."""
    x = jnp.linspace(0.1, 4, 9)[:, None] * jax.random.normal(jax.random.key(0), (9, 64))
    projection = fm.orthogonal_projection(jax.random.key(1), 7, 64)
    for feature_map in (lambda x: fm.favor_plus(x, projection), lambda x: fm.elu_plus_one(x - 20 * x[:, :1] ** 2 - 4)):
        exact, got = jax.jit(feature_map)(x), jax.jit(feature_map)(x.astype(jnp.float32)).astype(jnp.float64)
        chex.assert_trees_all_close(got, exact, rtol=1e-4, atol=1.01 * np.exp(-60))
        assert jnp.min(jnp.max(exact, axis=-1)) < np.exp(-70) < np.exp(-62) < jnp.min(jnp.max(got, axis=-1))


@pytest.mark.parametrize("size", [1e-20, 1e-3, 1.0, 1e18, 1e30])
def test_norms_leave_no_range_where_only_a_ratio_counts(size):
    features = jnp.array([[1.0, 2.0, 0.0, 5.0], [0.0, 0.0, 3.0, 0.0]])
    cotangent = jnp.array([[0.3, -1.0, 0.2, 0.7], [1.0, 0.1, -0.4, 2.0]])
    for normalize, eps in ((fm.sum_normalize, 0.0), (fm.sum_normalize, None), (fm.l2_normalize, 0.0)):
        want, of_want = jax.vjp(lambda x: normalize(x, eps), features)  # noqa: B023
        got, of_got = jax.vjp(lambda x: normalize(x, eps), size * features)  # noqa: B023
        chex.assert_trees_all_close(got, want, rtol=1e-6)
        chex.assert_trees_all_close(size * of_got(cotangent)[0], of_want(cotangent)[0], rtol=1e-5, atol=1e-7)
    if size > 1:
        chex.assert_trees_all_close(fm.l2_normalize(size * features), fm.l2_normalize(features, 0.0), rtol=1e-6)


# --- the other maps --------------------------------------------------------------------------------------------------


def test_elu_plus_one_does_not_underflow_in_bfloat16():
    """(exp(x) − 1) + 1 is 0 there."""
    features = fm.elu_plus_one(jnp.array([-10.0, -40.0], jnp.bfloat16))
    chex.assert_trees_all_close(features.astype(jnp.float32), jnp.exp(jnp.array([-10.0, -40.0])), rtol=2**-8)


def test_elu_plus_one_has_finite_gradients_where_exp_overflows():
    chex.assert_trees_all_equal(jax.grad(fm.elu_plus_one)(1000.0), jnp.float32(1))


@pytest.mark.parametrize("size", [1, 2, 7])
def test_the_kernel_of_taylor_is_the_series_of_the_exponential(size, x64):
    key, query = jnp.asarray(np.random.default_rng(1).normal(size=(2, size)))
    features = fm.taylor(key)
    assert features.shape == (1 + size + size * (size + 1) // 2,)
    s = jnp.vdot(key, query) / size**0.5
    chex.assert_trees_all_close(jnp.vdot(features, fm.taylor(query)), 1 + s + s**2 / 2, rtol=1e-13)


def test_normalised_features_sum_to_one(x64):
    x = jnp.asarray(np.random.default_rng(1).random((3, 4)))
    chex.assert_trees_all_close(jnp.sum(fm.sum_normalize(x, eps=0), axis=-1), jnp.ones(3), rtol=1e-14)
    chex.assert_trees_all_close(jnp.sum(fm.l2_normalize(x, eps=0) ** 2, axis=-1), jnp.ones(3), rtol=1e-14)


def test_numbers_of_flash_linear_attention():
    golden = np.load(pathlib.Path(__file__).parent / "golden" / "fla" / "feature_maps.npz")
    x = jnp.asarray(golden["x"])
    kernel, bias = golden["hedgehog/layer.weight"].T, golden["hedgehog/layer.bias"]
    # fla's hedgehog is softmax([2u; −2u]).
    got = {
        "elu_p1": fm.elu_plus_one(x),
        "fm_hedgehog": fm.hedgehog(x, jnp.asarray(2 * kernel), jnp.asarray(2 * bias)),
        "fm_t2r": fm.t2r(x, jnp.asarray(golden["t2r/layer.weight"].T)),
        "fm_t2r_d4": fm.t2r(x, jnp.asarray(golden["t2r_d4/layer.weight"].T)),
        "fm_taylor": fm.taylor(x),
        **{f"dpfp_nu{nu}": fm.dpfp(x, nu=nu) for nu in (1, 2, 3, 4)},
    }
    chex.assert_trees_all_close(got, {name: golden[name] for name in got}, rtol=1e-5, atol=1e-6)
