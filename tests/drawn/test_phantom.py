"""The phantom: volumes that show what their truth says, and questions that need the volume."""

import collections
import concurrent.futures
import re

import numpy as np
import pytest

from benchmarks import damage
from tghmoe_jax.drawn import cache, phantom, phantom_source
from tghmoe_jax.drawn.cache import seeds_of
from tghmoe_jax.drawn.phantom import PLANES, draw, plan
from tghmoe_jax.drawn.phantom_anatomy import PADDING, PHASES
from tghmoe_jax.drawn.phantom_lesions import KINDS, KINDS_BY_SECTION, ORGANS_BY_SECTION, SECTIONS
from tghmoe_jax.drawn.phantom_report import parse_findings, report
from tghmoe_jax.drawn.phantom_source import PhantomSource
from tghmoe_jax.drawn.phantom_text import (
    ANSWER_PHRASES,
    AUX_NAMES,
    NONE,
    aux_targets,
    lesion_labels,
    make_question,
)
from tghmoe_jax.drawn.phantom_wordings import SEEN, UNSEEN
from tghmoe_jax.errors import UserError
from tghmoe_jax.samples.questions import LETTERS, TYPES
from tghmoe_jax.scans.slices import to_channels


@pytest.fixture(scope="module")
def truths():
    return [plan(seed).truth for seed in range(6000)]


# Volumes


def test_same_seed_gives_the_same_volume_and_another_seed_does_not():
    first, again, other = draw(7), draw(7), draw(8)
    assert first.truth == again.truth
    np.testing.assert_array_equal(first.hu, again.hu)
    assert (first.hu != other.hu).any()
    assert first.hu.dtype == np.int16 and first.hu.shape == (16, 64, 64)


def test_another_grid_shows_the_same_field():
    coarse, fine = draw(11), draw(11, (32, 128, 128))
    assert fine.hu.shape == (32, 128, 128)
    assert coarse.truth.triples == fine.truth.triples
    np.testing.assert_allclose(fine.truth.spacing_mm, np.array(coarse.truth.spacing_mm) / 2, atol=0.02)


def test_every_lesion_is_conspicuous_in_four_pixels_and_two_slices(monkeypatch):
    shown = phantom.draw_lesion
    for seed in range(90):
        monkeypatch.setattr(phantom, "draw_lesion", shown)
        ill = draw(seed)
        for lesion in ill.truth.lesions:
            monkeypatch.setattr(phantom, "draw_lesion", lambda *a, hidden=lesion: None if a[2] == hidden else shown(*a))
            difference = np.abs(to_channels(ill.hu).astype(int) - to_channels(draw(seed).hu)).max(-1) >= 24
            where = np.argwhere(difference)
            extent = np.ptp(where, axis=0) + 1
            assert extent[0] >= 2 and extent[1] >= 4 and extent[2] >= 4, (seed, lesion)
            assert np.abs(where.mean(0) - lesion.centre).max() < 4, (seed, lesion)
            assert lesion.size_mm >= 4 * ill.truth.spacing_mm[1]


def test_side_and_level_agree_with_the_voxels_of_the_lesion(truths):
    axial = [t for t in truths if t.plane == "axial"]
    for section in SECTIONS:
        for organ in ORGANS_BY_SECTION[section]:
            lesions = [le for t in axial if t.section == section for le in t.lesions if le.organ == organ]
            upper = np.mean([le.centre[0] for le in lesions if le.place.endswith("upper")])
            lower = np.mean([le.centre[0] for le in lesions if le.place.endswith("lower")])
            assert upper > lower + 2, organ
            columns = {
                side: np.mean([le.centre[2] for le in lesions if le.side == side] or [99]) for side in ("right", "left")
            }
            assert (
                columns["left"] > columns["right"] + 6 or organ == "spleen"
            )  # the patient's left is on the image's right


def test_lesions_lie_inside_the_scanned_field(truths):
    for truth in truths:
        for lesion in truth.lesions:
            half = 0.8 * lesion.size_mm / 2 / np.array(truth.spacing_mm)
            assert (np.array(lesion.centre) - half > -0.7).all() and (
                lesion.centre + half < np.array([15.7, 63.7, 63.7])
            ).all()


