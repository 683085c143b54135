"""Simulation-based calibration: the posterior passes; what is shifted or narrow is found by the test meant for it."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

import vdiff as vd
from tests import toys
from tests.evaluate import linear_vae
from vdiff.evaluate.calibration import symmetry_p_value

MODEL = linear_vae.build()
PARAMS = MODEL.init(jax.random.key(0))
NUM_DATA = 1000
of_keys = toys.quick_jit(jax.vmap(vd.evaluate.posterior_ranks(MODEL, 99), in_axes=(0, None)))


def found(seed=0, **q):
    keys = jax.random.split(jax.random.key(seed), NUM_DATA)
    return vd.evaluate.calibration(of_keys(keys, PARAMS._replace(lam=linear_vae.lam(**q))))


def test_the_posterior_is_uniform():
    """Ranks of 20 x 1,000 data: their means and squares are those of uniform draws, and p-values are no smaller."""
    ranks = np.concatenate(
        [of_keys(jax.random.split(jax.random.key(s), NUM_DATA), PARAMS) for s in range(20)]
    )
    num = len(ranks)
    assert np.all(np.abs(ranks.mean(0) - 1 / 2) < 5 * np.sqrt(1 / 12 / num))
    assert np.all(np.abs(np.square(ranks - 1 / 2).mean(0) - 1 / 12) < 5 * np.sqrt(1 / 180 / num))
    p_values = np.concatenate([np.stack(found(seed)).ravel() for seed in range(20)])
    assert p_values.min() > 1e-4 and 0.3 < np.median(p_values) < 0.7


def test_a_shifted_q_is_found_by_both_tests_in_its_unit_alone():
    uniformity, symmetry = found(shift=(0.4, 0.0))
    assert uniformity[0] < 1e-8 and symmetry[0] < 1e-8
    assert uniformity[1] > 1e-3 and symmetry[1] > 1e-3


@pytest.mark.parametrize("widen", [-0.5, 0.5])
def test_a_narrow_or_wide_q_is_found_by_uniformity_and_not_by_symmetry(widen):
    uniformity, symmetry = found(widen=(0.0, widen))
    assert uniformity[1] < 1e-5 and symmetry[1] > 1e-3
    assert uniformity[0] > 1e-3 and symmetry[0] > 1e-3


def test_discrete_latents_have_uniform_ranks_too():
    """Ties are broken at random: a bit and a class, in a dictionary, whose q is their prior and so their posterior."""

    def sample_z(key):
        key_bit, key_class = jax.random.split(key)
        logits = jnp.array([0.0, 1.0, -1.0])
        return {
            "bit": jax.random.bernoulli(key_bit, 0.2, (2,)),
            "class": jax.random.categorical(key_class, logits),
        }

    model = vd.Model(
        lambda key: vd.Params(),
        lambda params, x, z: jnp.zeros(()),
        lambda params, x, z: jnp.zeros(()),
        lambda key, params, x: sample_z(key),
        lambda key, params: (jnp.zeros(1), sample_z(key)),
    )
    ranks = toys.quick_jit(jax.vmap(vd.evaluate.posterior_ranks(model, 7), in_axes=(0, None)))(
        jax.random.split(jax.random.key(1), NUM_DATA), vd.Params()
    )
    assert ranks["bit"].shape == (NUM_DATA, 2) and ranks["class"].shape == (NUM_DATA,)
    for leaf in jax.tree.leaves(ranks):
        for p_values in vd.evaluate.calibration(leaf):
            assert np.all(p_values > 1e-3)


def test_symmetry_against_every_sequence_of_signs():
    """All 2^9 walks, and the statistic is the distance of the two samples p and 1 - p."""
    rng = np.random.default_rng(0)
    sizes = rng.random(9) / 2
    walks = np.array(list(itertools.product([-1, 1], repeat=9)))
    largest = np.abs(np.cumsum(walks[:, np.argsort(-sizes)], axis=1)).max(1)
    for signs in walks[::37]:
        p = 0.5 + signs * sizes
        distance = scipy.stats.ks_2samp(p, 1 - p).statistic
        assert symmetry_p_value(p) == pytest.approx(np.mean(largest >= round(9 * distance)), abs=1e-12)
    assert symmetry_p_value(np.full(5, 0.5)) == 1.0


def test_the_test_of_symmetry_refuses_as_often_as_it_says():
    """At 5 %, of 2,000 symmetric samples of 400; the two-sample test on the same numbers refuses twice as many."""
    rng = np.random.default_rng(1)
    samples = rng.beta(0.5, 0.5, size=(2000, 400))
    refused = np.mean([symmetry_p_value(p) < 0.05 for p in samples])
    assert abs(refused - 0.05) < 5 * np.sqrt(0.05 * 0.95 / 2000)
    two_samples = np.mean(
        [scipy.stats.ks_2samp(p, 1 - p, method="asymp").pvalue < 0.05 for p in samples[:500]]
    )
    assert two_samples > 0.075


@pytest.mark.parametrize(
    "ranks", [np.zeros((1, 2)), np.full((5, 2), 1.1), np.full((5, 2), -0.1), np.full(5, np.nan)]
)
def test_what_are_no_ranks_is_refused(ranks):
    with pytest.raises(
        ValueError, match=r"ranks: got shape .*expected \[N, ...\] with N at least 2, in \[0, 1\]"
    ):
        vd.evaluate.calibration(ranks)


def test_no_draws_are_refused():
    with pytest.raises(ValueError, match="num_samples: got 0"):
        vd.evaluate.posterior_ranks(MODEL, 0)
