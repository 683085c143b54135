"""Guidance where its law is known: two Gaussians of one width."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vdiff as vd
from tests.diffusion.cases import gaussian_mse
from vdiff import diffusion

SCALE = 0.25
MEANS = jnp.array([-0.5, 0.4, 0.1])  # two classes, and none


def denoiser():
    """The best guess of x ~ N(mean of the label, SCALE^2)."""

    def apply(theta, z, log_snr, label):
        signal, noise = jax.nn.sigmoid(log_snr), jax.nn.sigmoid(-log_snr)
        best = SCALE**2 * jnp.sqrt(signal) * z + noise * theta[label]
        return best / (SCALE**2 * signal + noise)

    return vd.Network(lambda key: MEANS, apply)


def of(label):
    return vd.vdm(
        vd.given(denoiser(), label),
        diffusion.linear_log_snr(9.0, -9.0),
        shape=(2,),
        num_steps=30,
        predict=vd.predict.data,
        reverse_variance=diffusion.optimal_variance(gaussian_mse(0.0, SCALE)),
        likelihood=diffusion.gaussian(0.003),
    )


@pytest.mark.parametrize("weight", [0.0, 1.0, 2.5])
def test_the_guided_law_is_a_shifted_gaussian(weight):
    """Affine guesses of one slope: p(z | y)^(1 + w) p(z)^-w is N(mean + w (mean - mean of none), the same width)."""
    labels = jnp.array([0, 1] * 10_000, jnp.int32)

    def sample(key, label):
        return diffusion.guided(of(label), of(jnp.int32(2)), weight).sample(key, of(label).init(key))[0]

    x = np.asarray(jax.jit(jax.vmap(sample))(jax.random.split(jax.random.key(1), 20_000), labels), float)
    for label in (0, 1):
        mean = float(MEANS[label] + weight * (MEANS[label] - MEANS[2]))
        mine = x[np.asarray(labels) == label].ravel()
        assert abs(mine.mean() - mean) < 5 * SCALE / math.sqrt(mine.size) + 1e-4
        assert abs(mine.std() - SCALE) < 5 * SCALE / math.sqrt(2 * mine.size) + 2e-4


def test_weight_zero_is_the_conditional_model():
    key, label = jax.random.key(3), jnp.int32(1)
    params = of(label).init(key)
    same = diffusion.guided(of(label), of(jnp.int32(2)), 0.0)
    one = same._replace(sample=vd.ancestral(same, 30)).sample(key, params)
    other = vd.ancestral(of(label), 30)(key, params)
    assert np.allclose(one[0], other[0], atol=1e-5) and np.allclose(one[1], other[1], atol=1e-5)


def test_its_elbo_is_refused():
    guided = diffusion.guided(of(jnp.int32(0)), of(jnp.int32(2)), 1.0)
    params, x = guided.init(jax.random.key(0)), jnp.zeros(2)
    with pytest.raises(ValueError, match="elbo_terms: got a diffusion whose guesses were changed"):
        guided.elbo_estimate(jax.random.key(0), params, x)
    with pytest.raises(ValueError, match="log_joint"):
        vd.pathwise(guided)(jax.random.key(0), params, x)


def test_shapes_must_agree():
    other = vd.ddpm(denoiser(), [0.5], shape=(3,))
    with pytest.raises(ValueError, match="unconditional: got shape"):
        diffusion.guided(of(jnp.int32(0)), other, 1.0)
