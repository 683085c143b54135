"""What a run tells: rows of JSON, TensorBoard events, a bar, and the end of a run that diverged."""

import io
import json
import math
import struct
import time
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import rich
from tensorboardX.proto.event_pb2 import Event

import vdiff as vd
from vdiff.train import hooks
from vdiff.train.guard import Guard, skip_nonfinite, unguarded
from vdiff.train.hooks import (
    DivergedError,
    progress_bar,
    stop_if_diverged,
    stop_if_skipping,
    tensorboard,
    write_metrics,
)

STATE = vd.TrainState(*[None] * 5)


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def events(directory):
    """The scalars of the one event file: (step, name, value), from TFRecord frames of protocol buffers."""
    (path,) = directory.iterdir()
    data, rows = path.read_bytes(), []
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        event = Event.FromString(data[12 : 12 + length])
        rows += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
        data = data[16 + length :]
    return rows


def test_rows_are_the_metrics_of_their_steps(tmp_path):
    path = tmp_path / "metrics.jsonl"
    hook = write_metrics(path, every=3)
    assert hook.every == 3
    assert hook.call(3, STATE, {"objective": -12.5, "kl": -0.25}) is None
    time.sleep(0.05)
    hook.call(6, STATE, {"objective": -11.0, "kl": -0.5, "test_elbo": -13.0})
    rows = read(path)
    assert [{k: v for k, v in row.items() if k != "seconds"} for row in rows] == [
        {"step": 3, "objective": -12.5, "kl": -0.25},
        {"step": 6, "objective": -11.0, "kl": -0.5, "test_elbo": -13.0},
    ]
    assert 0.045 < rows[1]["seconds"] - rows[0]["seconds"] < 5.0


def test_rows_of_a_fit_are_those_of_its_hooks(tmp_path):
    """Through `fit`: theta rises by the rate each step, so that the means are known."""
    optimizer = optax.sgd(1.0)
    model = vd.Model(lambda key: vd.Params(theta=jnp.zeros(())), *[None] * 4)
    step = vd.jit_step(vd.make_train_step(lambda key, params, x: {"theta": params.theta}, optimizer))
    hooks = [
        vd.Hook(4, lambda step, state, metrics: {"judged": 10.0 * step}),
        write_metrics(tmp_path / "m.jsonl", every=2),
    ]
    state = vd.init_state(jax.random.key(0), model, optimizer)
    vd.fit(state, step, lambda i: np.zeros((2, 1), np.float32), 5, hooks=hooks)
    rows = read(tmp_path / "m.jsonl")
    # Before its update, step t has theta = t - 1.
    assert [(row["step"], row["theta"]) for row in rows] == [(2, 0.5), (4, 2.5), (5, 4.0)]
    assert [row.get("judged") for row in rows] == [None, 40.0, 50.0]


def test_a_resumed_file_drops_what_the_run_forgot(tmp_path):
    """Rows past the start and a last line cut by a kill go; seconds go on from the last row that stays."""
    path = tmp_path / "metrics.jsonl"
    kept = [
        {"step": 50, "seconds": 10.0, "objective": -9.0},
        {"step": 100, "seconds": 100.0, "objective": -8.0},
    ]
    later = {"step": 150, "seconds": 1000.0, "objective": -7.0}
    lines = [json.dumps(row) for row in (*kept, later)]
    path.write_text("\n".join(lines) + '\n{"step": 200, "secon')
    hook = write_metrics(path, start=100)
    assert read(path) == kept
    hook.call(150, STATE, {"objective": -6.0})
    *before, last = read(path)
    assert before == kept and last["step"] == 150 and last["objective"] == -6.0
    assert 100.0 <= last["seconds"] < 105.0


