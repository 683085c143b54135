"""Machines small enough that everything about them is a sum, in NumPy and float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from vdiff.baselines import rbm

MODEL = rbm((3, 2), 4, init_scale=0.01, num_steps=50)


def moved(model, scale, seed=1):
    """Parameters far from their symmetric start."""
    rng = np.random.default_rng(seed)
    start = model.init(jax.random.key(seed))
    return jax.tree.map(
        lambda leaf: leaf + jnp.asarray(scale * rng.normal(size=leaf.shape), leaf.dtype), start
    )


PARAMS = moved(MODEL, 1.4)


def states(num_units):
    """All states of so many bits, [2^n, n]; the first unit is the lowest bit."""
    return (np.arange(2**num_units)[:, None] >> np.arange(num_units)) & 1


def weights_of(params):
    """W, b flat, c, in float64."""
    theta = {name: np.asarray(leaf, np.float64) for name, leaf in params.theta.items()}
    return theta["weight"], theta["visible"].ravel(), theta["hidden"]


def sigmoid(a):
    return 1 / (1 + np.exp(-a))


def bernoulli_table(probabilities, bits):
    """P(bits) for each row of probabilities: [rows, states]."""
    p = probabilities[:, None, :]
    return np.prod(np.where(bits[None] == 1, p, 1 - p), axis=-1)


@functools.cache
def joint():
    """exp(-E(x, h)) of MODEL at PARAMS, [64, 16]."""
    weight, b, c = weights_of(PARAMS)
    x, h = states(6), states(4)
    return np.exp((x @ b)[:, None] + (h @ c)[None] + x @ weight @ h.T)


@functools.cache
def transition():
    """T[x, x'] = sum_h p(h | x) p(x' | h) of MODEL at PARAMS, [64, 64]."""
    weight, b, c = weights_of(PARAMS)
    x, h = states(6), states(4)
    return bernoulli_table(sigmoid(c + x @ weight), h) @ bernoulli_table(sigmoid(b + h @ weight.T), x)


@functools.cache
def minus_free_energy_gradients():
    """- dF(x)/dtheta = (x sigmoid(a)', x, sigmoid(a)) of all states x, flat: [64, 24 + 6 + 4]."""
    weight, _, c = weights_of(PARAMS)
    x = states(6)
    mean = sigmoid(c + x @ weight)
    return np.concatenate([(x[:, :, None] * mean[:, None, :]).reshape(64, -1), x, mean], axis=1)


def flat(params, axes=0):
    """The leaves in the order of the above, after so many leading axes."""
    theta = params.theta
    parts = [np.asarray(theta[name], np.float64) for name in ("weight", "visible", "hidden")]
    return np.concatenate([part.reshape(*part.shape[:axes], -1) for part in parts], axis=-1)
