import base64

import pytest

from vdiff.report import markup

EVIL = "\"><script>alert('x')</script> & $title"


def test_what_holds_nothing_leaves_no_empty_element():
    assert markup.wrap("section", "figures", ["", ""]) == "" == markup.paragraph("lead", "")
    assert markup.wrap("dl", "tiles", ["a", "", "b"]) == '<dl class="tiles">\na\nb\n</dl>'


def test_a_grid_has_its_head_and_a_row_for_each(tmp_path, read):
    body = [markup.grid("<th>a</th><th>b</th>", (f"<td>{i}</td><td>x</td>" for i in range(3)))]
    reader = read(markup.write(tmp_path / "a.html", "t", "l", body))
    tags = [tag for tag, _ in reader.tags]
    assert (tags.count("table"), tags.count("th"), tags.count("tr"), tags.count("td")) == (1, 2, 4, 6)


def test_a_figure_inlines_its_picture_and_leads_to_its_link(tmp_path, read, picture):
    body = [markup.figure(picture, EVIL, alt="", heading=EVIL, link="a/b.html")]
    reader = read(markup.write(tmp_path / "a.html", "t", "l", body))
    (source,) = reader.attributes("img", "src")
    assert base64.b64decode(source.removeprefix("data:image/png;base64,")) == picture.read_bytes()
    assert reader.attributes("img", "alt") == [EVIL]  # the caption, where no other text is given
    assert reader.attributes("a", "href") == ["a/b.html"] * 2  # of the heading and of the picture
    assert reader.attributes("figure", "style") == ["--aspect:1.000;--width:213px"]  # 410 pixels square
    assert reader.text.count(EVIL) == 2


def test_a_figure_without_heading_or_link_has_neither(picture):
    html = markup.figure(picture, "caption")
    assert "<img" in html and "<h3" not in html and "<a" not in html


def test_a_figure_that_is_no_png_is_refused(tmp_path):
    (tmp_path / "a.png").write_bytes(b"\xff\xd8\xff\xe0 a JPEG")
    with pytest.raises(ValueError, match=r"figures: got .*a.png, expected a PNG"):
        markup.figure(tmp_path / "a.png", "caption")


def test_a_page_escapes_its_title_and_its_sentence(tmp_path, read):
    reader = read(markup.write(tmp_path / "a.html", EVIL, EVIL, []))
    assert "script" not in {tag for tag, _ in reader.tags}
    assert reader.text.count(EVIL) == 3  # in the head, above the page, below that


def test_a_page_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = markup.write(tmp_path / "a.html", "old", "lead", ["body"])
    old = path.read_text(encoding="utf-8")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(markup.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        markup.write(path, "new", "lead", ["body"])
    assert path.read_text(encoding="utf-8") == old
    assert list(tmp_path.iterdir()) == [path]
