import numpy as np
import pytest

from vdiff.data.folders import files_of, in_parts, new_folder, writing


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def test_a_folder_appears_when_all_is_written(tmp_path):
    with new_folder(tmp_path / "deep/new") as folder:
        (folder / "a").write_text("a")
        assert not (tmp_path / "deep/new").exists()
    assert names(tmp_path / "deep") == ["new"] and names(tmp_path / "deep/new") == ["a"]


def test_an_empty_folder_is_taken(tmp_path):
    (tmp_path / "empty").mkdir()
    with new_folder(str(tmp_path / "empty")) as folder:
        (folder / "a").write_text("a")
    assert names(tmp_path / "empty") == ["a"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_what_is_broken_off_leaves_nothing(error, tmp_path):
    with pytest.raises(error), new_folder(tmp_path / "new") as folder:
        (folder / "a").write_text("a")
        raise error
    assert names(tmp_path) == []


def test_what_is_there_is_kept(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/thesis.tex").write_text("precious")
    for path in (tmp_path / "full", tmp_path / "full/thesis.tex"):
        with (
            pytest.raises(ValueError, match="holds something, expected a new or empty folder"),
            new_folder(path),
        ):
            pytest.fail("opened")
    assert (tmp_path / "full/thesis.tex").read_text() == "precious" and names(tmp_path) == ["full"]


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(ValueError, match=r"file/new: cannot be written \(Not a directory\)"),
        new_folder(tmp_path / "file/new"),
    ):
        pytest.fail("opened")
    with pytest.raises(ValueError, match=r"x: cannot be written \(no\nroom\)".replace(r"\n", " ")):
        with writing(tmp_path / "x"):
            raise RuntimeError("no\nroom")


def test_files_come_by_name_without_hidden_or_other_ones(tmp_path):
    for name in ("b.npy", "a.npy", ".c.npy", "labels.txt"):
        (tmp_path / name).write_text("")
    assert [path.name for path in files_of(tmp_path, ".npy")] == ["a.npy", "b.npy"]
    with pytest.raises(ValueError, match="got no .array_record file, expected at least one"):
        files_of(tmp_path, ".array_record")
    with pytest.raises(ValueError, match="gone: no such folder"):
        files_of(tmp_path / "gone", ".npy")


def test_parts_are_taken_one_at_a_time():
    taken = []

    def rows():
        for i in range(7):
            taken.append(i)
            yield np.full(2, i)

    parts = in_parts(rows(), 3)
    assert taken == []
    assert [row[0] for row in next(parts)] == [0, 1, 2] and taken == [0, 1, 2]
    assert [len(part) for part in parts] == [3, 1]


@pytest.mark.parametrize(
    ("rows", "size", "line"),
    [
        ([], 3, "rows: got no data, expected at least one"),
        ([np.zeros(2)], 0, "data per file: got 0"),
        ([np.zeros(2), np.zeros(3)], 1, r"rows\[1\]: got float64\[3\], expected float64\[2\] as rows\[0\]"),
        (
            [np.zeros(2), np.zeros(2, int)],
            5,
            r"rows\[1\]: got int64\[2\], expected float64\[2\] as rows\[0\]",
        ),
        (["a"], 1, r"rows\[0\]: got dtype <U1, expected numbers"),
    ],
)
def test_data_that_differ_are_refused(rows, size, line):
    with pytest.raises(ValueError, match=line):
        list(in_parts(rows, size))
