"""The common form of all data sets of files: one request about one volume, with its split."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np

from tghmoe_jax.samples.questions import Question
from tghmoe_jax.samples.tasks import kind_of
from tghmoe_jax.scans.volume import Volume

SPLITS = ("train", "validation", "test")


@dataclasses.dataclass(frozen=True)
class Item:
    """One request and its true answer.

    `volume` is the key of the volume: its path below the data set's root with forward slashes, and for a part of a
    scan a fragment that the data set itself understands. `case` is the patient or study: items of one case are never
    in two splits unless the data set was published so. `type` is one of `samples.TYPES` where it fits, else
    the data set's own word. An empty `question` asks for a request of the project's own wording.
    """

    volume: str
    split: str
    case: str
    task: str  # one of `samples.tasks`
    type: str
    question: str
    answer: str
    choices: tuple[str, ...] = ()

    @property
    def kind(self) -> str:
        """One of the kinds of its task: `report`, `closed` (it has choices) or `open`."""
        return kind_of(self.task, bool(self.choices))

    def asked(self, question: str = "") -> Question:
        """The request as the pipeline sees it; `question` is used where the item has none of its own."""
        return Question(self.task, self.kind, self.type, self.question or question, self.choices, self.answer)


@dataclasses.dataclass(frozen=True)
class Rejected:
    """An item or a volume that was left out: where (file and line or key) and why, in one sentence."""

    where: str
    reason: str


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A data set as it lies on disk. `read` gives the canonical volume of a key and raises UserError for a bad one.

    Where it has segmentation masks, `structures` are their names, and `labels` gives of a key uint16 (D, H, W) on the
    grid of the canonical volume, 1 + the index of the structure of each voxel, 0 for none; and the indices of the
    structures that the mask does not tell of, whether they are there or not.
    """

    name: str
    root: Path
    items: tuple[Item, ...]
    rejected: tuple[Rejected, ...]
    read: Callable[[str], Volume]
    structures: tuple[str, ...] = ()
    labels: Callable[[str], tuple[np.ndarray, tuple[int, ...]]] | None = None
