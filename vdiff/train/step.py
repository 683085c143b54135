r"""One training step: `(state, batch) -> (state, metrics)`, pure.

    keys:       key_i = fold_in(fold_in(run key, step), i), i the position in the GLOBAL batch
    loss:       - combine( mean over the batch of the objective's terms )
    update:     Optax, then an exponential moving average of the parameters; none where a number is not finite

A key belongs to a position, not to a device, so one device and eight compute the same numbers.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from vdiff.objectives import Scheduled, sum_terms
from vdiff.train.accumulation import Gradient, batch_gradient
from vdiff.train.batching import check_slots, per_example
from vdiff.train.guard import NOTHING_SKIPPED, Guard, Guarding, Metrics, skip_nonfinite
from vdiff.types import Key, Objective, Params, PyTree, Startable, Terms, check_key


class TrainState(NamedTuple):
    """Hold all that a run is, so that a saved state resumes it exactly.

    Attributes:
        step: how many steps were made, int32; the data order is a function of it.
        params: what is trained.
        ema: exponential moving average of params, for evaluation and samples.
        opt_state: Optax's state.
        key: the run's typed key; never changes.
        aux: what no gradient can train, one slot per position in the global batch; usually `()`.
        guard: how many updates were skipped, and which was the last.
    """

    step: Int[Array, ""]
    params: Params
    ema: Params
    opt_state: PyTree
    key: Key
    aux: PyTree = ()
    guard: Guard = NOTHING_SKIPPED


@dataclasses.dataclass(frozen=True)
class TrainStep:
    """Hold a step in its two halves; call it as `state, metrics = step(state, batch)`.

    Between the halves lies all that devices tell each other: the mean of the gradient over them.

    Attributes:
        gradient: `(state, batch [B, ...], axis_name) -> Gradient` of this device's share, the devices being those of
            a mapped axis, or the only one under None; reads the state's step, params, key and aux.
        update: `(state, Gradient of the whole batch) -> (state, metrics)`.
        axis_name: the mapped axis under which the step is called; None for none.
        num_accumulate: into how many parts a device cuts its share of the batch.
    """

    gradient: Callable[[TrainState, PyTree, str | None], Gradient]
    update: Callable[[TrainState, Gradient], tuple[TrainState, Metrics]]
    axis_name: str | None = None
    num_accumulate: int = 1

    def __call__(self, state: TrainState, batch: PyTree) -> tuple[TrainState, Metrics]:
        """Take one step on a batch [B, ...], under a mapped axis on this device's share of it."""
        found = self.gradient(state, batch, self.axis_name)
        return self.update(state, found._replace(grads=_mean_over_devices(found.grads, self.axis_name)))


def init_state(
    key: Key,
    model: Startable,
    optimizer: optax.GradientTransformation,
    *,
    aux: PyTree = (),
    shardings: Callable[[TrainState], TrainState] | None = None,
) -> TrainState:
    """Start a run.

    Args:
        key: a typed key; the run's parameters and all its noise follow from it.
        model: anything with `init: (key) -> Params`.
        optimizer: the Optax transformation that the step will use.
        aux: what `batching=persistent` hands from step to step, one slot per position in the global batch, [B, ...];
            copied.
        shardings: `(the state's shapes) -> where each leaf is to lie`, e.g. `CompiledStep.shardings`: each device then
            makes what it is to hold, and none holds the whole; the numbers are the same. None for the default device.

    Returns:
        A `TrainState` at step 0, with ema a copy of params.

    Raises:
        TypeError: if `key` is not a typed key.
    """
    check_key(key)

    def make(data: Array, aux: PyTree) -> TrainState:
        key_init, key_run = jax.random.split(jax.random.wrap_key_data(data, impl=jax.random.key_impl(key)))
        # Strongly typed, as every later state is: a weakly typed leaf would compile the step twice.
        params = jax.tree.map(lambda leaf: jnp.asarray(leaf, leaf.dtype), jax.jit(model.init)(key_init))
        # A copy, since a donated state must not hold one buffer twice.
        ema = jax.tree.map(jnp.copy, params)
        guard = jax.tree.map(jnp.asarray, NOTHING_SKIPPED)
        opt_state, aux = optimizer.init(params), jax.tree.map(jnp.array, aux)
        return TrainState(jnp.zeros((), jnp.int32), params, ema, opt_state, key_run, aux, guard)

    data = jax.random.key_data(key)
    if shardings is None:
        return make(data, aux)
    # From the host, where all processes have them.
    held = jax.tree.map(np.asarray, (data, aux))
    return jax.jit(make, out_shardings=shardings(jax.eval_shape(make, *held)))(*held)


