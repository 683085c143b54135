"""What all figures share: the ground, the ink, a sequence of colours.

The ground is transparent and the ink a middle grey, so that one file reads on a light page and on a dark
one. Every figure is a `matplotlib.figure.Figure` of its own: nothing touches pyplot or its global state.
Colours: Petroff, Accessible Color Sequences for Data Visualization, 2021 (safe for colour-blind readers).

The functions that draw import matplotlib themselves, here and in the modules beside, since it takes a
while to import and most programs that import vdiff draw nothing.
"""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import matplotlib.axes
    import matplotlib.figure

INK = "#7a828e"
COLORS = (
    *("#3f90da", "#ffa90e", "#bd1f01", "#94a4a2", "#832db6"),
    *("#a96b59", "#e76300", "#b9ac70", "#717581", "#92dadd"),
)


def cycled_colors(num: int) -> np.ndarray:
    """Take RGB [num, 3] in [0, 1] from the sequence, from its start again where it ends."""
    from matplotlib.colors import to_rgb

    return np.array([to_rgb(COLORS[i % len(COLORS)]) for i in range(num)])


def new_figure(width: float, height: float) -> "matplotlib.figure.Figure":
    """Make an empty figure, inches, that arranges its axes by itself."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def dress(ax: "matplotlib.axes.Axes", title: str = "") -> "matplotlib.axes.Axes":
    """Dress axes for any ground: grey ink, faint grid, no box."""
    ax.set_title(title, loc="left", size=11, color=INK, weight="bold")
    ax.patch.set_alpha(0)
    ax.spines[["top", "right", "left"]].set_visible(False)
    ax.spines["bottom"].set_color(INK)
    ax.tick_params(colors=INK, labelsize=11, length=0)
    ax.grid(visible=True, axis="y", color=INK, alpha=0.22, linewidth=0.8)
    ax.set_axisbelow(True)
    for label in (ax.xaxis.label, ax.yaxis.label):
        label.set(color=INK, size=11)
    return ax


def save(fig: "matplotlib.figure.Figure", path: Path | str) -> Path:
    """Write a figure cut to its ink, on a transparent ground, and return the path."""
    fig.savefig(path, dpi=200, transparent=True, bbox_inches="tight", pad_inches=0.08)
    return Path(path)
