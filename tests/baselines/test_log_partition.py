"""log Z against the sum over all states: exact, from below, from above; weights unbiased both ways."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vdiff as vd
from tests.baselines import small
from vdiff.baselines import (
    annealed_log_partition,
    exact_log_partition,
    normalized_log_prob,
    rbm,
    reverse_log_partition,
)

NUM_HIDDEN = 15
MODEL = rbm((6, 4), NUM_HIDDEN)
PARAMS = small.moved(MODEL, 0.5, seed=2)
BIAS = 0.7 * np.random.default_rng(5).normal(size=(6, 4))  # of the base: another one than the model's
BETAS = np.linspace(0, 1, 31) ** 2
NUM_CHAINS = 4000


@functools.cache
def hidden_log_weights():
    """log sum_x exp(-E(x, h)) of the 2^15 states h, float64."""
    weight, b, c = small.weights_of(PARAMS)
    h = small.states(NUM_HIDDEN)
    return h @ c + np.logaddexp(0, b + h @ weight.T).sum(1)


@functools.cache
def log_z():
    return np.logaddexp.reduce(hidden_log_weights())


@functools.cache
def exact_samples():
    """Draws of h from its table, then of x given h."""
    rng = np.random.default_rng(7)
    weight, b, _ = small.weights_of(PARAMS)
    p = np.exp(hidden_log_weights() - log_z())
    h = small.states(NUM_HIDDEN)[rng.choice(len(p), NUM_CHAINS, p=p)]
    x = rng.random((NUM_CHAINS, 24)) < small.sigmoid(b + h @ weight.T)
    return jnp.asarray(x.reshape(-1, 6, 4).astype(np.int32))


@functools.cache
def forward():
    return jax.jit(annealed_log_partition(MODEL, BIAS, BETAS, NUM_CHAINS))(jax.random.key(3), PARAMS)


@functools.cache
def reverse():
    return jax.jit(reverse_log_partition(MODEL, BIAS, BETAS))(jax.random.key(4), PARAMS, exact_samples())


def test_the_sum_over_the_hidden_side_is_exact():
    """In one chunk, and in many with a last one cut short; its gradient is the model's mean."""
    for chunk_size in (2**16, 1000):
        found, gradient = jax.jit(jax.value_and_grad(exact_log_partition(MODEL, chunk_size=chunk_size)))(
            PARAMS
        )
        assert float(found) == pytest.approx(log_z(), rel=2e-6)
        p = np.exp(hidden_log_weights() - log_z())
        np.testing.assert_allclose(
            gradient.theta["hidden"], p @ small.states(NUM_HIDDEN), atol=2e-5, rtol=2e-5
        )


def test_the_sum_over_the_visible_side_is_exact_where_that_is_smaller():
    model = rbm((2, 2), 30)
    params = small.moved(model, 2.0)
    weight, b, c = small.weights_of(params)
    x = small.states(4)
    expected = np.logaddexp.reduce(x @ b + np.logaddexp(0, c + x @ weight).sum(1))
    assert float(jax.jit(exact_log_partition(model))(params)) == pytest.approx(expected, rel=2e-6)


