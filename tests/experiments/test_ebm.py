"""The energy-based experiment: its rings' own density, its objectives, and a small run."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import ebm
from vdiff.evaluate.grid import grid_points


def test_the_rings_own_density():
    """It sums to one over the plane, and is the mean over angles of the noise's."""
    points = grid_points(ebm.LOW, ebm.HIGH, 300)
    log_prob = ebm.rings_log_prob(points, ebm.SPREAD)
    assert np.sum(np.exp(log_prob)) * (7.2 / 300) ** 2 == pytest.approx(1, abs=1e-5)

    x = ebm.two_rings(0, 5).astype(np.float64)
    angles = 2 * np.pi * np.arange(4000) / 4000
    circles = np.array(ebm.RADII)[:, None, None] * np.stack([np.cos(angles), np.sin(angles)], -1)
    squares = np.sum((x[:, None, None] - circles) ** 2, -1) / (2 * ebm.SPREAD**2)
    expected = np.log(np.mean(np.exp(-squares), axis=(1, 2)) / (2 * np.pi * ebm.SPREAD**2))
    np.testing.assert_allclose(ebm.rings_log_prob(x, ebm.SPREAD), expected, rtol=1e-9)


@pytest.mark.parametrize(
    ("loss", "terms"),
    [("denoising", {"denoising"}), ("explicit", {"norm", "trace"}), ("sliced", {"norm", "trace"})],
)
def test_objectives(loss, terms, key):
    config = dataclasses.replace(ebm.PRESETS["smoke"][1], loss=loss)
    problem = ebm.build(config)
    params = jax.eval_shape(problem.model.init, key)
    out = jax.eval_shape(ebm.objective_of(config, problem), key, params, jnp.asarray(problem.train[0]))
    assert set(out) == terms


def test_digits_are_centred(key):
    problem = ebm.build(ebm.PRESETS["digits"][1])
    x = np.asarray(jax.jit(problem.prepare)(key, jnp.asarray(problem.train[:50])))
    assert -1 <= x.min() < -0.9 and 0.9 < x.max() < 1
    assert np.all(np.floor((x + 1) / 2 * 17) == problem.train[:50])


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["denoising", "explicit", "sliced"])
def test_a_small_run(tmp_path, loss):
    config = dataclasses.replace(ebm.PRESETS["smoke"][1], run_dir=tmp_path / "run", hidden=(16,), loss=loss)
    metrics = ebm.run(config)["metrics"]
    # Not trained to speak of: far from the truth, and better than the box that the rings lie in.
    assert -np.log(7.2**2) < metrics["log_prob"]["value"] < metrics["log_prob_best"]["value"]
    is_blurred = metrics["log_prob_best"]["value"] < metrics["log_prob_truth"]["value"]
    assert is_blurred == (loss == "denoising")
    assert metrics["log_prob"]["bound"] == "grid" and metrics["log_prob"]["unit"] == "nats per datum"
    assert 0.5 < metrics["moved"]["value"] <= 1
    for name in ("landscape.png", "curves.png", "report.html"):
        assert (tmp_path / "run" / name).stat().st_size > 1000