def test_outside_the_scan_is_padding_and_the_air_around_the_body_is_not():
    seeds = {plan(s).truth.plane: s for s in range(60)}
    assert (draw(seeds["axial"]).hu > PADDING).all()
    coronal = draw(seeds["coronal"]).hu
    assert (coronal[:, [0, -1]] == PADDING).all() and (coronal[:, 32] > PADDING).all()


def test_enhancement_orders_the_phases():
    values = collections.defaultdict(list)
    for seed in range(300):
        truth = plan(seed).truth
        if truth.section == "chest" and truth.plane == "axial" and not any(le.organ == "heart" for le in truth.lesions):
            chambers = draw(seed).hu[5:9, 24:32, 32:42]
            values[truth.phase].append(np.percentile(chambers, 85))
    means = {phase: np.mean(values[phase]) for phase in PHASES}
    assert means["non-contrast"] + 35 < means["delayed"] < means["portal venous"] - 35 < means["arterial"] - 70


def test_planes_phases_sections_and_lesions_are_balanced(truths):
    def rates(names):
        counts = collections.Counter(names)
        return {k: v / len(truths) for k, v in counts.items()}

    for field, count in (("plane", 4), ("phase", 4), ("section", 3)):
        found = rates(getattr(t, field) for t in truths)
        assert len(found) == count and all(abs(rate - 1 / count) < 0.025 for rate in found.values())
    found = rates(len(t.lesions) for t in truths)
    np.testing.assert_allclose([found[n] for n in range(4)], phantom.LESION_COUNTS, atol=0.02)
    for section in SECTIONS:
        assert len(ORGANS_BY_SECTION[section]) == 5
        ill = collections.Counter(le.organ for t in truths if t.section == section for le in t.lesions)
        mean = sum(ill.values()) / 5
        assert all(abs(ill[organ] - mean) < 0.12 * mean for organ in ORGANS_BY_SECTION[section])
        for organ in ORGANS_BY_SECTION[section]:
            places = collections.Counter(
                le.place for t in truths if t.section == section for le in t.lesions if le.organ == organ
            )
            assert len(places) == 4 and max(places.values()) < 1.5 * min(places.values()), (organ, places)


# Questions


def test_closed_questions_have_four_options_of_which_only_the_answer_is_true(truths):
    rng = np.random.default_rng(0)
    for truth in truths[:3000]:
        for type in TYPES:
            q = make_question(truth, "closed", rng, type)
            assert len(q.choices) == 4 == len(set(q.choices)) and q.answer in q.choices and q.type == type
            assert len(q.prompt.split()) <= 40
            assert set(q.choices) <= set(ANSWER_PHRASES)
            wrong = set(q.choices) - {q.answer}
            if type == "organ":
                assert not wrong & {le.organ for le in truth.lesions}
                assert wrong <= {NONE, *ORGANS_BY_SECTION[truth.section]}
            if type == "abnormality":
                assert not wrong & {le.kind for le in truth.lesions}
                assert wrong <= {NONE, *(k.phrase for k in KINDS_BY_SECTION[truth.section])}
            if type == "location":
                assert not wrong & {f"{le.place} {le.organ}" for le in truth.lesions if le.kind in q.question}
            if type in ("organ", "abnormality"):
                assert (q.answer == NONE) == (not truth.lesions)


def test_question_types_and_letters_are_uniform(truths):
    rng = np.random.default_rng(1)
    questions = [make_question(t, "closed", rng) for t in truths[:4000]]
    types, letters = (collections.Counter(getattr(q, name) for q in questions) for name in ("type", "letter"))
    assert set(types) == set(TYPES) and all(abs(n - 800) < 110 for n in types.values())
    assert set(letters) == set(LETTERS) and all(abs(n - 1000) < 110 for n in letters.values())