def test_the_sum_is_safe_where_its_terms_overflow_and_where_they_vanish():
    for shift in (300.0, -300.0):
        params = PARAMS._replace(theta=PARAMS.theta | {"visible": jnp.full((6, 4), shift)})
        weight, b, c = small.weights_of(params)
        h = small.states(NUM_HIDDEN)
        expected = np.logaddexp.reduce(h @ c + np.logaddexp(0, b + h @ weight.T).sum(1))
        assert float(jax.jit(exact_log_partition(MODEL))(params)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_the_two_sides_hold_log_z_between_them():
    """Each on its own side within three of its standard errors; the means of single log-weights strictly so."""
    below, above = forward(), reverse()
    assert below.value < log_z() + 3 * below.std_error
    assert above.value > log_z() - 3 * above.std_error
    assert np.mean(below.log_weights) < log_z() - 0.05
    assert -np.mean(above.log_weights) > log_z() + 0.05
    assert below.value == pytest.approx(log_z(), abs=5 * float(below.std_error))
    assert above.value == pytest.approx(log_z(), abs=5 * float(above.std_error))


@pytest.mark.slow
@pytest.mark.parametrize(("estimate", "sign"), [(forward, 1.0), (reverse, -1.0)])
def test_weights_are_unbiased(estimate, sign):
    """E exp(w - log Z) = 1, and of 1/Z in reverse; known to 2 %."""
    ratio = np.exp(np.asarray(estimate().log_weights, np.float64) - sign * log_z())
    error = ratio.std() / np.sqrt(NUM_CHAINS)
    assert error < 0.02
    assert abs(ratio.mean() - 1) < 4 * error


@pytest.mark.slow
@pytest.mark.parametrize(("estimate", "sign"), [(forward, 1.0), (reverse, -1.0)])
def test_value_error_and_effective_number_are_those_of_the_weights(estimate, sign):
    found = estimate()
    w = np.exp(np.asarray(found.log_weights, np.float64) - sign * log_z())
    assert float(found.value) == pytest.approx(sign * (np.log(w.mean()) + sign * log_z()), rel=1e-6)
    assert float(found.std_error) == pytest.approx(w.std(ddof=1) / w.mean() / np.sqrt(len(w)), rel=1e-3)
    assert float(found.ess) == pytest.approx(w.sum() ** 2 / (w**2).sum(), rel=1e-4)
    assert 1 < found.ess < NUM_CHAINS


def test_nothing_is_lost_to_rounding():
    """A machine that is the base: every weight is Z, whatever the temperatures and however large the numbers."""
    bias = 5.0 * np.random.default_rng(1).normal(size=(28, 28))
    model = rbm((28, 28), 50, visible_bias=bias, init_scale=0.0)
    estimate = annealed_log_partition(model, bias, np.linspace(0, 1, 301), 4)
    found = jax.jit(estimate)(jax.random.key(0), model.init(jax.random.key(0)))
    expected = np.logaddexp(0, bias).sum() + 50 * np.log(2)
    np.testing.assert_allclose(found.log_weights, expected, rtol=2e-6)


def test_log_prob_sums_to_one():
    params = small.PARAMS
    of = normalized_log_prob(small.MODEL, exact_log_partition(small.MODEL)(params))
    x = small.states(6).reshape(64, 3, 2)
    nats = vd.evaluate.evaluate(of, jax.random.key(0), params, x)
    expected = np.log(small.joint().sum(1) / small.joint().sum())
    np.testing.assert_allclose(nats, expected, rtol=1e-5, atol=1e-5)


def test_what_cannot_be_estimated_is_refused():
    with pytest.raises(
        ValueError, match=r"^model: got 25 visible and 21 hidden units, expected at most 20 on"
    ):
        exact_log_partition(rbm((5, 5), 21))
    for betas in ([0.0, 0.5], [0.1, 1.0], [0.0, 0.7, 0.7, 1.0], [[0.0, 1.0]]):
        for make in (annealed_log_partition, reverse_log_partition):
            arguments = (2,) if make is annealed_log_partition else ()
            with pytest.raises(
                ValueError, match=r"^betas: got .*, expected numbers that rise from 0 to 1; use"
            ):
                make(MODEL, BIAS, np.asarray(betas), *arguments)
    with pytest.raises(ValueError, match="^num_chains: got 1, expected at least 2, for a standard error$"):
        annealed_log_partition(MODEL, BIAS, BETAS, 1)
    for shape in ((1, 6, 4), (5, 24), (6, 4)):
        with pytest.raises(
            ValueError, match=r"^x: got shape .*, expected \[N, 6, 4\] with N at least 2; give"
        ):
            reverse_log_partition(MODEL, BIAS, BETAS)(jax.random.key(0), PARAMS, jnp.zeros(shape))
