"""The whole path in one scan: its mean is the sum over steps, or the integral over time, of closed-form KLs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.integrate import quad

import vdiff as vd
from tests import toys
from tests.diffusion import cases
from vdiff import diffusion
from vdiff.diffusion import predict

X = np.array([0.45, -0.1], np.float32)
BETAS = np.array([0.02, 0.1, 0.3, 0.4, 0.6], np.float32)
SCALE_OF_X = 0.2
DRAWS = 20_000


def chain():
    return diffusion.ddpm(
        cases.gaussian_denoiser(),
        BETAS,
        shape=(2,),
        predict=predict.data,
        likelihood=diffusion.gaussian(SCALE_OF_X),
    )


def continuous():
    return diffusion.vdm(
        cases.gaussian_denoiser(),
        diffusion.cosine_log_snr(6.0, -4.0),
        shape=(2,),
        predict=predict.data,
        likelihood=diffusion.gaussian(SCALE_OF_X),
    )


MODELS = {"chain": (chain, 4), "chain, twice": (chain, 8), "continuous": (continuous, 24)}


def log_snrs():
    abar = np.cumprod(1.0 - BETAS.astype(np.float64))
    return np.log(abar / (1 - abar))


def error_of_x(log_snr):
    """E |x - x_hat|^2 over z, x fixed, for the best denoiser of N(LOC, SCALE^2)."""
    alpha, sigma = cases.scales(log_snr)
    slope = cases.SCALE**2 * alpha / (cases.SCALE**2 * alpha**2 + sigma**2)
    return np.sum((slope * sigma) ** 2 + (1 - slope * alpha) ** 2 * (X - cases.LOC) ** 2)


def exact_kls():
    """KL of each of the four steps, float64: q(z_i | z_{i+1}, x) by Bayes' rule against N(mean, beta)."""
    kls = []
    for s, t, beta in zip(log_snrs()[:-1], log_snrs()[1:], BETAS[1:].astype(np.float64), strict=True):
        by_x, variance = cases.bayes(0.0, 1.0, s, t)
        spread = variance / beta
        kls.append(0.5 * (2 * (spread - 1 - np.log(spread)) + by_x**2 * error_of_x(t) / beta))
    return np.array(kls)


def exact_terms(name):
    """Prior, reconstruction, diffusion, float64."""
    first, last = (6.0, -4.0) if name == "continuous" else log_snrs()[[0, -1]]
    alpha, sigma = cases.scales(last)
    prior = -np.sum(0.5 * ((alpha * X) ** 2 + sigma**2 - 1) - np.log(sigma))
    constant = -2 * (np.log(SCALE_OF_X) + 0.5 * np.log(2 * np.pi))
    reconstruction = constant - 0.5 * error_of_x(first) / SCALE_OF_X**2
    if name != "continuous":
        return prior, reconstruction, -exact_kls().sum()
    # -1/2 int SNR |x - x_hat|^2 dlog_snr
    integral = quad(lambda at: np.exp(at) * error_of_x(at), -4.0, 6.0, epsabs=1e-12)[0]
    return prior, reconstruction, -0.5 * integral


@functools.cache
def drawn(name, num_sweeps=2):
    make, num_times = MODELS[name]
    model = make()
    estimate = diffusion.path_elbo(model, num_times, num_sweeps)
    run = toys.quick_jit(jax.vmap(estimate, in_axes=(0, None, None)))
    keys = jax.random.split(jax.random.key(0), DRAWS)
    found = run(keys, model.init(jax.random.key(1)), jnp.asarray(X))
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), found)


