"""Folders of data files: written whole or not at all, and listed in the order of their names."""

import contextlib
import itertools
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from vdiff.data.rows import describe


@contextlib.contextmanager
def new_folder(directory: str | Path) -> Iterator[Path]:
    """Write into a folder beside `directory`, which takes its place when all is written.

    Args:
        directory: where the files will be; new, or an empty folder.

    Yields:
        The folder to write into; if an error or an interruption comes, it is removed and `directory` stays as it was.

    Raises:
        ValueError: if `directory` holds anything, or cannot be written.
    """
    directory = Path(directory).expanduser()
    if directory.exists() and not (directory.is_dir() and not any(directory.iterdir())):
        raise ValueError(
            f"directory: got {directory}, which holds something, expected a new or empty folder; choose another"
        )
    part = directory.with_name(f".{directory.name}.{os.getpid()}.part")
    try:
        with writing(directory):
            part.mkdir(parents=True)
        yield part
        with writing(directory):
            os.replace(part, directory)
    finally:
        shutil.rmtree(part, ignore_errors=True)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what writing to a disk raises into one line.

    Raises:
        ValueError: if the path cannot be written.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:  # RuntimeError is ArrayRecord's
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise ValueError(
            f"{path}: cannot be written ({reason}), expected a writable place with room; choose another"
        ) from error


def files_of(directory: str | Path, suffix: str) -> list[Path]:
    """List the files of a folder whose names end in `suffix`, by name; hidden ones are left out.

    Raises:
        ValueError: if there is no such folder, or no such file in it.
    """
    directory = Path(directory).expanduser()
    if not directory.is_dir():
        raise ValueError(f"{directory}: no such folder, expected one of {suffix} files; check the path")
    names = sorted(path for path in directory.glob(f"*{suffix}") if not path.name.startswith("."))
    if not names:
        raise ValueError(f"{directory}: got no {suffix} file, expected at least one; check the path")
    return names


def in_parts(rows: Iterable[Any], size: int) -> Iterator[list[np.ndarray]]:
    """Take `size` data at a time, the last time fewer.

    Args:
        rows: data of one shape and dtype, arrays or numbers, e.g. an array [N, ...] or a generator.
        size: at least 1.

    Yields:
        Lists of arrays.

    Raises:
        ValueError: if there is no datum, one has another shape or dtype than the first, or `size` is below 1.
    """
    if size < 1:
        raise ValueError(f"data per file: got {size}, expected at least 1")
    checked = _alike(rows)
    while part := list(itertools.islice(checked, size)):
        yield part


def _alike(rows: Iterable[Any]) -> Iterator[np.ndarray]:
    first = None
    for i, row in enumerate(rows):
        row = np.asarray(row)
        first = row if first is None else first
        if row.dtype.kind not in "buifc":
            raise ValueError(
                f"rows[{i}]: got dtype {row.dtype}, expected numbers; convert it with np.asarray"
            )
        if (row.shape, row.dtype) != (first.shape, first.dtype):
            raise ValueError(
                f"rows[{i}]: got {describe(row)}, expected {describe(first)} as rows[0]; make all data alike"
            )
        yield row
    if first is None:
        raise ValueError("rows: got no data, expected at least one")
