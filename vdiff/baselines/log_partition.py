r"""log Z of a restricted Boltzmann machine: exact where one side is small, else from below and from above.

    path       params_k = (1 - beta_k) base + beta_k params,      0 = beta_0 < ... < beta_K = 1
    base       W = 0, c = 0, b given:      log Z_0 = sum_i softplus(b_i) + num_hidden log 2
    forward    x_0 ~ p_0,  x_k a sweep at beta_k from x_{k-1},
               w = Z_0 prod_k p*_k(x_{k-1}) / p*_{k-1}(x_{k-1}),                             E w = Z
    reverse    x_K ~ p,    the same path walked backwards, w inverted:                       E w = 1 / Z

By Jensen's inequality the log of a mean of w is, in expectation, below log Z forward, and minus it above log Z in
reverse: the two hold log Z between them. The energy is linear in the parameters, so that the line between two machines
is the geometric path between their laws of (x, h), a machine at each place. A sweep is its own reversal.

Source: Neal, Annealed Importance Sampling, 2001; Salakhutdinov and Murray, On the Quantitative Analysis of Deep Belief
Networks, 2008; Burda, Grosse and Salakhutdinov, Accurate and Conservative Estimates of MRF Log-likelihood using Reverse
Annealing, 2015; Grosse, Ghahramani and Adams, Sandwiching the Marginal Likelihood, 2015.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from vdiff.baselines.rbm import RBM
from vdiff.types import Key, Params, PyTree, check_key

MAX_UNITS = 20


class LogPartition(NamedTuple):
    """Hold an estimate of log Z in nats and how far to trust it.

    Attributes:
        value: the estimate of log Z.
        std_error: its standard error over the chains (delta method).
        ess: the effective number of chains, between 1 and how many there were.
        log_weights: [N], one a chain; exp of one is in expectation Z (forward) or 1 / Z (reverse).
    """

    value: Float[Array, ""]
    std_error: Float[Array, ""]
    ess: Float[Array, ""]
    log_weights: Float[Array, " N"]


def annealed_log_partition(
    model: RBM, base_bias: ArrayLike, betas: ArrayLike, num_chains: int
) -> Callable[[Key, Params], LogPartition]:
    """Build the estimate of log Z by annealing from independent pixels to the model: in expectation a lower bound.

    An estimate of log p(x) made with it is, in expectation, too good by as much.

    Args:
        model: an `RBM`.
        base_bias: logits of the independent pixels, [*shape]; those of the data's mean are a good base.
        betas: [K + 1], rising from 0 to 1, e.g. `np.linspace(0, 1, 1001)`.
        num_chains: how many independent chains; two or more, or there is no standard error.

    Returns:
        `(key, params) -> LogPartition`, nats.

    Raises:
        ValueError: if `betas` do not rise from 0 to 1, or `num_chains` is less than two.
    """
    befores, afters = _pairs(betas)
    if num_chains < 2:
        raise ValueError(f"num_chains: got {num_chains}, expected at least 2, for a standard error")

    def log_partition(key: Key, params: Params) -> LogPartition:
        base = _base(model, base_bias)

        def chain(key: Key) -> Float[Array, ""]:
            key_start, key_sweeps = jax.random.split(key)
            x = jax.random.bernoulli(key_start, jax.nn.sigmoid(base.theta["visible"])).astype(jnp.int32)

            def step(x: Array, at: tuple) -> tuple[Array, Array]:
                k, before, after = at
                log_w = _log_ratio(model, base, params, x, before, after)
                return model.sweep(jax.random.fold_in(key_sweeps, k), _between(base, params, after), x), log_w

            return jnp.sum(jax.lax.scan(step, x, (jnp.arange(len(afters)), befores, afters))[1])

        log_w = jax.vmap(chain)(jax.random.split(check_key(key), num_chains))
        log_w = log_w + _base_log_partition(base)
        return LogPartition(*_log_mean_exp(log_w), log_w)

    return log_partition


def reverse_log_partition(
    model: RBM, base_bias: ArrayLike, betas: ArrayLike
) -> Callable[[Key, Params, Array], LogPartition]:
    """Build the estimate of log Z by annealing from the model to independent pixels: in expectation an upper bound.

    An estimate of log p(x) made with it is, in expectation, too bad by as much. That holds for draws of the model: for
    exact ones, or as far as a chain has forgotten its start.

    Args:
        model: an `RBM`.
        base_bias: logits of the independent pixels, [*shape].
        betas: [K + 1], rising from 0 to 1; they are gone through from the last to the first.

    Returns:
        `(key, params, x [N, *shape]) -> LogPartition`, nats; x are N draws of the model, N at least two.

    Raises:
        ValueError: if `betas` do not rise from 0 to 1; at trace time, if there are fewer than two draws.
    """
    befores, afters = _pairs(betas)

    def log_partition(key: Key, params: Params, x: Array) -> LogPartition:
        if x.shape[1:] != model.shape or len(x) < 2:
            raise ValueError(
                f"x: got shape {x.shape}, expected [N, {', '.join(map(str, model.shape))}] with N at least 2; "
                "give draws of the model, one a chain"
            )
        base = _base(model, base_bias)

        def chain(key: Key, x: Array) -> Float[Array, ""]:
            def step(x: Array, at: tuple) -> tuple[Array, Array]:
                k, before, after = at
                x = model.sweep(jax.random.fold_in(key, k), _between(base, params, after), x)
                return x, _log_ratio(model, base, params, x, after, before)

            places = (jnp.arange(len(afters)), befores, afters)
            return jnp.sum(jax.lax.scan(step, x, places, reverse=True)[1])

        log_w = jax.vmap(chain)(jax.random.split(check_key(key), len(x)), x)
        log_w = log_w - _base_log_partition(base)
        value, std_error, ess = _log_mean_exp(log_w)
        return LogPartition(-value, std_error, ess, log_w)

    return log_partition


def exact_log_partition(model: RBM, *, chunk_size: int = 4096) -> Callable[[Params], Float[Array, ""]]:
    """Build log Z as the sum over all states of the smaller side, the other summed in closed form.

    Args:
        model: an `RBM` with at most 20 units on one side.
        chunk_size: how many states are held at a time.

    Returns:
        `(params) -> []`, nats; differentiable.

    Raises:
        ValueError: if both sides have more than 20 units.
    """
    num_visible = math.prod(model.shape)
    num_units = min(num_visible, model.num_hidden)
    if num_units > MAX_UNITS:
        raise ValueError(
            f"model: got {num_visible} visible and {model.num_hidden} hidden units, expected at most {MAX_UNITS} on "
            "one side; use annealed_log_partition and reverse_log_partition"
        )
    is_hidden = num_units == model.num_hidden
    of_one = model.hidden_free_energy if is_hidden else model.free_energy
    shape = (num_units,) if is_hidden else model.shape
    size = 2**num_units
    chunk_size = min(chunk_size, size)
    num_chunks = -(-size // chunk_size)

    def log_partition(params: Params) -> Float[Array, ""]:
        def of_state(state: Array) -> Float[Array, ""]:
            bits = (state >> jnp.arange(num_units)) & 1
            return jnp.where(state < size, -of_one(params, bits.reshape(shape)), -jnp.inf)

        def of_chunk(log_sum: Array, i: Array) -> tuple[Array, None]:
            terms = jax.vmap(of_state)(i * chunk_size + jnp.arange(chunk_size))
            return jnp.logaddexp(log_sum, jax.nn.logsumexp(terms)), None

        first, _ = of_chunk(jnp.full((), -jnp.inf), jnp.int32(0))
        return jax.lax.scan(jax.checkpoint(of_chunk), first, jnp.arange(1, num_chunks))[0]

    return log_partition


def normalized_log_prob(model: RBM, log_z: ArrayLike) -> Callable[[Key, Params, Array], Float[Array, ""]]:
    """Build log p(x) = - F(x) - log Z of parameters whose log Z is known.

    Args:
        model: an `RBM`.
        log_z: log Z of the very parameters that it will be called with, nats.

    Returns:
        `(key, params, x) -> []`, nats; key is unused, so that it goes where `importance_log_prob` goes.
    """
    return lambda key, params, x: -model.free_energy(params, x) - log_z


def _pairs(betas: ArrayLike) -> tuple[Array, Array]:
    betas = np.asarray(betas, np.float64)
    if betas.ndim != 1 or len(betas) < 2 or betas[0] != 0 or betas[-1] != 1 or np.any(np.diff(betas) <= 0):
        raise ValueError(
            f"betas: got {np.array2string(betas, threshold=6, edgeitems=2)}, expected numbers that rise from 0 to 1; "
            "use np.linspace(0, 1, 1001)"
        )
    return jnp.asarray(betas[:-1], jnp.float32), jnp.asarray(betas[1:], jnp.float32)


def _base(model: RBM, base_bias: ArrayLike) -> Params:
    visible = jnp.broadcast_to(jnp.asarray(base_bias, jnp.float32), model.shape)
    weight = jnp.zeros((visible.size, model.num_hidden))
    return Params(theta={"weight": weight, "visible": visible, "hidden": jnp.zeros(model.num_hidden)})


def _base_log_partition(base: Params) -> Float[Array, ""]:
    return sum(jnp.sum(jax.nn.softplus(base.theta[side])) for side in ("visible", "hidden"))


def _between(base: PyTree, params: PyTree, beta: Array) -> PyTree:
    return jax.tree.map(lambda one, other: (1.0 - beta) * one + beta * other, base, params)


def _log_ratio(
    model: RBM, base: Params, params: Params, x: Array, before: Array, after: Array
) -> Float[Array, ""]:
    """Take log p*(x) at one temperature less that at another, nats."""
    energies = (model.free_energy(_between(base, params, beta), x) for beta in (before, after))
    return next(energies) - next(energies)


def _log_mean_exp(log_w: Float[Array, " N"]) -> tuple[Array, Array, Array]:
    """Average weights: log of the mean, its standard error by the delta method, the effective number."""
    num, top = len(log_w), jnp.max(log_w)
    w = jnp.exp(log_w - top)
    first, second = jnp.sum(w), jnp.sum(jnp.square(w))
    inverse_ess = second / jnp.square(first)
    spread = jnp.maximum(inverse_ess - 1.0 / num, 0.0)
    value = top + jnp.log(first) - math.log(num)
    return value, jnp.sqrt(spread * (num / (num - 1))), 1.0 / inverse_ess
