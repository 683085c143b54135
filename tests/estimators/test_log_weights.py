"""Draws and their log-weights: shapes, independence, and one run of the encoder."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vdiff as vd
from tests import toys
from vdiff.estimators.log_weights import check_num_samples, draw, draw_with_log_q, log_joints, log_qs


@pytest.mark.parametrize("name", ["linear2", "shared", "bernoulli", "numpyro"])
@pytest.mark.parametrize("num_samples", [1, 5])
def test_draws_have_a_leading_axis(key, name, num_samples):
    toy = toys.toy(name)
    x = jnp.asarray(toy.data[0])
    z = draw(vd.q_at(toy.model, toy.params, x), key, num_samples)
    one = toy.model.sample_q(key, toy.params, x)
    assert jax.tree.structure(z) == jax.tree.structure(one)
    for leaf, single in zip(jax.tree.leaves(z), jax.tree.leaves(one), strict=True):
        assert leaf.shape == (num_samples, *single.shape) and leaf.dtype == single.dtype


def test_draws_are_independent_draws_of_q(key):
    """By q's mean and covariance in closed form, and no correlation between neighbours."""
    toy, num_samples = toys.toy("linear2"), 100_000
    x = jnp.asarray(toy.data[1])
    z = np.asarray(jax.jit(lambda key: draw(vd.q_at(toy.model, toy.params, x), key, num_samples))(key), float)
    lam = jax.tree.map(lambda leaf: np.asarray(leaf, float), toy.params.lam)
    factor = np.tril(lam["lower"], -1) + np.diag(np.exp(lam["log_diag"]))
    eps = np.linalg.solve(factor, (z - lam["weight"] @ toy.data[1] - lam["bias"]).T).T
    for sample, expected in (
        (eps, 0.0),
        (eps**2, 1.0),
        (eps[:, 0] * eps[:, 1], 0.0),
        (eps[1:] * eps[:-1], 0.0),
    ):
        z_score = (sample.mean(axis=0) - expected) / (sample.std(axis=0) / np.sqrt(len(sample)))
        assert np.max(np.abs(z_score)) < 5.0


def test_keys_make_the_draws():
    toy = toys.toy("linear2")
    x = jnp.asarray(toy.data[0])
    q = vd.q_at(toy.model, toy.params, x)
    one, again, other = (draw(q, jax.random.key(seed), 3) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, again)
    assert not np.any(np.asarray(one) == np.asarray(other))


@pytest.mark.parametrize("name", ["linear2", "shared", "bernoulli"])
def test_log_weights_equal_a_loop(key, name):
    toy = toys.toy(name)
    x = jnp.asarray(toy.data[0])
    q = vd.q_at(toy.model, toy.params, x)
    z, log_q = draw_with_log_q(q, key, 4)
    jax.tree.map(np.testing.assert_array_equal, z, draw(q, key, 4))
    for batched, single in (
        (log_joints(toy.model, toy.params, x, z, 4), toy.model.log_joint),
        (log_qs(q, z, 4), toy.model.log_q),
        (log_q, toy.model.log_q),
    ):
        loop = [single(toy.params, x, jax.tree.map(lambda leaf, k=k: leaf[k], z)) for k in range(4)]
        np.testing.assert_allclose(batched, loop, rtol=1e-6)


def test_a_model_without_a_latent_has_equal_weights(key):
    """Z = (): K is not to be read off z."""
    mixture = vd.gmm(3, 2)
    model, x = vd.collapsed(mixture), jnp.array([0.3, -0.2])
    params = model.init(key)
    q = vd.q_at(model, params, x)
    assert draw(q, key, 4) == ()
    exact = mixture.log_prob(params, x)
    np.testing.assert_allclose(log_joints(model, params, x, (), 4), np.full(4, exact), rtol=1e-6)
    np.testing.assert_array_equal(log_qs(q, (), 4), np.zeros(4))
    np.testing.assert_array_equal(draw_with_log_q(q, key, 4)[1], np.zeros(4))


def test_the_encoder_runs_once():
    """Its share of the arithmetic does not grow with K: 64 draws cost less than twice one."""
    likelihood = vd.likelihoods.bernoulli()
    model = vd.vae(
        vd.nets.mlp((64,), (4,), hidden=(128,)),
        vd.nets.mlp((2,), (64,), hidden=(4,)),
        latent_dim=2,
        likelihood=likelihood,
    )
    params, x = model.init(jax.random.key(0)), jnp.zeros(64, jnp.int32)

    def flops(num_samples):
        @jax.jit
        def drawn(key, params, x):
            return draw(vd.q_at(model, params, x), key, num_samples)

        return drawn.lower(jax.random.key(0), params, x).compile().cost_analysis()["flops"]

    encoder = 2 * (64 * 128 + 128 * 4)
    one, many = flops(1), flops(64)
    assert one > 0.9 * encoder
    # The noise of 64 draws is not free; 64 encoders would be 63 * 17,000.
    assert many - one < encoder


def test_raw_keys_are_refused():
    toy = toys.toy("linear2")
    with pytest.raises(TypeError, match=r"key: got uint32\[2\], expected a typed key"):
        draw(vd.q_at(toy.model, toy.params, jnp.asarray(toy.data[0])), jax.random.PRNGKey(0), 2)


@pytest.mark.parametrize("num_samples", [0, -3])
def test_fewer_than_one_draw_is_refused(num_samples):
    with pytest.raises(ValueError, match=f"num_samples: got {num_samples}, expected at least 1"):
        check_num_samples(num_samples)
    for estimator in (vd.pathwise, vd.doubly_reparameterized, vd.score_function):
        with pytest.raises(ValueError, match="num_samples"):
            estimator(toys.toy("linear").model, vd.elbo, num_samples)
    assert check_num_samples(1) is None
