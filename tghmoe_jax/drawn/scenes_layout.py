"""What is in a scene: shapes of known kind, size, place, colour and content, answers about equally frequent."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from tghmoe_jax.drawn.chance import pick
from tghmoe_jax.drawn.scenes_draw import DOT, MARKS, SHAPES, SOLID, TEXTURES, Look, Mark, SceneItem

COUNTS = ("one", "two", "three", "four")
SIZES = {
    "tiny": (3.0, 4.0),
    "small": (6.0, 7.2),
    "medium": (9.5, 11.0),
    "large": (14.5, 17.0),
}  # radius in pixels of 64
PLACES = tuple(f"{row} {column}" for row in ("upper", "middle", "lower") for column in ("left", "centre", "right"))
# Where a mark lies in its shape. These words differ from PLACES, because one visual token may hold both places.
SIDES = ("west", "east", "north", "south", "core")
COLOURS = {
    "black": (10, 10, 10),
    "grey": (127, 127, 127),  # drawn as one of the two middle GREYS
    "white": (245, 245, 245),
    "red": (220, 30, 30),
    "green": (30, 185, 45),
    "blue": (35, 55, 225),
    "yellow": (235, 225, 30),
    "purple": (175, 40, 200),
    "cyan": (30, 215, 225),
    "orange": (245, 135, 15),
}
GREYS = {"black": 12, "dark grey": 88, "light grey": 166, "white": 243}  # names of brightness
GREY_ODDS = (0.1, 0.4, 0.4, 0.1)  # the middle ones seldom stand out enough and are drawn again
FIRST_SIZES, OTHER_SIZES = (0.0, 0.6, 0.2, 0.2), (0.36, 0.28, 0.18, 0.18)
COUNT_CHANCES = (0.28, 0.28, 0.22, 0.22)
NO_MARK = 0.15  # of the shapes that could hold one
CONTRAST = 60  # least difference between a shape and what is behind it, in the channel where it is greatest

_CENTRES = ((12.0, 18.0), (29.0, 35.0), (45.0, 51.0))  # rows or columns of the three bands of places
_OFFSETS = {"disc": (0.52, 0.52), "square": (0.5, 0.5), "triangle": (0.3, 0.34)}


@dataclasses.dataclass(frozen=True)
class Scene:
    """A picture's content; the first item is the one most questions are about."""

    look: Look
    items: tuple[SceneItem, ...]

    def unique_shapes(self) -> list[SceneItem]:
        """Items that their shape's name alone identifies."""
        names = [i.shape for i in self.items]
        return [i for i in self.items if names.count(i.shape) == 1]

    def unique_colours(self) -> list[SceneItem]:
        """Items that their colour alone identifies."""
        names = [i.colour for i in self.items]
        return [i for i in self.items if names.count(i.colour) == 1]


def sample(rng: np.random.Generator) -> Scene:
    """A random scene of one to four shapes."""
    mode = int(rng.random() < 0.35)  # coloured or grey
    look = _look(rng, mode)
    count = 1 + int(rng.choice(len(COUNTS), p=COUNT_CHANCES))
    items: list[SceneItem] = []
    free = [PLACES[i] for i in rng.permutation(len(PLACES))]
    while len(items) < count:
        items.append(_item(rng, mode, look, items, free))
    if not any(level_name(i) for i in items) and not extremes(items):
        items[-1] = _repainted(rng, look, items[-1])
    return Scene(look, tuple(items))


def level_name(item: SceneItem) -> str:
    """The name of a grey item's brightness; empty for a coloured one or one between two names."""
    if max(item.levels) - min(item.levels) > 30:
        return ""
    return next((name for name, level in GREYS.items() if abs(item.brightness - level) < 22), "")


def extremes(items: Sequence[SceneItem]) -> dict[str, SceneItem]:
    """The clearly brightest and the clearly darkest item, where all items differ in shape."""
    if len(items) < 2 or len({i.shape for i in items}) < len(items):
        return {}
    ranked = sorted(items, key=lambda i: i.brightness)
    found = {}
    if ranked[-1].brightness - ranked[-2].brightness > 30 and ranked[-1].shape != DOT:
        found["brightest"] = ranked[-1]
    if ranked[1].brightness - ranked[0].brightness > 30 and ranked[0].shape != DOT:
        found["darkest"] = ranked[0]
    return found


def _repainted(rng: np.random.Generator, look: Look, item: SceneItem) -> SceneItem:
    """The item in a grey level that has a name, so that the scene has an answer about brightness."""
    levels, colour = _colour(rng, 1, look)
    mark = _mark(rng, item.shape, item.size, item.centre, item.radius, levels)
    return dataclasses.replace(item, levels=levels, colour=colour, mark=mark)


