"""`config.json` says which settings a run belongs to, and keeps what it said before."""

import dataclasses
import json
from pathlib import Path

import pytest
from rich.console import Console

from experiments import settings


@dataclasses.dataclass(frozen=True)
class Config:
    run_dir: Path = Path("somewhere")
    resume: str = "auto"
    override: bool = False
    width: int = 3
    hidden: tuple[int, ...] = (4, 5)
    data: Path = Path("images.npz")
    scale: float | None = None


def test_the_same_settings_do_not_differ_wherever_the_run_lies(tmp_path):
    assert settings.record(Config(), tmp_path) is None
    assert json.loads((tmp_path / "config.json").read_text()) == {
        "width": 3,
        "hidden": [4, 5],
        "data": "images.npz",
        "scale": None,
    }
    assert settings.differences(Config(), tmp_path) == {}
    assert settings.differences(Config(run_dir=Path("x"), resume="must", override=True), tmp_path) == {}


def test_what_differs_is_named_with_both_values(tmp_path):
    settings.record(Config(), tmp_path)
    assert settings.differences(Config(width=4, hidden=(4,), scale=0.5), tmp_path) == {
        "width": ("3", "4"),
        "hidden": ("[4, 5]", "[4]"),
        "scale": ("null", "0.5"),
    }


def test_a_setting_that_came_after_the_run_or_went(tmp_path):
    @dataclasses.dataclass(frozen=True)
    class Later:
        width: int = 3
        hidden: tuple[int, ...] = (4, 5)
        data: Path = Path("images.npz")
        depth: int = 2
        log: Path = Path("log")

    settings.record(Config(), tmp_path)
    assert settings.differences(Later(), tmp_path) == {"scale": ("null", "not there")}
    assert settings.differences(Later(depth=3), tmp_path)["depth"] == ("2", "3")


def test_the_table_shows_them():
    console = Console(width=80)
    with console.capture() as captured:
        console.print(settings.as_table({"data": ('"a[b]"', '"c"'), "hidden": ("[4, 5]", "[4]")}))
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in captured.get().splitlines()]
    assert [row for row in rows if row] == [["data", '- "a[b]"', '+ "c"'], ["hidden", "- [4, 5]", "+ [4]"]]


def test_every_record_before_is_kept(tmp_path):
    """And with the first of them what the run left at its end."""
    settings.record(Config(), tmp_path)
    (tmp_path / "exported").mkdir()
    for name in ("result.json", "exported/ema.npz", "performance.json"):
        (tmp_path / name).write_text("3")
    assert settings.record(Config(), tmp_path) is None
    assert (tmp_path / "result.json").exists()
    kept = [settings.record(Config(width=width), tmp_path) for width in (4, 5)]
    assert kept == [tmp_path / "config.before-1.json", tmp_path / "config.before-2.json"]
    assert [json.loads(path.read_text())["width"] for path in kept] == [3, 4]
    assert json.loads((tmp_path / "config.json").read_text())["width"] == 5
    assert {path.name for path in tmp_path.iterdir()} == {
        "config.json",
        "config.before-1.json",
        "config.before-2.json",
        "result.before-1.json",
        "exported.before-1",
        "performance.json",
    }
    assert [path.name for path in (tmp_path / "exported.before-1").iterdir()] == ["ema.npz"]


@pytest.mark.parametrize("content", ["{", "[1]", "3", ""])
def test_a_damaged_record_is_refused_and_replaced_by_another(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(
        ValueError, match=r"config.json: got a damaged file, expected JSON.*--override"
    ) as error:
        settings.differences(Config(), tmp_path)
    assert "\n" not in str(error.value)
    assert settings.record(Config(), tmp_path) == tmp_path / "config.before-1.json"
    assert (tmp_path / "config.before-1.json").read_text() == content
    assert settings.differences(Config(), tmp_path) == {}
