"""Discrete codes by enumeration: two codes of three, a MADE as their prior; every sum is over all nine."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

import vdiff as vd
from tests import toys
from vdiff import baselines, likelihoods

Z = np.eye(3, dtype=np.int32)[np.array(list(itertools.product(range(3), repeat=2)))]
X = np.array(list(itertools.product([0, 1], repeat=4)), np.int32)


@pytest.fixture(scope="module")
def built():
    """The model, its parameters, and log p(x, z) and log q(z | x) of all 16 data and 9 latents in float64."""
    net = vd.nets.masked_mlp((2, 3), (2, 3), num_variables=2, hidden=())
    orders = np.arange(2)[None]
    prior = baselines.made(net, (2, 3), likelihood=likelihoods.one_hot(3), orders=orders)
    model = vd.vqvae(
        vd.nets.mlp((4,), (4,), hidden=()),
        vd.nets.mlp((2, 2), (4,), hidden=(5,), activation=jnp.tanh),
        **{"num_latents": 2, "num_codes": 3, "code_dim": 2, "temperature": 1.5},
        likelihood=likelihoods.bernoulli(),
        prior=prior,
    )
    rng, shapes = np.random.default_rng(0), jax.eval_shape(model.init, jax.random.key(0))
    params = jax.tree.map(lambda of: jnp.asarray(0.9 * rng.normal(size=of.shape), of.dtype), shapes)

    @toys.quick_jit
    def every(x, z):
        both = [jax.vmap(of, in_axes=(None, None, 0)) for of in (model.log_joint, model.log_q)]
        return [jax.vmap(of, in_axes=(None, 0, None))(params, x, z) for of in both]

    log_joint, log_q = (np.asarray(of, np.float64) for of in every(jnp.asarray(X), jnp.asarray(Z)))
    return model, params, prior, log_joint, log_q


def test_is_a_joint_density(built):
    """Over all x and z it sums to one, q over all z; q is the softmax of distances, the likeliest code the nearest."""
    model, params, _, log_joint, log_q = built
    assert np.exp(log_joint).sum() == pytest.approx(1.0, abs=2e-6)
    np.testing.assert_allclose(np.exp(log_q).sum(1), 1.0, atol=2e-6)
    layer = jax.tree.map(np.asarray, params.lam)["Dense_0"]
    codebook = np.asarray(params.theta["codebook"], np.float64)
    codes = np.asarray(jax.vmap(model.encode, in_axes=(None, 0))(params, jnp.asarray(X)))
    for x, log_q_of_x, code in zip(X, log_q, codes, strict=True):
        points = ((2.0 * x - 1.0) @ layer["kernel"] + layer["bias"]).reshape(2, 1, 2)
        distances = np.sum((points - codebook[None]) ** 2, axis=-1)
        expected = scipy.special.log_softmax(-distances / 1.5, axis=1)
        np.testing.assert_allclose(log_q_of_x, np.sum(Z * expected[None], axis=(1, 2)), rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(code, np.argmin(distances, axis=1))


def test_the_enumerated_elbo_is_the_sum(built):
    model, params, _, log_joint, log_q = built
    elbo = vd.total(vd.enumerated(model, jnp.asarray(Z)))
    got = toys.quick_jit(elbo)(jax.random.key(0), params, jnp.asarray(X[6]))
    expected = np.sum(np.exp(log_q[6]) * (log_joint[6] - log_q[6]))
    assert float(got) == pytest.approx(expected, abs=1e-5)
    assert expected < scipy.special.logsumexp(log_joint[6]) - 0.05


def test_importance_sampling_converges_to_log_p(built):
    """20,000 draws, within their error; and an error that would see a tenth of the gap to the ELBO."""
    model, params, _, log_joint, log_q = built
    exact = scipy.special.logsumexp(log_joint[6])
    got = toys.quick_jit(vd.importance_log_prob(model, 20_000, 20_000))(
        jax.random.key(1), params, jnp.asarray(X[6])
    )
    gap = exact - np.sum(np.exp(log_q[6]) * (log_joint[6] - log_q[6]))
    assert float(got.std_error) < gap / 10 and abs(float(got.value) - exact) < 5 * float(got.std_error)


def test_draws_have_the_enumerated_frequencies(built):
    """Of (x, z) and of z given x: chi-square over 144 and 9 cells as z-scores."""
    model, params, _, log_joint, log_q = built
    num_draws = 30_000

    @toys.quick_jit
    @jax.vmap
    def run(key):
        key_p, key_q = jax.random.split(key)
        return model.sample(key_p, params), model.sample_q(key_q, params, jnp.asarray(X[6]))

    (x, z), of_q = jax.device_get(run(jax.random.split(jax.random.key(0), num_draws)))
    assert z.dtype == of_q.dtype == np.int32 and np.all(z.sum(-1) == 1) and np.all(of_q.sum(-1) == 1)

    def number(z):
        return np.argmax(z, axis=-1) @ [3, 1]

    for cells, log_p in ((x @ [8, 4, 2, 1] * 9 + number(z), log_joint.ravel()), (number(of_q), log_q[6])):
        expected = num_draws * np.exp(log_p)
        counts = np.bincount(cells, minlength=len(expected))
        statistic = np.sum((counts - expected) ** 2 / expected)
        mean, variance = len(expected) - 1, 2 * (len(expected) - 1) + np.sum(1 / expected)
        assert abs(statistic - mean) / np.sqrt(variance) < 5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("estimator", "low", "high"),
    [(vd.relaxed, (0.0, 0.06), (0.3, 0.5)), (vd.straight_through, (0.1, 0.3), (0.3, 0.6))],
)
def test_relaxations_have_the_value_of_the_model_and_a_bias_that_falls(built, estimator, low, high):
    """Value: the ELBO. Theta's decoder and phi, which q does not read: unbiased.

    Lambda and the codebook, which q reads: off by a share of the gradient's norm that lies in `low` at temperature .2
    and in `high` at 1. The bias of `relaxed` vanishes; that of `straight_through` need not, under a decoder of tanh.
    """
    model, params, *_ = built
    x, num_draws = jnp.asarray(X[6]), 40_000
    exact_value, exact = toys.quick_jit(
        jax.value_and_grad(vd.total(vd.enumerated(model, jnp.asarray(Z))), argnums=1)
    )(jax.random.key(0), params, x)
    keys = jax.random.split(jax.random.key(1), num_draws)

    @toys.quick_jit
    def draws(temperature):
        objective = estimator(model, model.logits, temperature, relaxation=vd.relaxations.one_hot)
        one = jax.value_and_grad(vd.total(objective), argnums=1)
        return jax.lax.map(lambda key: one(key, params, x), keys, batch_size=2000)

    for temperature, (least, most) in ((0.2, low), (1.0, high)):
        values, gradients = jax.device_get(draws(temperature))
        assert toys.z_scores(np.asarray(values, np.float64)[:, None], float(exact_value)) < 5.0
        for of in (lambda g: g.theta["decoder"], lambda g: g.phi):
            got, expected = toys.flat(of(gradients)), toys.flat_single(of(exact))
            error = np.std(got, axis=0) / np.sqrt(num_draws)
            assert np.all(np.abs(got.mean(0) - expected) < 5 * error + 1e-6)
        for of in (lambda g: g.lam, lambda g: g.theta["codebook"]):
            got, expected = toys.flat(of(gradients)), toys.flat_single(of(exact))
            norm = np.linalg.norm(expected)
            assert np.linalg.norm(np.std(got, axis=0)) / np.sqrt(num_draws) < 0.03 * norm
            assert least <= np.linalg.norm(got.mean(0) - expected) / norm < most


def test_refusals(built):
    _, params, prior, *_ = built
    net, likelihood = vd.nets.mlp((4,), (4,), hidden=()), likelihoods.bernoulli()
    sizes = {"num_latents": 2, "num_codes": 3, "code_dim": 2}
    for name in sizes:
        with pytest.raises(ValueError, match=f"{name}: got 0, expected at least 1"):
            vd.vqvae(net, net, **(sizes | {name: 0}), likelihood=likelihood, prior=prior)
    with pytest.raises(ValueError, match="temperature: got 0"):
        vd.vqvae(net, net, **sizes, likelihood=likelihood, prior=prior, temperature=0.0)
    with pytest.raises(ValueError, match="prior: got a model with a latent of its own"):
        latent = prior._replace(sample_q=lambda key, params, x: jnp.zeros(1))
        jax.eval_shape(
            vd.vqvae(net, net, **sizes, likelihood=likelihood, prior=latent).init, jax.random.key(0)
        )
    short = vd.vqvae(vd.nets.mlp((4,), (3,), hidden=()), net, **sizes, likelihood=likelihood, prior=prior)
    with pytest.raises(ValueError, match=r"encoder: got output of shape \(3,\), expected 4 numbers"):
        jax.eval_shape(short.logits, jax.eval_shape(short.init, jax.random.key(0)), jnp.zeros(4, jnp.int32))
    wide = vd.vqvae(net, vd.nets.mlp((2, 2), (5,), hidden=()), **sizes, likelihood=likelihood, prior=prior)
    of = jax.eval_shape(wide.init, jax.random.key(0))
    with pytest.raises(ValueError, match=r"decoder: got output of shape \(5,\), expected \(4,\)"):
        jax.eval_shape(wide.log_joint, of, jnp.zeros(4, jnp.int32), jnp.zeros((2, 3), jnp.int32))
    with pytest.raises(TypeError, match="expected a typed key"):
        wide.init(jax.random.PRNGKey(0))
