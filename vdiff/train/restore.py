"""Restoring a run: the newest whole checkpoint, on any number of devices, in any mode.

Files are compared with their checksums before Orbax meets them: a damaged checkpoint is passed over, never read.
"""

import logging
import warnings
from collections.abc import Callable
from pathlib import Path

import jax
import orbax.checkpoint as ocp

from vdiff.train.checksums import DamagedError, verify
from vdiff.train.guard import NOTHING_SKIPPED
from vdiff.train.hosts import from_first, is_first, largest
from vdiff.train.sharding import placed, shape_at
from vdiff.train.step import TrainState

# 1: a TrainState, its checksums in sha256.json. 2: with its guard, and with a manifest that says the format.
FORMAT = 2
# Written by Orbax at its commit, when the manifest is there already.
NOTES = ("_CHECKPOINT_METADATA", "commit_success.txt")

# What Orbax fails at is raised, here in one line; it would log it too, with a traceback from every thread.
logging.getLogger("absl").addFilter(lambda record: "orbax" not in record.pathname)


def _warn(line: str) -> None:
    warnings.warn(line, stacklevel=4)


def restore(
    directory: str | Path,
    like: TrainState,
    *,
    step: int | None = None,
    shardings: Callable[[TrainState], TrainState] | None = None,
    on_skip: Callable[[str], None] = _warn,
) -> TrainState:
    """Restore the newest whole state of a directory.

    Of several processes, which all call this, the first chooses the checkpoint and sums its files; all read that one.

    Args:
        directory: where the checkpoints of one run lie.
        like: a state of the same run, e.g. from `init_state`; gives shapes, dtypes and placement, which may be on other
            devices than the saved state's. It is not changed.
        step: the step to restore, e.g. `best_step(...)`; None for the newest that is whole.
        shardings: `(like) -> where each leaf is to lie`, e.g. `CompiledStep.shardings`, and `like` may then be the
            state's shapes alone, `jax.eval_shape(lambda: init_state(...))`; None for where those of `like` lie.
        on_skip: told in one line of each damaged checkpoint that is passed over, and why; a warning when left out.

    Returns:
        The saved `TrainState`.

    Raises:
        FileNotFoundError: if the directory holds no checkpoint, or not that of `step`, or one of several processes does
            not see it.
        ValueError: if all are damaged, or the one asked for; if the newest whole one is of another model, or of a
            newer format than this version knows; in the other processes, if the first raised.
    """
    directory = Path(directory).absolute()
    chosen, refused = -1, None
    if is_first():
        try:
            chosen = _choose(directory, step, on_skip)
        except Exception as error:  # noqa: BLE001  raised when the others know
            refused = error
    chosen = from_first(chosen)
    folder = directory / str(chosen)
    is_missing = largest(not folder.is_dir())
    if chosen < 0:
        raise refused or ValueError(
            f"directory: got {directory}, of which the first process restores nothing, and says why"
        )
    if is_missing:
        raise FileNotFoundError(
            f"directory: got {directory}, whose step {chosen} not every process sees; expected a disk that all share"
        )
    return _read(folder, like, shardings)


def _choose(directory: Path, step: int | None, on_skip: Callable[[str], None]) -> int:
    """Find the newest step that is whole, or insist on one."""
    steps = saved_steps(directory)
    if not steps:
        raise FileNotFoundError(
            f"directory: got {directory}, expected a folder with a saved checkpoint; start the run anew"
        )
    if step is not None and step not in steps:
        raise FileNotFoundError(f"step: got {step}, expected one that {directory} holds: {steps}")
    reasons = []
    for candidate in reversed(steps) if step is None else [step]:
        folder = directory / str(candidate)
        try:
            version = verify(folder, later=NOTES)
        except DamagedError as error:
            reasons.append(f"{candidate}: {error}")
            if step is None:
                on_skip(f"checkpoint {folder} is damaged and was skipped: {error}")
            continue
        if version > FORMAT:
            raise ValueError(
                f"checkpoint {folder}: got format {version}, expected at most {FORMAT}; it was written by a newer "
                "vdiff: upgrade vdiff"
            )
        return candidate
    raise ValueError(
        f"directory: got {directory}, where no checkpoint is whole ({'; '.join(reasons)}), expected one; "
        + (
            "start the run anew in another directory"
            if step is None
            else "leave step out for the newest whole one"
        )
    )


