"""The training loop: batches in, a trained state out, hooks in between.

The data order is a function of the step and the noise a function of key and step, so a run that is stopped
and resumed is the run that was not stopped.
"""

import contextlib
import signal
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import NamedTuple

import jax
import numpy as np

from vdiff.train.parallel import CompiledStep
from vdiff.train.step import TrainState
from vdiff.types import PyTree


class Hook(NamedTuple):
    """Hold what is done every so many steps, and always at the last one.

    Attributes:
        every: how many steps lie between two calls.
        call: `(step, state, metrics) -> None`; metrics are floats, means since the last dispatch. The state's
            buffers are donated to the next step: copy what is kept.
    """

    every: int
    call: Callable[[int, TrainState, dict[str, float]], None]


def fit(
    state: TrainState,
    step: CompiledStep,
    batches: Callable[[int], PyTree],
    num_steps: int,
    *,
    hooks: Sequence[Hook] = (),
    steps_per_call: int = 16,
    should_stop: Callable[[], bool] = lambda: False,
) -> TrainState:
    """Train until the state has made `num_steps` steps in all.

    Several steps go to the device in one call, and the next batches are prepared while it works; metrics
    are fetched only when a hook is due. Calling `fit` again with the same step and shapes compiles nothing.

    Args:
        state: from `init_state` or `restore`; donated.
        step: from `jit_step` or `pmap_step`.
        batches: `(step) -> batch [B, ...]`, NumPy; a pure function of the step.
        num_steps: the step at which to end, counted from the start of the run; a state that is there already
            comes back as it is.
        hooks: what to do every so many steps, in this order; each is also called at the last step.
        steps_per_call: how many steps to dispatch at once; a hook's step always ends a call.
        should_stop: asked between calls; when true, the hooks are called and the state returned.

    Returns:
        The trained `TrainState`.

    Raises:
        TypeError: if `step` is not compiled.
        ValueError: if `steps_per_call` or a hook's `every` is less than one.
    """
    if not isinstance(step, CompiledStep):
        raise TypeError(f"step: got {type(step).__name__}, expected jit_step(step) or pmap_step(step)")
    for name, size in [("steps_per_call", steps_per_call), *((f"hooks {h.call}", h.every) for h in hooks)]:
        if size < 1:
            raise ValueError(f"{name}: got {size}, expected at least 1")

    done = int(state.step)
    while done < num_steps:
        ends = [done - done % hook.every + hook.every for hook in hooks]
        end = min(done + steps_per_call, num_steps, *ends)
        stack = _stack([batches(i) for i in range(done, end)], steps_per_call)
        state, metrics = step.run(state, step.place(stack), end - done)
        done = end
        is_last = done == num_steps or should_stop()
        due = [hook for hook in hooks if is_last or done % hook.every == 0]
        if due:
            fetched = {name: float(value) for name, value in jax.device_get(metrics).items()}
            for hook in due:
                hook.call(done, state, fetched)
        if is_last:
            break
    return state


class StopSignal:
    """Remember the signal that asked the run to stop; call it to ask whether one did."""

    def __init__(self) -> None:
        self.number: int | None = None

    def __call__(self) -> bool:
        """Tell whether a signal has come."""
        return self.number is not None


@contextlib.contextmanager
def stop_on_signals() -> Iterator[StopSignal]:
    """Turn the first Ctrl-C or SIGTERM into a wish to stop; a second one interrupts at once.

    Yields:
        A `StopSignal`, to be given to `fit(should_stop=...)`; its `number` is the signal's, or None.
    """
    stop = StopSignal()

    def handle(number: int, frame: FrameType | None) -> None:
        if stop():
            raise KeyboardInterrupt
        stop.number = number

    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _stack(batches: list[PyTree], length: int) -> PyTree:
    """Stack batches on a new leading axis, padded with zeros to `length`, so that shapes never change."""

    def stack(*leaves: np.ndarray) -> np.ndarray:
        out = np.zeros((length, *np.shape(leaves[0])), np.asarray(leaves[0]).dtype)
        for i, leaf in enumerate(leaves):
            out[i] = leaf
        return out

    return jax.tree.map(stack, *batches)
