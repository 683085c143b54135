"""A data set larger than memory as a folder of ArrayRecord files, read through Grain, an optional dependency.

    write_records("big/train", images)        an .npy of each datum as one record, compressed
    rows = open_records("big/train")          as one array [N, ...], nothing but the first record read
    batches(rows, batch_size, seed)

The files follow each other in the order of their names and may differ in length. Records of your own format, e.g. JPEG
or tf.train.Example, take a `decode`. Grain's own pipelines (`grain.MapDataset`) are taken by `from_source`.
"""

import io
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from vdiff.data.folders import files_of, in_parts, new_folder, writing
from vdiff.data.rows import Rows, from_source

SUFFIX = ".array_record"


def write_records(directory: str | Path, rows: Iterable[Any], *, rows_per_file: int = 8192) -> list[Path]:
    """Write data into a new folder of ArrayRecord files, one record a datum; whole or not at all.

    Args:
        directory: where the files will be; new, or an empty folder.
        rows: data of one shape and dtype: an array [N, ...], `Rows`, or any iterable.
        rows_per_file: how many data a file has; the last may have fewer.

    Returns:
        The files' paths.

    Raises:
        ImportError: if Grain is missing.
        ValueError: if `directory` holds anything or cannot be written, or the data are none or differ.
    """
    _grain()
    from array_record.python.array_record_module import ArrayRecordWriter

    directory = Path(directory).expanduser()
    names = []
    with new_folder(directory) as folder:
        for i, part in enumerate(in_parts(rows, rows_per_file)):
            names.append(f"{i:06d}{SUFFIX}")
            with writing(directory):
                # One record a group, so that one can be read without its neighbours.
                writer = ArrayRecordWriter(str(folder / names[-1]), "group_size:1")
                for row in part:
                    writer.write(_to_npy(row))
                writer.close()
    return [directory / name for name in names]


def open_records(directory: str | Path, decode: Callable[[bytes], np.ndarray] | None = None) -> Rows:
    """See a folder of ArrayRecord files as one array.

    Args:
        directory: a folder of `.array_record` files.
        decode: `(record) -> array`, one datum; of one shape and dtype throughout. Left out for records that
            `write_records` wrote.

    Returns:
        `Rows` [N, ...].

    Raises:
        ImportError: if Grain is missing.
        ValueError: if there is no file or no record, or a file is damaged or cut short; when read, if a record is
            damaged, or has another shape or dtype than the first.
    """
    grain = _grain()
    paths = [str(path) for path in files_of(directory, SUFFIX)]
    source = _Records(Path(directory), _open(grain, paths))
    if len(source) == 0:
        raise ValueError(f"{directory}: got files of no records, expected at least one")
    return from_source(source, _npy_like(source[0]) if decode is None else decode)


def _to_npy(row: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(row).reshape(np.shape(row)), allow_pickle=False)
    return buffer.getvalue()


def _npy_like(example: bytes) -> Callable[[bytes], np.ndarray]:
    """Make the decoder of .npy records; where the header is the example's, it is not parsed again."""
    first = _from_npy(example)
    header = example[: len(example) - first.nbytes]

    def decode(record: bytes) -> np.ndarray:
        if len(record) == len(example) and record.startswith(header) and first.flags.c_contiguous:
            return np.frombuffer(record, first.dtype, offset=len(header)).reshape(first.shape)
        return _from_npy(record)

    return decode


def _from_npy(record: bytes) -> np.ndarray:
    try:
        return np.load(io.BytesIO(record), allow_pickle=False)
    except Exception as error:  # whatever NumPy met first
        raise ValueError(
            f"record: got {len(record)} bytes beginning {record[:4].hex()}, expected an .npy, as write_records writes; "
            "give open_records the decode of your own format"
        ) from error


class _Records:
    """Read records of Grain's source; its errors become one line."""

    def __init__(self, directory: Path, source: Any) -> None:
        self._directory, self._source = directory, source

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> bytes:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> Sequence[bytes]:
        try:
            return self._source.__getitems__(indices)
        except RuntimeError as error:
            raise ValueError(
                f"{self._directory}: a record cannot be read ({_one_line(error)}), expected whole files; put them "
                "back, and the same command goes on"
            ) from error


def _open(grain: ModuleType, paths: list[str]) -> Any:
    for path in paths:  # one by one, since an error does not always name its file
        try:
            grain.sources.ArrayRecordDataSource([path])
        except RuntimeError as error:
            raise ValueError(
                f"{path}: got a file that is damaged or cut short ({_one_line(error)}), expected a whole ArrayRecord "
                "file; write it again"
            ) from error
    return grain.sources.ArrayRecordDataSource(paths)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()).split(";")[0]


def _grain() -> ModuleType:
    try:
        import grain
    except ImportError as error:
        raise ImportError(
            "records: got no grain, expected it to be installed; pip install 'vdiff[grain]', or use shards"
        ) from error
    return grain
