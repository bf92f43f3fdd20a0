"""The scanner of the third phantom style: plane, spacing, field of view and range of a scan, and its noise."""

import dataclasses

import numpy as np
from scipy.ndimage import gaussian_filter, gaussian_filter1d

from tghmoe_jax.drawn.phantom import DIRECTIONS
from tghmoe_jax.drawn.phantom3_body import Person

# Levels (mm in the atlas) among which the middle of a scan lies.
_MIDDLE = {"chest": (255, 300), "abdomen": (70, 150), "pelvis": (-145, -75)}


@dataclasses.dataclass(frozen=True)
class FieldOfView:
    """Where the voxels lie: `grid` (D, H, W), `spacing` (slice, row, column) in mm, `centre` (x, y, z) in mm.

    `reach` is half the range along the body in mm: beyond it nothing was scanned. A slice is the mean of `parts` thin
    ones, spread over `thick` (a share of the distance between slices).
    """

    plane: str
    grid: tuple[int, int, int]
    spacing: tuple[float, float, float]
    centre: tuple[float, float, float]
    reach: float
    thick: float
    parts: int

    @staticmethod
    def make(
        rng: np.random.Generator, section: str, plane: str, grid: tuple[int, int, int], patient: Person
    ) -> "FieldOfView":
        """A random scan of a section: 140 to 320 mm along the body, a field of view of 300 to 420 mm."""
        lean, fat = {"chest": (330, 28), "abdomen": (300, 42), "pelvis": (345, 52)}[section]
        width = (lean + fat * patient.fat) * patient.scale[0]
        field = float(np.clip(width * rng.uniform(1.0, 1.18), 300, 420))
        low, high = _MIDDLE[section]
        z = rng.uniform(low, high) * patient.scale[2]
        along = rng.uniform(140, 320) if plane == "axial" else rng.uniform(280, 320)
        deep = {"axial": along, "coronal": rng.uniform(180, 250), "sagittal": rng.uniform(250, 320)}
        slices = deep.get(plane, rng.uniform(150, 220))
        centre = patient.to_scanner([[0, 3, z / patient.scale[2]]])[0] + rng.uniform(-8, 8, 3)
        spacing = (slices / grid[0], field / grid[2], field / grid[2])
        thick = rng.uniform(0.3, 0.75)
        parts = int(np.clip(np.ceil(thick * spacing[0] / 6), 1, 2))
        return FieldOfView(plane, grid, spacing, tuple(centre), along / 2, thick, parts)

    def step(self) -> np.ndarray:
        """mm per index (3, 3): one row for each of slice, row and column."""
        return np.array(DIRECTIONS[self.plane]) * np.array(self.spacing)[:, None]

    def to_index(self, points) -> np.ndarray:
        """Fractional indices (N, 3) of points (N, 3) of the scanner's frame."""
        p = np.asarray(points, float) - self.centre
        return p @ np.transpose(DIRECTIONS[self.plane]) / self.spacing + (np.array(self.grid) - 1) / 2

    def to_scanner(self, index) -> np.ndarray:
        """The inverse of `to_index`."""
        return (np.asarray(index, float) - (np.array(self.grid) - 1) / 2) @ self.step() + self.centre

    def room(self, points) -> np.ndarray:
        """How far points (N, 3) of the scanner's frame lie inside the field of view and the range, in mm (N,)."""
        index = self.to_index(points)
        edge = np.minimum(index + 0.5, np.array(self.grid) - 0.5 - index) * self.spacing
        along = self.reach - np.abs(np.asarray(points)[:, 2] - self.centre[2])
        return np.minimum(edge.min(1), along)

    @property
    def fine(self) -> tuple[int, int, int]:
        """The grid with each slice in parts."""
        return (self.grid[0] * self.parts, *self.grid[1:])

    def to_fine(self, index) -> np.ndarray:
        """Indices (N, 3) of the fine grid from those of the grid; those between two slices get -9."""
        out = np.array(index, float)
        whole = np.rint(out[:, 0])
        part = (out[:, 0] - whole) / self.thick
        out[:, 0] = np.where(np.abs(part) < 0.5, (whole + part + 0.5) * self.parts - 0.5, -9)
        return out

    def points(self, patient: Person):
        """Atlas points x, y, z (M,) float32 of the fine grid, its scanner's y (M,) and what was scanned (M,) bool."""
        axes = [np.arange(n, dtype=np.float32) for n in self.fine]
        part = (axes[0] % self.parts + 0.5) / self.parts - 0.5
        axes[0] = axes[0] // self.parts + part * np.float32(self.thick)
        i, j, k = (a.reshape([-1 if n == m else 1 for n in range(3)]) for m, a in enumerate(axes))
        step, half = self.step(), (np.array(self.grid) - 1) / 2

        def affine(matrix, start):
            matrix, start = np.float32(matrix), np.float32(start - half @ matrix)
            return [(i * a + (j * b + (k * c + d))).ravel() for a, b, c, d in zip(*matrix, start, strict=True)]

        back = patient.frame / patient.scale
        x, y, z = affine(step @ back, (np.array(self.centre) - (*patient.position, 0)) @ back)
        x -= patient.bend(z)
        level = affine(step, np.array(self.centre))
        return (x, y, z), level[1], np.abs(level[2] - np.float32(self.centre[2])) <= self.reach


def lay_table(hu: np.ndarray, skin: np.ndarray, across: np.ndarray, level: np.ndarray) -> None:
    """Put the scanner's table under the body, in place.

    All arrays are (N,): HU, distance to the skin, x and y of the scanner, in mm.
    """
    body = np.abs(skin) < 4
    if not body.any():
        return
    back = level[body].max() + 4
    k = np.flatnonzero((skin > 1) & (level > back - 60) & (level < back + 40) & (np.abs(across) < 215))
    depth = level[k] - back + 0.0011 * across[k] ** 2  # the table is a shallow trough
    thin = np.exp(-(((depth - 3) / 3) ** 2)) + 0.8 * np.exp(-(((depth - 22) / 3) ** 2))
    hu[k] = np.maximum(hu[k], -1000 + 620 * thin + 60 * ((depth > 3) & (depth < 22)))


def finish(
    hu: np.ndarray, inside: np.ndarray, scan: FieldOfView, noise_hu: float, rng: np.random.Generator
) -> np.ndarray:
    """Thin slices (fine grid) to a volume of float32 HU (D, H, W): averaged, blurred by the scanner, with noise.

    `inside` (fine grid, bool) marks the body: the noise has a spread of `noise_hu` where the beam crosses most of it,
    and about half of that in air.
    """
    d, h, w = scan.grid
    hu, inside = (a.reshape(d, scan.parts, h, w).mean(1, dtype=np.float32) for a in (hu, inside))
    blur, grain, along = rng.uniform(0.25, 0.55), rng.uniform(0.25, 0.75), rng.uniform(0, 0.4)
    hu = gaussian_filter(hu, (0, blur, blur))
    noise = gaussian_filter(rng.standard_normal(hu.shape, np.float32), (along, grain, grain))
    noise *= noise_hu / noise.std()
    crossed = gaussian_filter1d(inside, 5, axis=2)
    return hu + noise * (0.55 + 0.45 * crossed / max(float(crossed.max()), 0.1))
