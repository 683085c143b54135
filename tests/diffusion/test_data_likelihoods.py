"""p(x | z_1) against scipy in float64, far tails and slopes included; masses, samples, embeddings."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats

from tests import toys
from tests.diffusion import cases
from vdiff import diffusion

DRAWS = 100_000
DISCRETE = {
    "discretized_gaussian(2)": (diffusion.discretized_gaussian, 2),
    "discretized_gaussian(5)": (diffusion.discretized_gaussian, 5),
    "discretized_gaussian(256)": (diffusion.discretized_gaussian, 256),
    "levels(2)": (diffusion.levels, 2),
    "levels(5)": (diffusion.levels, 5),
    "levels(256)": (diffusion.levels, 256),
}
every_discrete = pytest.mark.parametrize("name", DISCRETE)


def built(name):
    make, levels = DISCRETE[name]
    return make(levels), levels


def all_masses(likelihood, levels, params, x_hat, z, log_snr):
    """log p(x = k) of one pixel, for every k."""
    log_prob = lambda k: likelihood.log_prob(params, k[None], x_hat, z, log_snr)  # noqa: E731
    return np.asarray(jax.jit(jax.vmap(log_prob))(jnp.arange(levels)), np.float64)


# Gaussian.


@pytest.mark.parametrize("scale", [0.3, 2.0])
def test_fixed_gaussian(scale, key):
    likelihood = diffusion.gaussian(scale)
    x, x_hat = np.random.default_rng(0).normal(size=(2, 3, 4)).astype(np.float32)
    assert likelihood.init(key) == ()
    found = likelihood.log_prob((), jnp.asarray(x), jnp.asarray(x_hat), jnp.zeros((3, 4)), jnp.float32(1))
    assert float(found) == pytest.approx(scipy.stats.norm.logpdf(x, x_hat, scale).sum(), rel=1e-6)


def test_learned_gaussian_and_its_slope(key):
    """Its parameter is the log of the scale, 0.1 at the start; its slope is sum((x - x_hat)^2 / s^2 - 1)."""
    likelihood = diffusion.gaussian()
    x, x_hat = np.random.default_rng(0).normal(size=(2, 5)).astype(np.float32)
    assert float(likelihood.init(key)) == pytest.approx(np.log(0.1), rel=1e-6)
    log_scale = jnp.float32(-0.4)
    args = jnp.asarray(x), jnp.asarray(x_hat), jnp.zeros(5), jnp.float32(1)
    value, slope = jax.value_and_grad(likelihood.log_prob)(log_scale, *args)
    scale = np.exp(np.float64(log_scale))
    assert float(value) == pytest.approx(scipy.stats.norm.logpdf(x, x_hat, scale).sum(), rel=1e-6)
    assert float(slope) == pytest.approx(np.sum((x - x_hat) ** 2 / scale**2 - 1), rel=1e-5)


@pytest.mark.parametrize("scale", [0.3, None])
def test_gaussian_samples(scale):
    likelihood = diffusion.gaussian(scale)
    params = () if scale else jnp.float32(np.log(0.7))
    x_hat = jnp.array([0.5, -2.0])
    draws = jax.vmap(likelihood.sample, (0, None, None, None, None))(
        jax.random.split(jax.random.key(0), DRAWS), params, x_hat, jnp.zeros(2), jnp.float32(0)
    )
    standard = (np.asarray(draws, np.float64) - np.asarray(x_hat)) / (scale or 0.7)
    for column in standard.T:
        assert abs(column.mean()) * np.sqrt(DRAWS) < 5
        assert abs(np.mean(column**2) - 1) * np.sqrt(DRAWS / 2) < 5
    assert abs(np.mean(standard[:, 0] * standard[:, 1])) * np.sqrt(DRAWS) < 5


@pytest.mark.parametrize("scale", [0.0, -1.0, float("inf"), float("nan")])
def test_a_scale_that_is_none_is_refused(scale):
    with pytest.raises(ValueError, match="scale: got .*, expected a positive number, or None to learn it"):
        diffusion.gaussian(scale)


# Discretised Gaussian.


def exact_log_mass(k, x_hat, log_scale, levels):
    """Log of scipy's difference of distribution functions, taken in the nearer tail; and its slopes, float64."""
    scale, value = np.exp(log_scale), (2.0 * k + 1.0) / levels - 1.0
    lower, upper = (value - 1.0 / levels - x_hat) / scale, (value + 1.0 / levels - x_hat) / scale
    lower, upper = -np.inf if k == 0 else lower, np.inf if k == levels - 1 else upper
    sign = -1.0 if lower + upper > 0 or upper == np.inf else 1.0
    if k in {0, levels - 1}:
        sign = 1.0 if k == 0 else -1.0
    left, right = (lower, upper) if sign > 0 else (-upper, -lower)
    log_right, log_left = scipy.special.log_ndtr(right), scipy.special.log_ndtr(left)
    log_mass = log_right + np.log(-np.expm1(log_left - log_right))

    def ratio(edge):
        """The density at an edge over the mass, and that times the edge, which vanish at infinity."""
        if np.isinf(edge):
            return 0.0, 0.0
        at = np.exp(-0.5 * edge**2 - 0.5 * np.log(2 * np.pi) - log_mass)
        return at, at * edge

    (of_upper, times_upper), (of_lower, times_lower) = ratio(upper), ratio(lower)
    return log_mass, -(of_upper - of_lower) / scale, -(times_upper - times_lower)


