"""Pictures of what a model encodes.

    principal_plane     points [N, D] to the plane in which they vary most
    latent_scatter      latents in the plane, coloured by class
    mixture_plot        12.2.2's clusters: points in the plane and the components that explain them
    kl_per_unit         how many nats each latent unit carries

All but the first are pure functions from arrays to one PNG, whose path they return.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from vdiff.report.ink import COLORS, INK, cycled_colors, dress, new_figure, save

if TYPE_CHECKING:
    import matplotlib.axes
    import matplotlib.figure


def principal_plane(points: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Project points on the two directions in which they vary most, by SVD.

    Args:
        points: [N, D] with D at least 2.

    Returns:
        The coordinates [N, 2], centred, each direction signed so that its largest entry is positive, and
        the shares [2] of the variance that the two directions explain.

    Raises:
        ValueError: if points is not [N, D] with N and D at least 2.
    """
    points = np.asarray(points, np.float64)
    if points.ndim != 2 or min(points.shape) < 2:
        raise ValueError(f"points: got shape {points.shape}, expected [N, D], both at least 2; add a column")
    centred = points - points.mean(0)
    _, scale, directions = np.linalg.svd(centred, full_matrices=False)
    largest = np.argmax(np.abs(directions[:2]), axis=1)
    directions = directions[:2] * np.sign(directions[np.arange(2), largest])[:, None]
    return centred @ directions.T, scale[:2] ** 2 / max(np.sum(scale**2), np.finfo(np.float64).tiny)


def latent_scatter(
    points: ArrayLike,
    labels: ArrayLike | None,
    path: Path | str,
    *,
    axis_labels: Sequence[str] = ("$z_1$", "$z_2$"),
) -> Path:
    """Write the latents in the plane, each class labelled at its median.

    Args:
        points: [N, 2]; of wider latents, `principal_plane`.
        labels: [N] classes, or None for one colour.
        path: the PNG to write.
        axis_labels: names of the two axes.

    Returns:
        The path.

    Raises:
        ValueError: if points is not [N, 2] or labels is not [N].
    """
    points = _check_plane("points", points)
    classes = np.zeros(len(points), int) if labels is None else np.asarray(labels)
    if classes.shape != points.shape[:1]:
        raise ValueError(
            f"labels: got shape {classes.shape}, expected [{len(points)}], one for each point; or pass None"
        )
    names, indices = np.unique(classes, return_inverse=True)
    colors = cycled_colors(len(names))
    order = np.random.default_rng(0).permutation(len(points))  # no class drawn over all others
    fig, ax = _plane(axis_labels)
    _dots(ax, points[order], colors[indices[order]])
    if labels is not None:
        medians = np.stack([np.nanmedian(points[indices == i], axis=0) for i in range(len(names))])
        _badges(ax, medians, [str(name) for name in names], colors)
    return save(fig, path)


def mixture_plot(
    data: ArrayLike, locs: ArrayLike, covariances: ArrayLike, weights: ArrayLike, path: Path | str
) -> Path:
    """Write data in the plane under a Gaussian mixture: ellipses at 1 and 2 sigma, weights at the means.

    A point's colour blends those of the components by p(component | point).

    Args:
        data: [N, 2].
        locs: means [C, 2].
        covariances: [C, 2, 2].
        weights: [C], summing to one.
        path: the PNG to write.

    Returns:
        The path.

    Raises:
        ValueError: if the shapes disagree or a covariance is not positive definite.
    """
    from matplotlib.patches import Ellipse

    data, locs = _check_plane("data", data), _check_plane("locs", locs)
    covariances, weights = np.asarray(covariances, np.float64), np.asarray(weights, np.float64)
    num = len(locs)
    for name, array, expected in (("covariances", covariances, (num, 2, 2)), ("weights", weights, (num,))):
        if array.shape != expected:
            raise ValueError(f"{name}: got shape {array.shape}, expected {expected}, one a row of locs")
    scales, axes = np.linalg.eigh(covariances)
    if not np.all(scales > 0):
        raise ValueError(
            f"covariances: got least eigenvalue {scales.min():.3g}, expected positive; pass scale @ scale.T"
        )
    colors = cycled_colors(num)
    whitened = np.einsum("nci,cij->ncj", data[:, None] - locs, axes) / np.sqrt(scales)
    with np.errstate(divide="ignore"):  # a component of weight 0 has no points
        log_joint = np.log(weights) - 0.5 * np.log(scales).sum(-1) - 0.5 * (whitened**2).sum(-1)
    posterior = np.exp(log_joint - log_joint.max(1, keepdims=True))
    posterior /= posterior.sum(1, keepdims=True)
    fig, ax = _plane(("$x_1$", "$x_2$"))
    _dots(ax, data, posterior @ colors)
    for loc, scale, axis, color in zip(locs, 2 * np.sqrt(scales), axes, colors, strict=True):
        angle = np.degrees(np.arctan2(axis[1, 0], axis[0, 0]))
        for num_sigmas in (1, 2):
            style = {"facecolor": "none", "edgecolor": color, "linewidth": 2.4 / num_sigmas}
            ax.add_patch(Ellipse(loc, *(num_sigmas * scale), angle=angle, **style))
    _badges(ax, locs, [f"{weight:.2f}" for weight in weights], colors)
    return save(fig, path)


