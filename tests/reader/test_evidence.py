"""What an answer rests on: parts cover the scan, hiding nothing changes nothing, and mm are those of the patient."""

import jax
import nibabel as nib
import numpy as np
import pytest

from tests import tiny
from tests.scans import ct_fixtures as ct
from tests.scans.test_nifti import ORIENTATIONS
from tghmoe_jax.datasets.sources import make_source
from tghmoe_jax.evaluation.evidence_plot import Box
from tghmoe_jax.models import generation
from tghmoe_jax.reader import evidence
from tghmoe_jax.reader.batches import Request
from tghmoe_jax.reader.opening import load
from tghmoe_jax.scans.scan import read_scan
from tghmoe_jax.studies import pointing

BASE = tiny.CONFIG | {"vision_config": tiny.CONFIG["vision_config"] | {"image_size": 32}}
DATA = {"slices": 8, "size": 32, "channels": "windows3"}


def small(**changes):
    """A model of 4 x 4 visual tokens a view."""
    return tiny.model(BASE, patch_depth=2, **changes)


# ------------------------------------------------------------------------------------------------------- what is hidden


@pytest.mark.parametrize("changes", [{}, {"layout": "flat"}, {"spatial_pool": 2}, {"depth_pool": 2}])
def test_each_visual_token_is_hidden_by_its_view_and_by_one_region(changes):
    cfg = small(**changes).cfg
    views, regions = evidence.hidden_tokens(cfg, 8)
    number, side, row = cfg.views(8), cfg.view_side, cfg.view_side + (not cfg.flat)
    assert views.shape == (number, cfg.visual_tokens(8)) and regions.shape == (number, side, side, views.shape[1])
    assert (views.sum(axis=1) == side * row).all() and views.sum(axis=0).max() == 1
    for v, r, c in np.ndindex(number, side, side):
        column = [] if cfg.flat else [number * side * row + 1 + r * row + c]  # after the separator: the global view
        assert np.flatnonzero(regions[v, r, c]).tolist() == [v * side * row + r * row + c, *column]


def test_a_view_of_many_tokens_is_cut_into_sixteen_regions():
    cfg = tiny.model(BASE | {"vision_config": BASE["vision_config"] | {"image_size": 72}}, layout="flat").cfg
    _, regions = evidence.hidden_tokens(cfg, 2)
    assert cfg.view_side == 9 and regions.shape[1:3] == (3, 3) and (regions.sum(axis=-1) == 9).all()
    assert evidence.region_voxels(cfg) == (1, 24, 24)


