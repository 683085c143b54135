"""Saving a run, by Orbax: asynchronous, atomic, with a manifest of checksums.

    write       to STEP.orbax-checkpoint-tmp, while training goes on
    manifest    when every process has written, the first sums the files and flushes them to the disk
    commit      the folder is renamed to STEP; then older ones are deleted

A process killed before the commit leaves half a folder under a name that nobody reads, and the checkpoint before.
"""

import contextlib
import itertools
import math
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import orbax.checkpoint as ocp

from vdiff.train.checksums import MANIFEST, DamagedError, extend_manifest, verify, write_manifest
from vdiff.train.hosts import is_first, largest
from vdiff.train.loop import Hook
from vdiff.train.restore import FORMAT, NOTES, saved_steps
from vdiff.train.step import TrainState

_TEMPORARY = ".orbax-checkpoint-tmp"
_Write = Callable[[int, TrainState, dict[str, float]], None]


def save(directory: str | Path, state: TrainState, *, keep_last: int = 3) -> None:
    """Save a state under its step, and wait until it is saved; a step that is saved already stays as it is.

    Args:
        directory: where the checkpoints of one run lie; made if absent.
        state: the `TrainState` to save.
        keep_last: how many of the newest checkpoints stay.

    Raises:
        OSError: if the disk does not take it; earlier checkpoints stay as they are.
        ValueError: if the directory holds a later step.
    """
    with _writer(Path(directory).absolute(), keep_last, None) as write:
        write(int(state.step), state, {})


@contextlib.contextmanager
def checkpoint_every(
    num_steps: int, directory: str | Path, *, keep_last: int = 3, best: str | None = None
) -> Iterator[Hook]:
    """Save the state every so many steps, and at the last one, while training goes on.

    A checkpoint is begun only when the one before it is finished, so a kill costs at most 2 num_steps steps. Leaving
    the context waits for the last; a KeyboardInterrupt does not.

    Args:
        num_steps: steps between two checkpoints.
        directory: where the checkpoints of one run lie.
        keep_last: how many of the newest stay; two at least, if a damaged one is to have another behind it.
        best: name of a metric, larger is better: the checkpoint with the largest value stays too. The hook that
            gives it comes before this one; a checkpoint at whose step it gives none is not judged.

    Yields:
        A `Hook` for `fit`.

    Raises:
        OSError: if the disk does not take a checkpoint, at the next one or on leaving; earlier ones stay as they are.
        ValueError: if the directory holds a later step; on leaving, if `best` is the name of no metric.
    """
    with _writer(Path(directory).absolute(), keep_last, best) as write:
        yield Hook(num_steps, write)


@contextlib.contextmanager
def _writer(directory: Path, keep_last: int, best: str | None) -> Iterator[_Write]:
    """Open Orbax's manager at the first state to be saved, and see the last one to the disk."""
    if keep_last < 1:
        raise ValueError(f"keep_last: got {keep_last}, expected at least 1")
    manager: ocp.CheckpointManager | None = None
    written: int | None = None  # the step that was last given to the manager
    is_pending = False
    seen: set[str] = set()

    def seal() -> None:
        """Write the manifest; Orbax calls this when all processes have written, before it renames the folder."""
        # Some versions of Orbax add a number to the name.
        temporary = max(directory.glob(f"{written}{_TEMPORARY}*"), key=os.path.getmtime)
        write_manifest(temporary, FORMAT, later=NOTES)

    def finish() -> None:
        """Wait for the checkpoint that is being written, and bring its commit to the disk."""
        nonlocal is_pending
        if manager is None or not is_pending:
            return
        is_pending = False
        with _one_line(directory, written):
            manager.wait_until_finished()
            if is_first():
                extend_manifest(directory / str(written))

    def write(step: int, state: TrainState, metrics: dict[str, float]) -> None:
        nonlocal manager, written, is_pending
        finish()
        seen.update(metrics)
        if manager is None:
            with _one_line(directory, step):
                manager = _open(directory, keep_last, best, seal, step)
        newest = manager.latest_step()
        if newest is not None and step < newest:
            raise ValueError(
                f"directory: got {directory}, which holds step {newest}, expected none after step {step}; "
                "choose another directory, or move the later checkpoints away"
            )
        if step == newest:
            return
        judged = {best: metrics[best]} if math.isfinite(metrics.get(best, math.nan)) else None
        written, is_pending = step, True
        with _one_line(directory, step):
            manager.save(step, args=ocp.args.StandardSave(state), metrics=judged, force=True)

    try:
        yield write
    except KeyboardInterrupt:
        raise  # at once: what is half written is no checkpoint
    except BaseException as error:
        try:
            finish()
        except OSError as unsaved:
            error.add_note(str(unsaved))
        raise
    finish()
    if manager is not None:
        manager.close()
        if best is not None and best not in seen:
            raise ValueError(f"best: got {best!r}, expected the name of a metric: {', '.join(sorted(seen))}")


def _open(
    directory: Path, keep_last: int, best: str | None, seal: Callable[[], None], step: int
) -> ocp.CheckpointManager:
    def value(metrics: dict[str, float]) -> float:
        return metrics.get(best, -math.inf)

    policies = ocp.checkpoint_managers
    newest = policies.LatestN(keep_last)
    highest = policies.BestN(get_metric_fn=value, n=1, keep_checkpoints_without_metrics=False)
    options = ocp.CheckpointManagerOptions(
        preservation_policy=newest if best is None else policies.AnyPreservationPolicy([newest, highest]),
        best_fn=None if best is None else value,
        cleanup_tmp_directories=True,
        async_options=ocp.AsyncOptions(post_finalization_callback=seal),
    )
    handler = ocp.StandardCheckpointHandler()
    _set_aside(directory, step)
    if is_first():
        for left in directory.glob(f"*.{MANIFEST}"):  # by a process killed before it put it in its folder
            left.unlink()
    largest(0)  # all wait until the first has done it
    try:
        return ocp.CheckpointManager(directory, options=options, item_handlers=handler)
    except ValueError:  # a file of metrics that is no JSON
        _set_aside(directory, 0)
        return ocp.CheckpointManager(directory, options=options, item_handlers=handler)


def _set_aside(directory: Path, first: int) -> None:
    """Rename the damaged checkpoints from a step on, which a run that resumed before them will reach again."""
    steps = saved_steps(directory) if is_first() else []
    for step in steps:
        folder = directory / str(step)
        if step < first:
            continue
        try:
            verify(folder, later=NOTES)
        except DamagedError:
            names = (directory / f"{step}.damaged-{i}" for i in itertools.count(1))
            os.replace(folder, next(path for path in names if not path.exists()))


@contextlib.contextmanager
def _one_line(directory: Path, step: int | None) -> Iterator[None]:
    """Tell in one line that a checkpoint could not be written, and free what half of it takes."""
    try:
        yield
    except Exception as error:
        for temporary in directory.glob(f"{step}{_TEMPORARY}*"):
            shutil.rmtree(temporary, ignore_errors=True)
        reason = str(error)
        is_full = "No space left" in reason
        line = (
            "no space left on the disk"
            if is_full
            else (reason.splitlines() or [type(error).__name__])[0][:200]
        )
        before = [saved for saved in saved_steps(directory) if saved != step]
        raise OSError(
            f"checkpoint {directory / str(step)}: could not be written ({line}), "
            + (f"the one of step {before[-1]} is as it was" if before else "and there is none before it")
            + "; free some space and run the same command again" * is_full
        ) from error
