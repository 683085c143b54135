r"""MADE: the chain rule with one masked network, under one order of the variables or a mixture of several.

    log p(x | order) = sum_t log p(x_{o(t)} | x_{o(0)}, .., x_{o(t-1)})            one pass of the network
    log p(x) = log 1/M sum_m p(x | order m)                                        exact, M passes

There is no latent: z = (), and log p(x, z) is log p(x) itself. A draw takes a pass for each variable.

Source: Germain, Gregor, Murray and Larochelle, MADE: Masked Autoencoder for Distribution Estimation, 2015; ensembles of
orders: Uria, Murray and Larochelle, A Deep and Tractable Density Estimator, 2014.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import logsumexp
from jaxtyping import Array, Float, Int

from vdiff.types import Key, Likelihood, Model, Network, Objective, Params, PyTree, Terms, check_key


class MADE(NamedTuple):
    """Hold a density: the fields of `Model`, and what is known under each order.

    Attributes:
        init, log_joint, log_q, sample_q, sample, elbo_terms: as in `vdiff.types.Model`; z is ().
        log_prob: `(params, x) -> []`, log p(x) of the mixture over orders, exact, nats.
        log_prob_under: `(params, x, m) -> []`, log p(x | order m), nats.
        out: `(params, x, m) -> [*likelihood.out_shape(shape)]`, the law of each variable given those before it.
        sample_under: `(key, params, m) -> x`, drawn under order m.
        orders: int32 [M, D].
    """

    init: Callable[[Key], Params]
    log_joint: Callable[[Params, PyTree, PyTree], Array]
    log_q: Callable[[Params, PyTree, PyTree], Array]
    sample_q: Callable[[Key, Params, PyTree], PyTree]
    sample: Callable[[Key, Params], tuple[PyTree, PyTree]]
    elbo_terms: Objective
    log_prob: Callable[[Params, Array], Array]
    log_prob_under: Callable[[Params, Array, Array | int], Array]
    out: Callable[[Params, Array, Array | int], Array]
    sample_under: Callable[[Key, Params, Array | int], Array]
    orders: np.ndarray

    elbo_estimate = Model.elbo_estimate


def made(
    network: Network,
    shape: Sequence[int],
    *,
    likelihood: Likelihood,
    orders: np.ndarray | None = None,
) -> MADE:
    """Build a masked autoencoder for distribution estimation.

    `elbo_terms` is {"log_prob": log p(x)}, exact in value and gradient, at the cost of M passes. Cheaper by M:
    `under_order(model, m)`.

    Args:
        network: `Network` with apply(theta, likelihood.embed(x), place [D]) -> [*likelihood.out_shape(shape)], which at
            variable d depends on variables of a lower place only, such as `nets.masked_mlp`.
        shape: of one datum; its variables lie on the leading axes.
        likelihood: what the output says of one variable: `likelihoods.bernoulli()`, `.categorical(levels)`,
            `.one_hot(levels)` for codes, or any other.
        orders: int [M, D], in each row the variables in the order in which they are drawn; row by row of the datum,
            prod(shape) variables, when left out. `shuffled_orders` draws some.

    Returns:
        A `MADE`; theta is the network's, phi and lam are (). Everything in nats per datum.

    Raises:
        ValueError: if a row of `orders` is not a permutation, or its variables do not divide the datum; at trace time,
            if the network's output does not fit.
    """
    shape = tuple(shape)
    size = math.prod(shape)
    orders = np.arange(size)[None, :] if orders is None else np.asarray(orders)
    num_variables = orders.shape[-1]
    if orders.ndim != 2 or orders.size == 0 or np.any(np.sort(orders) != np.arange(num_variables)[None, :]):
        raise ValueError(
            f"orders: got an array of shape {orders.shape}, expected [M, D], each row a permutation of 0..D-1; use "
            "shuffled_orders(D, M)"
        )
    if size % num_variables:
        raise ValueError(
            f"orders: got {num_variables} variables for a datum of {size} numbers, expected a divisor; each variable "
            "has as many numbers as any other"
        )
    orders = orders.astype(np.int32)
    places = np.argsort(orders).astype(np.int32)
    of_one = (size // num_variables,)
    # One order stays a constant: an index that is drawn would give each datum of a batch its own masked weights.
    is_one = len(orders) == 1

    def place(m: Array | int) -> Int[Array, " D"]:
        return jnp.asarray(places)[0 if is_one else m]

    def out(params: Params, x: Array, m: Array | int) -> Array:
        found = network.apply(params.theta, likelihood.embed(x), place(m))
        if found.shape != likelihood.out_shape(shape):
            raise ValueError(
                f"network: got output of shape {found.shape}, expected {likelihood.out_shape(shape)} for x of shape "
                f"{shape}; build it with out_shape=likelihood.out_shape(shape)"
            )
        return found

    def log_prob_under(params: Params, x: Array, m: Array | int) -> Float[Array, ""]:
        return likelihood.log_prob(out(params, x, m), x)

    def log_prob(params: Params, x: Array) -> Float[Array, ""]:
        if is_one:
            return log_prob_under(params, x, 0)
        under_each = jax.vmap(log_prob_under, in_axes=(None, None, 0))(params, x, jnp.arange(len(orders)))
        return logsumexp(under_each) - math.log(len(orders))

    def sample_under(key: Key, params: Params, m: Array | int) -> Array:
        order = jnp.asarray(orders)[0 if is_one else m]

        def draw_next(x: Array, step: tuple[Array, Key]) -> tuple[Array, None]:
            variable, key = step
            law = out(params, x.reshape(shape), m).reshape(num_variables, -1)[variable]
            drawn = likelihood.sample(key, law.reshape(likelihood.out_shape(of_one)))
            return x.at[variable].set(drawn), None

        dtype = jax.eval_shape(likelihood.sample, key, jnp.zeros(likelihood.out_shape(of_one))).dtype
        keys = jax.random.split(check_key(key), num_variables)
        start = jnp.zeros((num_variables, *of_one), dtype)
        return jax.lax.scan(draw_next, start, (order, keys))[0].reshape(shape)

    def sample(key: Key, params: Params) -> tuple[Array, tuple[()]]:
        key_order, key_x = jax.random.split(check_key(key))
        return sample_under(key_x, params, jax.random.randint(key_order, (), 0, len(orders))), ()

    return MADE(
        init=lambda key: Params(theta=network.init(check_key(key))),
        log_joint=lambda params, x, z: log_prob(params, x),
        log_q=lambda params, x, z: jnp.zeros(()),
        sample_q=lambda key, params, x: (),
        sample=sample,
        elbo_terms=lambda key, params, x: {"log_prob": log_prob(params, x)},
        log_prob=log_prob,
        log_prob_under=log_prob_under,
        out=out,
        sample_under=sample_under,
        orders=orders,
    )


def under_order(model: MADE, m: Array | int) -> Objective:
    """Judge a datum under one order of the variables alone.

    Value: log p(x | order m), and its gradient. The mean over orders lies below log p(x) of the mixture, by Jensen's
    inequality, so that going through the orders by the step raises a lower bound, at the cost of one pass:

        vd.scheduled(lambda step: under_order(model, step % len(model.orders)))

    Args:
        model: a `MADE`.
        m: which order, a number below M; a traced one too.

    Returns:
        An objective with one term, `log_prob`, nats.
    """

    def objective(key: Key, params: Params, x: Array) -> Terms:
        return {"log_prob": model.log_prob_under(params, x, m)}

    return objective


def shuffled_orders(num_variables: int, num_orders: int, *, seed: int = 0) -> np.ndarray:
    """Return the order 0..D-1 and others drawn at random.

    Args:
        num_variables: D.
        num_orders: M, the first among them.
        seed: of the others.

    Returns:
        int32 [M, D], each row a permutation.

    Raises:
        ValueError: if a number is less than one.
    """
    if num_variables < 1 or num_orders < 1:
        raise ValueError(
            f"num_orders: got {num_orders} orders of {num_variables} variables, expected at least 1 of each"
        )
    rng = np.random.default_rng(seed)
    others = [rng.permutation(num_variables) for _ in range(num_orders - 1)]
    return np.stack([np.arange(num_variables), *others]).astype(np.int32)
