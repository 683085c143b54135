"""Experiments on data that stay on disk: read batch by batch, resumed at the same bits, refused where all is needed."""

import dataclasses

import numpy as np
import pytest

import vdiff as vd
from experiments import exits, gmm, pixels, runs, training, vae

IMAGES = np.random.default_rng(0).integers(0, 256, (300, 4, 4), np.uint8)
WRITERS = {"shards": vd.data.write_shards, "records": vd.data.write_records}


def config_of(directory, data, **changes):
    settings = {"hidden": (8,), "latent_dim": 2, "num_steps": 12, "eval_samples": 2, "eval_images": 10}
    settings |= {"likelihood": "logistic", "batch_size": 32, "log_every": 4, "checkpoint_every": 4}
    return vae.Config(run_dir=directory, data=str(data), **(settings | changes))


def trained(config, *, crash_at=None):
    """Train, with a hook that fails at a step if one is given; returns the digest."""

    def crash(step, state, metrics):
        if step == crash_at:
            raise ConnectionError

    problem = vae.build(config)
    directory = runs.open_run(config)
    objective = vae.objective_of(config, problem)
    hooks = (vd.Hook(2, crash),)
    state = training.train(config, directory, problem.model, objective, problem.dataset.train, hooks=hooks)
    return runs.digest(state.params), int(state.step)


@pytest.mark.slow
def test_a_run_from_disk_goes_on_at_the_same_bits_whatever_the_files(tmp_path):
    digests = {}
    for name, write in WRITERS.items():
        write(tmp_path / name, IMAGES)
        config = config_of(tmp_path / f"run-{name}", tmp_path / name)
        with pytest.raises(ConnectionError):
            trained(config, crash_at=10)
        # Twelve batches of 32 of 270 images: the ninth, after the restart, has the end of the first epoch.
        assert vd.latest_step(config.run_dir / "checkpoints") == 8
        digests[name], step = trained(config)
        assert step == 12
        straight, _ = trained(dataclasses.replace(config, run_dir=tmp_path / f"straight-{name}"))
        assert digests[name] == straight
    assert len(set(digests.values())) == 1
    # In memory, the same data are shuffled by NumPy: another run.
    np.save(tmp_path / "mine.npy", IMAGES)
    in_memory, _ = trained(config_of(tmp_path / "run-memory", tmp_path / "mine.npy"))
    assert in_memory not in digests.values()


@pytest.mark.slow
def test_a_run_from_disk_is_judged_and_pictured(tmp_path):
    vd.data.write_shards(tmp_path / "mine/train", IMAGES[:250])
    vd.data.write_shards(tmp_path / "mine/test", IMAGES[250:])
    np.save(tmp_path / "mine/test_labels.npy", np.arange(50) % 10)
    result = vae.run(config_of(tmp_path / "run", tmp_path / "mine"))
    assert result["metrics"]["log_prob"]["num_data"] == 10
    assert (tmp_path / "run/samples.png").stat().st_size > 1000


def test_a_shard_lost_in_training_is_refused_and_the_run_kept(tmp_path, capsys):
    paths = vd.data.write_shards(tmp_path / "mine", IMAGES, rows_per_shard=10)
    config = config_of(tmp_path / "run", tmp_path / "mine")
    built = vae.build

    def build(config):
        problem = built(config)
        for path in paths[10:]:
            path.unlink()
        return problem

    def experiment(config):
        problem = build(config)
        objective = vae.objective_of(config, problem)
        training.train(config, runs.open_run(config), problem.model, objective, problem.dataset.train)

    assert exits.exit_code(experiment, config) == 2
    line = capsys.readouterr().err.strip()
    assert "cannot be read any more" in line and "the same command goes on" in line and "\n" not in line


@pytest.mark.parametrize(
    ("experiment", "changes", "line"),
    [
        (
            vae,
            {"binarization": "fixed"},
            "binarization: got fixed for .* which stays on disk, .*; use dynamic",
        ),
        (gmm, {}, "data: got .*, which stays on disk, expected data in memory, .*; use an .npy or .npz"),
    ],
)
def test_what_needs_all_data_at_once_is_refused(experiment, changes, line, tmp_path):
    vd.data.write_shards(tmp_path / "mine", IMAGES)
    preset = experiment.PRESETS["smoke"][1]
    config = dataclasses.replace(preset, data=str(tmp_path / "mine"), run_dir=tmp_path / "run", **changes)
    with pytest.raises(exits.Refused, match=line):
        experiment.run(config)
    assert not (tmp_path / "run").exists()


def test_a_models_start_looks_at_all_in_memory_and_at_some_on_disk():
    asked = []
    rows = vd.data.Rows((10**9, 1), np.dtype(np.uint8), lambda i: asked.append(i) or np.zeros((len(i), 1)))
    assert pixels.looked_at(IMAGES) is IMAGES
    assert pixels.looked_at(rows, at_most=5).shape == (5, 1)
    assert asked[0].tolist() == [0, 249_999_999, 499_999_999, 749_999_999, 999_999_999]
    few = vd.data.Rows(IMAGES.shape, IMAGES.dtype, lambda indices: IMAGES[indices])
    assert (pixels.looked_at(few) == IMAGES).all()
