import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.image import imread

from vdiff.report import schedules
from vdiff.report.ink import COLORS

T = np.linspace(0, 1, 11)
CURVES = {"learned": (T, 9 - 17 * T**2), "linear": (T, 9 - 17 * T), "cosine": (T, 9 - 17 * T**3)}


def test_each_schedule_has_a_line_and_a_bar_as_long_as_its_spread(tmp_path):
    spreads = {"learned": 10.0, "linear": 20.0, "cosine": 40.0}
    picture = imread(schedules.schedule_comparison(CURVES, spreads, tmp_path / "schedules.png"))
    lengths = []
    for color in COLORS[:3]:
        mine = np.all(np.abs(picture[..., :3] - to_rgb(color)) < 0.03, axis=-1) & (picture[..., 3] > 0.9)
        half = picture.shape[1] // 2
        assert mine[:, :half].sum() > 500  # a line on the left
        lengths.append(mine[:, half:].sum(1).max())  # a bar on the right
    np.testing.assert_allclose(np.array(lengths) / lengths[0], [1, 2, 4], rtol=0.05)


def test_one_schedule_may_stand_alone(tmp_path):
    path = schedules.schedule_comparison({"linear": CURVES["linear"]}, {"linear": 3.0}, tmp_path / "one.png")
    assert imread(path).shape[1] > 1000


@pytest.mark.parametrize("spreads", [{}, {"learned": 1.0}, {"linear": 1.0, "learned": 1.0, "cosine": 1.0}])
def test_other_names_are_refused(tmp_path, spreads):
    with pytest.raises(ValueError, match="spreads: got names"):
        schedules.schedule_comparison(CURVES, spreads, tmp_path / "schedules.png")
    with pytest.raises(ValueError, match="spreads: got names"):
        schedules.schedule_comparison({}, {}, tmp_path / "schedules.png")


def test_a_curve_of_two_lengths_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"linear: got t of shape \(11,\) and log-SNR of \(10,\)"):
        schedules.schedule_comparison({"linear": (T, T[1:])}, {"linear": 1.0}, tmp_path / "schedules.png")
