r"""Bounds on log p(x): functions of K log-weights l_k = log p(x, z_k) - log q(z_k | x), z_k ~ q.

    elbo        1/K sum_k l_k                                          tight at the posterior (12.2.3)
    iwae        log 1/K sum_k exp(l_k)                                 tighter with K
    renyi(a)    1/(1-a) log 1/K sum_k exp((1-a) l_k)                   elbo at a = 1, iwae at a = 0
    tvo(b)      sum_j (b_{j+1} - b_j) sum_k softmax(b_j l)_k l_k       elbo at (0, 1), iwae as b is refined

A bound knows no model, and an estimator knows no bound: every pair of them works. Nats per datum.
"""

import itertools
import math
from collections.abc import Callable, Iterable

import chex
import jax
import jax.numpy as jnp
from jax.lax import stop_gradient
from jax.scipy.special import logsumexp
from jaxtyping import Array, Float

Bound = Callable[[Float[Array, " K"]], Float[Array, ""]]


def elbo(log_weights: Float[Array, " K"]) -> Float[Array, ""]:
    """Average K log-weights: the evidence lower bound.

    Args:
        log_weights: [K], nats.

    Returns:
        1/K sum_k l_k, nats; in expectation at most log p(x).

    Source: lecture 12.2.3.
    """
    chex.assert_rank(log_weights, 1)
    return jnp.mean(log_weights)


def iwae(log_weights: Float[Array, " K"]) -> Float[Array, ""]:
    """Take the log of the average of K weights: the importance-weighted bound.

    Args:
        log_weights: [K], nats.

    Returns:
        log 1/K sum_k exp(l_k), nats; in expectation between the ELBO and log p(x), rising with K.

    Source: Burda, Grosse and Salakhutdinov, Importance Weighted Autoencoders, 2016, eq. 8.
    """
    chex.assert_rank(log_weights, 1)
    return logsumexp(log_weights) - math.log(log_weights.shape[0])


def renyi(alpha: float) -> Bound:
    """Build the variational Renyi bound of order alpha.

        1/(1-alpha) log 1/K sum_k exp((1-alpha) l_k)

    The limits are exact: alpha = 1 is `elbo`, alpha = 0 is `iwae`. Near alpha = 1 the logarithm above is
    a small difference divided by a small number; there it is computed about the mean m of the l_k as
    m + log1p(mean(expm1((1-alpha)(l - m)))) / (1-alpha).

    Args:
        alpha: the order, any finite number; negative orders lie above `iwae`.

    Returns:
        A bound `(log_weights [K]) -> []`, nats.

    Raises:
        ValueError: if alpha is not finite.

    Source: Li and Turner, Renyi Divergence Variational Inference, 2016, eq. 10.
    """
    if not math.isfinite(alpha):
        raise ValueError(f"alpha: got {alpha}, expected a finite number")
    if alpha == 1.0:
        return elbo
    order = 1.0 - alpha

    def bound(log_weights: Float[Array, " K"]) -> Float[Array, ""]:
        chex.assert_rank(log_weights, 1)
        mean = jnp.mean(log_weights)
        spread = order * (log_weights - mean)
        is_small = jnp.max(jnp.abs(spread)) < 1.0  # False for the NaN of a weight of zero
        near = mean + jnp.log1p(jnp.mean(jnp.expm1(jnp.where(is_small, spread, 0.0)))) / order
        # Shifted before it is scaled: a compiler that fuses the two rounds order * l and its maximum differently.
        top = stop_gradient(jnp.max(log_weights) if order > 0 else jnp.min(log_weights))
        top = jnp.where(jnp.isfinite(top), top, 0.0)
        far = top + (logsumexp(order * (log_weights - top)) - math.log(log_weights.shape[0])) / order
        return jnp.where(is_small, near, far)

    bound.__name__ = "renyi"
    return bound


def tvo(partition: Iterable[float]) -> Bound:
    """Build the thermodynamic bound: a left Riemann sum along the path from q to the posterior.

        log p(x) = int_0^1 E_b[l] db,      E_b[l] = sum_k softmax(b l)_k l_k on the draws at hand

    Since E_b[l] rises with b, the sum at the left ends lies below the integral, which on K draws is `iwae`:
    elbo <= tvo <= iwae, more with each point of the partition.

    Args:
        partition: b_0 = 0 < b_1 < .. < b_J = 1.

    Returns:
        A bound `(log_weights [K]) -> []`, nats.

    Raises:
        ValueError: if the partition does not rise from 0 to 1.

    Source: Masrani, Le and Wood, The Thermodynamic Variational Objective, 2019, eq. 9.
    """
    points = [float(point) for point in partition]
    steps = [right - left for left, right in itertools.pairwise(points)]
    if len(points) < 2 or points[0] != 0.0 or points[-1] != 1.0 or not min(steps) > 0.0:
        raise ValueError(f"partition: got {points}, expected numbers rising from 0 to 1, e.g. (0, 0.1, 1)")

    def bound(log_weights: Float[Array, " K"]) -> Float[Array, ""]:
        chex.assert_rank(log_weights, 1)
        # Weights and means of what lies below the top: the gradient is a covariance, whose terms would cancel.
        top = stop_gradient(jnp.max(log_weights))
        below = log_weights - top

        def mean_at(inverse_temperature: float) -> Float[Array, ""]:
            if inverse_temperature == 0.0:
                return jnp.mean(below)
            weights = jax.nn.softmax(inverse_temperature * below)
            return jnp.sum(weights * jnp.where(weights > 0, below, 0.0))

        return top + sum(step * mean_at(point) for step, point in zip(steps, points, strict=False))

    bound.__name__ = "tvo"
    return bound
