"""The flow's density against its closed form: a linear map for Gaussian data, a grid's sum for a ring."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.diffusion.flows import (
    ENDS,
    MODES,
    correlated,
    correlated_theta,
    diffusion_of,
    log_normal,
    on_levels,
    own,
    pushforward,
    ring,
    ring_log_prob,
    scales,
    white,
    white_theta,
    with_own,
)
from vdiff.diffusion import ddpm, gaussian, learned_log_snr, levels, linear_betas, log_snrs_of, predict, vdm
from vdiff.diffusion.divergence import exact_divergence, hutchinson
from vdiff.diffusion.forward import alpha, sigma
from vdiff.diffusion.probability_flow import flow_decode, flow_encode, ode_elbo_terms, ode_log_prob
from vdiff.diffusion.runge_kutta import fixed_grid
from vdiff.diffusion.warp import sinh_warp
from vdiff.evaluate import evaluate
from vdiff.types import Network, Params

MEAN, SCALE = 0.3, 0.25


def of_batch(log_prob):
    return jax.jit(jax.vmap(log_prob, in_axes=(None, None, 0)))


def draws(shape, num=64, seed=0):
    y = MEAN + SCALE * np.random.default_rng(seed).normal(size=(num, *shape))
    return y.astype(np.float32)


def reference(y, ends):
    return pushforward(y, np.full(y.shape[1:], float(np.float32(MEAN))), np.full(y.shape[1:], SCALE**2), ends)


IMAGE = (28, 28, 1)


@pytest.mark.parametrize(
    ("shape", "ends"),
    [
        ((8,), ENDS),
        ((8,), (10.0, -10.0)),
        ((2, 2, 2), (10.0, -10.0)),
        (IMAGE, ENDS),
        pytest.param((2, 2, 2), ENDS, marks=pytest.mark.slow),
        pytest.param(IMAGE, (10.0, -10.0), marks=pytest.mark.slow),
    ],
)
def test_the_bar(key, shape, ends):
    """At 77 calls of the denoiser: rms below 5e-7, largest below 2e-6 nats/dim, on 64 data."""
    diffusion, params = diffusion_of(white, white_theta(MEAN, SCALE), shape, ends)
    y = draws(shape)
    got = np.asarray(of_batch(ode_log_prob(diffusion))(key, params, y), np.float64)
    error = (got - reference(y, ends)[0]) / np.prod(shape)
    assert np.sqrt(np.mean(error**2)) < 5e-7
    assert np.max(np.abs(error)) < 2e-6


@pytest.mark.parametrize("ends", [(13.3, -5.0), (10.0, -10.0)])
def test_the_gap_to_the_datas_density_is_that_of_the_ends(key, ends):
    """Datum by datum: log p(y) less log p_flow(y) is the blur at t = 0 and the prior at t = 1."""
    diffusion, params = diffusion_of(white, white_theta(MEAN, SCALE), (8,), ends)
    y = draws((8,))
    (a, noise), (b, noise_last) = scales(float(np.float32(ends[0]))), scales(float(np.float32(ends[1])))
    mean, ones = np.full(8, float(np.float32(MEAN))), np.ones(8)
    truth = log_normal(y, mean, SCALE**2 * ones)
    z = np.asarray(jax.jit(jax.vmap(flow_encode(diffusion), (None, 0)))(params, y), np.float64)
    start = truth - log_normal(y, mean, (SCALE**2 + noise / a**2) * ones)
    end = log_normal(z, b * mean, (b**2 * SCALE**2 + noise_last) * ones) - log_normal(z, 0 * mean, ones)
    gap = truth - np.asarray(of_batch(ode_log_prob(diffusion))(key, params, y), np.float64)
    assert np.max(np.abs(gap - (start + end))) < 8 * 2e-6
    assert np.max(np.abs(end)) > (1e-2 if ends[1] == -5.0 else 1e-4)


@pytest.mark.parametrize("shape", [pytest.param((6,), marks=pytest.mark.slow), (3, 2, 1)])
def test_correlated_data_of_scales_from_a_fifth_to_one_and_a_half(key, shape):
    """The Jacobian is far from a multiple of the identity: any trace but the trace shows."""
    theta = correlated_theta(6, shape=shape)
    diffusion, params = diffusion_of(correlated, theta, shape)
    y = np.random.default_rng(1).normal(size=(64, *shape)).astype(np.float32)
    expected, z = pushforward(y, theta["mean"], theta["variance"], ENDS, theta["basis"])
    for chunk_size in (4, 64):
        log_prob = ode_log_prob(diffusion, divergence=exact_divergence(chunk_size))
        np.testing.assert_allclose(of_batch(log_prob)(key, params, y), expected, atol=6 * 3e-6, rtol=2e-6)
    np.testing.assert_allclose(jax.jit(jax.vmap(flow_encode(diffusion), (None, 0)))(params, y), z, atol=2e-5)


@pytest.mark.parametrize("num_probes", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_hutchinsons_mean_is_the_exact_one(num_probes):
    """Over 8,192 keys on correlated data; the spread is some tenths of a nat, so that 0.01 nats would show."""
    theta = correlated_theta(4)
    diffusion, params = diffusion_of(correlated, theta, (4,))
    y = np.asarray([[0.5, -1.0, 0.2, 0.9]], np.float32)
    expected = pushforward(y, theta["mean"], theta["variance"], ENDS, theta["basis"])[0][0]
    log_prob = ode_log_prob(diffusion, divergence=hutchinson(num_probes))
    keys = jax.random.split(jax.random.key(5), 8192)
    got = np.asarray(jax.jit(jax.vmap(log_prob, (0, None, None)))(keys, params, y[0]), np.float64)
    std_error = got.std() / np.sqrt(len(got))
    assert abs(got.mean() - expected) < 5 * std_error
    assert 1e-3 < std_error < 0.02


def test_a_rings_density_integrates_to_one_and_is_the_rings(key):
    """On a grid of spacing 0.05 over [-2.5, 2.5]^2, for which the trapezoid rule is exact to 1e-8 and more."""
    diffusion, params = diffusion_of(ring, jnp.asarray(MODES, jnp.float32), (2,), (10.0, -10.0))
    axis = np.linspace(-2.5, 2.5, 101)
    y = np.stack(np.meshgrid(axis, axis), axis=-1).reshape(-1, 2).astype(np.float32)
    log_prob = ode_log_prob(diffusion, solver=fixed_grid(16))
    got = np.asarray(of_batch(log_prob)(key, params, y), np.float64)
    assert abs(np.sum(np.exp(got)) * 0.05**2 - 1) < 1e-5
    # What is left is the end's: below 1e-4 where there is mass.
    there = got > -5
    np.testing.assert_allclose(got[there], ring_log_prob(y[there], 10.0), atol=3e-4)


def test_any_denoiser_gives_a_density(key):
    """One that is no posterior mean, in one dimension: the flow is still invertible."""

    def denoise(theta, z, log_snr):
        return jnp.sin(2.0 * z - theta) * jax.nn.sigmoid(log_snr)

    diffusion, params = diffusion_of(denoise, jnp.float32(0.4), (1,), (4.0, -3.0))
    y = np.linspace(-8, 8, 8001, dtype=np.float32)[:, None]
    log_prob = ode_log_prob(diffusion, solver=fixed_grid(12))
    got = np.exp(np.asarray(of_batch(log_prob)(key, params, y), np.float64))
    assert abs(np.sum(got) * 0.002 - 1) < 1e-4
    assert got.max() > 1.0


@pytest.mark.parametrize(
    "divergence",
    [exact_divergence(2), pytest.param(hutchinson(2), marks=pytest.mark.slow)],
    ids=["exact", "hutchinson"],
)
def test_calls_of_the_denoiser(key, divergence):
    """Counted as it runs: eleven a step, whatever the number of tangents; none in other places."""
    called = []

    def counted(theta, z, log_snr):
        jax.debug.callback(lambda: called.append(1))
        return white(theta, z, log_snr)

    diffusion, params = diffusion_of(counted, white_theta(MEAN, SCALE), (3,))
    y = draws((3,), 1)[0]

    def count(f, *args):
        called.clear()
        jax.block_until_ready(jax.jit(f)(*args))
        jax.effects_barrier()
        return len(called)

    assert count(ode_log_prob(diffusion, divergence=divergence), key, params, y) == 77
    log_prob = ode_log_prob(diffusion, solver=fixed_grid(2), divergence=divergence)
    assert count(log_prob, key, params, y) == 22
    assert count(flow_encode(diffusion), params, y) == count(flow_decode(diffusion), params, y) == 77
    # One more for p(x | z_0).
    assert count(ode_elbo_terms(diffusion), key, params, y) == 78


def test_the_gradient_by_params_is_that_of_the_closed_form(key):
    """Against central differences of the pushforward in float64, by mean and scale."""
    diffusion, params = diffusion_of(white, white_theta(MEAN, SCALE), (8,))
    y = draws((8,), 4)

    def mean(params):
        return jnp.mean(jax.vmap(ode_log_prob(diffusion), (None, None, 0))(key, params, y))

    def exact(loc, log_scale):
        return pushforward(y, np.full(8, loc), np.full(8, np.exp(2 * log_scale)))[0].mean()

    got = own(jax.jit(jax.grad(mean))(params))
    loc, log_scale, h = float(np.float32(MEAN)), np.log(SCALE), 1e-5
    by_mean = (exact(loc + h, log_scale) - exact(loc - h, log_scale)) / (2 * h)
    by_scale = (exact(loc, log_scale + h) - exact(loc, log_scale - h)) / (2 * h)
    np.testing.assert_allclose(got["mean"], by_mean, rtol=2e-5)
    np.testing.assert_allclose(got["log_scale"], by_scale, rtol=2e-5)


def test_the_gradient_by_the_datum_is_the_score(key):
    diffusion, params = diffusion_of(white, white_theta(MEAN, SCALE), (2, 2, 2), (10.0, -10.0))
    y = draws((2, 2, 2), 4)
    got = jax.jit(jax.vmap(jax.grad(ode_log_prob(diffusion), argnums=2), (None, None, 0)))(key, params, y)
    h = 1e-5 * np.eye(8).reshape(8, 1, 2, 2, 2)
    for i in range(8):
        up, down = reference(y + h[i], (10.0, -10.0))[0], reference(y - h[i], (10.0, -10.0))[0]
        np.testing.assert_allclose(got.reshape(4, 8)[:, i], (up - down) / 2e-5, rtol=1e-4, atol=1e-4)


def test_the_schedules_interior_does_not_matter(key):
    """Only its two ends are read: lam has no gradient, and another lam gives the same number."""
    denoiser = Network(lambda key: white_theta(MEAN, SCALE), white)
    diffusion = vdm(denoiser, learned_log_snr(num_bins=4), shape=(8,), predict=predict.data)
    params = diffusion.init(key)
    bent = params._replace(lam=jnp.asarray([3.0, -1.0, 0.0, 0.5]))
    y = jnp.asarray(draws((8,), 1))
    value_and_grad = jax.jit(jax.value_and_grad(ode_log_prob(diffusion), argnums=1))
    value, gradient = value_and_grad(key, bent, y[0])
    np.testing.assert_allclose(value, reference(y, ENDS)[0][0], atol=8 * 2e-6)
    np.testing.assert_allclose(value, value_and_grad(key, params, y[0])[0], atol=8e-6)
    np.testing.assert_allclose(gradient.lam, np.zeros(4), atol=1e-4)


def test_a_chain_is_read_between_its_first_and_last_latent(key):
    """The lecture's model: the flow runs from z_1 to z_m, whatever lies between."""
    betas = linear_betas(50)
    denoiser = Network(lambda key: white_theta(MEAN, SCALE), white)
    diffusion = ddpm(denoiser, betas, shape=(8,), predict=predict.data)
    log_snrs = log_snrs_of(betas)
    y = draws((8,))
    got = of_batch(ode_log_prob(diffusion))(key, diffusion.init(key), y)
    expected = reference(y, (float(log_snrs[0]), float(log_snrs[-1])))[0]
    np.testing.assert_allclose(got, expected, atol=8 * 2e-6)


