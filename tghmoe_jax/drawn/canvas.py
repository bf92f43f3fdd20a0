"""A volume that is being drawn: where its voxels lie in a nominal body, and shapes that are blended into it.

Coordinates are millimetres of a nominal body in the patient frame: x toward Left, y toward Posterior, z toward
Superior. Axis legend: D slices, H rows, W columns. Arrays are float32 and broadcast to (D, H, W).
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

Box = tuple[slice, slice, slice]
Point = Sequence[float]

AIR = -1000.0  # HU of an empty volume
NOTHING = "nothing"  # the mark of what is part of no structure, whatever it is drawn over
WARP_ROUNDS = 4  # of the search for the point that a warp takes to a given one: within 0.1 mm


@dataclasses.dataclass(frozen=True)
class Warp:
    """A smooth displacement of the body: a sum of sine waves of its coordinates.

    `waves` (K, 3) are the wave vectors in radians for each mm, `phases` (K,) in radians, and `shifts` (K, 3) the
    amplitudes in mm along x, y and z.
    """

    waves: np.ndarray
    phases: np.ndarray
    shifts: np.ndarray

    @property
    def reach(self) -> np.ndarray:
        """The largest displacement (3,) in mm along each axis."""
        return np.abs(self.shifts).sum(axis=0)

    @property
    def slope(self) -> np.ndarray:
        """The most (3,) that the displacement changes with each mm."""
        return np.linalg.norm(self.waves, axis=1) @ np.abs(self.shifts)

    def at(self, points: np.ndarray) -> np.ndarray:
        """The displacement (..., 3) in mm at points (..., 3)."""
        return np.sin(points @ self.waves.T + self.phases) @ self.shifts

    def __call__(self, x: np.ndarray, y: np.ndarray, z: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Displaced coordinates."""
        moved = [x, y, z]
        for wave, phase, shift in zip(self.waves, self.phases, self.shifts, strict=True):
            kx, ky, kz, p = (np.float32(v) for v in (*wave, phase))
            swing = np.sin(kx * x + ky * y + kz * z + p)
            moved = [c + np.float32(s) * swing for c, s in zip(moved, shift, strict=True)]
        return tuple(moved)


@dataclasses.dataclass(frozen=True)
class Frame:
    """Where the voxels of a grid lie in the nominal body.

    `origin` (3,) is the patient position in mm of voxel (0, 0, 0), `steps` (3, 3) holds one column (x, y, z) in mm for
    each array axis, and `scale` (3,) is the habitus: patient mm per nominal mm. A `warp` then displaces the nominal
    coordinates.
    """

    grid: tuple[int, int, int]
    origin: np.ndarray
    steps: np.ndarray
    scale: np.ndarray
    warp: Warp | None = None

    def position(self, point: Point) -> np.ndarray:
        """Fractional voxel index (3,) of a nominal body point, or (N, 3) of points (N, 3)."""
        point = aim = np.asarray(point, np.float64)
        for _ in range(WARP_ROUNDS if self.warp else 0):  # a warp has no inverse in closed form
            point = aim - self.warp.at(point)
        return np.linalg.solve(self.steps, (point * self.scale - self.origin).T).T


def empty(box: Box) -> bool:
    """Whether a box holds no voxel."""
    return any(side.start == side.stop for side in box)


