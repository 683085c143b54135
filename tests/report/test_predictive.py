import numpy as np
import pytest
from matplotlib.image import imread

from vdiff import report


def predictions(num=4, num_draws=2000, size=8):
    """A left half that z alone decides, and a right half of independent pixels."""
    rng = np.random.default_rng(0)
    means = np.full((num, num_draws, size, size), 0.5, np.float32)
    means[..., : size // 2] = rng.choice([0.2, 0.8], (num, num_draws, 1, 1))
    draws = means.copy()
    draws[..., size // 2 :] = rng.random((num, num_draws, size, size - size // 2)) < 0.5
    return draws, means


def test_spread_is_split_into_what_z_carries_and_the_rest():
    draws, means = predictions()
    total, through_z = report.predictive_spread(draws, means)
    assert total.shape == through_z.shape == (4, 8, 8)
    np.testing.assert_allclose(total[..., :4], 0.3, atol=0.01)
    np.testing.assert_allclose(through_z[..., :4], total[..., :4], rtol=1e-5)
    np.testing.assert_allclose(total[..., 4:], 0.5, atol=0.02)
    np.testing.assert_array_equal(through_z[..., 4:], 0.0)


def test_a_column_shows_datum_mean_draws_and_spreads(tmp_path):
    draws, means = predictions(num_draws=50)
    data = np.full((4, 8, 8), 0.9)
    sheet = imread(report.predictive_grid(data, draws, means, tmp_path / "predictive.png"))
    pitch = 200 + 10
    assert sheet.shape[0] == 7 * pitch - 10
    left, right = 400 + 50, 400 + 150  # the middle of the first image's halves

    def at(row, column):
        return sheet[row * pitch + 100, column, :3]

    np.testing.assert_allclose(at(0, left), 0.9, atol=0.01)
    np.testing.assert_allclose(at(1, left), means[0, :, 0, 0].mean(), atol=0.01)
    for i in range(3):
        np.testing.assert_allclose(at(2 + i, left), draws[0, i, 0, 0], atol=0.01)
    brightness = {(row, side): at(row, side).sum() for row in (5, 6) for side in (left, right)}
    # The whole spread is larger on the right, and none of it goes through z.
    assert brightness[5, right] > brightness[5, left] > brightness[6, right]
    assert brightness[6, left] == pytest.approx(brightness[5, left], abs=0.02) and brightness[6, right] < 0.1
    for row in (0, 1, 2, 5, 6):
        assert sheet[row * pitch : row * pitch + 200, :380, 3].sum() > 0
    assert sheet[3 * pitch : 5 * pitch, :380, 3].sum() == 0


def test_what_does_not_fit_is_refused(tmp_path):
    draws, means = predictions(num_draws=5)
    data, path = np.full((4, 8, 8), 0.9), tmp_path / "predictive.png"
    with pytest.raises(ValueError, match=r"draws, means: got shapes .* expected \[N, S, ...\] for both"):
        report.predictive_grid(data, draws, means[:, :4], path)
    with pytest.raises(ValueError, match=r"draws: got shape \(4, 5, 8, 8\), expected \(3, 'S', 8, 8, 1\)"):
        report.predictive_grid(data[:3], draws, means, path)
    with pytest.raises(ValueError, match="draws: got 2 for each datum, expected at least 3"):
        report.predictive_grid(data, draws[:, :2], means[:, :2], path)
