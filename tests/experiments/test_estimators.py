"""The experiment on estimators: its exact gradients, and what its table says of the biased and the unbiased."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vdiff as vd
from experiments import cases, estimators

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    directory = tmp_path_factory.mktemp("estimators")
    config = estimators.PRESETS["smoke"][1]
    result = estimators.run(estimators.dataclasses.replace(config, run_dir=directory, network_steps=40))
    return directory, result


def test_it_writes_a_page_with_every_figure(smoke):
    directory, result = smoke
    page = (directory / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 4
    assert page.count("k-hat above 0.7 for") >= 2 and page.count("ESS ") >= 2
    for name in ("snr.png", "ratio.png", "temperature.png", "networks.png"):
        assert (directory / name).stat().st_size > 5000
    assert set(result["metrics"]) == {"log_prob, vimco", "log_prob, wake_sleep"}
    rows = json.loads((directory / "gradients.json").read_text())["rows"]
    assert {row["estimator"] for row in rows} == {
        *("pathwise", "sticking the landing", "score, leave-one-out (RLOO)", "score, no baseline"),
        *("pathwise, IWAE", "doubly reparametrized, IWAE (DReG)", "score, IWAE (VIMCO)"),
    }


def test_unbiased_ones_are_within_their_noise_and_the_order_of_variances_is_the_theory_s(smoke):
    rows = json.loads((smoke[0] / "gradients.json").read_text())["rows"]
    by = {(row["where"], row["estimator"]): row for row in rows}
    for row in rows:
        for part in ("theta", "lam"):
            assert row[part]["z"] < 5.0, row
    near = {name: by["near", name]["lam"]["std"] for _, name in by}
    assert near["sticking the landing"] < near["pathwise"] < near["score, no baseline"]
    far = {name: by["far", name]["lam"]["std"] for _, name in by}
    assert far["pathwise"] < far["score, leave-one-out (RLOO)"] < far["score, no baseline"]


def test_signal_to_noise_has_the_published_slopes():
    """Rainforth et al. (2018) and Tucker et al. (2019), between 4 and 64 draws, to .1 of the exponent."""
    config = estimators.dataclasses.replace(estimators.PRESETS["smoke"][1], num_draws=1000, max_samples=64)
    of_lam, of_theta = (panel.lines for panel in estimators.snr_panels(config))
    for lines, of_doubly, of_others in ((of_lam, 0.5, -0.5), (of_theta, 0.5, 0.5)):
        assert len(lines) == 3
        for name, (draws, ratios) in lines.items():
            k, snr = (np.log(np.array(row)[-3:]) for row in (draws, ratios))
            assert draws[-3:] == [4, 16, 64]
            slope = np.polyfit(k, snr, 1)[0]
            assert slope == pytest.approx(of_doubly if "DReG" in name else of_others, abs=0.1), name


def test_a_temperature_trades_bias_for_noise():
    """Relaxed: less bias and more noise at each lower temperature; straight-through keeps its bias, half and more."""
    config = estimators.dataclasses.replace(estimators.PRESETS["smoke"][1], num_draws=400)
    bias, noise = (panel.lines for panel in estimators.temperature_panels(config))
    for name in ("relaxed", "straight-through"):
        assert list(noise[name][1]) == sorted(noise[name][1], reverse=True)
    falling = bias["relaxed"][1][1:]
    assert falling == sorted(falling) and falling[0] < 0.06 and falling[-1] > 0.3
    assert min(bias["straight-through"][1]) > 0.5


def test_the_gaussian_s_elbo_is_the_mean_of_its_estimate():
    """The closed form that judges, against 40,000 draws of the plain estimate."""
    case = cases.gaussian(jax.random.key(0))
    params, x = cases.far(case, jax.random.key(1)), case.data[0]
    estimate = vd.total(vd.pathwise(case.model, vd.elbo, 1))
    keys = jax.random.split(jax.random.key(2), 40_000)
    draws = np.asarray(jax.jit(jax.vmap(estimate, in_axes=(0, None, None)))(keys, params, x), np.float64)
    closed = float(vd.total(case.elbo)(jax.random.key(0), params, x))
    assert abs(np.mean(draws) - closed) < 5 * np.std(draws) / 200


def test_the_gaussian_s_score_is_that_of_its_marginal():
    """-(W W^T + .7^2 I)^-1 (x - W phi - b), in NumPy."""
    case = cases.gaussian(jax.random.key(0))
    params, x = cases.far(case, jax.random.key(1)), case.data[0]
    w, b, loc = (np.asarray(v, np.float64) for v in (params.theta["w"], params.theta["b"], params.phi))
    score = -np.linalg.solve(w @ w.T + 0.49 * np.eye(4), np.asarray(x) - w @ loc - b)
    np.testing.assert_allclose(cases.gaussian_score(params, x), score, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("label", ["wake-sleep, wake phase", "wake-sleep, sleep phase"])
def test_the_aims_of_the_phases(label):
    """Exact for the sleep phase; the wake phase tends to its aim as K grows."""
    case = cases.bits(jax.random.key(0))
    params, x = cases.far(case, jax.random.key(1)), case.data[0]
    estimator = case.estimators[label]
    exact = estimator.aim(params, x)
    if "sleep phase" in label:
        found = vd.gradient_report(estimator.objective, params, x, jax.random.key(2), 20_000, exact=exact)
        assert found.parts["lam"].z_score < 5.0
        return
    biases = []
    for k in (2, 50):
        found = vd.gradient_report(vd.wake_sleep(case.model, k), params, x, jax.random.key(2), 20_000)
        gaps = jax.tree.map(lambda a, b: np.sum((a - b) ** 2), found.mean.lam, exact.lam)
        biases.append(float(np.sqrt(sum(jax.tree.leaves(gaps)))))
    assert biases[1] < 0.2 * biases[0]


def test_near_is_higher_than_far():
    case = cases.mixture(jax.random.key(3))
    start = cases.far(case, jax.random.key(1))
    mean = jax.vmap(vd.total(case.elbo), in_axes=(None, None, 0))
    before, after = (
        float(jnp.mean(mean(jax.random.key(0), params, case.data)))
        for params in (start, cases.near(case, start, 200))
    )
    assert after > before + 0.5


def test_a_biased_one_is_told_from_an_unbiased_one():
    unbiased = {"bias": 0.004, "std": 1.0, "noise": 0.003, "z": 2.0}
    biased = {"bias": 0.25, "std": 1.0, "noise": 0.003, "z": 40.0}
    assert estimators._cells(unbiased) == ("< 0.9%", "1")
    assert estimators._cells(biased) == ("25.0%", "1")
