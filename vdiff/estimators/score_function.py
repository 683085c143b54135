r"""Gradients by the score function: no derivative of the draw, so any z, discrete too (12.2.4).

    d/d lambda E_q[f(z)] = E_q[ (f(z) - b) d log q(z | x) / d lambda ]          for any b that ignores z

The lecture's 12.2.4 writes f = log p(x, z); the lambda-gradient of the ELBO carries
f = log p(x, z) - log q(z | x), and so does the code. With f = bound(l) of K draws, each draw's score has
its own baseline b_k.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient
from jaxtyping import Array, Float

from vdiff.bounds import Bound, elbo
from vdiff.estimators.log_weights import check_num_samples, draw, log_joints, log_qs
from vdiff.types import Key, ModelLike, Network, Objective, Params, PyTree, Terms, gradient_only, q_at

Baseline = Callable[[PyTree, PyTree, Bound, Float[Array, " K"]], Float[Array, " K"]]
"""`(params.cv, x, bound, log_weights [K]) -> b [K]`, where b_k must not depend on l_k."""


def leave_one_out(cv: PyTree, x: PyTree, bound: Bound, log_weights: Float[Array, " K"]) -> Float[Array, " K"]:
    """Predict the bound without draw k: l_k is replaced by the mean of the others.

        b_k = bound(l_1, .., mean of l_j with j != k, .., l_K)

    With `elbo` this is RLOO, with `iwae` it is VIMCO. It learns nothing: cv and x are not read.

    Source: Mnih and Rezende, Variational Inference for Monte Carlo Objectives, 2016, eq. 9; Kool, van Hoof
    and Welling, Buy 4 REINFORCE Samples, Get a Baseline for Free, 2019.
    """
    num_samples = log_weights.shape[0]
    others = (jnp.sum(log_weights) - log_weights) / (num_samples - 1)
    replaced = jnp.where(jnp.eye(num_samples, dtype=bool), others[:, None], log_weights[None, :])
    return jax.vmap(bound)(replaced)


def no_baseline(cv: PyTree, x: PyTree, bound: Bound, log_weights: Float[Array, " K"]) -> Float[Array, " K"]:
    """Subtract nothing: the plain score function, of large variance."""
    return jnp.zeros_like(log_weights)


def running_mean(cv: PyTree, x: PyTree, bound: Bound, log_weights: Float[Array, " K"]) -> Float[Array, " K"]:
    """Subtract `params.cv`, one number that follows the bound.

    Its gradient is bound - cv, so that `optax.sgd(1 - decay)` on that part is the running mean
    cv <- decay cv + (1 - decay) bound.

    Raises:
        TypeError: at trace time, if `params.cv` is not one number.

    Source: Williams, Simple Statistical Gradient-Following Algorithms, 1992.
    """
    if not jax.tree_util.all_leaves([cv]) or jnp.shape(cv) != ():
        got = f"leaves of shapes {jax.tree.map(jnp.shape, cv)}" if jax.tree.leaves(cv) else "nothing"
        raise TypeError(
            f"params.cv: got {got}, expected one number for running_mean; start it by "
            "with_cv(model, lambda key: jnp.zeros(())), or pass baseline=leave_one_out, which learns nothing"
        )
    return jnp.broadcast_to(cv, log_weights.shape)


def learned_baseline(network: Network) -> Baseline:
    """Build a baseline that predicts the bound from x, its parameters in `params.cv`.

    Args:
        network: `Network` with apply(cv, x) -> [], fitted to the bound by least squares.

    Returns:
        A baseline for `score_function`; start its parameters by `with_cv(model, network.init)`.

    Raises:
        TypeError: at trace time, if `params.cv` is empty and the network has parameters.
        ValueError: at trace time, if the network's output is not a scalar.

    Source: Mnih and Gregor, Neural Variational Inference and Learning in Belief Networks, 2014, 3.1.
    """

    def baseline(cv: PyTree, x: PyTree, bound: Bound, log_weights: Float[Array, " K"]) -> Float[Array, " K"]:
        if not jax.tree.leaves(cv) and jax.tree.leaves(jax.eval_shape(network.init, jax.random.key(0))):
            raise TypeError(
                f"params.cv: got {cv}, expected the network's parameters for learned_baseline; start them by "
                "with_cv(model, network.init), or pass baseline=leave_one_out, which learns nothing"
            )
        prediction = network.apply(cv, x)
        if jnp.shape(prediction) != ():
            raise ValueError(
                f"network: got an output of shape {jnp.shape(prediction)}, expected (), one number for a "
                "datum; build it with out_shape=()"
            )
        return jnp.broadcast_to(prediction, log_weights.shape)

    return baseline


def score_function(
    model: ModelLike, bound: Bound = elbo, num_samples: int = 2, *, baseline: Baseline = leave_one_out
) -> Objective:
    """Estimate a bound from K draws and its gradient by their scores.

    Value: bound(l). Gradient: sum_k w_k d l_k at fixed z, plus sum_k (bound(l) - b_k) d log q(z_k | x);
    unbiased for theta, phi and lambda, for any z. The gradient for cv is that of
    -1/(2K) sum_k (bound(l) - b_k)^2, and of nothing else.

    Args:
        model: any `Model`.
        bound: `(log_weights [K]) -> []`.
        num_samples: K; at least 2 with `leave_one_out`.
        baseline: `leave_one_out`, `no_baseline`, `running_mean`, `learned_baseline(network)`, or your own.

    Returns:
        An objective with one term, named after the bound, nats.

    Raises:
        ValueError: if K = 1 is combined with `leave_one_out`, or `num_samples` is less than one.

    Source: lecture 12.2.4; Ranganath, Gerrish and Blei, Black Box Variational Inference, 2014.
    """
    check_draws(num_samples, baseline)

    def objective(key: Key, params: Params, x: PyTree) -> Terms:
        q = q_at(model, params, x)
        z = stop_gradient(draw(q, key, num_samples))
        log_q = log_qs(q, z, num_samples)
        log_weights = log_joints(model, params, x, z, num_samples) - log_q
        score = score_surrogate(bound, baseline, params.cv, x, log_weights, log_q)
        return {bound.__name__: bound(log_weights) + score}

    return objective


def score_surrogate(
    bound: Bound,
    baseline: Baseline,
    cv: PyTree,
    x: PyTree,
    log_weights: Float[Array, " K"],
    log_q: Float[Array, " K"],
) -> Float[Array, ""]:
    """Return zero with the gradients sum_k (bound - b_k) d log_q_k, and for cv that of the baseline's fit."""
    fixed = stop_gradient(log_weights)
    # Only cv may be moved by the fit of the baseline: x can carry an encoder's gradient.
    error = bound(fixed) - baseline(cv, stop_gradient(x), bound, fixed)
    fit = -0.5 * jnp.mean(jnp.square(error))
    return gradient_only(jnp.sum(stop_gradient(error) * log_q)) + gradient_only(fit)


def check_draws(num_samples: int, baseline: Baseline) -> None:
    """Refuse a number of draws that the baseline cannot use.

    Raises:
        ValueError: if K = 1 is combined with `leave_one_out`, or `num_samples` is less than one.
    """
    check_num_samples(num_samples)
    if baseline is leave_one_out and num_samples == 1:
        raise ValueError(
            "num_samples: got 1, expected at least 2 for the leave_one_out baseline, which needs "
            "another draw; raise num_samples or pass baseline=no_baseline"
        )
