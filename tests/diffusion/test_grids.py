import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.diffusion import exact_scores as exact
from vdiff.diffusion import (
    ancestral,
    cosine_log_snr,
    fixed,
    karras,
    predict,
    uniform_log_snr,
    uniform_time,
    vdm,
)
from vdiff.types import Network, Params


def cosine():
    return vdm(
        Network(lambda key: (), lambda *_: None), cosine_log_snr(8.0, -6.0), shape=(2,), predict=predict.data
    )


def test_uniform_time_is_the_schedules_own():
    """cosine: -log_snr / 2 = log tan of an angle linear in time."""
    grid = np.asarray(uniform_time(cosine(), Params(), 7), np.float64)
    angles = np.arctan(np.exp(-grid / 2))
    np.testing.assert_allclose(np.diff(angles, 2), 0, atol=2e-6)
    np.testing.assert_allclose(grid[[0, -1]], [8, -6], atol=1e-4)


def test_uniform_log_snr_is_even():
    np.testing.assert_allclose(uniform_log_snr(cosine(), Params(), 8), np.linspace(8, -6, 8), atol=1e-4)


@pytest.mark.parametrize("rho", [1.0, 7.0])
def test_karras_is_the_papers_formula(rho):
    model = exact.diffusion(8.0, -6.0)
    low, high, n = np.exp(-4.0), np.exp(3.0), 9
    noise = (high ** (1 / rho) + np.arange(n) / (n - 1) * (low ** (1 / rho) - high ** (1 / rho))) ** rho
    grid = karras(rho)(model, Params(), n)
    np.testing.assert_allclose(grid, -2 * np.log(noise)[::-1], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(grid[jnp.array([0, -1])], [8, -6])


@pytest.mark.parametrize("grid", [uniform_time, uniform_log_snr, karras()])
def test_one_and_two_latents(grid):
    model = exact.diffusion(8.0, -6.0)
    np.testing.assert_allclose(grid(model, Params(), 1), [8.0], rtol=1e-6)
    np.testing.assert_allclose(grid(model, Params(), 2), [8.0, -6.0], rtol=1e-6)


def test_a_learned_schedule_is_differentiated_through():
    """Grids are functions of params: d last / d lam of a linear schedule is what it should be."""
    model = exact.diffusion()._replace(log_snr=lambda params, t: params.lam * (1.0 - 2.0 * t))
    for grid, middle in ((uniform_time, 0), (uniform_log_snr, 0), (karras(), None)):
        slope = jax.jacobian(lambda lam, grid=grid: grid(model, Params(lam=lam), 5))(jnp.float32(4.0))
        np.testing.assert_allclose(slope[jnp.array([0, 4])], [1, -1], atol=1e-5)
        if middle is None:
            # The middle of karras(7) is -14 log cosh(lam / 14).
            middle = -np.tanh(4.0 / 14)
        np.testing.assert_allclose(slope[2], middle, atol=1e-4)


def test_fixed_gives_what_it_was_given():
    numbers = [5.0, 1.0, -2.5]
    _, z = ancestral(exact.diffusion(), 3, grid=fixed(numbers))(jax.random.key(0), exact.ring())
    assert z.shape == (3, 2)
    np.testing.assert_array_equal(fixed(numbers)(exact.diffusion(), Params(), 3), numbers)


def test_wrong_grids_are_refused():
    with pytest.raises(ValueError, match="rho: got 0.0"):
        karras(0.0)
    with pytest.raises(ValueError, match="expected a fall"):
        fixed([1.0, 2.0])
    with pytest.raises(ValueError, match="expected a fall"):
        fixed([2.0, 2.0])
    with pytest.raises(ValueError, match=r"log_snrs: got shape \(0,\)"):
        fixed([])
    with pytest.raises(ValueError, match="finite"):
        fixed([np.inf, 2.0])
    with pytest.raises(ValueError, match="num_steps: got 4 with a grid of 2 log-SNRs.*num_steps=2"):
        ancestral(exact.diffusion(), 4, grid=fixed([2.0, 1.0]))(jax.random.key(0), exact.ring())