@pytest.mark.parametrize("name", MODELS)
def test_terms_have_their_exact_means(name):
    found, exact = drawn(name), exact_terms(name)
    for term, expected in zip(("prior", "reconstruction", "diffusion"), exact, strict=True):
        draws = found.terms[term]
        std_error = max(draws.std() / np.sqrt(DRAWS), 2e-6 * abs(expected))
        assert abs(draws.mean() - expected) < 5 * std_error, term
        assert std_error < 0.004 * abs(expected)  # so that 2 % would show
    np.testing.assert_allclose(found.value, sum(found.terms.values()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_standard_error_is_the_spread(name):
    """E std_error^2 = Var(value), over many keys, for two sweeps."""
    found = drawn(name)
    squares = found.std_error**2
    variance = (found.value - found.value.mean()) ** 2 * DRAWS / (DRAWS - 1)
    difference = squares - variance
    assert abs(difference.mean()) < 5 * difference.std() / np.sqrt(DRAWS)
    assert difference.std() / np.sqrt(DRAWS) < 0.02 * variance.mean()


def test_standard_error_of_more_and_of_one_sweep():
    three, one = drawn("chain", 3), drawn("chain", 1)
    assert np.all(np.isinf(one.std_error))
    assert (three.std_error**2).mean() == pytest.approx(three.value.var(), rel=0.06)
    # Three sweeps have a third of one's variance.
    assert three.value.var() == pytest.approx(one.value.var() / 3, rel=0.06)


@pytest.mark.parametrize("multiple", [1, 3])
def test_each_step_of_a_chain_is_visited_equally_often(multiple):
    """From the data's end on; the density is 1/4 over the log-SNR that a step crosses, for every key."""
    model = chain()
    params = model.init(jax.random.key(0))
    along = jax.jit(diffusion.rates(model, 4 * multiple))
    for seed in range(20):
        rate = along(jax.random.key(seed), params, jnp.asarray(X))
        assert all(leaf.shape == (4 * multiple,) for leaf in rate)
        np.testing.assert_allclose(rate.log_snr, np.repeat(log_snrs()[1:], multiple), rtol=1e-5)
        np.testing.assert_allclose(rate.density, np.repeat(-0.25 / np.diff(log_snrs()), multiple), rtol=1e-5)


def test_each_step_has_its_own_kl():
    """The mean of each rate, times the probability of its step, is that step's KL; draws differ between times."""
    model = chain()
    keys = jax.random.split(jax.random.key(2), DRAWS)
    along = toys.quick_jit(jax.vmap(diffusion.rates(model, 4), in_axes=(0, None, None)))
    rate = along(keys, model.init(jax.random.key(0)), jnp.asarray(X))
    assert np.max(toys.z_scores(np.asarray(rate.value, np.float64), -4 * exact_kls())) < 5
    errors = np.exp(log_snrs()[1:]) * [error_of_x(at) for at in log_snrs()[1:]]
    found = np.asarray(rate.squared_error, np.float64)
    assert np.max(toys.z_scores(found, errors)) < 5
    correlation = np.corrcoef(found.T) - np.eye(4)
    assert np.max(np.abs(correlation)) < 5 / np.sqrt(DRAWS)


def test_rates_in_continuous_time():
    """value * density is -1/2 SNR |x - x_hat|^2 at the rate's log-SNR, to the last digit; one time in each n-th."""
    model = continuous()
    rate = jax.jit(diffusion.rates(model, 50))(
        jax.random.key(0), model.init(jax.random.key(0)), jnp.asarray(X)
    )
    np.testing.assert_allclose(rate.value * rate.density, -0.5 * rate.squared_error, rtol=1e-5)
    first, last = np.arctan(np.exp(-3.0)), np.arctan(np.exp(2.0))
    times = (np.arctan(np.exp(-0.5 * np.float64(rate.log_snr))) - first) / (last - first)
    offsets = times * 50 - np.arange(50)
    assert np.all((offsets >= -1e-4) & (offsets < 1 + 1e-4))
    np.testing.assert_allclose(offsets, offsets[0], atol=1e-3)  # one lattice, shifted as a whole


def test_times_never_reach_one():
    """However the shift is rounded: u in [0, 1), which a chain's last step and a schedule's end rely on."""

    def rate_at(key, params, x, u):
        return diffusion.Rate(u, u, u, u)

    model = chain()._replace(rate_at=rate_at)
    for num_times in (1, 3, 1000):
        draw = jax.jit(
            jax.vmap(lambda key, n=num_times: diffusion.rates(model, n)(key, vd.Params(), ()).value)
        )
        u = np.asarray(draw(jax.random.split(jax.random.key(0), 2000)))
        assert np.all(u >= 0) and np.all(u < 1)
        np.testing.assert_array_equal(
            np.floor(u.astype(np.float64) * num_times * (1 + 1e-7)).max(), num_times - 1
        )
        # The shift is uniform.
        shift = u[:, 0].astype(np.float64) * num_times
        assert abs(shift.mean() - 0.5) < 5 * np.sqrt(1 / 12 / 2000)


def test_counts_that_are_none_are_refused(key):
    model = chain()
    with pytest.raises(ValueError, match="num_times: got 0, expected at least 1"):
        diffusion.rates(model, 0)
    with pytest.raises(ValueError, match="num_times: got -1, expected at least 1"):
        diffusion.path_elbo(model, -1)
    with pytest.raises(ValueError, match="num_sweeps: got 0, expected at least 1"):
        diffusion.path_elbo(model, 4, 0)
    for function in (diffusion.rates(model, 4), diffusion.path_elbo(model, 4)):
        with pytest.raises(TypeError, match="expected a typed key"):
            function(jax.random.PRNGKey(0), model.init(key), jnp.asarray(X))
