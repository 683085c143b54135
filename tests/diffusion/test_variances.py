"""Reverse variances against Bayes' rule, and against a numerical search for the least loss, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import minimize_scalar

from tests.diffusion import cases
from vdiff import diffusion

STEPS = [(5.0, 4.9), (1.0, -1.0), (13.3, 10.0), (30.0, 13.3), (-4.0, -5.0), (-5.0, -20.0), (20.0, -20.0)]
every_step = pytest.mark.parametrize(("log_snr_s", "log_snr_t"), STEPS)


def eta(network, log_snr_s, log_snr_t, phi=None):
    phi = network.init(jax.random.key(0)) if phi is None else phi
    found = network.apply(phi, jnp.float32(log_snr_s), jnp.float32(log_snr_t))
    assert found.shape == () and found.dtype == jnp.float32
    return float(found)


def posterior(log_snr_s, log_snr_t):
    return cases.bayes(0.0, 0.0, np.float32(log_snr_s), np.float32(log_snr_t))[1]


def beta(log_snr_s, log_snr_t):
    return cases.step_of_q(np.float32(log_snr_s), np.float32(log_snr_t))[1]


@every_step
def test_posterior_and_beta(log_snr_s, log_snr_t):
    """Those of q(z_s | z_t, x) and of q(z_t | z_s); nothing is learned."""
    at = (log_snr_s, log_snr_t)
    assert eta(diffusion.posterior_variance(), *at) == pytest.approx(posterior(*at), rel=3e-6)
    assert eta(diffusion.beta_variance(), *at) == pytest.approx(beta(*at), rel=3e-6)
    _, of_forward = diffusion.forward_posterior(
        jnp.zeros(1), jnp.zeros(1), jnp.float32(log_snr_s), jnp.float32(log_snr_t)
    )
    assert eta(diffusion.posterior_variance(), *at) == pytest.approx(float(of_forward), rel=2e-6)
    for network in (diffusion.posterior_variance(), diffusion.beta_variance()):
        assert network.init(jax.random.key(0)) == ()


@every_step
def test_optimal_with_extreme_errors(log_snr_s, log_snr_t):
    """Nothing known beforehand but N(0, I), mse = sigma_t^2: beta. Everything known, mse = 0: the posterior's."""
    at = (log_snr_s, log_snr_t)
    white = diffusion.optimal_variance(lambda log_snr: jax.nn.sigmoid(-log_snr))
    known = diffusion.optimal_variance(jnp.zeros_like)
    assert eta(white, *at) == pytest.approx(beta(*at), rel=5e-6)
    assert eta(known, *at) == pytest.approx(posterior(*at), rel=3e-6)
    assert white.init(jax.random.key(0)) == ()


def moments(log_snr_s, log_snr_t):
    """Var(z_s | z_t) for x ~ N(LOC, SCALE^2), from the joint Gaussian of z_s and z_t."""
    (alpha_s, sigma_s), (alpha_t, sigma_t) = cases.scales(log_snr_s), cases.scales(log_snr_t)
    a = cases.step_of_q(log_snr_s, log_snr_t)[0]
    of_s, of_t = (
        alpha**2 * cases.SCALE**2 + sigma**2 for alpha, sigma in ((alpha_s, sigma_s), (alpha_t, sigma_t))
    )
    return of_s - (a * of_s) ** 2 / of_t


