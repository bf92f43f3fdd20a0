"""Ways of asking that training never holds and that make a task hard to tell: a test of the task router alone.

Each way is a `Wording`, so that the same volumes, answers and options are asked about in it.
"""

import re
import zlib
from collections.abc import Iterable

import numpy as np

from tghmoe_jax.drawn.phantom_wordings import SEEN, Wording

# What a clinician writes above a request; some of it names findings or a report, as real indications do.
INDICATIONS = (
    "Clinical indication: weight loss and back pain.",
    "Indication: evaluate for metastasis.",
    "History: fall from a ladder, rule out fracture.",
    "65-year-old woman, fever and flank pain, suspected stone.",
    "Known liver mass, follow-up. Prior report not available.",
    "Shortness of breath. Please describe any effusion.",
)
EXCHANGED = Wording(  # a report asked as a question, and a question asked in the words of a report
    questions={
        "plane": ("Report the plane of this CT.", "Describe the plane of the images.", "For the report: which plane?"),
        "phase": ("Report the contrast phase.", "Describe the contrast phase.", "For the report: which phase?"),
        "organ": ("Report the abnormal organ.", "Summarise which organ is ill.", "For the report: which organ?"),
        "abnormality": ("Report the lesion.", "Give the finding of this CT.", "For the report: which lesion?"),
        "location": ("Report the place of the {lesion}.", "Write where the {lesion} is.",
                     "For the report: where is the {lesion}?"),
    },
    requests=(
        "What does this CT show?", "What are the findings?", "What do you see in this scan?",
        "Is anything abnormal in this scan, and how is the rest?", "How would a radiologist sum this up?",
        "Which findings would you write down?",
    ),
)  # fmt: skip
OTHER_LANGUAGE = Wording(
    questions={
        "plane": ("In welcher Ebene liegt diese CT?", "¿En qué plano está esta TC?", "Quel est le plan de coupe ?"),
        "phase": ("Welche Kontrastphase ist das?", "¿Qué fase de contraste es?", "Quelle est la phase de contraste ?"),
        "organ": ("Welches Organ ist krank?", "¿Qué órgano está enfermo?", "Quel organe est malade ?"),
        "abnormality": ("Welche Läsion ist zu sehen?", "¿Qué lesión se ve?", "Quelle lésion voit-on ?"),
        "location": ("Wo liegt die Läsion ({lesion})?", "¿Dónde está la lesión ({lesion})?",
                     "Où est la lésion ({lesion}) ?"),
    },
    requests=(
        "Schreibe einen Befund zu dieser CT.", "Beschreibe diese Untersuchung.", "Escribe un informe de esta TC.",
        "Describe los hallazgos.", "Rédige le compte rendu de ce scanner.", "Décris les images.",
    ),
)  # fmt: skip


def _each(change) -> Wording:
    """The wordings of training, each changed by `change(text)` into one or several."""

    def changed(texts: Iterable[str]) -> tuple[str, ...]:
        return tuple(new for text in texts for new in change(text))

    return Wording({type: changed(texts) for type, texts in SEEN.questions.items()}, changed(SEEN.requests))


def mistyped(text: str, mistakes: int = 2) -> str:
    """`text` with letters exchanged, left out or doubled in different words, always the same ones.

    Words of fewer than four letters and `{lesion}` stay as they are.
    """
    rng = np.random.default_rng(zlib.crc32(text.encode()))
    words = [m.span() for m in re.finditer(r"(?<![\w{])[A-Za-z]{4,}(?![\w}])", text)]
    chosen = rng.permutation(len(words))[:mistakes]
    for start, end in sorted((words[i] for i in chosen), reverse=True):
        at = int(rng.integers(start + 1, end - 1))
        a, b = text[at], text[at + 1]
        text = text[:at] + (b + a, a, a + a + b)[rng.integers(3)] + text[at + 2 :]
    return text


ADVERSARIAL: dict[str, Wording] = {
    "indication": _each(lambda text: (f"{indication} {text}" for indication in INDICATIONS)),
    "exchanged": EXCHANGED,
    # CT-RATE's task tags, after the request as its authors write them.
    "tags": Wording(
        {type: tuple(f"{text}<multiple_choice>" for text in texts) for type, texts in SEEN.questions.items()},
        tuple(f"{text}<report_generation>" for text in SEEN.requests),
    ),
    "language": OTHER_LANGUAGE,
    "typos": _each(lambda text: (mistyped(text),)),
}
