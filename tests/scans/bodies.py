"""Cross-sections of the body in HU, drawn without the project's code, and the ways in which their values go wrong.

A body is a list of ellipses in mm, painted one over the other; each tapers from slice to slice, so that no border runs
straight through the stack. Axis legend: D slices toward Superior, H rows toward Posterior, W columns toward Left.
"""

import dataclasses

import numpy as np

AIR, LUNG, FAT, MUSCLE, BRAIN, CANCELLOUS, CORTICAL, ENAMEL, METAL = -1000, -860, -100, 55, 35, 350, 1150, 2300, 3071


@dataclasses.dataclass(frozen=True)
class Region:
    """field: side of the square in mm; parts: (rx, ry, cx, cy, HU) from the outermost to the innermost."""

    field: float
    parts: tuple[tuple[float, float, float, float, float], ...]
    taper: float = 0.1  # how much narrower the last slice is than the first


def _limb(rx, ry, cx, bones, fat=12):
    skin = ((rx, ry, cx, 0, FAT), (rx - fat, ry - fat, cx, 0, MUSCLE))
    return (*skin, *(part for r, dx, dy in bones for part in _bone(r, cx + dx, dy)))


def _bone(r, cx, cy, wall=0.3):
    return (r, r, cx, cy, CORTICAL), (r * (1 - wall), r * (1 - wall), cx, cy, CANCELLOUS)


_TRUNK = ((170, 115, 0, 0, FAT), (150, 100, 0, 0, MUSCLE))
_SPINE = ((22, 18, 0, 62, CORTICAL), (19, 15, 0, 62, CANCELLOUS), (9, 9, 0, 86, BRAIN))
_LUNGS = ((58, 74, 74, -5, LUNG), (58, 74, -74, -5, LUNG))
_SKULL = ((78, 98, 0, 0, 30), (73, 93, 0, 0, CORTICAL), (66, 86, 0, 0, BRAIN), (12, 26, 0, -5, 8))

REGIONS = {
    "head": Region(240, _SKULL, 0.4),
    "face and teeth": Region(
        200,
        (
            *((70, 85, 0, 0, FAT), (64, 78, 0, 0, MUSCLE), (40, 34, 0, -40, CORTICAL), (36, 30, 0, -40, CANCELLOUS)),
            *((3.5, 5, x, -62 + x * x / 40, ENAMEL) for x in (-24, -16, -8, 0, 8, 16, 24)),
            *((14, 8, 0, -20, AIR), (14, 12, 0, 45, CORTICAL), (11, 9, 0, 45, CANCELLOUS)),
        ),
    ),
    "neck": Region(220, ((62, 68, 0, 0, FAT), (55, 60, 0, 0, MUSCLE), (9, 9, 0, -22, AIR), *_bone(16, 0, 20))),
    "shoulders": Region(
        500,
        (
            (225, 105, 0, 0, FAT),
            (205, 90, 0, 0, MUSCLE),
            (40, 50, 60, 0, LUNG),
            (40, 50, -60, 0, LUNG),
            *_bone(28, 150, 0),
            *_bone(28, -150, 0),
            *_SPINE,
        ),
    ),  # fmt: skip
    "chest": Region(400, (*_TRUNK, *_LUNGS, (18, 18, 10, 25, 300), *_SPINE)),
    "heart, small field": Region(
        220,
        (
            (300, 300, 0, 0, LUNG),
            (75, 68, 12, -10, MUSCLE),
            (40, 36, 20, -10, 320),
            (9, 9, 20, -60, CANCELLOUS),
            *_bone(17, 0, 92),
        ),
    ),  # fmt: skip
    "abdomen": Region(400, (*_TRUNK, (60, 48, -70, -10, 110), (30, 24, 80, 15, 130), (14, 10, 30, -60, AIR), *_SPINE)),
    "abdomen that fills the field": Region(
        400, ((215, 196, 0, 0, FAT), (150, 130, 0, 0, MUSCLE), (60, 48, -70, -10, 110), (14, 10, 30, -60, AIR), *_SPINE)
    ),
    "pelvis": Region(
        420,
        (
            (185, 125, 0, 0, FAT),
            (165, 108, 0, 0, MUSCLE),
            (32, 26, 0, -30, 5),
            *_bone(26, 100, 10),
            *_bone(26, -100, 10),
            (14, 14, 0, 60, AIR),
        ),
    ),  # fmt: skip
    "both thighs": Region(430, (*_limb(88, 90, 100, ((17, 0, 0),)), *_limb(88, 90, -100, ((17, 0, 0),)))),
    "knee": Region(160, _limb(58, 60, 0, ((32, 0, 12), (15, 0, -38)), 8)),
    "both knees, metal": Region(
        380, (*_limb(62, 64, 90, ((34, 0, 8),)), *_limb(62, 64, -90, ((34, 0, 8),)), (14, 10, 90, 0, METAL))
    ),
    "foot, wide field": Region(300, _limb(34, 40, 0, ((13, 6, 6), (8, -14, -6)), 3), 0.3),
    "wrist, wide field": Region(350, _limb(28, 18, 40, ((9, 10, 0), (7, -12, 0)), 3)),
    "small child": Region(
        250,
        ((75, 60, 0, 0, FAT), (70, 55, 0, 0, MUSCLE), (26, 32, 32, 0, LUNG), (26, 32, -32, 0, LUNG), *_bone(9, 0, 34)),
    ),  # fmt: skip
}
# Fields that lie within the body: nothing in them tells how often a rescale was applied.
WITHOUT_AIR = {
    "spine, small field": Region(120, ((300, 300, 0, 0, MUSCLE), (60, 30, 0, -60, FAT), *_bone(24, 0, 0))),
    "liver, cut out": Region(150, ((300, 300, 0, 0, 110), (50, 60, -60, 20, FAT), (12, 12, 20, 0, 180))),
    "brain, cut out": Region(110, ((300, 300, 0, 0, BRAIN), (12, 26, 0, -5, 8), (8, 8, 30, 20, 60))),
}


