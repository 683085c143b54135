"""The measured bias of contrastive divergence is that of NumPy's sums, and falls with k."""

import numpy as np
import pytest

from experiments import contrastive
from tests.baselines import small
from vdiff import baselines


def test_the_bias_is_that_of_sums_in_numpy():
    """On the machine of the other tests, its pixels in a row."""
    model = baselines.rbm((6,), 4)
    theta = small.PARAMS.theta | {"visible": small.PARAMS.theta["visible"].ravel()}
    params = small.PARAMS._replace(theta=theta)
    law = np.random.default_rng(3).dirichlet(np.ones(64))
    np.testing.assert_allclose(contrastive.transition_matrix(model, params), small.transition(), atol=1e-6)
    found = contrastive.biases(model, params, law, (1, 5))
    scores = small.minus_free_energy_gradients()
    p = small.joint().sum(1) / small.joint().sum()
    truth = (law - p) @ scores
    for k, (off, cosine) in found.items():
        exact = (law - law @ np.linalg.matrix_power(small.transition(), k)) @ scores
        assert off == pytest.approx(np.linalg.norm(exact - truth) / np.linalg.norm(truth), rel=1e-4)
        assert cosine == pytest.approx(
            exact @ truth / (np.linalg.norm(exact) * np.linalg.norm(truth)), rel=1e-5
        )


def test_the_table_is_printed(capsys):
    found = contrastive.run(contrastive.Config(num_sweeps=(1, 400), train_steps=(0, 300)))
    for row in found.values():
        assert row[400][0] < min(row[1][0], 0.01)
    # A trained machine mixes more slowly than one that has hardly any weights.
    assert found[300][1][0] > 2 * found[0][1][0]
    assert "k = 400" in capsys.readouterr().out
