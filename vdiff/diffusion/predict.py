r"""What a denoiser's output means: the noise, the data or the velocity; any of them gives the other two.

    z = alpha x + sigma eps,    v = alpha eps - sigma x
    x = (z - sigma eps) / alpha = alpha z - sigma v,      eps = (z - alpha x) / sigma = sigma z + alpha v

The error of the implied noise, eps_hat - eps, is what the ELBO weighs. It is `gain` times the error of the output
itself, and is computed so: no difference of two large numbers at either end of time.

Source: Ho, Jain and Abbeel, 2020 (noise); Salimans and Ho, Progressive Distillation, 2022 (velocity); Karras et al.,
Elucidating the Design Space of Diffusion-Based Generative Models, 2022, table 1 (preconditioning).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array

from vdiff.diffusion.forward import alpha, sigma


class Prediction(NamedTuple):
    """Hold how a denoiser's output is read; all for one datum.

    Attributes:
        data: `(z, log_snr, out) -> x_hat`.
        noise: `(z, log_snr, out) -> eps_hat`.
        target: `(x, eps, log_snr) -> the output of a denoiser that knows`.
        gain: `(log_snr) -> []`, with eps_hat - eps = gain (out - target).
    """

    data: Callable[[Array, Array, Array], Array]
    noise: Callable[[Array, Array, Array], Array]
    target: Callable[[Array, Array, Array], Array]
    gain: Callable[[Array], Array]


noise = Prediction(
    data=lambda z, log_snr, out: (z - sigma(log_snr) * out) / alpha(log_snr),
    noise=lambda z, log_snr, out: out,
    target=lambda x, eps, log_snr: eps,
    gain=lambda log_snr: jnp.ones_like(log_snr),
)
"""The output is the noise in z. The guess of x is ill-conditioned where there is nearly no signal."""

data = Prediction(
    data=lambda z, log_snr, out: out,
    noise=lambda z, log_snr, out: (z - alpha(log_snr) * out) / sigma(log_snr),
    target=lambda x, eps, log_snr: x,
    gain=lambda log_snr: -jnp.exp(0.5 * log_snr),
)
"""The output is the datum. The guess of the noise is ill-conditioned where there is nearly no noise."""

velocity = Prediction(
    data=lambda z, log_snr, out: alpha(log_snr) * z - sigma(log_snr) * out,
    noise=lambda z, log_snr, out: sigma(log_snr) * z + alpha(log_snr) * out,
    target=lambda x, eps, log_snr: alpha(log_snr) * eps - sigma(log_snr) * x,
    gain=lambda log_snr: alpha(log_snr),
)
"""The output is the velocity alpha eps - sigma x: well-conditioned at both ends."""


def preconditioned(data_scale: float) -> Prediction:
    """Build the prediction of what is left of x when the best linear guess is taken off, in its own scale.

        x_hat = skip z + spread out,   skip = s^2 alpha / v,   spread = s sigma / sqrt(v),   v = s^2 alpha^2 + sigma^2

    with s the data's standard deviation. An output of zero is then the best linear denoiser of white data, and
    the target has variance one at every log-SNR. With s = 1 it is minus the velocity.

    Args:
        data_scale: s, positive: the standard deviation of an embedded pixel.

    Returns:
        A `Prediction`.

    Raises:
        ValueError: if `data_scale` is not positive.

    Source: Karras et al., 2022, table 1, written for variance-preserving z.
    """
    if not data_scale > 0:
        raise ValueError(f"data_scale: got {data_scale}, expected a positive standard deviation")

    def root(log_snr: Array) -> Array:
        return jnp.sqrt(jnp.square(data_scale * alpha(log_snr)) + jnp.square(sigma(log_snr)))

    def guess(z: Array, log_snr: Array, out: Array) -> Array:
        v = root(log_snr)
        return data_scale / v * (data_scale * alpha(log_snr) / v * z + sigma(log_snr) * out)

    def implied_noise(z: Array, log_snr: Array, out: Array) -> Array:
        v = root(log_snr)
        return sigma(log_snr) / jnp.square(v) * z - data_scale * alpha(log_snr) / v * out

    def target(x: Array, eps: Array, log_snr: Array) -> Array:
        # (x - skip z) / spread with z = alpha x + sigma eps put in, so that nothing cancels.
        s = data_scale
        return (sigma(log_snr) / s * x - s * alpha(log_snr) * eps) / root(log_snr)

    return Prediction(
        guess, implied_noise, target, lambda log_snr: -data_scale * alpha(log_snr) / root(log_snr)
    )
