"""Where lesions can be in a patient: points within the organs as they are drawn, each with the name of its place.

Coordinates are mm of the nominal body, as in `patient_body`. Axis legend: K points.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

from tghmoe_jax.drawn import patient_organs as organs
from tghmoe_jax.drawn.canvas import Frame
from tghmoe_jax.drawn.patient_body import CAVITY_MM, RIB_DEPTH, RIB_MM, RIB_SLOPE, Ball, Patient, breast_of, heart_of
from tghmoe_jax.drawn.phantom_lesions import KINDS

ORGANS = tuple(dict.fromkeys(kind.organ for kind in KINDS))
POINTS = 26  # that are tried of each part of an organ
FEWEST = 3  # points of a place that must be seen, for a lesion to be put there
MARGIN = 0.08  # share of an organ's extent about a boundary between places, where no lesion is put
SIDES = ((-1, "right"), (1, "left"))


@dataclasses.dataclass(frozen=True)
class OrganPart:
    """A part of an organ: an ellipsoid, or the tube that it makes when its centre moves by `run` (3,).

    `first` and `level` are the words of its places, or the lowest coordinate of the second word's half: `x` for right
    and left (the spleen: `y` for anterior and posterior), `z` for lower and upper. `within` names what confines it.
    """

    organ: str
    ball: Ball
    first: str | float
    level: str | float
    run: tuple[float, float, float] = (0, 0, 0)
    within: str = ""


def parts_of(p: Patient) -> list[OrganPart]:
    """The parts of all organs that can be ill."""
    found = []
    for side, name in SIDES:
        lung = p.lung(side)
        middle = lung.centre[2] + 15
        found += [
            OrganPart("lung", lung, name, middle, within="lung"),
            OrganPart("pleura", lung, name, middle, within="pleura"),
            OrganPart("rib", Ball(np.array([side, 5, 140]), np.array([1, 80, 130]), 0.0), name, 140.0, within="rib"),
            OrganPart("kidney", body := organs.kidney(p, side), name, float(body.centre[2])),
            OrganPart("bone", Ball(np.array([side * 88, 22, -165]), np.array([9, 54, 62]), side * 0.62), name, "upper"),
            OrganPart("bone", Ball(np.array([side * 95, 5, -260]), np.array([24, 24, 24]), 0.0), name, "lower"),
            OrganPart("muscle", organs.gluteal(p, side), name, "lower"),
        ]
        if p.sex == "female":
            breast, ovary = breast_of(p, side), organs.ovary(p, side)
            adnexa = Ball(ovary.centre, ovary.radii * (1, 1, 1.8), ovary.angle)
            found += [
                OrganPart("breast", breast, name, float(breast.centre[2]), within="breast"),
                OrganPart("ovary", adnexa, name, float(ovary.centre[2])),
            ]
        for organ, axis, radius, levels in (
            ("colon", organs.colon(p, side), organs.COLON_MM - 4, ("lower", -108.0, "upper")),
            ("muscle", organs.paraspinal(p, side), organs.PARASPINAL_MM, ("upper", "upper")),
            ("artery", organs.iliac(side), 15, ("upper", "lower")),  # out of its axis too: it bulges
        ):
            for start, end, level in zip(axis[:-1], axis[1:], levels, strict=True):
                found.append(OrganPart(organ, Ball(start, np.full(3, radius), 0.0), name, level, tuple(end - start)))
    heart, sac, pulp = heart_of(p), organs.bladder(p), organs.spleen(p)
    right, left = organs.liver(p)
    falciform = float((right.centre[0] + left.centre[0]) / 2)
    return [
        *found,
        OrganPart("heart", heart, float(heart.centre[0]), float(heart.centre[2])),
        OrganPart("liver", right, falciform, float(right.centre[2] + 10), within="below"),
        OrganPart("liver", left, falciform, float(right.centre[2] + 10), within="below"),
        OrganPart("spleen", pulp, float(pulp.centre[1]), float(pulp.centre[2]), within="below"),
        OrganPart("bladder", sac, float(sac.centre[0]), float(sac.centre[2])),
    ]


@dataclasses.dataclass(frozen=True)
class View:
    """What of a patient a scan shows: {organ: {place: points (K, 3)}} in mm of the nominal body, and the voxel index
    (K, 3) of each point."""

    points: dict[str, dict[str, np.ndarray]]
    index: dict[str, dict[str, np.ndarray]]

    @property
    def places(self) -> dict[str, tuple[str, ...]]:
        return {organ: tuple(places) for organ, places in self.points.items()}


def view_of(patient: Patient, frame: Frame, seen: Callable[[np.ndarray], np.ndarray], rng: np.random.Generator) -> View:
    """What a frame shows of a patient; `seen` maps voxel indices (K, 3) to bool (K,)."""
    parts = parts_of(patient)
    points = _points(patient, parts, rng)
    index = frame.position(points.reshape(-1, 3))
    good = _inside(patient, parts, points) & seen(index).reshape(points.shape[:2])
    organ = np.array([ORGANS.index(part.organ) for part in parts])[:, None]
    place = _halves(parts, points, "first") * 2 + _halves(parts, points, "level")
    key = np.where(good & (place >= 0), organ * 4 + place, -1).ravel()
    order = np.argsort(key, kind="stable")
    ends = np.searchsorted(key[order], np.arange(-1, 4 * len(ORGANS)), side="right")
    points, index = points.reshape(-1, 3)[order], index[order]
    view = View({}, {})
    for number, (start, end) in enumerate(zip(ends, ends[1:], strict=False)):
        if end - start >= FEWEST:
            name = ORGANS[number // 4]
            firsts = ("anterior", "posterior") if name == "spleen" else ("right", "left")
            word = f"{firsts[number % 4 // 2]} {('lower', 'upper')[number % 2]}"
            view.points.setdefault(name, {})[word] = points[start:end]
            view.index.setdefault(name, {})[word] = index[start:end]
    return view


def _points(p: Patient, parts: list[OrganPart], rng: np.random.Generator) -> np.ndarray:
    """Random points (parts, K, 3) of the parts."""
    unit = rng.standard_normal((len(parts), POINTS, 3))
    unit /= np.linalg.norm(unit, axis=2, keepdims=True)
    radii, centres = (np.array([getattr(part.ball, name) for part in parts])[:, None] for name in ("radii", "centre"))
    angle = np.array([part.ball.angle for part in parts])[:, None]
    run = np.array([part.run for part in parts])[:, None]
    x, y, z = np.moveaxis(unit * radii * 0.92 * rng.random((len(parts), POINTS, 1)) ** (1 / 3), -1, 0)
    turned = np.stack([np.cos(angle) * x - np.sin(angle) * y, np.sin(angle) * x + np.cos(angle) * y, z], -1)
    points = centres + turned + run * rng.random((len(parts), POINTS, 1))

    ribs, edges = ([i for i, part in enumerate(parts) if part.within == name] for name in ("rib", "pleura"))
    points[ribs] = _on_ribs(p, points[ribs])
    unit[..., 1] = np.abs(unit[..., 1])  # the back, where fluid lies
    points[edges] = _on_edge(p, centres[edges], unit[edges] * radii[edges])
    return points


def _halves(parts: list[OrganPart], points: np.ndarray, name: str) -> np.ndarray:
    """int (parts, K): 0 or 1 for the first or second word of `first` or `level`, -9 near the boundary."""
    fixed = {"right": 0, "left": 1, "lower": 0, "upper": 1}
    found = np.empty(points.shape[:2], int)
    for organ in {part.organ for part in parts}:
        own = [i for i, part in enumerate(parts) if part.organ == organ]
        axis = 2 if name == "level" else 1 if organ == "spleen" else 0
        ends = [(c - r + min(0, d), c + r + max(0, d)) for part in (parts[i] for i in own)
                for c, r, d in [(part.ball.centre[axis], part.ball.radii[axis], part.run[axis])]]  # fmt: skip
        margin = MARGIN * (max(high for _, high in ends) - min(low for low, _ in ends))
        for i in own:
            word = getattr(parts[i], name)
            if isinstance(word, str):
                found[i] = fixed[word]
            else:
                gap = points[i, :, axis] - word
                found[i] = np.where(np.abs(gap) < margin, -9, gap > 0)
    return found


def _on_ribs(p: Patient, points: np.ndarray) -> np.ndarray:
    """Points (..., 3) whose x is a side, moved onto the bony part of the nearest rib."""
    side, y, z = np.sign(points[..., 0]), np.clip(points[..., 1], -40, 70), points[..., 2]
    z = np.round((z - RIB_SLOPE * y) / RIB_MM) * RIB_MM + RIB_SLOPE * y
    a, b, ahead = p.cavity(y, z)
    x = a * np.sqrt(np.maximum(1 + RIB_DEPTH / CAVITY_MM - (ahead / b) ** 2, 0.01))
    return np.stack([side * x, y, z], axis=-1)


def _on_edge(p: Patient, centres: np.ndarray, ways: np.ndarray) -> np.ndarray:
    """Points (..., 3) where the lungs end on the ways (..., 3) out from their centres."""
    low, high = np.full(ways.shape[:-1], 0.3), np.full(ways.shape[:-1], 0.96)
    for _ in range(5):
        part = (low + high) / 2
        inside = p.cavity_depth(*np.moveaxis(centres + part[..., None] * ways, -1, 0)) > 2
        low, high = np.where(inside, part, low), np.where(inside, high, part)
    return centres + low[..., None] * ways


def _inside(p: Patient, parts: list[OrganPart], points: np.ndarray) -> np.ndarray:
    """bool (parts, K): the points that what confines their part leaves."""
    x, y, z = np.moveaxis(points, -1, 0).astype(np.float32)
    within = np.array([part.within for part in parts])[:, None]
    cavity = p.cavity_depth(x, y, z)
    lungs = np.maximum(p.lung_depth(-1, x, y, z), p.lung_depth(1, x, y, z))
    middle = (x / 30) ** 2 + ((y - 2) / 48) ** 2 + ((z - 190) / 87) ** 2 < 1
    heart = heart_of(p)
    middle |= (((points - heart.centre) / (heart.radii * 1.1)) ** 2).sum(-1) < 1
    above = z - np.where(x < 0, p.dome(-1, x, y), p.dome(1, x, y))  # the diaphragm
    _, _, front = p.wall(z)
    chest_wall = -front * np.sqrt(np.clip(1 - (x / 150) ** 2, 0.1, 1))
    rules = {
        "lung": (lungs > 8) & (cavity > 5) & ~middle,
        "pleura": (above > 6) & ~middle & (z < 250),
        "below": (lungs < -4) & (cavity > 4),
        "rib": (z > 20) & (z < 262),
        "breast": y < chest_wall - 4,
    }
    good = np.ones(points.shape[:2], bool)
    for name, rule in rules.items():
        good &= (within != name) | rule
    return good
