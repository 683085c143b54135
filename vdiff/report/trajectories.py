"""How a sample comes about: latents on their way from noise to data, and what is guessed from each."""

from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from vdiff.report.images import GUTTER, check_images, tile
from vdiff.report.ink import INK

_LABELS = (r"$z$", r"$\hat{x}$")


def denoising_rows(latents: ArrayLike, guesses: ArrayLike, log_snrs: ArrayLike, path: Path | str) -> Path:
    """Write pairs of rows, noise on the left: a sample's latents above, the denoiser's guess from each below.

    Args:
        latents: z, [S, T, H, W] or [S, T, H, W, C], S samples at T places of their path, from the noise's end to the
            data's, brought to [0, 1]; what strays outside is clipped.
        guesses: E[x | z] of each, of the same shape, in [0, 1].
        log_snrs: [T], written above the columns.
        path: the PNG to write.

    Returns:
        The path.

    Raises:
        ValueError: if the shapes differ or are not those of images.
    """
    from matplotlib.figure import Figure

    rows = [_stacks(name, images) for name, images in (("latents", latents), ("guesses", guesses))]
    log_snrs = np.asarray(log_snrs, np.float64)
    if rows[0].shape != rows[1].shape or log_snrs.shape != rows[0].shape[1:2]:
        raise ValueError(
            f"guesses, log_snrs: got shapes {rows[1].shape} and {log_snrs.shape}, expected {rows[0].shape} as latents "
            f"and ({rows[0].shape[1]},), one a column"
        )
    num_samples, num_columns = rows[0].shape[:2]
    pairs = [[tile(images[i], num_columns) for images in rows] for i in range(num_samples)]
    height, width = pairs[0][0].shape[:2]
    side = (width + GUTTER) // num_columns
    pitch = 2 * height + GUTTER // 2 + height // 5  # from one pair to the next, pixels
    left, top, dpi = side // 3, side // 3, 100
    total = top + pitch * num_samples - height // 5
    fig = Figure(figsize=((left + width) / dpi, total / dpi), dpi=dpi)
    fig.patch.set_alpha(0)
    text = {"color": INK, "size": side / 7}
    for j, log_snr in enumerate(log_snrs):
        at = (left + j * side + (side - GUTTER) / 2) / (left + width)
        label = f"{log_snr:.1f}".replace("-", "\N{MINUS SIGN}")
        fig.text(at, 1 - 0.5 * top / total, label, ha="center", va="center", **text)
    for i, pair in enumerate(pairs):
        for j, (tiles, label) in enumerate(zip(pair, _LABELS, strict=True)):
            bottom = total - top - i * pitch - (j + 1) * height - j * (GUTTER // 2)
            fig.figimage(tiles, left, bottom, origin="upper")
            fig.text(
                0.45 * left / (left + width),
                (bottom + height / 2) / total,
                label,
                ha="center",
                va="center",
                **text,
            )
    fig.savefig(path, dpi=dpi)
    return Path(path)


def _stacks(name: str, images: ArrayLike) -> np.ndarray:
    """Check [S, T, H, W] or [S, T, H, W, C] and return the latter, clipped to [0, 1]."""
    images = np.asarray(images, np.float32)
    if images.ndim not in (4, 5) or not images.size:
        raise ValueError(
            f"{name}: got shape {images.shape}, expected [S, T, H, W] or [S, T, H, W, C]; stack samples and places"
        )
    clipped = np.clip(images, 0.0, 1.0)  # NaN stays
    flat = check_images(name, clipped.reshape(-1, *images.shape[2:]))
    return flat.reshape(*images.shape[:2], *flat.shape[1:])