@pytest.mark.parametrize("name", ["noise", "velocity"])
def test_other_predictions(key, name):
    """The same denoiser, told by its noise or its velocity."""

    def output(theta, z, log_snr):
        x_hat = white(theta, z, log_snr)
        eps = predict.data.noise(z, log_snr, x_hat)
        return eps if name == "noise" else alpha(log_snr) * eps - sigma(log_snr) * x_hat

    denoiser = Network(lambda key: white_theta(MEAN, SCALE), output)
    data, params = diffusion_of(white, white_theta(MEAN, SCALE), (8,), (10.0, -5.0))
    diffusion = data._replace(
        denoise=lambda params, z, log_snr: getattr(predict, name).data(
            z, log_snr, denoiser.apply(own(params), z, log_snr)
        )
    )
    y = draws((8,))
    got = of_batch(ode_log_prob(diffusion))(key, params, y)
    np.testing.assert_allclose(got, reference(y, (10.0, -5.0))[0], atol=8 * 1e-5)


def test_there_and_back():
    diffusion, params = diffusion_of(ring, jnp.asarray(MODES, jnp.float32), (2,), (8.0, -5.0))
    y = (MODES + 0.15 * np.random.default_rng(2).normal(size=(8, 2))).astype(np.float32)
    solver = fixed_grid(20)
    z = jax.jit(jax.vmap(flow_encode(diffusion, solver=solver), (None, 0)))(params, y)
    again = jax.jit(jax.vmap(flow_decode(diffusion, solver=solver), (None, 0)))(params, z)
    np.testing.assert_allclose(again, y, atol=2e-4)
    assert np.abs(z - y).max() > 0.5


