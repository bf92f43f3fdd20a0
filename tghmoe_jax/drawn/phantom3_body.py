"""The patient of the third phantom style: habitus, position, and where every organ lies.

`Figure` answers questions about geometry alone; `phantom3_anatomy` paints HU with its answers.
"""

import dataclasses
import functools
import zlib

import numpy as np

from tghmoe_jax.drawn import phantom3_tables as tables
from tghmoe_jax.drawn.phantom3_shapes import ANGLES, STEP, TURN, Posed, Sweep, Table, solid, sweep

LOW = -340.0  # mm: the lowest level of the trunk
LEVELS = np.arange(LOW, 520.1, STEP)  # up to the neck
# Parts that move together: the name of a part -> the group whose scale and shift it has.
_GROUP = {
    **dict.fromkeys(
        ("heart", "left ventricle", "right ventricle", "right atrium", "left atrium", "mediastinum"), "heart"
    ),
    **dict.fromkeys(
        ("gallbladder", "right liver vein", "middle liver vein", "left liver vein", "left portal vein", "portal vein"),
        "liver",
    ),
    "spleen vein": "pancreas",
    "kidney sinus": "kidney",
}
# How much of the diaphragm's shift a group follows.
_BREATH = {"liver": 1.0, "spleen": 0.9, "stomach": 0.7, "kidney": 0.5, "heart": 0.6, "pancreas": 0.4, "duodenum": 0.4}
_STILL = ("erector", "sacrum", "psoas", "quadratus", "mediastinum")  # parts that stay where the skeleton is


@dataclasses.dataclass(frozen=True)
class Person:
    """A patient. Lengths are in mm, angles in radians, and a factor of 1 is that of the average adult.

    scale: turns the atlas into this patient's size, for x, y and z; turn: rotations about x, y and z; position: x and y
    of the scanner's frame where the atlas' origin lies; fat: factor of the fat under the skin; belly: how far the front
    of the belly stands out; breath: how far the diaphragm has moved up; density: factor of the bones' density; dose:
    factor of the contrast medium's effect; sway: scoliosis; breast: height of the breasts; fatty: HU that the liver has
    lost; filling: factor of the bladder's size; arms: 0 to 1, how far the shoulders stand out.
    """

    seed: int
    female: bool
    scale: tuple[float, float, float]
    turn: tuple[float, float, float]
    position: tuple[float, float]
    fat: float
    belly: float
    breath: float
    density: float
    dose: float
    sway: float
    breast: float
    fatty: float
    filling: float
    arms: float

    @staticmethod
    def make(rng: np.random.Generator, seed: int, female: bool) -> "Person":
        """A random adult."""
        size = rng.normal(0.95 if female else 1.02, 0.045)
        x, y, z = size * rng.normal(1, 0.03, 3)
        fat = float(np.exp(rng.normal(0.05 if female else -0.1, 0.4)))
        return Person(
            seed=seed,
            female=female,
            scale=(float(x), float(y), float(np.clip(z, 0.87, 1.1))),
            turn=(rng.normal(0, 0.02), rng.normal(0, 0.02), float(np.clip(rng.normal(0, 0.055), -0.13, 0.13))),
            position=(rng.normal(0, 6), rng.normal(0, 6)),
            fat=float(np.clip(fat, 0.35, 2.2)),
            belly=float(np.clip(rng.normal(6 + 9 * (fat - 1), 9), -10, 34)),
            breath=rng.normal(0, 8),
            density=rng.uniform(0.55, 1.2),
            dose=rng.uniform(0.75, 1.2),
            sway=rng.normal(0, 3.5),
            breast=float(np.clip(rng.normal(36 + 10 * (fat - 1), 8), 24, 62)) if female else 0.0,
            fatty=rng.uniform(8, 30) if rng.random() < 0.25 else 0.0,
            filling=rng.uniform(0.72, 1.12),
            arms=rng.uniform(0, 1),
        )

    @functools.cached_property
    def frame(self) -> np.ndarray:
        """Rotation (3, 3) from the atlas' axes to the scanner's."""
        (sa, sb, sc), (ca, cb, cc) = np.sin(self.turn), np.cos(self.turn)
        about_x = np.array([[1, 0, 0], [0, ca, -sa], [0, sa, ca]])
        about_y = np.array([[cb, 0, sb], [0, 1, 0], [-sb, 0, cb]])
        about_z = np.array([[cc, -sc, 0], [sc, cc, 0], [0, 0, 1]])
        return about_z @ about_y @ about_x

    def bend(self, z):
        """How far the body sways to the left at level z (mm): a slight scoliosis."""
        return self.sway * np.sin(z / np.float32(110) + np.float32(self.seed % 7))

    def to_scanner(self, points) -> np.ndarray:
        """Points of the scanner's frame (N, 3) in mm where the atlas' points (N, 3) lie."""
        p = np.array(points, float)
        p[:, 0] += self.bend(p[:, 2])
        return (p * self.scale) @ self.frame.T + (*self.position, 0.0)

    def from_scanner(self, points) -> np.ndarray:
        """The inverse of `to_scanner`."""
        p = (np.asarray(points, float) - (*self.position, 0.0)) @ self.frame / self.scale
        p[:, 0] -= self.bend(p[:, 2])
        return p


