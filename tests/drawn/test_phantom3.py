import collections
import dataclasses

import numpy as np
import pytest

from tghmoe_jax.drawn import phantom3
from tghmoe_jax.drawn.phantom import PLANES, Phantom, Truth
from tghmoe_jax.drawn.phantom3_body import Figure, Person
from tghmoe_jax.drawn.phantom3_lesions import Finding
from tghmoe_jax.drawn.phantom3_scan import FieldOfView
from tghmoe_jax.drawn.phantom_anatomy import PHASES
from tghmoe_jax.drawn.phantom_lesions import KIND_PHRASES, ORGANS_BY_SECTION, SECTIONS, kind_of
from tghmoe_jax.errors import UserError

COUNT = 2000
WATER = ("liver cyst", "kidney cyst", "ovary cyst")
DENSE = ("kidney stone", "bladder stone", "heart calcification")


@pytest.fixture(scope="module")
def compositions():
    return [phantom3.compose(seed) for seed in range(COUNT)]


@pytest.fixture(scope="module")
def drawn(compositions):
    """For each kind of lesion: a composition, the lesion's index, the volume with it and the volume without it."""
    found = {}
    for composition in sorted(compositions, key=lambda c: -len(c.truth.lesions)):
        kinds = {lesion.kind: i for i, lesion in enumerate(composition.truth.lesions) if lesion.kind not in found}
        if kinds:
            ill = phantom3.render(composition)
            found |= {kind: (composition, i, ill, phantom3.render(composition, i)) for kind, i in kinds.items()}
    return found


def all_lesions(compositions):
    return [(c, lesion) for c in compositions for lesion in c.truth.lesions]


def assert_frequency(observed, trials, chance):
    """Within 4.5 spreads of a binomial: one such check in 100,000 fails by chance."""
    assert abs(observed - trials * chance) <= 4.5 * (trials * chance * (1 - chance)) ** 0.5


def test_the_same_seed_and_grid_give_the_same_volume():
    first, second = phantom3.draw(41), phantom3.draw(41)
    assert isinstance(first, Phantom) and isinstance(first.truth, Truth)
    assert first.truth == second.truth == phantom3.plan(41)
    np.testing.assert_array_equal(first.hu, second.hu)
    assert not np.array_equal(first.hu, phantom3.draw(42).hu)


@pytest.mark.parametrize("grid", [(16, 64, 64), (9, 40, 48)])
def test_volumes_are_int16_hu_of_the_grid(grid):
    for seed in (3, 4):
        hu = phantom3.draw(seed, grid).hu
        assert hu.dtype == np.int16 and hu.shape == grid
        assert hu.min() >= -1024 and hu.max() <= 3071
        assert (hu < -900).mean() > 0.05 and 0.05 < (hu > -150).mean() < 0.9  # air around a body
        assert hu.max() > 250  # bone


def test_a_grid_that_could_not_show_a_lesion_is_refused():
    seed = next(seed for seed in range(50) if phantom3.plan(seed).lesions)
    with pytest.raises(UserError, match="too coarse"):
        phantom3.plan(seed, (16, 6, 6))


def test_no_word_is_outside_the_vocabulary(compositions):
    for composition in compositions:
        truth = composition.truth
        assert truth.section in SECTIONS and truth.plane in PLANES and truth.phase in PHASES
        assert len(truth.lesions) <= 3
        assert len({lesion.organ for lesion in truth.lesions}) == len(truth.lesions)
        for lesion in truth.lesions:
            kind = kind_of(lesion.kind, truth.section)
            assert (lesion.lesion, lesion.organ) == (kind.lesion, kind.organ) and lesion.place in kind.places
            assert lesion.side == ("left" if lesion.organ == "spleen" else lesion.place.split()[0])


def test_frequencies_are_those_of_the_design(compositions):
    truths = [c.truth for c in compositions]
    for field, values in (("section", SECTIONS), ("plane", PLANES), ("phase", PHASES)):
        seen = collections.Counter(getattr(t, field) for t in truths)
        for value in values:
            assert_frequency(seen[value], COUNT, 1 / len(values))
    counts = collections.Counter(len(t.lesions) for t in truths)
    for n, chance in enumerate((0.20, 0.35, 0.27, 0.18)):
        assert_frequency(counts[n], COUNT, chance)
    for section, organs in ORGANS_BY_SECTION.items():
        lesions = [lesion for t in truths if t.section == section for lesion in t.lesions]
        seen = collections.Counter(lesion.organ for lesion in lesions)
        for organ in organs:
            assert_frequency(seen[organ], len(lesions), 1 / 5)
    for organ in ("liver", "kidney"):
        kinds = collections.Counter(lesion.kind for _, lesion in all_lesions(compositions) if lesion.organ == organ)
        assert len(kinds) == 2
        assert_frequency(max(kinds.values()), sum(kinds.values()), 1 / 2)


