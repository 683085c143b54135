"""A picture to show, and a reader of pages that sees the tags and the text of a page as a person would."""

from html.parser import HTMLParser

import numpy as np
import pytest

from vdiff.report.images import image_grid


class Reader(HTMLParser):
    """Collect the tags of a page, their attributes and the text that a person would see."""

    def __init__(self):
        super().__init__()
        self.tags, self.text, self.open = [], "", []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag  # every tag is closed, in order

    def handle_data(self, data):
        self.text += data

    def attributes(self, tag, name):
        return [attrs.get(name) for other, attrs in self.tags if other == tag]


@pytest.fixture
def picture(tmp_path):
    return image_grid(np.random.default_rng(0).random((4, 8, 8)), tmp_path / "samples.png", columns=2)


@pytest.fixture
def read():
    """Read a page, from its path, into a `Reader`."""

    def read(path):
        reader = Reader()
        reader.feed(path.read_text(encoding="utf-8"))
        assert reader.open == []
        return reader

    return read
