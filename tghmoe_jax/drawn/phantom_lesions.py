"""The phantom's lesions: which exist in which body section, where they sit, and how they look in HU.

Every section has five organs that can be ill and a lesion takes each with equal chance, so that knowing the section
gives no hint of the lesion. Points are millimetres of the nominal body of `phantom_anatomy`.
"""

import dataclasses
import itertools

import numpy as np

from tghmoe_jax.drawn.canvas import Canvas, Frame
from tghmoe_jax.drawn.chance import pick
from tghmoe_jax.drawn.phantom_anatomy import CAVITY_X, CAVITY_Y, FLUID, Z_KNOTS, Body

SECTIONS = ("chest", "abdomen", "pelvis")
WANDER_MM = {"lung": (12, 24, 10), "rib": (0, 34, 8), "liver": (6, 6, 5), "muscle": (5, 2, 8)}  # about a place
TRIES = 100_000  # of placing all lesions of a volume: far more than any volume takes, so that a field without room ends
# What a lesion is made of, the outermost first: HU or a tissue of the body, and the part of the lesion's radius.
LAYERS: dict[str, tuple[tuple[float | str, float], ...]] = {
    "nodule": (("muscle", 1.0),),
    "effusion": ((FLUID + 4, 1.0),),  # a loculated collection against the chest wall
    "fracture": ((760.0, 1.0),),  # callus over displaced ends
    "calcification": ((1050.0, 1.0),),
    "stone": ((1050.0, 1.0),),
    "ovary cyst": ((72.0, 1.0),),  # blood-filled
    "cyst": ((500.0, 1.0), (0.0, 0.62)),  # calcified wall, water inside
    "mass": ((8.0, 1.0), (750.0, 0.66)),  # hypodense tissue round a calcified core
    "abscess": ((18.0, 1.0), (-800.0, 0.66)),  # pus, with gas inside
    "metastasis": ((1100.0, 1.0),),  # sclerotic
    "aneurysm": ((620.0, 1.0), ("artery", 0.7)),  # calcified wall, blood inside
}


@dataclasses.dataclass(frozen=True)
class LesionKind:
    """One kind of lesion: its names, its four places and its size range in mm."""

    lesion: str
    organ: str
    phrase: str  # how a question names it
    section: str
    size_mm: tuple[float, float]
    places: dict[str, tuple[float, float, float]]

    @property
    def side_is_fixed(self) -> bool:
        """Whether the organ lies on one side, so that naming it gives the side away."""
        return not any(place.startswith(("left", "right")) for place in self.places)


@dataclasses.dataclass(frozen=True)
class Lesion:
    """One lesion of a volume. `centre` is its fractional voxel index (slice, row, column)."""

    kind: str  # LesionKind.phrase
    lesion: str
    organ: str
    side: str
    place: str  # "right upper"; for the spleen "anterior upper"
    size_mm: float
    centre: tuple[float, float, float]

    @property
    def triple(self) -> tuple[str, str, str]:
        return (self.lesion, self.organ, self.side)


def _paired(x: float, upper: tuple[float, float], lower: tuple[float, float]) -> dict[str, tuple[float, float, float]]:
    """The four places of a paired organ from |x| and the (y, z) of each level."""
    return {
        f"{side} {level}": (sign * x, *yz)
        for side, sign in (("right", -1), ("left", 1))
        for level, yz in (("upper", upper), ("lower", lower))
    }


_HEART = {
    "right upper": (-14, -36, 132),
    "right lower": (-14, -36, 88),
    "left upper": (52, -24, 132),
    "left lower": (52, -24, 88),
}
_LIVER = {
    "right upper": (-92, -4, 46),
    "right lower": (-78, -26, -12),
    "left upper": (14, -48, 46),
    "left lower": (14, -48, 0),
}
_SPLEEN = {
    "anterior upper": (88, 14, 38),
    "anterior lower": (88, 14, -12),
    "posterior upper": (88, 60, 38),
    "posterior lower": (88, 60, -12),
}
_ARTERY = {
    "right upper": (-42, 4, -142),
    "right lower": (-70, -20, -214),
    "left upper": (42, 4, -142),
    "left lower": (70, -20, -214),
}
KINDS = (
    LesionKind("nodule", "lung", "lung nodule", "chest", (36, 54), _paired(62, (4, 208), (12, 116))),
    LesionKind("effusion", "pleura", "pleural effusion", "chest", (66, 84), _paired(94, (34, 198), (40, 92))),
    LesionKind("fracture", "rib", "rib fracture", "chest", (36, 46), _paired(124, (0, 200), (0, 112))),
    LesionKind("mass", "breast", "breast mass", "chest", (38, 48), _paired(76, (-104, 152), (-104, 100))),
    LesionKind("calcification", "heart", "heart calcification", "chest", (36, 46), _HEART),
    LesionKind("cyst", "liver", "liver cyst", "abdomen", (46, 58), _LIVER),
    LesionKind("mass", "liver", "liver mass", "abdomen", (46, 58), _LIVER),
    LesionKind("mass", "spleen", "spleen mass", "abdomen", (40, 50), _SPLEEN),
    LesionKind("stone", "kidney", "kidney stone", "abdomen", (34, 40), _paired(60, (40, -18), (40, -74))),
    LesionKind("cyst", "kidney", "kidney cyst", "abdomen", (44, 54), _paired(87, (32, -16), (32, -76))),
    LesionKind("mass", "colon", "colon mass", "abdomen", (38, 48), _paired(94, (-4, -66), (-4, -110))),
    LesionKind("abscess", "muscle", "muscle abscess", "abdomen", (38, 44), _paired(46, (73, 36), (73, -66))),
    LesionKind("stone", "bladder", "bladder stone", "pelvis", (34, 42), _paired(29, (-24, -230), (-24, -270))),
    LesionKind("cyst", "ovary", "ovary cyst", "pelvis", (46, 56), _paired(52, (24, -186), (26, -240))),
    LesionKind("metastasis", "bone", "bone metastasis", "pelvis", (40, 50), _paired(92, (26, -150), (22, -264))),
    LesionKind("abscess", "muscle", "muscle abscess", "pelvis", (42, 54), _paired(74, (74, -160), (72, -250))),
    LesionKind("aneurysm", "artery", "artery aneurysm", "pelvis", (40, 50), _ARTERY),
)
KINDS_BY_SECTION = {s: tuple(k for k in KINDS if k.section == s) for s in SECTIONS}
ORGANS_BY_SECTION = {s: tuple(dict.fromkeys(k.organ for k in KINDS_BY_SECTION[s])) for s in SECTIONS}
KIND_PHRASES = tuple(dict.fromkeys(k.phrase for k in KINDS))


