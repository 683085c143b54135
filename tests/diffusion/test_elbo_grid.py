import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.diffusion import exact_scores as exact
from vdiff.diffusion import (
    beta_variance,
    bound_gap,
    denoising_error,
    elbo_optimal,
    interpolated_error,
    optimal_variance,
    path_loss,
    posterior_variance,
)

S = exact.STD


def of(network):
    return functools.partial(network.apply, ())


VARIANCES = {
    "posterior": of(posterior_variance()),
    "beta": of(beta_variance()),
    "optimal": of(optimal_variance(exact.gaussian_mse)),
}


def mse64(log_snr):
    a2 = 1 / (1 + np.exp(-log_snr))
    return S**2 * (1 - a2) / (S**2 * a2 + 1 - a2)


def kl(s, t, eta):
    """KL of two Gaussians, its mean averaged over the data, from their moments."""
    a2, c = 1 / (1 + np.exp(-s)), 1 - np.exp(t - s)
    v, gap = (1 - a2) * c, a2 * c**2 * mse64(t)
    return 0.5 * (np.log(eta / v) + (v + gap) / eta - 1)


@pytest.mark.parametrize("name", VARIANCES)
def test_path_loss_is_the_sum_of_the_kls(name):
    grid = np.array([7.0, 4.0, 3.5, -1.0, -6.0])
    s, t = grid[:-1], grid[1:]
    c = 1 - np.exp(t - s)
    posterior = c / (1 + np.exp(s))
    eta = {
        "posterior": posterior,
        "beta": c / (1 + np.exp(t)),
        "optimal": posterior + c**2 / (1 + np.exp(-s)) * mse64(t),
    }[name]
    np.testing.assert_allclose(
        path_loss(exact.gaussian_mse, VARIANCES[name], grid), np.sum(kl(s, t, eta)), rtol=1e-5
    )


def test_simple_forms_of_the_loss():
    """(SNR_s - SNR_t) mse / 2 with the posterior's variance, log(1 + that twice) / 2 with the optimal one."""
    grid = np.array([7.0, 2.0, -3.0])
    fall = -np.diff(np.exp(grid)) * mse64(grid[1:])
    for name, expected in (("posterior", fall / 2), ("optimal", np.log1p(fall) / 2)):
        np.testing.assert_allclose(
            path_loss(exact.gaussian_mse, VARIANCES[name], grid), np.sum(expected), rtol=1e-5
        )


def test_the_optimal_variance_has_no_gap_on_a_gaussian():
    """Its reverse kernels are exact at any number of steps; the limit is 1/2 log (1 + s^2 SNR_1) / (1 + s^2 SNR_m)."""
    for grid in (np.linspace(8, -6, 3), np.linspace(8, -6, 30)):
        assert abs(bound_gap(exact.gaussian_mse, VARIANCES["optimal"], grid)) < 1e-4
        loss = path_loss(exact.gaussian_mse, VARIANCES["optimal"], grid)
        limit = 0.5 * np.log((1 + S**2 * np.exp(8)) / (1 + S**2 * np.exp(-6)))
        np.testing.assert_allclose(loss, limit, rtol=1e-5)


@pytest.mark.parametrize("name", ["posterior", "beta"])
def test_gaps_halve_when_steps_do(name):
    gaps = [bound_gap(exact.gaussian_mse, VARIANCES[name], np.linspace(8, -6, n)) for n in (101, 201, 401)]
    np.testing.assert_allclose(np.log2(np.array(gaps[:-1]) / gaps[1:]), 1, atol=0.15)


@pytest.mark.parametrize("name", ["posterior", "beta"])
@pytest.mark.parametrize("num_steps", [2, 3, 4, 5])
def test_no_choice_from_the_fine_grid_is_better(name, num_steps):
    """All of them tried, with the losses from another formula."""
    fine = np.linspace(8, -6, 12)
    s, t = fine[:, None], fine[None, :]
    with np.errstate(all="ignore"):
        c = 1 - np.exp(t - s)
        eta = c / (1 + np.exp(s)) if name == "posterior" else c / (1 + np.exp(t))
        loss = kl(s, t, eta)
    best = min(
        sum(loss[i, j] for i, j in itertools.pairwise((0, *middle, 11)))
        for middle in itertools.combinations(range(1, 11), num_steps - 2)
    )
    grid = elbo_optimal(exact.gaussian_mse, VARIANCES[name], 8.0, -6.0, num_steps, resolution=12)
    assert grid.shape == (num_steps,)
    np.testing.assert_allclose(grid[[0, -1]], [8, -6])
    np.testing.assert_allclose(path_loss(exact.gaussian_mse, VARIANCES[name], grid), best, rtol=1e-5)


def test_all_latents_are_used_when_there_is_no_choice():
    grid = elbo_optimal(exact.gaussian_mse, VARIANCES["posterior"], 4.0, -4.0, 9, resolution=9)
    np.testing.assert_allclose(grid, np.linspace(4, -4, 9))


@pytest.fixture(scope="module")
def ring_mse():
    rng = np.random.default_rng(0)
    data = exact.MODES[rng.integers(8, size=4000)] + exact.RING_STD * rng.standard_normal((4000, 2))
    log_snrs = np.linspace(-8, 10, 73, dtype=np.float32)
    errors = denoising_error(
        exact.diffusion(), exact.ring(), jax.random.key(0), data.astype(np.float32), log_snrs, chunk_size=4000
    )
    return interpolated_error(log_snrs, errors)


@pytest.mark.parametrize("num_steps", [5, 10, 20])
def test_half_the_gap_of_the_even_grid_on_the_ring(ring_mse, num_steps):
    """The bar, with the optimal variance; with the posterior's it holds too."""
    for variance in (of(optimal_variance(ring_mse)), VARIANCES["posterior"]):
        grid = elbo_optimal(ring_mse, variance, 10.0, -8.0, num_steps + 1)
        best = bound_gap(ring_mse, variance, grid)
        assert 0 < best < 0.5 * bound_gap(ring_mse, variance, np.linspace(10, -8, num_steps + 1))


def test_what_cannot_be_is_refused():
    variance = VARIANCES["posterior"]
    with pytest.raises(ValueError, match="expected a fall; exchange them"):
        elbo_optimal(exact.gaussian_mse, variance, -6.0, 8.0, 5)
    for num_steps in (1, 13):
        with pytest.raises(ValueError, match=f"num_steps: got {num_steps} with resolution=12"):
            elbo_optimal(exact.gaussian_mse, variance, 8.0, -6.0, num_steps, resolution=12)
    with pytest.raises(ValueError, match="falling"):
        path_loss(exact.gaussian_mse, variance, [1.0, 2.0])
    assert path_loss(exact.gaussian_mse, variance, jnp.array([1.0])) == 0
