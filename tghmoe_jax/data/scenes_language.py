"""Items about text alone, asked beside a random picture: option letters, reading, repeating and shortening reports.

A tiny language part learns the skill "option text -> letter" and the words of CT reports here, before it meets any
CT.
"""

import dataclasses

import numpy as np

from tghmoe_jax.data.phantom import plan
from tghmoe_jax.data.phantom_report import report, where
from tghmoe_jax.data.phantom_text import ANSWER_PHRASES, NONE, QUESTIONS
from tghmoe_jax.data.samples import LETTERS, Question
from tghmoe_jax.data.scenes_draw import MARKS, SHAPES, TEXTURES
from tghmoe_jax.data.scenes_layout import COLOURS, COUNTS, GREYS, PLACES, SIZES
from tghmoe_jax.data.scenes_text import pick, shuffled

_TRUTH_SEEDS = 10**12  # far from the seeds of any phantom volume

SCENE_PHRASES = tuple(
    dict.fromkeys((*SHAPES, *MARKS, *TEXTURES, *COLOURS, *COUNTS, *GREYS, *PLACES, *SIZES, "nothing", "none"))
)
CT_WORDS = tuple(
    """
    lung liver spleen kidney aorta heart bladder bone rib spine pancreas colon stomach gallbladder adrenal thyroid
    trachea bronchus oesophagus uterus prostate ovary pleura muscle vertebra pelvis chest abdomen brain vein artery
    lymph
    """.split()
)
CT_THINGS = tuple(
    """
    nodule mass cyst stone fracture effusion lesion calcification abscess tumour metastasis thrombus aneurysm hernia
    oedema consolidation emphysema atelectasis haematoma dilatation thickening stenosis collection polyp infarct
    ascites
    """.split()
)
CT_ADJECTIVES = tuple(
    """
    left right upper lower anterior posterior medial lateral central peripheral small large diffuse focal solid
    calcified bilateral acute chronic mild severe normal dense round irregular
    """.split()
)
PHASE_PHRASES = (
    "non-contrast phase",
    "arterial phase",
    "portal venous phase",
    "delayed phase",
    "axial plane",
    "coronal plane",
    "sagittal plane",
    "oblique plane",
    "lung window",
    "bone window",
)
COMMON_PHRASES = (*SCENE_PHRASES, *ANSWER_PHRASES, *PHASE_PHRASES)
WORDS = tuple(sorted({phrase for phrase in COMMON_PHRASES if " " not in phrase}))
EASY = 0.5  # share of closed training items with fewer options: they show first what a letter is for

BINDING: dict[str, tuple[str, ...]] = {
    "seen": (
        "The answer is {x}. Which letter?",
        "Which letter is {x}?",
        "It is {x}. Which option is this?",
        "Which option is {x}?",
        "Name the letter of {x}.",
        "What is the letter of {x}?",
        "This shows {x}. Which letter?",
        "The finding is {x}.",
        "Answer: {x}. Which option is it?",
        "Choose {x}.",
    ),
    "unseen": ("Select the choice that says {x}.", "Find {x} in the list."),
}
READING: dict[str, tuple[str, ...]] = {
    "seen": ("Text: {t} Question: {q}", "Report: {t} Question: {q}", "{t} {q}", "{q} Text: {t}"),
    "unseen": ("Given that {t} {q}",),
}
REPEATING: dict[str, tuple[str, ...]] = {
    "seen": (
        "Report: {t} Write the report again.",
        "Repeat this report: {t}",
        "Please write this again: {t}",
        "Say the report again. Report: {t}",
    ),
    "unseen": ("Copy the following: {t}",),
}
SHORTENING: dict[str, tuple[str, ...]] = {
    "seen": (
        "Report: {t} Give the abnormal findings.",
        "Report: {t} Which lesions are reported?",
        "Write the lesions of this report: {t}",
    ),
    "unseen": ("Shorten: {t}",),
}


def binding(rng: np.random.Generator, wording: str, easy: bool = False) -> Question:
    """A closed question that states its answer: what is asked is the letter. `easy`: two to four single words."""
    phrases = _phrases(rng)
    if easy:
        words = [WORDS[i] for i in rng.choice(len(WORDS), len(LETTERS), replace=False)]
        phrases = words[: rng.integers(2, len(LETTERS) + 1)]
    answer, *others = phrases
    text = pick(rng, BINDING[wording]).format(x=answer)
    return Question("vqa", "closed", "binding", text, shuffled(rng, [answer, *others]), answer)


