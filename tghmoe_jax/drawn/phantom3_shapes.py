"""Shapes of the third phantom style: outlines by level, and sweeps along a spline.

A shape answers one question: how far is a point from its surface (mm, negative inside)? All points are float32 arrays
(N,) in the frame of the atlas: x toward the patient's Left, y toward Posterior, z toward Superior, in mm.
"""

import dataclasses
import functools

import numpy as np
from scipy.interpolate import PchipInterpolator
from scipy.ndimage import gaussian_filter1d

ANGLES = 96  # samples of an outline around its centre
STEP = 2.0  # mm between the levels of a table
_NEXT, _LAST = np.roll(np.arange(ANGLES), -1), np.roll(np.arange(ANGLES), 1)
TURN = np.linspace(0, 2 * np.pi, ANGLES, endpoint=False)
_COS, _SIN = np.float32(np.cos(TURN)), np.float32(np.sin(TURN))


def oval(cx: float, cy: float, a: float, b: float, power: float = 2.0) -> list[tuple[float, float]]:
    """24 corners of a superellipse with half-widths `a` (x) and `b` (y), in mm."""
    t = np.linspace(0, 2 * np.pi, 24, endpoint=False)
    c, s = np.cos(t), np.sin(t)
    r = (np.abs(c) ** power + np.abs(s) ** power) ** (-1 / power)
    return list(zip(cx + a * r * c, cy + b * r * s, strict=True))


def _polar(corners) -> tuple[np.ndarray, np.ndarray]:
    """Centre (2,) of a polygon and its radius at every angle of `TURN` (ANGLES,)."""
    p = np.asarray(corners, float)
    q = np.roll(p, -1, 0)
    cross = p[:, 0] * q[:, 1] - q[:, 0] * p[:, 1]
    centre = ((p + q) * cross[:, None]).sum(0) / (3 * cross.sum())
    a, b = p - centre, q - centre
    ray = np.stack([np.cos(TURN), np.sin(TURN)], 1)[:, None]
    edge = b - a
    det = ray[..., 0] * edge[:, 1] - ray[..., 1] * edge[:, 0]
    det = np.where(np.abs(det) < 1e-9, 1e-9, det)
    r = (a[:, 0] * edge[:, 1] - a[:, 1] * edge[:, 0]) / det
    along = (a[:, 0] * ray[..., 1] - a[:, 1] * ray[..., 0]) / det
    hit = (along >= -1e-6) & (along <= 1 + 1e-6) & (r > 0)
    radius = np.where(hit, r, 0).max(1)
    return centre, gaussian_filter1d(radius, 1.2, mode="wrap")


