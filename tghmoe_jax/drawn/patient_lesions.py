"""The lesions of patients: how large they are, and how each kind looks.

What they are called is `phantom_lesions.KINDS`. Coordinates and axis legend as in `patient_body`.
"""

import numpy as np

from tghmoe_jax.drawn.chance import pick
from tghmoe_jax.drawn.patient_trunk import Torso
from tghmoe_jax.drawn.phantom_lesions import Lesion

# Smallest and largest size in mm of the kinds that 6 to 60 mm do not fit.
SMALLEST_MM, LARGEST_MM = 6.0, 60.0
SIZES_MM = {
    "pleural effusion": (25, 60),
    "rib fracture": (10, 40),
    "breast mass": (6, 50),
    "heart calcification": (6, 36),
    "spleen mass": (6, 50),
    "kidney stone": (6, 32),
    "kidney cyst": (6, 56),
    "colon mass": (10, 50),
    "muscle abscess": (8, 50),
    "bladder stone": (6, 44),
    "ovary cyst": (10, 60),
    "bone metastasis": (6, 46),
    "artery aneurysm": (26, 60),
}
CLEAR = 1.6  # a lesion that could be hidden differs from its surroundings by so many deviations of the noise


def size_range(phrase: str, pixel_mm: float, slice_mm: float) -> tuple[float, float]:
    """Smallest and largest size in mm of a kind of lesion on a grid."""
    least, most = SIZES_MM.get(phrase, (SMALLEST_MM, LARGEST_MM))
    least = max(least, SMALLEST_MM, 1.5 * pixel_mm, 0.5 * slice_mm)
    return least, max(most, 1.2 * least)


class Brush:
    """Blends the shapes of one lesion into a torso; `radii` (3,) are those of a sphere of its volume.

    `limit`, float32 (D, H, W) in 0..1, confines them.
    """

    def __init__(self, torso: Torso, lesion: Lesion, centre: np.ndarray, noise_hu: float, rng: np.random.Generator):
        self.t, self.centre, self.noise, self.rng = torso, np.asarray(centre), noise_hu, rng
        self.radii = lesion.size_mm / 2 / torso.patient.scale
        limits = {"liver": torso.below, "spleen": torso.below, "colon": torso.cavity, "muscle": torso.trunk}
        self.limit = limits.get(lesion.organ)
        self.turn = float(rng.uniform(-1.5, 1.5))
        stretch = rng.uniform(-0.2, 0.2, 3)
        self.stretch = np.exp(stretch - stretch.mean())

    def blob(self, value, part=1.0, at=(0.0, 0.0, 0.0), rough: float = 0.0, limit: np.ndarray | None = None) -> None:
        """An ellipsoid of `part` (one number or three) of the radii, `at` of them off the centre, with a `rough`
        surface."""
        canvas, centre = self.t.canvas, self.centre + self.radii * at
        radii = self.radii * self.stretch * part
        box = canvas.box(centre, np.full(3, radii.max() * (1 + rough)))
        x, y, z = (c - np.float32(m) for c, m in zip(canvas.coordinates(box), centre, strict=True))
        c, s = np.float32(np.cos(self.turn)), np.float32(np.sin(self.turn))
        u, v, w = ((a * np.float32(1 / r)) for a, r in zip((c * x + s * y, c * y - s * x, z), radii, strict=True))
        q = u**2 + v**2 + w**2
        if rough:
            for _ in range(2):
                k = self.rng.uniform(-1, 1, 3)
                k *= self.rng.uniform(3, 5) / np.linalg.norm(k)
                q = q * (
                    1 + np.float32(rough) * np.sin(np.float32(k[0]) * u + np.float32(k[1]) * v + np.float32(k[2]) * w)
                )
        weight = canvas.weight((1 - q) * np.float32(radii.min() / 2))
        limit = self.limit if limit is None else limit
        canvas.blend(box, weight if limit is None else weight * limit[box], value)

    def apart(self, hu: float, tissue: float, least: float = 25.0) -> float:
        """`hu`, or farther from the tissue around if it would be lost in the noise."""
        least = max(least, CLEAR * self.noise)
        gap = hu - tissue
        return hu if abs(gap) >= least else tissue + (least if gap > 0 else -least)

    def some(self, chance: float) -> bool:
        return bool(self.rng.random() < chance)

    def near(self, low: float, high: float) -> float:
        return float(self.rng.uniform(low, high))


def draw_lesion(t: Torso, lesion: Lesion, centre: np.ndarray, noise_hu: float, rng: np.random.Generator) -> None:
    """Draws one lesion; `centre` (3,) in mm of the nominal body."""
    look = _LOOKS.get(lesion.kind) or _LOOKS[lesion.lesion]
    look(Brush(t, lesion, centre, noise_hu, rng), t.patient.hu)


def _cyst(b: Brush, hu: dict[str, float]) -> None:
    """Water in all phases, with a calcified wall now and then."""
    if b.some(0.15):
        b.blob(b.near(200, 500))
        b.blob(b.near(0, 14), 0.85)
    else:
        b.blob(b.near(-2, 14))


def _ovary_cyst(b: Brush, hu: dict[str, float]) -> None:
    b.blob(b.apart(b.near(0, 12) if b.some(0.6) else b.near(60, 85), 34.0))  # water or blood


