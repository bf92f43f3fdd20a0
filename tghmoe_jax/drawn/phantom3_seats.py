"""Where a lesion of the third phantom style can lie: points of an organ, what it holds there, the name of the place.

Sides. A paired organ (lung, pleura, rib, breast, kidney, muscle, ovary, iliac artery) is right or left as a whole. An
unpaired one has two middles that a radiologist could mean, that of the body and its own (for the liver about the plane
between its lobes): a lesion is right when it lies to the right of both, and no lesion lies between them. Upper and
lower, and the spleen's anterior and posterior, count from the middle of the organ's own extent (which leaves out the
outermost 2 % of its volume at both ends). A seat is at least 8 % of that extent away from every boundary.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

from tghmoe_jax.drawn import phantom3_tables as tables
from tghmoe_jax.drawn.phantom3_body import Figure, breast_bump, buttock_seam, rib_line
from tghmoe_jax.drawn.phantom3_skeleton import hip_bone, thigh_bone

CLEAR = 0.08  # share of an organ's extent that stays free on both sides of a boundary
LARGEST = 60.0  # mm
_TAIL = 0.02  # share of an organ's volume at an end that does not count for its extent
PLACES = ("right upper", "right lower", "left upper", "left lower")
SPLEEN_PLACES = ("anterior upper", "anterior lower", "posterior upper", "posterior lower")
ASIDE = np.array([-5.5, -8.0, 0.0])  # mm from the left artery to an aneurysm's centre: away from the psoas behind it
SMALLEST = {"artery aneurysm": 18.0}  # mm; a narrower iliac artery is not an aneurysm


@dataclasses.dataclass(frozen=True)
class Seats:
    """Points (N, 3) of the atlas where a lesion can lie, the largest size (N,) in mm there, and the places (N,).

    A place is an index into `names`, or -1 where the point is too near a boundary.
    """

    points: np.ndarray
    holds: np.ndarray
    places: np.ndarray
    names: tuple[str, ...] = PLACES


def _half(values, low: float, high: float, extent: float) -> np.ndarray:
    """0 for values below the zone from `low` to `high`, 1 above it, -1 in it or within the clear margin around it."""
    margin = CLEAR * extent
    return np.where(values < low - margin, 0, np.where(values > high + margin, 1, -1))


def _name(first, upper) -> np.ndarray:
    return np.where((first < 0) | (upper < 0), -1, 2 * first + 1 - upper)


def _span(values) -> tuple[float, float]:
    low, high = np.quantile(values, (_TAIL, 1 - _TAIL))
    return float(low), float(high)


def _paired(points, holds, organ=None) -> Seats:
    """Seats of a paired organ. `organ` (M, 3) are points that show its extent, by default the seats themselves."""
    organ = points if organ is None else organ
    upper = np.full(len(points), -1)
    for sign in (-1, 1):
        here, whole = np.sign(points[:, 0]) == sign, organ[np.sign(organ[:, 0]) == sign, 2]
        if here.any() and len(whole):
            low, high = _span(whole)
            upper[here] = _half(points[here, 2], (low + high) / 2, (low + high) / 2, high - low)
    return Seats(points, holds, _name((points[:, 0] > 0).astype(int), upper))


def _unpaired(points, holds, organ=None) -> Seats:
    organ = points if organ is None else organ
    (right, left), (low, high) = _span(organ[:, 0]), _span(organ[:, 2])
    middle = (right + left) / 2
    side = _half(points[:, 0], min(middle, 0), max(middle, 0), left - right)
    upper = _half(points[:, 2], (low + high) / 2, (low + high) / 2, high - low)
    return Seats(points, holds, _name(side, upper))


def _cloud(rng, box, n: int) -> np.ndarray:
    return rng.uniform(*np.asarray(box, float), (n, 3))


def _columns(points):
    return np.float32(points.T)


def _either_side(points, rng) -> np.ndarray:
    """Points of the left side, each moved to the right side with a chance of one half."""
    return points * np.where(rng.random((len(points), 1)) < 0.5, (-1.0, 1, 1), (1.0, 1, 1))


def _lung(body: Figure, rng) -> Seats:
    p = _cloud(rng, [(-135, -100, 105), (135, 85, 430)], 900)
    depth = -body.lung(*_columns(p))
    p, depth = p[depth > 2], depth[depth > 2]
    hilum = np.linalg.norm(p - np.stack([np.sign(p[:, 0]) * 50, 0 * p[:, 0] + 20, 0 * p[:, 0] + 302], 1), axis=1)
    ok = (depth > 5) & (hilum > 42)
    return _paired(p[ok], np.minimum(2 * depth[ok] + 4, 44), p)


def _pleura(body: Figure, rng) -> Seats:
    n = 500
    angle, z, side = rng.uniform(18, 112, n), rng.uniform(115, 415, n), rng.choice([-1.0, 1.0], n)
    shallow, deep, deeper = (-body.lung(*_columns(_on_chest(body, angle, z, side, -d))) for d in (5, 12, 24))
    p = _on_chest(body, angle, z, side, -7.0)
    ok = (shallow > 0) & (deep > 3)
    return _paired(p[ok], np.where(deeper > 4, LARGEST, 30.0)[ok])


def _rib(body: Figure, rng) -> Seats:
    n = 400
    rib = rng.integers(2, 11, n)
    last = np.array([row[2] for row in tables.RIBS])[rib - 1]
    angle = 24 + rng.uniform(0, 1, n) * (last - 34)
    z = rib_line(rib, angle)
    p = _on_chest(body, angle, z, rng.choice([-1.0, 1.0], n), 5.0)
    whole = np.array([[s, 0, z] for s in (-1, 1) for z in (88.0, 416.0)])
    return _paired(p, np.full(n, 26.0), whole)


def _on_chest(body: Figure, angle, z, side, out: float) -> np.ndarray:
    """Points (N, 3) that lie `out` mm outside the inner wall, at an angle from the back in degrees."""
    turn = np.radians(angle)
    table = body.inner
    direction = np.stack([side * np.sin(turn), np.cos(turn), 0 * z], 1)
    level = np.clip(np.rint((z - table.low) / 2).astype(int), 0, len(table.radius) - 1)
    p = np.stack([0 * z, table.centre[level, 1], z], 1) + 100 * direction
    for _ in range(3):
        p = p + (out - body.inner.distance(*_columns(p)))[:, None] * direction
    return p


def _breast(body: Figure, rng) -> Seats:
    p = _cloud(rng, [(-150, -190, 205), (150, -50, 310)], 1600)
    x, y, z = _columns(p)
    skin, wall, _, _ = body.surfaces(x, y, z)
    bump = breast_bump(z, np.arctan2(y - 5, x))
    depth = np.minimum(-skin - 3, wall - 1)
    whole = (depth > 0) & (bump > 0.35) & (y < -20)
    ok = whole & (depth > 4) & (bump > 0.5)
    return _paired(p[ok], np.minimum(2 * depth[ok] + 4, 50), p[whole])


def _heart(body: Figure, rng) -> Seats:
    shape = body.shape("heart")
    p = _cloud(rng, shape.box, 1200)
    x, y, z = _columns(p)
    inner = body.inner.distance(x, y, z)
    depth = np.minimum(-shape.distance(x, y, z), body.above(x, y, z, inner))
    ok = (depth > 3) & (depth < 14)
    return _unpaired(p[ok], np.full(ok.sum(), 26.0), p[depth > 1])


def _liver(body: Figure, rng) -> Seats:
    shape = body.shape("liver")
    p = _cloud(rng, shape.box, 2000)
    x, y, z = _columns(p)
    depth = -np.maximum(shape.distance(x, y, z), body.under(x, y, z))
    return _unpaired(p[depth > 4], 2 * depth[depth > 4] + 5, p[depth > 1])


def _spleen(body: Figure, rng) -> Seats:
    shape = body.shape("spleen")
    p = _cloud(rng, shape.box, 3000)
    x, y, z = _columns(p)
    depth = -np.maximum(shape.distance(x, y, z), body.under(x, y, z))
    whole, ok = p[depth > 0.5], depth > 4
    (front, back), (low, high) = _span(whole[:, 1]), _span(whole[:, 2])
    behind = _half(p[ok, 1], (front + back) / 2, (front + back) / 2, back - front)
    upper = _half(p[ok, 2], (low + high) / 2, (low + high) / 2, high - low)
    return Seats(p[ok], 2 * depth[ok] + 6, _name(behind, upper), SPLEEN_PLACES)


def _kidney(part: str) -> Callable:
    def seats(body: Figure, rng) -> Seats:
        whole, found, holds = [], [], []
        for right in (False, True):
            shape = body.shape("kidney", right)
            p = _cloud(rng, shape.box, 500)
            depth = -shape.distance(*_columns(p))
            whole.append(p[depth > 0])
            if part == "stone":
                core = body.shape("kidney sinus", right)
                p = _cloud(rng, core.box, 400)
                inside = -core.distance(*_columns(p))
                p, room = p[inside > 0], np.full((inside > 0).sum(), 24.0)
            else:
                sinus = body.shape("kidney sinus", right).distance(*_columns(p))
                ok = (depth > 3) & (depth < 15) & (sinus > 3)
                p, room = p[ok], np.full(ok.sum(), 52.0)
            found.append(p)
            holds.append(room)
        return _paired(np.concatenate(found), np.concatenate(holds), np.concatenate(whole))

    return seats


def _colon(body: Figure, rng) -> Seats:
    path = body.path("colon")
    xyz = _columns(path.path)
    inside = -body.inner.distance(*xyz) > 14
    for solid in ("liver", "spleen"):
        inside &= body.shape(solid).distance(*xyz) > 8
    i = rng.choice(np.flatnonzero(inside[3:-2]) + 3, 500)
    p = path.path[i] + rng.uniform(-0.2, 0.2, (500, 3)) * path.radius[i, None]
    return _unpaired(p, 2.3 * path.radius[i], path.path)


def _trunk_muscle(body: Figure, rng) -> Seats:
    if rng.random() < 0.5:
        shape = body.shape("erector")
        p = _cloud(rng, [(4, 50, -45), (66, 108, 160)], 700)
        depth = -shape.distance(*_columns(p))
    else:
        p = _cloud(rng, [(18, -20, -60), (90, 50, 112)], 900)
        path = body.path("psoas")
        gap = np.linalg.norm(p[:, None] - path.path, axis=2) - path.radius
        depth = -gap.min(1)
    p = _either_side(p, rng)
    return _paired(p[depth > 6], np.minimum(2 * depth[depth > 6] + 6, 50), p[depth > 0])


def _hip_muscle(body: Figure, rng) -> Seats:
    p = _cloud(rng, [(45, 10, -195), (150, 112, -25)], 900)
    x, y, z = _columns(p)
    _, wall, inner, _ = body.surfaces(x, y, z)
    depth = np.minimum(-wall - 2, inner - 6)
    depth = np.minimum(depth, np.minimum(hip_bone(body, x, y, z), thigh_bone(body, x, y, z)) - 2)
    depth = np.where((x - 46) * 1.75 + (y - 80) > 4, depth, -1)
    ok = (depth > 5) & (buttock_seam(x, y, z) > 6)
    p = _either_side(p, rng)
    return _paired(p[ok], 2 * depth[ok], p[depth > 0])


def _bladder(body: Figure, rng) -> Seats:
    shape = body.shape("bladder")
    p = _cloud(rng, shape.box, 1000)
    depth = -shape.distance(*_columns(p))
    back = p[:, 1] > np.quantile(p[depth > 0, 1], 0.5)  # stones sink
    ok = (depth > 4) & back
    return _unpaired(p[ok], np.minimum(2 * depth[ok] + 2, 45), p[depth > 0])


def _ovary(body: Figure, rng) -> Seats:
    points = []
    for right in (False, True):
        shape = body.shape("ovary", right)
        p = _cloud(rng, shape.box, 500)
        points.append(p[-shape.distance(*_columns(p)) > 5])
    p = np.concatenate(points)
    inner = -body.inner.distance(*_columns(p))
    room = np.array([[s, 0, z] for s in (-1, 1) for z in (-146.0, -74.0)])  # the space beside the uterus
    return _paired(p, np.clip(2 * inner + 16, 20, LARGEST), room)


def _bone(body: Figure, rng) -> Seats:
    p = _cloud(rng, [(4, -76, -222), (130, 108, 9)], 2000)
    x, y, z = _columns(p)
    sacrum = body.shape("sacrum").distance(x, y, z)
    depth = -np.minimum(hip_bone(body, x, y, z), sacrum)
    p = _either_side(p, rng)
    ok = depth > 2
    return _unpaired(p[ok], np.minimum(2 * depth[ok] + 22, 50), p[depth > 0])


def _artery(body: Figure, rng) -> Seats:
    points = []
    for right in (False, True):
        for name in ("common iliac artery", "outer iliac artery"):
            path = body.path(name, right).path
            points.append(path[(path[:, 2] > -168) & (path[:, 2] < -8)])
    p = np.concatenate(points).astype(float)[rng.integers(0, sum(map(len, points)), 300)]
    p = p + ASIDE * np.where(p[:, :1] < 0, (-1.0, 1, 1), 1.0)
    ok = (-body.inner.distance(*_columns(p)) > 5) & (np.abs(p[:, 0]) > 5)
    whole = np.array([[s, 0, z] for s in (-1, 1) for z in (-168.0, 0.0)])
    return _paired(p[ok], np.full(ok.sum(), 46.0), whole)


def seats(kind: str, section: str, body: Figure, rng: np.random.Generator) -> Seats:
    """Where a lesion of a kind can lie in a patient."""
    find = {
        "lung nodule": _lung,
        "pleural effusion": _pleura,
        "rib fracture": _rib,
        "breast mass": _breast,
        "heart calcification": _heart,
        "liver cyst": _liver,
        "liver mass": _liver,
        "spleen mass": _spleen,
        "kidney stone": _kidney("stone"),
        "kidney cyst": _kidney("cyst"),
        "colon mass": _colon,
        "muscle abscess": _hip_muscle if section == "pelvis" else _trunk_muscle,
        "bladder stone": _bladder,
        "ovary cyst": _ovary,
        "bone metastasis": _bone,
        "artery aneurysm": _artery,
    }
    return find[kind](body, rng)
