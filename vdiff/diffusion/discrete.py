r"""A denoiser for discrete data: a network's logits and Bayes' rule.

    x_hat_i = sum_k value(k) softmax_k( logits_ik + log N(z_i; alpha value(k), sigma^2) )

What its own noisy value says of a pixel is known exactly and need not be learned: the network supplies what the rest of
z says, as a prior of each pixel, and the posterior mean follows. x_hat is always a mean of levels, and sharpens by
itself as the noise goes.

Source: the output of Graves et al., Bayesian Flow Networks, 2023, 4.2, with the pixel's own evidence added.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array

from vdiff.diffusion.data_likelihoods import evidence
from vdiff.types import Network, PyTree


def expected_level(logits: Network, num_levels: int) -> Network:
    """Turn a network of logits into a denoiser of levels, to be used with `predict.data` and `levels(num_levels)`.

    Args:
        logits: `Network` with apply(theta, z [*shape], log_snr, ...) -> as many numbers as z has, times num_levels,
            the levels of a channel side by side, e.g. `nets.dit(shape, out_channels=shape[-1] * num_levels)`.
        num_levels: how many values a pixel can take.

    Returns:
        A `Network` with apply(theta, z, log_snr, ...) -> x_hat [*shape].

    Raises:
        ValueError: at trace time, if there are fewer than two levels or the logits have another size.
    """

    def apply(theta: PyTree, z: Array, log_snr: Array, *condition: Array) -> Array:
        out = logits.apply(theta, z, log_snr, *condition)
        if out.size != z.size * num_levels:
            raise ValueError(
                f"logits: got output of shape {out.shape}, expected {num_levels} numbers for each of z's "
                f"{z.size}; give the network {z.shape[-1] * num_levels} output channels"
            )
        log_weights, values = evidence(z, log_snr, num_levels)
        weights = jax.nn.softmax(out.reshape(log_weights.shape) + log_weights)
        return jnp.sum(weights * values, axis=-1)

    return Network(logits.init, apply)
