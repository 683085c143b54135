r"""Families of covariance matrices, held so that every parameter value is one.

    Sigma^-1 = W^T W,   W lower triangular with a positive diagonal, held by its logarithm
    log N(x; loc, Sigma) = log |W| - |W (x - loc)|^2 / 2 - dim / 2 log 2 pi

A density takes a matrix product per datum; only sampling, x = loc + W^-1 eps, solves a triangular system. A
diagonal Sigma has W = diag(exp(-log_scale)).

Source: Bishop, Pattern Recognition and Machine Learning, 2006, 2.3.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.lax import Precision
from jax.scipy.linalg import solve_triangular
from jaxtyping import Array, Float, Int

from vdiff.densities import LOG_2_PI

Theta = dict[str, Array]

_RESOLUTION = 1e-5
"""What float32 sums resolve: a smaller ratio of scales is rounding, not structure in the data."""


class Covariance(NamedTuple):
    """Hold a family of covariances Sigma_z, by their whitening matrices W_z, as pure functions.

    `theta` is the mixture's whole dictionary: "loc" and the family's own leaves. The last three serve EM.

    Attributes:
        init: `(num_components, dim) -> dict`, the family's own leaves at Sigma_z = I.
        whiten: `(theta, z, residual [dim]) -> [dim]`, W_z residual.
        unwhiten: `(theta, z, noise [dim]) -> [dim]`, W_z^-1 noise.
        log_det: `(theta, z) -> []`, log |W_z|, nats.
        log_prior: `(theta, prior_scale) -> []`, -1/2 sum (log |Sigma| + prior_scale^2 tr Sigma^-1) over the
            family's DISTINCT matrices, nats at unit strength.
        scatter: `(residual [N, dim], weight [N]) -> sum_n weight_n residual_n residual_n^T`, [dim, dim], or
            its diagonal [dim].
        maximize: `(theta, counts [C], scatters [C, ...], prior_strength, prior_scale) -> dict`, the own
            leaves that maximise the expected log-likelihood plus prior_strength * log_prior.
    """

    init: Callable[[int, int], Theta]
    whiten: Callable[[Theta, Array, Array], Array]
    unwhiten: Callable[[Theta, Array, Array], Array]
    log_det: Callable[[Theta, Array], Array]
    log_prior: Callable[[Theta, Array | float], Array]
    scatter: Callable[[Array, Array], Array]
    maximize: Callable[[Theta, Array, Array, Array | float, Array | float], Theta]


def _matrix(log_diag: Float[Array, " dim"], lower: Float[Array, "dim dim"]) -> Float[Array, "dim dim"]:
    return jnp.tril(lower, -1) + jnp.diag(jnp.exp(log_diag))


def _scatter(residual: Float[Array, "N dim"], weight: Float[Array, " N"]) -> Float[Array, "dim dim"]:
    return jnp.matmul((weight[:, None] * residual).T, residual, precision=Precision.HIGHEST)


def _log_prior(
    log_diag: Float[Array, "*C dim"], lower: Float[Array, "*C dim dim"], prior_scale: Array | float
) -> Float[Array, ""]:
    trace = jnp.sum(jnp.exp(2.0 * log_diag)) + jnp.sum(jnp.square(jnp.tril(lower, -1)))
    return jnp.sum(log_diag) - 0.5 * prior_scale**2 * trace


def _maximize(
    theta: Theta,
    square: Float[Array, " dim"],
    count: Float[Array, ""],
    scatter: Float[Array, "dim dim"],
    prior_strength: Array | float,
    prior_scale: Array | float,
) -> Theta:
    """Set one matrix to (scatter + nu s^2 I) / (count + nu); keep it where float32 sees that as singular."""
    eye = jnp.eye(square.shape[0], dtype=square.dtype)
    total = jnp.maximum(count + prior_strength, jnp.finfo(square.dtype).tiny)
    sigma = (scatter + prior_strength * prior_scale**2 * eye) / total
    factor = jnp.linalg.cholesky(sigma)
    pivots = jnp.diagonal(factor)
    is_sound = jnp.all(pivots**2 > _RESOLUTION * jnp.diagonal(sigma))  # False for the NaN of a failed factor
    is_sound &= jnp.all(jnp.diagonal(sigma) > _RESOLUTION**2 * square)
    whitening = solve_triangular(jnp.where(is_sound, factor, eye), eye, lower=True)
    return {
        "log_diag": jnp.where(is_sound, -jnp.log(pivots), theta["log_diag"]),
        "lower": jnp.where(is_sound, jnp.tril(whitening, -1), theta["lower"]),
    }


def _maximize_full(
    theta: Theta, counts: Array, scatters: Array, prior_strength: Array | float, prior_scale: Array | float
) -> Theta:
    own = {"log_diag": theta["log_diag"], "lower": theta["lower"]}
    per_component = jax.vmap(_maximize, in_axes=(0, 0, 0, 0, None, None))
    return per_component(own, theta["loc"] ** 2, counts, scatters, prior_strength, prior_scale)


def _maximize_shared(
    theta: Theta, counts: Array, scatters: Array, prior_strength: Array | float, prior_scale: Array | float
) -> Theta:
    total = jnp.maximum(jnp.sum(counts), jnp.finfo(counts.dtype).tiny)
    square = jnp.matmul(counts / total, theta["loc"] ** 2)
    return _maximize(theta, square, jnp.sum(counts), jnp.sum(scatters, axis=0), prior_strength, prior_scale)


def _maximize_diagonal(
    theta: Theta, counts: Array, scatters: Array, prior_strength: Array | float, prior_scale: Array | float
) -> Theta:
    total = jnp.maximum(counts + prior_strength, jnp.finfo(counts.dtype).tiny)[:, None]
    variance = (scatters + prior_strength * prior_scale**2) / total
    is_sound = variance > _RESOLUTION**2 * theta["loc"] ** 2
    log_scale = 0.5 * jnp.log(jnp.where(is_sound, variance, 1.0))
    return {"log_scale": jnp.where(is_sound, log_scale, theta["log_scale"])}


full_covariance = Covariance(
    init=lambda num_components, dim: {
        "log_diag": jnp.zeros((num_components, dim)),
        "lower": jnp.zeros((num_components, dim, dim)),
    },
    whiten=lambda theta, z, residual: jnp.matmul(
        _matrix(theta["log_diag"][z], theta["lower"][z]), residual, precision=Precision.HIGHEST
    ),
    unwhiten=lambda theta, z, noise: solve_triangular(
        _matrix(theta["log_diag"][z], theta["lower"][z]), noise, lower=True
    ),
    log_det=lambda theta, z: jnp.sum(theta["log_diag"][z]),
    log_prior=lambda theta, prior_scale: _log_prior(theta["log_diag"], theta["lower"], prior_scale),
    scatter=_scatter,
    maximize=_maximize_full,
)
"""A full matrix per component: leaves "log_diag" [C, dim] and "lower" [C, dim, dim] (below the diagonal)."""

shared_covariance = Covariance(
    init=lambda num_components, dim: {"log_diag": jnp.zeros((dim,)), "lower": jnp.zeros((dim, dim))},
    whiten=lambda theta, z, residual: jnp.matmul(
        _matrix(theta["log_diag"], theta["lower"]), residual, precision=Precision.HIGHEST
    ),
    unwhiten=lambda theta, z, noise: solve_triangular(
        _matrix(theta["log_diag"], theta["lower"]), noise, lower=True
    ),
    log_det=lambda theta, z: jnp.sum(theta["log_diag"]),
    log_prior=lambda theta, prior_scale: _log_prior(theta["log_diag"], theta["lower"], prior_scale),
    scatter=_scatter,
    maximize=_maximize_shared,
)
"""One full matrix for all components: leaves "log_diag" [dim] and "lower" [dim, dim]."""

diagonal_covariance = Covariance(
    init=lambda num_components, dim: {"log_scale": jnp.zeros((num_components, dim))},
    whiten=lambda theta, z, residual: jnp.exp(-theta["log_scale"][z]) * residual,
    unwhiten=lambda theta, z, noise: jnp.exp(theta["log_scale"][z]) * noise,
    log_det=lambda theta, z: -jnp.sum(theta["log_scale"][z]),
    log_prior=lambda theta, prior_scale: (
        -jnp.sum(theta["log_scale"] + 0.5 * prior_scale**2 * jnp.exp(-2.0 * theta["log_scale"]))
    ),
    scatter=lambda residual, weight: jnp.matmul(weight, residual**2, precision=Precision.HIGHEST),
    maximize=_maximize_diagonal,
)
"""A diagonal matrix per component: the leaf "log_scale" [C, dim]."""


def component_log_prob(
    covariance: Covariance, theta: Theta, z: Int[Array, ""], x: Float[Array, " dim"]
) -> Float[Array, ""]:
    """Evaluate log p(x | z) = log N(x; loc_z, Sigma_z) of one datum under one component, nats."""
    white = covariance.whiten(theta, z, x - theta["loc"][z])
    return covariance.log_det(theta, z) - 0.5 * (jnp.sum(jnp.square(white)) + white.shape[0] * LOG_2_PI)
