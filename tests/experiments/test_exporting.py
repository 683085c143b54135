"""What a run leaves is what its model computes: every experiment, loaded again without it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vdiff as vd
from experiments import (
    autoregressive,
    diffusion,
    ebm,
    exporting,
    gmm,
    hvae,
    mixture,
    runs,
    sbn,
    settings,
    vae,
    vqvae,
)

pytestmark = pytest.mark.slow

KEY = jax.random.key(4)


def exported(experiment, config, directory):
    """Export what a run would at its start; return its problem, what is loaded, and the state."""
    problem = experiment.build(config)
    params, ema = problem.model.init(jax.random.key(0)), problem.model.init(jax.random.key(1))
    state = vd.TrainState(jnp.int32(0), params, ema, (), KEY)
    (directory / "config.json").write_text("{}")
    images = problem.test if experiment is gmm else problem.dataset.test
    if experiment in (hvae, sbn, vqvae):
        exporting.export_model(config, directory, state, problem.model, 60, images[0])
    else:
        experiment.export(config, problem, directory, state, images[0])
    return problem, vd.load_run(directory), images[:4]


def agree(got, expected, tolerance=1e-6):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        off = np.linalg.norm(np.float64(a).ravel() - np.float64(b).ravel())
        assert off <= tolerance * np.linalg.norm(np.float64(b)), off


def the_elbo_and_its_slope_agree(run, model, x):
    keys, axes = jax.random.split(KEY, len(x)), (0, None, 0)
    got, own = (
        jax.jit(jax.value_and_grad(lambda p, f=f: jnp.mean(jax.vmap(f, in_axes=axes)(keys, p, x))))(run.ema)
        for f in (run.elbo_estimate, model.elbo_estimate)
    )
    agree(got, own, tolerance=3e-6)


def test_a_mixture_of_points(tmp_path):
    problem, run, x = exported(gmm, gmm.PRESETS["smoke"][1], tmp_path)
    the_elbo_and_its_slope_agree(run, problem.model, x)
    exact = jax.vmap(problem.mixture.log_prob, in_axes=(None, 0))(run.ema, x)
    agree(run.log_prob(KEY, run.ema, x), exact)
    agree(run.encode(run.ema, x), jax.vmap(problem.mixture.log_posterior, in_axes=(None, 0))(run.ema, x))
    assert run.decode is None and "exact" in run.log_prob.__doc__


def test_a_vae_of_dequantized_images_speaks_in_their_units(tmp_path):
    small = {"likelihood": "gaussian", "hidden": (8,), "eval_samples": 60}
    config = dataclasses.replace(vae.PRESETS["smoke"][1], **small)
    problem, run, x = exported(vae, config, tmp_path)
    the_elbo_and_its_slope_agree(run, problem.model, x)
    of_evaluate = vd.evaluate.evaluate(
        vd.importance_log_prob(problem.model, 60, chunk_size=50), KEY, run.ema, x
    )
    agree(run.log_prob(KEY, run.ema, x), of_evaluate.value)
    assert "60 draws" in run.log_prob.__doc__
    loc, scale = run.encode(run.ema, x)
    middle = (np.float32(x) + 0.5) / 17
    agree((loc, scale), jax.vmap(problem.vae.encode, in_axes=(None, 0))(run.ema, middle))
    # The VAE's own mean is of levels in [0, 1): a level's middle is the level.
    mean = jax.vmap(problem.vae.decode, in_axes=(None, 0))(run.ema, loc)
    agree((run.decode(run.ema, loc) + 0.5) / 17, mean)
    drawn, _ = run.sample(KEY, run.ema)
    assert drawn.dtype == x.dtype and drawn.shape == x.shape[1:]


def test_a_sigmoid_belief_network_decodes_its_bits(tmp_path):
    problem, run, _ = exported(sbn, sbn.PRESETS["smoke"][1], tmp_path)
    x, z = run.sample(jax.random.split(KEY, 3), run.ema)
    the_elbo_and_its_slope_agree(run, problem.model, x)
    agree(run.decode(run.ema, z), jax.vmap(problem.model.decode, in_axes=(None, 0))(run.ema, z))
    assert run.encode is None


@pytest.mark.parametrize("experiment", [hvae, vqvae])
def test_layers_and_codes_are_encoded_and_decoded(tmp_path, experiment):
    problem, run, _ = exported(experiment, experiment.PRESETS["smoke"][1], tmp_path)
    x, z = run.sample(jax.random.split(KEY, 3), run.ema)
    the_elbo_and_its_slope_agree(run, problem.model, x)
    for got, own, given in (
        (run.encode, problem.model.encode, x),
        (run.decode, problem.model.decode, z),
    ):
        agree(got(run.ema, given), jax.vmap(own, in_axes=(None, 0))(run.ema, given))
    of_evaluate = vd.evaluate.evaluate(
        vd.importance_log_prob(problem.model, 60, chunk_size=50), KEY, run.ema, x
    )
    agree(run.log_prob(KEY, run.ema, x), of_evaluate.value)


@pytest.mark.parametrize("experiment", [autoregressive, mixture])
def test_densities_that_are_exact_are_so(tmp_path, experiment):
    problem, run, _ = exported(experiment, experiment.PRESETS["smoke"][1], tmp_path)
    x, _ = run.sample(jax.random.split(KEY, 3), run.ema)
    the_elbo_and_its_slope_agree(run, problem.model, x)
    density = problem.model if experiment is autoregressive else vd.collapsed(problem.model)
    exact = jax.vmap(lambda x: density.log_joint(run.ema, x, ()))(x)
    agree(run.log_prob(KEY, run.ema, x), exact)
    assert run.decode is None and "exact" in run.log_prob.__doc__


def test_an_energy_in_the_plane_has_its_normalizer(tmp_path):
    config = ebm.PRESETS["smoke"][1]
    problem = ebm.build(config)
    params = problem.model.init(jax.random.key(0))
    state = vd.TrainState(jnp.int32(0), params, params, (), KEY)
    (tmp_path / "config.json").write_text("{}")
    ebm.export(config, problem, tmp_path, state)
    run, x = vd.load_run(tmp_path), problem.test[:5]
    own = jax.vmap(problem.model.log_density, in_axes=(None, 0))(params, x)
    got = run.log_prob(KEY, run.ema, x)
    agree(got - got[0], own - own[0], tolerance=1e-5)
    low, width = ebm.LOW[0], (ebm.HIGH[0] - ebm.LOW[0]) / 50  # the density summed over 50 x 50 cells' middles
    middles = low + width * (np.arange(50, dtype=np.float32) + 0.5)
    cells = np.stack(np.meshgrid(middles, middles), -1).reshape(-1, 2)
    mass = np.sum(np.exp(np.float64(run.log_prob(KEY, run.ema, cells)))) * width**2
    assert abs(mass - 1.0) < 0.02
    drawn, _ = run.sample(KEY, run.ema)
    assert drawn.shape == (2,) and drawn.dtype == np.float32


def test_a_diffusion_in_latents_samples_and_has_an_elbo(tmp_path):
    small = {"network": "mlp", "prediction": "velocity", "depth": 1, "latent_dim": 2, "hidden": (8,)}
    config = dataclasses.replace(diffusion.PRESETS["smoke"][1], sample_steps=3, **small)
    problem, run, x = exported(diffusion, config, tmp_path)
    the_elbo_and_its_slope_agree(run, problem.model, x)
    (drawn, path), (own, own_path) = (f(KEY, run.ema) for f in (run.sample, jax.jit(problem.model.sample)))
    assert drawn.dtype == x.dtype
    agree((np.int32(drawn), path), (np.int32(own), own_path), tolerance=1e-5)
    assert run.log_prob is None and run.encode(run.ema, x)[0].shape == (4, 2)


def test_a_full_disk_does_not_lose_the_run(tmp_path, monkeypatch, capsys):
    def full(*args, **others):
        raise OSError("No space left on device")

    config = gmm.PRESETS["smoke"][1]
    with monkeypatch.context() as patched:
        patched.setattr(exporting.vd, "export_run", full)
        exporting.export_functions(config, tmp_path, vd.TrainState(0, (), (), (), KEY), x=1.0)
    said = capsys.readouterr().out
    assert "note the run is saved, its functions are not: No space left on device" in said


def test_what_cannot_be_exported_is_said_in_one_line(tmp_path, capsys):
    def encode(params, x):
        raise ValueError("no\nsuch thing")

    state = vd.TrainState(0, vd.Params(), vd.Params(), (), KEY)
    exporting.export_functions(gmm.PRESETS["smoke"][1], tmp_path, state, x=jnp.ones(2), encode=encode)
    assert "note encode: could not be exported (no)\n" in capsys.readouterr().out


def test_a_run_with_and_without_export_is_the_same_run(tmp_path):
    config = dataclasses.replace(gmm.PRESETS["smoke"][1], run_dir=tmp_path / "run", export=False)
    runs.check_settings(config)
    settings.record(config, runs.open_run(config))
    assert runs.open_run(dataclasses.replace(config, export=True)) == tmp_path / "run"
    exporting.export_functions(config, tmp_path, None, x=None)
    assert not (tmp_path / "exported").exists()
