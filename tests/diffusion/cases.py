"""Denoisers whose answers are known, shared by the tests of diffusion; nothing here is taken from vdiff.diffusion."""

import jax
import jax.numpy as jnp
import numpy as np

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
