"""Data sets as integers: images of `levels` grey levels, pixels 0 .. levels - 1, in [N, H, W, C].

    load("digits")          1,797 images of 8 x 8, 17 levels, with scikit-learn; 1,437 train and 360 test
    load("mnist")           60,000 + 10,000 images of 28 x 28, 256 levels; fetched into the cache when absent
    load("fashion_mnist")   the same numbers
    load("images.npz")      your own: arrays `train` and, if you like, `test`, `train_labels`, `test_labels`
    load("images.npy")      your own: one array
    load("images")          your own, larger than memory: a folder of .npy shards or of .array_record files

Your own images are [N, H, W] or [N, H, W, C]: uint8 or other integers in 0..255 (256 levels), bool (2
levels), or floats in [0, 1], which are rounded to 256 levels, k = round(255 x). In an .npz the training
images may also be called `images` or `x`, or be the only array beside labels and test; `labels` is another
name of `train_labels`. Without `test`, the last tenth of one fixed permutation is held out.

A folder holds images of uint8 or bool, which need no look through all of them, in its files or in those of its folders
`train` and, if you like, `test`; beside these may lie `train_labels.npy` and `test_labels.npy`. They stay on disk: what
is read of them is what is asked for. Without `test`, the last tenth of one fixed permutation is held out here too.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from vdiff.data.fetch import FILES, SHA256, fetch
from vdiff.data.image_folders import hold_out_tenth, open_images
from vdiff.data.rows import Rows

_KNOWN = ("digits", *SHA256)
_TRAIN_NAMES = ("train", "images", "x")
_OTHER_NAMES = ("test", "train_labels", "labels", "test_labels")


class Dataset(NamedTuple):
    """Hold a data set, split in two.

    Attributes:
        name: what it is called; of your own file, the file's name without its suffix.
        train: uint8 [N, H, W, C], pixels 0 .. levels - 1; an array, or `Rows` on disk.
        test: uint8 [M, H, W, C].
        train_labels: int32 [N], or None.
        test_labels: int32 [M], or None.
        levels: how many grey levels a pixel can take.
    """

    name: str
    train: np.ndarray | Rows
    test: np.ndarray | Rows
    train_labels: np.ndarray | None
    test_labels: np.ndarray | None
    levels: int


def load(name_or_path: str | Path) -> Dataset:
    """Load a data set by its name, or your own images from a file or a folder.

    Args:
        name_or_path: "digits", "mnist", "fashion_mnist", or the path of an .npy or .npz file, or of a folder.

    Returns:
        A `Dataset`; the same call gives the same split on every machine.

    Raises:
        ValueError: if the name is unknown, the file is missing or damaged, or what it holds is not images;
            in one line that says what was got, what was expected, and what to do.
    """
    name = str(name_or_path)
    if name == "digits":
        return _digits()
    if name in SHA256:
        return _idx_set(name)
    path = Path(name).expanduser()
    if name and path.is_dir():
        return _folder_set(path)
    if path.suffix not in (".npy", ".npz"):
        raise ValueError(
            f"data set: got {name!r}, expected one of {', '.join(_KNOWN)}, or the path of your own .npy or "
            ".npz file, or of a folder of them"
        )
    return _user_set(path)


def check_images(images: np.ndarray, levels: int, name: str) -> None:
    """Refuse what cannot be read as images of `levels` grey levels.

    Args:
        images: [N, H, W, C]; integers in 0 .. levels - 1, bool, or floats in [0, 1].
        levels: how many grey levels an integer pixel can take.
        name: what the error calls the images, e.g. "train".

    Raises:
        ValueError: on a wrong type, rank or dtype, an empty set, NaN, or a pixel out of range; the line names
            the first such pixel.
    """
    if not isinstance(images, np.ndarray):
        raise ValueError(
            f"{name}: got {type(images).__name__}, expected a NumPy array; use np.asarray({name})"
        )
    shape = list(images.shape)
    if images.ndim != 4:
        raise ValueError(
            f"{name}: got shape {shape}, expected [N, H, W, C]; reshape it, e.g. to [-1, 28, 28, 1] for grey "
            "images of 28 x 28"
        )
    if images.size == 0:
        raise ValueError(f"{name}: got shape {shape}, expected at least one image of at least one pixel")
    if images.dtype.kind not in "buif":
        raise ValueError(
            f"{name}: got dtype {images.dtype}, expected uint8, bool, integers in 0..{levels - 1} or floats "
            "in [0, 1]; convert it, e.g. with .astype(np.uint8)"
        )
    is_float = images.dtype.kind == "f"
    bad = ~((images >= 0) & (images <= (1 if is_float else levels - 1)))  # NaN compares false, hence bad
    if bad.any():
        index = np.unravel_index(np.argmax(bad), images.shape)
        expected, fix = (
            f"an integer in 0..{levels - 1}",
            f"rescale the images, or clip them to 0..{levels - 1}",
        )
        if is_float:
            expected, fix = "a float in [0, 1]", "rescale the images (8-bit grey levels: divide by 255)"
        if is_float and np.isnan(images[index]):
            fix = "drop the image or fill the pixel"
        where = ", ".join(str(int(i)) for i in index)
        raise ValueError(f"{name}[{where}]: got {images[index]}, expected {expected}; {fix}")


def _digits() -> Dataset:
    from sklearn import datasets  # a second to import, and needed for this set alone

    digits = datasets.load_digits()
    images, labels = digits.images[..., None].astype(np.uint8), digits.target.astype(np.int32)
    check_images(images, 17, "digits")
    train, test = _split(len(images), num_test=360)
    return Dataset("digits", images[train], images[test], labels[train], labels[test], 17)


def _idx_set(name: str) -> Dataset:
    paths = fetch(name)
    train, train_labels, test, test_labels = (_read_idx(paths[file]) for file in FILES)
    train, test = _add_channel(train), _add_channel(test)
    check_images(train, 256, f"{name} train")
    check_images(test, 256, f"{name} test")
    return Dataset(
        name,
        train,
        test,
        _check_labels(train_labels, len(train), "train_labels"),
        _check_labels(test_labels, len(test), "test_labels"),
        256,
    )


def _read_idx(path: Path) -> np.ndarray:
    data = path.read_bytes()
    rank = data[3] if len(data) > 3 else 0
    start = 4 + 4 * rank
    if data[:3] != b"\0\0\x08" or len(data) < start:
        raise ValueError(f"{path}: got a file beginning {data[:4].hex()}, expected IDX of uint8; delete it")
    shape = np.frombuffer(data, ">u4", rank, offset=4).tolist()
    if len(data) - start != np.prod(shape, dtype=object):
        raise ValueError(
            f"{path}: got {len(data) - start} bytes for shape {shape}, expected as many; delete it"
        )
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape).copy()


def _user_set(path: Path) -> Dataset:
    arrays = _read_arrays(path)
    train_name = next((name for name in _TRAIN_NAMES if name in arrays), None)
    if train_name is None:
        others = [name for name in arrays if name not in _OTHER_NAMES]
        if len(others) != 1:
            raise ValueError(
                f"{path}: got arrays {', '.join(arrays) or 'none'}, expected one called train (or images, or "
                "x), and optionally test, train_labels, test_labels; rename them"
            )
        train_name = others[0]
    label_name = "train_labels" if "train_labels" in arrays else "labels"
    train, levels = _as_levels(arrays[train_name], train_name)
    labels = _check_labels(arrays.get(label_name), len(train), label_name)
    if "test" in arrays:
        test, test_levels = _as_levels(arrays["test"], "test")
        _check_alike(test, test_levels, train, levels, train_name)
        test_labels = _check_labels(arrays.get("test_labels"), len(test), "test_labels")
        return Dataset(path.stem, train, test, labels, test_labels, levels)
    if "test_labels" in arrays:
        raise ValueError("test_labels: got labels but no array test, expected both; add test or drop them")
    if len(train) < 2:
        raise ValueError(f"{train_name}: got 1 image, expected at least 2 to hold one out; add an array test")
    kept, held_out = _split(len(train), num_test=max(1, len(train) // 10))
    kept_labels, held_out_labels = (None, None) if labels is None else (labels[kept], labels[held_out])
    return Dataset(path.stem, train[kept], train[held_out], kept_labels, held_out_labels, levels)


def _folder_set(path: Path) -> Dataset:
    inner = path / "train"
    whole, levels = open_images(inner if inner.is_dir() else path)
    labels = _read_labels(path / "train_labels.npy", len(whole)) if inner.is_dir() else None
    if inner.is_dir() and (path / "test").is_dir():
        test, test_levels = open_images(path / "test")
        _check_alike(test, test_levels, whole, levels, "train")
        test_labels = _read_labels(path / "test_labels.npy", len(test))
        return Dataset(path.name, whole, test, labels, test_labels, levels)
    kept, held_out, order = hold_out_tenth(whole, str(path))
    split = (None, None) if labels is None else np.split(labels[order(np.arange(len(whole)))], [len(kept)])
    return Dataset(path.name, kept, held_out, *split, levels)


def _read_labels(path: Path, num_images: int) -> np.ndarray | None:
    return _check_labels(_read_arrays(path)["train"], num_images, str(path)) if path.exists() else None


def _check_alike(
    test: np.ndarray | Rows, test_levels: int, train: np.ndarray | Rows, levels: int, train_name: str
) -> None:
    if (test.shape[1:], test_levels) != (train.shape[1:], levels):
        raise ValueError(
            f"test: got images of shape {list(test.shape[1:])} with {test_levels} levels, expected "
            f"{list(train.shape[1:])} with {levels}, as {train_name} has; store both alike"
        )


def _read_arrays(path: Path) -> dict[str, np.ndarray]:
    try:
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return {"train": loaded}
        with loaded:
            return {name: loaded[name] for name in loaded.files}
    except FileNotFoundError as error:
        raise ValueError(f"{path}: no such file, expected an .npy or .npz file; check the path") from error
    except Exception as error:  # a damaged file raises whatever zipfile, zlib or NumPy met first
        raise ValueError(
            f"{path}: got a file that is damaged, cut short or not plain numbers, expected a whole .npy or "
            ".npz file of numeric arrays; write it again with np.save or np.savez"
        ) from error


def _as_levels(images: np.ndarray, name: str) -> tuple[np.ndarray, int]:
    images = _add_channel(images)
    levels = 2 if images.dtype == bool else 256
    check_images(images, levels, name)
    if images.dtype.kind == "f":
        images = np.rint(images * 255)
    return images.astype(np.uint8), levels


def _add_channel(images: np.ndarray) -> np.ndarray:
    return images[..., None] if images.ndim == 3 else images


def _check_labels(labels: np.ndarray | None, num_images: int, name: str) -> np.ndarray | None:
    if labels is None:
        return None
    if labels.shape != (num_images,) or labels.dtype.kind not in "ui":
        raise ValueError(
            f"{name}: got {labels.dtype}{list(labels.shape)}, expected integers of shape [{num_images}], one "
            "for each image"
        )
    return labels.astype(np.int32)


def _split(num_images: int, num_test: int) -> tuple[np.ndarray, np.ndarray]:
    # RandomState's stream is frozen for good, default_rng's is not: the split outlives NumPy's versions.
    order = np.random.RandomState(0).permutation(num_images)
    return order[: num_images - num_test], order[num_images - num_test :]
