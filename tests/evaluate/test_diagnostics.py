"""Active units against NumPy, by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

import vdiff as vd


def test_active_units_are_those_whose_mean_varies():
    rng = np.random.default_rng(0)
    scales = np.array([1.0, 0.0, 0.2, 0.05])  # variances 1, 0, .04, .0025
    means = (rng.normal(size=(4000, 4)) * scales + np.array([0.0, 3.0, -5.0, 100.0])).astype(np.float32)
    units = vd.evaluate.active_units(means)
    wide = means.astype(np.float64)
    np.testing.assert_allclose(units.variance, np.mean((wide - wide.mean(axis=0)) ** 2, axis=0), rtol=1e-9)
    np.testing.assert_allclose(units.variance, scales**2, rtol=0.15, atol=1e-9)
    assert units.is_active.tolist() == [True, False, True, False]
    assert vd.evaluate.active_units(means, threshold=0.001).is_active.tolist() == [True, False, True, True]
    assert vd.evaluate.active_units(means, threshold=0.1).is_active.tolist() == [True, False, False, False]


def test_the_variance_is_over_the_data_not_over_the_units():
    units = vd.evaluate.active_units(np.array([[0.0, 7.0, -7.0], [2.0, 7.0, -7.0]]))
    np.testing.assert_array_equal(units.variance, [1.0, 0.0, 0.0])


@pytest.mark.parametrize("shape", [(5,), (1, 3), (0, 3), (2, 3, 4)])
def test_other_shapes_are_refused(shape):
    pattern = r"posterior_means: got shape \(.*\), expected \[N, D\] with N at least 2"
    with pytest.raises(ValueError, match=pattern):
        vd.evaluate.active_units(np.zeros(shape))


def test_the_kl_of_a_unit_is_its_integral():
    """Against quadrature of q (log q - log p), averaged over data; and a unit at the prior has none."""
    rng = np.random.default_rng(0)
    loc, scale = rng.normal(size=(6, 3)), np.exp(rng.normal(size=(6, 3)))
    loc[:, 2], scale[:, 2] = 0.0, 1.0
    nodes, weights = np.polynomial.hermite_e.hermegauss(40)
    z = loc[..., None] + scale[..., None] * nodes
    log_ratio = -0.5 * nodes**2 - np.log(scale)[..., None] + 0.5 * z**2
    expected = np.mean(np.sum(weights / weights.sum() * log_ratio, -1), axis=0)
    got = vd.evaluate.unit_kl(loc, scale)
    np.testing.assert_allclose(got, expected, atol=1e-12)
    assert got.shape == (3,) and got[2] == 0 and np.all(got[:2] > 0)


def test_the_units_kls_sum_to_the_elbos():
    loc, log_scale = jnp.array([[0.3, -1.2]]), jnp.array([[-0.4, 0.2]])
    total = np.sum(vd.densities.normal_kl(loc, log_scale))
    np.testing.assert_allclose(vd.evaluate.unit_kl(loc, jnp.exp(log_scale)).sum(), total, rtol=1e-6)


@pytest.mark.parametrize("shapes", [((3,), (3,)), ((3, 2), (3, 1)), ((0, 2), (0, 2))])
def test_other_shapes_have_no_kl(shapes):
    with pytest.raises(ValueError, match=r"loc, scale: got shapes .* expected \[N, D\] for both"):
        vd.evaluate.unit_kl(np.zeros(shapes[0]), np.ones(shapes[1]))
    with pytest.raises(ValueError, match="scale: got -1, expected positive"):
        vd.evaluate.unit_kl(np.zeros((2, 2)), -np.ones((2, 2)))
