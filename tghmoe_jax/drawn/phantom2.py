"""A second drawing style of the phantom, on which nothing is ever trained: the transfer test.

The questions, the places and what a lesion is made of are those of the first style; the drawing is not. Organs are
superquadrics and bent tubes with proportions, textures and Hounsfield units of their own, the body is smaller
and flatter than any of the first style's and bent, edges are softer, noise is correlated and streaked, and requests and
reports are worded otherwise. Axis legend: D slices, H rows, W columns.
"""

import functools

import numpy as np
from scipy import ndimage

from tghmoe_jax.drawn.canvas import Frame
from tghmoe_jax.drawn.phantom import Phantom, plan, scanned
from tghmoe_jax.drawn.phantom_anatomy import PHASES
from tghmoe_jax.drawn.phantom_lesions import Lesion
from tghmoe_jax.drawn.phantom_report import Sentences, report
from tghmoe_jax.drawn.phantom_wordings import Wording
from tghmoe_jax.drawn.wordings import TEXTS

HABITUS = ((0.90, 0.94), (0.86, 0.91), (0.92, 0.96))  # outside the first style's on all three axes
PHASE_HU = {  # by contrast phase: non-contrast, arterial, portal venous, delayed
    "artery": (46, 305, 170, 122),
    "vein": (46, 92, 165, 122),
    "heart": (46, 260, 160, 122),
    "wall": (52, 104, 112, 92),
    "liver": (56, 68, 118, 96),
    "spleen": (48, 135, 122, 94),
    "cortex": (36, 205, 180, 145),
    "medulla": (36, 85, 168, 145),
    "urine": (4, 4, 30, 320),
    "gut": (30, 66, 98, 78),
    "muscle": (58, 62, 70, 66),
}
AIR, LUNG, FAT, BONE, WATER = -995.0, -820.0, -115.0, 520.0, 4.0


def draw(seed: int, grid: tuple[int, int, int] = (16, 64, 64)) -> Phantom:
    """Draws the volume of one seed; the same seed and grid always give the same volume."""
    planned = plan(seed, grid, HABITUS)
    sketch = Sketch(planned.frame, planned.truth.spacing_mm[1], planned.rng)
    draw_body(sketch, {name: values[PHASES.index(planned.truth.phase)] for name, values in PHASE_HU.items()})
    for lesion, centre, radius in planned.placed:
        draw_lesion(sketch, lesion, centre, radius / planned.frame.scale)
    return Phantom(scanned(sketch.noisy(1.3 * planned.truth.noise_hu), planned, sketch.xyz[2]), planned.truth)


class Sketch:
    """A volume being drawn. `xyz` are mm of the nominal body, `bent` the same with the body's own asymmetry."""

    def __init__(self, frame: Frame, pixel_mm: float, rng: np.random.Generator):
        index = np.indices(frame.grid, np.float32).reshape(3, -1)
        mm = (frame.steps.astype(np.float32) @ index + frame.origin[:, None].astype(np.float32)) / frame.scale[:, None]
        self.xyz = mm.astype(np.float32).reshape(3, *frame.grid)
        x, y, z = self.xyz
        a, b = rng.uniform(0, 2 * np.pi, 2)
        self.bent = np.stack([x + 4 * np.sin(z / 75 + a), y + 3 * np.sin(x / 60 + b), z]).astype(np.float32)
        self.soft = 1.5 * pixel_mm
        self.rng = rng
        self.hu = np.full(frame.grid, AIR, np.float32)

    def depth(self, centre, radii, power: float = 2.0, angle: float = 0.0, bent: bool = True) -> np.ndarray:
        """mm below the surface of a superquadric (2: ellipsoid, above: boxier); `angle` turns it about z."""
        x, y, z = (c - np.float32(m) for c, m in zip(self.bent if bent else self.xyz, centre, strict=True))
        if angle:
            x, y = np.cos(angle) * x + np.sin(angle) * y, np.cos(angle) * y - np.sin(angle) * x
        norm = sum(np.abs(c / np.float32(r)) ** np.float32(power) for c, r in zip((x, y, z), radii, strict=True))
        return (1 - norm ** np.float32(1 / power)) * np.float32(min(radii))

    def tube_depth(self, points, radius: float) -> np.ndarray:
        """mm below the surface of a tube along a chain of points."""
        nearest = np.inf
        for start, end in zip(points, points[1:], strict=False):
            a, d = np.array(start, np.float32), np.subtract(end, start).astype(np.float32)
            gap = self.bent - a.reshape(3, 1, 1, 1)
            t = np.clip(np.tensordot(d, gap, 1) / (d @ d), 0, 1)
            nearest = np.minimum(nearest, np.sqrt(((gap - t * d.reshape(3, 1, 1, 1)) ** 2).sum(0)))
        return np.float32(radius) - nearest

    def paint(self, depth: np.ndarray, value, within: np.ndarray | None = None) -> np.ndarray:
        """Moves what lies below a surface to `value`, inside `within` (0..1) alone; returns the membership."""
        weight = np.clip(depth / np.float32(self.soft) + np.float32(0.5), 0, 1)
        weight = weight if within is None else weight * within
        self.hu += weight * (value - self.hu)
        return weight

    def grain(self, size: float) -> np.ndarray:
        """A smooth random field of deviation 1 whose spots are about `size` pixels wide."""
        field = ndimage.gaussian_filter(self.rng.standard_normal(self.hu.shape, np.float32), (size / 3, size, size))
        return field / field.std()

    def noisy(self, hu: float) -> np.ndarray:
        """The drawing under correlated noise of deviation `hu` and horizontal streaks."""
        streaks = ndimage.gaussian_filter1d(self.rng.standard_normal(self.hu.shape[:2], np.float32), 0.7, axis=1)
        return self.hu + np.float32(hu) * (self.grain(0.7) + 0.6 * streaks[:, :, None])


