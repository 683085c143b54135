r"""Sampling by DPM-Solver++: multistep methods of high order in half the log-SNR.

With u = log_snr / 2 the flow (a = 1) and the diffusion (a = 2) from t to s are exactly

    z_s = e^{-(a-1) h} (sigma_s / sigma_t) z_t + alpha_s int_0^h a e^{-a (h - u)} x_hat(u) du + sigma_s sqrt(c) eps

with h = u_s - u_t, c = 1 - e^{-2 h}, and eps = 0 for the flow. x_hat(u) is replaced by the polynomial through its
values at z_t and at the one or two latents before, at distances h1 and h2; with d0, d1, d2 its divided differences,

    order 2:  m0 (d0 + h/2 d1)                              the integral at the middle of the step
    order 3:  m0 d0 + m1 d1 + (m2 + h1 m1) d2               the integral exactly

    m0 = 1 - e^{-a h},  m1 = h - m0 / a,  m2 = h^2 - 2 m1 / a

The first step knows no past and is of order one, the second of order two at most. The draw of x is in effect a step
of order one to where there is no noise; in less than 15 steps the last step before it is of order one too, and that
before of order two at most, as the authors advise.

Source: Lu et al., DPM-Solver++: Fast Solver for Guided Sampling of Diffusion Probabilistic Models, 2022.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.nn import log_sigmoid
from jaxtyping import Array

from vdiff.diffusion.forward import alpha, sigma
from vdiff.diffusion.grids import Grid, uniform_log_snr
from vdiff.diffusion.model import Diffusion
from vdiff.diffusion.reverse import Sampler, reverse
from vdiff.types import Key, Params, PyTree

Past = tuple[Array, Array, Array]
FEW = 15


def dpm_solver(
    diffusion: Diffusion, num_steps: int, *, order: int = 2, grid: Grid = uniform_log_snr
) -> Sampler:
    """Sample along the probability flow by DPM-Solver++ (1, 2M, 3M): n latents, n calls of the denoiser.

    Deterministic but for z_m and the draw of x; with order 1 it is `ddim`.

    Args:
        diffusion: what to sample; its own reverse variance is not read.
        num_steps: n; one call at each latent, that at z_1 for the draw of x.
        order: 1, 2 or 3.
        grid: where the latents lie.

    Returns:
        `(key, params) -> (x, z)`, z the path [n, *shape] from the data's end.

    Raises:
        ValueError: if `num_steps` is less than one, or `order` is not 1, 2 or 3.

    Source: Lu et al., 2022, algorithm 2.
    """
    if order not in (1, 2, 3):
        raise ValueError(f"order: got {order}, expected 1, 2 or 3")

    def step(
        key: Key, params: Params, z: Array, past: Past, log_snr_s: Array, log_snr_t: Array
    ) -> tuple[Array, Past]:
        x_hat = diffusion.denoise(params, z, log_snr_t)
        return _mean(z, x_hat, past, log_snr_s, log_snr_t, 1.0), _remember(past, x_hat, log_snr_t)

    return reverse(diffusion, num_steps, grid, step, _without_past(order, num_steps))


def dpm_solver_sde(
    diffusion: Diffusion, num_steps: int, *, order: int = 2, grid: Grid = uniform_log_snr
) -> Sampler:
    """Sample the diffusion by SDE-DPM-Solver++ (1, 2M): n latents, n calls of the denoiser.

    Fresh noise at every step, as much as the posterior's variance; with order 1 it is `ancestral` with that variance.

    Args:
        diffusion: what to sample; its own reverse variance is not read.
        num_steps: n; one call at each latent, that at z_1 for the draw of x.
        order: 1 or 2.
        grid: where the latents lie.

    Returns:
        `(key, params) -> (x, z)`, z the path [n, *shape] from the data's end.

    Raises:
        ValueError: if `num_steps` is less than one, or `order` is not 1 or 2.

    Source: Lu et al., 2022, section 5.
    """
    if order not in (1, 2):
        raise ValueError(f"order: got {order}, expected 1 or 2; order 3 is for dpm_solver")

    def step(
        key: Key, params: Params, z: Array, past: Past, log_snr_s: Array, log_snr_t: Array
    ) -> tuple[Array, Past]:
        x_hat = diffusion.denoise(params, z, log_snr_t)
        scale = sigma(log_snr_s) * jnp.sqrt(-jnp.expm1(log_snr_t - log_snr_s))
        fresh = scale * jax.random.normal(key, z.shape)
        return _mean(z, x_hat, past, log_snr_s, log_snr_t, 2.0) + fresh, _remember(past, x_hat, log_snr_t)

    return reverse(diffusion, num_steps, grid, step, _without_past(order, num_steps))


def _without_past(
    order: int, num_steps: int
) -> Callable[[Key, tuple[int, ...], Array], tuple[Array, PyTree]]:
    """Start from noise; a guess that does not exist has a log-SNR of minus infinity.

    The past is the last guesses, their log-SNRs, and which order may still be used.
    """

    def start(key: Key, shape: tuple[int, ...], log_snr: Array) -> tuple[Array, Past]:
        z = jax.random.normal(key, shape)
        x_hats, log_snrs = jnp.zeros((order - 1, *shape), z.dtype), jnp.full(order - 1, -jnp.inf, z.dtype)
        return z, (x_hats, log_snrs, jnp.asarray(num_steps - 1 if num_steps <= FEW else 2 * num_steps))

    return start


def _remember(past: Past, x_hat: Array, log_snr: Array) -> Past:
    x_hats, log_snrs, allowed = past
    x_hats, log_snrs = (
        jnp.concatenate([new[None], old])[: len(old)] for new, old in ((x_hat, x_hats), (log_snr, log_snrs))
    )
    return x_hats, log_snrs, allowed - 1


def _mean(z: Array, x_hat: Array, past: Past, log_snr_s: Array, log_snr_t: Array, a: float) -> Array:
    """Return z_s without its fresh noise."""
    h = 0.5 * (log_snr_s - log_snr_t)
    kept = jnp.exp(0.5 * (log_sigmoid(-log_snr_s) - log_sigmoid(-log_snr_t)) - (a - 1.0) * h)
    return kept * z + alpha(log_snr_s) * _integral(x_hat, past, log_snr_t, h, a)


def _integral(x_hat: Array, past: Past, log_snr: Array, h: Array, a: float) -> Array:
    x_hats, log_snrs, allowed = past
    m0 = -jnp.expm1(-a * h)
    if len(x_hats) == 0:
        return m0 * x_hat
    known = jnp.isfinite(log_snrs)
    # What is not known may be at any distance, so long as nothing is divided by zero.
    distance = jnp.where(known, 0.5 * (log_snr - log_snrs), 1.0 + jnp.arange(len(x_hats), dtype=h.dtype))
    d1 = (x_hat - x_hats[0]) / distance[0]
    second = m0 * (x_hat + jnp.where(known[0] & (allowed > 1), 0.5 * h * d1, 0.0))
    if len(x_hats) == 1:
        return second
    m1 = h - m0 / a
    m2 = jnp.square(h) - 2.0 * m1 / a
    d2 = (d1 - (x_hats[0] - x_hats[1]) / (distance[1] - distance[0])) / distance[1]
    third = m0 * x_hat + m1 * d1 + (m2 + distance[0] * m1) * d2
    return jnp.where(known[1] & (allowed > 2), third, second)
