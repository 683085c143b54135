"""Every density against scipy and numpyro in float64, in the tails and in the limits."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
import scipy.special
import scipy.stats

from vdiff import densities

LOC, LOG_SCALE = (
    a.ravel().astype(np.float32) for a in np.meshgrid([-3.0, 0.0, 0.7], [-8.0, -1.3, 0.0, 2.0, 8.0])
)


def exact_logistic_mass(k, loc, log_scale, levels):
    """Log of a difference of logistic CDFs in float64, each taken on the side where it is small."""
    k, loc, scale = np.asarray(k, float), np.asarray(loc, float), np.exp(np.asarray(log_scale, float))
    centre, half = 2 * k / (levels - 1) - 1, 1 / (levels - 1)
    low = np.where(k == 0, -np.inf, (centre - half - loc) / scale)
    high = np.where(k == levels - 1, np.inf, (centre + half - loc) / scale)
    flip = low > 0  # by symmetry the mass of [low, high] is that of [-high, -low]
    low, high = np.where(flip, -high, low), np.where(flip, -low, high)
    log_low, log_high = -np.logaddexp(0, -low), -np.logaddexp(0, -high)
    return log_high + np.log1p(-np.exp(log_low - log_high))


def test_normal_log_prob():
    for offset in (-2.5, 0.0, 0.3, 40.0):
        x = (LOC + offset * np.exp(LOG_SCALE)).astype(np.float32)
        exact = scipy.stats.norm.logpdf(x.astype(float), LOC.astype(float), np.exp(LOG_SCALE.astype(float)))
        got = densities.normal_log_prob(jnp.asarray(x), jnp.asarray(LOC), jnp.asarray(LOG_SCALE))
        np.testing.assert_allclose(got, exact, rtol=2e-6, atol=2e-6)


def test_normal_log_prob_by_numpyro_with_gradients():
    x, loc, log_scale = (jnp.array(v) for v in ([0.3, -1.2], [0.1, 0.4], [-0.5, 0.7]))

    def ours(*args):
        return jnp.sum(densities.normal_log_prob(*args))

    def theirs(x, loc, log_scale):
        return jnp.sum(dist.Normal(loc, jnp.exp(log_scale)).log_prob(x))

    for mine, other in zip(
        jax.grad(ours, argnums=(0, 1, 2))(x, loc, log_scale),
        jax.grad(theirs, argnums=(0, 1, 2))(x, loc, log_scale),
        strict=True,
    ):
        np.testing.assert_allclose(mine, other, rtol=1e-5, atol=1e-6)


def test_standard_normal_log_prob():
    x = np.array([-80.0, -3.0, 0.0, 0.5, 80.0], np.float32)
    got = densities.standard_normal_log_prob(jnp.asarray(x))
    np.testing.assert_allclose(got, scipy.stats.norm.logpdf(x.astype(float)), rtol=1e-6)
    np.testing.assert_allclose(
        jax.vmap(jax.grad(lambda v: densities.standard_normal_log_prob(v)))(jnp.asarray(x)), -x
    )


def test_normal_entropy():
    exact = scipy.stats.norm(0, np.exp(LOG_SCALE.astype(float))).entropy()
    np.testing.assert_allclose(densities.normal_entropy(jnp.asarray(LOG_SCALE)), exact, rtol=1e-6, atol=1e-6)


def test_normal_kl():
    loc, log_scale = LOC.astype(float), LOG_SCALE.astype(float)
    exact = 0.5 * (loc**2 + np.exp(2 * log_scale) - 1) - log_scale
    got = densities.normal_kl(jnp.asarray(LOC), jnp.asarray(LOG_SCALE))
    np.testing.assert_allclose(got, exact, rtol=1e-6, atol=1e-6)
    theirs = dist.kl_divergence(dist.Normal(0.4, 0.3), dist.Normal(0.0, 1.0))
    np.testing.assert_allclose(
        densities.normal_kl(jnp.array(0.4), jnp.log(jnp.array(0.3))), theirs, rtol=1e-6
    )


def test_normal_kl_is_the_expected_log_ratio():
    """E_q[log q - log p] by Gauss-Hermite, which is exact for a quadratic."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(12)
    z = jnp.asarray(0.7 + np.exp(-0.4) * nodes, jnp.float32)
    log_ratio = densities.normal_log_prob(
        z, jnp.full_like(z, 0.7), jnp.full_like(z, -0.4)
    ) - densities.standard_normal_log_prob(z)
    quadrature = np.sum(np.asarray(log_ratio, float) * weights / weights.sum())
    np.testing.assert_allclose(densities.normal_kl(jnp.array(0.7), jnp.array(-0.4)), quadrature, rtol=3e-6)


