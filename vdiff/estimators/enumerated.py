r"""The ELBO without sampling: a sum over a finite support.

ELBO(x) = sum_z q(z | x) ( log p(x, z) - log q(z | x) )                     (12.2.3)
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array

from vdiff.estimators.log_weights import log_joints, log_qs
from vdiff.types import Key, ModelLike, Objective, Params, PyTree, Terms


def enumerated(model: ModelLike, support: PyTree) -> Objective:
    """Compute the ELBO exactly by visiting every value of z.

    Value: the ELBO, not an estimate. Gradient: exact. The key is not used. A value of z that q never takes
    contributes nothing.

    Args:
        model: a `Model` whose z has finitely many values.
        support: every value of z once, stacked on a leading axis of every leaf.

    Returns:
        An objective with the one term `elbo`, nats.

    Raises:
        ValueError: if the leaves of `support` are missing or differ in their number of values.
    """
    sizes = sorted({jnp.shape(leaf)[0] if jnp.ndim(leaf) else 0 for leaf in jax.tree.leaves(support)})
    if len(sizes) != 1 or sizes[0] == 0:
        raise ValueError(
            f"support: got leading axes {sizes}, expected one common length; stack every value of z on axis 0"
        )

    def objective(key: Key, params: Params, x: PyTree) -> Terms:
        log_q = log_qs(model, params, x, support, sizes[0])
        log_weights = log_joints(model, params, x, support, sizes[0]) - log_q
        return {"elbo": jnp.sum(_times_exp(log_weights, log_q))}

    return objective


def _times_exp(f: Array, log_q: Array) -> Array:
    """Return exp(log_q) f, with zero (and zero gradient) where q is zero and f therefore infinite."""
    is_possible = log_q > -jnp.inf
    return jnp.where(is_possible, jnp.exp(log_q) * jnp.where(is_possible, f, 0.0), 0.0)