def _table_accuracy(rows, half, smoothing=8):
    """Held-out accuracy of the best of three count tables that map what is known to the chance of each option."""
    best = 0.0
    for key in (
        lambda known, q, option: (known, option),
        lambda known, q, option: (known, q.question, option),
        lambda known, q, option: (known, tuple(sorted(q.choices)), option),
    ):
        shown, true = collections.Counter(), collections.Counter()
        for known, q in rows[:half]:
            for option in q.choices:
                shown[key(known, q, option)] += 1
                true[key(known, q, option)] += option == q.answer
        hits = 0
        for known, q in rows[half:]:
            scores = {
                o: (true[k] + smoothing / 4) / (shown[k] + smoothing) for o in q.choices for k in [key(known, q, o)]
            }
            hits += max(scores, key=scores.get) == q.answer
        best = max(best, hits / (len(rows) - half))
    return best


def test_neither_the_text_nor_the_section_answers_a_question(truths):
    rng = np.random.default_rng(2)
    lines = []
    for type in TYPES:
        questions = [make_question(t, "closed", rng, type) for t in truths]
        text = _table_accuracy([("", q) for q in questions], 3600)
        section = _table_accuracy([(t.section, q) for t, q in zip(truths, questions, strict=True)], 3600)
        lines.append(f"{type}: text only {text:.3f}, section only {section:.3f}")
        assert text <= 0.32 and section <= 0.32, lines[-1]
    print("\n".join(lines))  # shown by pytest -s


def test_unseen_wordings_do_not_occur_among_the_seen():
    ways = [(*way.questions.values(), way.requests) for way in (SEEN, UNSEEN)]
    everything = [text for way in ways for texts in way for text in texts]
    assert len(everything) == len(set(everything))  # nor does a wording serve two types
    for seen, unseen in zip(*ways, strict=True):
        assert len(seen) >= 6 and len(unseen) >= 3
    truth, rng = plan(3).truth, np.random.default_rng(0)
    for kind in ("closed", "open", "report"):
        asked = {make_question(truth, kind, rng, wording=UNSEEN).question for _ in range(60)}
        assert not asked & {make_question(truth, kind, rng).question for _ in range(60)}


def test_the_training_vocabulary_is_small(truths):
    rng = np.random.default_rng(0)
    words = set()
    for truth in truths[:1500]:
        for kind in ("closed", "report"):
            q = make_question(truth, kind, rng)
            words.update(re.findall(r"[a-z-]+", f"{q.prompt} {q.target}".lower()))
    assert len(words) < 200


# Reports


def test_parsing_a_report_gives_back_its_findings(truths):
    rng = np.random.default_rng(0)
    lengths = []
    for truth in truths:
        text = report(truth, rng)
        assert parse_findings(text) == truth.triples, text
        assert truth.section in text.lower() and truth.plane in text.lower() and truth.phase in text.lower()
        lengths.append(len(text.split()))
    assert min(lengths) >= 18 and max(lengths) <= 50


def test_findings_come_before_negative_statements(truths):
    rng = np.random.default_rng(0)
    for truth in truths[:500]:
        sentences = report(truth, rng).split(". ")
        stated = [bool(parse_findings(s)) for s in sentences]
        assert stated[1 : 1 + len(truth.lesions)] == [True] * len(truth.lesions) and not any(
            stated[1 + len(truth.lesions) :]
        )