def values_and_slopes(levels, param, ks, guesses, log_snrs):
    """Log mass, and its slopes by the parameter and by x_hat, at every [log_snr, guess, k]."""
    likelihood = diffusion.discretized_gaussian(levels)

    def one(log_snr, x_hat, k):
        function = lambda param, x_hat: likelihood.log_prob(  # noqa: E731
            param, k[None], x_hat[None], jnp.zeros(1), log_snr
        )
        return jax.value_and_grad(function, (0, 1))(jnp.float32(param), x_hat)

    over = jax.vmap(jax.vmap(jax.vmap(one, (None, None, 0)), (None, 0, None)), (0, None, None))
    arrays = (jnp.asarray(v, jnp.float32) for v in (log_snrs, guesses))
    value, (by_param, by_guess) = toys.quick_jit(over)(*arrays, jnp.asarray(ks))
    return np.asarray(value), np.asarray(by_param), np.asarray(by_guess)


@pytest.mark.parametrize("levels", [2, 5, 256])
def test_masses_of_the_discretised_gaussian(levels):
    """Value and slopes by x_hat and the scale, within 2e-5, for guesses near, off and far off; they sum to one."""
    log_snrs, guesses = [-5.0, 0.0, 5.0, 8.0], np.float32([0.0, 0.02, -0.4, 0.9, -1.3, 4.0])
    value, by_param, by_guess = values_and_slopes(levels, 0.3, np.arange(levels), guesses, log_snrs)
    np.testing.assert_allclose(np.exp(value.astype(np.float64)).sum(axis=2), 1.0, atol=5e-6)
    for i, log_snr in enumerate(log_snrs):
        log_scale = np.float64(np.float32(0.3)) - 0.5 * log_snr
        for j, guess in enumerate(guesses.astype(np.float64)):
            for k in range(levels):
                exact, of_guess, of_scale = exact_log_mass(k, guess, log_scale, levels)
                at, here = (log_snr, guess, k), (i, j, k)
                assert value[here] == pytest.approx(exact, rel=1e-5, abs=3e-6), at
                # A slope by the guess is of the size of one over the scale.
                assert by_guess[here] == pytest.approx(of_guess, rel=2e-5, abs=1e-5 * np.exp(-log_scale)), at
                assert by_param[here] == pytest.approx(of_scale, rel=5e-5, abs=2e-5), at


def test_far_tails():
    """Up to millions of scales away: there log mass is -e^2 / 2 - log(e sqrt(2 pi)), e the nearest edge."""
    log_snrs, guesses, ks = [13.3, 20.0, 30.0], np.float32([-0.3, 0.1, 0.9, -1.1, 5.0]), [0, 100, 255]
    value, by_param, by_guess = values_and_slopes(256, 0.0, ks, guesses, log_snrs)
    for i, log_snr in enumerate(np.float32(log_snrs)):
        for j, guess in enumerate(guesses.astype(np.float64)):
            for n, k in enumerate(ks):
                found = value[i, j, n], by_param[i, j, n], by_guess[i, j, n]
                scale, centre = np.exp(-0.5 * np.float64(log_snr)), (2 * k + 1) / 256 - 1
                edge = (np.abs(centre - guess) - 1 / 256) / scale
                assert edge > 25
                if (k == 0 and guess < centre) or (k == 255 and guess > centre):
                    assert found == (0.0, 0.0, 0.0)
                    continue
                exact = -0.5 * edge**2 - np.log(edge) - 0.5 * np.log(2 * np.pi)
                exact += np.log1p(-1 / edge**2 + 3 / edge**4)
                hazard = edge + 1 / edge
                expected = exact, hazard * edge, np.sign(centre - guess) * hazard / scale
                np.testing.assert_allclose(found, expected, rtol=2e-5)


