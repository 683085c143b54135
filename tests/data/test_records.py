import sys

import numpy as np
import pytest

from vdiff.data import Rows, batches
from vdiff.data.records import open_records, write_records

ARRAY = np.random.default_rng(0).integers(0, 256, (23, 4, 3), np.uint8)


@pytest.mark.parametrize("rows_per_file", [5, 100])
def test_what_is_written_comes_back(rows_per_file, tmp_path):
    paths = write_records(tmp_path / "new", ARRAY, rows_per_file=rows_per_file)
    assert len(paths) == -(-23 // rows_per_file) and paths[0] == tmp_path / "new/000000.array_record"
    rows = open_records(str(tmp_path / "new"))
    assert isinstance(rows, Rows) and rows.shape == ARRAY.shape and rows.dtype == ARRAY.dtype
    assert (np.asarray(rows) == ARRAY).all()
    order = np.random.default_rng(1).integers(0, 23, 60)
    assert (rows[order] == ARRAY[order]).all()
    assert rows[[]].shape == (0, 4, 3)
    rows[[0]][:] = 0  # what is read may be changed


def test_batches_of_records_are_those_of_the_array(tmp_path):
    write_records(tmp_path / "new", iter(ARRAY), rows_per_file=7)
    on_disk = batches(open_records(tmp_path / "new"), 6, seed=3, share=(1, 3))
    in_memory = batches(ARRAY, 6, seed=3, share=(1, 3))
    for step in (0, 9, 4):
        assert (on_disk(step) == in_memory(step)).all()


def test_grain_itself_reads_the_same_records(tmp_path):
    """By Grain's own source and NumPy's own reader."""
    import io

    import grain

    paths = write_records(tmp_path / "new", ARRAY.astype(">f8"), rows_per_file=20)
    source = grain.sources.ArrayRecordDataSource([str(path) for path in paths])
    assert len(source) == 23
    for i, row in enumerate(ARRAY):
        got = np.load(io.BytesIO(source[i]))
        assert (got == row).all() and got.dtype == ">f8"


def test_shapes_and_orders(tmp_path):
    for name, array in {"numbers": np.arange(5), "columns": np.asfortranarray(ARRAY.T)}.items():
        write_records(tmp_path / name, array)
        got = np.asarray(open_records(tmp_path / name))
        assert got.dtype == array.dtype and got.shape == array.shape and (got == array).all()


def raw_records(path, records):
    from array_record.python.array_record_module import ArrayRecordWriter

    writer = ArrayRecordWriter(str(path), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()


def npy(array):
    import io

    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def test_records_of_ones_own_format(tmp_path):
    raw_records(tmp_path / "a.array_record", [row.tobytes() for row in ARRAY])
    rows = open_records(tmp_path, lambda record: np.frombuffer(record, np.uint8).reshape(4, 3))
    assert (np.asarray(rows) == ARRAY).all()
    with pytest.raises(ValueError, match="record: got 12 bytes beginning .*, expected an .npy.*decode"):
        open_records(tmp_path)


def test_npy_records_that_another_wrote(tmp_path):
    """Column-major, and of another version of the header."""
    import io

    other = io.BytesIO()
    np.lib.format.write_array(other, ARRAY[1], version=(2, 0))
    raw_records(tmp_path / "a.array_record", [npy(np.asfortranarray(ARRAY[0])), other.getvalue()])
    assert (np.asarray(open_records(tmp_path)) == ARRAY[:2]).all()


@pytest.mark.parametrize("other", [np.zeros((3, 4), np.uint8), np.zeros((4, 3), np.int8), np.zeros((4, 3))])
def test_a_record_unlike_the_first_is_refused_when_read(other, tmp_path):
    raw_records(tmp_path / "a.array_record", [npy(ARRAY[0]), npy(other)])
    rows = open_records(tmp_path)
    assert (rows[[0]] == ARRAY[:1]).all()
    with pytest.raises(ValueError, match=r"source\[1\]: got .*, expected uint8\[4, 3\]"):
        rows[[1]]


@pytest.mark.parametrize("make", [lambda data: b"", lambda data: data[:100_000], lambda data: b"x" * 200_000])
def test_a_damaged_file_is_named(make, tmp_path):
    paths = write_records(tmp_path / "new", ARRAY, rows_per_file=10)
    paths[1].write_bytes(make(paths[1].read_bytes()))
    with pytest.raises(ValueError, match=rf"{paths[1]}: got a file that is damaged or cut short") as caught:
        open_records(tmp_path / "new")
    assert "\n" not in str(caught.value)


def test_damage_within_a_file_is_found_when_it_is_read(tmp_path):
    noise = np.random.default_rng(2).integers(0, 256, (50, 4000), np.uint8)
    (path,) = write_records(tmp_path / "new", noise)
    data = bytearray(path.read_bytes())
    where = bytes(data).index(noise[30, 1000:1100].tobytes())
    data[where] ^= 0xFF
    path.write_bytes(bytes(data))
    rows = open_records(tmp_path / "new")
    assert (rows[[29, 31]] == noise[[29, 31]]).all()
    with pytest.raises(
        ValueError, match=r"new: a record cannot be read \(.*\), expected whole files"
    ) as caught:
        rows[[29, 30]]
    assert "\n" not in str(caught.value)


def test_nothing_is_refused_and_what_is_there_is_kept(tmp_path):
    with pytest.raises(ValueError, match="rows: got no data"):
        write_records(tmp_path / "new", [])
    assert list(tmp_path.iterdir()) == []
    raw_records(tmp_path / "a.array_record", [])
    with pytest.raises(ValueError, match="got files of no records"):
        open_records(tmp_path)
    with pytest.raises(ValueError, match="holds something"):
        write_records(tmp_path, ARRAY)


@pytest.mark.parametrize("call", [lambda path: open_records(path), lambda path: write_records(path, ARRAY)])
def test_without_grain(call, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "grain", None)
    with pytest.raises(ImportError, match=r"records: got no grain.*vdiff\[grain\].*shards"):
        call(tmp_path / "new")
    assert list(tmp_path.iterdir()) == []
