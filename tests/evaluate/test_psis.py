"""k-hat against ArviZ's on the same log-weights, and against tails whose shape is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arviz_stats.base import array_stats

import vdiff as vd
from tests import toys
from vdiff.evaluate.psis import FEWEST_DRAWS, tail_size

SHAPES = np.array([-0.5, 0.0, 0.3, 0.7, 1.2, 3.0])
k_hats = toys.quick_jit(jax.vmap(vd.evaluate.k_hat))


def log_weights(num, seed=0):
    """Log-weights of every shape in SHAPES: generalized Pareto draws, on scales far apart, [6, num]."""
    u = np.random.default_rng(seed).random((len(SHAPES), num))
    k = SHAPES[:, None]
    y = np.where(k == 0, -np.log(u), np.expm1(-k * np.log(u)) / np.where(k == 0, 1.0, k))
    return np.log(0.1 + y) + np.linspace(-90, 40, len(SHAPES))[:, None]


def by_arviz(values):
    return np.array([float(array_stats.psislw(-row)[1]) for row in values])  # it takes minus the log-weights


@pytest.mark.parametrize("num", [25, 5000])
def test_it_agrees_with_arviz(num):
    values = log_weights(num, seed=num)
    expected = by_arviz(values)
    assert np.ptp(expected) > 0.5
    in_double = toys.in_float64(jax.vmap(vd.evaluate.k_hat), values)
    np.testing.assert_allclose(in_double, expected, atol=1e-9)
    # In float32 as in float64 at the same numbers.
    single = values.astype(np.float32)
    np.testing.assert_allclose(k_hats(single), by_arviz(single.astype(np.float64)), atol=1e-4)


def test_it_finds_the_shape_of_a_long_tail():
    """Draws of a pure generalized Pareto law, drawn towards 1/2 with the weight of ten of them."""
    num_tail = tail_size(5000)
    drawn = np.stack([k_hats(log_weights(5000, seed).astype(np.float32)) for seed in range(20)])
    expected = (num_tail * SHAPES + 5) / (num_tail + 10)
    std_error = drawn.std(0, ddof=1) / np.sqrt(20)
    # The fit itself is off by some (1 + k) / M at most.
    assert np.all(np.abs(drawn.mean(0) - expected) < 5 * std_error + (1 + SHAPES) / num_tail)
    assert np.all(std_error < 0.03 * (1 + SHAPES))


def test_only_differences_matter():
    values = log_weights(5000)
    shifts = np.array([0, 5000, -5000, 5000, -5000, 0])
    # float32 resolves 5e-4 at 5000.
    got, shifted = k_hats(values.astype(np.float32)), k_hats((values + shifts[:, None]).astype(np.float32))
    np.testing.assert_allclose(shifted, got, atol=5e-3)


def test_the_edges():
    """Weights that are equal, tied, lost, of the largest spread, or too few."""
    rng = np.random.default_rng(0)
    ties = rng.permutation(np.append(np.repeat(np.arange(12.0), 3), np.full(64, -1.0)))
    rows = np.stack(
        [
            np.full(100, -7.0),
            np.append(np.zeros(4), np.full(96, -500.0)),
            np.full(100, -np.inf),
            np.append(np.nan, np.zeros(99)),
            np.linspace(-800.0, 0.0, 100),
            ties,
        ]
    )
    equal, few, lost, unknown, wide, tied = k_hats(rows.astype(np.float32))
    assert equal == -np.inf and few == np.inf and lost == np.inf and np.isnan(unknown)
    assert 3 < wide < np.inf
    # The 21st largest of the tied weights is the last of the 7th value: 18 of the 20 exceed it.
    value = np.sort(ties)[::-1][:18] - np.sort(ties)[::-1][20]
    assert tail_size(100) == 20 and np.all(value > 0) and np.isfinite(tied)
    assert np.isnan(vd.evaluate.k_hat(jnp.zeros(FEWEST_DRAWS - 1)))


def test_it_has_no_gradient():
    """So that an estimate with it in its record can be differentiated."""
    w = log_weights(25)[2].astype(np.float32)
    grad = toys.quick_jit(jax.grad(lambda w: vd.evaluate.k_hat(w) + jnp.sum(w)))(w)
    np.testing.assert_array_equal(grad, np.ones(25))


@pytest.mark.parametrize(("num", "expected"), [(1, 0), (24, 4), (25, 5), (225, 45), (5000, 212)])
def test_the_size_of_a_tail(num, expected):
    assert tail_size(num) == expected
