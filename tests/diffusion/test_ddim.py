import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.diffusion import exact_scores as exact
from vdiff.diffusion import ancestral, ddim, forward_posterior, uniform_log_snr
from vdiff.diffusion.ddim import along_flow


def test_error_falls_with_the_step():
    np.testing.assert_allclose(exact.slopes(ddim)[-1], 1, atol=0.1)


def test_eta_one_is_the_chain_with_the_posteriors_variance():
    """Step by step, with the same draws."""
    model = exact.diffusion()
    one = exact.draw(ddim(model, 20, eta=1.0), exact.ring(), 8)
    other = exact.draw(ancestral(model, 20, grid=uniform_log_snr), exact.ring(), 8)
    for got, expected in zip(one, other, strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("gap", [1e-3, 1.0, 30.0])
def test_eta_one_has_the_posteriors_mean(gap):
    z, x = jnp.array([1.3, -0.4]), jnp.array([-0.2, 0.9])
    t = jnp.float32(-1.7)
    mean, _ = forward_posterior(z, x, t + gap, t)
    np.testing.assert_allclose(along_flow(z, x, t + gap, t, 1.0), mean, rtol=2e-6)


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_marginals_are_kept_when_the_data_are_known(eta):
    """With x_hat = x: from z_t = alpha_t x + sigma_t eps the mean is alpha_s x + sqrt(sigma_s^2 - v) eps."""
    s, t, x, eps = 1.1, -0.6, 0.8, -1.4
    a = {k: 1 / (1 + np.exp(-k)) for k in (s, t)}
    v = eta**2 * (1 - a[s]) * (1 - np.exp(t - s))
    z = np.sqrt(a[t]) * x + np.sqrt(1 - a[t]) * eps
    got = along_flow(jnp.array([z]), jnp.array([x]), jnp.float32(s), jnp.float32(t), eta)
    np.testing.assert_allclose(got[0], np.sqrt(a[s]) * x + np.sqrt(1 - a[s] - v) * eps, atol=1e-6)


def test_gradients_are_finite_at_both_ends_of_eta():
    z, x = jnp.array([1.3]), jnp.array([-0.2])
    for eta in (0.0, 1.0):
        for gap in (1e-3, 40.0):
            slope = jax.grad(lambda s, eta=eta: along_flow(z, x, s, jnp.float32(-20), eta)[0])(
                jnp.float32(-20 + gap)
            )
            assert np.isfinite(slope)


def test_other_etas_are_refused():
    with pytest.raises(ValueError, match="eta: got 1.5, expected a share in"):
        ddim(exact.diffusion(), 10, eta=1.5)
