r"""The normaliser of a density of few dimensions, by a sum over a grid.

    log Z = log int exp(log_density(x)) dx ~ log sum_i exp(log_density(x_i)) + log(volume of a cell)

x_i are the middles of the cells of a box. For a smooth density that has died out at the walls the midpoint rule
converges faster than any power of the cell's width: with cells narrower than its finest feature, exact to rounding.
"""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from vdiff.types import PyTree


def grid_points(low: Sequence[float], high: Sequence[float], num_points: int) -> np.ndarray:
    """Give the middles of the cells of a box.

    Args:
        low: the box's lower corner, [d].
        high: its upper corner, [d].
        num_points: cells along each axis.

    Returns:
        float32 [num_points ** d, d], the last axis running fastest.

    Raises:
        ValueError: if the box has no volume, more than three dimensions, or no cells.
    """
    if (
        len(low) != len(high)
        or not 1 <= len(low) <= 3
        or not all(a < b for a, b in zip(low, high, strict=True))
    ):
        raise ValueError(
            f"low, high: got {tuple(low)} and {tuple(high)}, expected the corners of a box of one to three dimensions, "
            "low below high; in more, estimate the normaliser by annealed importance sampling"
        )
    if num_points < 1:
        raise ValueError(f"num_points: got {num_points}, expected at least 1")
    middles = (np.arange(num_points) + 0.5) / num_points
    axes = [a + (b - a) * middles for a, b in zip(low, high, strict=True)]
    return np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, len(low)).astype(np.float32)


def grid_log_normalizer(
    log_density: Callable[[PyTree, Array], Array],
    low: Sequence[float],
    high: Sequence[float],
    num_points: int = 200,
    *,
    batch_size: int = 2000,
) -> Callable[[PyTree], Float[Array, ""]]:
    """Build the sum over a grid that normalises a density of one to three dimensions.

    Check it with twice the points and with a larger box: neither may move it.

    Args:
        log_density: `(params, x [d]) -> []`, nats, unnormalised.
        low: lower corner of a box outside of which there is nothing, [d].
        high: its upper corner, [d].
        num_points: cells along each axis.
        batch_size: points evaluated at once.

    Returns:
        `(params) -> []`, log Z in nats; log p(x) = log_density(params, x) - log Z(params). Differentiable.

    Raises:
        ValueError: if the box is none, or there are no cells.
    """
    points = grid_points(low, high, num_points)
    log_cell = sum(math.log((b - a) / num_points) for a, b in zip(low, high, strict=True))

    def log_normalizer(params: PyTree) -> Float[Array, ""]:
        values = jax.lax.map(lambda x: log_density(params, x), jnp.asarray(points), batch_size=batch_size)
        return jax.nn.logsumexp(values) + log_cell

    return log_normalizer
