"""The organs of a patient's abdomen and pelvis: their shapes, and how they are drawn.

Coordinates and axis legend as in `patient_body`.
"""

import numpy as np

from tghmoe_jax.drawn.canvas import AIR, NOTHING
from tghmoe_jax.drawn.patient_body import Ball, Patient
from tghmoe_jax.drawn.patient_trunk import SIDE, Torso, waves

# Tubes of the nominal body: points of their axis and radius in mm. `side` is -1 right, 1 left.
COLON_MM, PARASPINAL_MM = 21.0, 26.0


def liver(p: Patient) -> tuple[Ball, Ball]:
    """The right and the left lobe."""
    return p.ball("liver", (-66, -14, 14), (86, 84, 80)), p.ball("left lobe", (6, -48, 32), (74, 42, 44), -0.15)


def spleen(p: Patient) -> Ball:
    return p.ball("spleen", (96, 42, 16), (25, 54, 58), -0.25)


def kidney(p: Patient, side: int) -> Ball:
    name = "right kidney" if side < 0 else "left kidney"
    return p.ball(name, (side * 62, 44, -50), (28, 27, 55), side * 0.5)


def bladder(p: Patient) -> Ball:
    return p.ball("bladder", (0, -28, -252), (54, 38, 40))


def ovary(p: Patient, side: int) -> Ball:
    return p.ball("right ovary" if side < 0 else "left ovary", (side * 48, 22, -216), (15, 14, 17))


def colon(p: Patient, side: int) -> np.ndarray:
    """Axis (4, 3) of the ascending (right) or descending (left) colon, from below upward."""
    points = [(96, -22, -178), (98, -4, -140), (98, 4, -95), (94, 0, -52)]
    return np.array([p.moved("right colon" if side < 0 else "left colon", (side * x, y, z)) for x, y, z in points])


def paraspinal(p: Patient, side: int) -> np.ndarray:
    """Axis (3, 3) of the long muscle of the back."""
    return np.array([p.moved("muscle", (side * 38, y, z)) for y, z in ((86, -190), (80, -50), (94, 215))])


def gluteal(p: Patient, side: int) -> Ball:
    return p.ball("muscle", (side * 84, 74, -205), (46, 24, 66), side * -0.5)


def iliac(side: int) -> np.ndarray:
    """Axis (3, 3) of the common and the external iliac artery, from above downward."""
    return np.array([(side * 8, 22, -115), (side * 46, 16, -170), (side * 74, -42, -262)], np.float64)


def draw_organs(t: Torso) -> None:
    """Draws abdomen and pelvis."""
    below = t.below
    _muscles(t)
    _bowel(t)
    _upper(t, below)
    _kidneys(t)
    _vessels(t)
    _pelvis(t)


def _muscles(t: Torso) -> None:
    p, hu = t.patient, t.patient.hu
    for side, name in SIDE.items():
        t.chain(paraspinal(p, side), PARASPINAL_MM, hu["muscle"], t.trunk, f"autochthon_{name}")
        t.chain(((side * 26, 88, -190), (side * 24, 84, -50), (side * 26, 96, 160)), 3, hu["fat"] + 30)  # fat between
        t.chain(
            ((side * 26, 44, 0), (side * 40, 34, -90), (side * 66, 0, -225), (side * 84, -8, -300)), 17, hu["muscle"],
            mark=f"iliopsoas_{name}",
        )  # fmt: skip
        t.chain(((side * 60, 66, -20), (side * 72, 62, -120)), 12, hu["muscle"])  # quadratus lumborum
        t.canvas.ellipsoid((side * 112, 34, -190), (15, 56, 66), hu["fat"] + 20, side * 0.6, t.trunk)
        middle = f"gluteus_medius_{name}"
        t.canvas.ellipsoid((side * 110, 30, -180), (12, 50, 62), hu["muscle"], side * 0.6, t.trunk, middle)
        t.ball(gluteal(p, side), hu["fat"] + 20, 1.12, t.trunk)
        t.ball(gluteal(p, side), hu["muscle"], limit=t.trunk, mark=f"gluteus_maximus_{name}")
        t.canvas.ellipsoid((side * 58, 10, -262), (9, 36, 40), hu["muscle"], side * 0.3)  # obturator


