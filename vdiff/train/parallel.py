r"""The same step on one device or many.

`jit_step` splits a global batch over a mesh, `fsdp_step` the state too; `pmap_step` maps the step over the local
devices of one host. The state never grows a device axis, so each mode goes on from the others' checkpoints, and all
compute what one device computes.
"""

import collections
import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from vdiff.train.accumulation import Gradient
from vdiff.train.batching import check_slots
from vdiff.train.sharding import (
    AXIS,
    MIN_SIZE,
    MODEL_AXIS,
    RULES,
    Rules,
    SpecOf,
    along_data,
    by_rules,
    gathered,
    placed,
    scattered_mean,
    shape_at,
    state_specs,
    whole,
)
from vdiff.train.step import Metrics, TrainState, TrainStep, check_divides, many_steps
from vdiff.types import PyTree


class CompiledStep(NamedTuple):
    """Hold a compiled step; call it as `state, metrics = step(state, batch)`. The state is donated.

    Attributes:
        run: `(state, batches [n, B, ...] as placed, count) -> (state, metrics)`, `count` steps in one call.
        place: `(batches [n, B, ...]) -> the same on the devices`; each of several processes gives its share of B.
        lower: `(state, batches [n, B, ...]) -> jax.stages.Lowered`, what `run` compiles, from arrays or their shapes;
            `.compile()` tells its HLO, its memory and its FLOPs.
        shardings: `(state, or its shapes) -> where the step keeps each leaf`; for `init_state` and `restore`, so that
            a state is split from the start and no device ever holds the whole of it.
    """

    run: Callable[[TrainState, PyTree, int], tuple[TrainState, Metrics]]
    place: Callable[[PyTree], PyTree]
    lower: Callable[[TrainState, PyTree], jax.stages.Lowered]
    shardings: Callable[[TrainState], TrainState]

    def __call__(self, state: TrainState, batch: PyTree) -> tuple[TrainState, Metrics]:
        """Take one step on a global batch [B, ...]."""
        return self.run(state, self.place(jax.tree.map(lambda leaf: leaf[None], batch)), 1)


