"""Rows of a comparison: found when done, told apart by settings, costs by the exported functions."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

import vdiff as vd
from experiments import comparison, runs, settings
from vdiff import report

NATS = {"value": -3.0, "std_error": 0.1, "bound": "exact", "unit": "nats per datum", "num_data": 5}
RESULT = {"metrics": {"log_prob": NATS, "bits_per_dim": {"value": 1.5}}, "seconds": {"training": 7.0}}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(runs.RunConfig):
    width: int = 4


def coin(calls):
    """An experiment whose model is three fair coins."""

    def run(config):
        calls.append(config)
        config.run_dir.mkdir(parents=True, exist_ok=True)
        settings.record(config, config.run_dir)
        (config.run_dir / "result.json").write_text(json.dumps(RESULT))
        params = vd.Params(theta={"logit": jnp.zeros(()), "unused": jnp.zeros((2, 3))})

        def sample(key, params):
            return jax.random.bernoulli(key, jax.nn.sigmoid(params.theta["logit"]), (2, 2, 1)).astype(
                jnp.uint8
            ), ()

        def log_prob(key, params, x):
            return 4 * jax.nn.log_sigmoid(params.theta["logit"])

        functions = {"sample": sample, "log_prob": log_prob}
        vd.export_run(config.run_dir, params, params, functions, x=jnp.zeros((2, 2, 1), jnp.uint8))
        return RESULT

    return SimpleNamespace(run=run)


def test_what_was_trained_with_the_same_settings_is_found(tmp_path):
    calls = []
    family = comparison.Family("coin", "Coins", coin(calls), Config(), "log_prob", "c")
    assert comparison.finished([family], tmp_path) == []
    for _ in range(2):
        comparison.train([family], tmp_path)
        assert comparison.finished([family], tmp_path) == [(family, RESULT)]
    assert len(calls) == 1 and calls[0].run_dir == tmp_path / "coin"
    comparison.train([family._replace(config=Config(width=5))], tmp_path)
    assert len(calls) == 2 and comparison.finished([family], tmp_path) == []
    (tmp_path / "coin/exported/manifest.json").unlink()  # as a run that was killed before it had exported all
    comparison.train([family._replace(config=Config(width=5))], tmp_path)
    assert len(calls) == 3


def test_a_row_costs_what_its_exported_functions_do(tmp_path, monkeypatch, capsys):
    family = comparison.Family("coin", "Coins", coin([]), Config(), "log_prob", "c")
    comparison.train([family], tmp_path)
    [(_, result)] = comparison.finished([family], tmp_path)
    cost = comparison.cost_of(tmp_path / "coin")
    assert cost.num_params == 7 and 0 < cost.draw < 1 and 0 < cost.judge < 1
    picture = Path("coin.png")
    draws = comparison.draws_of(tmp_path / "coin")
    assert draws.shape == (comparison.NUM_DRAWS, 2, 2, 1) and set(np.unique(draws)) == {0.0, 1.0}
    report.image_grid(draws, tmp_path / picture, columns=20)
    entry = comparison.entry_of(family, result, picture, cost)
    assert entry[1:7] == ("Coins", "exact", -3.0, 0.1, 1.5, 7.0) and entry.report == Path("coin/report.html")
    assert entry.num_params == 7 and entry.seconds_per_sample == cost.draw
    assert entry.weights is None and entry.steps == "3,000 steps of 128"
    trust = {"ess": {"value": 15.21, "unit": "of 200 draws, median"}, "k_hat": {"value": 0.843}}
    weighted = comparison.entry_of(family, {**result, "metrics": result["metrics"] | trust}, picture)
    assert weighted.weights == "ESS 15 of 200 draws, k-hat above 0.7 for 84.3%"
    page = report.write_index(tmp_path / "index.html", title="t", lead="l", runs=[entry]).read_text()
    assert "parameters" in page and ">7<" in page and "ESS" not in page
    page = report.write_index(
        tmp_path / "index.html", title="t", lead="l", runs=[entry, weighted]
    ).read_text()
    assert ">ESS 15 of 200" in page and ">3,000 steps of 128<" in page

    gains = comparison.Gains(0.5, 0.125, "elbo")
    head, _, row = comparison.markdown([entry], [gains], ["python -m coin"]).splitlines()
    assert head.count("|") == row.count("|")
    row_of_it = (
        "| Coins | 7 | 3,000 steps of 128 | 7.0 s | exact | −3.00 ± 0.10 | – | 1.500 | +0.50 (ELBO) | +0.12 |"
    )
    assert row.startswith(row_of_it)
    assert row.endswith("| `python -m coin` |")
    for width in (80, 200):  # numbers are never cut
        monkeypatch.setattr(runs, "console", Console(width=width))
        many = weighted._replace(num_params=8_149_776, seconds=12345.6, seconds_per_sample=0.5)
        comparison.print_table([entry, many])
        shown = capsys.readouterr().out
        assert (
            "parameters" in shown and "8,149,776" in shown and "12345.6" in shown and "−3.00 ± 0.10" in shown
        )
    assert "ESS 15 of 200 draws, k-hat above 0.7 for 84.3%" in shown


def test_costs_are_columns_only_where_they_are_known(tmp_path, capsys):
    family = comparison.Family("coin", "Coins", coin([]), Config(), "log_prob", "c")
    comparison.train([family], tmp_path)
    [(_, result)] = comparison.finished([family], tmp_path)
    picture = Path("coin.png")
    report.image_grid(np.zeros((1, 2, 2)), tmp_path / picture, columns=1)
    comparison.print_table([comparison.entry_of(family, result, picture)])
    assert "parameters" not in capsys.readouterr().out


def test_what_doubling_the_steps_gains_is_read_from_the_curve(tmp_path):
    """On a curve that falls short by 8 / sqrt(steps): each doubling gains sqrt(1/2) of what the one before did."""
    steps = 2 ** np.arange(11)
    nats = -80 - 8 / np.sqrt(steps)

    def gains(first):
        rows = [{"step": int(s), "test_elbo": v} for s, v in zip(steps, nats, strict=True) if s >= first]
        rows.insert(0, {"step": 0, "objective": -500.0})
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return comparison.gains_of_doubling(tmp_path)

    expected = 8 / np.sqrt(512) - 8 / np.sqrt(1024)
    np.testing.assert_allclose(gains(1)[:2], (expected, expected * np.sqrt(0.5)), rtol=1e-9)
    assert gains(1).bound == "elbo"
    assert gains(512) is None
    nats = nats[::-1]  # worse the longer, as by too high a rate
    assert gains(1)[1] == gains(1)[0] < 0