def _bowel(t: Torso) -> None:
    p, hu, rng = t.patient, t.patient.hu, t.rng
    limit, wall = t.cavity, hu["bowel"]
    filling = float(rng.choice((8.0, 25.0, 25.0, 260.0)))  # water, chyme, or contrast that was drunk
    _loops(t, filling)
    for _ in range(int(rng.integers(5, 10))):
        at = rng.uniform((-74, -72, -185), (74, 4, -50))
        bends = at + np.cumsum(rng.uniform(-34, 34, (3, 3)) * (1, 0.7, 0.7), axis=0)
        radius = rng.uniform(10, 17)
        t.chain(bends, radius, wall, limit, "small_bowel")
        t.chain(bends[1:], radius - 3.5, filling if rng.random() < 0.6 else wall - 10, limit)
        if rng.random() < 0.3:
            t.canvas.ellipsoid(bends[1] - (0, 0.4 * radius, 0), (radius, 0.5 * radius, radius), -850.0, limit=limit)
    for _ in range(8):  # vessels of the mesentery
        a = rng.uniform((-50, -50, -150), (50, 10, -40))
        t.chain((a, a + rng.uniform(-40, 40, 3)), 2.5, hu["vein"], limit)
    gas = rng.uniform(0, 1)
    stool = rng.uniform(-140, 30)
    across = [
        p.moved("right colon", (-94, -20, -40)),
        (-40, -66, -30),
        (20, -72, -24),
        p.moved("left colon", (92, -16, -30)),
    ]
    low = [colon(p, 1)[0], (72, -10, -205), (20, -10, -200), (10, 30, -190)]
    for points, size in ((across, 17), (low, 14), (colon(p, -1), COLON_MM), (colon(p, 1), COLON_MM - 3)):
        _colon(t, points, size * rng.uniform(0.75, 1.1), gas, stool)


def _loops(t: Torso, filling: float) -> None:
    """Folded bowel between fat, dense in slim patients: where a sum of waves is high."""
    canvas, rng = t.canvas, t.rng
    box = canvas.box((0, -30, -115), (118, 95, 110))
    x, y, z = canvas.coordinates(box)
    high = waves((x, y, z), (38, 80), 4, rng)
    deep = 1 - (x / 112) ** 2 - ((y + 30) / 88) ** 2 - ((z + 115) / 105) ** 2  # less toward the edges
    high += np.minimum(3 * deep, 0) - np.float32(0.2 + 1.1 * t.patient.fat_mm / 50)
    there = canvas.weight(14 * high) * t.cavity[box]
    canvas.blend(box, there, np.float32(t.patient.hu["bowel"]), "small_bowel")
    canvas.blend(
        box, canvas.weight(14 * (high - 0.5)) * t.cavity[box], np.float32(0.5 * (filling + t.patient.hu["bowel"]))
    )
    gas = np.minimum(high - 0.6, np.float32(0.02) * (-50 - y))
    canvas.blend(box, canvas.weight(14 * gas) * t.cavity[box], np.float32(AIR + 60))


def _colon(t: Torso, points, radius: float, gas: float, stool: float) -> None:
    """A tube of pouches that hold stool and, in front of it, gas."""
    t.chain(points, radius, t.patient.hu["bowel"], t.cavity, "colon")
    t.chain(points, radius - 4, stool, t.cavity)
    for start, end in zip(points, points[1:], strict=False):
        for part in (0.2, 0.7):
            if t.rng.random() < gas:
                at = np.asarray(start) + part * np.subtract(end, start) - (0, 0.2 * radius, 0)
                radii = t.rng.uniform(0.65, 1.0, 3) * (radius - 3)
                t.canvas.ellipsoid(at, radii, AIR + 60, limit=t.cavity)


def _upper(t: Torso, below: np.ndarray) -> None:
    p, hu, rng = t.patient, t.patient.hu, t.rng
    stomach = p.ball("stomach", (58, -34, 34), (38, 44, 44), 0.3)
    t.chain((stomach.centre, (10, -48, -8), (-26, -34, -10)), 17, hu["bowel"], below, "stomach")
    t.ball(stomach, hu["bowel"], limit=below, mark="stomach")
    t.ball(stomach, float(rng.choice((10.0, 40.0, 200.0), p=(0.45, 0.45, 0.1))), 0.84, below)
    level = rng.uniform(0.1, 0.5)
    bubble = stomach.radii * (0.7, 0.9 - level, 0.75)
    t.canvas.ellipsoid(stomach.centre - (0, stomach.radii[1] * level, 0), bubble, AIR + 30, limit=below)
    t.chain(((-30, -34, -12), (-36, -10, -50), (-6, 4, -66), (34, -10, -30)), 11, hu["bowel"], below, "duodenum")
    gland = [p.moved("pancreas", at) for at in ((-24, -12, -22), (0, -30, -2), (34, -16, 8), (66, 14, 18))]
    t.chain(gland, 10, (hu["bowel"] + hu["liver"]) / 2, below, "pancreas")
    right, left = liver(p)
    t.ball(right, hu["liver"], limit=below, mark="liver")
    t.ball(left, hu["liver"], limit=below, mark="liver")
    for _ in range(7):  # veins of the liver meet below the heart
        way = rng.uniform((-110, -60, -50), (10, 50, 10))
        t.chain(
            (right.centre + (38, 0, 50), right.centre + (38, 0, 50) + way), rng.uniform(2.5, 5.5), hu["vein"], below
        )
    portal = ((16, -6, -30), (-18, -16, 4), (-52, -14, 18), (-84, -6, 22))
    t.chain(portal, 6, hu["vein"], below, "portal_vein_and_splenic_vein")
    pouch = p.ball("gallbladder", (-46, -58, -24), (16, 26, 20))
    t.ball(pouch, hu["bowel"], 1.1, below, "gallbladder")
    t.ball(pouch, 8.0, 0.95, below)
    pulp, box = spleen(p), None
    reach = np.full(3, max(pulp.radii[:2]))
    reach[2] = pulp.radii[2]
    box = t.canvas.box(pulp.centre, reach)
    weight = t.canvas.ellipsoid_weight(box, *pulp) * below[box]
    value = np.float32(hu["spleen"])
    if hu["artery"] > 3 * hu["vein"]:  # the arterial spleen is striped
        x, y, z = t.canvas.coordinates(box)
        value = value + 35 * np.cos((y + z * 0.6 + x * 0.5) * np.float32(2 * np.pi / 30))
    t.canvas.blend(box, weight, value, "spleen")
    for side, name in SIDE.items():
        gland = ((side * 30, 24, 14), (side * 36, 12, 4), (side * 44, 26, -2))
        t.chain(gland, 3.5, hu["bowel"], below, f"adrenal_gland_{name}")


