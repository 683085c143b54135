r"""The same step on one device or many.

`jit_step` lets the compiler split a global batch over a mesh; `pmap_step` maps the step over the local
devices of one host. The state is whole in both: it never grows a device axis, so either mode goes on from
the other's checkpoint, and both compute what one device computes.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from vdiff.train.step import Metrics, TrainState, TrainStep, many_steps
from vdiff.types import PyTree


class CompiledStep(NamedTuple):
    """Hold a compiled step; call it as `state, metrics = step(state, batch)`. The state is donated.

    Attributes:
        run: `(state, batches [n, B, ...] as placed, count) -> (state, metrics)`, `count` steps in one call.
        place: `(batches [n, B, ...]) -> the same on the devices`.
    """

    run: Callable[[TrainState, PyTree, int], tuple[TrainState, Metrics]]
    place: Callable[[PyTree], PyTree]

    def __call__(self, state: TrainState, batch: PyTree) -> tuple[TrainState, Metrics]:
        """Take one step on a global batch [B, ...]."""
        return self.run(state, self.place(jax.tree.map(lambda leaf: leaf[None], batch)), 1)


def data_mesh() -> Mesh:
    """Make a mesh of all devices with the one axis "data"."""
    # Auto axes: with explicit ones, a vmap over a sharded and an unsharded input raises.
    return jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))


def shard_batch(batch: PyTree, mesh: Mesh) -> PyTree:
    """Split a global batch [B, ...] over a mesh's "data" axis.

    Raises:
        ValueError: if B is not a multiple of the axis.
    """
    _check_divides(batch, axis=0, num_devices=mesh.shape["data"])
    return jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data")))


def jit_step(step: TrainStep, mesh: Mesh | None = None) -> CompiledStep:
    """Compile a step for one device, or for a mesh with the batch split over its "data" axis.

    Args:
        step: from `make_train_step(..., axis_name=None)`.
        mesh: from `data_mesh()`; None for the default device.

    Returns:
        A `CompiledStep`; parameters are whole on every device.

    Raises:
        ValueError: when called, if the batch is not a multiple of the devices.
    """
    take = many_steps(step)
    if mesh is None:
        compiled = jax.jit(take, donate_argnums=0)
        return CompiledStep(
            lambda state, batches, count: compiled(state, batches, jnp.int32(count)), jax.device_put
        )

    whole = NamedSharding(mesh, PartitionSpec())
    split = NamedSharding(mesh, PartitionSpec(None, "data"))
    compiled = jax.jit(
        take, donate_argnums=0, in_shardings=(whole, split, whole), out_shardings=(whole, whole)
    )

    def place(batches: PyTree) -> PyTree:
        _check_divides(batches, axis=1, num_devices=mesh.shape["data"])
        return jax.device_put(batches, split)

    def run(state: TrainState, batches: PyTree, count: int) -> tuple[TrainState, Metrics]:
        # A no-op but for the first call, when the state lies on one device.
        return compiled(jax.device_put(state, whole), batches, jnp.int32(count))

    return CompiledStep(run, place)


def pmap_step(step: TrainStep, axis_name: str = "data") -> CompiledStep:
    """Map a step over all local devices with `jax.pmap`, each taking its share of the batch.

    Args:
        step: from `make_train_step(..., axis_name=axis_name)`.
        axis_name: the mapped axis.

    Returns:
        A `CompiledStep`; the state goes in and comes out without a device axis.

    Raises:
        ValueError: when called, if the batch is not a multiple of the devices.
    """
    devices = jax.local_devices()
    compiled = jax.pmap(
        many_steps(step), axis_name, in_axes=(None, 0, None), out_axes=None, donate_argnums=0, devices=devices
    )

    def place(batches: PyTree) -> PyTree:
        _check_divides(batches, axis=1, num_devices=len(devices))

        def split(leaf: Array | np.ndarray) -> Array | np.ndarray:
            shares = np.reshape(leaf, (leaf.shape[0], len(devices), -1, *leaf.shape[2:]))
            return np.moveaxis(shares, 1, 0)

        return jax.tree.map(split, batches)

    def run(state: TrainState, batches: PyTree, count: int) -> tuple[TrainState, Metrics]:
        return compiled(state, batches, jnp.int32(count))

    return CompiledStep(run, place)


def _check_divides(batches: PyTree, *, axis: int, num_devices: int) -> None:
    for leaf in jax.tree.leaves(batches):
        size = leaf.shape[axis]
        if size % num_devices or size == 0:
            lower, upper = size // num_devices * num_devices, -(-size // num_devices) * num_devices
            fits = " or ".join(str(n) for n in sorted({lower, upper, num_devices} - {0}))
            raise ValueError(
                f"batch: got {size} data for {num_devices} devices, expected a multiple of {num_devices}; "
                f"use a batch size of {fits}"
            )
