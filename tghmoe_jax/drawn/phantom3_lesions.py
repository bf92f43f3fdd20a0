"""Paints the lesions of the third phantom style, each as it looks on real CT."""

import dataclasses

import numpy as np

from tghmoe_jax.drawn.phantom3_body import rib_line, trunk_middle
from tghmoe_jax.drawn.phantom3_painter import Painter
from tghmoe_jax.drawn.phantom3_seats import ASIDE
from tghmoe_jax.drawn.phantom3_skeleton import hip_bone


@dataclasses.dataclass(frozen=True)
class Finding:
    """A lesion in the frame of the atlas: `spot` (x, y, z) is its centre, `size` its largest extent, both in mm.

    The size of an aneurysm is its width; it is half as long again.
    """

    kind: str
    place: str
    size: float
    spot: tuple[float, float, float]


@dataclasses.dataclass(frozen=True)
class Near:
    """Voxels `k` (M,) around a lesion, `v` (M, 3) from its centre to them and `rho` (M,) how far, in mm."""

    k: np.ndarray
    v: np.ndarray
    rho: np.ndarray


def _around(p: Painter, f: Finding, reach: float = 0.8) -> Near:
    scale = np.array(p.patient.scale)
    r = (f.size * reach + 6) / scale
    k = p.within(np.array([f.spot - r, f.spot + r]))
    v = (np.stack([p.x[k], p.y[k], p.z[k]], 1) - np.float32(f.spot)) * np.float32(scale)
    return Near(k, v, np.sqrt((v * v).sum(1)))


def _ball(near: Near, size: float, rng: np.random.Generator, lumps: float) -> np.ndarray:
    """Distances (M,) to a lumpy ball of largest extent `size`; its radius varies by `lumps` (a share)."""
    toward = near.v / np.maximum(near.rho, 0.1)[:, None]
    bumps = np.zeros(len(near.k), np.float32)
    for rate in (2.0, 3.5, 5.0):
        axis = rng.normal(size=3)
        bumps += np.cos(rate * (toward @ np.float32(axis / np.linalg.norm(axis))) * 2 + np.float32(rng.uniform(0, 6)))
    return near.rho - size / 2 * (1 - lumps + lumps * bumps / 3)


def paint_lesion(p: Painter, f: Finding, rng: np.random.Generator) -> None:
    """Paint one lesion over the healthy anatomy."""
    _PAINTERS[f.kind](p, f, rng)


def _lung_nodule(p, f, rng) -> None:
    near = _around(p, f)
    d = _ball(near, f.size, rng, rng.choice([0.05, 0.18]))
    lung = p.body.lung(p.x[near.k], p.y[near.k], p.z[near.k], p.inner[near.k])
    if rng.random() < 0.3:  # a halo of ground glass
        p.blend(near.k, np.maximum(d - 4, lung), -620.0)
    p.blend(near.k, np.maximum(d, lung - 2), rng.uniform(25, 50) + (0, 25, 30, 20)[p.phase])


def _effusion(p, f, rng) -> None:
    near = _around(p, f)
    out = np.array([f.spot[0], f.spot[1] - 8, 0.0])
    out = np.float32(out / np.linalg.norm(out))
    depth = near.v @ out
    along = np.sqrt(np.maximum(near.rho**2 - depth**2, 0))
    thick = np.float32(np.clip(0.3 * f.size, 7, 17))
    d = (np.sqrt((along * 2 / f.size) ** 2 + (depth / thick) ** 2) - 1) * thick
    lung = p.body.lung(p.x[near.k], p.y[near.k], p.z[near.k], p.inner[near.k])
    p.blend(near.k, np.maximum(d - 3, lung), -250.0)  # compressed lung
    p.blend(near.k, np.maximum(d, lung), rng.uniform(4, 20))


