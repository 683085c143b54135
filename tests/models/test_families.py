"""Each family against scipy, against quadrature, and its draws against its density, by z-scores."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats

from tests import toys
from vdiff import Params
from vdiff.models import families
from vdiff.models.families import Family

D, RANK, K = 3, 2, 3
FAMILIES = {
    "mean_field": families.mean_field(D),
    "full_rank": families.full_rank(D),
    "low_rank": families.low_rank(D, RANK),
    "mixture": families.mixture(D, K),
}
OUTS = {
    "mean_field": [0.9, -0.6, 0.4, -0.5, 0.2, -0.1],
    "full_rank": [0.9, -0.6, 0.4, -0.5, 0.2, -0.1, 0.7, -0.4, 0.5],
    "low_rank": [0.9, -0.6, 0.4, -0.5, 0.2, -0.1, 0.6, -0.3, 0.2, 0.8, -0.5, 0.4],
    "mixture": [
        *(0.5, -0.9, 0.2),
        *(0.9, -0.6, 0.4, -0.7, 0.5, 0.1, 0.2, -0.2, -1.0),
        *(-0.3, 0.1, -0.1, 0.0, -0.4, -0.2, 0.1, -0.1, 0.2),
    ],
}
OUTS = {name: np.array(out, np.float32) for name, out in OUTS.items()}
# f(z) = sin(a . z) + (b . z)^2, whose expectation under a Gaussian is a closed form.
A, B = np.array([0.8, -0.5, 0.6], np.float32), np.array([0.6, 0.4, -0.7], np.float32)


@pytest.fixture(params=FAMILIES)
def name(request):
    return request.param


def components(name, out, d=D, xp=np):
    """The density as a list of (weight, loc, covariance), from the definitions; xp is numpy or jax.numpy."""
    out = xp.asarray(out, xp.float64)
    if name == "mixture":
        k = len(out) // (1 + 2 * d)
        weight = xp.exp(out[:k]) / xp.sum(xp.exp(out[:k]))
        loc, log_scale = out[k : k + k * d].reshape(k, d), out[k + k * d :].reshape(k, d)
        return [(weight[i], loc[i], xp.diag(xp.exp(2 * log_scale[i]))) for i in range(k)]
    loc, scale, rest = out[:d], xp.diag(xp.exp(out[d : 2 * d])), out[2 * d :]
    if name == "mean_field":
        inner = xp.eye(d)
    elif name == "full_rank":
        # A matrix for each entry of N: no scatter in common with the code.
        places = [(i, j) for i in range(d) for j in range(i)]
        units = [np.outer(np.eye(d)[i], np.eye(d)[j]) for i, j in places]
        factor = xp.eye(d) + sum((v * u for v, u in zip(rest, units, strict=True)), xp.zeros((d, d)))
        inner = factor @ factor.T
    else:
        w = rest.reshape(d, -1)
        inner = xp.eye(d) + w @ w.T
    return [(1.0, loc, scale @ inner @ scale)]


def exact_log_prob(name, out, z, d=D):
    """By scipy's multivariate normal, float64."""
    parts = [
        np.log(weight) + scipy.stats.multivariate_normal(loc, cov).logpdf(z).reshape(len(z))
        for weight, loc, cov in components(name, out, d)
    ]
    return scipy.special.logsumexp(parts, axis=0)


def log_probs(family, out, z):
    return jax.vmap(family.log_prob, in_axes=(None, 0))(out, z)


def test_sizes():
    assert [FAMILIES[name].size for name in FAMILIES] == [6, 9, 12, 21]
    assert all(len(OUTS[name]) == family.size for name, family in FAMILIES.items())


def test_log_prob_is_scipys(name):
    z = np.random.default_rng(1).normal(scale=3.0, size=(50, D)).astype(np.float32)
    expected = exact_log_prob(name, OUTS[name], z.astype(np.float64))
    exact = toys.in_float64(lambda out, z: log_probs(FAMILIES[name], out, z), OUTS[name], z)
    np.testing.assert_allclose(exact, expected, rtol=1e-11)
    single = toys.quick_jit(lambda out, z: log_probs(FAMILIES[name], out, z))(OUTS[name], z)
    assert single.dtype == jnp.float32
    np.testing.assert_allclose(single, expected, rtol=3e-6)


