"""What is asked and reported about a drawn patient: twelve types of questions in four families, and one report.

The texts of a volume are fixed: its seed gives it one report and six questions. What keeps a question from being
answerable without the volume: of the options shown, each is true equally often, given the words of the question
(`patient_pairs` has the rule for two lesions), and the letters are shuffled.
"""

import functools

import numpy as np

from tghmoe_jax.drawn.chance import pick, shuffled
from tghmoe_jax.drawn.patient_drain import ALONG, COURSE_NAMES, COURSES, REACHES
from tghmoe_jax.drawn.patient_pairs import (
    APART_MM,
    APART_SLICES,
    LARGER,
    MISSING,
    OPPOSITE,
    PAIR_TYPES,
    SAME,
    phrases_of,
)
from tghmoe_jax.drawn.patient_places import ORGANS
from tghmoe_jax.drawn.patients import PatientTruth
from tghmoe_jax.drawn.phantom import PLANES
from tghmoe_jax.drawn.phantom_anatomy import PHASES
from tghmoe_jax.drawn.phantom_lesions import KINDS, SECTIONS, Lesion
from tghmoe_jax.drawn.phantom_report import where
from tghmoe_jax.drawn.phantom_text import AUX_NAMES as PHANTOM_AUX
from tghmoe_jax.drawn.phantom_text import NONE
from tghmoe_jax.drawn.phantom_text import aux_targets as phantom_aux
from tghmoe_jax.drawn.phantom_wordings import SEEN, UNSEEN, Wording
from tghmoe_jax.drawn.wordings import TEXTS
from tghmoe_jax.samples.questions import FAMILIES, Question

NO_DRAIN = "no drain"
COUNTS = ("none", "one", "two", "three")
SMALL_MM, LARGE_MM = 15.0, 30.0  # below and above are the sizes that a report names small and large
FIXED = 6  # questions of a volume
# How often a volume is asked for its number of lesions, and for the sides of two where it can be; those whose size can
# be compared always are. So one question in four compares lesions, and the number is asked of all volumes alike.
ASKED = {"larger": 1.0, "count": 0.8, "sides": 0.8}

AUX_NAMES = (*PHANTOM_AUX, *(f"course:{name}" for name in COURSE_NAMES), *(f"reach:{name}" for name in REACHES))

_REPORT = TEXTS["patients"]["report"]
_EVERY_PLACE = {kind.organ: tuple(kind.places) for kind in KINDS}


def aux_targets(truth: PatientTruth) -> np.ndarray:
    """float32 (A,), 1 where the label of AUX_NAMES holds."""
    labels = np.concatenate([phantom_aux(truth), np.zeros(len(AUX_NAMES) - len(PHANTOM_AUX), np.float32)])
    if truth.drain:
        labels[[AUX_NAMES.index(f"course:{truth.drain.course}"), AUX_NAMES.index(f"reach:{truth.drain.reach}")]] = 1
    return labels


def make_question(
    truth: PatientTruth, kind: str, rng: np.random.Generator, type: str | None, wording: Wording
) -> Question:
    """One of the volume's fixed requests. `rng` chooses among its six questions, or among those of `type`.

    A `type` that is not among the six is asked all the same, in a text that is as fixed; a question about two lesions
    then names one that is missing. Open questions are the closed ones without their options.
    """
    if kind == "report":
        request = pick(_stream(truth, 0), wording.requests)
        return Question("report", "report", "report", request, (), wording.report(truth, rng))
    known = [question for question in fixed_questions(truth, wording) if type in (None, question.type)]
    question = pick(rng, known) if known else _ask(truth, type, _stream(truth, 1), wording)
    return question if kind == "closed" else question.without_choices()


