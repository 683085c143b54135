import json
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from vdiff.report import curves


def test_load_metrics_reads_every_line(tmp_path):
    rows = [{"step": 1, "elbo": -2.5}, {"step": 2, "elbo": float("inf")}]
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + "\n")
    assert curves.load_metrics(path) == rows


def test_load_metrics_reads_null_as_a_number_that_is_none(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "elbo": null, "kl": -2.0}\n')
    (row,) = curves.load_metrics(path)
    assert np.isnan(row.pop("elbo")) and row == {"step": 1, "kl": -2.0}


@pytest.mark.parametrize("tail", [b'{"step": 2, "el', b"{", b'{"step": 2, "name": "\xc3'])
def test_load_metrics_ignores_a_last_line_cut_short(tmp_path, tail):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + tail)
    assert curves.load_metrics(path) == [{"step": 1}]


def test_load_metrics_keeps_a_whole_last_line_without_newline(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}')
    assert curves.load_metrics(path) == [{"step": 1}, {"step": 2}]


@pytest.mark.parametrize("line", ['{"step": 2, "el{"step": 2}', "[1, 2]", "nonsense"])
def test_load_metrics_names_a_corrupt_line(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{line}\n{{"step": 3}}\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl, line 2: got .* expected a JSON object; delete"):
        curves.load_metrics(path)


def draw(monkeypatch, rows, **settings):
    """Draw training curves and return {title: axes}."""
    seen = []
    monkeypatch.setattr(curves, "save", lambda fig, path: seen.append(fig) or path)
    curves.training_curves(rows, Path("unused.png"), **settings)
    seen[0].draw_without_rendering()
    return {ax.get_title(loc="left"): ax for ax in seen[0].axes}


def run_rows(num=400):
    rng = np.random.default_rng(0)
    rows = []
    for step in range(num):
        elbo = -90 + rng.normal() - (5000 if step < 3 else 0)
        row = {"step": step, "seconds": 0.1 * step, "elbo": elbo, "reconstruction": elbo + 20, "kl": -20.0}
        rows.append({**row, "grad_norm": 3.0, **({"test_elbo": -91.0} if step % 50 == 0 else {})})
    return rows


def test_curves_have_a_panel_for_the_bound_each_term_and_the_gradient(monkeypatch):
    axes = draw(monkeypatch, run_rows())
    titles = ["elbo, nats", "reconstruction, nats", "kl, nats", "gradient norm, log"]
    assert list(axes) == titles
    assert [text.get_text() for text in axes[titles[0]].get_legend().get_texts()] == ["train", "test elbo"]
    assert axes[titles[3]].get_yscale() == "log"
    chosen = draw(monkeypatch, run_rows(), terms=["kl"])
    assert list(chosen) == [titles[0], *titles[2:]]


def test_skipped_steps_have_no_panel(monkeypatch):
    rows = [row | {"skipped": 0.5, "skipped/kl": -20.0, "skipped/elbo": np.nan} for row in run_rows()]
    assert list(draw(monkeypatch, rows)) == list(draw(monkeypatch, run_rows()))


def test_the_objective_stands_for_a_bound_that_is_only_in_its_terms(monkeypatch):
    rows = [{"step": s, "objective": -9.0, "kl": -2.0, "reconstruction": -7.0} for s in range(5)]
    axes = draw(monkeypatch, [*rows, {"step": 5, "test_elbo": -8.0}])
    assert list(axes) == ["objective, nats", "kl, nats", "reconstruction, nats"]
    train, test = axes["objective, nats"].lines
    assert set(train.get_ydata()) == {-9.0} and list(test.get_ydata()) == [-8.0]
    rows = [{**row, "score": 2.0} for row in rows]  # the same number twice needs one panel
    assert list(draw(monkeypatch, rows, bound="score", terms=[], unit="score units")) == [
        "score, score units"
    ]


def test_the_first_wild_steps_do_not_flatten_the_rest_but_are_told(monkeypatch):
    rows = run_rows()
    ax = draw(monkeypatch, rows)["elbo, nats"]
    low, high = ax.get_ylim()
    assert -96 < low < -92 and -88 < high < -84
    assert ax.get_title(loc="right") == f"off scale: \N{MINUS SIGN}{-min(row['elbo'] for row in rows):,.0f}"


def test_the_strong_line_is_the_running_mean(monkeypatch):
    rows = [{"step": step, "elbo": float(step + (-1) ** step)} for step in range(600)]
    faint, strong = draw(monkeypatch, rows)["elbo, nats"].lines
    assert len(faint.get_xdata()) == 600
    steps, values = strong.get_data()
    np.testing.assert_allclose(values, steps - 0.5, atol=1e-9)  # a window of 20, centred half a step early


def test_curves_leave_out_missing_and_not_finite_values(monkeypatch):
    rows = run_rows(40)
    rows[7]["elbo"], rows[9]["elbo"], rows[8]["kl"] = float("nan"), float("-inf"), None
    del rows[11]["elbo"], rows[12]["grad_norm"]
    rows[13]["grad_norm"] = 0.0
    axes = draw(monkeypatch, rows)
    lines = {title: ax.lines[0] for title, ax in axes.items()}
    assert set(range(40)) - set(lines["elbo, nats"].get_xdata()) == {7, 9, 11}
    assert "2 not finite" in axes["elbo, nats"].get_title(loc="right")
    assert set(range(40)) - set(lines["kl, nats"].get_xdata()) == {8}
    assert set(range(40)) - set(lines["gradient norm, log"].get_xdata()) == {12, 13}


def test_of_a_step_logged_twice_the_later_row_counts(monkeypatch):
    rows = [{"step": step, "elbo": -float(step)} for step in (0, 1, 2, 3)]
    rows += [{"step": step, "elbo": 10.0} for step in (2, 3, 4)]
    (line,) = draw(monkeypatch, rows)["elbo, nats"].lines
    assert list(line.get_xdata()) == [0, 1, 2, 3, 4]
    assert list(line.get_ydata()) == [0, -1, 10, 10, 10]


@pytest.mark.parametrize("rows", [[{"step": 0, "elbo": -3.0}], [{"step": 5, "test_elbo": float("nan")}]])
def test_the_shortest_run_is_drawn(tmp_path, rows):
    assert imread(curves.training_curves(rows, tmp_path / "a.png")).shape[1] > 1000


def test_curves_refuse_rows_without_a_bound_or_a_step(tmp_path):
    with pytest.raises(ValueError, match="rows: got names .* expected 'elbo' among them"):
        curves.training_curves([{"step": 1, "seconds": 2.0}], tmp_path / "a.png")
    with pytest.raises(ValueError, match='rows: got one without "step"'):
        curves.training_curves([{"elbo": 2.0}], tmp_path / "a.png")
