"""Drawn patients: volumes that show what their truth says, whatever the body, the field and the scanner."""

import collections
import dataclasses
import json

import numpy as np
import pytest
import scipy

from tghmoe_jax.drawn import patient_drain, patients
from tghmoe_jax.drawn.cache import seeds_of
from tghmoe_jax.drawn.canvas import Canvas, Frame, Warp
from tghmoe_jax.drawn.patient_body import ORGANS, SEXES
from tghmoe_jax.drawn.patient_places import view_of
from tghmoe_jax.drawn.patient_scanner import NOISE_HU
from tghmoe_jax.drawn.patient_source import PatientSource
from tghmoe_jax.drawn.patients import COVERAGE_MM, FIELD_MM, PatientTruth, draw, plan
from tghmoe_jax.drawn.phantom import DIRECTIONS, PLANES
from tghmoe_jax.drawn.phantom_anatomy import PADDING, PHASES
from tghmoe_jax.drawn.phantom_lesions import KINDS, SECTIONS
from tghmoe_jax.scans.slices import to_channels

GRID = (16, 64, 64)


@pytest.fixture(scope="module")
def plans():
    return [plan(seed) for seed in range(500)]


def test_same_seed_gives_the_same_volume_and_another_seed_does_not():
    first, again, other = draw(7), draw(7), draw(8)
    assert first.truth == again.truth != other.truth
    np.testing.assert_array_equal(first.hu, again.hu)
    assert (first.hu != other.hu).any()
    assert first.hu.dtype == np.int16 and first.hu.shape == GRID
    assert first.hu.min() >= PADDING and first.hu.max() <= 3000


def test_a_finer_grid_shows_the_same_patient_and_field():
    coarse, fine = plan(11), plan(11, (32, 128, 128))
    assert (coarse.truth.section, coarse.truth.plane, coarse.truth.sex) == (
        fine.truth.section, fine.truth.plane, fine.truth.sex,
    )  # fmt: skip
    np.testing.assert_allclose(fine.truth.spacing_mm, np.array(coarse.truth.spacing_mm) / 2, atol=0.02)
    assert fine.patient.jitter["liver"][2] == coarse.patient.jitter["liver"][2]


def test_truth_survives_its_line_of_json(plans):
    for planned in plans[:200]:
        line = json.dumps(dataclasses.asdict(planned.truth))
        assert PatientTruth.from_json(json.loads(line)) == planned.truth


# Position and sides


def test_a_warp_is_inverted_and_moves_no_point_farther_than_its_reach(plans):
    rng = np.random.default_rng(0)
    for planned in plans[:40]:
        frame, warp = planned.frame, planned.patient.warp
        points = rng.uniform(-150, 150, (50, 3))
        index = frame.position(points)
        flat = (frame.origin + index @ frame.steps.T) / frame.scale
        assert np.abs(flat + warp.at(flat) - points).max() < 0.2
        assert (np.abs(warp.at(points)).max(0) <= warp.reach + 1e-9).all() and (warp.reach <= 8).all()
    np.testing.assert_allclose(frame.position(points[3]), index[3])


@pytest.mark.parametrize("plane", PLANES)
def test_a_marker_on_the_left_lies_where_the_left_of_the_plane_is(plans, plane):
    """Left is toward larger columns, or, of sagittal slices, toward later ones; front and head likewise."""
    toward = {axis: np.array(DIRECTIONS[plane])[:, axis] for axis in range(3)}
    marked = 0
    for planned in [one for one in plans if one.truth.plane == plane][:25]:
        frame, middle = planned.frame, (np.array(GRID) - 1) / 2
        centre = (frame.origin + frame.steps @ middle) / frame.scale
        for axis in range(3):
            ends = []
            for side in (-1, 1):
                canvas = Canvas(frame, planned.truth.spacing_mm[1])
                canvas.ellipsoid(centre + side * 32 * np.eye(3)[axis], (14, 14, 14), 3000.0)
                drawn = np.argwhere(canvas.hu > 500)
                ends.append(drawn.mean(0) if len(drawn) else None)
            if ends[0] is not None and ends[1] is not None:
                way = (ends[1] - ends[0]) * planned.truth.spacing_mm
                assert way @ toward[axis] > 0.8 * np.linalg.norm(way), (planned.truth.seed, axis)
                marked += 1
    assert marked > 40