def make_train_step(
    objective: Objective | Scheduled,
    optimizer: optax.GradientTransformation,
    *,
    batching: Callable[[Objective], Callable[..., tuple[Terms, PyTree]]] = per_example,
    combine: Callable[[Terms], Float[Array, ""]] = sum_terms,
    ema_decay: float = 0.999,
    axis_name: str | None = None,
    num_accumulate: int = 1,
    guard: Guarding = skip_nonfinite,
) -> TrainStep:
    """Make the step that raises an objective.

    The moving average starts quickly: its decay at step t is min(ema_decay, (1 + t) / (10 + t)).

    Args:
        objective: `(key, params, x) -> Terms` of one datum, larger is better, or `scheduled(...)`.
        optimizer: an Optax transformation.
        batching: lifts the objective to a batch: `per_example`, `stratified` for one that takes a time, or `persistent`
            for one that hands something on to the next step.
        combine: `(mean Terms over the batch) -> []`, what is raised; a nonlinear one gives, e.g., free bits.
        ema_decay: decay of the moving average, in [0, 1).
        axis_name: the mapped axis under `pmap_step`; None under `jit_step`.
        num_accumulate: into how many parts a device cuts its share of the batch, one after another, so that it holds
            the activations of one part only; the result is the same.
        guard: `(state, update, metrics, grads) -> (state, metrics)`, whether to make an update, `() -> state`;
            `unguarded` makes every one.

    Returns:
        `(state, batch [B, ...]) -> (state, metrics)`; metrics are the mean terms, "objective" (their
        combination), "grad_norm" and "skipped", 1 where no update was made, else 0.

    Raises:
        ValueError: if `ema_decay` is outside [0, 1), or `num_accumulate` below 1; at trace time, if the batch's leaves
            differ in length or cannot be cut into parts, or aux has not as many slots as the batch has data.
    """
    if not 0.0 <= ema_decay < 1.0:
        raise ValueError(f"ema_decay: got {ema_decay}, expected a number in [0, 1)")

    if num_accumulate < 1:
        raise ValueError(
            f"num_accumulate: got {num_accumulate}, expected at least 1, the whole batch at once"
        )

    def gradient(state: TrainState, batch: PyTree, axis_name: str | None) -> Gradient:
        size = _batch_size(batch)
        check_divides(size, num_parts=num_accumulate)
        check_slots(state.aux, size)
        positions = jnp.arange(size)
        if axis_name is not None:
            positions = positions + jax.lax.axis_index(axis_name) * size
        now = objective.at(state.step) if isinstance(objective, Scheduled) else objective
        lifted = functools.partial(batching(now), jax.random.fold_in(state.key, state.step))
        mean = functools.partial(_mean_over_devices, axis_name=axis_name)
        return batch_gradient(lifted, combine, num_accumulate, mean)(
            state.params, batch, positions, state.aux
        )

    def update(state: TrainState, found: Gradient) -> tuple[TrainState, Metrics]:
        grads, terms, aux = found

        def updated() -> TrainState:
            # Optax's own arithmetic mixes dtypes; that is none of a strict user's business.
            with jax.numpy_dtype_promotion("standard"):
                updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
            time = state.step.astype(jnp.float32)
            decay = jnp.minimum(ema_decay, (1.0 + time) / (10.0 + time))
            ema = optax.incremental_update(params, state.ema, 1.0 - decay)
            return TrainState(state.step + 1, params, ema, opt_state, state.key, aux, state.guard)

        metrics = {**terms, "objective": combine(terms), "grad_norm": optax.tree.norm(grads)}
        return guard(state, updated, metrics, grads)

    return TrainStep(gradient, update, axis_name, num_accumulate)


def many_steps(
    step: Callable[[TrainState, PyTree], tuple[TrainState, Metrics]],
) -> Callable[[TrainState, PyTree, Array], tuple[TrainState, Metrics]]:
    """Take several steps in one call, so that the host is asked rarely.

    Args:
        step: `(state, batch) -> (state, metrics)`.

    Returns:
        `(state, batches [n, B, ...], count) -> (state, metrics)`: takes the first `count` of n batches; count
        is traced, so that a short last call compiles nothing. Metrics are [n], one for each step, with zeros after the
        first `count`; with n = 1 there is no loop, and they are [].
    """

    def take(state: TrainState, batches: PyTree, count: Int[Array, ""]) -> tuple[TrainState, Metrics]:
        def body(i: Array, carry: tuple[TrainState, Metrics]) -> tuple[TrainState, Metrics]:
            state, rows = carry
            state, metrics = step(state, jax.tree.map(lambda leaf: leaf[i], batches))
            return state, jax.tree.map(lambda row, value: row.at[i].set(value), rows, metrics)

        first = jax.tree.map(lambda leaf: leaf[0], batches)
        num_steps = _batch_size(batches)
        if num_steps == 1:
            return step(state, first)
        shapes = jax.eval_shape(step, state, first)[1]
        zeros = jax.tree.map(lambda leaf: jnp.zeros((num_steps, *leaf.shape), leaf.dtype), shapes)
        return jax.lax.fori_loop(0, count, body, (state, zeros))

    return take


def check_divides(size: int, *, num_devices: int = 1, num_parts: int = 1) -> None:
    """Refuse a batch that devices and parts cannot share evenly.

    Raises:
        ValueError: if `size` is no multiple of devices times parts; names the nearest that are.
    """
    unit = num_devices * num_parts
    if size % unit or size == 0:
        lower, upper = size // unit * unit, -(-size // unit) * unit
        fits = " or ".join(str(n) for n in sorted({lower, upper, unit} - {0}))
        parts = (
            f"{num_parts} parts" if num_devices == 1 else f"{num_devices} devices with {num_parts} parts each"
        )
        shares = f"{num_devices} devices" if num_parts == 1 else parts
        raise ValueError(
            f"batch: got {size} data for {shares}, expected a multiple of {unit}; use a batch size of {fits}"
        )


def _batch_size(batch: PyTree) -> int:
    sizes = sorted({leaf.shape[0] if leaf.ndim else 0 for leaf in jax.tree.leaves(batch)})
    if len(sizes) != 1 or sizes[0] == 0:
        raise ValueError(f"batch: got leading axes {sizes}, expected one common length of at least 1")
    return sizes[0]


def _mean_over_devices(tree: PyTree, axis_name: str | None) -> PyTree:
    return tree if axis_name is None else jax.lax.pmean(tree, axis_name)
