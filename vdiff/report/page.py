"""One self-contained HTML page a run: to be looked at rather than read.

A page opens with a title and one sentence, then headline numbers as tiles, the figures, the tables, and,
folded, everything needed to repeat the run.
"""

import json
import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple, SupportsFloat

from vdiff.report.markup import figure, grid, paragraph, wrap, write
from vdiff.report.values import Value, format_seconds, format_value

_NUMBER = re.compile(r"(< )?[−+]?[\d,.]+(e[−+]\d+)?( ± [\d,.]+)?%?|–")


class Tile(NamedTuple):
    """Hold a headline number.

    Attributes:
        label: what it is, in a few words.
        value: the number, or a text shown as it is.
        std_error: its standard error; it also sets how many digits of the value are shown.
        unit: e.g. "nats per datum".
        note: one short line below, e.g. how it was estimated.
    """

    label: str
    value: Value
    std_error: SupportsFloat | None = None
    unit: str = ""
    note: str = ""


class FigureEntry(NamedTuple):
    """Hold a picture: the path of a PNG, a one-sentence caption, a text for who cannot see it."""

    path: Path | str
    caption: str
    alt: str = ""


class Table(NamedTuple):
    """Hold a table: its title, the names of its columns, its rows of texts and numbers."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[Value]]


def write_page(
    run_dir: Path | str,
    *,
    title: str,
    lead: str,
    headline: Sequence[Tile],
    figures: Sequence[FigureEntry],
    tables: Sequence[Table] = (),
    config: Mapping[str, object],
    result: Mapping[str, object],
) -> Path:
    """Write `report.html` of one run, whole or not at all.

    Args:
        run_dir: the run's directory; a figure's relative path starts there.
        title: the page's title.
        lead: one sentence: what was done and what came out.
        headline: the few numbers that matter.
        figures: pictures, shown in this order, wide ones across the page.
        tables: shown below the pictures.
        config: what `config.json` holds.
        result: what `result.json` holds: metrics, params_digest, seconds, versions, device.

    Returns:
        The path of the page.

    Raises:
        ValueError: if a figure is not a PNG, or a table's row has not as many cells as its header.
    """
    run_dir = Path(run_dir)
    seconds = result.get("seconds", {})
    seconds = seconds if isinstance(seconds, Mapping) else {"training": seconds}
    times = [f"{name} {format_seconds(value)}" for name, value in seconds.items()]
    metrics = [(t.label, _with_error(t), t.unit, t.note) for t in metric_tiles(result.get("metrics", {}))]
    folded = [
        Table("Configuration", ("setting", "value"), _flat(config)),
        Table("All metrics", ("name", "value", "unit", "mean of"), metrics),
        Table("Versions and digest", ("what", "value"), _flat(_without(result, "metrics"))),
    ]
    pictures = (figure(run_dir / path, caption, alt=alt) for path, caption, alt in figures)
    body = [
        paragraph("facts", " · ".join([str(result.get("device", "")), *times]).strip(" ·")),
        _tiles(headline),
        wrap("section", "figures", pictures),
        *(_table(table) for table in tables),
        *(_folded(table) for table in folded if table.rows),
    ]
    return write(run_dir / "report.html", title, lead, body)


def metric_tiles(metrics: Mapping[str, object]) -> list[Tile]:
    """Make a tile of each metric of `result.json`: a number, or {value, std_error, unit, num_data}."""
    tiles = []
    for name, metric in metrics.items():
        record = metric if isinstance(metric, Mapping) else {"value": metric}
        note = f"{record['num_data']:,} data" if "num_data" in record else ""
        label, unit = name.replace("_", " "), record.get("unit") or ""
        tiles.append(Tile(label, record.get("value"), record.get("std_error"), unit, note))
    return tiles


def _with_error(tile: Tile) -> str:
    return format_value(tile.value, tile.std_error)


def _without(mapping: Mapping[str, object], name: str) -> dict[str, object]:
    return {key: value for key, value in mapping.items() if key != name}


def _flat(tree: Mapping[str, object], prefix: str = "") -> list[tuple[str, str]]:
    """List the leaves of nested mappings as (dotted name, text), texts as in JSON and exact."""
    rows = []
    for name, value in tree.items():
        if isinstance(value, Mapping):
            rows += _flat(value, f"{prefix}{name}.")
        else:
            rows.append(
                (f"{prefix}{name}", value if isinstance(value, str) else json.dumps(value, default=str))
            )
    return rows


def _tiles(tiles: Sequence[Tile]) -> str:
    parts = []
    for tile in tiles:
        value, _, error = _with_error(tile).partition(" ± ")
        error = f' <span class="error">± {escape(error)}</span>' if error else ""
        parts.append(
            f'<div><dt>{escape(tile.label)}</dt><dd><span class="value">{escape(value)}</span>{error}'
            f"{paragraph('unit', tile.unit)}{paragraph('note', tile.note)}</dd></div>"
        )
    return wrap("dl", "tiles", parts)


def _cell(tag: str, value: Value, like: Value) -> str:
    number = ' class="number"' if _NUMBER.fullmatch(format_value(like)) else ""
    return f"<{tag}{number}>{escape(format_value(value))}</{tag}>"


def _rows(table: Table) -> str:
    if wrong := {len(row) for row in table.rows} - {len(table.header)}:
        raise ValueError(
            f"tables: {table.title!r} has rows of {sorted(wrong)} cells, expected {len(table.header)}; "
            "give each row a cell for each column of the header"
        )
    first = table.rows[0] if table.rows else table.header
    head = "".join(_cell("th", name, value) for name, value in zip(table.header, first, strict=True))
    return grid(head, ("".join(_cell("td", value, value) for value in row) for row in table.rows))


def _table(table: Table) -> str:
    return f"<h2>{escape(table.title)}</h2>\n{_rows(table)}"


def _folded(table: Table) -> str:
    return f"<details><summary>{escape(table.title)}</summary>\n{_rows(table)}</details>"
