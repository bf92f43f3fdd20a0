"""Phantom reports in words, and the findings a report states.

A finding is a triple (lesion, organ, side). `parse_findings(report(truth, rng)) == truth.triples` always holds.
"""

import re
from typing import NamedTuple

import numpy as np

from tghmoe_jax.drawn.chance import pick, shuffled
from tghmoe_jax.drawn.phantom import Truth
from tghmoe_jax.drawn.phantom_lesions import KINDS, ORGANS_BY_SECTION, Lesion, kinds_of
from tghmoe_jax.drawn.wordings import TEXTS


class Sentences(NamedTuple):
    """Templates of a report's sentences. `where` is a place with its organ, as in `right upper lung`."""

    technique: tuple[str, ...]  # {plane} {phase} {section}
    finding: tuple[str, ...]  # {a_lesion} {where}
    negative: tuple[str, ...]  # {organ} {other} {phrase} {other_phrase}
    healthy: tuple[str, ...]  # {section}


FIRST = Sentences(**TEXTS["seen"]["sentences"])


def where(lesion: Lesion) -> str:
    """The place as an answer names it: `right upper lung`."""
    return f"{lesion.place} {lesion.organ}"


def report(truth: Truth, rng: np.random.Generator, sentences: Sentences = FIRST) -> str:
    """A report of 20 to 50 words: technique, one sentence for each finding, then one or two negative statements."""
    written = [pick(rng, sentences.technique).format(plane=truth.plane, phase=truth.phase, section=truth.section)]
    for i in rng.permutation(len(truth.lesions)):
        lesion = truth.lesions[i]
        article = "an" if lesion.lesion[0] in "aeiou" else "a"
        written.append(pick(rng, sentences.finding).format(a_lesion=f"{article} {lesion.lesion}", where=where(lesion)))
    if not truth.lesions:
        written.append(pick(rng, sentences.healthy).format(section=truth.section))

    well = well_organs(truth, rng)
    wanted = max(1, 2 - len(truth.lesions) // 2)
    for organ, other in list(zip(well[::2], well[1::2], strict=False))[:wanted]:
        sentence = pick(rng, sentences.negative)
        phrase, other_phrase = (phrase_of(truth.section, o, rng) for o in (organ, other))
        written.append(sentence.format(organ=organ, other=other, phrase=phrase, other_phrase=other_phrase))
    return " ".join(s[0].upper() + s[1:] for s in written)


def phrase_of(section: str, organ: str, rng: np.random.Generator) -> str:
    """What a lesion of an organ is called, one of its kinds."""
    return pick(rng, kinds_of(section, organ)).phrase


def well_organs(truth: Truth, rng: np.random.Generator) -> tuple[str, ...]:
    """The section's organs without a lesion, in random order."""
    ill = {lesion.organ for lesion in truth.lesions}
    return shuffled(rng, [o for o in ORGANS_BY_SECTION[truth.section] if o not in ill])


# The parser reads any text, a model's too: only what is plainly asserted counts.
ORGANS_OF: dict[str, frozenset[str]] = {
    lesion: frozenset(k.organ for k in KINDS if k.lesion == lesion) for lesion in {k.lesion for k in KINDS}
}
FIXED_SIDE = {k.organ: "left" for k in KINDS if k.side_is_fixed}
_FORMS = {
    "lung": "lung lungs pulmonary",
    "pleura": "pleura pleural",
    "rib": "rib ribs",
    "breast": "breast breasts",
    "heart": "heart cardiac",
    "liver": "liver hepatic",
    "spleen": "spleen splenic",
    "kidney": "kidney kidneys renal",
    "colon": "colon colonic",
    "muscle": "muscle muscles",
    "bladder": "bladder",
    "ovary": "ovary ovaries ovarian",
    "bone": "bone bones",
    "artery": "artery arteries",
}
_ORGAN_OF_WORD = {form: organ for organ, forms in _FORMS.items() for form in forms.split()}
_LESION_OF_WORD = {w: lesion for lesion in ORGANS_OF for w in (lesion, lesion + "s")} | {
    "metastases": "metastasis",
    "abscesses": "abscess",
}
_SIDES = {"right": ("right",), "left": ("left",), "bilateral": ("right", "left"), "both": ("right", "left")}
_SENTENCE = re.compile(r"(?<=[!?;\n])|(?<=\.)(?!\d)")
_CLAUSE = re.compile(r"\b(?:but|however|although|though|whereas|while|except|yet)\b|\band (?=there (?:is|are)\b)")
_JOINT = re.compile(r",|\band\b|\bor\b|\bplus\b|\bas well as\b")
# What follows these words is denied or left open ...
_DENIES_AFTER = re.compile(
    r"\b(?:no|without|free of|free from|clear of|nor|neither|denies|lacks?|exclud\w*|rul\w+ out|rather than|instead of"
    r"|possibl[ey]|probabl[ey]|may|might|could|suspected"
    r"|suspicious for|evaluate for|history of|prior|previous|if|any|question of)\b"
)
# ... and a clause holding one of these asserts nothing.
_DENIES_ALL = re.compile(
    r"\b(?:not|never|cannot|can't|isn't|aren't|wasn't|absent|absence|excluded|ruled out|resolved|unlikely|none|nothing"
    r"|normal|unremarkable|doubtful|questionable|removed|disappeared|gone"
    r"|negative)\b|:\s*no\b"
)


def parse_findings(text: str) -> frozenset[tuple[str, str, str]]:
    """The (lesion, organ, side) triples a text asserts; the side is empty where an assertion names none.

    Negations, questions and guesses assert nothing, and neither does a lesion without an organ that can have it.
    """
    found = set()
    for sentence in _SENTENCE.split(text.lower()):
        if sentence.rstrip().endswith("?"):
            continue
        for clause in _CLAUSE.split(sentence):
            if _DENIES_ALL.search(clause):
                # "normal liver, stone in the left kidney" still asserts the stone: deny part by part.
                parts = [p for p in re.split(r",|\bwith\b", clause) if not _DENIES_ALL.search(p)]
                if re.search(r"\b(?:not|never|cannot|none|excluded|ruled out)\b", clause):
                    parts = []
            else:
                parts = [clause]
            for part in parts:
                denial = _DENIES_AFTER.search(part)
                found.update(_assertions(part[: denial.start()] if denial else part))
    return frozenset(found)


def _assertions(clause: str) -> set[tuple[str, str, str]]:
    """Triples of a clause that denies nothing, one lesion word at a time."""
    groups: list[list[str]] = []
    for piece in _JOINT.split(clause):
        words = re.findall(r"[a-z]+", piece)
        has_lesion = any(w in _LESION_OF_WORD for w in words)
        if groups and not (has_lesion and any(w in _LESION_OF_WORD for w in groups[-1])):
            groups[-1].extend(words)
        else:
            groups.append(words)
    found = set()
    waiting: list[str] = []  # "a cyst and a stone in the left kidney": the cyst's organ is named in the next group
    for words in groups:
        lesions = waiting + [_LESION_OF_WORD[w] for w in words if w in _LESION_OF_WORD]
        waiting = []
        for lesion in lesions:
            sites = [(i, _ORGAN_OF_WORD[w]) for i, w in enumerate(words) if _ORGAN_OF_WORD.get(w) in ORGANS_OF[lesion]]
            if not sites:
                if not any(w in _ORGAN_OF_WORD for w in words):
                    waiting.append(lesion)
                continue
            at, organ = sites[0]
            sides = sorted((abs(at - i) + (i > at) * 0.5, w) for i, w in enumerate(words) if w in _SIDES)
            if organ in FIXED_SIDE:
                found.add((lesion, organ, FIXED_SIDE[organ]))
            else:
                for side in _SIDES[sides[0][1]] if sides else ("",):
                    found.add((lesion, organ, side))
    return found
