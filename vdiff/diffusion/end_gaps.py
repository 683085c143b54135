r"""What the two ends of a schedule cost a flow's likelihood, in closed form for Gaussian data.

    y ~ N(m, diag v),   n = sigma_0^2 / alpha_0^2 = exp(-log_snr(0)),   w = alpha_1^2 v + sigma_1^2

    start    KL( N(m, v) || N(m, v + n) )       the flow's density is that of data blurred by n
    end      E[ log N(z_1; alpha_1 m, w) - log N(z_1; 0, 1) ]
             = 1/2 ( alpha_1^2 m^2 + (w - 1) v / (v + n) - log w ),   as n -> 0 KL( N(alpha_1 m, w) || N(0, 1) )

summed over dimensions, z_1 being where the flow takes y. With the denoiser of these data, at every schedule,

    E log p(y) - E ode_log_prob(y) = start + end
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from vdiff.diffusion.forward import alpha
from vdiff.diffusion.model import Diffusion
from vdiff.types import Params


class EndGaps(NamedTuple):
    """Hold the nats per datum that a flow's log-density lacks on average, at either end.

    Attributes:
        start: at t = 0, by leaving the noise of z_0 out.
        end: at t = 1, by taking N(0, I) for the law of z_1.
    """

    start: Float[Array, ""]
    end: Float[Array, ""]


def end_gaps(diffusion: Diffusion, mean: Array, variance: Array) -> Callable[[Params], EndGaps]:
    """Compute what the schedule's two ends cost on average, for data N(mean, diag variance).

    For other data with these moments the end's first term, |alpha_1 mean|^2 / 2, is still right and the rest is of
    second order in SNR_1. The start's is for a density that is smooth on the scale of sqrt(n): data on levels have no
    density, and there the dequantising noise decides.

    Args:
        diffusion: whose log-SNRs at t = 0 and t = 1 are read.
        mean: [*shape], of an embedded datum.
        variance: [*shape], positive, of each dimension.

    Returns:
        `(params) -> EndGaps`, nats per datum.

    Raises:
        ValueError: if mean or variance has another shape than the model.
    """
    if mean.shape != diffusion.shape or variance.shape != diffusion.shape:
        raise ValueError(
            f"mean, variance: got shapes {mean.shape} and {variance.shape}, expected {diffusion.shape}; take them over "
            "embedded data, dimension by dimension"
        )

    def gaps(params: Params) -> EndGaps:
        first = diffusion.log_snr(params, jnp.zeros((), mean.dtype))
        signal = alpha(diffusion.log_snr(params, jnp.ones((), mean.dtype)))
        blur = jnp.exp(-first) / (variance + jnp.exp(-first))
        spread = jnp.square(signal) * (variance - 1.0)
        start = _excess(-blur)
        end = jnp.square(signal * mean) + _excess(spread) - blur * spread
        return EndGaps(0.5 * jnp.sum(start), 0.5 * jnp.sum(end))

    return gaps


def _excess(delta: Array) -> Array:
    """Return delta - log(1 + delta), without the cancellation near zero."""
    series = jnp.square(delta) * (0.5 - delta * (1.0 / 3.0 - delta * (0.25 - delta * (0.2 - delta / 6.0))))
    return jnp.where(jnp.abs(delta) < 0.03, series, delta - jnp.log1p(delta))