def _solid_organ_mass(b: Brush, tissue: float, enhanced: bool) -> None:
    """Darker, ringed or brighter than its organ, and uneven."""
    look = pick(b.rng, ("dark", "ring", "bright") if enhanced else ("dark", "dark", "ring"))
    rough = b.near(0.1, 0.35)
    if look == "bright":
        b.blob(b.apart(tissue + b.near(30, 70), tissue), rough=rough)
        if b.some(0.3):
            b.blob(tissue - 20, 0.3)
        return
    core = b.apart(tissue - b.near(25, 60), tissue)
    if look == "ring":
        b.blob(tissue + (b.near(30, 60) if enhanced else b.near(5, 15)), rough=rough)
        b.blob(core - b.near(0, 20), 0.75, rough=rough)
    else:
        b.blob(core, rough=rough)
    if b.some(0.15):
        b.blob(b.near(200, 600), 0.2, b.rng.uniform(-0.4, 0.4, 3))  # calcified


def _nodule(b: Brush, hu: dict[str, float]) -> None:
    value = b.near(15, 70) if b.some(0.85) else b.near(-520, -250)  # solid, or like ground glass
    rough = b.near(0, 0.5)
    b.blob(value, rough=rough, limit=b.t.lung)
    b.blob(value, 0.85, rough=rough)
    if b.some(0.15):
        b.blob(b.near(250, 700), 0.4)
    elif b.some(0.15):
        b.blob(-800.0, 0.35)  # a cavity


def _effusion(b: Brush, hu: dict[str, float]) -> None:
    """A lens or crescent of fluid between lung and wall."""
    b.turn, b.stretch = 0.0, np.array([1.0, 1.0, 1.15])
    b.blob(b.near(0, 30), limit=b.t.lung)


def _fracture(b: Brush, hu: dict[str, float]) -> None:
    """Displaced ends of a rib under callus."""
    hard = b.t.bone(hu["cortical"]) + 150
    b.stretch = np.ones(3)
    away = 0.22 * np.sign(b.centre[0])
    if b.some(0.7):
        b.blob(b.near(160, 380) + b.noise, 0.9, rough=0.2)
    b.blob(hard, (0.45, 0.7, 0.5), (away, -0.4, 0.1))
    b.blob(hard, (0.45, 0.7, 0.5), (-away, 0.4, -0.15))
    b.blob(hard, 0.4)


def _breast_mass(b: Brush, hu: dict[str, float]) -> None:
    rough = b.near(0.1, 0.5)
    b.blob(max(b.near(30, 60), hu["muscle"]) + (25 if hu["artery"] > 80 else 0), rough=rough)
    if b.some(0.2):
        b.blob(b.near(200, 700), 0.25, b.rng.uniform(-0.3, 0.3, 3))


def _heart_calcification(b: Brush, hu: dict[str, float]) -> None:
    value = max(b.near(350, 1300), hu["heart"] + 200)
    b.blob(value, 0.8, rough=0.4)
    for _ in range(int(b.rng.integers(1, 4))):
        b.blob(value, b.near(0.3, 0.6), b.rng.uniform(-0.6, 0.6, 3))


def _stone(b: Brush, hu: dict[str, float]) -> None:
    value = b.near(300, 1500)
    value = max(value, hu["urine"] + 150)  # in excreted contrast a faint stone would be lost
    b.blob(value, rough=b.near(0, 0.3))
    if b.some(0.3):
        b.blob(0.6 * value, 0.5)


def _colon_mass(b: Brush, hu: dict[str, float]) -> None:
    """Tissue that fills the bowel, with a narrowed and shifted lumen in some."""
    value = max(hu["bowel"] + b.near(15, 45), 60.0)
    b.blob(b.apart(value, 0.0), rough=b.near(0.2, 0.4))
    if b.some(0.4):
        b.blob(-600.0, 0.25, b.rng.uniform(-0.5, 0.5, 3))


def _abscess(b: Brush, hu: dict[str, float]) -> None:
    muscle = hu["muscle"]
    b.blob(muscle + (b.near(30, 60) if hu["artery"] > 80 else b.near(8, 20)), rough=0.2)
    b.blob(b.apart(b.near(4, 20), muscle, 38.0), 0.82, rough=0.2)
    if b.some(0.5) or b.noise > 20:
        b.blob(b.near(-900, -500), (0.5, 0.35, 0.5), (0, -0.25, 0))  # gas, which rises to the front


def _metastasis(b: Brush, hu: dict[str, float]) -> None:
    marrow = hu["marrow"] * b.t.patient.bone
    if b.some(0.5):
        b.blob(max(b.near(700, 1200), marrow + 300), rough=0.35)
    else:
        b.blob(b.apart(b.near(20, 60), max(marrow, 61.0), 40.0), rough=0.35)


def _aneurysm(b: Brush, hu: dict[str, float]) -> None:
    """A widened artery: clot, the lumen that is left, and a calcified wall in most."""
    b.blob(hu["muscle"], 1.06)
    b.blob(b.apart(b.near(28, 45), hu["artery"]))
    if b.some(0.75):
        for _ in range(int(b.rng.integers(2, 6))):
            way = b.rng.standard_normal(3)
            b.blob(b.near(500, 1000), b.near(0.15, 0.25), 0.9 * b.stretch * way / np.linalg.norm(way))
    if hu["artery"] > 80:  # without contrast the lumen is not to be told from clot
        b.blob(hu["artery"], b.near(0.4, 0.75), b.rng.uniform(-0.35, 0.35, 3))


_LOOKS = {
    "cyst": _cyst,
    "ovary cyst": _ovary_cyst,
    "nodule": _nodule,
    "effusion": _effusion,
    "fracture": _fracture,
    "calcification": _heart_calcification,
    "stone": _stone,
    "abscess": _abscess,
    "metastasis": _metastasis,
    "aneurysm": _aneurysm,
    "breast mass": _breast_mass,
    "colon mass": _colon_mass,
    "liver mass": lambda b, hu: _solid_organ_mass(b, hu["liver"], hu["artery"] > 80),
    "spleen mass": lambda b, hu: _solid_organ_mass(b, hu["spleen"], hu["artery"] > 80),
}
