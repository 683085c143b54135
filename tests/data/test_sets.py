import hashlib
import importlib
import io
import struct

import numpy as np
import pytest
from sklearn import datasets as sklearn_datasets

from vdiff.data import (
    Dataset,
    Rows,
    batches,
    check_images,
    load,
    permutations,
    write_records,
    write_shards,
)

fetching = importlib.import_module("vdiff.data.fetch")  # vdiff.data.fetch is the function


def rows(images):
    return [image.tobytes() for image in images]


def numbered(num_images, dtype=np.uint8, height=3, width=4):
    # Image i holds the number i, so that a split tells which images went where.
    images = np.zeros((num_images, height, width), dtype)
    images[:] = np.arange(num_images)[:, None, None]
    return images


def save(path, **arrays):
    np.savez(path, **arrays)
    return path


# The small digits.


def test_digits_have_the_promised_shapes_and_levels():
    digits = load("digits")
    assert isinstance(digits, Dataset) and digits.name == "digits"
    assert digits.train.shape == (1437, 8, 8, 1) and digits.test.shape == (360, 8, 8, 1)
    assert digits.train.dtype == digits.test.dtype == np.uint8
    assert digits.train_labels.shape == (1437,) and digits.test_labels.shape == (360,)
    assert digits.train_labels.dtype == digits.test_labels.dtype == np.int32
    assert digits.levels == 17
    for images in (digits.train, digits.test):
        assert (images.min(), images.max()) == (0, 16)
    for labels in (digits.train_labels, digits.test_labels):
        assert sorted(set(labels.tolist())) == list(range(10))


def test_digits_are_scikit_learns_with_their_labels_each_in_one_part():
    digits, source = load("digits"), sklearn_datasets.load_digits()
    pairs = list(zip(rows(source.images.astype(np.uint8)), source.target, strict=True))
    train = list(zip(rows(digits.train), digits.train_labels, strict=True))
    test = list(zip(rows(digits.test), digits.test_labels, strict=True))
    assert sorted(train + test) == sorted(pairs)
    assert not set(train) & set(test)


def test_digits_are_shuffled_the_same_way_each_time():
    first, second = load("digits"), load("digits")
    assert (first.train == second.train).all() and (first.test == second.test).all()
    last = sklearn_datasets.load_digits().images[-360:, ..., None]
    assert (first.test != last).any(axis=(1, 2, 3)).mean() > 0.9
    # The legacy generator's stream is frozen, so this split is the same under every NumPy.
    kept = np.random.RandomState(0).permutation(1797)[:1437]
    assert (first.train_labels == sklearn_datasets.load_digits().target[kept]).all()