def test_the_side_and_level_of_a_lesion_agree_with_its_voxel(plans):
    """However the body is turned: a lesion lies left of the point of the middle plane that it would touch."""
    heights = collections.defaultdict(list)
    paired = {"lung", "pleura", "rib", "breast", "kidney", "ovary", "bone", "muscle", "colon", "artery"}
    for planned in plans:
        left = np.array(DIRECTIONS[planned.truth.plane])[:, 0] * planned.truth.spacing_mm
        for lesion, point in planned.placed:
            opposite = planned.frame.position(point * (-1, 1, 1))
            if lesion.organ in paired:
                assert ((lesion.centre - opposite) @ left > 0) == (lesion.side == "left"), (planned.truth.seed, lesion)
            assert lesion.place.startswith((lesion.side, "anterior", "posterior"))
            heights[lesion.organ, lesion.place.split()[1]].append(point[2])
    for organ in {organ for organ, _ in heights}:
        assert np.mean(heights[organ, "upper"]) > np.mean(heights[organ, "lower"]) + 8, organ


def test_lesions_lie_in_the_scan_in_organs_in_view_and_have_their_sizes(plans):
    known = {(kind.phrase, kind.lesion, kind.organ) for kind in KINDS}
    for planned in plans:
        truth = planned.truth
        assert len({lesion.organ for lesion in truth.lesions}) == len(truth.lesions) <= 3
        for lesion in truth.lesions:
            assert (lesion.kind, lesion.lesion, lesion.organ) in known and lesion.place in truth.places[lesion.organ]
            assert (np.array(lesion.centre) > -0.5).all() and (lesion.centre < np.array(GRID) - 0.5).all()
            least = max(6, 1.5 * truth.spacing_mm[1], 0.5 * truth.spacing_mm[0])
            assert least - 0.1 <= lesion.size_mm <= max(60, 1.2 * 26, 1.2 * least) + 0.1
        assert len(truth.places) >= 4 and (truth.sex == "female" or not {"breast", "ovary"} & truth.places.keys())


def _but(hidden, shown, torso, lesion, *more):
    return None if lesion == hidden else shown(torso, lesion, *more)


@pytest.mark.parametrize(("volumes", "share"), [(16, 0.85), pytest.param(330, 0.95, marks=pytest.mark.slow)])
def test_a_lesion_changes_its_centre_by_more_than_the_noise(monkeypatch, volumes, share):
    shown, clear = patients.draw_lesion, []
    for seed in range(3000, 3000 + volumes):
        monkeypatch.setattr(patients, "draw_lesion", shown)
        truth = plan(seed).truth
        if not truth.lesions:
            continue
        ill = draw(seed).hu.astype(float)
        index = np.indices(ill.shape).reshape(3, -1).T
        for lesion in truth.lesions:
            if lesion.size_mm < 2 * truth.spacing_mm[1]:
                continue
            monkeypatch.setattr(
                patients, "draw_lesion", lambda *a, hidden=lesion: None if a[1] == hidden else shown(*a)
            )
            gap = np.linalg.norm((index - lesion.centre) * truth.spacing_mm, axis=1)
            core = (gap < max(0.25 * lesion.size_mm, gap.min() + 1e-6)).reshape(ill.shape)
            clear.append(np.abs(ill - draw(seed).hu)[core].mean() > truth.noise_hu)
    assert np.mean(clear) >= share, np.mean(clear)


# What varies


