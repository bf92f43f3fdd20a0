"""Draws a torso in Hounsfield units from analytic shapes.

Coordinates are millimetres of a nominal body in the patient frame: x toward Left, y toward Posterior, z toward
Superior; z = 0 lies at the lowest ribs. Axis legend: D slices, H rows, W columns. Arrays are float32 and broadcast to
(D, H, W).
"""

import dataclasses

import numpy as np

from tghmoe_jax.drawn.canvas import AIR, Canvas

PADDING = -1024  # HU outside the scanned range
LUNG, FAT, FLUID, BONE, DISC = -860.0, -100.0, 8.0, 420.0, 90.0

# Enhancement in HU by contrast phase: the sources of contrast a reader names the phase from.
PHASES = ("non-contrast", "arterial", "portal venous", "delayed")
ENHANCEMENT = {
    "artery": (40, 350, 190, 110),
    "vein": (40, 80, 180, 110),
    "heart": (40, 290, 175, 110),
    "myocardium": (45, 120, 120, 85),
    "liver": (62, 74, 132, 90),
    "spleen": (52, 150, 135, 88),
    "cortex": (40, 230, 200, 135),
    "medulla": (40, 75, 185, 135),
    "urine": (8, 8, 20, 380),
    "bowel": (36, 75, 110, 72),
    "muscle": (50, 56, 74, 62),
}

Z_KNOTS = np.array([-340, -260, -120, 0, 100, 200, 260, 310], np.float32)
OUTLINE_X = np.array([166, 172, 152, 152, 158, 168, 164, 120], np.float32)
OUTLINE_Y = np.array([108, 108, 102, 104, 108, 104, 90, 70], np.float32)
CAVITY_X = np.array([100, 108, 118, 122, 122, 106, 78, 30], np.float32)
CAVITY_Y = np.array([66, 72, 80, 86, 88, 78, 60, 26], np.float32)
CAVITY_SHIFT = np.array([-22, -18, -10, 0, 0, 0, 4, 6], np.float32)


@dataclasses.dataclass
class Body:
    """What varies between bodies, and the regions later shapes are confined to."""

    enhancement: dict[str, float]
    fat_mm: float
    rng: np.random.Generator
    lung: np.ndarray | None = None  # (D, H, W) 0..1
    cavity: np.ndarray | None = None


def draw_body(canvas: Canvas, phase: str, rng: np.random.Generator) -> Body:
    """Draws the healthy torso of one contrast phase onto the canvas."""
    column = PHASES.index(phase)
    gain = float(rng.uniform(0.93, 1.07))
    body = Body(
        {k: v[column] * (gain if column else 1.0) for k, v in ENHANCEMENT.items()}, float(rng.uniform(10, 22)), rng
    )
    _wall(canvas, body)
    _lungs(canvas, body)
    _spine(canvas, body)
    _pelvic_bones(canvas)
    _chest(canvas, body)
    _abdomen(canvas, body)
    _pelvis(canvas, body)
    return body


def _wall(canvas: Canvas, body: Body) -> None:
    x, y, z = canvas.xyz
    a, b = np.interp(z, Z_KNOTS, OUTLINE_X).astype(np.float32), np.interp(z, Z_KNOTS, OUTLINE_Y).astype(np.float32)
    canvas.capsule((-135, 126, -600), (-135, 126, 600), 6, -150.0)
    canvas.capsule((135, 126, -600), (135, 126, 600), 6, -150.0)
    table = canvas.box((0, 128, 0), (150, 6, 600))
    canvas.blend(table, canvas.weight(6 - np.abs(canvas.coordinates(table)[1] - 128)), -150.0)
    breast = 45.0
    for side in (-1, 1):
        canvas.ellipsoid((side * 76, -92, 125), (56, breast, 62), FAT)
        canvas.ellipsoid((side * 76, -100, 125), (26, 24, 32), -20.0)

    def depth(margin: float) -> np.ndarray:
        u2, v2 = (x / (a - margin)) ** 2, (y / (b - margin)) ** 2
        return (1 - u2 - v2 + np.float32(0.25) * u2 * v2) * np.float32(55)

    canvas.blend(None, canvas.weight(depth(0)), FAT)
    canvas.blend(None, canvas.weight(depth(body.fat_mm)), body.enhancement["muscle"])
    ca, cb = np.interp(z, Z_KNOTS, CAVITY_X).astype(np.float32), np.interp(z, Z_KNOTS, CAVITY_Y).astype(np.float32)
    shift = np.interp(z, Z_KNOTS, CAVITY_SHIFT).astype(np.float32)
    q = (x / ca) ** 2 + ((y - shift) / cb) ** 2
    inside = (1 - q) * np.float32(45)
    body.cavity = canvas.weight(inside)
    canvas.blend(None, body.cavity, FAT + 5)
    # Ribs: a shell round the thoracic cavity, cut into bands that run down toward the front.
    band = np.clip(np.cos((z - np.float32(0.35) * y) * np.float32(2 * np.pi / 38)) * 3 + 0.6, 0, 1)
    band = band * canvas.weight(z + 15) * canvas.weight(285 - z)
    if band.max() > 0:
        shell = np.clip(1.5 - np.abs(inside + 7) * np.float32(1 / 6), 0, 1)
        canvas.blend(None, shell * band, 480.0)


