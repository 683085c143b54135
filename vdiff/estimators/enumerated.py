r"""A bound without sampling: the sum over a finite support, of one draw or of several.

    E bound(l_1..l_K) = sum_{z_1..z_K} prod_k q(z_k | x)  bound(l_1..l_K),      l_k = log p(x, z_k) - log q(z_k | x)

With `elbo` one draw is enough (12.2.3). A bound does not see the order of its draws, so a sum over multisets with
their multiplicities does: C(n + K - 1, K) terms for n values.
"""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from vdiff.bounds import Bound, elbo
from vdiff.estimators.log_weights import check_num_samples, log_joints, log_qs
from vdiff.types import Key, ModelLike, Objective, Params, PyTree, Terms, is_discrete, q_at

MAX_TERMS = 1_000_000
"""The longest sum that is built."""


def enumerated(model: ModelLike, support: PyTree, bound: Bound = elbo, num_samples: int = 1) -> Objective:
    """Compute the expectation of a bound exactly by visiting every value of z.

    Value: the expectation of the bound, not an estimate. Gradient: exact. The key is not used. A value of z that q
    never takes contributes nothing.

    Args:
        model: a `Model` whose z has finitely many values.
        support: every value of z once, stacked on a leading axis of every leaf.
        bound: `(log_weights [K]) -> []`, which does not depend on their order.
        num_samples: K; the ELBO is the same for every K.

    Returns:
        An objective with one term, named after the bound, nats.

    Raises:
        ValueError: if the leaves of `support` are missing or differ in their number of values, or the sum would have
            more than a million terms.
        TypeError: at trace time, if z has a continuous leaf.
    """
    check_num_samples(num_samples)
    sizes = sorted({jnp.shape(leaf)[0] if jnp.ndim(leaf) else 0 for leaf in jax.tree.leaves(support)})
    if len(sizes) != 1 or sizes[0] == 0:
        raise ValueError(
            f"support: got leading axes {sizes}, expected one common length; stack every value of z on axis 0"
        )
    num_terms = math.comb(sizes[0] + num_samples - 1, num_samples)
    if num_terms > MAX_TERMS:
        raise ValueError(
            f"num_samples: got {num_samples} draws of {sizes[0]} values, {num_terms:,} terms, expected at most "
            f"{MAX_TERMS:,}; use score_function(model, bound, num_samples)"
        )
    index, log_count = _multisets(sizes[0], num_samples)

    def objective(key: Key, params: Params, x: PyTree) -> Terms:
        _check_discrete(jax.eval_shape(model.sample_q, jax.random.key(0), params, x))
        log_q = log_qs(q_at(model, params, x), support, sizes[0])
        log_weights = log_joints(model, params, x, support, sizes[0]) - log_q
        is_possible = log_q > -jnp.inf
        # Where q is zero the log-weight is infinite: take it out before the two meet.
        kept = jnp.where(is_possible, log_weights, 0.0)[index]
        log_mass = log_count + jnp.sum(jnp.where(is_possible, log_q, 0.0)[index], axis=-1)
        mass = jnp.where(jnp.all(is_possible[index], axis=-1), jnp.exp(log_mass), 0.0)
        return {bound.__name__: jnp.sum(mass * jax.vmap(bound)(kept))}

    return objective


def _check_discrete(z: PyTree) -> None:
    """Refuse a sum over some of infinitely many values."""
    if not all(is_discrete(leaf) for leaf in jax.tree.leaves(z)):
        raise TypeError(
            "z: got a continuous leaf, expected discrete ones only for enumerated, which visits every value; use "
            "pathwise(model, bound, num_samples), or mixed(model, log_q_discrete, bound, num_samples) where z has both"
        )


def _multisets(num_values: int, num_draws: int) -> tuple[np.ndarray, Array]:
    """List every multiset of K of the values, [n, K], and the log of how many ordered tuples it stands for, [n]."""
    draws = itertools.combinations_with_replacement(range(num_values), num_draws)
    index = np.array(list(draws), np.int32)
    log_factorial = np.cumsum(np.log(np.maximum(np.arange(num_draws + 1), 1)))
    repeats = (index[:, :, None] == np.arange(num_values)).sum(axis=1)
    log_count = log_factorial[num_draws] - log_factorial[repeats].sum(axis=-1)
    return index, jnp.asarray(log_count, jnp.float32)
