"""A density over the plane, as the height of a landscape, and points on it."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from vdiff.report.ink import COLORS, INK, dress, new_figure, save


def landscape(
    log_density: ArrayLike,
    low: Sequence[float],
    high: Sequence[float],
    points: Sequence[tuple[str, ArrayLike]],
    path: Path | str,
    *,
    depth: float = 9.0,
) -> Path:
    """Write a log-density over a box, and beside each other sets of points on it.

    Heights are in nats below the highest; what lies deeper than `depth` is left blank, as is the ground.

    Args:
        log_density: [G, G] at the middles of the cells, the first axis along the first coordinate; nats.
        low: the box's lower corner, [2].
        high: its upper corner, [2].
        points: a title and an array [N, 2] for each panel; an empty array leaves the landscape alone.
        path: the PNG to write.
        depth: how many nats below the highest are drawn.

    Returns:
        The path.

    Raises:
        ValueError: if log_density is not [G, G] with a finite entry, there is no panel, or points are not [N, 2].
    """
    heights = np.asarray(log_density, np.float64)
    if heights.ndim != 2 or heights.shape[0] != heights.shape[1] or not np.isfinite(heights).any():
        raise ValueError(f"log_density: got shape {heights.shape}, expected [G, G] with finite entries")
    panels = [(title, np.asarray(given, np.float64)) for title, given in points]
    if not panels or any(given.ndim != 2 or given.shape[1] != 2 for _, given in panels):
        raise ValueError(
            f"points: got shapes {[given.shape for _, given in panels]}, expected [N, 2] for each of one panel or more"
        )
    from matplotlib.colors import LinearSegmentedColormap, to_rgb

    blue = to_rgb(COLORS[0])
    colors = LinearSegmentedColormap.from_list("height", [(*blue, 0.0), (*blue, 0.55), (*blue, 1.0)])
    below = heights - np.nanmax(np.where(np.isfinite(heights), heights, np.nan))
    shown = np.where(below > -depth, below, np.nan).T
    extent = (low[0], high[0], low[1], high[1])
    fig = new_figure(4.6 * len(panels) + 0.9, 4.6)
    axes = fig.subplots(1, len(panels), squeeze=False)[0]
    for ax, (title, given) in zip(axes, panels, strict=True):
        dress(ax, title)
        drawn = ax.imshow(
            shown, origin="lower", extent=extent, cmap=colors, vmin=-depth, vmax=0.0, aspect="equal"
        )
        size = float(np.clip(4e3 / max(len(given), 1), 2, 14))
        ax.scatter(*given.T, s=size, c=COLORS[1], linewidths=0, alpha=0.8)
        ax.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]), xlabel="$x_1$", ylabel="$x_2$")
        ax.grid(visible=False)
    bar = fig.colorbar(drawn, ax=list(axes), shrink=0.85, ticks=[-depth, -2 * depth / 3, -depth / 3, 0])
    bar.outline.set_visible(False)
    bar.ax.tick_params(colors=INK, labelsize=11, length=0)
    bar.set_label("log p, nats below the highest", color=INK, size=11)
    return save(fig, path)
