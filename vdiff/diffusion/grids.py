r"""Where a sampler's latents lie: grids of log-SNR, falling from the data's end to the noise's.

    uniform_time       L(0), L(1/(n-1)), .. L(1)                       L the model's own schedule
    uniform_log_snr    even in log_snr
    karras(rho)        even in s^(1/rho),  s = exp(-log_snr / 2) = sigma / alpha
    fixed(log_snrs)    given, e.g. by `elbo_optimal`

A grid is a function `(diffusion, params, n) -> [n]`. The first three share the schedule's two ends.

Source: Lu et al., DPM-Solver, 2022 (log-SNR); Karras et al., 2022, eq. 5.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from vdiff.diffusion.model import Diffusion
from vdiff.types import Params

Grid = Callable[[Diffusion, Params, int], Float[Array, " n"]]


def uniform_time(diffusion: Diffusion, params: Params, num_steps: int) -> Float[Array, " n"]:
    """Place latents at even times of the model's own schedule: a `Grid`."""
    times = jnp.linspace(0.0, 1.0, num_steps)
    return jax.vmap(diffusion.log_snr, in_axes=(None, 0))(params, times)


def uniform_log_snr(diffusion: Diffusion, params: Params, num_steps: int) -> Float[Array, " n"]:
    """Place latents at even log-SNRs between the schedule's ends: a `Grid`."""
    return jnp.linspace(*_ends(diffusion, params), num_steps)


def karras(rho: float = 7.0) -> Grid:
    """Build the grid that is even in s^(1/rho), s = sigma / alpha, between the schedule's ends.

    rho = 1 is even in s; as rho grows it nears `uniform_log_snr`.

    Args:
        rho: positive.

    Returns:
        A `Grid`.

    Raises:
        ValueError: if `rho` is not positive.

    Source: Karras et al., Elucidating the Design Space of Diffusion-Based Generative Models, 2022, eq. 5.
    """
    if not rho > 0:
        raise ValueError(f"rho: got {rho}, expected a positive number, e.g. 7.0")

    def grid(diffusion: Diffusion, params: Params, num_steps: int) -> Float[Array, " n"]:
        first, last = _ends(diffusion, params)
        low, high = jnp.exp(-0.5 / rho * first), jnp.exp(-0.5 / rho * last)
        log_snrs = -2.0 * rho * jnp.log(jnp.linspace(low, high, num_steps))
        # There and back rounds: the ends are put where they belong.
        return log_snrs.at[-1].set(last).at[0].set(first)

    return grid


def fixed(log_snrs: Float[Array, " n"] | Float[np.ndarray, " n"] | Sequence[float]) -> Grid:
    """Build the grid that is these log-SNRs.

    Args:
        log_snrs: [n], falling.

    Returns:
        A `Grid`, for samplers of n steps only.

    Raises:
        ValueError: if they do not fall; at trace time, if a sampler has another number of steps.
    """
    numbers = np.asarray(log_snrs, np.float64)
    if numbers.ndim != 1 or len(numbers) == 0 or not np.all(np.isfinite(numbers)):
        raise ValueError(f"log_snrs: got shape {numbers.shape}, expected [n] finite numbers")
    if not np.all(np.diff(numbers) < 0):
        raise ValueError(
            f"log_snrs: got {numbers}, expected a fall, from the data's end; reverse or sort them"
        )

    def grid(diffusion: Diffusion, params: Params, num_steps: int) -> Float[Array, " n"]:
        if num_steps != len(numbers):
            raise ValueError(
                f"num_steps: got {num_steps} with a grid of {len(numbers)} log-SNRs, expected as many; "
                f"give the sampler num_steps={len(numbers)}"
            )
        return jnp.asarray(numbers, jnp.result_type(float))

    return grid


def _ends(diffusion: Diffusion, params: Params) -> tuple[Array, Array]:
    return diffusion.log_snr(params, jnp.zeros(())), diffusion.log_snr(params, jnp.ones(()))
