"""Paints a healthy patient of the third phantom style, each tissue over what lies under it."""

import numpy as np

from tghmoe_jax.drawn import phantom3_chest as chest
from tghmoe_jax.drawn import phantom3_organs as organs
from tghmoe_jax.drawn import phantom3_skeleton as skeleton
from tghmoe_jax.drawn.phantom3_body import breast_bump, buttock_seam
from tghmoe_jax.drawn.phantom3_painter import FAT, Painter
from tghmoe_jax.drawn.phantom3_shapes import waves


def paint(p: Painter, volume: float, to_index) -> None:
    """Paint a whole healthy patient.

    `volume` is that of a voxel in mm3 and `to_index` turns atlas points (N, 3) into indices (N, 3) of the fine grid.
    """
    _shell(p)
    _muscles(p)
    skeleton.spine(p)
    if p.low < 20:
        skeleton.pelvis_bones(p)
    if p.high > 120:
        chest.lungs(p, volume, to_index)
        chest.heart(p)
    chest.great_vessels(p)
    if p.low < 240:
        organs.abdomen(p)
    if p.low < -20:
        organs.pelvis(p)
    skeleton.rib_cage(p)
    skeleton.shoulders(p)


def _shell(p: Painter) -> None:
    """Skin, fat, breasts, the muscles of the trunk as one mass, and the fat inside."""
    everything = np.arange(len(p.at))
    p.blend(everything, p.skin, 15.0)
    p.blend(everything, p.skin + 2.5, FAT + 6 * waves(3, p.x, p.y, p.z, 60))
    if p.patient.female:
        k = np.flatnonzero((p.y < 0) & (p.wall > -2) & (p.z > 190) & (p.z < 330))
        turn = np.arctan2(p.y[k] - 5, p.x[k])
        height = p.patient.breast * breast_bump(p.z[k], turn)
        d = np.maximum(np.maximum(p.skin[k] + 9, 3 - p.wall[k]), 0.42 * p.patient.breast - height)
        lobes = 0.55 + 0.25 * np.tanh(1.5 * p.field("gland", k, 45))
        p.blend(k, d, FAT + (p.hu_of("gland") - FAT) * lobes)
    muscle = p.hu_of("muscle")
    streaks = np.abs(p.field("streaks", everything, 40)) < 0.07 * p.patient.fat
    p.blend(everything, p.wall, muscle + 4 * waves(4, p.x, p.y, p.z, 25) - 25 * streaks)
    _fat_planes(p, np.flatnonzero(p.wall < 0))
    k = np.flatnonzero((p.inner < p.soft) & (p.z > -224) & (p.z < 430))
    p.blend(k, p.inner[k], FAT)


def _fat_planes(p: Painter, k) -> None:
    """The seams of fat between muscles, which make their outlines visible."""

    def between(low: float, high: float):
        here = k[(p.z[k] > low) & (p.z[k] < high)]
        return here, np.abs(p.x[here]), p.y[here], p.z[here], p.inner[here]

    def seam(here, *distances) -> None:
        p.blend(here, np.maximum(np.minimum.reduce(distances), p.wall[here] + 3), -85.0)

    if p.high > 180:  # under the muscles of the shoulder blade, and the armpit
        here, x, y, z, inner = between(180, 420)
        armpit = np.sqrt(((x - 134) / 20) ** 2 + ((y - 2) / 26) ** 2 + ((z - 348) / 46) ** 2) * 20 - 18
        seam(here, np.abs(inner - 19) - 1.4, armpit)
    if p.low < 130 and p.high > -40:  # between the layers of the flank
        here, x, _, _, inner = between(-40, 130)
        seam(here, np.where(x > 80, np.abs(inner - 9) - 0.5, 99))
    if p.low < -30:  # under the great muscle of the buttock
        here, x, y, z, _ = between(-215, -30)
        seam(here, np.where(x > 50, buttock_seam(x, y, z) - 2, 99))
    if p.low < -130:  # thigh, groin and the fat beside the rectum
        here, x, y, z, _ = between(-400, -130)
        far = np.sqrt((x - 118) ** 2 + (y - 8) ** 2)
        ray = np.arctan2(y - 8, x - 118) + 0.3 * np.sin(z / 40)  # the seams run outward from the femur
        thigh = far * np.abs(np.sin(2 * ray + 0.5 * np.sin(far / 20))) / 2 - 1.2
        thigh = np.where((z < -165) & (far > 30) & ((z < -205) | (y < 10)), thigh, 99)
        pit = np.sqrt(((x - 28) / 15) ** 2 + ((y - 56) / 24) ** 2 + ((z + 212) / 32) ** 2) * 16 - 15
        groin = np.sqrt(((x - 74) / 20) ** 2 + ((y + 80) / 14) ** 2 + ((z + 205) / 75) ** 2) * 14 - 13
        seam(here, thigh, pit, groin)


def _muscles(p: Painter) -> None:
    muscle = p.hu_of("muscle")
    for right in (False, True):
        k, d = p.solid("erector", right)
        p.blend(k, d - 2.0, -80.0)
        p.blend(k, d, muscle + 5 * p.field("erector", k, 18))
        for name in ("psoas", "quadratus"):
            p.vessel(name, "muscle", right)
        p.vessel("crus", "muscle", right)
    k = np.flatnonzero((p.z > -205) & (p.z < -105) & (p.inner > -14) & (p.inner < 2) & (np.abs(p.x) > 30) & (p.y < 62))
    p.blend(k, -p.inner[k] - 11, muscle)  # the muscle that lines the true pelvis
