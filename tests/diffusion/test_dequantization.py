"""Masses of levels from a density of embedded data, against differences of the normal's distribution function."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from tests.diffusion.flows import diffusion_of, on_levels
from vdiff.densities import normal_log_prob
from vdiff.diffusion.dequantization import (
    dequantized_log_prob,
    start_scale,
    truncated_normal_noise,
    uniform_noise,
)
from vdiff.diffusion.probability_flow import ode_log_prob
from vdiff.diffusion.runge_kutta import fixed_grid
from vdiff.types import Params

LOC, SCALE = 0.2, 0.3
LEVELS = [2, 17, 256]


def log_density(key, params, y):
    return jnp.sum(normal_log_prob(y, jnp.full_like(y, LOC), jnp.full_like(y, math.log(SCALE))))


def log_masses(n):
    """Of N(LOC, SCALE^2) on the n equal parts of [-1, 1], in float64."""
    law = scipy.stats.norm(LOC, SCALE)
    edges = -1 + 2 * np.arange(n + 1) / n
    upper = edges > LOC
    # Differences of the smaller tail.
    below, above = np.diff(law.cdf(edges)), -np.diff(law.sf(edges))
    return np.log(np.where(upper[:-1], above, below))


def nodes(n, scale):
    """Nodes in a bin and the masses of q on them, in float64; uniform when scale is None."""
    x, w = np.polynomial.legendre.leggauss(200)
    u = x / n
    q = (
        np.full(200, n / 2)
        if scale is None
        else scipy.stats.truncnorm(-1 / n / scale, 1 / n / scale, 0, scale).pdf(u)
    )
    return u, w / n * q, np.log(q)


NOISES = {
    "uniform": lambda n: (uniform_noise(), None),
    "narrow": lambda n: (truncated_normal_noise(0.4 / n), 0.4 / n),
    "wide": lambda n: (truncated_normal_noise(lambda params: jnp.float32(1.5 / n)), 1.5 / n),
}
every_noise = pytest.mark.parametrize("noise", NOISES.values(), ids=NOISES)


@pytest.mark.parametrize("n", LEVELS)
@pytest.mark.parametrize("shape", [(), (2, 3, 1)])
def test_a_flat_density_gives_every_level_its_share(key, n, shape):
    """The log-Jacobian of the scaling and nothing else: exactly -d log n."""
    flat = lambda key, params, y: jnp.asarray(-y.size * math.log(2.0), jnp.float32)  # noqa: E731
    k = jax.random.randint(key, shape, 0, n)
    got = dequantized_log_prob(flat, n)(key, Params(), k).value
    np.testing.assert_allclose(got, -math.prod(shape) * math.log(n), rtol=1e-6)


@every_noise
@pytest.mark.parametrize("n", LEVELS)
def test_one_draw_is_a_lower_bound_of_known_mean(noise, n):
    """Three levels, 20,000 draws each: the mean of the bound by quadrature, the mean of its exponential is the mass."""
    noise, scale = noise(n)
    log_prob = dequantized_log_prob(log_density, n, noise)
    keys = jax.random.split(jax.random.key(1), 20_000)
    u, mass, log_q = nodes(n, scale)
    of_keys = jax.jit(jax.vmap(log_prob, (0, None, None)))
    for level in sorted({0, n // 2, n - 1}):
        got = of_keys(keys, Params(), jnp.asarray([level]))
        values = np.asarray(got.value, np.float64)
        y = (2 * level + 1) / n - 1 + u
        bound = np.sum(mass * (scipy.stats.norm(LOC, SCALE).logpdf(y) - log_q))
        exact = log_masses(n)[level]
        assert bound <= exact + 1e-12
        rounding = 1e-5
        assert abs(values.mean() - bound) < 5 * values.std() / np.sqrt(len(values)) + rounding
        weights = np.exp(values - exact)
        assert abs(weights.mean() - 1) < 5 * weights.std() / np.sqrt(len(weights)) + rounding
        assert np.all(np.isinf(got.std_error)) and np.allclose(got.ess, 1.0)


@every_noise
@pytest.mark.parametrize("n", LEVELS)
def test_many_draws_reach_the_mass_of_every_level_and_their_sum(noise, n):
    """All levels: within five standard errors each, and in sum the mass that the density has in [-1, 1]."""
    num_samples = {2: 40_000, 17: 5_000, 256: 1_000}[n]
    log_prob = dequantized_log_prob(log_density, n, noise(n)[0], num_samples=num_samples, chunk_size=1_000)
    keys = jax.random.split(jax.random.key(2), n)
    got = jax.jit(jax.vmap(log_prob, (0, None, 0)))(keys, Params(), jnp.arange(n)[:, None])
    value, std_error = np.asarray(got.value, np.float64), np.asarray(got.std_error, np.float64)
    assert np.max(np.abs(value - log_masses(n)) / (std_error + 2e-6)) < 5
    law = scipy.stats.norm(LOC, SCALE)
    mass, error = np.sum(np.exp(value)), np.sqrt(np.sum((np.exp(value) * std_error) ** 2))
    assert abs(mass - (law.cdf(1) - law.cdf(-1))) < 5 * error + 1e-5
    assert mass - 5 * error < 1 and error < 0.01
    assert np.all((got.ess >= 1) & (got.ess <= num_samples * 1.001))


def test_the_standard_error_is_the_spread_and_chunks_do_not_matter():
    k, params = jnp.asarray([[3, 9, 16]]), Params()
    keys = jax.random.split(jax.random.key(3), 1_000)
    runs = [
        jax.jit(
            jax.vmap(dequantized_log_prob(log_density, 17, num_samples=30, chunk_size=c), (0, None, None))
        )(keys, params, k)
        for c in (1, 7, 100)
    ]
    for run in runs[1:]:
        np.testing.assert_allclose(run.value, runs[0].value, rtol=2e-6)
        np.testing.assert_allclose(run.ess, runs[0].ess, rtol=1e-5)
    np.testing.assert_allclose(np.mean(runs[0].std_error), np.std(runs[0].value), rtol=0.1)
    exact = log_masses(17)[[3, 9, 16]].sum()
    assert np.mean(runs[0].value) < exact < np.mean(runs[0].value) + 0.1


def test_truncated_normal_noise_is_that():
    """Its moments, and that its density is its own: E[1 / q] is the volume of the bin."""
    half, scale = 0.25, 0.2
    noise = jax.vmap(lambda key: truncated_normal_noise(scale)(key, Params(), (2,), half))
    u, log_q = noise(jax.random.split(jax.random.key(4), 50_000))
    law = scipy.stats.truncnorm(-half / scale, half / scale, 0, scale)
    assert np.max(np.abs(u)) <= half
    assert abs(np.mean(u)) < 5 * law.std() / np.sqrt(u.size)
    np.testing.assert_allclose(np.std(u), law.std(), rtol=0.01)
    np.testing.assert_allclose(log_q, law.logpdf(np.asarray(u, np.float64)).sum(1), atol=1e-5)


def test_noise_of_the_start_finds_the_masses_of_data_on_levels():
    """A flow whose data are bare levels: log P(k) itself, where uniform noise is lost between the peaks."""
    log_mass = np.log([0.1, 0.4, 0.2, 0.3])
    diffusion, params = diffusion_of(on_levels, jnp.asarray(log_mass, jnp.float32), (2,), (11.0, -9.0))
    np.testing.assert_allclose(start_scale(diffusion)(params), np.exp(-5.5), rtol=1e-6)
    density = ode_log_prob(diffusion, solver=fixed_grid(40))
    k = jnp.asarray([[0, 1], [2, 3], [3, 0]])
    exact = log_mass[np.asarray(k)].sum(1)
    keys = jax.random.split(jax.random.key(5), 3)

    def values(noise, num_samples):
        log_prob = dequantized_log_prob(density, 4, noise, num_samples=num_samples, chunk_size=50)
        return np.asarray(jax.jit(jax.vmap(log_prob, (0, None, 0)))(keys, params, k).value)

    matched = truncated_normal_noise(start_scale(diffusion))
    np.testing.assert_allclose(values(matched, 50), exact, atol=5e-3)
    assert np.all(values(uniform_noise(), 50) < exact - 3)


def test_the_density_gets_a_key_of_its_own_and_the_parameters():
    """An estimate that is right on average only is still a bound with one draw; its noise is not the bin's."""

    def noisy(key, params, y):
        return params.theta * log_density(key, params, y) + jax.random.normal(key)

    log_prob = dequantized_log_prob(noisy, 17)
    keys = jax.random.split(jax.random.key(6), 20_000)
    got = jax.jit(jax.vmap(log_prob, (0, None, None)))(keys, Params(theta=jnp.float32(0.5)), jnp.asarray([9]))
    u, mass, log_q = nodes(17, None)
    exact = np.sum(mass * (0.5 * scipy.stats.norm(LOC, SCALE).logpdf(19 / 17 - 1 + u) - log_q))
    values = np.asarray(got.value, np.float64)
    assert abs(values.mean() - exact) < 5 * values.std() / np.sqrt(len(values))
    np.testing.assert_allclose(values.std(), 1.0, rtol=0.05)


