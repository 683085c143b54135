"""Panels of lines: what is drawn is what was given."""

import numpy as np
import pytest

from vdiff import report
from vdiff.report import lines

K = np.array([1.0, 4.0, 16.0, 64.0])


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """Draw panels and return their figure."""

    def draw(panels, **settings):
        figures = []

        def keep(fig, path):
            figures.append(fig)
            return save(fig, path)

        save = lines.save
        monkeypatch.setattr(lines, "save", keep)
        path = report.line_panels(panels, tmp_path / "lines.png", **settings)
        assert path.read_bytes()[:4] == b"\x89PNG"
        monkeypatch.setattr(lines, "save", save)
        return figures[0]

    return draw


def test_lines_and_colours(drawn):
    panels = [
        report.Panel("one", {"a": (K, K**0.5), "b": (K, K**-0.5)}, xlabel="draws K"),
        report.Panel("two", {"b": (K, 2 * K)}, log_x=False, log_y=False),
    ]
    fig = drawn(panels)
    first, second = fig.axes
    np.testing.assert_array_equal(first.lines[0].get_xydata(), np.stack([K, K**0.5], axis=1))
    assert first.get_xscale() == first.get_yscale() == "log" and first.get_xlabel() == "draws K"
    assert second.get_xscale() == second.get_yscale() == "linear"
    # One name, one colour, one entry in the legend.
    assert first.lines[1].get_color() == second.lines[0].get_color() != first.lines[0].get_color()
    assert [text.get_text() for text in fig.legends[0].get_texts()] == ["a", "b"]
    assert [ax.get_title(loc="left") for ax in fig.axes] == ["one", "two"]


def test_a_slope_has_its_exponent_and_runs_through_the_middle(drawn):
    fig = drawn([report.Panel("one", {"a": (K, 3 * K**0.5)}, {"K^{1/2}": 0.5})])
    x, y = fig.axes[0].lines[1].get_data()
    np.testing.assert_allclose(np.diff(np.log(y)) / np.diff(np.log(x)), 0.5)
    np.testing.assert_allclose(y, 3 * K**0.5)
    assert fig.axes[0].texts[0].get_text() == "K^{1/2}"


def test_panels_are_arranged_in_columns(drawn):
    panels = [report.Panel(str(i), {"a": (K, K)}) for i in range(5)]
    fig = drawn(panels, columns=2)
    assert len(fig.axes) == 5 and fig.axes[0].get_gridspec().nrows == 3
    assert fig.axes[0].get_gridspec().ncols == 2


def test_many_points_have_no_dots(drawn):
    x = np.arange(1.0, 40.0)
    fig = drawn([report.Panel("one", {"few": (K, K), "many": (x, x)})])
    assert [line.get_marker() for line in fig.axes[0].lines] == ["o", "None"]


def test_what_it_refuses(tmp_path):
    with pytest.raises(ValueError, match="panels: got none"):
        report.line_panels([], tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"a: got x of shape \(4,\) and y of \(3,\)"):
        report.line_panels([report.Panel("one", {"a": (K, K[:3])})], tmp_path / "a.png")
    assert not (tmp_path / "a.png").exists()
