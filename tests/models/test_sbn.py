"""The sigmoid belief network against enumeration of all it can be: 8 pictures, 4 x 4 states of two layers."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats

import vdiff as vd
from tests import toys
from vdiff import Network

X = np.array(list(itertools.product([0, 1], repeat=3)), np.int32)
BITS = np.array(list(itertools.product([False, True], repeat=4)))
Z = (BITS[:, :2], BITS[:, 2:])
DATA = np.array([[1, 0, 1], [0, 0, 1], [1, 1, 1]], np.int32)


def linear(num_in, num_out, seed):
    """W x + b in the dtype of W, so that float64 can judge it; weights from N(0, 1)."""
    rng = np.random.default_rng(seed)
    start = {"w": rng.normal(size=(num_out, num_in)), "b": rng.normal(size=num_out)}
    start = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), start)
    return Network(lambda key: start, lambda p, x: p["w"] @ x.astype(p["w"].dtype) + p["b"])


@functools.cache
def deep():
    model = vd.sbn(
        [linear(3, 2, 0), linear(2, 2, 1)],
        [linear(2, 3, 2), linear(2, 2, 3)],
        num_units=2,
        likelihood=vd.likelihoods.bernoulli(),
    )
    return model, model.init(jax.random.key(0))._replace(phi=jnp.array([0.8, -0.5]))


@functools.cache
def shallow():
    model = vd.sbn([linear(3, 4, 0)], [linear(4, 3, 2)], num_units=4, likelihood=vd.likelihoods.bernoulli())
    return model, model.init(jax.random.key(0))._replace(phi=jnp.array([0.8, -0.5, 0.1, 1.5]))


@functools.cache
def enumerated():
    """log p(x, z) and log q(z | x) at every x and z, [8, 16]."""
    model, params = deep()

    @toys.quick_jit
    def run(x, z):
        over = {"in_axes": (None, None, 0)}
        return jax.vmap(
            lambda x: (
                jax.vmap(model.log_joint, **over)(params, x, z),
                jax.vmap(model.log_q, **over)(params, x, z),
            )
        )(x)

    return jax.device_get(run(jnp.asarray(X), jax.tree.map(jnp.asarray, Z)))


def log_bernoulli(x, logits):
    return np.sum(np.where(x, scipy.special.log_expit(logits), scipy.special.log_expit(-logits)), axis=-1)


def affine(p, x):
    return np.asarray(p["w"], np.float64) @ x + np.asarray(p["b"], np.float64)


def test_the_joint_and_q_sum_to_one():
    log_joint, log_q = (np.asarray(of, np.float64) for of in enumerated())
    assert np.sum(np.exp(log_joint)) == pytest.approx(1.0, rel=1e-5)
    np.testing.assert_allclose(np.sum(np.exp(log_q), axis=1), 1.0, rtol=1e-5)


def test_the_densities_are_their_factors():
    """Who is whose parent, written in NumPy; networks are shown pixels and bits as -1 and 1."""
    _, params = deep()
    log_joint, log_q = enumerated()
    for i, j in itertools.product(range(8), range(16)):
        x, (z_1, z_2) = X[i], (Z[0][j], Z[1][j])
        p = log_bernoulli(x, affine(params.theta[0], 2 * z_1 - 1)) + log_bernoulli(
            z_1, affine(params.theta[1], 2 * z_2 - 1)
        )
        p = p + log_bernoulli(z_2, np.asarray(params.phi))
        q = log_bernoulli(z_1, affine(params.lam[0], 2 * x - 1)) + log_bernoulli(
            z_2, affine(params.lam[1], 2 * z_1 - 1)
        )
        assert log_joint[i, j] == pytest.approx(p, rel=1e-5) and log_q[i, j] == pytest.approx(q, rel=1e-5)


def chi_square(index, probabilities):
    """The p-value of draws of indices; cells expected less than ten times are one."""
    expected = probabilities.ravel() * len(index)
    counts = np.bincount(index, minlength=len(expected)).astype(float)
    rare = expected < 10
    if rare.any():
        counts, expected = (np.append(v[~rare], v[rare].sum()) for v in (counts, expected))
    return scipy.stats.chisquare(counts, expected * counts.sum() / expected.sum()).pvalue


def test_draws_have_the_enumerated_frequencies():
    """Of (x, z) and of z given x: 40,000 draws, chi-square over the 128 and the 16 cells."""
    model, params = deep()
    x = X[5]

    @toys.quick_jit
    @jax.vmap
    def run(key):
        key_p, key_q = jax.random.split(key)
        return model.sample(key_p, params), model.sample_q(key_q, params, jnp.asarray(x))

    (pixels, z), of_q = jax.device_get(run(jax.random.split(jax.random.key(0), 40_000)))
    assert pixels.dtype == np.int32 and all(leaf.dtype == bool for leaf in (*z, *of_q))
    log_joint, log_q = (np.asarray(of, np.float64) for of in enumerated())
    powers = 2 ** np.arange(3, -1, -1)

    def number(z):
        return np.concatenate(z, axis=1) @ powers

    assert chi_square(pixels @ powers[1:] * 16 + number(z), np.exp(log_joint)) > 1e-6
    assert chi_square(number(of_q), np.exp(log_q[5])) > 1e-6


def test_vimco_is_unbiased():
    """Theta, phi and lambda of two layers, K = 3, against enumeration of all triples."""
    model, params = deep()

    def support(params, x, eps, log_mass):
        z = jax.tree.map(jnp.asarray, Z)
        return z, jax.vmap(model.log_q, in_axes=(None, None, 0))(params, x, z)

    toy = toys.Toy(model, params, DATA, None, support=support)
    value, gradient = toys.exact_expectations(toy, 3, alphas=(0.0,))[0.0]
    objective = vd.score_function(model, vd.iwae, 3)
    values, draws = toys.gradient_draws({"iwae": objective}, params, DATA, 150_000)["iwae"]
    assert toys.z_scores(values[:, None], value) < 5.0
    toys.check_unbiased(draws, gradient)


def test_elbo_terms_are_left_to_estimators(key):
    """`elbo_estimate` is then the one-draw estimate, at a draw of q."""
    model, params = deep()
    assert model.elbo_terms is None
    z = model.sample_q(key, params, jnp.asarray(X[3]))
    number = int(np.concatenate(z) @ 2 ** np.arange(3, -1, -1))
    log_joint, log_q = enumerated()
    got = model.elbo_estimate(key, params, jnp.asarray(X[3]))
    assert float(got) == pytest.approx(log_joint[3, number] - log_q[3, number], rel=1e-5)


def test_one_layers_logits_are_those_of_its_densities():
    """What relaxations need: log q and log p(z) from `logits` and `prior_logits`, x from `sample_x`."""
    model, params = shallow()
    x, z = jnp.asarray(X[6]), (jnp.asarray(BITS),)
    (logits,), (prior) = model.logits(params, x), model.prior_logits(params)
    over = {"in_axes": (None, None, 0)}
    log_q = jax.vmap(model.log_q, **over)(params, x, z)
    np.testing.assert_allclose(log_q, log_bernoulli(BITS, np.asarray(logits)), rtol=1e-5)
    np.testing.assert_array_equal(prior[0], params.phi)
    log_joint = jax.vmap(model.log_joint, **over)(params, x, z)
    out = np.array([affine(params.theta[0], 2 * bits - 1) for bits in BITS])
    expected = log_bernoulli(BITS, np.asarray(params.phi)) + log_bernoulli(X[6], out)
    np.testing.assert_allclose(log_joint, expected, rtol=1e-5)
    np.testing.assert_allclose(
        jax.vmap(model.decode, in_axes=(None, 0))(params, z), scipy.special.expit(out), rtol=1e-5
    )
    draws = toys.quick_jit(jax.vmap(lambda key: model.sample_x(key, params, (jnp.asarray(BITS[9]),))))(
        jax.random.split(jax.random.key(0), 20_000)
    )
    assert np.max(toys.z_scores(np.asarray(draws, np.float64), scipy.special.expit(out[9]))) < 5.0


def test_floats_are_accepted_for_bits():
    """At 0 and 1 the densities of bits, between them finite with a gradient by z."""
    for model, params, z in ((*deep(), Z), (*shallow(), (BITS,))):
        x = jnp.asarray(X[2])
        bits = tuple(jnp.asarray(leaf[6]) for leaf in z)
        floats = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), bits)
        for of in (model.log_joint, model.log_q):
            assert float(of(params, x, bits)) == float(of(params, x, floats))
            middle = jax.tree.map(lambda leaf: 0.5 * leaf + 0.2, floats)
            slope = jax.grad(of, argnums=2)(params, x, middle)
            assert all(np.all(np.isfinite(leaf)) and np.any(leaf != 0) for leaf in slope)


def test_refusals(key):
    model, params = deep()
    advice = r"got a network of 2 layers, expected one, .* use score_function\(.*wake_sleep"
    with pytest.raises(ValueError, match="^logits: " + advice):
        model.logits(params, jnp.asarray(X[0]))
    with pytest.raises(ValueError, match="^prior_logits: " + advice):
        model.prior_logits(params)
    net, likelihood = linear(2, 2, 0), vd.likelihoods.bernoulli()
    for encoders, decoders in (([net], [net, net]), ([net, net], [net]), ([], [])):
        with pytest.raises(ValueError, match=f"decoders: got {len(decoders)} for {len(encoders)} encoders"):
            vd.sbn(encoders, decoders, num_units=2, likelihood=likelihood)
    with pytest.raises(ValueError, match="num_units: got 0, expected at least 1"):
        vd.sbn([net], [net], num_units=0, likelihood=likelihood)
    raw = jax.random.PRNGKey(0)
    x, z = jnp.asarray(X[0]), tuple(jnp.asarray(leaf[0]) for leaf in Z)
    for call in (
        lambda: model.init(raw),
        lambda: model.sample(raw, params),
        lambda: model.sample_q(raw, params, x),
        lambda: model.sample_x(raw, params, z),
    ):
        with pytest.raises(TypeError, match="expected a typed key"):
            call()
