"""How a run trains: its clipping, what it does where numbers are none, and what is left when it ends with code 3."""

import dataclasses
import json
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vdiff as vd
from experiments import exits, runs, training
from vdiff.train import checkpoint

MODEL = vd.Model(lambda key: vd.Params(theta={"loc": jnp.zeros(3)}), *[None] * 4)
IMAGES = np.random.default_rng(0).normal(size=(16, 3)).astype(np.float32)


def fit_term(key, params, x):
    return {"fit": -jnp.sum(jnp.square(x - params.theta["loc"])), "other": jnp.float32(-1.0)}


def failing(bad):
    """An objective whose first term is NaN at the steps `bad(step)`, counted from 0."""
    return vd.scheduled(lambda step: vd.weighted(fit_term, {"fit": jnp.where(bad(step), jnp.nan, 1.0)}))


def config_of(directory, **changes):
    settings = {"num_steps": 12, "batch_size": 4, "log_every": 4, "checkpoint_every": 16, "max_skips": 3}
    return runs.RunConfig(**(settings | {"run_dir": directory} | changes))


def begin(config, objective, **settings):
    """Train, and return the exit code and the state."""
    states = []

    def experiment(config):
        with jax.numpy_dtype_promotion("standard"):
            states.append(training.train(config, runs.open_run(config), MODEL, objective, IMAGES, **settings))

    return exits.exit_code(experiment, config), states


def restored(config):
    like = vd.init_state(jax.random.key(config.seed), MODEL, training.optimizer_of(config))
    return vd.restore(config.run_dir / "checkpoints", like)


def leaves(state):
    return jax.tree.leaves((state.step, state.params, state.ema, state.opt_state))


def test_too_many_skips_end_with_code_3_and_the_last_good_state(tmp_path, capsys):
    """From step 7 on, seen at step 12 of 100: saved is the run of 6 steps, which goes on at step 13's data."""
    config = config_of(tmp_path / "run", num_steps=100)
    code, _ = begin(config, failing(lambda step: (step >= 6) & (step < 12)))
    assert code == 3
    error = " ".join(capsys.readouterr().err.split())
    assert "diverged step 12: got no update in 6 steps, fit nan" in error
    assert "the gradient of theta.loc (6 in a row, 6 in all)" in error
    assert error.endswith(f"the operation with --debug-nans; step 12 is saved in {tmp_path / 'run'}")

    saved = restored(config)
    assert int(saved.step) == 12
    stopped = vd.fit(
        vd.init_state(jax.random.key(0), MODEL, training.optimizer_of(config)),
        vd.jit_step(vd.make_train_step(failing(lambda step: step < 0), training.optimizer_of(config))),
        vd.data.batches(IMAGES, 4, 0),
        6,
    )
    for got, expected in zip(leaves(saved)[1:], leaves(stopped)[1:], strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-6)

    held = vd.saved_steps(tmp_path / "run/checkpoints")
    assert begin(config, failing(lambda step: step >= 6))[0] == 3
    assert "got no update in 10 steps" in capsys.readouterr().err
    assert vd.saved_steps(tmp_path / "run/checkpoints") == held == [8, 12]

    code, (resumed,) = begin(config, failing(lambda step: (step >= 6) & (step < 12)))
    assert code == 0 and int(resumed.step) == 100
    assert [int(count) for count in resumed.guard[:2]] == [6, 0]
    rows = [json.loads(line, parse_constant=pytest.fail) for line in (tmp_path / "run/metrics.jsonl").open()]
    assert [row["step"] for row in rows][:3] == [4, 8, 16] and rows[1]["skipped"] == 0.5
    assert rows[1]["skipped/fit"] is None and rows[1]["skipped/other"] == -1.0


