r"""Discrete draws as functions of noise: what lets a derivative pass where z itself has none.

A discrete z with logits l is a hard function of perturbed logits y = T(eps, l), a soft function of
the same y is differentiable, and y given z can be drawn again:

    bernoulli    y = l + Logistic(0, 1)       z = [y > 0]               soft: sigmoid(y / temperature)
    one_hot      y = l + Gumbel(0, 1)         z = one-hot argmax y      soft: softmax(y / temperature)

A soft value tends to z as the temperature tends to zero. Everything is of one leaf of z, of the shape of its
logits; z is written in floats, so that `log_joint` must accept floats where z has zeros and ones. The perturbed
logits of `one_hot` move with a constant added to l, though neither z nor its soft copy does.

Source: Maddison, Mnih and Teh, The Concrete Distribution, 2017; Jang, Gu and Poole, Categorical
Reparameterization with Gumbel-Softmax, 2017; Tucker et al., REBAR, 2017, appendix C (y given z).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient
from jax.scipy.special import logsumexp
from jax.typing import ArrayLike
from jaxtyping import Array

from vdiff.densities import bernoulli_log_prob
from vdiff.types import Key, PyTree


class Relaxation(NamedTuple):
    """Hold the ways between a discrete leaf z, its logits l and the perturbed logits y, all of one shape.

    Attributes:
        perturb: `(key, l) -> y`, differentiable in l.
        harden: `(y) -> z`, zeros and ones in floats.
        soften: `(y, temperature) -> z`, between zero and one.
        condition: `(key, l, z) -> y` drawn from p(y | z), differentiable in l; its key is not the one that drew z.
        log_prob: `(l, z) -> []`, log p(z), nats, summed over the leaf; for a soft z its linear extension.
        log_density: `(l, y) -> []`, log p(y), nats, summed over the leaf.
    """

    perturb: Callable[[Key, Array], Array]
    harden: Callable[[Array], Array]
    soften: Callable[[Array, ArrayLike], Array]
    condition: Callable[[Key, Array, Array], Array]
    log_prob: Callable[[Array, Array], Array]
    log_density: Callable[[Array, Array], Array]


def key_per_leaf(key: Key, tree: PyTree) -> PyTree:
    """Split a key into a tree of keys, one a leaf."""
    leaves, treedef = jax.tree.flatten(tree)
    return jax.tree.unflatten(treedef, list(jax.random.split(key, len(leaves))))


def check_temperature(temperature: ArrayLike) -> None:
    """Refuse a temperature that is not positive; a traced one cannot be looked at.

    Raises:
        ValueError: if the temperature is a Python number that is not positive.
    """
    if isinstance(temperature, int | float) and not temperature > 0:
        raise ValueError(
            f"temperature: got {temperature}, expected a positive number; a soft draw tends to the hard one as it "
            "falls to zero, 0.5 is a fair start"
        )


def _condition_bernoulli(key: Key, logits: Array, z: Array) -> Array:
    """Draw y given its sign: log (1 + v e^l) - log (1 - v) for z = 1, and its mirror image for z = 0."""
    v = _open_uniform(key, logits)
    sign = 2.0 * z - 1.0
    return sign * (jax.nn.softplus(sign * logits + jnp.log(v)) - jnp.log1p(-v))


def _condition_one_hot(key: Key, logits: Array, z: Array) -> Array:
    """Draw y given where its largest element stands: that one first, the others -log(e^-y + e^-top), below it."""
    key_top, key_rest = jax.random.split(key)
    total = logsumexp(logits, axis=-1, keepdims=True)
    top = total + jax.random.gumbel(key_top, total.shape, logits.dtype)
    free = logits + jax.random.gumbel(key_rest, logits.shape, logits.dtype)
    # Where a free draw is far above the top, the distance to it rounds to nothing: keep them apart.
    least = 2.0 * jnp.finfo(logits.dtype).eps * (1.0 + jnp.abs(stop_gradient(top)))
    return jnp.where(z > 0, top, top - jnp.maximum(jax.nn.softplus(top - free), least))


def _open_uniform(key: Key, like: Array) -> Array:
    """Draw from U(0, 1) without its ends."""
    info = jnp.finfo(like.dtype)
    return jax.random.uniform(key, like.shape, like.dtype, minval=info.tiny, maxval=1.0 - info.epsneg)


def _logistic_log_density(logits: Array, y: Array) -> Array:
    return jnp.sum(jax.nn.log_sigmoid(y - logits) + jax.nn.log_sigmoid(logits - y))


def _gumbel_log_density(logits: Array, y: Array) -> Array:
    return jnp.sum(logits - y - jnp.exp(logits - y))


bernoulli = Relaxation(
    perturb=lambda key, logits: logits + jax.random.logistic(key, logits.shape, logits.dtype),
    harden=lambda y: (y > 0).astype(y.dtype),
    soften=lambda y, temperature: jax.nn.sigmoid(y / temperature),
    condition=_condition_bernoulli,
    log_prob=lambda logits, z: jnp.sum(bernoulli_log_prob(z, logits)),
    log_density=_logistic_log_density,
)
"""Independent bits: z of zeros and ones."""

one_hot = Relaxation(
    perturb=lambda key, logits: logits + jax.random.gumbel(key, logits.shape, logits.dtype),
    harden=lambda y: jax.nn.one_hot(jnp.argmax(y, axis=-1), y.shape[-1], dtype=y.dtype),
    soften=lambda y, temperature: jax.nn.softmax(y / temperature),
    condition=_condition_one_hot,
    log_prob=lambda logits, z: jnp.sum(z.astype(logits.dtype) * jax.nn.log_softmax(logits)),
    log_density=_gumbel_log_density,
)
"""Independent categories on the last axis: z one-hot."""
