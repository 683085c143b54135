"""The autoregressive experiment: each family trains on real digits and is judged by its own exact log p(x)."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vdiff as vd
from experiments import autoregressive, runs, training, vae


def config_of(directory, **changes):
    settings = {"hidden": (16,), "num_steps": 60, "eval_images": 50, "num_shown": 4}
    settings |= {"run_dir": directory, "log_every": 20, "checkpoint_every": 60, "learning_rate": 1e-2}
    return autoregressive.Config(**(settings | changes))


@pytest.mark.slow
def test_it_trains_and_is_judged(tmp_path):
    """Better than fair coins by many standard errors; the metric is the mean of exact values."""
    config = config_of(tmp_path / "run", num_orders=2)
    result = autoregressive.run(config)
    log_prob = result["metrics"]["log_prob"]
    assert log_prob["num_data"] == 50 and log_prob["bound"] == "exact, a mixture of 2 orders"
    assert -64 * math.log(2) + 5 < log_prob["value"] < -10
    assert json.loads((tmp_path / "run/result.json").read_text()) == json.loads(json.dumps(result))
    assert (tmp_path / "run/report.html").read_text().count("data:image/png;base64,") == 3
    rows = vd.report.load_metrics(tmp_path / "run/metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(20, config.num_steps + 1, 20))


def test_orders_are_trained_in_turn_and_other_likelihoods_built():
    """A step raises log p under its own order; grey levels stay as they are."""
    problem = autoregressive.build(config_of(None, num_orders=3, likelihood="logistic", hidden=()))
    params = jax.eval_shape(problem.model.init, jax.random.key(0))
    params = jax.tree.map(lambda of: jnp.full(of.shape, 0.1, of.dtype), params)
    x = jnp.asarray(problem.dataset.train[0])
    assert problem.levels == 17 and problem.transform(jax.random.key(0), x) is x

    @jax.jit
    def values(x):
        under = [problem.model.log_prob_under(params, x, m) for m in range(3)]
        return under, [problem.objective(step)(jax.random.key(0), params, x)["log_prob"] for step in range(4)]

    under, at_step = (np.asarray(of) for of in values(x))
    np.testing.assert_allclose(at_step, under[[0, 1, 2, 0]], rtol=1e-6)
    assert len(set(under.tolist())) == 3


@pytest.mark.parametrize("likelihood", ["bernoulli", "categorical", "logistic"])
def test_every_likelihood_of_a_pixelcnn_is_built(likelihood):
    """Traced only: its own sample is a datum that it judges."""
    problem = autoregressive.build(config_of(None, family="pixelcnn", likelihood=likelihood))
    params = jax.eval_shape(problem.model.init, jax.random.key(0))
    x, _ = jax.eval_shape(problem.model.sample, jax.random.key(0), params)
    assert x.shape == (8, 8, 1)
    assert jax.eval_shape(problem.objective(0), jax.random.key(0), params, x)["log_prob"].shape == ()


def test_the_test_images_are_those_of_a_vae():
    """The same bits, from the same seed: what the families are compared on."""
    problem = autoregressive.build(config_of(None))
    images = problem.dataset.test[:3]
    _, key_test, *_ = jax.random.split(jax.random.key(1), 5)
    bits = training.transformed(problem.transform, key_test, images)
    other = vae.build(vae.Config(likelihood="bernoulli", hidden=(2,), latent_dim=1))
    np.testing.assert_array_equal(bits, training.transformed(other.transform, key_test, images))


def test_the_presets_are_legal():
    for _, config in autoregressive.PRESETS.values():
        runs.check_settings(config)