@pytest.mark.parametrize("options", [(), ("a", "b", "c")])
def test_the_part_that_carries_the_answer_is_found_and_its_cost_counted(options):
    cfg, rng, calls = small().cfg, np.random.default_rng(3), []
    visual = rng.standard_normal((1, cfg.visual_tokens(8), 5)).astype(np.float32)
    planted = np.flatnonzero(evidence.hidden_tokens(cfg, 8)[1][2, 1, 3])[0]

    def score(seen):
        calls.append(len(seen))
        gone = np.abs(np.asarray(seen) - visual)[:, planted].max(axis=1) > 0
        found = np.stack([gone * 1.0, np.where(gone, 2.0, 5.0), gone * 0.0], axis=1)
        return found[:, : len(options) or 1]

    falls = evidence.measure(score, cfg, 8, visual, np.ones(visual.shape[:2], bool), options, "text")
    if options:  # of the second, from 5 above the best other one to 1
        assert falls.answer == "b" and falls.region == (2, 1, 3)
        assert falls.whole == 4 and falls.views.tolist() == [0, 0, 4, 0] and falls.regions.sum() == 4
    else:
        assert falls.answer == "text" and falls.whole == -1 and falls.views.tolist() == [0, 0, -1, 0]
    assert falls.rows == sum(calls) and set(calls) == {evidence.ROWS}
    assert falls.rows == -(-(2 + 4) // evidence.ROWS) * evidence.ROWS + 16


def test_a_part_is_not_strongest_because_its_tokens_are_far_from_the_mean():
    """A decoder that weighs all tokens alike points at none, however far one of them lies from the others."""
    cfg, rng = small(layout="flat").cfg, np.random.default_rng(5)
    visual = rng.choice([-1.0, 1.0], (1, cfg.visual_tokens(8), 4)).astype(np.float32)
    far = np.flatnonzero(evidence.hidden_tokens(cfg, 8)[1][1, 2, 3])[0]
    visual[0, far] *= 50

    def score(seen):
        return -np.sqrt(((np.asarray(seen) - visual) ** 2).sum(axis=(1, 2)))[:, None]

    falls = evidence.measure(score, cfg, 8, visual, np.ones(visual.shape[:2], bool), (), "text")
    assert falls.views.argmax() == 1 and falls.views.max() > 5 * np.delete(falls.views, 1).max()
    assert evidence.strength(falls.views, falls.view_changes).argmax() != 1 and falls.view != 1


def test_hiding_what_is_masked_takes_nothing():
    model, slices = small(), 8
    size = model.cfg.visual_tokens(slices)
    visual = np.random.default_rng(0).standard_normal((1, size, model.cfg.decoder.width)).astype(np.float32)
    mask = ~evidence.hidden_tokens(model.cfg, slices)[0][3][None]  # the last view has no real slice
    text = tiny.batch(rows=evidence.ROWS, seed=1)
    text = {key: np.repeat(value[:1], evidence.ROWS, axis=0) for key, value in text.items()}
    params = tiny.tree(tiny.params(model))

    def score(seen):
        ids = np.array([5, 9, 11])
        return generation.next_likelihood(model, params, text, seen, np.repeat(mask, len(seen), axis=0), ids, 1)

    falls = evidence.measure(score, model.cfg, slices, visual, mask, ("a", "b", "c"), "")
    assert falls.views[3] == 0 and (falls.views[:3] != 0).all() and falls.view != 3 and falls.whole != 0


# ------------------------------------------------------------------------------------------------- where in the patient


LESION = (5, 22, 33)  # of a canonical scan: upper half, back, the patient's left


def planted(spacing=(3.0, 1.5, 1.25)):
    """A scan with one bright lesion, and its axes."""
    hu = np.full((10, 36, 48), -1000, np.int16)
    hu[:, 4:32, 4:44] = -300
    z, y, x = LESION
    hu[z - 1 : z + 2, y - 2 : y + 3, x - 2 : x + 3] = 900
    return hu, ct.axes_of(spacing)


def found(path) -> evidence.Evidence:
    """What the brightest part of the model's own input would be said to be, in the scan."""
    scan = read_scan(path, DATA, None, keep=True)
    cfg = small(layout="flat").cfg
    bright = scan.prepared.slices[..., 2].astype(np.float64)
    cells = bright.reshape(4, 2, 4, 8, 4, 8).max(axis=(1, 3, 5)) + bright.reshape(4, 2, 4, 8, 4, 8).mean(axis=(1, 3, 5))
    views = cells.max(axis=(1, 2))
    falls = evidence.Falls(
        "left", 1000.0, views, int(views.argmax()), cells[int(views.argmax())], np.ones(4), np.ones((4, 4)), 24
    )
    return evidence.locate(falls, cfg, scan)


def check(one: evidence.Evidence, place: np.ndarray, axes: np.ndarray) -> None:
    """The strongest region holds the lesion: in voxels, and in mm along each of the scan's own axes."""
    region = one.regions[0]
    for (first, last), index in zip(region.voxels, LESION, strict=True):
        assert first - 1 <= index <= last
    away = (place - np.array(region.centre_mm)) @ (axes / np.linalg.norm(axes, axis=1, keepdims=True)).T
    assert (np.abs(away) <= np.array(region.size_mm) / 2 + 1e-6).all(), (away, region)
    middle = one.volume.affine @ [*(np.array(one.volume.array.shape) / 2 - 0.5), 1.0]
    assert region.centre_mm[0] > middle[0]  # the patient's left
    assert region.centre_mm[1] > middle[1] and region.strength == max(part.strength for part in one.regions)


@pytest.mark.parametrize("degrees", [0, 12])
def test_a_lesion_is_placed_alike_whatever_the_orientation_of_the_file(tmp_path, degrees):
    hu, axes = planted()
    a = np.radians(degrees)
    axes = axes @ np.array([[1, 0, 0], [0, np.cos(a), -np.sin(a)], [0, np.sin(a), np.cos(a)]]).T
    image = nib.Nifti1Image(hu, ct.affine_of(axes))
    place, path = np.array(ct.ORIGIN) + LESION @ axes, tmp_path / "scan.nii"
    for orientation in ORIENTATIONS:
        stored = image.as_reoriented(orientation)
        stored.to_filename(path)
        one = found(path)
        check(one, place, axes)
        # nibabel's word for the same voxel, in RAS
        lesion = np.argwhere(np.asarray(stored.dataobj) == 900).mean(axis=0)
        own = one.volume.affine @ [*LESION, 1.0]
        np.testing.assert_allclose(own[:3] * [-1, -1, 1], nib.affines.apply_affine(stored.affine, lesion), atol=1e-3)


@pytest.mark.parametrize("order, flips", [((0, 1, 2), (0, 0, 0)), ((2, 0, 1), (1, 0, 1)), ((1, 2, 0), (0, 1, 1))])
def test_a_lesion_of_a_series_is_placed_as_its_headers_say(tmp_path, order, flips):
    hu, axes = planted((3.0, 1.5, 1.5))
    stored, turned, origin = ct.turned(hu, axes, ct.ORIGIN, order, flips)
    folder = ct.write_dicom(tmp_path / "series", stored, axes=turned, origin=origin)
    one = found(folder)
    check(one, np.array(ct.ORIGIN) + LESION @ axes, axes)
    np.testing.assert_allclose(one.volume.affine[:3, 3], ct.ORIGIN, atol=1e-3)


@pytest.mark.parametrize("scale", [1.0, 3e-5, 2e-9])
def test_the_record_keeps_which_part_is_strongest_however_small_the_strengths_are(scale):
    """They are divided by a cube of distances, which a larger model makes much larger."""
    strengths = scale * np.array([0.811, 0.812, 0.5])
    boxes = [Box(np.array([[0, 4], [0, 8], [0, 8]]), 1.0, 0.5, float(s), None, None) for s in strengths]
    kept = [box.to_json()["strength"] for box in boxes]
    np.testing.assert_allclose(kept, strengths, rtol=1e-3)
    assert np.argsort(kept).tolist() == np.argsort(strengths).tolist()


def test_a_scan_without_orientation_has_voxels_and_no_millimetres(tmp_path):
    values = (np.clip(planted()[0], -1000, 1000) / 2000 + 0.5).astype(np.float32)
    np.save(tmp_path / "scan.npy", values[None])
    record = found(tmp_path / "scan.npy").to_json()
    assert record["frame"] is None and record["region"]["centre_mm"] is None and record["region"]["slices"][0] >= 1


def test_padding_of_a_slice_is_no_part_of_the_scan(tmp_path):
    hu, axes = planted()
    ct.write_nifti(tmp_path / "scan.nii", hu[:, 10:26], axes)  # 24 mm high, 60 mm wide
    one = found(tmp_path / "scan.nii")
    high = one.volume.array.shape[1]
    assert len(one.regions) == 8  # the two rows of regions in the middle
    assert all(0 <= part.edges[1, 0] < part.edges[1, 1] <= high for part in one.regions)
    assert [slab.voxels[0] for slab in one.slabs][0][0] == 1 and one.slabs[-1].voxels[0][1] == 10


# ------------------------------------------------------------------------------------------------- the embedded reader


@pytest.fixture(scope="module")
def embedded(tmp_path_factory):
    """The embedded reader, and phantoms of the test split."""
    reader = load("embedded")
    data = reader.run.config["data"] | {"root": str(tmp_path_factory.mktemp("phantom"))}
    return reader, make_source(data, "test", 20)


@pytest.mark.slow
def test_what_an_answer_rests_on_does_not_depend_on_what_it_is_asked_beside(embedded):
    reader, source = embedded
    asked = pointing.lesion_questions(source, 3, 0)
    asked.append((asked[0][0], asked[0][1].without_choices()))
    requests = [Request(volume, question, evidence=True) for volume, question in asked]
    alone = [reader.answer(source, [request], 8)[0].falls for request in requests]
    reader.batch = 3
    together = [answer.falls for answer in reader.answer(source, requests, 8)]
    reader.batch = 1
    for one, other in zip(alone, together, strict=True):
        assert (one.answer, one.region, one.rows) == (other.answer, other.region, other.rows)
        np.testing.assert_allclose(one.regions, other.regions, rtol=1e-3, atol=1e-3)
        np.testing.assert_allclose([one.whole, *one.views], [other.whole, *other.views], rtol=1e-3, atol=1e-3)
    assert not np.allclose(alone[0].views, alone[1].views)


@pytest.mark.slow
def test_the_strongest_region_touches_the_lesion_far_more_often_than_by_chance(embedded):
    reader, source = embedded
    asked = pointing.lesion_questions(source, 15, 0)
    rows = [row for row in pointing.point(reader, source, asked, 8) if row["right"]]
    assert len(rows) >= 8
    assert np.mean([row["hit"] for row in rows]) > 0.6 > 3 * np.mean([row["chance"] for row in rows])


@pytest.mark.slow
def test_shuffled_weights_are_the_same_numbers_in_another_order(embedded):
    reader, _ = embedded
    params, mixed = (one.variables["params"] for one in (reader, pointing.shuffled(reader, 0)))
    for one, other in zip(jax.tree.leaves(params["decoder"]), jax.tree.leaves(mixed["decoder"]), strict=True):
        np.testing.assert_array_equal(np.sort(one, axis=None), np.sort(other, axis=None))
        assert not np.array_equal(one, other)
    for part in set(params) - {"decoder"}:
        assert jax.tree.leaves(params[part])[0] is jax.tree.leaves(mixed[part])[0]


@pytest.mark.slow
def test_the_study_goes_on_where_it_was_stopped(tmp_path):
    arguments = ["--items", "2", "--to", str(tmp_path / "study"), "--data", str(tmp_path / "data")]
    assert pointing.main(arguments) == 0
    whole = {file.name: file.read_bytes() for file in (tmp_path / "study").iterdir()}
    assert len(whole) == len(pointing.CONDITIONS) + 1 and all(whole.values())
    (tmp_path / "study" / "second_shuffled.jsonl").unlink()
    assert pointing.main(arguments) == 0
    assert {file.name: file.read_bytes() for file in (tmp_path / "study").iterdir()} == whole


def test_a_score_of_the_study_counts_right_and_wrong_answers_apart():
    rows = [
        {"volume": i // 3, "type": pointing.TYPES[i % 3], "right": i % 4 > 0, "hit": i % 4 > 0, "chance": 0.1}
        | {"slab_hit": True, "slab_chance": 0.4}
        for i in range(24)
    ]
    mixed = [row | {"hit": False} for row in rows]
    scores = pointing.summarise({("first", "trained"): rows, ("first", "shuffled"): mixed})["first"]
    assert scores["trained"]["right"]["items"] == 18 and scores["trained"]["wrong"]["items"] == 6
    assert scores["trained"]["right"]["hit"]["value"] == 1 and scores["trained"]["wrong"]["hit"]["value"] == 0
    assert scores["trained"]["right"]["hit"]["ci95"][0] < 1 and scores["shuffled"]["right"]["hit"]["value"] == 0
    assert "| first | shuffled | right | 18 | 0.0 [0.0, " in pointing.table({"first": scores})
