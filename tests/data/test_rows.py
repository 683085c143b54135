import numpy as np
import pytest

from vdiff.data.rows import Rows, describe, from_source, view

ARRAY = np.random.default_rng(0).integers(0, 256, (10, 2, 3), np.uint8)


def recorded():
    """Rows of ARRAY, and the indices that were read so far."""
    asked = []

    def read(indices):
        assert indices.dtype == np.int64
        asked.extend(indices.tolist())
        return ARRAY[indices]

    return Rows(ARRAY.shape, ARRAY.dtype, read), asked


@pytest.mark.parametrize(
    "index",
    [
        3,
        -1,
        np.int32(4),
        [5, 0, 5, -10],
        np.array([[1, 2], [9, 3]]),
        np.array([7], np.uint8),
        [],
    ],
)
def test_an_index_reads_what_an_array_gives(index):
    rows, asked = recorded()
    expected = ARRAY[np.asarray(index, np.int64)]
    got = rows[index]
    assert got.shape == expected.shape and got.dtype == expected.dtype and (got == expected).all()
    assert asked == (np.asarray(index, np.int64) % 10).ravel().tolist()


@pytest.mark.parametrize("index", [slice(3), slice(2, -2), slice(None, None, -2), slice(20, 30), slice(None)])
def test_a_slice_reads_nothing_until_it_is_asked(index):
    rows, asked = recorded()
    part = rows[index]
    assert isinstance(part, Rows) and part.shape == ARRAY[index].shape and len(part) == len(ARRAY[index])
    assert asked == []
    assert (np.asarray(part) == ARRAY[index]).all()
    if len(part):
        assert (part[[-1, 0]] == ARRAY[index][[-1, 0]]).all()
        assert (part[1:][0] == ARRAY[index][1:][0]).all()


def test_all_is_read_when_an_array_is_asked_for():
    rows, _ = recorded()
    assert (np.asarray(rows) == ARRAY).all() and np.asarray(rows).dtype == np.uint8
    assert np.asarray(rows, np.float32).dtype == np.float32
    with pytest.raises(ValueError, match="rows: got copy=False"):
        np.array(rows, copy=False)


@pytest.mark.parametrize(("index", "first"), [([3, 10], 10), (-11, -11), ([[0], [12]], 12)])
def test_an_index_out_of_range_is_refused(index, first):
    rows, asked = recorded()
    with pytest.raises(IndexError, match=rf"rows: got index {first}, expected one of 10 rows"):
        rows[index]
    assert asked == []


@pytest.mark.parametrize("index", [np.ones(10, bool), [0.5], "a"])
def test_an_index_that_is_no_integer_is_refused(index):
    with pytest.raises(TypeError, match="rows: got an index of dtype"):
        recorded()[0][index]


def test_a_view_reads_what_it_shows():
    rows, asked = recorded()
    seen = view(rows, 3, lambda positions: 9 - 3 * positions)
    assert seen.shape == (3, 2, 3)
    assert (seen[[2, 0]] == ARRAY[[3, 9]]).all() and asked == [3, 9]


class Source:
    """What Grain calls a random access source."""

    def __init__(self, data):
        self.data = data

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        assert type(index) is int
        return self.data[index]


class ManySource(Source):
    def __getitems__(self, indices):
        return [self.data[i] for i in reversed(indices)][::-1]


@pytest.mark.parametrize("kind", [Source, ManySource])
def test_any_source_of_random_access(kind):
    rows = from_source(kind([row.tobytes() for row in ARRAY]), lambda data: np.frombuffer(data, np.uint8))
    assert rows.shape == (10, 6) and rows.dtype == np.uint8
    assert (rows[[4, 4, 0]] == ARRAY.reshape(10, 6)[[4, 4, 0]]).all()
    assert rows[[]].shape == (0, 6)
    got = rows[[1]]
    got[:] = 0
    assert (rows[[1]] == ARRAY.reshape(10, 6)[[1]]).all()


def test_a_source_whose_data_differ_is_refused_when_read():
    rows = from_source([np.zeros(3), np.zeros(3), np.zeros(4)])
    assert rows[[1, 0]].shape == (2, 3)
    with pytest.raises(
        ValueError, match=r"source\[2\]: got float64\[4\], expected float64\[3\] as source\[0\]"
    ):
        rows[[0, 2]]
    with pytest.raises(ValueError, match="source: got no data"):
        from_source([])


def test_describe():
    assert describe(ARRAY) == describe(recorded()[0]) == "uint8[10, 2, 3]"
