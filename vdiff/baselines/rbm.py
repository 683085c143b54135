r"""The restricted Boltzmann machine: bits that see, bits that are hidden, and no edge within a side.

    p(x, h) = exp(- E(x, h)) / Z,     E(x, h) = - b . x - c . h - x W h,     x and h bits
    p*(x) = sum_h exp(- E(x, h)) = exp(- F(x)),      F(x) = - b . x - sum_j softplus(c_j + (x W)_j)
    h_j | x ~ Bernoulli(sigmoid((c + x W)_j)),       x_i | h ~ Bernoulli(sigmoid((b + W h)_i))

Given one side the units of the other are independent, so that a sweep of Gibbs' sampler draws a whole side at once. Z
is a sum over all states of a side, so that log p(x) = - F(x) - log Z has to be estimated (`log_partition`), and this
is no `Model`: it draws a pair (x, h) by a chain and not from the top down.

Source: Smolensky, Information Processing in Dynamical Systems, 1986; Hinton, A Practical Guide to Training Restricted
Boltzmann Machines, 2012.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from vdiff.types import Key, Params, check_key


class RBM(NamedTuple):
    """Hold a restricted Boltzmann machine as pure functions of ONE datum.

    `params.theta` is {"weight": [num_visible, num_hidden], "visible": [*shape], "hidden": [num_hidden]}.

    Attributes:
        init: `(key) -> Params`.
        free_energy: `(params, x) -> []`, F(x) = - log p*(x), nats up to log Z.
        hidden_free_energy: `(params, h) -> []`, the same of the other side, - log sum_x exp(- E(x, h)).
        hidden_logits: `(params, x) -> [num_hidden]`, those of p(h | x).
        visible_logits: `(params, h) -> [*shape]`, those of p(x | h).
        sweep: `(key, params, x) -> x`, a draw of h given x, then of x given h; leaves p(x) as it is, and is its own
            reversal. x keeps its dtype.
        sample: `(key, params) -> (x, h)`, the end of a long chain: int32 [*shape] and bool [num_hidden].
        shape: of x.
        num_hidden: how many bits are hidden.
    """

    init: Callable[[Key], Params]
    free_energy: Callable[[Params, Array], Array]
    hidden_free_energy: Callable[[Params, Array], Array]
    hidden_logits: Callable[[Params, Array], Array]
    visible_logits: Callable[[Params, Array], Array]
    sweep: Callable[[Key, Params, Array], Array]
    sample: Callable[[Key, Params], tuple[Array, Array]]
    shape: tuple[int, ...]
    num_hidden: int


def rbm(
    shape: tuple[int, ...],
    num_hidden: int,
    *,
    visible_bias: ArrayLike = 0.0,
    init_scale: float = 0.1,
    num_steps: int = 1000,
) -> RBM:
    """Build a restricted Boltzmann machine.

    Args:
        shape: of x, e.g. (28, 28, 1).
        num_hidden: how many bits are hidden.
        visible_bias: where b starts, [*shape] or a number; the logit of each pixel's mean is a good start.
        init_scale: standard deviation of the weights at the start; c starts at zero. Far smaller ones are slow to part,
            since all hidden bits then get the same noise of the pixels' means, which Adam scales up.
        num_steps: length of the chain behind `sample`, which starts from independent pixels with the logits b.

    Returns:
        An `RBM`.

    Raises:
        ValueError: if a size or `num_steps` is less than one.
    """
    num_visible = math.prod(shape)
    for name, size in {"shape": num_visible, "num_hidden": num_hidden, "num_steps": num_steps}.items():
        if size < 1:
            raise ValueError(f"{name}: got {size}, expected at least 1")

    def init(key: Key) -> Params:
        weight = init_scale * jax.random.normal(check_key(key), (num_visible, num_hidden))
        visible = jnp.broadcast_to(jnp.asarray(visible_bias, jnp.float32), shape)
        return Params(theta={"weight": weight, "visible": visible, "hidden": jnp.zeros(num_hidden)})

    def hidden_logits(params: Params, x: Array) -> Float[Array, " num_hidden"]:
        return params.theta["hidden"] + x.ravel().astype(jnp.float32) @ params.theta["weight"]

    def visible_logits(params: Params, h: Array) -> Float[Array, "..."]:
        return params.theta["visible"] + (params.theta["weight"] @ h.astype(jnp.float32)).reshape(shape)

    def free_energy(params: Params, x: Array) -> Float[Array, ""]:
        of_x = jnp.sum(params.theta["visible"] * x.astype(jnp.float32))
        return -of_x - jnp.sum(jax.nn.softplus(hidden_logits(params, x)))

    def hidden_free_energy(params: Params, h: Array) -> Float[Array, ""]:
        of_h = jnp.sum(params.theta["hidden"] * h.astype(jnp.float32))
        return -of_h - jnp.sum(jax.nn.softplus(visible_logits(params, h)))

    def sweep(key: Key, params: Params, x: Array) -> Array:
        key_h, key_x = jax.random.split(check_key(key))
        h = _draw(key_h, hidden_logits(params, x))
        return _draw(key_x, visible_logits(params, h)).astype(x.dtype)

    def sample(key: Key, params: Params) -> tuple[Array, Array]:
        key_start, key_chain, key_h = jax.random.split(check_key(key), 3)
        start = _draw(key_start, params.theta["visible"]).astype(jnp.int32)
        x = gibbs(model, num_steps)(key_chain, params, start)
        return x, _draw(key_h, hidden_logits(params, x))

    model = RBM(
        *(init, free_energy, hidden_free_energy, hidden_logits, visible_logits, sweep, sample),
        tuple(shape),
        num_hidden,
    )
    return model


def gibbs(model: RBM, num_steps: int) -> Callable[[Key, Params, Array], Array]:
    """Run a chain of `model.sweep` by a scan.

    Args:
        model: an `RBM`.
        num_steps: how long.

    Returns:
        `(key, params, x) -> x`, the chain's end.

    Raises:
        ValueError: if `num_steps` is less than one.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps: got {num_steps}, expected at least 1")

    def chain(key: Key, params: Params, x: Array) -> Array:
        step = lambda x, key: (model.sweep(key, params, x), None)  # noqa: E731
        return jax.lax.scan(step, x, jax.random.split(check_key(key), num_steps))[0]

    return chain


def _draw(key: Key, logits: Array) -> Array:
    return jax.random.bernoulli(key, jax.nn.sigmoid(logits))
