r"""Sampling by DDIM: the same marginals with less fresh noise, down to none.

    z_s = alpha_s x_hat + sqrt(sigma_s^2 - v) eps_hat + sqrt(v) eps,   v = eta^2 sigma_s^2 c,   c = 1 - SNR_t / SNR_s

with x_hat = denoise(z_t) and eps_hat = (z_t - alpha_t x_hat) / sigma_t. eta = 1 is `ancestral` with the posterior's
variance; eta = 0 solves the probability-flow ODE to first order, exactly where x_hat does not change. With
h = (log_snr_s - log_snr_t) / 2 and k = exp(-h) sqrt(1 - eta^2 c) nothing cancels:

    z_s = k (alpha_s / alpha_t) z_t + (1 - k) alpha_s x_hat + sqrt(v) eps

Source: Song, Meng and Ermon, Denoising Diffusion Implicit Models, 2021, eq. 12 and 16.
"""

import jax
import jax.numpy as jnp
from jax.nn import log_sigmoid
from jaxtyping import Array, Float

from vdiff.diffusion.forward import alpha, sigma
from vdiff.diffusion.grids import Grid, uniform_log_snr
from vdiff.diffusion.model import Diffusion
from vdiff.diffusion.reverse import Sampler, reverse
from vdiff.types import Key, Params, PyTree


def ddim(diffusion: Diffusion, num_steps: int, *, eta: float = 0.0, grid: Grid = uniform_log_snr) -> Sampler:
    """Sample by DDIM: n latents, n calls of the denoiser, the last for the draw of x.

    Args:
        diffusion: what to sample; its own reverse variance is not read.
        num_steps: n.
        eta: share of the posterior's standard deviation that is drawn afresh at each step; 0 draws nothing.
        grid: where the latents lie.

    Returns:
        `(key, params) -> (x, z)`, z the path [n, *shape] from the data's end.

    Raises:
        ValueError: if `num_steps` is less than one, or `eta` is not in [0, 1].
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta: got {eta}, expected a share in [0, 1]; 1 is as noisy as the posterior")

    def step(
        key: Key, params: Params, z: Array, memory: PyTree, log_snr_s: Array, log_snr_t: Array
    ) -> tuple[Array, PyTree]:
        x_hat = diffusion.denoise(params, z, log_snr_t)
        mean = along_flow(z, x_hat, log_snr_s, log_snr_t, eta)
        scale = eta * sigma(log_snr_s) * jnp.sqrt(-jnp.expm1(log_snr_t - log_snr_s))
        return mean + scale * jax.random.normal(key, z.shape), memory

    return reverse(diffusion, num_steps, grid, step)


def along_flow(
    z: Float[Array, "*n"],
    x_hat: Float[Array, "*n"],
    log_snr_s: Float[Array, ""],
    log_snr_t: Float[Array, ""],
    eta: float = 0.0,
) -> Float[Array, "*n"]:
    """Move z_t to the log-SNR of s as if x_hat were the same all along.

        k (alpha_s / alpha_t) z_t + (1 - k) alpha_s x_hat

    Args:
        z: z_t.
        x_hat: a guess of the data.
        log_snr_s: [], where to.
        log_snr_t: [], where from.
        eta: what will be drawn afresh afterwards, see `ddim`.

    Returns:
        The mean of z_s.
    """
    gap = log_snr_s - log_snr_t
    # 1 - eta^2 c as a sum of positive terms.
    log_k = -0.5 * gap + 0.5 * jnp.log(1.0 - eta**2 + eta**2 * jnp.exp(-gap))
    alphas = jnp.exp(0.5 * (log_sigmoid(log_snr_s) - log_sigmoid(log_snr_t)))
    return jnp.exp(log_k) * alphas * z - jnp.expm1(log_k) * alpha(log_snr_s) * x_hat
