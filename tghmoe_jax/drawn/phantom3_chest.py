"""Paints the great vessels and the organs of the chest of the third phantom style."""

import numpy as np

from tghmoe_jax.drawn.phantom3_painter import Painter


def great_vessels(p: Painter) -> None:
    """Aorta, venae cavae, the vessels of the neck, of the lungs' roots and of the pelvis; windpipe and gullet."""
    k, d, _ = p.tube("cava")
    mixed = np.clip((p.z[k] - 75) / 40, 0, 1)  # the kidneys' veins bring contrast first
    p.blend(k, d, p.hu_of("vein") + mixed * (p.hu_of("cava") - p.hu_of("vein")))
    p.vessel("upper cava", "cava", value=p.hu_of("artery") * 1.25 if p.phase == 1 else None)
    p.vessel("innominate vein", "vein")
    for name in ("neck arteries", "left neck artery", "left subclavian"):
        p.vessel(name, "artery")
    for name in ("lung trunk", "right lung artery"):
        p.vessel(name, "lung artery")
    p.vessel("lung veins", "artery")
    p.vessel("aorta", "artery", grow=1.5, value=44.0)
    p.vessel("aorta", "artery")
    for right in (False, True):
        p.vessel("right common iliac vein" if right else "common iliac vein", "vein")
        p.vessel("outer iliac vein", "vein", right)
        for name in ("common iliac artery", "outer iliac artery", "inner iliac artery"):
            p.vessel(name, "artery", right)
    p.vessel("gullet", "bowel")
    p.vessel("gullet", "bowel", grow=-5.0, value=-300.0)
    for name in ("windpipe", "right bronchus", "left bronchus"):
        p.vessel(name, "muscle", grow=2.0)
        p.vessel(name, "muscle", value=-985.0)


def lungs(p: Painter, volume: float, to_index) -> None:
    """Lungs with vessels and fissures, and the diaphragm; the arguments are those of `paint`."""
    k = np.flatnonzero((p.inner < p.soft) & (p.z > 90 + p.patient.breath))
    x, y, z = p.x[k], p.y[k], p.z[k]
    lung = p.body.lung(x, y, z, p.inner[k])
    grey = -862 + 0.45 * (y + 20) + 0.25 * (300 - z) * (y > 0) + 14 * p.field("lung", k, 45)
    # the fissures: thin plates between the lobes
    tilt = (z - 286 - p.patient.breath * 0.5 - (y - 10) * 1.05 + 0.003 * (np.abs(x) - 60) ** 2) * 0.69
    lesser = np.where((x < 0) & (tilt > 0), z - 284 + 0.002 * (x + 70) ** 2, 99)
    plate = np.minimum(np.abs(tilt), np.abs(lesser)) - 0.5
    grey = grey + p.cover(plate) * np.clip(1.2 / p.soft, 0, 1) * 300
    filled = p.splat(*_vessel_tree(p), volume, to_index)[k]
    grey = grey + filled * (35 + p.hu_of("lung artery") * 0.35 - grey)
    p.blend(k, lung, grey)
    above = p.body.above(x, y, z, p.inner[k])
    close = np.flatnonzero((np.abs(above) < 10) & (p.inner[k] < 0))
    rim = np.abs(above[close] + 1.5) - 1.3  # the diaphragm itself
    p.blend(k[close], np.maximum(rim, -lung[close]), p.hu_of("muscle"))


def heart(p: Painter) -> None:
    """The heart with its four chambers and the fat in its grooves."""
    k, d = p.solid("heart")
    below = np.full(len(p.at), -99.0, np.float32)  # negative above the diaphragm
    below[k] = -p.body.above(p.x[k], p.y[k], p.z[k], p.inner[k])
    d = np.maximum(d, below[k] + 1)
    p.blend(k, d, p.hu_of("heart"))
    blood = {"left ventricle": "artery", "left atrium": "artery", "right ventricle": "lung artery"}
    blood["right atrium"] = "cava" if p.phase != 1 else "lung artery"
    for name, tissue in blood.items():
        j, inside = p.solid(name)
        p.blend(j, np.maximum(inside, below[j] + 7), p.hu_of(tissue))
    groove = np.abs(p.field("groove", k, 70)) * 8 - 1.0
    p.blend(k, np.maximum(np.maximum(d, -d - 4), groove), -60.0)


def _vessel_tree(p: Painter) -> tuple[np.ndarray, np.ndarray]:
    """Points (K, 3) along the vessels of the lungs and the volume (K,) in mm3 that each stands for."""
    rng = p.body.rng("tree")
    n = 800
    ends = np.stack([rng.uniform(28, 132, n), rng.uniform(-85, 80, n), rng.uniform(130, 420, n)], 1)
    ends[::2, 0] *= -1
    ends = ends[p.body.lung(*np.float32(ends.T)) < -4][:230]
    left = ends[:, 0] > 0
    hilum = np.stack([np.where(left, 50, -50), np.full(len(ends), 20.0), np.full(len(ends), 302.0)], 1)
    hilum[:, 2] += np.clip(ends[:, 2] - 302, -45, 25) * 0.6
    bend = (hilum + ends) / 2 + rng.normal(0, 9, ends.shape)
    t = np.linspace(0.08, 1, 30)[:, None, None]
    points = (1 - t) ** 2 * hilum + 2 * t * (1 - t) * bend + t**2 * ends
    length = np.linalg.norm(ends - hilum, axis=1) / 30
    thick = rng.uniform(2.2, 5.0, len(ends)) * (1.15 - t[..., 0])
    weight = np.pi * thick**2 * length
    return points.reshape(-1, 3), weight.ravel()
