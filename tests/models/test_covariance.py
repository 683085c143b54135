"""Each family against NumPy in float64: its matrices, its densities, its prior, its maximum."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from vdiff.models.covariance import (
    component_log_prob,
    diagonal_covariance,
    full_covariance,
    shared_covariance,
)

KINDS = {"full": full_covariance, "shared": shared_covariance, "diagonal": diagonal_covariance}
C, DIM = 3, 4


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def theta_of(kind):
    """A mixture's theta with random leaves; the strictly upper part of "lower" must not matter."""
    theta = {"loc": jnp.zeros((C, DIM))} | KINDS[kind].init(C, DIM)
    keys = jax.random.split(jax.random.key(4), len(theta))
    return {
        n: 0.4 * jax.random.normal(k, leaf.shape) for (n, leaf), k in zip(theta.items(), keys, strict=True)
    }


def sigma_of(kind, theta, z):
    """Rebuild Sigma_z from the definition, in float64."""
    if kind == "diagonal":
        return np.diag(np.exp(2.0 * np.asarray(theta["log_scale"][z], np.float64)))
    log_diag, lower = (np.asarray(theta[n], np.float64) for n in ("log_diag", "lower"))
    if kind == "full":
        log_diag, lower = log_diag[z], lower[z]
    w = np.tril(lower, -1) + np.diag(np.exp(log_diag))
    return np.linalg.inv(w.T @ w)


def test_init_is_the_identity(kind):
    theta = {"loc": jnp.zeros((C, DIM))} | KINDS[kind].init(C, DIM)
    for z in range(C):
        np.testing.assert_allclose(sigma_of(kind, theta, z), np.eye(DIM), atol=1e-7)


def test_unwhiten_undoes_whiten(kind):
    theta, x = theta_of(kind), jax.random.normal(jax.random.key(1), (DIM,))
    white = KINDS[kind].whiten(theta, 1, x)
    np.testing.assert_allclose(KINDS[kind].unwhiten(theta, 1, white), x, rtol=1e-5, atol=1e-6)
    assert not np.allclose(white, x, atol=1e-2)


def test_unwhitened_noise_has_the_covariance(kind):
    theta = theta_of(kind)
    root = np.stack([np.asarray(KINDS[kind].unwhiten(theta, 2, e), np.float64) for e in jnp.eye(DIM)]).T
    np.testing.assert_allclose(root @ root.T, sigma_of(kind, theta, 2), rtol=1e-5, atol=1e-6)


def test_component_log_prob_is_scipys(kind):
    theta, x = theta_of(kind), jax.random.normal(jax.random.key(1), (DIM,))
    for z in range(C):
        loc = np.asarray(theta["loc"][z], np.float64)
        expected = scipy.stats.multivariate_normal(loc, sigma_of(kind, theta, z)).logpdf(
            np.asarray(x, np.float64)
        )
        value = component_log_prob(KINDS[kind], theta, jnp.int32(z), x)
        np.testing.assert_allclose(value, expected, rtol=2e-6)


def test_log_prior_counts_each_distinct_matrix_once(kind):
    theta, scale = theta_of(kind), 0.7
    matrices = [sigma_of(kind, theta, z) for z in range(1 if kind == "shared" else C)]
    expected = -0.5 * sum(np.linalg.slogdet(s)[1] + scale**2 * np.trace(np.linalg.inv(s)) for s in matrices)
    np.testing.assert_allclose(KINDS[kind].log_prior(theta, scale), expected, rtol=1e-5)


@pytest.mark.parametrize("strength", [0.0, 3.0])
def test_maximize_reaches_a_stationary_point(kind, strength):
    """At the maximum the gradient of the expected log-likelihood plus the prior is zero, at others it is not."""
    covariance, theta, scale = KINDS[kind], theta_of(kind), 0.6
    data = jax.random.normal(jax.random.key(7), (40, DIM)) @ jnp.diag(jnp.array([0.5, 1.0, 2.0, 0.8]))
    weights = jax.nn.softmax(jax.random.normal(jax.random.key(8), (C, 40)), axis=0)
    residuals = [data - theta["loc"][z][None] for z in range(C)]
    scatters = jnp.stack([covariance.scatter(r, w) for r, w in zip(residuals, weights, strict=True)])
    best = theta | covariance.maximize(theta, weights.sum(1), scatters, strength, scale)

    def objective(theta):
        each = jax.vmap(lambda z: jax.vmap(lambda x: component_log_prob(covariance, theta, z, x))(data))(
            jnp.arange(C)
        )
        return jnp.sum(weights * each) + strength * covariance.log_prior(theta, scale)

    def steepness(theta):
        gradient = jax.grad(objective)(theta)
        return max(float(jnp.max(jnp.abs(g))) for name, g in gradient.items() if name != "loc")

    assert steepness(best) < 2e-3
    assert steepness(theta) > 1.0
    assert objective(best) > objective(theta)