def fixed_questions(truth: PatientTruth, wording: Wording) -> tuple[Question, ...]:
    """The six closed questions of a volume, whatever the wording."""
    rng = _stream(truth, 2)
    types = [type for type in ("larger", "count", "sides")
             if (type == "count" or type in truth.pairs) & (rng.random() < ASKED[type])]  # fmt: skip
    # The others go round the other families.
    _, _, _, fair = _asked_place(truth)
    waiting = {"global": list(FAMILIES["global"]), "local": ["organ", "abnormality", *["location"] * fair],
               "depth": ["course", "reach"]}  # fmt: skip
    waiting = {family: list(shuffled(rng, types)) for family, types in waiting.items()}
    if "order" in truth.pairs:
        waiting["depth"].insert(0, "order")
    turns = shuffled(rng, list(waiting))
    while len(types) < FIXED:
        for family in turns[: FIXED - len(types)]:
            if waiting[family]:
                types.append(waiting[family].pop(0))
    return tuple(_ask(truth, type, _stream(truth, 3, number), wording) for number, type in enumerate(types))


def _stream(truth: PatientTruth, *path: int) -> np.random.Generator:
    return np.random.default_rng((20311, truth.seed, *path))


def _ask(truth: PatientTruth, type: str, rng: np.random.Generator, wording: Wording) -> Question:
    """A closed question of a type."""
    names, answer, options = _FACTS[type](truth, rng)
    options = shuffled(rng, list(options))  # before a wording is chosen, of which there may be more or fewer
    return Question("vqa", "closed", type, pick(rng, wording.questions[type]).format(**names), options, answer)


# Each returns what a wording names, the answer and the options.


def _section(truth, rng):
    return {}, truth.section, SECTIONS


def _plane(truth, rng):
    return {}, truth.plane, PLANES


def _phase(truth, rng):
    return {}, truth.phase, PHASES


def _organ(truth: PatientTruth, rng):
    lesion, well = _ill_and_well(truth, rng)
    return {}, *_among(lesion and lesion.organ, well)


def _abnormality(truth: PatientTruth, rng):
    lesion, well = _ill_and_well(truth, rng)
    return {}, *_among(lesion and lesion.kind, [pick(rng, phrases_of(organ)) for organ in well])


def _ill_and_well(truth: PatientTruth, rng) -> tuple[Lesion | None, list[str]]:
    """One of the lesions, and the organs without a lesion, those in view first: they are ill as often as its own."""
    lesion = pick(rng, truth.lesions) if truth.lesions else None
    ill = {lesion.organ for lesion in truth.lesions}
    seen = shuffled(rng, [organ for organ in truth.places if organ not in ill])
    return lesion, [*seen, *shuffled(rng, [organ for organ in ORGANS if organ not in truth.places])]


def _among(answer: str | None, others: list[str]) -> tuple[str, list[str]]:
    """The answer and up to four options. `none` is always shown, and true in the quarter of healthy volumes."""
    return (answer, [answer, NONE, *others[:2]]) if answer else (NONE, [NONE, *others[:3]])


def _asked_place(truth: PatientTruth) -> tuple[str, str, str | None, bool]:
    """(organ, kind, place or None) of a lesion, or of one that a healthy volume does not have, and whether its place is
    a question whose options are true equally often.

    It is where the scan shows three or four places of the organ. Where it shows two, there are three options, and
    `none` is to be true in a third: a third of the lesions is passed over. One place leaves nothing to ask.
    """
    rng = _stream(truth, 5)
    if truth.lesions:
        lesion = pick(rng, truth.lesions)
        organ, kind, place = lesion.organ, lesion.kind, where(lesion)
    else:
        organ = pick(rng, list(truth.places))
        kind, place = pick(rng, phrases_of(organ)), None
    shown, passed = len(truth.places[organ]), rng.random() < 1 / 3
    return organ, kind, place, shown > 2 or (shown == 2 and not (place and passed))


def _location(truth: PatientTruth, rng):
    organ, kind, place, fair = _asked_place(truth)
    seen = truth.places[organ]
    others = shuffled(rng, list(seen))
    if not fair:
        others += shuffled(rng, [name for name in _EVERY_PLACE[organ] if name not in seen])
    return {"lesion": kind}, *_among(place, [at for name in others if (at := f"{name} {organ}") != place])