def _look(rng: np.random.Generator, mode: int) -> Look:
    base = np.full(3, rng.uniform(12, 243))
    if mode == 0:
        base = np.clip(base + rng.uniform(-28, 28, 3), 5, 250)
    texture = TEXTURES[rng.integers(len(TEXTURES))]
    away = np.where(base < 128, 1, -1) * rng.uniform(45, 60)
    other = base + away * (1.3 if texture == "shaded" else 1)
    noise = rng.uniform(26, 38) if texture == "noisy" else rng.uniform(1, 5)
    return Look(
        texture=texture,
        levels=tuple(base.tolist()),
        other=tuple(other.tolist()),
        period=float(rng.uniform(12, 18) if texture in ("dotted", "checked") else rng.uniform(6, 12)),
        turn=float(rng.uniform(0, 2 * np.pi)),
        noise=float(noise),
        soft=float(rng.uniform(0.8, 1.6)),
        frame=float(rng.uniform(0, 255) if rng.random() < 0.3 else rng.uniform(0, 20)) if rng.random() < 0.15 else None,
        shading=tuple((rng.uniform(-5, 5, 2)).tolist()),
        offset=int(rng.integers(1 << 20)),
    )


def _item(rng: np.random.Generator, mode: int, look: Look, items: list[SceneItem], free: list[str]) -> SceneItem:
    """A further item that overlaps none of `items`; takes its place out of `free`."""
    first = not items
    names = list(SIZES)
    # The first item is never tiny (its shape can be recognised), and mostly one that can hold a mark.
    holder = rng.random() < (0.85 if first else 0.15)
    size = names[rng.choice(4, p=(0.0, 0.0, 0.5, 0.5) if holder and first else FIRST_SIZES if first else OTHER_SIZES)]
    while True:
        for place in free:
            radius = float(rng.uniform(*SIZES[size]))
            row, column = (_within(rng, _CENTRES[band], radius) for band in divmod(PLACES.index(place), 3))
            if all(np.hypot(row - i.centre[0], column - i.centre[1]) > radius + i.radius + 2 for i in items):
                free.remove(place)
                if size == "tiny":
                    shape = DOT
                else:
                    taken = items[0].shape if items else ""
                    shape = pick(rng, [s for s in (SOLID if holder else SHAPES) if s != taken])
                levels, colour = _colour(rng, mode, look)
                turn = _turn(rng, shape)
                mark = _mark(rng, shape, size, (row, column), radius, levels)
                return SceneItem(shape, size, place, colour, (row, column), radius, turn, levels, mark)
        size = names[names.index(size) - 1]  # a tiny one always fits somewhere


def _within(rng: np.random.Generator, band: tuple[float, float], radius: float) -> float:
    low, high = max(band[0], radius + 2), min(band[1], 62 - radius)
    return float(rng.uniform(low, high)) if low < high else (low if band[0] < 30 else high)


def _turn(rng: np.random.Generator, shape: str) -> float:
    if shape in ("square", "triangle", "cross"):
        return float(rng.uniform(-0.15, 0.15))
    return float(rng.uniform(0, 2 * np.pi)) if shape == "bar" else 0.0


def _colour(rng: np.random.Generator, mode: int, look: Look) -> tuple[tuple[float, float, float], str]:
    """Levels that stand out from the background, and the colour's name."""
    for _ in range(20):
        if mode == 1:
            name = tuple(GREYS)[rng.choice(len(GREYS), p=GREY_ODDS)]
            levels, name = np.full(3, GREYS[name]) + rng.uniform(-10, 10), name.split()[-1]
        else:
            name = pick(rng, tuple(COLOURS))
            base = GREYS[pick(rng, ("dark grey", "light grey"))] if name == "grey" else COLOURS[name]
            levels = base + rng.uniform(-14, 14, 3)
        if all(np.abs(levels - behind).max() >= CONTRAST for behind in (look.levels, look.other)):
            break
    else:
        bright = max(look.levels[1], look.other[1]) < 128
        levels, name = np.full(3, 243.0 if bright else 12.0), "white" if bright else "black"
    return tuple(np.clip(levels, 0, 255).tolist()), name


def _mark(rng, shape, size, centre, radius, levels) -> Mark | None:
    """Something inside a large enough solid shape, or nothing."""
    if shape not in SOLID or size not in ("medium", "large") or rng.random() < NO_MARK:
        return None
    kinds = [
        k for k in MARKS if not (k == "bright spot" and min(levels) > 150 or k == "dark spot" and max(levels) < 105)
    ]
    odds = np.array([1.5 if k.endswith("spot") else 1.0 for k in kinds])  # one of the two spots is often ruled out
    kind = kinds[rng.choice(len(kinds), p=odds / odds.sum())]
    side = pick(rng, SIDES)
    along, across = _OFFSETS[shape]
    down = {"north": -across, "south": across}.get(side, 0.0) * radius
    right = {"west": -along, "east": along}.get(side, 0.0) * radius
    if shape == "triangle":
        down += 0.1 * radius  # its wide part is below
    if kind.endswith("spot"):
        bright = kind == "bright spot"
        mark_radius = float(np.clip(0.25 * radius, 2.6, 4.0))
    else:
        bright = sum(levels) < 3 * 128
        mark_radius = float(np.clip(0.36 * radius, 3.6, 5.6))
    level = rng.uniform(232, 255, 3) if bright else rng.uniform(0, 22, 3)
    return Mark(kind, side, (centre[0] + down, centre[1] + right), mark_radius, tuple(level.tolist()))
