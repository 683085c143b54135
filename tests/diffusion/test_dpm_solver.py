import jax
import numpy as np
import pytest

from tests.diffusion import exact_scores as exact
from vdiff.diffusion import ancestral, ddim, dpm_solver, dpm_solver_sde, uniform_log_snr


@pytest.mark.parametrize("order", [1, 2, 3])
def test_error_falls_as_the_order_says(order):
    fitted = exact.slopes(lambda model, n: dpm_solver(model, n, order=order))
    np.testing.assert_allclose(fitted[-1], order, atol=0.25)


def test_standard_deviation_at_twenty_evaluations():
    """The bar: within .004, the call at z_1 counted."""
    model = exact.diffusion()
    assert abs(exact.affine_std(dpm_solver(model, 20, grid=uniform_log_snr), model) - exact.STD) < 0.004


@pytest.mark.parametrize("num_steps", [7, 20])
def test_order_one_is_what_it_is_called(num_steps):
    """Along the flow it is DDIM, with noise the chain under the posterior's variance, draw by draw."""
    model = exact.diffusion()
    for one, other in (
        (dpm_solver(model, num_steps, order=1), ddim(model, num_steps)),
        (dpm_solver_sde(model, num_steps, order=1), ancestral(model, num_steps, grid=uniform_log_snr)),
    ):
        for got, expected in zip(
            exact.draw(one, exact.ring(), 8), exact.draw(other, exact.ring(), 8), strict=True
        ):
            np.testing.assert_allclose(got, expected, rtol=2e-5, atol=2e-5)


def test_second_order_noise_is_nearer_the_law_than_first():
    """At 20 latents the spread of order one is an eighth too small, that of order two a tenth of that."""
    model = exact.diffusion()
    first, second = (
        np.std(exact.draw(dpm_solver_sde(model, 20, order=order), exact.gaussian(), 20_000)[0]) - exact.STD
        for order in (1, 2)
    )
    assert first < -0.02 and abs(second) < abs(first) / 4


@pytest.mark.parametrize("order", [2, 3])
def test_a_guess_that_is_a_polynomial_is_integrated(order):
    """With x_hat quadratic in u the third order errs in its first two steps alone; with x_hat constant none errs."""

    def errors(guess, primitive, num_steps):
        # z_s / sigma_s - z_t / sigma_t = int e^u x_hat(u) du
        with jax.enable_x64(True):
            model = exact.diffusion(4.0, -8.0, guess=guess)
            _, z = jax.jit(dpm_solver(model, num_steps, order=order))(jax.random.key(0), exact.ring())
            z = np.asarray(z)
        u = np.linspace(2.0, -4.0, num_steps)
        scaled = z / (1 / np.sqrt(1 + np.exp(2 * u)))[:, None]
        exactly = scaled[-1] + (primitive(u) - primitive(u[-1]))[:, None]
        return np.max(np.abs(np.diff((scaled - exactly)[:-2], axis=0)))

    # 16 latents, so that the last steps keep their order.
    constant = errors(lambda theta, z, log_snr: 0 * z + 0.7, lambda u: 0.7 * np.exp(u), 16)
    assert constant < 1e-12
    quadratic = errors(
        lambda theta, z, log_snr: 0 * z + 0.25 * log_snr * log_snr,
        lambda u: np.exp(u) * (u**2 - 2 * u + 2),
        16,
    )
    assert quadratic < 1e-12 if order == 3 else quadratic > 1e-3


def test_a_few_steps_end_in_order_one():
    """Up to 15 latents the last step is that of DDIM from the latent before; with 16 it is not."""
    model = exact.diffusion()
    for num_steps, ends_low in ((15, True), (16, False)):
        _, z = jax.jit(dpm_solver(model, num_steps, order=3))(jax.random.key(1), exact.gaussian())
        log_snr_s, log_snr_t = np.linspace(9.0, -9.0, num_steps)[:2]
        sigma_s, sigma_t = (1 / np.sqrt(1 + np.exp(a)) for a in (log_snr_s, log_snr_t))
        alpha_s = 1 / np.sqrt(1 + np.exp(-log_snr_s))
        x_hat = np.asarray(model.denoise(exact.gaussian(), z[1], jax.numpy.float32(log_snr_t)))
        step = (
            sigma_s / sigma_t * np.asarray(z[1]) + alpha_s * (1 - np.exp((log_snr_t - log_snr_s) / 2)) * x_hat
        )
        assert (np.max(np.abs(step - z[0])) < 1e-5) == ends_low


@pytest.mark.parametrize(("solver", "order"), [(dpm_solver, 4), (dpm_solver, 0), (dpm_solver_sde, 3)])
def test_other_orders_are_refused(solver, order):
    with pytest.raises(ValueError, match=f"order: got {order}, expected 1"):
        solver(exact.diffusion(), 10, order=order)
