import numpy as np
import pytest
from matplotlib.image import imread

from vdiff.report import figures
from vdiff.report.ink import COLORS


def test_principal_plane_finds_the_two_widest_directions():
    rng = np.random.default_rng(0)
    rotation = np.linalg.qr(rng.normal(size=(5, 5)))[0]
    scales = np.array([3.0, 2.0, 0.1, 0.1, 0.1])
    hidden = np.linalg.qr(rng.normal(size=(400, 5)))[0]
    hidden = np.linalg.qr(hidden - hidden.mean(0))[0]  # centred, exactly orthonormal columns
    plane, explained = figures.principal_plane(hidden * scales @ rotation.T + 7.0)
    np.testing.assert_allclose(np.abs(plane), np.abs(hidden[:, :2] * scales[:2]), atol=1e-9)
    np.testing.assert_allclose(explained, scales[:2] ** 2 / np.sum(scales**2), rtol=1e-9)


def test_principal_plane_signs_each_direction_by_its_largest_entry():
    points = np.random.default_rng(0).normal(size=(50, 4)) * [1.0, 5.0, 3.0, 1.0]
    for flipped in (points, points * [1, -1, 1, 1], points * [1, -1, -1, 1]):
        plane, _ = figures.principal_plane(flipped)
        directions = np.linalg.lstsq(flipped - flipped.mean(0), plane, rcond=None)[0].T
        assert list(np.argmax(np.abs(directions), axis=1)) == [1, 2]
        assert directions[0, 1] > 0 and directions[1, 2] > 0


def test_principal_plane_of_one_point_repeated_is_zero():
    plane, explained = figures.principal_plane(np.ones((4, 3)))
    assert np.all(plane == 0) and np.all(explained == 0)


@pytest.mark.parametrize("shape", [(4,), (4, 1), (1, 4)])
def test_principal_plane_refuses_a_line(shape):
    with pytest.raises(ValueError, match=r"points: got shape .* expected \[N, D\]"):
        figures.principal_plane(np.zeros(shape))


def near(picture, color, tolerance=0.02):
    """Count the opaque pixels of a colour."""
    rgb = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.sum((np.abs(picture[..., :3] - rgb).max(-1) < tolerance) & (picture[..., 3] > 0.3))


def test_latent_scatter_colours_each_class(tmp_path):
    points = np.random.default_rng(0).normal(size=(90, 2))
    labelled = imread(figures.latent_scatter(points, np.arange(90) % 3, tmp_path / "labelled.png"))
    for color in COLORS[:3]:
        assert near(labelled, color) > 500
    assert near(labelled, COLORS[4]) == 0


def test_latent_scatter_without_labels_has_one_colour(tmp_path):
    points = np.random.default_rng(0).normal(size=(90, 2))
    plain = imread(figures.latent_scatter(points, None, tmp_path / "plain.png", axis_labels=("a", "b")))
    assert near(plain, COLORS[0]) > 500
    assert near(plain, COLORS[1]) == 0


def test_badges_of_classes_on_one_spot_are_pushed_apart(tmp_path):
    rng = np.random.default_rng(0)
    points = np.concatenate([rng.normal(size=(200, 2)) + [0, 0.02 * i] for i in range(4)])
    fig, ax = figures._plane(("a", "b"))
    ax.scatter(*points.T)
    centres = np.array([[0, 0.001 * i] for i in range(4)])
    figures._badges(ax, centres, list("0123"), np.zeros((4, 3)))
    at = ax.transData.transform([text.get_position() for text in ax.texts])
    gaps = np.hypot(*(at[:, None] - at).T) + 1e9 * np.eye(4)
    assert gaps.min() > 0.9 * 20 * fig.dpi / 72


