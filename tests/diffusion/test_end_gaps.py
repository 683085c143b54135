"""The cost of a schedule's ends against closed forms in float64, and against the flow's mean log-density."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.diffusion.flows import diffusion_of, log_normal, pushforward, scales, white, white_theta
from vdiff.diffusion.end_gaps import end_gaps

MEAN = np.array([[0.3, -1.0], [0.0, 2.0]])
VARIANCE = np.array([[0.0625, 1.0], [0.5, 3.0]])


def kl(mean, variance, mean_other, variance_other):
    each = (variance + (mean - mean_other) ** 2) / variance_other - 1 + np.log(variance_other / variance)
    return 0.5 * np.sum(each)


@pytest.mark.parametrize("ends", [(13.3, -5.0), (10.0, -10.0), (2.0, 0.0)])
def test_against_divergences_in_float64(ends):
    diffusion, params = diffusion_of(white, white_theta(0.0, 1.0), (2, 2), ends)
    gaps = end_gaps(diffusion, jnp.asarray(MEAN, jnp.float32), jnp.asarray(VARIANCE, jnp.float32))(params)
    (a, noise), (b, noise_last) = scales(ends[0]), scales(ends[1])
    np.testing.assert_allclose(gaps.start, kl(MEAN, VARIANCE, MEAN, VARIANCE + noise / a**2), rtol=2e-5)
    last = b**2 * VARIANCE + noise_last
    kept = VARIANCE / (VARIANCE + noise / a**2)
    end = 0.5 * np.sum(b**2 * MEAN**2 + kept * (last - 1) - np.log(last))
    np.testing.assert_allclose(gaps.end, end, rtol=2e-5)
    if ends[0] >= 10:
        np.testing.assert_allclose(gaps.end, kl(b * MEAN, last, 0, 1), rtol=2e-3)


@pytest.mark.parametrize("ends", [(13.3, -5.0), (4.0, -2.0)])
def test_they_are_what_the_mean_log_density_lacks(ends):
    """A quadratic's mean over a normal is its mean over one standard deviation to both sides, axis by axis."""
    diffusion, params = diffusion_of(white, white_theta(0.0, 1.0), (2, 2), ends)
    axes = np.eye(4).reshape(4, 2, 2) * np.sqrt(4 * VARIANCE)
    y = np.concatenate([MEAN + axes, MEAN - axes])
    lacks = log_normal(y, MEAN, VARIANCE).mean() - pushforward(y, MEAN, VARIANCE, ends)[0].mean()
    gaps = end_gaps(diffusion, jnp.asarray(MEAN, jnp.float32), jnp.asarray(VARIANCE, jnp.float32))(params)
    np.testing.assert_allclose(sum(gaps), lacks, rtol=2e-5)


def test_the_ends_may_be_learned():
    """A gradient by whatever moves the ends is the closed form's."""
    diffusion, params = diffusion_of(white, white_theta(0.0, 1.0), (2, 2))
    diffusion = diffusion._replace(log_snr=lambda params, t: params.lam - 18.3 * t)

    def cost(first):
        gaps = end_gaps(diffusion, jnp.asarray(MEAN, jnp.float32), jnp.asarray(VARIANCE, jnp.float32))
        return gaps(params._replace(lam=first)).end

    def exact(first):
        b, noise_last = scales(first - 18.3)
        last = b**2 * VARIANCE + noise_last
        kept = VARIANCE / (VARIANCE + np.exp(-first))
        return 0.5 * np.sum(b**2 * MEAN**2 + kept * (last - 1) - np.log(last))

    slope = (exact(13.3 + 1e-4) - exact(13.3 - 1e-4)) / 2e-4
    np.testing.assert_allclose(jax.jit(jax.grad(cost))(jnp.float32(13.3)), slope, rtol=1e-4)


def test_refusals():
    diffusion, _ = diffusion_of(white, white_theta(0.0, 1.0), (2, 2))
    with pytest.raises(
        ValueError, match=r"mean, variance: got shapes \(2,\) and \(2, 2\), expected \(2, 2\)"
    ):
        end_gaps(diffusion, jnp.zeros(2), jnp.ones((2, 2)))
