"""Finished runs of a yardstick judged again: their own parameters, on their own bits, by two estimates."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vdiff as vd
from experiments import annealing, exits, exporting, judging, runs, settings, training, vae, yardstick

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A yardstick whose VAE is done, as far as can be seen: at its start, with decoder weights that matter."""
    directory = tmp_path_factory.mktemp("yardstick")
    [family] = [made for made in yardstick.families_of(yardstick.PRESETS["smoke"][1]) if made.name == "vae"]
    run_dir = directory / "vae"
    run_dir.mkdir()
    config = dataclasses.replace(family.config, run_dir=run_dir)
    settings.record(config, run_dir)
    (run_dir / "result.json").write_text(json.dumps({"metrics": {}}))
    problem = vae.build(config)
    params = problem.model.init(jax.random.key(3))
    params = params._replace(theta=jax.tree.map(lambda leaf: 2.0 * leaf, params.theta))
    state = vd.TrainState(jnp.int32(0), params, params, (), jax.random.key(0))
    exporting.export_model(config, run_dir, state, problem.model, 50, problem.dataset.test[0])
    return directory, problem, params


def test_annealing_finds_what_many_draws_find(directory):
    pytest.importorskip("blackjax")
    directory, problem, params = directory
    config = annealing.Config(run_dir=directory, size="smoke", families=("vae", "ladder"), num_images=6)
    [(label, judged)] = annealing.run(dataclasses.replace(config, num_steps=30))
    assert label == "VAE, ELBO" and judged.step_size in config.step_sizes

    test = training.transformed(problem.transform, runs.keys_of(0).test, problem.dataset.test[:6])
    many = judging.estimate_log_prob(problem.model, 20_000, jax.random.key(1), params, test).value
    assert abs(judged.annealed.mean - np.mean(many)) < 0.3
    few = judging.estimate_log_prob(problem.model, 50, runs.keys_of(0).judge, params, test).value
    assert judged.importance.mean == pytest.approx(np.mean(few), rel=1e-5)
    assert judged.difference.mean == pytest.approx(judged.annealed.mean - judged.importance.mean, abs=1e-5)
    assert judged.gap.mean > -3 * judged.gap.std_error
    assert re.fullmatch(r"ESS \d+ of 50 draws, k-hat above 0.7 for [\d.]+%", judged.weights)
    assert re.fullmatch(r"ESS [1-4]\.\d of 4", judged.chains)
    table = (directory / "annealing.md").read_text()
    assert table.count("\n") == 3 and f"| {judged.weights} |" in table and "| VAE, ELBO | 6 |" in table


def test_a_step_size_that_cannot_be_is_refused_before_any_work(directory, capsys):
    pytest.importorskip("blackjax")
    config = annealing.Config(run_dir=directory[0], size="smoke", step_sizes=(0.1, -0.1))
    assert exits.exit_code(annealing.run, config) == 2
    assert "step_size: got -0.1" in capsys.readouterr().err


def test_no_step_size_is_refused(directory, capsys):
    config = annealing.Config(run_dir=directory[0], size="smoke", step_sizes=())
    assert exits.exit_code(annealing.run, config) == 2
    assert "step_sizes: got none" in capsys.readouterr().err


def test_without_a_finished_run_it_says_how_to_make_one(tmp_path, capsys):
    config = annealing.Config(run_dir=tmp_path, size="smoke", families=("hvae", "ladder"))
    assert exits.exit_code(annealing.run, config) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "expected finished runs of hvae, ladder" in said and "--families hvae ladder" in said
