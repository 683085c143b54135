"""What a run tells while it trains: a progress bar, a file of metrics, TensorBoard, its skipped updates."""

import contextlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import rich.console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from vdiff.train.guard import Guard, leaf_names
from vdiff.train.loop import Hook
from vdiff.train.step import TrainState

SECONDS_BETWEEN_LINES = 60.0  # of a log


def logged(console: rich.console.Console) -> Callable[[str], None]:
    """Make what stands for a progress bar where none can be drawn, in a log.

    Args:
        console: where the bar would be.

    Returns:
        `(line) -> None`, which prints a line a minute and drops the others; where a bar is drawn it drops all.
    """
    shown = time.monotonic()

    def log(line: str) -> None:
        nonlocal shown
        draws_bars = console.is_jupyter or (console.is_terminal and not console.is_dumb_terminal)
        if not draws_bars and time.monotonic() - shown >= SECONDS_BETWEEN_LINES:
            shown = time.monotonic()
            console.print(line, markup=False, highlight=False, soft_wrap=True)

    return log


@contextlib.contextmanager
def progress_bar(
    label: str, num_steps: int, *, start: int = 0, every: int = 20, unit: str = "nats"
) -> Iterator[Hook]:
    """Show a progress bar with the live value of the objective; in a log, where there is none, a line a minute.

    Args:
        label: what is being trained.
        num_steps: the step at which the run ends.
        start: the step at which it (re)starts.
        every: steps between two updates.
        unit: of the objective; "" for one that has none.

    Yields:
        A `Hook` for `fit`.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[value]}"),
        TimeRemainingColumn(compact=True, elapsed_when_finished=True),
    )
    with Progress(*columns) as progress:
        task = progress.add_task(label, total=num_steps, completed=start, value="compiling")
        log = logged(progress.console)

        def show(step: int, state: TrainState, metrics: dict[str, float]) -> None:
            value = f"{metrics['objective']:9.2f} {unit}"
            progress.update(task, completed=step, value=value)
            log(f"{label}: {step:,} of {num_steps:,}  {value.strip()}")

        yield Hook(every, show)


def write_metrics(path: str | Path, *, start: int = 0, every: int = 50) -> Hook:
    """Append metrics to a file of JSON lines; rows past the (re)starting step are dropped first.

    Args:
        path: the file, e.g. `run/metrics.jsonl`; rows are {"step", "seconds", name: value, ...}, null where a
            number is not finite.
        start: the step at which the run (re)starts.
        every: steps between two rows.

    Returns:
        A `Hook` for `fit`. Seconds count training time over all resumptions.
    """
    path = Path(path)
    rows = _rows_until(path, start)
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    os.replace(temporary, path)
    before = float(rows[-1]["seconds"]) if rows else 0.0
    began = time.perf_counter()

    def write(step: int, state: TrainState, metrics: dict[str, float]) -> None:
        values = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        row = {"step": step, "seconds": round(before + time.perf_counter() - began, 3), **values}
        with path.open("a") as file:
            file.write(f"{json.dumps(row, allow_nan=False)}\n")

    return Hook(every, write)


@contextlib.contextmanager
def tensorboard(directory: str | Path, *, start: int = 0, every: int = 50) -> Iterator[Hook]:
    """Write metrics as TensorBoard events, those that are finite.

    Args:
        directory: where the event files go.
        start: the step at which the run (re)starts; events past it are hidden.
        every: steps between two events.

    Yields:
        A `Hook` for `fit`.
    """
    from tensorboardX import SummaryWriter

    with SummaryWriter(str(directory), purge_step=start or None) as writer:

        def write(step: int, state: TrainState, metrics: dict[str, float]) -> None:
            for name, value in metrics.items():
                if math.isfinite(value):
                    writer.add_scalar(name, value, step)

        yield Hook(every, write)


class DivergedError(RuntimeError):
    """Tell that a run's objective or gradient is no longer a number."""


