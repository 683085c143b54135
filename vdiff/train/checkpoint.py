"""Saving and restoring a run, by Orbax.

A checkpoint is a folder named by its step. Orbax writes it under a temporary name and renames it when it is
whole, so that a run killed while saving keeps the one before.
"""

import hashlib
import json
import logging
import os
from pathlib import Path

import jax
import orbax.checkpoint as ocp

from vdiff.train.loop import Hook
from vdiff.train.step import TrainState

_CHECKSUMS = "sha256.json"

logging.getLogger("absl").setLevel(logging.ERROR)


def save(directory: str | Path, state: TrainState, *, max_to_keep: int = 3) -> None:
    """Save a state under its step; a step that is saved already stays as it is.

    Args:
        directory: where the checkpoints of one run lie; made if absent.
        state: the `TrainState` to save.
        max_to_keep: how many of the newest checkpoints stay.

    Raises:
        OSError: if the disk does not take it; earlier checkpoints stay whole.
    """
    with _manager(directory, max_to_keep) as manager:
        step, newest = int(state.step), manager.latest_step()
        if newest is not None and step < newest:
            raise ValueError(
                f"directory: got {directory}, which holds step {newest}, expected none after step {step}; "
                "choose another directory, or move the later checkpoints away"
            )
        if step not in manager.all_steps():
            manager.save(step, args=ocp.args.StandardSave(state))
            folder = Path(directory).absolute() / str(step)
            temporary = folder.with_name(f"{step}.{_CHECKSUMS}")
            temporary.write_text(json.dumps(_checksums(folder)))
            os.replace(temporary, folder / _CHECKSUMS)


def latest_step(directory: str | Path) -> int | None:
    """Find the newest step saved in a directory.

    Args:
        directory: where the checkpoints of one run lie; may be absent.

    Returns:
        The step, or None where nothing whole was saved.
    """
    if not Path(directory).is_dir():
        return None
    with _manager(directory) as manager:
        return manager.latest_step()


def restore(directory: str | Path, like: TrainState) -> TrainState:
    """Restore the newest state of a directory.

    Args:
        directory: where the checkpoints of one run lie.
        like: a state of the same run, e.g. from `init_state`; gives shapes, dtypes and placement. It is not
            changed.

    Returns:
        The saved `TrainState`.

    Raises:
        FileNotFoundError: if the directory holds no checkpoint.
        ValueError: if the checkpoint belongs to another model, or cannot be read.
    """
    step = latest_step(directory)
    if step is None:
        raise FileNotFoundError(
            f"directory: got {directory}, expected a folder with a saved checkpoint; start the run anew"
        )
    folder = Path(directory).absolute() / str(step)
    _verify(folder)
    with _manager(directory) as manager:
        try:
            saved = _shapes(manager.item_metadata(step))
        except Exception as error:
            raise _unreadable(folder, error) from error
        # Orbax lists a key by the shape of its raw data.
        expected = _shapes(like._replace(key=jax.random.key_data(like.key)))
        if saved != expected:
            raise ValueError(_difference(folder, saved, expected))
        try:
            return manager.restore(step, args=ocp.args.StandardRestore(like))
        except Exception as error:
            raise _unreadable(folder, error) from error


def checkpoint_every(num_steps: int, directory: str | Path, *, max_to_keep: int = 3) -> Hook:
    """Make the hook that saves the state every so many steps, and at the last one.

    Args:
        num_steps: steps between two checkpoints.
        directory: where the checkpoints of one run lie.
        max_to_keep: how many of the newest stay.

    Returns:
        A `Hook` for `fit`.
    """
    return Hook(num_steps, lambda step, state, metrics: save(directory, state, max_to_keep=max_to_keep))


def _manager(directory: str | Path, max_to_keep: int | None = None) -> ocp.CheckpointManager:
    options = ocp.CheckpointManagerOptions(max_to_keep=max_to_keep, enable_async_checkpointing=False)
    handler = ocp.StandardCheckpointHandler()
    return ocp.CheckpointManager(Path(directory).absolute(), options=options, item_handlers=handler)


def _shapes(tree: object) -> dict[str, tuple[int, ...]]:
    """List the shapes of a tree's leaves by path, whether it holds arrays or Orbax's metadata of them."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(getattr(tree, "tree", tree))
    return {".".join(_name(entry) for entry in path): tuple(leaf.shape) for path, leaf in leaves}


def _name(entry: object) -> str:
    """Name a step of a tree's path: a field, a key or a position."""
    return str(next(getattr(entry, kind) for kind in ("name", "key", "idx") if hasattr(entry, kind)))


def _difference(folder: Path, saved: dict, expected: dict) -> str:
    names = sorted(set(saved) | set(expected))
    name = next(name for name in names if saved.get(name) != expected.get(name))
    got, wanted = (str(d.get(name, "nothing")) for d in (saved, expected))
    return (
        f"checkpoint {folder}: got another model's state ({name} has shape {got}), expected {wanted}; "
        "resume with the settings that the run began with, or choose another run directory"
    )


def _checksums(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != _CHECKSUMS)
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def _verify(folder: Path) -> None:
    """Refuse a checkpoint whose files changed since it was saved, before Orbax meets them."""
    try:
        expected = json.loads((folder / _CHECKSUMS).read_text())
    except FileNotFoundError:
        return  # killed between Orbax's rename and ours: whole, but without checksums
    except ValueError as error:
        raise _unreadable(folder, f"{_CHECKSUMS} is not JSON") from error
    found = _checksums(folder)
    damaged = sorted(name for name in set(found) | set(expected) if found.get(name) != expected.get(name))
    if damaged:
        raise _unreadable(folder, f"{damaged[0]} is not as it was saved")


def _unreadable(folder: Path, reason: object) -> ValueError:
    line = (str(reason).splitlines() or [type(reason).__name__])[0][:200]
    return ValueError(
        f"checkpoint {folder}: got unreadable files ({line}), expected a whole checkpoint; move this "
        "folder away to resume from the one before"
    )
