r"""The grid of log-SNRs whose ELBO is best, by dynamic programming.

The diffusion term of a chain through falling log-SNRs is, per dimension and up to its sign, a sum over steps

    loss(s, t) = 1/2 ( v/eta - 1 - log(v/eta) ) + (alpha_s c)^2 mse(log_snr_t) / (2 eta)

with v = sigma_s^2 c the posterior's variance, c = 1 - SNR_t / SNR_s, mse the denoiser's error per dimension. Each
step's loss depends on nothing but its two ends, so the least sum over n latents is that of a shortest path,

    V_1(s_1) = 0,    V_{k+1}(t) = min_s  V_k(s) + loss(s, t)

found exactly over all choices from a fine grid. As the steps get small the sum falls to 1/2 int SNR mse d log_snr,
whatever the grid; what a grid loses beyond that is its bound gap. For eta = v the loss is (SNR_s - SNR_t) mse / 2,
for the optimal variance 1/2 log(1 + (SNR_s - SNR_t) mse): the second needs far fewer steps.

It is the best grid for the ELBO, and so for `ancestral` with that reverse variance. A solver of the flow has another
error.

Source: Watson et al., Learning to Efficiently Sample from Diffusion Probabilistic Models, 2021.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

Error = Callable[[Float[Array, ""]], Float[Array, ""]]
Variance = Callable[[Float[Array, ""], Float[Array, ""]], Float[Array, ""]]


def elbo_optimal(
    mse: Error,
    reverse_variance: Variance,
    log_snr_max: float,
    log_snr_min: float,
    num_steps: int,
    *,
    resolution: int = 401,
) -> Float[np.ndarray, " n"]:
    """Find the grid of least diffusion loss, both ends held; on the host.

        eta = optimal_variance(mse)
        log_snrs = elbo_optimal(mse, functools.partial(eta.apply, ()), 13.3, -5.0, 20)
        diffusion._replace(sample=ancestral(diffusion, 20, grid=fixed(log_snrs)))

    Args:
        mse: `(log_snr []) -> []`, the denoiser's error per dimension, from `interpolated_error` or a closed form.
        reverse_variance: `(log_snr_s, log_snr_t) -> eta`, e.g. `functools.partial(diffusion.reverse_variance, params)`.
        log_snr_max: of z_1.
        log_snr_min: of z_m.
        num_steps: n, latents.
        resolution: how many even log-SNRs are there to choose from, the ends among them.

    Returns:
        [n], falling, for `fixed`.

    Raises:
        ValueError: if the ends do not fall, or `num_steps` is not between 2 and `resolution`.
    """
    if not log_snr_min < log_snr_max:
        raise ValueError(
            f"log_snr_max, log_snr_min: got {log_snr_max}, {log_snr_min}, expected a fall; exchange them"
        )
    if not 2 <= num_steps <= resolution:
        raise ValueError(
            f"num_steps: got {num_steps} with resolution={resolution}, expected 2 to {resolution}; raise resolution"
        )
    fine = np.linspace(log_snr_max, log_snr_min, resolution).astype(np.float32)
    loss = np.full((resolution, resolution), np.inf)
    s, t = np.triu_indices(resolution, 1)
    loss[s, t] = _losses(mse, reverse_variance, fine[s], fine[t])

    value = np.where(np.arange(resolution) == 0, 0.0, np.inf)
    came_from = []
    for _ in range(num_steps - 1):
        through = value[:, None] + loss
        came_from.append(through.argmin(axis=0))
        value = through.min(axis=0)
    indices = [resolution - 1]
    for before in reversed(came_from):
        indices.append(int(before[indices[-1]]))
    return fine[indices[::-1]].astype(np.float64)


def path_loss(
    mse: Error,
    reverse_variance: Variance,
    log_snrs: Float[Array, " n"] | Float[np.ndarray, " n"] | Sequence[float],
) -> float:
    """Sum the diffusion loss of a grid: what `elbo_optimal` makes least, nats per dimension.

    Averaged over data, minus this times the dimensions is the term "diffusion" of the ELBO of a chain through these
    log-SNRs with this reverse variance.

    Args:
        mse: see `elbo_optimal`.
        reverse_variance: see `elbo_optimal`.
        log_snrs: [n], falling.

    Returns:
        Nats per dimension, positive.

    Raises:
        ValueError: if they do not fall.
    """
    grid = np.asarray(log_snrs, np.float32)
    if grid.ndim != 1 or len(grid) == 0 or not np.all(np.diff(grid) < 0):
        raise ValueError(f"log_snrs: got {grid}, expected [n] falling log-SNRs")
    return float(np.sum(_losses(mse, reverse_variance, grid[:-1], grid[1:])))


def bound_gap(
    mse: Error,
    reverse_variance: Variance,
    log_snrs: Float[Array, " n"] | Float[np.ndarray, " n"] | Sequence[float],
    *,
    resolution: int = 20_001,
) -> float:
    """Tell how much of the ELBO a grid loses against continuous time between the same ends.

        sum_i loss(s_i, t_i) - 1/2 int SNR mse d log_snr

    Args:
        mse: see `elbo_optimal`.
        reverse_variance: see `elbo_optimal`.
        log_snrs: [n], falling.
        resolution: points of the trapezoidal rule for the integral.

    Returns:
        Nats per dimension.

    Raises:
        ValueError: if the log-SNRs do not fall.
    """
    loss = path_loss(mse, reverse_variance, log_snrs)
    fine = np.linspace(float(log_snrs[-1]), float(log_snrs[0]), resolution)
    rate = np.exp(fine) * _on_host(mse, fine)
    return loss - 0.5 * float(np.trapezoid(rate, fine))


def _losses(mse: Error, reverse_variance: Variance, s: np.ndarray, t: np.ndarray) -> np.ndarray:
    """Return the loss of each step, in float64 but for what the two functions return."""
    eta = _on_host(reverse_variance, s, t)
    s, t, error = s.astype(np.float64), t.astype(np.float64), _on_host(mse, t)
    kept = -np.expm1(t - s)
    # sigma^2 and alpha^2 of s
    ratio = np.exp(-np.logaddexp(0.0, s)) * kept / eta
    of_means = np.exp(-np.logaddexp(0.0, -s)) * np.square(kept) * error / eta
    return 0.5 * (ratio - 1.0 - np.log(ratio) + of_means)


def _on_host(function: Callable[..., Array], *args: np.ndarray) -> np.ndarray:
    arrays = (jnp.asarray(arg, jnp.result_type(float)) for arg in args)
    return np.asarray(jax.vmap(function)(*arrays), np.float64)
