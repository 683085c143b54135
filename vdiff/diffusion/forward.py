r"""The noising q that every diffusion model shares: it has nothing to learn but when to be where.

    z_{i+1} = sqrt(1 - beta_{i+1}) z_i + sqrt(beta_{i+1}) eps,   z_0 = x                    (12.2.6)
    q(z | x) = N(alpha x, sigma^2 I),   alpha^2 = sigmoid(log_snr),   sigma^2 = sigmoid(-log_snr)

so that log_snr = log(alpha^2 / sigma^2) says all about how noisy z is (variance preserving: alpha^2 + sigma^2 = 1).
With s the cleaner and t the noisier of two times and c = 1 - SNR_t / SNR_s,

    q(z_t | z_s)    = N( (alpha_t / alpha_s) z_s,  sigma_t^2 c I )
    q(z_s | z_t, x) = N( alpha_s [ (SNR_t / SNR_s) z_t / alpha_t + c x ],  sigma_s^2 c I )

Everything is written in differences of log-SNR through `expm1` and `log_sigmoid`: finite, value and gradient, where
sqrt(1 - alpha^2) is not.

Source: Sohl-Dickstein et al., Deep Unsupervised Learning using Nonequilibrium Thermodynamics, 2015; Ho, Jain and
Abbeel, Denoising Diffusion Probabilistic Models, 2020; Kingma et al., Variational Diffusion Models, 2021.
"""

import chex
import jax
import jax.numpy as jnp
from jax.nn import log_sigmoid
from jaxtyping import Array, Float

from vdiff.types import Key, check_key


def alpha(log_snr: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """Return the signal's scale, alpha = sqrt(sigmoid(log_snr)), elementwise."""
    return jnp.exp(0.5 * log_sigmoid(log_snr))


def sigma(log_snr: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """Return the noise's scale, sigma = sqrt(sigmoid(-log_snr)), elementwise."""
    return jnp.exp(0.5 * log_sigmoid(-log_snr))


def forward_noise(key: Key, x: Float[Array, "*n"], betas: Float[Array, " m"]) -> Float[Array, "m *n"]:  # noqa: F821
    """Noise a datum step by step: draw the whole path z_1..z_m of q.

        z_{i+1} = sqrt(1 - beta_{i+1}) z_i + sqrt(beta_{i+1}) eps_i,   z_0 = x

    Args:
        key: a typed key.
        x: one datum.
        betas: [m], the variance that each step adds, in (0, 1).

    Returns:
        z_1..z_m, [m, *x.shape].

    Source: lecture 12.2.6. The lecture's "+ eps_i" is noise of variance beta_i.
    """
    chex.assert_rank(betas, 1)
    eps = jax.random.normal(check_key(key), (*betas.shape, *x.shape), x.dtype)

    def step(z: Array, beta_eps: tuple[Array, Array]) -> tuple[Array, Array]:
        beta, eps = beta_eps
        z = jnp.sqrt(1.0 - beta) * z + jnp.sqrt(beta) * eps
        return z, z

    return jax.lax.scan(step, x, (betas, eps))[1]


def forward_marginal(
    key: Key, x: Float[Array, "*n"], log_snr: Float[Array, ""]
) -> tuple[Float[Array, "*n"], Float[Array, "*n"]]:
    """Noise a datum in one jump: draw z = alpha x + sigma eps from q(z | x).

    Args:
        key: a typed key.
        x: one datum.
        log_snr: [], how noisy z is to be.

    Returns:
        z and the noise eps that made it, each of x's shape.

    Source: Ho, Jain and Abbeel, 2020, eq. 4.
    """
    chex.assert_rank(log_snr, 0)
    eps = jax.random.normal(check_key(key), x.shape, x.dtype)
    return alpha(log_snr) * x + sigma(log_snr) * eps, eps


def forward_posterior(
    z: Float[Array, "*n"], x: Float[Array, "*n"], log_snr_s: Float[Array, ""], log_snr_t: Float[Array, ""]
) -> tuple[Float[Array, "*n"], Float[Array, ""]]:
    """Return mean and variance of q(z_s | z_t, x), one step back from z_t when x is known.

    Args:
        z: z_t, the noisier latent.
        x: the datum, or a denoiser's guess of it.
        log_snr_s: [], of the cleaner z_s.
        log_snr_t: [], of z_t; below log_snr_s.

    Returns:
        The mean, of x's shape, and the variance, [].

    Source: Kingma et al., Variational Diffusion Models, 2021, appendix A.
    """
    ratio, kept = jnp.exp(log_snr_t - log_snr_s), -jnp.expm1(log_snr_t - log_snr_s)
    # alpha_s / alpha_t as one exponential: alpha_t alone underflows before the quotient does.
    alphas = jnp.exp(0.5 * (log_sigmoid(log_snr_s) - log_sigmoid(log_snr_t)))
    mean = ratio * alphas * z + kept * alpha(log_snr_s) * x
    return mean, jnp.exp(log_sigmoid(-log_snr_s)) * kept


def betas_of(log_snrs: Float[Array, " m"]) -> Float[Array, " m"]:
    """Return the variances beta_1..beta_m of the steps through latents with these log-SNRs.

        beta_1 = sigma_1^2,   beta_{i+1} = 1 - alpha_{i+1}^2 / alpha_i^2

    Args:
        log_snrs: [m], falling.

    Returns:
        [m], for `forward_noise`.
    """
    log_alpha_squared = log_sigmoid(log_snrs)
    return -jnp.expm1(jnp.diff(log_alpha_squared, prepend=0.0))