def test_the_gradient_reaches_the_noises_scale(key):
    """By a scale that is a parameter: the one-draw bound's, against quadrature by central differences."""
    noise = truncated_normal_noise(lambda params: jnp.exp(params.lam))
    log_prob = dequantized_log_prob(log_density, 2, noise)
    keys = jax.random.split(key, 20_000)

    def value(lam, key):
        return log_prob(key, Params(lam=lam), jnp.asarray([1])).value

    slope = jax.jit(jax.vmap(jax.grad(value), (None, 0)))(jnp.log(0.2), keys)

    def bound(scale):
        u, mass, log_q = nodes(2, scale)
        return np.sum(mass * (scipy.stats.norm(LOC, SCALE).logpdf(0.5 + u) - log_q))

    exact = (bound(0.2 * np.exp(1e-4)) - bound(0.2 * np.exp(-1e-4))) / 2e-4
    slope = np.asarray(slope, np.float64)
    assert abs(slope.mean() - exact) < 5 * slope.std() / np.sqrt(len(slope))
    assert abs(exact) > 10 * slope.std() / np.sqrt(len(slope))


@pytest.mark.parametrize("k", [-1, 17, 200])
def test_a_level_outside_is_nan(key, k):
    for num_samples in (1, 3):
        log_prob = dequantized_log_prob(log_density, 17, num_samples=num_samples)
        assert np.isnan(log_prob(key, Params(), jnp.asarray([3, k])).value)
        assert np.isfinite(log_prob(key, Params(), jnp.asarray([3, 16], jnp.uint8)).value)


def test_refusals(key):
    with pytest.raises(ValueError, match="num_levels: got 1, expected at least 2"):
        dequantized_log_prob(log_density, 1)
    with pytest.raises(ValueError, match="num_samples, chunk_size: got 0, 1"):
        dequantized_log_prob(log_density, 2, num_samples=0)
    with pytest.raises(ValueError, match="num_samples, chunk_size: got 1, 0"):
        dequantized_log_prob(log_density, 2, chunk_size=0)
    with pytest.raises(ValueError, match="scale: got 0.0, expected a positive standard deviation"):
        truncated_normal_noise(0.0)
    with pytest.raises(TypeError, match=r"k: got float32, expected an integer array of levels 0..16"):
        dequantized_log_prob(log_density, 17)(key, Params(), jnp.zeros(2))
    with pytest.raises(TypeError, match="expected a typed key"):
        dequantized_log_prob(log_density, 17)(jax.random.PRNGKey(0), Params(), jnp.zeros(2, jnp.int32))
