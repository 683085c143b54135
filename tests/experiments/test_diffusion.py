"""The diffusion experiment: every setting trains, judges and pictures real digits."""

import contextlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vdiff as vd
from experiments import diffusion, exits, runs, training, vae

pytestmark = pytest.mark.slow


def config_of(directory, **changes):
    settings = {"network": "mlp", "width": 32, "depth": 2, "prediction": "data", "num_steps": 40}
    settings |= {"eval_times": 4, "eval_images": 30, "sample_steps": 5, "learning_rate": 3e-3}
    settings |= {"run_dir": directory, "log_every": 2, "checkpoint_every": 20, "ema_decay": 0.9}
    return diffusion.Config(**(settings | changes))


def further(changes):
    return pytest.param(changes, marks=pytest.mark.long)


CHAIN = {"model": "ddpm", "num_latents": 6, "schedule": "cosine"}


@pytest.mark.parametrize(
    "changes",
    [
        {"network": "dit", "width": 16, "depth": 1, "patch": 4, "prediction": "level", "warmup_steps": 5},
        further({"network": "unet", "width": 8, "depth": 2, "prediction": "velocity", "weight": "min_snr"}),
        further({"prediction": "preconditioned", "schedule": "monotone", "precision": "bfloat16"}),
        {"likelihood": "bernoulli", "schedule": "linear", "log_snr_max": 5.0, "eval_sweeps": 1},
        CHAIN | {"likelihood": "discretized", "reverse_variance": "beta", "prediction": "noise"},
        further({"num_latents": 5, "reverse_variance": "learned"}),
        {"latent_dim": 4, "hidden": (32,), "prediction": "velocity", "log_snr_max": 5.0, "eval_images": 1},
    ],
)
def test_every_setting_trains_and_is_judged_over_the_path(changes, tmp_path):
    config = config_of(tmp_path / "run", **changes)
    result = diffusion.run(config)

    assert json.loads((tmp_path / "run/result.json").read_text()) == json.loads(json.dumps(result))
    metrics = result["metrics"]
    names = ("prior", "reconstruction", "diffusion")
    if config.latent_dim:
        names = ("reconstruction", "entropy", *(f"prior_{name}" for name in names))
    elbo = metrics["elbo"]["value"]
    assert sum(metrics[name]["value"] for name in names) == pytest.approx(elbo, rel=1e-4)
    times = config.num_latents - 1 if config.num_latents else config.eval_times
    assert metrics["elbo"]["bound"] == f"ELBO over the path, {config.eval_sweeps} x {times} times"
    assert metrics["elbo"]["num_data"] == config.eval_images
    assert metrics["bits_per_dim"]["value"] == pytest.approx(vd.bits_per_dim(elbo, 64))
    assert ("elbo_noise" in metrics) == (config.eval_sweeps > 1)

    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(2, 41, 2))
    early, late = (row["test_elbo"] for row in rows if "test_elbo" in row)
    assert late > early

    names = ["samples.png", "denoising.png", "rates.png", "curves.png"]
    names += [] if config.num_latents else ["schedules.png"]
    for name in names:
        assert (tmp_path / "run" / name).stat().st_size > 1000
    assert (tmp_path / "run/report.html").read_text().count("data:image/png;base64,") == len(names)


class StopAfter:
    """Ask a run to stop when it has been asked so many times."""

    received = 15

    def __init__(self, steps):
        self.left = steps

    def __call__(self):
        self.left -= 1
        return self.left <= 0


