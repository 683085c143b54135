r"""REBAR and RELAX: the score function of a discrete z, its noise cancelled by a relaxed copy of itself.

With logits eta of q, perturbed logits y = T(eps, eta), z = H(y), y~ drawn from p(y | z), f the bound and any c,

    g = (f(z) - c(y~)) d log q(z)  +  d c(y)  -  d c(y~)  +  d f(z) at fixed z             all by eta

is unbiased for every c: E c(y) = E c(y~), and the score of z is all of the score of (z, y~) that p(y | z) does not give
back by its own path. What c has to learn is learned from g alone, by the gradient of its variance,

    d Var g / d cv = d E |g|^2 / d cv,

    rebar    c(y) = scale f(soften(y, temperature)),                          cv = {log_temperature, scale}
    relax    c(y) = that + network(soften(y, temperature), x),                cv = {log_temperature, scale, network}

The inner derivative is by the logits; the chain to the parameters is g . eta.

Source: Tucker et al., REBAR: Low-Variance, Unbiased Gradient Estimates for Discrete Latent Variable Models, 2017;
Grathwohl et al., Backpropagation through the Void, 2018.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient
from jaxtyping import Array, Float

from vdiff.bounds import Bound, elbo
from vdiff.estimators.log_weights import check_num_samples, log_joints
from vdiff.estimators.perturbed import Logits, checked_logits, condition, log_probs, perturb
from vdiff.relaxations import Relaxation, bernoulli
from vdiff.types import Key, ModelLike, Network, Objective, Params, PyTree, Terms, check_key, gradient_only

Control = Callable[[PyTree, PyTree, PyTree, Float[Array, ""]], Float[Array, ""]]
"""`(cv, x, soft z [K, ...], f(soft z)) -> []`, nats."""

_REBAR = ("log_temperature", "scale")


def rebar_init(key: Key) -> PyTree:
    """Start REBAR's `params.cv`: temperature 0.5, scale 1; for `with_cv(model, rebar_init)`."""
    return {"log_temperature": jnp.log(jnp.float32(0.5)), "scale": jnp.ones(())}


def relax_init(network: Network) -> Callable[[Key], PyTree]:
    """Build the start of RELAX's `params.cv`, REBAR's and the network's; for `with_cv(model, ...)`."""
    return lambda key: {**rebar_init(key), "network": network.init(key)}


def rebar(
    model: ModelLike,
    logits: Logits,
    bound: Bound = elbo,
    num_samples: int = 1,
    *,
    relaxation: Relaxation = bernoulli,
) -> Objective:
    """Estimate a bound of a model with discrete z, and its gradient by REBAR.

    Value: bound(l). Gradient: unbiased for theta, phi and lambda; for cv that of -|g|^2, minus the variance of
    the gradient by the logits. `frozen(rebar(...), "cv")` keeps cv as it is and saves its second derivatives.
    The K draws share one control variate: for the ELBO of several draws take `repeat(rebar(model, logits), K)`.
    The model is evaluated three times: on perceptrons 2.3 times the FLOPs of `score_function`, 3.8 if cv learns.

    Args:
        model: a `Model` with discrete z, whose `log_joint` accepts floats between zero and one.
        logits: `(params, x) -> ` logits of q, in the leaves and shapes of z; `model.log_q` is not called.
        bound: `(log_weights [K]) -> []`.
        num_samples: K.
        relaxation: `relaxations.bernoulli`, or `relaxations.one_hot` for categories on the last axis.

    Returns:
        An objective with one term, named after the bound, nats; `params.cv` as `rebar_init` makes it.

    Raises:
        ValueError: if `num_samples` is less than one.
        TypeError: at trace time, if z is not discrete, the logits have other shapes or `params.cv` other entries.
    """

    def control(cv: PyTree, x: PyTree, soft: PyTree, value: Float[Array, ""]) -> Float[Array, ""]:
        return cv["scale"] * value

    return _controlled(model, logits, bound, num_samples, relaxation, control, _REBAR, "rebar")


