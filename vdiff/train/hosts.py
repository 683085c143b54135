"""Several processes as one machine: what they must agree on, and what each of them holds alone.

Each process runs the same program and makes the same calls in the same order; JAX's own runtime joins them
(`jax.distributed.initialize`). With one process nothing here communicates.
"""

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

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


def on_one_device(tree: PyTree) -> PyTree:
    """Gather a tree that lies over all devices, and give it whole to each process, on its first device.

    Args:
        tree: arrays as a compiled step returns them: whole on every device, or split over them.

    Returns:
        The same tree, each leaf an array on one device that this process sees alone.
    """

    def first_copy(leaf: jax.Array) -> jax.Array:
        return leaf.addressable_data(0) if isinstance(leaf, jax.Array) else leaf

    meshes = [
        leaf.sharding.mesh
        for leaf in jax.tree.leaves(tree)
        if isinstance(leaf, jax.Array) and isinstance(leaf.sharding, NamedSharding)
    ]
    if not meshes:
        return tree
    # Through the compiler, since keys cannot be moved between processes in another way.
    everywhere = NamedSharding(meshes[0], PartitionSpec())
    return jax.tree.map(first_copy, jax.jit(lambda tree: tree, out_shardings=everywhere)(tree))