def _superellipse(a, front, back, power) -> np.ndarray:
    c, s = np.abs(np.cos(TURN)), np.sin(TURN)
    depth = np.where(s < 0, front[:, None], back[:, None])
    n = power[:, None]
    return ((c / a[:, None]) ** n + (np.abs(s) / depth) ** n) ** (-1 / n)


@functools.cache
def _trunk() -> dict[str, np.ndarray]:
    """The trunk of an average adult, float32: `middle` (levels, 2), and radii or shares of radii (levels, ANGLES)."""
    rows = np.array(tables.TRUNK, float)
    mid, *wall, a, f, b, n = (np.interp(LEVELS, rows[:, 0], c) for c in rows[:, 1:].T)
    rows = np.array(tables.FAT, float)
    front, side, back = (np.interp(LEVELS, rows[:, 0], c)[:, None] for c in rows[:, 1:].T)
    z, s, behind = LEVELS[:, None], np.sin(TURN), TURN - np.pi / 2
    ahead = np.where(s < 0, s * s, 0)
    side_belly = 0.5 * np.exp(-(((z - 40) / 80) ** 2)) * (1 - s * s)
    parts = {
        "middle": np.stack([0 * mid, mid], 1),
        "wall": _superellipse(wall[0], mid - wall[1], wall[2] - mid, wall[3]),
        "inner": _superellipse(a, np.maximum(mid - f, 2), np.maximum(b - mid, 2), n),
        "fat": front * ahead + back * np.where(s > 0, s * s, 0) + side * (1 - s * s),
        "belly": ahead * np.exp(-(((z - 35) / 85) ** 2)) + side_belly,
        "breast": breast_bump(z, TURN),
        "furrow": np.exp(-((behind / 0.07) ** 2)) + 0 * z,
        "cleft": np.exp(-((behind / 0.1) ** 2)) / (1 + np.exp((z + 135) / 10)),
        "shoulder": np.exp(-(((z - 392) / 24) ** 2)) * np.cos(TURN) ** 4,
    }
    # The slopes of a patient's walls are close to these.
    for name in ("wall", "inner"):
        parts[f"{name} slope"] = Table.make(LOW, parts["middle"], parts[name]).slope
    return {name: np.float32(values) for name, values in parts.items()}


def breast_bump(z, turn) -> np.ndarray:
    """How far the breasts stand out at level z (mm) and an angle about the trunk's middle: a share of their height."""
    left = np.exp(-((((turn - np.radians(306) + np.pi) % (2 * np.pi) - np.pi) / 0.30) ** 4))
    right = np.exp(-((((turn - np.radians(234) + np.pi) % (2 * np.pi) - np.pi) / 0.30) ** 4))
    return (left + right) * np.exp(-((np.abs(z - 258) / 44) ** 2.6))


def trunk_middle(z):
    """y in mm of the middle of the trunk at level z, about which its angles count."""
    rows = np.array(tables.TRUNK, float)
    return np.interp(z, rows[:, 0], rows[:, 1])


