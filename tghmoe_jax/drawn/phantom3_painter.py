"""The canvas of the third phantom style: the voxels of a scan while tissues are painted over each other."""

import numpy as np

from tghmoe_jax.drawn import phantom3_tables as tables
from tghmoe_jax.drawn.phantom3_body import Figure
from tghmoe_jax.drawn.phantom3_shapes import near, waves
from tghmoe_jax.drawn.phantom_anatomy import PHASES

_BLOCK = 256
AIR, FAT = -1000.0, -104.0
# tissue -> HU of an average adult in each phase
ENHANCEMENT = {
    "artery": (42, 310, 155, 108),
    "lung artery": (42, 250, 155, 108),
    "vein": (42, 52, 130, 106),
    "cava": (42, 105, 148, 108),
    "portal": (42, 95, 172, 112),
    "liver": (57, 68, 110, 90),
    "spleen": (47, 122, 120, 92),
    "pancreas": (38, 96, 86, 66),
    "cortex": (33, 180, 180, 142),
    "medulla": (32, 62, 165, 142),
    "pelvis": (4, 8, 30, 420),
    "bowel": (36, 72, 82, 68),
    "stomach": (38, 76, 86, 70),
    "muscle": (52, 56, 62, 60),
    "heart": (45, 105, 105, 86),
    "uterus": (46, 72, 112, 98),
    "prostate": (40, 56, 76, 72),
    "ovary": (40, 52, 68, 64),
    "gland": (22, 34, 44, 40),
    "urine": (5, 6, 9, 230),
}


