"""A run directory belongs to one run; every kind of bad input is refused in one line with exit code 2."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

import vdiff as vd
from experiments import gmm, runs, settings, vae
from tests import tiny_run

ROOT = Path(__file__).parents[2]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(runs.RunConfig):
    width: int = 3


def tiny(directory, **changes):
    of_it = {"hidden": (8,), "latent_dim": 2, "num_steps": 4, "eval_samples": 3, "eval_images": 20}
    of_it |= {"run_dir": directory, "log_every": 2, "checkpoint_every": 2, "likelihood": "logistic"}
    return vae.Config(**(of_it | changes))


def files(directory):
    return {str(p): p.read_bytes() for p in sorted(Path(directory).rglob("*")) if p.is_file()}


def refused(config, capsys, experiment=vae.run):
    """Run, expect exit code 2, and return the one line it printed."""
    assert runs.exit_code(experiment, config) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("refused ")
    return lines[0]


def begin(config):
    """Do what a run does first."""
    settings.record(config, runs.open_run(config))


def test_open_run_finds_a_run_again(tmp_path):
    """And makes one no sooner than its settings are recorded: an empty directory is nobody's."""
    config = Config(run_dir=tmp_path / "run")
    for width in (4, 3):
        assert runs.open_run(dataclasses.replace(config, width=width)) == tmp_path / "run"
        assert files(tmp_path) == {}
    begin(config)
    assert json.loads((tmp_path / "run/config.json").read_text())["width"] == 3
    assert runs.open_run(config) == tmp_path / "run"


def test_open_run_refuses_another_run_and_names_what_differs(tmp_path):
    begin(Config(run_dir=tmp_path / "run"))
    before = files(tmp_path)
    runs.open_run(Config(run_dir=tmp_path / "run", width=4, override=True))
    with pytest.raises(ValueError, match=r"holds another run \(width 3 -> 4\).*--override"):
        runs.open_run(Config(run_dir=tmp_path / "run", width=4))
    assert files(tmp_path) == before


def test_a_closer_look_is_the_same_run_and_another_clip_is_not(tmp_path):
    """Also where the run began before it could be set."""
    begin(Config(run_dir=tmp_path / "run"))
    runs.open_run(Config(run_dir=tmp_path / "run", debug_nans=True, max_skips=3))
    record = tmp_path / "run/config.json"
    saved = json.loads(record.read_text())
    assert saved.pop("clip") == 200.0 and "max_skips" not in saved
    for content in (saved, saved | {"clip": 200.0}):
        record.write_text(json.dumps(content))
        runs.open_run(Config(run_dir=tmp_path / "run"))
        with pytest.raises(ValueError, match=r"another run \(clip 200.0 -> 1.0\)"):
            runs.open_run(Config(run_dir=tmp_path / "run", clip=1.0))


