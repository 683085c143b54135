"""The implicit derivative against the triangular map itself, differentiated and solved densely in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats

from tests import toys
from vdiff.models.implicit import reparametrized


def log_components(z, loc, log_scale):
    return -0.5 * ((z[None] - loc) / jnp.exp(log_scale)) ** 2 - log_scale - 0.5 * toys.LOG_2_PI


def triangular_map(z, mixture):
    """S_j(z) = F(z_j | z_1..z_{j-1}), dimension by dimension."""
    log_r, loc, log_scale = mixture
    uniforms = []
    for j in range(z.shape[0]):
        cdf = 0.5 * jax.lax.erfc(-(z[j] - loc[:, j]) / jnp.exp(log_scale[:, j]) / np.sqrt(2))
        uniforms.append(jnp.sum(jax.nn.softmax(log_r) * cdf))
        log_r = log_r + log_components(z, loc, log_scale)[:, j]
    return jnp.stack(uniforms)


def unflatten(out, k, d):
    """Logits, which may be moved freely, in place of log weights that must sum to one."""
    return jax.nn.log_softmax(out[:k]), out[k : k + k * d].reshape(k, d), out[k + k * d :].reshape(k, d)


def reference(out, z, k, d):
    """-(dS/dz)^-1 dS/dout."""

    def mapped(out, z):
        return triangular_map(z, unflatten(out, k, d))

    return -jnp.linalg.solve(jax.jacfwd(mapped, argnums=1)(out, z), jax.jacfwd(mapped)(out, z))


def derivative(out, z, k, d, jacobian=jax.jacrev):
    return jacobian(lambda out: reparametrized(z, *unflatten(out, k, d)))(out)


jitted = toys.quick_jit(derivative, static_argnums=(2, 3, 4))


def random_mixture(seed, k, d, spread=1.0):
    rng = np.random.default_rng(seed)
    parts = rng.normal(size=k), spread * rng.normal(size=(k, d)), 0.4 * rng.normal(size=(k, d))
    return np.concatenate([part.ravel() for part in parts]).astype(np.float32)


@pytest.mark.parametrize("k, d", [(2, 1), (3, 4)])
def test_derivative_is_that_of_the_triangular_map(k, d):
    out = random_mixture(k, k, d)
    z = np.random.default_rng(0).normal(scale=1.2, size=(30, d)).astype(np.float32)
    both = jax.vmap(lambda z, out: (derivative(out, z, k, d), reference(out, z, k, d)), (0, None))
    exact, expected = toys.in_float64(both, z, out)
    np.testing.assert_allclose(exact, expected, rtol=1e-8, atol=1e-9 * np.max(np.abs(expected)))
    single = toys.quick_jit(jax.vmap(lambda z, out: derivative(out, z, k, d), (0, None)))(z, out)
    size = np.max(np.abs(expected), axis=(1, 2), keepdims=True)
    assert np.max(np.abs(single - expected) / size) < 3e-5


def test_one_component_is_the_ordinary_reparametrization():
    out, z = random_mixture(0, 1, 2), jnp.array([0.3, -1.2])
    got = jitted(jnp.asarray(out), z, 1, 2)
    loc = out[1:3]
    expected = np.concatenate([np.zeros((2, 1)), np.eye(2), np.diag(z - loc)], axis=1)
    np.testing.assert_allclose(got, expected, atol=1e-6)


def test_forward_and_reverse_mode_agree():
    out, z = jnp.asarray(random_mixture(1, 3, 4)), jnp.array([0.1, -0.5, 1.0, 0.4])
    forward = jitted(out, z, 3, 4, jax.jacfwd)
    np.testing.assert_allclose(forward, jitted(out, z, 3, 4), rtol=1e-5, atol=1e-6)


def test_second_derivatives():
    """d/dout of the velocity v(z(out), out) is the partial one plus (dv/dz) v."""
    k, d = 2, 2
    out, z = random_mixture(4, k, d), np.array([0.4, -0.3], np.float32)

    def expected(out, z):
        by_out, by_z = jax.jacfwd(lambda out, z: reference(out, z, k, d), argnums=(0, 1))(out, z)
        return by_out + jnp.einsum("jpi,iq->jpq", by_z, reference(out, z, k, d))

    def got(out, z):
        return jax.jacfwd(jax.jacrev(lambda out: reparametrized(z, *unflatten(out, k, d))))(out)

    one, other = toys.in_float64(lambda out, z: (got(out, z), expected(out, z)), out, z)
    np.testing.assert_allclose(one, other, rtol=1e-7, atol=1e-9)


def far_out_cases():
    """(logits, loc, scale, z) in one dimension: tails, gaps, and weights that float32 hardly holds."""
    return {
        "left tail": ([0.3, -0.4], [-0.5, 0.8], [1.0, 0.7], -9.0),
        "far left tail": ([0.3, -0.4], [-0.5, 0.8], [1.0, 0.7], -30.0),
        "in the gap": ([0.3, -0.4], [-8.0, 8.0], [1.0, 1.0], 0.7),
        "by the left of two": ([0.3, -0.4], [-20.0, 20.0], [1.0, 1.0], -18.0),
        "by the right of two": ([0.3, -0.4], [-20.0, 20.0], [1.0, 1.0], 22.0),
        "a weight of 1e-11, here": ([0.0, -25.0], [-3.0, 3.0], [0.5, 0.5], 3.2),
        "a weight of 1e-35, there": ([0.0, -80.0], [-3.0, 3.0], [0.5, 0.5], -3.2),
        "narrow in wide": ([0.0, 0.0], [0.0, 0.1], [1e-4, 10.0], 1e-4),
        "far out of narrow": ([0.0, 0.0], [0.0, 0.1], [1e-4, 10.0], -40.0),
    }


def exact_velocity(logits, loc, scale, z):
    """Closed form in one dimension, float64, for two components: scipy's logcdf, from the left."""
    logits, loc, scale = (np.asarray(v, np.float64) for v in (logits, loc, scale))
    if z > 0 and np.all(z > loc):  # the right tail is the left one of the mirrored mixture
        by_out = exact_velocity(logits, -loc, scale, -z)
        return by_out * np.repeat([-1.0, 1.0, -1.0], len(logits))
    log_pi = logits - scipy.special.logsumexp(logits)
    log_f = scipy.special.logsumexp(log_pi + scipy.stats.norm(loc, scale).logpdf(z))
    share = np.exp(log_pi + scipy.stats.norm(loc, scale).logpdf(z) - log_f)
    mass = np.exp(scipy.stats.norm(loc, scale).logcdf(z) - log_f)
    by_logit = -np.exp(np.sum(log_pi)) * (mass[0] - mass[1]) * np.array([1.0, -1.0])  # two components
    return np.concatenate([by_logit, share, share * (z - loc)])


