"""Denoisers whose answers are known, shared by the tests of diffusion; nothing here is taken from vdiff.diffusion."""

import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import expit

import vdiff as vd

LOC, SCALE = 0.3, 0.25


def gaussian_denoiser(loc=LOC, scale=SCALE):
    """The best guess of x ~ N(loc, scale^2 I) from z = alpha x + sigma eps, as a data prediction, elementwise.

        E[x | z] = (scale^2 alpha z + sigma^2 loc) / (scale^2 alpha^2 + sigma^2)

    Its parameters are {"loc", "log_scale"}, those of the data it believes in.
    """

    def init(key):
        return {"loc": jnp.asarray(loc, jnp.float32), "log_scale": jnp.asarray(np.log(scale), jnp.float32)}

    def apply(theta, z, log_snr):
        variance = jnp.exp(2.0 * theta["log_scale"])
        signal, noise = jax.nn.sigmoid(log_snr), jax.nn.sigmoid(-log_snr)
        return (variance * jnp.sqrt(signal) * z + noise * theta["loc"]) / (variance * signal + noise)

    return vd.Network(init, apply)


def gaussian_mse(loc=LOC, scale=SCALE):
    """What `gaussian_denoiser` leaves unknown, per dimension: log_snr -> Var(x | z)."""
    return lambda log_snr: (
        scale**2 * jax.nn.sigmoid(-log_snr) / (scale**2 * jax.nn.sigmoid(log_snr) + jax.nn.sigmoid(-log_snr))
    )


def tiny_denoiser(dims, hidden=4):
    """A random network for z of any shape with `dims` numbers: no answer is known but by differences.

    out = V tanh(U z + t log_snr / 10 + b) + c
    """

    def init(key):
        keys = jax.random.split(key, 5)
        return {
            "u": jax.random.normal(keys[0], (hidden, dims)) / np.sqrt(dims),
            "t": jax.random.normal(keys[1], (hidden,)),
            "b": 0.5 * jax.random.normal(keys[2], (hidden,)),
            "v": jax.random.normal(keys[3], (dims, hidden)) / np.sqrt(hidden),
            "c": 0.3 * jax.random.normal(keys[4], (dims,)),
        }

    def apply(theta, z, log_snr):
        h = jnp.tanh(theta["u"] @ z.ravel() + theta["t"] * (0.1 * log_snr) + theta["b"])
        return (theta["v"] @ h + theta["c"]).reshape(z.shape)

    return vd.Network(init, apply)


# The forward process in NumPy, float64, written apart from vdiff.


def scales(log_snr):
    """Return alpha and sigma."""
    log_snr = np.asarray(log_snr, np.float64)
    return np.sqrt(expit(log_snr)), np.sqrt(expit(-log_snr))


def step_of_q(log_snr_s, log_snr_t):
    """Return a and v of q(z_t | z_s) = N(a z_s, v): what is left of the variance of z_t given x."""
    (alpha_s, sigma_s), (alpha_t, sigma_t) = scales(log_snr_s), scales(log_snr_t)
    a = alpha_t / alpha_s
    return a, sigma_t**2 - (a * sigma_s) ** 2


def bayes(z_t, x, log_snr_s, log_snr_t):
    """Mean and variance of q(z_s | z_t, x), by Bayes' rule from q(z_s | x) and q(z_t | z_s)."""
    alpha_s, sigma_s = scales(log_snr_s)
    a, v = step_of_q(log_snr_s, log_snr_t)
    variance = 1.0 / (1.0 / sigma_s**2 + a**2 / v)
    return variance * (alpha_s * x / sigma_s**2 + a * z_t / v), variance


def slope(function, at, width=1e-5):
    """Differentiate by central differences of fourth order."""
    step = width * max(1.0, abs(at))
    near, far = (function(at + k * step) - function(at - k * step) for k in (1, 2))
    return (8 * near - far) / (12 * step)
