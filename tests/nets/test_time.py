"""The embedding of the log-SNR: its formula, how far it tells log-SNRs apart, and how smooth it is."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.nets import oracles
from vdiff.nets import fourier_features
from vdiff.nets.time import TimeEmbedding, time_examples

NUM = 64


@pytest.mark.parametrize("num_features", [2, 4, 10, NUM])
def test_cosines_then_sines(num_features):
    n = num_features // 2
    omega = np.array([2 * np.pi / 80 * 80 ** (k / max(n - 1, 1)) for k in range(n)])
    for log_snr in (-20.0, -0.37, 0.0, 13.3):
        expected = np.concatenate([np.cos(omega * log_snr), np.sin(omega * log_snr)])
        out = fourier_features(jnp.float32(log_snr), num_features)
        assert out.shape == (num_features,) and out.dtype == jnp.float32
        np.testing.assert_allclose(out, expected, atol=2e-5)


def test_no_two_log_snrs_look_alike():
    """From .01 apart to 40: the distance grows with the difference while small, and never falls back to zero."""
    grid = jnp.linspace(-20.0, 20.0, 401)
    features = np.asarray(jax.vmap(lambda log_snr: fourier_features(log_snr, NUM))(grid), np.float64)
    distances = np.linalg.norm(features[:, None] - features[None], axis=-1)
    apart = np.abs(np.subtract.outer(grid, grid))
    # |gamma(a) - gamma(b)|^2 = sum_k 4 sin(omega_k (a - b) / 2)^2, and sin(y) >= 2 y / pi up to y = pi / 2.
    assert np.all(distances[apart > 0.35] > 2.0)
    near, base = fourier_features(jnp.float32(5.01), NUM), fourier_features(jnp.float32(5.0), NUM)
    omega = 2 * np.pi / 80 * 80 ** (np.arange(32) / 31)
    expected = np.sqrt(np.sum(4 * np.sin(0.005 * omega) ** 2))
    np.testing.assert_allclose(np.linalg.norm(near - base), expected, rtol=1e-2)
    assert expected > 0.1


def test_the_derivative_is_bounded_and_right():
    """|d gamma / d l|^2 = sum_k omega_k^2 everywhere: the embedding moves at one speed."""
    omega = 2 * np.pi / 80 * 80 ** (np.arange(32) / 31)
    for log_snr in (-20.0, 0.0, 7.7):
        slope = jax.jacfwd(lambda log_snr: fourier_features(log_snr, NUM))(jnp.float32(log_snr))
        np.testing.assert_allclose(np.linalg.norm(slope), np.linalg.norm(omega), rtol=1e-5)
        expected = np.concatenate([-omega * np.sin(omega * log_snr), omega * np.cos(omega * log_snr)])
        np.testing.assert_allclose(slope, expected, atol=2e-4)


@pytest.mark.parametrize("num_features", [0, 1, 7, -2])
def test_an_odd_number_of_features_is_refused(num_features):
    with pytest.raises(
        ValueError, match=rf"num_features: got {num_features}, expected an even number .*; use"
    ):
        fourier_features(jnp.zeros(()), num_features)


def draw(num_labels):
    module, inputs = TimeEmbedding(6, num_labels), time_examples(num_labels)
    shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]
    rng = np.random.default_rng(0)
    return module, jax.tree.map(lambda p: jnp.asarray(0.3 * rng.normal(size=p.shape), p.dtype), shapes)


@pytest.mark.parametrize("label", [(), (0,), (2,), (3,)])
def test_two_products_and_a_row_for_the_label(label):
    """Three labels have four rows; the last is "no label"."""
    module, params = draw(3 if label else 0)
    inputs = (jnp.float32(4.2), *(jnp.int32(y) for y in label))
    out = module.apply({"params": params}, *inputs)
    expected = oracles.embedding(oracles.wide(params), 4.2, label)
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5)
    if label:
        assert params["Embed_0"]["embedding"].shape == (4, 6)


def test_labels_that_are_none_show_as_nan():
    """A traced label cannot be refused; its row is NaN, so the loss is, and training stops at once."""
    module, params = draw(3)
    assert np.all(np.isnan(module.apply({"params": params}, jnp.float32(0.0), jnp.int32(4))))