def test_every_place_of_every_organ_occurs(compositions):
    seen = collections.Counter((lesion.organ, lesion.place) for _, lesion in all_lesions(compositions))
    for organ in {organ for organs in ORGANS_BY_SECTION.values() for organ in organs}:
        places = [n for (name, _), n in seen.items() if name == organ]
        assert len(places) == 4
        assert min(places) > 0.12 * sum(places)


def test_spacing_covers_what_the_design_says(compositions):
    for composition in compositions:
        slice_mm, row_mm, column_mm = composition.truth.spacing_mm
        assert row_mm == column_mm and 300 <= 64 * column_mm <= 420 + 1e-6
        assert 140 <= 2 * composition.scan.reach <= 320
        if composition.truth.plane == "axial":
            assert 16 * slice_mm == pytest.approx(2 * composition.scan.reach)


def test_lesions_lie_within_the_scan_and_can_be_seen(compositions):
    for composition, lesion in all_lesions(compositions):
        spacing = np.array(composition.truth.spacing_mm)
        assert max(10, 1.8 * spacing[2], 0.7 * spacing[0]) <= lesion.size_mm + 1e-9 and lesion.size_mm <= 60
        centre, half = np.array(lesion.centre), lesion.size_mm / 2 / spacing
        assert (centre - half >= -0.5 - 1e-6).all() and (centre + half <= np.array((16, 64, 64)) - 0.5 + 1e-6).all()
        z = composition.scan.to_scanner([lesion.centre])[0, 2]
        assert abs(z - composition.scan.centre[2]) + lesion.size_mm / 2 <= composition.scan.reach + 1e-6


def test_sizes_reach_far_beyond_the_smallest(compositions):
    sizes = np.array([lesion.size_mm for _, lesion in all_lesions(compositions)])
    assert sizes.min() < 11 and sizes.max() > 50 and 16 < np.median(sizes) < 30


def atlas(composition, lesion):
    return composition.patient.from_scanner(composition.scan.to_scanner([lesion.centre]))[0]


def test_the_side_is_that_of_the_centre_about_the_midline_of_the_body(compositions):
    for composition, lesion in all_lesions(compositions):
        x = atlas(composition, lesion)[0]  # mm to the patient's left of the midline
        assert x > 0 if lesion.side == "left" else x < 0


def test_right_lesions_lie_at_the_low_end_of_the_axis_that_runs_to_the_left(compositions):
    for composition, lesion in all_lesions(compositions):
        axis = 0 if composition.truth.plane == "sagittal" else 2
        z = composition.scan.to_scanner([lesion.centre])[0, 2]
        y = atlas(composition, lesion)[1]
        level = z / composition.patient.scale[2]
        midline = composition.scan.to_index(composition.patient.to_scanner([[0.0, y, level]]))[0, axis]
        if abs(atlas(composition, lesion)[0]) > 25:  # farther from the midline than a tilt of the body can hide
            assert (lesion.centre[axis] < midline) == (lesion.side == "right")


@pytest.mark.parametrize("plane", PLANES)
def test_a_planted_marker_in_the_right_side_appears_at_the_low_end(plane):
    rng = np.random.default_rng(5)
    patient = dataclasses.replace(Person.make(rng, 5, False), turn=(0.0, 0.0, 0.06))
    scan = FieldOfView.make(rng, "abdomen", plane, (16, 64, 64), patient)
    scan = dataclasses.replace(scan, centre=tuple(patient.to_scanner([[0.0, 0.0, 90.0]])[0]))
    truth = Truth(5, "abdomen", plane, "non-contrast", scan.spacing, 5.0, ())
    axis = 0 if plane == "sagittal" else 2
    markers = [
        Finding("kidney stone", f"{side} upper", 30.0, (x, 10.0, 90.0))
        for side, x in (("right", -70.0), ("left", 70.0))
    ]
    composition = phantom3.Composition(truth, patient, scan, tuple(markers))
    only_left, only_right = (phantom3.render(composition, without=i).astype(int) for i in (0, 1))
    right, left = (np.argwhere(change > 400)[:, axis] for change in (only_right - only_left, only_left - only_right))
    middle = ((16, 64, 64)[axis] - 1) / 2
    assert len(right) and len(left)
    assert right.mean() < middle - 1 and left.mean() > middle + 1


