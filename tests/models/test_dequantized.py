"""Masses of integers from densities, against differences of the normal's distribution function."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

import vdiff as vd

LEVELS, LOC, SCALE = 8, 0.55, 0.11
NUM_DRAWS = 40_000
EDGES = np.arange(LEVELS + 1) / LEVELS
LOG_MASS = np.log(np.diff(scipy.stats.norm(LOC, SCALE).cdf(EDGES)))


def density(shape=()):
    """y = loc + scale eps, independent in each dimension; no latent, no terms of its own."""
    return vd.Model(
        init=lambda key: vd.Params(theta={"loc": jnp.float32(LOC), "log_scale": jnp.log(jnp.float32(SCALE))}),
        log_joint=lambda params, y, z: jnp.sum(
            jax.scipy.stats.norm.logpdf(y, params.theta["loc"], jnp.exp(params.theta["log_scale"]))
        ),
        log_q=lambda params, y, z: jnp.zeros(()),
        sample_q=lambda key, params, y: (),
        sample=lambda key, params: (
            params.theta["loc"] + jnp.exp(params.theta["log_scale"]) * jax.random.normal(key, shape),
            (),
        ),
    )


def many(function, seed=0, num_draws=NUM_DRAWS):
    """Float64 values of `(key) -> []` over independent keys."""
    keys = jax.random.split(jax.random.key(seed), num_draws)
    return np.asarray(jax.jit(jax.vmap(function))(keys), np.float64)


def z_score(values, expected):
    return (values.mean() - expected) / (values.std() / np.sqrt(len(values)))


@pytest.mark.parametrize("level", [2, 4, 6])
def test_importance_sampling_gives_the_mass(key, level):
    """E exp(value) = P(k), at any K; the standard error is below 1 %."""
    model = vd.dequantized(density(), LEVELS)
    params, x = model.init(key), jnp.int32(level)
    evaluator = vd.importance_log_prob(model, 7, 3)
    ratio = np.exp(many(lambda k: evaluator(k, params, x).value) - LOG_MASS[level])
    assert ratio.std() / np.sqrt(NUM_DRAWS) < 0.01
    assert abs(z_score(ratio, 1.0)) < 5
    out = vd.importance_log_prob(model, 20_000, 1000)(key, params, x)
    assert abs(float(out.value) - LOG_MASS[level]) < 5 * float(out.std_error)


def exact_elbo(level):
    """Mean over the bin of log N(y; loc, scale^2) - log levels: y is uniform, of variance 1 / 12 bins."""
    square = ((level + 0.5) / LEVELS - LOC) ** 2 + 1 / (12 * LEVELS**2)
    return -0.5 * square / SCALE**2 - np.log(SCALE) - 0.5 * np.log(2 * np.pi) - np.log(LEVELS)


@pytest.mark.parametrize("level", [2, 4, 6])
def test_the_elbo_is_the_mean_log_density_and_a_bound(key, level):
    """In value by both routes, the terms and log_joint - log_q, and in gradient by quadrature's closed form."""
    model = vd.dequantized(density(), LEVELS)
    params, x = model.init(key), jnp.int32(level)
    elbo = exact_elbo(level)
    assert elbo < LOG_MASS[level] - 1e-3
    values = many(lambda k: model.elbo_estimate(k, params, x))
    assert abs(z_score(values, elbo)) < 5
    pathwise = vd.total(vd.pathwise(model, vd.elbo, 2))
    assert abs(z_score(many(lambda k: pathwise(k, params, x), seed=1), elbo)) < 5
    by_loc = many(lambda k: jax.grad(lambda p: model.elbo_estimate(k, p, x))(params).theta["loc"])
    assert abs(z_score(by_loc, ((level + 0.5) / LEVELS - LOC) / SCALE**2)) < 5


def test_terms_of_a_model_without_and_with_its_own(key):
    shape = (3, 2)
    x = jnp.array([[0, 7], [3, 4], [5, 1]])
    model = vd.dequantized(density(shape), LEVELS)
    terms = model.elbo_terms(key, model.init(key), x)
    assert set(terms) == {"elbo", "dequantization"}
    np.testing.assert_allclose(float(terms["dequantization"]), -6 * math.log(LEVELS), rtol=1e-6)
    assert terms["dequantization"].dtype == jnp.float32 and terms["dequantization"].shape == ()

    vae = vd.vae(
        vd.nets.mlp(shape, (4,), hidden=(5,)),
        vd.nets.mlp((2,), shape, hidden=(5,)),
        latent_dim=2,
        likelihood=vd.likelihoods.gaussian(0.3),
    )
    model = vd.dequantized(vae, LEVELS)
    params = jax.jit(model.init)(key)
    terms = model.elbo_terms(key, params, x)
    assert set(terms) == {"reconstruction", "kl", "dequantization"}
    np.testing.assert_allclose(float(terms["dequantization"]), -6 * math.log(LEVELS), rtol=1e-6)
    # The terms' sum and the weights' mean are one number, the ELBO of the pair (u, z).
    pathwise = vd.total(vd.pathwise(model, vd.elbo, 3))
    one = many(lambda k: model.elbo_estimate(k, params, x))
    other = many(lambda k: pathwise(k, params, x), seed=1)
    assert abs(one.mean() - other.mean()) < 5 * np.sqrt((one.var() + other.var()) / NUM_DRAWS)
    assert np.sqrt(one.var() / NUM_DRAWS) < 0.01 * abs(one.mean())


