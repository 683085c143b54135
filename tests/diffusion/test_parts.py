"""What models share: the error of the noise, the ELBO's ends, and a surrogate on a toy of three outcomes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vdiff as vd
from tests import toys
from tests.diffusion import cases
from vdiff import diffusion
from vdiff.diffusion import predict
from vdiff.diffusion.parts import make_parts, towards_less_variance


def built(prediction=predict.data, denoiser=None, shape=(3,), likelihood=None, reverse_variance=None):
    return make_parts(
        denoiser or cases.gaussian_denoiser(),
        init_lam=lambda key: jax.random.normal(key, (2,)),
        shape=shape,
        predict=prediction,
        reverse_variance=reverse_variance or diffusion.learned_variance(num_knots=4),
        likelihood=likelihood or diffusion.gaussian(),
    )


def test_init_puts_everything_in_its_part(key):
    params = built().init(key)
    assert set(params.theta) == {"denoiser", "likelihood"} and set(params.theta["denoiser"]) == {
        "loc",
        "log_scale",
    }
    assert params.theta["likelihood"].shape == () and params.phi.shape == (4,) and params.lam.shape == (2,)
    assert params.cv == ()
    same, other = built().init(key), built().init(jax.random.key(1))
    np.testing.assert_array_equal(params.lam, same.lam)
    assert np.all(params.lam != other.lam)
    with pytest.raises(TypeError, match="expected a typed key"):
        built().init(jax.random.PRNGKey(0))


@pytest.mark.parametrize("log_snr", [8.0, 0.5, -6.0])
@pytest.mark.parametrize("name", ["noise", "data", "velocity", "preconditioned"])
def test_squared_error_is_that_of_the_noise(name, log_snr, key):
    """|eps_hat - eps|^2 in float64 from the network's own output, whatever the output means."""
    prediction = predict.preconditioned(0.4) if name == "preconditioned" else getattr(predict, name)
    network = cases.tiny_denoiser(3)
    parts = built(prediction, network)
    params = parts.init(key)
    y = jnp.array([0.3, -0.2, 0.7])
    key_error = jax.random.key(5)
    found = parts.squared_error(key_error, params, y, jnp.float32(log_snr))
    assert found.shape == () and found.dtype == jnp.float32
    z, eps = diffusion.forward_marginal(key_error, y, jnp.float32(log_snr))
    out = np.float64(network.apply(params.theta["denoiser"], z, jnp.float32(log_snr)))
    z, eps = np.float64(z), np.float64(eps)
    alpha, sigma = cases.scales(log_snr)
    variance = 0.4**2 * alpha**2 + sigma**2
    eps_hat = {
        "noise": out,
        "data": (z - alpha * out) / sigma,
        "velocity": sigma * z + alpha * out,
        "preconditioned": z * sigma / variance - 0.4 * alpha / np.sqrt(variance) * out,
    }[name]
    assert float(found) == pytest.approx(np.sum((eps_hat - eps) ** 2), rel=1e-4)


@pytest.mark.parametrize("log_snr", [4.0, -1.0])
def test_mean_squared_error_of_the_best_denoiser(log_snr):
    """E |eps_hat - eps|^2 for x fixed, in closed form; 100,000 draws."""
    parts = built()
    params = parts.init(jax.random.key(0))
    y = np.array([0.3, -0.2, 0.7])
    draws = toys.quick_jit(jax.vmap(parts.squared_error, (0, None, None, None)))(
        jax.random.split(jax.random.key(1), 100_000),
        params,
        jnp.asarray(y, jnp.float32),
        jnp.float32(log_snr),
    )
    alpha, sigma = cases.scales(log_snr)
    variance = cases.SCALE**2 * alpha**2 + sigma**2
    slope = cases.SCALE**2 * alpha / variance
    # x_hat - x = slope sigma eps - (1 - slope alpha) (x - loc)
    error_of_x = (slope * sigma) ** 2 + (1 - slope * alpha) ** 2 * (y - cases.LOC) ** 2
    exact = np.sum(error_of_x) * (alpha / sigma) ** 2
    draws = np.asarray(draws, np.float64)
    assert abs(draws.mean() - exact) < 5 * draws.std() / np.sqrt(len(draws))
    assert draws.std() / np.sqrt(len(draws)) < 0.004 * exact