def _course(truth: PatientTruth, rng):
    """Four ways and no drain are equally frequent; any four of them are shown."""
    way = ALONG[truth.plane]
    answer = truth.drain.course if truth.drain else NO_DRAIN
    return {"way": way, "going": f"Going {way}"}, answer, _four((*COURSES[truth.plane], NO_DRAIN), answer, rng)


def _reach(truth: PatientTruth, rng):
    answer = truth.drain.reach if truth.drain else NO_DRAIN
    return {}, answer, _four((*REACHES, NO_DRAIN), answer, rng)


def _four(names, answer: str, rng) -> list[str]:
    return [answer, *shuffled(rng, [name for name in names if name != answer])[:3]]


def _count(truth: PatientTruth, rng):
    return {}, COUNTS[len(truth.lesions)], COUNTS


def _pair(type: str, truth: PatientTruth, rng):
    """Two lesions of `truth.pairs`, or else one that is missing and another."""
    if type in truth.pairs:
        a, b, answer = truth.pairs[type]
    else:
        ill = {lesion.organ for lesion in truth.lesions}
        well = [pick(rng, phrases_of(organ)) for organ in shuffled(rng, [o for o in truth.places if o not in ill])]
        there = [pick(rng, truth.lesions).kind] if truth.lesions else []
        a, b = shuffled(rng, [*there, *well][:2])
        answer = MISSING
    return {"a": a, "b": b}, answer, (SAME, OPPOSITE, MISSING) if type == "sides" else (a, b, MISSING)


_FACTS = {
    "plane": _plane,
    "phase": _phase,
    "section": _section,
    "organ": _organ,
    "abnormality": _abnormality,
    "location": _location,
    "course": _course,
    "reach": _reach,
    "count": _count,
} | {type: functools.partial(_pair, type) for type in PAIR_TYPES}


def report(truth: PatientTruth, rng: np.random.Generator | None = None) -> str:
    """All facts of a volume in one wording; `rng` changes nothing.

    `parse_findings(report(truth)) == truth.triples` always holds.
    """
    said = [_REPORT["technique"].format(plane=truth.plane, phase=truth.phase, section=truth.section)]
    for lesion in truth.lesions:
        said.append(_REPORT["finding"].format(size=_size(lesion.size_mm), lesion=lesion.lesion, where=where(lesion)))
    if len(truth.lesions) > 1:
        said.append(f"{_most(truth, 'larger')}, {_most(truth, 'higher')}")
    if not truth.lesions:
        said.append(_REPORT["healthy"])
    drain = truth.drain
    said.append(_REPORT["drain"].format(course=drain.course, reach=drain.reach) if drain else _REPORT["no_drain"])
    ill = {lesion.organ for lesion in truth.lesions}
    well = [organ for organ in truth.places if organ not in ill]
    rng = _stream(truth, 4)
    said.append(_REPORT["negative"].format(phrase=pick(rng, phrases_of(pick(rng, well)))))
    return " ".join(sentence[0].upper() + sentence[1:] for sentence in said)


def _size(mm: float) -> str:
    return "small" if mm < SMALL_MM else "large" if mm > LARGE_MM else "medium"


def _most(truth: PatientTruth, word: str) -> str:
    """Which lesion is larger or higher than all others by what a question asks for."""
    values = truth.heights_mm if word == "higher" else [np.log(lesion.size_mm) for lesion in truth.lesions]
    gap = max(APART_MM, APART_SLICES * truth.spacing_mm[0]) if word == "higher" else np.log(LARGER)
    first, second = sorted(values)[::-1][:2]
    if first - second <= gap:
        return _REPORT["level" if word == "higher" else "alike"]
    lesion: Lesion = truth.lesions[int(np.argmax(values))]
    most = word if len(values) == 2 else {"higher": "highest", "larger": "largest"}[word]
    return _REPORT[most].format(organ=lesion.organ)


def _wording(way: Wording, name: str) -> Wording:
    return Wording({**way.questions, **TEXTS["patients"][name]}, way.requests, report)


WORDINGS = {"seen": _wording(SEEN, "seen"), "unseen": _wording(UNSEEN, "unseen")}
