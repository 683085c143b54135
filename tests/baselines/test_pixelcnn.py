"""PixelCNN by enumeration: masses sum to one, draws have their masses, its terms are log p(x)."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vdiff as vd
from tests import toys
from vdiff import likelihoods

# name -> (likelihood, shape of an image, every image)
CASES = {
    "bits": (
        likelihoods.bernoulli(),
        (3, 3, 1),
        np.array(list(itertools.product([0, 1], repeat=9)), np.int32),
    ),
    "levels": (
        likelihoods.categorical(3),
        (2, 2, 1),
        np.array(list(itertools.product(range(3), repeat=4)), np.int32),
    ),
}


@pytest.fixture(scope="module", params=CASES)
def case(request):
    """A model, parameters off their start, every image, and log p(x) of each in float64."""
    likelihood, shape, support = CASES[request.param]
    net = vd.nets.gated_pixelcnn(shape, likelihood.out_shape(shape), features=3, layers=2, kernel=2, reach=1)
    model = vd.baselines.pixelcnn(net, shape, likelihood=likelihood)
    rng, shapes = np.random.default_rng(0), jax.eval_shape(model.init, jax.random.key(0))
    params = jax.tree.map(lambda of: jnp.asarray(0.8 * rng.normal(size=of.shape), of.dtype), shapes)
    support = support.reshape(-1, *shape)
    log_prob = toys.quick_jit(jax.vmap(model.log_prob, in_axes=(None, 0)))(params, jnp.asarray(support))
    return model, params, support, np.asarray(log_prob, np.float64)


def test_masses_sum_to_one(case):
    """All 2^9 images of 3 x 3 bits, all 3^4 of 2 x 2 levels."""
    *_, log_prob = case
    assert np.exp(log_prob).sum() == pytest.approx(1.0, abs=2e-6)
    assert np.ptp(log_prob) > 1


def test_draws_have_their_masses(case):
    """60,000 draws, chi-square over all images as a z-score: drawing row by row is drawing from p(x)."""
    model, params, support, log_prob = case
    num_draws = 60_000
    draw = toys.quick_jit(jax.vmap(model.sample, in_axes=(0, None)))
    x, z = draw(jax.random.split(jax.random.key(3), num_draws), params)
    assert z == () and x.shape[1:] == support.shape[1:] and x.dtype == jnp.int32
    number = {image.tobytes(): i for i, image in enumerate(support)}
    counts = np.bincount([number[image.tobytes()] for image in np.asarray(x)], minlength=len(support))
    expected = num_draws * np.exp(log_prob)
    statistic = np.sum((counts - expected) ** 2 / expected)
    mean, variance = len(support) - 1, 2 * (len(support) - 1) + np.sum(1 / expected)
    assert abs(statistic - mean) / np.sqrt(variance) < 5


@pytest.mark.parametrize("case", ["bits"], indirect=True)
def test_is_a_density(case):
    model, params, support, log_prob = case
    x, key = jnp.asarray(support[7]), jax.random.key(0)
    assert model._fields[:6] == vd.Model._fields and isinstance(model, vd.ModelLike)
    assert params.phi == () and params.lam == () and model.sample_q(key, params, x) == ()
    assert float(model.log_q(params, x, ())) == 0.0
    value, gradient = toys.quick_jit(jax.value_and_grad(model.elbo_estimate, argnums=1))(key, params, x)
    assert float(value) == pytest.approx(log_prob[7], abs=1e-5)
    assert all(np.all(np.isfinite(leaf)) and np.any(leaf != 0) for leaf in jax.tree.leaves(gradient))
    assert float(toys.quick_jit(model.log_joint)(params, x, ())) == pytest.approx(log_prob[7], abs=1e-5)


def test_refusals():
    shape = (2, 2, 1)
    net = vd.nets.gated_pixelcnn(shape, shape, features=2, layers=1)
    model = vd.baselines.pixelcnn(net, shape, likelihood=likelihoods.categorical(3))
    params = jax.eval_shape(model.init, jax.random.key(0))
    with pytest.raises(
        ValueError, match=r"network: got output of shape \(2, 2, 1\), expected \(2, 2, 1, 3\)"
    ):
        jax.eval_shape(model.log_prob, params, jnp.zeros(shape, jnp.int32))
    raw = jax.random.PRNGKey(0)
    for call in (lambda: model.init(raw), lambda: model.sample(raw, params)):
        with pytest.raises(TypeError, match="expected a typed key"):
            call()
