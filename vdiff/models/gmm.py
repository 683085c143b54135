r"""The Gaussian mixture: a `mixture` whose components are Gaussians, which EM can fit.

    p(z) = softmax(phi)_z,   z in {0..C-1}           p(x | z) = N(x; loc_z, Sigma_z)         (12.2.1)

Source: lecture 12.2.1 and 12.2.3; Bishop, Pattern Recognition and Machine Learning, 2006, 9.2 and 2.3.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vdiff.models.covariance import Covariance, component_log_prob, full_covariance
from vdiff.models.mixture import Components, mixture
from vdiff.types import Key, Model, Network, Objective, Params, PyTree


class GMM(NamedTuple):
    """Hold a mixture of Gaussians: the fields of `Mixture`, and what EM wants to know.

    Attributes:
        init, log_joint, log_q, sample_q, sample, elbo_terms, log_prob, log_posterior: as in `Mixture`.
        covariance: the `Covariance` that it was built with.
        encoder: the `Network` of q, or None where q is the posterior.
    """

    init: Callable[[Key], Params]
    log_joint: Callable[[Params, PyTree, PyTree], Array]
    log_q: Callable[[Params, PyTree, PyTree], Array]
    sample_q: Callable[[Key, Params, PyTree], PyTree]
    sample: Callable[[Key, Params], tuple[PyTree, PyTree]]
    elbo_terms: Objective
    log_prob: Callable[[Params, PyTree], Array]
    log_posterior: Callable[[Params, PyTree], Array]
    covariance: Covariance
    encoder: Network | None

    elbo_estimate = Model.elbo_estimate


def gmm(
    num_components: int,
    dim: int,
    *,
    covariance: Covariance = full_covariance,
    encoder: Network | None = None,
) -> GMM:
    """Build a mixture of Gaussians; x is a float vector [dim], z the index of its component.

        log p(x, z) = log softmax(phi)_z + log N(x; loc_z, Sigma_z)

    q, its encoder and the terms are those of `mixture`: without an encoder q is the exact posterior and the terms sum
    to log p(x); with one they sum to the exact ELBO.

    Args:
        num_components: C, at least 1.
        dim: dimension of x, at least 1.
        covariance: `full_covariance`, `diagonal_covariance` or `shared_covariance`, or your own record.
        encoder: a `Network` with apply(lam, x) -> logits [C]; None for the exact posterior.

    Returns:
        A `GMM`, with params theta = {"loc": [C, dim], ...the covariance's leaves}, phi = {"logits": [C]} and
        lam = encoder's. `init` draws locations from N(0, I), with unit covariances and equal weights.

    Raises:
        ValueError: if C or dim is less than one; at trace time, if x is not a float [dim] or the encoder's
            output not [C].

    Source: lecture 12.2.1 and 12.2.3; Bishop, Pattern Recognition and Machine Learning, 2006, 9.2.
    """
    if encoder is None:
        seen = None
    else:
        seen = Network(encoder.init, lambda lam, x: encoder.apply(lam, _check_datum(x, dim)))
    of = mixture(num_components, gaussian_components(dim, covariance), encoder=seen)
    return GMM(*of, covariance, encoder)


def gaussian_components(dim: int, covariance: Covariance = full_covariance) -> Components:
    """Build components N(x; loc_z, Sigma_z) of float vectors [dim].

    Args:
        dim: dimension of x, at least 1.
        covariance: how Sigma_z is parametrised.

    Returns:
        `Components`, theta = {"loc": [C, dim], ...the covariance's leaves}.

    Raises:
        ValueError: if dim is less than one; at trace time, if x is not a float [dim].
    """
    if dim < 1:
        raise ValueError(f"dim: got {dim}, expected at least 1")

    def init(key: Key, num_components: int) -> PyTree:
        loc = jax.random.normal(key, (num_components, dim))
        return {"loc": loc} | covariance.init(num_components, dim)

    def log_prob(theta: PyTree, z: Int[Array, ""], x: Array) -> Float[Array, ""]:
        return component_log_prob(covariance, theta, z, _check_datum(x, dim))

    def sample(key: Key, theta: PyTree, z: Int[Array, ""]) -> Float[Array, " dim"]:
        noise = jax.random.normal(key, (dim,), theta["loc"].dtype)
        return theta["loc"][z] + covariance.unwhiten(theta, z, noise)

    return Components(init, log_prob, sample)


def _check_datum(x: Array, dim: int) -> Array:
    if jnp.shape(x) != (dim,):
        fix = "pass one datum as a vector, and map over a batch with jax.vmap"
        raise ValueError(f"x: got shape {list(jnp.shape(x))}, expected [{dim}]; {fix}")
    if not jnp.issubdtype(jnp.result_type(x), jnp.floating):
        raise ValueError(f"x: got dtype {jnp.result_type(x)}, expected floating point; convert it by astype")
    return x
