"""Each way in which an experiment ends has its exit code, and says itself in one line."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest

import vdiff as vd
from experiments import exits, runs, vae
from tests import tiny_run

ROOT = Path(__file__).parents[2]


def short(directory, **changes):
    return tiny_run.Config(run_dir=directory, **({"num_steps": 4, "checkpoint_every": 4} | changes))


def test_a_disk_that_takes_no_more_ends_with_code_1(tmp_path, capsys, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    assert exits.exit_code(tiny_run.run, short(tmp_path / "run", num_steps=2)) == 0
    capsys.readouterr()
    monkeypatch.setattr("vdiff.train.checkpoint.write_manifest", full)
    assert exits.exit_code(tiny_run.run, short(tmp_path / "run", num_steps=4, override=True)) == 1
    line = capsys.readouterr().err
    assert (
        "failed checkpoint" in line
        and "checkpoints/4: could not be written (no space left on the disk)" in line
    )
    assert "the one of step 2 is as it was" in line and line.count("\n") == 1
    assert vd.saved_steps(tmp_path / "run/checkpoints") == [2]


def test_divergence_ends_with_code_3(tmp_path, capsys):
    config = vae.Config(
        run_dir=tmp_path / "run",
        hidden=(8,),
        latent_dim=2,
        likelihood="logistic",
        learning_rate=1e30,
        num_steps=20,
        log_every=2,
        checkpoint_every=2,
        max_skips=3,
    )
    with jax.numpy_dtype_promotion("standard"):
        assert exits.exit_code(vae.run, config) == 3
    assert "diverged step" in capsys.readouterr().err


def test_unknown_flags_and_presets_exit_with_code_2():
    for arguments in (
        ["digits", "--no-such-flag", "1"],
        ["no_such_preset"],
        ["digits", "--parallel", "magic"],
    ):
        command = [sys.executable, "-m", "experiments.vae", *arguments]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
        assert done.returncode == 2
        assert arguments[-2 if len(arguments) > 1 else -1].strip("-") in (done.stdout + done.stderr)


SIGNALS = [
    (
        signal.SIGTERM,
        ["experiments.vae", "smoke", "--hidden", "16", "--eval-samples", "2", "--eval-images", "20"],
    ),
    (signal.SIGINT, ["tests.tiny_run", "tiny", "--pause", "0.01"]),
]


@pytest.mark.slow
@pytest.mark.parametrize(("number", "experiment"), SIGNALS)
def test_a_signal_saves_and_the_same_command_goes_on_exactly(number, experiment, tmp_path):
    def command(directory):
        flags = ["--num-steps", "300", "--log-every", "5", "--checkpoint-every", "100000"]
        return [sys.executable, "-m", *experiment, *flags, "--run-dir", str(directory)]

    process = subprocess.Popen(command(tmp_path / "a"), cwd=ROOT, stderr=subprocess.PIPE, text=True)
    rows = tmp_path / "a/metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (rows.exists() and rows.read_text().count("\n") > 3):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(process.pid, number)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 128 + number
    assert "stopped" in stderr
    step = vd.latest_step(tmp_path / "a/checkpoints")
    assert 0 < step < 300

    for directory in ("a", "b"):
        done = subprocess.run(
            command(tmp_path / directory), cwd=ROOT, capture_output=True, text=True, timeout=240
        )
        assert done.returncode == 0, done.stderr
    resumed, straight = (json.loads((tmp_path / d / "result.json").read_text()) for d in ("a", "b"))
    assert resumed["params_digest"] == straight["params_digest"]
    assert resumed["metrics"] == straight["metrics"]
    steps = [json.loads(line)["step"] for line in rows.read_text().splitlines()]
    assert steps == sorted(set(steps))


@pytest.mark.slow
def test_a_second_signal_stops_at_once(tmp_path):
    """In the middle of a step, without saving; the code is the signal's."""
    command = [
        sys.executable,
        "-m",
        "tests.tiny_run",
        "tiny",
        "--pause",
        "4",
        "--run-dir",
        str(tmp_path / "run"),
    ]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    rows, deadline = tmp_path / "run/metrics.jsonl", time.monotonic() + 120
    while not (rows.exists() and rows.read_text().count("\n") == 1):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGTERM)
    time.sleep(0.3)
    assert process.poll() is None
    os.kill(process.pid, signal.SIGTERM)
    began = time.monotonic()
    _, stderr = process.communicate(timeout=60)
    assert time.monotonic() - began < 3
    assert process.returncode == 143
    assert stderr.splitlines() == ["stopped at once; the same command goes on from the last checkpoint"]
    assert vd.latest_step(tmp_path / "run/checkpoints") is None


@pytest.mark.parametrize(
    ("num_processes", "error", "said"),
    [
        (
            1,
            jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\n more"),
            "--accumulate N",
        ),
        (
            2,
            jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes."),
            "9 bytes.); --acc",
        ),
        (
            2,
            jax.errors.JaxRuntimeError("INTERNAL: Gloo all-reduce failed: Connection closed"),
            "another process",
        ),
        (
            2,
            jax.errors.JaxRuntimeError("UNAVAILABLE: The coordination service cannot be reached"),
            "another process",
        ),
        (2, jax.errors.JaxRuntimeError("INTERNAL: something else"), "Traceback"),
        (2, RuntimeError("coordination of something else"), "Traceback"),
        (1, RuntimeError("something else"), None),
    ],
)
def test_what_is_at_fault_is_said(monkeypatch, capfd, num_processes, error, said):
    def experiment(config):
        raise error

    monkeypatch.setattr(jax, "process_count", lambda: num_processes)
    if said is None:
        with pytest.raises(RuntimeError, match="something else"):
            exits.exit_code(experiment, runs.RunConfig())
        return
    assert exits.exit_code(experiment, runs.RunConfig()) == 1
    printed = capfd.readouterr().err
    assert said in printed
    assert ("another process" in said) == ("another process" in printed)
    assert (said == "Traceback") == (len(printed.splitlines()) > 1)
