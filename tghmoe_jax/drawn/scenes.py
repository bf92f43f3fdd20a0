"""2D pretraining pictures that are not CT: coloured shapes on textured backgrounds, with captions and questions.

They teach a small base model what it later needs on CT: shape, colour, place, number, size, brightness, texture, what
lies inside what, and the binding of an option's text to its letter. Axis legend: D slices (always 1), S pixels, A
auxiliary labels.
"""

import functools

import numpy as np

from tghmoe_jax.drawn import binding
from tghmoe_jax.drawn.chance import pick
from tghmoe_jax.drawn.scenes_draw import DOT, MARKS, SHAPES, TEXTURES, UNIT, SceneItem, draw
from tghmoe_jax.drawn.scenes_layout import COLOURS, COUNTS, PLACES, SIDES, SIZES, Scene, sample
from tghmoe_jax.drawn.scenes_text import CAPTION_REQUESTS, OPEN_TYPES, SCENE_TYPES, ask, caption
from tghmoe_jax.errors import UserError
from tghmoe_jax.samples.questions import Kind, Question, cell_grid, touched

SPLITS = ("train", "validation", "test")
WORDINGS = ("seen", "unseen")  # `unseen` wordings never occur in training
_FORMS = (*SHAPES, DOT)
AUX_NAMES: tuple[str, ...] = (
    *(f"shape:{s}" for s in _FORMS),
    *(f"colour:{c}" for c in COLOURS),
    *(f"place:{p}" for p in PLACES),
    *(f"place:{p}:{s}" for p in PLACES for s in _FORMS),
    *(f"size:{s}" for s in SIZES),
    *(f"count:{c}" for c in COUNTS),
    *(f"texture:{t}" for t in TEXTURES),
    "mark:mark",
    *(f"mark:{m}" for m in MARKS),
    *(f"mark:{m}:{s}" for m in MARKS for s in SIDES),
    *(f"mark:{p}:mark" for p in PLACES),
)


@functools.lru_cache(maxsize=2048)  # a batch asks for the same pictures' content, pixels and labels in turn
def _scene(seed: int, split: int, index: int) -> Scene:
    return sample(np.random.default_rng((seed, split, index)))


_AUX_INDEX = {name: i for i, name in enumerate(AUX_NAMES)}


class ScenesSource:
    """`samples.Source` over scenes. Picture `i` of a (split, seed) is always the same; splits share none.

    `question` knows the types SCENE_TYPES (open or closed) and `report` (a caption); every picture answers every type.
    """

    aux_names = AUX_NAMES
    kinds = ("closed", "open", "report", "binding")

    def __init__(
        self, split: str, count: int, seed: int = 0, size: int = 64, wording: str = "seen", pictures: bool = True,
        more_types: tuple[str, ...] = (),
    ):  # fmt: skip
        for name, value, known in (("split", split, SPLITS), ("wording", wording, WORDINGS)):
            if value not in known:
                raise UserError(f"{name}={value!r} is unknown: use one of {', '.join(known)}.")
        if count < 1 or size < 32:
            raise UserError(f"count={count} and size={size} must be at least 1 picture and 32 pixels.")
        self.split, self.count, self.seed, self.size, self.wording = split, count, seed, size, wording
        self.pictures, self.more_types = pictures, more_types

    def __len__(self) -> int:
        return self.count

    def scene(self, index: int) -> Scene:
        """What picture `index` shows."""
        if not 0 <= index < self.count:
            raise IndexError(index)
        return _scene(self.seed, SPLITS.index(self.split), int(index))

    def slices(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """uint8 (1, S, S, 3) and the mask bool (1,); without `pictures`, no slice."""
        if not self.pictures:
            return np.zeros((0, self.size, self.size, 3), np.uint8), np.zeros(0, bool)
        scene = self.scene(index)
        return draw(list(scene.items), scene.look, self.size)[None], np.ones(1, bool)

    def slice_spacing(self, index: int) -> float:
        """Distance of slices in mm; a picture has one slice, so the value has no effect."""
        return 1.0

    def input_ranges(self) -> dict:
        """Nothing to warn of: pictures carry no units."""
        return {}

    def question(self, index: int, kind: Kind, rng: np.random.Generator, type: str | None = None) -> Question:
        """A request about picture `index`; without `type`, `rng` draws it: in training from `more_types` too, and half
        of the closed ones with fewer options."""
        if kind == "binding":
            return binding.ask(rng)
        if kind == "report":
            request = pick(rng, CAPTION_REQUESTS[self.wording])
            return Question("report", "report", "report", request, (), caption(self.scene(index), rng))
        training = type is None and self.split == "train"
        drawn = SCENE_TYPES + self.more_types + (OPEN_TYPES if self.more_types and kind == "open" else ())
        type = type or pick(rng, drawn if training else SCENE_TYPES)
        question = ask(self.scene(index), kind, rng, type, self.wording)
        easy = training and kind == "closed" and rng.random() < binding.EASY
        return binding.fewer_choices(question, rng) if easy else question

    def aux(self, index: int) -> np.ndarray:
        """float32 (A,), 1 where the label of `aux_names` holds."""
        scene = self.scene(index)
        names = [f"count:{COUNTS[len(scene.items) - 1]}", f"texture:{scene.look.texture}"]
        labels = np.zeros(len(AUX_NAMES), np.float32)
        labels[[_AUX_INDEX[name] for name in names]] = 1
        for item in scene.items:
            labels[_item_labels(item)] = 1
        return labels

    def aux_cells(self, index: int, cell: tuple[int, int, int]) -> np.ndarray:
        """bool (V, R, C, A): a shape's labels are read off the cells that it touches (see `samples.Source`)."""
        shape = (int(self.pictures), self.size, self.size)
        cells = np.zeros((*cell_grid(shape, cell), len(AUX_NAMES)), bool)
        if not self.pictures:
            return cells
        scene = self.scene(index)
        for item in scene.items:
            row, column, radius = (x * self.size / UNIT for x in (*item.centre, item.radius))
            cells[..., _item_labels(item)] |= touched(shape, cell, (0, row, column), (0, radius, radius))[..., None]
        cells[..., ~cells.any(axis=(0, 1, 2))] = True
        return cells

    def group(self, index: int) -> str:
        """One stratum: scenes have no body section."""
        return "scene"

    def sides(self, index: int) -> None:
        """A scene is no patient."""

    def findings(self, index: int) -> frozenset[tuple[str, str, str]]:
        """No scene has a CT finding."""
        return frozenset()


def _item_labels(item: SceneItem) -> list[int]:
    """Indices into AUX_NAMES of what one shape makes true."""
    names = [f"shape:{item.shape}", f"size:{item.size}", f"colour:{item.colour}"]
    names += [f"place:{item.place}", f"place:{item.place}:{item.shape}"]
    if item.mark:
        kind = item.mark.kind
        names += ["mark:mark", f"mark:{kind}", f"mark:{kind}:{item.mark.side}", f"mark:{item.place}:mark"]
    return [_AUX_INDEX[name] for name in names]
