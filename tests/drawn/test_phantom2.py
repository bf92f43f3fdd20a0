"""The second drawing style: other volumes under truths of the same kind, and words that training never holds."""

import collections

import numpy as np
import pytest

from tghmoe_jax.drawn import phantom, phantom2
from tghmoe_jax.drawn.phantom_adversarial import ADVERSARIAL, mistyped
from tghmoe_jax.drawn.phantom_anatomy import PADDING, PHASES
from tghmoe_jax.drawn.phantom_lesions import KIND_PHRASES
from tghmoe_jax.drawn.phantom_report import parse_findings
from tghmoe_jax.drawn.phantom_source import PhantomSource
from tghmoe_jax.drawn.phantom_text import make_question
from tghmoe_jax.drawn.phantom_wordings import SEEN, UNSEEN
from tghmoe_jax.errors import UserError
from tghmoe_jax.samples.questions import TYPES
from tghmoe_jax.scans.slices import to_channels


def plan(seed):
    return phantom.plan(seed, habitus=phantom2.HABITUS)


def every_text(way) -> set[str]:
    return {text for texts in (*way.questions.values(), way.requests) for text in texts}


# ------------------------------------------------------------------------------------------------------- volumes


def test_same_seed_gives_the_same_volume_and_the_first_style_another():
    drawn, again = phantom2.draw(7), phantom2.draw(7)
    np.testing.assert_array_equal(drawn.hu, again.hu)
    assert drawn.truth == again.truth and drawn.hu.dtype == np.int16 and drawn.hu.shape == (16, 64, 64)
    assert np.mean(drawn.hu != phantom.draw(7).hu) > 0.3
    assert phantom2.draw(7, (32, 128, 128)).hu.shape == (32, 128, 128)


def test_no_body_has_proportions_of_the_first_style():
    for own, first in zip(phantom2.HABITUS, phantom.HABITUS, strict=True):
        assert own[1] < first[0] or own[0] > first[1]


@pytest.mark.slow
def test_every_lesion_shows_where_its_truth_says(monkeypatch):
    shown = phantom2.draw_lesion
    kinds = set()
    for seed in range(60):
        monkeypatch.setattr(phantom2, "draw_lesion", shown)
        ill = phantom2.draw(seed)
        for lesion in ill.truth.lesions:

            def all_but_one(s, other, centre, radii, hidden=lesion):
                keep = s.hu.copy()
                shown(s, other, centre, radii)  # random numbers are drawn in the same order
                if other == hidden:
                    s.hu = keep

            monkeypatch.setattr(phantom2, "draw_lesion", all_but_one)
            change = np.abs(to_channels(ill.hu).astype(int) - to_channels(phantom2.draw(seed).hu)).max(-1) >= 24
            where = np.argwhere(change)
            extent = np.ptp(where, axis=0) + 1
            assert (extent >= (2, 4, 4)).all(), (seed, lesion)
            assert np.abs(where.mean(0) - lesion.centre).max() < 4, (seed, lesion)
            kinds.add(lesion.kind)
    assert len(kinds) >= len(KIND_PHRASES) - 2


def test_enhancement_orders_the_phases():
    values = collections.defaultdict(list)
    for seed in range(240):
        truth = plan(seed).truth
        if truth.section == "chest" and truth.plane == "axial" and not any(le.organ == "heart" for le in truth.lesions):
            values[truth.phase].append(np.percentile(phantom2.draw(seed).hu[5:9, 24:32, 32:42], 85))
    means = {phase: np.mean(values[phase]) for phase in PHASES}
    assert means["non-contrast"] + 30 < means["delayed"] < means["portal venous"] - 15 < means["arterial"] - 50


def test_outside_the_scan_is_padding():
    seeds = {plan(s).truth.plane: s for s in range(60)}
    assert (phantom2.draw(seeds["axial"]).hu > PADDING).all()
    coronal = phantom2.draw(seeds["coronal"]).hu
    assert (coronal[:, [0, -1]] == PADDING).all() and (coronal[:, 32] > PADDING).all()


def test_a_source_of_it_has_a_cache_of_its_own(tmp_path):
    first = PhantomSource(tmp_path, "test", 3)
    second = PhantomSource(tmp_path, "test", 3, wording="second", style="second")
    again = PhantomSource(tmp_path, "test", 3, wording="second", style="second")
    assert len(list(tmp_path.iterdir())) == 2
    assert (second.volumes[0] != first.volumes[0]).any() and (second.volumes[:] == again.volumes[:]).all()
    assert first.truths == PhantomSource(tmp_path, "test", 3).truths
    with pytest.raises(UserError, match="style='fourth'"):
        PhantomSource(tmp_path, "test", 3, style="fourth")


# --------------------------------------------------------------------------------------------------------- words


def test_a_report_gives_back_its_findings_in_sentences_of_its_own():
    rng = np.random.default_rng(0)
    firsts, seconds = set(), set()
    for seed in range(1500):
        truth = plan(seed).truth
        written = make_question(truth, "report", rng, wording=phantom2.WORDING)
        assert parse_findings(written.answer) == truth.triples, written.answer
        for name in (truth.section, truth.plane, truth.phase):
            assert name in written.answer.lower()
        seconds |= set(written.answer.split(". "))
        firsts |= set(make_question(truth, "report", rng).answer.split(". "))
    assert not firsts & seconds


@pytest.mark.parametrize("way", ["second", *ADVERSARIAL])
def test_no_wording_of_a_test_occurs_in_training(way):
    wording = phantom2.WORDING if way == "second" else ADVERSARIAL[way]
    assert set(wording.questions) == set(TYPES) and len(wording.requests) >= 4
    assert not every_text(wording) & (every_text(SEEN) | every_text(UNSEEN))
    assert all("{lesion}" in text for text in wording.questions["location"])
    truth = plan(3).truth
    for kind in ("closed", "report"):
        asked = make_question(truth, kind, np.random.default_rng(0), wording=wording)
        assert "{" not in asked.prompt and asked.answer


def test_typing_errors_are_few_and_always_the_same():
    for text in every_text(SEEN):
        typed = mistyped(text)
        assert typed == mistyped(text) != text and abs(len(typed) - len(text)) <= 2
        assert typed.count("{lesion}") == text.count("{lesion}")
        pairs = zip(text.split(), typed.split(), strict=True)
        assert 1 <= sum(old != new for old, new in pairs) <= 2
