r"""One stochastic layer of a hierarchy: a Gaussian whose units are independent, given by a network's output.

    out = (loc, log scale) along the last axis;      N(loc, diag(scale^2)) of a latent of any shape
    KL(q || p) = sum_i KL( N((m_q - m_p) / s_p, (s_q / s_p)^2) || N(0, 1) )

Models of one layer have `families`; these are parts of models of several.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vdiff.densities import normal_entropy, normal_kl, normal_log_prob
from vdiff.types import Key, check_key


class Gaussian(NamedTuple):
    """Hold the parameters of one layer's density.

    Attributes:
        loc: means, of the latent's shape.
        log_scale: logarithms of the standard deviations, of the same shape.
    """

    loc: Array
    log_scale: Array


def halved(name: str, out: Array) -> Gaussian:
    """Read a network's output as loc beside log scale.

    Args:
        name: of the network, for the error.
        out: [..., 2 C].

    Returns:
        A `Gaussian` of a latent [..., C].

    Raises:
        ValueError: if the last axis cannot be halved.
    """
    if out.ndim < 1 or out.shape[-1] % 2 or out.shape[-1] == 0:
        raise ValueError(
            f"{name}: got output of shape {out.shape}, expected an even last axis, loc beside log scale; give it "
            "twice the channels of z"
        )
    return Gaussian(*jnp.split(out, 2, axis=-1))


def drawn(key: Key, of: Gaussian) -> Array:
    """Draw z = loc + scale * eps (12.2.5)."""
    return of.loc + jnp.exp(of.log_scale) * jax.random.normal(check_key(key), of.loc.shape, of.loc.dtype)


def log_prob(z: Array, of: Gaussian) -> Float[Array, ""]:
    """Evaluate log N(z; loc, diag(scale^2)), nats."""
    return jnp.sum(normal_log_prob(z, of.loc, of.log_scale))


def entropy(of: Gaussian) -> Float[Array, ""]:
    """Evaluate the entropy of N(loc, diag(scale^2)), nats."""
    return jnp.sum(normal_entropy(of.log_scale))


def kl(q: Gaussian, p: Gaussian) -> Float[Array, ""]:
    """Evaluate KL(q || p), nats."""
    return jnp.sum(normal_kl((q.loc - p.loc) * jnp.exp(-p.log_scale), q.log_scale - p.log_scale))