@pytest.mark.parametrize("d", [1, 2])
def test_densities_integrate_to_one(d):
    """By the trapezoid rule in float64, for parameters of which scipy knows nothing."""
    makers = {
        "mean_field": families.mean_field(d),
        "full_rank": families.full_rank(d),
        "low_rank": families.low_rank(d, 1),
        "mixture": families.mixture(d, 4),
    }
    axis = np.linspace(-14, 14, 400)
    grid = np.stack(np.meshgrid(*[axis] * d), axis=-1).reshape(-1, d)
    rng = np.random.default_rng(0)
    outs = {name: 0.5 * rng.normal(size=family.size) for name, family in makers.items()}

    def mass(outs, z):
        return {name: jnp.sum(jnp.exp(log_probs(makers[name], out, z))) for name, out in outs.items()}

    for name, total in toys.in_float64(mass, outs, grid).items():
        np.testing.assert_allclose(total * (axis[1] - axis[0]) ** d, 1.0, rtol=1e-9, err_msg=name)


def test_draws_have_the_moments_and_the_score_of_the_density(name):
    """Mean and second moments of z, and E[d log q / d out] = 0, in standard errors."""
    family, num_draws = FAMILIES[name], 100_000

    @toys.quick_jit
    @jax.vmap
    def draw(key):
        z = family.sample(key, jnp.asarray(OUTS[name]))
        return z, jnp.outer(z, z)[jnp.triu_indices(D)], jax.grad(family.log_prob)(jnp.asarray(OUTS[name]), z)

    first, second, score = draw(jax.random.split(jax.random.key(2), num_draws))
    parts = components(name, OUTS[name])
    mean = sum(w * m for w, m, _ in parts)
    moment = sum(w * (c + np.outer(m, m)) for w, m, c in parts)[np.triu_indices(D)]
    assert np.max(toys.z_scores(np.asarray(first, np.float64), mean)) < 5
    assert np.max(toys.z_scores(np.asarray(second, np.float64), moment)) < 5
    assert np.max(toys.z_scores(np.asarray(score, np.float64), np.zeros(family.size))) < 5
    # The scale on which a z of 5 is judged: 1.6 % of a standard deviation, of a root of the Fisher information.
    assert np.all(np.std(score, axis=0) > 0.05)


def expectation_of_f(name, out):
    a, b = jnp.asarray(A, jnp.float64), jnp.asarray(B, jnp.float64)
    return sum(
        w * (jnp.exp(-0.5 * a @ c @ a) * jnp.sin(a @ m) + jnp.square(b @ m) + b @ c @ b)
        for w, m, c in components(name, out, xp=jnp)
    )


def test_pathwise_gradient_of_a_nonlinear_function(name):
    """d/d out E_q[sin(a.z) + (b.z)^2] against the closed form; a mixture's weights are judged by themselves."""
    family, num_logits = FAMILIES[name], K if name == "mixture" else 0

    def objective(key, params, x):
        out = jnp.concatenate([params.theta, params.lam])
        z = family.sample(key, out)
        return {"f": jnp.sin(jnp.sum(A * z)) + jnp.square(jnp.sum(B * z))}

    out = OUTS[name]
    params = Params(theta=jnp.asarray(out[:num_logits]), lam=jnp.asarray(out[num_logits:]))
    value, gradient = toys.in_float64(jax.value_and_grad(lambda out: expectation_of_f(name, out)), out)
    num_draws = 550_000 if name == "mixture" else 250_000
    values, draws = toys.gradient_draws({"f": objective}, params, np.zeros(1), num_draws)["f"]
    assert np.max(toys.z_scores(np.asarray(values, np.float64)[:, None], np.array([value]))) < 5
    exact = Params(theta=gradient[:num_logits], lam=gradient[num_logits:])
    toys.check_unbiased(draws, exact, ("theta", "lam") if num_logits else ("lam",))


