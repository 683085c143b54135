r"""Weights of the diffusion loss: functions `(log_snr, density) -> []` of where a latent was drawn and how often.

    loss = 1/2 int w(log_snr) |eps_hat - eps|^2 dlog_snr,    estimated by  w(log_snr) / density  at a drawn log_snr

    elbo            1                                     the ELBO itself, in continuous time
    simple          density                               the noise's plain squared error, under this schedule
    min_snr(g)      density min(1, g / SNR)
    edm(..)         N(log_snr; -2 mean, (2 std)^2) (1 + 1 / (s^2 SNR))
    sigmoid(b)      sigmoid(b - log_snr)

A weight that does not fall as log-SNR rises is still an ELBO, of data with noise added (Kingma and Gao, 2023).

Source: Kingma and Gao, Understanding Diffusion Objectives as the ELBO with Simple Data Augmentation, 2023, table 1; Ho,
Jain and Abbeel, 2020, eq. 14 (simple); Hang et al., Efficient Diffusion Training via Min-SNR Weighting Strategy, 2023;
Karras et al., 2022, table 1 (EDM).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.scipy.stats import norm
from jaxtyping import Array, Float

from vdiff.diffusion.model import Diffusion
from vdiff.types import Key, Params, PyTree, Terms, check_key

Weight = Callable[[Float[Array, ""], Float[Array, ""]], Float[Array, ""]]


def weighted_terms(diffusion: Diffusion, weight: Weight) -> Callable[[Key, Params, PyTree, Array], Terms]:
    """Make the terms of a diffusion model with a weighted loss in place of the diffusion term.

        diffusion:   -1/2 w(log_snr) / density |eps_hat - eps|^2

    Args:
        diffusion: the model.
        weight: e.g. `weights.simple`.

    Returns:
        `(key, params, x, u) -> {"prior", "reconstruction", "diffusion"}`, for `stratified` or `at_random_time`. The sum
        is a bound only for `elbo` in continuous time; otherwise "diffusion" is in weighted nats and never to be printed
        as one. The schedule is held fixed: lam has no gradient.
    """

    def terms_at(key: Key, params: Params, x: PyTree, u: Array) -> Terms:
        key_ends, key_rate = jax.random.split(check_key(key))
        params = params._replace(lam=jax.lax.stop_gradient(params.lam))
        rate = diffusion.rate_at(key_rate, params, x, u)
        importance = weight(rate.log_snr, rate.density) / rate.density
        return {
            **diffusion.end_terms(key_ends, params, x),
            "diffusion": -0.5 * importance * rate.squared_error,
        }

    return terms_at


def elbo(log_snr: Float[Array, ""], density: Float[Array, ""]) -> Float[Array, ""]:
    """Weigh every log-SNR alike: the continuous ELBO."""
    return jnp.ones_like(log_snr)


def simple(log_snr: Float[Array, ""], density: Float[Array, ""]) -> Float[Array, ""]:
    """Weigh by how often the schedule visits: half the squared error of the noise."""
    return density


def min_snr(gamma: float = 5.0) -> Weight:
    """Cut `simple` down where the signal is strong: min(1, gamma / SNR)."""
    if not gamma > 0:
        raise ValueError(f"gamma: got {gamma}, expected a positive number, e.g. 5")
    return lambda log_snr, density: density * jnp.minimum(1.0, gamma * jnp.exp(-log_snr))


def edm(mean: float = -1.2, std: float = 1.2, data_scale: float = 0.5) -> Weight:
    """Weigh as Karras et al. draw and weigh: log noise ~ N(mean, std^2), then 1 + noise^2 / data_scale^2."""
    if not (std > 0 and data_scale > 0):
        raise ValueError(f"std, data_scale: got {std}, {data_scale}, expected positive numbers")

    def weight(log_snr: Array, density: Array) -> Array:
        drawn = jnp.exp(norm.logpdf(log_snr, -2.0 * mean, 2.0 * std))
        # exp(log of the product), since 1 / SNR alone overflows where the density is nothing.
        excess = jnp.exp(norm.logpdf(log_snr, -2.0 * mean, 2.0 * std) - log_snr) / data_scale**2
        return drawn + excess

    return weight


def sigmoid(bias: float = 2.0) -> Weight:
    """Weigh by a sigmoid that falls with log-SNR, one half at the bias."""
    return lambda log_snr, density: jax.nn.sigmoid(bias - log_snr)
