"""What every sampler keeps: the law in the limit, the ends, the number of calls, what jit and vmap promise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.diffusion import exact_scores as exact
from vdiff.diffusion import (
    ancestral,
    ddim,
    dpm_solver,
    dpm_solver_sde,
    heun,
    optimal_variance,
    uniform_log_snr,
)
from vdiff.diffusion.reverse import reverse

# A sampler, steps enough for the law, and the calls that n latents cost.
SAMPLERS = {
    "ancestral": (lambda model, n: ancestral(model, n), 600, lambda n: n),
    "ddim": (lambda model, n: ddim(model, n), 400, lambda n: n),
    "ddim half": (lambda model, n: ddim(model, n, eta=0.5), 600, lambda n: n),
    "heun": (lambda model, n: heun(model, n), 80, lambda n: 2 * n - 1),
    "heun churned": (lambda model, n: heun(model, n, churn=20.0), 120, lambda n: 2 * n - 1),
    "dpm 1": (lambda model, n: dpm_solver(model, n, order=1), 400, lambda n: n),
    "dpm 2": (lambda model, n: dpm_solver(model, n, order=2), 80, lambda n: n),
    "dpm 3": (lambda model, n: dpm_solver(model, n, order=3), 80, lambda n: n),
    "sde 1": (lambda model, n: dpm_solver_sde(model, n, order=1), 600, lambda n: n),
    "sde 2": (lambda model, n: dpm_solver_sde(model, n, order=2), 120, lambda n: n),
}
WEIGHTS = np.arange(1, 9) / 36

every = pytest.mark.parametrize("name", SAMPLERS)


@pytest.mark.slow
@every
def test_many_steps_reach_the_law(name):
    """The Gaussian's mean and spread, the ring's unequal weights and its modes' width; 1 % would show."""
    sampler, num_steps, _ = SAMPLERS[name]
    sample = jax.jit(jax.vmap(sampler(exact.diffusion(), num_steps), in_axes=(0, None)))
    keys = jax.random.split(jax.random.key(0), 8000)
    x = np.asarray(sample(keys, exact.gaussian())[0], np.float64)
    assert abs(np.mean(x) - exact.MEAN) / (exact.STD / np.sqrt(x.size)) < 5
    assert abs(np.std(x) - exact.STD) / (exact.STD / np.sqrt(2 * x.size)) < 5
    x = np.asarray(sample(keys, exact.ring(tuple(WEIGHTS)))[0], np.float64)
    away = x[:, None] - exact.MODES
    nearest = np.argmin(np.sum(away**2, axis=-1), axis=1)
    counts = np.bincount(nearest, minlength=8)
    z = (counts - len(x) * WEIGHTS) / np.sqrt(len(x) * WEIGHTS * (1 - WEIGHTS))
    assert np.max(np.abs(z)) < 5
    within = away[np.arange(len(x)), nearest]
    assert abs(np.std(within) - exact.RING_STD) / (exact.RING_STD / np.sqrt(2 * within.size)) < 5


def test_five_calls_with_the_optimal_variance():
    """The bar: .2500 within .001, at 5 evaluations; a million draws know it to .00018."""
    model = exact.diffusion(reverse_variance=optimal_variance(exact.gaussian_mse))
    x, _ = exact.draw(ancestral(model, 5, grid=uniform_log_snr), exact.gaussian(), 500_000)
    assert abs(np.std(x) - exact.STD) < 0.001
    assert abs(np.mean(x) - exact.MEAN) < 5 * exact.STD / np.sqrt(x.size)


@every
def test_number_of_calls_and_where(name):
    """Each latent from the first to the last is denoised, and as often as the docstring says."""
    sampler, _, num_calls = SAMPLERS[name]
    at = []

    def guess(theta, z, log_snr):
        at.append(float(log_snr))
        return 0.5 * z

    model = exact.diffusion(8.0, -8.0, guess=guess)
    for num_steps in (2, 5):
        at.clear()
        with jax.disable_jit():
            x, z = sampler(model, num_steps)(jax.random.key(0), exact.ring())
        assert len(at) == num_calls(num_steps) and z.shape == (num_steps, 2) and x.shape == (2,)
        np.testing.assert_allclose(at[-1], 8.0)
        if "churned" not in name:
            np.testing.assert_allclose(at[0], -8.0)
            np.testing.assert_allclose(np.unique(at), np.linspace(-8, 8, num_steps))


