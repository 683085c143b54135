"""The example whose log p(x) is known, and the tables made of it."""

import numpy as np
import pytest
from rich.console import Console
from scipy.stats import multivariate_normal

from experiments import evaluation


def test_its_truth_is_the_gaussians():
    _, params, log_prob = evaluation.linear_vae(0)
    weight = np.asarray(params.theta, np.float64)
    covariance = weight @ weight.T + evaluation.SCALE**2 * np.eye(evaluation.DIM)
    x = np.random.default_rng(1).normal(size=(5, evaluation.DIM))
    np.testing.assert_allclose(
        log_prob(x), multivariate_normal(cov=covariance).logpdf(x), rtol=1e-7
    )  # the model keeps its weights in float32


@pytest.mark.slow
def test_the_tables_hold_an_error_for_every_estimate(capsys, monkeypatch):
    monkeypatch.setattr(evaluation, "Console", lambda width: Console(width=width, color_system=None))
    evaluation.run(evaluation.Config(num_data=8, num_steps=(5, 20), num_samples=(100,)))
    printed = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in printed.splitlines() if "│" in line]
    errors = {
        row[0]: float(row[1].split()[0]) for row in rows if row[0].startswith(("importance", "annealed"))
    }
    assert set(errors) == {
        *(f"importance from {start}, 100 draws" for start in ("q", "the prior")),
        *(f"annealed from {start}, {t} steps" for start in ("q", "the prior") for t in (5, 20)),
    }
    # From the prior, ten latents known to a thirtieth of their spread, is further off than from q.
    assert errors["importance from the prior, 100 draws"] < errors["importance from q, 100 draws"] < 1
    gaps = [float(row[3].split()[0]) for row in rows if row[0].startswith("T =")]
    assert gaps[1] < gaps[0]
