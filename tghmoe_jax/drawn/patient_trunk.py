"""How a patient's trunk is drawn: wall, lungs, bones and the organs of the chest.

Coordinates and axis legend as in `patient_body`.
"""

import dataclasses
import itertools

import numpy as np

from tghmoe_jax.drawn.canvas import AIR, NOTHING, Canvas
from tghmoe_jax.drawn.patient_body import RIB_DEPTH, RIB_MM, RIB_SLOPE, SPINE, Ball, Patient, breast_of, heart_of

SIDE = {-1: "right", 1: "left"}
RIBS = 8  # the lowest ones, down to 12: each begins at the vertebra of its number
FISSURE = 0.9  # mm that the fissure between two lobes of a lung rises toward the back, for each mm
# Vertebral bodies are VERTEBRA_MM high, all alike; the lowest lumbar one begins at LOWEST_MM. T2 is above all scans.
VERTEBRAE = (*(f"vertebrae_L{n}" for n in range(5, 0, -1)), *(f"vertebrae_T{n}" for n in range(12, 2, -1)))
VERTEBRA_MM, LOWEST_MM = 36.0, -180.0


def waves(xyz, length_mm: tuple[float, float], count: int, rng: np.random.Generator) -> np.ndarray:
    """float32: a sum of sine waves along random directions."""
    total = np.float32(0)
    for _ in range(count):
        way = rng.standard_normal(3)
        way *= 2 * np.pi / (rng.uniform(*length_mm) * np.linalg.norm(way))
        kx, ky, kz, phase = (np.float32(v) for v in (*way, rng.uniform(0, 2 * np.pi)))
        total = total + np.sin(kx * xyz[0] + ky * xyz[1] + kz * xyz[2] + phase)
    return total


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

    def ball(self, ball: Ball, value, part: float = 1.0, limit: np.ndarray | None = None, mark: str = "") -> None:
        """Draws an ellipsoid, or the inner `part` of it."""
        self.canvas.ellipsoid(ball.centre, ball.radii * part, value, ball.angle, limit, mark)

    def chain(self, points, radius: float, value, limit: np.ndarray | None = None, mark: str = "") -> None:
        """Draws a tube along a chain of points."""
        for start, end in zip(points, points[1:], strict=False):
            self.canvas.capsule(start, end, radius, value, limit, mark)

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
    hu, fat = patient.hu, np.float32(patient.fat_mm / patient.scale[:2].mean())
    a, back, front = patient.wall(z)
    ahead = y < 0
    b = np.where(ahead, front, back)

    def depth(side, ends) -> np.ndarray:
        # Far outside, where the product would win, both stay at 4: there the depth is negative.
        u2, v2 = np.minimum((x / (a + side)) ** 2, 4), np.minimum((y / (b + ends)) ** 2, 4)
        return (1 - u2 - v2 + np.float32(0.25) * u2 * v2) * np.float32(55)

    thick = np.where(ahead, np.float32(0.75), np.float32(0.85)) * fat  # least over the ribs, most over the buttocks
    thick = thick * np.interp(z, (-260, -160, 0, 200), (1.25, 1.1, 1.0, 0.55)).astype(np.float32)
    if patient.arms:
        for side in (-1, 1):
            shoulder, hand = (side * (172 + fat), 20, 270), (side * (196 + fat), 10, -330)
            canvas.capsule(shoulder, hand, 40, hu["fat"])
            canvas.capsule(shoulder, hand, 34 - 0.2 * fat, hu["muscle"])
            canvas.capsule(shoulder, hand, 12, hu["cortical"] * patient.bone, mark=f"humerus_{SIDE[side]}")
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
        canvas.mark(None, shell * band * (y <= -48), "costal_cartilages")
        number = np.round((z - np.float32(RIB_SLOPE) * y) * np.float32(1 / RIB_MM))
        for above, side in itertools.product(range(RIBS if canvas.structures else 0), SIDE):
            here = (y > -48) & (number == above) & (side * x > 0)
            canvas.mark(None, shell * band * here, f"rib_{SIDE[side]}_{12 - above}")
    return Torso(canvas, patient, rng, np.zeros_like(cavity), cavity, trunk)


def _lungs(t: Torso) -> None:
    canvas, patient = t.canvas, t.patient
    for side in (-1, 1):
        lung = patient.lung(side)
        box = canvas.box(lung.centre, lung.radii)
        depth = patient.lung_depth(side, *canvas.coordinates(box))
        inside = canvas.weight(depth) * t.cavity[box]
        t.lung[box] = np.maximum(t.lung[box], inside)
        _, y, z = canvas.coordinates(box)
        low = z - lung.centre[2] < np.float32(FISSURE) * y
        for lobe, part in (("lower", low), ("upper", ~low)):
            canvas.mark(box, inside * part, f"lung_{lobe}_lobe_{SIDE[side]}")
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
    column = np.maximum(canvas.weight(body) * canvas.weight(z + 230), canvas.weight(ring) * arch)
    number = np.floor((z - np.float32(LOWEST_MM)) * np.float32(1 / VERTEBRA_MM))
    for index, name in enumerate(VERTEBRAE if canvas.structures else ()):
        canvas.mark(box, column * (number == index), name)
    canvas.blend(box, canvas.weight(canal), 22.0, "spinal_cord")


