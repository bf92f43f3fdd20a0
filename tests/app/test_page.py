"""The page in headless Chromium, with real clicks and keys, and no network but this machine."""

import importlib.resources
import re

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from tests.app.browser import Browser, chromium
from tests.app.served import served
from tests.scans.ct_fixtures import SECRET, axes_of, patient, turned, write_nifti
from tghmoe_jax.reader.opening import load

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(chromium() is None, reason="no Chromium on this machine (Debian: apt-get install chromium)"),
]
CUT = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"
SHAPE = (24, 72, 88)
OPEN = "document.querySelector('#status').textContent === 'The scan is open.'"
# Where the white pixels of a view lie, as shares of its width and height; the crosshair and letters are in colours.
BRIGHT = """(() => {{ const c = document.querySelector('#view-{}'), {{width, height}} = c;
  const d = c.getContext('2d').getImageData(0, 0, width, height).data; let n = 0, x = 0, y = 0;
  for (let i = 0; i < d.length; i += 4) if (d[i] > 200 && d[i + 1] > 200 && d[i + 2] > 200) {{
    n++; x += (i / 4) % width; y += Math.floor(i / 4 / width); }}
  return n && [x / n / width, y / n / height]; }})()"""

# How far down the line of the crosshair lies at the left edge of the coronal view, as a share.
LINE = """(() => { const c = document.querySelector('#view-1'), {width, height} = c, context = c.getContext('2d');
  const d = context.getImageData(0, 0, 1, height).data;
  for (let y = 0; y < height; y++) if (d[4 * y + 1] > 150 && d[4 * y] < 150) return y / height; })()"""


@pytest.fixture(scope="module")
def reader():
    return load("embedded")


@pytest.fixture
def page(tmp_path, reader):
    with served(tmp_path, readers=[reader]) as (room, port), Browser(tmp_path / "profile", CUT) as browser:
        browser.go(f"http://127.0.0.1:{port}/")
        yield browser
        hosts = {re.match(r"(\w+:)/*([^/]*)", one).groups() for one in browser.requests}
        own = {("http:", f"127.0.0.1:{port}"), ("about:", "blank")}
        assert {one for one in hosts if one[0] not in ("data:", "blob:")} <= own
        assert not browser.problems
        assert not [one for one in room.folder.rglob("*") if one.is_file()]


def scan_file(folder, order=(2, 1, 0), flips=(True, False, True)):
    """The patient as a NIfTI file whose stored axes are turned: its path and its image."""
    stored, axes, origin = turned(patient(SHAPE), axes_of(), (-31.5, -250.25, 410.5), order, flips)
    path = write_nifti(folder / f"{SECRET}.nii.gz", stored, axes, origin)
    return path, nib.load(path)


def shown_at(text):
    """Slice, row and column from 0, mm in LPS and HU of a line under the views."""
    found = re.search(
        r"slice (\d+), row (\d+), column (\d+); ([LR]) ([\d.]+), ([PA]) ([\d.]+), ([SI]) ([\d.]+) mm; (-?[\d.]+) HU",
        text,
    )
    numbers = [int(one) - 1 for one in found.groups()[:3]]
    mm = [float(found[5 + 2 * i]) * (1 if found[4 + 2 * i] in "LPS" else -1) for i in range(3)]
    return numbers, mm, float(found[10])


def put(browser, field, value):
    browser.run(f"(() => {{ const e = document.querySelector('{field}'); e.value = '{value}'; e.oninput(); }})()")


