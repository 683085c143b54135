r"""The whole path judged: every step of a chain, or a lattice of times, in one scan.

    u_i = (i + u_0) / n,  i = 0..n-1,   u_0 ~ U[0, 1)

With n a multiple of a chain's m - 1 steps each step is visited equally often, and the sum over steps is that of
the ELBO; in continuous time the lattice is an unbiased quadrature.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vdiff.diffusion.model import Diffusion, Rate
from vdiff.types import Key, Params, PyTree, Terms, check_key


class PathElbo(NamedTuple):
    """Hold an ELBO whose diffusion term was summed over the path.

    Attributes:
        terms: "prior", "reconstruction" and "diffusion", nats.
        value: their sum.
        std_error: its standard error over the sweeps, nats.
    """

    terms: Terms
    value: Float[Array, "..."]
    std_error: Float[Array, "..."]


def rates(diffusion: Diffusion, num_times: int) -> Callable[[Key, Params, PyTree], Rate]:
    """Draw the diffusion term at every time of a lattice.

    Args:
        diffusion: the model.
        num_times: n, a multiple of a chain's m - 1 steps.

    Returns:
        `(key, params, x) -> Rate` with leaves [n], from the data's end to the noise's; the mean of its values estimates
        the term, and value * density is the rate, nats per unit of log-SNR.

    Raises:
        ValueError: if `num_times` is less than one.
    """
    if num_times < 1:
        raise ValueError(f"num_times: got {num_times}, expected at least 1")

    def draw(key: Key, params: Params, x: PyTree) -> Rate:
        key_start, key_rates = jax.random.split(check_key(key))
        start = jax.random.uniform(key_start)

        def at(i: Array) -> Rate:
            # Rounding must not carry the last time to one.
            u = jnp.minimum((i.astype(jnp.float32) + start) / num_times, jnp.nextafter(jnp.float32(1), 0))
            return diffusion.rate_at(jax.random.fold_in(key_rates, i), params, x, u)

        return jax.lax.map(at, jnp.arange(num_times))

    return draw


def path_elbo(
    diffusion: Diffusion, num_times: int, num_sweeps: int = 2
) -> Callable[[Key, Params, PyTree], PathElbo]:
    """Build the ELBO with its diffusion term summed over the path, for evaluation.

    Args:
        diffusion: the model.
        num_times: times in a sweep, a multiple of a chain's m - 1 steps.
        num_sweeps: independent sweeps, over which the standard error is taken; each draws z_1 once.

    Returns:
        `(key, params, x) -> PathElbo` of one datum, nats; std_error is infinite for one sweep.

    Raises:
        ValueError: if `num_times` or `num_sweeps` is less than one.
    """
    if num_sweeps < 1:
        raise ValueError(f"num_sweeps: got {num_sweeps}, expected at least 1")
    along = rates(diffusion, num_times)

    def estimate(key: Key, params: Params, x: PyTree) -> PathElbo:
        def sweep(key: Key) -> Terms:
            key_ends, key_rates = jax.random.split(key)
            diffusion_term = jnp.mean(along(key_rates, params, x).value)
            return {**diffusion.end_terms(key_ends, params, x), "diffusion": diffusion_term}

        sweeps = jax.vmap(sweep)(jax.random.split(check_key(key), num_sweeps))
        values = sum(sweeps.values())
        if num_sweeps == 1:
            std_error = jnp.full((), jnp.inf)
        else:
            std_error = jnp.std(values, ddof=1) / math.sqrt(num_sweeps)
        return PathElbo(jax.tree.map(jnp.mean, sweeps), jnp.mean(values), std_error)

    return estimate
