"""The hierarchical experiment: both directions of inference train and are judged on real digits."""

import json
import math

import numpy as np
import pytest

import vdiff as vd
from experiments import exits, hvae, runs, training, vae

pytestmark = pytest.mark.slow


def config_of(directory, **changes):
    settings = {"num_steps": 60, "eval_samples": 20, "eval_images": 40, "learning_rate": 3e-3}
    settings |= {"run_dir": directory, "log_every": 20, "checkpoint_every": 30}
    settings |= {"network": "mlp", "latent_dims": (6, 3), "hidden": (24, 12)}
    return hvae.Config(**(settings | changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"likelihood": "logistic", "warmup_steps": 30, "free_bits": 0.3, "log_every": 1},
        {"bound": "iwae", "num_samples": 3},
        {"network": "ladder", "features": (4,), "latents": (1,), "layers_per_level": 2, "top": 3},
    ],
    ids=["mlp, elbo", "mlp, iwae", "ladder"],
)
def test_every_network_trains_and_is_judged(changes, tmp_path):
    """Better than fair levels by many standard errors; every layer's KL is told, and the page is whole."""
    config = config_of(tmp_path / "run", **changes)
    result = hvae.run(config)
    metrics, num_levels = result["metrics"], 17 if config.likelihood == "logistic" else 2
    log_prob = metrics["log_prob"]
    assert {"value", "std_error", "bound"} <= set(log_prob) and log_prob["num_data"] == 40
    assert -64 * math.log(num_levels) + 5 < log_prob["value"] < -10
    assert log_prob["value"] > metrics["elbo"]["value"] - 3 * metrics["elbo"]["std_error"]
    assert json.loads((tmp_path / "run/result.json").read_text()) == json.loads(json.dumps(result))
    num_layers = 3 if config.network == "ladder" else 2
    assert [name for name in metrics if name.startswith("kl_")] == [f"kl_{i + 1}" for i in range(num_layers)]
    page = (tmp_path / "run/report.html").read_text()
    assert page.count("data:image/png;base64,") == 4 and "What each layer carries" in page
    rows = vd.report.load_metrics(tmp_path / "run/metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(config.log_every, 61, config.log_every))
    if config.free_bits:
        # Raised at every step are the batch's means, none below its floor, which one of them is at some steps.
        for row in rows:
            floored = sum(min(row[f"kl_{i}"], -config.free_bits) for i in (1, 2))
            assert row["objective"] == pytest.approx(row["reconstruction"] + floored, abs=1e-3)
        smallest = [-max(row["kl_1"], row["kl_2"]) for row in rows]
        assert min(smallest) < config.free_bits < max(smallest)


def test_it_is_judged_on_the_vaes_pixels():
    """The same seed binarises the test images alike."""
    config = config_of(None)
    problem = hvae.build(config)
    other = vae.build(vae.Config(likelihood="bernoulli"))
    keys = runs.keys_of(config.seed)
    one, two = (training.transformed(p.transform, keys.test, p.dataset.test[:20]) for p in (problem, other))
    np.testing.assert_array_equal(one, two)


def test_every_layers_kl_is_named():
    assert hvae.names_of(hvae.build(config_of(None))) == ["kl_1", "kl_2"]


def test_what_does_not_fit_is_refused(tmp_path, capsys):
    for changes, message in (
        ({"bound": "iwae", "free_bits": 0.5}, "bound: got iwae with warm-up or free bits"),
        ({"hidden": (10,)}, "hidden: got 1 widths for 2 latent_dims"),
        ({"free_bits": -1.0}, "expected nats of at least 0"),
        ({"network": "ladder", "features": (4, 8), "latents": (1,)}, "latents: got 1 levels"),
    ):
        assert exits.exit_code(hvae.run, config_of(tmp_path / "run", **changes)) == 2
        assert message in " ".join(capsys.readouterr().err.split())


def test_the_presets_are_legal():
    for _, config in hvae.PRESETS.values():
        runs.check_settings(config)
