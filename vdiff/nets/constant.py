"""An array that is learned: a network without an input, such as the start of a path."""

from collections.abc import Sequence

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array

from vdiff.types import Key, Network, check_key


def constant(shape: Sequence[int], *, value: ArrayLike = 0.0) -> Network:
    """Build a learned array.

    Args:
        shape: of the array.
        value: where it starts, broadcast to `shape`.

    Returns:
        A `Network` with `apply(params) -> [*shape]`.
    """

    def init(key: Key) -> Array:
        check_key(key)
        return jnp.broadcast_to(jnp.asarray(value, jnp.float32), tuple(shape))

    return Network(init, lambda params: params)
