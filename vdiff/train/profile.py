"""A trace of a few training steps, for Perfetto or TensorBoard."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import jax

from vdiff.train.parallel import CompiledStep
from vdiff.train.step import Metrics, TrainState
from vdiff.types import PyTree


@contextlib.contextmanager
def traced(
    step: CompiledStep, directory: str | Path, num_steps: int, *, num_calls_before: int = 2
) -> Iterator[CompiledStep]:
    """Trace a few steps of a training, once the first calls, which compile, are over.

    The trace is written when the last of its steps is done, or when training ends before. It holds what the host does
    between the steps, too: batches, hooks, checkpoints. Each call is marked as the step it begins with.

    Args:
        step: from `jit_step`, `fsdp_step` or `pmap_step`.
        directory: where the trace goes: `plugins/profile/TIME/`, with `*.xplane.pb` for TensorBoard's profile plugin
            and `perfetto_trace.json.gz` for ui.perfetto.dev.
        num_steps: the least number of steps to trace; whole calls are.
        num_calls_before: calls that go before.

    Yields:
        The step to train with.

    Raises:
        ValueError: if `num_steps` is less than one.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps: got {num_steps}, expected at least 1")
    num_calls = num_traced = first = 0
    tracing = contextlib.ExitStack()

    def run(state: TrainState, batches: PyTree, count: int) -> tuple[TrainState, Metrics]:
        nonlocal num_calls, num_traced, first
        num_calls += 1
        if num_calls <= num_calls_before or num_traced >= num_steps:
            return step.run(state, batches, count)
        if not num_traced:
            first = int(jax.block_until_ready(state).step)
            tracing.enter_context(_trace(directory))
        with jax.profiler.StepTraceAnnotation("train", step_num=first + num_traced):
            state, metrics = step.run(state, batches, count)
        num_traced += count
        if num_traced >= num_steps:
            jax.block_until_ready(state)
            tracing.close()
        return state, metrics

    with tracing:
        yield step._replace(run=run)


def _trace(directory: str | Path) -> contextlib.AbstractContextManager:
    # The host's own work as JAX marks it; each call of a Python function would be a hundred times as many events.
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    return jax.profiler.trace(str(directory), create_perfetto_trace=True, profiler_options=options)
