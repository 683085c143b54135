"""What a model predicts of a datum that it has seen: means, draws, and where it is unsure.

    x_rep ~ p(x_rep | z), z ~ q(z | x)
    Var(x_rep | x) = E_z Var(x_rep | z) + Var_z E(x_rep | z)        all of the spread, and the part of it that z carries

Where the second part is large, the code leaves open what the datum was; the rest is noise of single pixels.
"""

from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from vdiff.report.images import GUTTER, check_images, labelled_rows, tile

_NUM_SHOWN = 3


def predictive_spread(draws: ArrayLike, means: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Compute the standard deviation of what is predicted, and the part of it that z carries, pixel by pixel.

    Args:
        draws: [N, S, ...], x_rep at S draws of q for each of N data.
        means: [N, S, ...], E[x_rep | z] at the same draws of z.

    Returns:
        Both standard deviations, [N, ...]; draws alone would give the first, means the second.

    Raises:
        ValueError: if the shapes differ, or S is less than two.
    """
    draws, means = np.asarray(draws, np.float64), np.asarray(means, np.float64)
    if draws.ndim < 2 or draws.shape != means.shape or draws.shape[1] < 2:
        raise ValueError(
            f"draws, means: got shapes {draws.shape} and {means.shape}, expected [N, S, ...] for both, S at least 2"
        )
    return draws.std(1, ddof=1), means.std(1, ddof=1)


def predictive_grid(data: ArrayLike, draws: ArrayLike, means: ArrayLike, path: Path | str) -> Path:
    """Write a column for each datum: itself, its mean prediction, three draws, and two pictures of their spread.

    Spreads are dark where there is none and bright where it is largest in the whole picture, one scale for both rows.

    Args:
        data: [N, H, W] or [N, H, W, C] with C 1 or 3, in [0, 1].
        draws: [N, S, H, W(, C)], x_rep at S draws of q, in [0, 1].
        means: of the same shape, E[x_rep | z] at the same draws.
        path: the PNG to write.

    Returns:
        The path.

    Raises:
        ValueError: if the shapes disagree or are not those of images, or S is less than three.
    """
    from matplotlib import colormaps

    data = check_images("data", data)
    draws, means = (np.asarray(values, np.float32) for values in (draws, means))
    total, through_z = predictive_spread(draws, means)
    if draws.shape[0] != len(data) or draws.shape[2:] not in (data.shape[1:], data.shape[1:-1]):
        raise ValueError(
            f"draws: got shape {draws.shape}, expected {(len(data), 'S', *data.shape[1:])} as data; draw for each datum"
        )
    if draws.shape[1] < _NUM_SHOWN:
        raise ValueError(
            f"draws: got {draws.shape[1]} for each datum, expected at least {_NUM_SHOWN} to show"
        )
    rows = {"data": data, "mean": check_images("means", means.mean(1))}
    for i in range(_NUM_SHOWN):
        rows["a draw" if i == 0 else i] = check_images("draws", draws[:, i])
    largest = max(float(total.max()), float(through_z.max()), np.finfo(np.float32).tiny)
    for label, spread in (("spread", total), ("… through z", through_z)):
        gray = spread.reshape(data.shape).mean(-1) / largest
        rows[label] = np.asarray(colormaps["magma"](gray)[..., :3], np.float32)
    sheets = [tile(images, len(data)) for images in rows.values()]
    labels = [label if isinstance(label, str) else "" for label in rows]
    return labelled_rows(sheets, labels, path, gap=GUTTER)