def test_a_few_skips_are_told_and_the_run_goes_on(tmp_path, capsys):
    config = config_of(tmp_path / "run")
    code, (state,) = begin(config, failing(lambda step: step == 5))
    assert code == 0 and int(state.step) == 12 and int(state.guard.num_skipped) == 1
    out = " ".join(capsys.readouterr().out.split())
    assert "step 6: update skipped, fit nan" in out and "(0 in a row, 1 in all)" in out


def test_a_signal_while_the_last_checkpoint_is_written_ends_the_run_when_it_is(tmp_path, monkeypatch, capsys):
    """It comes when training has made its last step, and what was minded before training does not hear of it."""
    outside, extend_manifest = [], checkpoint.extend_manifest

    def signalled(folder):
        os.kill(os.getpid(), signal.SIGTERM)
        extend_manifest(folder)

    config = config_of(tmp_path / "run", checkpoint_every=24)
    previous = signal.signal(signal.SIGTERM, lambda *_: outside.append(1))
    try:
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, "extend_manifest", signalled)
            assert begin(config, fit_term)[0] == 143
    finally:
        signal.signal(signal.SIGTERM, previous)
    assert not outside and "stopped by signal 15" in capsys.readouterr().err
    assert int(restored(config).step) == 12
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["12"]


def test_debug_nans_names_the_operation_and_its_line(tmp_path, capsys):
    def objective(key, params, x):
        return {"fit": -jnp.sum(jnp.square(jnp.log(x) - params.theta["loc"]))}

    config = config_of(tmp_path / "run", debug_nans=True)
    assert begin(config, objective)[0] == 3
    error = capsys.readouterr().err
    assert "nan" in error and "in log" in error and f"{__file__}:" in error and "jnp.log(x)" in error
    assert len(error.strip().splitlines()) == 1 and error.strip().endswith("; no checkpoint was saved yet")
    # It is over with the run.
    assert np.isnan(jnp.log(jnp.float32(-1.0)))


def test_a_profile_lies_in_the_run_directory(tmp_path):
    config = config_of(tmp_path / "run", profile=2)
    assert begin(config, fit_term)[0] == 0
    (trace,) = (tmp_path / "run/profile").glob("plugins/profile/*/*.xplane.pb")
    assert trace.stat().st_size > 1000


@pytest.mark.parametrize("clip", [0.5, 200.0])
def test_the_gradient_is_clipped_at_the_norm_that_was_asked_for(clip):
    """By part: the model's norm is 5, cv's 12; Adam's first moment after one step is a tenth of what it was given."""
    config = dataclasses.replace(config_of(None), clip=clip)
    params = vd.Params(theta=jnp.zeros(1), lam=jnp.zeros(1), cv=jnp.zeros(2))
    grads = vd.Params(theta=jnp.array([3.0]), lam=jnp.array([-4.0]), cv=jnp.array([0.0, 12.0]))
    optimizer = training.optimizer_of(config)
    with jax.numpy_dtype_promotion("standard"):
        _, state = optimizer.update(grads, optimizer.init(params), params)
    given = {
        name: np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(inner.inner_state[1][0].mu)]) * 10
        for name, inner in state.inner_states.items()
    }
    scale = min(1.0, clip / 5), min(1.0, clip / 12)
    np.testing.assert_allclose(np.sort(given["model"]), np.array([-4.0, 3.0]) * scale[0], rtol=1e-5)
    np.testing.assert_allclose(given["cv"], np.array([0.0, 12.0]) * scale[1], rtol=1e-5)


def test_devices_that_cannot_be_asked_for(monkeypatch):
    """Named as the flags are."""
    step = vd.make_train_step(fit_term, training.optimizer_of(config_of(None)))
    three = jax.device_count() + 1
    with pytest.raises(ValueError, match=rf"^split_features: got {three} for .* devices, expected a divisor"):
        training.compiled_step(config_of(None, parallel="fsdp", split_features=three), step)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ValueError, match="got pmap for 2 processes, .*; use --parallel jit or fsdp"):
        training.compiled_step(config_of(None, parallel="pmap"), step)
