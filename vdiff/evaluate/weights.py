r"""K importance weights, taken in chunk by chunk, and what they say of log p(x).

    value = log 1/K sum_k w_k,    ess = (sum w)^2 / sum w^2,    std_error = sqrt((1 / ess - 1 / K) K / (K - 1))

Held are the sums, relative to the largest weight so far, and the few largest log-weights, of which k-hat is made.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vdiff.evaluate.psis import tail_shape, tail_size
from vdiff.types import LogProb


class Weights(NamedTuple):
    """Hold what is kept of the log-weights so far.

    Attributes:
        largest: [tail_size(K) + 1], the largest log-weights, the largest first.
        first: the sum of the weights, over the largest of them.
        second: the sum of their squares, over the square of the largest.
    """

    largest: Float[Array, " L"]
    first: Float[Array, ""]
    second: Float[Array, ""]


def no_weights(num_samples: int) -> Weights:
    """Begin with none of `num_samples` weights."""
    zero = jnp.zeros(())
    return Weights(jnp.full((tail_size(num_samples) + 1,), -jnp.inf), zero, zero)


def add_weights(weights: Weights, log_weights: Float[Array, " C"]) -> Weights:
    """Take in a chunk of log-weights; one of -inf is a weight of zero."""
    joined = jnp.concatenate([weights.largest, log_weights])
    largest = jax.lax.top_k(joined, len(weights.largest))[0]
    top = jnp.maximum(weights.largest[0], jnp.max(log_weights))
    # Where every weight so far is zero, top is -inf and differences to it are undefined.
    shift = jnp.where(jnp.isneginf(top), 0.0, top)
    old, w = jnp.exp(weights.largest[0] - shift), jnp.exp(log_weights - shift)
    first = weights.first * old + jnp.sum(w)
    return Weights(largest, first, weights.second * jnp.square(old) + jnp.sum(jnp.square(w)))


def log_prob_of(weights: Weights, num_samples: int) -> LogProb:
    """Estimate the logarithm of the mean of all `num_samples` weights, and how far to trust it, nats."""
    value = weights.largest[0] + jnp.log(weights.first) - jnp.log(float(num_samples))
    inverse_ess = weights.second / jnp.square(weights.first)
    spread = jnp.maximum(inverse_ess - 1.0 / num_samples, 0.0)
    if num_samples == 1:
        std_error = jnp.full_like(value, jnp.inf)
    else:
        std_error = jnp.sqrt(spread * (num_samples / (num_samples - 1)))
    return LogProb(value, std_error, 1.0 / inverse_ess, tail_shape(weights.largest, num_samples))
