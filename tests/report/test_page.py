import base64
import re

import pytest

from vdiff.report import page
from vdiff.report.figures import kl_per_unit

EVIL = "<script>alert('x')</script> & \"$title\""


def make(run_dir, **changes):
    settings = {
        "title": "A model",
        "lead": "What came out.",
        "headline": [page.Tile("test ELBO", -86.42134, 0.131, "nats per datum", "297 images")],
        "figures": [],
        "config": {"seed": 0},
        "result": {"metrics": {}, "params_digest": "abc", "seconds": 183.2, "versions": {}, "device": "cpu"},
    }
    return page.write_page(run_dir, **{**settings, **changes})


def test_everything_is_escaped(tmp_path, read, picture):
    path = make(
        tmp_path,
        title=EVIL,
        lead=EVIL,
        headline=[page.Tile(EVIL, EVIL, None, EVIL, EVIL)],
        figures=[page.FigureEntry(picture, EVIL), page.FigureEntry(picture, "caption", EVIL)],
        tables=[page.Table(EVIL, (EVIL, "n"), [(EVIL, 3)])],
        config={EVIL: {"note": EVIL}},
        result={"metrics": {EVIL: 1.0}, "device": EVIL, "versions": {EVIL: EVIL}},
    )
    reader = read(path)
    assert "script" not in {tag for tag, _ in reader.tags}
    assert not any(name.startswith("on") for _, attrs in reader.tags for name in attrs)
    assert reader.attributes("img", "alt") == [EVIL, EVIL]
    # title twice, lead, 4 of the tile, 2 captions with 1 evil, 3 of the table, 2 config, metric, device, versions
    assert reader.text.count(EVIL) == 2 + 1 + 4 + 1 + 3 + 2 + 1 + 2 + 2


def test_pictures_are_inlined_whole_and_nothing_is_fetched(tmp_path, read, picture):
    second = kl_per_unit([1.0, 2.0], tmp_path / "kl.png")
    entries = [page.FigureEntry("samples.png", "Samples."), page.FigureEntry(second, "The KL.", "bars")]
    path = make(tmp_path, figures=entries, config={"data": "https://example.org/set"})
    reader = read(path)
    sources = reader.attributes("img", "src")
    assert [base64.b64decode(source.removeprefix("data:image/png;base64,")) for source in sources] == [
        picture.read_bytes(),
        second.read_bytes(),
    ]
    assert reader.attributes("img", "alt") == ["Samples.", "bars"]
    assert reader.attributes("img", "width")[0] == reader.attributes("img", "height")[0] == "410"
    links = [attrs[name] for _, attrs in reader.tags for name in ("src", "href") if name in attrs]
    assert all(link.startswith("data:") for link in links)
    assert not re.search(r"@import|url\(", path.read_text(encoding="utf-8"))


def test_a_tile_shows_value_error_unit_and_what_it_is(tmp_path, read):
    text = read(make(tmp_path)).text
    for part in ("test ELBO", "\N{MINUS SIGN}86.42", "± 0.13", "nats per datum", "297 images", "3 min 3 s"):
        assert part in text


def test_seconds_may_be_a_number_or_one_for_each_part(tmp_path, read):
    result = {"seconds": {"training": 183.2, "evaluation": 4.0}, "device": "cpu"}
    assert "cpu · training 3 min 3 s · evaluation 4.0 s" in read(make(tmp_path, result=result)).text
    assert "cpu · training 4.0 s" in read(make(tmp_path, result={**result, "seconds": 4.0})).text


def test_config_versions_and_digest_are_folded(tmp_path):
    result = {"params_digest": "f00d", "versions": {"jax": "0.10.2"}, "seconds": 1.0, "device": "cpu"}
    result["metrics"] = {
        "test_elbo": {"value": -1.234, "std_error": 0.1, "unit": "nats", "num_data": 1797},
        "active": 14,
    }
    path = make(tmp_path, config={"model": {"hidden": [8, 8]}, "rate": 1e-3}, result=result)
    folded = "".join(re.findall(r"<details>.*?</details>", path.read_text(encoding="utf-8"), re.DOTALL))
    for part in (
        "model.hidden",
        "[8, 8]",
        "0.001",
        "f00d",
        "versions.jax",
        "0.10.2",
        "test elbo",
        "1.23 ± 0.10",
        "1,797 data",
    ):
        assert part in folded


def test_a_table_aligns_its_numbers(tmp_path, read):
    table = page.Table("T", ("name", "value"), [("elbo", -1.5), ("iwae", "\N{MINUS SIGN}1.40 ± 0.02")])
    reader = read(make(tmp_path, tables=[table], config={}, result={}))
    assert reader.attributes("td", "class") == [None, "number", None, "number"]
    assert reader.attributes("th", "class") == [None, "number"]


def test_a_table_with_a_ragged_header_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"tables: 'T' has rows of \[2\] cells, expected 1"):
        make(tmp_path, tables=[page.Table("T", ("name",), [("elbo", -1.5)])])


def test_a_figure_that_is_no_png_is_refused(tmp_path):
    (tmp_path / "a.svg").write_text("<svg/>")
    with pytest.raises(ValueError, match=r"figures: got .*a.svg, expected a PNG"):
        make(tmp_path, figures=[page.FigureEntry("a.svg", "caption")])


def test_metrics_become_tiles_by_name_with_what_is_known_of_each():
    metrics = {"test_elbo": {"value": -1.5, "std_error": 0.1, "unit": "nats", "num_data": 1797}, "active": 14}
    assert page.metric_tiles(metrics) == [
        page.Tile("test elbo", -1.5, 0.1, "nats", "1,797 data"),
        page.Tile("active", 14),
    ]