NODULE, CYST, STONE = ("nodule", "lung", "right"), ("cyst", "kidney", "left"), ("stone", "kidney", "right")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("No nodule.", ()),
        ("There is no nodule in the right lung.", ()),
        ("No nodule, effusion or rib fracture.", ()),
        ("The right lung shows no nodule.", ()),
        ("A nodule is not seen in the right upper lung.", ()),
        ("Right lung nodule: none.", ()),
        ("Right lung nodule: no.", ()),
        ("Right lung without nodule.", ()),
        ("The right lung is free of nodules.", ()),
        ("Nodule of the right lung has been excluded.", ()),
        ("Cannot exclude a nodule in the right lung.", ()),
        ("Possible nodule in the right lung.", ()),
        ("Is there a nodule in the right lung?", ()),
        ("The right lung is clear, with no nodule and no pleural effusion.", ()),
        ("Negative for right lung nodule.", ()),
        ("A nodule in the liver.", ()),  # no organ that can have it
        ("nodule nodule stone", ()),
        ("", ()),
        ("?? 4.5 \n;;", ()),
        ("There is a nodule in the right upper lung.", (NODULE,)),
        ("A NODULE LIES IN THE RIGHT LOWER LUNG", (NODULE,)),
        ("Right pulmonary nodules.", (NODULE,)),
        ("A nodule of 4.5 cm in the right lung.", (NODULE,)),
        ("A nodule is seen in the lung.", (("nodule", "lung", ""),)),
        ("Bilateral lung nodules.", (NODULE, ("nodule", "lung", "left"))),
        ("No effusion.There is a nodule in the right lung.", (NODULE,)),
        ("No pleural effusion, but a nodule in the right lung.", (NODULE,)),
        ("No rib fracture and there is a nodule in the right lung.", (NODULE,)),
        ("A nodule in the right lung without pleural effusion.", (NODULE,)),
        ("The liver is normal, a nodule is in the right lung.", (NODULE,)),
        ("A cyst in the left kidney and a stone in the right kidney.", (CYST, STONE)),
        ("A cyst and a stone in the left kidney.", (CYST, ("stone", "kidney", "left"))),
        ("Left renal cyst, right renal stone.", (CYST, STONE)),
        ("A mass is seen in the anterior upper spleen.", (("mass", "spleen", "left"),)),
        (
            "Left lower ovarian cyst with a left iliac artery aneurysm",
            (("cyst", "ovary", "left"), ("aneurysm", "artery", "left")),
        ),
    ],
)
def test_only_plain_assertions_count_as_findings(text, expected):
    assert parse_findings(text) == frozenset(expected)


def test_parsing_never_fails_on_broken_text(truths):
    rng = np.random.default_rng(0)
    words = " ".join(report(t, rng) for t in truths[:40]).split()
    known = {(k.lesion, k.organ, side) for k in KINDS for side in ("right", "left", "")}
    for _ in range(500):
        assert parse_findings(" ".join(rng.choice(words, 30))) <= known


# Auxiliary labels


def test_auxiliary_labels_say_what_the_truth_says(truths):
    for truth in truths[:500]:
        on = {name for name, value in zip(AUX_NAMES, aux_targets(truth), strict=True) if value}
        assert {f"plane:{truth.plane}", f"phase:{truth.phase}", f"section:{truth.section}"} <= on
        assert {n[7:] for n in on if n.startswith("lesion:")} == {le.kind for le in truth.lesions}
        assert len(on) == 3 + 3 * len(truth.lesions)
        for lesion in truth.lesions:
            assert {f"place:{lesion.kind}:{word}" for word in lesion.place.split()} <= on
    assert len(set(AUX_NAMES)) == len(AUX_NAMES)


