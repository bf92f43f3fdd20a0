"""Patients that differ: build, habitus, breathing, contrast, and the shapes that others are drawn in.

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

from tghmoe_jax.drawn.canvas import Warp
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
