import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.diffusion import exact_scores as exact
from vdiff.diffusion import denoising_error, interpolated_error, levels

LOG_SNRS = np.array([-6.0, 0.0, 4.0, 9.0], np.float32)


def data(num):
    return (exact.MEAN + exact.STD * np.random.default_rng(0).standard_normal((num, 2))).astype(np.float32)


def test_error_of_the_exact_denoiser_is_the_posteriors_variance():
    num = 20_000
    got = np.asarray(
        denoising_error(
            exact.diffusion(), exact.gaussian(), jax.random.key(0), data(num), LOG_SNRS, chunk_size=5000
        )
    )
    expected = np.asarray(jax.vmap(exact.gaussian_mse)(jnp.asarray(LOG_SNRS)))
    # A mean of squares of 2 num normal draws.
    assert np.all(np.abs(got / expected - 1) * np.sqrt(num) < 5)


def test_error_of_a_wrong_denoiser_is_its_own():
    """x_hat = 0: the mean square of the data, at every log-SNR."""
    model = exact.diffusion(guess=lambda theta, z, log_snr: 0.0 * z)
    x = data(300)
    got = denoising_error(model, exact.gaussian(), jax.random.key(0), x, LOG_SNRS)
    np.testing.assert_allclose(got, np.full(4, np.mean(x**2)), rtol=1e-5)


def test_chunks_do_not_matter():
    at = [
        denoising_error(
            exact.diffusion(), exact.ring(), jax.random.key(1), data(10), LOG_SNRS, chunk_size=chunk_size
        )
        for chunk_size in (3, 5, 100)
    ]
    np.testing.assert_allclose(at[0], at[1], rtol=1e-5)
    np.testing.assert_allclose(at[0], at[2], rtol=1e-5)


def test_data_are_embedded():
    """Bits at -1/2 and 1/2: with x_hat = 0 the error is 1/4."""
    model = exact.diffusion(guess=lambda theta, z, log_snr: 0.0 * z)._replace(likelihood=levels(2))
    bits = np.random.default_rng(0).integers(0, 2, (50, 2))
    got = denoising_error(model, exact.ring(), jax.random.key(0), bits, LOG_SNRS)
    np.testing.assert_allclose(got, 0.25, rtol=1e-6)


def test_one_program_for_all_chunks():
    traces = []

    def guess(theta, z, log_snr):
        traces.append(1)
        return z

    denoising_error(
        exact.diffusion(guess=guess), exact.ring(), jax.random.key(0), data(10), LOG_SNRS, chunk_size=3
    )
    assert len(traces) == 1


def test_interpolation_is_geometric_and_flat_beyond():
    mse = jax.jit(interpolated_error([4.0, 0.0, 2.0], [0.01, 1.0, 0.25]))
    at = [mse(jnp.float32(log_snr)) for log_snr in (-5, 0, 1, 2, 3, 4, 9)]
    np.testing.assert_allclose(at, [1, 1, 0.5, 0.25, 0.05, 0.01, 0.01], rtol=1e-5)


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="got 0 data"):
        denoising_error(exact.diffusion(), exact.ring(), jax.random.key(0), data(0), LOG_SNRS)
    with pytest.raises(TypeError, match="typed key"):
        denoising_error(exact.diffusion(), exact.ring(), jax.random.PRNGKey(0), data(2), LOG_SNRS)
    with pytest.raises(ValueError, match="different log-SNRs"):
        interpolated_error([1.0, 1.0], [0.1, 0.2])
    with pytest.raises(ValueError, match="errors: got .* expected positive"):
        interpolated_error([1.0, 2.0], [0.1, 0.0])
