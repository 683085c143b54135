"""A run directory belongs to one run; every kind of bad input is refused in one line with exit code 2."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

import vdiff as vd
from experiments import exits, gmm, runs, settings, vae
from tests import tiny_run


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
    assert exits.exit_code(experiment, config) == 2
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
        ({"checkpoint_every": 1}, "checkpoint_every: got 1, expected at least 2"),
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
    assert exits.exit_code(vae.run, tiny(tmp_path / "run")) == 0
    capsys.readouterr()
    before = files(tmp_path)
    assert "holds another run (seed 0 -> 1)" in refused(tiny(tmp_path / "run", seed=1), capsys)
    assert files(tmp_path) == before


def short(directory, **changes):
    return tiny_run.Config(run_dir=directory, **({"num_steps": 4, "checkpoint_every": 4} | changes))


def test_what_is_refused_leaves_a_new_directory_to_other_settings(tmp_path, capsys):
    """A batch that cannot be cut is found when the step is there; the next command is no other run."""
    line = refused(short(tmp_path / "run", batch_size=6, accumulate=4), capsys, tiny_run.run)
    assert "got 6 data" in line and "use a batch size of 4 or 8" in line and files(tmp_path) == {}
    asked = short(tmp_path / "run", batch_size=8, accumulate=4, resume="never")
    assert exits.exit_code(tiny_run.run, asked) == 0


def test_a_damaged_checkpoint_is_passed_over_and_said_so(tmp_path, capsys):
    """And kept: the run goes on from the one before, to the same end."""
    assert exits.exit_code(tiny_run.run, short(tmp_path / "run")) == 0
    capsys.readouterr()
    digest = json.loads((tmp_path / "run/result.json").read_text())["params_digest"]
    damaged = tmp_path / "run/checkpoints/4"
    largest = max(damaged.rglob("*"), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:100])
    before = list(files(damaged).values())
    assert exits.exit_code(tiny_run.run, short(tmp_path / "run")) == 0
    out = capsys.readouterr().out
    assert (
        f"note checkpoint {damaged} is damaged and was skipped: {largest.relative_to(damaged)} is not" in out
    )
    assert "resuming at step 2 of 4" in out
    assert json.loads((tmp_path / "run/result.json").read_text())["params_digest"] == digest
    assert list(files(tmp_path / "run/checkpoints/4.damaged-1").values()) == before


def test_a_run_without_a_whole_checkpoint_is_refused_and_kept(tmp_path, capsys):
    assert exits.exit_code(tiny_run.run, short(tmp_path / "run")) == 0
    for step in (2, 4):
        (tmp_path / f"run/checkpoints/{step}/manifest.json").unlink()
    capsys.readouterr()
    before = files(tmp_path)
    line = refused(short(tmp_path / "run"), capsys, tiny_run.run)
    assert "no checkpoint is whole (4: manifest.json is missing; 2: manifest.json is missing)" in line
    assert files(tmp_path) == before


def test_other_settings_are_shown_and_taken_on_with_override(tmp_path, capsys):
    assert exits.exit_code(tiny_run.run, short(tmp_path / "run")) == 0
    first = (tmp_path / "run/config.json").read_bytes()
    capsys.readouterr()
    asked = short(tmp_path / "run", num_steps=6, learning_rate=1e-4)
    assert exits.exit_code(tiny_run.run, asked) == 2
    out = capsys.readouterr().out
    assert "num_steps" in out and "- 4" in out and "+ 6" in out and "+ 0.0001" in out and "seed" not in out
    assert exits.exit_code(tiny_run.run, dataclasses.replace(asked, override=True)) == 0
    out = capsys.readouterr().out
    assert (
        f"those before are kept in {tmp_path}/run/config.before-1.json" in out
        and "resuming at step 4 of 6" in out
    )
    assert (tmp_path / "run/config.before-1.json").read_bytes() == first
    results = [json.loads((tmp_path / f"run/result{n}.json").read_text()) for n in (".before-1", "")]
    assert results[0]["params_digest"] != results[1]["params_digest"]
    assert json.loads((tmp_path / "run/config.json").read_text())["num_steps"] == 6
    assert exits.exit_code(tiny_run.run, asked) == 0


def test_an_override_that_the_state_does_not_fit_changes_nothing(tmp_path, capsys):
    assert exits.exit_code(tiny_run.run, short(tmp_path / "run")) == 0
    capsys.readouterr()
    before = files(tmp_path)
    line = refused(short(tmp_path / "run", width=5, override=True), capsys, tiny_run.run)
    assert "another model's state" in line
    assert files(tmp_path) == before
