"""Discrete draws through perturbed logits, leaf by leaf: what relaxed and control-variate estimators start from."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vdiff.relaxations import Relaxation, key_per_leaf
from vdiff.types import Key, ModelLike, Params, PyTree, check_key, is_discrete

Logits = Callable[[Params, PyTree], PyTree]
"""`(params, x) -> l`: the logits of q(z | x), in the shapes of z; given x, z's elements are independent."""


def checked_logits(
    model: ModelLike, logits: Logits, key: Key, params: Params, x: PyTree, name: str
) -> PyTree:
    """Evaluate q's logits and see that they belong to the model's z.

    Args:
        model: whose `sample_q` tells the leaves of z; it is traced, not run.
        logits: `(params, x) -> ` logits of q.
        key: a typed key.
        params: the model's parameters.
        x: one datum.
        name: of the estimator, for the messages.

    Returns:
        The logits, a tree of z's leaves and shapes.

    Raises:
        TypeError: if `key` is not a typed key, z is not discrete, or the logits have not its leaves and shapes.
    """
    z = jax.eval_shape(model.sample_q, check_key(key), params, x)
    leaves = jax.tree.leaves(z)
    if not leaves or not all(is_discrete(leaf) for leaf in leaves):
        raise TypeError(
            f"z: got {'a continuous leaf' if leaves else 'no leaf'}, expected discrete ones only for {name}; use "
            "pathwise(model, bound, num_samples), or mixed(model, log_q_discrete, bound, num_samples) where z has both"
        )
    found = jax.tree.map(jnp.asarray, logits(params, x))
    shapes, expected = (jax.tree.map(lambda leaf: leaf.shape, tree) for tree in (found, z))
    if jax.tree.structure(found) != jax.tree.structure(z) or shapes != expected:
        raise TypeError(
            f"logits: got leaves of shapes {shapes}, expected those of z, {expected}, for {name}; write categories "
            "one-hot, or use score_function(model, bound, num_samples)"
        )
    return found


def perturb(relaxation: Relaxation, key: Key, logits: PyTree, num_samples: int) -> PyTree:
    """Draw y_1..y_K, K leading every leaf."""

    def leaf(key: Key, logits: Array) -> Array:
        keys = jax.random.split(key, num_samples)
        return jax.vmap(relaxation.perturb, in_axes=(0, None))(keys, logits)

    return jax.tree.map(leaf, key_per_leaf(key, logits), logits)


def condition(relaxation: Relaxation, key: Key, logits: PyTree, z: PyTree, num_samples: int) -> PyTree:
    """Draw y_k given z_k, K leading every leaf; the key must not be the one that drew z."""

    def leaf(key: Key, logits: Array, z: Array) -> Array:
        keys = jax.random.split(key, num_samples)
        return jax.vmap(relaxation.condition, in_axes=(0, None, 0))(keys, logits, z)

    return jax.tree.map(leaf, key_per_leaf(key, logits), logits, z)


def log_probs(relaxation: Relaxation, logits: PyTree, z: PyTree) -> Float[Array, " K"]:
    """Evaluate log q(z_k), summed over the leaves, [K] nats."""
    by_leaf = jax.tree.map(jax.vmap(relaxation.log_prob, in_axes=(None, 0)), logits, z)
    return sum(jax.tree.leaves(by_leaf))
