"""Noise schedules beside each other: where each spends its time, and how much its estimate then varies."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from vdiff.report.ink import COLORS, INK, cycled_colors, dress, new_figure, save
from vdiff.report.values import format_value


def schedule_comparison(
    schedules: Mapping[str, tuple[ArrayLike, ArrayLike]], spreads: Mapping[str, float], path: Path | str
) -> Path:
    """Write log-SNR against time on the left, and the spread of the estimate under each schedule on the right.

    Args:
        schedules: name -> (t [n], log-SNR [n]), in the order to show.
        spreads: name -> standard deviation of the estimate, nats; of the same names.
        path: the PNG to write.

    Returns:
        The path.

    Raises:
        ValueError: if there is no schedule, the names differ, or a schedule's two arrays do.
    """
    if not schedules or list(schedules) != list(spreads):
        raise ValueError(
            f"spreads: got names {list(spreads)}, expected {list(schedules)}, those of schedules, at least one"
        )
    fig = new_figure(7.2, 3.0)
    grid = fig.add_gridspec(1, 2, width_ratios=(3, 2))
    ax = dress(fig.add_subplot(grid[0]), "log-SNR over time")
    for i, (name, (t, log_snr)) in enumerate(schedules.items()):
        t, log_snr = np.asarray(t, np.float64), np.asarray(log_snr, np.float64)
        if t.ndim != 1 or t.shape != log_snr.shape or not len(t):
            raise ValueError(
                f"{name}: got t of shape {t.shape} and log-SNR of {log_snr.shape}, expected [n] twice"
            )
        ax.plot(t, log_snr, color=COLORS[i % len(COLORS)], linewidth=2, zorder=2 + len(schedules) - i)
    ax.set(xlim=(0, 1), xlabel="t (data at 0, noise at 1)")
    bars = dress(fig.add_subplot(grid[1]), "spread of one draw, nats")
    values = np.array([spreads[name] for name in spreads], np.float64)
    places = np.arange(len(values))[::-1]
    bars.barh(places, values, height=0.55, color=cycled_colors(len(values)))
    for place, name, value in zip(places, spreads, values, strict=True):
        label = f"{name}  {format_value(value)}"
        bars.annotate(label, (0, place + 0.31), color=INK, size=11, ha="left", va="bottom")
    bars.set(yticks=[], ylim=(-0.5, len(values) - 0.1), xlim=(0, 1.05 * values.max()))
    bars.grid(visible=False)
    return save(fig, path)
