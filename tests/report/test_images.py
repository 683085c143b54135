import numpy as np
import pytest
from matplotlib.image import imread

from vdiff.report import images as sheets


def test_image_grid_magnifies_each_pixel_by_a_whole_factor(tmp_path):
    images = np.random.default_rng(0).random((7, 8, 8))
    sheet = imread(sheets.image_grid(images, tmp_path / "grid.png", columns=3))
    zoom, gutter = 200 // 8, 10
    pitch = 8 * zoom + gutter
    assert sheet.shape == (3 * pitch - gutter, 3 * pitch - gutter, 4)
    for i, image in enumerate(images):
        top, left = i // 3 * pitch, i % 3 * pitch
        cell = sheet[top : top + 8 * zoom, left : left + 8 * zoom]
        expected = image.repeat(zoom, 0).repeat(zoom, 1)
        np.testing.assert_allclose(
            cell[..., :3], np.repeat(expected[..., None], 3, -1), atol=0.5 / 255 + 1e-6
        )
        assert np.all(cell[..., 3] == 1)


@pytest.mark.parametrize("page", [0.0, 1.0])
@pytest.mark.parametrize("pixel", [0.0, 1.0])
def test_gutters_part_images_from_each_other_on_any_page_and_missing_cells_are_transparent(
    tmp_path, page, pixel
):
    sheet = imread(sheets.image_grid(np.full((7, 8, 8), pixel), tmp_path / "grid.png", columns=3))
    seen = sheet[..., 0] * sheet[..., 3] + page * (1 - sheet[..., 3])
    for gutter in (seen[:200, 200:210], seen[200:210], seen[410:420]):
        assert np.all(np.abs(gutter - pixel) > 0.15)
    assert np.all(sheet[420:, 210:, 3] == 0)  # the seventh image is alone in the last row
    assert np.all(sheet[420:, :200, 3] == 1)


def test_image_grid_is_no_wider_than_its_images(tmp_path):
    sheet = imread(sheets.image_grid(np.ones((2, 8, 8)), tmp_path / "grid.png", columns=10))
    assert sheet.shape[:2] == (200, 410)


def test_image_grid_keeps_colour_and_aspect(tmp_path):
    images = np.zeros((1, 10, 20, 3))
    images[..., 0], images[..., 1] = 1.0, 0.2
    sheet = imread(sheets.image_grid(images, tmp_path / "grid.png", columns=1))
    assert sheet.shape[:2] == (100, 200)
    np.testing.assert_allclose(sheet[50, 50], [1, 0.2, 0, 1], atol=1e-6)


def test_image_grid_clips_noise_and_paints_what_is_not_finite_red(tmp_path):
    images = np.linspace(0, 1, 400).reshape(1, 20, 20)
    images[0, 0, :3] = np.nan, -0.4, 1.4
    sheet = imread(sheets.image_grid(images, tmp_path / "grid.png", columns=1))
    red, black, white = sheet[5, [5, 15, 25], :3]
    assert red[0] > 0.8 and max(red[1:]) < 0.2
    assert np.all(black == 0) and np.all(white == 1)


@pytest.mark.parametrize("shape", [(64,), (5, 64), (5, 8, 8, 2), (0, 8, 8), (1, 5, 8, 8, 1)])
def test_image_grid_refuses_what_is_no_stack_of_images(tmp_path, shape):
    with pytest.raises(ValueError, match=r"images: got shape .* expected \[N, H, W\].*reshape"):
        sheets.image_grid(np.zeros(shape), tmp_path / "grid.png", columns=2)


@pytest.mark.parametrize("scale, shift", [(16, 0), (255, 0), (2, -1)])
def test_image_grid_refuses_other_ranges(tmp_path, scale, shift):
    images = scale * np.random.default_rng(0).integers(0, 2, (5, 8, 8)) + shift
    with pytest.raises(ValueError, match=r"images: got values from .* expected \[0, 1\].*levels - 1"):
        sheets.image_grid(images, tmp_path / "grid.png", columns=2)


def test_grids_refuse_no_columns(tmp_path):
    images = np.zeros((2, 8, 8))
    with pytest.raises(ValueError, match="columns: got 0"):
        sheets.image_grid(images, tmp_path / "grid.png", columns=0)
    with pytest.raises(ValueError, match="columns: got 0"):
        sheets.reconstruction_grid(images, images, tmp_path / "grid.png", columns=0)


def test_reconstruction_grid_puts_the_data_above(tmp_path):
    originals, reconstructions = np.full((5, 8, 8), 0.8), np.full((5, 8, 8), 0.4)
    originals[:, 0] = 0.2
    path = sheets.reconstruction_grid(originals, reconstructions, tmp_path / "pairs.png", columns=3)
    sheet = imread(path)
    pair = 2 * 200 + 5
    assert sheet.shape[0] == 2 * pair + 200 // 6  # five pairs, three in a row: two pairs of rows
    for top in (0, pair + 200 // 6):
        np.testing.assert_allclose(sheet[top + 100, 400 + 100], [0.8, 0.8, 0.8, 1], atol=1e-2)
        np.testing.assert_allclose(sheet[top + 305, 400 + 100], [0.4, 0.4, 0.4, 1], atol=1e-2)
        np.testing.assert_allclose(sheet[top + 12, 400 + 100], [0.2, 0.2, 0.2, 1], atol=1e-2)  # upright
    assert sheet[-10, -10, 3] == 0  # there is no sixth pair
    labels = sheet[:200, :380, 3], sheet[205:405, :380, 3]
    assert 0 < labels[0].sum() < labels[1].sum()  # "data" is shorter than "reconstruction"


def test_reconstruction_grid_refuses_other_shapes(tmp_path):
    with pytest.raises(
        ValueError, match=r"reconstructions: got shape \(4, 8, 8, 1\), expected \(5, 8, 8, 1\)"
    ):
        sheets.reconstruction_grid(np.zeros((5, 8, 8)), np.zeros((4, 8, 8)), tmp_path / "pairs.png")


def test_image_rows_stand_below_each_other_each_with_its_name(tmp_path):
    rows = {"dark": np.zeros((3, 8, 8)), "light": np.ones((3, 8, 8, 1))}
    sheet = imread(sheets.image_rows(rows, tmp_path / "rows.png"))
    left = sheet.shape[1] - (3 * 200 + 2 * 10)
    assert sheet.shape[0] == 2 * 200 + 10 and left > 100
    np.testing.assert_allclose(sheet[100, left + 100], [0, 0, 0, 1], atol=1e-6)
    np.testing.assert_allclose(sheet[310, left + 100], [1, 1, 1, 1], atol=1e-6)
    for top in (0, 210):  # a name beside each row
        assert sheet[top : top + 200, :left, 3].sum() > 50


def test_image_rows_of_several_shapes_are_refused(tmp_path):
    rows = {"one": np.zeros((3, 8, 8)), "other": np.zeros((2, 8, 8))}
    with pytest.raises(
        ValueError, match=r"rows: got shape \(2, 8, 8, 1\) for other, expected \(3, 8, 8, 1\)"
    ):
        sheets.image_rows(rows, tmp_path / "rows.png")
    with pytest.raises(ValueError, match="rows: got none"):
        sheets.image_rows({}, tmp_path / "rows.png")
