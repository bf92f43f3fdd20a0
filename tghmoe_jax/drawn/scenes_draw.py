"""Drawing of 2D scenes: soft-edged shapes with marks inside them, on textured backgrounds.

Axis legend: S pixels, C colour channels. Levels are 0..255 and are drawn for each channel on its own, because the
three channels later carry three HU windows.
"""

import dataclasses

import numpy as np

SHAPES = ("disc", "square", "triangle", "ring", "cross", "bar")
SOLID = SHAPES[:3]  # may hold a mark
DOT = "dot"  # a shape too small to recognise its outline
MARKS = ("bright spot", "dark spot", "small cross", "small ring")
TEXTURES = ("plain", "striped", "dotted", "checked", "noisy", "shaded")
UNIT = 64  # sizes and places are in pixels of a 64-pixel picture

_NOISE = np.random.default_rng(7).standard_normal(1 << 18).astype(np.float32)  # windows of it replace fresh draws


@dataclasses.dataclass(frozen=True)
class Mark:
    """A small thing inside a shape: what, on which side, at which pixel (row, column), and its levels (C,)."""

    kind: str
    side: str
    centre: tuple[float, float]
    radius: float
    levels: tuple[float, float, float]


@dataclasses.dataclass(frozen=True)
class SceneItem:
    """One shape of a scene. `centre` is (row, column), `place` one of nine."""

    shape: str
    size: str
    place: str
    colour: str
    centre: tuple[float, float]
    radius: float
    turn: float
    levels: tuple[float, float, float]
    mark: Mark | None = None

    @property
    def brightness(self) -> float:
        return sum(self.levels) / 3


@dataclasses.dataclass(frozen=True)
class Look:
    """Everything in a picture except its shapes: background texture, levels (C,), disturbances."""

    texture: str
    levels: tuple[float, float, float]
    other: tuple[float, float, float]  # second levels of the texture
    period: float
    turn: float
    noise: float
    soft: float
    frame: float | None  # level outside a round body, or None
    shading: tuple[float, float]
    offset: int  # into the noise


def distance(shape: str, u: np.ndarray, v: np.ndarray, r: float) -> np.ndarray:
    """Signed distance in pixels, positive inside, of a shape of radius r at offsets (u right, v down)."""
    a, b = np.abs(u), np.abs(v)
    if shape in ("disc", DOT, "bright spot", "dark spot"):
        return r - np.hypot(u, v)
    if shape == "square":
        return 0.86 * r - np.maximum(a, b)
    if shape == "triangle":
        return np.minimum(0.62 * r - v, 0.62 * r - 0.87 * a + 0.5 * v)
    if shape in ("ring", "small ring"):
        width = max(0.17 * r, 0.8)
        return width - np.abs(np.hypot(u, v) - (r - width))
    if shape in ("cross", "small cross"):
        width = max(0.24 * r, 0.8)
        return np.maximum(np.minimum(width - a, r - b), np.minimum(width - b, r - a))
    if shape == "bar":
        return np.minimum(r - a, max(0.22 * r, 1.0) - b)
    raise ValueError(shape)


def draw(items: list[SceneItem], look: Look, size: int = UNIT) -> np.ndarray:
    """The picture, uint8 (S, S, 3). Pure: the same scene gives the same pixels."""
    scale = size / UNIT
    picture = _background(look, size)
    for item in items:
        _paint(picture, item.shape, item, item.turn, look.soft, scale)
        if item.mark is not None:
            _paint(picture, item.mark.kind, item.mark, 0.0, min(look.soft, 1.2), scale)
    rows = np.linspace(-1, 1, size, dtype=np.float32)
    picture += (np.float32(look.shading[0]) * rows)[:, None, None] + (np.float32(look.shading[1]) * rows)[None, :, None]
    count = picture.size
    start = look.offset % (len(_NOISE) - count) if count < len(_NOISE) else 0
    noise = _NOISE[start : start + count] if count < len(_NOISE) else np.resize(_NOISE, count)
    picture += np.float32(look.noise) * noise.reshape(picture.shape)
    return np.clip(picture, 0, 255).astype(np.uint8)


def _background(look: Look, size: int) -> np.ndarray:
    """float32 (S, S, 3): the texture between its two levels, inside a round body where there is one."""
    axis = np.arange(size, dtype=np.float32) * (UNIT / size)
    first, second = np.array(look.levels, np.float32), np.array(look.other, np.float32)
    y, x = axis[:, None], axis[None, :]
    c, s = np.float32(np.cos(look.turn)), np.float32(np.sin(look.turn))
    step = np.float32(2 * np.pi / look.period)
    mix = None
    if look.texture == "striped":
        mix = np.clip(0.5 + 1.5 * np.sin((c * x + s * y) * step), 0, 1)
    elif look.texture == "checked":
        mix = np.clip(0.5 + 3 * np.sin(x * step + s * 3) * np.sin(y * step + c * 3), 0, 1)
    elif look.texture == "dotted":
        mix = np.clip(3 * (np.cos(x * step + s * 3) + np.cos(y * step + c * 3)) - 3.0, 0, 1)
    elif look.texture == "shaded":
        mix = np.clip(0.5 + (c * (x - 32) + s * (y - 32)) / 64, 0, 1)
    picture = np.empty((size, size, 3), np.float32)
    picture[:] = first
    if mix is not None:
        picture += mix[..., None] * (second - first)
    if look.frame is not None:
        outside = np.clip((np.hypot((x - 32) / 30.5, (y - 32) / 30.5) - 1) * 16 + 0.5, 0, 1)[..., None]
        picture += outside * (np.float32(look.frame) - picture)
    return picture


def _paint(picture: np.ndarray, shape: str, thing: SceneItem | Mark, turn: float, soft: float, scale: float) -> None:
    """Blends a shape or mark into the picture in place; only the window around it is touched."""
    row, column, r = thing.centre[0] * scale, thing.centre[1] * scale, thing.radius * scale
    reach = 1.15 * r + soft + 1
    top, left = max(0, int(row - reach)), max(0, int(column - reach))
    window = picture[top : int(row + reach) + 2, left : int(column + reach) + 2]
    v = np.arange(top, top + window.shape[0], dtype=np.float32)[:, None] - np.float32(row)
    u = np.arange(left, left + window.shape[1], dtype=np.float32)[None, :] - np.float32(column)
    if turn:
        c, s = np.float32(np.cos(turn)), np.float32(np.sin(turn))
        u, v = c * u + s * v, c * v - s * u
    cover = np.clip(distance(shape, u, v, r) / np.float32(soft) + 0.5, 0, 1)
    window += cover[..., None] * (np.array(thing.levels, np.float32) - window)
