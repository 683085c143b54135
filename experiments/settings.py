"""`config.json`: the settings that a run directory belongs to."""

import contextlib
import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

# Where a run lies, how it is begun, when it gives up or looks closer, what it leaves, how devices share it are not
# what it is.
_OF_THE_COMMAND = {"run_dir", "resume", "override", "max_skips", "debug_nans", "export", "profile"} | {
    *("parallel", "accumulate", "split_features", "remat"),
    *("coordinator", "num_processes", "process_id"),
}

# What a run leaves at its end, and says of the settings that it had then.
_OF_THE_END = ("result.json", "report.html", "exported")


class DamagedError(ValueError):
    """Tell that `config.json` cannot be read."""


def differences(config: Any, directory: Path) -> dict[str, tuple[str, str]]:
    """Compare the settings that a run was begun with, or overridden to, with those of a command.

    Args:
        config: the command's settings, a dataclass.
        directory: the run directory, which holds `config.json`.

    Returns:
        Name -> (the run's, the command's), for those that differ; "not there" for one that there is no more.

    Raises:
        DamagedError: if `config.json` is damaged.
    """
    record = directory / "config.json"
    try:
        saved = dict(json.loads(record.read_text()))
    except (ValueError, TypeError) as error:
        raise DamagedError(
            f"{record}: got a damaged file, expected JSON; choose another --run-dir, or put these settings in its "
            "place by --override"
        ) from error
    asked = _settings(config)
    # A setting that came after the run has the value that the run had without it.
    fields = [field for field in dataclasses.fields(config) if field.name in asked]
    saved = {
        field.name: field.default for field in fields if field.default is not dataclasses.MISSING
    } | saved
    pairs = {name: (_shown(saved, name), _shown(asked, name)) for name in {**saved, **asked}}
    return {name: (one, other) for name, (one, other) in pairs.items() if one != other}


def as_table(different: Mapping[str, tuple[str, str]]) -> Table:
    """Show what differs, a setting a row."""
    table = Table("setting", "the run", "this command", title="settings that differ", title_justify="left")
    for name, (saved, asked) in different.items():
        table.add_row(name, Text(f"- {saved}", "red"), Text(f"+ {asked}", "green"))
    return table


def record(config: Any, directory: Path) -> Path | None:
    """Write `config.json` where it does not hold these settings yet, and keep the one before beside it, as it was.

    A result, a report and exported functions of the settings before are kept likewise, under the same number: none of
    them is taken for one of these settings, which have no end yet.

    Args:
        config: the settings, a dataclass.
        directory: the run directory.

    Returns:
        Where the settings before are kept, or None if there were none or the same.
    """
    path, kept = directory / "config.json", None
    if path.exists():
        with contextlib.suppress(DamagedError):
            if not differences(config, directory):
                return None
        number = 1
        while (kept := directory / f"config.before-{number}.json").exists():
            number += 1
        _write(kept, path.read_bytes())
        for end in (directory / name for name in _OF_THE_END):
            if end.exists():
                os.replace(end, end.with_stem(f"{end.stem}.before-{number}"))
    write_json(path, _settings(config))
    return kept


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a file whole or not at all."""
    _write(path, (json.dumps(content, indent=2) + "\n").encode())


def _write(path: Path, content: bytes) -> None:
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _settings(config: Any) -> dict[str, Any]:
    settings = {
        name: value for name, value in dataclasses.asdict(config).items() if name not in _OF_THE_COMMAND
    }
    return json.loads(json.dumps(settings, default=str))


def _shown(settings: Mapping[str, Any], name: str) -> str:
    return json.dumps(settings[name], default=str) if name in settings else "not there"
