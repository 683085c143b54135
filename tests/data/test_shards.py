import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from vdiff.data import Rows, batches
from vdiff.data.shards import open_shards, write_shards

ARRAY = np.random.default_rng(0).integers(0, 256, (23, 4, 3), np.uint8)


@pytest.mark.parametrize("rows_per_shard", [1, 5, 23, 100])
def test_what_is_written_comes_back(rows_per_shard, tmp_path):
    paths = write_shards(tmp_path / "new", ARRAY, rows_per_shard=rows_per_shard)
    assert len(paths) == -(-23 // rows_per_shard) and paths[0] == tmp_path / "new/000000.npy"
    # A shard is a plain .npy, readable by anyone.
    assert (np.concatenate([np.load(path) for path in paths]) == ARRAY).all()
    rows = open_shards(str(tmp_path / "new"))
    assert isinstance(rows, Rows) and rows.shape == ARRAY.shape and rows.dtype == ARRAY.dtype
    assert (np.asarray(rows) == ARRAY).all()
    order = np.random.default_rng(1).integers(0, 23, 60)
    assert (rows[order] == ARRAY[order]).all()
    assert rows[[]].shape == (0, 4, 3)


def test_batches_of_shards_are_those_of_the_array(tmp_path):
    write_shards(tmp_path / "new", iter(ARRAY), rows_per_shard=7)
    on_disk = batches(open_shards(tmp_path / "new"), 5, seed=3)
    in_memory = batches(ARRAY, 5, seed=3)
    for step in (0, 9, 4):
        assert (on_disk(step) == in_memory(step)).all()


def test_shards_of_any_make_and_length(tmp_path):
    parts = ARRAY[:4], ARRAY[4:4], np.asfortranarray(ARRAY[4:20]), ARRAY[20:]
    for name, part in zip("abcd", parts, strict=True):
        np.save(tmp_path / f"{name}.npy", part)
    rows = open_shards(tmp_path)
    assert len(rows) == 23 and (np.asarray(rows) == ARRAY).all()
    assert (rows[[3, 4, 19, 20, 22]] == ARRAY[[3, 4, 19, 20, 22]]).all()


def test_numbers_and_other_dtypes(tmp_path):
    for name, array in {"f": np.linspace(0, 1, 5), "i": np.arange(5), "b": np.arange(5) > 2}.items():
        write_shards(tmp_path / name, array, rows_per_shard=2)
        got = np.asarray(open_shards(tmp_path / name))
        assert got.dtype == array.dtype and (got == array).all()


def test_what_is_read_may_be_changed_and_the_files_stay(tmp_path):
    write_shards(tmp_path / "new", ARRAY)
    rows = open_shards(tmp_path / "new")
    got = rows[[1, 2]]
    got[:] = 0
    assert type(got) is np.ndarray and (rows[[1, 2]] == ARRAY[[1, 2]]).all()


def test_more_shards_than_a_process_may_have_files_open(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    write_shards(tmp_path / "new", np.arange(200), rows_per_shard=1)
    resource.setrlimit(resource.RLIMIT_NOFILE, (100, hard))
    try:
        rows = open_shards(tmp_path / "new")
        assert (rows[np.arange(200)] == np.arange(200)).all()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux counts the memory")
def test_memory_does_not_grow_with_what_was_read(tmp_path):
    """Every row of 300 MB is read, batch by batch; the process grows by a tenth of that at most."""
    megabyte = np.zeros((1, 1024, 1024), np.uint8)
    write_shards(tmp_path / "new", (megabyte[0] for _ in range(300)), rows_per_shard=50)
    program = f"""
import re
from vdiff.data import batches
from vdiff.data.shards import open_shards
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024
batch = batches(open_shards({str(tmp_path / "new")!r}), 4, seed=0)
batch(0)
before = peak()
for step in range(75):
    batch(step)
print(peak() - before)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 30


def damaged(tmp_path, make):
    write_shards(tmp_path / "new", ARRAY, rows_per_shard=10)
    path = tmp_path / "new/000001.npy"
    make(path)
    return path


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "damaged, cut short or not plain numbers"),
        (lambda path: path.write_bytes(path.read_bytes()[:20]), "damaged, cut short or not plain numbers"),
        (lambda path: path.write_bytes(b""), "damaged, cut short or not plain numbers"),
        (lambda path: np.save(path, np.array([{}], object)), "damaged, cut short or not plain numbers"),
        (lambda path: np.save(path, ARRAY[0, 0, 0]), r"got uint8\[\], expected numbers \[n, ...\]"),
        (lambda path: np.save(path, np.array(["a"])), r"got <U1\[1\], expected numbers"),
        (
            lambda path: np.save(path, ARRAY[:, :2]),
            r"got uint8\[23, 2, 3\], expected uint8\[10, 4, 3\] in all but the first axis, as 000000.npy has",
        ),
        (
            lambda path: np.save(path, ARRAY.astype(np.int8)),
            r"got int8\[23, 4, 3\], expected uint8\[10, 4, 3\]",
        ),
    ],
)
def test_a_shard_that_does_not_fit_is_named(make, line, tmp_path):
    path = damaged(tmp_path, make)
    with pytest.raises(ValueError, match=rf"{path}: {line}|{path}: got a file that is {line}") as caught:
        open_shards(tmp_path / "new")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "make", [lambda path: path.unlink(), lambda path: path.write_bytes(path.read_bytes()[:-1])]
)
def test_a_shard_lost_while_it_is_used_is_named(make, tmp_path):
    write_shards(tmp_path / "new", ARRAY, rows_per_shard=10)
    rows = open_shards(tmp_path / "new")
    make(tmp_path / "new/000001.npy")
    assert (rows[[3, 22]] == ARRAY[[3, 22]]).all()
    with pytest.raises(
        ValueError, match=r"000001\.npy: cannot be read any more .*; put it back, and the same"
    ):
        rows[[3, 12]]


def test_what_is_no_data_is_refused_and_nothing_is_left(tmp_path):
    with pytest.raises(ValueError, match=r"rows\[12\]: got float64\[4, 3\], expected uint8\[4, 3\]"):
        write_shards(tmp_path / "new", [*ARRAY[:12], ARRAY[12] / 2], rows_per_shard=5)
    with pytest.raises(ValueError, match="rows: got no data"):
        write_shards(tmp_path / "new", [])
    assert list(tmp_path.iterdir()) == []
    np.save(tmp_path / "a.npy", ARRAY[:0])
    with pytest.raises(ValueError, match="got shards of no rows"):
        open_shards(tmp_path)
    with pytest.raises(ValueError, match="holds something"):
        write_shards(tmp_path, ARRAY)
