r"""Conditional models: a function y -> model, lifted to data (x, y).

    p(x | y) = int p_theta(x, z | y) dz

The condition is bound into the networks, `given(network, y)`, so that no signature knows of it; every estimator and
evaluator then runs on pairs.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array

from vdiff.types import (
    Distribution,
    Key,
    Model,
    ModelLike,
    Network,
    Params,
    PyTree,
    Terms,
    check_key,
    fused,
    q_at,
)


def given(network: Network, *condition: PyTree) -> Network:
    """Bind a condition into a network: apply(params, *inputs) becomes network.apply(params, *inputs, *condition)."""
    return Network(network.init, lambda params, *inputs: network.apply(params, *inputs, *condition))


def conditional(of: Callable[[PyTree], ModelLike], example: PyTree) -> Model:
    """Lift a function y -> model to a model of pairs.

        conditional(lambda y: ddpm(given(network, y), betas, shape=shape), jnp.int32(0))

    Args:
        of: `(y) -> Model`; all of them share their parameters.
        example: any y, for `init`.

    Returns:
        A `Model` of the datum (x, y), whose `sample` is `(key, params, y) -> (x, z)`. What it bounds is log p(x | y).
    """

    def log_joint(params: Params, xy: tuple[PyTree, PyTree], z: PyTree) -> Array:
        x, y = xy
        return of(y).log_joint(params, x, z)

    def q(params: Params, xy: tuple[PyTree, PyTree]) -> Distribution:
        x, y = xy
        return q_at(of(y), params, x)

    def sample(key: Key, params: Params, y: PyTree) -> tuple[PyTree, PyTree]:
        return of(y).sample(key, params)

    sample_q, log_q = fused(q)
    has_terms = of(example).elbo_terms is not None
    elbo_terms = on_pairs(lambda y: of(y).elbo_terms) if has_terms else None
    return Model(of(example).init, log_joint, log_q, sample_q, sample, elbo_terms)


def on_pairs(of: Callable[[PyTree], Callable[..., PyTree]]) -> Callable[..., PyTree]:
    """Lift a function y -> objective, or evaluator, to pairs.

        on_pairs(lambda y: of(y).elbo_terms_at)             takes (key, params, (x, y), u)

    Args:
        of: `(y) -> (key, params, x, ...) -> anything`.

    Returns:
        `(key, params, (x, y), ...) -> of(y)(key, params, x, ...)`.
    """

    def lifted(key: Key, params: Params, xy: tuple[PyTree, PyTree], *coordinates: Array) -> PyTree:
        x, y = xy
        return of(y)(key, params, x, *coordinates)

    return lifted


def dropping(objective: Callable[..., Terms], probability: float, null: PyTree) -> Callable[..., Terms]:
    """Forget the condition now and then, so that one network learns p(x | y) and p(x).

        y' = null with the given probability, y otherwise

    Args:
        objective: `(key, params, (x, y), ...) -> Terms`.
        probability: in [0, 1], e.g. 0.1.
        null: the condition that means none, of y's shape and dtype.

    Returns:
        An objective of the same signature: an estimate of the mean of both bounds, weighted by the probability.

    Raises:
        ValueError: if `probability` is not in [0, 1].

    Source: Ho and Salimans, Classifier-Free Diffusion Guidance, 2022, algorithm 1.
    """
    if not 0 <= probability <= 1:
        raise ValueError(f"probability: got {probability}, expected a number in [0, 1], e.g. 0.1")

    def objective_dropping(key: Key, params: Params, xy: tuple[PyTree, PyTree], *coordinates: Array) -> Terms:
        key_drop, key_terms = jax.random.split(check_key(key))
        x, y = xy
        is_dropped = jax.random.bernoulli(key_drop, probability)
        y = jax.tree.map(lambda none, given: jnp.where(is_dropped, none, given), null, y)
        return objective(key_terms, params, (x, y), *coordinates)

    return objective_dropping
