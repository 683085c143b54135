"""Betas against the formulas of their papers in float64."""

import jax.numpy as jnp
import numpy as np
import pytest

from vdiff import diffusion


def test_linear_betas_are_hos():
    np.testing.assert_allclose(diffusion.linear_betas(1000), np.linspace(1e-4, 0.02, 1000), rtol=2e-6)
    np.testing.assert_allclose(diffusion.linear_betas(100), np.linspace(1e-3, 0.2, 100), rtol=2e-6)
    np.testing.assert_allclose(diffusion.linear_betas(1), [0.1], rtol=1e-6)
    few = np.minimum(100.0 * (1e-4 + (0.02 - 1e-4) * np.arange(10) / 9), 0.999)
    assert few[-1] == 0.999
    np.testing.assert_allclose(diffusion.linear_betas(10), few, rtol=2e-6)
    other = np.linspace(0.001, 0.01, 500) * 2
    np.testing.assert_allclose(diffusion.linear_betas(500, 0.001, 0.01), other, rtol=2e-6)


@pytest.mark.parametrize(("num_steps", "offset"), [(1000, 0.008), (50, 0.008), (7, 0.2), (1, 0.008)])
def test_cosine_betas_are_those_published(num_steps, offset):
    f = np.cos((np.arange(num_steps + 1) / num_steps + offset) / (1 + offset) * np.pi / 2) ** 2
    alpha_squared = f / f[0]
    expected = np.minimum(1.0 - alpha_squared[1:] / alpha_squared[:-1], 0.999)
    np.testing.assert_allclose(diffusion.cosine_betas(num_steps, offset), expected, rtol=2e-4)
    # The tolerance is for the last, where cos^2 is nearly zero; the first have all their digits.
    np.testing.assert_allclose(
        diffusion.cosine_betas(num_steps, offset)[: num_steps // 2], expected[: num_steps // 2], rtol=2e-4
    )


def test_constant_betas():
    np.testing.assert_array_equal(diffusion.constant_betas(4, 0.3), np.full(4, 0.3, np.float32))


@pytest.mark.parametrize("betas", [[0.3], [0.02, 0.5, 0.9], np.linspace(1e-4, 0.02, 1000), [1e-9, 1e-3]])
def test_log_snrs_are_those_of_the_products(betas):
    products = np.cumprod(1.0 - np.asarray(betas, np.longdouble))
    expected = np.log(products) - np.log(1.0 - products)
    found = diffusion.log_snrs_of(np.asarray(betas))
    assert found.dtype == jnp.float32 and np.all(np.diff(found) < 0)
    np.testing.assert_allclose(found, np.asarray(expected, np.float64), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("betas", [[], 0.5, [[0.1]], [0.1, 0.0], [1.0], [-0.1], [0.5, float("nan")]], ids=str)
def test_betas_that_are_no_variances_are_refused(betas, unchecked):
    with pytest.raises(ValueError, match=r"betas: got .*expected \[m\] variances in \(0, 1\).*linear_betas"):
        diffusion.log_snrs_of(np.asarray(betas))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: diffusion.linear_betas(0), "num_steps: got 0"),
        (lambda: diffusion.linear_betas(5, first=0.0), "first: got 0.0"),
        (lambda: diffusion.linear_betas(5, last=1.0), "last: got 1.0"),
        (lambda: diffusion.cosine_betas(0), "num_steps: got 0"),
        (lambda: diffusion.cosine_betas(5, 0.0), "offset: got 0.0"),
        (lambda: diffusion.cosine_betas(5, float("nan")), "offset: got nan"),
        (lambda: diffusion.constant_betas(-1, 0.1), "num_steps: got -1"),
        (lambda: diffusion.constant_betas(3, 1.5), "beta: got 1.5"),
    ],
)
def test_settings_that_make_no_betas_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
