"""The noising q against float64: scales, the whole path's moments, one jump, Bayes' rule, betas and back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import toys
from tests.diffusion import cases
from vdiff import diffusion
from vdiff.diffusion import forward

LOG_SNRS = [0.0, 5.0, -5.0, 20.0, -20.0, 80.0, -80.0]
# (s, t): a small step, large ones, both ends, and a step from one end to the other.
STEPS = [(5.0, 4.9), (1.0, -1.0), (13.3, 10.0), (30.0, 13.3), (-4.0, -5.0), (-5.0, -20.0), (20.0, -20.0)]
DRAWS = 200_000
X = np.array([0.8, -0.4, 1.5], np.float32)
BETAS = np.array([0.02, 0.3, 0.1, 0.5, 0.25], np.float32)  # five latents of three dimensions


@pytest.mark.parametrize("log_snr", LOG_SNRS)
def test_scales_and_their_slopes(log_snr):
    """alpha' = alpha sigma^2 / 2 and sigma' = -sigma alpha^2 / 2; finite and right where the other scale is gone."""
    alpha, sigma = cases.scales(log_snr)
    for function, value, derivative in (
        (diffusion.alpha, alpha, alpha * sigma**2 / 2),
        (diffusion.sigma, sigma, -sigma * alpha**2 / 2),
    ):
        found = jax.value_and_grad(function)(jnp.float32(log_snr))
        np.testing.assert_allclose(found, (value, derivative), rtol=5e-6)
    assert float(diffusion.alpha(jnp.float32(log_snr))) ** 2 + float(
        diffusion.sigma(jnp.float32(log_snr))
    ) ** 2 == pytest.approx(1.0, abs=1e-6)


def test_scales_are_elementwise():
    at = np.array([[0.0, 5.0, -5.0], [20.0, -20.0, 1.0]], np.float32)
    np.testing.assert_allclose(diffusion.alpha(jnp.asarray(at)), cases.scales(at)[0], rtol=5e-6)
    np.testing.assert_allclose(diffusion.sigma(jnp.asarray(at)), cases.scales(at)[1], rtol=5e-6)


def test_path_has_the_mean_and_covariance_of_the_chain():
    """E z_i = sqrt(abar_i) x,  Cov(z_i, z_j) = sqrt(abar_j / abar_i) (1 - abar_i) for i <= j, each dimension apart."""
    keys = jax.random.split(jax.random.key(0), DRAWS)
    path = jax.jit(jax.vmap(diffusion.forward_noise, in_axes=(0, None, None)))(
        keys, jnp.asarray(X), jnp.asarray(BETAS)
    )
    assert path.shape == (DRAWS, 5, 3)
    abar = np.cumprod(1.0 - BETAS.astype(np.float64))
    mean = np.sqrt(abar)[:, None] * X
    i, j = np.minimum.outer(np.arange(5), np.arange(5)), np.maximum.outer(np.arange(5), np.arange(5))
    over_time = np.sqrt(abar[j] / abar[i]) * (1.0 - abar[i])
    covariance = np.einsum("ij,kl->ikjl", over_time, np.eye(3)).reshape(15, 15)

    centred = np.asarray(path, np.float64).reshape(DRAWS, 15) - mean.ravel()
    assert np.max(toys.z_scores(centred, np.zeros(15))) < 5
    for row in range(15):
        found = centred[:, row : row + 1] * centred[:, row:]
        z = np.abs(found.mean(0) - covariance[row, row:]) / (found.std(0, ddof=1) / np.sqrt(DRAWS))
        assert np.max(z) < 5, row


def test_path_keeps_a_datums_shape_and_dtype(key):
    x = jnp.ones((2, 3, 1))
    assert diffusion.forward_noise(key, x, jnp.asarray(BETAS)).shape == (5, 2, 3, 1)
    first = diffusion.forward_noise(key, x, jnp.array([1e-12, 0.5]))[0]
    np.testing.assert_allclose(first, x, atol=1e-5)  # beta near zero: z_1 is x


@pytest.mark.parametrize("log_snr", [3.0, -2.0])
def test_one_jump(log_snr):
    keys = jax.random.split(jax.random.key(1), DRAWS)
    z, eps = jax.jit(jax.vmap(diffusion.forward_marginal, in_axes=(0, None, None)))(
        keys, jnp.asarray(X), jnp.float32(log_snr)
    )
    alpha, sigma = cases.scales(log_snr)
    z, eps = np.asarray(z, np.float64), np.asarray(eps, np.float64)
    np.testing.assert_allclose(z, alpha * X + sigma * eps, atol=2e-6)
    products = [eps, eps**2 - 1.0, eps[:, :1] * eps[:, 1:], (z - alpha * X) ** 2 - sigma**2]
    assert np.max(toys.z_scores(np.concatenate(products, axis=1), np.zeros(11))) < 5


def test_one_jump_goes_where_the_chain_goes():
    """The marginal at the log-SNR of z_5 has the moments of z_5."""
    log_snr = diffusion.log_snrs_of(BETAS)[-1]
    abar = np.prod(1.0 - BETAS.astype(np.float64))
    alpha, sigma = cases.scales(log_snr)
    np.testing.assert_allclose([alpha**2, sigma**2], [abar, 1.0 - abar], rtol=1e-6)


@pytest.mark.parametrize(("log_snr_s", "log_snr_t"), STEPS)
def test_posterior_is_bayes_rule(log_snr_s, log_snr_t):
    s, t = np.float32(log_snr_s), np.float32(log_snr_t)
    z, x = np.random.default_rng(0).normal(size=(2, 4)).astype(np.float32)
    mean, variance = diffusion.forward_posterior(
        jnp.asarray(z), jnp.asarray(x), jnp.asarray(s), jnp.asarray(t)
    )
    expected, expected_variance = cases.bayes(z, x, s, t)
    # Each of the mean's two parts to float32; they may cancel.
    of_z, of_x = (np.abs(cases.bayes(one, other, s, t)[0]) for one, other in ((z, 0 * x), (0 * z, x)))
    assert np.all(np.abs(mean - expected) < 3e-6 * (of_z + of_x))
    np.testing.assert_allclose(variance, expected_variance, rtol=3e-6)


@pytest.mark.parametrize(("log_snr_s", "log_snr_t"), STEPS)
def test_slopes_of_the_posterior(log_snr_s, log_snr_t):
    """By both log-SNRs, against differences of Bayes' rule."""
    s, t = float(np.float32(log_snr_s)), float(np.float32(log_snr_t))
    z, x = np.float32(0.7), np.float32(-1.2)
    function = lambda s, t: jnp.stack(diffusion.forward_posterior(jnp.asarray(z), jnp.asarray(x), s, t))  # noqa: E731
    found = jax.jacfwd(function, argnums=(0, 1))(jnp.float32(s), jnp.float32(t))
    for k in range(2):
        for argument, (of, at) in enumerate(
            ((lambda s: cases.bayes(z, x, s, t)[k], s), (lambda t: cases.bayes(z, x, s, t)[k], t))  # noqa: B023
        ):
            exact = cases.slope(of, at, width=1e-3 if abs(s - t) > 1 else 1e-4)
            scale = max(abs(exact), 1e-3 * abs(of(at)))
            assert abs(float(found[argument][k]) - exact) < 1e-4 * scale, (k, argument)