def test_planes_phases_sections_counts_and_sexes_are_balanced(plans):
    truths = [planned.truth for planned in plans]
    for values, names in (
        ([t.plane for t in truths], PLANES), ([t.phase for t in truths], PHASES),
        ([t.section for t in truths], SECTIONS),
        ([len(t.lesions) for t in truths], range(4)), ([t.sex for t in truths], SEXES),
    ):  # fmt: skip
        counts = collections.Counter(values)
        assert set(counts) == set(names)
        assert all(abs(counts[name] / len(truths) - 1 / len(names)) < 0.055 for name in names), counts


def test_every_organ_in_view_is_ill_equally_often_in_any_section(plans):
    seen, ill = collections.Counter(), collections.Counter()
    for planned in plans:
        for organ in planned.truth.places:
            seen[organ] += len(planned.truth.lesions) / len(planned.truth.places)
        ill.update(lesion.organ for lesion in planned.truth.lesions)
    assert set(ill) == {kind.organ for kind in KINDS}
    for organ, expected in seen.items():
        assert abs(ill[organ] - expected) < 4 * np.sqrt(expected) + 2, organ
    sections = collections.defaultdict(set)
    for planned in plans:
        for lesion in planned.truth.lesions:
            sections[lesion.organ].add(planned.truth.section)
    assert sum(len(found) > 1 for found in sections.values()) >= 10


def test_patients_and_scanners_vary_as_widely_as_they_are_said_to(plans):
    def limits(values, low, high, part=0.85):
        values = np.array(values)
        assert values.min() >= low - 1e-6 and values.max() <= high + 1e-6
        assert np.ptp(values) > part * (high - low)

    limits([one.patient.scale for one in plans], 0.8, 1.25)
    limits([one.patient.fat_mm for one in plans], 4, 50)
    limits(np.log([one.scanner.noise_hu for one in plans]), *np.log((NOISE_HU[0] - 0.1, NOISE_HU[1] + 0.1)))
    limits([one.scanner.offset_hu for one in plans], -10, 10)
    for organ in ORGANS:
        limits([one.patient.jitter[organ][0][0] for one in plans], -10, 10, part=0.3)
    for plane in PLANES:
        own = [one.truth.spacing_mm for one in plans if one.truth.plane == plane]
        limits([np.log(spacing[1] * 64) for spacing in own], *np.log(FIELD_MM) + (-0.01, 0.01))
        limits([np.log(spacing[0] * 16) for spacing in own], *np.log(COVERAGE_MM[plane]) + (-0.01, 0.01))
    turned = [np.degrees(np.arctan2(one.frame.steps[1, 2], one.frame.steps[0, 2])) for one in plans
              if one.truth.plane == "axial"]  # fmt: skip
    limits(turned, -15, 15)
    for name in ("streaks_hu", "circle"):
        assert 0.03 < np.mean([getattr(one.scanner, name) > 0 for one in plans]) < 0.4
    assert 0.1 < np.mean([one.scanner.table_mm is None for one in plans]) < 0.5
    assert 0.1 < np.mean([one.patient.arms for one in plans]) < 0.5


def test_enhancement_orders_the_phases_of_every_patient(plans):
    blood = collections.defaultdict(list)
    for planned in plans:
        blood[planned.truth.phase].append(planned.patient.hu["artery"])
    order = ("non-contrast", "delayed", "portal venous", "arterial")
    for low, high in zip(order, order[1:], strict=False):
        assert max(blood[low]) < min(blood[high]), (low, high)
    assert np.ptp(blood["arterial"]) > 0.15 * np.mean(blood["arterial"]), "timing and strength vary within a phase"


def test_nothing_of_the_body_lies_far_outside_it(plans):
    """The outline is closed: an arm's length from the middle of the neck, of the legs and of the trunk there is air."""
    patient = plans[0].patient
    for z in (-400, -200, 0, 200, 300, 360):
        origin = np.array([-320.0, -320.0, z])
        frame = Frame((1, 80, 80), origin, np.array([[0, 0, 8.0], [0, 8.0, 0], [1.0, 0, 0]]), np.ones(3))
        bare = dataclasses.replace(patient, arms=False)
        torso = patients.draw_trunk(Canvas(frame, 8.0), bare, np.random.default_rng(0))
        rows, columns = np.ogrid[:80, :80]
        assert not torso.trunk[0][np.hypot(rows - 40, columns - 40) * 8 > 270].any(), z