def buttock_seam(x, y, z) -> np.ndarray:
    """Distance (N,) in mm to the seam under the great muscle of the left buttock; `x` counts from the midline."""
    return np.abs(y - 62 - 0.45 * (x - 110) + 0.1 * (z + 100)) * np.float32(0.9)


def rib_line(rib, angle) -> np.ndarray:
    """Level in mm of the middle of rib 1 to 12 at an angle from the back, in degrees (numbers or arrays)."""
    start, end, last = np.array([row[:3] for row in tables.RIBS], float)[np.asarray(rib) - 1].T
    share = np.clip((angle - 14) / (last - 14), 0, 1)
    return start + 6 * np.sin(np.pi * share) + (end - start) * share**1.15


@functools.cache
def ribs() -> tuple[np.ndarray, np.ndarray]:
    """Offsets (levels, ANGLES) in mm to the nearest rib and to the nearest rib cartilage.

    Measured along the inner surface of the chest, at right angles to the rib; 1000 where no rib is near.
    """
    angle = np.abs((np.degrees(TURN) - 90 + 180) % 360 - 180)  # 0 at the back, 180 in front
    bone = np.full((len(LEVELS), ANGLES), 1000.0)
    gristle = bone.copy()
    for rib, (start, end, last, meets) in enumerate(tables.RIBS, 1):
        line = rib_line(rib, angle)
        lean = np.cos(np.arctan(np.abs(end - start) / (np.radians(last - 14) * 125)))
        v = np.where((angle >= 14) & (angle <= last), (LEVELS[:, None] - line) * lean, 1000)
        bone = np.where(np.abs(v) < np.abs(bone), v, bone)
        if meets is None:
            continue
        stop = 174 if rib <= 7 else last + 22
        share = np.clip((angle - last) / (stop - last), 0, 1)
        line = end + (meets - end) * share**1.3
        lean = np.cos(np.arctan(np.abs(meets - end) / (np.radians(stop - last) * 110)))
        v = np.where((angle >= last) & (angle <= stop), (LEVELS[:, None] - line) * lean, 1000)
        gristle = np.where(np.abs(v) < np.abs(gristle), v, gristle)
    return bone.astype(np.float32), gristle.astype(np.float32)


@functools.cache
def _solid(name: str) -> Table:
    return solid(tables.SOLIDS[name], 8.0 if name in ("ovary", "kidney sinus") else 10.0)


