r"""Sampling what is missing: the chain is conditioned on the pixels that are known.

    known      alpha_s y + sigma_s eps, drawn afresh        y the known datum, embedded
    unknown    z_s ~ N( E[z_s | z_t, x_hat], eta I )        a step of `ancestral`
    again      z_t ~ q(z_t | z_s),  and the step is redone

The two halves of z_s are drawn without knowledge of each other; going forth and back lets them agree. As r, the
number of times that a step is done, grows, the unknown forgets where it began, and its law at small steps nears the
conditional one where there is little noise. With r = 1 it is far from it.

Source: Lugmayr et al., RePaint: Inpainting using Denoising Diffusion Probabilistic Models, 2022, algorithm 1.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.nn import log_sigmoid
from jaxtyping import Array

from vdiff.diffusion.forward import forward_marginal, forward_posterior, sigma
from vdiff.diffusion.grids import Grid, uniform_log_snr
from vdiff.diffusion.model import Diffusion
from vdiff.diffusion.reverse import Sampler, reverse
from vdiff.types import Key, Params, PyTree


def inpaint(
    diffusion: Diffusion,
    known: PyTree,
    mask: Array | np.ndarray,
    num_steps: int,
    *,
    num_resamples: int = 1,
    grid: Grid = uniform_log_snr,
) -> Sampler:
    """Sample the rest of a datum: n latents, (n - 1) r + 1 calls of the denoiser.

    Args:
        diffusion: what to sample, with its own reverse variance.
        known: one datum, of which the masked part is read.
        mask: of the datum's shape, true where it is known.
        num_steps: n.
        num_resamples: r, how often each step is done.
        grid: where the latents lie.

    Returns:
        `(key, params) -> (x, z)`, z the path [n, *shape] from the data's end; x is `known` where the mask is true.

    Raises:
        ValueError: if `num_steps` or `num_resamples` is less than one, or `known` or `mask` has another shape than a
            datum.
        TypeError: if the mask is not boolean.
    """
    if num_resamples < 1:
        raise ValueError(f"num_resamples: got {num_resamples}, expected at least 1")
    known, mask = jnp.asarray(known), jnp.asarray(mask)
    if mask.dtype != jnp.bool_:
        raise TypeError(f"mask: got {mask.dtype}, expected bool, true where known; write mask == 1")
    for name, array in (("known", known), ("mask", mask)):
        if array.shape != diffusion.shape:
            raise ValueError(
                f"{name}: got shape {array.shape}, expected {diffusion.shape}, that of one datum"
            )
    target = diffusion.likelihood.embed(known)

    def with_known(key: Key, z: Array, log_snr: Array) -> Array:
        return jnp.where(mask, forward_marginal(key, target, log_snr)[0], z)

    def back(key: Key, params: Params, z: Array, log_snr_s: Array, log_snr_t: Array) -> Array:
        key_step, key_known = jax.random.split(key)
        mean, _ = forward_posterior(z, diffusion.denoise(params, z, log_snr_t), log_snr_s, log_snr_t)
        eta = diffusion.reverse_variance(params, log_snr_s, log_snr_t)
        z = mean + jnp.sqrt(eta) * jax.random.normal(key_step, z.shape)
        return with_known(key_known, z, log_snr_s)

    def forth(key: Key, z: Array, log_snr_s: Array, log_snr_t: Array) -> Array:
        kept = jnp.exp(0.5 * (log_sigmoid(log_snr_t) - log_sigmoid(log_snr_s)))
        scale = sigma(log_snr_t) * jnp.sqrt(-jnp.expm1(log_snr_t - log_snr_s))
        return kept * z + scale * jax.random.normal(key, z.shape)

    def step(
        key: Key, params: Params, z: Array, memory: PyTree, log_snr_s: Array, log_snr_t: Array
    ) -> tuple[Array, PyTree]:
        def again(i: Array | int, z: Array) -> Array:
            key_back, key_forth = jax.random.split(jax.random.fold_in(key, i))
            return forth(key_forth, back(key_back, params, z, log_snr_s, log_snr_t), log_snr_s, log_snr_t)

        z = jax.lax.fori_loop(1, num_resamples, again, z)
        return back(jax.random.fold_in(key, 0), params, z, log_snr_s, log_snr_t), memory

    def start(key: Key, shape: tuple[int, ...], log_snr: Array) -> tuple[Array, PyTree]:
        key_noise, key_known = jax.random.split(key)
        return with_known(key_known, jax.random.normal(key_noise, shape), log_snr), ()

    draw = reverse(diffusion, num_steps, grid, step, start)

    def sample(key: Key, params: Params) -> tuple[PyTree, Array]:
        x, z = draw(key, params)
        return jnp.where(mask, known, x), z

    return sample
