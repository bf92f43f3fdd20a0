"""Paints the bones of the third phantom style."""

import numpy as np

from tghmoe_jax.drawn import phantom3_tables as tables
from tghmoe_jax.drawn.phantom3_body import Figure, ribs, trunk_middle
from tghmoe_jax.drawn.phantom3_painter import Painter
from tghmoe_jax.drawn.phantom3_shapes import near


def spine(p: Painter) -> None:
    """The spine from the second neck vertebra that the tables hold down to the last lumbar one."""
    k = np.flatnonzero((np.abs(p.x) < 48) & (p.y < 104) & (p.y > -16) & (p.z > -46))
    if not len(k):
        return
    x, y, z = np.abs(p.x[k]), p.y[k], p.z[k]
    rows = np.array(tables.SPINE, float)
    middle, half_width, half_depth = (np.interp(z, rows[:, 0], c).astype(np.float32) for c in rows[:, 1:].T)
    edges = (rows[1:, 0] + rows[:-1, 0]) / 2
    i = np.clip(np.searchsorted(edges, z), 1, len(rows) - 2)
    tall = np.float32((edges[i] - edges[i - 1]) / 2)
    f = (z - np.float32((edges[i] + edges[i - 1]) / 2)) / tall  # -1 to 1 from disc to disc
    disc = np.where(z > 180, 0.88, 0.78)
    waist = half_width * (0.92 + 0.08 * f * f)
    body = ((x / waist) ** 2.6 + (np.abs(y - middle) / half_depth) ** 2.6) ** (1 / 2.6)
    body = (body - 1) * half_depth
    p.blend(k, body, 88.0 - 10 * (p.phase == 0))  # discs
    end_plate = (np.abs(f) - disc) * tall
    canal_y = middle + half_depth + 7
    canal = (np.sqrt((x / 11) ** 2 + ((y - canal_y) / 8.5) ** 2) - 1) * 9
    ring = np.maximum((np.sqrt((x / 19) ** 2 + ((y - canal_y - 2) / 15) ** 2) - 1) * 16, (np.abs(f) - 0.72) * tall)
    low_back = z < 130
    slant = np.where(low_back, 0.1, 0.9) * (y - canal_y - 12) / tall  # the thoracic spines point downward
    length = np.where(low_back, 33, 29)
    spinous = np.maximum(x - 3.2, np.abs(y - canal_y - length + 13) - 16)
    spinous = np.maximum(spinous, (np.abs(f + 0.25 + slant) - 0.62) * tall)
    back = canal_y - 4 + np.where(low_back, 0.12, 0.55) * (x - 14)
    across = np.maximum(np.abs(y - back) - 4.5, np.maximum(x - np.where(low_back, 40, 33), 11 - x))
    across = np.maximum(across, (np.abs(f - 0.15) - 0.36) * tall)
    p.bone(k, np.maximum(body, end_plate), 165.0, 430.0, 2.5)
    p.bone(k, np.minimum.reduce([ring, spinous, across]), 260.0, 560.0)
    p.blend(k, canal, 22.0)
    p.blend(k, (np.sqrt((x / 6) ** 2 + ((y - canal_y) / 5) ** 2) - 1) * 5, np.where(z > 90, 42.0, 24.0))


def pelvis_bones(p: Painter) -> None:
    """Sacrum, hip bones and thigh bones, with the muscle that lines the iliac blades."""
    k, d = p.solid("sacrum")
    p.bone(k, d, 130.0, 480.0, 3.0)
    z, x = p.z[k], np.abs(p.x[k])
    holes = np.sqrt((x - 22) ** 2 + (((z + 58) % 26) - 13) ** 2) - 4
    p.blend(k, np.maximum(np.maximum(holes, np.abs(z + 95) - 40), d), 20.0)
    canal = np.sqrt((x / 9) ** 2 + ((p.y[k] - 84 - 0.12 * np.clip(-58 - z, -20, 40)) / 5) ** 2) * 6 - 6
    p.blend(k, np.maximum(np.maximum(canal, -150 - z), d), 12.0)
    for right in (False, True):
        side = np.float32(-1 if right else 1)
        k = np.flatnonzero((p.x * side > 30) & (p.z < 14) & (p.z > -206) & (p.y < 100) & (p.y > -74))
        if len(k):
            x, y, z = p.x[k] * side, p.y[k], p.z[k]
            lining = np.maximum(blade(x, y, z) - 13, np.maximum(z + 2, (y - 70 + 0.8 * (x - 50))))
            p.blend(k, np.maximum(lining, -p.inner[k] - 30), p.hu_of("muscle"))
            d = hip_bone(p.body, x, y, z)
            p.bone(k, d, 160.0, 640.0, 3.6)
        for name in ("lower pubis", "ischium"):
            j, near_d, _ = p.tube(name, right)
            j_low = p.z[j] < -200
            p.bone(j[j_low], near_d[j_low], 160.0, 640.0, 3.6)
        k = np.flatnonzero((p.x * side > 60) & (p.z < -125) & (p.y < 60) & (p.y > -60))
        if not len(k):
            continue
        x, y, z = p.x[k] * side, p.y[k], p.z[k]
        d = thigh_bone(p.body, x, y, z)
        shaft = np.clip((-200 - z) / 30, 0, 1)  # the shaft has a thick shell and fatty marrow
        p.bone(k, d, 250.0 - 230 * shaft, 600.0 + 500 * shaft, 3.5 + 2 * shaft)
    k = np.flatnonzero((np.abs(p.x) < 5) & (p.z < -164) & (p.z > -200) & (p.y < -50) & (p.y > -76))
    p.blend(k, np.abs(p.x[k]) - 2.5, 60.0)  # the joint between the pubic bones


