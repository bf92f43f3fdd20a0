"""Patients that differ, and how the trunk of one is drawn: wall, lungs, bones and chest.

Coordinates are millimetres of the nominal body of `phantom_anatomy` (x toward Left, y toward Posterior, z toward
Superior, z = 0 at the lowest ribs); a `Frame` scales, turns and warps them. Axis legend: D slices, H rows, W columns.
What is random of a patient is drawn before a voxel is: places of lesions are chosen from the same shapes.

The HU below were compared with two labelled real series (machine-made labels, medians within the eroded label): without
contrast liver 47, spleen 35, kidneys 14 and 20, paraspinal muscle 26, blood 42, gallbladder 3, fat -97, lungs -780 to
-856, lumbar vertebrae 110 to 119 (95th percentile 240 to 320), ribs 30 to 280, costal cartilage 114; early after
contrast liver 93, spleen 81, aorta 153, inferior vena cava 96, portal vein 137, fat -84, humerus 640 to 850.
"""

import dataclasses
from typing import NamedTuple

import numpy as np

from tghmoe_jax.drawn.canvas import AIR, Canvas, Warp
from tghmoe_jax.drawn.phantom_anatomy import (
    CAVITY_SHIFT,
    CAVITY_X,
    CAVITY_Y,
    ENHANCEMENT,
    FAT,
    LUNG,
    OUTLINE_X,
    OUTLINE_Y,
    PHASES,
    Z_KNOTS,
)

SEXES = ("female", "male")
NOMINAL_FAT = 16  # mm of fat in OUTLINE_X and OUTLINE_Y
# The trunk ends in a neck; below Z_KNOTS the outline stays as it is.
KNOTS = np.array([*Z_KNOTS[:-1], 300, 330, 370], np.float32)
WALL_X = np.array([*OUTLINE_X[:-1], 128, 80, 58], np.float32) - NOMINAL_FAT
WALL_Y = np.array([*OUTLINE_Y[:-1], 74, 62, 56], np.float32) - NOMINAL_FAT
DEEPER_MM = (6, 22)  # the body of the real series is deeper than that of the phantom: in front, behind
INNER_X = np.array([6, 104, *CAVITY_X[2:-1], 38, 10, 4], np.float32)  # a floor of the pelvis, which the phantom lacks
INNER_Y = np.array([6, 66, *CAVITY_Y[2:-1], 32, 10, 4], np.float32) + 7
INNER_SHIFT = np.array([*CAVITY_SHIFT[:-1], 6, 6, 6], np.float32) + 5
SPINE = ((-340, -230, -140, -50, 60, 170, 260, 340), (66, 68, 52, 38, 46, 60, 54, 40))  # z, y of the vertebral bodies
CAVITY_MM = 45.0  # half axis of the cavity by which relative depths become mm
RIB_MM, RIB_SLOPE = 38.0, 0.35  # distance of the ribs along z, and how much they run down toward the front
RIB_DEPTH = 6.0  # mm outside the cavity

# Organs that vary on their own: their centre moves by up to SHIFT_MM, their radii by FACTOR, their angle by TURN.
ORGANS = (
    "lungs", "heart", "liver", "left lobe", "gallbladder", "stomach", "spleen", "pancreas", "right kidney",
    "left kidney", "bladder", "womb", "right ovary", "left ovary", "right colon", "left colon", "rectum", "breasts",
    "muscle",
)  # fmt: skip
SHIFT_MM, FACTOR, TURN = 10.0, (0.8, 1.25), 0.3
# How far an organ moves with the diaphragm, a share of that.
BREATHING = {
    "liver": 1.0, "left lobe": 1.0, "gallbladder": 1.0, "stomach": 1.0, "spleen": 1.0, "pancreas": 0.5, "heart": 0.5,
    "right kidney": 0.5, "left kidney": 0.5,
}  # fmt: skip


class Ball(NamedTuple):
    """An ellipsoid of the nominal body: mm, and radians about z."""

    centre: np.ndarray
    radii: np.ndarray
    angle: float


