r"""Pictures of a run: pure functions from arrays to one PNG each; they return the path they wrote.

    image_grid, reconstruction_grid       what the model draws         images in [0, 1]
    latent_scatter, kl_per_unit           what it encodes              points [N, 2], nats [D]
    mixture_plot                          12.2.2's clusters            points and components in the plane
    training_curves                       how it learned               rows of `metrics.jsonl`

The ground is transparent and the ink a middle grey, so that one file reads on a light page and on a dark
one. Every figure is a `matplotlib.figure.Figure` of its own: nothing touches pyplot or its global state.
Colours: Petroff, Accessible Color Sequences for Data Visualization, 2021 (safe for colour-blind readers).
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.image import imsave
from matplotlib.patches import Ellipse
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
from numpy.typing import ArrayLike

INK = "#7a828e"
COLORS = (
    *("#3f90da", "#ffa90e", "#bd1f01", "#94a4a2", "#832db6"),
    *("#a96b59", "#e76300", "#b9ac70", "#717581", "#92dadd"),
)
_CELL = 200  # pixels an image is magnified to, by a whole factor: 100 on a page, sharp on fine screens
_GUTTER = 10
_NOT_FINITE = (214, 39, 40, 255)


def image_grid(images: ArrayLike, path: Path | str, *, columns: int) -> Path:
    """Write images in reading order, each pixel a crisp square, with thin gutters.

    Args:
        images: [N, H, W] or [N, H, W, C] with C 1 or 3, in [0, 1]; the noise of a Gaussian sample that
            strays outside is clipped, and a pixel that is not finite is painted red.
        path: the PNG to write.
        columns: images in a row; the last row may be shorter.

    Returns:
        The path.

    Raises:
        ValueError: if the shape or the range is not that of images, or columns is not positive.
    """
    _check_columns(columns)
    imsave(path, _tile(_check_images("images", images), columns))
    return Path(path)


def reconstruction_grid(
    originals: ArrayLike, reconstructions: ArrayLike, path: Path | str, *, columns: int = 10
) -> Path:
    """Write pairs of rows: the data above, their reconstructions below.

    Args:
        originals: [N, H, W] or [N, H, W, C], in [0, 1].
        reconstructions: of the same shape.
        path: the PNG to write.
        columns: pairs in a row.

    Returns:
        The path.

    Raises:
        ValueError: if the shapes differ or are not those of images, or columns is not positive.
    """
    _check_columns(columns)
    pairs = _check_images("originals", originals), _check_images("reconstructions", reconstructions)
    if pairs[0].shape != pairs[1].shape:
        got, expected = pairs[1].shape, pairs[0].shape
        raise ValueError(f"reconstructions: got shape {got}, expected {expected} as originals; pair them")
    blocks = [
        [_tile(images[start : start + columns], columns) for images in pairs]
        for start in range(0, len(pairs[0]), columns)
    ]
    height, width = blocks[0][0].shape[:2]
    pitch = 2 * height + _GUTTER // 2 + _CELL // 6  # from one pair of rows to the next, pixels
    left, total, dpi = int(2.0 * _CELL), pitch * len(blocks) - _CELL // 6, 100
    fig = Figure(figsize=((left + width) / dpi, total / dpi), dpi=dpi)
    fig.patch.set_alpha(0)
    for i, block in enumerate(blocks):
        for j, (tiles, label) in enumerate(zip(block, ("data", "reconstruction"), strict=True)):
            bottom = total - i * pitch - (j + 1) * height - j * (_GUTTER // 2)
            fig.figimage(tiles, left, bottom, origin="upper")
            middle = (bottom + height / 2) / total
            at = (left - 20) / (left + width)
            fig.text(at, middle, label, color=INK, size=32, ha="right", va="center")
    fig.savefig(path, dpi=dpi)
    return Path(path)


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
    colors = np.array([to_rgb(COLORS[i % len(COLORS)]) for i in range(len(names))])
    order = np.random.default_rng(0).permutation(len(points))  # no class drawn over all others
    fig, ax = _plane(axis_labels)
    _dots(ax, points[order], colors[indices[order]])
    if labels is not None:
        medians = np.stack([np.nanmedian(points[indices == i], axis=0) for i in range(len(names))])
        _badges(ax, medians, [str(name) for name in names], colors)
    return _save(fig, path)


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
    colors = np.array([to_rgb(COLORS[i % len(COLORS)]) for i in range(num)])
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
    return _save(fig, path)


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
    values = np.asarray(values, np.float64)
    if values.ndim != 1 or not len(values):
        raise ValueError(f"values: got shape {values.shape}, expected [D], one a unit; average over the data")
    values = np.sort(values)[::-1]
    active = values > active_above
    fig = Figure(figsize=(7.2, 3.2), layout="constrained")
    ax = _axes(fig.add_subplot(), f"{active.sum()} of {len(values)} units above {active_above:g} nats")
    ax.bar(np.arange(1, len(values) + 1), values, width=0.8, color=np.where(active, COLORS[0], COLORS[3]))
    ax.set(xlabel="latent unit, sorted", ylabel="KL, nats per datum", xlim=(0.4, len(values) + 0.6))
    ax.xaxis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1))
    return _save(fig, path)


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
        terms: the names of its terms; by default every other name but "objective", "seconds" and "test_...".
        unit: of the bound and of its terms, e.g. "nats" a datum.

    Returns:
        The path.

    Raises:
        ValueError: if a row has no step, or no row has any of the names.
    """
    if not all("step" in row for row in rows):
        raise ValueError('rows: got one without "step", expected the rows of load_metrics; add the step')
    known = ("step", "seconds", "grad_norm", "objective", bound)
    names = dict.fromkeys(name for row in rows for name in row if isinstance(row[name], int | float))
    if terms is None:
        terms = [name for name in names if name not in known and not name.startswith("test_")]
    panels = [(f"{name}, {unit}", [name, f"test_{name}"]) for name in terms]
    train = bound if bound in names or "objective" not in names else "objective"
    panels.insert(0, (f"{train}, {unit}", [train, f"test_{bound}"]))
    panels.append(("gradient norm, log scale", ["grad_norm"]))
    panels = [(title, [name for name in group if name in names]) for title, group in panels]
    panels = [(title, group) for title, group in panels if group]
    if not panels:
        raise ValueError(f"rows: got names {list(names)}, expected {bound!r} among them; pass bound=")
    steps = [row["step"] for row in rows]
    num_rows = 1 + len(panels) // 2
    fig = Figure(figsize=(7.2, 0.4 + 1.9 * num_rows), layout="constrained")
    grid = fig.add_gridspec(num_rows, 2)
    for i, (title, group) in enumerate(panels):
        row, column = (i + 1) // 2, (i + 1) % 2
        alone = i == 0 or (column == 0 and i == len(panels) - 1)  # the bound, and a last one without a peer
        ax = _axes(fig.add_subplot(grid[row, :] if alone else grid[row, column]), title)
        ax.set(xlim=(min(steps), max(*steps, min(steps) + 1)), xlabel="step" if row == num_rows - 1 else "")
        ax.xaxis.set_major_locator(MaxNLocator(5 if alone else 3, integer=True, min_n_ticks=1))
        ax.xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step:,.0f}"))
        ax.set_yscale("log" if group == ["grad_norm"] else "linear")
        _curves(ax, [(name, *_series(rows, name)) for name in group])
    return _save(fig, path)


