"""What a run tells while it trains: a progress bar, a file of metrics, TensorBoard."""

import contextlib
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from vdiff.train.loop import Hook
from vdiff.train.step import TrainState


@contextlib.contextmanager
def progress_bar(label: str, num_steps: int, *, start: int = 0, every: int = 20) -> Iterator[Hook]:
    """Show a progress bar with the live value of the objective.

    Args:
        label: what is being trained.
        num_steps: the step at which the run ends.
        start: the step at which it (re)starts.
        every: steps between two updates.

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

        def show(step: int, state: TrainState, metrics: dict[str, float]) -> None:
            progress.update(task, completed=step, value=f"{metrics['objective']:9.2f} nats")

        yield Hook(every, show)


def write_metrics(path: str | Path, *, start: int = 0, every: int = 50) -> Hook:
    """Append metrics to a file of JSON lines; rows past the (re)starting step are dropped first.

    Args:
        path: the file, e.g. `run/metrics.jsonl`; rows are {"step", "seconds", name: value, ...}.
        start: the step at which the run (re)starts.
        every: steps between two rows.

    Returns:
        A `Hook` for `fit`. Seconds count training time over all resumptions.
    """
    path = Path(path)
    rows = _rows_until(path, start)
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    before = float(rows[-1]["seconds"]) if rows else 0.0
    began = time.perf_counter()

    def write(step: int, state: TrainState, metrics: dict[str, float]) -> None:
        row = {"step": step, "seconds": round(before + time.perf_counter() - began, 3), **metrics}
        with path.open("a") as file:
            file.write(f"{json.dumps(row)}\n")

    return Hook(every, write)


@contextlib.contextmanager
def tensorboard(directory: str | Path, *, start: int = 0, every: int = 50) -> Iterator[Hook]:
    """Write metrics as TensorBoard events.

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
                writer.add_scalar(name, value, step)

        yield Hook(every, write)


class DivergedError(RuntimeError):
    """Tell that a run's objective or gradient is no longer a number."""


def stop_if_diverged(*, every: int = 50) -> Hook:
    """Make the hook that ends a run whose metrics are not finite. Put it before the one that saves.

    Args:
        every: steps between two looks; a mean over the steps between hides no NaN.

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


def _rows_until(path: Path, step: int) -> list[dict]:
    """Read the rows up to a step; a last line cut short by a kill is dropped with those past the step."""
    if step == 0 or not path.exists():
        return []
    rows = []
    for line in path.read_text().splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return [row for row in rows if row["step"] <= step]