@pytest.mark.parametrize("case", far_out_cases())
def test_far_out_draws_and_unequal_weights(case):
    """Float32 holds the velocity to 1e-4 of its size, parameter group by parameter group."""
    logits, loc, scale, z = far_out_cases()[case]
    out = np.concatenate([logits, loc, np.log(scale)]).astype(np.float32)
    z = np.float32(z)
    exact = exact_velocity(out[:2], out[2:4], np.exp(out[4:].astype(np.float64)), float(z))
    mirrored = np.repeat([1.0, -1.0, 1.0], 2).astype(np.float32)
    mirrored_exact = exact * np.repeat([-1.0, 1.0, -1.0], 2)
    for o, point, expected in ((out, z, exact), (mirrored * out, -z, mirrored_exact)):
        # d/d log scale is per scale already: velocity by log scale is (z - loc) share.
        got = jitted(jnp.asarray(o), jnp.asarray([point]), 2, 1)[0]
        for part in (slice(0, 2), slice(2, 4), slice(4, 6)):
            np.testing.assert_allclose(
                got[part], expected[part], rtol=2e-4, atol=1e-4 * np.max(np.abs(expected[part]))
            )


def test_the_draws_own_derivative_is_dropped():
    mixture = unflatten(jnp.asarray(random_mixture(0, 2, 2)), 2, 2)
    grad = toys.quick_jit(jax.grad(lambda z: jnp.sum(reparametrized(z, *mixture))))(jnp.ones(2))
    np.testing.assert_array_equal(grad, 0.0)
