r"""Sampling by the chain itself: the reverse steps that the ELBO speaks of, on any grid of log-SNRs.

    z_m ~ N(0, I),    z_s = E[z_s | z_t, x_hat] + sqrt(eta) eps,   x_hat = denoise(z_t),    x ~ p(x | z_1)

Each latent is denoised once, so n latents take n calls of the denoiser.

Source: Ho, Jain and Abbeel, 2020, algorithm 2.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array

from vdiff.diffusion.forward import forward_posterior
from vdiff.diffusion.grids import Grid, uniform_time
from vdiff.diffusion.model import Diffusion
from vdiff.diffusion.reverse import Sampler, reverse
from vdiff.types import Key, Params, PyTree


def ancestral(diffusion: Diffusion, num_steps: int, *, grid: Grid = uniform_time) -> Sampler:
    """Sample by the reverse steps, with the model's own reverse variance.

        diffusion = diffusion._replace(sample=ancestral(diffusion, 50))

    Args:
        diffusion: what to sample.
        num_steps: n, the latents visited and the calls of the denoiser.
        grid: where they lie.

    Returns:
        `(key, params) -> (x, z)`, z the path [n, *shape] from the data's end.

    Raises:
        ValueError: if `num_steps` is less than one.
    """

    def step(
        key: Key, params: Params, z: Array, memory: PyTree, log_snr_s: Array, log_snr_t: Array
    ) -> tuple[Array, PyTree]:
        mean, _ = forward_posterior(z, diffusion.denoise(params, z, log_snr_t), log_snr_s, log_snr_t)
        eta = diffusion.reverse_variance(params, log_snr_s, log_snr_t)
        return mean + jnp.sqrt(eta) * jax.random.normal(key, z.shape), memory

    return reverse(diffusion, num_steps, grid, step)
