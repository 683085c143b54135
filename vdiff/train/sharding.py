"""Which axis of which leaf of a training state is split over which axis of a mesh.

A device holds its slice of a split leaf between the steps; within one, the slices are gathered, and of the gradient
each device gets the mean of the slice that it holds.
"""

import math
import re
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec, Sharding
from jaxtyping import Array

from vdiff.train.step import TrainState
from vdiff.types import PyTree

AXIS = "data"
"""The mesh axis over which a batch is split."""

MODEL_AXIS = "model"
"""The mesh axis over which the features of large layers may be split."""

SpecOf = Callable[[str, tuple[int, ...]], PartitionSpec]
"""`(path of a leaf, its shape) -> PartitionSpec`."""


Rules = Sequence[tuple[str, int]]
"""Pairs (pattern of a leaf's path, its axis that is split over the mesh axis "model"); the first that fits counts."""

RULES: Rules = (
    # The two layers of a block, the first by its outputs, the second by its inputs: one sum over devices for both.
    (r"\['up'\]\['kernel'\]|\['_Block_\d+'\]\['Conv_0'\]\['kernel'\]", -1),
    (r"\['down'\]\['kernel'\]|\['_Block_\d+'\]\['Conv_1'\]\['kernel'\]", -2),
)

MIN_SIZE = 1024
"""A leaf with fewer numbers than this stays whole: sending it would take longer than it saves."""


def whole(path: str, shape: tuple[int, ...]) -> PartitionSpec:
    """Keep every leaf whole on every device."""
    return PartitionSpec()


def by_rules(mesh: Mesh | AbstractMesh, rules: Rules = RULES, min_size: int = MIN_SIZE) -> SpecOf:
    """Split every large leaf over a mesh: over "model" by a table, over "data" along its longest other axis.

    An axis is split only where its length is a multiple of the devices.

    Args:
        mesh: with an axis "data" and perhaps an axis "model".
        rules: which axis of which leaf is split over "model".
        min_size: leaves with fewer numbers stay whole.

    Returns:
        `(path, shape) -> PartitionSpec`.
    """
    num_data, num_model = mesh.shape[AXIS], mesh.shape.get(MODEL_AXIS, 1)

    def spec_of(path: str, shape: tuple[int, ...]) -> PartitionSpec:
        if math.prod(shape) < min_size:
            return PartitionSpec()
        axes: list[str | None] = [None] * len(shape)
        chosen = next((axis for pattern, axis in rules if re.search(pattern, path)), None)
        if num_model > 1 and chosen is not None and shape[chosen] % num_model == 0:
            axes[chosen] = MODEL_AXIS
        free = [i for i, size in enumerate(shape) if axes[i] is None and size % num_data == 0]
        if num_data > 1 and free:
            axes[max(free, key=lambda i: shape[i])] = AXIS
        return PartitionSpec(*axes)

    return spec_of


def state_specs(state: TrainState, spec_of: SpecOf) -> TrainState:
    """List how each leaf of a state is split; aux, one slot per position of the batch, is split as the batch is."""

    def of(path: tuple, leaf: Array | np.ndarray | jax.ShapeDtypeStruct) -> PartitionSpec:
        return spec_of(jax.tree_util.keystr(path), leaf.shape)

    specs = jax.tree_util.tree_map_with_path(of, state)
    return specs._replace(aux=jax.tree.map(lambda leaf: PartitionSpec(AXIS), state.aux))


def along_data(spec: PartitionSpec) -> PartitionSpec:
    """Leave out every axis of the mesh but the data axis."""
    return PartitionSpec(*(AXIS if name == AXIS else None for name in spec))


def along_model(spec: PartitionSpec) -> PartitionSpec:
    """Leave out every axis of the mesh but the model axis."""
    return PartitionSpec(*(MODEL_AXIS if name == MODEL_AXIS else None for name in spec))


def split_axis(spec: PartitionSpec) -> int:
    """Find which axis of a leaf is split over the data axis of the mesh; -1 for none."""
    return spec.index(AXIS) if AXIS in spec else -1


def gathered(leaf: Array, spec: PartitionSpec) -> Array:
    """Put the slices of all devices along the data axis together; those along the model axis stay apart."""
    axis = split_axis(spec)
    return leaf if axis < 0 else jax.lax.all_gather(leaf, AXIS, axis=axis, tiled=True)


def scattered_mean(leaf: Array, spec: PartitionSpec) -> Array:
    """Take the mean over the devices along the data axis, of the slice that this one holds."""
    if MODEL_AXIS in spec:
        leaf = jax.lax.with_sharding_constraint(leaf, along_model(spec))
    axis = split_axis(spec)
    if axis < 0:
        return jax.lax.pmean(leaf, AXIS)
    total = jax.lax.psum_scatter(leaf, AXIS, scatter_dimension=axis, tiled=True)
    return total / jax.lax.axis_size(AXIS)


def placed(leaf: Array | np.ndarray, sharding: Sharding) -> Array:
    """Put a leaf where a step keeps it; what lies there already goes through as it is."""
    there = leaf.sharding if isinstance(leaf, jax.Array) else None
    # Of the same kind too: for one device there are two, and a step would be compiled for each.
    if isinstance(there, NamedSharding) and there.is_equivalent_to(sharding, leaf.ndim):
        return leaf
    if sharding.is_fully_addressable:
        return jax.device_put(leaf, sharding)
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        data = placed(jax.random.key_data(leaf), sharding)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        return jax.jit(lambda leaf: leaf, out_shardings=sharding)(leaf)
    # Each of several processes holds the same leaf, and cuts out what its devices are to hold.
    held = np.asarray(leaf)
    return jax.make_array_from_callback(held.shape, sharding, lambda index: held[index])


def shape_at(leaf: PyTree, sharding: Sharding) -> jax.ShapeDtypeStruct:
    """Describe a leaf that lies there, without its numbers."""
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
