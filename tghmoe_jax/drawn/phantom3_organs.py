"""Paints the organs of the belly and of the pelvis of the third phantom style."""

import numpy as np

from tghmoe_jax.drawn.phantom3_painter import FAT, Painter
from tghmoe_jax.drawn.phantom3_shapes import near


def abdomen(p: Painter) -> None:
    """Paint the abdominal organs, those at the back first."""
    under = np.full(len(p.at), -999.0, np.float32)  # negative under the diaphragm
    k = np.flatnonzero(p.z > 60)
    under[k] = p.body.under(p.x[k], p.y[k], p.z[k], p.inner[k])
    for right in (False, True):
        _kidney(p, right)
    _loops(p)
    for name in ("mesenteric artery", "kidney artery"):
        p.vessel(name, "artery")
    p.vessel("kidney artery", "artery", True)
    p.vessel("kidney vein", "cava")
    p.vessel("mesenteric vein", "portal")
    _hollow(p, "duodenum", 3.0, "bowel", 15.0, 0.2)
    p.vessel("pancreas", "pancreas")
    p.vessel("spleen vein", "portal")
    _colon(p)
    _stomach(p, under)
    k, d = p.solid("spleen")
    spleen = p.hu_of("spleen")
    mottled = 22 * p.field("spleen", k, 22) if p.phase == 1 else 0
    p.blend(k, np.maximum(d, under[k]), spleen + mottled)
    k, d = p.solid("liver")
    p.blend(k, np.maximum(d, under[k]), p.hu_of("liver") + 3 * p.field("liver", k, 30))
    _liver_inside(p, under)
    k, d, _ = p.tube("gallbladder")
    p.blend(k, d - 1.5, 40.0)
    p.blend(k, d, 9.0)


def _liver_inside(p: Painter, under) -> None:
    veins = {
        "portal vein": "portal",
        "left portal vein": "portal",
        "right liver vein": "cava",
        "middle liver vein": "cava",
        "left liver vein": "cava",
    }
    for name, tissue in veins.items():
        k, d, _ = p.tube(name)
        value = p.hu_of(tissue)
        if p.phase == 1 and tissue == "cava":
            value = p.hu_of("liver") - 12  # the liver's veins fill late
        p.blend(k, np.maximum(d, under[k]), value)
    k, d, _ = p.tube("cava")
    p.blend(k, np.maximum(d, -(p.z[k] - 120)), p.hu_of("cava"))


def _kidney(p: Painter, right: bool) -> None:
    k, d = p.solid("kidney", right)
    p.blend(k, d, p.hu_of("cortex"))
    cones = np.cos(p.z[k] / 4.2) * np.cos(np.arctan2(p.y[k] - 30, np.abs(p.x[k]) - 62) * 3) * 3
    p.blend(k, d + 8 + cones, p.hu_of("medulla"))
    k, d = p.solid("kidney sinus", right)
    p.blend(k, d, FAT + 10)
    p.blend(k, d + 4.5, p.hu_of("pelvis"))


def _loops(p: Painter) -> None:
    """The small bowel: one channel of a warped gyroid, a surface whose channels wind like bowel."""
    k, d = p.solid("loops")
    if not len(k):
        return
    rng = p.body.rng("loops")
    rate = np.float32(2 * np.pi / rng.uniform(56, 66))
    warp = 9 * p.field("warp", k, 120)
    u, v, w = ((c[k] + warp) * rate + np.float32(rng.uniform(0, 6)) for c in (p.x, p.y, p.z))
    g = np.sin(u) * np.cos(v) + np.sin(v) * np.cos(w) + np.sin(w) * np.cos(u)
    depth = (np.float32(0.15) - g) / rate * np.float32(0.8)  # about the distance to the loop's surface
    outside = np.maximum(depth, np.maximum(d, p.inner[k] + 4))
    for right in (False, True):  # the vessels of the pelvis run in fat
        for name in ("common iliac artery", "outer iliac artery"):
            j, gap, _ = near(p.body.path(name, right), p.x[k], p.y[k], p.z[k], 22)
            outside[j] = np.maximum(outside[j], 20 - gap)
    p.blend(k, outside, p.hu_of("bowel"))
    part = p.field("content", k, 70)
    fluid = np.where(part > 0.9, 4.0, 24.0)
    gas = (part < -1.15) & (p.field("gas", k, 34) > 0.3)
    p.blend(k, outside + 4, np.where(gas, -820.0, fluid))
    vessels = np.abs(p.field("mesentery", k, 26)) * 6 - 0.5
    p.blend(k, np.maximum(np.maximum(vessels, 3 - outside), d + 4), -20.0 + 0.2 * p.hu_of("artery"))