def test_outside_the_field_and_the_scanned_rows_is_padding(plans):
    for name in ("circle", "high"):
        seed = next(
            one.truth.seed for one in plans
            if (one.scanner.circle if name == "circle" else one.scanner.high < 0.95)
        )  # fmt: skip
        hu = draw(seed).hu
        corners = hu[:, [0, 0, -1, -1], [0, -1, 0, -1]]
        assert (corners == PADDING).all() and (hu[8, 32] > PADDING).any()


# The drain


def test_a_drain_is_dense_in_the_slices_that_it_reaches_and_in_no_other(monkeypatch):
    shown = patients.draw_drain
    for seed in range(200, 212):
        monkeypatch.setattr(patients, "draw_drain", shown)
        drawn = draw(seed)
        drain, with_drain = drawn.truth.drain, drawn.hu.astype(int)
        monkeypatch.setattr(patients, "draw_drain", lambda *a: None)
        changed = np.abs(with_drain - draw(seed).hu) > max(60, 2 * drawn.truth.noise_hu)
        if drain is None:
            assert not changed.any()
            continue
        assert len(drain.places) == max(2, round(16 * patient_drain.REACHES[drain.reach]))
        assert np.flatnonzero(changed.any((1, 2))).tolist() == list(range(drain.first, drain.first + len(drain.places)))
        for place, image in zip(drain.places, changed[drain.first :], strict=False):
            assert np.abs(np.argwhere(image).mean(0) - place).max() < 1.5
            assert np.ptp(np.argwhere(image), axis=0).max() <= 12, "a dot or a short dash"


def test_a_drain_runs_its_course_over_a_fifth_of_the_field(plans):
    for planned in plans:
        truth = planned.truth
        if truth.drain is None:
            continue
        way = np.subtract(truth.drain.places[-1], truth.drain.places[0])
        toward = np.array(patient_drain.COURSES[truth.plane][truth.drain.course])
        assert way @ toward >= 0.2 * 64 - 0.1 and way @ toward > 2 * np.abs(way @ toward[::-1])
        assert (np.array(truth.drain.places) > 0).all() and (np.array(truth.drain.places) < 63).all()


@pytest.fixture(scope="module")
def drains():
    """{plane: planned drains}, None among them."""
    rng = np.random.default_rng(5)
    return {
        plane: [
            patient_drain.plan_drain(plane, GRID, rng.choice((1.0, rng.uniform(0.74, 1))), rng) for _ in range(2500)
        ]
        for plane in PLANES
    }


def test_courses_reaches_and_no_drain_are_equally_frequent(drains):
    for plane, planned in drains.items():
        for name in ("course", "reach"):
            counts = collections.Counter(drain and getattr(drain, name) for drain in planned)
            assert len(counts) == 5 and all(abs(n / len(planned) - 0.2) < 0.03 for n in counts.values()), (
                plane,
                counts,
            )