def test_auxiliary_labels_of_a_lesion_are_read_off_the_cells_it_lies_in(tmp_path):
    source, cell = PhantomSource(tmp_path, "test", 40), (4, 16, 16)
    for i, truth in enumerate(source.truths):
        cells = source.aux_cells(i, cell)
        assert cells.shape == (4, 4, 4, len(AUX_NAMES)) and cells.dtype == bool
        placed = {j for lesion in truth.lesions for j in lesion_labels(lesion)}
        assert cells[..., [j for j in range(len(AUX_NAMES)) if j not in placed]].all()
        for lesion in truth.lesions:
            own = cells[..., lesion_labels(lesion)]
            places = zip(lesion.centre, (16, 64, 64), cell, strict=True)
            centre = tuple(int(np.clip(round(x), 0, n - 1)) // c for x, n, c in places)
            assert own[centre].all() and own.any(axis=-1).sum() <= 2 * 2 * 2 * (1 + (truth.plane == "oblique"))


# Source


def test_source_reads_back_what_the_seeds_draw(tmp_path):
    source = PhantomSource(tmp_path, "validation", 6, seed=1)
    seeds = seeds_of("validation", 6, 1)
    assert len(source) == 6 and source.aux_names == AUX_NAMES
    for i, seed in enumerate(seeds):
        drawn = draw(seed)
        levels, mask = source.slices(i)
        np.testing.assert_array_equal(levels, to_channels(drawn.hu, "windows3"))
        assert levels.dtype == np.uint8 and mask.dtype == bool and mask.all() and mask.shape == (16,)
        assert source.truths[i] == drawn.truth and source.findings(i) == drawn.truth.triples
        assert source.group(i) == drawn.truth.section
        np.testing.assert_array_equal(source.aux(i), aux_targets(drawn.truth))
        first, again = (source.question(i, "closed", np.random.default_rng(i)) for _ in range(2))
        assert first == again


def test_channels_may_repeat_one_window(tmp_path):
    source = PhantomSource(tmp_path, "test", 1, channels="repeat")
    np.testing.assert_array_equal(source.slices(0)[0], to_channels(np.asarray(source.volumes[0]), "repeat"))


def test_two_writers_of_one_cache_leave_one_whole_cache(tmp_path):
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        sources = list(pool.map(lambda _: PhantomSource(tmp_path, "train", 4), range(2)))
    np.testing.assert_array_equal(sources[0].volumes, sources[1].volumes)
    assert [p.name.startswith("phantom-") for p in tmp_path.iterdir()] == [True]


def test_failed_drawing_leaves_no_cache(tmp_path, monkeypatch):
    monkeypatch.setitem(phantom_source.STYLES, "first", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        PhantomSource(tmp_path, "train", 2)
    assert not list(tmp_path.iterdir())


def test_full_disk_is_said_before_drawing(tmp_path, monkeypatch):
    full = collections.namedtuple("usage", "total used free")(1, 1, 0)
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda _: full)
    with pytest.raises(UserError, match="make room"):
        PhantomSource(tmp_path, "train", 2)
    assert not list(tmp_path.iterdir())


def test_splits_share_no_seed_and_a_longer_split_extends_a_shorter():
    ranges = [set(seeds_of(split, 500, seed)) for split in ("train", "validation", "test") for seed in (0, 1)]
    assert sum(map(len, ranges)) == len(set().union(*ranges))
    assert list(seeds_of("train", 9, 0))[:4] == list(seeds_of("train", 4, 0))


@pytest.mark.parametrize("fault", [{"split": "dev"}, {"count": 0}, {"wording": "odd"}, {"channels": "rgb"}])
def test_wrong_arguments_are_named(tmp_path, fault):
    with pytest.raises(UserError, match=next(iter(fault))):
        PhantomSource(tmp_path, **{"split": "train", "count": 1, **fault})


def test_all_planes_are_drawn_right_side_up():
    # In every plane but the sagittal the liver's side of the abdomen is brighter soft tissue on the image's left.
    for plane in PLANES:
        seed = next(
            s for s in range(400) if (t := plan(s).truth).plane == plane and t.section == "abdomen" and not t.lesions
        )
        soft = np.clip(draw(seed).hu.astype(float), -100, 100)[:, :, :]
        axis = 0 if plane == "sagittal" else 2
        soft = np.moveaxis(soft, axis, -1)
        n = soft.shape[-1]
        assert soft[..., : n // 2].mean() > soft[..., n // 2 :].mean(), plane


@pytest.mark.parametrize("kind", ["flip", "cut", "delete", "add"])
@pytest.mark.parametrize("name", ["volumes.npy", "truth.jsonl", "digests.json"])
def test_a_damaged_cache_is_drawn_anew_after_one_line(tmp_path, capsys, kind, name):
    whole = PhantomSource(tmp_path, "train", 2, grid=(8, 24, 24))
    volumes, (folder,) = np.array(whole.volumes), tmp_path.iterdir()
    assert capsys.readouterr().err == ""
    damage.spoil(folder / name, kind, np.random.default_rng(1))
    again = PhantomSource(tmp_path, "train", 2, grid=(8, 24, 24))
    assert np.array_equal(again.volumes, volumes) and again.truths == whole.truths
    err = capsys.readouterr().err
    assert err.startswith(f"{folder} is damaged ({'' if kind == 'flip' else name}") and err.count("\n") == 1
    left = [path for path in tmp_path.iterdir() if path != folder]
    assert [path.name for one in left for path in one.iterdir()] == [f"{name}.1"] * (kind == "add"), (
        "others' files stay"
    )
    PhantomSource(tmp_path, "train", 2, grid=(8, 24, 24))
    assert capsys.readouterr().err == "", "once"
