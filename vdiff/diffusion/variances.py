r"""Reverse variances eta: how far p(z_s | z_t) = N(mean, eta I) spreads, a function of the two log-SNRs of a step.

    posterior     sigma_s^2 c                               that of q(z_s | z_t, x): right when x is known exactly
    beta          sigma_t^2 c                               right when x ~ N(0, I)
    optimal       sigma_s^2 c + (alpha_s c)^2 mse(log_snr_t)       least loss, mse = E |x - x_hat|^2 / dims
    learned       between the first two, in the logarithm

with c = 1 - SNR_t / SNR_s. Each is a `Network`: what it learns, if anything, is part of phi, the prior over paths.

Source: Ho, Jain and Abbeel, 2020, 3.2 (beta, posterior); Nichol and Dhariwal, 2021, eq. 15 (learned); Bao et al.,
Analytic-DPM, 2022, theorem 1 (optimal).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.nn import log_sigmoid
from jaxtyping import Array

from vdiff.types import Network, PyTree


def _log_posterior(log_snr_s: Array, log_snr_t: Array) -> Array:
    return log_sigmoid(-log_snr_s) + jnp.log(-jnp.expm1(log_snr_t - log_snr_s))


def _log_beta(log_snr_s: Array, log_snr_t: Array) -> Array:
    return log_sigmoid(-log_snr_t) + jnp.log(-jnp.expm1(log_snr_t - log_snr_s))


def posterior_variance() -> Network:
    """Build eta = sigma_s^2 (1 - SNR_t / SNR_s), apply(phi, log_snr_s, log_snr_t) -> []."""
    return Network(lambda key: (), lambda phi, s, t: jnp.exp(_log_posterior(s, t)))


def beta_variance() -> Network:
    """Build eta = sigma_t^2 (1 - SNR_t / SNR_s), the forward variance; apply(phi, log_snr_s, log_snr_t) -> []."""
    return Network(lambda key: (), lambda phi, s, t: jnp.exp(_log_beta(s, t)))


def learned_variance(log_snr_max: float = 13.3, log_snr_min: float = -5.0, num_knots: int = 16) -> Network:
    """Build a learned eta between posterior and beta.

        log eta = v log beta + (1 - v) log posterior,   v = sigmoid(phi interpolated at log_snr_t)

    Args:
        log_snr_max: log-SNR of the first knot.
        log_snr_min: log-SNR of the last; between knots v's logit is linear, beyond them constant.
        num_knots: how many.

    Returns:
        A `Network` with phi [num_knots], zeros at the start.

    Raises:
        ValueError: if the ends do not fall, or there is no knot.
    """
    if not (log_snr_min < log_snr_max and num_knots >= 1):
        raise ValueError(
            f"log_snr_max, log_snr_min, num_knots: got {log_snr_max}, {log_snr_min}, {num_knots}, expected a fall "
            "and at least one knot"
        )
    knots = jnp.linspace(log_snr_min, log_snr_max, num_knots)

    def apply(phi: Array, log_snr_s: Array, log_snr_t: Array) -> Array:
        v = jax.nn.sigmoid(jnp.interp(log_snr_t, knots, phi))
        # log beta - log posterior without what they share.
        between = log_sigmoid(-log_snr_t) - log_sigmoid(-log_snr_s)
        return jnp.exp(_log_posterior(log_snr_s, log_snr_t) + v * between)

    return Network(lambda key: jnp.zeros(num_knots), apply)


def optimal_variance(mse: Callable[[Array], Array]) -> Network:
    """Build the eta of least loss for a denoiser whose error is known.

        eta = sigma_s^2 c + (alpha_s c)^2 mse(log_snr_t)

    Args:
        mse: `(log_snr []) -> []`, E |x - x_hat|^2 per dimension, over data and noise, as a closed form or from
            `denoising_error`.

    Returns:
        A `Network` without parameters.
    """

    def apply(phi: PyTree, log_snr_s: Array, log_snr_t: Array) -> Array:
        kept = -jnp.expm1(log_snr_t - log_snr_s)
        spread = jnp.exp(log_sigmoid(log_snr_s)) * jnp.square(kept) * mse(log_snr_t)
        return jnp.exp(_log_posterior(log_snr_s, log_snr_t)) + spread

    return Network(lambda key: (), apply)