def test_left_is_left_and_values_and_millimetres_are_those_of_the_file(page, tmp_path):
    path, image = scan_file(tmp_path)
    page.choose_files("#file", path)
    page.until(OPEN)
    to_voxel = np.linalg.inv(image.affine)
    for view, across, down in ((0, 0.3, 0.45), (0, 0.71, 0.5), (1, 0.4, 0.5), (2, 0.6, 0.45)):
        page.hover(f"#view-{view}", across, down)
        text = page.until("document.querySelector('#pointer').textContent.startsWith('Pointer') && "
                          "document.querySelector('#pointer').textContent")  # fmt: skip
        _, mm, hu = shown_at(text)
        ras = np.array([-mm[0], -mm[1], mm[2], 1])  # nibabel's frame
        voxel = np.rint((to_voxel @ ras)[:3]).astype(int)
        assert np.abs((image.affine @ [*voxel, 1] - ras)[:3]).max() < 0.06  # the centre of a voxel
        assert image.dataobj[tuple(voxel)] == hu
    # What is drawn at the pointer is what stands there: lungs in the upper half of the patient, tissue in the lower.
    put(page, "#slice-1", SHAPE[1] // 2)
    page.until(f"document.querySelector('#cross').textContent.includes('row {SHAPE[1] // 2 + 1},')")
    for down, hu in ((0.35, "-850"), (0.65, "40")):
        page.hover("#view-1", 0.7, down)
        page.until(f"document.querySelector('#pointer').textContent.endsWith('; {hu} HU')")
        grey = page.run(
            "(() => { const c = document.querySelector('#view-1'); return c.getContext('2d')"
            f".getImageData(0.7 * c.width, {down} * c.height, 1, 1).data[0]; }})()"
        )
        assert abs(grey - (0 if hu == "-850" else 127)) <= 2  # mediastinum: 40 in 400
    # The crosshair, and with it every box, is drawn where its slice is: the last one at the patient's head, above.
    for index, above in ((SHAPE[0] - 1, True), (0, False)):
        put(page, "#slice-0", index)
        page.until(f"document.querySelector('#cross').textContent.includes('slice {index + 1},')")
        assert (page.until(LINE) < 0.4) == above
    # The marker of 1200 HU is at the patient's left.
    z, y, x = (int(one) for one in np.argwhere(patient(SHAPE) == 1200).mean(axis=0).round())
    assert x > SHAPE[2] / 2
    put(page, "#centre", 1100), put(page, "#width", 50)
    for axis, index in ((0, z), (1, y), (2, x)):
        put(page, f"#slice-{axis}", index)
    page.until(f"document.querySelector('#cross').textContent.includes('column {x + 1};')")
    spots = [page.until(BRIGHT.format(view)) for view in range(3)]
    assert spots[0][0] > 0.6 and spots[1][0] > 0.6  # the patient's left is at the right
    assert spots[0][1] < 0.48 and spots[2][0] < 0.48  # and the front above, and at the left of the sagittal view
    assert shown_at(page.text("#cross"))[2] == 1200
    right = SHAPE[2] - 1 - x
    put(page, "#slice-2", right)
    page.until(f"document.querySelector('#cross').textContent.includes('column {right + 1};')")
    assert page.until(f"{BRIGHT.format(2)} === 0 ? 'none' : false") == "none"
    # A click on the marker brings the crosshair back.
    page.click("#view-0", *spots[0])
    page.until("document.querySelector('#cross').textContent.includes('1200 HU')")
    assert SECRET not in page.run("document.documentElement.outerHTML") + "".join(page.requests)


def test_left_is_left_in_the_3d_views_too(page, tmp_path):
    page.choose_files("#file", scan_file(tmp_path)[0])
    page.until(OPEN)
    page.click("#webgl")
    page.until("document.querySelector('#status').textContent === 'The 3D views are there.'")
    z, y, x = (int(one) for one in np.argwhere(patient(SHAPE) == 1200).mean(axis=0).round())
    put(page, "#slice-0", z), put(page, "#slice-1", 5), put(page, "#slice-2", 5)
    page.until("document.querySelector('#cross').textContent.includes('row 6, column 6;')")
    put(page, "#centre", 1100), put(page, "#width", 50)
    left, top, wide, high = (round(one) for one in page.box("#gl"))
    page.run("new Promise((done) => setTimeout(done, 500))")  # frames of WebGL
    page.picture(tmp_path / "page.png", whole=False)
    drawn = np.asarray(Image.open(tmp_path / "page.png").convert("RGB"))[top : top + high, left : left + wide // 4]
    spots = np.argwhere((drawn > 200).all(axis=-1))  # of the axial view, the first of four; its crosshair is red
    row, column = spots.mean(axis=0)
    assert column > wide / 8  # the patient's left is at the right
    page.click("#gl", column / wide, row / high)
    page.until("document.querySelector('#cross').textContent.includes('1200 HU')")


def test_a_question_is_answered_and_the_crosshair_goes_where_the_answer_rests(page, tmp_path):
    page.click("#open-example")
    page.until(OPEN)
    page.click("#question"), page.type("Which organ is abnormal?")
    page.click("#choices"), page.type("liver | spleen | left kidney")
    page.click("#ask")
    page.until("document.querySelectorAll('article').length === 1")
    answer = page.text("article")
    for part in (
        "Answered by",
        "Router",
        "Options",
        "Without the scan",
        "Rests on",
        "not for clinical use",
        "embedded",
    ):
        assert part in answer
    page.click("article button")
    page.until("document.querySelector('#caption').textContent.startsWith('Of answer 1. What the answer rests on')")
    where = re.search(r"slices (\d+) to (\d+), rows (\d+) to (\d+), columns (\d+) to (\d+)", answer).groups()
    page.until(f"!document.querySelector('#cross').textContent.includes('slice {17}, row {65}, column {65};')")
    numbers, _, _ = shown_at(page.text("#cross"))
    for number, low, high in zip(numbers, where[::2], where[1::2], strict=True):
        assert int(low) <= number + 1 <= int(high)
    before = page.run("document.querySelector('#view-0').toDataURL()")
    put(page, "#strength", 100)
    assert page.run("document.querySelector('#view-0').toDataURL()") != before
    page.click("#model")
    page.until("document.querySelector('#cross').textContent.includes('for the model')")
    page.click("#question"), page.run("document.querySelector('#question').select()"), page.type("Which plane is this?")
    page.run("document.querySelector('#choices').value = ''")
    page.click("#ask")
    page.until("document.querySelectorAll('article').length === 2")
    page.click("#beside")
    left, right = (page.box(f"article:nth-child({i})") for i in (1, 2))
    assert left[0] + left[2] <= right[0] and left[1] == pytest.approx(right[1], abs=40)


def test_keys_alone_open_ask_and_read(page):
    def tab_to(name):
        for _ in range(60):
            page.press("Tab")
            if page.run("document.activeElement.id") == name:
                return
        raise AssertionError(f"Tab never reaches {name}")

    tab_to("example")
    page.press("ArrowDown")
    tab_to("open-example")
    page.press("Enter")
    page.until(OPEN)
    tab_to("view-0")
    before = shown_at(page.text("#cross"))[0]
    for key in ("ArrowRight", "ArrowDown", "PageUp"):
        page.press(key)
    moved = [one + 1 for one in before]
    page.until(f"document.querySelector('#cross').textContent.includes('slice {moved[0] + 1}, row {moved[1] + 1}, "
               f"column {moved[2] + 1};')")  # fmt: skip
    tab_to("question")
    page.type("Which phase is this?")
    page.press("Enter")
    page.until("document.querySelector('#status').textContent.startsWith('Answer 1: ')")
    assert page.run("document.querySelector('#status').getAttribute('role')") == "status"


def test_axe_finds_nothing_that_shuts_users_out(page):
    """axe-core finds no fault of contrast, names or roles; planted faults show that it looks for them."""
    page.run(importlib.resources.files("axe_core_python").joinpath("axe.min.js").read_text() + "; 0")

    def violations():
        found = page.run("axe.run().then(r => r.violations.map(v => [v.id, v.nodes.map(n => n.html.slice(0, 99))]))")
        return dict(map(tuple, found))

    assert not violations()
    page.click("#open-example")
    page.until(OPEN)
    assert not violations()
    page.click("#question"), page.type("Which organ is abnormal?"), page.click("#choices"), page.type("liver | spleen")
    page.click("#ask")
    page.until("document.querySelectorAll('article').length === 1")
    page.click("article button")
    page.until("document.querySelector('#caption').textContent.startsWith('Of answer 1.')")
    assert not violations()
    page.run("document.querySelector('#question').style.cssText = 'color: #777; background: #888'")
    page.run("document.querySelector('article').insertAdjacentHTML('beforeend', '<img src=\"data:,\"><input>')")
    assert {"color-contrast", "image-alt", "label"} <= violations().keys()


def test_a_bad_file_is_a_sentence_on_the_page(page, tmp_path):
    bad = tmp_path / f"{SECRET}.nii.gz"
    bad.write_bytes(b"no scan")
    page.choose_files("#file", bad)
    text = page.until("document.querySelector('#error').textContent")
    assert text.startswith("Error: the scan") and SECRET not in text
