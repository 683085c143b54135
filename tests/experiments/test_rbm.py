"""A restricted Boltzmann machine in an experiment: trained, and judged on the VAE's bits by a log Z that is right."""

import json

import jax
import numpy as np
import pytest

import vdiff as vd
from experiments import exits, rbm, runs, training, vae
from vdiff import baselines

pytestmark = pytest.mark.slow


def config_of(directory, **changes):
    settings = {"num_hidden": 12, "num_steps": 120, "learning_rate": 0.3, "eval_images": 60, "num_sweeps": 2}
    settings |= {"temperatures": 100, "chains": 100, "sample_sweeps": 100, "batch_size": 32}
    return rbm.Config(run_dir=directory, log_every=3, checkpoint_every=60, **(settings | changes))


def test_it_trains_and_its_log_prob_is_the_exact_one(tmp_path):
    config = config_of(tmp_path / "run")
    result = rbm.run(config)
    metrics = result["metrics"]
    assert json.loads((tmp_path / "run/result.json").read_text()) == json.loads(json.dumps(result))

    # Pixels that know nothing of each other, on the same bits, and the machine that the checkpoint holds, by the sum.
    problem = rbm.build(config)
    key_test = runs.keys_of(config.seed).test
    transform = vae.build(vae.Config(likelihood="bernoulli")).transform
    test = training.transformed(transform, key_test, problem.dataset.test[:60])
    chains = np.zeros((32, 8, 8, 1), np.uint8)
    like = vd.init_state(jax.random.key(0), problem.model, rbm.optimizer_of(config), aux=chains)
    state = vd.restore(tmp_path / "run/checkpoints", like)
    free_energy = jax.jit(jax.vmap(problem.model.free_energy, in_axes=(None, 0)))

    def exact(params):
        log_z = jax.jit(baselines.exact_log_partition(problem.model))(params)
        return float(np.mean(-free_energy(params, test)) - log_z)

    assert metrics["log_prob_exact"]["value"] == pytest.approx(exact(state.ema), abs=1e-3)
    assert exact(state.ema) > exact(like.params) + 0.5
    for name, log_z in (("log_prob", "log_z"), ("log_prob_reverse", "log_z_reverse")):
        found = metrics[name]
        assert set(found) == {"value", "std_error", "unit", "bound", "num_data"} and found["num_data"] == 60
        gap = abs(found["value"] - metrics["log_prob_exact"]["value"])
        assert gap < 5 * metrics[log_z]["std_error"] < 0.5
        assert found["std_error"] > metrics["log_prob_exact"]["std_error"]
    assert set(np.unique(state.aux)) == {0, 1}
    assert metrics["k_hat_log_z"]["value"] < 0.7 and metrics["k_hat_log_z_reverse"]["value"] < 0.7

    page = (tmp_path / "run/report.html").read_text()
    assert f"of 100 chains, k-hat {metrics['k_hat_log_z']['value']:.2f}" in page
    assert page.count("data:image/png;base64,") == 4
    rows = vd.report.load_metrics(tmp_path / "run/metrics.jsonl")
    assert {"free_energy_difference", "test_log_prob"} <= set().union(*rows)


def test_contrastive_chains_start_at_the_data(tmp_path):
    """A step of CD keeps nothing for the next."""
    config = config_of(tmp_path / "run", algorithm="contrastive")
    problem = rbm.build(config)
    optimizer = rbm.optimizer_of(config)
    step = vd.jit_step(vd.make_train_step(problem.objective, optimizer, batching=problem.batching))
    start = vd.init_state(jax.random.key(0), problem.model, optimizer)
    state, metrics = step(start, (problem.dataset.train[:32] > 8).astype(np.int32))
    assert state.aux == () and set(metrics) >= {"free_energy_difference", "objective"}


def test_one_chain_is_refused(tmp_path, capsys):
    assert exits.exit_code(rbm.run, config_of(tmp_path / "run", chains=1)) == 2
    assert "num_chains: got 1, expected at least 2" in capsys.readouterr().err


def test_the_presets_are_legal():
    for _, config in rbm.PRESETS.values():
        runs.check_settings(config)