def _rib_fracture(p, f, rng) -> None:
    near = _around(p, f)
    k = near.k
    angle = np.degrees(np.abs(np.arctan2(p.x[k], p.y[k] - trunk_middle(p.z[k]))))  # from the back
    here = np.degrees(abs(np.arctan2(f.spot[0], f.spot[1] - trunk_middle(f.spot[2]))))
    rib = min(range(1, 11), key=lambda r: abs(rib_line(r, here) - f.spot[2]))
    off = p.z[k] - rib_line(rib, angle)
    deep = p.inner[k] - 5
    along = np.sign(angle - here) * np.sqrt(np.maximum(near.rho**2 - (0.8 * off) ** 2 - deep**2, 0))
    blood = np.maximum(near.rho - f.size / 2, np.abs(deep) - 10)
    p.blend(k, blood, rng.uniform(42, 58))
    gap = max(4.5, 0.2 * f.size)
    shift = np.where(along > 0, 4.0, -3.0)  # the ends stand out of line
    end = np.maximum(np.sqrt((off / 6.5) ** 2 + ((deep - shift) / 4) ** 2) * 4.5 - 4.5, gap - np.abs(along))
    p.blend(k, np.maximum(end, near.rho - f.size / 2 - 2), 520.0)


def _breast_mass(p, f, rng) -> None:
    near = _around(p, f)
    d = _ball(near, f.size, rng, 0.2)
    p.blend(near.k, np.maximum(d, p.skin[near.k] + 2), rng.uniform(56, 64) + (0, 55, 42, 34)[p.phase])


def _heart_calcification(p, f, rng) -> None:
    near = _around(p, f)
    out = np.array(f.spot) - p.body.shape("heart").box.mean(0)
    out = np.float32(out / np.linalg.norm(out))
    depth = near.v @ out
    along = np.sqrt(np.maximum(near.rho**2 - depth**2, 0)) / (f.size / 2)
    thick = np.float32(max(4.2, 0.28 * f.size))
    d = (np.sqrt(along**2 + (depth / thick) ** 2) - 1) * thick
    p.blend(near.k, d, rng.uniform(750, 1200))


def _cyst(p, f, rng, tissue: str = "") -> None:
    near = _around(p, f)
    d = _ball(near, f.size, rng, 0.03)
    if tissue:
        p.blend(near.k, d, p.hu_of(tissue) + 8)
    p.blend(near.k, d + (min(2.0, 0.06 * f.size) if tissue else 0), rng.uniform(1, 8))


def _liver_mass(p, f, rng) -> None:
    near = _around(p, f)
    d = _ball(near, f.size, rng, 0.12)
    liver = p.hu_of("liver")
    bright = rng.random() < 0.5  # one that takes up contrast early, or one that does not
    contrast = ((-26, 52, -34, -30) if bright else (-26, -32, -52, -36))[p.phase]
    clip = np.maximum(d, p.body.under(p.x[near.k], p.y[near.k], p.z[near.k], p.inner[near.k]))
    if not bright and p.phase in (1, 2):
        p.blend(near.k, clip, liver + 6)
        clip = clip + 2.5
    p.blend(near.k, clip, liver + contrast)
    if f.size > 30:
        core = near.rho - 0.2 * f.size
        p.blend(near.k, core, liver + contrast - 0.45 * abs(contrast) if contrast < 0 else liver + 0.8 * contrast)


def _spleen_mass(p, f, rng) -> None:
    near = _around(p, f)
    d = _ball(near, f.size, rng, 0.1)
    d = np.maximum(d, p.body.under(p.x[near.k], p.y[near.k], p.z[near.k], p.inner[near.k]))
    p.blend(near.k, d, p.hu_of("spleen") - (25, 68, 52, 36)[p.phase])


def _stone(p, f, rng) -> None:
    near = _around(p, f)
    p.blend(near.k, _ball(near, f.size, rng, 0.15), rng.uniform(850, 1300))


