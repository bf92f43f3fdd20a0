"""What is asked and reported about drawn patients: fixed texts that say what is true and need the volume."""

import collections

import numpy as np
import pytest

from tests import tiny_run
from tghmoe_jax.bases.base import EMBEDDED
from tghmoe_jax.bases.phi3v import CHAT
from tghmoe_jax.drawn.patient_drain import ALONG, COURSES
from tghmoe_jax.drawn.patient_pairs import APART_MM, APART_SLICES, LARGER, MISSING, OPPOSITE, SAME
from tghmoe_jax.drawn.patient_source import PatientSource
from tghmoe_jax.drawn.patient_text import (
    AUX_NAMES,
    COUNTS,
    FIXED,
    NO_DRAIN,
    WORDINGS,
    aux_targets,
    fixed_questions,
    make_question,
    report,
)
from tghmoe_jax.drawn.patients import plan
from tghmoe_jax.drawn.phantom_report import parse_findings
from tghmoe_jax.drawn.phantom_text import NONE
from tghmoe_jax.reader import examination
from tghmoe_jax.samples import prompts
from tghmoe_jax.samples.questions import FAMILIES, FAMILY_OF, LETTERS
from tghmoe_jax.samples.tokenizer import Tokenizer

SEEN = WORDINGS["seen"]
VOLUMES = 600
TEXT_LENGTH = 96  # of --config.data.text_length, as its comment says


@pytest.fixture(scope="module")
def truths():
    return [plan(seed).truth for seed in range(VOLUMES)]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_folder(EMBEDDED, CHAT)


@pytest.fixture(scope="module")
def asked(truths):
    """(truth, question) of the fixed questions."""
    return pairs_of(truths)


def pairs_of(truths) -> list:
    return [(truth, question) for truth in truths for question in fixed_questions(truth, SEEN)]


# Fixed texts


def test_a_volume_has_one_report_and_six_questions_whoever_asks(truths):
    for truth in truths[:25]:
        own = fixed_questions(truth, SEEN)
        assert len(own) == FIXED == len({question.type for question in own})
        for draw in range(8):
            rng = np.random.default_rng(draw)
            question = make_question(truth, "closed", rng, None, SEEN)
            assert question in own
            opened = make_question(truth, "open", np.random.default_rng(draw), None, SEEN)
            assert opened == question.without_choices() and opened.choices == ()
            assert make_question(truth, "closed", rng, own[0].type, SEEN) == own[0]
        texts = {make_question(truth, "report", np.random.default_rng(i), None, SEEN) for i in range(5)}
        assert len(texts) == 1


def test_another_wording_asks_the_same(truths):
    for truth in truths[:200]:
        for one, other in zip(*(fixed_questions(truth, WORDINGS[name]) for name in ("seen", "unseen")), strict=True):
            assert (one.type, one.choices, one.answer) == (other.type, other.choices, other.answer)
            assert one.question != other.question
    for type in set(FAMILY_OF):
        seen, unseen = (set(WORDINGS[name].questions[type]) for name in ("seen", "unseen"))
        assert len(seen) >= 2 and len(unseen) >= 2 and not seen & unseen


def test_a_type_that_is_not_among_the_six_is_asked_all_the_same(truths):
    for truth in truths[:40]:
        for type in FAMILY_OF:
            first, again = (make_question(truth, "closed", np.random.default_rng(i), type, SEEN) for i in (1, 2))
            assert first == again and first.type == type and 3 <= len(first.choices) == len(set(first.choices)) <= 4
            if type in ("order", "larger", "sides") and type not in truth.pairs:
                assert first.answer == MISSING


def test_the_families_are_equally_frequent(truths, asked):
    counts = collections.Counter(FAMILY_OF[question.type] for _, question in asked)
    assert set(counts) == set(FAMILIES) and all(abs(n / (FIXED * len(truths)) - 0.25) < 0.015 for n in counts.values())


# Truth


