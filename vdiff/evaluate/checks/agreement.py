r"""Samplers held against densities: the statistics of `statistics`, averaged over what a model draws.

    z ~ sample_q(x)    against log_q(x, z);  its gradient, and the sum of elbo_terms, against log_joint - log_q
    (x, z) ~ sample    against log_joint(x, z)

Compiled once per model, whatever the key and the parameters; memory does not grow with the number of draws.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array

from vdiff.evaluate.checks.reference import Joint, Reference
from vdiff.evaluate.checks.statistics import Moments, identities, moments, pathwise_difference
from vdiff.types import Key, ModelLike, Params, PyTree

FLOATS_AT_ONCE = 2**22
NUM_MOVED = 20
MANY_PARAMETERS = 20_000
NUM_BLOCKS = 100


@functools.partial(jax.jit, static_argnums=(0, 1, 5))
def pilot_draws(
    model: ModelLike, sound: frozenset[str], key: Key, params: Params, x: PyTree, num_draws: int
) -> dict[str, PyTree]:
    """Draw a sample to look at first.

    Args:
        model: any `Model`.
        sound: the names of its functions that may be called.
        key: a typed key.
        params: its parameters.
        x: one datum.
        num_draws: N.

    Returns:
        Trees of [N, ...] as far as the functions are sound: "joint", a `Joint` from `sample`; "given", z at x;
        "sampled", z at the first x of the joint.
    """
    key_joint, key_given, key_sampled = (jax.random.split(k, num_draws) for k in jax.random.split(key, 3))
    draw_z, draws = jax.vmap(model.sample_q, in_axes=(0, None, None)), {}
    if "sample_q" in sound:
        draws["given"] = draw_z(key_given, params, x)
    if "sample" in sound:
        draws["joint"] = Joint(*jax.vmap(model.sample, in_axes=(0, None))(key_joint, params))
    if {"sample_q", "sample"} <= sound:
        draws["sampled"] = draw_z(key_sampled, params, jax.tree.map(lambda leaf: leaf[0], draws["joint"].x))
    return draws


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def q_moments(
    model: ModelLike,
    terms: Callable | None,
    num_draws: int,
    key: Key,
    params: Params,
    learned: PyTree,
    x: PyTree,
    reference: Reference,
    loc_and_scale: tuple[PyTree, PyTree] | None,
    unit: float | Array,
) -> Moments:
    """Hold sample_q against log_q at one x.

    Args:
        model: any `Model`.
        terms: its elbo_terms, to be held against log_joint - log_q; None not to.
        num_draws: N.
        key: a typed key.
        params: its parameters.
        learned: the leaves of params that log_q reads, None in place of the others.
        x: one datum.
        reference: fitted to draws `Joint((), z)`.
        loc_and_scale: of z, to compare the gradients of its law; None not to.
        unit: nats, by which the difference of the terms is divided.

    Returns:
        The moments of `identities`, and of "pathwise" and "elbo_terms" where asked for.
    """

    def log_q(params: Params, z: PyTree) -> Array:
        return model.log_q(params, x, z)

    def log_density(params: Params, y: Joint) -> Array:
        return log_q(params, y.z)

    def draw_z(key: Key, params: Params) -> PyTree:
        return model.sample_q(key, params, x)

    def terms_less_log_weight(key: Key, z: PyTree) -> Array:
        log_weight = model.log_joint(params, x, z) - model.log_q(params, x, z)
        return (sum(terms(key, params, x).values()) - log_weight) / unit

    def statistic(keys: Key) -> dict[str, PyTree]:
        keys_z, keys_identities, keys_terms = _split_each(keys, 3)
        z = jax.vmap(draw_z, in_axes=(0, None))(keys_z, params)
        out = identities(keys_identities, log_density, params, learned, Joint((), z), reference)
        if loc_and_scale is not None:
            out["pathwise"] = pathwise_difference(keys_z, draw_z, log_q, params, learned, *loc_and_scale)
        if terms is not None:
            out["elbo_terms"] = jnp.mean(jax.vmap(terms_less_log_weight)(keys_terms, z))
        return out

    sizes = _sizes(learned, jax.eval_shape(draw_z, key, params), num_draws)
    return moments(statistic, key, num_draws, *sizes)


@functools.partial(jax.jit, static_argnums=(0, 1))
def joint_moments(
    model: ModelLike, num_draws: int, key: Key, params: Params, learned: PyTree, reference: Reference
) -> Moments:
    """Hold sample against log_joint.

    Args:
        model: any `Model`.
        num_draws: N.
        key: a typed key.
        params: its parameters.
        learned: the leaves of params that log_joint reads, None in place of the others.
        reference: fitted to draws `Joint(x, z)`.

    Returns:
        The moments of `identities`.
    """

    def log_density(params: Params, y: Joint) -> Array:
        return model.log_joint(params, y.x, y.z)

    def draw(key: Key) -> Joint:
        return Joint(*model.sample(key, params))

    def statistic(keys: Key) -> dict[str, PyTree]:
        keys_y, keys_identities = _split_each(keys, 2)
        return identities(keys_identities, log_density, params, learned, jax.vmap(draw)(keys_y), reference)

    return moments(statistic, key, num_draws, *_sizes(learned, jax.eval_shape(draw, key), num_draws))


def _split_each(keys: Key, num: int) -> Key:
    """Split each of B keys, [num, B]."""
    return jax.vmap(lambda key: jax.random.split(key, num), out_axes=1)(keys)


def _sizes(learned: PyTree, y: PyTree, num_draws: int) -> tuple[int, int]:
    """Return how many blocks of draws fit into memory, and how many draws make a block with one gradient.

    Each block has a gradient, and each draw a y of its own for each move.
    """
    size = sum(leaf.size for leaf in jax.tree.leaves(learned))
    size_of_draw = NUM_MOVED * sum(leaf.size for leaf in jax.tree.leaves(y))
    block_size = 1
    if size > MANY_PARAMETERS:
        block_size = max(1, min(num_draws // NUM_BLOCKS, FLOATS_AT_ONCE // (size_of_draw + 1)))
    size += block_size * size_of_draw
    return max(1, min(100, FLOATS_AT_ONCE // (size + 1))), block_size
