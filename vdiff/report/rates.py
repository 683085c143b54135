r"""Where on its path a diffusion model spends its nats.

-diffusion = int rate(log_snr) dlog_snr,    rate = 1/2 E|eps_hat - eps|^2 in continuous time
"""

from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from vdiff.report.ink import COLORS, dress, new_figure, save


def rate_curve(
    edges: ArrayLike, nats: ArrayLike, path: Path | str, *, std_errors: ArrayLike | None = None
) -> Path:
    """Write nats per unit of log-SNR against log-SNR, as strips whose areas add up to the diffusion term.

    Args:
        edges: [n + 1] log-SNRs, rising or falling, between which the strips lie.
        nats: [n], what each strip costs: minus its share of the diffusion term.
        path: the PNG to write.
        std_errors: [n], of nats; drawn as a band.

    Returns:
        The path.

    Raises:
        ValueError: if the lengths do not fit, or edges do not rise or fall.
    """
    edges, nats = np.asarray(edges, np.float64), np.asarray(nats, np.float64)
    errors = np.zeros_like(nats) if std_errors is None else np.asarray(std_errors, np.float64)
    if nats.ndim != 1 or not len(nats) or edges.shape != (len(nats) + 1,) or errors.shape != nats.shape:
        raise ValueError(
            f"edges, nats, std_errors: got shapes {edges.shape}, {nats.shape} and {errors.shape}, expected [n + 1], "
            "[n] and [n]; a strip lies between two edges"
        )
    if edges[0] > edges[-1]:
        edges, nats, errors = edges[::-1], nats[::-1], errors[::-1]
    widths = np.diff(edges)
    if not np.all(widths > 0):
        raise ValueError("edges: got a sequence that turns or stands still, expected one that rises or falls")
    fig = new_figure(7.2, 3.2)
    ax = dress(fig.add_subplot(), f"nats per unit of log-SNR; the area is {nats.sum():.2f} nats")
    ax.stairs(nats / widths, edges, fill=True, color=COLORS[0], alpha=0.25, linewidth=0)
    ax.stairs(nats / widths, edges, color=COLORS[0], linewidth=2, baseline=None)
    if std_errors is not None:
        middles = (edges[:-1] + edges[1:]) / 2
        bars = {"fmt": "none", "ecolor": COLORS[0], "elinewidth": 1.2}
        ax.errorbar(middles, nats / widths, yerr=errors / widths, **bars)
    ax.set(xlim=(edges[0], edges[-1]), xlabel="log-SNR (noise on the left, data on the right)")
    ax.set_ylim(bottom=min(0.0, float((nats / widths).min())))
    return save(fig, path)
