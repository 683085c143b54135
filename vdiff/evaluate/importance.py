r"""The log-likelihood by importance sampling, and how far to trust it.

    log p(x) ~ log 1/K sum_k w_k,   w_k = p(x, z_k) / q(z_k | x),   z_k ~ q     (iwae at large K)

In expectation a lower bound, tight as K grows. The K draws are streamed in chunks: memory does not grow
with K, and what depends on x alone, such as the encoder, runs once.

Source: Burda, Grosse and Salakhutdinov, Importance Weighted Autoencoders, 2016, section 5.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vdiff.estimators.log_weights import check_num_samples, draw_with_log_q, log_joints
from vdiff.types import Key, LogProb, ModelLike, Params, PyTree, check_key, q_at


class _Sums(NamedTuple):
    """Hold the streamed sums of weights and squared weights, relative to the largest log-weight so far."""

    top: Float[Array, ""]
    first: Float[Array, ""]
    second: Float[Array, ""]


def importance_log_prob(
    model: ModelLike, num_samples: int, chunk_size: int = 100
) -> Callable[[Key, Params, PyTree], LogProb]:
    """Build the importance-sampling estimate of log p(x).

    Args:
        model: any `Model`.
        num_samples: K, the draws per datum, e.g. 5,000.
        chunk_size: how many draws are held in memory at once; the last chunk may be short.

    Returns:
        `(key, params, x) -> LogProb(value, std_error, ess)` of one datum, nats. value is in expectation a
        lower bound on log p(x). std_error is that of the draws by the delta method,
        sqrt((sum w^2 / (sum w)^2 - 1/K) K / (K - 1)); infinite when K is 1. ess = (sum w)^2 / sum w^2.

    Raises:
        ValueError: if `num_samples` or `chunk_size` is less than one.
    """
    check_num_samples(num_samples)
    if chunk_size < 1:
        raise ValueError(f"chunk_size: got {chunk_size}, expected at least 1")
    chunk_size = min(chunk_size, num_samples)
    num_chunks = -(-num_samples // chunk_size)

    def log_prob(key: Key, params: Params, x: PyTree) -> LogProb:
        key, q = check_key(key), q_at(model, params, x)

        def add_chunk(sums: _Sums, i: Array) -> tuple[_Sums, None]:
            z, log_q = draw_with_log_q(q, jax.random.fold_in(key, i), chunk_size)
            log_w = log_joints(model, params, x, z, chunk_size) - log_q
            log_w = jnp.where(i * chunk_size + jnp.arange(chunk_size) < num_samples, log_w, -jnp.inf)
            top = jnp.maximum(sums.top, jnp.max(log_w))
            # Where every weight so far is zero, top is -inf and differences to it are undefined.
            shift = jnp.where(jnp.isneginf(top), 0.0, top)
            old, w = jnp.exp(sums.top - shift), jnp.exp(log_w - shift)
            first = sums.first * old + jnp.sum(w)
            return _Sums(top, first, sums.second * jnp.square(old) + jnp.sum(jnp.square(w))), None

        zero = jnp.zeros(())
        sums, _ = jax.lax.scan(add_chunk, _Sums(zero - jnp.inf, zero, zero), jnp.arange(num_chunks))
        value = sums.top + jnp.log(sums.first) - jnp.log(float(num_samples))
        inverse_ess = sums.second / jnp.square(sums.first)
        spread = jnp.maximum(inverse_ess - 1.0 / num_samples, 0.0)
        if num_samples == 1:
            std_error = jnp.full_like(value, jnp.inf)
        else:
            std_error = jnp.sqrt(spread * (num_samples / (num_samples - 1)))
        return LogProb(value, std_error, 1.0 / inverse_ess)

    return log_prob