@dataclasses.dataclass(frozen=True)
class Patient:
    """What differs between patients.

    `scale` is mm of the patient for each nominal mm, `fat_mm` the layer under the skin, `belly_mm` what the abdomen
    stands out by, `breath_mm` how far the diaphragm stands below its middle position, `bone` a factor of HU above soft
    tissue, `hu` the HU of each tissue, `jitter` of each organ (shift, factors, turn), `outline` factors of the wall at
    KNOTS.
    """

    sex: str
    scale: np.ndarray
    fat_mm: float
    belly_mm: float
    breath_mm: float
    bone: float
    arms: bool
    hu: dict[str, float]
    jitter: dict[str, tuple[np.ndarray, np.ndarray, float]]
    outline: np.ndarray
    warp: Warp

    def ball(self, organ: str, centre, radii, angle: float = 0.0) -> Ball:
        """An ellipsoid that belongs to an organ, as this patient has it."""
        shift, factors, turn = self.jitter[organ]
        return Ball(np.asarray(centre) + shift, np.asarray(radii) * factors, angle + turn)

    def moved(self, organ: str, point) -> np.ndarray:
        """A point that moves with an organ."""
        return np.asarray(point, np.float64) + self.jitter[organ][0]

    def wall(self, z: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Half axes of the muscular wall along x, and along y behind and in front."""
        a, b = _interp(z, WALL_X * self.outline), _interp(z, WALL_Y * self.outline)
        front, back = (np.float32(mm) for mm in DEEPER_MM)
        return a, b + back, b + front + np.float32(self.belly_mm) * np.exp(-(((z + 40) * np.float32(1 / 110)) ** 2))

    def cavity(self, y: np.ndarray, z: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Half axes along x and y of the thoracic and abdominal cavity at each point, and y from its middle."""
        a, b = _interp(z, INNER_X * self.outline), _interp(z, INNER_Y * self.outline)
        y = y - _interp(z, INNER_SHIFT)
        front = np.float32(self.belly_mm) * np.exp(-(((z + 40) * np.float32(1 / 110)) ** 2))
        return a, np.where(y < 0, b + front, b), y

    def cavity_depth(self, x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
        """mm, roughly, below the surface of the cavity."""
        a, b, y = self.cavity(y, z)
        return (1 - (x / a) ** 2 - (y / b) ** 2) * np.float32(CAVITY_MM)

    def lung_depth(self, side: int, x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
        """mm, roughly, below the surface of the lung of a side (-1 right, 1 left), the diaphragm included."""
        lung = self.lung(side)
        u, v, w = ((c - np.float32(m)) * np.float32(1 / r) for c, m, r in zip((x, y, z), *lung[:2], strict=True))
        depth = (1 - u**2 - v**2 - w**2) * np.float32(28)
        return np.minimum(depth, z - self.dome(side, x, y))

    def lung(self, side: int) -> Ball:
        return self.ball("lungs", (side * 63, 8, 105), (57, 90, 178))

    def dome(self, side: int, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """z of the diaphragm; the right dome stands higher."""
        top = (84 if side < 0 else 74) - self.breath_mm
        return top - ((x - side * 62) * np.float32(1 / 60)) ** 2 * 45 - ((y + 10) * np.float32(1 / 85)) ** 2 * 50


def breast_of(p: Patient, side: int) -> Ball:
    """A breast of a woman."""
    return p.ball("breasts", (side * 66, -84 - p.fat_mm / 3, 125), (50, 42, 56), side * 0.2)


def heart_of(p: Patient) -> Ball:
    return p.ball("heart", (22, -30, 112), (60, 48, 52))


def waves(xyz, length_mm: tuple[float, float], count: int, rng: np.random.Generator) -> np.ndarray:
    """float32: a sum of sine waves along random directions."""
    total = np.float32(0)
    for _ in range(count):
        way = rng.standard_normal(3)
        way *= 2 * np.pi / (rng.uniform(*length_mm) * np.linalg.norm(way))
        kx, ky, kz, phase = (np.float32(v) for v in (*way, rng.uniform(0, 2 * np.pi)))
        total = total + np.sin(kx * xyz[0] + ky * xyz[1] + kz * xyz[2] + phase)
    return total


def _interp(z: np.ndarray, values: np.ndarray) -> np.ndarray:
    return np.interp(z, KNOTS, values).astype(np.float32)


def make_patient(phase: str, rng: np.random.Generator) -> Patient:
    """A patient whose contrast phase this is."""
    size = rng.uniform(0.88, 1.13)
    obese = rng.uniform(0, 1)
    wave = rng.standard_normal((3, 3))
    wave *= 2 * np.pi / (rng.uniform(180, 420, (3, 1)) * np.linalg.norm(wave, axis=1, keepdims=True))
    breath = rng.uniform(-18, 18)
    shifts, factors = rng.uniform(-SHIFT_MM, SHIFT_MM, (len(ORGANS), 3)), rng.uniform(0, 1, (len(ORGANS), 3))
    shifts *= np.array([0.4 if organ in ("lungs", "muscle") else 1 for organ in ORGANS])[:, None]
    shifts[:, 2] -= breath * np.array([BREATHING.get(organ, 0) for organ in ORGANS])
    factors = FACTOR[0] * (FACTOR[1] / FACTOR[0]) ** factors
    turns = rng.uniform(-TURN, TURN, len(ORGANS))
    jitter = dict(zip(ORGANS, zip(shifts, factors, turns.tolist(), strict=True), strict=True))
    jitter["lungs"] = (shifts[0], 0.93 + 0.12 * (factors[0] - FACTOR[0]) / (FACTOR[1] - FACTOR[0]), 0.0)
    return Patient(
        sex=SEXES[rng.integers(2)],
        scale=np.clip(size * rng.uniform(0.91, 1.10, 3), 0.8, 1.25),
        fat_mm=float(4 * (50 / 4) ** obese),
        belly_mm=float(rng.uniform(0, 34) * obese**2 + rng.uniform(0, 8)),
        breath_mm=float(breath),
        bone=float(rng.uniform(0.55, 1.25)),
        arms=bool(rng.random() < 0.25),
        hu=_tissues(phase, rng),
        jitter=jitter,
        outline=rng.uniform(0.95, 1.05, len(KNOTS)).astype(np.float32),
        warp=Warp(wave, rng.uniform(0, 2 * np.pi, 3), rng.uniform(-8 / 3, 8 / 3, (3, 3))),
    )


# How much of the way to the phase before and after a scan may be timed; not toward those that would look the same.
TIMING = {"non-contrast": (0, 0), "arterial": (0.1, 0.2), "portal venous": (0.15, 0.2), "delayed": (0.2, 0)}


def _tissues(phase: str, rng: np.random.Generator) -> dict[str, float]:
    """HU of each tissue: contrast of a phase, timed a little early or late and more or less strong."""
    column, (early, late) = PHASES.index(phase), TIMING[phase]
    when, gain = rng.uniform(-early, late), rng.uniform(0.9, 1.1)
    neighbour = column + (1 if when > 0 else -1 if when < 0 else 0)
    found = {}
    for tissue, values in ENHANCEMENT.items():
        plain = values[0] + rng.normal(0, 4)
        timed = values[column] + abs(when) * (values[neighbour] - values[column])
        found[tissue] = float(plain + gain * (timed - values[0]))
    if rng.random() < 0.15:  # a fatty liver
        found["liver"] -= rng.uniform(15, 40)
    found["muscle"] -= rng.uniform(0, 28)
    return found | {
        "fat": FAT + rng.normal(0, 5),
        "lung": LUNG + rng.uniform(-20, 80),
        "marrow": rng.uniform(70, 200),
        "cortical": rng.uniform(300, 750),
        "cartilage": rng.uniform(90, 140),
    }


@dataclasses.dataclass
class Torso:
    """A patient on a canvas, and the regions that later shapes are confined to, float32 (D, H, W) in 0..1."""

    canvas: Canvas
    patient: Patient
    rng: np.random.Generator
    lung: np.ndarray
    cavity: np.ndarray
    trunk: np.ndarray  # within the skin

    @property
    def below(self) -> np.ndarray:
        """The abdomen: the cavity without the lungs."""
        return self.cavity * (1 - self.lung)

    def ball(self, ball: Ball, value, part: float = 1.0, limit: np.ndarray | None = None) -> None:
        """Draws an ellipsoid, or the inner `part` of it."""
        self.canvas.ellipsoid(ball.centre, ball.radii * part, value, ball.angle, limit)

    def chain(self, points, radius: float, value, limit: np.ndarray | None = None) -> None:
        """Draws a tube along a chain of points."""
        for start, end in zip(points, points[1:], strict=False):
            self.canvas.capsule(start, end, radius, value, limit)

    def bone(self, hu: float) -> float:
        """HU of bone in this patient."""
        return hu * self.patient.bone


def draw_trunk(canvas: Canvas, patient: Patient, rng: np.random.Generator) -> Torso:
    """Draws wall, lungs, bones and the organs of the chest."""
    torso = _wall(canvas, patient, rng)
    _lungs(torso)
    _spine(torso)
    _girdles(torso)
    _chest(torso)
    return torso


def _wall(canvas: Canvas, patient: Patient, rng: np.random.Generator) -> Torso:
    x, y, z = canvas.xyz
    hu, fat = patient.hu, np.float32(patient.fat_mm)
    a, back, front = patient.wall(z)
    ahead = y < 0
    b = np.where(ahead, front, back)

    def depth(side, ends) -> np.ndarray:
        u2, v2 = (x / (a + side)) ** 2, (y / (b + ends)) ** 2
        return (1 - u2 - v2 + np.float32(0.25) * u2 * v2) * np.float32(55)

    thick = np.where(ahead, np.float32(0.75), np.float32(0.85)) * fat  # least over the ribs, most over the buttocks
    thick = thick * np.interp(z, (-260, -160, 0, 200), (1.25, 1.1, 1.0, 0.55)).astype(np.float32)
    if patient.arms:
        for side in (-1, 1):
            shoulder, hand = (side * (172 + fat), 20, 270), (side * (196 + fat), 10, -330)
            canvas.capsule(shoulder, hand, 40, hu["fat"])
            canvas.capsule(shoulder, hand, 34 - 0.2 * fat, hu["muscle"])
            canvas.capsule(shoulder, hand, 12, hu["cortical"] * patient.bone)
            canvas.capsule(shoulder, hand, 7, 60.0)
    if patient.sex == "female":
        for side in (-1, 1):
            breast = breast_of(patient, side)
            canvas.ellipsoid(breast.centre, breast.radii, hu["fat"])
            canvas.ellipsoid(breast.centre, breast.radii * 0.55, (hu["fat"] + hu["muscle"]) / 2)
    skin = depth(thick, thick)
    trunk = canvas.weight(skin)
    canvas.blend(None, trunk, 20.0)
    canvas.blend(None, canvas.weight(skin - 2), hu["fat"])
    canvas.blend(None, canvas.weight(depth(0, 0)), hu["muscle"])
    legs = canvas.weight((-z - 345) * np.float32(0.35) - np.abs(x))
    if legs.any():
        canvas.blend(None, legs, AIR)
    inside = patient.cavity_depth(x, y, z)
    cavity = canvas.weight(inside)
    canvas.blend(None, cavity, hu["fat"] + 4)
    # Ribs: a shell round the thoracic cavity, cut into bands that run down toward the front, where they are cartilage.
    band = np.clip(np.cos((z - np.float32(RIB_SLOPE) * y) * np.float32(2 * np.pi / RIB_MM)) * 3 - 0.2, 0, 1)
    band = band * canvas.weight(z + 15) * canvas.weight(285 - z)
    if band.max() > 0:
        shell = np.clip(1.4 - np.abs(inside + np.float32(RIB_DEPTH)) * np.float32(1 / 4), 0, 1)
        bone = np.where(y > -48, np.float32(0.75 * hu["cortical"] * patient.bone), np.float32(hu["cartilage"]))
        canvas.blend(None, shell * band, bone)
    return Torso(canvas, patient, rng, np.zeros_like(cavity), cavity, trunk)


def _lungs(t: Torso) -> None:
    canvas, patient = t.canvas, t.patient
    for side in (-1, 1):
        lung = patient.lung(side)
        box = canvas.box(lung.centre, lung.radii)
        depth = patient.lung_depth(side, *canvas.coordinates(box))
        t.lung[box] = np.maximum(t.lung[box], canvas.weight(depth) * t.cavity[box])
    if not t.lung.any():
        return
    y = canvas.xyz[1]
    canvas.blend(None, t.lung, np.float32(patient.hu["lung"]) + np.float32(0.35) * y)  # denser where it lies
    # Small vessels: where two sums of waves are near 0 at once, which is along curves.
    width = max(3.0, 0.6 * canvas.soft)
    near = np.zeros(canvas.hu.shape, np.float32)
    for _ in range(2):
        near += (waves(canvas.xyz, (60, 130), 3, t.rng) * np.float32(45 / width)) ** 2
    canvas.blend(None, t.lung * np.clip(1.3 - near, 0, 1) * np.float32((3.0 / width) ** 1.5), patient.hu["vein"] - 80)


def _spine(t: Torso) -> None:
    canvas, hu = t.canvas, t.patient.hu
    marrow, cortical = hu["marrow"] * t.patient.bone, t.bone(hu["cortical"])
    box = canvas.box((0, 62, 0), (52, 62, 900))
    x, y, z = canvas.coordinates(box)
    y = y - np.interp(z, *SPINE).astype(np.float32)
    wave = np.cos(z * np.float32(2 * np.pi / 36))
    body = (1 - (x * np.float32(1 / 24)) ** 2 - (y * np.float32(1 / 19)) ** 2) * np.float32(10)
    bone = np.clip(wave * 4 + 3.4, 0, 1) * canvas.weight(z + 185)
    rim = np.clip(1.4 - np.abs(body - 1.2) * np.float32(0.6), 0, 1) + np.clip(1 - np.abs(wave + 0.7) * 5, 0, 1)
    value = np.float32(90) + bone * (np.float32(marrow - 90) + np.float32(0.5 * cortical) * np.clip(rim, 0, 1))
    canvas.blend(box, canvas.weight(body) * canvas.weight(z + 230), value)
    arch = np.clip(np.cos((z - 8) * np.float32(2 * np.pi / 36)) * 4 + 2, 0, 1) * canvas.weight(z + 230)
    ring = (1 - (x * np.float32(1 / 19)) ** 2 - ((y - 30) * np.float32(1 / 16)) ** 2) * np.float32(8)
    cross = np.clip(arch * 2 - 1, 0, 1)  # processes, once a vertebra
    wings = np.minimum(7 - np.abs(y - 32), 46 - np.abs(x))
    spine = np.minimum(4 - np.abs(x), 20 - np.abs(y - 48))
    for depth, part in ((wings, cross), (spine, arch), (ring, 0.5 + 0.5 * arch)):
        canvas.blend(box, canvas.weight(depth) * part * t.trunk[box], np.float32(0.6 * cortical + 0.4 * marrow))
    canal = (1 - (x * np.float32(1 / 10)) ** 2 - ((y - 27) * np.float32(1 / 9)) ** 2) * np.float32(4)
    canvas.blend(box, canvas.weight(canal), 22.0)


def _girdles(t: Torso) -> None:
    """Breastbone, shoulders, pelvis and thighs: cortical bone round marrow."""
    canvas, hard = t.canvas, t.bone(t.patient.hu["cortical"])
    marrow = t.patient.hu["marrow"] * t.patient.bone
    ball, rod = canvas.ellipsoid, canvas.capsule
    ball((0, -82, 170), (17, 7, 75), 0.5 * hard)
    ball((0, 68, -200), (46, 19, 52), 0.5 * hard)
    ball((0, 68, -200), (40, 13, 46), marrow)
    for side in (-1, 1):
        ball((side * 105, 82, 205), (38, 6, 62), hard, side * -0.6, t.trunk)
        rod((side * 20, -70, 255), (side * 130, -20, 278), 7, hard)
        rod((side * 140, 4, 262), (side * 150, 6, 200), 19, 0.7 * hard)
        rod((side * 140, 4, 262), (side * 150, 6, 200), 14, marrow)
        ball((side * 88, 22, -165), (11, 58, 68), hard, side * 0.62)
        ball((side * 88, 22, -165), (6, 50, 60), marrow, side * 0.62)
        ball((side * 90, 6, -258), (34, 34, 34), 0.8 * hard)
        ball((side * 96, 4, -260), (28, 27, 27), 60.0)
        ball((side * 96, 4, -260), (23, 23, 23), 0.7 * hard)
        ball((side * 96, 4, -260), (19, 19, 19), marrow + 120)
        rod((side * 96, 4, -260), (side * 128, 12, -292), 14, 0.7 * hard)
        rod((side * 130, 12, -290), (side * 120, 10, -460), 15, hard)
        rod((side * 130, 12, -300), (side * 120, 10, -460), 8, 40.0)
        rod((side * 12, -62, -292), (side * 72, -20, -268), 10, 0.8 * hard)
        rod((side * 72, 36, -265), (side * 56, 42, -325), 13, 0.7 * hard)
        rod((side * 56, 42, -325), (side * 16, -50, -318), 8, 0.8 * hard)


def _chest(t: Torso) -> None:
    hu, canvas, patient = t.patient.hu, t.canvas, t.patient
    mixed = (hu["artery"] + hu["vein"]) / 2
    for side in (-1, 1):  # lung vessels fan out from the hilum
        for _ in range(9):
            way = t.rng.uniform((0.5, -0.8, -0.9), (1.0, 0.9, 0.9)) * (58 * side, 62, 80)
            fork = np.array((side * 34, 6, 158)) + 0.55 * way
            t.chain(((side * 34, 6, 158), fork), 3.6, mixed, t.lung)
            for _ in range(2):
                t.chain((fork, fork + 0.5 * way + t.rng.uniform(-22, 22, 3)), 2.4, mixed - 40, t.lung)
    canvas.ellipsoid((0, 2, 190), (28, 46, 85), hu["fat"] + 15)  # mediastinum
    muscle, blood = hu["myocardium"], hu["heart"]
    heart = heart_of(patient)
    t.ball(heart, hu["fat"] + 10, 1.07)
    t.ball(heart, muscle)
    for centre, radii, value in (
        ((44, -20, 104), (28, 26, 32), blood),
        ((-6, -40, 112), (30, 30, 36), (blood + hu["vein"]) / 2),
        ((14, 6, 128), (30, 17, 22), blood),
    ):
        t.ball(patient.ball("heart", centre, radii), value)
    root = patient.moved("heart", (-6, -24, 140))
    t.chain((root, (-6, -22, 205), (8, 0, 216), (22, 26, 205), (22, 28, 60), (10, 22, -115)), 13, hu["artery"])
    t.chain((patient.moved("heart", (24, -34, 145)), (20, -14, 172), (-42, 2, 164)), 12, mixed)
    t.chain(((20, -10, 170), (50, 8, 168)), 11, mixed)
    t.chain(((-26, -8, 130), (-24, -12, 240), (-40, -20, 300)), 10, hu["vein"] * 1.1)
    t.chain(((12, 24, 330), (10, 26, 200), (12, 22, 80)), 8, hu["bowel"])  # gullet
    t.chain(((10, 8, 218), (26, -6, 300)), 6, hu["artery"])
    t.chain(((-8, -6, 214), (-26, -6, 300)), 6, hu["artery"])
    t.chain(((0, 14, 178), (0, 4, 420)), 12, 60.0)
    t.chain(((0, 14, 178), (0, 4, 420)), 9, AIR)
    for side in (-1, 1):
        t.chain(((0, 14, 180), (side * 42, 12, 152)), 9, 40.0)
        t.chain(((0, 14, 180), (side * 42, 12, 152)), 7, AIR + 40)
