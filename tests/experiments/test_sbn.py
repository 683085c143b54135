"""The belief-network experiment: every estimator trains and is judged on real digits."""

import json
import math

import jax
import numpy as np
import pytest

import vdiff as vd
from experiments import exits, runs, sbn

pytestmark = pytest.mark.slow


def config_of(directory, **changes):
    settings = {"widths": (12,), "num_samples": 4, "num_steps": 120, "eval_samples": 50, "eval_images": 60}
    settings |= {"run_dir": directory, "log_every": 20, "checkpoint_every": 60, "learning_rate": 1e-2}
    return sbn.Config(**(settings | changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"estimator": "vimco", "widths": (12, 6)},
        {"estimator": "rloo"},
        {"estimator": "learned_baseline"},
        {"estimator": "wake_wake", "widths": (12, 6)},
        {"estimator": "wake_sleep"},
        {"estimator": "straight_through"},
        {"estimator": "relaxed"},
        {"estimator": "rebar", "num_samples": 1},
        {"estimator": "relax", "num_samples": 1},
    ],
    ids=lambda changes: changes["estimator"],
)
def test_every_estimator_trains(changes, tmp_path):
    """Better than fair coins by many standard errors, and no better than memory."""
    result = sbn.run(config_of(tmp_path / "run", **changes))
    log_prob = result["metrics"]["log_prob"]
    assert log_prob["num_data"] == 60
    assert -64 * math.log(2) + 5 < log_prob["value"] < -10
    assert log_prob["value"] > result["metrics"]["iwae"]["value"] - 3 * log_prob["std_error"]
    assert json.loads((tmp_path / "run/result.json").read_text()) == json.loads(json.dumps(result))
    assert (tmp_path / "run/report.html").read_text().count("data:image/png;base64,") == 3
    rows = vd.report.load_metrics(tmp_path / "run/metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(20, 121, 20))


def test_what_learns_a_control_variate_starts_with_one():
    for estimator in ("learned_baseline", "rebar", "relax"):
        problem = sbn.build(config_of(None, estimator=estimator))
        params = problem.model.init(jax.random.key(0))
        assert params.cv != ()


@pytest.mark.parametrize("estimator", ["relaxed", "rebar"])
def test_two_layers_are_refused_where_one_is_needed(estimator, tmp_path, capsys):
    code = exits.exit_code(sbn.run, config_of(tmp_path / "run", estimator=estimator, widths=(6, 4)))
    assert code == 2
    assert "expected one" in capsys.readouterr().err


def test_the_presets_are_legal():
    for _, config in sbn.PRESETS.values():
        runs.check_settings(config)
        assert config.estimator in sbn.ESTIMATORS and np.all(np.array(config.widths) > 0)
