r"""One self-contained HTML page a run, and one that compares runs: to be looked at rather than read.

A page opens with a title and one sentence, then headline numbers as tiles, the figures, the tables, and,
folded, everything needed to repeat the run. Pictures are inlined, so the file can be mailed; there is no
script and nothing is fetched. It follows the reader's light or dark setting and fits a phone.
"""

import base64
import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from numbers import Integral
from pathlib import Path
from string import Template
from typing import NamedTuple, SupportsFloat
from urllib.parse import quote

Value = str | SupportsFloat | None
_NUMBER = re.compile(r"[−+]?[\d,.]+(e[−+]\d+)?( ± [\d,.]+)?%?|–")


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


class RunEntry(NamedTuple):
    """Hold a run for comparison with others on the same data.

    Attributes:
        data: the data set; runs on the same one are compared, in one table with one scale.
        model: the model's name.
        bound: what the number is, e.g. "elbo" or "importance, K = 1000".
        nats: its value, nats per datum, larger is better.
        std_error: its standard error.
        bits_per_dim: the same in bits/dim, or None where that has no meaning.
        seconds: what training took.
        report: the path of the run's report.
        picture: a PNG that shows what the model does.
        caption: one sentence below the picture.
    """

    data: str
    model: str
    bound: str
    nats: float
    std_error: float | None
    bits_per_dim: float | None
    seconds: float
    report: Path | str
    picture: Path | str
    caption: str


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
    body = [
        _paragraph("facts", " · ".join([str(result.get("device", "")), *times]).strip(" ·")),
        _tiles(headline),
        _wrap("section", "figures", (_figure(run_dir, entry) for entry in figures)),
        *(_table(table) for table in tables),
        *(_folded(table) for table in folded if table.rows),
    ]
    return _write(run_dir / "report.html", title, lead, body)


def write_index(path: Path | str, *, title: str, lead: str, runs: Sequence[RunEntry]) -> Path:
    """Write the page that compares runs: a table and a scale for each data set, a picture for each run.

    Args:
        path: the page to write; links to the reports are relative to its directory.
        title: the page's title.
        lead: one sentence: what is compared.
        runs: in the order to show; relative paths in them start at the page's directory.

    Returns:
        The path of the page.

    Raises:
        ValueError: if a picture is not a PNG.
    """
    path = Path(path)
    body = []
    for data in dict.fromkeys(run.data for run in runs):
        group = [run for run in runs if run.data == data]
        cards = (
            _figure(
                path.parent, FigureEntry(run.picture, run.caption), run.model, _link(path.parent, run.report)
            )
            for run in group
        )
        body += [f"<h2>{escape(data)}</h2>", _comparison(path.parent, group)]
        body.append(_wrap("section", "figures small", cards))
    return _write(path, title, lead, body)


def metric_tiles(metrics: Mapping[str, object]) -> list[Tile]:
    """Make a tile of each metric of `result.json`: a number, or {value, std_error, unit, num_data}."""
    tiles = []
    for name, metric in metrics.items():
        record = metric if isinstance(metric, Mapping) else {"value": metric}
        note = f"{record['num_data']:,} data" if "num_data" in record else ""
        label, unit = name.replace("_", " "), record.get("unit") or ""
        tiles.append(Tile(label, record.get("value"), record.get("std_error"), unit, note))
    return tiles


def format_value(value: Value, std_error: SupportsFloat | None = None) -> str:
    """Write a number for people: two digits of its standard error, or else four digits of its own.

    Returns:
        E.g. "−86.421 ± 0.013", "12,345", "1.234"; a text as it is, "–" for None.
    """
    if value is None:
        return "–"
    if isinstance(value, str | bool):
        return str(value)
    if isinstance(value, Integral) and std_error is None:
        return _minus(f"{value:,}")
    value, error = float(value), 0.0 if std_error is None else float(std_error)
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else _minus(f"{value}".replace("inf", "∞"))
    if math.isfinite(error) and error > 0:
        decimals = min(9, max(0, 1 - math.floor(math.log10(error))))
        return _minus(f"{value:,.{decimals}f} ± {error:,.{decimals}f}")
    size = math.floor(math.log10(abs(value))) if value else 0
    return _minus(f"{value:,.{min(3, max(0, 3 - size))}f}" if -3 < size < 9 else f"{value:.3g}")


