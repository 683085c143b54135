"""Weights taken in by chunks say what all of them at once do."""

import jax
import numpy as np
import pytest
import scipy.special
from arviz_stats.base import array_stats

from tests import toys
from vdiff.evaluate.weights import add_weights, log_prob_of, no_weights

NUM = 400
LOG_W = np.random.default_rng(2).gumbel(size=(3, NUM)).astype(np.float32) * np.float32([[0.5], [1.5], [6.0]])


def taken_in(log_weights, num_chunks):
    def add(weights, chunk):
        return add_weights(weights, chunk), None

    weights, _ = jax.lax.scan(add, no_weights(NUM), log_weights.reshape(num_chunks, -1))
    return log_prob_of(weights, NUM)


@pytest.mark.parametrize("num_chunks", [1, 8])
def test_chunks_change_nothing(num_chunks):
    got = toys.quick_jit(jax.vmap(taken_in, in_axes=(0, None)), static_argnums=1)(LOG_W, num_chunks)
    log_w = LOG_W.astype(np.float64)
    value = scipy.special.logsumexp(log_w, axis=1) - np.log(NUM)
    w = np.exp(log_w - value[:, None])
    np.testing.assert_allclose(got.value, value, rtol=3e-6)
    np.testing.assert_allclose(got.std_error, w.std(1, ddof=1) / np.sqrt(NUM), rtol=1e-4)
    np.testing.assert_allclose(got.ess, NUM**2 / np.sum(w**2, 1), rtol=1e-4)
    expected = [float(array_stats.psislw(-row)[1]) for row in log_w]
    np.testing.assert_allclose(got.k_hat, expected, atol=1e-4)
    assert got.k_hat[0] < 0.7 < got.k_hat[2]