class Canvas:
    """A volume being drawn; every shape touches only the voxels of its bounding box."""

    def __init__(self, frame: Frame, pixel_mm: float, structures: Sequence[str] = ()):
        """`pixel_mm` is the width of a soft edge.

        With `structures`, `labels` uint8 (D, H, W) holds 1 + the index of the structure that a voxel is part of, 0 for
        none: shapes that are drawn with a `mark` among them set it. Others leave it, so that what lies within a
        structure stays part of it.
        """
        self.frame = frame
        self.soft = float(pixel_mm)
        self.hu = np.full(frame.grid, AIR, np.float32)
        self.structures = tuple(structures)
        self.labels = np.zeros(frame.grid, np.uint8) if structures else None
        index = np.ogrid[tuple(slice(0, n) for n in frame.grid)]
        # Each coordinate varies along at most two array axes, so shapes are evaluated on broadcast factors.
        self.xyz = tuple(
            sum(
                (index[a] * frame.steps[c, a] for a in range(3) if frame.steps[c, a]),
                np.zeros((1, 1, 1)) + frame.origin[c],
            ).astype(np.float32)
            / np.float32(frame.scale[c])
            for c in range(3)
        )
        if frame.warp:
            self.xyz = frame.warp(*self.xyz)
        inverse = np.linalg.inv(frame.steps)
        self._to_index, self._origin = inverse * frame.scale, inverse @ frame.origin
        self._reach, self._slope = (frame.warp.reach, frame.warp.slope) if frame.warp else (0.0, 0.0)

    def box(self, centre: Point, radii: Point) -> Box:
        """The voxels that a shape within `centre` +- `radii` can touch; empty where it lies off the grid."""
        centre, margin = np.asarray(centre, np.float64), self.soft
        if self.frame.warp:
            away = np.linalg.norm(radii) + self.soft + np.linalg.norm(self._reach)
            margin = margin + np.minimum(self._slope * away, 2 * self._reach)
            centre = centre - self.frame.warp.at(centre)
        middle = self._to_index @ centre - self._origin
        half = np.abs(self._to_index) @ (np.asarray(radii) + margin)
        bounds = []
        for m, h, n in zip(middle.tolist(), half.tolist(), self.frame.grid, strict=True):
            low, high = max(0, math.ceil(m - h)), min(n, math.floor(m + h) + 1)
            bounds.append(slice(low, max(low, high)))
        return tuple(bounds)

    def coordinates(self, box: Box) -> list[np.ndarray]:
        """x, y, z over a box, still as broadcast factors."""
        return [c[tuple(s if n > 1 else slice(None) for s, n in zip(box, c.shape, strict=True))] for c in self.xyz]

    def weight(self, inside_mm: np.ndarray) -> np.ndarray:
        """0..1 from the signed depth inside a surface, with an edge one pixel wide."""
        return np.clip(inside_mm * np.float32(1 / self.soft) + np.float32(0.5), 0, 1)

    def blend(self, box: Box | None, weight: np.ndarray, value, mark: str = "") -> None:
        """Moves the voxels of a box (None: all) toward `value` by `weight`; most of a voxel gives it its `mark`."""
        view = self.hu if box is None else self.hu[box]
        view += weight * (value - view)
        self.mark(box, weight, mark)

    def mark(self, box: Box | None, weight: np.ndarray, name: str) -> None:
        """Makes the voxels of a box (None: all) that lie mostly inside part of a structure."""
        if name and self.labels is not None:
            labels = self.labels if box is None else self.labels[box]
            value = 0 if name == NOTHING else 1 + self.structures.index(name)
            labels[np.broadcast_to(weight, labels.shape) > 0.5] = value

    def ellipsoid_weight(self, box: Box, centre: Point, radii: Point, angle: float = 0.0) -> np.ndarray:
        """Soft membership of an ellipsoid whose x and y axes are turned by `angle` (radians) about z."""
        x, y, z = self.coordinates(box)
        x, y, z = x - np.float32(centre[0]), y - np.float32(centre[1]), z - np.float32(centre[2])
        if angle:
            c, s = np.float32(np.cos(angle)), np.float32(np.sin(angle))
            x, y = c * x + s * y, c * y - s * x
        rx, ry, rz = (np.float32(1 / r) for r in radii)
        q = (x * rx) ** 2 + (y * ry) ** 2 + (z * rz) ** 2
        return self.weight((1 - q) * np.float32(min(radii) / 2))  # 1 - q is twice the relative depth near the surface

    def ellipsoid(
        self, centre: Point, radii: Point, value, angle: float = 0.0, limit: np.ndarray | None = None, mark: str = ""
    ) -> None:
        """Draws an ellipsoid; `limit` (D, H, W) in 0..1 confines it."""
        reach = (max(radii[:2]),) * 2 + (radii[2],) if angle else radii
        box = self.box(centre, reach)
        if empty(box):
            return
        w = self.ellipsoid_weight(box, centre, radii, angle)
        self.blend(box, w if limit is None else w * limit[box], value, mark)

    def capsule(
        self, start: Point, end: Point, radius: float, value, limit: np.ndarray | None = None, mark: str = ""
    ) -> None:
        """Draws a straight tube with round ends."""
        a, b = np.asarray(start, np.float32), np.asarray(end, np.float32)
        box = self.box((a + b) / 2, np.abs(b - a) / 2 + radius)
        if empty(box):
            return
        x, y, z = (c - p for c, p in zip(self.coordinates(box), a, strict=True))
        d = b - a
        t = np.clip((x * d[0] + y * d[1] + z * d[2]) * np.float32(1 / max(float(d @ d), 1e-6)), 0, 1)
        gap = (x - t * d[0]) ** 2 + (y - t * d[1]) ** 2 + (z - t * d[2]) ** 2
        w = self.weight((1 - gap * np.float32(1 / radius**2)) * np.float32(radius / 2))
        self.blend(box, w if limit is None else w * limit[box], value, mark)
