"""expected_level is Bayes' rule: with the logits of independent pixels, the exact E[x | z], by a sum over levels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vdiff as vd
from tests import toys
from tests.diffusion import cases
from vdiff import diffusion

LEVELS = 4
SHAPE = (2, 2, 3)  # as images: H, W, C with more than one channel
VALUES = (2.0 * np.arange(LEVELS) + 1.0) / LEVELS - 1.0


def network(dtype=jnp.float32):
    """Logits that are its parameters, the levels of a channel side by side: [H, W, C * levels]."""
    init = lambda key: jnp.zeros((*SHAPE[:2], SHAPE[2] * LEVELS))  # noqa: E731
    return vd.Network(init, lambda theta, z, log_snr: theta)


def posterior_mean(prior, z, log_snr):
    """sum_k v_k p_k N(z; alpha v_k, sigma^2) / sum_k p_k N(z; alpha v_k, sigma^2), float64."""
    alpha, sigma = cases.scales(log_snr)
    log_weight = np.log(prior) - 0.5 * ((z[..., None] - alpha * VALUES) / sigma) ** 2
    weight = np.exp(log_weight - log_weight.max(axis=-1, keepdims=True))
    return (weight * VALUES).sum(axis=-1) / weight.sum(axis=-1)


@pytest.fixture
def prior():
    return np.random.default_rng(0).dirichlet(np.ones(LEVELS), size=SHAPE)


@pytest.mark.parametrize("log_snr", [-20.0, -2.0, 1.0, 4.0, 8.0])
def test_it_is_the_posterior_mean_of_independent_pixels(prior, log_snr):
    x = VALUES[np.random.default_rng(1).integers(0, LEVELS, size=SHAPE)]
    alpha, sigma = cases.scales(log_snr)
    z = np.float32(alpha * x + sigma * np.random.default_rng(2).normal(size=SHAPE))
    logits = jnp.asarray(np.log(prior).reshape(*SHAPE[:2], -1) + 7.0, jnp.float32)  # up to a constant
    denoiser = diffusion.expected_level(network(), LEVELS)
    found = denoiser.apply(logits, jnp.asarray(z), jnp.float32(log_snr))
    assert found.shape == SHAPE and found.dtype == jnp.float32
    np.testing.assert_allclose(found, posterior_mean(prior, np.float64(z), log_snr), atol=2e-6)


def test_slope_by_z_is_the_posterior_variance(prior):
    """Tweedie: d E[x | z] / dz = alpha / sigma^2 Var(x | z)."""
    log_snr = 2.0
    alpha, sigma = cases.scales(log_snr)
    z = np.random.default_rng(3).normal(size=SHAPE).astype(np.float32)
    logits = jnp.asarray(np.log(prior).reshape(*SHAPE[:2], -1), jnp.float32)
    denoiser = diffusion.expected_level(network(), LEVELS)
    slope = jax.grad(lambda z: jnp.sum(denoiser.apply(logits, z, jnp.float32(log_snr))))(jnp.asarray(z))
    weight = prior * np.exp(-0.5 * ((z[..., None] - alpha * VALUES) / sigma) ** 2)
    weight /= weight.sum(axis=-1, keepdims=True)
    variance = (weight * VALUES**2).sum(axis=-1) - (weight * VALUES).sum(axis=-1) ** 2
    np.testing.assert_allclose(slope, alpha / sigma**2 * variance, rtol=1e-5, atol=2e-6)


def test_both_ends(prior):
    """Where there is signal alone, the data; where there is noise alone, the prior's mean."""
    k = np.random.default_rng(4).integers(0, LEVELS, size=SHAPE)
    denoiser = diffusion.expected_level(network(), LEVELS)
    logits = jnp.asarray(np.log(prior).reshape(*SHAPE[:2], -1), jnp.float32)
    for log_snr in (13.3, 30.0, 80.0):
        at = jnp.float32(log_snr)
        z, _ = diffusion.forward_marginal(jax.random.key(0), jnp.asarray(VALUES[k], jnp.float32), at)
        value, slope = jax.value_and_grad(lambda t, z=z, at=at: jnp.sum(denoiser.apply(t, z, at)))(logits)
        assert float(value) == pytest.approx(VALUES[k].sum(), abs=1e-5) and not np.any(np.isnan(slope))
        np.testing.assert_allclose(denoiser.apply(logits, z, at), VALUES[k], atol=1e-6)
    for log_snr in (-30.0, -80.0):
        z = jax.random.normal(jax.random.key(1), SHAPE)
        np.testing.assert_allclose(denoiser.apply(logits, z, jnp.float32(log_snr)), prior @ VALUES, atol=2e-6)


def test_levels_of_a_channel_lie_side_by_side():
    """Logits [h, w, c * levels + k] speak of level k of channel c, and of no other pixel or channel."""
    logits = np.zeros((*SHAPE[:2], SHAPE[2] * LEVELS), np.float32)
    logits[1, 0, 2 * LEVELS + 3] = 50.0
    found = diffusion.expected_level(network(), LEVELS).apply(
        jnp.asarray(logits), jnp.zeros(SHAPE), jnp.float32(-80.0)
    )
    expected = np.zeros(SHAPE)
    expected[1, 0, 2] = VALUES[3]
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_it_agrees_with_the_likelihood_of_levels():
    """With flat logits the weights are `levels`' own masses: E under them."""
    z, log_snr = jnp.array([[-0.4, 0.9]]), jnp.float32(2.5)
    flat = vd.Network(lambda key: (), lambda theta, z, log_snr: jnp.zeros((1, 2 * LEVELS)))
    likelihood = diffusion.levels(LEVELS)
    masses = np.exp(
        [
            [
                float(likelihood.log_prob((), jnp.array([k]), jnp.zeros(1), z[0, i : i + 1], log_snr))
                for k in range(4)
            ]
            for i in range(2)
        ]
    )
    np.testing.assert_allclose(
        diffusion.expected_level(flat, LEVELS).apply((), z, log_snr)[0], masses @ VALUES, atol=1e-6
    )


def test_network_parameters_and_conditions_pass_through():
    seen = []

    def apply(theta, z, log_snr, *condition):
        seen.append(condition)
        return theta["w"] * jnp.ones((2, LEVELS))

    of_logits = vd.Network(lambda key: {"w": jnp.ones(())}, apply)
    denoiser = diffusion.expected_level(of_logits, LEVELS)
    assert denoiser.init is of_logits.init
    denoiser.apply({"w": jnp.ones(())}, jnp.zeros(2), jnp.float32(0), jnp.int32(3))
    assert [int(c) for c in seen[0]] == [3]


def test_wrong_sizes_are_refused():
    with pytest.raises(
        ValueError, match=r"logits: got output of shape \(2, 2, 12\), expected 5 numbers.*15 output"
    ):
        toys.quick_jit(diffusion.expected_level(network(), 5).apply)(
            jnp.zeros((2, 2, 12)), jnp.zeros(SHAPE), jnp.float32(0)
        )
    one = vd.Network(lambda key: (), lambda theta, z, log_snr: z)
    with pytest.raises(ValueError, match="levels: got 1, expected at least 2"):
        diffusion.expected_level(one, 1).apply((), jnp.zeros(SHAPE), jnp.float32(0))