@every
def test_one_latent_is_guessed_once(name):
    """No step: z_1 is noise, and x the guess at it."""
    model = exact.diffusion(guess=lambda theta, z, log_snr: 0.5 * z + log_snr)
    x, z = SAMPLERS[name][0](model, 1)(jax.random.key(0), exact.ring())
    assert z.shape == (1, 2)
    np.testing.assert_allclose(x, 0.5 * z[0] + 9.0, rtol=1e-6)


@every
def test_vmap_is_a_loop_and_one_trace(name):
    sampler, _, _ = SAMPLERS[name]
    traces = []

    def guess(theta, z, log_snr):
        traces.append(1)
        return exact.mixture_guess(theta, z, log_snr)

    sample = sampler(exact.diffusion(guess=guess), 6)
    keys = jax.random.split(jax.random.key(3), 3)
    one = jax.jit(sample)
    singly = [one(key, exact.ring()) for key in keys]
    # Once for each place where it is called: in the step, and for x.
    assert len(traces) == (3 if "heun" in name else 2)
    mapped = jax.jit(jax.vmap(sample, in_axes=(0, None)))(keys, exact.ring())
    for i, single in enumerate(singly):
        for got, expected in zip(mapped, single, strict=True):
            np.testing.assert_allclose(got[i], expected, rtol=1e-4, atol=1e-4)
            assert got.dtype == jnp.float32


@every
def test_both_far_ends_of_log_snr(name):
    """From -20 to 20 with a guess in bfloat16: no step overflows, and x is the data's to the guess's own precision."""
    sampler, _, _ = SAMPLERS[name]

    def rough(theta, z, log_snr):
        guess = exact.mixture_guess(theta, z, log_snr)
        return guess.astype(jnp.bfloat16).astype(jnp.float32)

    model = exact.diffusion(20.0, -20.0, guess=rough)
    x, z = exact.draw(sampler(model, 40), exact.ring(), 200)
    assert np.all(np.isfinite(z))
    distance = np.min(np.linalg.norm(x[:, None] - exact.MODES, axis=-1), axis=1)
    assert np.max(distance) < 6 * exact.RING_STD


@pytest.mark.parametrize("name", ["dpm 3", "sde 2", "heun", "ddim half"])
def test_gradient_is_that_of_differences(name):
    """Of x by the mixture's spread, through all steps, those without a past among them."""
    sample = jax.jit(
        lambda std: SAMPLERS[name][0](model, 7)(jax.random.key(5), exact.params(exact.MODES, std))[0][0]
    )
    model = exact.diffusion()
    slope = jax.jit(jax.grad(sample))(jnp.float32(0.3))
    difference = (sample(jnp.float32(0.31)) - sample(jnp.float32(0.29))) / 0.02
    np.testing.assert_allclose(slope, difference, rtol=0.05, atol=0.02)


@every
def test_less_than_one_step_is_refused(name):
    with pytest.raises(ValueError, match="num_steps: got 0, expected at least 1"):
        SAMPLERS[name][0](exact.diffusion(), 0)


def test_raw_keys_are_refused():
    with pytest.raises(TypeError, match="typed key"):
        ancestral(exact.diffusion(), 3)(jax.random.PRNGKey(0), exact.ring())


def test_memory_goes_from_step_to_step():
    """A sampler of one's own: z counts the steps that memory has seen."""

    def step(key, params, z, memory, log_snr_s, log_snr_t):
        assert log_snr_s.shape == log_snr_t.shape == ()
        return jnp.full_like(z, memory), memory + 1.0

    def start(key, shape, log_snr):
        return jnp.full(shape, log_snr), jnp.float32(1.0)

    _, z = reverse(exact.diffusion(), 4, uniform_log_snr, step, start)(jax.random.key(0), exact.ring())
    np.testing.assert_allclose(z[:, 0], [3, 2, 1, -9])
