"""Closed questions that state their answer and ask for its letter; the picture or volume does not matter.

A tiny language part learns the skill "option text -> letter" and the words of CT answers here, before it meets any CT.
"""

import dataclasses

import numpy as np

from tghmoe_jax.drawn.chance import pick, shuffled
from tghmoe_jax.drawn.phantom import PLANES
from tghmoe_jax.drawn.phantom_anatomy import PHASES
from tghmoe_jax.drawn.phantom_text import ANSWER_PHRASES
from tghmoe_jax.drawn.scenes_draw import MARKS, SHAPES, TEXTURES
from tghmoe_jax.drawn.scenes_layout import COLOURS, COUNTS, GREYS, PLACES, SIDES, SIZES
from tghmoe_jax.drawn.wordings import TEXTS
from tghmoe_jax.samples.questions import LETTERS, Question

SCENE_PHRASES = tuple(
    dict.fromkeys((*SHAPES, *MARKS, *TEXTURES, *COLOURS, *COUNTS, *GREYS, *PLACES, *SIDES, *SIZES, "nothing", "none"))
)
CT_WORDS, CT_THINGS, CT_ADJECTIVES = (tuple(words.split()) for words in TEXTS["binding_words"].values())
PHASE_PHRASES = (
    *(f"{phase} phase" for phase in PHASES),
    *(f"{plane} plane" for plane in PLANES),
    *("lung window", "bone window"),
)
COMMON_PHRASES = tuple(dict.fromkeys((*SCENE_PHRASES, *ANSWER_PHRASES, *PHASE_PHRASES)))
WORDS = tuple(sorted({phrase for phrase in COMMON_PHRASES if " " not in phrase}))
EASY = 0.5  # share of training items with fewer options or words: they show first what a letter is for

REQUESTS: dict[str, tuple[str, ...]] = TEXTS["binding"]


def ask(rng: np.random.Generator, wording: str = "seen", easy: float = EASY) -> Question:
    """A closed question that states its answer and asks for its letter.

    The share `easy` has two to four single words as options, the rest four phrases.
    """
    phrases = _phrases(rng)
    if rng.random() < easy:
        words = [WORDS[i] for i in rng.choice(len(WORDS), len(LETTERS), replace=False)]
        phrases = words[: rng.integers(2, len(LETTERS) + 1)]
    answer, *others = phrases
    text = pick(rng, REQUESTS[wording]).format(x=answer)
    return Question("vqa", "closed", "binding", text, shuffled(rng, [answer, *others]), answer)


def fewer_choices(question: Question, rng: np.random.Generator) -> Question:
    """The same closed question with two to four of its options in their order; the answer is one of them."""
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
