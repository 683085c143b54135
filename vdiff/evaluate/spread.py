r"""How wide q(z | x) is, number by number of z: the units in which a Markov chain takes its steps.

    s_i(x) = sqrt( 1/(K-1) sum_k (z_ki - mean_i)^2 ),    z_1..z_K ~ q(z | x)

One length of a step serves all of z where z is measured in s: `hmc` of a step size h in these units is `hmc` with the
diagonal mass matrix 1 / s^2 in those of z.

Source: Neal, MCMC Using Hamiltonian Dynamics, 2011, 4.1.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from vdiff.evaluate.transitions import LogDensity, Transition
from vdiff.types import Key, ModelLike, Params, PyTree, check_key, is_discrete, q_at

Spread = Callable[[Params, PyTree], PyTree]
"""A function `(params, x) -> s`, positive numbers like z."""


def spread_of_q(model: ModelLike, key: Key, num_samples: int = 64) -> Spread:
    """Build the standard deviations of q(z | x), estimated by draws that are the same at each call.

        moves = evaluate.hmc(0.3, 5)
        estimate = evaluate.annealed_log_prob(model, moves, 300, units=evaluate.spread_of_q(model, jax.random.key(1)))

    A latent that is drawn given others has its marginal spread, wider than given them.

    Args:
        model: any `Model` whose z is floating point.
        key: a typed key, of the draws; another one than the chains', which must not start at these draws.
        num_samples: K, at least 2.

    Returns:
        `(params, x) -> s` of one datum, like z, positive: where the draws are all the same it is one.

    Raises:
        TypeError: if `key` is not a typed key; at trace time, if z has a leaf that is not floating point.
        ValueError: if `num_samples` is less than two.
    """
    if num_samples < 2:
        raise ValueError(f"num_samples: got {num_samples}, expected at least 2, for a standard deviation")
    keys = jax.random.split(check_key(key), num_samples)

    def spread(params: Params, x: PyTree) -> PyTree:
        z = jax.vmap(q_at(model, params, x).sample)(keys)
        if is_discrete(z):
            raise TypeError(
                "model: got a z with a leaf that is not floating point, expected one that has a spread"
            )
        # Less the first of them, draws that are all the same are zero, and so is their deviation, to the last bit.
        deviations = jax.tree.map(lambda leaf: jnp.std(leaf - leaf[:1], axis=0, ddof=1), z)
        return jax.tree.map(lambda s: jnp.where(s == 0, 1.0, s), deviations)

    return spread


def in_units(transition: Transition, units: Spread | None) -> Callable[[Params, PyTree], Transition]:
    """Build the transition that moves z / s of a datum, which leaves invariant what `transition` does.

    Args:
        transition: `(key, log_density, z) -> z`.
        units: `(params, x) -> s`; None for z itself.

    Returns:
        `(params, x) -> Transition`, s computed once for all its steps.

    Raises:
        ValueError: at trace time of the transition, if s is not like z.
    """
    if units is None:
        return lambda params, x: transition

    def at(params: Params, x: PyTree) -> Transition:
        s = units(params, x)

        def scaled(u: PyTree) -> PyTree:
            return jax.tree.map(jnp.multiply, u, s)

        def moved(key: Key, log_density: LogDensity, z: PyTree) -> PyTree:
            got, expected = (jax.tree.map(jnp.shape, tree) for tree in (s, z))
            if got != expected:
                raise ValueError(
                    f"units: got shapes {got}, expected those of z, {expected}; use spread_of_q(model, key)"
                )
            u = jax.tree.map(jnp.divide, z, s)
            return scaled(transition(key, lambda u: log_density(scaled(u)), u))

        return moved

    return at
