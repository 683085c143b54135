r"""The log-likelihood by importance sampling, and how far to trust it.

    log p(x) ~ log 1/K sum_k w_k,   w_k = p(x, z_k) / q(z_k | x),   z_k ~ q     (iwae at large K)

In expectation a lower bound, tight as K grows. The K draws are streamed in chunks: memory does not grow
with K, and what depends on x alone, such as the encoder, runs once.

Source: Burda, Grosse and Salakhutdinov, Importance Weighted Autoencoders, 2016, section 5.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array

from vdiff.estimators.log_weights import check_num_samples, draw_with_log_q, log_joints
from vdiff.evaluate.weights import Weights, add_weights, log_prob_of, no_weights
from vdiff.types import Key, LogProb, ModelLike, Params, PyTree, check_key, q_at


def importance_log_prob(
    model: ModelLike, num_samples: int, chunk_size: int = 100
) -> Callable[[Key, Params, PyTree], LogProb]:
    """Build the importance-sampling estimate of log p(x).

    Args:
        model: any `Model`.
        num_samples: K, the draws per datum, e.g. 5,000.
        chunk_size: how many draws are held in memory at once; the last chunk may be short.

    Returns:
        `(key, params, x) -> LogProb(value, std_error, ess, k_hat)` of one datum, nats. value is in expectation a
        lower bound on log p(x). std_error is that of the draws by the delta method,
        sqrt((sum w^2 / (sum w)^2 - 1/K) K / (K - 1)); infinite when K is 1. ess = (sum w)^2 / sum w^2. k_hat is the
        shape of the weights' tail: above 0.7 neither value nor std_error is to be trusted; NaN when K is under 25.

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

        def add_chunk(weights: Weights, i: Array) -> tuple[Weights, None]:
            z, log_q = draw_with_log_q(q, jax.random.fold_in(key, i), chunk_size)
            log_w = log_joints(model, params, x, z, chunk_size) - log_q
            is_asked = i * chunk_size + jnp.arange(chunk_size) < num_samples
            return add_weights(weights, jnp.where(is_asked, log_w, -jnp.inf)), None

        weights, _ = jax.lax.scan(add_chunk, no_weights(num_samples), jnp.arange(num_chunks))
        return log_prob_of(weights, num_samples)

    return log_prob
