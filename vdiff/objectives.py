r"""Objectives from objectives: what turns one `(key, params, x) -> Terms` into another.

The sum of an objective's terms is its estimate; a weight on a named term is a beta-VAE, a weight that
depends on the step is KL warm-up. Nothing here knows a model.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from vdiff.types import Key, Objective, Params, PyTree, Terms, check_key, gradient_only


def total(objective: Objective) -> Callable[[Key, Params, PyTree], Float[Array, ""]]:
    """Sum an objective's terms: the scalar function to evaluate, `jax.grad` or `jax.vmap`.

    Args:
        objective: `(key, params, x) -> Terms`.

    Returns:
        `(key, params, x) -> []`, in the objective's unit (nats).
    """
    return lambda key, params, x: sum_terms(objective(check_key(key), params, x))


def sum_terms(terms: Terms) -> Float[Array, ""]:
    """Sum named terms: how a train step combines them unless told otherwise."""
    return sum(terms.values())


def weighted(objective: Objective, weights: Mapping[str, ArrayLike]) -> Objective:
    """Multiply named terms by weights; a term not named keeps weight one.

        weighted(model.elbo_terms, {"kl": beta})        is the objective of a beta-VAE

    Args:
        objective: `(key, params, x) -> Terms`.
        weights: name of a term -> number, or traced scalar.

    Returns:
        An objective with the same names. It is the objective's own estimate only at weights one.

    Raises:
        ValueError: at trace time, if a weight names a term that the objective does not have.

    Source: Higgins et al., beta-VAE, 2017.
    """

    def objective_weighted(key: Key, params: Params, x: PyTree) -> Terms:
        terms = objective(key, params, x)
        unknown = sorted(set(weights) - set(terms))
        if unknown:
            raise ValueError(
                f"weights: got {unknown}, expected names among {sorted(terms)}; "
                "name the terms that this objective returns"
            )
        return {name: term * weights.get(name, 1.0) for name, term in terms.items()}

    return objective_weighted


def free_bits(floors: Mapping[str, float]) -> Callable[[Terms], Float[Array, ""]]:
    """Combine mean terms so that a KL term is not pressed below its floor.

        sum_i t_i,   with min(t_i, -floor_i) for a named term t_i = -KL_i

    It looks at batch means, so `make_train_step(combine=...)` takes it, and it is no objective. Below its floor a term
    is a constant: its gradient is exactly zero, and the layer may carry so many nats for nothing.

        make_train_step(model.elbo_terms, optimizer, combine=free_bits({"kl_1": 0.5, "kl_2": 0.5}))

    Args:
        floors: name of a term, a KL divergence with its minus sign -> nats that are free, positive or zero.

    Returns:
        `(mean Terms over the batch) -> []`, nats; the objective's own estimate once every KL is above its floor.

    Raises:
        ValueError: if a floor is negative; at trace time, if a name is not among the terms.

    Source: Kingma et al., Improved Variational Inference with Inverse Autoregressive Flow, 2016, C.8.
    """
    if any(floor < 0 for floor in floors.values()):
        raise ValueError(
            f"floors: got {dict(floors)}, expected nats of at least 0; the sign of the term is known"
        )

    def combine(terms: Terms) -> Float[Array, ""]:
        unknown = sorted(set(floors) - set(terms))
        if unknown:
            raise ValueError(f"floors: got {unknown}, expected names among {sorted(terms)}")
        floored = {name: jnp.where(terms[name] < -f, terms[name], -f) for name, f in floors.items()}
        return sum_terms(terms | floored)

    return combine


def repeat(objective: Objective, num_repeats: int) -> Objective:
    """Average independent runs of an objective.

        repeat(pathwise(model, iwae, k), m)             is MIWAE(m, k)

    Args:
        objective: `(key, params, x) -> Terms`.
        num_repeats: how many runs, each with its own key.

    Returns:
        An objective with the same names and expectation, and 1/num_repeats of the variance.

    Raises:
        ValueError: if `num_repeats` is less than one.

    Source: Rainforth et al., Tighter Variational Bounds are Not Necessarily Better, 2018.
    """
    if num_repeats < 1:
        raise ValueError(f"num_repeats: got {num_repeats}, expected at least 1")

    def objective_repeated(key: Key, params: Params, x: PyTree) -> Terms:
        keys = jax.random.split(check_key(key), num_repeats)
        runs = jax.vmap(objective, in_axes=(0, None, None))(keys, params, x)
        return jax.tree.map(jnp.mean, runs)

    return objective_repeated


def frozen(objective: Objective, *parts: str) -> Objective:
    """Stop the gradient of parts of the parameters.

        frozen(objective, "lam")                        trains theta and phi under a given q

    Args:
        objective: `(key, params, x) -> Terms`.
        parts: names among theta, phi, lam and cv.

    Returns:
        An objective with the same terms, whose gradient by these parts is zero.

    Raises:
        ValueError: if a name is not a part.
    """
    _check_parts(parts)

    def objective_frozen(key: Key, params: Params, x: PyTree) -> Terms:
        stopped = {part: jax.lax.stop_gradient(getattr(params, part)) for part in parts}
        return objective(key, params._replace(**stopped), x)

    return objective_frozen


def by_part(objective: Objective, **others: Objective) -> Objective:
    """Give parts of the parameters the gradient of another objective.

        by_part(pathwise(model, iwae, m * k), lam=repeat(pathwise(model, iwae, k), m))        is PIWAE(m, k)

    All of them see the same key.

    Args:
        objective: what is estimated, and the gradient of every part that is not named.
        **others: a part, theta, phi, lam or cv -> the objective whose gradient it gets.

    Returns:
        An objective with the terms of `objective`; a term that only another one has is added with value zero.

    Raises:
        ValueError: if a name is not a part.

    Source: Rainforth et al., Tighter Variational Bounds are Not Necessarily Better, 2018, 4.3.
    """
    _check_parts(others)
    main = frozen(objective, *others)
    rest = {part: frozen(o, *(p for p in Params._fields if p != part)) for part, o in others.items()}

    def objective_by_part(key: Key, params: Params, x: PyTree) -> Terms:
        terms = main(key, params, x)
        for other in rest.values():
            for name, term in other(key, params, jax.lax.stop_gradient(x)).items():
                terms = terms | {name: terms.get(name, 0.0) + gradient_only(term)}
        return terms

    return objective_by_part


def _check_parts(parts: Iterable[str]) -> None:
    unknown = sorted(set(parts) - set(Params._fields))
    if unknown:
        raise ValueError(f"parts: got {unknown}, expected names among {list(Params._fields)}")


def preprocessed(
    objective: Callable[..., PyTree], transform: Callable[[Key, PyTree], PyTree]
) -> Callable[..., PyTree]:
    """Transform a datum at random before it is judged: binarisation, dequantisation, augmentation.

        o(key, params, x) = objective(key_o, params, transform(key_t, x))

    It happens on the device and from the key, so that data stay small on the host and the draw belongs
    to the step and the position in the batch. Works on evaluators as on objectives, and passes on what a batching gives
    besides, such as the coordinate u of `stratified`.

    Args:
        objective: `(key, params, x) -> anything`.
        transform: `(key, x) -> x`, e.g. `transforms.binarize(256)`.

    Returns:
        A function of the same signature as `objective`.
    """

    def objective_preprocessed(key: Key, params: Params, x: PyTree, *coordinates: Array) -> PyTree:
        key_transform, key_objective = jax.random.split(check_key(key))
        return objective(key_objective, params, transform(key_transform, x), *coordinates)

    return objective_preprocessed


class Scheduled(NamedTuple):
    """Hold an objective that depends on the training step; made by `scheduled`."""

    at: Callable[[Array], Objective]


def scheduled(at: Callable[[Array], Objective]) -> Scheduled:
    """Let an objective depend on the training step: warm-up weights, temperatures.

        scheduled(lambda step: weighted(model.elbo_terms, {"kl": jnp.minimum(1.0, step / 1000)}))

    Args:
        at: `(step) -> objective`; step is a traced int32 scalar, so nothing is compiled twice.

    Returns:
        What `make_train_step` takes in place of an objective.
    """
    return Scheduled(at)


def bits_per_dim(nats: ArrayLike, num_dims: int) -> ArrayLike:
    """Convert nats per datum into bits per dimension, smaller is better.

        - nats / (num_dims ln 2)

    Args:
        nats: log-probability (or a bound on it) per datum, larger is better.
        num_dims: dimensions of the datum, e.g. 784.

    Returns:
        Bits per dimension.

    Raises:
        ValueError: if `num_dims` is less than one.
    """
    if num_dims < 1:
        raise ValueError(f"num_dims: got {num_dims}, expected the number of dimensions of one datum")
    return -nats / (num_dims * math.log(2.0))
