"""report.html: whole, self-contained, escaped, the failures first."""

import base64
import html.parser
import io
import re

import numpy as np
from PIL import Image

from tests.evaluation.test_protocols import small_run
from tghmoe_jax.evaluation import DISCLAIMER, html_report
from tghmoe_jax.evaluation.protocols import score
from tghmoe_jax.evaluation.routing_picture import Routing

ROUTING = Routing("vqa", None, (2, 4), np.full((2, 3), 1 / 3), np.arange(24).reshape(2, 3, 2, 2) % 3)
VOID = {"meta", "img", "line", "rect", "br"}


class Source:
    """Volumes whose slices show their number."""

    def slices(self, index):
        levels = np.full((9, 8, 8, 3), 10 * index + 5, np.uint8)
        return levels, np.arange(9) < 7


class Page(html.parser.HTMLParser):
    """The open and closed tags of a page, and its text."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.text = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data):
        self.text.append(data)


def page(tmp_path, run=None, loads=None, overlays=()):
    run = small_run() if run is None else run
    html_report.write(tmp_path / "report.html", score(run), run, Source(), ("report", "vqa"), loads, (2, 4), overlays)
    return (tmp_path / "report.html").read_text(encoding="utf-8")


def test_the_page_is_whole_and_asks_no_network(tmp_path):
    own = np.zeros((2, 2, 4))
    own[:, 1] = 1
    text = page(tmp_path, loads={"vqa": own}, overlays=[(3, ROUTING)])
    parsed = Page(text)
    assert parsed.open in ([], ["html"]) and not re.search(r"https?:|<script|<link|@import|url\(", text)
    assert all(attrs["src"].startswith("data:image/png;base64,") for tag, attrs in parsed.tags if tag == "img")
    words = " ".join(parsed.text)
    assert DISCLAIMER in words and "closed/accuracy_strict" in words and "layer 4, vqa prompts, vqa experts" in words
    assert "report experts" not in words and html_report.routing_picture.CAPTION in words
    assert sum(tag == "svg" for tag, _ in parsed.tags) == 1
    assert "sent to report" in words and "Routing, not explanation" in words


def test_failures_come_first_and_every_case_shows_its_slices(tmp_path):
    text = page(tmp_path)
    closed = text[text.index("Closed questions: sample") : text.index("Reports: sample")]
    marks = [match == " wrong" for match in re.findall(r'<div class="case( wrong)?">', closed)]
    assert marks == sorted(marks, reverse=True) and True in marks and False in marks
    strips = re.findall(r'volume (\d+)" src="data:image/png;base64,([^"]+)"', text)
    for index, data in strips:
        picture = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))
        assert picture.shape == (8, 8 * html_report.SLICES) and (picture == 10 * int(index) + 5).all()
    assert len(strips) == len(re.findall(r'<div class="case', text))


def test_what_a_model_writes_cannot_become_markup(tmp_path):
    run = small_run()
    bad = "<script>alert(1)</script><img src=x onerror=1>"
    run["closed"] = [one.__class__(**{**one.__dict__, "output": bad, "answer": bad}) for one in run["closed"]]
    text = page(tmp_path, run)
    assert "<script" not in text and "onerror=1>" not in text and "&lt;script&gt;" in text


def test_a_run_without_cases_still_gives_a_page(tmp_path):
    assert "None." in page(tmp_path, {})