def kl_per_unit(values: ArrayLike, path: Path | str, *, active_above: float = 0.01) -> Path:
    """Write the KL of each latent unit as sorted bars, the active ones coloured.

    Args:
        values: [D], nats, averaged over data.
        path: the PNG to write.
        active_above: a unit with more nats than this counts as active.

    Returns:
        The path.

    Raises:
        ValueError: if values is not a non-empty vector.
    """
    from matplotlib.ticker import MaxNLocator

    values = np.asarray(values, np.float64)
    if values.ndim != 1 or not len(values):
        raise ValueError(f"values: got shape {values.shape}, expected [D], one a unit; average over the data")
    values = np.sort(values)[::-1]
    active = values > active_above
    fig = new_figure(7.2, 3.2)
    ax = dress(fig.add_subplot(), f"{active.sum()} of {len(values)} units above {active_above:g} nats")
    ax.bar(np.arange(1, len(values) + 1), values, width=0.8, color=np.where(active, COLORS[0], COLORS[3]))
    ax.set(xlabel="latent unit, sorted", ylabel="KL, nats per datum", xlim=(0.4, len(values) + 0.6))
    ax.xaxis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1))
    return save(fig, path)


def _check_plane(name: str, points: ArrayLike) -> np.ndarray:
    points = np.asarray(points, np.float64)
    if points.ndim != 2 or points.shape[1] != 2 or not len(points):
        raise ValueError(f"{name}: got shape {points.shape}, expected [N, 2]; project with principal_plane")
    return points


def _plane(axis_labels: Sequence[str]) -> tuple["matplotlib.figure.Figure", "matplotlib.axes.Axes"]:
    from matplotlib.ticker import MaxNLocator

    fig = new_figure(5.4, 5.4)
    ax = dress(fig.add_subplot())
    ax.set(xlabel=axis_labels[0], ylabel=axis_labels[1], aspect="equal")
    ax.grid(visible=True, axis="x", color=INK, alpha=0.22, linewidth=0.8)
    ax.spines["bottom"].set_visible(False)
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(MaxNLocator(5, integer=True))
    return fig, ax


def _dots(ax: "matplotlib.axes.Axes", points: np.ndarray, colors: np.ndarray) -> None:
    ax.scatter(*points.T, s=float(np.clip(4e4 / len(points), 4, 36)), c=colors, alpha=0.6, linewidths=0)


def _badges(
    ax: "matplotlib.axes.Axes", centres: np.ndarray, texts: Sequence[str], colors: np.ndarray
) -> None:
    """Write texts in coloured badges at their centres, pushed apart where they would overlap."""
    ax.figure.draw_without_rendering()  # the limits and the size in pixels are known only then
    size = 20.0 * ax.figure.dpi / 72
    at = ax.transData.transform(centres)
    for _ in range(100):
        gaps = at[:, None] - at
        distances = np.hypot(*gaps.T).T + np.eye(len(at)) * 1e9
        push = np.clip(size - distances, 0, None) / np.maximum(distances, 1e-9) / 2
        at = at + (push[..., None] * gaps).sum(1)
    for place, text, color in zip(ax.transData.inverted().transform(at), texts, colors, strict=True):
        dark = color @ (0.299, 0.587, 0.114) > 0.6
        shape = "circle,pad=0.25" if len(text) < 2 else "round,pad=0.3"
        box = {"boxstyle": shape, "facecolor": color, "edgecolor": "white"}
        ink = "#111827" if dark else "white"
        ax.text(*place, text, color=ink, size=11, weight="bold", ha="center", va="center", bbox=box)
