r"""Explicit Runge-Kutta steps on a fixed grid, as one scan: differential equations for batches.

    k_i = f(t + c_i h, y + h sum_{j < i} a_ij k_j),   y(t + h) = y + h sum_i b_i k_i

`cooper_verner` is of order eight with eleven stages. Its last nodes and its weights are those of Lobatto's rule with
five points,

    c = 0, 1/2 - r, 1/2, 1/2 + r, 1,   b = 1/20, 49/180, 16/45, 49/180, 1/20,   r = sqrt(21) / 14

so that all weights are positive and a pure quadrature, as that of a log-determinant along a path, adds its roundings
up evenly.

Source: Cooper and Verner, Some Explicit Runge-Kutta Methods of High Order, 1972; coefficients as in Hairer, Norsett
and Wanner, Solving Ordinary Differential Equations I, 1993, II.5.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from vdiff.types import PyTree

Field = Callable[[Array, PyTree], PyTree]
"""`(t [], y) -> dy/dt`, the right-hand side of a differential equation; y is a pytree of float arrays."""

Solver = Callable[[Field, PyTree, Array, Array], PyTree]
"""`(field, y, start, stop) -> y at stop`, given y at start; stop may lie below start."""


class Tableau(NamedTuple):
    """Hold the coefficients of an explicit Runge-Kutta method with s stages.

    Attributes:
        stages: a, [s, s], strictly lower triangular.
        weights: b, [s].
        nodes: c, [s], the rows' sums of a.
    """

    stages: np.ndarray
    weights: np.ndarray
    nodes: np.ndarray


def tableau(rows: Sequence[Sequence[float | int]], weights: Sequence[float | int]) -> Tableau:
    """Build a `Tableau` from the rows of a below the first, and b.

    Args:
        rows: s - 1 rows, the i-th with i entries.
        weights: b, s numbers with sum one.

    Returns:
        A `Tableau`, float64.

    Raises:
        ValueError: if a row has another length than its place asks, or the weights do not add up to one.
    """
    num_stages = len(weights)
    if [len(row) for row in rows] != list(range(1, num_stages)) or abs(sum(weights) - 1.0) > 1e-9:
        raise ValueError(
            f"rows, weights: got rows of lengths {[len(row) for row in rows]} and weights with sum {sum(weights)}, "
            f"expected lengths 1..{num_stages - 1} and sum 1; leave the first, empty row out and write zeros in full"
        )
    stages = np.zeros((num_stages, num_stages))
    for i, row in enumerate(rows, start=1):
        stages[i, :i] = row
    return Tableau(stages, np.asarray(weights, np.float64), stages.sum(1))


def _cooper_verner() -> Tableau:
    r = math.sqrt(21.0)
    rows = [
        [1 / 2],
        [1 / 4, 1 / 4],
        [1 / 7, (-7 - 3 * r) / 98, (21 + 5 * r) / 49],
        [(11 + r) / 84, 0, (18 + 4 * r) / 63, (21 - r) / 252],
        [(5 + r) / 48, 0, (9 + r) / 36, (-231 + 14 * r) / 360, (63 - 7 * r) / 80],
        [
            (10 - r) / 42,
            0,
            (-432 + 92 * r) / 315,
            (633 - 145 * r) / 90,
            (-504 + 115 * r) / 70,
            (63 - 13 * r) / 35,
        ],
        [1 / 14, 0, 0, 0, (14 - 3 * r) / 126, (13 - 3 * r) / 63, 1 / 9],
        [1 / 32, 0, 0, 0, (91 - 21 * r) / 576, 11 / 72, (-385 - 75 * r) / 1152, (63 + 13 * r) / 128],
        [
            1 / 14,
            0,
            0,
            0,
            1 / 9,
            (-733 - 147 * r) / 2205,
            (515 + 111 * r) / 504,
            (-51 - 11 * r) / 56,
            (132 + 28 * r) / 245,
        ],
        [
            0,
            0,
            0,
            0,
            (-42 + 7 * r) / 18,
            (-18 + 28 * r) / 45,
            (-273 - 53 * r) / 72,
            (301 + 53 * r) / 72,
            (28 - 28 * r) / 45,
            (49 - 7 * r) / 18,
        ],
    ]
    return tableau(rows, [1 / 20, 0, 0, 0, 0, 0, 0, 49 / 180, 16 / 45, 49 / 180, 1 / 20])


cooper_verner = _cooper_verner()
"""Order eight, eleven stages."""


def fixed_grid(num_steps: int = 7, *, tableau: Tableau = cooper_verner) -> Solver:
    """Build a solver that takes equal steps, each a scan over its stages: the field is compiled once.

    Args:
        num_steps: n; the field is evaluated n times the number of stages, 77 times as it stands.
        tableau: which method.

    Returns:
        A `Solver`; differentiable, and the same work for every datum, so that `jax.vmap` loses nothing.

    Raises:
        ValueError: if `num_steps` is less than one.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps: got {num_steps}, expected at least 1")
    num_stages = len(tableau.weights)

    def solve(field: Field, y: PyTree, start: Array, stop: Array) -> PyTree:
        h = (stop - start) / num_steps
        stages, weights, nodes = (jnp.asarray(part, h.dtype) for part in tableau)

        def step(y: PyTree, i: Array) -> tuple[PyTree, None]:
            t = start + i.astype(h.dtype) * h

            def stage(slopes: PyTree, inputs: tuple[Array, Array, Array]) -> tuple[PyTree, None]:
                j, row, node = inputs
                slope = field(t + node * h, _moved(y, h, row, slopes))
                return jax.tree.map(lambda all_, one: all_.at[j].set(one), slopes, slope), None

            slopes = jax.tree.map(lambda leaf: jnp.zeros((num_stages, *leaf.shape), leaf.dtype), y)
            slopes, _ = jax.lax.scan(stage, slopes, (jnp.arange(num_stages), stages, nodes))
            return _moved(y, h, weights, slopes), None

        return jax.lax.scan(step, y, jnp.arange(num_steps))[0]

    return solve


def _moved(y: PyTree, h: Array, weights: Float[Array, " s"], slopes: PyTree) -> PyTree:
    # At full precision: a device that rounds the factors of a product would spoil all eight orders.
    def move(leaf: Array, slope: Array) -> Array:
        return leaf + h * jnp.tensordot(weights, slope, axes=1, precision=jax.lax.Precision.HIGHEST)

    return jax.tree.map(move, y, slopes)
