r"""Grids of log-SNR for samplers: n falling numbers, from the data's end to the noise's.

    uniform_time       log_snr at n even times of the model's own schedule
    uniform_log_snr    even in log-SNR
    karras(rho)        s^(1/rho) even, s = exp(-log_snr / 2) the noise per signal
    fixed              numbers of your own, e.g. from `elbo_optimal`

All of them begin and end where the model's schedule does.

Source: Karras et al., 2022, eq. 5; Lu et al., DPM-Solver, 2022 (log-SNR).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vdiff.diffusion.ancestral import Grid
from vdiff.diffusion.model import Diffusion
from vdiff.types import Params


def uniform_time(diffusion: Diffusion, num_steps: int) -> Grid:
    """Take n even times of the model's own schedule."""
    times = jnp.linspace(0.0, 1.0, check_num_steps(num_steps))
    return lambda params: jax.vmap(diffusion.log_snr, in_axes=(None, 0))(params, times)


def check_num_steps(num_steps: int) -> int:
    """Refuse fewer than one step."""
    if num_steps < 1:
        raise ValueError(f"num_steps: got {num_steps}, expected at least 1")
    return num_steps
