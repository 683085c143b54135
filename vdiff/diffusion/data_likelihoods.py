r"""The last step p(x | z_1) of a diffusion model, and the place where its noise is added.

    gaussian(scale)               x real                N(x; x_hat, scale^2)
    discretized_gaussian(levels)  x in {0..levels-1}    mass of N(x_hat, scale^2) on the bin of x
    levels(n)                     x in {0..n-1}         softmax over k of  log N(z_1; alpha_1 value(k), sigma_1^2)
    bernoulli()                   x in {0, 1}           levels(2)

x_hat is the denoiser's guess at z_1. `levels` does without it: it is the posterior under a flat prior on levels, needs
nothing learned, and is sharp once log-SNR at z_1 is well above that of a level's spacing.

Source: Ho, Jain and Abbeel, 2020, eq. 13 (discretised Gaussian); Kingma et al., Variational Diffusion Models, 2021,
eq. 8 (levels).
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from vdiff.densities import normal_interval_log_prob, normal_log_cdf, normal_log_prob
from vdiff.diffusion.forward import alpha, sigma
from vdiff.types import Key, PyTree, check_key


class DataLikelihood(NamedTuple):
    """Hold p(x | z_1) of one datum.

    Attributes:
        init: `(key) -> params`, what it learns; `()` when nothing.
        log_prob: `(params, x, x_hat, z, log_snr) -> []`, nats, summed over dimensions; z is z_1, at log_snr.
        sample: `(key, params, x_hat, z, log_snr) -> x`.
        embed: `(x) -> float array`, where noise is added; the shape of the latents.
        unembed: `(y) -> x's units`, a float array; the inverse of `embed` between levels too.
    """

    init: Callable[[Key], PyTree]
    log_prob: Callable[[PyTree, Array, Array, Array, Array], Array]
    sample: Callable[[Key, PyTree, Array, Array, Array], Array]
    embed: Callable[[Array], Array]
    unembed: Callable[[Array], Array]


def gaussian(scale: float | None = None) -> DataLikelihood:
    """Build p(x | z_1) = N(x; x_hat, scale^2 I), for real x.

    Args:
        scale: a fixed standard deviation, or None: one number is learned, starting at 0.1.

    Returns:
        A `DataLikelihood`; its log_prob is a density.

    Raises:
        ValueError: if a fixed scale is not positive and finite.
    """
    if scale is not None and not (scale > 0 and math.isfinite(scale)):
        raise ValueError(f"scale: got {scale}, expected a positive number, or None to learn it")

    def log_scale_of(params: PyTree) -> Array:
        return params if scale is None else jnp.asarray(math.log(scale), jnp.float32)

    def log_prob(params: PyTree, x: Array, x_hat: Array, z: Array, log_snr: Array) -> Array:
        return jnp.sum(normal_log_prob(x, x_hat, jnp.broadcast_to(log_scale_of(params), x.shape)))

    def sample(key: Key, params: PyTree, x_hat: Array, z: Array, log_snr: Array) -> Array:
        return x_hat + jnp.exp(log_scale_of(params)) * jax.random.normal(check_key(key), x_hat.shape)

    init = (lambda key: jnp.log(jnp.asarray(0.1))) if scale is None else (lambda key: ())
    return DataLikelihood(init, log_prob, sample, lambda x: x, lambda y: y)


def discretized_gaussian(levels: int) -> DataLikelihood:
    """Build the mass that N(x_hat, scale^2) puts on the bin of x, the outermost bins reaching to infinity.

    The scale is that of the noise in z_1 / alpha_1 times a learned number, one at the start.

    Args:
        levels: how many values a pixel can take; level k is embedded at (2 k + 1) / levels - 1.

    Returns:
        A `DataLikelihood`; samples are int32.

    Raises:
        ValueError: if there are fewer than two levels.
    """
    embed, unembed = embedding(levels)
    half = 1.0 / levels

    def scale_of(params: PyTree, log_snr: Array) -> Array:
        return jnp.exp(params - 0.5 * log_snr)

    def log_prob(params: PyTree, x: Array, x_hat: Array, z: Array, log_snr: Array) -> Array:
        scale = scale_of(params, log_snr)
        centre, half_width = (embed(x) - x_hat) / scale, half / scale
        ends = normal_log_cdf(jnp.where(x == 0, centre, -centre) + half_width)
        inside = normal_interval_log_prob(centre, half_width)
        return jnp.sum(jnp.where((x == 0) | (x == levels - 1), ends, inside))

    def sample(key: Key, params: PyTree, x_hat: Array, z: Array, log_snr: Array) -> Array:
        y = x_hat + scale_of(params, log_snr) * jax.random.normal(check_key(key), x_hat.shape)
        return jnp.clip(jnp.round(unembed(y)), 0, levels - 1).astype(jnp.int32)

    return DataLikelihood(lambda key: jnp.zeros(()), log_prob, sample, embed, unembed)


def levels(num_levels: int) -> DataLikelihood:
    """Build p(x | z_1) over levels, each weighed by how well it explains z_1.

        p(x_i = k | z_1) = softmax_k( log N(z_1i; alpha_1 value(k), sigma_1^2) ),   value(k) = (2 k + 1) / n - 1

    Args:
        num_levels: n, how many values a pixel can take.

    Returns:
        A `DataLikelihood` with nothing to learn; samples are int32.

    Raises:
        ValueError: if there are fewer than two levels.
    """
    embed, unembed = embedding(num_levels)

    def log_masses(z: Array, log_snr: Array) -> Array:
        return jax.nn.log_softmax(evidence(z, log_snr, num_levels)[0])

    def log_prob(params: PyTree, x: Array, x_hat: Array, z: Array, log_snr: Array) -> Array:
        index = x.astype(jnp.int32)[..., None]
        return jnp.sum(jnp.take_along_axis(log_masses(z, log_snr), index, axis=-1))

    def sample(key: Key, params: PyTree, x_hat: Array, z: Array, log_snr: Array) -> Array:
        return jax.random.categorical(check_key(key), log_masses(z, log_snr)).astype(jnp.int32)

    return DataLikelihood(lambda key: (), log_prob, sample, embed, unembed)


def bernoulli() -> DataLikelihood:
    """Build p(x | z_1) for bits: `levels(2)`, the bits at -1/2 and 1/2.

    log p(x = 1 | z_1) - log p(x = 0 | z_1) = alpha_1 z_1 / sigma_1^2
    """
    return levels(2)


def evidence(z: Array, log_snr: Array, num_levels: int) -> tuple[Array, Array]:
    """Weigh each level by how well it explains z.

        log N(z; alpha value(k), sigma^2),   up to what no level changes

    Returns:
        The logarithms [*z.shape, num_levels], and the values, broadcast against them.
    """
    embed, _ = embedding(num_levels)
    values = embed(jnp.arange(num_levels)).reshape((1,) * z.ndim + (num_levels,))
    # Squared distances, not their expansion: at a high SNR its terms would cancel.
    distance = (z[..., None] - alpha(log_snr) * values) / sigma(log_snr)
    return -0.5 * jnp.square(distance), values


def embedding(levels: int) -> tuple[Callable[[Array], Array], Callable[[Array], Array]]:
    """Return x -> (2 x + 1) / levels - 1, bin centres of [-1, 1], and the way back."""
    if levels < 2:
        raise ValueError(f"levels: got {levels}, expected at least 2; count the values a pixel can take")
    return (
        lambda x: (2.0 * x.astype(jnp.float32) + 1.0) * (1.0 / levels) - 1.0,
        lambda y: ((y + 1.0) * levels - 1.0) * 0.5,
    )