def test_decoding_is_the_inverse_map_in_closed_form():
    theta = correlated_theta(6)
    diffusion, params = diffusion_of(correlated, theta, (6,))
    y = np.random.default_rng(4).normal(size=(8, 6)).astype(np.float32)
    z = pushforward(y, theta["mean"], theta["variance"], ENDS, theta["basis"])[1].astype(np.float32)
    np.testing.assert_allclose(jax.jit(jax.vmap(flow_decode(diffusion), (None, 0)))(params, z), y, atol=2e-5)


def test_with_the_noise_of_the_start_it_bounds_and_the_terms_are_exact(key):
    """For Gaussian data with a Gaussian p(x | z_0) of the right spread, each term's mean is known."""
    ends, shape, scale = (4.0, -5.0), (3,), 0.1
    diffusion, params = diffusion_of(white, white_theta(MEAN, SCALE), shape, ends, likelihood=gaussian(scale))
    y = draws(shape, 1)
    keys = jax.random.split(jax.random.key(2), 20_000)
    terms = jax.jit(jax.vmap(ode_elbo_terms(diffusion), (0, None, None)))(keys, params, y[0])
    assert set(terms) == {"reconstruction", "flow", "entropy"}
    a, noise = scales(4.0)
    eps = np.random.default_rng(7).normal(size=(20_000, 3))
    z = a * y + np.sqrt(noise) * eps
    flow = pushforward(z / a, np.full(3, float(np.float32(MEAN))), np.full(3, SCALE**2), ends)[0]
    x_hat = (noise * MEAN + SCALE**2 * a * z) / (SCALE**2 * a**2 + noise)
    reconstruction = log_normal(np.broadcast_to(y, z.shape), x_hat, np.full(3, scale**2))
    for name, exact in (("flow", flow - 3 * np.log(a)), ("reconstruction", reconstruction)):
        got = np.asarray(terms[name], np.float64)
        std_error = np.sqrt((got.var() + exact.var()) / len(got))
        assert abs(got.mean() - exact.mean()) < 5 * std_error, name
    np.testing.assert_allclose(terms["entropy"], 1.5 * np.log(2 * np.pi * np.e * noise), rtol=1e-6)