def test_the_place_of_the_dot_in_the_middle_slice_says_nothing_of_the_course(drains):
    for plane, planned in drains.items():
        names, table = list(patient_drain.COURSES[plane]), np.zeros((25, 4))
        for drain in filter(None, planned):
            if drain.first <= 8 < drain.first + len(drain.places):
                row, column = drain.places[8 - drain.first]
                cell = 5 * min(max(int(row - 12) // 8, 0), 4) + min(max(int(column - 12) // 8, 0), 4)
                table[cell, names.index(drain.course)] += 1
        table = table[table.sum(1) >= 20]
        assert scipy.stats.chi2_contingency(table).pvalue > 0.002, plane


def test_the_dots_of_the_first_and_last_slice_tell_little_of_the_course(drains):
    """They cannot tell nothing: a tube that runs right ends farther right than one that runs left."""
    for plane, planned in drains.items():
        for slice_ in (0, 15):
            rows = [drain for drain in planned if drain and drain.first <= slice_ < drain.first + len(drain.places)]
            right = 0
            for drain in rows:  # the best guess: away from the middle where it starts, or toward where it ends
                place = np.subtract(drain.places[slice_ - drain.first], 31.5) * (1 if slice_ else -1)
                ways = patient_drain.COURSES[plane]
                right += max(ways, key=lambda name, ways=ways, place=place: np.dot(ways[name], place)) == drain.course
            assert right / len(rows) < 0.52, (plane, slice_)


# The source


def test_source_reads_back_what_the_seeds_draw(tmp_path):
    source = PatientSource(tmp_path, "validation", 3, seed=1)
    assert [path.name.startswith("patients-") for path in tmp_path.iterdir()] == [True]
    for i, seed in enumerate(seeds_of("validation", 3, 1)):
        drawn = draw(seed)
        levels, mask = source.slices(i)
        np.testing.assert_array_equal(levels, to_channels(drawn.hu, "windows3"))
        assert levels.dtype == np.uint8 and mask.all() and source.truths[i] == drawn.truth
        assert source.group(i) == drawn.truth.section and source.findings(i) == drawn.truth.triples
        assert source.sides(i) == (("A", "P") if drawn.truth.plane == "sagittal" else ("R", "L"))
        assert source.slice_spacing(i) == drawn.truth.spacing_mm[0]
    ranges = source.input_ranges()
    assert ranges["slices"] == [16, 16] and ranges["field_of_view_mm"][0] >= 249
    assert source.lesions_mm is None or source.lesions_mm[1] <= 60


def test_splits_share_no_volume(tmp_path):
    sources = [PatientSource(tmp_path, split, 2, grid=(8, 24, 24)) for split in ("train", "validation", "test")]
    volumes = {source.volumes[i].tobytes() for source in sources for i in range(2)}
    assert len(volumes) == 6


def test_a_frame_without_warp_or_turn_is_that_of_the_phantom():
    frame = Frame((4, 8, 8), np.zeros(3), np.diag([2.0, 2.0, 5.0])[:, ::-1], np.ones(3))
    still = dataclasses.replace(frame, warp=Warp(np.ones((1, 3)), np.zeros(1), np.zeros((1, 3))))
    np.testing.assert_allclose(frame.position((2, 4, 10)), still.position((2, 4, 10)))
    for one in (frame, still):
        canvas = Canvas(one, 2.0)
        canvas.ellipsoid((6, 6, 10), (5, 5, 5), 100.0)
        assert np.allclose(np.argwhere(canvas.hu > 0).mean(0), (2, 3, 3))


def test_points_of_lesions_lie_in_the_organs_as_drawn(plans):
    """A patient's own shapes: a liver lesion on liver, a lung nodule on lung, on a scan without noise."""
    checked = collections.Counter()
    for planned in plans[:30]:
        truth = planned.truth
        view = view_of(planned.patient, planned.frame, lambda at: np.ones(len(at), bool), np.random.default_rng(0))
        assert {name for places in view.places.values() for name in places}
        canvas = Canvas(planned.frame, truth.spacing_mm[1])
        torso = patients.draw_trunk(canvas, planned.patient, np.random.default_rng(1))
        lung = torso.lung
        for organ, wanted in (("lung", True), ("liver", False), ("spleen", False)):
            index = view.index.get(organ, {}).values()
            inside = [at for at in np.concatenate([*index, np.zeros((0, 3))]) if ((at > 0) & (at < (15, 63, 63))).all()]
            if inside:
                values = lung[tuple(np.rint(np.array(inside)).astype(int).T)]
                checked[organ, bool(((values > 0.5) == wanted).mean() > 0.9)] += 1
    for organ in ("lung", "liver", "spleen"):
        assert checked[organ, True] > 5 * checked[organ, False], checked