def extent(body, organ, x_sign):
    """Lowest and highest x, y and z (2, 3) of an organ but for its outermost 2 %, from a regular grid of points."""
    if organ == "lung":
        low, high = np.array([(-150, -120, 90), (150, 120, 430)], float)
    else:
        low, high = body.shape(organ, x_sign < 0 and organ == "kidney").box
    axes = [np.linspace(a, b, 40, dtype=np.float32) for a, b in zip(low, high, strict=True)]
    x, y, z = (a.ravel() for a in np.meshgrid(*axes, indexing="ij"))
    if organ == "lung":
        d = np.where(np.sign(x) == x_sign, body.lung(x, y, z), 1)
    else:
        d = body.shape(organ, x_sign < 0 and organ == "kidney").distance(x, y, z)
    if organ in ("liver", "spleen"):
        d = np.maximum(d, body.under(x, y, z))
    if organ == "heart":
        d = np.maximum(d, -body.above(x, y, z, body.inner.distance(x, y, z)))
    inside = np.stack([x, y, z], 1)[d < 0]
    return np.quantile(inside, (0.02, 0.98), axis=0)


@pytest.mark.parametrize("organ", ["lung", "liver", "spleen", "kidney", "bladder", "heart"])
def test_places_count_from_the_middle_of_the_organ(organ, compositions):
    chosen = [(c, lesion) for c, lesion in all_lesions(compositions) if lesion.organ == organ][:20]
    for composition, lesion in chosen:
        point = atlas(composition, lesion)
        low, high = extent(Figure(composition.patient), organ, np.sign(point[0]))
        share = (point - (low + high) / 2) / (high - low)  # 0 in the middle, 0.5 at the ends
        clear = 0.05  # 8 % of an extent that the drawing itself only samples
        first, second = lesion.place.split()
        assert share[2] > clear if second == "upper" else share[2] < -clear
        if organ == "spleen":
            assert share[1] > clear if first == "posterior" else share[1] < -clear
        elif organ in ("liver", "bladder", "heart"):
            assert share[0] > clear if first == "left" else share[0] < -clear


def test_every_kind_changes_the_image_at_its_centre_and_only_there(drawn):
    assert set(drawn) == set(KIND_PHRASES)
    for kind, (composition, i, ill, healthy) in drawn.items():
        lesion = composition.truth.lesions[i]
        change = np.abs(ill.astype(int) - healthy)
        assert change[tuple(np.rint(lesion.centre).astype(int))] > composition.truth.noise_hu, kind
        index = np.stack(np.meshgrid(*map(np.arange, change.shape), indexing="ij"), -1)
        far = np.linalg.norm((index - lesion.centre) * composition.truth.spacing_mm, axis=-1)
        assert (change[far > 1.1 * lesion.size_mm + 30] == 0).all(), kind


def test_lesions_have_the_density_of_their_kind(drawn):
    for kind, (composition, i, ill, _) in drawn.items():
        lesion, noise = composition.truth.lesions[i], composition.truth.noise_hu
        hu = ill[tuple(np.rint(lesion.centre).astype(int))]
        if kind in DENSE:
            assert hu > 300, kind
        if kind in WATER and lesion.size_mm > 20:
            assert -20 - 3 * noise < hu < 30 + 3 * noise, kind
        if kind == "lung nodule":
            assert hu > -400
        if kind == "pleural effusion":
            assert -150 < hu < 60 + 3 * noise


@pytest.mark.parametrize("plane", PLANES)
def test_the_liver_lies_on_the_right_and_the_lungs_are_air(plane):
    rng = np.random.default_rng(8)
    patient = Person.make(rng, 8, False)
    scan = FieldOfView.make(rng, "abdomen", plane, (16, 64, 64), patient)
    scan = dataclasses.replace(scan, centre=tuple(patient.to_scanner([[0.0, 0.0, 170.0]])[0]))
    truth = Truth(8, "abdomen", plane, "portal venous", scan.spacing, 4.0, ())
    hu = phantom3.render(phantom3.Composition(truth, patient, scan, ()))
    body = Figure(patient)
    index = np.rint(scan.to_index(patient.to_scanner([[-90.0, 0.0, 170.0], [105.0, -10.0, 245.0]]))).astype(int)
    liver, lung = (hu[tuple(i)] for i in index)
    assert liver == pytest.approx(100, abs=40) and lung < -600
    assert body.lung(*np.float32([[105.0], [-10.0], [245.0]]))[0] < 0
