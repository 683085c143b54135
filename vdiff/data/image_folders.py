"""Images larger than memory: a folder of shards or records seen as grey levels, and a tenth of it held out."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from vdiff.data.permutations import keyed
from vdiff.data.records import SUFFIX, open_records
from vdiff.data.rows import Rows, describe, view
from vdiff.data.shards import open_shards


def open_images(directory: Path) -> tuple[Rows, int]:
    """See a folder of `.npy` shards, or of `.array_record` files, as images; nothing but headers is read.

    Args:
        directory: its images are uint8 or bool, of which any is a grey level, so that none need be looked at;
            [N, H, W] or [N, H, W, C].

    Returns:
        The images, uint8 [N, H, W, C], and how many levels a pixel can take: 256, or 2 of bool.

    Raises:
        ImportError: if the files are records and Grain is missing.
        ValueError: if there are no such files or both kinds, or they hold no images or other numbers.
    """
    found = [suffix for suffix in (".npy", SUFFIX) if any(directory.glob(f"*{suffix}"))]
    if len(found) != 1:
        raise ValueError(
            f"{directory}: got {'both kinds of files' if found else 'none of these files'}, expected .npy shards or "
            f"{SUFFIX} files; vdiff.data.write_shards writes them"
        )
    rows = open_shards(directory) if found == [".npy"] else open_records(directory)
    if len(rows.shape) not in (3, 4) or 0 in rows.shape:
        raise ValueError(
            f"{directory}: got {describe(rows)}, expected images [N, H, W] or [N, H, W, C]; reshape them"
        )
    if rows.dtype not in (np.uint8, np.bool_):
        raise ValueError(
            f"{directory}: got {describe(rows)}, expected uint8 or bool; write grey levels in [0, 1] as "
            "np.rint(255 * images).astype(np.uint8)"
        )
    shape = rows.shape if len(rows.shape) == 4 else (*rows.shape, 1)

    def read(indices: np.ndarray) -> np.ndarray:
        return rows.read(indices).view(np.uint8).reshape(-1, *shape[1:])

    return Rows(shape, np.dtype(np.uint8), read), 2 if rows.dtype == np.bool_ else 256


def hold_out_tenth(rows: Rows, name: str) -> tuple[Rows, Rows, Callable[[np.ndarray], np.ndarray]]:
    """Split data at nine tenths of one fixed permutation, `keyed(0, 0, N)`; nothing is read.

    Args:
        rows: [N, ...], N at least 2.
        name: what the error calls them.

    Returns:
        The first nine tenths, the last tenth (at least one), and the permutation.

    Raises:
        ValueError: if there is one datum only.
    """
    if len(rows) < 2:
        raise ValueError(f"{name}: got 1 image, expected at least 2 to hold one out; add a folder test")
    num_kept = len(rows) - max(1, len(rows) // 10)
    order = keyed(0, 0, len(rows))
    held_out = view(rows, len(rows) - num_kept, lambda positions: order(positions + num_kept))
    return view(rows, num_kept, order), held_out, order
