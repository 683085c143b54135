"""What a training costs: to compile, per step, in memory, and against the device's peak.

Figures are of the last session that trained, kept in `performance.json` and from there in `result.json`.
"""

import functools
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import vdiff as vd
from vdiff.train.parallel import CompiledStep
from vdiff.types import PyTree


class Compiled(NamedTuple):
    """Hold what compiling a step told.

    Attributes:
        seconds: to trace, lower and compile it.
        flops: of one step on one device, as XLA's cost analysis counts them: a loop's body once, but for the one over
            the parts of a batch; None if it does not.
    """

    seconds: float
    flops: float | None


def compile_step(
    step: CompiledStep,
    state: vd.TrainState,
    batch: PyTree,
    batch_size: int,
    steps_per_call: int,
    undivided: CompiledStep | None = None,
) -> Compiled:
    """Compile a step ahead of its first call, which finds it compiled.

    Args:
        step: from `jit_step`, `fsdp_step` or `pmap_step`.
        state: as it will be called with; only looked at.
        batch: [B, ...], of this process; only looked at.
        batch_size: data per step, over all processes.
        steps_per_call: how many batches a call gets.
        undivided: where the step cuts a batch in parts, the same step that does not; it is not compiled.

    Returns:
        The seconds, and the FLOPs of a step over all its parts.
    """

    def stacked(leaf: np.ndarray) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((steps_per_call, batch_size, *leaf.shape[1:]), leaf.dtype)

    batches = jax.tree.map(stacked, batch)
    began = time.perf_counter()
    lowered = step.lower(state, batches)
    compiled = lowered.compile()
    seconds = time.perf_counter() - began
    flops = _flops(compiled)
    if undivided is not None and flops is not None:
        # The parts are a loop, whose body counts once. What the others take is what the two gradients differ by.
        whole, part = _flops(undivided.lower(state, batches)), _flops(lowered)
        flops = None if whole is None or part is None else flops + whole - part
    return Compiled(seconds, flops)


def _flops(program: jax.stages.Lowered | jax.stages.Compiled) -> float | None:
    flops = (program.cost_analysis() or {}).get("flops", 0.0)
    return float(flops) if flops > 0 else None


def timed(hooks: Sequence[vd.Hook], every: int, start: int) -> tuple[tuple[vd.Hook, ...], list[float]]:
    """Time the steps of a fit between the looks of its hooks, which wait for the device anyway.

    Args:
        hooks: of the fit; the time spent in them is left out.
        every: steps between two times.
        start: the step at which the fit begins.

    Returns:
        The hooks to give to `fit`, and a list that will hold seconds per step, each a mean over the steps between two
        looks: batches made and moved, and the step itself.
    """
    seconds: list[float] = []
    before, at, away = time.perf_counter(), start, 0.0

    def look(step: int, state: vd.TrainState, metrics: dict[str, float]) -> None:
        nonlocal before, at, away
        now = time.perf_counter()
        seconds.append((now - before - away) / (step - at))
        before, at, away = now, step, 0.0

    def outside(hook: vd.Hook) -> vd.Hook:
        def call(step: int, state: vd.TrainState, metrics: dict[str, float]) -> dict[str, float] | None:
            nonlocal away
            began = time.perf_counter()
            more = hook.call(step, state, metrics)
            away += time.perf_counter() - began
            return more

        return vd.Hook(hook.every, call)

    return (vd.Hook(every, look), *(outside(hook) for hook in hooks)), seconds


def figures(
    compiled: Compiled,
    step_seconds: Sequence[float],
    batch_size: int,
    every: int,
    precision: str = "float32",
) -> dict[str, Any]:
    """Gather the figures of a training for `performance.json`.

    Args:
        compiled: from `compile_step`.
        step_seconds: from `timed`; the first, which warms up, is left out where there are others.
        batch_size: data per step, over all devices.
        every: steps that each of these times is a mean over.
        precision: the dtype that the step's products are in, which the peak is that of.

    Returns:
        The figures by name. Peaks and FLOPs are of one device.
    """
    times = np.asarray(step_seconds[1:] or step_seconds)
    median = float(np.median(times))
    peak = product_peak(precision)
    share = None if compiled.flops is None else compiled.flops / median / peak
    bytes_used, where = peak_memory()
    return {
        "compile_seconds": round(compiled.seconds, 3),
        "step_ms": {
            **{f"p{q}": _digits(float(np.percentile(times, q)) * 1e3) for q in (50, 90, 99)},
            "num": len(times),
            "mean_over_steps": every,
        },
        "examples_per_second": _digits(batch_size / median),
        "peak_memory_bytes": {"value": bytes_used, "of": where},
        "step_flops": compiled.flops,
        "peak_flops_per_second": {
            "value": _digits(peak),
            "of": f"a {precision} matrix product, measured after training",
        },
        "share_of_peak": None if share is None else _digits(share),
    }


def peak_memory() -> tuple[int, str]:
    """Read the most memory used so far: of the first device, or of this process where devices do not tell."""
    statistics_of_device = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in statistics_of_device:
        return int(statistics_of_device["peak_bytes_in_use"]), "device"
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024, "process"


@functools.cache
def product_peak(precision: str = "float32") -> float:
    """Measure the FLOP/s of a square matrix product in a dtype, large enough to take 2 ms; once a process."""
    size = 1024
    while True:
        square = jnp.ones((size, size), precision)
        product = jax.jit(jnp.matmul)
        (seconds,) = median_seconds(lambda: product(square, square), num_calls=3, num_measurements=5)  # noqa: B023
        if seconds > 2e-3 or size >= 8192:
            return 2 * size**3 / seconds
        size *= 2


def median_seconds(
    *calls: Callable[[], jax.Array],
    num_calls: int,
    num_measurements: int,
    clock: Callable[[], float] = time.perf_counter,
) -> list[float]:
    """Take the median over measurements of the seconds per call of each function, in turn, after a first call."""
    times: list[list[float]] = [[] for _ in calls]
    jax.block_until_ready([call() for call in calls])
    for _ in range(num_measurements):
        for call, own in zip(calls, times, strict=True):
            began = clock()
            for _ in range(num_calls):
                last = call()
            jax.block_until_ready(last)
            own.append((clock() - began) / num_calls)
    return [statistics.median(own) for own in times]


def _digits(value: float) -> float:
    """Round to four digits, which is more than a time repeats."""
    return float(f"{value:.4g}")