def stop_if_diverged(*, every: int = 50) -> Hook:
    """Make the hook that ends a run at the first number that is not finite. Put it before the one that saves.

    Where a few skipped updates are to be lived with, take `stop_if_skipping`.

    Args:
        every: steps between two looks; neither a mean over the steps between nor a skipped step hides a NaN.

    Returns:
        A `Hook` for `fit`, which raises `DivergedError` naming the step and the metrics.
    """

    def look(step: int, state: TrainState, metrics: dict[str, float]) -> None:
        bad = {name: value for name, value in metrics.items() if not math.isfinite(value)}
        if bad:
            raise DivergedError(
                f"step {step}: got {bad}, expected finite numbers; lower the learning rate, or clip the "
                "gradient"
            )

    return Hook(every, look)


def stop_if_skipping(
    max_in_a_row: int,
    *,
    start: int = 0,
    every: int = 50,
    save: Callable[[int, TrainState, dict[str, float]], object] = lambda step, state, metrics: None,
    finder: str = "jax_debug_nans",
    tell: Callable[[str], object] = lambda line: rich.get_console().print(line, markup=False, soft_wrap=True),
) -> Hook:
    """Make the hook that tells of skipped updates, and ends a run that makes no more. Put it before the one that saves.

    A state whose last updates were skipped is the last good one, so it is saved as it is: it goes on at the data after
    those that were skipped. If no update is made there either, the state that it went on from is the last good one, and
    nothing is saved anew: repeated starts would push the checkpoints before out.

    Args:
        max_in_a_row: ends the run when, at a look, so many updates in a row were skipped.
        start: the step at which the run (re)starts.
        every: steps between two looks.
        save: called with `(step, state, metrics)` before the end, e.g. the `call` of the hook of `checkpoint_every`.
        finder: what finds the operation that made a NaN, for the last line; a program may have its own flag for it.
        tell: takes the line about the updates that were skipped since the last look.

    Returns:
        A `Hook` for `fit`, which raises `DivergedError` naming the step, its terms and the gradient's leaf.

    Raises:
        ValueError: if `max_in_a_row` is less than one.
    """
    if max_in_a_row < 1:
        raise ValueError(f"max_in_a_row: got {max_in_a_row}, expected at least 1")

    def look(step: int, state: TrainState, metrics: dict[str, float]) -> None:
        if not metrics.get("skipped"):
            return
        guard = jax.device_get(state.guard)
        line = _skips(state, guard, metrics)
        if guard.num_in_a_row < max_in_a_row:
            tell(f"step {guard.step}: update skipped, {line}")
            return
        is_saved = 0 < start and step - start <= guard.num_in_a_row
        if not is_saved:
            save(step, state, metrics)
        raise DivergedError(
            f"step {guard.step}: got no update in {guard.num_in_a_row} steps, {line}, expected fewer than "
            f"{max_in_a_row}; lower the learning rate, look at the data, or find the operation with {finder}"
        )

    return Hook(every, look)


def _skips(state: TrainState, guard: Guard, metrics: dict[str, float]) -> str:
    """Tell of the last skipped step: what was not finite, in which leaf of the gradient, and how many there were."""
    last = {
        name.removeprefix("skipped/"): value for name, value in metrics.items() if name.startswith("skipped/")
    }
    bad = ", ".join(f"{name} {value}" for name, value in last.items() if not math.isfinite(value))
    where = "no leaf of the gradient"
    if guard.num_leaves:
        where = f"the gradient of {leaf_names(state.params)[guard.leaf]}"
    if guard.num_leaves > 1:
        where += f" and {guard.num_leaves - 1} more"
    return f"{bad}, {where} ({guard.num_in_a_row} in a row, {guard.num_skipped} in all)"


def _rows_until(path: Path, step: int) -> list[dict]:
    """Read the rows up to a step; a last line cut short by a kill is dropped with those past the step."""
    if step == 0 or not path.exists():
        return []
    rows = []
    for line in path.read_text().splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return [row for row in rows if row["step"] <= step]
