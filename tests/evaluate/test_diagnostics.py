"""Active units against NumPy, by hand."""

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