def draw_body(s: Sketch, hu: dict[str, float]) -> None:
    """Draws the healthy torso; `hu` gives the enhancing tissues of the phase."""
    x, y, z = s.bent
    waist = 1 - 0.09 * np.exp(-(((z - 30) / 90) ** 2))

    def trunk(margin: float, power: float) -> np.ndarray:
        sides = np.abs(x / ((170 - margin) * waist)) ** power + np.abs(y / (106 - margin)) ** power
        return (1 - sides ** (1 / power)) * (106 - margin)

    s.paint(s.depth((0, 132, 0), (150, 7, 900), 4, bent=False), -250.0)  # the table is a slab
    for side in (-1, 1):
        s.paint(s.depth((side * 76, -90, 126), (52, 42, 58), 2.4), FAT)
        s.paint(s.depth((side * 76, -94, 122), (18, 16, 40)), -35.0)
    inner = float(s.rng.uniform(8, 26))
    s.paint(trunk(0, 2.6), FAT)
    s.paint(trunk(inner, 2.8), hu["muscle"] + 9 * s.grain(2.0))
    room = (1 - (np.abs(x / 112) ** 2.3 + np.abs((y + 6) / 76) ** 2.3) ** (1 / 2.3)) * 76
    cavity = s.paint(room, FAT + 12 * s.grain(3.0))
    for k in range(12):  # ribs are rings that slope down toward the front
        ring = 7 - np.hypot((room + 8) * 0.9, z - (18 + 23 * k) - 0.3 * y)
        s.paint(np.where(z > 0, ring, -99), BONE)

    lung = np.zeros(s.hu.shape, np.float32)
    for side in (-1, 1):
        dome = z - (66 - 6 * side) + 0.008 * (x - side * 60) ** 2 + 0.006 * (y + 8) ** 2
        depth = np.minimum(s.depth((side * 61, 2, 110), (52, 78, 168), 2.6), dome)
        lung = np.maximum(lung, s.paint(depth, LUNG + 45 * s.grain(1.5)))
    below = cavity * (1 - lung)
    _bones(s)
    _vessels_and_heart(s, hu, lung)
    _abdomen(s, hu, cavity, below)


