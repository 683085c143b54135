"""The README's programs run as they stand, and what it says exists does."""

import dataclasses
import re
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments import vae

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.S)


def test_the_first_program_trains_and_its_pmap_lines_go_on(capsys):
    names = {}
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        exec(BLOCKS[0], names)
        nats = float(re.match(r"(-[\d.]+) nats per image", capsys.readouterr().out)[1])
        # Better than pixels that know nothing of each other, worse than memory.
        assert _independent_pixels(names["images"], names["test"]) + 20 < nats < 0
        exec(BLOCKS[1], names)
    assert int(names["state"].step) == 2000


def _independent_pixels(train, test):
    levels = np.arange(17)
    frequency = (train[..., None] == levels).mean(0) + 1e-3
    log_p = np.log(frequency / frequency.sum(-1, keepdims=True))
    return np.mean(np.sum((test[..., None] == levels) * log_p, axis=(1, 2, 3, 4)))


def test_the_users_own_model_gives_a_gradient_by_part():
    names = {}
    exec(BLOCKS[2], names)
    gradient = names["gradient"]
    assert np.isfinite(float(names["nats"]))
    for part in (gradient.theta, gradient.phi, gradient.lam):
        assert any(np.any(leaf != 0) for leaf in jax.tree.leaves(part))


def test_the_guide_to_estimators_runs(capsys):
    """Its programs in their order, in one namespace."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/estimators.md").read_text(), flags=re.S)
    names = {}
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        for block in blocks:
            exec(block, names)
        key, x = jax.random.key(3), names["x"]
        for model, objectives in {
            "vae": ["dreg", "miwae", "piwae", "combined"],
            "sbn": ["vimco", "rws"],
            "of_nvil": ["nvil"],
            "of_rebar": ["rebar", "fixed"],
            "relaxed_model": ["biased_in_the_model"],
        }.items():
            params = names[model].init(key)
            for objective in objectives:
                gradient = jax.grad(names["vd"].total(names[objective]), argnums=1)(key, params, x)
                assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(gradient)), objective
        for model in ("better", "bent"):
            assert np.isfinite(names[model].elbo_estimate(key, names[model].init(key), x))
    assert names["nats"].shape == (2,) and np.all(np.isfinite(names["nats"]))
    printed = capsys.readouterr().out
    assert "log_q" in printed and "snr" in printed and "FAIL" not in printed


def names_of(directory):
    return {path.name for path in directory.iterdir()}


def run_guide(name):
    """Run a page's programs in their order, in one namespace, and return it."""
    names = {}
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        for block in re.findall(r"```python\n(.*?)```", (ROOT / "docs" / name).read_text(), flags=re.S):
            exec(block, names)
    return names


def test_the_readmes_centrepiece_holds(capsys):
    """The diffusion loss is the ELBO of the path."""
    exec(BLOCKS[3], {})
    assert abs(float(capsys.readouterr().out.split()[0])) < 5


def test_the_guide_to_diffusion_runs(capsys):
    names = run_guide("diffusion.md")
    assert int(names["state"].step) == 20 and np.all(np.isfinite(names["nats"].value))
    assert names["image"].shape == names["shape"] and names["path"].shape == (10, *names["shape"])
    assert set(names["terms"]) == {"prior", "reconstruction", "diffusion"}
    assert "prior_diffusion" in capsys.readouterr().out


def test_the_guide_to_samplers_runs(capsys):
    """It draws what the page says."""
    names = run_guide("samplers.md")
    std, gap = capsys.readouterr().out.split("\n")[:2]
    assert abs(float(std) - 0.25) < 0.005
    # On a Gaussian the optimal variance loses nothing but what the measured error is off by.
    assert abs(float(gap.split()[0])) < 0.05
    keys, params = jax.random.split(jax.random.key(9), 2000), names["params"]
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        for name, std in (("careful", 0.25), ("clipped", 0.25), ("thresholded", 0.25)):
            x = jax.jit(jax.vmap(names[name].sample, in_axes=(0, None)))(keys, params)[0]
            assert abs(np.std(x) - std) < 0.05, name
        np.testing.assert_array_equal(names["x"][:2], names["known"][:2])
        with pytest.raises(ValueError, match="as it was trained"):
            names["halved"].elbo_estimate(keys[0], params, names["x"])


def test_the_guide_to_the_likelihood_runs():
    """Its numbers are what they are called."""
    names = run_guide("likelihood.md")
    key, params, y = jax.random.key(0), names["params"], names["y"]
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        for log_prob in ("cheap", "careful"):
            # Dimensions are independent, so that probes are exact too.
            assert abs(names[log_prob](key, params, y) - names["nats"][0]) < 1e-4
        narrow = names["narrow"](key, names["bits"].init(key), jax.numpy.array([8, 11, 9]))
    truth = -0.5 * np.log(2 * np.pi * 0.25**2) - 0.5 * ((names["images"] - 0.3) / 0.25) ** 2
    gap = truth.sum((1, 2, 3)).mean() - names["nats"].mean()
    assert 0 < names["end"] < 0.01 and abs(gap) < 0.01 and 0 <= names["start"] < 1e-8
    np.testing.assert_allclose(names["again"], y, atol=1e-5)
    assert set(names["terms"]) == {"reconstruction", "flow", "entropy"}
    assert narrow.value < names["mass"].value < 0