def data_mesh(*, model: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Make a mesh of all devices with the axis "data", and the axis "model" if features are to be split too.

    Devices stand in the order of their processes, as the shares of a batch do.

    Args:
        model: how many devices share the features of a large layer, under `fsdp_step`; a divisor of the devices, of
            those of each process where there are several, since devices that share features have the same data.
        devices: which devices; all when left out.

    Returns:
        A mesh ("data",), or ("data", "model").

    Raises:
        ValueError: if `model` does not divide the number of devices, or that of a process's.
    """
    devices = sorted(jax.devices() if devices is None else devices, key=lambda device: device.process_index)
    of_each = collections.Counter(device.process_index for device in devices)
    common = math.gcd(*of_each.values())
    if model < 1 or common % model:
        fits = ", ".join(str(n) for n in range(1, common + 1) if common % n == 0)
        held = f" in {len(of_each)} processes" if len(of_each) > 1 else ""
        of = " of the devices of each" if len(of_each) > 1 else ""
        raise ValueError(
            f"model: got {model} for {len(devices)} devices{held}, expected a divisor{of}; use one of {fits}"
        )
    shape, names = (len(devices) // model, model), (AXIS, MODEL_AXIS)
    num_axes = 1 if model == 1 else 2
    # Auto axes: with explicit ones, a vmap over a sharded and an unsharded input raises.
    types = (AxisType.Auto,) * num_axes
    # Not jax.make_mesh, which orders devices by how they are wired, across processes too.
    return Mesh(np.reshape(devices, shape[:num_axes]), names[:num_axes], axis_types=types)


def shard_batch(batch: PyTree, mesh: Mesh) -> PyTree:
    """Split a global batch [B, ...] over a mesh's "data" axis; each of several processes gives its own rows.

    Raises:
        ValueError: if B is not a multiple of the axis.
    """
    return _rows_placed(NamedSharding(mesh, PartitionSpec(AXIS)), axis=0)(batch)


def jit_step(step: TrainStep, mesh: Mesh | None = None) -> CompiledStep:
    """Compile a step for one device, or for a mesh with the batch split over its "data" axis.

    Each device of a mesh takes the gradient of its share, in as many parts as the step has; then the devices take the
    mean, once, and each makes the same update.

    Args:
        step: from `make_train_step(..., axis_name=None)`.
        mesh: from `data_mesh()`; None for the default device.

    Returns:
        A `CompiledStep`; parameters are whole on every device.

    Raises:
        ValueError: when called, if the batch is not a multiple of the devices, times the step's parts.
    """
    if mesh is not None:
        return _mesh_step(step, mesh, whole)
    compiled = jax.jit(many_steps(step), donate_argnums=0)

    def place(batches: PyTree) -> PyTree:
        _check_batches(batches, axis=1, num_parts=step.num_accumulate)
        return jax.device_put(batches)

    def shardings(state: TrainState) -> TrainState:
        here = jnp.zeros(()).sharding  # where new arrays go
        return jax.tree.map(lambda leaf: here, state)

    def run(state: TrainState, batches: PyTree, count: int) -> tuple[TrainState, Metrics]:
        return compiled(state, batches, jnp.int32(count))

    def lower(state: TrainState, batches: PyTree) -> jax.stages.Lowered:
        return compiled.lower(state, batches, _COUNT)

    return CompiledStep(run, place, lower, shardings)


def fsdp_step(step: TrainStep, mesh: Mesh, *, rules: Rules = RULES, min_size: int = MIN_SIZE) -> CompiledStep:
    """Compile a step for a mesh with the batch and the state split over it: fully sharded data parallelism.

    Between steps a device holds its slice of parameters, moving average and optimizer's state. In a step the parameters
    are gathered, each device takes the gradient of its share of the batch, in as many parts as the step has; then each
    gets the mean of its own slice of the gradient, once, and updates that slice.

    Args:
        step: from `make_train_step(..., axis_name=None)`.
        mesh: from `data_mesh()`; with an axis "model", the features of large layers are split over that one besides.
        rules: pairs (pattern of a leaf's path, which of its axes is split over "model").
        min_size: leaves with fewer numbers stay whole on every device, as do those of which no axis divides.

    Returns:
        A `CompiledStep`; it splits a state that is whole. One that would fit no device is split from the start, by
        `init_state(..., shardings=step.shardings)`.

    Raises:
        ValueError: when called, if the batch is not a multiple of the data axis, times the step's parts.

    Source: Rajbhandari et al., ZeRO: Memory Optimizations Toward Training Trillion Parameter Models, 2020; Xu et al.,
    GSPMD: General and Scalable Parallelization for ML Computation Graphs, 2021.
    """
    return _mesh_step(step, mesh, by_rules(mesh, rules, min_size))


def pmap_step(step: TrainStep, axis_name: str = AXIS) -> CompiledStep:
    """Map a step over all local devices with `jax.pmap`, each taking its share of the batch.

    Args:
        step: from `make_train_step(..., axis_name=axis_name)`.
        axis_name: the mapped axis.

    Returns:
        A `CompiledStep`; the state goes in and comes out without a device axis.

    Raises:
        ValueError: when called, if the batch is not a multiple of the devices, times the step's parts.
    """
    devices = jax.local_devices()
    mapped = dataclasses.replace(step, axis_name=axis_name)

    def share(state: TrainState, batch: PyTree) -> tuple[TrainState, Metrics]:
        i, size = jax.lax.axis_index(axis_name), jax.tree.leaves(batch)[0].shape[0]
        # A slice that reaches over the end is moved back in silence.
        check_slots(state.aux, len(devices) * size)
        own = jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, i * size, size), state.aux)
        state, metrics = mapped(state._replace(aux=own), batch)
        return state._replace(aux=jax.lax.all_gather(state.aux, axis_name, tiled=True)), metrics

    compiled = jax.pmap(
        many_steps(share),
        axis_name,
        in_axes=(None, 0, None),
        out_axes=None,
        donate_argnums=0,
        devices=devices,
    )

    mesh = jax.make_mesh((len(devices),), (axis_name,), devices=devices, axis_types=(AxisType.Auto,))
    replicated = NamedSharding(mesh, PartitionSpec())

    def place(batches: PyTree) -> PyTree:
        _check_batches(batches, axis=1, num_devices=len(devices), num_parts=step.num_accumulate)

        def split(leaf: Array | np.ndarray) -> Array | np.ndarray:
            shares = np.reshape(leaf, (leaf.shape[0], len(devices), -1, *leaf.shape[2:]))
            return np.moveaxis(shares, 1, 0)

        return jax.tree.map(split, batches)

    def shardings(state: TrainState) -> TrainState:
        return jax.tree.map(lambda leaf: replicated, state)

    def run(state: TrainState, batches: PyTree, count: int) -> tuple[TrainState, Metrics]:
        # Where its own results lie, or the first call and the second would each be compiled.
        state = jax.tree.map(placed, state, shardings(state))
        return compiled(state, batches, jnp.int32(count))

    def lower(state: TrainState, batches: PyTree) -> jax.stages.Lowered:
        state = jax.tree.map(shape_at, state, shardings(state))
        return compiled.lower(state, jax.eval_shape(place, batches), _COUNT)

    return CompiledStep(run, place, lower, shardings)


def _mesh_step(step: TrainStep, mesh: Mesh, spec_of: SpecOf) -> CompiledStep:
    """Compile a step whose state lies on a mesh as `spec_of` says of each leaf, and whose batch is split."""
    split = PartitionSpec(AXIS)
    stack = NamedSharding(mesh, PartitionSpec(None, AXIS))

    def one(state: TrainState, batch: PyTree) -> tuple[TrainState, Metrics]:
        specs = state_specs(state, spec_of)
        manual = jax.tree.map(along_data, _read(specs))

        def share(state: TrainState, batch: PyTree) -> Gradient:
            params = jax.tree.map(gathered, state.params, specs.params)
            found = step.gradient(state._replace(params=params), batch, AXIS)
            return found._replace(grads=jax.tree.map(scattered_mean, found.grads, specs.params))

        # Not checked for varying values: a device then differentiates its share, and nothing is summed but by us.
        found = jax.shard_map(
            share,
            mesh=mesh,
            in_specs=(manual, split),
            out_specs=Gradient(manual.params, PartitionSpec(), split),
            axis_names={AXIS},
            check_vma=False,
        )(_read(state), batch)
        state, metrics = step.update(state, found)
        return jax.lax.with_sharding_constraint(state, shardings(state)), metrics

    def shardings(state: TrainState) -> TrainState:
        specs = state_specs(state, spec_of)
        return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)

    compiled = jax.jit(many_steps(one), donate_argnums=0)

    def run(state: TrainState, batches: PyTree, count: int) -> tuple[TrainState, Metrics]:
        return compiled(jax.tree.map(placed, state, shardings(state)), batches, jnp.int32(count))

    def lower(state: TrainState, batches: PyTree) -> jax.stages.Lowered:
        state = jax.tree.map(shape_at, state, shardings(state))
        return compiled.lower(state, jax.tree.map(lambda leaf: shape_at(leaf, stack), batches), _COUNT)

    return CompiledStep(run, _rows_placed(stack, axis=1, num_parts=step.num_accumulate), lower, shardings)


def _rows_placed(split: NamedSharding, *, axis: int, num_parts: int = 1) -> Callable[[PyTree], PyTree]:
    """Make the function that puts batches on a mesh, with each process's rows on its own devices."""
    num_devices = split.mesh.shape[AXIS]
    num_processes = len({device.process_index for device in split.mesh.devices.flat})

    def place(batches: PyTree) -> PyTree:
        _check_batches(
            batches, axis=axis, num_devices=num_devices, num_parts=num_parts, num_processes=num_processes
        )

        def of_all(leaf: Array | np.ndarray) -> Array:
            shape = (*leaf.shape[:axis], leaf.shape[axis] * num_processes, *leaf.shape[axis + 1 :])
            # The shape is told, or JAX takes devices of two processes with the same rows for a smaller batch.
            return jax.make_array_from_process_local_data(split, leaf, shape)

        return jax.tree.map(of_all, batches)

    return place


def _read(state: TrainState) -> TrainState:
    """Leave out what a gradient does not read."""
    return state._replace(ema=(), opt_state=())


def _check_batches(
    batches: PyTree, *, axis: int, num_devices: int = 1, num_parts: int = 1, num_processes: int = 1
) -> None:
    for leaf in jax.tree.leaves(batches):
        # Each process holds its share of the batch.
        check_divides(leaf.shape[axis] * num_processes, num_devices=num_devices, num_parts=num_parts)


_COUNT = jax.ShapeDtypeStruct((), jnp.int32)
