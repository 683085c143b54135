r"""Sampling by Heun's method: each step is corrected by the guess at its end; noise may be put back before it.

    hat:      z_hat ~ q(z_hat | z_t),  s_hat = (1 + gamma) s_t,  s = sigma / alpha = exp(-log_snr / 2)     if churned
    Euler:    z' = along_flow(z_hat),  x_hat = denoise(z_hat)                                     a step of `ddim`
    Heun:     z_s = z' + alpha_s w(h) (x_hat' - x_hat),  x_hat' = denoise(z'),  h = (log_snr_s - log_snr_hat) / 2

What Euler leaves out of the flow from t to s is alpha_s int_0^h e^{-(h - u)} (x_hat(u) - x_hat(0)) du, and w is the
rule that integrates it from its two ends:

    in_log_snr    w = h / 2             the trapezoidal rule in u = log_snr / 2
    in_sigma      w = (e^h - 1) / 2     the trapezoidal rule in s: exactly the method of Karras et al., in z = alpha y

Both are of second order. In few steps h is large, and e^h then carries the second far past the data; the first is the
default. No y = z / alpha, which grows without bound, is ever formed.

Source: Karras et al., Elucidating the Design Space of Diffusion-Based Generative Models, 2022, algorithm 2.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vdiff.diffusion.ddim import along_flow
from vdiff.diffusion.forward import alpha, sigma
from vdiff.diffusion.grids import Grid, uniform_log_snr
from vdiff.diffusion.model import Diffusion
from vdiff.diffusion.reverse import Sampler, reverse
from vdiff.types import Key, Params, PyTree


def in_log_snr(h: Float[Array, ""]) -> Float[Array, ""]:
    """Weigh the correction by the trapezoidal rule in half the log-SNR: h / 2."""
    return 0.5 * h


def in_sigma(h: Float[Array, ""]) -> Float[Array, ""]:
    """Weigh the correction by the trapezoidal rule in sigma / alpha, as EDM does: (e^h - 1) / 2."""
    return 0.5 * jnp.expm1(h)


def heun(
    diffusion: Diffusion,
    num_steps: int,
    *,
    churn: float = 0.0,
    churn_noise: float = 1.0,
    churn_between: tuple[float, float] = (-math.inf, math.inf),
    weight: Callable[[Array], Array] = in_log_snr,
    grid: Grid = uniform_log_snr,
) -> Sampler:
    """Sample by Heun's method: n latents, 2 n - 1 calls of the denoiser.

        gamma = min(churn / n, sqrt(2) - 1),   c = 1 - 1 / (1 + gamma)^2
        z_hat = (alpha_hat / alpha_t) z_t + churn_noise sigma_hat sqrt(c) eps

    Deterministic but for z_m and the draw of x when `churn` is zero. EDM's own sampler is
    `heun(diffusion, n, churn=40.0, churn_noise=1.003, weight=in_sigma, grid=karras())`.

    Args:
        diffusion: what to sample; its own reverse variance is not read.
        num_steps: n; two calls for each of the n - 1 steps, and one at z_1 for the draw of x.
        churn: how much noise is put back, over all steps; EDM's S_churn.
        churn_noise: scale of that noise; EDM's S_noise.
        churn_between: log-SNRs, low and high, between which a step is churned. A step from the grid's end asks the
            denoiser for a log-SNR as much as log 2 below that end, unless it is left out here.
        weight: `(h) -> w`, with w = h / 2 + O(h^2) for second order.
        grid: where the latents lie.

    Returns:
        `(key, params) -> (x, z)`, z the path [n, *shape] from the data's end.

    Raises:
        ValueError: if `num_steps` is less than one, `churn` or `churn_noise` is negative, or `churn_between` falls.
    """
    low, high = churn_between
    if not (churn >= 0 and churn_noise >= 0):
        raise ValueError(
            f"churn, churn_noise: got {churn}, {churn_noise}, expected none to be negative; 0 puts no noise back"
        )
    if not low < high:
        raise ValueError(f"churn_between: got {low}, {high}, expected low < high; exchange them")
    # Above a doubled variance the noise would undo most of a step.
    raised = min(churn / max(num_steps, 1), math.sqrt(2.0) - 1.0)

    def step(
        key: Key, params: Params, z: Array, memory: PyTree, log_snr_s: Array, log_snr_t: Array
    ) -> tuple[Array, PyTree]:
        gamma = jnp.where((low <= log_snr_t) & (log_snr_t <= high), raised, 0.0).astype(z.dtype)
        log_snr_hat = log_snr_t - 2.0 * jnp.log1p(gamma)
        fresh = churn_noise * sigma(log_snr_hat) * jnp.sqrt(gamma * (2.0 + gamma)) / (1.0 + gamma)
        kept = alpha(log_snr_hat) / alpha(log_snr_t)
        z_hat = kept * z + fresh * jax.random.normal(key, z.shape)
        x_hat = diffusion.denoise(params, z_hat, log_snr_hat)
        z = along_flow(z_hat, x_hat, log_snr_s, log_snr_hat)
        change = diffusion.denoise(params, z, log_snr_s) - x_hat
        return z + alpha(log_snr_s) * weight(0.5 * (log_snr_s - log_snr_hat)) * change, memory

    return reverse(diffusion, num_steps, grid, step)
