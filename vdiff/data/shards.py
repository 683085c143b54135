"""A data set larger than memory as a folder of `.npy` files, its shards, that are mapped into memory as they are read.

    write_shards("big/train", images)         images: an array, or an iterable of any length
    rows = open_shards("big/train")           as one array [N, ...], nothing read
    batches(rows, batch_size, seed)

The shards follow each other in the order of their names and may differ in length. A shard is mapped for one read and
then let go: neither memory nor open files grow with the data.
"""

import math
import mmap
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vdiff.data.folders import files_of, in_parts, new_folder, writing
from vdiff.data.rows import Rows, describe


def write_shards(directory: str | Path, rows: Iterable[Any], *, rows_per_shard: int = 8192) -> list[Path]:
    """Write data into a new folder of shards, `000000.npy` and so on; whole or not at all.

    Args:
        directory: where the shards will be; new, or an empty folder.
        rows: data of one shape and dtype: an array [N, ...], `Rows`, or any iterable, of which one shard at a time is
            in memory.
        rows_per_shard: how many data a shard has; the last may have fewer.

    Returns:
        The shards' paths.

    Raises:
        ValueError: if `directory` holds anything or cannot be written, or the data are none or differ.
    """
    directory = Path(directory).expanduser()
    names = []
    with new_folder(directory) as folder:
        for i, part in enumerate(in_parts(rows, rows_per_shard)):
            names.append(f"{i:06d}.npy")
            with writing(directory):
                np.save(folder / names[-1], np.stack(part))
    return [directory / name for name in names]


def open_shards(directory: str | Path) -> Rows:
    """See a folder of shards as one array; reads their headers only.

    Args:
        directory: a folder of `.npy` files, each [n, ...], alike in dtype and in all but the first axis.

    Returns:
        `Rows` [N, ...].

    Raises:
        ValueError: if there is no shard, or one is damaged, cut short, or unlike the first; when read, if one has gone
            or was changed.
    """
    shards = [_look_at(path) for path in files_of(directory, ".npy")]
    first = shards[0]
    for shard in shards:
        if (shard.shape[1:], shard.dtype) != (first.shape[1:], first.dtype):
            raise ValueError(
                f"{shard.path}: got {describe(shard)}, expected {describe(first)} in all but the first axis, as "
                f"{first.path.name} has; write all shards alike"
            )
    ends = np.cumsum([shard.shape[0] for shard in shards])
    if ends[-1] == 0:
        raise ValueError(f"{directory}: got shards of no rows, expected at least one row")

    def read(indices: np.ndarray) -> np.ndarray:
        out = np.empty((len(indices), *first.shape[1:]), first.dtype)
        shard_of = np.searchsorted(ends, indices, side="right")
        for i in np.unique(shard_of):
            here = np.flatnonzero(shard_of == i)
            out[here] = _mapped(shards[i])[indices[here] - (ends[i] - shards[i].shape[0])]
        return out

    return Rows((int(ends[-1]), *first.shape[1:]), first.dtype, read)


class _Shard(NamedTuple):
    path: Path
    shape: tuple[int, ...]
    dtype: np.dtype
    offset: int
    order: str


def _look_at(path: Path) -> _Shard:
    try:
        mapped = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # a damaged header raises whatever NumPy met first
        raise ValueError(
            f"{path}: got a file that is damaged, cut short or not plain numbers, expected a whole .npy file; write it "
            "again with np.save"
        ) from error
    if mapped.ndim == 0 or mapped.dtype.kind not in "buifc":
        raise ValueError(
            f"{path}: got {describe(mapped)}, expected numbers [n, ...]; write it again with np.save"
        )
    order = "C" if mapped.flags.c_contiguous else "F"
    return _Shard(path, mapped.shape, mapped.dtype, mapped.offset, order)


def _mapped(shard: _Shard) -> np.ndarray:
    count = math.prod(shard.shape)
    try:
        with shard.path.open("rb") as file:
            length = shard.offset + count * shard.dtype.itemsize
            mapped = mmap.mmap(file.fileno(), length, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{shard.path}: cannot be read any more ({error}), expected the shard as it was when opened; put it back, "
            "and the same command goes on"
        ) from error
    # As np.memmap does, in half its time.
    return np.frombuffer(mapped, shard.dtype, count, shard.offset).reshape(shard.shape, order=shard.order)
