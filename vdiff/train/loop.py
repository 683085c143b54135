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

from vdiff.train.hosts import largest
from vdiff.train.parallel import CompiledStep
from vdiff.train.step import Metrics, TrainState
from vdiff.types import PyTree

# Asking waits for the devices: not at every step.
_STEPS_PER_QUESTION = 10


class Hook(NamedTuple):
    """Hold what is done every so many steps, and always at the last one.

    Attributes:
        every: how many steps lie between two calls.
        call: `(step, state, metrics) -> None or more metrics`; metrics are floats, means over the steps since
            this hook's last call. Steps whose update was skipped are left out of the means, which are NaN where all
            were; "skipped" is their share, and "skipped/NAME" what the last of them had. What it returns is added to
            the metrics of the hooks after it. The state's buffers are donated to the next step: copy what is kept.
    """

    every: int
    call: Callable[[int, TrainState, dict[str, float]], dict[str, float] | None]


def fit(
    state: TrainState,
    step: CompiledStep,
    batches: Callable[[int], PyTree],
    num_steps: int,
    *,
    hooks: Sequence[Hook] = (),
    steps_per_call: int | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> TrainState:
    """Train until the state has made `num_steps` steps in all.

    Several steps go to the device in one call, and the next batches are prepared while it works; metrics
    are fetched only when a hook is due. Calling `fit` again with the same step and shapes compiles nothing.

    Args:
        state: from `init_state` or `restore`; donated.
        step: from `jit_step`, `fsdp_step` or `pmap_step`.
        batches: `(step) -> batch [B, ...]`, NumPy; a pure function of the step.
        num_steps: the step at which to end, counted from the start of the run; a state that is there already
            comes back as it is.
        hooks: what to do every so many steps, in this order; each is also called at the last step.
        steps_per_call: how many steps to dispatch at once; a hook's step always ends a call. None for 16 on
            accelerators and 1 on CPU, where a call costs little and XLA runs convolutions in a loop slowly.
        should_stop: asked between calls; when true, the hooks are called and the state returned.

    Returns:
        The trained `TrainState`.

    Raises:
        TypeError: if `step` is not compiled.
        ValueError: if `steps_per_call` or a hook's `every` is less than one.
    """
    if not isinstance(step, CompiledStep):
        raise TypeError(
            f"step: got {type(step).__name__}, expected jit_step(step), fsdp_step(step, mesh) or pmap_step(step)"
        )
    if steps_per_call is None:
        steps_per_call = default_steps_per_call()
    for name, size in [("steps_per_call", steps_per_call), *(("hooks: every", hook.every) for hook in hooks)]:
        if size < 1:
            raise ValueError(f"{name}: got {size}, expected at least 1")

    done = int(state.step)
    on_device: list[tuple[int, Metrics]] = []
    since_call: list[list[dict[str, np.ndarray]]] = [[] for _ in hooks]
    is_last = done >= num_steps
    while not is_last:
        ends = [done - done % hook.every + hook.every for hook in hooks]
        end = min(done + steps_per_call, num_steps, *ends)
        stack = _stack([batches(i) for i in range(done, end)], steps_per_call)
        state, metrics = step.run(state, step.place(stack), end - done)
        on_device.append((end - done, metrics))
        done = end
        is_last = done == num_steps or should_stop()
        due = [i for i, hook in enumerate(hooks) if is_last or done % hook.every == 0]
        if not due:
            continue
        fetched = [
            {name: np.atleast_1d(values)[:n] for name, values in metrics.items()}
            for n, metrics in jax.device_get(on_device)
        ]
        on_device = []
        for pending in since_call:
            pending.extend(fetched)
        more: dict[str, float] = {}
        for i in due:
            more |= hooks[i].call(done, state, _mean(since_call[i]) | more) or {}
            since_call[i].clear()
    return state


def default_steps_per_call() -> int:
    """Tell how many steps `fit` dispatches at once where it is not told: 16 on accelerators, 1 on CPU."""
    return 1 if jax.default_backend() == "cpu" else 16


class StopSignal:
    """Remember the signal that asked the run to stop; call it to ask whether one did.

    Several processes stop together: at every tenth call, which all of them make, they tell each other; at every one on
    accelerators, where a call is more than ten steps by default.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self.number: int | None = None
        self._num_calls = 0
        self._calls_per_question = -(-_STEPS_PER_QUESTION // default_steps_per_call())

    def __call__(self) -> bool:
        """Tell whether a signal has come, to this process or to another."""
        self._num_calls += 1
        if jax.process_count() == 1 or self._num_calls % self._calls_per_question == 0:
            self.number = largest(self.received or 0) or None
        return self.number is not None


@contextlib.contextmanager
def stop_on_signals() -> Iterator[StopSignal]:
    """Turn the first Ctrl-C or SIGTERM into a wish to stop; a second one interrupts at once.

    Yields:
        A `StopSignal`, to be given to `fit(should_stop=...)`; its `number` is the signal's, or None.
    """
    stop = StopSignal()

    def handle(number: int, frame: FrameType | None) -> None:
        if stop.received is not None:
            raise KeyboardInterrupt(number)
        stop.received = number

    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _stack(batches: list[PyTree], length: int) -> PyTree:
    """Stack batches on a new leading axis, padded with zeros to `length`, so that shapes never change."""

    def stack(*leaves: np.ndarray | jax.Array) -> np.ndarray:
        out = np.zeros((length, *np.shape(leaves[0])), np.asarray(leaves[0]).dtype)
        for i, leaf in enumerate(leaves):
            out[i] = leaf
        return out

    return jax.tree.map(stack, *batches)


def _mean(calls: list[dict[str, np.ndarray]]) -> dict[str, float]:
    """Average the metrics of several calls over the steps that made their update; tell of the others apart."""
    names = calls[0] if calls else {}
    rows = {name: np.concatenate([call[name] for call in calls]).astype(np.float64) for name in names}
    skipped = rows.pop("skipped", None)
    if skipped is None:
        return {name: float(np.mean(values)) for name, values in rows.items()}
    is_kept = skipped == 0
    means = {
        name: float(np.mean(values[is_kept])) if any(is_kept) else np.nan for name, values in rows.items()
    }
    means["skipped"] = float(np.mean(skipped))
    if not all(is_kept):
        newest = np.flatnonzero(~is_kept)[-1]
        means |= {f"skipped/{name}": float(values[newest]) for name, values in rows.items()}
    return means
