"""The VAE experiment: every setting trains, judges and pictures real digits."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vdiff as vd
from experiments import pixels, training, vae

pytestmark = pytest.mark.slow


def config_of(directory, **changes):
    settings = {"hidden": (32,), "latent_dim": 3, "num_steps": 60, "eval_samples": 20, "eval_images": 50}
    settings |= {"run_dir": directory, "log_every": 20, "checkpoint_every": 30, "learning_rate": 3e-3}
    return vae.Config(**(settings | changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"likelihood": "categorical"},
        {"likelihood": "logistic", "bound": "iwae", "num_samples": 3},
        {"likelihood": "bernoulli", "binarization": "fixed", "warmup_steps": 30},
        {"likelihood": "gaussian", "prior_components": 4, "num_samples": 2, "warmup_steps": 30},
        {"likelihood": "logistic", "network": "conv", "latent_dim": 2, "num_steps": 20},
    ],
)
def test_every_setting_trains_and_is_judged_above_the_pixels_alone(changes, tmp_path):
    config = config_of(tmp_path / "run", **changes)
    result = vae.run(config)

    assert json.loads((tmp_path / "run/result.json").read_text()) == json.loads(json.dumps(result))
    metrics = result["metrics"]
    # The bound of many draws is tighter than that of one, beyond the noise of the mean.
    assert metrics["log_prob"]["value"] > metrics["elbo"]["value"] - 3 * metrics["elbo"]["std_error"]
    assert metrics["log_prob"]["num_data"] == config.eval_images
    bits = vd.bits_per_dim(metrics["log_prob"]["value"], 64)
    assert metrics["bits_per_dim"]["value"] == pytest.approx(bits)

    # Trained, it judges the test set better than it began.
    problem = vae.build(config)
    start = vd.init_state(jax.random.key(config.seed), problem.model, training.optimizer_of(config)).params
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    objective = vae.objective_of(config, problem).at(np.int32(10**6))
    key, images = jax.random.key(5), problem.dataset.train[:200]
    before = np.mean(vd.evaluate.evaluate(vd.total(objective), key, start, images))
    assert rows[-1]["objective"] > before + 1.0
    assert [row["step"] for row in rows] == list(range(20, config.num_steps + 1, 20))

    page = (tmp_path / "run/report.html").read_text()
    for name in ("samples.png", "reconstructions.png", "predictive.png", "latents.png", "curves.png"):
        assert (tmp_path / "run" / name).stat().st_size > 1000
    assert page.count("data:image/png;base64,") == (6 if config.prior_components == 1 else 5)
    assert list((tmp_path / "run/tensorboard").glob("events*"))


def test_a_users_own_images_work(tmp_path):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (80, 5, 7, 3), dtype=np.uint8)
    np.savez(tmp_path / "own.npz", train=images[:60], test=images[60:])
    config = config_of(tmp_path / "run", data=str(tmp_path / "own.npz"), likelihood="logistic", num_steps=20)
    result = vae.run(config)
    assert result["metrics"]["log_prob"]["num_data"] == 20


def test_warmup_reaches_one_and_weighs_only_the_kl(tmp_path):
    config = config_of(tmp_path / "run", warmup_steps=10, likelihood="categorical")
    problem = vae.build(config)
    params = problem.model.init(jax.random.key(0))
    x = jnp.asarray(problem.dataset.train[0])
    plain, early, late = (
        vae.objective_of(c, problem).at(np.int32(step))(jax.random.key(1), params, x)
        for c, step in ((config_of(tmp_path, likelihood="categorical"), 0), (config, 4), (config, 50))
    )
    np.testing.assert_allclose(early["kl"], 0.5 * plain["kl"], rtol=1e-6)
    np.testing.assert_allclose(early["reconstruction"], plain["reconstruction"], rtol=1e-6)
    np.testing.assert_allclose(late["kl"], plain["kl"], rtol=1e-6)


def test_the_first_output_is_that_of_the_pixels_alone():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 5, (400, 2, 3, 1), dtype=np.uint8)
    for name in ("bernoulli", "categorical", "logistic", "gaussian"):
        likelihood, out = pixels.LIKELIHOODS[name](images, 5)
        assert out.shape == likelihood.out_shape((2, 3, 1))
        top = {"bernoulli": 4.0, "gaussian": 5.0}.get(name, 1.0)
        offset = 0.5 if name == "gaussian" else 0.0
        mean = np.asarray(likelihood.mean(jnp.asarray(out, jnp.float32)))
        np.testing.assert_allclose(mean * top, images.mean(0) + offset, atol=0.15)
