"""Sums over a grid against normalisers that are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.toys import quick_jit
from vdiff.evaluate.grid import grid_log_normalizer, grid_points

PRECISION = np.array([[2.0, 0.6], [0.6, 0.8]], np.float32)


def gaussian(precision, x):
    return -0.5 * x @ precision @ x + 3.0


def test_a_gaussians_normaliser_and_its_gradient():
    """log Z = 3 + log(2 pi) - log det(P) / 2; its gradient by P is minus half the covariance."""
    log_z = quick_jit(
        jax.value_and_grad(grid_log_normalizer(gaussian, (-9.0, -9.0), (9.0, 9.0), 100, batch_size=999))
    )
    value, gradient = log_z(jnp.asarray(PRECISION))
    exact = 3 + np.log(2 * np.pi) - 0.5 * np.linalg.slogdet(PRECISION.astype(float))[1]
    assert float(value) == pytest.approx(exact, rel=2e-6)
    np.testing.assert_allclose(gradient, -0.5 * np.linalg.inv(PRECISION.astype(float)), atol=1e-5)


def test_one_and_three_dimensions():
    for d in (1, 3):
        log_z = quick_jit(
            grid_log_normalizer(lambda params, x: -jnp.sum(jnp.abs(x)), [-30.0] * d, [10.0] * d, 80)
        )(())
        # exp(-|x|) on (-30, 10), cell by cell: the middle of a cell of width h counts h / 2 / sinh(h / 2) too little.
        h = 0.5
        exact = d * np.log((2 - np.exp(-30.0) - np.exp(-10.0)) * (h / 2) / np.sinh(h / 2))
        assert float(log_z) == pytest.approx(exact, abs=2e-6)


def test_points_are_the_middles_of_cells():
    points = grid_points((0.0, 10.0), (1.0, 14.0), 2)
    np.testing.assert_allclose(points, [[0.25, 11], [0.25, 13], [0.75, 11], [0.75, 13]])


@pytest.mark.parametrize("box", [((0.0,), (0.0,)), ((0.0, 1.0), (1.0,)), ((0.0,) * 4, (1.0,) * 4), ((), ())])
def test_what_is_no_box_is_refused(box):
    with pytest.raises(ValueError, match="corners of a box"):
        grid_log_normalizer(gaussian, *box)


def test_no_cells_are_refused():
    with pytest.raises(ValueError, match="num_points: got 0"):
        grid_points((0.0,), (1.0,), 0)