@pytest.mark.slow
def test_the_start_with_noise_on_levels_needs_no_dequantisation():
    """Bits of known mass, p(x | z_0) by the levels themselves: the bound is the log-mass, at high SNR."""
    log_mass = np.log([0.2, 0.8])
    diffusion, params = diffusion_of(
        on_levels, jnp.asarray(log_mass, jnp.float32), (3,), (8.0, -8.0), likelihood=levels(2)
    )
    bound = jax.jit(
        jax.vmap(
            lambda key, x: sum(ode_elbo_terms(diffusion, solver=fixed_grid(20))(key, params, x).values()),
            (0, None),
        )
    )
    keys = jax.random.split(jax.random.key(3), 2000)
    x = jnp.asarray([1, 0, 1])
    got = np.asarray(bound(keys, x), np.float64)
    assert abs(got.mean() - log_mass[np.asarray(x)].sum()) < 5 * got.std() / np.sqrt(len(got)) + 1e-3


@pytest.mark.slow
def test_the_eighth_order_shows_in_float64():
    """Twice the steps, a hundred times the precision; what is measured at 7 is not rounding alone."""
    with jax.enable_x64(True):
        theta = {"mean": jnp.float64(MEAN), "log_scale": jnp.log(jnp.float64(SCALE))}
        denoiser = Network(lambda key: theta, white)
        diffusion = vdm(denoiser, learned_log_snr(num_bins=1), shape=(8,), predict=predict.data)
        diffusion = diffusion._replace(log_snr=lambda params, t: 10.0 - 20.0 * t)
        params = Params(theta={"denoiser": theta, "likelihood": ()})
        y = draws((8,)).astype(np.float64)
        expected = pushforward(y, np.full(8, MEAN), np.full(8, SCALE**2), (10.0, -10.0))[0]

        def worst(num_steps):
            log_prob = ode_log_prob(diffusion, solver=fixed_grid(num_steps))
            got = jax.jit(jax.vmap(log_prob, (None, None, 0)))(jax.random.key(0), params, y)
            return np.max(np.abs(got - expected)) / 8

        assert worst(14) < worst(7) / 100 and worst(28) < 1e-10


