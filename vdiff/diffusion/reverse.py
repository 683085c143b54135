r"""The loop that every sampler runs: from the noise along a grid of log-SNRs to z_1, and from there to x.

    z_m from `start`,    z_s = step(z_t) for each pair of neighbours,    x ~ p(x | z_1, x_hat),  x_hat = denoise(z_1)

A sampler is a step `(key, params, z, memory, log_snr_s, log_snr_t) -> (z, memory)`; memory is what it keeps from step
to step. The draw of x costs one call of the denoiser, beside those of the steps.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array

from vdiff.diffusion.grids import Grid
from vdiff.diffusion.model import Diffusion
from vdiff.types import Key, Params, PyTree, check_key

Sampler = Callable[[Key, Params], tuple[PyTree, Array]]
Step = Callable[[Key, Params, Array, PyTree, Array, Array], tuple[Array, PyTree]]


def reverse(
    diffusion: Diffusion,
    num_steps: int,
    grid: Grid,
    step: Step,
    start: Callable[[Key, tuple[int, ...], Array], tuple[Array, PyTree]] | None = None,
) -> Sampler:
    """Build a sampler of its step.

    Args:
        diffusion: whose `denoise`, `likelihood` and `shape` are read.
        num_steps: n, the latents visited.
        grid: where they lie.
        step: from z_t to z_s.
        start: `(key, shape, log_snr_m) -> (z_m, memory)`; z_m ~ N(0, I) and no memory when left out.

    Returns:
        `(key, params) -> (x, z)`, z the path [n, *shape] from the data's end.

    Raises:
        ValueError: if `num_steps` is less than one.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps: got {num_steps}, expected at least 1")
    start = _from_noise if start is None else start

    def sample(key: Key, params: Params) -> tuple[PyTree, Array]:
        key_last, key_steps, key_x = jax.random.split(check_key(key), 3)
        log_snrs = grid(diffusion, params, num_steps)

        def back(carry: tuple[Array, PyTree], inputs: tuple[Array, Array, Array]) -> tuple[tuple, Array]:
            z, memory = carry
            key_step, log_snr_s, log_snr_t = inputs
            return step(key_step, params, z, memory, log_snr_s, log_snr_t), z

        first = start(key_last, diffusion.shape, log_snrs[-1])
        keys = jax.random.split(key_steps, log_snrs.shape[0] - 1)
        (z, _), path = jax.lax.scan(back, first, (keys, log_snrs[:-1][::-1], log_snrs[1:][::-1]))
        x_hat = diffusion.denoise(params, z, log_snrs[0])
        x = diffusion.likelihood.sample(key_x, params.theta["likelihood"], x_hat, z, log_snrs[0])
        return x, jnp.concatenate([z[None], path[::-1]])

    return sample


def _from_noise(key: Key, shape: tuple[int, ...], log_snr: Array) -> tuple[Array, PyTree]:
    return jax.random.normal(key, shape), ()
