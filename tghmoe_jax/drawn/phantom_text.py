"""Questions about a phantom volume in M3D's five types, report requests, and the auxiliary labels.

What keeps a question from being answerable without the volume: the four options are drawn so that, among the options
shown, each is true equally often (given the question's words and the body section), and the letters are shuffled.
"""

import numpy as np

from tghmoe_jax.drawn.chance import pick, shuffled
from tghmoe_jax.drawn.phantom import LESION_COUNTS, PLANES, Truth
from tghmoe_jax.drawn.phantom_anatomy import PHASES
from tghmoe_jax.drawn.phantom_lesions import KIND_PHRASES, KINDS, ORGANS_BY_SECTION, SECTIONS, Lesion, kind_of, kinds_of
from tghmoe_jax.drawn.phantom_report import phrase_of, well_organs, where
from tghmoe_jax.drawn.phantom_wordings import SEEN, Wording
from tghmoe_jax.samples.questions import TYPES, Question

NONE = "none"
_PLACED = (f"{place} {k.organ}" for k in KINDS for place in k.places)
ANSWER_PHRASES: tuple[str, ...] = tuple(
    dict.fromkeys((*PLANES, *PHASES, NONE, *(k.organ for k in KINDS), *KIND_PHRASES, *_PLACED))
)
AUX_NAMES: tuple[str, ...] = (
    *(f"plane:{p}" for p in PLANES),
    *(f"phase:{p}" for p in PHASES),
    *(f"section:{s}" for s in SECTIONS),
    *(f"lesion:{p}" for p in KIND_PHRASES),
    *(
        f"place:{p}:{w}"
        for p in KIND_PHRASES
        for w in sorted({w for k in KINDS if k.phrase == p for place in k.places for w in place.split()})
    ),
)
_AUX_INDEX = {name: i for i, name in enumerate(AUX_NAMES)}

# How often "none" is among the options of a volume with one or two lesions. It is true in LESION_COUNTS[0] of the
# questions and must be a distractor three times as often; three lesions leave two well organs, so there it always is.
NONE_CHANCE = (3 * LESION_COUNTS[0] - LESION_COUNTS[3]) / (LESION_COUNTS[1] + LESION_COUNTS[2])


def aux_targets(truth: Truth) -> np.ndarray:
    """float32 (A,), 1 where the label of AUX_NAMES holds."""
    labels = np.zeros(len(AUX_NAMES), np.float32)
    names = [f"plane:{truth.plane}", f"phase:{truth.phase}", f"section:{truth.section}"]
    labels[[_AUX_INDEX[name] for name in names]] = 1
    for lesion in truth.lesions:
        labels[lesion_labels(lesion)] = 1
    return labels


def lesion_labels(lesion: Lesion) -> list[int]:
    """Indices into AUX_NAMES of what one lesion makes true."""
    names = [f"lesion:{lesion.kind}", *(f"place:{lesion.kind}:{word}" for word in lesion.place.split())]
    return [_AUX_INDEX[name] for name in names]


def make_question(
    truth: Truth, kind: str, rng: np.random.Generator, type: str | None = None, wording: Wording = SEEN
) -> Question:
    """A request about a volume; `open` and `closed` ones are of `type`, or of any of the five types equally often."""
    if kind == "report":
        return Question("report", "report", "report", pick(rng, wording.requests), (), wording.report(truth, rng))
    type = type or pick(rng, TYPES)
    text = pick(rng, wording.questions[type])
    if type == "plane":
        answer, options = truth.plane, list(PLANES)
    elif type == "phase":
        answer, options = truth.phase, list(PHASES)
    elif type == "location":
        text, answer, options = _location(text, truth, rng)
    else:
        answer, options = _organ_or_abnormality(type, truth, rng)
    if kind == "open":
        return Question("vqa", "open", type, text, (), answer)
    return Question("vqa", "closed", type, text, shuffled(rng, options), answer)


def _organ_or_abnormality(type: str, truth: Truth, rng: np.random.Generator) -> tuple[str, list[str]]:
    """The answer and its four options: ill organs but the true one are never options, so just one option is true."""
    section = truth.section

    def name(organ: str) -> str:
        return organ if type == "organ" else phrase_of(section, organ, rng)

    well = well_organs(truth, rng)
    if not truth.lesions:
        return NONE, [NONE, *map(name, well[:3])]
    lesion = truth.lesions[rng.integers(len(truth.lesions))]
    answer = lesion.organ if type == "organ" else lesion.kind
    with_none = len(well) < 3 or rng.random() < NONE_CHANCE
    others = [*map(name, well[: 2 if with_none else 3]), *([NONE] if with_none else [])]
    return answer, [answer, *others]


def _location(text: str, truth: Truth, rng: np.random.Generator) -> tuple[str, str, list[str]]:
    """Asks for a lesion's place, or, in a healthy volume, for a lesion that is not there."""
    if truth.lesions:
        lesion = truth.lesions[rng.integers(len(truth.lesions))]
        kind, answer = kind_of(lesion.kind, truth.section), where(lesion)
    else:
        organ = pick(rng, ORGANS_BY_SECTION[truth.section])
        kind, answer = pick(rng, kinds_of(truth.section, organ)), NONE
    others = [o for o in (NONE, *(f"{place} {kind.organ}" for place in kind.places)) if o != answer]
    others.pop(rng.integers(len(others)))  # five answers are equally frequent, any four of them are shown
    return text.format(lesion=kind.phrase), answer, [answer, *others]
