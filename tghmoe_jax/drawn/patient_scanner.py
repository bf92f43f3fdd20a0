"""The scanner: field of view, table, kernel, noise, streaks and what it stores outside its field.

Axis legend: D slices, H rows, W columns.
"""

import dataclasses

import numpy as np
from scipy import ndimage

from tghmoe_jax.drawn.phantom_anatomy import PADDING

NOISE_HU = (4.0, 40.0)  # standard deviation; 12 to 19 in the liver of the two labelled real series
MOST_HU = 3000


@dataclasses.dataclass(frozen=True)
class Scanner:
    """What differs between scans of one patient.

    `kernel` is below 0 for a soft and above 0 for a sharp one, `thick` the share of its neighbours in a slice,
    `texture_hu` the deviation of uneven tissue, `circle` the radius of the reconstructed field in pixels (0: a square),
    `high` the part of the rows that were scanned, about the middle (of planes whose rows run along the body).
    """

    noise_hu: float
    offset_hu: float
    kernel: float
    thick: float
    streaks_hu: float
    texture_hu: float
    circle: float
    table_mm: float | None
    high: float


def make_scanner(plane: str, pixels: int, rng: np.random.Generator) -> Scanner:
    """A scanner and its settings; `pixels` is the side of a slice."""
    upright = plane in ("coronal", "sagittal")
    round_field = rng.random() < 0.3
    return Scanner(
        noise_hu=round(float(np.exp(rng.uniform(*np.log(NOISE_HU)))), 1),
        offset_hu=float(rng.uniform(-10, 10)),
        kernel=float(rng.uniform(-1.2, 0.7)),
        thick=float(rng.uniform(0, 0.2)),
        streaks_hu=float(rng.uniform(3, 25)) if rng.random() < 0.25 else 0.0,
        texture_hu=float(rng.uniform(0, 7)),
        circle=0.5 * pixels if plane == "axial" and round_field else 0.0,
        table_mm=float(rng.uniform(2, 25)) if rng.random() < 0.7 else None,
        high=float(rng.uniform(0.74, 1)) if upright and rng.random() < 0.5 else 1.0,
    )


def seen(scanner: Scanner, grid: tuple[int, int, int], index: np.ndarray, edge: float = 1.5) -> np.ndarray:
    """bool (K,): whether voxel indices (K, 3) lie in the scan, `edge` pixels from its sides."""
    rows, columns = index[:, 1] - (grid[1] - 1) / 2, index[:, 2] - (grid[2] - 1) / 2
    found = (index[:, 0] > 0) & (index[:, 0] < grid[0] - 1)
    found &= (np.abs(rows) < scanner.high * grid[1] / 2 - edge) & (np.abs(columns) < grid[2] / 2 - edge)
    return found & (np.hypot(rows, columns) < scanner.circle - edge) if scanner.circle else found


def blurred(hu: np.ndarray, share: float, axes: tuple[int, ...]) -> np.ndarray:
    """`hu` with a share of each neighbour along some axes; a negative share sharpens."""
    for axis in axes:
        kernel = np.array([share, 1 - 2 * share, share], np.float32)
        hu = ndimage.convolve1d(hu, kernel, axis=axis, mode="nearest")
    return hu


def uneven(shape: tuple[int, int, int], rng: np.random.Generator) -> np.ndarray:
    """A smooth field of deviation about 1, float32 (D, H, W)."""
    coarse = rng.standard_normal(tuple(-(-n // 4) + 1 for n in shape), dtype=np.float32)
    for axis, n in enumerate(shape):
        at = np.linspace(0, coarse.shape[axis] - 1.001, n)
        low = at.astype(int)
        part = (at - low).astype(np.float32).reshape([-1 if a == axis else 1 for a in range(3)])
        coarse = np.take(coarse, low, axis) * (1 - part) + np.take(coarse, low + 1, axis) * part
    return coarse * np.float32(1.8)


def lay_on_table(hu: np.ndarray, below: np.ndarray, sideways: np.ndarray, rng: np.random.Generator) -> None:
    """Draws a curved table into air: `below` (D, H, W) is mm behind its middle, `sideways` mm from there."""
    depth = below + sideways**2 * np.float32(rng.uniform(0.0002, 0.0012))
    wide = np.abs(sideways) < rng.uniform(190, 260)
    air = hu < -500
    for at, thick, value in ((0, 1.5, rng.uniform(-500, 100)), (rng.uniform(12, 30), 1.5, rng.uniform(-700, 0))):
        shell = np.clip(1.5 - np.abs(depth - at) / (thick + 2), 0, 1) * wide * air
        hu += shell * (np.float32(value) - hu)


def scan(hu: np.ndarray, scanner: Scanner, rng: np.random.Generator) -> np.ndarray:
    """What the scanner stores of float32 (D, H, W): int16 HU with its kernel, noise, streaks and field."""
    soft = (hu > -200) & (hu < 350)
    hu = hu + soft * np.float32(scanner.texture_hu) * uneven(hu.shape, rng)
    hu = blurred(hu, -0.12 * scanner.kernel if scanner.kernel > 0 else -0.2 * scanner.kernel, (1, 2))
    noise = blurred(rng.standard_normal(hu.shape, dtype=np.float32), -0.24 * scanner.kernel, (1, 2))
    hu = hu + noise * np.float32(scanner.noise_hu / noise.std())
    if scanner.streaks_hu:
        rows = rng.standard_normal(hu.shape[:2], dtype=np.float32)[:, :, None]
        hu = hu + np.float32(scanner.streaks_hu) * rows * (hu > -800).mean(axis=2, keepdims=True)
    hu = np.clip(hu + np.float32(scanner.offset_hu), PADDING, MOST_HU)
    return np.rint(np.where(field_of(scanner, hu.shape[1:]), hu, PADDING)).astype(np.int16)


def field_of(scanner: Scanner, shape: tuple[int, int]) -> np.ndarray:
    """bool (H, W): the pixels of a slice that were scanned; outside is padding."""
    rows, columns = (np.arange(n) - (n - 1) / 2 for n in shape)
    field = np.ones(shape, bool)
    if scanner.circle:
        field &= np.hypot(rows[:, None], columns) < scanner.circle
    if scanner.high < 1:
        field &= np.abs(rows)[:, None] < scanner.high * shape[0] / 2
    return field