def _hollow(p: Painter, name: str, wall: float, tissue: str, content: float, gas_share: float) -> None:
    """A hollow organ: wall, fluid, and gas in front."""
    path = p.body.path(name)
    k, d, s = p.tube(name)
    p.blend(k, d, p.hu_of(tissue))
    front = (path.path[s, 1] - p.y[k]) / np.maximum(path.radius[s], 1)
    gas = (front > 1 - 2 * gas_share) & (p.field(name, k, 40) > 0.2)
    p.blend(k, d + wall, np.where(gas, -850.0, content))


def _stomach(p: Painter, under) -> None:
    k, d, _ = p.tube("stomach")
    d = np.maximum(d, under[k])
    p.blend(k, d, p.hu_of("stomach") + 4 * p.field("stomach", k, 25))
    rng = p.body.rng("meal")
    level = rng.uniform(-62, -25)  # the fluid's surface: gas rises to the front
    meal = rng.choice([12.0, 32.0]) + rng.uniform(0, 18) * p.field("food", k, 15)
    gas = p.cover(p.y[k] - np.float32(level))
    p.blend(k, d + 5, meal + gas * (-930 - meal))


def _stool(p: Painter, k, path, s, d, wall: float, solid_share: float) -> None:
    p.blend(k, d, p.hu_of("bowel"))
    crumb = 0.55 * p.field("crumb", k, 24) + p.body.rng(f"crumb {wall}").normal(0, 0.8, len(k))
    mass = 2 - 420 * np.clip(crumb - 0.35, 0, 1) + 10 * np.minimum(crumb, 1)
    front = (path.path[s, 1] - p.y[k]) / np.maximum(path.radius[s], 1)
    part = np.sin(path.along[s] / 55 + p.body.rng("stool").uniform(0, 6))
    gas = p.cover((solid_share + 0.5 * part - front) * 12)
    p.blend(k, d + wall, mass + gas * (-940 - mass))


def _colon(p: Painter) -> None:
    path = p.body.path("colon")
    k, d, s = p.tube("colon", margin=8)
    folds = 2.6 * np.cos(path.along[s] * np.float32(2 * np.pi / 34))  # the pouches of the colon
    d = np.maximum(d + folds, p.inner[k] + 2.5)
    fade = p.body.rng("stool share").uniform(-0.2, 1.0)
    _stool(p, k, path, s, d, 3.5, fade)


def pelvis(p: Painter) -> None:
    """Paint the organs of the pelvis."""
    k, d, _ = p.tube("sigmoid")
    p.blend(k, d, p.hu_of("bowel"))
    p.blend(k, d + 5, np.where(p.field("rectum", k, 45) > 0.5, -700.0, 20.0))
    if p.patient.female:
        k, d = p.solid("uterus")
        p.blend(k, d - 0.5, p.hu_of("uterus"))
        p.blend(k, d + 10, p.hu_of("uterus") - 18)
    else:
        k, d = p.solid("prostate")
        p.blend(k, d, p.hu_of("prostate"))
        k = p.within([[-28, 2, -196], [28, 22, -172]])
        back = p.y[k] - 10 - 0.08 * np.abs(p.x[k])
        gland = np.sqrt((p.x[k] / 26) ** 2 + (back / 6) ** 2 + ((p.z[k] + 184) / 8) ** 2)
        p.blend(k, (gland - 1) * 6, 40.0)
    k, d = p.solid("bladder")
    p.blend(k, d - 3, p.hu_of("bowel"))
    urine = p.hu_of("urine")
    if p.phase == 3:  # contrast sinks to the back
        urine = urine * np.clip(0.55 + (p.y[k] + 34) / 50, 0.15, 1.1)
    p.blend(k, d, urine)
    for right in (False, True) if p.patient.female else ():
        k, d = p.solid("ovary", right)
        p.blend(k, d, p.hu_of("ovary"))
