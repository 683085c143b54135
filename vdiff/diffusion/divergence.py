r"""The divergence of a vector field, exactly or by random probes.

    div f = sum_i d f_i / d z_i = sum_i e_i . J e_i              exact: d tangents
          = E[v . J v],   E[v v^T] = I                           Hutchinson: as many tangents as probes

J is linearised once and the tangents are pushed through it: the field is evaluated once, whatever the number of them.

Source: Hutchinson, A Stochastic Estimator of the Trace of the Influence Matrix, 1990; Grathwohl et al., FFJORD, 2019
(probes fixed along a path).
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vdiff.types import Key, check_key

Traced = Callable[[Callable[[Array], Array], Array], tuple[Array, Array]]
"""`(f, z) -> (f(z), div f(z) [])`."""

Divergence = Callable[[Key, tuple[int, ...]], Traced]
"""`(key, shape of z) -> Traced`: what is random is drawn once, and then fixed along a path."""


def exact_divergence(chunk_size: int = 64) -> Divergence:
    """Build the exact divergence, the trace of the Jacobian by one tangent per dimension; z of any shape.

    Args:
        chunk_size: how many tangents are pushed at once, per datum: memory for time.

    Returns:
        A `Divergence` that leaves its key alone.

    Raises:
        ValueError: if `chunk_size` is less than one.
    """
    if chunk_size < 1:
        raise ValueError(f"chunk_size: got {chunk_size}, expected at least 1")

    def prepare(key: Key, shape: tuple[int, ...]) -> Traced:
        check_key(key)
        num_dims = math.prod(shape)
        size = min(chunk_size, num_dims)
        num_chunks = -(-num_dims // size)

        def traced(f: Callable[[Array], Array], z: Float[Array, "*n"]) -> tuple[Array, Array]:
            value, push = jax.linearize(f, z)

            def diagonal(i: Array) -> Array:
                # Past the last dimension the one-hot vector is zero, and so is what it adds.
                basis = jax.nn.one_hot(i, num_dims, dtype=z.dtype).reshape(shape)
                return jnp.sum(basis * push(basis))

            def chunk(i: Array) -> Array:
                return jnp.sum(jax.vmap(diagonal)(i))

            chunks = jnp.arange(num_chunks * size).reshape(num_chunks, size)
            return value, jnp.sum(jax.lax.map(chunk, chunks))

        return traced

    return prepare


def hutchinson(num_probes: int = 1) -> Divergence:
    """Build the mean of v . J v over probes v whose entries are +1 or -1: unbiased.

    Its variance is 2 / num_probes times the sum of the squares of the off-diagonal entries of J's symmetric part
    (twice each pair): none where dimensions do not interact.

    Args:
        num_probes: how many, independent of each other.

    Returns:
        A `Divergence`.

    Raises:
        ValueError: if `num_probes` is less than one.
    """
    if num_probes < 1:
        raise ValueError(f"num_probes: got {num_probes}, expected at least 1")

    def prepare(key: Key, shape: tuple[int, ...]) -> Traced:
        probes = jax.random.rademacher(check_key(key), (num_probes, *shape), jnp.float32)

        def traced(f: Callable[[Array], Array], z: Float[Array, "*n"]) -> tuple[Array, Array]:
            value, push = jax.linearize(f, z)
            v = probes.astype(z.dtype)
            return value, jnp.sum(v * jax.vmap(push)(v)) / num_probes

        return traced

    return prepare
