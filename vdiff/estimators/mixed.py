r"""Models with both discrete and continuous latents: scores for the ones, paths for the others.

With z = (c, u), c discrete, u continuous and reparametrized, and q the product of its nodes' conditionals in any order,

    d E_q[bound] = E_q[ d bound along the path of u  +  sum_k (bound - b_k) d log q(c_k | parents of c_k) ]

where u is live in log q(c | parents) too. The score of the WHOLE q beside the path would count u twice.

Source: Schulman et al., Gradient Estimation Using Stochastic Computation Graphs, 2015, theorem 1.
"""

from collections.abc import Callable

import jax
from jaxtyping import Array

from vdiff.bounds import Bound, elbo
from vdiff.estimators.log_weights import check_scalars, draw_with_log_q, log_joints
from vdiff.estimators.score_function import Baseline, check_draws, leave_one_out, score_surrogate
from vdiff.types import Key, ModelLike, Objective, Params, PyTree, Terms, is_discrete, q_at


def mixed(
    model: ModelLike,
    log_q_discrete: Callable[[Params, PyTree, PyTree], Array],
    bound: Bound = elbo,
    num_samples: int = 2,
    *,
    baseline: Baseline = leave_one_out,
) -> Objective:
    """Estimate a bound with scores for the discrete latents and paths for the continuous ones.

    Value: bound(l). Gradient: unbiased for theta, phi and lambda, where `sample_q` is differentiable in its continuous
    leaves given its discrete ones, and `log_q_discrete` sums the conditionals of the discrete ones alone. Passes as in
    `pathwise`.

    Args:
        model: a `Model` whose z has discrete and continuous leaves.
        log_q_discrete: `(params, x, z) -> []`, sum of log q(c | parents of c) over the discrete nodes of q, nats.
        bound: `(log_weights [K]) -> []`.
        num_samples: K; at least 2 with `leave_one_out`.
        baseline: as in `score_function`.

    Returns:
        An objective with one term, named after the bound, nats.

    Raises:
        ValueError: if K = 1 is combined with `leave_one_out`, or `num_samples` is less than one.
        TypeError: at trace time, if z is all discrete or all continuous.
    """
    check_draws(num_samples, baseline)

    def objective(key: Key, params: Params, x: PyTree) -> Terms:
        z, log_q = draw_with_log_q(q_at(model, params, x), key, num_samples)
        log_weights = log_joints(model, params, x, _check_mixed(z), num_samples) - log_q
        log_q = jax.vmap(log_q_discrete, in_axes=(None, None, 0))(params, x, z)
        score = score_surrogate(
            bound, baseline, params.cv, x, log_weights, check_scalars("log_q_discrete", log_q, num_samples)
        )
        return {bound.__name__: bound(log_weights) + score}

    return objective


def _check_mixed(z: PyTree) -> PyTree:
    is_discrete_leaf = [is_discrete(leaf) for leaf in jax.tree.leaves(z)]
    if all(is_discrete_leaf) or not any(is_discrete_leaf):
        kind, instead = (
            ("discrete", "score_function") if any(is_discrete_leaf) else ("continuous", "pathwise")
        )
        raise TypeError(
            f"z: got {kind} leaves only, expected discrete and continuous ones for mixed; use {instead}(model, "
            "bound, num_samples)"
        )
    return z