def _bones(s: Sketch) -> None:
    for k in range(-6, 14):  # vertebrae are boxes
        s.paint(s.depth((0, 62, 12 + 26 * k), (21, 16, 11), 5), BONE - 90)
        s.paint(s.depth((0, 97, 6 + 26 * k), (4, 14, 7), 4), BONE)
    s.paint(s.tube_depth([(0, 80, -170), (0, 80, 400)], 8), 25.0)
    s.paint(s.depth((0, -82, 165), (15, 6, 80), 4), BONE - 60)
    s.paint(s.depth((0, 68, -190), (40, 16, 55), 3), BONE - 160)
    for side in (-1, 1):
        s.paint(s.tube_depth([(side * 16, -74, 262), (side * 80, -58, 280), (side * 135, -15, 268)], 7), BONE)
        s.paint(s.depth((side * 104, 76, 210), (36, 5, 58), 3, angle=side * -0.5), BONE)
        s.paint(s.depth((side * 90, 20, -160), (9, 54, 60), 3, angle=side * 0.55), BONE)
        s.paint(s.depth((side * 92, 8, -258), (33, 33, 33), 2.5), BONE - 80)
        s.paint(s.tube_depth([(side * 96, 6, -262), (side * 126, 10, -300), (side * 122, 8, -430)], 15), BONE)
        s.paint(s.tube_depth([(side * 10, -62, -296), (side * 74, -18, -266), (side * 60, 44, -318)], 9), BONE)


def _vessels_and_heart(s: Sketch, hu: dict[str, float], lung: np.ndarray) -> None:
    s.paint(s.depth((0, 2, 190), (26, 44, 80), 3), FAT + 40)
    for side in (-1, 1):
        for dx, dy, dz in ((34, -40, 40), (44, 20, 60), (42, 34, -40), (30, -22, -50)):
            s.paint(s.tube_depth([(side * 36, 4, 158), (side * (36 + dx), dy, 158 + dz)], 3.5), hu["vein"] - 150, lung)
    s.paint(s.depth((20, -30, 108), (60, 48, 50), 2.4, angle=0.3), hu["wall"])
    s.paint(s.depth((42, -20, 104), (27, 25, 32)), hu["heart"])
    s.paint(s.depth((-8, -38, 110), (29, 30, 36), 2.4), 0.5 * (hu["heart"] + hu["vein"]))
    s.paint(s.depth((12, 8, 130), (28, 16, 19), 2.6), hu["heart"])
    arch = [(-4, -26, 138), (-8, -24, 196), (6, 2, 218), (22, 28, 200), (21, 28, 60), (16, 26, -118)]
    s.paint(s.tube_depth(arch, 13), hu["artery"])
    s.paint(s.tube_depth([(24, -32, 146), (14, -10, 170), (-40, 4, 164)], 12), 0.5 * (hu["artery"] + hu["vein"]))
    s.paint(s.tube_depth([(-26, -6, 128), (-24, -10, 250)], 9), hu["vein"])
    s.paint(s.tube_depth([(0, 16, 340), (0, 16, 176), (-40, 12, 150)], 8), AIR)
    s.paint(s.tube_depth([(0, 16, 176), (40, 12, 150)], 7), AIR)
    s.paint(s.tube_depth([(-20, 26, -118), (-22, 18, 92)], 11), hu["vein"])
    for side in (-1, 1):
        s.paint(s.tube_depth([(side * 6, 24, -112), (side * 44, 14, -160), (side * 72, -36, -258),
                              (side * 82, -52, -420)], 10), hu["artery"])  # fmt: skip
        s.paint(s.tube_depth([(side * 28, 34, -118), (side * 60, 24, -185), (side * 58, -38, -270)], 9), hu["vein"])