def kinds_of(section: str, organ: str) -> list[LesionKind]:
    """The kinds of lesion that an organ of a section can have."""
    return [k for k in KINDS_BY_SECTION[section] if k.organ == organ]


def kind_of(phrase: str, section: str) -> LesionKind:
    """The kind a phrase names in one section (muscle abscesses exist in two)."""
    return next(k for k in KINDS_BY_SECTION[section] if k.phrase == phrase)


def place_lesions(
    frame: Frame, section: str, count: int, smallest_mm: float, scanned: tuple[float, float], rng: np.random.Generator
) -> list[tuple[Lesion, tuple[float, ...], float]]:
    """Draws `count` lesions in different organs, apart from each other and inside the scanned field.

    `scanned` is the middle and half length of the scanned z range. Returns (lesion, centre in the
    nominal body, radius in mm). All places are drawn again when one does not fit: the organs stay equally frequent.
    """
    organs = ORGANS_BY_SECTION[section]
    chosen = [organs[o] for o in rng.permutation(len(organs))[:count]]
    kinds = [pick(rng, kinds_of(section, organ)) for organ in chosen]
    for _ in range(TRIES):
        placed = [_place(frame, kind, smallest_mm, rng) for kind in kinds]
        if all(_fits(frame, centre, radius, scanned) for _, centre, radius in placed) and not _collide(placed):
            return placed
    raise RuntimeError(f"no room for {', '.join(k.phrase for k in kinds)} in a field of {frame.grid} voxels")


def _place(
    frame: Frame, kind: LesionKind, smallest_mm: float, rng: np.random.Generator
) -> tuple[Lesion, tuple[float, ...], float]:
    place = list(kind.places)[rng.integers(len(kind.places))]
    x, y, z = kind.places[place]
    wander = WANDER_MM.get(kind.organ, (3, 4, 4))
    x, y, z = (float(v + rng.uniform(-1, 1) * w) for v, w in zip((x, y, z), wander, strict=True))
    if kind.organ == "rib":  # on the shell round the thoracic cavity
        a, b = np.interp(z, Z_KNOTS, CAVITY_X) + 5, np.interp(z, Z_KNOTS, CAVITY_Y) + 5
        x = float(np.sign(x) * a * np.sqrt(1 - (y / b) ** 2))
    low = max(kind.size_mm[0], smallest_mm)
    size = float(rng.uniform(low, max(low, kind.size_mm[1])))
    side = "left" if kind.side_is_fixed else place.split()[0]
    centre = tuple(round(float(v), 2) for v in frame.position((x, y, z)))
    return Lesion(kind.phrase, kind.lesion, kind.organ, side, place, round(size, 1), centre), (x, y, z), size / 2


def _fits(frame: Frame, centre: tuple[float, ...], radius: float, scanned: tuple[float, float]) -> bool:
    index = frame.position(centre)
    half = 0.85 * radius / np.linalg.norm(frame.steps, axis=0)
    in_grid = (index - half >= -0.5).all() and (index + half <= np.array(frame.grid) - 0.5).all()
    return bool(in_grid) and abs(centre[2] - scanned[0]) + 0.85 * radius <= scanned[1]


def _collide(placed: list) -> bool:
    pairs = itertools.combinations(placed, 2)
    return any(np.linalg.norm(np.subtract(a, b)) < 0.9 * (ra + rb) for (_, a, ra), (_, b, rb) in pairs)


def draw_lesion(canvas: Canvas, body: Body, lesion: Lesion, centre: tuple[float, ...], radius: float) -> None:
    """Draws one lesion over the healthy torso."""
    effusion = lesion.lesion == "effusion"
    radii = radius / canvas.frame.scale  # mm of this patient, not of the nominal body
    stretch, limit = (np.array([0.9, 1.15, 1.0]), body.lung) if effusion else (1.0, None)
    for value, part in LAYERS.get(lesion.kind) or LAYERS[lesion.lesion]:
        hu = body.enhancement[value] if isinstance(value, str) else value
        canvas.ellipsoid(centre, radii * part * stretch, hu, limit=limit)
