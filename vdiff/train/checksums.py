"""A manifest in a folder: a checksum of every file, so that damage is found before anything reads it.

The manifest is written when the files are whole and flushed to the disk. It carries the format of the folder's
content and a checksum of itself.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Collection
from pathlib import Path

MANIFEST = "manifest.json"
_FIRST_MANIFEST = "sha256.json"  # of format 1, a plain dictionary of sums


class DamagedError(Exception):
    """Tell that a folder's files are not as they were written; the message names one of them and says why."""


def write_manifest(folder: Path, version: int, *, later: Collection[str] = ()) -> None:
    """Sum every file of a folder, flush it to the disk, and write the manifest.

    Args:
        folder: what is to be committed; nothing else writes into it meanwhile.
        version: the format of its content.
        later: files that are written after the manifest; `extend_manifest` adds them.
    """
    sums = {name: _sum(path) for name, path in _files(folder).items() if name not in later}
    _write(folder / MANIFEST, version, sums)
    for path in (*folder.rglob("*"), folder):
        flush(path)


def extend_manifest(folder: Path) -> None:
    """Add to a folder's manifest the files that were written after it, and flush the folder's own entry."""
    version, sums = _read(folder / MANIFEST)
    new = {name: path for name, path in _files(folder).items() if name not in sums}
    for path in new.values():
        flush(path)
    # Beside the folder: half of a manifest inside it would be a file too many.
    temporary = folder.with_name(f"{folder.name}.{MANIFEST}")
    _write(temporary, version, sums | {name: _sum(path) for name, path in new.items()})
    flush(temporary)
    os.replace(temporary, folder / MANIFEST)
    flush(folder)
    flush(folder.parent)


def verify(folder: Path, *, later: Collection[str] = ()) -> int:
    """Compare a folder with its manifest.

    Args:
        folder: the folder.
        later: files that may be there without being listed.

    Returns:
        The format of its content; 1 where the manifest is of the kind that had none.

    Raises:
        DamagedError: if a file is missing, changed or not listed, or the manifest itself is.
    """
    try:
        files = _files(folder)
        if MANIFEST not in files and _FIRST_MANIFEST in files:
            version, sums = 1, json.loads(files.pop(_FIRST_MANIFEST).read_text())
        else:
            version, sums = _read(folder / MANIFEST)
        for name in sorted(sums.keys() | files.keys() - set(later)):
            if name not in files:
                raise DamagedError(f"{name} is missing")
            if name not in sums:
                raise DamagedError(f"{name} was not there when it was saved")
            if sums[name] != _sum(files[name]):
                raise DamagedError(f"{name} is not as it was saved")
    except (OSError, ValueError, AttributeError) as error:
        line = (str(error).splitlines() or [type(error).__name__])[0]
        raise DamagedError(f"its files cannot be read: {line}") from error
    return version


def flush(path: Path) -> None:
    """Ask the system to bring a file, or the entries of a folder, to the disk, where it can."""
    with contextlib.suppress(PermissionError):  # some systems flush no folders
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _files(folder: Path) -> dict[str, Path]:
    found = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {name: path for name, path in found.items() if name != MANIFEST}


def _sum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _seal(version: int, sums: dict[str, str]) -> str:
    return hashlib.sha256(json.dumps([version, sorted(sums.items())]).encode()).hexdigest()


def _write(path: Path, version: int, sums: dict[str, str]) -> None:
    content = {"format": version, "files": sums, "seal": _seal(version, sums)}
    path.write_text(json.dumps(content, indent=1) + "\n")


def _read(path: Path) -> tuple[int, dict[str, str]]:
    try:
        content = json.loads(path.read_text())
        version, sums = content["format"], content["files"]
        is_whole = content["seal"] == _seal(version, sums)
    except FileNotFoundError as error:
        raise DamagedError(f"{path.name} is missing") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DamagedError(f"{path.name} is not as it was saved") from error
    if not is_whole:
        raise DamagedError(f"{path.name} is not as it was saved")
    return version, sums
