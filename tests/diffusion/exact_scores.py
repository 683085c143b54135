"""Mixtures of Gaussians in the plane, whose denoiser, flow and error are known: what samplers are tried on."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from vdiff.diffusion import DataLikelihood, alpha, linear_log_snr, posterior_variance, predict, sigma, vdm
from vdiff.types import Network, Params

MEAN, STD, RADIUS, RING_STD = 0.3, 0.25, 1.0, 0.1
ANGLES = np.arange(8) * math.pi / 4
MODES = RADIUS * np.stack([np.cos(ANGLES), np.sin(ANGLES)], axis=1)

# x is the guess itself: nothing is added that would hide a sampler's error.
point = DataLikelihood(
    init=lambda key: (),
    log_prob=lambda params, x, x_hat, z, log_snr: jnp.zeros(()),
    sample=lambda key, params, x_hat, z, log_snr: x_hat,
    embed=lambda x: x,
    unembed=lambda y: y,
)


def mixture_guess(theta, z, log_snr):
    variance = jnp.square(theta["std"] * alpha(log_snr)) + jnp.square(sigma(log_snr))
    away = z[None] - alpha(log_snr) * theta["means"]
    log_weights = theta["log_weights"] - 0.5 * jnp.sum(jnp.square(away), axis=1) / variance
    guesses = theta["means"] + jnp.square(theta["std"]) * alpha(log_snr) / variance * away
    return jnp.sum(jax.nn.softmax(log_weights)[:, None] * guesses, axis=0)


def diffusion(log_snr_max=9.0, log_snr_min=-9.0, reverse_variance=None, guess=mixture_guess):
    return vdm(
        Network(lambda key: (), guess),
        linear_log_snr(log_snr_max, log_snr_min),
        shape=(2,),
        predict=predict.data,
        likelihood=point,
        reverse_variance=posterior_variance() if reverse_variance is None else reverse_variance,
    )


def params(means, std, weights=(1.0,) * 8):
    """One structure for all, so that one program serves them."""
    theta = {
        "means": jnp.asarray(means, jnp.result_type(float)),
        "std": jnp.asarray(std, jnp.result_type(float)),
        "log_weights": jnp.log(jnp.asarray(weights, jnp.result_type(float))),
    }
    return Params(theta={"denoiser": theta, "likelihood": ()})


def gaussian():
    """Both coordinates N(0.3, 0.25^2)."""
    return params(np.full((8, 2), MEAN), STD)


def ring(weights=(1.0,) * 8):
    return params(MODES, RING_STD, weights)


def gaussian_mse(log_snr):
    """The error per dimension of the Gaussian's denoiser: what its posterior varies."""
    return (
        STD**2 * jnp.square(sigma(log_snr)) / (jnp.square(STD * alpha(log_snr)) + jnp.square(sigma(log_snr)))
    )


def draw(sample, of, num_draws, seed=0):
    keys = jax.random.split(jax.random.key(seed), num_draws)
    x, z = jax.jit(jax.vmap(sample, in_axes=(0, None)))(keys, of)
    return np.asarray(x, np.float64), np.asarray(z, np.float64)


def gaussian_flow(z, log_snr_from, log_snr_to):
    """Where the probability flow carries z: it keeps the place among the standard deviations."""
    a, b = (1 / (1 + np.exp(-log_snr)) for log_snr in (log_snr_from, log_snr_to))
    spread = np.sqrt((STD**2 * b + 1 - b) / (STD**2 * a + 1 - a))
    return np.sqrt(b) * MEAN + spread * (z - np.sqrt(a) * MEAN)


def ring_flow(z, log_snr_from, log_snr_to, num_steps=4000):
    """The same by Runge-Kutta in u = log_snr / 2:  dz/du = alpha x_hat - alpha^2 z."""

    def slope(z, u):
        a2 = 1 / (1 + np.exp(-2 * u))
        variance = RING_STD**2 * a2 + 1 - a2
        away = z[:, None] - np.sqrt(a2) * MODES
        log_weights = -0.5 * np.sum(away**2, axis=-1) / variance
        weights = np.exp(log_weights - log_weights.max(axis=1, keepdims=True))
        weights /= weights.sum(axis=1, keepdims=True)
        guess = np.sum(weights[..., None] * (MODES + RING_STD**2 * np.sqrt(a2) / variance * away), axis=1)
        return np.sqrt(a2) * guess - a2 * z

    u, h = log_snr_from / 2, (log_snr_to - log_snr_from) / 2 / num_steps
    for _ in range(num_steps):
        k1 = slope(z, u)
        k2 = slope(z + h / 2 * k1, u + h / 2)
        k3 = slope(z + h / 2 * k2, u + h / 2)
        k4 = slope(z + h * k3, u + h)
        z, u = z + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4), u + h
    return z


def slopes(sampler, sizes=(641, 1281), ends=(7.0, -12.0)):
    """By how many powers of two the error at z_1 falls when the steps halve: on the Gaussian, on the ring.

    The start is so noisy that the guess hardly moves there: a multistep first step, of order one, costs nothing.
    """
    errors = []
    with jax.enable_x64(True):
        model = diffusion(*ends)
        for num_steps in sizes:
            sample = jax.jit(jax.vmap(sampler(model, num_steps), in_axes=(0, None)))
            keys = jax.random.split(jax.random.key(0), 32)
            row = []
            for of, flow in ((gaussian(), gaussian_flow), (ring(), ring_flow)):
                z = np.asarray(sample(keys, of)[1])
                exact = flow(z[:, -1], ends[1], ends[0])
                # Medians: a start near the border of two modes converges late.
                row.append(np.median(np.linalg.norm(z[:, 0] - exact, axis=-1)))
            errors.append(row)
    return np.log2(np.array(errors)[:-1] / np.array(errors)[1:])


def affine_std(sampler, model):
    """The exact standard deviation of x when z_m ~ N(0, I) and the map from z_m to x is affine."""
    x, z = draw(sampler, gaussian(), 64)
    return np.std(x) / np.std(z[:, -1])