def _lungs(canvas: Canvas, body: Body) -> None:
    body.lung = np.zeros(canvas.hu.shape, np.float32)
    for side in (-1, 1):
        centre, radii = (side * 63, 4, 105), (57, 84, 178)
        box = canvas.box(centre, radii)
        x, y, z = canvas.coordinates(box)
        w = canvas.ellipsoid_weight(box, centre, radii)
        top = 84 if side < 0 else 74  # the right dome of the diaphragm stands higher
        dome = top - ((x - side * 62) / 60) ** 2 * 45 - ((y + 10) / 85) ** 2 * 50
        body.lung[box] = np.maximum(body.lung[box], w * canvas.weight(z - dome))
    canvas.blend(None, body.lung, LUNG)


def _spine(canvas: Canvas, body: Body) -> None:
    box = canvas.box((0, 48, 90), (26, 24, 270))
    x, y, z = canvas.coordinates(box)
    w = canvas.weight((1 - (x / 25) ** 2 - ((y - 48) / 21) ** 2) * 10.5) * canvas.weight(360 - np.abs(z - 180))
    bone = np.clip(np.cos(z * np.float32(2 * np.pi / 40)) * 4 + 3.2, 0, 1)
    canvas.blend(box, w, DISC + (BONE - 130 - DISC) * bone)
    canvas.capsule((0, 77, -160), (0, 77, 600), 15, BONE)
    canvas.capsule((0, 77, -160), (0, 77, 600), 9, 20.0)
    box = canvas.box((0, 96, 200), (6, 10, 370))
    x, y, z = canvas.coordinates(box)
    bands = np.clip(np.cos((z - 10) * np.float32(2 * np.pi / 40)) * 4 + 1, 0, 1) * canvas.weight(z + 160)
    canvas.blend(box, canvas.weight((1 - (x / 6) ** 2 - ((y - 96) / 10) ** 2) * 4) * bands, BONE)
    canvas.ellipsoid((0, -84, 170), (17, 7, 75), BONE)  # sternum
    for side in (-1, 1):
        canvas.ellipsoid((side * 105, 72, 205), (38, 6, 62), BONE, angle=side * -0.6)  # shoulder blade
        canvas.capsule((side * 20, -70, 255), (side * 130, -20, 275), 8, BONE)


def _pelvic_bones(canvas: Canvas) -> None:
    canvas.ellipsoid((0, 66, -185), (44, 19, 62), BONE - 120)
    for side in (-1, 1):
        canvas.ellipsoid((side * 88, 22, -165), (11, 58, 68), BONE, angle=side * 0.62)
        canvas.ellipsoid((side * 90, 6, -258), (36, 34, 34), BONE)
        canvas.ellipsoid((side * 96, 4, -260), (28, 27, 27), 60.0)
        canvas.ellipsoid((side * 96, 4, -260), (23, 23, 23), BONE)
        canvas.capsule((side * 96, 4, -260), (side * 128, 12, -292), 14, BONE)
        canvas.capsule((side * 130, 12, -290), (side * 124, 10, -420), 16, BONE + 100)
        canvas.capsule((side * 12, -62, -292), (side * 72, -20, -268), 11, BONE)
        canvas.capsule((side * 72, 36, -265), (side * 56, 42, -325), 14, BONE)
        canvas.capsule((side * 56, 42, -325), (side * 16, -50, -318), 9, BONE)


def _chest(canvas: Canvas, body: Body) -> None:
    e = body.enhancement
    for side in (-1, 1):  # lung vessels fan out from the hilum
        for dy, dz in ((-30, 50), (25, 45), (30, -35), (-25, -30), (5, 5)):
            canvas.capsule((side * 38, 2, 155), (side * 82, dy, 155 + dz), 4.5, e["vein"] - 120, limit=body.lung)
    canvas.ellipsoid((0, 0, 190), (30, 48, 85), FAT + 30)  # mediastinum
    canvas.ellipsoid((22, -30, 112), (62, 50, 54), e["myocardium"])
    canvas.ellipsoid((44, -20, 104), (30, 28, 34), e["heart"])
    canvas.ellipsoid((-6, -40, 112), (32, 32, 38), (e["heart"] + e["vein"]) / 2)
    canvas.ellipsoid((14, 6, 128), (32, 18, 22), e["heart"])
    canvas.capsule((-6, -24, 140), (-6, -22, 205), 17, e["artery"])
    canvas.capsule((-6, -22, 207), (22, 26, 207), 15, e["artery"])
    canvas.capsule((22, 26, 207), (20, 24, -115), 13, e["artery"])
    canvas.capsule((24, -34, 145), (20, -14, 172), 14, (e["artery"] + e["vein"]) / 2)
    canvas.capsule((-44, 2, 164), (52, 6, 168), 11, (e["artery"] + e["vein"]) / 2)
    canvas.capsule((-30, -8, 130), (-26, -12, 235), 11, e["vein"] * 1.1)
    canvas.capsule((0, 14, 178), (0, 6, 330), 10, AIR)
    for side in (-1, 1):
        canvas.capsule((0, 14, 180), (side * 42, 12, 152), 8, AIR + 60)