def test_answers_say_what_the_truth_says(asked):
    for truth, q in asked:
        assert q.answer in q.choices and 3 <= len(q.choices) == len(set(q.choices)) <= 4
        lesions = {lesion.kind: lesion for lesion in truth.lesions}
        named = [kind for kind in q.choices if kind in lesions]
        match q.type:
            case "plane" | "phase" | "section":
                assert q.answer == getattr(truth, q.type)
            case "organ":
                assert {o for o in q.choices if o in {le.organ for le in truth.lesions}} == {q.answer} - {NONE}
            case "abnormality":
                assert set(named) == {q.answer} - {NONE}
            case "location":
                places = {f"{le.place} {le.organ}" for le in truth.lesions if f" {le.kind}" in q.question}
                assert places & set(q.choices) == {q.answer} - {NONE}
            case "course":
                assert q.answer == (truth.drain.course if truth.drain else NO_DRAIN)
                assert set(q.choices) <= {*COURSES[truth.plane], NO_DRAIN} and ALONG[truth.plane] in q.question.lower()
            case "reach":
                assert q.answer == (truth.drain.reach if truth.drain else NO_DRAIN)
            case "count":
                assert q.answer == COUNTS[len(truth.lesions)] and len(q.choices) == 4


def test_comparisons_hold_of_the_lesions(asked):
    found = collections.Counter()
    for truth, q in asked:
        if FAMILY_OF[q.type] not in ("depth", "comparison") or q.type not in truth.pairs:
            continue
        a, b, answer = truth.pairs[q.type]
        assert answer == q.answer and a in q.question and b in q.question
        lesions = {lesion.kind: i for i, lesion in enumerate(truth.lesions)}
        found[q.type, answer == MISSING] += 1
        if answer == MISSING:
            assert not {a, b} <= lesions.keys()
            continue
        i, j = lesions[a], lesions[b]
        if q.type == "sides":
            assert answer == (SAME if truth.lesions[i].side == truth.lesions[j].side else OPPOSITE)
        elif q.type == "larger":
            ratio = truth.lesions[i].size_mm / truth.lesions[j].size_mm
            assert answer == (a if ratio > 1 else b) and max(ratio, 1 / ratio) >= LARGER - 0.02
        else:
            gap = truth.heights_mm[i] - truth.heights_mm[j]
            assert answer == (a if gap > 0 else b)
            assert abs(gap) > max(APART_MM, APART_SLICES * truth.spacing_mm[0]) - 0.5
    assert len(found) == 6


# Blind answers

KEYS = {
    "option": lambda q, option: option,
    "words": lambda q, option: (q.question, option),
    "options": lambda q, option: (tuple(sorted(q.choices)), option),
    "letter": lambda q, option: (q.question, q.choices.index(option)),
}


def table_accuracy(questions: list, key, smoothing: int = 8) -> float:
    """How often the likeliest option is true, by a count table of the other half of the questions."""
    half, hits = len(questions) // 2, 0
    for counted, judged in ((questions[:half], questions[half:]), (questions[half:], questions[:half])):
        shown, true = collections.Counter(), collections.Counter()
        for q in counted:
            shown.update(key(q, option) for option in q.choices)
            true[key(q, q.answer)] += 1

        def likely(q, option, shown=shown, true=true):
            return (true[key(q, option)] + smoothing / len(q.choices)) / (shown[key(q, option)] + smoothing)

        hits += sum(max(q.choices, key=lambda option, q=q: likely(q, option)) == q.answer for q in judged)
    return hits / len(questions)


@pytest.mark.parametrize(("volumes", "slack"), [(VOLUMES, 0.06), pytest.param(4000, 0.03, marks=pytest.mark.slow)])
def test_the_text_alone_answers_no_question(asked, volumes, slack):
    more = pairs_of(plan(seed).truth for seed in range(VOLUMES, volumes))
    by_type = collections.defaultdict(list)
    for _, question in [*asked, *more]:
        by_type[question.type].append(question)
    assert by_type.keys() == FAMILY_OF.keys()
    lines = []
    for type, questions in by_type.items():
        chance = np.mean([1 / len(q.choices) for q in questions])
        found = {name: table_accuracy(questions, key) for name, key in KEYS.items()}
        lines.append(
            f"{type}: {len(questions)}, chance {chance:.3f}, " + ", ".join(f"{n} {v:.3f}" for n, v in found.items())
        )
        error = np.sqrt(chance * (1 - chance) / len(questions))  # of a share of so many questions
        assert max(found.values()) <= chance + slack + error, lines[-1]
    print("\n".join(lines))  # shown by pytest -s


