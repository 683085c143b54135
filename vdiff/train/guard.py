"""A guard against numbers that are none: an update from a non-finite loss or gradient is not made.

The decision is taken on the device, from the reduced loss and gradient, so that every device takes the same one and
the host is never asked.
"""

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from vdiff.types import PyTree

State = TypeVar("State")
Metrics = dict[str, Float[Array, "..."]]
Guarding = Callable[[State, Callable[[], State], Metrics, PyTree], tuple[State, Metrics]]


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


def skip_nonfinite(
    old: State, update: Callable[[], State], metrics: Metrics, grads: PyTree
) -> tuple[State, Metrics]:
    """Make an update, unless the objective or the gradient's norm is not finite: then only the step goes on.

    The norm is not finite where a gradient is not, and where its square overflows, which an optimizer's second moment
    would not survive. The data go on with the step.

    Args:
        old: the `TrainState` before the update.
        update: `() -> ` the one after it.
        metrics: of this step, with "objective" and "grad_norm".
        grads: the gradient, a tree like the parameters.

    Returns:
        The state to go on from, and the metrics with "skipped", 1 or 0.
    """

    def make() -> State:
        return update()._replace(guard=old.guard._replace(num_in_a_row=jnp.zeros((), jnp.int32)))

    def skip() -> State:
        return old._replace(step=old.step + 1, guard=_count(old.guard, old.step + 1, grads))

    # A branch, not a choice between the results: a choice would hold the old state until the new one is whole.
    is_finite = jnp.isfinite(metrics["objective"]) & jnp.isfinite(metrics["grad_norm"])
    state = jax.lax.cond(is_finite, make, skip)
    return state, {**metrics, "skipped": 1.0 - is_finite.astype(jnp.float32)}


def unguarded(
    old: State, update: Callable[[], State], metrics: Metrics, grads: PyTree
) -> tuple[State, Metrics]:
    """Make every update, whatever it does."""
    return update(), metrics


def leaf_names(tree: PyTree) -> list[str]:
    """Name the leaves of a tree by their paths, e.g. `theta.Dense_0.kernel`."""
    paths = [path for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0]]
    return [jax.tree_util.keystr(path, simple=True, separator=".") for path in paths]


def _count(guard: Guard, step: Int[Array, ""], grads: PyTree) -> Guard:
    is_bad = [~jnp.isfinite(jnp.sum(jnp.square(jnp.abs(leaf)))) for leaf in jax.tree.leaves(grads)]
    # One more at the end, so that the first is found in a tree without leaves too.
    first = jnp.argmax(jnp.stack([*is_bad, jnp.ones((), bool)])).astype(jnp.int32)
    num_leaves = sum((one.astype(jnp.int32) for one in is_bad), jnp.zeros((), jnp.int32))
    return Guard(guard.num_skipped + 1, guard.num_in_a_row + 1, step, first, num_leaves)