def _abdomen(canvas: Canvas, body: Body) -> None:
    e, rng = body.enhancement, body.rng
    for side in (-1, 1):
        canvas.ellipsoid((side * 44, 74, -40), (38, 26, 260), e["muscle"])  # paraspinal muscle
        canvas.capsule((side * 30, 38, 0), (side * 62, 4, -215), 17, e["muscle"])  # psoas
    for _ in range(int(rng.integers(7, 11))):  # small bowel
        centre = (rng.uniform(-72, 72), rng.uniform(-66, 0), rng.uniform(-165, -55))
        canvas.ellipsoid(centre, rng.uniform(14, 26, 3), e["bowel"], limit=body.cavity)
        if rng.random() < 0.4:
            canvas.ellipsoid((centre[0], centre[1] - 6, centre[2]), (9, 7, 9), -600.0, limit=body.cavity)
    below = body.cavity * (1 - body.lung)
    canvas.ellipsoid((-58, -6, 4), (84, 84, 80), e["liver"], limit=below)
    canvas.ellipsoid((14, -42, 24), (66, 44, 52), e["liver"], limit=below)
    canvas.ellipsoid((62, -34, 36), (38, 44, 42), e["bowel"], limit=below)  # stomach: wall, fluid, gas
    canvas.ellipsoid((62, -30, 36), (31, 36, 35), 15.0, limit=below)
    canvas.ellipsoid((60, -50, 38), (22, 16, 26), AIR + 100, limit=below)
    box = canvas.box((88, 38, 14), (34, 54, 62))
    w = canvas.ellipsoid_weight(box, (88, 38, 14), (34, 54, 62)) * below[box]
    value = np.float32(e["spleen"])
    if e["artery"] > 3 * e["vein"]:  # the arterial spleen is striped
        x, y, z = canvas.coordinates(box)
        value = value + 45 * np.cos((y + z * 0.6 + x * 0.5) * np.float32(2 * np.pi / 30))
    canvas.blend(box, w, value)
    for side in (-1, 1):
        c = (side * 62, 40, -45)
        canvas.ellipsoid(c, (31, 29, 58), e["cortex"])
        canvas.ellipsoid((side * 60, 40, -45), (20, 19, 44), e["medulla"])
        canvas.ellipsoid((side * 50, 36, -45), (17, 13, 26), e["urine"])
        canvas.capsule((side * 40, 32, -60), (side * 34, 26, -210), 4, e["urine"])
        canvas.capsule((side * 94, 0, -140), (side * 94, -4, -55), 22, e["bowel"], limit=body.cavity)
        canvas.capsule((side * 94, -2, -140), (side * 94, -6, -55), 15, AIR + 150, limit=body.cavity)
    canvas.capsule((-20, 24, -118), (-24, 14, 96), 12, e["vein"])


def _pelvis(canvas: Canvas, body: Body) -> None:
    e = body.enhancement
    for side in (-1, 1):
        canvas.capsule((side * 8, 24, -115), (side * 46, 16, -165), 12, e["artery"])
        canvas.capsule((side * 46, 16, -165), (side * 74, -42, -262), 12, e["artery"])
        canvas.capsule((side * 74, -42, -262), (side * 84, -52, -400), 11, e["artery"])
        canvas.capsule((side * 30, 34, -120), (side * 62, 24, -180), 11, e["vein"])
        canvas.capsule((side * 62, 24, -180), (side * 60, -40, -264), 11, e["vein"])
        canvas.ellipsoid((side * 44, 20, -222), (12, 11, 13), 45.0)
    canvas.ellipsoid((0, 22, -222), (30, 20, 32), e["bowel"] * 1.2)  # uterus
    canvas.capsule((0, 42, -180), (0, 46, -320), 19, e["bowel"])
    canvas.capsule((0, 40, -180), (0, 44, -270), 9, AIR + 250)
    canvas.ellipsoid((0, -28, -248), (62, 42, 44), e["muscle"])
    canvas.ellipsoid((0, -28, -248), (57, 37, 39), e["urine"])