def _kidneys(t: Torso) -> None:
    p, hu = t.patient, t.patient.hu
    for side, name in SIDE.items():
        body = kidney(p, side)
        bed = Ball(body.centre + (0, 4, -6), body.radii + 0.12 * p.fat_mm + 5, body.angle)
        t.ball(bed, hu["fat"], limit=t.cavity, mark=NOTHING)
        t.ball(body, hu["cortex"], mark=f"kidney_{name}")
        t.ball(body, hu["medulla"], 0.72)
        hilum = body.centre - (side * 0.6 * body.radii[0], 0, 0)
        t.canvas.ellipsoid(hilum, body.radii * (0.5, 0.3, 0.5), hu["fat"], body.angle)
        t.canvas.ellipsoid(hilum, body.radii * (0.42, 0.2, 0.3), hu["urine"], body.angle)
        t.chain((hilum, (side * 38, 34, -100), (side * 40, 24, -170), (side * 34, 10, -235)), 3, hu["urine"])
        t.chain((hilum, (side * 16, 18, -38)), 5, hu["vein"])


def _vessels(t: Torso) -> None:
    hu = t.patient.hu
    t.chain(((12, 20, 70), (8, 22, -115)), 11, hu["artery"], mark="aorta")
    t.chain(((-22, 24, -118), (-24, 20, -20), (-26, 6, 96)), 12, hu["vein"], mark="inferior_vena_cava")
    t.chain(((8, 12, -20), (6, -20, -30), (4, -24, -120)), 4.5, hu["artery"])
    t.chain(((-6, -22, -24), (-8, -26, -120)), 5.5, hu["vein"])
    for side, name in SIDE.items():
        t.chain(iliac(side), 9, hu["artery"], mark=f"iliac_artery_{name}")
        t.chain((iliac(side)[-1], (side * 84, -52, -420)), 8, hu["artery"])
        t.chain(((side * 46, 16, -170), (side * 40, 44, -230)), 6, hu["artery"])
        vein = ((-22, 28, -118), (side * 50, 30, -185), (side * 62, -38, -266), (side * 66, -48, -420))
        t.chain(vein, 9, hu["vein"], mark=f"iliac_vena_{name}")


def _pelvis(t: Torso) -> None:
    p, hu, rng = t.patient, t.patient.hu, t.rng
    rectum = [p.moved("rectum", at) for at in ((4, 42, -185), (0, 50, -240), (0, 40, -320))]
    t.chain(rectum, 17, hu["bowel"], mark="colon")
    t.chain(rectum[:2], 11, AIR + 150 if rng.random() < 0.5 else -20.0)
    if p.sex == "female":
        womb = p.ball("womb", (0, 14, -222), (26, 22, 30))
        t.ball(womb, hu["bowel"] * 1.15)
        t.ball(womb, hu["bowel"] * 0.8, 0.35)
        for side in (-1, 1):
            t.ball(ovary(p, side), 32.0)
    else:
        t.canvas.ellipsoid((0, 4, -296), (24, 19, 22), hu["bowel"] * 1.05, mark="prostate")
        t.canvas.ellipsoid((0, 20, -272), (30, 8, 11), hu["muscle"] - 10)
    sac = bladder(p)
    t.ball(sac, hu["muscle"], mark="urinary_bladder")
    t.ball(Ball(sac.centre, sac.radii - 4, sac.angle), hu["urine"])
