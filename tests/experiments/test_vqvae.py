"""The experiment of discrete codes: built for real digits by every estimator, trained and judged by one."""

import json

import jax
import pytest

from experiments import exits, runs, vqvae


def config_of(directory, **changes):
    settings = {"hidden": (16,), "prior_hidden": (8,), "num_latents": 3, "num_codes": 4, "code_dim": 2}
    settings |= {"num_steps": 60, "eval_samples": 50, "eval_images": 50, "learning_rate": 1e-2}
    settings |= {"run_dir": directory, "log_every": 20, "checkpoint_every": 60}
    return vqvae.Config(**(settings | changes))


@pytest.mark.parametrize("estimator", ["straight_through", "relaxed", "vimco", "rloo"])
def test_every_estimator_is_built(estimator):
    """Traced only: one term, a bound, of one image."""
    problem = vqvae.build(config_of(None, estimator=estimator, num_samples=2))
    params = jax.eval_shape(problem.model.init, jax.random.key(0))
    x = jax.eval_shape(problem.transform, jax.random.key(0), problem.dataset.train[0])
    terms = jax.eval_shape(problem.objective, jax.random.key(0), params, x)
    assert {name: term.shape for name, term in terms.items()} == {
        "iwae" if estimator == "vimco" else "elbo": ()
    }


@pytest.mark.slow
def test_it_trains_and_is_judged(tmp_path):
    config = config_of(tmp_path / "run", num_steps=120, log_every=6, checkpoint_every=60)
    result = vqvae.run(config)
    assert json.loads((tmp_path / "run/result.json").read_text()) == json.loads(json.dumps(result))
    metrics = result["metrics"]
    assert metrics["log_prob"]["num_data"] == config.eval_images
    # Both are of the same images: many draws are above one beyond the noise of one.
    assert metrics["log_prob"]["value"] > metrics["elbo"]["value"] - metrics["elbo"]["std_error"]
    assert 1 <= metrics["code_perplexity"]["value"] <= config.num_codes
    assert 0 <= metrics["k_hat"]["value"] <= 1 and 1 <= metrics["ess"]["value"] <= config.eval_samples
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    first, *_, last = [row["test_elbo"] for row in rows if "test_elbo" in row]
    assert last > first
    for name in ("samples.png", "reconstructions.png", "curves.png", "report.html"):
        assert (tmp_path / "run" / name).stat().st_size > 1000


def test_one_draw_has_no_leave_one_out(tmp_path, capsys):
    assert exits.exit_code(vqvae.run, config_of(tmp_path / "run", estimator="rloo")) == 2
    assert "num_samples" in capsys.readouterr().err


def test_the_presets_are_legal():
    for _, config in vqvae.PRESETS.values():
        runs.check_settings(config)
