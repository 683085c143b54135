"""Transitions against the laws they keep: exact draws stay draws, and moments are known."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.toys import quick_jit
from vdiff.evaluate.transitions import hmc, langevin, nuts, repeated, unadjusted_langevin

NUM_CHAINS, NUM_STEPS = 10_000, 6
# Acceptance of some 70 % each: a step that took everything, or refused wrongly, would be seen.
ADJUSTED = {"langevin": langevin(0.25), "hmc": hmc(0.7, 3), "nuts": nuts(0.8, 2)}

# Two components in the plane; as a Gaussian both are the first.
WEIGHTS = np.array([0.65, 0.35])
LOCS = np.array([[-1.0, 0.2], [1.4, 0.9]])
FACTORS = np.array([[[0.8, 0.0], [0.3, 0.6]], [[0.5, 0.0], [-0.4, 0.7]]])
LAWS = {"mixture": (LOCS, FACTORS), "gaussian": (LOCS[[0, 0]], FACTORS[[0, 0]])}


def draws(law, num, seed=0):
    locs, factors = LAWS[law]
    rng = np.random.default_rng(seed)
    which = rng.choice(2, size=num, p=WEIGHTS)
    eps = rng.normal(size=(num, 2))
    return locs[which] + np.einsum("nij,nj->ni", factors[which], eps)


def log_density_of(locs, precisions, log_weights):
    """Unnormalised, of z = {"u": [], "v": [1]}."""

    def log_density(z):
        residuals = jnp.stack([z["u"], z["v"][0]])[None] - locs
        quadratic = jnp.einsum("ci,cij,cj->c", residuals, precisions, residuals)
        return jax.nn.logsumexp(log_weights - 0.5 * quadratic) + 7.0

    return log_density


def arguments(law):
    locs, factors = LAWS[law]
    precisions = np.linalg.inv(factors @ np.swapaxes(factors, 1, 2))
    log_weights = np.log(WEIGHTS) - np.log(np.abs(np.linalg.det(factors)))
    return [jnp.asarray(a, jnp.float32) for a in (locs, precisions, log_weights)]


def chains(transition, law, starts, seed=1):
    """Where chains are after some steps, [N, 2] in float64, and the share of their steps that moved."""

    def chain(key, start, *args):
        log_density = log_density_of(*args)

        def step(z, key):
            new = transition(key, log_density, z)
            return new, new["u"] != z["u"]

        keys = jax.random.split(key, NUM_STEPS)
        z, moved = jax.lax.scan(step, {"u": start[0], "v": start[1:]}, keys)
        return jnp.stack([z["u"], z["v"][0]]), moved

    run = _compiled.setdefault(transition, quick_jit(jax.vmap(chain, in_axes=(0, 0, None, None, None))))
    keys = jax.random.split(jax.random.key(seed), len(starts))
    z, moved = run(keys, jnp.asarray(starts, jnp.float32), *arguments(law))
    return np.asarray(z, np.float64), float(np.mean(moved))


_compiled = {}


def exact_moments(law):
    """E u, E v, E u^2, E uv, E v^2."""
    locs, factors = LAWS[law]
    second = factors @ np.swapaxes(factors, 1, 2) + locs[:, :, None] * locs[:, None, :]
    first, second = np.tensordot(WEIGHTS, locs, 1), np.tensordot(WEIGHTS, second, 1)
    return np.array([*first, second[0, 0], second[0, 1], second[1, 1]])


def z_scores(z, expected):
    u, v = z.T
    values = np.stack([u, v, u * u, u * v, v * v])
    return (values.mean(1) - expected) / (values.std(1, ddof=1) / np.sqrt(len(z)))


@pytest.mark.slow
@pytest.mark.parametrize("name", ADJUSTED)
def test_exact_draws_stay_exact(name):
    """Of a Gaussian and of a mixture: five moments, each known to about 1 %; and chains have moved."""
    for law in LAWS:
        starts = draws(law, NUM_CHAINS)
        z, moved = chains(ADJUSTED[name], law, starts)
        assert np.all(np.abs(z_scores(z, exact_moments(law))) < 5), law
        assert 0.5 < moved < (1.01 if name == "nuts" else 0.97)
        assert np.mean(np.all(z == starts, axis=1)) < 0.01
        correlation = np.corrcoef(starts[:, 1], z[:, 1])[0, 1]
        assert abs(correlation) < 0.6


def test_the_moments_tell_a_wrong_law():
    """Without its correction the same Langevin step is caught by the same scores."""
    z, moved = chains(unadjusted_langevin(0.25), "mixture", draws("mixture", NUM_CHAINS))
    assert moved == 1.0
    assert np.max(np.abs(z_scores(z, exact_moments("mixture")))) > 7


def test_unadjusted_langevin_keeps_the_law_that_its_docstring_says():
    """N(loc, s^2) becomes N(loc, s^2 / (1 - h / (2 s^2))): that one stays, and its spread is not s^2."""
    step_size, variance = 0.3, np.array([0.5, 2.0])
    kept = variance / (1 - step_size / (2 * variance))
    loc = np.array([0.7, -0.4])
    starts = loc + np.sqrt(kept) * np.random.default_rng(3).normal(size=(NUM_CHAINS, 2))

    def log_density(z):
        return -0.5 * jnp.sum((z - jnp.asarray(loc, jnp.float32)) ** 2 / jnp.asarray(variance, jnp.float32))

    transition = repeated(unadjusted_langevin(step_size), 10)
    keys = jax.random.split(jax.random.key(2), NUM_CHAINS)
    run = quick_jit(jax.vmap(lambda key, z: transition(key, log_density, z)))
    z = np.asarray(run(keys, jnp.asarray(starts, jnp.float32)), np.float64)
    std_error = np.sqrt(kept / NUM_CHAINS)
    assert np.all(np.abs(z.mean(0) - loc) < 5 * std_error)
    spread_error = kept * np.sqrt(2 / NUM_CHAINS)
    assert np.all(np.abs(z.var(0) - kept) < 5 * spread_error)
    assert np.all(kept - variance > 5 * spread_error)


@pytest.mark.slow
def test_chains_from_one_point_reach_the_law():
    """Ergodic, too: 60 steps of HMC from a corner of the plane."""
    z = np.full((NUM_CHAINS, 2), 3.0)
    for seed in range(10):
        z, _ = chains(ADJUSTED["hmc"], "mixture", z, seed=seed)
    assert np.all(np.abs(z_scores(z, exact_moments("mixture"))) < 5)


def test_a_step_is_refused_whole():
    """A forbidden half plane is never entered, though the gradient knows nothing of it."""

    def log_density(z):
        return jnp.where(z[0] > 0, -0.5 * jnp.sum(z**2), -jnp.inf)

    run = quick_jit(
        jax.vmap(lambda key: repeated(langevin(0.5), 20)(key, log_density, jnp.array([0.3, 0.0])))
    )
    z = np.asarray(run(jax.random.split(jax.random.key(0), 4000)), np.float64)
    assert np.all(z[:, 0] > 0)
    # What is left is half a Gaussian: E z_0 = sqrt(2 / pi).
    assert abs(z[:, 0].mean() - np.sqrt(2 / np.pi)) < 5 * z[:, 0].std() / np.sqrt(len(z))


def test_a_traced_step_size_does_not_compile_again():
    count = 0

    def log_density(z):
        nonlocal count
        count += 1
        return -0.5 * jnp.sum(z**2)

    step = jax.jit(lambda key, h: langevin(h)(key, log_density, jnp.ones(2)))
    first = step(jax.random.key(0), 1e-6)
    traced = count
    second = step(jax.random.key(1), 0.5)
    assert count == traced and not np.array_equal(first, second)
    np.testing.assert_allclose(first, 1.0, atol=0.02)


def test_what_is_refused(key):
    for build in (langevin, unadjusted_langevin, lambda h: hmc(h, 3), nuts):
        with pytest.raises(ValueError, match="step_size: got 0.0"):
            build(0.0)
        with pytest.raises(ValueError, match="log_density: got an output of shape"):
            jax.eval_shape(lambda z, build=build: build(0.1)(key, lambda z: -(z**2), z), jnp.ones(3))
        with pytest.raises(TypeError, match="z: got leaves of dtype .*int32.*Gibbs"):
            build(0.1)(key, lambda z: -jnp.sum(z[0] ** 2), (jnp.ones(3), jnp.ones(2, jnp.int32)))
        with pytest.raises(ValueError, match="no leaf"):
            build(0.1)(key, lambda z: jnp.zeros(()), ())
    with pytest.raises(ValueError, match="num_integration_steps: got 0"):
        hmc(0.1, 0)
    with pytest.raises(ValueError, match="max_num_doublings: got 0"):
        nuts(0.1, 0)
    with pytest.raises(ValueError, match="num_steps: got 0"):
        repeated(langevin(0.1), 0)


def test_a_raw_key_is_refused(unchecked):
    with pytest.raises(TypeError, match="typed key"):
        langevin(0.1)(jax.random.PRNGKey(0), lambda z: -jnp.sum(z**2), jnp.ones(3))


def test_without_blackjax(monkeypatch):
    monkeypatch.setitem(sys.modules, "blackjax", None)
    for build in (langevin, unadjusted_langevin, lambda h: hmc(h, 3), nuts):
        with pytest.raises(ImportError, match=r"vdiff\[blackjax\]"):
            build(0.1)