@pytest.mark.parametrize(
    ("log_snr_s", "log_snr_t"), [(5.0, 4.5), (1.0, -1.0), (6.0, 2.0), (2.0, -6.0), (-1.0, -4.0)]
)
def test_optimal_is_where_the_step_costs_least(log_snr_s, log_snr_t):
    """E KL(q(z_s | z_t, x), N(mean, eta)) over data and noise by quadrature, minimised by scipy."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(40)
    weights = weights / weights.sum()
    x = cases.LOC + cases.SCALE * nodes[:, None]
    alpha, sigma = cases.scales(log_snr_t)
    z = alpha * x + sigma * nodes[None, :]
    x_hat = cases.LOC + cases.SCALE**2 * alpha / (cases.SCALE**2 * alpha**2 + sigma**2) * (
        z - alpha * cases.LOC
    )
    mean, variance = cases.bayes(z, x, log_snr_s, log_snr_t)
    guess, _ = cases.bayes(z, x_hat, log_snr_s, log_snr_t)

    def cost(log_eta):
        kl = 0.5 * (variance / np.exp(log_eta) - 1 - np.log(variance) + log_eta)
        return np.einsum("i,j,ij->", weights, weights, kl + 0.5 * (mean - guess) ** 2 / np.exp(log_eta))

    bounds = np.log(variance) - 3, np.log(variance) + 8
    best = np.exp(minimize_scalar(cost, bounds=bounds, method="bounded", options={"xatol": 1e-9}).x)
    found = eta(diffusion.optimal_variance(cases.gaussian_mse()), log_snr_s, log_snr_t)
    assert found == pytest.approx(best, rel=1e-5)
    # For Gaussian data p(z_s | z_t) is then q(z_s | z_t) itself.
    assert found == pytest.approx(moments(log_snr_s, log_snr_t), rel=1e-5)
    assert not posterior(log_snr_s, log_snr_t) == pytest.approx(best, rel=1e-4)


@every_step
def test_learned_lies_between(log_snr_s, log_snr_t):
    """phi -> infinity gives beta, -> -infinity the posterior's; zero, their geometric mean."""
    at, network = (log_snr_s, log_snr_t), diffusion.learned_variance()
    phi = network.init(jax.random.key(0))
    assert phi.shape == (16,) and not np.any(phi)
    assert eta(network, *at, phi + 60) == pytest.approx(beta(*at), rel=5e-6)
    assert eta(network, *at, phi - 60) == pytest.approx(posterior(*at), rel=5e-6)
    assert eta(network, *at) == pytest.approx(np.sqrt(beta(*at) * posterior(*at)), rel=1e-5)


@pytest.mark.parametrize("log_snr_t", [15.0, 8.0, 1.3, -4.1, -9.0])
def test_learned_interpolates_between_knots(log_snr_t):
    """v's logit by NumPy's interpolation at the noisier latent, constant beyond the ends; and the slope by phi."""
    network, log_snr_s = diffusion.learned_variance(10.0, -6.0, 5), log_snr_t + 0.7
    phi = np.array([-1.0, 2.0, 0.5, -0.7, 1.1])

    def exact(phi):
        logit = np.interp(np.float32(log_snr_t), np.linspace(-6.0, 10.0, 5), phi)
        v, at = 1 / (1 + np.exp(-logit)), (log_snr_s, log_snr_t)
        return np.exp(v * np.log(beta(*at)) + (1 - v) * np.log(posterior(*at)))

    phi32 = jnp.asarray(phi, jnp.float32)
    at = jnp.float32(log_snr_s), jnp.float32(log_snr_t)
    value, slopes = jax.value_and_grad(network.apply)(phi32, *at)
    assert float(value) == pytest.approx(exact(phi), rel=1e-5)
    differences = [cases.slope(lambda h, i=i: exact(phi + h * np.eye(5)[i]), 0.0) for i in range(5)]
    np.testing.assert_allclose(slopes, differences, rtol=1e-4, atol=1e-6 * float(value))


@pytest.mark.parametrize("settings", [(1.0, 1.0, 4), (0.0, 2.0, 4), (5.0, -5.0, 0)])
def test_knots_that_do_not_fall_are_refused(settings):
    with pytest.raises(ValueError, match=r"log_snr_max, log_snr_min, num_knots: got .* expected a fall"):
        diffusion.learned_variance(*settings)


@every_step
def test_slopes_by_the_log_snrs(log_snr_s, log_snr_t):
    """A learned schedule is trained through these."""
    s, t = float(np.float32(log_snr_s)), float(np.float32(log_snr_t))
    width = 1e-3 if s - t > 0.5 else 1e-4
    for network, exact in (
        (diffusion.posterior_variance(), lambda s, t: cases.bayes(0.0, 0.0, s, t)[1]),
        (diffusion.beta_variance(), lambda s, t: cases.step_of_q(s, t)[1]),
        (
            diffusion.optimal_variance(cases.gaussian_mse()),
            moments,
        ),
    ):
        found = jax.grad(network.apply, (1, 2))((), jnp.float32(s), jnp.float32(t))
        expected = (
            cases.slope(lambda s: exact(s, t), s, width),  # noqa: B023
            cases.slope(lambda t: exact(s, t), t, width),  # noqa: B023
        )
        size = exact(s, t)
        np.testing.assert_allclose(found, expected, rtol=2e-4, atol=2e-5 * size)