def test_ends(key):
    """prior = -KL(N(alpha y, sigma^2), N(0, 1)); reconstruction = log p(x | z_1) at one draw of z_1."""
    parts = built()
    params = parts.init(key)
    x = jnp.array([0.3, -0.2, 0.7])
    first, last = jnp.float32(3.0), jnp.float32(-2.0)
    terms = parts.end_terms(key, params, x, first, last)
    assert set(terms) == {"prior", "reconstruction"}
    alpha, sigma = cases.scales(-2.0)
    kl = 0.5 * ((alpha * np.float64(x)) ** 2 + sigma**2 - 1) - np.log(sigma)
    assert float(terms["prior"]) == pytest.approx(-kl.sum(), rel=1e-5)
    z = np.float64(diffusion.forward_marginal(key, x, first)[0])
    alpha, sigma = cases.scales(3.0)
    variance = cases.SCALE**2 * alpha**2 + sigma**2
    x_hat = (cases.SCALE**2 * alpha * z + sigma**2 * cases.LOC) / variance
    exact = -0.5 * ((np.float64(x) - x_hat) / 0.1) ** 2 - np.log(0.1) - 0.5 * np.log(2 * np.pi)
    assert float(terms["reconstruction"]) == pytest.approx(exact.sum(), rel=1e-5)


def test_prior_at_the_end_of_time(key):
    """KL(q(z_m | x), p) is of the order of SNR: relative 1e-3 of float64 where float32 would have lost it."""
    parts = built()
    x = jnp.array([0.3, -0.2, 0.7])
    for log_snr in (-5.0, -10.0, -13.0):
        found = parts.end_terms(key, parts.init(key), x, jnp.float32(5), jnp.float32(log_snr))["prior"]
        signal = 1 / (1 + np.exp(-np.float64(log_snr)))
        exact = -0.5 * np.sum(signal * np.float64(x) ** 2 - signal - np.log1p(-signal))
        assert float(found) == pytest.approx(exact, rel=1e-3, abs=1e-9)


def test_reverse_variance_reads_phi(key):
    parts = built()
    params = parts.init(key)
    network = diffusion.learned_variance(num_knots=4)
    at = jnp.float32(2.0), jnp.float32(1.0)
    for phi in (params.phi, params.phi + 2.0):
        assert float(parts.reverse_variance(params._replace(phi=phi), *at)) == float(network.apply(phi, *at))


def test_wrong_shapes_are_refused(key):
    parts = built(shape=(3,))
    params = parts.init(key)
    with pytest.raises(ValueError, match=r"x: got a datum of shape \(4,\), expected \(3,\).*shape=x.shape"):
        parts.end_terms(key, params, jnp.zeros(4), jnp.float32(1), jnp.float32(-1))
    network = vd.Network(lambda key: (), lambda theta, z, log_snr: jnp.zeros(5))
    parts = built(denoiser=network)
    for call in (
        lambda: parts.denoise(parts.init(key), jnp.zeros(3), jnp.float32(0)),
        lambda: parts.squared_error(key, parts.init(key), jnp.zeros(3), jnp.float32(0)),
    ):
        with pytest.raises(ValueError, match=r"denoiser: got output of shape \(5,\), expected \(3,\)"):
            call()


def test_the_surrogate_points_to_less_variance():
    """Three outcomes with loss g_i, drawn with p = softmax(lam): f = g / p, and E f^2 = sum g^2 / p, by hand.

    The value is zero; the mean of the gradient is minus the slope of E f^2, in units of one dimension. No gradient
    reaches g: it is the ELBO's.
    """
    g, lam, dims = np.array([0.5, 3.0, 1.2]), np.array([0.3, -0.5, 0.9]), 4
    p = np.exp(lam) / np.exp(lam).sum()

    def surrogate(lam, g, i):
        log_p = jax.nn.log_softmax(lam)[i]
        return towards_less_variance(g[i] / jnp.exp(log_p), log_p, dims)

    lam32, g32 = jnp.asarray(lam, jnp.float32), jnp.asarray(g, jnp.float32)
    values, by_lam, by_g = [], [], []
    for i in range(3):
        value, slopes = jax.value_and_grad(surrogate, (0, 1))(lam32, g32, i)
        values.append(float(value))
        by_lam.append(slopes[0])
        by_g.append(slopes[1])
    assert values == [0.0, 0.0, 0.0] and not np.any(by_g)

    def second_moment(lam):
        p = np.exp(lam) / np.exp(lam).sum()
        return np.sum((g / dims) ** 2 / p)

    exact = [-cases.slope(lambda h, i=i: second_moment(lam + h * np.eye(3)[i]), 0.0) for i in range(3)]
    np.testing.assert_allclose(p @ np.asarray(by_lam, np.float64), exact, rtol=1e-5)
    # So ascent leads to p proportional to |g|, where the estimate does not vary at all.
    best = np.log(g)
    at_best = [cases.slope(lambda h, i=i: second_moment(best + h * np.eye(3)[i]), 0.0) for i in range(3)]
    np.testing.assert_allclose(at_best, 0.0, atol=1e-9)