def test_a_stopped_run_goes_on_to_the_same_numbers(tmp_path, monkeypatch):
    whole = diffusion.run(config_of(tmp_path / "whole"))
    config = config_of(tmp_path / "parts")
    with monkeypatch.context() as patch:
        patch.setattr(vd, "stop_on_signals", lambda: contextlib.nullcontext(StopAfter(27)))
        with pytest.raises(exits.Stopped):
            diffusion.run(config)
    assert vd.latest_step(tmp_path / "parts/checkpoints") == 27
    parts = diffusion.run(config)
    assert parts["params_digest"] == whole["params_digest"]
    assert parts["metrics"] == whole["metrics"]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model": "ddpm"}, "num_latents, schedule: got None and learned for a ddpm"),
        (CHAIN | {"schedule": "learned"}, "num_latents, schedule: got 6 and learned"),
        ({"prediction": "level"}, "prediction: got level for the network mlp"),
        ({"latent_dim": 3, "network": "dit"}, "network, prediction: got dit and data for latents"),
        ({"network": "dit", "prediction": "velocity", "patch": 3}, "patch: got 3"),
        ({"warmup_steps": 40}, "warmup_steps: got 40, expected fewer than the 40 steps"),
        ({"log_snr_max": -9.0}, "log_snr_max, log_snr_min"),
        ({"eval_times": 0}, "eval_times: got 0"),
        ({"data": "nowhere"}, "nowhere"),
    ],
)
def test_input_that_cannot_be_is_refused(changes, message, tmp_path, capsys):
    config = config_of(tmp_path / "run", **changes)
    assert exits.exit_code(diffusion.run, config) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run").exists()


def test_it_is_judged_on_the_very_images_of_the_vae(tmp_path, monkeypatch):
    judged = []

    def held_out(objective, key, images, **others):
        judged.append(images)
        raise InterruptedError

    monkeypatch.setattr(training, "held_out", held_out)
    for experiment, config in (
        (diffusion, config_of(tmp_path / "a", likelihood="bernoulli", seed=3)),
        (vae, vae.Config(run_dir=tmp_path / "b", likelihood="bernoulli", eval_images=30, seed=3)),
    ):
        with pytest.raises(InterruptedError):
            experiment.run(config)
    ours, theirs = judged
    assert len(ours) == 30 and set(np.unique(ours)) == {0, 1}
    np.testing.assert_array_equal(ours, theirs)


def test_the_terms_of_a_random_time_and_of_the_path_agree(tmp_path):
    """The mean over many times of what is raised in training is what is judged, in pixels and in latents."""
    for changes in ({}, {"latent_dim": 3, "hidden": (16,)}):
        problem = diffusion.build(config := config_of(tmp_path, **changes))
        params = problem.model.init(jax.random.key(0))
        x = jnp.asarray(problem.dataset.train[0])
        u = (jnp.arange(400.0) + 0.5) / 400
        keys = jax.random.split(jax.random.key(1), 400)
        raised = jax.vmap(diffusion.objective_of(config, problem), in_axes=(0, None, None, 0))(
            keys, params, x, u
        )
        judged = diffusion.sweeps_of(problem, 20, 20)(jax.random.key(2), params, x)
        assert raised.keys() == judged.keys()
        for name in raised:
            error = np.hypot(np.std(raised[name]) / 400**0.5, np.std(judged[name]) / 20**0.5)
            assert abs(np.mean(raised[name]) - np.mean(judged[name])) < 5 * error + 1e-4, name


def test_the_rate_of_learning_rises_and_then_falls():
    config = runs.RunConfig(num_steps=100, learning_rate=1e-2)
    params = vd.Params(theta=jnp.zeros(()))
    optimizer = training.optimizer_of(config, rise_steps=10)
    state, sizes = optimizer.init(params), []
    for _ in range(100):
        with jax.numpy_dtype_promotion("standard"):  # Optax's own arithmetic mixes dtypes
            updates, state = optimizer.update(vd.Params(theta=jnp.ones(())), state, params)
        sizes.append(abs(float(updates.theta)))
    np.testing.assert_allclose(sizes[0], 1e-2 / 11, rtol=1e-3)
    assert np.argmax(sizes) == 10 and np.all(np.diff(sizes[:11]) > 0) and np.all(np.diff(sizes[10:]) < 0)
    np.testing.assert_allclose(sizes[10], 1e-2, rtol=1e-3)
    assert sizes[-1] < 1e-5
