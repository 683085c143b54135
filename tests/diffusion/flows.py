"""Diffusions whose flow is known: Gaussian data with any covariance, a ring of Gaussians, data on levels."""

import jax
import jax.numpy as jnp
import numpy as np

from vdiff.diffusion import linear_log_snr, predict, vdm
from vdiff.diffusion.forward import alpha, sigma
from vdiff.types import Network, Params

ENDS = (13.3, -5.0)


def diffusion_of(denoise, theta, shape, ends=ENDS, **settings):
    """A continuous-time diffusion whose denoiser is the function `(theta, z, log_snr) -> x_hat`, and its parameters."""
    denoiser = Network(lambda key: theta, denoise)
    diffusion = vdm(denoiser, linear_log_snr(*ends), shape=shape, predict=predict.data, **settings)
    return diffusion, diffusion.init(jax.random.key(0))


def white(theta, z, log_snr):
    """E[x | z] for x ~ N(mean, exp(log_scale)^2 I)."""
    a, noise = alpha(log_snr), jnp.square(sigma(log_snr))
    s2 = jnp.exp(2.0 * theta["log_scale"])
    return (noise * theta["mean"] + s2 * a * z) / (s2 * jnp.square(a) + noise)


def white_theta(mean, scale):
    return {"mean": jnp.asarray(mean, jnp.float32), "log_scale": jnp.log(jnp.asarray(scale, jnp.float32))}


def correlated(theta, z, log_snr):
    """E[x | z] for x ~ N(mean, basis diag(variance) basis^T)."""
    a, noise = alpha(log_snr), jnp.square(sigma(log_snr))
    centred = (z - a * theta["mean"]).reshape(-1) @ theta["basis"]
    gain = a * theta["variance"] / (jnp.square(a) * theta["variance"] + noise)
    return theta["mean"] + (theta["basis"] @ (gain * centred)).reshape(z.shape)


def correlated_theta(num_dims, seed=0, shape=None):
    rng = np.random.default_rng(seed)
    basis = np.linalg.qr(rng.normal(size=(num_dims, num_dims)))[0]
    return {
        "mean": jnp.asarray(rng.uniform(-0.5, 0.5, shape or num_dims), jnp.float32),
        "basis": jnp.asarray(basis, jnp.float32),
        "variance": jnp.asarray(np.geomspace(0.04, 2.0, num_dims), jnp.float32),
    }


def scales(log_snr):
    """Alpha and sigma squared, in float64."""
    return 1 / np.sqrt(1 + np.exp(-log_snr)), 1 / (1 + np.exp(log_snr))


def pushforward(y, mean, variance, ends=ENDS, basis=None):
    """The log-density of the flow's own model for data N(mean, basis diag(variance) basis^T), and z_1, in float64.

    The flow keeps every marginal, so it is linear: along a principal axis what is left of the mean is stretched by the
    ratio of standard deviations.
    """
    y, mean, variance = (np.asarray(a, np.float64) for a in (y, mean, variance))
    basis = np.eye(mean.size) if basis is None else np.asarray(basis, np.float64)
    # The ends as float32 holds them.
    (a, noise), (b, noise_last) = (scales(float(np.float32(end))) for end in ends)
    stretch = np.sqrt((b**2 * variance + noise_last) / (a**2 * variance + noise)).reshape(-1)
    centred = a * (y - mean).reshape(len(y), -1) @ basis
    z = (b * mean).reshape(-1) + (stretch * centred) @ basis.T
    log_det = np.sum(np.log(stretch)) + mean.size * np.log(a)
    return -0.5 * np.sum(z**2 + np.log(2 * np.pi), axis=1) + log_det, z.reshape(y.shape)


def log_normal(y, mean, variance):
    """Log N(y; mean, diag variance) of each row, in float64."""
    y, mean, variance = (np.asarray(a, np.float64) for a in (y, mean, variance))
    each = -0.5 * ((y - mean) ** 2 / variance + np.log(2 * np.pi * variance))
    return each.reshape(len(y), -1).sum(1)


RADIUS, RING_SCALE, NUM_MODES = 1.0, 0.15, 8
ANGLES = 2 * np.pi * np.arange(NUM_MODES) / NUM_MODES
MODES = RADIUS * np.stack([np.cos(ANGLES), np.sin(ANGLES)], axis=1)


def ring(theta, z, log_snr):
    """E[x | z] for eight equal Gaussians on a ring; theta is their centres."""
    a, noise = alpha(log_snr), jnp.square(sigma(log_snr))
    variance = RING_SCALE**2 * jnp.square(a) + noise
    weights = jax.nn.softmax(-0.5 * jnp.sum(jnp.square(z[None] - a * theta), axis=1) / variance)
    return (noise * (weights @ theta) + RING_SCALE**2 * a * z) / variance


def ring_log_prob(y, log_snr):
    """Log-density of the ring blurred by the noise of log_snr, in float64."""
    variance = RING_SCALE**2 + np.exp(-log_snr)
    squared = np.sum((np.asarray(y, np.float64)[:, None] - MODES) ** 2, axis=2)
    return np.logaddexp.reduce(-0.5 * squared / variance, axis=1) - np.log(2 * np.pi * variance * NUM_MODES)


def on_levels(theta, z, log_snr):
    """E[x | z] for x on levels, independent in each dimension; theta is the logarithms of their masses."""
    num_levels = theta.shape[0]
    values = (2.0 * jnp.arange(num_levels, dtype=z.dtype) + 1.0) / num_levels - 1.0
    a = alpha(log_snr)
    distance = z[..., None] / a - values.reshape((1,) * z.ndim + (-1,))
    logits = theta.reshape((1,) * z.ndim + (-1,)) - 0.5 * jnp.exp(log_snr) * jnp.square(distance)
    return jax.nn.softmax(logits) @ values


def own(params):
    """The denoiser's parameters."""
    return params.theta["denoiser"]


def with_own(params, theta):
    return Params(theta={**params.theta, "denoiser": theta}, phi=params.phi, lam=params.lam)
