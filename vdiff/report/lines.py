"""Lines in panels: how measured quantities depend on a number, several methods in one panel."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from vdiff.report.ink import COLORS, INK, dress, new_figure, save

if TYPE_CHECKING:
    import matplotlib.axes


class Panel(NamedTuple):
    """Hold one panel.

    Attributes:
        title: what is drawn, with its unit.
        lines: name of a line -> (x, y); a name has the same colour in every panel.
        slopes: label -> exponent of x; thin reference lines of a log-log panel.
        xlabel: what x is.
        log_x: whether x is drawn on a logarithmic scale.
        log_y: whether y is.
    """

    title: str
    lines: Mapping[str, tuple[ArrayLike, ArrayLike]]
    slopes: Mapping[str, float] = {}
    xlabel: str = ""
    log_x: bool = True
    log_y: bool = True


def line_panels(panels: Sequence[Panel], path: Path | str, *, columns: int = 3) -> Path:
    """Write panels of lines, with one legend below.

    Args:
        panels: in the order to show.
        path: the PNG to write.
        columns: the most panels in a row.

    Returns:
        The path.

    Raises:
        ValueError: if there is no panel, or a line's x and y differ in length or are empty.
    """
    if not panels:
        raise ValueError("panels: got none, expected at least one")
    names = list(dict.fromkeys(name for panel in panels for name in panel.lines))
    colors = {name: COLORS[i % len(COLORS)] for i, name in enumerate(names)}
    columns = min(columns, len(panels))
    num_rows = -(-len(panels) // columns)
    fig = new_figure(3.6 * columns if columns > 1 else 7.2, 2.9 * num_rows + 0.5)
    handles = {}
    for i, panel in enumerate(panels):
        ax = dress(fig.add_subplot(num_rows, columns, i + 1), panel.title)
        ax.set(
            xlabel=panel.xlabel,
            xscale="log" if panel.log_x else "linear",
            yscale="log" if panel.log_y else "linear",
        )
        for name, (x, y) in panel.lines.items():
            x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
            if x.shape != y.shape or x.ndim != 1 or not len(x):
                raise ValueError(f"{name}: got x of shape {x.shape} and y of {y.shape}, expected [n] twice")
            marker = "o" if len(x) <= 20 else None
            handles[name] = ax.plot(x, y, color=colors[name], linewidth=2, marker=marker, markersize=4)[0]
        for label, exponent in panel.slopes.items():
            _slope(ax, panel, label, exponent)
        _ticks(ax, panel)
    fig.legend(
        handles.values(),
        handles.keys(),
        loc="outside lower center",
        ncols=min(len(handles), 2 * columns),
        frameon=False,
        labelcolor="linecolor",
        fontsize=11,
    )
    return save(fig, path)


def _ticks(ax: "matplotlib.axes.Axes", panel: Panel) -> None:
    """Mark few plain numbers: where there are few x, each of them."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

    x = np.unique(np.concatenate([np.asarray(x, np.float64) for x, _ in panel.lines.values()]))
    plain = FuncFormatter(lambda value, _: f"{value:,.0f}" if abs(value) >= 10 else f"{value:g}")
    if panel.log_x:
        ax.xaxis.set_major_locator(FixedLocator(x) if len(x) <= 8 else LogLocator(numticks=5))
        ax.xaxis.set_minor_locator(NullLocator())
    else:
        ax.locator_params(axis="x", nbins=4)
    ax.xaxis.set_major_formatter(plain)
    if panel.log_y:
        low, high = ax.get_ylim()
        ax.yaxis.set_major_locator(
            LogLocator(subs=(1.0, 2.0, 5.0) if high < 100 * low else (1.0,), numticks=6)
        )
        ax.yaxis.set_minor_locator(NullLocator())
        ax.yaxis.set_major_formatter(plain)


def _slope(ax: "matplotlib.axes.Axes", panel: Panel, label: str, exponent: float) -> None:
    """Draw a dashed power of x through the middle of the panel, and name it at its end."""
    x = np.unique(np.concatenate([np.asarray(x, np.float64) for x, _ in panel.lines.values()]))
    values = np.concatenate([np.asarray(y, np.float64) for _, y in panel.lines.values()])
    values = values[np.isfinite(values) & (values > 0)]
    middle = np.exp((np.log(values.min()) + np.log(values.max())) / 2)
    y = middle * (x / np.sqrt(x[0] * x[-1])) ** exponent
    ax.plot(x, y, color=INK, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    side = "bottom" if exponent > 0 else "top"
    ax.annotate(label, (x[-1], y[-1]), color=INK, size=9, ha="right", va=side)
