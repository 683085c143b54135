"""CD-k's value and gradient against those by the transition matrix over all states."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vdiff as vd
from tests.baselines import small
from vdiff.baselines import contrastive_divergence, persistent_contrastive_divergence

DATUM = 37
X = small.states(6).reshape(64, 3, 2).astype(np.int32)
NUM_DRAWS = 50_000


def exact_gradient(num_steps, datum=DATUM):
    """- dF(x) + sum_x' T^k(x, x') dF(x'), and the value beside it."""
    power = np.linalg.matrix_power(small.transition(), num_steps)[datum]
    scores = small.minus_free_energy_gradients()
    log_p = np.log(small.joint().sum(1))
    return scores[datum] - power @ scores, log_p[datum] - power @ log_p


def likelihood_gradient(datum=DATUM):
    p = small.joint().sum(1) / small.joint().sum()
    scores = small.minus_free_energy_gradients()
    return scores[datum] - p @ scores


@functools.cache
def drawn(num_steps):
    """Value and gradient of many chains: their means and standard errors."""
    total = vd.total(contrastive_divergence(small.MODEL, num_steps))
    both = jax.vmap(jax.value_and_grad(total, argnums=1), in_axes=(0, None, None))
    keys = jax.random.split(jax.random.key(num_steps), NUM_DRAWS)
    values, gradients = jax.jit(both)(keys, small.PARAMS, jnp.asarray(X[DATUM]))
    values, gradients = np.asarray(values, np.float64), small.flat(gradients, 1)
    errors = (a.std(axis=0) / np.sqrt(NUM_DRAWS) for a in (gradients, values))
    return gradients.mean(0), values.mean(), *errors


@pytest.mark.parametrize("num_steps", [1, 2, 5])
def test_value_and_gradient_are_those_of_the_transition_matrix(num_steps):
    gradient, value, gradient_error, value_error = drawn(num_steps)
    exact, exact_value = exact_gradient(num_steps)
    assert abs(value - exact_value) < 5 * value_error
    assert np.all(np.abs(gradient - exact) < 5 * np.maximum(gradient_error, 1e-6))
    # By another number of sweeps, and by the likelihood, it is another gradient.
    for other in (exact_gradient(num_steps + 1)[0], likelihood_gradient()):
        assert np.max(np.abs(gradient - other) / np.maximum(gradient_error, 1e-6)) > 5


def test_the_bias_against_the_likelihood_falls_with_the_length_of_the_chain():
    """Over the 64 data, weighed by another law than the model's; the exact gradient at k = 200 is the likelihood's."""
    weights = np.random.default_rng(3).dirichlet(np.ones(64))
    truth = sum(w * likelihood_gradient(i) for i, w in enumerate(weights))

    def bias(num_steps):
        found = sum(w * exact_gradient(num_steps, i)[0] for i, w in enumerate(weights))
        return np.linalg.norm(found - truth) / np.linalg.norm(truth)

    biases = [bias(k) for k in (1, 2, 5, 10)]
    assert biases == sorted(biases, reverse=True) and biases[0] > 0.05
    assert bias(200) < 1e-9


def test_a_persistent_chain_goes_on_where_it_was():
    """From its slot and not from the datum; k sweeps a step; the terms are those at the chain's new place."""
    objective = persistent_contrastive_divergence(small.MODEL, 2)
    keys = jax.random.split(jax.random.key(5), 100_000)
    slot = jnp.asarray(X[5], jnp.uint8)
    terms, chain = jax.jit(jax.vmap(objective, in_axes=(0, None, None, None)))(
        keys, small.PARAMS, jnp.asarray(X[DATUM]), slot
    )
    assert chain.dtype == jnp.uint8 and chain.shape == (100_000, 3, 2)
    index = np.asarray(chain).reshape(-1, 6) @ 2 ** np.arange(6)
    p = np.linalg.matrix_power(small.transition(), 2)[5]
    counts = np.bincount(index, minlength=64)
    z = (counts - 1e5 * p) / np.sqrt(np.maximum(1e5 * p * (1 - p), 1.0))
    assert np.abs(z).max() < 5
    log_p = np.log(small.joint().sum(1))
    np.testing.assert_allclose(terms["free_energy_difference"], log_p[DATUM] - log_p[index], atol=2e-5)


def test_a_persistent_chains_gradient_is_that_of_the_transition_matrix():
    """- dF(x) + E dF(x'), x' two sweeps from the slot: |z| < 5; and not that of a chain from the datum."""
    objective, slot = persistent_contrastive_divergence(small.MODEL, 2), jnp.asarray(X[5])

    def total(params, key):
        terms, chain = objective(key, params, jnp.asarray(X[DATUM]), slot)
        return sum(terms.values()), chain

    draw = jax.jit(jax.vmap(jax.grad(total, has_aux=True), in_axes=(None, 0)))
    gradients, _ = draw(small.PARAMS, jax.random.split(jax.random.key(6), NUM_DRAWS))
    gradients = small.flat(gradients, 1)
    mean = gradients.mean(0)
    error = np.maximum(gradients.std(axis=0) / np.sqrt(NUM_DRAWS), 1e-6)
    scores = small.minus_free_energy_gradients()
    exact = scores[DATUM] - np.linalg.matrix_power(small.transition(), 2)[5] @ scores
    assert np.all(np.abs(mean - exact) < 5 * error)
    assert np.max(np.abs(mean - exact_gradient(2)[0]) / error) > 5


def test_no_steps_are_refused():
    for make in (contrastive_divergence, persistent_contrastive_divergence):
        with pytest.raises(ValueError, match="^num_steps: got 0, expected at least 1$"):
            make(small.MODEL, 0)