def rib_cage(p: Painter) -> None:
    """Ribs, their cartilage and the breast bone, all as patterns on the inner wall of the chest."""
    k = np.flatnonzero((p.inner > -4) & (p.inner < 20) & (p.z > 78) & (p.z < 432))
    if not len(k):
        return
    bone, gristle = (t.ravel().take(p.cell[k]) for t in ribs())
    deep = (p.inner[k] - 5.0) / 3.6
    p.blend(k, (np.sqrt((gristle / 7.5) ** 2 + deep**2) - 1) * 4.5, 95.0)
    p.bone(k, (np.sqrt((bone / 6.5) ** 2 + deep**2) - 1) * 4.0, 190.0, 470.0, 2.2)
    k = np.flatnonzero((np.abs(p.x) < 36) & (p.y < 0) & (p.inner > -6) & (p.inner < 18) & (p.z > 196) & (p.z < 382))
    z = p.z[k]
    half = np.interp(z, [200, 222, 235, 300, 336, 345, 370, 380], [4, 6, 15, 13, 15, 22, 27, 20])
    flat = np.abs(p.inner[k] - 6.0) - 4.8 + 0.006 * p.x[k] ** 2
    d = np.maximum.reduce([np.abs(p.x[k]) - half, flat, 202 - z, z - 378])
    p.bone(k, d, 150.0, 330.0, 2.0)


def shoulders(p: Painter) -> None:
    """Shoulder blades, collar bones and upper arms."""
    if p.high < 270:
        return
    k = np.flatnonzero((p.z > 272) & (p.z < 412) & (p.y > 20) & (p.inner > 8) & (p.inner < 40))
    angle = np.degrees(np.abs(np.arctan2(p.x[k], p.y[k] - trunk_middle(p.z[k]))))  # 0 at the back
    z = p.z[k]
    inner_edge = np.interp(z, [280, 300, 400], [50, 42, 40])
    outer_edge = np.interp(z, [280, 300, 390, 400], [56, 66, 88, 80])
    gap = np.interp(z, [280, 350, 400], [15, 20, 26])
    along = np.maximum(inner_edge - angle, angle - outer_edge) * 2.0
    thick = 2.6 + 2.2 * np.clip((angle - outer_edge + 8) / 8, 0, 1)
    d = np.maximum(np.maximum(np.abs(p.inner[k] - gap) - thick, along), np.maximum(280 - z, z - 400))
    p.bone(k, d, 260.0, 620.0, 2.5)
    for right in (False, True):
        for name in ("collarbone", "humerus", "shoulder blade neck", "shoulder blade spine"):
            k, d, _ = p.tube(name, right)
            inside = p.skin[k] < -4
            p.bone(k[inside], d[inside], 200.0, 560.0, 3.0)


def blade(x, y, z) -> np.ndarray:
    """Distance (N,) in mm to the iliac blade of the left side; `x` counts from the midline."""
    rows = np.array(tables.BLADE, float)
    x0, y0, x1, y1, thick = (np.interp(z, rows[:, 0], c).astype(np.float32) for c in rows[:, 1:].T)
    ux, uy = x1 - x0, y1 - y0
    length = np.sqrt(ux * ux + uy * uy)
    u = ((x - x0) * ux + (y - y0) * uy) / (length * length)
    w = ((y - y0) * ux - (x - x0) * uy) / length - 34 * u * (1 - u) * np.clip((z + 130) / 60, 0, 1)
    thick = thick * (0.75 + 1.4 * (u - 0.45) ** 2)
    d = np.maximum(np.abs(w) - thick, (np.abs(u - 0.5) - 0.5) * length)
    return np.maximum(d, np.maximum(z - 9, -140 - z))


def hip(x, y, z) -> np.ndarray:
    """Distance (N,) in mm to the socket of the left hip: a thick bowl around the head of the femur."""
    rho = np.sqrt((x - 92) ** 2 + (y + 2) ** 2 + (z + 160) ** 2)
    open_side = 0.75 * (x - 92) - 0.35 * (z + 160) - 0.2 * (y + 2) - 10
    return np.maximum(np.maximum(rho - 37, 27 - rho), open_side)


def hip_bone(body: Figure, x, y, z) -> np.ndarray:
    """Distance (N,) in mm to the left hip bone above the sitting bone; `x` counts from the midline."""
    d = np.minimum(blade(x, y, z), hip(x, y, z))
    for name in ("ischium", "upper pubis"):
        j, near_d, _ = near(body.path(name), x, y, z, 12)
        d[j] = np.minimum(d[j], near_d)
    return d


def thigh_bone(body: Figure, x, y, z) -> np.ndarray:
    """Distance (N,) in mm to the left femur; `x` counts from the midline."""
    d = np.sqrt((x - 92) ** 2 + (y + 2) ** 2 + (z + 160) ** 2) - 24
    for name in ("femur", "trochanter"):
        j, near_d, _ = near(body.path(name), x, y, z, 12)
        d[j] = np.minimum(d[j], near_d)
    return d
