r"""The likelihood's own gradient, and why it is not used: a ratio of integrals (12.2.2).

    d log p(x) = int d p(x, z) dz / int p(x, z) dz = E_{p(z | x)}[ d log p(x, z) ]

Each integral has an unbiased estimate from draws of q; their ratio has not. With weights w_k = p(x, z_k) / q(z_k | x)
it is the self-normalised estimate

    sum_k w_k d log p(x, z_k) / sum_k w_k,

whose bias falls as 1/K; it is, without bias, the gradient of IWAE_K by theta and phi.

The score of the data density is the same ratio with d/dx for d/dtheta, so that score matching of a latent-variable
model meets the same obstacle: differentiate this objective by x.
"""

from jax.lax import stop_gradient
from jaxtyping import Array, Float

from vdiff.bounds import iwae
from vdiff.estimators.log_weights import check_num_samples, draw, log_joints, log_qs
from vdiff.types import Key, ModelLike, Objective, Params, PyTree, Terms, q_at


def likelihood_gradient(model: ModelLike, num_samples: int) -> Objective:
    """Estimate log p(x) and its gradient by self-normalised importance sampling from q.

    Value: log 1/K sum_k w_k. Gradient: sum_k w_k d log p(x, z_k) / sum_k w_k by theta, phi and x, biased by
    O(1/K) for that of log p(x) (by theta, on a toy of two bits, by 34 % of the norm at K = 2, 19 % at K = 5, 13 % at
    K = 8), unbiased for that of `iwae`; zero by lambda. For weights shared between p and q, only what p does with them
    counts.

    Args:
        model: any `Model`.
        num_samples: K.

    Returns:
        An objective with the one term `iwae`, nats.

    Raises:
        ValueError: if `num_samples` is less than one.

    Source: lecture 12.2.2; Bornschein and Bengio, Reweighted Wake-Sleep, 2015, eq. 8.
    """
    check_num_samples(num_samples)

    def objective(key: Key, params: Params, x: PyTree) -> Terms:
        z = stop_gradient(draw(q_at(model, params, x), key, num_samples))
        return {"iwae": iwae(fixed_q_log_weights(model, params, x, z, num_samples))}

    return objective


def fixed_q_log_weights(
    model: ModelLike, params: Params, x: PyTree, z: PyTree, num_samples: int
) -> Float[Array, " K"]:
    """Evaluate log p(x, z_k) - log q(z_k | x), [K] nats, with no gradient through q."""
    log_q: Array = stop_gradient(log_qs(q_at(model, params, x), z, num_samples))
    return log_joints(model, params, x, z, num_samples) - log_q