def load_metrics(path: Path | str) -> list[dict[str, object]]:
    """Read `metrics.jsonl`; a last line cut short, as by a kill, is ignored.

    Args:
        path: a file with one JSON object a line.

    Returns:
        One dict a line.

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
            rows.append(row)
        elif number < len(lines):  # a line that ends in a newline was written whole
            raise ValueError(
                f"{path}, line {number}: got {line[:60]!r}, expected a JSON object; delete that line"
            )
    return rows


def _check_columns(columns: int) -> None:
    if columns < 1:
        raise ValueError(f"columns: got {columns}, expected at least 1; pass how many images make a row")


def _check_images(name: str, images: ArrayLike) -> np.ndarray:
    images = np.asarray(images, np.float32)
    images = images[..., None] if images.ndim == 3 else images
    if images.ndim != 4 or images.shape[-1] not in (1, 3) or not images.size:
        raise ValueError(
            f"{name}: got shape {images.shape}, expected [N, H, W] or [N, H, W, C] with C 1 or 3; "
            "reshape flat images to their height and width"
        )
    low, high = np.nanquantile(images, [0.01, 0.99]) if np.isfinite(images).any() else (0, 0)
    if low < -0.5 or high > 1.5:
        raise ValueError(
            f"{name}: got values from {low:.3g} to {high:.3g}, expected [0, 1]; "
            "divide grey levels by levels - 1, or clip"
        )
    return images


def _tile(images: np.ndarray, columns: int) -> np.ndarray:
    """Lay [N, H, W, C] out as RGBA bytes, magnified, with transparent gutters between."""
    num, height, width, _ = images.shape
    columns = min(columns, num)
    pixels = np.full((num, height, width, 4), 255, np.uint8)
    pixels[..., :3] = np.round(255 * np.clip(np.nan_to_num(images), 0, 1))
    pixels[~np.isfinite(images).all(-1)] = _NOT_FINITE
    zoom = max(1, _CELL // max(height, width))
    pixels = pixels.repeat(zoom, 1).repeat(zoom, 2)
    height, width = height * zoom, width * zoom
    rows = -(-num // columns)
    pitch = height + _GUTTER, width + _GUTTER
    sheet = np.zeros((rows * pitch[0] - _GUTTER, columns * pitch[1] - _GUTTER, 4), np.uint8)
    for i, image in enumerate(pixels):
        top, left = i // columns * pitch[0], i % columns * pitch[1]
        sheet[top : top + height, left : left + width] = image
    return sheet


def _check_plane(name: str, points: ArrayLike) -> np.ndarray:
    points = np.asarray(points, np.float64)
    if points.ndim != 2 or points.shape[1] != 2 or not len(points):
        raise ValueError(f"{name}: got shape {points.shape}, expected [N, 2]; project with principal_plane")
    return points


def _axes(ax: Axes, title: str = "") -> Axes:
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


def _plane(axis_labels: Sequence[str]) -> tuple[Figure, Axes]:
    fig = Figure(figsize=(5.4, 5.4), layout="constrained")
    ax = _axes(fig.add_subplot())
    ax.set(xlabel=axis_labels[0], ylabel=axis_labels[1], aspect="equal")
    ax.grid(visible=True, axis="x", color=INK, alpha=0.22, linewidth=0.8)
    ax.spines["bottom"].set_visible(False)
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(MaxNLocator(5, integer=True))
    return fig, ax


def _dots(ax: Axes, points: np.ndarray, colors: np.ndarray) -> None:
    ax.scatter(*points.T, s=float(np.clip(4e4 / len(points), 4, 36)), c=colors, alpha=0.6, linewidths=0)


def _badges(ax: Axes, centres: np.ndarray, texts: Sequence[str], colors: np.ndarray) -> None:
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


def _series(rows: Sequence[Mapping[str, object]], name: str) -> tuple[np.ndarray, np.ndarray]:
    values = {row["step"]: row[name] for row in rows if isinstance(row.get(name), int | float)}
    steps = sorted(values)
    return np.array(steps, float), np.array([values[step] for step in steps], float)


def _curves(ax: Axes, curves: list[tuple[str, np.ndarray, np.ndarray]]) -> None:
    """Draw (name, steps, values): the noise faint, its running mean strong, a test curve with dots."""
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


def _save(fig: Figure, path: Path | str) -> Path:
    fig.savefig(path, dpi=200, transparent=True, bbox_inches="tight", pad_inches=0.08)
    return Path(path)
