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
from vdiff.types import Key, ModelLike, Objective, Params, PyTree, Terms

Baseline = Callable[[Bound, Float[Array, " K"]], Float[Array, " K"]]
"""`(bound, log_weights [K]) -> b [K]`, where b_k must not depend on l_k."""


def leave_one_out(bound: Bound, log_weights: Float[Array, " K"]) -> Float[Array, " K"]:
    """Predict the bound without draw k: l_k is replaced by the mean of the others.

        b_k = bound(l_1, .., mean of l_j with j != k, .., l_K)

    With `elbo` this is RLOO, with `iwae` it is VIMCO.

    Source: Mnih and Rezende, Variational Inference for Monte Carlo Objectives, 2016, eq. 9; Kool, van Hoof
    and Welling, Buy 4 REINFORCE Samples, Get a Baseline for Free, 2019.
    """
    num_samples = log_weights.shape[0]
    others = (jnp.sum(log_weights) - log_weights) / (num_samples - 1)
    replaced = jnp.where(jnp.eye(num_samples, dtype=bool), others[:, None], log_weights[None, :])
    return jax.vmap(bound)(replaced)


def no_baseline(bound: Bound, log_weights: Float[Array, " K"]) -> Float[Array, " K"]:
    """Subtract nothing: the plain score function, of large variance."""
    return jnp.zeros_like(log_weights)


def score_function(
    model: ModelLike, bound: Bound = elbo, num_samples: int = 2, *, baseline: Baseline = leave_one_out
) -> Objective:
    """Estimate a bound from K draws and its gradient by their scores.

    Value: bound(l). Gradient: sum_k w_k d l_k at fixed z, plus sum_k (bound(l) - b_k) d log q(z_k | x);
    unbiased for theta, phi and lambda, for any z.

    Args:
        model: any `Model`.
        bound: `(log_weights [K]) -> []`.
        num_samples: K; at least 2 with `leave_one_out`.
        baseline: `(bound, log_weights) -> [K]`: `leave_one_out` or `no_baseline`, or your own.

    Returns:
        An objective with one term, named after the bound, nats.

    Raises:
        ValueError: if K = 1 is combined with `leave_one_out`, or `num_samples` is less than one.

    Source: lecture 12.2.4; Ranganath, Gerrish and Blei, Black Box Variational Inference, 2014.
    """
    check_num_samples(num_samples)
    if baseline is leave_one_out and num_samples == 1:
        raise ValueError(
            "num_samples: got 1, expected at least 2 for the leave_one_out baseline, which needs "
            "another draw; raise num_samples or pass baseline=no_baseline"
        )

    def objective(key: Key, params: Params, x: PyTree) -> Terms:
        z = stop_gradient(draw(model, key, params, x, num_samples))
        log_q = log_qs(model, params, x, z, num_samples)
        log_weights = log_joints(model, params, x, z, num_samples) - log_q
        value = bound(log_weights)
        fixed = stop_gradient(log_weights)
        score = jnp.sum(stop_gradient(value - baseline(bound, fixed)) * log_q)
        return {bound.__name__: value + (score - stop_gradient(score))}

    return objective