def test_betas_and_log_snrs_are_inverse():
    """First and last step by hand, and the way there and back, for short and long chains."""
    log_snrs = diffusion.log_snrs_of(BETAS)
    b = BETAS.astype(np.float64)
    assert float(log_snrs[0]) == pytest.approx(np.log((1 - b[0]) / b[0]), rel=1e-6)
    assert float(log_snrs[-1]) == pytest.approx(np.log(np.prod(1 - b) / (1 - np.prod(1 - b))), rel=1e-6)
    for betas in (BETAS, [0.5], diffusion.linear_betas(1000), diffusion.cosine_betas(50)):
        betas = np.asarray(betas, np.float32)
        found = diffusion.betas_of(diffusion.log_snrs_of(betas))
        assert found.shape == betas.shape and found.dtype == jnp.float32
        # log alpha^2 reaches -10, where float32 is 1e-6 apart, and a beta is a difference of two.
        log_alpha_squared = np.cumsum(np.log1p(-betas.astype(np.float64)))
        assert np.all(np.abs(found - betas) < 1e-6 * betas + 3e-7 * np.abs(log_alpha_squared))


def test_betas_are_differentiable_by_the_log_snrs():
    at, weight = np.array([6.0, 2.0, -1.0, -8.0]), np.array([1.0, -0.5, 2.0, 0.7])

    def exact(log_snrs):
        alpha_squared = cases.scales(log_snrs)[0] ** 2
        return weight @ (1.0 - alpha_squared / np.concatenate([[1.0], alpha_squared[:-1]]))

    found = jax.grad(lambda v: jnp.asarray(weight, jnp.float32) @ forward.betas_of(v))(
        jnp.asarray(at, jnp.float32)
    )
    differences = [cases.slope(lambda h, i=i: exact(at + h * np.eye(4)[i]), 0.0, 1e-3) for i in range(4)]
    np.testing.assert_allclose(found, differences, rtol=2e-5)


def test_raw_keys_and_wrong_ranks_are_refused(key):
    with pytest.raises(TypeError, match="expected a typed key"):
        diffusion.forward_marginal(jax.random.PRNGKey(0), jnp.ones(2), jnp.float32(0))
    with pytest.raises(TypeError, match="expected a typed key"):
        diffusion.forward_noise(jax.random.PRNGKey(0), jnp.ones(2), jnp.ones(2) / 2)


def test_ranks_are_checked(key, unchecked):
    with pytest.raises(AssertionError):
        diffusion.forward_marginal(key, jnp.ones(2), jnp.zeros(2))
    with pytest.raises(AssertionError):
        diffusion.forward_noise(key, jnp.ones(2), jnp.float32(0.5))