def _girdles(t: Torso) -> None:
    """Breastbone, shoulders, pelvis and thighs: cortical bone round marrow."""
    canvas, hard = t.canvas, t.bone(t.patient.hu["cortical"])
    marrow = t.patient.hu["marrow"] * t.patient.bone
    ball, rod = canvas.ellipsoid, canvas.capsule
    ball((0, -82, 170), (17, 7, 75), 0.5 * hard, mark="sternum")
    ball((0, 68, -200), (46, 19, 52), 0.5 * hard, mark="sacrum")
    ball((0, 68, -200), (40, 13, 46), marrow)
    for side, name in SIDE.items():
        ball((side * 105, 82, 205), (38, 6, 62), hard, side * -0.6, t.trunk, f"scapula_{name}")
        rod((side * 20, -70, 255), (side * 130, -20, 278), 7, hard, mark=f"clavicula_{name}")
        rod((side * 140, 4, 262), (side * 150, 6, 200), 19, 0.7 * hard, mark=f"humerus_{name}")
        rod((side * 140, 4, 262), (side * 150, 6, 200), 14, marrow)
        ball((side * 88, 22, -165), (11, 58, 68), hard, side * 0.62, mark=f"hip_{name}")
        ball((side * 88, 22, -165), (6, 50, 60), marrow, side * 0.62)
        ball((side * 90, 6, -258), (34, 34, 34), 0.8 * hard, mark=f"hip_{name}")
        ball((side * 96, 4, -260), (28, 27, 27), 60.0, mark=f"femur_{name}")
        ball((side * 96, 4, -260), (23, 23, 23), 0.7 * hard)
        ball((side * 96, 4, -260), (19, 19, 19), marrow + 120)
        rod((side * 96, 4, -260), (side * 128, 12, -292), 14, 0.7 * hard, mark=f"femur_{name}")
        rod((side * 130, 12, -290), (side * 120, 10, -460), 15, hard, mark=f"femur_{name}")
        rod((side * 130, 12, -300), (side * 120, 10, -460), 8, 40.0)
        rod((side * 12, -62, -292), (side * 72, -20, -268), 10, 0.8 * hard, mark=f"hip_{name}")
        rod((side * 72, 36, -265), (side * 56, 42, -325), 13, 0.7 * hard, mark=f"hip_{name}")
        rod((side * 56, 42, -325), (side * 16, -50, -318), 8, 0.8 * hard, mark=f"hip_{name}")


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
    canvas.ellipsoid((0, 2, 190), (28, 46, 85), hu["fat"] + 15, mark=NOTHING)  # mediastinum
    muscle, blood = hu["myocardium"], hu["heart"]
    heart = heart_of(patient)
    t.ball(heart, hu["fat"] + 10, 1.07, mark=NOTHING)
    t.ball(heart, muscle, mark="heart")
    for centre, radii, value in (
        ((44, -20, 104), (28, 26, 32), blood),
        ((-6, -40, 112), (30, 30, 36), (blood + hu["vein"]) / 2),
        ((14, 6, 128), (30, 17, 22), blood),
    ):
        t.ball(patient.ball("heart", centre, radii), value)
    root = patient.moved("heart", (-6, -24, 140))
    arch = (root, (-6, -22, 205), (8, 0, 216), (22, 26, 205), (22, 28, 60), (10, 22, -115))
    t.chain(arch, 13, hu["artery"], mark="aorta")
    t.chain((patient.moved("heart", (24, -34, 145)), (20, -14, 172), (-42, 2, 164)), 12, mixed)
    t.chain(((20, -10, 170), (50, 8, 168)), 11, mixed)
    t.chain(((-26, -8, 130), (-24, -12, 240), (-40, -20, 300)), 10, hu["vein"] * 1.1, mark="superior_vena_cava")
    t.chain(((12, 24, 330), (10, 26, 200), (12, 22, 80)), 8, hu["bowel"], mark="esophagus")
    t.chain(((10, 8, 218), (26, -6, 300)), 6, hu["artery"])
    t.chain(((-8, -6, 214), (-26, -6, 300)), 6, hu["artery"])
    t.chain(((0, 14, 178), (0, 4, 420)), 12, 60.0, mark="trachea")
    t.chain(((0, 14, 178), (0, 4, 420)), 9, AIR)
    for side in (-1, 1):
        t.chain(((0, 14, 180), (side * 42, 12, 152)), 9, 40.0, mark="trachea")
        t.chain(((0, 14, 180), (side * 42, 12, 152)), 7, AIR + 40)
