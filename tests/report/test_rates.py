import numpy as np
import pytest
from matplotlib.image import imread

from vdiff.report import rates


def test_a_strip_lies_between_its_edges_and_is_as_large_as_its_share(tmp_path):
    edges, nats = np.array([-6.0, -2.0, 0.0, 2.0]), np.array([4.0, 6.0, 1.0])
    picture = imread(rates.rate_curve(edges, nats, tmp_path / "rates.png", std_errors=0.1 * nats))
    assert picture.ndim == 3 and picture.shape[1] > 1000 and picture[..., 3].min() == 0
    again = imread(
        rates.rate_curve(edges[::-1], nats[::-1], tmp_path / "back.png", std_errors=0.1 * nats[::-1])
    )
    np.testing.assert_array_equal(picture, again)  # noise on the left, whichever way the path was told

    # The filled area: strips of 4/4, 6/2 and 1/2 nats per unit, so 4, 6 and 1 nats.
    plain = imread(rates.rate_curve(edges, nats, tmp_path / "plain.png"))
    blue = (plain[..., 2] > plain[..., 0] + 0.2) & (plain[..., 3] > 0.1)
    heights = blue.sum(0)
    columns = np.flatnonzero(heights)
    left, width = columns[0], columns[-1] - columns[0]
    at = [heights[left + int(width * share)] for share in (0.25, 0.625, 0.875)]
    np.testing.assert_allclose(at / at[1], [1 / 3, 1, 1 / 6], atol=0.03)


@pytest.mark.parametrize(
    "edges, nats, errors",
    [
        ([0, 1], [1, 2], None),
        ([0], [], None),
        ([0, 1, 2], [1, 2], [1]),
        ([0, 1, 2], [[1, 2]], None),
    ],
)
def test_lengths_that_do_not_fit_are_refused(tmp_path, edges, nats, errors):
    with pytest.raises(ValueError, match="edges, nats, std_errors: got shapes"):
        rates.rate_curve(edges, nats, tmp_path / "rates.png", std_errors=errors)


@pytest.mark.parametrize("edges", [[0, 2, 1], [0, 1, 1]])
def test_edges_that_turn_or_stand_still_are_refused(tmp_path, edges):
    with pytest.raises(ValueError, match="edges: got a sequence that turns"):
        rates.rate_curve(edges, [1, 2], tmp_path / "rates.png")