def _abdomen(s: Sketch, hu: dict[str, float], cavity: np.ndarray, below: np.ndarray) -> None:
    for side in (-1, 1):
        s.paint(s.depth((side * 44, 74, -40), (34, 22, 240), 3), hu["muscle"] + 6 * s.grain(1.5))
        s.paint(s.tube_depth([(side * 32, 40, 10), (side * 60, 6, -210)], 15), hu["muscle"])
    for _ in range(int(s.rng.integers(5, 8))):  # bowel loops are bent tubes
        walk = np.cumsum([s.rng.uniform((-60, -60, -150), (60, 0, -70)), *s.rng.uniform(-34, 34, (3, 3))], axis=0)
        s.paint(s.tube_depth(walk, 11), hu["gut"] + 20 * s.grain(2.0), cavity)
    s.paint(s.depth((-56, -6, 2), (80, 80, 76), 2.7), hu["liver"] + 7 * s.grain(1.2), below)
    s.paint(s.depth((14, -42, 22), (60, 42, 48), 2.5, angle=0.2), hu["liver"] + 7 * s.grain(1.2), below)
    s.paint(s.depth((60, -36, 32), (38, 40, 40), 2.2), hu["gut"], below)
    s.paint(s.depth((60, -34, 30), (30, 33, 33), 2.2), 60.0, below)  # oral contrast of a little density
    s.paint(s.depth((60, -54, 38), (24, 12, 22)), AIR, below)
    s.paint(s.depth((88, 38, 12), (32, 52, 58), 2.6), hu["spleen"] + 10 * s.grain(1.5), below)
    for side in (-1, 1):
        s.paint(s.depth((side * 62, 40, -46), (30, 28, 56), 2.3), hu["cortex"])
        s.paint(s.depth((side * 59, 40, -46), (19, 18, 42), 2.3), hu["medulla"])
        s.paint(s.depth((side * 50, 36, -46), (15, 12, 24)), hu["urine"])
        s.paint(s.tube_depth([(side * 40, 32, -60), (side * 36, 22, -140), (side * 34, 26, -215)], 4), hu["urine"])
        s.paint(s.tube_depth([(side * 92, -2, -50), (side * 96, 2, -95), (side * 92, -2, -142)], 20), hu["gut"], cavity)
        s.paint(s.tube_depth([(side * 92, -4, -50), (side * 96, -1, -95), (side * 92, -4, -142)], 13), -700.0, cavity)
        s.paint(s.depth((side * 45, 20, -220), (11, 11, 14)), 40.0)
    s.paint(s.depth((0, 22, -220), (28, 18, 34), 2.4), hu["gut"] + 25)
    s.paint(s.tube_depth([(0, 44, -176), (4, 50, -240), (0, 46, -330)], 17), hu["gut"])
    s.paint(s.tube_depth([(0, 42, -176), (4, 48, -270)], 8), -600.0)
    s.paint(s.depth((0, -28, -248), (60, 40, 42), 2.5), hu["muscle"])
    s.paint(s.depth((0, -28, -248), (54, 35, 37), 2.5), hu["urine"])


def draw_lesion(s: Sketch, lesion: Lesion, centre, radii: np.ndarray) -> None:
    """Draws one lesion of half axes `radii` (3,): the materials of the first style in shapes of its own."""
    turn = float(s.rng.uniform(-0.6, 0.6))

    def ball(value, part: float = 1.0, at=(0.0, 0.0, 0.0), power: float = 2.0, stretch=(1.0, 1.0, 1.0)) -> None:
        middle = np.asarray(centre) + radii * at
        s.paint(s.depth(middle, radii * part * np.asarray(stretch), power, turn, bent=False), value)

    lobes = s.rng.uniform(-0.35, 0.35, (4, 3))
    match lesion.lesion:
        case "nodule":  # lobulated
            for at in lobes:
                ball(60.0, 0.75, at)
        case "effusion":
            ball(18.0, stretch=(0.8, 1.2, 1.05), power=3.0)
        case "fracture":  # two displaced ends with callus
            ball(560.0, 0.9, (0.0, -0.3, 0.15))
            ball(820.0, 0.75, (0.15, 0.35, -0.15))
        case "calcification" | "stone":
            ball(900.0, power=3.0)
        case "cyst" if lesion.organ == "ovary":
            ball(80.0, power=2.4)
        case "cyst":
            ball(420.0, 1.03)
            ball(WATER, 0.7)
        case "mass":
            for at in lobes:
                ball(20.0, 0.8, at)
            ball(700.0, 0.6, lobes[0] / 2, 2.6)
        case "abscess":
            ball(28.0, power=2.4)
            ball(-700.0, 0.6, (0.0, -0.2, 0.0))
        case "metastasis":
            for at in lobes:
                ball(950.0, 0.8, at)
        case "aneurysm":
            ball(540.0, power=2.4)
            ball(200.0, 0.74)
        case _:
            raise ValueError(f"no drawing for {lesion.lesion}")


WORDING = Wording(
    TEXTS["second"]["questions"],
    TEXTS["second"]["requests"],
    functools.partial(report, sentences=Sentences(**TEXTS["second"]["sentences"])),
)
