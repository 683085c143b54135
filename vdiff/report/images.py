"""Sheets of images, each pixel a crisp square.

    image_grid              what the model draws     images in [0, 1], in reading order
    reconstruction_grid     what it keeps            rows of the data, each above its reconstructions
    image_rows              what several models draw a row of each, named

Each writes one PNG on a transparent ground and returns its path.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from vdiff.report.ink import INK

_CELL = 200  # pixels an image is magnified to, by a whole factor: 100 on a page, sharp on fine screens
GUTTER = 10
_WASH = (128, 128, 128, 110)  # parts a white image from a white page, and a black one from a black page
_NOT_FINITE = (214, 39, 40, 255)


def image_grid(images: ArrayLike, path: Path | str, *, columns: int) -> Path:
    """Write images in reading order, each pixel a crisp square, with thin grey gutters.

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
    from matplotlib.image import imsave

    _check_columns(columns)
    imsave(path, tile(check_images("images", images), columns))
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
    from matplotlib.figure import Figure

    _check_columns(columns)
    pairs = check_images("originals", originals), check_images("reconstructions", reconstructions)
    if pairs[0].shape != pairs[1].shape:
        got, expected = pairs[1].shape, pairs[0].shape
        raise ValueError(f"reconstructions: got shape {got}, expected {expected} as originals; pair them")
    blocks = [
        [tile(images[start : start + columns], columns) for images in pairs]
        for start in range(0, len(pairs[0]), columns)
    ]
    height, width = blocks[0][0].shape[:2]
    pitch = 2 * height + GUTTER // 2 + _CELL // 6  # from one pair of rows to the next, pixels
    left, total, dpi = int(2.0 * _CELL), pitch * len(blocks) - _CELL // 6, 100
    fig = Figure(figsize=((left + width) / dpi, total / dpi), dpi=dpi)
    fig.patch.set_alpha(0)
    for i, block in enumerate(blocks):
        for j, (tiles, label) in enumerate(zip(block, ("data", "reconstruction"), strict=True)):
            bottom = total - i * pitch - (j + 1) * height - j * (GUTTER // 2)
            fig.figimage(tiles, left, bottom, origin="upper")
            middle = (bottom + height / 2) / total
            at = (left - 20) / (left + width)
            fig.text(at, middle, label, color=INK, size=32, ha="right", va="center")
    fig.savefig(path, dpi=dpi)
    return Path(path)


def image_rows(rows: Mapping[str, ArrayLike], path: Path | str) -> Path:
    """Write rows of images, each with its name on its left, to be compared from above to below.

    Args:
        rows: name -> [N, H, W] or [N, H, W, C], in [0, 1]; all of one shape.
        path: the PNG to write.

    Returns:
        The path.

    Raises:
        ValueError: if there is no row, or a row is not of images or of another shape than the first.
    """
    images = {name: check_images(name, row) for name, row in rows.items()}
    shapes = {name: row.shape for name, row in images.items()}
    first = next(iter(shapes.values()), None)
    for name, shape in shapes.items():
        if shape != first:
            raise ValueError(
                f"rows: got shape {shape} for {name}, expected {first} as the first; pass as many"
            )
    if first is None:
        raise ValueError("rows: got none, expected at least one")
    sheets = [tile(row, first[0]) for row in images.values()]
    gutter = np.broadcast_to(np.array(_WASH, np.uint8), (GUTTER, *sheets[0].shape[1:]))
    sheets[:-1] = [np.concatenate([sheet, gutter]) for sheet in sheets[:-1]]
    return labelled_rows(sheets, list(images), path, gap=0)


def labelled_rows(
    sheets: Sequence[np.ndarray], labels: Sequence[str], path: Path | str, *, gap: int = GUTTER
) -> Path:
    """Write RGBA sheets of one width below each other, `gap` pixels apart, each with a label on its left.

    Args:
        sheets: each [height, width, 4], bytes, as of `tile`.
        labels: one for each.
        path: the PNG to write.
        gap: pixels between two sheets.

    Returns:
        The path.
    """
    from matplotlib.figure import Figure

    heights, width = [len(sheet) for sheet in sheets], sheets[0].shape[1]
    left, total, dpi = int(2.0 * _CELL), sum(heights) + gap * (len(sheets) - 1), 100
    fig = Figure(figsize=((left + width) / dpi, total / dpi), dpi=dpi)
    fig.patch.set_alpha(0)
    bottom = total
    for sheet, label, height in zip(sheets, labels, heights, strict=True):
        bottom -= height
        fig.figimage(sheet, left, bottom, origin="upper")
        middle = (bottom + height / 2) / total
        fig.text((left - 20) / (left + width), middle, label, color=INK, size=32, ha="right", va="center")
        bottom -= gap
    fig.savefig(path, dpi=dpi)
    return Path(path)


def _check_columns(columns: int) -> None:
    if columns < 1:
        raise ValueError(f"columns: got {columns}, expected at least 1; pass how many images make a row")


def check_images(name: str, images: ArrayLike) -> np.ndarray:
    """Return images as [N, H, W, C], or raise ValueError where the shape or the range is not that of images."""
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


def tile(images: np.ndarray, columns: int) -> np.ndarray:
    """Lay [N, H, W, C] out as RGBA bytes, magnified, with grey gutters between; missing cells are transparent."""
    num, height, width, _ = images.shape
    columns = min(columns, num)
    pixels = np.full((num, height, width, 4), 255, np.uint8)
    pixels[..., :3] = np.round(255 * np.clip(np.nan_to_num(images), 0, 1))
    pixels[~np.isfinite(images).all(-1)] = _NOT_FINITE
    zoom = max(1, _CELL // max(height, width))
    pixels = pixels.repeat(zoom, 1).repeat(zoom, 2)
    height, width = height * zoom, width * zoom
    rows = -(-num // columns)
    pitch = height + GUTTER, width + GUTTER
    sheet = np.zeros((rows * pitch[0] - GUTTER, columns * pitch[1] - GUTTER, 4), np.uint8)
    for i, image in enumerate(pixels):
        top, left = i // columns * pitch[0], i % columns * pitch[1]
        sheet[top : top + pitch[0], left : left + pitch[1]] = _WASH
        sheet[top : top + height, left : left + width] = image
    return sheet
