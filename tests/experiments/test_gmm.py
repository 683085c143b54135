"""The mixture experiment: the lecture's two clusters exactly, the digits as a bound."""

import dataclasses

import jax
import numpy as np
import pytest

import vdiff as vd
from experiments import gmm

pytestmark = pytest.mark.slow


def test_two_clusters_em_and_gradient_reach_the_same_likelihood(tmp_path):
    result = gmm.run(dataclasses.replace(gmm.PRESETS["clusters"][1], run_dir=tmp_path / "run"))
    metrics = result["metrics"]
    assert metrics["log_prob"]["value"] == pytest.approx(metrics["log_prob_em"]["value"], abs=2e-3)
    # The exact posterior: the ELBO is log p(x) itself.
    assert metrics["elbo"]["value"] == pytest.approx(metrics["log_prob"]["value"], abs=1e-5)
    assert metrics["log_prob"]["bound"] == "exact"
    for name in ("samples.png", "latents.png", "curves.png", "report.html"):
        assert (tmp_path / "run" / name).stat().st_size > 1000


def test_the_clusters_are_judged_near_their_own_entropy(tmp_path):
    """A fitted mixture is as good as the truth, up to 11 parameters over 2 N nats."""
    config = dataclasses.replace(gmm.PRESETS["clusters"][1], run_dir=tmp_path / "run")
    value = gmm.run(config)["metrics"]["log_prob"]
    test = gmm.build(config).test
    mixing = np.array([[1.2, 0.6], [0.0, 0.4]])
    truth = np.logaddexp(
        np.log(0.6) + _log_normal(test, [-2.0, 0.5], 0.64 * np.eye(2)),
        np.log(0.4) + _log_normal(test, [2.0, -0.5], mixing.T @ mixing),
    )
    assert value["value"] == pytest.approx(truth.mean(), abs=0.03)


def _log_normal(x, loc, covariance):
    residual = x.astype(np.float64) - np.asarray(loc)
    squares = np.einsum("ni,ij,nj->n", residual, np.linalg.inv(covariance), residual)
    return -0.5 * (squares + np.linalg.slogdet(2 * np.pi * covariance)[1])


@pytest.mark.parametrize(
    "changes",
    [{"covariance": "shared"}, {"covariance": "diagonal", "encoder_hidden": 16}, {"prior_strength": 50.0}],
)
def test_digits_with_every_covariance(changes, tmp_path, capsys):
    config = dataclasses.replace(gmm.PRESETS["digits"][1], run_dir=tmp_path / "run", num_components=4)
    config = dataclasses.replace(
        config, num_steps=40, em_steps=5, eval_samples=20, eval_images=40, log_every=20
    )
    result = gmm.run(dataclasses.replace(config, **changes))
    metrics = result["metrics"]
    assert metrics["bits_per_dim"]["value"] == pytest.approx(
        vd.bits_per_dim(metrics["log_prob"]["value"], 64)
    )
    # What the draws are worth is said of both.
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("log p(x)")]
    assert len(said) == 2 and all(" of 20 draws" in line for line in said)
    # Worse than the VAE's -82 and better than 17 equal levels a pixel.
    assert -64 * np.log(17) < metrics["log_prob"]["value"] < -90
    for name in ("samples.png", "reconstructions.png", "latents.png", "curves.png", "report.html"):
        assert (tmp_path / "run" / name).stat().st_size > 1000


def test_the_prior_is_spread_over_the_data():
    """Averaged over the data, the objective is EM's penalised likelihood per datum."""
    config = dataclasses.replace(gmm.PRESETS["clusters"][1], prior_strength=7.0, prior_scale=0.3)
    problem = gmm.build(config)
    params, history = vd.fit_em(
        jax.random.key(0), problem.mixture, problem.train, num_steps=5, prior_strength=7.0, prior_scale=0.3
    )
    objective = vd.total(gmm.objective_of(config, problem))
    values = vd.evaluate.evaluate(objective, jax.random.key(0), params, problem.train, batch_size=500)
    assert np.mean(values) == pytest.approx(history[-1], rel=1e-5)
