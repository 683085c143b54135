"""A guard against numbers that are none: an update from a non-finite loss or gradient is not made.

The decision is taken on the device, from the reduced loss and gradient, so that every device takes the same one and
the host is never asked.
"""

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from vdiff.types import PyTree

State = TypeVar("State")
Metrics = dict[str, Float[Array, "..."]]
Guarding = Callable[[State, State, Metrics, PyTree], tuple[State, Metrics]]


class Guard(NamedTuple):
    """Count the updates that were not made, and remember the last of them.

    Attributes:
        num_skipped: in the whole run, int32.
        num_in_a_row: up to the newest step; 0 after an update.
        step: the newest skipped step, counted from 1 as a log does; 0 where there was none.
        leaf: position of its first gradient leaf that is not finite, in the order of `leaf_names`.
        num_leaves: how many of its gradient leaves are not finite; with 0, `leaf` has no meaning.
    """

    num_skipped: Int[Array | np.ndarray, ""]
    num_in_a_row: Int[Array | np.ndarray, ""]
    step: Int[Array | np.ndarray, ""]
    leaf: Int[Array | np.ndarray, ""]
    num_leaves: Int[Array | np.ndarray, ""]


NOTHING_SKIPPED = Guard(*(np.zeros((), np.int32) for _ in Guard._fields))


def skip_nonfinite(old: State, new: State, metrics: Metrics, grads: PyTree) -> tuple[State, Metrics]:
    """Keep the old state, but for the step, where the objective or the gradient's norm is not finite.

    The norm is not finite where a gradient is not, and where its square overflows, which an optimizer's second moment
    would not survive. The step goes on, and the data with it.

    Args:
        old: the `TrainState` before the update.
        new: the one after it.
        metrics: of this step, with "objective" and "grad_norm".
        grads: the gradient, a tree like the parameters.

    Returns:
        The state to go on from, and the metrics with "skipped", 1 or 0.
    """
    is_kept = jnp.isfinite(metrics["objective"]) & jnp.isfinite(metrics["grad_norm"])
    guard = _count(old.guard, new.step, is_kept, grads)

    def choose(after: Array, before: Array) -> Array:
        return after if after is before else jnp.where(is_kept, after, before)

    chosen = jax.tree.map(choose, new, old._replace(step=new.step))
    return chosen._replace(guard=guard), {**metrics, "skipped": 1.0 - is_kept.astype(jnp.float32)}


def unguarded(old: State, new: State, metrics: Metrics, grads: PyTree) -> tuple[State, Metrics]:
    """Make every update, whatever it does."""
    return new, metrics


def leaf_names(tree: PyTree) -> list[str]:
    """Name the leaves of a tree by their paths, e.g. `theta.Dense_0.kernel`."""
    paths = [path for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0]]
    return [jax.tree_util.keystr(path, simple=True, separator=".") for path in paths]


def _count(guard: Guard, step: Int[Array, ""], is_kept: Bool[Array, ""], grads: PyTree) -> Guard:
    # The sums of squares are those of the norm: the compiler merges the two.
    squares = [jnp.sum(jnp.square(jnp.abs(leaf))) for leaf in jax.tree.leaves(grads)]
    # One more at the end, so that the first is found in a tree without leaves too.
    is_bad = jnp.stack([*(~jnp.isfinite(square) for square in squares), jnp.ones((), bool)])
    first, num_leaves = jnp.argmax(is_bad).astype(jnp.int32), jnp.sum(is_bad[:-1], dtype=jnp.int32)
    skipped = Guard(guard.num_skipped + 1, guard.num_in_a_row + 1, step, first, num_leaves)
    kept = guard._replace(num_in_a_row=jnp.zeros((), jnp.int32))
    return jax.tree.map(lambda a, b: jnp.where(is_kept, a, b), kept, skipped)