def format_seconds(seconds: float) -> str:
    """Write a duration for people, e.g. "0.8 s", "42 s", "12 min 3 s", "1 h 5 min"."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if minutes else f"{rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def _minus(text: str) -> str:
    return text.replace("-", "\N{MINUS SIGN}")


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


def _wrap(tag: str, name: str, parts: Iterable[str]) -> str:
    inner = "\n".join(part for part in parts if part)
    return f'<{tag} class="{name}">\n{inner}\n</{tag}>' if inner else ""


def _paragraph(name: str, text: str) -> str:
    return f'<p class="{name}">{escape(text)}</p>' if text else ""


def _tiles(tiles: Sequence[Tile]) -> str:
    parts = []
    for tile in tiles:
        value, _, error = _with_error(tile).partition(" ± ")
        error = f' <span class="error">± {escape(error)}</span>' if error else ""
        parts.append(
            f'<div><dt>{escape(tile.label)}</dt><dd><span class="value">{escape(value)}</span>{error}'
            f"{_paragraph('unit', tile.unit)}{_paragraph('note', tile.note)}</dd></div>"
        )
    return _wrap("dl", "tiles", parts)


def _figure(directory: Path, entry: FigureEntry, heading: str = "", link: str = "") -> str:
    path = directory / entry.path
    content = path.read_bytes()
    if content[:8] != b"\x89PNG\r\n\x1a\n":
        raise ValueError(f"figures: got {path}, expected a PNG; write it with vdiff.report.figures")
    width, height = (int.from_bytes(content[i : i + 4]) for i in (16, 20))
    source = f"data:image/png;base64,{base64.b64encode(content).decode()}"
    alt = escape(entry.alt or entry.caption)
    image = f'<img src="{source}" alt="{alt}" width="{width}" height="{height}">'
    opening, closing = (f'<a href="{escape(link)}">', "</a>") if link else ("", "")
    title = f"<h3>{opening}{escape(heading)}{closing}</h3>" if heading else ""
    style = f"--aspect:{width / height:.3f};--width:{0.52 * width:.0f}px"  # sharp on fine screens
    return (
        f'<figure style="{style}">{title}{opening}{image}{closing}'
        f"<figcaption>{escape(entry.caption)}</figcaption></figure>"
    )


def _cell(tag: str, value: Value, like: Value) -> str:
    number = ' class="number"' if _NUMBER.fullmatch(format_value(like)) else ""
    return f"<{tag}{number}>{escape(format_value(value))}</{tag}>"


def _grid(head: str, rows: Iterable[str]) -> str:
    lines = "\n".join(f"<tr>{row}</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead>\n<tbody>{lines}</tbody></table></div>'


def _rows(table: Table) -> str:
    if wrong := {len(row) for row in table.rows} - {len(table.header)}:
        raise ValueError(
            f"tables: {table.title!r} has rows of {sorted(wrong)} cells, expected {len(table.header)}; "
            "give each row a cell for each column of the header"
        )
    first = table.rows[0] if table.rows else table.header
    head = "".join(_cell("th", name, value) for name, value in zip(table.header, first, strict=True))
    return _grid(head, ("".join(_cell("td", value, value) for value in row) for row in table.rows))


def _table(table: Table) -> str:
    return f"<h2>{escape(table.title)}</h2>\n{_rows(table)}"


def _folded(table: Table) -> str:
    return f"<details><summary>{escape(table.title)}</summary>\n{_rows(table)}</details>"


def _link(directory: Path, target: Path | str) -> str:
    return quote(Path(os.path.relpath(directory / target, directory)).as_posix())


def _comparison(directory: Path, runs: Sequence[RunEntry]) -> str:
    """Compare runs on one data set: each a dot with its standard error on a scale that they share."""
    finite = [run.nats for run in runs if math.isfinite(run.nats)]
    alone = len(finite) < 2
    rows = []
    for run in runs:
        link = escape(_link(directory, run.report))
        mark = "" if alone or not math.isfinite(run.nats) else _dot(run, min(finite), max(finite))
        rows.append(
            f'<th scope="row"><a href="{link}">{escape(run.model)}</a></th><td>{escape(run.bound)}</td>'
            f'<td class="number">{escape(format_value(run.nats, run.std_error))}</td>'
            f'<td class="chart">{mark}</td><td class="number">{escape(format_value(run.bits_per_dim))}</td>'
            f'<td class="number">{escape(format_seconds(run.seconds))}</td>'
        )
    return _grid(
        '<th>model</th><th>bound</th><th class="number">nats per datum</th>'
        f'<th class="chart">{"" if alone else "larger is better →"}</th>'
        '<th class="number">bits/dim</th><th class="number">time</th>',
        rows,
    )


def _dot(run: RunEntry, low: float, high: float) -> str:
    unit = 92 / ((high - low) or 1.0)  # percent of the scale's width that a nat takes
    at, half = 4 + unit * (run.nats - low), unit * (run.std_error or 0.0)
    left, right = max(0.0, at - half), max(0.0, 100 - at - half)
    name = "scale best" if run.nats == high else "scale"
    return (
        f'<div class="{name}"><i style="left:{left:.2f}%;right:{right:.2f}%"></i>'
        f'<b style="left:{at:.2f}%"></b></div>'
    )


def _write(path: Path, title: str, lead: str, body: Sequence[str]) -> Path:
    text = _PAGE.substitute(
        title=escape(title), lead=_paragraph("lead", lead), body="\n".join(part for part in body if part)
    )
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


_PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>$title</title>
<style>
:root { --ground: #fff; --raised: #f4f5f7; --ink: #14171c; --soft: #5b6470; --line: #e2e5e9;
  --mark: #2b78c0; }
@media (prefers-color-scheme: dark) {
  :root { --ground: #14171c; --raised: #1e2229; --ink: #e8eaed; --soft: #9aa3ae; --line: #2d333b;
    --mark: #5aa7e8; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1100px; padding: 3rem 1.25rem 4rem; background: var(--ground);
  color: var(--ink); overflow-wrap: anywhere;
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; }
h1 { margin: 0; font-size: clamp(1.7rem, 5vw, 2.6rem); line-height: 1.15; letter-spacing: -.02em; }
h2 { margin: 3.5rem 0 .75rem; font-size: 1.3rem; letter-spacing: -.01em; }
h3 { margin: 0 0 .6rem; font-size: 1.05rem; }
p { margin: 0; }
a { color: var(--mark); text-decoration-thickness: 1px; text-underline-offset: .2em; }
.lead { margin-top: .75rem; max-width: 46rem; font-size: 1.15rem; color: var(--soft); }
.facts { margin-top: .75rem; font-size: .9rem; color: var(--soft); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 13.5rem), 1fr));
  gap: .75rem; margin: 2rem 0 0; }
.tiles > div { padding: 1rem 1.15rem 1.1rem; background: var(--raised); border-radius: .75rem; }
dt { font-size: .9rem; font-weight: 600; color: var(--soft); }
dd { margin: .2rem 0 0; }
.value { font-size: 2rem; font-weight: 650; line-height: 1.2; letter-spacing: -.02em; }
.value, .error, .number { font-variant-numeric: tabular-nums; white-space: nowrap; }
.error, .unit, .note { color: var(--soft); }
.unit, .note { font-size: .9rem; }
.figures { --height: 20rem; --limit: 100rem; display: flex; flex-wrap: wrap; gap: 2.5rem 2rem;
  margin: 2.5rem 0 0; }
.small { --height: 13rem; --limit: 22rem; }
figure { flex: var(--aspect) 1 calc(var(--aspect) * var(--height)); min-width: 0; margin: 0;
  max-width: min(var(--width), var(--aspect) * var(--limit)); }
img { display: block; width: 100%; height: auto; }
figcaption { margin-top: .7rem; font-size: .95rem; color: var(--soft); }
.scroll { overflow-x: auto; }
table { width: 100%; border-collapse: collapse; font-size: .95rem; overflow-wrap: normal; }
th, td { padding: .5rem 1rem .5rem 0; border-bottom: 1px solid var(--line); text-align: left; }
th:last-child, td:last-child { padding-right: 0; }
thead th { font-size: .85rem; font-weight: 600; color: var(--soft); }
th.number, td.number { text-align: right; }
.chart { width: 32%; min-width: 10rem; }
.scale { position: relative; height: 1.5rem; }
.scale::before { content: ""; position: absolute; inset: 50% 0 auto; border-top: 1px solid var(--line); }
.scale i { position: absolute; top: calc(50% - 2px); height: 4px; border-radius: 2px;
  background: var(--soft); }
.scale b { position: absolute; top: calc(50% - 6px); width: 12px; height: 12px; margin-left: -6px;
  border-radius: 50%; background: var(--soft); }
.best i, .best b { background: var(--mark); }
details { margin-top: .75rem; padding: .8rem 1.15rem; background: var(--raised); border-radius: .75rem; }
.scroll + details, .figures + details { margin-top: 3.5rem; }
summary { cursor: pointer; font-weight: 600; }
details .scroll { margin-top: .5rem; }
details td { font: .85rem/1.5 ui-monospace, SFMono-Regular, Consolas, monospace; overflow-wrap: anywhere; }
details td:first-child { width: 14rem; }
details th.number, details td.number { text-align: left; }
@media (max-width: 40rem) {
  .chart { display: none; }
  details td:first-child { width: 9rem; }
}
</style>
</head>
<body>
<h1>$title</h1>
$lead
<main>
$body
</main>
</body>
</html>
""")
