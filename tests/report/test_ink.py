import subprocess
import sys

import numpy as np
from matplotlib.image import imread

from vdiff.report import ink


def test_colours_are_distinct_and_start_again_where_they_end():
    num = len(ink.COLORS)
    colors = ink.cycled_colors(num + 2)
    assert colors.shape == (num + 2, 3) and len(np.unique(colors, axis=0)) == num
    np.testing.assert_array_equal(colors[num:], colors[:2])
    np.testing.assert_allclose(255 * colors[0], [0x3F, 0x90, 0xDA])


def test_dressed_axes_have_a_title_in_ink_and_no_box():
    ax = ink.dress(ink.new_figure(3.0, 2.0).add_subplot(), "title")
    assert ax.get_title(loc="left") == "title"
    assert ax.xaxis.label.get_color() == ax.yaxis.label.get_color() == ink.INK
    assert [name for name, spine in ax.spines.items() if spine.get_visible()] == ["bottom"]


def test_a_saved_figure_is_cut_to_its_ink_on_a_transparent_ground(tmp_path):
    fig = ink.new_figure(3.0, 2.0)
    fig.text(0.5, 0.5, "word", color=ink.INK)
    path = ink.save(fig, tmp_path / "a.png")
    picture = imread(path)
    assert path == tmp_path / "a.png"
    assert picture.shape[0] < 2 * 200 / 2 and picture.shape[1] < 3 * 200 / 2
    solid = picture[picture[..., 3] == 1]
    assert 0 < len(solid) < picture[..., 0].size / 2
    np.testing.assert_allclose(255 * solid[:, :3], np.tile([0x7A, 0x82, 0x8E], (len(solid), 1)), atol=1)


def test_pyplot_and_without_a_drawing_all_of_matplotlib_stay_unimported(tmp_path):
    program = """
import sys
import vdiff
assert "matplotlib" not in sys.modules
vdiff.report.kl_per_unit([1.0], sys.argv[1])
vdiff.report.training_curves([{"step": 1, "elbo": 2.0}], sys.argv[1])
assert "matplotlib" in sys.modules and "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "a.png")], check=True)