def test_scatters_refuse_other_shapes(tmp_path):
    with pytest.raises(ValueError, match=r"points: got shape \(9, 3\), expected \[N, 2\].*principal_plane"):
        figures.latent_scatter(np.zeros((9, 3)), None, tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"labels: got shape \(8,\), expected \[9\]"):
        figures.latent_scatter(np.zeros((9, 2)), np.zeros(8), tmp_path / "a.png")


@pytest.mark.parametrize("tilt", [0.7, -0.7, 0.0])
def test_mixture_ellipses_lie_at_one_and_two_sigma(tmp_path, monkeypatch, tilt):
    seen = []
    monkeypatch.setattr(figures, "save", lambda fig, path: seen.append(fig) or path)
    factor = np.array([[1.5, 0.0], [tilt, 0.4]])
    covariance, loc = factor @ factor.T, np.array([2.0, -1.0])
    data = np.random.default_rng(0).normal(size=(20, 2))
    figures.mixture_plot(data, loc[None], covariance[None], [1.0], tmp_path / "a.png")
    for num_sigmas, ellipse in enumerate(seen[0].axes[0].patches, start=1):
        edge = ellipse.get_patch_transform().transform(ellipse.get_path().vertices[:-1:3]) - loc
        distance = np.sqrt(np.einsum("ni,ij,nj->n", edge, np.linalg.inv(covariance), edge))
        np.testing.assert_allclose(distance, num_sigmas, rtol=1e-3)
    assert num_sigmas == 2


def test_mixture_points_take_the_colour_of_their_component(tmp_path):
    data = np.concatenate([np.full((50, 2), -3.0), np.full((50, 2), 3.0)])
    data += 0.3 * np.random.default_rng(0).normal(size=data.shape)
    covariances = np.tile(np.eye(2), (2, 1, 1))
    path = figures.mixture_plot(data, [[-3, -3], [3, 3]], covariances, [0.5, 0.5], tmp_path / "a.png")
    picture = imread(path)
    lower_left, upper_right = (
        picture[len(picture) // 2 :, : 1080 // 2],
        picture[: len(picture) // 2, 1080 // 2 :],
    )
    first, second = COLORS[:2]
    assert near(lower_left, first) > 500 and near(lower_left, second) == 0
    assert near(upper_right, second) > 500 and near(upper_right, first) == 0


def test_mixture_plot_refuses_what_is_no_mixture(tmp_path):
    data, eye = np.zeros((5, 2)), np.tile(np.eye(2), (3, 1, 1))
    with pytest.raises(ValueError, match=r"covariances: got shape \(3, 2, 2\), expected \(2, 2, 2\)"):
        figures.mixture_plot(data, np.zeros((2, 2)), eye, [0.5, 0.5], tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"weights: got shape \(2,\), expected \(3,\)"):
        figures.mixture_plot(data, np.zeros((3, 2)), eye, [0.5, 0.5], tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"covariances: got least eigenvalue -1, expected positive"):
        figures.mixture_plot(data, np.zeros((3, 2)), -eye, [0.2, 0.3, 0.5], tmp_path / "a.png")


def test_kl_bars_are_sorted_and_the_active_ones_counted(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(figures, "save", lambda fig, path: seen.append(fig) or path)
    figures.kl_per_unit([0.001, 2.0, 0.5, 3.0, 0.02], tmp_path / "a.png", active_above=0.1)
    ax = seen[0].axes[0]
    assert [bar.get_height() for bar in ax.patches] == [3.0, 2.0, 0.5, 0.02, 0.001]
    assert len({bar.get_facecolor() for bar in ax.patches[:3]}) == 1
    assert ax.patches[2].get_facecolor() != ax.patches[3].get_facecolor()
    assert ax.get_title(loc="left").startswith("3 of 5 units above 0.1 nats")


def test_kl_per_unit_refuses_a_batch(tmp_path):
    with pytest.raises(ValueError, match=r"values: got shape \(4, 3\), expected \[D\]"):
        figures.kl_per_unit(np.zeros((4, 3)), tmp_path / "a.png")