def relax(
    model: ModelLike,
    logits: Logits,
    network: Network,
    bound: Bound = elbo,
    num_samples: int = 1,
    *,
    relaxation: Relaxation = bernoulli,
) -> Objective:
    """Estimate a bound of a model with discrete z, and its gradient by RELAX.

    Like `rebar`, with a free network in the control variate.

    Args:
        model: a `Model` with discrete z, whose `log_joint` accepts floats between zero and one.
        logits: `(params, x) -> ` logits of q, in the leaves and shapes of z; `model.log_q` is not called.
        network: `Network` with apply(cv["network"], soft z, x) -> [], averaged over the draws.
        bound: `(log_weights [K]) -> []`.
        num_samples: K.
        relaxation: `relaxations.bernoulli`, or `relaxations.one_hot` for categories on the last axis.

    Returns:
        An objective with one term, named after the bound, nats; `params.cv` as `relax_init(network)` makes it.

    Raises:
        ValueError: if `num_samples` is less than one; at trace time, if the network's output is not a scalar.
        TypeError: at trace time, if z is not discrete, the logits have other shapes or `params.cv` other entries.
    """

    def control(cv: PyTree, x: PyTree, soft: PyTree, value: Float[Array, ""]) -> Float[Array, ""]:
        free = jax.vmap(network.apply, in_axes=(None, 0, None))(cv["network"], soft, x)
        if free.shape != (num_samples,):
            raise ValueError(
                f"network: got an output of shape {free.shape[1:]}, expected (), one number for a draw; "
                "build it with out_shape=()"
            )
        return cv["scale"] * value + jnp.mean(free)

    return _controlled(model, logits, bound, num_samples, relaxation, control, (*_REBAR, "network"), "relax")


def _controlled(
    model: ModelLike,
    logits: Logits,
    bound: Bound,
    num_samples: int,
    relaxation: Relaxation,
    control: Control,
    names: tuple[str, ...],
    name: str,
) -> Objective:
    check_num_samples(num_samples)

    def objective(key: Key, params: Params, x: PyTree) -> Terms:
        key_y, key_given_z = jax.random.split(check_key(key))
        live = checked_logits(model, logits, key, params, x, name)
        _check_cv(params.cv, names, name)
        fixed, fixed_params, fixed_x = stop_gradient((live, params, x))
        z = jax.tree.map(relaxation.harden, perturb(relaxation, key_y, fixed, num_samples))
        log_joint = log_joints(model, params, x, z, num_samples)
        value = bound(log_joint - log_probs(relaxation, fixed, z))

        def at_fixed_z(eta: PyTree) -> Array:
            return bound(stop_gradient(log_joint) - log_probs(relaxation, eta, z))

        def c(eta: PyTree, y: PyTree, cv: PyTree) -> Array:
            soft = jax.tree.map(lambda leaf: relaxation.soften(leaf, jnp.exp(cv["log_temperature"])), y)
            log_weights = log_joints(model, fixed_params, fixed_x, soft, num_samples)
            return control(cv, fixed_x, soft, bound(log_weights - log_probs(relaxation, eta, soft)))

        def c_free(eta: PyTree) -> Array:
            return c(eta, perturb(relaxation, key_y, eta, num_samples), params.cv)

        def c_given_z(eta: PyTree) -> Array:
            return c(eta, condition(relaxation, key_given_z, eta, z, num_samples), params.cv)

        score = jax.grad(lambda eta: jnp.sum(log_probs(relaxation, eta, z)))(fixed)
        predicted, given_z = jax.value_and_grad(c_given_z)(fixed)
        advantage = stop_gradient(value) - predicted
        g = jax.tree.map(
            lambda score, free, given_z, direct: advantage * score + free - given_z + direct,
            *(score, jax.grad(c_free)(fixed), given_z, jax.grad(at_fixed_z)(fixed)),
        )
        chain = jax.tree.map(lambda g, eta: jnp.vdot(stop_gradient(g), eta), g, live)
        squares = jax.tree.map(lambda g: jnp.vdot(g, g), g)
        surrogate = sum(jax.tree.leaves(chain)) - sum(jax.tree.leaves(squares))
        return {bound.__name__: value + gradient_only(surrogate)}

    return objective


def _check_cv(cv: PyTree, names: tuple[str, ...], name: str) -> None:
    """Refuse a `params.cv` that another estimator, or none, has started."""
    got = sorted(cv) if isinstance(cv, dict) else cv
    if not isinstance(cv, dict) or not set(names) <= set(cv):
        raise TypeError(
            f"params.cv: got {got}, expected a dict with {list(names)} for {name}; start it by "
            f"with_cv(model, init), init as {name}_init makes it"
        )
