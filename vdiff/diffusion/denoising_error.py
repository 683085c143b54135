r"""How well a trained denoiser guesses, as a function of log-SNR.

    mse(log_snr) = E |x - x_hat|^2 / dims,   z = alpha x + sigma eps,   over data and noise

This one curve decides the reverse variance of least loss (`optimal_variance`), the ELBO of every grid, and so the
best one (`elbo_optimal`). It spans many orders of magnitude and is smooth in its logarithm, where it is interpolated.

Source: Bao et al., Analytic-DPM, 2022, which estimates it once from the trained model.
"""

import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from vdiff.diffusion.forward import forward_marginal
from vdiff.diffusion.model import Diffusion
from vdiff.types import Key, Params, check_key


def denoising_error(
    diffusion: Diffusion,
    params: Params,
    key: Key,
    data: Array | np.ndarray,
    log_snrs: Float[Array, " n"] | Float[np.ndarray, " n"] | Sequence[float],
    *,
    chunk_size: int = 256,
) -> Float[Array, " n"]:
    """Measure E |x - x_hat|^2 per dimension at each log-SNR, with one draw of noise per datum and log-SNR.

    Args:
        diffusion: whose `denoise` and likelihood's `embed` are read.
        params: its parameters.
        key: a typed key; each datum's noise depends on its position, not on the chunks.
        data: [N, ...], in x's units.
        log_snrs: [n].
        chunk_size: how many data are on the device at once.

    Returns:
        [n], per dimension, in units of the embedded data, squared.

    Raises:
        ValueError: if there are no data, no log-SNR, or no room in a chunk.
    """
    log_snrs = jnp.asarray(log_snrs)
    if len(data) == 0 or log_snrs.ndim != 1 or len(log_snrs) == 0 or chunk_size < 1:
        raise ValueError(
            f"data, log_snrs, chunk_size: got {len(data)} data, shape {log_snrs.shape}, {chunk_size}, expected at "
            "least one of each, log_snrs [n]"
        )
    check_key(key)
    chunk_size = min(chunk_size, len(data))
    total = np.zeros(len(log_snrs))
    for begin in range(0, len(data), chunk_size):
        # The last chunk goes over the end; what it sees twice weighs nothing.
        positions = np.arange(begin, begin + chunk_size)
        inside = positions < len(data)
        positions = np.where(inside, positions, 0)
        sums = _chunk(diffusion, params, key, data[positions], positions, inside, log_snrs)
        total += np.asarray(sums, np.float64)
    return jnp.asarray(total / len(data), log_snrs.dtype)


@functools.partial(jax.jit, static_argnums=0)
def _chunk(
    diffusion: Diffusion,
    params: Params,
    key: Key,
    data: Array,
    positions: Array,
    inside: Array,
    log_snrs: Float[Array, " n"],
) -> Float[Array, " n"]:
    def error(x: Array, position: Array, log_snr: Array, index: Array) -> Array:
        key_eps = jax.random.fold_in(jax.random.fold_in(key, position), index)
        y = diffusion.likelihood.embed(x)
        z, _ = forward_marginal(key_eps, y, log_snr)
        squares = jnp.square(y - diffusion.denoise(params, z, log_snr))
        return jnp.sum(squares) / math.prod(diffusion.shape)

    def at(inputs: tuple[Array, Array]) -> Array:
        errors = jax.vmap(error, in_axes=(0, 0, None, None))(data, positions, *inputs)
        return jnp.sum(jnp.where(inside, errors, 0.0))

    return jax.lax.map(at, (log_snrs, jnp.arange(len(log_snrs))))


def interpolated_error(
    log_snrs: Float[Array, " n"] | Float[np.ndarray, " n"] | Sequence[float],
    errors: Float[Array, " n"] | Float[np.ndarray, " n"] | Sequence[float],
) -> Callable[[Float[Array, ""]], Float[Array, ""]]:
    """Turn measured errors into a function of log-SNR, linear between them in the logarithm, constant beyond.

    Args:
        log_snrs: [n], where they were measured, in any order; they should span the schedule.
        errors: [n], from `denoising_error`.

    Returns:
        `(log_snr []) -> []`, for `optimal_variance` and `elbo_optimal`.

    Raises:
        ValueError: if the two are not [n], log-SNRs repeat, or an error is not positive.
    """
    at, errors = np.asarray(log_snrs, np.float64), np.asarray(errors, np.float64)
    if at.ndim != 1 or at.shape != errors.shape or len(at) == 0 or len(np.unique(at)) < len(at):
        raise ValueError(
            f"log_snrs, errors: got shapes {at.shape}, {errors.shape}, expected [n] different log-SNRs and an error "
            "at each"
        )
    if not np.all((errors > 0) & np.isfinite(errors)):
        raise ValueError(
            f"errors: got {errors}, expected positive numbers; where the denoiser is perfect leave the log-SNR out"
        )
    order = np.argsort(at)
    knots, values = at[order], np.log(errors[order])

    def mse(log_snr: Array) -> Array:
        dtype = log_snr.dtype
        return jnp.exp(jnp.interp(log_snr, jnp.asarray(knots, dtype), jnp.asarray(values, dtype)))

    return mse