def fewer_choices(question: Question, rng: np.random.Generator) -> Question:
    """The same closed question with two to four of its options, the answer among them, in their order."""
    others = [choice for choice in question.choices if choice != question.answer]
    kept = {question.answer, *(others[i] for i in rng.permutation(len(others))[: rng.integers(1, len(LETTERS))])}
    return dataclasses.replace(question, choices=tuple(c for c in question.choices if c in kept))


def _phrases(rng: np.random.Generator) -> list[str]:
    """Distinct phrases, as many as there are letters: often alike, so that every word counts."""
    form = rng.integers(5)
    if form == 0:
        pool = SCENE_PHRASES
    elif form <= 2:
        pool = ANSWER_PHRASES
        if rng.random() < 0.5:  # phrases that share a word
            word = pick(rng, pick(rng, pool).split())
            alike = [p for p in pool if word in p.split()]
            pool = alike if len(alike) >= len(LETTERS) else pool
    elif form == 3:
        pool = COMMON_PHRASES
    else:
        found: dict[str, None] = {}
        noun, adjective = pick(rng, (*CT_WORDS, *CT_THINGS, *SHAPES)), pick(rng, (*CT_ADJECTIVES, *COLOURS))
        shared = rng.integers(3)  # share the noun, the adjective, or nothing
        while len(found) < len(LETTERS):
            a = adjective if shared == 1 else pick(rng, (*CT_ADJECTIVES, *COLOURS))
            n = noun if shared == 0 else pick(rng, (*CT_WORDS, *CT_THINGS, *SHAPES))
            found[f"{a} {n}" if rng.random() < 0.8 or shared < 2 else n] = None
        return list(found)
    return [pool[i] for i in rng.choice(len(pool), len(LETTERS), replace=False)]


def reading(rng: np.random.Generator, wording: str) -> Question:
    """An open question whose answer stands in the CT sentences it quotes."""
    truth, sentences = _report(rng)
    type = pick(rng, ("plane", "phase", "location", "location", "organ", "abnormality"))
    quoted = [sentences[0]] if type in ("plane", "phase") else sentences[:3]
    lesions = truth.lesions
    asked = pick(rng, QUESTIONS[type][wording])
    if type in ("plane", "phase"):
        answer = getattr(truth, type)
        quoted = sentences[: 1 + rng.integers(2)]
    elif not lesions:
        answer, asked = (
            NONE,
            asked.format(lesion=pick(rng, ("lung nodule", "liver mass", "kidney cyst", "rib fracture"))),
        )
    else:
        lesion = lesions[rng.integers(len(lesions))]
        quoted = [s for s in sentences[1:] if lesion.lesion in s and where(lesion) in s]
        if type == "location" and len(sentences) > 2:
            quoted = sentences[1:3] if quoted[0] in sentences[1:3] else quoted
        answer = {"location": where(lesion), "organ": lesion.organ, "abnormality": lesion.kind}[type]
        asked = asked.format(lesion=lesion.kind)
    text = pick(rng, READING[wording]).format(t=" ".join(quoted), q=asked)
    return Question("vqa", "open", "reading", text, (), answer)


def repeating(rng: np.random.Generator, wording: str) -> Question:
    """A report to be said again, or cut down to its abnormal findings."""
    truth, sentences = _report(rng)
    sentences = sentences[: 2 + len(truth.lesions)]
    if rng.random() < 0.5:
        start = rng.integers(max(1, len(sentences) - 1))
        text = " ".join(sentences[start : start + 2])
        return Question("report", "report", "repeat", pick(rng, REPEATING[wording]).format(t=text), (), text)
    abnormal = sentences[1 : 1 + len(truth.lesions)] or ["No abnormality is seen in this scan."]
    rest = [s for s in sentences if s not in abnormal][:2]
    quoted = " ".join([*rest[:1], *abnormal[:2], *rest[1:]][:3])
    return Question(
        "report", "report", "shorten", pick(rng, SHORTENING[wording]).format(t=quoted), (), " ".join(abnormal[:2])
    )


def _report(rng: np.random.Generator):
    """A random truth and the sentences of a report on it: technique, findings, then what is normal."""
    truth = plan(_TRUTH_SEEDS + int(rng.integers(10**9))).truth
    return truth, [s if s.endswith(".") else s + "." for s in report(truth, rng).split(". ")]