def draw(region: Region, noise: float, seed: int = 0, shape: tuple[int, int, int] = (16, 96, 96)) -> np.ndarray:
    """HU float64 (D, H, W) of the region with normal noise of `noise` HU, rounded as a scanner stores it."""
    depth, high, wide = shape
    y = ((np.arange(high) + 0.5) / high - 0.5)[:, None] * region.field
    x = ((np.arange(wide) + 0.5) / wide - 0.5)[None, :] * region.field
    hu = np.full(shape, float(AIR))
    for index, plane in enumerate(hu):
        size = 1 - region.taper * index / (depth - 1)
        for rx, ry, cx, cy, value in region.parts:
            plane[((x - cx) / (rx * size)) ** 2 + ((y - cy) / (ry * size)) ** 2 < 1] = value
    return np.rint(hu + np.random.default_rng(seed).normal(0, noise, shape))


def outside(shape: tuple[int, int, int]) -> np.ndarray:
    """bool (H, W): what lies beyond the circle of reconstruction."""
    y, x = (((np.arange(n) + 0.5) / n - 0.5) for n in shape[1:])
    return np.hypot(y[:, None], x[None, :]) > 0.5


def damaged(hu: np.ndarray, way: str, padding: float | None, intercept: float = -1024) -> np.ndarray:
    """Values (D, H, W) of a scan whose HU were handled in this way; `padding` is a stored value outside the circle.

    Ways: `once` (right), `never` and `twice` rescaled, `sign` (signed 16 bit read as unsigned, before the rescale),
    `negated` (grey inverted about water), and `low..high`, clipped to that window.
    """
    stored = np.maximum(hu, -1024) - intercept  # scanners store nothing below
    if padding is not None:
        stored[:, outside(hu.shape)] = padding
    if way == "sign":  # of scans stored in HU; with an intercept only the padding is below 0
        stored = np.where(stored < 0, stored + 2**16, stored)
    if ".." in way:
        return np.clip(stored + intercept, *map(float, way.split("..")))
    values = stored + {"never": 0, "twice": 2}.get(way, 1) * intercept
    return -values if way == "negated" else values
