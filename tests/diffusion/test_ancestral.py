"""Sampling by the chain: on Gaussian data with its own denoiser each latent's law is a recursion of two moments."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vdiff as vd
from tests import toys
from tests.diffusion import cases
from vdiff import diffusion
from vdiff.diffusion import predict

DRAWS = 100_000
SCALE_OF_X = 0.1
VARIANCES = {
    "beta": diffusion.beta_variance,
    "posterior": diffusion.posterior_variance,
    "optimal": lambda: diffusion.optimal_variance(cases.gaussian_mse()),
}


def built(variance="beta", log_snrs=(9.0, -9.0), num_steps=None):
    return diffusion.vdm(
        cases.gaussian_denoiser(),
        diffusion.linear_log_snr(*log_snrs),
        shape=(2,),
        num_steps=num_steps,
        predict=predict.data,
        reverse_variance=VARIANCES[variance](),
        likelihood=diffusion.gaussian(SCALE_OF_X),
    )


def guess(log_snr):
    """E[x | z] = slope z + shift."""
    alpha, sigma = cases.scales(log_snr)
    variance = cases.SCALE**2 * alpha**2 + sigma**2
    return cases.SCALE**2 * alpha / variance, sigma**2 / variance * cases.LOC


def exact_law(variance, log_snrs):
    """Mean and variance of z_1..z_n, then of x, float64."""
    mean, spread = 0.0, 1.0
    law = [(mean, spread)]
    for s, t in zip(log_snrs[-2::-1], log_snrs[:0:-1], strict=True):
        slope, shift = guess(t)
        constant, posterior = cases.bayes(0.0, shift, s, t)
        by_z = cases.bayes(1.0, slope, s, t)[0]
        a, beta = cases.step_of_q(s, t)
        alpha_s = cases.scales(s)[0]
        kept = 1.0 - np.exp(t - s)
        mse = cases.SCALE**2 * (1 - cases.scales(t)[0] * slope)  # Var(x | z) = s^2 - Cov(x, z) slope
        eta = {"beta": beta, "posterior": posterior, "optimal": posterior + (alpha_s * kept) ** 2 * mse}[
            variance
        ]
        mean, spread = by_z * mean + constant, by_z**2 * spread + eta
        law.append((mean, spread))
    slope, shift = guess(log_snrs[0])
    return np.array(law[::-1]), (slope * mean + shift, slope**2 * spread + SCALE_OF_X**2)


@functools.cache
def drawn(variance, num_steps, log_snrs=(9.0, -9.0), seed=0, as_model=False):
    """x [N, 2] and the path [N, n, 2]."""
    model = built(variance, log_snrs, num_steps if as_model else None)
    sample = model.sample if as_model else diffusion.ancestral(model, num_steps)
    params = model.init(jax.random.key(0))
    draw = toys.quick_jit(jax.vmap(sample, in_axes=(0, None)))
    x, path = draw(jax.random.split(jax.random.key(seed), DRAWS), params)
    return np.asarray(x, np.float64), np.asarray(path, np.float64)


def check_moments(draws, mean, variance):
    """Draws [N, 2] of two independent dimensions of N(mean, variance), by z-scores."""
    assert np.max(np.abs(draws.mean(axis=0) - mean)) < 5 * np.sqrt(variance / DRAWS)
    squares = (draws - mean) ** 2
    assert np.max(np.abs(squares.mean(axis=0) - variance)) < 5 * variance * np.sqrt(2 / DRAWS)
    product = (draws[:, 0] - mean) * (draws[:, 1] - mean)
    assert abs(product.mean()) < 5 * variance / np.sqrt(DRAWS)


@pytest.mark.parametrize("as_model", [False, True])
@pytest.mark.parametrize("variance", VARIANCES)
def test_every_latent_of_the_path_has_its_exact_law(variance, as_model):
    """Five steps, so that the three variances are far apart; x too. A chain's own sample is the same."""
    log_snrs = np.linspace(9.0, -9.0, 6)
    law, of_x = exact_law(variance, log_snrs)
    x, path = drawn(variance, 6, as_model=as_model)
    assert path.shape == (DRAWS, 6, 2) and x.shape == (DRAWS, 2)
    for i, (mean, spread) in enumerate(law):
        check_moments(path[:, i], mean, spread)
    check_moments(x, *of_x)


