"""What all data sets of drawn CT volumes share: a cache that is read by random access, and what truth says of it."""

import abc
import json
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import numpy as np

from tghmoe_jax.drawn import binding, cache, phantom
from tghmoe_jax.drawn.phantom_text import lesion_labels
from tghmoe_jax.drawn.phantom_wordings import Wording
from tghmoe_jax.errors import UserError
from tghmoe_jax.samples.questions import Kind, Question, cell_grid, touched
from tghmoe_jax.scans.scan import low_high
from tghmoe_jax.scans.slices import to_channels, window_names

COARSEST = (8, 24)  # slices and pixels: coarser grids cannot show lesions


class DrawnSource(abc.ABC):
    """`samples.Source` over the volumes of a `Drawing`; `ask` and `aux` are those of a subclass.

    `root` is the folder for caches; `style` a key of `drawing.styles`, how volumes are drawn; `wording` a key of
    `wordings`, how requests and reports are phrased. `aux_names` begin with those of the phantom.
    """

    drawing: ClassVar[cache.Drawing]
    wordings: ClassVar[Mapping[str, Wording]]
    truth: ClassVar[type[phantom.Truth]] = phantom.Truth
    aux_names: ClassVar[tuple[str, ...]]
    kinds = ("closed", "open", "report", "binding")

    def __init__(
        self,
        root: str | Path,
        split: str,
        count: int,
        seed: int = 0,
        grid: tuple[int, int, int] = (16, 64, 64),
        channels: str = "windows3",
        wording: str = "seen",
        style: str = "first",
        processes: int = 2,
    ):
        named = (("split", split, cache.SPLITS), ("wording", wording, self.wordings))
        for name, value, known in (*named, ("style", style, self.drawing.styles)):
            if value not in known:
                raise UserError(f"{name}={value!r} is unknown: use one of {', '.join(known)}.")
        if not 0 < count <= cache.SPLIT_SEEDS:
            raise UserError(
                f"count={count} is out of range: ask for 1 to {cache.SPLIT_SEEDS} {self.drawing.name} volumes."
            )
        if grid[0] < COARSEST[0] or min(grid[1:]) < COARSEST[1]:
            raise UserError(
                f"--config.data.slices={grid[0]} and --config.data.size={grid[1]} are too coarse to draw lesions on; "
                f"use at least {COARSEST[0]} slices of {COARSEST[1]} pixels."
            )
        self.wording = self.wordings[wording]
        window_names(channels)  # refused here, not at the first volume
        self.channels = channels
        self.split = split
        folder = cache.prepare(self.drawing, Path(root), split, count, seed, tuple(grid), style, processes)
        self.volumes = np.load(folder / "volumes.npy", mmap_mode="r", allow_pickle=False)
        with open(folder / "truth.jsonl", encoding="utf-8") as lines:
            self.truths = [self.truth.from_json(json.loads(line)) for line in lines]

    def __len__(self) -> int:
        return len(self.truths)

    def slices(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """uint8 (D, H, W, 3), and the mask bool (D,): every drawn slice is real."""
        levels = to_channels(self.volumes[index], self.channels)
        return levels, np.ones(len(levels), bool)

    def slice_spacing(self, index: int) -> float:
        """Distance of neighbouring slices in mm."""
        return float(self.truths[index].spacing_mm[0])

    def question(self, index: int, kind: Kind, rng: np.random.Generator, type: str | None = None) -> Question:
        """A request about volume `index`; without `type`, `rng` draws it."""
        if kind == "binding":
            return binding.ask(rng)
        return self.ask(self.truths[index], kind, rng, type)

    @abc.abstractmethod
    def ask(self, truth: phantom.Truth, kind: Kind, rng: np.random.Generator, type: str | None) -> Question:
        """A request about a volume with this truth."""

    @abc.abstractmethod
    def aux(self, index: int) -> np.ndarray:
        """float32 (A,) in 0..1, named by `aux_names`."""

    def aux_cells(self, index: int, cell: tuple[int, int, int]) -> np.ndarray:
        """bool (V, R, C, A): a lesion's labels are read off the cells that it touches (see `samples.Source`)."""
        truth, shape = self.truths[index], self.volumes.shape[1:]
        cells = np.ones((*cell_grid(shape, cell), len(self.aux_names)), bool)
        for lesion in truth.lesions:
            half = lesion.size_mm / 2 / np.array(truth.spacing_mm)
            cells[..., lesion_labels(lesion)] = touched(shape, cell, lesion.centre, half)[..., None]
        return cells

    def input_ranges(self) -> dict:
        """Spacing (slice, row, column) and field of view in mm, number of slices, and HU, as [low, high]."""
        spacing = np.array([truth.spacing_mm for truth in self.truths])
        view = spacing[:, 1:] * self.volumes.shape[2:]
        few = self.volumes[:: max(1, len(self.volumes) // 200)]
        return {
            "spacing_mm": [low_high(column) for column in spacing.T],
            "slices": [int(self.volumes.shape[1])] * 2,
            "field_of_view_mm": low_high(view),
            "hu": low_high(few),
        }

    def group(self, index: int) -> str:
        """The body section."""
        return self.truths[index].section

    def sides(self, index: int) -> tuple[str, str]:
        """The patient's side at the left and at the right edge of each slice."""
        _, _, toward = phantom.DIRECTIONS[self.truths[index].plane]
        return ("R", "L") if toward[0] else ("A", "P")

    @property
    def lesions_mm(self) -> list[float] | None:
        """The smallest and the largest size of the drawn lesions; None where no volume has one."""
        sizes = [lesion.size_mm for truth in self.truths for lesion in truth.lesions]
        return low_high(sizes) if sizes else None

    def findings(self, index: int) -> frozenset[tuple[str, str, str]]:
        """True (lesion, organ, side) triples."""
        return self.truths[index].triples
