"""The machine against sums over all its states, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.baselines import small
from vdiff.baselines import gibbs, rbm

X = small.states(6).reshape(64, 3, 2)
H = small.states(4)


def over(function, *arguments, in_axes=(None, 0)):
    return np.asarray(jax.jit(jax.vmap(function, in_axes=in_axes))(*arguments), np.float64)


def test_a_side_summed_out_is_its_free_energy():
    model, params = small.MODEL, small.PARAMS
    np.testing.assert_allclose(
        over(model.free_energy, params, X), -np.log(small.joint().sum(1)), rtol=2e-6, atol=2e-6
    )
    np.testing.assert_allclose(
        over(model.hidden_free_energy, params, H), -np.log(small.joint().sum(0)), rtol=2e-6, atol=2e-6
    )


def test_conditionals_are_those_of_the_joint():
    model, params, joint = small.MODEL, small.PARAMS, small.joint()
    of_h = (joint @ H) / joint.sum(1, keepdims=True)
    np.testing.assert_allclose(small.sigmoid(over(model.hidden_logits, params, X)), of_h, atol=1e-6)
    of_x = (joint.T @ X.reshape(64, 6)) / joint.sum(0)[:, None]
    logits = over(model.visible_logits, params, H)
    assert logits.shape == (16, 3, 2)
    np.testing.assert_allclose(small.sigmoid(logits).reshape(16, 6), of_x, atol=1e-6)


def test_the_gradient_of_the_free_energy_has_means_for_hidden_bits():
    gradient = jax.jit(jax.vmap(jax.grad(small.MODEL.free_energy), in_axes=(None, 0)))(small.PARAMS, X)
    np.testing.assert_allclose(small.flat(gradient, 1), -small.minus_free_energy_gradients(), atol=2e-6)


def test_large_logits_neither_overflow_nor_vanish():
    """At a thousand times the weights, where exp of an energy is out of float32's range."""
    params = jax.tree.map(lambda leaf: 1000.0 * leaf, small.PARAMS)
    weight, b, c = small.weights_of(params)
    x = X.reshape(64, 6)
    expected = -(x @ b) - np.logaddexp(0, c + x @ weight).sum(1)
    np.testing.assert_allclose(over(small.MODEL.free_energy, params, X), expected, rtol=1e-6, atol=2e-3)


def counts_of(x):
    return np.bincount(np.asarray(x).reshape(-1, 6) @ 2 ** np.arange(6), minlength=64)


def z_scores(counts, p):
    num = counts.sum()
    return (counts - num * p) / np.sqrt(np.maximum(num * p * (1 - p), 1.0))


def test_a_chain_of_k_sweeps_draws_from_the_kth_power_of_the_transition_matrix():
    """100,000 draws from one start; a frequency of 1/64 is seen to 2.5 %."""
    start = jnp.asarray(X[37], jnp.uint8)
    for num_steps in (1, 2):
        chain = jax.jit(jax.vmap(gibbs(small.MODEL, num_steps), in_axes=(0, None, None)))
        x = chain(jax.random.split(jax.random.key(num_steps), 100_000), small.PARAMS, start)
        assert x.dtype == jnp.uint8 and x.shape == (100_000, 3, 2)
        expected = np.linalg.matrix_power(small.transition(), num_steps)[37]
        assert np.abs(z_scores(counts_of(x), expected)).max() < 5
        # Another start, or another power, is far away.
        for other in (small.transition()[36], np.linalg.matrix_power(small.transition(), num_steps + 1)[37]):
            assert np.abs(z_scores(counts_of(x), other)).max() > 8


def test_a_sweep_keeps_the_model_and_is_its_own_reversal():
    p = small.joint().sum(1) / small.joint().sum()
    flow = p[:, None] * small.transition()
    np.testing.assert_allclose(flow, flow.T, atol=1e-15)


def test_samples_are_the_models_pairs():
    x, h = jax.jit(jax.vmap(small.MODEL.sample, in_axes=(0, None)))(
        jax.random.split(jax.random.key(2), 10_000), small.PARAMS
    )
    assert x.dtype == jnp.int32 and x.shape[1:] == (3, 2) and h.dtype == bool and h.shape[1:] == (4,)
    joint = small.joint() / small.joint().sum()
    index = np.asarray(x).reshape(-1, 6) @ 2 ** np.arange(6) + 64 * (np.asarray(h) @ 2 ** np.arange(4))
    counts = np.bincount(index, minlength=1024)
    assert np.abs(z_scores(counts, joint.T.ravel())).max() < 5


def test_init_starts_from_the_pixels_own_law():
    bias = np.array([[0.5, -2.0], [1.0, 0.0], [3.0, -3.0]])
    params = rbm((3, 2), 4, visible_bias=bias, init_scale=0.02).init(jax.random.key(0))
    np.testing.assert_array_equal(params.theta["visible"], bias.astype(np.float32))
    assert params.theta["weight"].shape == (6, 4) and not np.any(params.theta["hidden"])
    wide = rbm((50, 40), 100, init_scale=0.02).init(jax.random.key(0)).theta["weight"]
    # The standard deviation of 200,000 draws is known to 0.16 %.
    assert abs(np.std(wide) / 0.02 - 1) < 0.01


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((3, 2), 0), "num_hidden: got 0, expected at least 1"),
        (((3, 0), 2), "shape: got 0, expected at least 1"),
    ],
)
def test_sizes_are_refused(arguments, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        rbm(*arguments)
    with pytest.raises(ValueError, match="^num_steps: got 0, expected at least 1$"):
        gibbs(small.MODEL, 0)
