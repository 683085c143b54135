"""The landscape: ink where the density is, points where they are, and what is refused."""

import matplotlib.image
import numpy as np
import pytest

from vdiff.report.landscapes import landscape

AXIS = (np.arange(40) + 0.5) / 40 * 6 - 3


def test_the_density_is_where_it_is_and_the_ground_is_clear(tmp_path):
    """A peak in the upper left: the first axis is the horizontal one, and what is far below stays blank."""
    heights = -4 * ((AXIS[:, None] + 1.5) ** 2 + (AXIS[None, :] - 1.5) ** 2)
    path = landscape(heights, (-3.0, -3.0), (3.0, 3.0), [("", np.zeros((0, 2)))], tmp_path / "a.png")
    picture = matplotlib.image.imread(path)
    blue = (picture[..., 3] > 0.3) & (picture[..., 2] > picture[..., 0] + 0.3)
    # Without the bar of colours at the right.
    rows, columns = np.nonzero(blue[:, : int(0.75 * blue.shape[1])])
    assert len(rows) > 1000
    assert rows.mean() < 0.4 * picture.shape[0] and columns.mean() < 0.4 * picture.shape[1]
    assert np.mean(picture[..., 3] == 0) > 0.5


def test_a_panel_for_each_set_of_points(tmp_path):
    heights = -0.5 * (AXIS[:, None] ** 2 + AXIS[None, :] ** 2)
    points = np.random.default_rng(0).normal(size=(100, 2))
    sizes = []
    for number in (1, 2):
        path = landscape(heights, (-3.0, -3.0), (3.0, 3.0), [("data", points)] * number, tmp_path / "a.png")
        picture = matplotlib.image.imread(path)
        yellow = (picture[..., 3] > 0.5) & (picture[..., 0] > picture[..., 2] + 0.5)
        sizes.append((picture.shape[1], yellow.sum()))
    assert sizes[1][0] > 1.5 * sizes[0][0] and sizes[1][1] > 1.5 * sizes[0][1] > 100


def test_what_is_refused(tmp_path):
    with pytest.raises(ValueError, match="log_density: got shape"):
        landscape(np.zeros((3, 4)), (0.0, 0.0), (1.0, 1.0), [("", np.zeros((1, 2)))], tmp_path / "a.png")
    for points in ([], [("", np.zeros((3, 3)))]):
        with pytest.raises(ValueError, match="points: got shapes"):
            landscape(np.zeros((3, 3)), (0.0, 0.0), (1.0, 1.0), points, tmp_path / "a.png")
