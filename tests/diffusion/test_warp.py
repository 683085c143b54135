"""The warp and its inverse, its shape, and refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vdiff.diffusion.warp import sinh_warp


@pytest.mark.parametrize(("centre", "width"), [(1.5, 2.5), (-3.0, 0.5)])
def test_there_and_back(centre, width):
    warp = sinh_warp(centre, width)
    log_snr = jnp.linspace(-20.0, 20.0, 41)
    np.testing.assert_allclose(warp.log_snr(warp.inverse(log_snr)), log_snr, rtol=2e-6, atol=2e-6)


def test_the_slope_is_least_at_the_centre_and_is_the_width():
    warp = sinh_warp(1.0, 2.0)
    slope = jax.vmap(jax.grad(warp.log_snr))(jnp.linspace(-2.0, 2.0, 5))
    np.testing.assert_allclose(slope, 2.0 * np.cosh(np.linspace(-2, 2, 5)), rtol=1e-6)
    assert float(warp.log_snr(jnp.zeros(()))) == 1.0


@pytest.mark.parametrize("width", [0.0, -1.0, float("nan")])
def test_refusals(width):
    with pytest.raises(ValueError, match="width: got .*, expected a positive number of units of log-SNR"):
        sinh_warp(0.0, width)
