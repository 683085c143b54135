import re

import pytest

from vdiff.report import index

EVIL = "<script>alert('x')</script> & \"$title\""


def run_entry(model, nats, data="digits", **changes):
    entry = index.RunEntry(
        data, model, "elbo", nats, 0.5, 1.9, 12.0, f"{model}/report.html", "samples.png", "c"
    )
    return entry._replace(**changes)


def test_the_index_compares_runs_on_the_same_data_only(tmp_path, read, picture):
    runs = [
        run_entry("gmm", -3.2, data="plane", bits_per_dim=None),
        run_entry("vae 1", -90.0),
        run_entry("ddpm", -80.0),
        run_entry("lost", float("nan"), report=tmp_path / "lost" / "report.html"),
    ]
    path = index.write_index(tmp_path / "index.html", title="Models", lead="All.", runs=runs)
    reader = read(path)
    links = [link for link in reader.attributes("a", "href") if link]
    assert sorted(set(links)) == [
        "ddpm/report.html",
        "gmm/report.html",
        "lost/report.html",
        "vae%201/report.html",
    ]
    assert reader.tags.count(("h2", {})) == 2 and len(reader.attributes("img", "src")) == 4
    # on one scale of the digits alone: the worst at 4 %, the best at 96 %, a run without a number nowhere
    assert reader.attributes("b", "style") == ["left:4.00%", "left:96.00%"]
    assert [name for name in reader.attributes("div", "class") if name.startswith("scale")] == [
        "scale",
        "scale best",
    ]
    left, right = re.findall(r"[\d.]+", reader.attributes("i", "style")[0])
    assert float(left) == 0 and float(right) == pytest.approx(100 - 4 - 4.6)  # 0.5 of 10 nats is 4.6 %
    assert "not a number" in reader.text


def test_the_index_escapes_as_a_page_does(tmp_path, read, picture):
    evil = run_entry(EVIL, -1.0, data=EVIL, bound=EVIL, caption=EVIL, report='a" onclick="x.html')
    reader = read(index.write_index(tmp_path / "index.html", title=EVIL, lead=EVIL, runs=[evil]))
    assert "script" not in {tag for tag, _ in reader.tags}
    assert not any(name.startswith("on") for _, attrs in reader.tags for name in attrs)
    assert reader.text.count(EVIL) == 2 + 1 + 1 + 1 + 1 + 1 + 1


def test_the_index_refuses_a_picture_that_is_no_png(tmp_path):
    (tmp_path / "samples.png").write_text("<svg/>")
    with pytest.raises(ValueError, match=r"figures: got .*samples.png, expected a PNG"):
        index.write_index(tmp_path / "index.html", title="t", lead="l", runs=[run_entry("vae", -1.0)])


def test_what_runs_cost_is_a_column_where_one_says_it(tmp_path, read, picture):
    runs = [run_entry("vae", -1.0, num_params=12_345, seconds_per_sample=0.0021), run_entry("gmm", -2.0)]
    text = read(index.write_index(tmp_path / "index.html", title="t", lead="l", runs=runs)).text
    assert "parameters" in text and "12,345" in text and "per sample" in text and "2.1 ms" in text
    text = read(index.write_index(tmp_path / "index.html", title="t", lead="l", runs=runs[1:])).text
    assert "parameters" not in text and "per sample" not in text


def test_tables_of_texts_are_escaped(tmp_path, read, picture):
    facts = index.FactTable(EVIL, ("model", EVIL), [("vae", EVIL)])
    page = index.write_index(
        tmp_path / "index.html", title="t", lead="l", runs=[run_entry("vae", -1.0)], tables=[facts]
    )
    reader = read(page)
    assert "script" not in {tag for tag, _ in reader.tags} and reader.text.count(EVIL) == 3