def test_traced_once(key):
    """jit of one datum, of a batch, and evaluate: once each, and all the same numbers."""
    diffusion, params = diffusion_of(white, white_theta(MEAN, SCALE), (2, 2, 2))
    log_prob = ode_log_prob(diffusion)
    y = draws((2, 2, 2), 5)
    once = jax.jit(chex.assert_max_traces(lambda *args: log_prob(*args), n=1))
    one_by_one = [once(jax.random.key(i), with_own(params, white_theta(MEAN, SCALE)), y[i]) for i in range(5)]
    batch = jax.jit(chex.assert_max_traces(lambda *args: jax.vmap(log_prob, (None, None, 0))(*args), n=1))
    np.testing.assert_allclose(batch(key, params, y), one_by_one, atol=8e-6)
    np.testing.assert_allclose(evaluate(log_prob, key, params, y, batch_size=2), one_by_one, atol=8e-6)


@pytest.mark.slow
def test_a_denoiser_without_parameters_and_another_warp(key):
    diffusion, params = diffusion_of(
        lambda theta, z, log_snr: white(white_theta(MEAN, SCALE), z, log_snr), (), (8,)
    )
    y = draws((8,))
    log_prob = ode_log_prob(diffusion, solver=fixed_grid(12), warp=sinh_warp(2.8, 3.0))
    np.testing.assert_allclose(of_batch(log_prob)(key, params, y), reference(y, ENDS)[0], atol=8 * 2e-6)


def test_refusals(key, unchecked):
    diffusion, params = diffusion_of(white, white_theta(MEAN, SCALE), (2, 2, 2))
    log_prob = ode_log_prob(diffusion)
    with pytest.raises(TypeError, match="x: got int32, expected a float array .* dequantized_log_prob"):
        log_prob(key, params, jnp.zeros((2, 2, 2), jnp.int32))
    with pytest.raises(ValueError, match=r"x: got an array of shape \(8,\), expected \(2, 2, 2\)"):
        log_prob(key, params, jnp.zeros(8))
    with pytest.raises(ValueError, match=r"x: got an array of shape \(3, 2, 2, 2\).*jax.vmap"):
        flow_encode(diffusion)(params, jnp.zeros((3, 2, 2, 2)))
    with pytest.raises(ValueError, match=r"z: got an array of shape \(2, 2\)"):
        flow_decode(diffusion)(params, jnp.zeros((2, 2)))
    with pytest.raises(TypeError, match="z: got int32"):
        flow_decode(diffusion)(params, jnp.zeros((2, 2, 2), jnp.int32))
    with pytest.raises(ValueError, match=r"x: got an array of shape \(8,\)"):
        ode_elbo_terms(diffusion)(key, params, jnp.zeros(8))
    for f in (log_prob, ode_elbo_terms(diffusion)):
        with pytest.raises(TypeError, match="expected a typed key"):
            f(jax.random.PRNGKey(0), params, jnp.zeros((2, 2, 2)))
