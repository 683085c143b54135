r"""The gradient of a batch, in one pass or in parts, on one device or as one device's share of a batch.

    loss   = - combine(m),     m = mean over the GLOBAL batch of the terms
    grad   = sum_k  c_k  grad m_k,     c = d loss / d m

Written so, no derivative goes through a mean over devices, and a part needs to know of the others only c. Every part's
data keep the keys of their positions, so that parts change nothing but rounding.
"""

from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vdiff.types import Params, PyTree, Terms

PerDatum = Callable[[Params, PyTree, Int[Array, " B"], PyTree], tuple[Terms, PyTree]]


class Gradient(NamedTuple):
    """Hold what a batch says.

    Attributes:
        grads: of the loss by params; of a device's share of the batch, the whole batch's is the mean over devices.
        terms: the mean terms of the whole batch.
        aux: the state's aux after this batch, of the device's share.
    """

    grads: Params
    terms: Terms
    aux: PyTree


def batch_gradient(
    per_datum: PerDatum,
    combine: Callable[[Terms], Float[Array, ""]],
    num_parts: int,
    mean_over_devices: Callable[[Terms], Terms],
) -> Callable[[Params, PyTree, Int[Array, " B"], PyTree], Gradient]:
    """Make the function that takes a batch's gradient, part after part.

    The activations of one part are held at a time. Where `combine` is nonlinear and there are several parts, c is known
    only after all data were seen: they are gone through twice. The compiler drops the first round where it is linear.

    Args:
        per_datum: `(params, batch [B, ...], positions [B], aux) -> (terms, each [B]; aux)`.
        combine: `(mean Terms over the batch) -> []`, what is raised.
        num_parts: into how many parts a batch is cut, one after another; aux, one slot per position, likewise.
        mean_over_devices: the mean of terms over the devices that share a batch.

    Returns:
        `(params, batch [B, ...], positions [B], aux) -> Gradient`.
    """

    def mean_terms(params: Params, part: tuple) -> tuple[Terms, PyTree]:
        batch, positions, aux = part
        terms, aux = per_datum(params, batch, positions, aux)
        chex.assert_shape(list(terms.values()), positions.shape)
        return jax.tree.map(jnp.mean, terms), aux

    def loss(terms: Terms) -> Float[Array, ""]:
        return -combine(terms)

    def gradient(params: Params, batch: PyTree, positions: Int[Array, " B"], aux: PyTree) -> Gradient:
        whole = (batch, positions, aux)
        if num_parts == 1:
            terms, pull, aux = jax.vjp(lambda params: mean_terms(params, whole), params, has_aux=True)
            terms = mean_over_devices(terms)
            return Gradient(*pull(jax.grad(loss)(terms)), terms, aux)

        parts = jax.tree.map(lambda leaf: leaf.reshape(num_parts, -1, *leaf.shape[1:]), whole)
        _, every = jax.lax.scan(lambda carry, part: (carry, mean_terms(params, part)[0]), (), parts)
        weights = jax.grad(loss)(mean_over_devices(jax.tree.map(jnp.mean, every)))

        def add(sums: PyTree, part: tuple) -> tuple[PyTree, PyTree]:
            terms, pull, aux = jax.vjp(lambda params: mean_terms(params, part), params, has_aux=True)
            return jax.tree.map(jnp.add, sums, (*pull(weights), terms)), aux

        shapes = jax.eval_shape(lambda: (params, jax.tree.map(lambda leaf: leaf[0], every)))
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        sums, aux = jax.lax.scan(add, zeros, parts)
        grads, terms = jax.tree.map(lambda leaf: leaf / jnp.asarray(num_parts, leaf.dtype), sums)
        aux = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), aux)
        return Gradient(grads, mean_over_devices(terms), aux)

    return gradient