def test_normal_kl_is_accurate_near_zero():
    """At N(0, e^{2d}), KL = d^2 + O(d^3): nothing of it may be lost to `s^2 - 1`."""
    got = densities.normal_kl(jnp.zeros(2), jnp.array([1e-2, -1e-2]))
    exact = [0.5 * (np.expm1(2 * d)) - d for d in (1e-2, -1e-2)]
    np.testing.assert_allclose(got, exact, rtol=1e-4)


@pytest.mark.parametrize("dtype", [np.int32, np.float32, np.bool_, np.uint8])
def test_bernoulli_log_prob(dtype):
    logits = np.array([-80.0, -5.0, -0.1, 0.0, 2.0, 80.0], np.float32)
    for x in (0, 1):
        got = densities.bernoulli_log_prob(jnp.full(6, x, dtype), jnp.asarray(logits))
        exact = scipy.stats.bernoulli.logpmf(x, scipy.special.expit(logits.astype(float)))
        exact = np.where(np.isfinite(exact), exact, -np.abs(logits))  # scipy's sigmoid(80) is one
        np.testing.assert_allclose(got, exact, rtol=1e-5, atol=1e-30)


def test_bernoulli_gradient_at_80():
    logits = jnp.array([-80.0, -20.0, 20.0, 80.0])
    for x in (0, 1):
        gradient = jax.vmap(jax.grad(lambda v, x=x: densities.bernoulli_log_prob(jnp.array(x), v)))(logits)
        np.testing.assert_allclose(
            gradient, x - scipy.special.expit(np.asarray(logits, float)), rtol=1e-6, atol=1e-7
        )


def test_categorical_log_prob():
    rng = np.random.default_rng(0)
    logits = (3 * rng.normal(size=(4, 5, 3))).astype(np.float32)
    k = rng.integers(0, 3, size=(4, 5))
    exact = np.take_along_axis(scipy.special.log_softmax(logits.astype(float), axis=-1), k[..., None], -1)[
        ..., 0
    ]
    for dtype in (np.int32, np.uint8):
        got = densities.categorical_log_prob(jnp.asarray(k.astype(dtype)), jnp.asarray(logits))
        np.testing.assert_allclose(got, exact, rtol=2e-6, atol=1e-6)
    theirs = dist.Categorical(logits=jnp.asarray(logits)).log_prob(jnp.asarray(k.astype(np.int32)))
    np.testing.assert_allclose(theirs, exact, rtol=2e-6, atol=1e-6)


def test_categorical_gradient_at_80():
    logits = jnp.array([80.0, -80.0, 0.0])
    for k in range(3):
        gradient = jax.grad(lambda v, k=k: densities.categorical_log_prob(jnp.array(k), v))(logits)
        exact = np.eye(3)[k] - scipy.special.softmax(np.asarray(logits, float))
        np.testing.assert_allclose(gradient, exact, rtol=1e-6, atol=1e-30)


@pytest.mark.parametrize("k", [3, 4, 100, -4, -1])
def test_categorical_out_of_range_is_nan(k):
    got = densities.categorical_log_prob(jnp.array([0, k]), jnp.zeros((2, 3)))
    assert got[0] == pytest.approx(np.log(1 / 3), rel=1e-6)
    assert np.isnan(got[1])


@pytest.mark.parametrize("levels", [2, 3, 17, 256])
@pytest.mark.parametrize("log_scale", [-8.0, -5.0, -2.0, 0.0, 3.0, 8.0])
def test_discretized_logistic_masses(levels, log_scale):
    """Each mass is the float64 one, and together they are one."""
    k = jnp.arange(levels)
    for loc in (-80.0, -1.3, -1.0, -0.4, 0.0, 0.123, 1.0, 2.0, 80.0):
        args = (jnp.full(levels, loc), jnp.full(levels, log_scale))
        got = np.asarray(densities.discretized_logistic_log_prob(k, *args, levels), float)
        exact = exact_logistic_mass(np.arange(levels), loc, log_scale, levels)
        # Pixel positions are rounded to float32, and seen in units of the scale.
        slack = 2e-6 + 3e-7 * np.exp(-log_scale) * max(1.0, abs(loc))
        np.testing.assert_allclose(got, exact, rtol=2e-6, atol=slack)
        np.testing.assert_allclose(np.sum(np.exp(got)), 1.0, atol=slack)


