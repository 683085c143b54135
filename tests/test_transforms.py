"""The random transforms: their laws by z-scores, and the change of variables."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vdiff as vd
from vdiff import transforms

NUM_DRAWS = 50_000


def draws(transform, k):
    return np.asarray(
        jax.vmap(transform, in_axes=(0, None))(jax.random.split(jax.random.key(0), NUM_DRAWS), k)
    )


@pytest.mark.parametrize("levels", [2, 17, 256])
def test_binarize(levels):
    """x_i is 1 with probability k_i / (levels - 1), each pixel by itself."""
    k = np.array([[0, 1], [levels // 2, levels - 1]], np.uint8)
    x = draws(transforms.binarize(levels), jnp.asarray(k))
    assert x.dtype == np.int32 and x.shape == (NUM_DRAWS, 2, 2) and set(np.unique(x)) == {0, 1}
    probability = k / (levels - 1.0)
    std_error = np.sqrt(probability * (1 - probability) / NUM_DRAWS)
    assert np.max(np.abs(x.mean(axis=0) - probability) / np.maximum(std_error, 1e-12)) < 5.0
    if levels > 2:
        product = (x[:, 0, 1] - probability[0, 1]) * (x[:, 1, 0] - probability[1, 0])
        assert abs(product.mean()) < 5 * product.std() / np.sqrt(NUM_DRAWS)


@pytest.mark.parametrize("levels", [2, 17, 256])
def test_dequantize(levels):
    """(k + u) / levels: u = levels y - k is uniform, and independent between pixels."""
    k = np.array([0, levels // 2, levels - 1], np.uint8)
    y = draws(transforms.dequantize(levels), jnp.asarray(k))
    assert y.dtype == np.float32 and y.shape == (NUM_DRAWS, 3)
    u = y.astype(float) * levels - k
    assert u.min() >= -1e-5 and u.max() <= 1 + 1e-5
    for sample, expected in ((u, 1 / 2), (u**2, 1 / 3), (u**3, 1 / 4), (u[:, :1] * u[:, 1:], 1 / 4)):
        z = (sample.mean(axis=0) - expected) / (sample.std(axis=0) / np.sqrt(NUM_DRAWS))
        assert np.max(np.abs(z)) < 5.0


@pytest.mark.parametrize("levels", [17, 256])
def test_dequantized_data_stay_in_their_bin(levels):
    """Y lies in [k / levels, (k + 1) / levels), so below 1, in 4 million draws: k + u must not round up."""
    k = jnp.full(1_000_000, levels - 1)
    transform = jax.jit(transforms.dequantize(levels))
    assert max(float(jnp.max(transform(jax.random.key(seed), k))) for seed in range(4)) < 1.0


def test_dequantize_log_det_is_the_change_of_variables():
    """For y of density one on [0, 1)^d the mass of every integer image is levels^-d, and the bound is tight."""
    assert transforms.dequantize_log_det(17, 64) == pytest.approx(-64 * np.log(17.0), rel=1e-12)
    # A density linear in y: p(y) = 2 y has P(k) = (2 k + 1) / levels^2; E_u exp(log p(y(u)) + log_det) is it.
    levels, k = 4, np.arange(4)
    y = draws(transforms.dequantize(levels), jnp.asarray(k)).astype(float)
    mass = 2 * y * np.exp(transforms.dequantize_log_det(levels, 1))
    z = (mass.mean(axis=0) - (2 * k + 1) / levels**2) / (mass.std(axis=0) / np.sqrt(NUM_DRAWS))
    assert np.max(np.abs(z)) < 5.0


@pytest.mark.parametrize("transform", [transforms.binarize(17), transforms.dequantize(17)])
def test_a_transform_is_a_function_of_its_key(transform):
    k = jnp.arange(17)
    one, again = (transform(jax.random.key(3), k) for _ in range(2))
    np.testing.assert_array_equal(one, again)
    assert np.any(np.asarray(one) != np.asarray(transform(jax.random.key(4), k)))
    np.testing.assert_array_equal(one, jax.jit(transform)(jax.random.key(3), k))


def test_transforms_are_reached_from_the_top():
    assert vd.transforms is transforms