class Figure:
    """Where everything lies in one patient, in the frame of the atlas."""

    def __init__(self, patient: Person) -> None:
        self.patient = patient
        self._paths: dict[tuple[str, bool], Sweep] = {}
        self._shapes: dict[tuple[str, bool], Posed] = {}

    def rng(self, name: str) -> np.random.Generator:
        """A generator for one part, the same whatever was drawn before."""
        return np.random.default_rng([self.patient.seed, zlib.crc32(name.encode())])

    @functools.cached_property
    def inner(self) -> Table:
        """The inner wall of chest, belly and pelvis."""
        trunk = _trunk()
        radius = trunk["inner"] + np.float32(self.patient.belly) * trunk["belly"]
        return Table(LOW, trunk["middle"], radius, trunk["inner slope"])

    @functools.cached_property
    def outsides(self) -> tuple[Table, Table]:
        """The skin and the outer surface of the muscles (wall); their angles count about the middle of `inner`."""
        patient, trunk = self.patient, _trunk()
        fat, arms = np.float32(patient.fat), np.float32(patient.arms)
        wall = trunk["wall"] + np.float32(patient.belly) * trunk["belly"] + (arms * 26 - 8) * trunk["shoulder"]
        skin = wall + 2 + fat * trunk["fat"] + np.float32(patient.breast) * trunk["breast"]
        skin -= 5 * trunk["furrow"] + (30 + 14 * fat) * trunk["cleft"]
        wall = np.minimum(wall, skin - 2)
        return Table.make(LOW, trunk["middle"], skin), Table(LOW, trunk["middle"], wall, trunk["wall slope"])

    def surfaces(self, x, y, z):
        """Distances (N,) in mm to skin, wall and inner wall, and the cells (N,) of their tables."""
        spot = self.inner.place(x, y, z)
        skin, wall = self.outsides
        return skin.at(spot), wall.at(spot), self.inner.at(spot), spot.cell

    def above(self, x, y, z, inner) -> np.ndarray:
        """Distance (N,) in mm above the diaphragm, negative below; `inner` is the distance to the inner wall."""
        right = 1 / (1 + np.exp(np.clip(x / np.float32(16), -20, 20)))
        top = 212 + 15 * right + np.float32(self.patient.breath)
        inward = np.clip((62 - np.abs(x)) / 62, 0, 1)
        dome = 20 * inward * inward * (1.5 - 0.5 * inward) + 14 * ((y + 8) / 70) ** 2
        rho = np.sqrt(x * x + (y - 5) ** 2) + np.float32(1)
        s = (y - 5) / rho
        fall = np.where(s > 0, 70 + 35 * s * s, 70 - 46 * s * s)
        share = 1 - np.clip(-inner / 48, 0, 1)
        power = share ** np.float32(2.2)
        steep = fall * power * np.float32(3.2 / 48)  # the diaphragm hangs down along the wall
        return (z - top + dome + fall * power * share) / np.sqrt(1.3 + steep * steep)

    def under(self, x, y, z, inner=None) -> np.ndarray:
        """Distance (N,) in mm to the space under the diaphragm, negative inside."""
        if inner is None:
            inner = self.inner.distance(x, y, z)
        return np.maximum(self.above(x, y, z, inner) + 3, inner + 3)

    def lung(self, x, y, z, inner=None) -> np.ndarray:
        """Distance (N,) in mm to the surface of the lungs, negative inside."""
        if inner is None:
            inner = self.inner.distance(x, y, z)
        mediastinum = self.shape("mediastinum").distance(x, y, z)
        return np.maximum(np.maximum(inner + 2, -self.above(x, y, z, inner)), 1.5 - mediastinum)

    def shape(self, name: str, right: bool = False) -> Posed:
        """A solid as this patient has it; `right` gives the right one of a pair."""
        if (name, right) not in self._shapes:
            self._shapes[name, right] = self._shape(name, right)
        return self._shapes[name, right]

    def _shape(self, name: str, right: bool) -> Posed:
        group = _GROUP.get(name, name)
        scale, shift = (1.0, np.zeros(3)) if name in _STILL else self.pose(group, right)
        if name == "bladder":
            scale = self.patient.filling
        table = _solid(name)
        if name not in ("mediastinum", "loops"):
            table = table.lumpy(self.rng(f"bumps {name} {right}"), 0.03)
        return Posed(table, scale, tuple(_solid(group).box.mean(0)), tuple(shift), right)

    def pose(self, group: str, right: bool = False) -> tuple[float, np.ndarray]:
        """Scale and shift (3,) in mm of a group of parts."""
        rng = self.rng(f"pose {group} {right}")
        scale = float(np.clip(rng.normal(1, 0.07), 0.86, 1.16))
        shift = np.clip(rng.normal(0, (4, 3, 5)), -10, 10)
        shift[2] += _BREATH.get(group, 0) * self.patient.breath - 10 * (right and group == "kidney")
        if group == "ovary":  # the ovaries lie anywhere beside the uterus
            shift = rng.uniform((-6, -12, -24), (10, 8, 24))
        return scale, shift

    def path(self, name: str, right: bool = False) -> Sweep:
        """A tube as this patient has it; `right` gives the right one of a pair."""
        if (name, right) not in self._paths:
            self._paths[name, right] = self._path(name, right)
        return self._paths[name, right]

    def _path(self, name: str, right: bool) -> Sweep:
        points, radii = tables.PATHS[name]
        p, rng = np.array(points, float), self.rng(f"path {name} {right}")
        group = _GROUP.get(name, name)
        if name not in _STILL:
            loose = 7.0 if name in ("colon", "sigmoid") else 1.5
            p[1:-1] += rng.normal(0, loose, (len(p) - 2, 3)) * (1, 0.5, 1)
            if group in _BREATH:
                p += self.pose(group)[1]
        scale = rng.normal(1, 0.08) if name not in _STILL else 1.0
        if right:
            p[:, 0] = -p[:, 0]
        return sweep(p, np.array(radii, float) * scale)
