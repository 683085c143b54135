"""What is recorded of a judged model, and how a page says it."""

import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rich.console
from scipy.stats import multivariate_normal

import vdiff as vd
from experiments import judging
from vdiff.train import hooks

WEIGHT = np.array([[0.8], [-0.5], [0.3]])


def linear():
    """z ~ N(0, 1), x = w z + noise of scale 1/2; q the posterior, so that every weight is p(x)."""
    precision = 1 + float((WEIGHT**2).sum()) / 0.25
    gain = jnp.asarray(WEIGHT[:, 0] / 0.25 / precision, jnp.float32)
    log_scale = jnp.full((1,), -0.5 * np.log(precision), jnp.float32)
    return vd.vae(
        vd.Network(lambda key: (), lambda lam, x: jnp.concatenate([(gain @ x)[None], log_scale])),
        vd.Network(lambda key: (), lambda theta, z: jnp.asarray(WEIGHT, jnp.float32) @ z),
        latent_dim=1,
        likelihood=vd.likelihoods.gaussian(0.5),
    )


@pytest.fixture
def test_data():
    return np.random.default_rng(0).normal(size=(12, 3)).astype(np.float32)


def test_a_tight_model_has_its_log_prob_as_its_bound(tmp_path, test_data):
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 5, "seconds": 7.0}) + "\n")
    model = linear()
    beside = judging.Beside("elbo", "ELBO, one draw", model.elbo_terms)
    key, params = jax.random.key(0), model.init(jax.random.key(1))
    judged = judging.judge(model, 50, key, params, test_data, tmp_path, beside)
    exact = multivariate_normal(cov=WEIGHT @ WEIGHT.T + 0.25 * np.eye(3)).logpdf(test_data)
    nats = judged.metrics["log_prob"]
    np.testing.assert_allclose(nats["value"], exact.mean(), rtol=1e-5)
    np.testing.assert_allclose(nats["std_error"], exact.std(ddof=1) / np.sqrt(12), rtol=1e-4)
    assert nats["bound"] == "importance, K = 50" and nats["num_data"] == 12
    assert judged.metrics["ess"]["value"] == pytest.approx(50, rel=1e-4)
    assert set(judged.terms) == {"reconstruction", "kl"}
    mean = float(np.mean(judged.terms["reconstruction"] + judged.terms["kl"]))
    assert judged.metrics["elbo"]["value"] == pytest.approx(mean, rel=1e-6)
    assert judged.metrics["bits_per_dim"]["value"] == pytest.approx(-exact.mean() / 3 / np.log(2), rel=1e-5)
    assert judged.seconds["training"] == 7.0 and judged.seconds["evaluation"] > 0


def test_an_exact_density_is_its_own_judge_and_a_page_has_no_bound_beside(tmp_path, test_data, capsys):
    (tmp_path / "metrics.jsonl").write_text("")  # as of a run that had no step left
    judged = judging.judge_exact(
        lambda key, params, x: -jnp.sum(x**2), "exact", jax.random.key(0), vd.Params(), test_data, tmp_path
    )
    np.testing.assert_allclose(judged.terms["log_prob"], -(test_data**2).sum(1), rtol=1e-6)
    first, last = judging.tiles(judged.metrics, 3)
    assert (first.label, last.label) == ("log p(x)", "bits/dim")
    assert judged.seconds["training"] == 0.0  # no row was ever written
    judging.tell(judged.metrics)
    assert f"log p(x) {judged.metrics['log_prob']['value']:.2f}" in capsys.readouterr().out


def test_a_page_says_the_bound_and_how_far_weights_are_trusted():
    nats = {"value": -3.0, "std_error": 0.1, "bound": "importance, K = 50", "num_data": 1200}
    metrics = {"log_prob": nats, "iwae": nats | {"value": -3.5, "bound": "IWAE, K = 5"}}
    metrics |= {"bits_per_dim": {"value": 1.0}, "k_hat": {"value": 0.25}}
    metrics |= {"ess": {"value": 11.2, "unit": "of 50 draws, median"}}
    first, beside, _ = judging.tiles(metrics, 3)
    trusted = "ESS 11 of 50 draws, k-hat above 0.7 for 25.0%"
    assert f"importance, K = 50, 1,200 test images, {trusted}" in str(first)
    assert (beside.label, beside.value) == ("IWAE", -3.5) and "IWAE, K = 5" in str(beside)


def test_what_weights_are_worth_is_said_wherever_they_are(capsys):
    metrics = {"log_prob": {"value": -3.0, "std_error": 0.1, "num_data": 1200}}
    judging.tell(metrics)
    metrics |= {"ess": {"value": 15.4, "unit": "of 200 draws, median"}, "k_hat": {"value": 0.843}}
    judging.tell(metrics)
    plain, weighted = capsys.readouterr().out.splitlines()
    assert plain == "log p(x) -3.00 +- 0.10 nats on 1200 test images"
    assert weighted == f"{plain}, ESS 15 of 200 draws, k-hat above 0.7 for 84.3%"
    of_chains = {"ess": {"value": 34.0, "unit": "of 100 chains"}, "k_hat_log_z": {"value": 0.4}}
    assert judging.told(of_chains) == "ESS 34 of 100 chains, k-hat 0.40"


def test_long_work_says_in_a_log_how_far_it_is(monkeypatch):
    out = io.StringIO()
    monkeypatch.setattr(rich, "_console", rich.console.Console(file=out, force_terminal=False))
    monkeypatch.setattr(hooks, "SECONDS_BETWEEN_LINES", 0.0)
    with judging.counting("judging", 10_000) as on_progress:
        on_progress(2_000)
    assert "judging: 2,000 of 10,000\n" in out.getvalue()
