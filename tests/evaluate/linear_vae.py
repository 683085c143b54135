"""A VAE whose every quantity is known: linear, Gaussian, its posterior factorised.

    z ~ N(0, I), [2];   x = W z + bias + s eps, [5];   the columns of W orthogonal

so that p(x) is a Gaussian and p(z | x) one with independent units, which q is at lam = {shift 0, widen 0}.
"""

import jax
import jax.numpy as jnp
import numpy as np

import vdiff as vd

SCALE = 0.4
WEIGHT = np.array([[0.9, 0.3], [0.9, -0.3], [0.6, 0.0], [0.0, 0.8], [0.0, 0.8]])
BIAS = np.array([0.2, -0.4, 0.1, 0.0, 0.5])
POSTERIOR_SCALE = 1 / np.sqrt(1 + np.sum(WEIGHT**2, 0) / SCALE**2)


def build():
    """The model; lam["shift"] moves q's mean, in the posterior's deviations, lam["widen"] is added to its log-scale."""
    w, bias, scale = (jnp.asarray(v, jnp.float32) for v in (WEIGHT, BIAS, POSTERIOR_SCALE))

    def encode(lam, x):
        loc = jnp.square(scale) * (w.T @ (x - bias)) / SCALE**2 + lam["shift"] * scale
        return jnp.concatenate([loc, jnp.log(scale) + lam["widen"]])

    return vd.vae(
        vd.Network(lambda key: lam(), encode),
        vd.Network(lambda key: {"w": w, "bias": bias}, lambda theta, z: theta["w"] @ z + theta["bias"]),
        latent_dim=2,
        likelihood=vd.likelihoods.gaussian(SCALE),
    )


def lam(shift=(0.0, 0.0), widen=(0.0, 0.0)):
    return {"shift": jnp.array(shift), "widen": jnp.array(widen)}


def log_prob(x):
    """Log N(x; bias, W W^T + s^2 I), float64, of x [N, 5]."""
    covariance = WEIGHT @ WEIGHT.T + SCALE**2 * np.eye(5)
    r = np.asarray(x, np.float64) - BIAS
    quadratic = np.sum(r * np.linalg.solve(covariance, r.T).T, -1)
    return -0.5 * (quadratic + np.linalg.slogdet(2 * np.pi * covariance)[1])


def started_from_prior(model):
    """The same model with the prior for its q."""
    return model._replace(
        sample_q=lambda key, params, x: jax.random.normal(key, (2,)),
        log_q=lambda params, x, z: jnp.sum(jax.scipy.stats.norm.logpdf(z)),
    )


def autoregressive(correlation):
    """In detailed balance with any Gaussian of z [2]: z' = loc + r (z - loc) + sqrt(1 - r^2) scale eps."""

    def transition(key, log_density, z):
        # Of a quadratic, the slope at zero and its differences to those at the unit vectors are all there is.
        slope, one, other = jax.vmap(jax.grad(log_density))(jnp.array([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]]))
        row, other = slope - one, slope - other
        det = row[0] * other[1] - row[1] * other[0]
        covariance = jnp.array([[other[1], -row[1]], [-row[1], row[0]]]) / det
        a = jnp.sqrt(covariance[0, 0])
        b = covariance[0, 1] / a
        factor = jnp.array([[a, 0.0], [b, jnp.sqrt(covariance[1, 1] - b**2)]])
        loc, eps = covariance @ slope, jax.random.normal(key, (2,))
        return loc + correlation * (z - loc) + np.sqrt(1 - correlation**2) * (factor @ eps)

    return transition
