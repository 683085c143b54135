"""Several processes as one machine: what they must agree on, and what each of them holds alone.

Each process runs the same program and makes the same calls in the same order; JAX's own runtime joins them
(`jax.distributed.initialize`). With one process nothing here communicates.
"""

import functools
from collections.abc import Callable

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vdiff.types import PyTree


def is_first() -> bool:
    """Tell whether this is the process that writes and prints."""
    return jax.process_index() == 0


def largest(value: int) -> int:
    """Return the largest of all processes' numbers, to each of them; waits until all have asked.

    On CPU, where programs may overtake each other, set `jax_cpu_enable_async_dispatch` to False before.

    Args:
        value: this process's number, of 32 bits.

    Returns:
        The same number everywhere.
    """
    if jax.process_count() == 1:
        return value
    return int(np.max(multihost_utils.process_allgather(np.int32(value))))


def from_first(value: int) -> int:
    """Return the first process's number, to each of them; waits until all have asked, as `largest` does."""
    return largest(value if is_first() else np.iinfo(np.int32).min)


def on_one_device(tree: PyTree) -> PyTree:
    """Gather a tree that lies over all devices, leaf by leaf, and give it whole to each process, on its first device.

    Other devices hold one whole leaf at a time. All processes call this with the same tree.

    Args:
        tree: arrays as a compiled step returns them: whole on every device, or split over them.

    Returns:
        The same tree, each leaf an array on one device that this process sees alone; of a leaf that was whole it is
        that device's own copy, which goes when the leaf is donated.
    """

    def first_copy(leaf: jax.Array | np.ndarray) -> jax.Array | np.ndarray:
        if not isinstance(leaf, jax.Array) or len(leaf.sharding.device_set) == 1:
            return leaf
        if not leaf.is_fully_replicated:
            leaf = _gather(leaf.sharding.mesh)(leaf)
        return leaf.addressable_data(0)

    return jax.tree.map(first_copy, tree)


@functools.cache
def _gather(mesh: Mesh) -> Callable[[jax.Array], jax.Array]:
    """Make one function for a mesh, so that a leaf's program is compiled once, not at every call."""
    # Through the compiler, since keys cannot be moved between processes in another way.
    return jax.jit(lambda leaf: leaf, out_shardings=NamedSharding(mesh, PartitionSpec()))