def saved_steps(directory: str | Path) -> list[int]:
    """List the steps saved in a directory, oldest first, whole or damaged."""
    directory = Path(directory)
    names = [path.name for path in directory.iterdir()] if directory.is_dir() else []
    return sorted(int(name) for name in names if name.isascii() and name.isdigit())


def latest_step(directory: str | Path) -> int | None:
    """Find the newest step saved in a directory.

    Args:
        directory: where the checkpoints of one run lie; may be absent.

    Returns:
        The step, or None where nothing was saved; whether it is whole, `restore` says.
    """
    return max(saved_steps(directory), default=None)


def best_step(directory: str | Path, metric: str) -> int | None:
    """Find the whole checkpoint with the largest value of a metric.

    Args:
        directory: where the checkpoints of one run lie; may be absent.
        metric: what `checkpoint_every(best=...)` was given.

    Returns:
        Its step, to be given to `restore(step=...)`, the newest of equals; None where none has a value of the metric.
    """
    values = {}
    for step in saved_steps(directory):
        folder = Path(directory).absolute() / str(step)
        try:
            verify(folder, later=NOTES)
        except DamagedError:
            continue
        if (folder / "metrics").is_dir():
            metrics = ocp.JsonCheckpointHandler("metrics").restore(folder / "metrics")
            values |= {step: metrics[metric]} if metric in metrics else {}
    return max(values, key=lambda step: (values[step], step), default=None)


def _read(folder: Path, like: TrainState, shardings: Callable[[TrainState], TrainState] | None) -> TrainState:
    """Read a folder whose files are as they were saved."""
    if shardings is not None:
        there = shardings(like)
        guard = jax.tree.map(placed, NOTHING_SKIPPED, there.guard)
        like = jax.tree.map(shape_at, like, there)._replace(guard=guard)
    fields = like._asdict()
    with ocp.StandardCheckpointer() as checkpointer:
        try:
            saved = _layout(checkpointer.metadata(folder / "default").item_metadata)
        except Exception as error:
            raise _unreadable(folder, error) from error
        if not any(name.startswith("guard.") for name in saved):
            del fields["guard"]  # of format 1, before there was one: that of `like` stands in
        # Orbax lists a key by its raw data.
        expected = _layout(fields | {"key": jax.eval_shape(jax.random.key_data, like.key)})
        if saved != expected:
            raise ValueError(_difference(folder, saved, expected))
        try:
            return like._replace(**checkpointer.restore(folder / "default", fields))
        except Exception as error:
            raise _unreadable(folder, error) from error


def _layout(tree: object) -> dict[str, str]:
    """List dtype and shape of a tree's leaves by path, whether it holds arrays or Orbax's metadata of them."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(getattr(tree, "tree", tree))
    return {
        ".".join(_name(entry) for entry in path): f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in leaves
    }


def _name(entry: object) -> str:
    """Name a step of a tree's path: a field, a key or a position."""
    return str(next(getattr(entry, kind) for kind in ("name", "key", "idx") if hasattr(entry, kind)))


def _difference(folder: Path, saved: dict[str, str], expected: dict[str, str]) -> str:
    names = sorted(saved.keys() | expected.keys())
    name = next(name for name in names if saved.get(name) != expected.get(name))
    got, wanted = (d.get(name, "nothing") for d in (saved, expected))
    return (
        f"checkpoint {folder}: got another model's state ({name} is {got}), expected {wanted}; "
        "resume with the settings that the run began with, or choose another run directory"
    )


def _unreadable(folder: Path, error: Exception) -> ValueError:
    line = (str(error).splitlines() or [type(error).__name__])[0][:200]
    return ValueError(
        f"checkpoint {folder}: got files that are as they were saved but cannot be read ({line}), expected to read "
        "them; try again with the versions of orbax and jax that wrote them"
    )
