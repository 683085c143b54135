r"""Whether importance weights can be trusted: the shape of their tail, k-hat.

Far out, weights have a generalized Pareto tail, p(w > c + y) ~ (1 + k y / sigma)^{-1/k}, of which the moments below the
1/k-th are finite. Of K log-weights the M = min(K / 5, 3 sqrt(K)) largest are fitted, by their exceedances
y_1 <= ... <= y_M of the next one. With b = -k / sigma,

    k(b) = 1/M sum_i log(1 - b y_i)                                   the likelihood's maximum over k at a given b
    l(b) = M (log(-b / k(b)) - k(b) - 1)                              its logarithm there
    b_j  = 1/y_M + (1 - sqrt(m / (j - 1/2))) / (3 y_{M/4}),           j = 1..m,   m = 30 + sqrt(M)
    b    = sum_j b_j softmax(l(b))_j,     k-hat = (M k(b) + 10 / 2) / (M + 10)

A k-hat above 0.7 says that more draws help little and that a standard error is not one: find a better q, or anneal.

Source: Vehtari, Simpson, Gelman, Yao and Gabry, Pareto Smoothed Importance Sampling, 2024; Zhang and Stephens, A New
and Efficient Estimation Method for the Generalized Pareto Distribution, 2009.
"""

import math

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient
from jaxtyping import Array, Float

FEWEST_DRAWS = 25
"""With fewer there are not the five exceedances that a tail takes."""
_LEAST = -80.0  # log-weights this far under the largest are zero, in float32


def tail_size(num_samples: int) -> int:
    """Count the largest of K weights that k-hat looks at: M = floor(min(K / 5, 3 sqrt(K)))."""
    return math.floor(min(num_samples / 5, 3 * math.sqrt(num_samples)))


def k_hat(log_weights: Float[Array, " K"]) -> Float[Array, ""]:
    """Estimate the shape of the tail of importance weights.

    Below 0.5 the weights' variance is finite and their mean behaves as usual; up to 0.7 its error still falls with K
    much as it should; above, the estimate and its standard error are not to be trusted; from 1 on there is no mean.

    Args:
        log_weights: [K], nats; independent draws.

    Returns:
        [], without a gradient; NaN with fewer than 25 draws; infinite where fewer than five weights stand out, since
        the rest is zero next to them; minus infinity where the M + 1 largest are equal.

    Source: see this module.
    """
    num_tail = tail_size(len(log_weights))
    return tail_shape(jax.lax.top_k(stop_gradient(log_weights), num_tail + 1)[0], len(log_weights))


def tail_shape(largest: Float[Array, " L"], num_samples: int) -> Float[Array, ""]:
    """Compute k-hat from the M + 1 largest of K log-weights, M = tail_size(K), the largest first."""
    top = largest[0]
    if num_samples < FEWEST_DRAWS:
        return jnp.full_like(top, jnp.nan)
    top, tail = stop_gradient(top), stop_gradient(largest[:-1])
    cutoff = jnp.maximum(stop_gradient(largest[-1]), top + _LEAST)
    exceeds = tail > cutoff  # not those equal to it, which a discrete latent has
    count = jnp.sum(exceeds)
    # exp(tail) - exp(cutoff), over its largest value, without overflow and without cancellation.
    y = jnp.exp(tail - top) * jnp.expm1(cutoff - tail) / jnp.expm1(cutoff - top)
    k = _fitted_shape(jnp.where(exceeds, y, 0.0), exceeds, count)
    k = jnp.where(count < 5, jnp.inf, k)
    k = jnp.where(top == largest[-1], -jnp.inf, k)
    return jnp.where(jnp.isneginf(top), jnp.inf, jnp.where(jnp.isnan(top), jnp.nan, k))


def _fitted_shape(y: Float[Array, " M"], is_in: Array, count: Array) -> Float[Array, ""]:
    """Fit k to exceedances in descending order, the first `count` of them, scaled to y[0] = 1."""
    num_grid = 30 + math.isqrt(len(y))
    n = count.astype(y.dtype)
    m = 30.0 + jnp.floor(jnp.sqrt(n))
    j = jnp.arange(1, num_grid + 1, dtype=y.dtype)
    quartile = y[count - (count + 2) // 4]
    b = 1.0 + (1.0 - jnp.sqrt(m / (j - 0.5))) / (3.0 * quartile)

    def shape_at(b: Array) -> Array:
        return jnp.sum(jnp.where(is_in, jnp.log1p(-b * y), 0.0)) / n

    k = jax.lax.map(shape_at, b)  # one b at a time: held are M numbers
    # As b goes to zero, -b / k does to one over the mean.
    ratio = jnp.where(k == 0, n / jnp.sum(y), -b / jnp.where(k == 0, 1.0, k))
    log_likelihood = jnp.where(j <= m, n * (jnp.log(ratio) - k - 1.0), -jnp.inf)
    mean_b = jnp.sum(jax.nn.softmax(log_likelihood) * b)
    return (n * shape_at(mean_b) + 5.0) / (n + 10.0)