def test_the_three_variances_are_told_apart():
    """By more than the test above would forgive."""
    last = [exact_law(variance, np.linspace(9.0, -9.0, 6))[0][0, 1] for variance in VARIANCES]
    for one, other in ((0, 1), (1, 2), (0, 2)):
        assert abs(last[one] / last[other] - 1) > 0.1


@pytest.mark.parametrize("num_steps", [2, 4])
def test_the_optimal_variance_gives_the_exact_marginals(num_steps):
    """However few the steps: each latent has the law of q, if the last has no signal left."""
    log_snrs = np.linspace(9.0, -20.0, num_steps)
    x, path = drawn("optimal", num_steps, (9.0, -20.0), seed=1)
    for i, log_snr in enumerate(log_snrs):
        alpha, sigma = cases.scales(log_snr)
        check_moments(path[:, i], alpha * cases.LOC, alpha**2 * cases.SCALE**2 + sigma**2)
    alpha, _ = cases.scales(log_snrs[0])
    slope, _ = guess(log_snrs[0])
    # x is a guess of x plus the likelihood's noise: all but what the guess leaves unknown.
    check_moments(x, cases.LOC, cases.SCALE**2 * alpha * slope + SCALE_OF_X**2)


def test_neighbours_of_the_path_are_steps_of_the_chain():
    """Cov(z_s, z_t) = slope Var z_t: the path is in one piece and in order."""
    log_snrs = np.linspace(9.0, -9.0, 6)
    law, _ = exact_law("beta", log_snrs)
    _, path = drawn("beta", 6)
    for i in range(5):
        slope, _ = guess(log_snrs[i + 1])
        by_z = cases.bayes(1.0, slope, log_snrs[i], log_snrs[i + 1])[0]
        products = (path[:, i, 0] - law[i, 0]) * (path[:, i + 1, 0] - law[i + 1, 0])
        exact = by_z * law[i + 1, 1]
        assert abs(products.mean() - exact) < 5 * products.std() / np.sqrt(DRAWS)


def test_one_step_is_noise_and_a_guess():
    x, path = drawn("beta", 1)
    slope, shift = guess(9.0)
    check_moments(path[:, 0], 0.0, 1.0)
    np.testing.assert_allclose((x - slope * path[:, 0] - shift).std(), SCALE_OF_X, rtol=5 / np.sqrt(DRAWS))


def test_a_grid_of_ones_own(key):
    """It is told the model, its params and n; its log-SNRs are those at which the model is denoised."""
    seen = []

    def grid(model, params, num_steps):
        seen.append((model.shape, params, num_steps))
        return jnp.array([4.0, 1.0, -3.0])

    def record(theta, z, log_snr):
        jax.debug.callback(lambda at: visited.append(float(at)), log_snr)
        return 0.0 * z

    visited = []
    model = diffusion.ddpm(vd.Network(lambda key: (), record), [0.1, 0.2], shape=(2,), predict=predict.data)
    params = model.init(key)
    x, path = diffusion.ancestral(model, 3, grid=grid)(key, params)
    jax.effects_barrier()
    assert seen == [((2,), params, 3)] and path.shape == (3, 2) and x.shape == (2,)
    assert sorted(visited) == [-3.0, 1.0, 4.0]


def test_uniform_time_is_even_in_the_models_own_time(key):
    model = built()
    grid = diffusion.uniform_time(model, model.init(key), 5)
    np.testing.assert_allclose(grid, [9.0, 4.5, 0.0, -4.5, -9.0], atol=1e-5)
    chain = diffusion.ddpm(cases.gaussian_denoiser(), [0.1, 0.2, 0.4], shape=(2,))
    np.testing.assert_allclose(
        diffusion.uniform_time(chain, chain.init(key), 3),
        diffusion.log_snrs_of(np.array([0.1, 0.2, 0.4])),
        rtol=1e-6,
    )


def test_refusals(key):
    model = built()
    with pytest.raises(ValueError, match="num_steps: got 0, expected at least 1"):
        diffusion.ancestral(model, 0)
    with pytest.raises(TypeError, match="expected a typed key"):
        diffusion.ancestral(model, 2)(jax.random.PRNGKey(0), model.init(key))