def test_letters_are_uniform(asked):
    letters = collections.Counter(question.letter for _, question in asked if len(question.choices) == 4)
    assert set(letters) == set(LETTERS)
    assert all(abs(n / letters.total() - 0.25) < 0.03 for n in letters.values())


# Reports


def test_parsing_a_report_gives_back_its_findings(truths):
    for truth in truths:
        text = report(truth)
        assert parse_findings(text) == truth.triples, text
        assert all(name in text.lower() for name in (truth.section, truth.plane, truth.phase))
        assert text.count("Small ") + text.count("Medium ") + text.count("Large ") == len(truth.lesions)
        if truth.drain:
            assert f"Drain runs {truth.drain.course} in {truth.drain.reach} of the slices." in text
        else:
            assert "No drain." in text


def test_a_report_names_the_larger_and_the_higher_lesion(truths):
    seen = collections.Counter()
    for truth in truths:
        text, lesions = report(truth), truth.lesions
        if len(lesions) < 2:
            assert "arge" not in text.replace("Large ", "") and "high" not in text
            continue
        sizes, heights = [le.size_mm for le in lesions], truth.heights_mm
        word = "Larger" if len(lesions) == 2 else "Largest"
        first, second = sorted(sizes)[::-1][:2]
        if first / second > LARGER:
            assert f"{word} in the {lesions[int(np.argmax(sizes))].organ}," in text
        else:
            assert "None larger," in text
        highest = lesions[int(np.argmax(heights))].organ
        seen[f"igher in the {highest}." in text or f"ighest in the {highest}." in text or "none higher." in text] += 1
    assert set(seen) == {True}


def test_texts_are_as_short_as_they_are_said_to_be(truths, tokenizer):
    reports = [len(tokenizer.encode(report(truth))) for truth in truths]
    assert max(reports) <= 75
    longest = 0
    for truth in truths[:250]:
        for wording in WORDINGS.values():
            told = [
                *fixed_questions(truth, wording),
                make_question(truth, "report", np.random.default_rng(0), None, wording),
            ]
            longest = max(longest, *(len(prompts.encode(tokenizer, q.prompt, q.target).tokens) for q in told))
    assert longest <= TEXT_LENGTH


# Labels, and the examination


def test_auxiliary_labels_say_what_the_truth_says(truths):
    assert len(set(AUX_NAMES)) == len(AUX_NAMES)
    for truth in truths[:200]:
        on = {name for name, value in zip(AUX_NAMES, aux_targets(truth), strict=True) if value}
        expected = {f"plane:{truth.plane}", f"phase:{truth.phase}", f"section:{truth.section}"}
        expected |= {f"lesion:{lesion.kind}" for lesion in truth.lesions}
        expected |= {f"place:{lesion.kind}:{word}" for lesion in truth.lesions for word in lesion.place.split()}
        if truth.drain:
            expected |= {f"course:{truth.drain.course}", f"reach:{truth.drain.reach}"}
        assert on == expected


def test_the_examination_asks_the_fixed_questions_of_all_families(tmp_path):
    source = PatientSource(tmp_path, "test", 24, grid=(8, 24, 24))
    assert source.aux(0).shape == (len(AUX_NAMES),) == source.aux_cells(0, (4, 8, 8)).shape[3:]
    assert examination.types_of(source, "closed") == [] and examination.kinds_of(source, ("report", "vqa"))
    questions = examination.questions(source, "closed", 24, 1, [])
    assert {FAMILY_OF[question.type] for _, question in questions} == set(FAMILIES)
    for index, question in questions:
        assert question in fixed_questions(source.truths[index], SEEN)


@pytest.mark.slow
def test_a_tiny_training_and_its_examination(tiny_folder):
    flags = ("--config.data.name=patients", f"--config.data.text_length={TEXT_LENGTH}")
    run = tiny_run.trained(tiny_folder, "stage1.py", "patients", *flags)
    metrics = tiny_run.metrics(run)
    assert 0 <= metrics["closed/ranked_macro_families"] <= 1 and metrics["report/finding_f1"] is not None
