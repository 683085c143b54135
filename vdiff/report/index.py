"""One self-contained HTML page that compares runs, data set by data set, and leads to the page of each."""

import math
import os
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

from vdiff.report.markup import figure, grid, wrap, write
from vdiff.report.values import format_milliseconds, format_seconds, format_value


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
        num_params: how many numbers were learned; a column only where some run has it.
        seconds_per_sample: what one draw takes; likewise.
        weights: how far the importance weights behind `nats` are to be trusted, a note to the bound.
        steps: how long it was trained, e.g. "6,000 steps of 128", a note to the seconds.
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
    num_params: int | None = None
    seconds_per_sample: float | None = None
    weights: str | None = None
    steps: str | None = None


class FactTable(NamedTuple):
    """Hold a table of texts.

    Attributes:
        title: its heading.
        head: the names of its columns.
        rows: a text for each column; the first names the row.
    """

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


def write_index(
    path: Path | str, *, title: str, lead: str, runs: Sequence[RunEntry], tables: Sequence[FactTable] = ()
) -> Path:
    """Write the page that compares runs: a table and a scale for each data set, a picture for each run.

    Args:
        path: the page to write; links to the reports are relative to its directory.
        title: the page's title.
        lead: one sentence: what is compared.
        runs: in the order to show; relative paths in them start at the page's directory.
        tables: what else is said of them, below.

    Returns:
        The path of the page.

    Raises:
        ValueError: if a picture is not a PNG.
    """
    path = Path(path)
    body = []
    for data in dict.fromkeys(run.data for run in runs):
        group = [run for run in runs if run.data == data]
        cards = (_card(path.parent, run) for run in group)
        body += [f"<h2>{escape(data)}</h2>", _comparison(path.parent, group)]
        body.append(wrap("section", "figures small", cards))
    for table in tables:
        body += [f"<h2>{escape(table.title)}</h2>", _facts(table)]
    return write(path, title, lead, body)


def _facts(table: FactTable) -> str:
    rows = (
        f'<th scope="row">{escape(first)}</th>' + "".join(f"<td>{escape(text)}</td>" for text in rest)
        for first, *rest in table.rows
    )
    return grid("".join(f"<th>{escape(name)}</th>" for name in table.head), rows)


def _link(directory: Path, target: Path | str) -> str:
    return quote(Path(os.path.relpath(directory / target, directory)).as_posix())


def _card(directory: Path, run: RunEntry) -> str:
    link = _link(directory, run.report)
    return figure(directory / run.picture, run.caption, heading=run.model, link=link)


def _comparison(directory: Path, runs: Sequence[RunEntry]) -> str:
    """Compare runs on one data set: each a dot with its standard error on a scale that they share."""
    finite = [run.nats for run in runs if math.isfinite(run.nats)]
    alone = len(finite) < 2
    with_params = any(run.num_params is not None for run in runs)
    with_draws = any(run.seconds_per_sample is not None for run in runs)
    rows = []
    for run in runs:
        link = escape(_link(directory, run.report))
        mark = "" if alone or not math.isfinite(run.nats) else _dot(run, min(finite), max(finite))
        rows.append(
            f'<th scope="row"><a href="{link}">{escape(run.model)}</a></th><td>{_noted(run.bound, run.weights)}</td>'
            f'<td class="number">{escape(format_value(run.nats, run.std_error))}</td>'
            f'<td class="chart">{mark}</td><td class="number">{escape(format_value(run.bits_per_dim))}</td>'
            f'<td class="number">{_noted(format_seconds(run.seconds), run.steps)}</td>'
            + (f'<td class="number">{escape(format_value(run.num_params))}</td>' if with_params else "")
            + (
                f'<td class="number">{escape(format_milliseconds(run.seconds_per_sample))}</td>'
                if with_draws
                else ""
            )
        )
    return grid(
        '<th>model</th><th>bound</th><th class="number">nats per datum</th>'
        f'<th class="chart">{"" if alone else "larger is better →"}</th>'
        '<th class="number">bits/dim</th><th class="number">training</th>'
        + ('<th class="number">parameters</th>' if with_params else "")
        + ('<th class="number">per sample</th>' if with_draws else ""),
        rows,
    )


def _noted(text: str, note: str | None) -> str:
    return escape(text) + (f'<div class="note">{escape(note)}</div>' if note else "")


def _dot(run: RunEntry, low: float, high: float) -> str:
    unit = 92 / ((high - low) or 1.0)  # percent of the scale's width that a nat takes
    at, half = 4 + unit * (run.nats - low), unit * (run.std_error or 0.0)
    left, right = max(0.0, at - half), max(0.0, 100 - at - half)
    name = "scale best" if run.nats == high else "scale"
    return (
        f'<div class="{name}"><i style="left:{left:.2f}%;right:{right:.2f}%"></i>'
        f'<b style="left:{at:.2f}%"></b></div>'
    )
