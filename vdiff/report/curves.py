"""Training curves: the rows of `metrics.jsonl`, and one picture of how a run learned."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vdiff.report.ink import COLORS, INK, dress, new_figure, save

if TYPE_CHECKING:
    import matplotlib.axes


def load_metrics(path: Path | str) -> list[dict[str, object]]:
    """Read `metrics.jsonl`; a last line cut short, as by a kill, is ignored.

    Args:
        path: a file with one JSON object a line.

    Returns:
        One dict a line; null, a number that was not finite, is NaN.

    Raises:
        ValueError: if any line but a last one cut short is not a JSON object.
    """
    text = Path(path).read_text(encoding="utf-8", errors="replace")
    rows, lines = [], text.split("\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            row = None
        if isinstance(row, dict):
            rows.append({name: math.nan if value is None else value for name, value in row.items()})
        elif number < len(lines):  # a line that ends in a newline was written whole
            raise ValueError(
                f"{path}, line {number}: got {line[:60]!r}, expected a JSON object; delete that line"
            )
    return rows


def training_curves(
    rows: Sequence[Mapping[str, object]],
    path: Path | str,
    *,
    bound: str = "elbo",
    terms: Sequence[str] | None = None,
    unit: str = "nats",
) -> Path:
    """Write small multiples over the steps: the bound, its terms, the gradient's norm.

    The limits follow the run after its first tenth; a panel says what lies outside them. Where a step was
    logged twice, as after a resume, the later row counts.

    Args:
        rows: of `metrics.jsonl`, each with "step"; other names may be missing from a row.
        path: the PNG to write.
        bound: the name of the bound; where no row has it, "objective" is drawn. `test_` before it names its
            value on test data, in the same panel.
        terms: the names of its terms; by default every other name but "objective", "seconds", "test_..." and what
            is told of skipped steps.
        unit: of the bound and of its terms, e.g. "nats" a datum.

    Returns:
        The path.

    Raises:
        ValueError: if a row has no step, or no row has any of the names.
    """
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    if not all("step" in row for row in rows):
        raise ValueError('rows: got one without "step", expected the rows of load_metrics; add the step')
    known = ("step", "seconds", "grad_norm", "objective", bound)
    names = dict.fromkeys(name for row in rows for name in row if isinstance(row[name], int | float))
    if terms is None:
        terms = [name for name in names if name not in known and not name.startswith(("test_", "skipped"))]
    panels = [(f"{name}, {unit}", [name, f"test_{name}"]) for name in terms]
    train = bound if bound in names or "objective" not in names else "objective"
    panels.insert(0, (f"{train}, {unit}", [train, f"test_{bound}"]))
    panels.append(("gradient norm, log", ["grad_norm"]))
    panels = [(title, [name for name in group if name in names]) for title, group in panels]
    panels = [(title, group) for title, group in panels if group]
    if not panels:
        raise ValueError(f"rows: got names {list(names)}, expected {bound!r} among them; pass bound=")
    steps = [row["step"] for row in rows]
    num_rows = 1 + len(panels) // 2
    fig = new_figure(7.2, 0.4 + 1.9 * num_rows)
    fig.get_layout_engine().set(h_pad=0.12)  # inches: a row's steps stay clear of the next row's titles
    grid = fig.add_gridspec(num_rows, 2)
    for i, (title, group) in enumerate(panels):
        row, column = (i + 1) // 2, (i + 1) % 2
        alone = i == 0 or (column == 0 and i == len(panels) - 1)  # the bound, and a last one without a peer
        ax = dress(fig.add_subplot(grid[row, :] if alone else grid[row, column]), title)
        ax.set(xlim=(min(steps), max(*steps, min(steps) + 1)), xlabel="step" if row == num_rows - 1 else "")
        ax.xaxis.set_major_locator(MaxNLocator(5 if alone else 3, integer=True, min_n_ticks=1))
        ax.xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step:,.0f}"))
        ax.set_yscale("log" if group == ["grad_norm"] else "linear")
        _curves(ax, [(name, *_series(rows, name)) for name in group])
    return save(fig, path)


def _series(rows: Sequence[Mapping[str, object]], name: str) -> tuple[np.ndarray, np.ndarray]:
    values = {row["step"]: row[name] for row in rows if isinstance(row.get(name), int | float)}
    steps = sorted(values)
    return np.array(steps, float), np.array([values[step] for step in steps], float)


def _curves(ax: "matplotlib.axes.Axes", curves: list[tuple[str, np.ndarray, np.ndarray]]) -> None:
    """Draw (name, steps, values): the noise faint, its running mean strong, a test curve with dots."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    logarithmic = ax.get_yscale() == "log"
    settled, everything, lost = [], [], 0
    for name, steps, values in curves:
        ok = np.isfinite(values) & ((values > 0) | (not logarithmic))
        lost += int(np.sum(~np.isfinite(values)))
        steps, values = steps[ok], values[ok]
        if not len(steps):
            continue
        test = name.startswith("test_")
        color, label = (COLORS[6], name.replace("_", " ")) if test else (COLORS[0], "train")
        window = 1 if test or len(values) < 60 else len(values) // 30
        mean = np.convolve(values, np.ones(window) / window, "valid")
        if window > 1:
            ax.plot(steps, values, color=color, alpha=0.3, linewidth=0.8)
        style = {"marker": "o", "markersize": 4.5} if test or len(values) == 1 else {}
        ax.plot(steps[window // 2 :][: len(mean)], mean, color=color, linewidth=2, label=label, **style)
        settled.append(values[steps >= steps[0] + 0.1 * (steps[-1] - steps[0])] if len(steps) > 9 else values)
        everything.append(values)
    notes = [f"{lost} not finite"] if lost else []
    if settled:
        scaled, unscaled = (np.log, np.exp) if logarithmic else (np.asarray, np.asarray)
        low, high = np.quantile(scaled(np.concatenate(settled)), [0.005, 0.995])
        margin = 0.08 * (high - low) or 0.05 * abs(high) or 1.0
        values = scaled(np.concatenate(everything))
        low, high = max(low - margin, values.min() - margin), min(high + margin, values.max() + margin)
        ax.set_ylim(unscaled([low, high]))
        ends = [end for end in (values.min(), values.max()) if max(low - end, end - high) > (high - low) / 4]
        notes += [f"off scale: {_number(float(unscaled(end)))}" for end in ends]
        if logarithmic:
            subs = (1.0, 2.0, 5.0) if high - low < np.log(100) else (1.0,)
            ax.yaxis.set_major_locator(LogLocator(subs=subs, numticks=6))
            ax.yaxis.set_minor_locator(NullLocator())
            ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _number(value)))
        else:
            ax.yaxis.set_major_locator(MaxNLocator(4))
    if notes:
        ax.set_title("\n".join(notes), loc="right", size=9, color=INK)
    if len(settled) > 1:
        ax.legend(loc="lower right", frameon=False, labelcolor="linecolor", fontsize=11)


def _number(value: float) -> str:
    text = f"{value:,.0f}" if 100 <= abs(value) < 1e6 else f"{value:.3g}"
    return text.replace("-", "\N{MINUS SIGN}")
