"""The tables of docs/likelihood.md: what they claim, at a smaller size."""

import jax
import pytest

from experiments import likelihood


@pytest.fixture(autouse=True)
def _as_a_user():
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


def test_ends_cost_more_than_the_solver():
    figures = likelihood.ends(likelihood.Config())
    assert 1e-4 < figures["0.25 (13.3, -5.0) end"] < 1e-3
    assert figures["0.25 (10.0, -10.0) end"] < 1e-5


@pytest.mark.slow
def test_the_tables():
    figures = likelihood.run(likelihood.Config(num_data=8))
    assert figures["(8,) scale 0.25 (13.3, -5.0) fixed_grid(7) rms"] < 5e-7
    assert figures["(28, 28, 1) scale 0.25 (13.3, -5.0) fixed_grid(7) rms"] < 5e-7
    assert figures["(8,) scale 0.25 (13.3, -5.0) adaptive(1e-3) rms"] > 1e-5
    matched = "truncated normal, of the start"
    assert abs(figures[f"bare levels {matched} 1"]) < 0.005 < figures["bare levels uniform 1"]
    assert abs(figures["levels + uniform noise uniform 1"]) < 0.01
    assert figures[f"levels + uniform noise {matched} 1"] > 1