def test_noise_is_uniform_in_the_bin_and_its_own_in_each_pixel(key):
    model = vd.dequantized(density((3,)), LEVELS)
    params, x = model.init(key), jnp.array([0, 4, 7])
    keys = jax.random.split(key, NUM_DRAWS)
    u, rest = jax.vmap(model.sample_q, in_axes=(0, None, None))(keys, params, x)
    assert rest == ()
    u = np.asarray(u, np.float64)
    assert u.shape == (NUM_DRAWS, 3) and u.min() >= 0 and u.max() < 1
    for column in u.T:
        assert scipy.stats.kstest(column, "uniform").pvalue > 1e-6
    assert np.max(np.abs(np.corrcoef(u.T) - np.eye(3))) * np.sqrt(NUM_DRAWS) < 5
    # log_joint reads u as the place in the bin: y = (x + u) / levels.
    got = model.log_joint(params, x, (jnp.array([0.0, 0.25, 0.5]), ()))
    y = np.array([0.0, 4.25, 7.5]) / LEVELS
    expected = scipy.stats.norm(LOC, SCALE).logpdf(y).sum() - 3 * np.log(LEVELS)
    np.testing.assert_allclose(float(got), expected, rtol=1e-5)
    assert float(model.log_q(params, x, (jnp.array([0.0, 0.25, 0.5]), ()))) == 0.0


def test_samples_are_integers_in_range_with_the_right_masses(key):
    """A wide density: what falls outside [0, 1) is clipped into the outermost levels."""
    model = vd.dequantized(density((2,)), LEVELS)
    params = model.init(key)
    params = params._replace(theta={"loc": jnp.float32(0.5), "log_scale": jnp.log(jnp.float32(0.5))})
    x, (u, _) = jax.vmap(model.sample, in_axes=(0, None))(jax.random.split(key, NUM_DRAWS), params)
    assert x.dtype == jnp.int32 and x.shape == u.shape == (NUM_DRAWS, 2)
    assert int(x.min()) == 0 and int(x.max()) == LEVELS - 1
    edges = np.concatenate([[-np.inf], EDGES[1:-1], [np.inf]])
    mass = np.diff(scipy.stats.norm(0.5, 0.5).cdf(edges))
    counts = np.stack([np.bincount(column, minlength=LEVELS) for column in np.asarray(x).T])
    z = (counts - NUM_DRAWS * mass) / np.sqrt(NUM_DRAWS * mass * (1 - mass))
    assert np.max(np.abs(z)) < 5
    # (x + u) / levels is the density's own draw, also where it was clipped.
    y = (np.asarray(x) + np.asarray(u, np.float64)) / LEVELS
    assert scipy.stats.kstest(y.ravel(), scipy.stats.norm(0.5, 0.5).cdf).pvalue > 1e-6
    inside = (np.asarray(x) > 0) & (np.asarray(x) < LEVELS - 1)
    assert np.asarray(u)[inside].min() >= 0 and np.asarray(u)[inside].max() < 1


def test_uint8_images_are_data(key):
    """What `data.load` gives: the sum k + u must not be taken in uint8."""
    model = vd.dequantized(density((2,)), 256)
    params = model.init(key)
    u = jnp.array([0.5, 0.25])
    as_int = model.log_joint(params, jnp.array([255, 3], jnp.int32), (u, ()))
    as_byte = model.log_joint(params, jnp.array([255, 3], jnp.uint8), (u, ()))
    expected = scipy.stats.norm(LOC, SCALE).logpdf(np.array([255.5, 3.25]) / 256).sum() - 2 * np.log(256)
    np.testing.assert_allclose(float(as_byte), expected, rtol=1e-5)
    assert float(as_byte) == float(as_int)


@pytest.mark.parametrize("levels", [1, 0, -3])
def test_fewer_than_two_levels_are_refused(levels):
    with pytest.raises(ValueError, match=f"levels: got {levels}, expected at least 2; count the values"):
        vd.dequantized(density(), levels)


def test_a_raw_key_is_refused(key):
    model = vd.dequantized(density(), LEVELS)
    for function in (model.sample_q, model.elbo_terms):
        with pytest.raises(TypeError, match="expected a typed key"):
            function(jax.random.PRNGKey(0), model.init(key), jnp.int32(3))
