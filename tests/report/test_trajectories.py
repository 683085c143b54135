import numpy as np
import pytest
from matplotlib.image import imread

from vdiff.report import trajectories


def test_each_sample_is_a_pair_of_rows_latents_above_guesses(tmp_path):
    latents, guesses = np.full((3, 4, 8, 8), 0.2), np.full((3, 4, 8, 8), 0.8)
    latents[0, 0], guesses[2, 3] = 1.7, -0.4  # clipped
    picture = imread(trajectories.denoising_rows(latents, guesses, [-8, -2, 2, 8], tmp_path / "rows.png"))
    side, gutter, pitch = 200, 10, 2 * 200 + 5 + 40
    left = top = 70
    assert picture.shape[:2] == (top + 3 * pitch - 40, left + 4 * side + 3 * gutter)
    for i in range(3):
        for j in range(4):
            column, row = left + j * (side + gutter) + 100, top + i * pitch + 100
            above, below = picture[row, column], picture[row + 205, column]
            np.testing.assert_allclose(above[:3], 1.0 if (i, j) == (0, 0) else 0.2, atol=0.01)
            np.testing.assert_allclose(below[:3], 0.0 if (i, j) == (2, 3) else 0.8, atol=0.01)
            assert above[3] == below[3] == 1
    gutter = picture[top + 10 : top + 190, left + 202 : left + 208, 3]
    assert np.all((gutter > 0.2) & (gutter < 0.8))
    assert np.all(picture[: top - 5, : left - 30, 3] == 0)
    for j in range(4):  # a number above each column
        assert picture[: top - 5, left + j * 210 : left + j * 210 + 200, 3].sum() > 50
    assert picture[top : top + 200, :left, 3].sum() > 20  # a name beside each row


def test_colour_and_a_channel_axis_are_kept(tmp_path):
    images = np.zeros((1, 2, 10, 20, 3))
    images[..., 0] = 1.0
    picture = imread(trajectories.denoising_rows(images, images, [0.0, 1.0], tmp_path / "rows.png"))
    np.testing.assert_allclose(picture[-50, -50], [1, 0, 0, 1], atol=1e-6)


def test_what_does_not_fit_is_refused(tmp_path):
    images = np.zeros((2, 3, 8, 8))
    for latents, guesses, log_snrs, message in [
        (images, images[:1], [1, 2, 3], r"guesses, log_snrs: got shapes \(1, 3, 8, 8, 1\)"),
        (images, images, [1, 2], r"expected .* and \(3,\), one a column"),
        (images[0], images[0], [1, 2, 3], "latents: got shape .* expected"),
        (images[..., None, None], images, [1, 2, 3], "latents: got shape"),
        (np.zeros((2, 3, 8, 8, 2)), images, [1, 2, 3], "latents: got shape"),
    ]:
        with pytest.raises(ValueError, match=message):
            trajectories.denoising_rows(latents, guesses, log_snrs, tmp_path / "rows.png")