def test_open_run_refuses_a_folder_of_other_files(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(ValueError, match="holds files but no run"):
        runs.open_run(Config(run_dir=tmp_path))
    assert files(tmp_path) == {str(tmp_path / "thesis.tex"): b"precious"}


def test_open_run_obeys_resume(tmp_path):
    with pytest.raises(ValueError, match="got must, but .* holds no run"):
        runs.open_run(Config(run_dir=tmp_path / "run", resume="must"))
    begin(Config(run_dir=tmp_path / "run", resume="never"))
    with pytest.raises(ValueError, match="got never, but .* holds a run"):
        runs.open_run(Config(run_dir=tmp_path / "run", resume="never"))
    runs.open_run(Config(run_dir=tmp_path / "run", resume="must"))


def test_open_run_refuses_a_damaged_record_but_to_replace_it(tmp_path, capsys):
    begin(Config(run_dir=tmp_path / "run"))
    (tmp_path / "run/config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json: got a damaged file, expected JSON"):
        runs.open_run(Config(run_dir=tmp_path / "run"))
    assert "note" not in capsys.readouterr().out
    runs.open_run(Config(run_dir=tmp_path / "run", override=True))
    assert f"note {tmp_path}/run/config.json is damaged" in capsys.readouterr().out
    assert (tmp_path / "run/config.json").read_text() == "{"


def test_check_settings():
    runs.check_settings(Config(seed=0))
    for changes, line in [
        ({"batch_size": 0}, "batch_size: got 0, expected at least 1"),
        ({"width": -1}, "width: got -1"),
        ({"seed": -1}, "seed: got -1, expected at least 0"),
        ({"learning_rate": 0.0}, "learning_rate: got 0.0, expected a positive number"),
        ({"learning_rate": float("nan")}, "learning_rate: got nan"),
        ({"clip": 0.0}, "clip: got 0.0, expected a positive norm"),
        ({"clip": float("nan")}, "clip: got nan"),
        ({"max_skips": 0}, "max_skips: got 0, expected at least 1"),
        ({"accumulate": 0}, "accumulate: got 0, expected at least 1"),
        (
            {"split_features": 2},
            "split_features: got 2 with parallel jit, .* expected 1; use --parallel fsdp",
        ),
    ]:
        with pytest.raises(ValueError, match=line):
            runs.check_settings(Config(**changes))


def test_digest_sees_names_shapes_and_bits():
    a = vd.Params(theta={"w": np.ones((2, 3), np.float32)})
    same = vd.Params(theta={"w": np.ones((2, 3), np.float32)})
    others = [
        vd.Params(phi={"w": np.ones((2, 3), np.float32)}),
        vd.Params(theta={"v": np.ones((2, 3), np.float32)}),
        vd.Params(theta={"w": np.ones((3, 2), np.float32)}),
        vd.Params(theta={"w": np.nextafter(np.ones((2, 3), np.float32), np.float32(2))}),
    ]
    assert runs.digest(a) == runs.digest(same)
    assert len({runs.digest(p) for p in [a, *others]}) == 5


def _save(path, **arrays):
    np.savez(path, **arrays)
    return str(path)


IMAGES = np.random.default_rng(0).integers(0, 256, (60, 6, 6), dtype=np.uint8)


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (lambda d: "nonsense", "data set: got 'nonsense', expected one of digits, mnist"),
        (lambda d: str(d / "absent.npz"), "absent.npz"),
        (lambda d: _save(d / "a.npz", train=IMAGES[0]), "shape"),
        (lambda d: _save(d / "a.npz", train=IMAGES.astype(np.complex64)), "complex64"),
        (lambda d: _save(d / "a.npz", train=np.where(IMAGES == IMAGES[3, 2, 1], np.nan, 0.5)), "got nan"),
        (lambda d: _save(d / "a.npz", train=IMAGES.astype(np.int32) + 1), "got 256"),
    ],
)
def test_bad_data_is_refused(make, line, tmp_path, capsys):
    assert line in refused(tiny(tmp_path / "run", data=make(tmp_path)), capsys)
    assert not (tmp_path / "run").exists()


def test_a_truncated_data_file_is_refused(tmp_path, capsys):
    path = Path(_save(tmp_path / "a.npz", train=IMAGES))
    path.write_bytes(path.read_bytes()[:200])
    before = path.read_bytes()
    assert "a.npz" in refused(tiny(tmp_path / "run", data=str(path)), capsys)
    assert path.read_bytes() == before


def test_settings_that_cannot_be_are_refused(tmp_path, capsys):
    assert "latent_dim: got 0" in refused(tiny(tmp_path / "run", latent_dim=0), capsys)
    assert "eval_images: got 0" in refused(tiny(tmp_path / "run", eval_images=0), capsys)
    config = dataclasses.replace(gmm.PRESETS["smoke"][1], run_dir=tmp_path / "run", num_components=0)
    assert "num_components: got 0" in refused(config, capsys, gmm.run)
    assert not (tmp_path / "run").exists()


def test_another_run_is_refused_and_kept(tmp_path, capsys):
    assert runs.exit_code(vae.run, tiny(tmp_path / "run")) == 0
    capsys.readouterr()
    before = files(tmp_path)
    assert "holds another run (seed 0 -> 1)" in refused(tiny(tmp_path / "run", seed=1), capsys)
    assert files(tmp_path) == before


def short(directory, **changes):
    return tiny_run.Config(run_dir=directory, **({"num_steps": 4, "checkpoint_every": 2} | changes))


def test_what_is_refused_leaves_a_new_directory_to_other_settings(tmp_path, capsys):
    """A batch that cannot be cut is found when the step is there; the next command is no other run."""
    line = refused(short(tmp_path / "run", batch_size=6, accumulate=4), capsys, tiny_run.run)
    assert "got 6 data" in line and "use a batch size of 4 or 8" in line and files(tmp_path) == {}
    asked = short(tmp_path / "run", batch_size=8, accumulate=4, resume="never")
    assert runs.exit_code(tiny_run.run, asked) == 0