def test_the_scale_is_that_of_the_noise_in_z_at_the_start(key):
    """sigma_1 / alpha_1: z_1 / alpha_1 as the guess, and the mass is the noise's own."""
    likelihood, log_snr = diffusion.discretized_gaussian(8), jnp.float32(3.0)
    params = likelihood.init(key)
    assert params.shape == () and float(params) == 0.0
    alpha, sigma = cases.scales(3.0)
    found = likelihood.log_prob(params, jnp.array([4]), jnp.array([0.3]), jnp.array([9.0]), log_snr)
    edges = (np.array([0.0, 0.25]) - np.float32(0.3)) / (sigma / alpha)
    assert float(found) == pytest.approx(np.log(np.diff(scipy.stats.norm.cdf(edges))[0]), rel=1e-5)


# Levels.


@pytest.mark.parametrize("levels", [2, 5, 256])
def test_levels_are_the_posterior_under_a_flat_prior(levels):
    """By Bayes' rule in float64, with the slope by z; evidence of size e is rounded by some 1e-7 e."""
    likelihood, values = diffusion.levels(levels), (2.0 * np.arange(levels) + 1.0) / levels - 1.0

    def one(log_snr, z, k):
        log_prob = lambda z: likelihood.log_prob((), k[None], z, z, log_snr)  # noqa: E731
        return jax.value_and_grad(log_prob)(z[None])

    over = toys.quick_jit(
        jax.vmap(jax.vmap(jax.vmap(one, (None, None, 0)), (None, 0, None)), (0, None, None))
    )
    log_snrs, zs = np.float32([-3.0, 2.0, 9.0]), np.float32([-1.4, 0.0, 0.31, 0.99])
    found, slopes = jax.device_get(over(log_snrs, zs, np.arange(levels)))
    for i, log_snr in enumerate(log_snrs):
        alpha, sigma = cases.scales(log_snr)
        for j, z in enumerate(zs.astype(np.float64)):
            evidence = -0.5 * ((z - alpha * values) / sigma) ** 2
            expected = evidence - scipy.special.logsumexp(evidence)
            rounding = 3e-6 - 3e-6 * evidence.max()
            assert np.exp(found[i, j].astype(np.float64)).sum() == pytest.approx(1.0, abs=rounding)
            np.testing.assert_allclose(found[i, j], expected, rtol=2e-5, atol=rounding)
            exact = alpha / sigma**2 * (values - np.exp(expected) @ values)
            np.testing.assert_allclose(
                slopes[i, j, :, 0], exact, rtol=1e-4, atol=(1e-5 + rounding) * alpha / sigma**2
            )


@pytest.mark.parametrize("log_snr", [-5.0, 0.5, 6.0])
def test_bernoullis_logit(log_snr):
    """alpha_1 z_1 / sigma_1^2."""
    likelihood, z = diffusion.bernoulli(), jnp.array([-0.7, 0.2, 1.3])
    alpha, sigma = cases.scales(log_snr)
    one, zero = (
        jax.vmap(
            lambda z, k=k: likelihood.log_prob(
                (), jnp.full(1, k), jnp.zeros(1), z[None], jnp.float32(log_snr)
            )
        )(z)
        for k in (1, 0)
    )
    logit = alpha * np.asarray(z, np.float64) / sigma**2
    np.testing.assert_allclose(one - zero, logit, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(one, scipy.special.log_expit(logit), rtol=1e-5, atol=1e-5)
    # A bit may come as bool or a float of any kind.
    for dtype in (jnp.bool_, jnp.float32, jnp.uint8):
        x = jnp.array([1, 0, 1]).astype(dtype)
        found = likelihood.log_prob((), x, z, z, jnp.float32(log_snr))
        assert float(found) == pytest.approx(float(one[0] + zero[1] + one[2]), rel=1e-5)


# All that are discrete.


@every_discrete
def test_dimensions_are_summed_and_apart(name):
    likelihood, levels = built(name)
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.integers(0, levels, size=(2, 3, 1)))
    x_hat, z = jnp.asarray(rng.normal(size=(2, 2, 3, 1)).astype(np.float32))
    params, log_snr = likelihood.init(jax.random.key(0)), jnp.float32(1.0)
    whole = likelihood.log_prob(params, x, x_hat, z, log_snr)
    single = jax.vmap(lambda x, m, z: likelihood.log_prob(params, x[None], m[None], z[None], log_snr))
    assert whole.shape == () and whole.dtype == jnp.float32
    assert float(whole) == pytest.approx(float(single(x.ravel(), x_hat.ravel(), z.ravel()).sum()), rel=1e-5)