@dataclasses.dataclass(frozen=True)
class Table:
    """A shape as radii by level and angle: `radius` (levels, ANGLES), `centre` (levels, 2), lowest level `low`, in mm.

    `slope` turns a radial distance into a distance to the surface.
    """

    low: float
    centre: np.ndarray
    radius: np.ndarray
    slope: np.ndarray

    @staticmethod
    def make(low: float, centre: np.ndarray, radius: np.ndarray) -> "Table":
        """The table of these radii, with its slopes."""
        r = np.maximum(radius, 0.5).astype(np.float32)
        around = (r[:, _NEXT] - r[:, _LAST]) * np.float32(ANGLES / (4 * np.pi)) / r
        up = np.gradient(r, np.float32(STEP), axis=0)
        slope = np.maximum(1 / np.sqrt(1 + around * around + up * up), np.float32(0.35))
        return Table(low, centre.astype(np.float32), radius.astype(np.float32), slope)

    @functools.cached_property
    def box(self) -> np.ndarray:
        """Lowest and highest x, y, z (2, 3) in mm."""
        x, y = self.centre[:, :1] + self.radius * _COS, self.centre[:, 1:] + self.radius * _SIN
        high = self.low + STEP * (len(self.radius) - 1)
        return np.array([[x.min(), y.min(), self.low], [x.max(), y.max(), high]])

    def lumpy(self, rng: np.random.Generator, amount: float) -> "Table":
        """The same shape with smooth bumps: radii vary by about `amount` (a share)."""
        turns = np.array([1, 2, 3, 5])
        size, phase, rise = rng.normal(size=4) / turns**0.5, rng.uniform(0, 2 * np.pi, 4), rng.normal(size=4) / 40
        up = (self.low + STEP * np.arange(len(self.radius)))[:, None] * rise
        around = np.multiply.outer(turns, TURN) + phase[:, None]
        ups = np.concatenate([np.cos(up), -np.sin(up)], 1) * np.tile(size, 2)  # cos(a + b), taken apart
        bumps = np.float32(ups) @ np.float32(np.concatenate([np.cos(around), np.sin(around)]))
        return Table.make(self.low, self.centre, self.radius * (1 + amount * np.clip(bumps, -2, 2)))

    def place(self, x, y, z) -> "Spot":
        """Where points (N,) lie in the table."""
        level = (z - np.float32(self.low)) * np.float32(1 / STEP)
        inside = np.clip(level, 0, len(self.radius) - 1)
        i = (inside + np.float32(0.5)).astype(np.int32)
        dx, dy = x - self.centre[:, 0].take(i), y - self.centre[:, 1].take(i)
        turn = np.arctan2(dy, dx) * np.float32(ANGLES / (2 * np.pi)) + np.float32(ANGLES)
        whole = turn.astype(np.int32)
        cell, after = i * ANGLES + whole % ANGLES, i * ANGLES + (whole + 1) % ANGLES
        return Spot(cell, after, turn - whole, np.sqrt(dx * dx + dy * dy), np.abs(level - inside) * np.float32(STEP))

    def at(self, spot: "Spot") -> np.ndarray:
        """Distance (N,) in mm to the surface at places that `place` found."""
        radius = self.radius.ravel()
        r = radius.take(spot.cell)
        r += (radius.take(spot.after) - r) * spot.part
        return (spot.rho - r) * self.slope.ravel().take(spot.cell)

    def distance(self, x, y, z) -> np.ndarray:
        """Distance to the surface in mm (N,), negative inside."""
        spot = self.place(x, y, z)
        d = self.at(spot)
        return np.where(spot.beyond > 0, np.maximum(d, spot.beyond), d)


@dataclasses.dataclass(frozen=True)
class Spot:
    """Places of points (N,) in a table: the cells before and after the point's angle, how far it lies between them.

    `rho` is the distance from the axis and `beyond` the way beyond the table's ends, both in mm.
    """

    cell: np.ndarray
    after: np.ndarray
    part: np.ndarray
    rho: np.ndarray
    beyond: np.ndarray


def solid(levels, cap: float = 10.0) -> Table:
    """The solid through closed outlines: `levels` is ((z, corners), ...), two or more, the lowest first.

    An outline must be star-shaped about its centre. Both ends are rounded; `cap` is the height of these ends in mm.
    """
    z = np.array([level for level, _ in levels], float)
    parts = [_polar(corners) for _, corners in levels]
    centre, radius = np.array([c for c, _ in parts]), np.array([r for _, r in parts])
    grid = np.arange(z[0] - cap, z[-1] + cap + 0.1, STEP)
    inner = np.clip(grid, z[0], z[-1])
    centre, radius = PchipInterpolator(z, centre)(inner), PchipInterpolator(z, radius)(inner)
    end = 1 - ((grid - inner) / cap) ** 2
    return Table.make(grid[0], centre, radius * np.sqrt(np.maximum(end, 0.001))[:, None])


@dataclasses.dataclass(frozen=True)
class Posed:
    """A table that a patient has: scaled by `scale` about `pivot` (3,), then moved by `shift` (3,), both in mm.

    `mirror` swaps left and right before the move.
    """

    table: Table
    scale: float
    pivot: tuple[float, float, float]
    shift: tuple[float, float, float]
    mirror: bool

    @functools.cached_property
    def _map(self) -> tuple[np.ndarray, np.ndarray]:
        flip = np.array([-1.0 if self.mirror else 1.0, 1, 1])
        pivot = np.array(self.pivot)
        return flip / self.scale, pivot - (pivot * flip + self.shift) * flip / self.scale

    @functools.cached_property
    def box(self) -> np.ndarray:
        """Lowest and highest x, y, z (2, 3) in mm."""
        factor, offset = self._map
        return np.sort((self.table.box - offset) / factor, axis=0)

    def distance(self, x, y, z) -> np.ndarray:
        """Distance to the surface in mm (N,), negative inside."""
        (fx, fy, fz), (ox, oy, oz) = np.float32(self._map)
        return self.table.distance(x * fx + ox, y * fy + oy, z * fz + oz) * np.float32(self.scale)


