"""The mixture experiment: it trains on real digits and is judged by its own exact log p(x)."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import exporting, mixture, training, vae


def config_of(directory, **changes):
    settings = {"num_components": 10, "num_steps": 100, "eval_images": 60, "learning_rate": 3e-2}
    settings |= {"run_dir": directory, "log_every": 10, "checkpoint_every": 100, "ema_decay": 0.9}
    return mixture.Config(**(settings | changes))


@pytest.mark.slow
def test_it_trains_and_is_judged(tmp_path, monkeypatch):
    """Better than pixels that know nothing of each other; what is exported is exact."""
    seen = {}
    monkeypatch.setattr(
        exporting,
        "export_functions",
        lambda config, directory, state, **given: seen.update(given, params=state.ema),
    )
    alone = mixture.run(config_of(tmp_path / "alone", num_components=1))
    result = mixture.run(config_of(tmp_path / "run"))
    nats, one = (of["metrics"]["log_prob"] for of in (result, alone))
    assert nats["num_data"] == 60 and nats["bound"] == "exact, 10 components"
    assert -64 * math.log(2) < one["value"] < nats["value"] - 1 < -10
    assert 1 <= result["metrics"]["used_components"]["value"] <= 10
    assert json.loads((tmp_path / "run/result.json").read_text()) == json.loads(json.dumps(result))
    assert (tmp_path / "run/report.html").read_text().count("data:image/png;base64,") == 4
    x, key = jnp.asarray(seen["x"]), jax.random.key(0)
    assert x.shape == (8, 8, 1) and seen["log_prob"](key, params := seen["params"], x).shape == ()
    log_posterior = seen["encode"](params, x)
    np.testing.assert_allclose(np.exp(log_posterior).sum(), 1.0, rtol=1e-5)
    np.testing.assert_allclose(
        seen["elbo_estimate"](key, params, x), seen["log_prob"](key, params, x), rtol=1e-5
    )


def test_the_test_images_are_those_of_a_vae():
    """The same bits, from the same seed: what the families are compared on."""
    problem = mixture.build(config_of(None))
    _, key_test, *_ = jax.random.split(jax.random.key(1), 5)
    bits = training.transformed(problem.transform, key_test, problem.dataset.test[:3])
    other = vae.build(vae.Config(likelihood="bernoulli", hidden=(2,), latent_dim=1))
    np.testing.assert_array_equal(
        bits, training.transformed(other.transform, key_test, other.dataset.test[:3])
    )


def test_grey_levels_stay_as_they_are():
    problem = mixture.build(config_of(None, likelihood="categorical"))
    x = problem.dataset.train[0]
    assert problem.levels == 17 and problem.transform(jax.random.key(0), x) is x
    params = jax.eval_shape(problem.model.init, jax.random.key(0))
    assert params.theta["out"].shape == (10, 8, 8, 1, 17)