class Painter:
    """A scan while it is painted. Arrays (N,) belong to the voxels in or near the body.

    x, y, z: atlas mm; hu: float32 HU; at: place in the flat grid; skin, wall, inner: distances in mm; soft: the width
    in mm over which an edge is blurred.
    """

    def __init__(self, body: Figure, phase: str, points, shape, soft: float) -> None:
        self.body, self.patient, self.phase = body, body.patient, PHASES.index(phase)
        self.soft, self.shape = np.float32(soft), shape
        px, py, pz = points
        self.full_skin, *found = body.surfaces(px, py, pz)
        legs = pz < -222
        if legs.any():  # below the crotch the two thighs are apart
            x, y, z = np.abs(px[legs]), py[legs], pz[legs]
            grow = np.clip((-222 - z) / 60, 0, 1)
            inner_side = grow * (9 + 16 * ((y - 6) / 70) ** 2) - 2
            self.full_skin[legs] = np.maximum(self.full_skin[legs], inner_side - x)
        self.at = np.flatnonzero(self.full_skin < soft)
        self.x, self.y, self.z = px[self.at], py[self.at], pz[self.at]
        self.skin = self.full_skin[self.at]
        self.wall, self.inner, self.cell = (values[self.at] for values in found)
        self.hu = np.full(len(self.at), AIR, np.float32)
        self.tone = body.rng("tone").normal(0, 1, 40)
        starts = np.arange(
            0, len(self.at), _BLOCK
        )  # voxels in a row lie close together: most blocks are far from a box
        xyz = np.stack([self.x, self.y, self.z])
        self._blocks = np.minimum.reduceat(xyz, starts, 1), np.maximum.reduceat(xyz, starts, 1)
        self.low, self.high = (float(self.z.min()), float(self.z.max())) if len(self.at) else (0.0, 0.0)

    def hu_of(self, tissue: str) -> float:
        """HU of a tissue in this phase and patient."""
        plain, *_ = values = ENHANCEMENT[tissue]
        wobble = 2 * self.tone[list(ENHANCEMENT).index(tissue)]
        fatty = self.patient.fatty if tissue == "liver" else 0
        return plain + self.patient.dose * (values[self.phase] - plain) + wobble - fatty

    def cover(self, d) -> np.ndarray:
        """How much of a voxel lies inside a surface at distance `d` (N,): 0 to 1."""
        return np.clip(0.5 - d / self.soft, 0, 1)

    def blend(self, k, d, value) -> None:
        """Paint `value` at the voxels `k` as far as they lie inside, by their distances `d`."""
        old = self.hu[k]
        self.hu[k] = old + self.cover(d) * (value - old)

    def within(self, box) -> np.ndarray:
        """Voxels (M,) in a box (2, 3) of the atlas, with a margin."""
        (x0, y0, z0), (x1, y1, z1) = box
        m = float(self.soft)
        if z0 - m > self.high or z1 + m < self.low:
            return np.zeros(0, np.int64)
        low, high = np.float32([x0 - m, y0 - m, z0 - m]), np.float32([x1 + m, y1 + m, z1 + m])
        block = np.flatnonzero(((self._blocks[1].T > low) & (self._blocks[0].T < high)).all(1))
        k = (block[:, None] * _BLOCK + np.arange(_BLOCK)).ravel()
        k = k[: np.searchsorted(k, len(self.at))]
        x, y, z = self.x[k], self.y[k], self.z[k]
        inside = (x > low[0]) & (x < high[0]) & (y > low[1]) & (y < high[1]) & (z > low[2]) & (z < high[2])
        return k[inside]

    def _far(self, levels, reach: float) -> bool:
        """Whether parts between these levels of the atlas, within `reach` mm, are all outside the scan."""
        return min(levels) - reach > self.high or max(levels) + reach < self.low

    def solid(self, name: str, right: bool = False):
        """Voxels near a solid and their distances to its surface."""
        if self._far([level for level, _ in tables.SOLIDS[name]], 70):
            return np.zeros(0, np.int64), np.zeros(0, np.float32)
        shape = self.body.shape(name, right)
        k = self.within(shape.box)
        return k, shape.distance(self.x[k], self.y[k], self.z[k])

    def tube(self, name: str, right: bool = False, margin: float = 6.0):
        """Voxels near a tube, their distances to its surface and their nearest samples of the path."""
        points, radii = tables.PATHS[name]
        if self._far([level for *_, level in points], 1.3 * max(radii) + margin + 40):
            return np.zeros(0, np.int64), np.zeros(0, np.float32), np.zeros(0, np.int64)
        path = self.body.path(name, right)
        reach = path.radius.max() + margin
        k = self.within(np.array([path.path.min(0) - reach, path.path.max(0) + reach]))
        j, d, sample = near(path, self.x[k], self.y[k], self.z[k], margin)
        return k[j], d, sample

    def vessel(self, name: str, tissue: str, right: bool = False, grow: float = 0.0, value=None) -> None:
        """Paint a tube, widened by `grow` mm, with one tissue or with the HU `value`."""
        k, d, _ = self.tube(name, right)
        self.blend(k, d - grow, self.hu_of(tissue) if value is None else value)

    def bone(self, k, d, marrow: float = 170.0, shell: float = 620.0, depth: float = 4.0) -> None:
        """Paint bone: a dense shell of `depth` mm around marrow."""
        inside = np.clip((-d - depth + self.soft / 3) / (self.soft / 1.5), 0, 1)
        density = self.patient.density
        marrow = 20 + (marrow - 20) * density + 15 * waves(5, self.x[k], self.y[k], self.z[k], 14)
        self.blend(k, d, shell * (0.6 + 0.4 * density) * (1 - inside) + marrow * inside)

    def field(self, name: str, k, length: float) -> np.ndarray:
        """A smooth random field of this patient at the voxels `k`."""
        seed = int(self.body.rng(name).integers(1 << 30))
        return waves(seed, self.x[k], self.y[k], self.z[k], length)

    def splat(self, points, weight, volume: float, to_index) -> np.ndarray:
        """Share (N,) of each voxel that thin vessels fill: `points` (K, 3) that carry `weight` (K,) mm3 each.

        `to_index` turns atlas points into fractional indices of the grid. A weight is shared among eight voxels.
        """
        at = to_index(points)
        seen = ((at > -1) & (at < self.shape)).all(1)
        at, weight = at[seen], weight[seen] / volume
        base = np.floor(at).astype(int)
        part = at - base
        total = np.zeros(int(np.prod(self.shape)))
        for corner in np.ndindex(2, 2, 2):
            cell = base + corner
            ok = ((cell >= 0) & (cell < self.shape)).all(1)
            w = np.prod(np.where(corner, part, 1 - part), axis=1) * weight
            total += np.bincount(np.ravel_multi_index(cell[ok].T, self.shape), w[ok], len(total))
        return np.minimum(total[self.at], 1).astype(np.float32)
