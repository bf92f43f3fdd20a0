"""What a data set gives to training: volumes as slices, and questions about them.

Axis legend: D slices, S pixels, A auxiliary labels.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, runtime_checkable

import numpy as np

LETTERS = "ABCD"
TYPES = ("plane", "phase", "organ", "abnormality", "location")  # M3D-VQA question types 1 to 5
# Question types by what an answer takes: all of a volume, a place in it, several of its slices, or several lesions.
FAMILIES = {
    "global": ("plane", "phase", "section"),
    "local": ("organ", "abnormality", "location"),
    "depth": ("course", "reach", "order"),
    "comparison": ("larger", "count", "sides"),
}
FAMILY_OF = {type: family for family, types in FAMILIES.items() for type in types}
Kind = str  # one of `samples.tasks`


@dataclasses.dataclass(frozen=True)
class Question:
    """One request about one volume and its true answer.

    `task` names the expert group (`report` or `vqa`); `choices` is empty unless the question is closed-ended;
    `answer` is the answer's text without a letter.
    """

    task: str
    kind: Kind
    type: str
    question: str
    choices: tuple[str, ...]
    answer: str

    @property
    def letter(self) -> str:
        """The true option's letter; empty for a question without choices, or whose answer nobody knows."""
        return LETTERS[self.choices.index(self.answer)] if self.choices and self.answer else ""

    @property
    def prompt(self) -> str:
        """The question as it is asked: M3D's closed form appends the lettered choices."""
        if not self.choices:
            return self.question
        listed = " ".join(f"{letter}. {choice}" for letter, choice in zip(LETTERS, self.choices, strict=False))
        return f"{self.question} Choices: {listed}"

    @property
    def target(self) -> str:
        """The text to be generated: `<letter>. <answer>` for a closed question, else the answer."""
        return f"{self.letter}. {self.answer}" if self.choices else self.answer

    def without_choices(self) -> "Question":
        """The same question asked openly (M3D asks each row both ways)."""
        return dataclasses.replace(self, kind="open", choices=())


class Source(Protocol):
    """A split of a data set with random access; every answer is a pure function of its arguments."""

    aux_names: tuple[str, ...]  # A binary labels of the optional auxiliary loss, `kind:words` or `kind:words:words`

    def __len__(self) -> int: ...

    def slices(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Slices uint8 (D, S, S, 3) and the mask bool (D,) of real slices."""

    def slice_spacing(self, index: int) -> float:
        """Distance of neighbouring slices in mm (1.0 where a picture has none)."""

    def question(self, index: int, kind: Kind, rng: np.random.Generator, type: str | None = None) -> Question:
        """A question about volume `index`; `type` fixes the question type, otherwise `rng` draws it."""

    def aux(self, index: int) -> np.ndarray:
        """float32 (A,) in 0..1, or -1 where a label is not known."""

    def aux_cells(self, index: int, cell: tuple[int, int, int]) -> np.ndarray:
        """bool (V, R, C, A) over cells of `cell` voxels (slices, rows, columns): where each label is to be read off,
        all of them for a label that has no place or does not hold."""

    def input_ranges(self) -> dict:
        """What the volumes cover, for predict's warnings: `spacing_mm` 3 x [low, high], `slices`, `field_of_view_mm`
        and `hu` [low, high]; empty where it means nothing."""

    def group(self, index: int) -> str:
        """The stratum of the section-shuffled control (the body section)."""

    def sides(self, index: int) -> tuple[str, str] | None:
        """The patient's side (R, L, A, P) at the left and at the right edge of each slice; None where not known."""

    def findings(self, index: int) -> frozenset[tuple[str, str, str]]:
        """True (lesion, organ, side) triples."""


@runtime_checkable
class ItemSource(Source, Protocol):
    """A source of files: its questions are given instead of drawn, and a volume may turn out to be broken.

    `slices` raises UserError for a broken volume. `weights` are whole numbers, the share of each data set in the
    samples of a kind; empty: all items alike.
    """

    weights: tuple[int, ...]
    made_up: Mapping[str, Callable[[np.random.Generator], Question]]  # kinds that are no items: see `question`

    def counts(self, kind: Kind) -> tuple[int, ...]:
        """Items of a kind in each data set; their indices run on from one to the next."""

    def item(self, kind: Kind, index: int, rng: np.random.Generator) -> tuple[int, Question]:
        """Volume and request of item `index` of a kind."""

    def case(self, index: int) -> int:
        """The number of the patient or study of volume `index`: what a bootstrap of the split draws whole."""

    def key(self, index: int) -> str:
        """The name of volume `index` for a message."""

    def digest(self) -> str:
        """A hash of what the split holds, for a run's manifest."""


def cell_grid(shape: Sequence[int], cell: Sequence[int]) -> tuple[int, ...]:
    """Cells (V, R, C) of `cell` voxels that cover a grid of `shape` voxels; the last of an axis may be cut."""
    return tuple(-(-n // c) for n, c in zip(shape, cell, strict=True))


def touched(shape: Sequence[int], cell: Sequence[int], centre: Sequence[float], half: Sequence[float]) -> np.ndarray:
    """bool (V, R, C): the cells of `cell` voxels that a box of half lengths `half` about `centre` touches.

    All are in voxels of a grid of `shape`; the cell of the nearest voxel of the grid is always touched.
    """
    result = np.zeros(cell_grid(shape, cell), bool)
    bounds = []
    for n, c, middle, reach in zip(shape, cell, centre, half, strict=True):
        low, high = (int(np.clip(round(edge), 0, n - 1)) // c for edge in (middle - reach, middle + reach))
        bounds.append(slice(low, high + 1))
    result[tuple(bounds)] = True
    return result
