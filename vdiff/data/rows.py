"""Data that need not be in memory: as much of an array as training and judging ask for.

    rows[[5, 0, 9]]   reads three data, in this order, into a fresh array
    rows[:500]        the first 500, still unread
    np.asarray(rows)  reads all

So a function that only indexes its data along the first axis takes `Rows` wherever it takes an array.
"""

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Rows:
    """Hold N data of one shape and dtype that are read when they are asked for.

    Attributes:
        shape: (N, ...), as of an array that holds them all.
        dtype: of every datum.
        read: `(indices int64 [n], each in 0 .. N - 1) -> [n, ...]`, in the order asked for; a fresh array. Several
            threads may call it.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[np.ndarray], np.ndarray]

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any) -> "np.ndarray | Rows":
        """Read one datum or an array of them; a slice reads nothing and gives `Rows`, as that of an array is a view."""
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            return view(self, len(range(start, stop, step)), lambda positions: start + step * positions)
        wanted = np.asarray(index)
        if wanted.dtype.kind not in "iu" and wanted.size:
            raise TypeError(
                f"rows: got an index of dtype {wanted.dtype}, expected integers or a slice, or flatnonzero(mask)"
            )
        wanted = wanted.astype(np.int64)
        outside = (wanted < -len(self)) | (wanted >= len(self))
        if outside.any():
            raise IndexError(f"rows: got index {wanted[outside][0]}, expected one of {len(self)} rows")
        wanted = np.where(wanted < 0, wanted + len(self), wanted)
        read = self.read(wanted.ravel())
        return read.reshape(*wanted.shape, *self.shape[1:])

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        """Read everything."""
        if copy is False:
            raise ValueError("rows: got copy=False, expected a copy to be allowed: they are not in memory")
        read = self.read(np.arange(len(self)))
        return read if dtype is None else read.astype(dtype, copy=False)


def view(rows: Rows, num_rows: int, index_of: Callable[[np.ndarray], np.ndarray]) -> Rows:
    """See some of the data, in another order; nothing is read.

    Args:
        rows: [N, ...].
        num_rows: M, how many are seen.
        index_of: `(positions int64 [n], each in 0 .. M - 1) -> indices [n] into rows`.

    Returns:
        `Rows` [M, ...]; position i is `rows[index_of(i)]`.
    """
    shape = (num_rows, *rows.shape[1:])
    return Rows(shape, rows.dtype, lambda positions: rows.read(index_of(positions)))


def from_source(source: Any, decode: Callable[[Any], np.ndarray] = np.asarray) -> Rows:
    """Take any source of random access as `Rows`, e.g. one of Grain's.

        from_source(grain.MapDataset.source(files).map(parse))

    Args:
        source: has `len(source)` and `source[i]`; its `__getitems__(indices)` is used if there is one.
        decode: `(what the source gives) -> array`, one datum; of one shape and dtype throughout.

    Returns:
        `Rows` [N, ...], with the shape and dtype of the first datum.

    Raises:
        ValueError: if the source is empty; when read, if a datum has another shape or dtype than the first.
    """
    num_rows = len(source)
    if num_rows == 0:
        raise ValueError("source: got no data, expected at least one")
    first = np.asarray(decode(source[0]))

    def fetch(indices: Sequence[int]) -> Sequence[Any]:
        if hasattr(source, "__getitems__"):
            return source.__getitems__(indices)
        return [source[i] for i in indices]

    def read(indices: np.ndarray) -> np.ndarray:
        asked = [operator.index(i) for i in indices]
        out = np.empty((len(asked), *first.shape), first.dtype)
        for position, given in enumerate(fetch(asked) if asked else ()):
            datum = np.asarray(decode(given))
            if (datum.shape, datum.dtype) != (first.shape, first.dtype):
                raise ValueError(
                    f"source[{asked[position]}]: got {describe(datum)}, expected {describe(first)} as source[0]; "
                    "store all data alike"
                )
            out[position] = datum
        return out

    return Rows((num_rows, *first.shape), first.dtype, read)


def describe(array: Any) -> str:
    """Write the dtype and shape of an array or `Rows`, e.g. uint8[60000, 28, 28]."""
    return f"{array.dtype}{list(array.shape)}"