def test_a_line_cut_before_the_start_is_dropped_too(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 50, "seconds": 1.0}\n{"step": 100, "sec')
    write_metrics(path, start=100).call(150, STATE, {})
    assert [row["step"] for row in read(path)] == [50, 150]


def test_a_new_run_starts_a_new_file(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 50, "seconds": 99.0, "objective": -9.0}\n')
    hook = write_metrics(path)
    assert path.read_text() == ""
    hook.call(50, STATE, {"objective": -1.0})
    (row,) = read(path)
    assert row["objective"] == -1.0 and row["seconds"] < 5.0


def test_a_resumed_run_without_a_file_starts_one(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_metrics(path, start=100).call(150, STATE, {"objective": -1.0})
    assert [row["step"] for row in read(path)] == [150]


def test_tensorboard_events_are_the_metrics(tmp_path):
    with tensorboard(tmp_path / "events", every=7) as hook:
        assert hook.every == 7
        assert hook.call(7, STATE, {"objective": -12.5, "kl": -0.25}) is None
        hook.call(14, STATE, {"objective": -11.0})
    expected = [(7, "objective", -12.5), (7, "kl", -0.25), (14, "objective", -11.0)]
    assert events(tmp_path / "events") == expected


def test_tensorboard_hides_what_a_resumed_run_forgot(tmp_path):
    with tensorboard(tmp_path, start=100) as hook:
        hook.call(150, STATE, {"objective": -1.0})
    (path,) = tmp_path.iterdir()
    data, steps = path.read_bytes(), []
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        event = Event.FromString(data[12 : 12 + length])
        if event.HasField("session_log"):
            steps.append((event.step, event.session_log.status))
        data = data[16 + length :]
    assert steps == [(100, 1)]  # SessionLog.START: events of earlier files from this step on are purged


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_divergence_is_told_by_step_and_metric(bad):
    hook = stop_if_diverged(every=9)
    assert hook.every == 9
    assert hook.call(9, STATE, {"objective": -1e30, "kl": 0.0}) is None
    with pytest.raises(DivergedError, match=r"step 18: got \{'kl': .*\}, expected finite numbers; lower the"):
        hook.call(18, STATE, {"objective": -1.0, "kl": bad})


@pytest.mark.parametrize("guard", [unguarded, skip_nonfinite])
def test_a_fit_that_diverges_stops_at_the_next_look(guard):
    """One NaN at step 5 of 12 is still seen in the metrics of steps 5 to 8, and no later hook runs."""
    optimizer = optax.sgd(0.0)
    model = vd.Model(lambda key: vd.Params(theta=jnp.ones(())), *[None] * 4)
    step = vd.jit_step(
        vd.make_train_step(lambda key, params, x: {"v": params.theta * x}, optimizer, guard=guard)
    )
    asked, saved = [], []

    def batches(i):
        asked.append(i)
        return np.full(2, np.nan if i == 4 else 1.0, np.float32)

    hooks = [stop_if_diverged(every=4), vd.Hook(4, lambda step, state, metrics: saved.append(step))]
    state = vd.init_state(jax.random.key(0), model, optimizer)
    with pytest.raises(DivergedError, match="step 8: .*v': nan"):
        vd.fit(state, step, batches, 12, hooks=hooks)
    assert asked == list(range(8)) and saved == [4]


def test_rows_are_json_where_numbers_are_none(tmp_path):
    """NaN and infinity are no JSON: null in the file, NaN to who reads it."""
    hook = write_metrics(tmp_path / "m.jsonl", every=1)
    hook.call(1, STATE, {"objective": math.nan, "kl": -math.inf, "fit": -1.5})
    (row,) = [json.loads(line, parse_constant=pytest.fail) for line in (tmp_path / "m.jsonl").open()]
    assert row["objective"] is None and row["kl"] is None and row["fit"] == -1.5
    (row,) = vd.report.load_metrics(tmp_path / "m.jsonl")
    assert math.isnan(row["objective"]) and math.isnan(row["kl"]) and row["fit"] == -1.5


def test_tensorboard_gets_the_numbers_that_are_some(tmp_path):
    with tensorboard(tmp_path) as hook:
        hook.call(7, STATE, {"objective": math.nan, "kl": -0.25})
    assert events(tmp_path) == [(7, "kl", -0.25)]


def skipping(at, num_steps, hooks):
    """A fit whose batch has a NaN at the steps `at`, counted from 0; terms "fit" and, without x, "pull"."""
    optimizer = optax.sgd(0.1)
    theta = {"Dense_0": {"kernel": jnp.ones(2)}, "scale": jnp.ones(2)}
    model = vd.Model(lambda key: vd.Params(theta=theta), *[None] * 4)

    def objective(key, params, x):
        kernel = params.theta["Dense_0"]["kernel"]
        return {"fit": -jnp.sum(x * jnp.square(kernel)), "pull": -jnp.sum(jnp.square(params.theta["scale"]))}

    def batches(i):
        return np.full((4, 2), np.nan if i in at else 1.0, np.float32)

    state = vd.init_state(jax.random.key(0), model, optimizer)
    return vd.fit(
        state, vd.jit_step(vd.make_train_step(objective, optimizer)), batches, num_steps, hooks=hooks
    )


def test_skipped_updates_are_told_by_step_terms_and_leaf():
    """Once, at the look after it; pull is finite and not accused, nor is the leaf that only it reaches."""
    lines = []
    skipping([4], 12, [stop_if_skipping(2, every=3, tell=lines.append)])
    assert lines == [
        "step 5: update skipped, fit nan, grad_norm nan, objective nan, the gradient of theta.Dense_0.kernel "
        "(0 in a row, 1 in all)"
    ]


def test_skips_that_end_leave_the_run_alone():
    lines = []
    hook = stop_if_skipping(3, every=1, tell=lines.append)
    state = skipping([1, 2, 5, 6], 9, [hook])
    assert [line.split("(")[1] for line in lines] == [
        "1 in a row, 1 in all)",
        "2 in a row, 2 in all)",
        "1 in a row, 3 in all)",
        "2 in a row, 4 in all)",
    ]
    assert int(state.step) == 9 and int(state.guard.num_skipped) == 4


def test_too_many_skips_in_a_row_save_and_end_the_run():
    saved, later = [], []
    hooks = [
        stop_if_skipping(3, every=2, save=lambda step, state, metrics: saved.append((step, int(state.step)))),
        vd.Hook(2, lambda step, state, metrics: later.append(step)),
    ]
    line = (
        r"step 8: got no update in 3 steps, fit nan, .*theta\.Dense_0\.kernel \(3 in a row, 3 in all\), "
        "expected fewer than 3; lower the .* with jax_debug_nans"
    )
    with pytest.raises(DivergedError, match=line) as error:
        skipping(range(5, 99), 12, hooks)
    assert saved == [(8, 8)] and later == [2, 4, 6] and "\n" not in str(error.value)


@pytest.mark.parametrize(("num_in_a_row", "saved"), [(6, []), (5, [18])])
def test_a_state_without_an_update_since_the_start_is_not_saved_again(num_in_a_row, saved):
    """From step 12 to 18: all six were skipped, or all but the first; skips before step 12 change nothing."""
    given = []
    hook = stop_if_skipping(3, start=12, save=lambda step, state, metrics: given.append(step))
    for more in (0, 6) if num_in_a_row == 6 else (0,):
        state = STATE._replace(guard=Guard(*map(np.int32, (9, num_in_a_row + more, 18, 0, 0))))
        with pytest.raises(DivergedError, match=f"got no update in {num_in_a_row + more} steps"):
            hook.call(18, state, {"skipped": 1.0, "skipped/fit": math.nan})
    assert given == saved


def test_a_row_of_no_skips_is_refused():
    with pytest.raises(ValueError, match="max_in_a_row: got 0, expected at least 1"):
        stop_if_skipping(0)


def test_the_progress_bar_shows_step_and_value(monkeypatch):
    out = io.StringIO()
    monkeypatch.setattr(rich, "_console", rich.console.Console(file=out, width=120, force_terminal=True))
    with progress_bar("training digits", 40, start=10, every=5) as hook:
        assert hook.every == 5
        assert hook.call(15, STATE, {"objective": -123.456}) is None
        hook.call(40, STATE, {"objective": -7.891})
    shown = out.getvalue()
    assert "training digits" in shown and "40/40" in shown and "-7.89 nats" in shown


@pytest.mark.parametrize(("is_terminal", "name"), [(False, "xterm"), (True, "dumb"), (True, "xterm")])
def test_a_log_has_a_line_a_minute_where_a_terminal_has_a_bar(monkeypatch, is_terminal, name):
    out, now = io.StringIO(), [100.0]
    console = rich.console.Console(file=out, width=120, force_terminal=is_terminal)
    monkeypatch.setattr(rich, "_console", console)
    monkeypatch.setenv("TERM", name)
    monkeypatch.setattr(hooks, "time", SimpleNamespace(monotonic=lambda: now[0]))
    has_bar = is_terminal and name != "dumb"
    with progress_bar("training digits", 4000, every=5) as hook:
        for step, seconds in ((1000, 30), (1500, 59), (2000, 60), (2500, 119), (3000, 121)):
            now[0] = 100.0 + seconds
            hook.call(step, STATE, {"objective": -step / 8})
    shown = out.getvalue()
    lines = ["training digits: 2,000 of 4,000  -250.00 nats", "training digits: 3,000 of 4,000  -375.00 nats"]
    assert [line for line in lines if line in shown] == ([] if has_bar else lines)
    assert shown.count(" of 4,000") == (0 if has_bar else 2)