def test_the_guide_to_data_runs():
    """Its parts and shares are what it says."""
    names = run_guide("data.md")
    assert names["batch"].shape == (128, 28, 28, 1) and names["some"].shape == (20, 28, 28, 1)
    assert len(names["data"].train) == 500 and len(names["data"].test) == 100
    assert np.array_equal(np.asarray(names["rows"]), np.asarray(names["data"].train)[:300, ..., 0])


def test_the_guide_to_runs_runs(tmp_path, monkeypatch):
    """And goes on where it was: the second time from its last checkpoint."""
    monkeypatch.chdir(tmp_path)
    first, second = (run_guide("runs.md") for _ in range(2))
    assert names_of(tmp_path / "checkpoints") >= {"100", "200", "300"}
    assert int(first["state"].step) == int(second["state"].step) == 300
    values = [path.read_text() for path in tmp_path.glob("checkpoints/*/metrics/metrics")]
    assert len(values) == 3 and str(int(first["best"].step)) in names_of(tmp_path / "checkpoints")


def test_the_guide_to_hierarchies_runs():
    """The page's step trains both layers, and the ladder is whole."""
    names = run_guide("hierarchical.md")
    assert int(names["state"].step) == 1 and {"kl_1", "kl_2", "reconstruction"} <= set(names["metrics"])
    assert len(names["shapes"].lam["encoders"]) == 2


@pytest.mark.slow
def test_the_guide_to_baselines_runs(capsys):
    """Its numbers are what they are called: one nats, normalised, and log Z where it says."""
    names = run_guide("baselines.md")
    assert int(names["state"].step) == 200 and names["samples"].shape == (100, 2)
    assert np.isfinite(names["nats"]) and names["drawn"].shape == (3, 3, 1)
    below, exact = names["below"], names["exact"]
    assert abs(below.value - exact) < 5 * below.std_error + 0.1
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        x = names["draws"][0]
        nats = names["log_prob"](jax.random.key(9), names["state"].ema, x)
        assert abs(nats + names["machine"].free_energy(names["state"].ema, x) + below.value) < 1e-3
    assert "log Z" in capsys.readouterr().out


@pytest.mark.slow
def test_the_guide_to_evaluation_runs():
    names = run_guide("evaluation.md")
    judged, key = names["judged"], jax.random.key(9)
    assert judged.value.shape == (20,) and np.all(np.isfinite(judged.value))
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        for start in ("annealed", "from_prior"):
            found = names["evaluate"].evaluate(names[start], key, names["params"], names["data"])
            # Annealing is below in the mean, from the prior by more.
            assert -2 < np.mean(found.value - judged.value) < 0.2, start
    assert names["ranks"].shape[0] == 500 and np.all(np.asarray(names["found"].uniformity) <= 1)


@pytest.mark.slow
def test_the_guide_to_calling_runs(tmp_path, monkeypatch, capsys):
    """Its programs on a small run of the experiment that it names."""
    monkeypatch.chdir(tmp_path)
    small = {"latent_dim": 12, "num_steps": 20, "eval_samples": 20, "run_dir": Path("runs/vae-digits")}
    vae.run(dataclasses.replace(vae.PRESETS["smoke"][1], **small))
    names = run_guide("calling.md")
    run, keys, images = names["run"], names["keys"], names["images"]
    np.testing.assert_allclose(names["each"], -run.elbo_estimate(keys, run.ema, images), rtol=1e-6)
    np.testing.assert_allclose(names["bound"], -names["each"], rtol=1e-6)
    assert names["per_image"].theta.keys() == names["slope"].theta.keys()
    assert names["tangents"].shape == (4, 8, 8, 1, 12) and np.any(names["tangents"] != 0)
    for name in ("shift", "again"):
        np.testing.assert_allclose(names[name], names["loc"].sum(1), rtol=1e-4, atol=1e-5)
    assert "20 draws" in capsys.readouterr().out


def test_the_guide_to_hosts_runs():
    """In one process, which is as many as it takes."""
    names = run_guide("hosts.md")
    assert int(names["state"].step) == 10 and names["params"].theta


PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md"))),
]


@pytest.mark.parametrize("name", PAGES)
def test_links_to_files_lead_somewhere(name):
    page = ROOT / name
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


def test_make_targets_that_are_named_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.M))
    named = set(re.findall(r"^make ([a-z-]+)", README, flags=re.M)) | {"data"}
    assert named <= targets