def test_fused_is_the_two_apart(name):
    """The same draw, value and gradient, under jit and vmap."""
    family = FAMILIES[name]

    def fused(out, key):
        z, log_prob = family.sample_and_log_prob(key, out)
        return (z, log_prob), jnp.sum(jnp.sin(z)) + log_prob

    def apart(out, key):
        z = family.sample(key, out)
        log_prob = family.log_prob(out, z)
        return (z, log_prob), jnp.sum(jnp.sin(z)) + log_prob

    def values(out, key):
        return [(f(out, key)[0], jax.grad(lambda out, f=f: f(out, key)[1])(out)) for f in (fused, apart)]

    keys = jax.random.split(jax.random.key(5), 40)
    ((z, log_prob), grads), ((z2, log_prob2), grads2) = toys.quick_jit(jax.vmap(values, in_axes=(None, 0)))(
        OUTS[name], keys
    )
    np.testing.assert_allclose(z, z2, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(log_prob, log_prob2, rtol=1e-6, atol=2e-6)
    np.testing.assert_allclose(grads, grads2, rtol=1e-4, atol=2e-5)
    np.testing.assert_allclose(
        log_prob, exact_log_prob(name, OUTS[name], np.asarray(z, float)), rtol=1e-5, atol=1e-5
    )


def extreme_outs(size):
    signs = np.where(np.random.default_rng(0).random((12, size)) < 0.5, -1.0, 1.0)
    signs[:2] = [[-1.0], [1.0]] * np.ones(size)
    mild = np.where(np.arange(size) % 3 == 0, 1.0, 0.1)
    return np.concatenate([scale * signs for scale in (20.0, 80.0)] + [80.0 * signs * mild]).astype(
        np.float32
    )


def test_extreme_parameters_give_finite_values_and_gradients(name):
    family = FAMILIES[name]
    fixed = jnp.array([[0.0, 0.0, 0.0], [1e3, -1e3, 10.0], [1e4, 1e4, -1e4]])

    def at(out, key):
        z, log_prob = family.sample_and_log_prob(key, out)
        jacobian = jax.jacrev(lambda out: family.sample_and_log_prob(key, out))(out)
        spots = jnp.concatenate([z[None], fixed])
        value_and_grads = jax.vmap(jax.value_and_grad(family.log_prob, argnums=(0, 1)), in_axes=(None, 0))
        return z, log_prob, jacobian, value_and_grads(out, spots)

    outs = extreme_outs(family.size)
    keys = jax.random.split(jax.random.key(0), len(outs))
    for leaf in jax.tree.leaves(toys.quick_jit(jax.vmap(at))(outs, keys)):
        assert np.all(np.isfinite(leaf))


def test_bounded_is_the_identity_up_to_20_and_never_flat():
    family = families.mean_field(1)
    log_scales = jnp.array([-20.0, -3.0, 0.0, 19.0, 20.0, 1e4])

    @toys.quick_jit
    @jax.vmap
    @jax.value_and_grad
    def entropy(log_scale):
        return -family.sample_and_log_prob(jax.random.key(0), jnp.stack([0.0 * log_scale, log_scale]))[1]

    values, slopes = entropy(log_scales)
    eps = jax.random.normal(jax.random.key(0), (1,))[0]
    expected = log_scales.at[-1].set(20 + np.log(1e4 - 19))
    np.testing.assert_allclose(values - 0.5 * (eps**2 + toys.LOG_2_PI), expected, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(slopes, [1.0, 1.0, 1.0, 1.0, 1.0, 1 / 9981], rtol=1e-6)


def test_a_mixture_of_one_is_mean_field():
    one, out = families.mixture(D, 1), OUTS["mean_field"]
    z = np.random.default_rng(0).normal(size=(5, D)).astype(np.float32)
    np.testing.assert_allclose(
        log_probs(one, jnp.asarray(np.append(3.0, out), jnp.float32), z),
        log_probs(FAMILIES["mean_field"], jnp.asarray(out), z),
        rtol=1e-6,
    )


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: families.mean_field(0), "latent_dim: got 0, expected at least 1"),
        (lambda: families.full_rank(-1), "latent_dim: got -1"),
        (lambda: families.low_rank(0, 1), "latent_dim: got 0"),
        (lambda: families.low_rank(3, 0), "rank: got 0, expected at least 1"),
        (lambda: families.low_rank(3, 4), r"rank: got 4, expected at most latent_dim = 3; use full_rank"),
        (lambda: families.mixture(0, 2), "latent_dim: got 0"),
        (lambda: families.mixture(2, 0), "num_components: got 0"),
    ],
)
def test_refusals(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_out_of_the_wrong_shape_is_refused(name):
    family: Family = FAMILIES[name]
    message = rf"out: got shape \({family.size + 1},\), expected \({family.size},\)"
    out = jnp.zeros(family.size + 1)
    for call in (
        lambda: family.log_prob(out, jnp.zeros(D)),
        lambda: family.sample(jax.random.key(0), out),
        lambda: family.sample_and_log_prob(jax.random.key(0), out),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_a_raw_key_is_refused(name, unchecked):
    with pytest.raises(TypeError, match="expected a typed key"):
        FAMILIES[name].sample(jnp.zeros((2,), jnp.uint32), jnp.asarray(OUTS[name]))