def test_discretized_logistic_gradient_is_that_of_float64():
    """In both tails, in the edge bins and far from every bin."""
    levels = 256
    k, loc, log_scale = (
        a.ravel()
        for a in np.meshgrid([0, 1, 100, 254, 255], [-80.0, -1.0, 0.2, 80.0], [-6.0, -2.0, 1.0, 8.0])
    )

    def summed(loc, log_scale):
        return jnp.sum(densities.discretized_logistic_log_prob(jnp.asarray(k), loc, log_scale, levels))

    got = jax.grad(summed, argnums=(0, 1))(jnp.asarray(loc, jnp.float32), jnp.asarray(log_scale, jnp.float32))
    step = 1e-5
    for gradient, along in zip(got, ((step, 0.0), (0.0, step)), strict=True):
        up = exact_logistic_mass(k, loc + along[0], log_scale + along[1], levels)
        down = exact_logistic_mass(k, loc - along[0], log_scale - along[1], levels)
        exact = (up - down) / (2 * step)
        # Float64 differences are good to 1e-16 |log mass| / step.
        slack = 2e-3 + 1e-10 * np.abs(up)
        assert np.all(np.abs(gradient - exact) < slack + 2e-3 * np.abs(exact))


def test_discretized_logistic_symmetry():
    """Mirroring location and level leaves the mass."""
    levels, k = 17, jnp.arange(17)
    one = densities.discretized_logistic_log_prob(k, jnp.full(17, 0.3), jnp.full(17, -2.0), levels)
    other = densities.discretized_logistic_log_prob(16 - k, jnp.full(17, -0.3), jnp.full(17, -2.0), levels)
    np.testing.assert_allclose(one, other, rtol=1e-5)


def test_densities_keep_float32():
    x = jnp.zeros(2)
    for value in (
        densities.normal_log_prob(x, x, x),
        densities.standard_normal_log_prob(x),
        densities.normal_entropy(x),
        densities.normal_kl(x, x),
        densities.bernoulli_log_prob(jnp.zeros(2, jnp.uint8), x),
        densities.categorical_log_prob(jnp.zeros(2, jnp.uint8), jnp.zeros((2, 3))),
        densities.discretized_logistic_log_prob(jnp.zeros(2, jnp.uint8), x, x, 5),
    ):
        assert value.dtype == jnp.float32 and value.shape == (2,)


@pytest.mark.parametrize("x", [-300.0, -30.0, -8.1, -7.9, -1.0, 0.0, 2.0, 9.0])
def test_normal_log_cdf_and_its_slope(x):
    """Against scipy in float64; the slope is the inverse Mills ratio."""
    value, slope = jax.value_and_grad(densities.normal_log_cdf)(jnp.float32(x))
    exact = scipy.stats.norm.logcdf(x)
    assert float(value) == pytest.approx(exact, rel=2e-6)
    assert float(slope) == pytest.approx(math.exp(scipy.stats.norm.logpdf(x) - exact), rel=1e-5)


@pytest.mark.parametrize("half_width", [1e-4, 0.01, 0.3, 3.0])
@pytest.mark.parametrize("centre", [0.0, -0.7, 5.0, -40.0])
def test_normal_interval_log_prob(centre, half_width):
    """Against quadrature about the nearer edge in float64, and its slopes against the densities at the edges."""
    value, slopes = jax.value_and_grad(densities.normal_interval_log_prob, argnums=(0, 1))(
        jnp.float32(centre), jnp.float32(half_width)
    )
    nearest = max(abs(centre) - half_width, 0.0)
    nodes, weights = np.polynomial.legendre.leggauss(400)
    points = centre + half_width * nodes
    exact = math.log(half_width * np.sum(weights * np.exp(-0.5 * (points**2 - nearest**2))))
    exact -= 0.5 * nearest**2 + 0.5 * math.log(2 * math.pi)
    assert float(value) == pytest.approx(exact, rel=1e-5, abs=1e-6)
    upper, lower = (math.exp(scipy.stats.norm.logpdf(centre + s * half_width) - exact) for s in (1, -1))
    assert float(slopes[0]) == pytest.approx(upper - lower, rel=1e-3, abs=1e-4)
    assert float(slopes[1]) == pytest.approx(upper + lower, rel=1e-3)