@pytest.mark.parametrize(
    "name", ["discretized_gaussian(2)", "discretized_gaussian(5)", "levels(2)", "levels(5)"]
)
def test_samples_have_the_masses(name):
    likelihood, levels = built(name)
    params, log_snr = likelihood.init(jax.random.key(0)), jnp.float32(1.2)
    x_hat, z = jnp.array([0.3, -0.9]), jnp.array([-0.2, 0.6])
    draws = jax.jit(jax.vmap(likelihood.sample, (0, None, None, None, None)))(
        jax.random.split(jax.random.key(1), DRAWS), params, x_hat, z, log_snr
    )
    assert draws.dtype == jnp.int32 and draws.shape == (DRAWS, 2)
    for i in range(2):
        masses = np.exp(all_masses(likelihood, levels, params, x_hat[i : i + 1], z[i : i + 1], log_snr))
        counts = np.bincount(np.asarray(draws[:, i]), minlength=levels)
        assert len(counts) == levels
        z_scores = (counts / DRAWS - masses) / np.sqrt(masses * (1 - masses) / DRAWS + 1e-12)
        assert np.max(np.abs(z_scores)) < 5
    # The dimensions are drawn apart: P(both first) is the product.
    both = np.mean((np.asarray(draws) == 0).all(axis=1))
    product = np.prod((np.asarray(draws) == 0).mean(axis=0))
    assert abs(both - product) < 5 * np.sqrt(product / DRAWS)


@every_discrete
def test_embedding_and_back(name):
    """Bin centres of [-1, 1], evenly spaced; the way back is linear, right between levels too."""
    likelihood, levels = built(name)
    k = jnp.arange(levels)
    y = likelihood.embed(k)
    assert y.dtype == jnp.float32
    edges = np.linspace(-1, 1, levels + 1)
    np.testing.assert_allclose(y, (edges[1:] + edges[:-1]) / 2, atol=2e-7)
    assert np.all(np.abs(y) <= 1)
    np.testing.assert_allclose(likelihood.unembed(y), k, atol=1e-4)
    np.testing.assert_allclose(
        likelihood.unembed(jnp.array([-1.0, 0.0, 1.0])), [-0.5, levels / 2 - 0.5, levels - 0.5]
    )
    np.testing.assert_array_equal(likelihood.embed(k.astype(jnp.uint8)), y)


def test_real_data_is_its_own_embedding():
    likelihood, x = diffusion.gaussian(), jnp.array([0.3, -7.0])
    np.testing.assert_array_equal(likelihood.embed(x), x)
    np.testing.assert_array_equal(likelihood.unembed(x), x)


@pytest.mark.parametrize("levels", [1, 0, -2])
def test_too_few_levels_are_refused(levels):
    for make in (diffusion.levels, diffusion.discretized_gaussian):
        with pytest.raises(ValueError, match=f"levels: got {levels}, expected at least 2"):
            make(levels)


@pytest.mark.parametrize(
    "likelihood", [diffusion.gaussian(), diffusion.discretized_gaussian(4), diffusion.levels(4)]
)
def test_raw_keys_are_refused(likelihood):
    params = likelihood.init(jax.random.key(0))
    with pytest.raises(TypeError, match="expected a typed key"):
        likelihood.sample(jax.random.PRNGKey(0), params, jnp.zeros(2), jnp.zeros(2), jnp.float32(0))
