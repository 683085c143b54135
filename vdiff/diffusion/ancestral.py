r"""Sampling by the chain itself: the reverse steps that the ELBO speaks of, on any grid of log-SNRs.

    z_m ~ N(0, I),    z_s = E[z_s | z_t, x_hat] + sqrt(eta) eps,   x_hat = denoise(z_t),    x ~ p(x | z_1)

A grid is a function `(diffusion, params, n) -> [n]`, falling: the log-SNRs of n latents from the data's end to the
noise's. Each latent is denoised once, so n is also the number of calls of the denoiser.

Source: Ho, Jain and Abbeel, 2020, algorithm 2.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vdiff.diffusion.forward import forward_posterior
from vdiff.diffusion.model import Diffusion
from vdiff.types import Key, Params, PyTree, check_key

Grid = Callable[[Diffusion, Params, int], Float[Array, " n"]]


def uniform_time(diffusion: Diffusion, params: Params, num_steps: int) -> Float[Array, " n"]:
    """Place latents at even times of the model's own schedule: a `Grid`."""
    times = jnp.linspace(0.0, 1.0, num_steps)
    return jax.vmap(diffusion.log_snr, in_axes=(None, 0))(params, times)


def ancestral(
    diffusion: Diffusion, num_steps: int, *, grid: Grid = uniform_time
) -> Callable[[Key, Params], tuple[PyTree, Array]]:
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
    if num_steps < 1:
        raise ValueError(f"num_steps: got {num_steps}, expected at least 1")

    def sample(key: Key, params: Params) -> tuple[PyTree, Array]:
        key_last, key_steps, key_x = jax.random.split(check_key(key), 3)
        log_snrs = grid(diffusion, params, num_steps)

        def step(z: Array, inputs: tuple[Array, Array, Array]) -> tuple[Array, Array]:
            key_step, log_snr_s, log_snr_t = inputs
            mean, _ = forward_posterior(z, diffusion.denoise(params, z, log_snr_t), log_snr_s, log_snr_t)
            eta = diffusion.reverse_variance(params, log_snr_s, log_snr_t)
            return mean + jnp.sqrt(eta) * jax.random.normal(key_step, z.shape), z

        z_last = jax.random.normal(key_last, diffusion.shape)
        keys = jax.random.split(key_steps, log_snrs.shape[0] - 1)
        backwards = (keys, log_snrs[:-1][::-1], log_snrs[1:][::-1])
        z_first, path = jax.lax.scan(step, z_last, backwards)
        x_hat = diffusion.denoise(params, z_first, log_snrs[0])
        x = diffusion.likelihood.sample(key_x, params.theta["likelihood"], x_hat, z_first, log_snrs[0])
        return x, jnp.concatenate([z_first[None], path[::-1]])

    return sample
