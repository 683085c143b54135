"""The averages are of the model's own draws: their second moments are Fisher informations known exactly."""

import jax
import jax.numpy as jnp
import numpy as np

from tests import toys
from vdiff.evaluate.checks.agreement import joint_moments, pilot_draws, q_moments
from vdiff.evaluate.checks.reference import Joint, fit_reference

TOY = toys.toy("linear2")
X = jnp.asarray(TOY.data[0])
NUM_DRAWS = 10_000


def pilot(*sound):
    return jax.device_get(pilot_draws(TOY.model, frozenset(sound), jax.random.key(0), TOY.params, X, 500))


def test_the_pilot_draws_what_is_sound():
    assert set(pilot("sample_q")) == {"given"} and set(pilot("sample")) == {"joint"} and pilot("log_q") == {}
    draws = pilot("sample", "sample_q")
    lam = TOY.params.lam
    for name, x in (("given", X), ("sampled", draws["joint"].x[0])):
        expected = lam["weight"] @ x + lam["bias"]
        std_error = draws[name].std(0) / np.sqrt(500)
        assert np.all(np.abs(draws[name].mean(0) - expected) < 5 * std_error), name
    assert not np.array_equal(draws["given"], draws["sampled"])


def only(part, name):
    """Params with one leaf, None in place of all others."""
    everything = jax.tree.map(lambda leaf: None, TOY.params)
    return everything._replace(**{part: {**getattr(everything, part), name: getattr(TOY.params, part)[name]}})


def test_the_joints_score_has_the_fisher_information():
    """z ~ N(loc, I): the square of d log p / d loc is one on average; 5 % off would be seven standard errors."""
    learned = only("phi", "loc")
    reference = fit_reference(pilot("sample")["joint"])
    means = joint_moments(TOY.model, NUM_DRAWS, jax.random.key(1), TOY.params, learned, reference)
    assert len(jax.tree.leaves(means.mean["score"])) == 1
    np.testing.assert_allclose(means.mean_square["score"].phi["loc"], 1.0, atol=5 * np.sqrt(2 / NUM_DRAWS))
    np.testing.assert_allclose(means.mean["score"].phi["loc"], 0.0, atol=5 / np.sqrt(NUM_DRAWS))


def test_qs_score_gradient_and_terms():
    draws = pilot("sample_q")["given"]
    learned, unit = only("lam", "bias"), 3.0

    def terms(key, params, x):  # Two nats too much.
        z = TOY.model.sample_q(key, params, x)
        return {"a": TOY.model.log_joint(params, x, z) + 2.0, "b": -TOY.model.log_q(params, x, z)}

    means = q_moments(
        TOY.model, terms, NUM_DRAWS, jax.random.key(1), TOY.params, learned, X,
        fit_reference(Joint((), draws)), (draws.mean(0), draws.std(0)), unit,
    )  # fmt: skip
    factor = np.tril(np.asarray(TOY.params.lam["lower"]), -1) + np.diag(np.exp(TOY.params.lam["log_diag"]))
    fisher = np.diag(np.linalg.inv(factor @ factor.T))
    np.testing.assert_allclose(
        means.mean_square["score"].lam["bias"], fisher, rtol=5 * np.sqrt(2 / NUM_DRAWS)
    )
    std_error = np.sqrt(means.mean_square["elbo_terms"] / NUM_DRAWS)
    assert abs(float(means.mean["elbo_terms"]) - 2.0 / unit) < 5 * std_error < 0.3
    difference = means.mean["pathwise"]["difference"].lam["bias"]
    spread = np.sqrt(means.mean_square["pathwise"]["difference"].lam["bias"] / NUM_DRAWS)
    assert np.all(np.abs(difference) < 5 * spread)
    assert np.all(np.abs(means.mean["pathwise"]["gradient"].lam["bias"]) > 0.1)


def test_what_is_not_asked_for_is_not_there():
    draws = pilot("sample_q")["given"]
    means = q_moments(
        TOY.model, None, 100, jax.random.key(1), TOY.params, only("lam", "bias"), X,
        fit_reference(Joint((), draws)), None, 1.0,
    )  # fmt: skip
    assert set(means.mean) == {"score", "Stein", "moves", "normalisation"}
