"""Adaptive steps against known solutions and the fixed grid, and what happens without Diffrax."""

import sys

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
    own,
    pushforward,
    ring,
    white,
    white_theta,
)
from vdiff.diffusion.adaptive import adaptive
from vdiff.diffusion.probability_flow import flow_decode, flow_encode, ode_log_prob
from vdiff.diffusion.runge_kutta import fixed_grid


def test_it_equals_the_closed_form_and_the_fixed_grid(key):
    theta = correlated_theta(4)
    diffusion, params = diffusion_of(correlated, theta, (4,))
    y = np.random.default_rng(1).normal(size=(8, 4)).astype(np.float32)
    expected = pushforward(y, theta["mean"], theta["variance"], ENDS, theta["basis"])[0]
    steps, grid = (
        jax.jit(jax.vmap(ode_log_prob(diffusion, solver=solver), (None, None, 0)))(key, params, y)
        for solver in (adaptive(1e-6, 1e-6), fixed_grid())
    )
    np.testing.assert_allclose(steps, expected, atol=2e-5)
    np.testing.assert_allclose(steps, grid, atol=2e-5)


@pytest.mark.slow
def test_on_a_ring(key):
    """Where the fixed grid wants more than its seven steps, tolerances find out by themselves."""
    diffusion, params = diffusion_of(ring, jnp.asarray(MODES, jnp.float32), (2,), (10.0, -10.0))
    y = (MODES + 0.15 * np.random.default_rng(2).normal(size=(8, 2))).astype(np.float32)
    steps, grid = (
        jax.jit(jax.vmap(ode_log_prob(diffusion, solver=solver), (None, None, 0)))(key, params, y)
        for solver in (adaptive(1e-6, 1e-6), fixed_grid(20))
    )
    np.testing.assert_allclose(steps, grid, atol=5e-5)


def test_a_smaller_tolerance_is_more_exact_and_more_work(key):
    called = []

    def counted(theta, z, log_snr):
        jax.debug.callback(lambda: called.append(1))
        return white(theta, z, log_snr)

    diffusion, params = diffusion_of(counted, white_theta(0.3, 0.25), (2, 2, 2))
    y = jnp.linspace(-0.5, 0.9, 8).reshape(2, 2, 2)
    expected = pushforward(np.asarray(y)[None], np.full(y.shape, np.float32(0.3)), np.full(y.shape, 0.0625))[
        0
    ][0]
    errors, calls = [], []
    for tolerance in (1e-2, 1e-5):
        called.clear()
        got = jax.jit(ode_log_prob(diffusion, solver=adaptive(tolerance, tolerance)))(key, params, y)
        errors.append(abs(float(got) - expected))
        jax.effects_barrier()
        calls.append(len(called))
    assert errors[1] < 1e-4 < errors[0] < 1.0
    assert calls[0] < calls[1] < 400


def test_both_ways():
    diffusion, params = diffusion_of(white, white_theta(0.3, 0.25), (3,))
    y = jnp.asarray([0.1, 0.5, -0.4])
    solver = adaptive(1e-6, 1e-6)
    z = flow_encode(diffusion, solver=solver)(params, y)
    expected = pushforward(np.asarray(y)[None], np.full(3, np.float32(0.3)), np.full(3, 0.0625))[1][0]
    np.testing.assert_allclose(z, expected, atol=1e-5)
    np.testing.assert_allclose(flow_decode(diffusion, solver=solver)(params, z), y, atol=1e-5)


@pytest.mark.slow
def test_the_gradient_is_the_fixed_grids(key):
    diffusion, params = diffusion_of(white, white_theta(0.3, 0.25), (3,))
    y = jnp.asarray([0.1, 0.5, -0.4])
    steps, grid = (
        own(jax.jit(jax.grad(ode_log_prob(diffusion, solver=solver), argnums=1))(key, params, y))
        for solver in (adaptive(1e-6, 1e-6), fixed_grid())
    )
    for name in grid:
        np.testing.assert_allclose(steps[name], grid[name], rtol=1e-4)


def test_too_few_steps_raise(key):
    diffusion, params = diffusion_of(white, white_theta(0.3, 0.25), (3,))
    log_prob = ode_log_prob(diffusion, solver=adaptive(1e-6, 1e-6, max_steps=2))
    with pytest.raises(Exception, match="max_steps"):
        jax.block_until_ready(log_prob(key, params, jnp.zeros(3)))


def test_without_diffrax(key, monkeypatch):
    """The refusal names the extra; the fixed grid works on."""
    monkeypatch.setitem(sys.modules, "diffrax", None)
    with pytest.raises(ImportError, match=r"adaptive: got no diffrax.*vdiff\[diffrax\].*fixed_grid"):
        adaptive()
    diffusion, params = diffusion_of(white, white_theta(0.3, 0.25), (3,))
    assert np.isfinite(ode_log_prob(diffusion)(key, params, jnp.zeros(3)))


@pytest.mark.parametrize("wrong", [{"rtol": 0.0}, {"atol": -1.0}, {"max_steps": 0}])
def test_refusals(wrong):
    with pytest.raises(ValueError, match="rtol, atol, max_steps: got .*, expected positive tolerances"):
        adaptive(**wrong)
