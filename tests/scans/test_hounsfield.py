"""Whether values are HU: regions of the body, right and handled wrongly (the table of the docs)."""

import collections
import dataclasses
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter

from tests.scans.bodies import REGIONS, WITHOUT_AIR, damaged, draw
from tests.scans.ct_fixtures import REAL, axes_of, needs_real, patient, refusal, write_nifti
from tghmoe_jax.errors import UserError
from tghmoe_jax.scans.hounsfield import check_hu
from tghmoe_jax.scans.reading import read_volume

DOCS = Path(__file__).resolve().parents[2] / "docs" / "volumes.md"
NOISE = (0, 3, 8, 15, 25, 40)
PADDING = (None, -2000, -1000, 0)  # stored values
# A column of the table: ways of `damaged`, each with the intercept of the scan.
COLUMNS = {
    "once": [("once", -1024), ("-1000..1000", -1024)],
    "never": [("never", -1024), ("never", -1000)],
    "twice": [("twice", -1024), ("twice", -1000)],
    "clipped": [(f"{low}..{high}", -1024) for low, high in ((-160, 240), (-57, 164), (-200, 300), (-450, 1000))]
    + [("-1024..250", -1024)],
    "sign": [("sign", 0), ("negated", -1024)],
}


SLOW = pytest.param("dicom_abdomen", marks=pytest.mark.slow)


def outcome(values):
    """`read`, `warned` or `refused`."""
    try:
        return "warned" if check_hu(values.astype(np.float32), "scan") else "read"
    except UserError:
        return "refused"


def row(region, noises=NOISE, paddings=PADDING, columns=COLUMNS):
    """Outcomes of one region, a Counter for each column."""
    found = {column: collections.Counter() for column in columns}
    for noise in noises:
        hu = draw(region, noise)
        for padding in paddings:
            for column, ways in columns.items():
                for way, intercept in ways:
                    found[column][outcome(damaged(hu, way, padding, intercept))] += 1
    return found


def as_text(name, counters):
    order = ("read", "warned", "refused")
    cells = [", ".join(f"{counter[kind]} {kind}" for kind in order if counter[kind]) for counter in counters.values()]
    return f"| {name} | {' | '.join(cells)} |"


@pytest.mark.parametrize("name", REGIONS)
def test_no_region_is_read_wrongly_without_a_word(name):
    assert len(REGIONS) >= 12
    found = row(REGIONS[name], (15,), (None, -2000))
    assert set(found.pop("once")) == {"read"}
    assert all(counter["read"] == 0 for counter in found.values()), found


@pytest.mark.slow
def test_the_table_of_regions_is_as_the_docs_show_it():
    shown = DOCS.read_text(encoding="utf-8")
    right = collections.Counter()
    for name, region in REGIONS.items():
        found = row(region)
        assert as_text(name, found) in shown, as_text(name, found)
        right += found.pop("once")
        assert all(counter["read"] == 0 for counter in found.values()), (name, found)
    assert right["read"] >= 0.98 * right.total()
    for name, region in WITHOUT_AIR.items():
        found = row(region, paddings=(None,), columns={c: COLUMNS[c][:1] for c in ("once", "never", "twice")})
        assert as_text(f"{name}; no air", found).rstrip("|") in shown, as_text(f"{name}; no air", found)
        assert all(counter["read"] == 0 for counter in found.values()), (name, found)


@given(
    name=st.sampled_from(sorted(REGIONS)),
    size=st.floats(0.9, 1.5),
    shift=st.tuples(st.floats(-0.1, 0.1), st.floats(-0.1, 0.1)),
    shape=st.tuples(st.integers(6, 20), st.integers(48, 110), st.integers(48, 110)),
    blur=st.floats(0, 1),
    noise=st.sampled_from([0, 2, 6, 12, 20, 40]),
    padding=st.sampled_from([None, -2000, -1024, -976, 0, -7168]),
    way=st.sampled_from(["never", "twice", "-160..240", "-57..164"]),
    seed=st.integers(0, 9),
)
def test_bodies_of_any_size_place_and_sharpness_are_told(name, size, shift, shape, blur, noise, padding, way, seed):
    region = REGIONS[name]
    x, y = (part * region.field for part in shift)
    parts = tuple((rx, ry, cx + x, cy + y, value) for rx, ry, cx, cy, value in region.parts)
    hu = draw(dataclasses.replace(region, field=region.field * size, parts=parts), 0, shape=shape)
    hu = gaussian_filter(hu, (0, blur, blur)) if blur > 0.2 else hu
    hu = np.rint(hu + np.random.default_rng(seed).normal(0, noise, shape))
    assert outcome(damaged(hu, way, padding)) != "read"
    assert outcome(damaged(hu, "once", padding)) != "refused"


def test_a_background_that_was_cut_away_is_air():
    hu = np.where(draw(REGIONS["abdomen"], 12) < -500, -1024, draw(REGIONS["abdomen"], 12))
    assert outcome(hu) == "read"


def test_padding_of_the_wrong_sign_is_a_warning():
    hu = damaged(draw(REGIONS["chest"], 12), "sign", -2000)
    (warning,) = check_hu(hu.astype(np.float32), "scan")
    assert hu.max() == 62_512 and "pass 32000" in warning


def test_values_that_look_wrong_are_read_where_the_user_says_that_they_are_hu(tmp_path):
    path = write_nifti(tmp_path / "scan.nii", patient() - np.int16(1024))
    assert "--assume-hu" in refusal(path)
    volume = read_volume(path, assume_hu=True)
    np.testing.assert_array_equal(volume.array, patient() - 1024)
    assert any("twice" in text and "as you said" in text for text in volume.warnings)


def test_a_scan_without_air_is_read_with_a_warning(tmp_path):
    hu = draw(WITHOUT_AIR["liver, cut out"], 12).astype(np.int16)
    volume = read_volume(write_nifti(tmp_path / "scan.nii", hu, axes_of()))
    np.testing.assert_array_equal(volume.array, hu)
    assert any("shows no air" in text for text in volume.warnings)


@pytest.mark.filterwarnings("error")
def test_values_beyond_the_range_of_tissue_are_read_with_a_warning():
    rng = np.random.default_rng(0)
    hu = np.where(rng.random((20, 40, 40)) < 0.6, 5_000, 20_000) + rng.normal(0, 300, (20, 40, 40))
    hu[0, 0] = -1000
    assert any("shows no air" in text for text in check_hu(hu.astype(np.float32), "scan"))


@needs_real
@pytest.mark.parametrize("name", ["abdomen_pelvis_3mm.nii.gz", "abdomen_slab_3mm.nii.gz", SLOW])
def test_real_scans_are_read_silently_and_told_when_handled_wrongly(name):
    volume = read_volume(REAL / name)
    assert [text for text in volume.warnings if "states no unit of length" not in text] == []
    if name.endswith(".gz"):
        stored = np.asarray(nib.load(REAL / name).dataobj)
        assert np.array_equal(np.sort(volume.array, axis=None), np.sort(stored.astype(np.float32), axis=None))
    for change in (1024, 1000, -1024, -1000):
        assert outcome(volume.array + change) == "refused"
    for low, high in ((-160, 240), (-57, 164), (-1024, 250)):
        assert outcome(volume.array.clip(low, high)) == "warned"
    assert outcome(volume.array.clip(-1000, 1000)) == "read"