# MNIST, from a made-up cache.


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache with five 4 x 3 training images and two for the test; returns (write, arrays)."""
    rng = np.random.default_rng(0)
    arrays = [
        rng.integers(0, 256, (5, 4, 3), np.uint8),
        np.arange(5, dtype=np.uint8),
        rng.integers(0, 256, (2, 4, 3), np.uint8),
        np.arange(2, dtype=np.uint8) + 7,
    ]
    monkeypatch.setenv("VDIFF_DATA", str(tmp_path))
    monkeypatch.setattr(fetching, "SOURCES", {"mnist": (), "fashion_mnist": ()})

    def write(files):
        (tmp_path / "mnist").mkdir()
        for file, data in zip(fetching.FILES, files, strict=True):
            (tmp_path / "mnist" / file).write_bytes(data)
        hashes = tuple(hashlib.sha256(data).hexdigest() for data in files)
        monkeypatch.setitem(fetching.SHA256, "mnist", hashes)

    return write, arrays


def idx(array):
    # Written out here, so that the reader is not tested by the library's own writer.
    return struct.pack(f">4B{array.ndim}i", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


def test_mnist_is_read_from_the_cache(cache):
    write, arrays = cache
    write([idx(array) for array in arrays])
    mnist = load("mnist")
    assert mnist.name == "mnist" and mnist.levels == 256
    assert (mnist.train == arrays[0][..., None]).all() and mnist.train.shape == (5, 4, 3, 1)
    assert (mnist.test == arrays[2][..., None]).all() and mnist.test.shape == (2, 4, 3, 1)
    assert mnist.train_labels.tolist() == [0, 1, 2, 3, 4] and mnist.test_labels.tolist() == [7, 8]
    assert mnist.train.dtype == np.uint8 and mnist.train_labels.dtype == np.int32
    assert mnist.train.flags.writeable


def test_mnist_is_fetched_when_absent(cache, monkeypatch):
    write, arrays = cache
    contents = {file: idx(array) for file, array in zip(fetching.FILES, arrays, strict=True)}
    hashes = tuple(hashlib.sha256(data).hexdigest() for data in contents.values())
    monkeypatch.setitem(fetching.SHA256, "fashion_mnist", hashes)
    monkeypatch.setitem(fetching.SOURCES, "fashion_mnist", (("made up", lambda *_: contents),))
    assert (load("fashion_mnist").train == arrays[0][..., None]).all()


def test_a_damaged_mnist_file_is_named(cache, tmp_path):
    write, arrays = cache
    write([idx(array) for array in arrays])
    path = tmp_path / "mnist" / "t10k-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=rf"{path}: damaged, delete it and fetch again: got \d+ bytes"):
        load("mnist")


def test_no_mnist_and_no_source(cache, tmp_path):
    with pytest.raises(ValueError, match="mnist: no source worked"):
        load("mnist")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("spoil", "line"),
    [
        (lambda data: b"", "got a file beginning , expected IDX of uint8"),
        (lambda data: b"\0\0\x0d\3" + data[4:], "got a file beginning 00000d03, expected IDX of uint8"),
        (lambda data: data[:9], "got a file beginning 00000803, expected IDX of uint8"),
        (lambda data: data[:-1], r"got 59 bytes for shape \[5, 4, 3\]"),
        (lambda data: data + b"\0", r"got 61 bytes for shape \[5, 4, 3\]"),
        (lambda data: data[:4] + b"\xff" * 12 + data[16:], "got 60 bytes for shape"),
    ],
)
def test_idx_that_is_not_what_it_says_is_refused(cache, spoil, line):
    write, arrays = cache
    files = [idx(array) for array in arrays]
    write([spoil(files[0]), *files[1:]])
    with pytest.raises(ValueError, match=f"train-images-idx3-ubyte: {line}"):
        load("mnist")


def test_mnist_labels_must_match_its_images(cache):
    write, arrays = cache
    write([idx(array) for array in (arrays[0], arrays[1][:4], *arrays[2:])])
    with pytest.raises(ValueError, match=r"train_labels: got uint8\[4\], expected integers of shape \[5\]"):
        load("mnist")


# The user's own files.


def test_npy_holds_out_the_last_tenth_of_a_permutation(tmp_path):
    path = tmp_path / "mine.npy"
    np.save(path, numbered(50))
    mine, again = load(path), load(str(path))
    assert mine.name == "mine" and mine.levels == 256
    assert mine.train.shape == (45, 3, 4, 1) and mine.test.shape == (5, 3, 4, 1)
    assert mine.train_labels is None and mine.test_labels is None
    numbers = [*mine.train[:, 0, 0, 0].tolist(), *mine.test[:, 0, 0, 0].tolist()]
    assert sorted(numbers) == list(range(50))
    assert numbers != list(range(50))
    assert (mine.train == again.train).all() and (mine.test == again.test).all()


@pytest.mark.parametrize(("num_images", "num_test"), [(2, 1), (9, 1), (19, 1), (20, 2)])
def test_at_least_one_image_is_held_out(tmp_path, num_images, num_test):
    np.save(tmp_path / "few.npy", numbered(num_images))
    few = load(tmp_path / "few.npy")
    assert (len(few.train), len(few.test)) == (num_images - num_test, num_test)


@pytest.mark.parametrize(
    ("array", "levels", "expected"),
    [
        (np.array([[[0, 7], [254, 255]]] * 2, np.uint8), 256, [0, 7, 254, 255]),
        (np.array([[[0, 7], [254, 255]]] * 2, np.int64), 256, [0, 7, 254, 255]),
        (np.array([[[0, 7], [254, 255]]] * 2, ">u2"), 256, [0, 7, 254, 255]),
        (np.array([[[0, 7], [100, 127]]] * 2, np.int8), 256, [0, 7, 100, 127]),
        (np.array([[[True, False], [False, True]]] * 2), 2, [1, 0, 0, 1]),
        # 0.5 is halfway between 127 and 128 and goes to the even one; .1 / 255 rounds down, .9 / 255 up.
        (np.array([[[0.0, 1.0], [0.5, 0.1 / 255]]] * 2, np.float64), 256, [0, 255, 128, 0]),
        (np.array([[[0.0, 1.0], [0.9 / 255, 1.1 / 255]]] * 2, np.float32), 256, [0, 255, 1, 1]),
        (np.array([[[0.0, 1.0], [0.25, 0.75]]] * 2, np.float16), 256, [0, 255, 64, 191]),
    ],
)
def test_every_accepted_dtype(tmp_path, array, levels, expected):
    np.save(tmp_path / "mine.npy", array)
    mine = load(tmp_path / "mine.npy")
    assert mine.levels == levels and mine.train.dtype == mine.test.dtype == np.uint8
    assert mine.train.ravel().tolist() == mine.test.ravel().tolist() == expected


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_grey_levels_divided_by_255_come_back_exactly(tmp_path, dtype):
    grey = np.arange(256, dtype=np.uint8).reshape(1, 16, 16)
    save(tmp_path / "mine.npz", train=(grey / 255).astype(dtype), test=(grey / 255).astype(dtype))
    assert (load(tmp_path / "mine.npz").train[..., 0] == grey).all()


def test_colour_keeps_its_channels(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (6, 4, 5, 3), np.uint8)
    mine = load(save(tmp_path / "mine.npz", train=images, test=images[:2]))
    assert (mine.train == images).all() and (mine.test == images[:2]).all()


@pytest.mark.parametrize("name", ["train", "images", "x", "arr_0", "faces"])
@pytest.mark.parametrize("label_name", ["train_labels", "labels"])
def test_npz_names(tmp_path, name, label_name):
    arrays = {name: numbered(20), label_name: np.arange(20, dtype=np.int64)}
    mine = load(save(tmp_path / "mine.npz", **arrays))
    # The labels follow their images through the split.
    assert (mine.train[:, 0, 0, 0] == mine.train_labels).all() and len(mine.train) == 18
    assert (mine.test[:, 0, 0, 0] == mine.test_labels).all() and len(mine.test) == 2
    assert mine.train_labels.dtype == mine.test_labels.dtype == np.int32


def test_npz_with_a_test_keeps_the_order(tmp_path):
    arrays = {"train": numbered(6), "test": numbered(9)[6:], "labels": np.arange(6), "other": np.zeros(3)}
    mine = load(save(tmp_path / "mine.npz", **arrays, test_labels=np.arange(6, 9)))
    assert mine.train[:, 0, 0, 0].tolist() == mine.train_labels.tolist() == [0, 1, 2, 3, 4, 5]
    assert mine.test[:, 0, 0, 0].tolist() == mine.test_labels.tolist() == [6, 7, 8]
    one = load(save(tmp_path / "one.npz", x=numbered(1), test=numbered(1)))
    assert len(one.train) == len(one.test) == 1 and one.train_labels is None and one.test_labels is None


def spoilt(dtype, value, index=(12, 3, 4, 0), shape=(15, 5, 6, 1)):
    images = np.zeros(shape, dtype)
    images[index] = value
    return images


@pytest.mark.parametrize(
    ("arrays", "line"),
    [
        (
            {"train": spoilt(np.float32, np.nan)},
            r"^train\[12, 3, 4, 0\]: got nan, expected a float in \[0, 1\]; drop",
        ),
        (
            {"train": spoilt(np.float64, np.inf)},
            r"^train\[12, 3, 4, 0\]: got inf, expected a float in \[0, 1\]",
        ),
        (
            {"x": spoilt(np.float32, 1.5)},
            r"^x\[12, 3, 4, 0\]: got 1\.5, expected a float in \[0, 1\]; .* 255",
        ),
        ({"x": spoilt(np.float32, -0.25)}, r"^x\[12, 3, 4, 0\]: got -0\.25, expected a float in \[0, 1\]"),
        (
            {"images": spoilt(np.int16, 256)},
            r"^images\[12, 3, 4, 0\]: got 256, expected an integer in 0\.\.255",
        ),
        ({"train": spoilt(np.int8, -1)}, r"^train\[12, 3, 4, 0\]: got -1, expected an integer in 0\.\.255"),
        (
            {"train": numbered(3, height=5, width=6), "test": spoilt(np.int32, 999, (1, 2, 3, 0))},
            r"^test\[1, 2, 3, 0\]: got 999",
        ),
        (
            {"train": np.zeros((7, 784), np.uint8)},
            r"^train: got shape \[7, 784\], expected \[N, H, W, C\]; reshape",
        ),
        (
            {"train": np.zeros((2, 3, 4, 1, 1))},
            r"^train: got shape \[2, 3, 4, 1, 1\], expected \[N, H, W, C\]",
        ),
        (
            {"train": np.zeros((0, 8, 8), np.uint8)},
            r"^train: got shape \[0, 8, 8, 1\], expected at least one image",
        ),
        (
            {"train": np.zeros((4, 8, 0), np.uint8)},
            r"^train: got shape \[4, 8, 0, 1\], expected at least one image",
        ),
        ({"train": np.zeros((4, 8, 8), np.complex64)}, "^train: got dtype complex64, expected uint8, bool"),
        ({"train": np.full((4, 8, 8), "1")}, "^train: got dtype <U1, expected uint8, bool"),
        ({"train": numbered(1)}, "^train: got 1 image, expected at least 2 to hold one out"),
        ({"a": numbered(3), "b": numbered(3)}, "got arrays a, b, expected one called train"),
        ({"test": numbered(3), "labels": np.arange(3)}, "got arrays test, labels, expected one called train"),
        ({}, "got arrays none, expected one called train"),
        (
            {"train": numbered(3), "test": numbered(3, width=5)},
            r"^test: got images of shape \[3, 5, 1\] with 256 levels, expected \[3, 4, 1\] with 256",
        ),
        (
            {"train": numbered(3) > 0, "test": numbered(3)},
            r"^test: got images of shape \[3, 4, 1\] with 256 levels, expected \[3, 4, 1\] with 2,",
        ),
        (
            {"train": numbered(3), "labels": np.arange(4)},
            r"^labels: got int64\[4\], expected integers of shape \[3\]",
        ),
        (
            {"train": numbered(3), "train_labels": np.ones(3)},
            r"^train_labels: got float64\[3\], expected integers",
        ),
        (
            {"train": numbered(3), "test": numbered(2), "test_labels": np.ones((2, 1), int)},
            r"^test_labels: got int64\[2, 1\], expected integers of shape \[2\]",
        ),
        ({"train": numbered(3), "test_labels": np.arange(3)}, "^test_labels: got labels but no array test"),
    ],
)
def test_what_is_not_images_is_refused_in_one_line(tmp_path, arrays, line):
    with pytest.raises(ValueError, match=line) as caught:
        load(save(tmp_path / "mine.npz", **arrays))
    assert "\n" not in str(caught.value)


def broken_npz(tmp_path):
    # One flipped byte inside the compressed data: zipfile or zlib finds it only on reading the array.
    buffer = io.BytesIO()
    np.savez_compressed(buffer, train=np.random.default_rng(0).integers(0, 256, (20, 8, 8), np.uint8))
    data = bytearray(buffer.getvalue())
    data[len(data) // 2] ^= 0xFF
    return bytes(data)


def whole_npy(array):
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def npy_that_promises_too_much():
    buffer = io.BytesIO()
    header = {"descr": "|u1", "fortran_order": False, "shape": (10**15, 3, 4)}
    np.lib.format.write_array_header_1_0(buffer, header)
    return buffer.getvalue() + bytes(100)


@pytest.mark.parametrize(
    ("file", "data"),
    [
        ("mine.npz", broken_npz),
        ("mine.npz", lambda _: b"PK\x03\x04 and no more"),
        ("mine.npz", lambda _: b""),
        ("mine.npy", lambda _: b""),
        ("mine.npy", lambda _: whole_npy(numbered(20))[:-1]),
        ("mine.npy", lambda _: whole_npy(numbered(20))[:20]),
        ("mine.npy", lambda _: b"hello"),
        ("mine.npy", lambda _: npy_that_promises_too_much()),
        ("mine.npy", lambda _: whole_npy(np.array([{"an": "object"}] * 3, dtype=object))),
    ],
)
def test_a_damaged_file_gives_a_line_and_no_foreign_traceback(tmp_path, file, data):
    (tmp_path / file).write_bytes(data(tmp_path))
    with pytest.raises(
        ValueError, match=rf"{file}: got a file that is damaged, cut short or not plain numbers"
    ) as caught:
        load(tmp_path / file)
    assert type(caught.value) is ValueError and caught.value.__cause__ is not None
    assert "pickle" not in str(caught.value) and "\n" not in str(caught.value)


def test_objects_in_an_npz_are_never_unpickled(tmp_path):
    class Trap:
        def __reduce__(self):
            return (pytest.fail, ("unpickled",))

    np.savez(tmp_path / "trap.npz", train=np.array([Trap()], dtype=object))
    with pytest.raises(ValueError, match="not plain numbers"):
        load(tmp_path / "trap.npz")


def test_a_missing_file_and_a_folder(tmp_path):
    with pytest.raises(ValueError, match=r"gone\.npz: no such file, expected an \.npy or \.npz file"):
        load(tmp_path / "gone.npz")
    (tmp_path / "folder.npy").mkdir()
    with pytest.raises(ValueError, match=r"folder\.npy: got none of these files, expected \.npy shards or"):
        load(tmp_path / "folder.npy")


@pytest.mark.parametrize("name", ["mnits", "", "images.png", "~/pictures"])
def test_an_unknown_name_lists_the_known_ones(name):
    known = rf"data set: got '{name}', expected one of digits, mnist, fashion_mnist, or the path of your own"
    with pytest.raises(ValueError, match=known):
        load(name)


# check_images, as experiments call it.


def test_check_images_lets_good_images_pass():
    check_images(np.full((2, 3, 4, 1), 16, np.uint8), 17, "train")
    check_images(np.ones((2, 3, 4, 1), bool), 2, "train")
    check_images(np.ones((2, 3, 4, 3), np.float32), 256, "train")


@pytest.mark.parametrize(
    ("images", "levels", "line"),
    [
        (
            np.full((2, 3, 4, 1), 17, np.uint8),
            17,
            r"^held out\[0, 0, 0, 0\]: got 17, expected an integer in 0\.\.16",
        ),
        (spoilt(np.uint8, 2), 2, r"^held out\[12, 3, 4, 0\]: got 2, expected an integer in 0\.\.1; "),
        (np.zeros((2, 3, 4), np.uint8), 17, r"^held out: got shape \[2, 3, 4\], expected \[N, H, W, C\]"),
        ([[0]], 17, "^held out: got list, expected a NumPy array; use np.asarray"),
    ],
)
def test_check_images_names_the_first_bad_pixel(images, levels, line, unchecked):
    with pytest.raises(ValueError, match=line):
        check_images(images, levels, "held out")


# Folders, larger than memory.

WRITERS = pytest.mark.parametrize("write", [write_shards, write_records])


@WRITERS
def test_a_folder_with_its_own_test(write, tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (30, 4, 5, 3), np.uint8)
    write(tmp_path / "mine/train", images[:23])
    write(tmp_path / "mine/test", images[23:])
    np.save(tmp_path / "mine/test_labels.npy", np.arange(7))
    mine = load(tmp_path / "mine")
    assert (mine.name, mine.levels) == ("mine", 256)
    assert isinstance(mine.train, Rows) and isinstance(mine.test, Rows)
    assert (np.asarray(mine.train) == images[:23]).all() and (np.asarray(mine.test) == images[23:]).all()
    assert mine.train_labels is None and mine.test_labels.tolist() == list(range(7))
    assert mine.test_labels.dtype == np.int32


@WRITERS
@pytest.mark.parametrize("inner", ["", "train"])
def test_a_folder_without_a_test_holds_out_a_tenth(write, inner, tmp_path):
    write(tmp_path / "mine" / inner, numbered(50))
    if inner:
        np.save(tmp_path / "mine/train_labels.npy", np.arange(50))
    mine, again = load(tmp_path / "mine"), load(str(tmp_path / "mine"))
    assert mine.train.shape == (45, 3, 4, 1) and mine.test.shape == (5, 3, 4, 1)
    train, test = np.asarray(mine.train), np.asarray(mine.test)
    order = permutations.keyed(0, 0, 50)(np.arange(50))
    assert (train[:, 0, 0, 0] == order[:45]).all() and (test[:, 0, 0, 0] == order[45:]).all()
    assert (train == np.asarray(again.train)).all() and train.dtype == np.uint8
    if inner:
        # The labels follow their images.
        assert (mine.train_labels == order[:45]).all() and (mine.test_labels == order[45:]).all()
    else:
        assert mine.train_labels is None and mine.test_labels is None


def test_a_folder_of_bits_has_two_levels(tmp_path):
    bits = np.random.default_rng(0).random((20, 3, 4)) < 0.5
    write_shards(tmp_path / "bits/train", bits)
    write_shards(tmp_path / "bits/test", bits[:5])
    mine = load(tmp_path / "bits")
    assert mine.levels == 2 and np.asarray(mine.train).dtype == np.uint8
    assert (np.asarray(mine.train)[..., 0] == bits).all()


def test_a_hundred_gigabytes_open_at_once(tmp_path):
    """A file with a hole: read through, or permuted in memory, it would take minutes."""
    shape = (100_000_000, 32, 32)
    (tmp_path / "huge").mkdir()
    with (tmp_path / "huge/0.npy").open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
        file.truncate(file.tell() + shape[0] * 1024)
    huge = load(tmp_path / "huge")
    assert (len(huge.train), len(huge.test)) == (90_000_000, 10_000_000)
    batch = batches(huge.train, 4, seed=0, permutation=permutations.keyed)
    assert batch(10**6).shape == (4, 32, 32, 1) and huge.test[:3][[2]].shape == (1, 32, 32, 1)


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (lambda d: d.mkdir(), "mine: got none of these files, expected .npy shards or .array_record files"),
        (
            lambda d: (write_shards(d, numbered(3)), (d / "a.array_record").write_bytes(b"")),
            "mine: got both kinds of files",
        ),
        (
            lambda d: write_shards(d, np.zeros((9, 784), np.uint8)),
            r"mine: got uint8\[9, 784\], expected images \[N",
        ),
        (
            lambda d: write_shards(d, np.zeros((9, 2, 0), np.uint8)),
            r"mine: got uint8\[9, 2, 0\], expected images",
        ),
        (
            lambda d: write_shards(d, np.zeros((9, 2, 3))),
            r"mine: got float64\[9, 2, 3\], expected uint8 or bool; .*rint",
        ),
        (lambda d: write_shards(d, numbered(1)), "mine: got 1 image, expected at least 2 to hold one out"),
        (
            lambda d: (
                write_shards(d / "train", numbered(5)),
                write_shards(d / "test", numbered(5, width=5)),
            ),
            r"test: got images of shape \[3, 5, 1\] with 256 levels, expected \[3, 4, 1\] with 256, as train has",
        ),
        (
            lambda d: (
                write_shards(d / "train", numbered(5)),
                np.save(d / "train_labels.npy", np.arange(4)),
            ),
            r"train_labels.npy: got int64\[4\], expected integers of shape \[5\]",
        ),
    ],
)
def test_a_folder_that_does_not_fit_is_refused_in_one_line(make, line, tmp_path):
    make(tmp_path / "mine")
    with pytest.raises(ValueError, match=line) as caught:
        load(tmp_path / "mine")
    assert "\n" not in str(caught.value)