@dataclasses.dataclass(frozen=True)
class Sweep:
    """A tube along a spline: `path` (n, 3), `radius` (n,), `along` (n,): way from the start, in mm."""

    path: np.ndarray
    radius: np.ndarray
    along: np.ndarray

    @functools.cached_property
    def tangent(self) -> np.ndarray:
        """Unit directions (n, 3) of the path."""
        t = np.gradient(self.path, axis=0)
        return (t / np.maximum(np.linalg.norm(t, axis=1, keepdims=True), 1e-6)).astype(np.float32)


def sweep(points, radii, step: float = 4.0) -> Sweep:
    """The tube along a cubic spline through `points` (k, 3) with `radii` (k,) in mm, sampled about every `step` mm."""
    p = np.asarray(points, float)
    way = np.concatenate([[0], np.cumsum(np.linalg.norm(np.diff(p, axis=0), axis=1))])
    t = np.linspace(0, way[-1], max(int(way[-1] / step) + 1, 3))
    slope = np.gradient(p, way, axis=0)
    i = np.clip(np.searchsorted(way, t, side="right") - 1, 0, len(p) - 2)
    gap = (way[i + 1] - way[i])[:, None]
    u = (t - way[i])[:, None] / gap
    ahead, behind = slope[i + 1] * gap, slope[i] * gap
    bend = 3 * (p[i + 1] - p[i]) - 2 * behind - ahead
    path = p[i] + u * (behind + u * (bend + u * (2 * (p[i] - p[i + 1]) + behind + ahead)))
    radius = np.interp(t, way, np.broadcast_to(np.asarray(radii, float), len(p)))
    return Sweep(path.astype(np.float32), radius.astype(np.float32), t.astype(np.float32))


def near(tube: Sweep, x, y, z, margin: float, piece: int = 8):
    """Points that lie within `margin` mm of a tube's surface.

    Returns their indices (M,), distances to the surface (M,) in mm, and nearest samples of the path (M,).
    """
    reach = float(tube.radius.max()) + margin
    low, high = tube.path.min(0) - reach, tube.path.max(0) + reach
    all_in = np.flatnonzero((x > low[0]) & (x < high[0]) & (y > low[1]) & (y < high[1]) & (z > low[2]) & (z < high[2]))
    px, py, pz = x[all_in], y[all_in], z[all_in]
    best = np.full(len(all_in), np.float32(1e6))
    sample = np.zeros(len(all_in), np.int32)
    half = np.float32((tube.along[1] - tube.along[0]) * 0.6)
    for start in range(0, len(tube.path), piece):
        path, radius = tube.path[start : start + piece], tube.radius[start : start + piece]
        low, high = path.min(0) - radius.max() - margin, path.max(0) + radius.max() + margin
        k = np.flatnonzero(
            (px > low[0]) & (px < high[0]) & (py > low[1]) & (py < high[1]) & (pz > low[2]) & (pz < high[2])
        )
        if not len(k):
            continue
        middle = path[len(path) // 2]
        here = np.stack([px[k], py[k], pz[k]], 1) - middle
        there = path - middle
        nearest = ((there * there).sum(1) - 2 * (here @ there.T)).argmin(1)
        gap = here - there[nearest]
        ahead = np.clip((gap * tube.tangent[start + nearest]).sum(1), -half, half)  # the way between two samples
        d = np.sqrt(np.maximum((gap * gap).sum(1) - ahead * ahead, 0)) - radius[nearest]
        closer = d < best[k]
        best[k[closer]] = d[closer]
        sample[k[closer]] = start + nearest[closer]
    keep = best < margin
    return all_in[keep], best[keep], sample[keep]


def waves(seed: int, x, y, z, length: float) -> np.ndarray:
    """A smooth random field (N,) of about unit spread, with waves of about `length` mm."""
    rng = np.random.default_rng(seed)
    total = np.zeros(len(x), np.float32)
    for _ in range(5):
        k = rng.normal(size=3)
        k *= 2 * np.pi / (length * rng.uniform(0.7, 1.4) * np.linalg.norm(k))
        kx, ky, kz = np.float32(k)
        total += np.sin(x * kx + y * ky + z * kz + np.float32(rng.uniform(0, 6.28)))
    return total * np.float32(0.63)