def _colon_mass(p, f, rng) -> None:
    near = _around(p, f)
    d = _ball(near, f.size, rng, 0.15)
    p.blend(near.k, d, rng.uniform(44, 52) + (0, 40, 52, 40)[p.phase])
    strands = np.maximum(d - 6, 1 - d)
    p.blend(near.k, np.maximum(strands, np.abs(p.field("strands", near.k, 12)) * 6 - 1), 0.0)


def _abscess(p, f, rng) -> None:
    near = _around(p, f)
    d = _ball(near, f.size, rng, 0.1)
    rim = 0.0
    if f.size > 3.2 * p.soft:  # the rim of a smaller one is too thin to see
        rim = min(3.5, 0.13 * f.size)
        p.blend(near.k, d, p.hu_of("muscle") + (4, 25, 45, 40)[p.phase])
    p.blend(near.k, d + rim, rng.uniform(4, 12))
    if f.size > 18:  # gas rises to the front
        bubble = np.linalg.norm(near.v - np.float32([0, -0.28 * f.size, 0.06 * f.size]), axis=1) - 0.12 * f.size
        p.blend(near.k, bubble, -820.0)


def _metastasis(p, f, rng) -> None:
    near = _around(p, f)
    d = _ball(near, f.size, rng, 0.14)
    k = near.k
    bone = np.minimum(
        hip_bone(p.body, np.abs(p.x[k]), p.y[k], p.z[k]), p.body.shape("sacrum").distance(p.x[k], p.y[k], p.z[k])
    )
    if rng.random() < 0.5:  # dense
        p.blend(k, np.maximum(d, bone - 1), rng.uniform(900, 1200))
    else:  # dissolved, with soft tissue that grows out of the bone
        p.blend(k, np.maximum(d, bone - 6), rng.uniform(38, 52) + (0, 12, 20, 15)[p.phase])


def _aneurysm(p, f, rng) -> None:
    near = _around(p, f, 1.1)
    right = f.spot[0] < 0
    artery = np.float32(f.spot - ASIDE * ((-1.0, 1, 1) if right else 1.0))
    gaps = []
    for name in ("common iliac artery", "outer iliac artery"):
        path = p.body.path(name, right)
        gap = np.linalg.norm(path.path - artery, axis=1)
        gaps.append((gap.min(), path.tangent[gap.argmin()]))
    tangent = min(gaps, key=lambda pair: pair[0])[1]
    along = near.v @ tangent
    across = np.sqrt(np.maximum(near.rho**2 - along**2, 0))
    d = (np.sqrt((across * 2 / f.size) ** 2 + (along / (0.75 * f.size)) ** 2) - 1) * f.size / 2
    k = near.k
    shell = np.abs(p.field("lime", k, 22)) < 0.75
    p.blend(k, d, np.where(shell, 420.0, 60.0))
    p.blend(k, d + 2.0, 50.0 if p.phase else 44.0)  # clot along the wall
    flow = np.linalg.norm(near.v - np.float32([0, 0.08 * f.size, 0]) - along[:, None] * tangent, axis=1) * 2 / f.size
    flow = (np.sqrt((flow / 0.62) ** 2 + (along / (0.7 * f.size)) ** 2) - 1) * 0.31 * f.size
    p.blend(k, np.maximum(flow, d + 2), p.hu_of("artery"))


_PAINTERS = {
    "lung nodule": _lung_nodule,
    "pleural effusion": _effusion,
    "rib fracture": _rib_fracture,
    "breast mass": _breast_mass,
    "heart calcification": _heart_calcification,
    "liver cyst": _cyst,
    "liver mass": _liver_mass,
    "spleen mass": _spleen_mass,
    "kidney stone": _stone,
    "kidney cyst": _cyst,
    "colon mass": _colon_mass,
    "muscle abscess": _abscess,
    "bladder stone": _stone,
    "ovary cyst": lambda p, f, rng: _cyst(p, f, rng, "ovary"),
    "bone metastasis": _metastasis,
    "artery aneurysm": _aneurysm,
}
