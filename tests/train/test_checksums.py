"""A manifest finds every kind of damage to every file, its own too, and says which file and how."""

import json
import shutil

import pytest

from tests.train import tiny
from vdiff.train import checksums

DAMAGE = [tiny.truncate, tiny.flip, tiny.empty, tiny.delete]


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "folder"
    (folder / "deep/er").mkdir(parents=True)
    for name, content in {"a": b"some bytes", "deep/b": bytes(range(256)), "deep/er/c": b"x" * 4096}.items():
        (folder / name).write_bytes(content)
    checksums.write_manifest(folder, 7)
    return folder


def reason(folder, **kwargs):
    with pytest.raises(checksums.DamagedError) as error:
        checksums.verify(folder, **kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_whole_folder_tells_its_format(folder):
    assert checksums.verify(folder) == 7
    moved = folder.rename(folder.with_name("elsewhere"))
    assert checksums.verify(moved) == 7


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_found_in_every_file(folder, damage):
    whole = folder.with_name("whole")
    shutil.copytree(folder, whole)
    names = tiny.files_of(folder)
    assert names == ["a", "deep/b", "deep/er/c", "manifest.json"]
    for name in names:
        damage(folder / name)
        assert reason(folder) == f"{name} is {'missing' if damage is tiny.delete else 'not as it was saved'}"
        shutil.copy(whole / name, folder / name)
    assert checksums.verify(folder) == 7


def test_every_byte_of_the_manifest_counts(folder):
    """But for white space, which says nothing."""
    path = folder / "manifest.json"
    text = path.read_text()
    for i, letter in enumerate(text):
        if letter.isspace():
            continue
        path.write_text(text[:i] + ("0" if letter != "0" else "1") + text[i + 1 :])
        assert "not as it was saved" in reason(folder)
    path.write_text(text)
    assert checksums.verify(folder) == 7


def test_a_manifest_that_is_json_but_no_manifest(folder):
    for content in ("[]", "{}", "3", "null", '{"format": 7, "files": [], "seal": ""}'):
        (folder / "manifest.json").write_text(content)
        assert reason(folder) == "manifest.json is not as it was saved"


def test_a_file_too_many_is_found(folder):
    (folder / "deep/more").write_text("")
    assert reason(folder) == "deep/more was not there when it was saved"


def test_an_empty_or_absent_folder_is_damaged(tmp_path):
    (tmp_path / "empty").mkdir()
    assert reason(tmp_path / "empty") == reason(tmp_path / "absent") == "manifest.json is missing"


def test_files_written_later_are_free_until_they_are_listed(folder):
    (folder / "note").write_text("late")
    assert reason(folder) == "note was not there when it was saved"
    assert checksums.verify(folder, later=["note"]) == 7
    tiny.flip(folder / "note")
    assert checksums.verify(folder, later=["note"]) == 7
    checksums.extend_manifest(folder)
    assert checksums.verify(folder) == checksums.verify(folder, later=["note"]) == 7
    tiny.flip(folder / "note")
    assert reason(folder, later=["note"]) == "note is not as it was saved"


def test_a_file_named_as_later_is_not_listed(folder):
    checksums.write_manifest(folder, 7, later=["a"])
    assert "a" not in json.loads((folder / "manifest.json").read_text())["files"]
    tiny.flip(folder / "a")
    assert checksums.verify(folder, later=["a"]) == 7


def test_the_first_kind_of_manifest_has_format_1(folder):
    sums = json.loads((folder / "manifest.json").read_text())["files"]
    (folder / "manifest.json").unlink()
    (folder / "sha256.json").write_text(json.dumps(sums))
    assert checksums.verify(folder) == 1
    tiny.flip(folder / "deep/b")
    assert reason(folder) == "deep/b is not as it was saved"
    tiny.flip(folder / "deep/b")
    for content in ("{", "[]"):
        (folder / "sha256.json").write_text(content)
        assert "cannot be read" in reason(folder)