def test_a_damaged_checkpoint_is_passed_over_and_said_so(tmp_path, capsys):
    """And kept: the run goes on from the one before, to the same end."""
    assert runs.exit_code(tiny_run.run, short(tmp_path / "run")) == 0
    capsys.readouterr()
    digest = json.loads((tmp_path / "run/result.json").read_text())["params_digest"]
    damaged = tmp_path / "run/checkpoints/4"
    largest = max(damaged.rglob("*"), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:100])
    before = list(files(damaged).values())
    assert runs.exit_code(tiny_run.run, short(tmp_path / "run")) == 0
    out = capsys.readouterr().out
    assert (
        f"note checkpoint {damaged} is damaged and was skipped: {largest.relative_to(damaged)} is not" in out
    )
    assert "resuming at step 2 of 4" in out
    assert json.loads((tmp_path / "run/result.json").read_text())["params_digest"] == digest
    assert list(files(tmp_path / "run/checkpoints/4.damaged-1").values()) == before


def test_a_run_without_a_whole_checkpoint_is_refused_and_kept(tmp_path, capsys):
    assert runs.exit_code(tiny_run.run, short(tmp_path / "run")) == 0
    for step in (2, 4):
        (tmp_path / f"run/checkpoints/{step}/manifest.json").unlink()
    capsys.readouterr()
    before = files(tmp_path)
    line = refused(short(tmp_path / "run"), capsys, tiny_run.run)
    assert "no checkpoint is whole (4: manifest.json is missing; 2: manifest.json is missing)" in line
    assert files(tmp_path) == before


def test_other_settings_are_shown_and_taken_on_with_override(tmp_path, capsys):
    assert runs.exit_code(tiny_run.run, short(tmp_path / "run")) == 0
    first = (tmp_path / "run/config.json").read_bytes()
    capsys.readouterr()
    asked = short(tmp_path / "run", num_steps=6, learning_rate=1e-4)
    assert runs.exit_code(tiny_run.run, asked) == 2
    out = capsys.readouterr().out
    assert "num_steps" in out and "- 4" in out and "+ 6" in out and "+ 0.0001" in out and "seed" not in out
    assert runs.exit_code(tiny_run.run, dataclasses.replace(asked, override=True)) == 0
    out = capsys.readouterr().out
    assert (
        f"those before are kept in {tmp_path}/run/config.before-1.json" in out
        and "resuming at step 4 of 6" in out
    )
    assert (tmp_path / "run/config.before-1.json").read_bytes() == first
    results = [json.loads((tmp_path / f"run/result{n}.json").read_text()) for n in (".before-1", "")]
    assert results[0]["params_digest"] != results[1]["params_digest"]
    assert json.loads((tmp_path / "run/config.json").read_text())["num_steps"] == 6
    assert runs.exit_code(tiny_run.run, asked) == 0


def test_an_override_that_the_state_does_not_fit_changes_nothing(tmp_path, capsys):
    assert runs.exit_code(tiny_run.run, short(tmp_path / "run")) == 0
    capsys.readouterr()
    before = files(tmp_path)
    line = refused(short(tmp_path / "run", width=5, override=True), capsys, tiny_run.run)
    assert "another model's state" in line
    assert files(tmp_path) == before


def test_a_disk_that_takes_no_more_ends_with_code_1(tmp_path, capsys, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    assert runs.exit_code(tiny_run.run, short(tmp_path / "run", num_steps=2)) == 0
    capsys.readouterr()
    monkeypatch.setattr("vdiff.train.checkpoint.write_manifest", full)
    assert runs.exit_code(tiny_run.run, short(tmp_path / "run", num_steps=4, override=True)) == 1
    line = capsys.readouterr().err
    assert (
        "failed checkpoint" in line
        and "checkpoints/4: could not be written (no space left on the disk)" in line
    )
    assert "the one of step 2 is as it was" in line and line.count("\n") == 1
    assert vd.saved_steps(tmp_path / "run/checkpoints") == [2]


def test_divergence_ends_with_code_3(tmp_path, capsys):
    with jax.numpy_dtype_promotion("standard"):
        assert (
            runs.exit_code(vae.run, tiny(tmp_path / "run", learning_rate=1e30, num_steps=20, max_skips=3))
            == 3
        )
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
        flags = ["--num-steps", "600", "--log-every", "5", "--checkpoint-every", "100000"]
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
    assert 0 < step < 600

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
            runs.exit_code(experiment, Config())
        return
    assert runs.exit_code(experiment, Config()) == 1
    printed = capfd.readouterr().err
    assert said in printed
    assert ("another process" in said) == ("another process" in printed)
    assert (said == "Traceback") == (len(printed.splitlines()) > 1)
