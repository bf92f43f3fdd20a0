"""report.html: whole, self-contained, escaped, the failures first."""

import base64
import dataclasses
import html.parser
import io
import re
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image

from tests.evaluation.test_protocols import ORGANS, closed, small_run
from tghmoe_jax.evaluation import DISCLAIMER, html_report, slice_strip, verdict
from tghmoe_jax.evaluation.protocols import CONTROLS, score
from tghmoe_jax.evaluation.routing_plot import RoutingMap
from tghmoe_jax.samples.questions import TYPES

ROUTING = RoutingMap("vqa", None, (2, 4), np.full((2, 3), 1 / 3), np.arange(24).reshape(2, 3, 2, 2) % 3)
VOID = {"meta", "img", "br"}


class Source:
    """Volumes whose slices show their number."""

    def slices(self, index):
        levels = np.full((9, 8, 8, 3), 10 * index + 5, np.uint8)
        return levels, np.arange(9) < 7

    def findings(self, index):
        return frozenset()

    def sides(self, index):
        return None


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
    assert "report experts" not in words and html_report.routing_plot.CAPTION in words
    assert "sent to report" in words and "Routing, not explanation" in words


def test_failures_come_first_and_every_case_shows_its_slices(tmp_path):
    text = page(tmp_path)
    closed = text[text.index("Closed questions: sample") : text.index("Reports: sample")]
    marks = [match == "wrong" for match in re.findall(r'<div class="case (wrong|right)">', closed)]
    assert marks == sorted(marks, reverse=True) and True in marks and False in marks
    strips = re.findall(r'alt="slices of volume (\d+)" src="data:image/png;base64,([^"]+)"', text)
    for index, data in strips:
        picture = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))
        pitch = 128 + slice_strip.GAP
        assert picture.shape == (pitch, 7 * pitch) and (picture[64:128, :128] == 10 * int(index) + 5).all()
    assert len(strips) == len(re.findall(r'<div class="case', text))


def test_what_a_model_writes_cannot_become_markup(tmp_path):
    run = small_run()
    bad = "<script>alert(1)</script><img src=x onerror=1>"
    run["closed"] = [one.__class__(**{**one.__dict__, "output": bad, "answer": bad}) for one in run["closed"]]
    text = page(tmp_path, run)
    assert "<script" not in text and "onerror=1>" not in text and "&lt;script&gt;" in text


def test_a_report_that_nothing_judges_is_shown_as_neither_right_nor_wrong(tmp_path):
    run = small_run()
    run["report"] = [dataclasses.replace(one, findings_true=None, findings_stated=None) for one in run["report"]]
    run["report"].append(dataclasses.replace(run["report"][0], index=2, output=" "))
    reports = page(tmp_path, run).split("Reports: sample")[1]
    assert re.findall(r'<div class="case (\w+)">', reports) == ["wrong", "unjudged", "unjudged"]  # the empty one first


def test_each_type_of_a_data_set_is_drawn_with_its_own_chance():
    run = {"closed": [closed(i, "side", ("left", "right"), "left", "A. left") for i in range(4)]}
    run["closed"] += [closed(i, "organ", ORGANS, "liver", "A. liver") for i in range(3)]
    run["closed"].append(closed(9, "lobe", (), "upper", "?"))  # of a file whose choices were not understood
    axis = html_report.bar_chart(score(run), run).axes[0]
    names = [label.get_text().split("\n") for label in axis.get_xticklabels()]
    assert names == [["organ", "1.000, n = 3"], ["side", "1.000, n = 4"], ["lobe", "0.000, n = 1"]]
    dashes = [line for line in axis.collections if line.get_linestyle()[0][1]]
    level = {int(line.get_segments()[0][0][0]): line.get_segments()[0][0][1] for line in dashes}
    assert level == {0: 0.25, 1: 0.5}


def test_the_head_says_what_was_found_by_what_and_on_what(tmp_path):
    run = small_run() | {"control/blind_closed": small_run()["closed"]}
    metrics = score(run) | {verdict.LESIONS: [34.0, 83.9]}
    facts = {"checkpoint": "stage2, step <7>", "command": "python -m tghmoe_jax.main", "code": ""}
    html_report.write(
        tmp_path / "report.html", metrics, run, Source(), ("report", "vqa"), facts=facts,
        verdicts=verdict.verdicts(metrics, run),
    )  # fmt: skip
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    head = " ".join(Page(text[: text.index("<h2>")]).text)
    assert "3 volumes are too few for an interval" in head and "drawn anatomy; lesions of 34 to 84 mm" in head
    assert "stage2, step <7>" in head and "4 closed, 2 open, 2 report" in head and "code" not in head


def test_scores_stand_in_groups_with_their_items_and_chance(tmp_path):
    table = page(tmp_path).split("<h2>Closed questions by type")[0]
    groups = re.findall(r"<th colspan=.9.>([^<]+)<", table)
    assert groups == ["Closed questions", "Open questions", "Reports", "Task router"]
    row = re.search(r"<tr><td>closed/by_type/organ</td>(.*?)</tr>", table)[1]
    assert re.findall(r"<td>([^<]*)</td>", row)[:4:3] == ["3", "0.250"]
    row = re.search(r"<tr><td>closed/empty</td>(.*?)</tr>", table)[1]
    assert re.findall(r"<td>([^<]*)</td>", row)[:4:3] == ["4", "–"]


def test_bars_are_as_high_as_the_scores():
    run = small_run()
    metrics = score(run)
    bars, *controls = html_report.bar_chart(metrics, run).axes[0].containers
    scores = [value for type in TYPES if (value := metrics[f"closed/by_type/{type}"]) is not None]
    assert [bar.get_height() for bar in bars] == scores
    assert len(controls) == sum(f"control/{control}_closed" in run for control in CONTROLS) > 0
    assert html_report.bar_chart(score({}), {}) is None


def test_a_run_without_cases_still_gives_a_page(tmp_path):
    assert "None." in page(tmp_path, {})


def test_a_browser_shows_the_page(tmp_path):
    """Headless Chromium draws tables, bars, pictures and cases; what it draws is not blank and has every colour."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no Chromium on this machine (Debian: apt-get install chromium)")
    own = np.zeros((2, 2, 3))
    own[:, 1] = [6, 3, 1]
    page(tmp_path, loads={"vqa": own}, overlays=[(3, ROUTING)])
    picture = tmp_path / "page.png"
    subprocess.run(
        [
            browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
            f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1200,5000", f"--screenshot={picture}",
            (tmp_path / "report.html").as_uri(),
        ],
        check=True, capture_output=True, timeout=240,
    )  # fmt: skip
    drawn = np.asarray(Image.open(picture).convert("RGB")).astype(int)
    assert drawn.shape == (5000, 1200, 3)
    blank = (drawn == 255).all(axis=(1, 2))
    assert blank[:5].all() and 0.2 < 1 - blank.mean()  # margins, and rows of content
    for colour in (html_report.COLOURS["score"], html_report.COLOURS["shuffled"], "#b8352c", "#3b8f4f"):
        rgb = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
        assert (abs(drawn - rgb).max(-1) <= 2).sum() > 20, f"nothing is drawn in {colour}"
    # The experts' colours over the slices: orange, blue and green mixed with grey.
    mixed = drawn[(drawn.max(-1) - drawn.min(-1)) > 40]
    assert {tuple(np.argsort(row)) for row in mixed} >= {(2, 1, 0), (0, 1, 2)}
