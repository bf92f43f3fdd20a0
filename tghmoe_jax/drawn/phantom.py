"""One CT-like volume with known truth from a seed, in Hounsfield units.

Axis legend: D slices, H rows, W columns. Nothing here is patient data: a torso is composed of analytic shapes, so the
four planes are the same body sampled along other directions, and every lesion's organ, side, place and size is known.
"""

import dataclasses

import numpy as np

from tghmoe_jax.drawn.canvas import Canvas, Frame
from tghmoe_jax.drawn.phantom_anatomy import PADDING, PHASES, draw_body
from tghmoe_jax.drawn.phantom_lesions import SECTIONS, Lesion, draw_lesion, place_lesions

GENERATOR = 4  # counts up with every change that alters a volume or its truth; part of the cache's name
PLANES = ("axial", "coronal", "sagittal", "oblique")
LESION_COUNTS = (0.20, 0.35, 0.27, 0.18)  # chance of 0, 1, 2, 3 lesions
CENTRE_Z_MM = {"chest": 152.0, "abdomen": -28.0, "pelvis": -212.0}

# Direction of (slice, row, column) in the patient frame (Left, Posterior, Superior). `oblique` stands halfway between
# axial and coronal.
HALF = 0.5**0.5
DIRECTIONS = {
    "axial": ((0, 0, 1), (0, 1, 0), (1, 0, 0)),
    "coronal": ((0, 1, 0), (0, 0, -1), (1, 0, 0)),
    "sagittal": ((1, 0, 0), (0, 0, -1), (0, 1, 0)),
    "oblique": ((0, HALF, HALF), (0, HALF, -HALF), (1, 0, 0)),
}
SLICE_MM = {
    "axial": (13.6, 14.8),
    "coronal": (15.0, 16.0),
    "sagittal": (17.0, 18.0),
    "oblique": (16.5, 17.5),
}  # at 16 slices
PIXEL_MM = (5.6, 6.2)  # at 64 pixels
HABITUS = ((0.95, 1.05), (0.95, 1.04), (0.97, 1.03))  # of a patient, per nominal mm along x, y, z


@dataclasses.dataclass(frozen=True)
class Truth:
    """Everything known of a volume; `spacing_mm` is (slice, row, column)."""

    seed: int
    section: str
    plane: str
    phase: str
    spacing_mm: tuple[float, float, float]
    noise_hu: float
    lesions: tuple[Lesion, ...]

    @property
    def triples(self) -> frozenset[tuple[str, str, str]]:
        """(lesion, organ, side) of every lesion."""
        return frozenset(lesion.triple for lesion in self.lesions)

    @classmethod
    def from_json(cls, row: dict) -> "Truth":
        """The inverse of `dataclasses.asdict`, from one line of truth.jsonl."""
        lesions = tuple(Lesion(**{**item, "centre": tuple(item["centre"])}) for item in row["lesions"])
        return cls(**{**row, "spacing_mm": tuple(row["spacing_mm"]), "lesions": lesions})


@dataclasses.dataclass(frozen=True)
class Phantom:
    """A volume int16 (D, H, W) in HU and its truth; `labels` uint8 (D, H, W) as of `Canvas`, where they were asked."""

    hu: np.ndarray
    truth: Truth
    labels: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class Plan:
    """A volume before it is drawn: cheap, so that truth can be counted over thousands of seeds.

    `scanned_mm` is the middle and half length of the scanned z range, `placed` the (lesion, centre in the nominal body,
    radius in mm), and `rng` the generator that then varies the drawing.
    """

    truth: Truth
    frame: Frame
    scanned_mm: tuple[float, float]
    placed: list[tuple[Lesion, tuple[float, ...], float]]
    rng: np.random.Generator


def plan(seed: int, grid: tuple[int, int, int] = (16, 64, 64), habitus=HABITUS) -> Plan:
    """Everything of one seed's volume but its voxels. `habitus` holds the [low, high] of the body's scale."""
    rng = np.random.default_rng((20260, seed))
    section, plane, phase = (names[rng.integers(len(names))] for names in (SECTIONS, PLANES, PHASES))
    frame, spacing = _frame(rng, section, plane, grid, habitus)
    count = int(rng.choice(len(LESION_COUNTS), p=LESION_COUNTS))
    scanned = (CENTRE_Z_MM[section] + float(rng.uniform(-2, 2)), float(rng.uniform(107, 116)))
    noise = round(float(rng.uniform(6, 16)), 1)
    smallest = max(4.3 * spacing[1], 1.9 * spacing[0])  # four pixels across, and seen in two slices
    placed = place_lesions(frame, section, count, smallest, scanned, rng)
    truth = Truth(seed, section, plane, phase, spacing, noise, tuple(lesion for lesion, _, _ in placed))
    return Plan(truth, frame, scanned, placed, rng)


def draw(seed: int, grid: tuple[int, int, int] = (16, 64, 64)) -> Phantom:
    """Draws the volume of one seed; the same seed and grid always give the same volume."""
    planned = plan(seed, grid)
    truth, rng = planned.truth, planned.rng
    canvas = Canvas(planned.frame, truth.spacing_mm[1])
    body = draw_body(canvas, truth.phase, rng)
    for lesion, centre, radius in planned.placed:
        draw_lesion(canvas, body, lesion, centre, radius)

    hu = canvas.hu + rng.standard_normal(canvas.hu.shape, dtype=np.float32) * np.float32(truth.noise_hu)
    return Phantom(scanned(hu, planned, canvas.xyz[2]), truth)


def scanned(hu: np.ndarray, planned: Plan, z: np.ndarray) -> np.ndarray:
    """HU int16 (D, H, W) as a scanner stores them, padded outside the scanned range; `z` in mm of the nominal body."""
    hu = np.clip(hu, PADDING + 1, 3000)
    if planned.truth.plane != "axial":
        middle, half = planned.scanned_mm
        hu = np.where(np.abs(z - np.float32(middle)) <= half, hu, np.float32(PADDING))
    return np.rint(hu).astype(np.int16)


def _frame(rng: np.random.Generator, section: str, plane: str, grid, habitus) -> tuple[Frame, tuple]:
    pixel = float(rng.uniform(*PIXEL_MM)) * 64 / grid[2]
    spacing = (round(float(rng.uniform(*SLICE_MM[plane])) * 16 / grid[0], 2), round(pixel, 2), round(pixel, 2))
    scale = np.array([rng.uniform(*limits) for limits in habitus])
    steps = np.array(DIRECTIONS[plane], np.float64).T * spacing
    centre = np.array([0.0, -6.0 if section == "chest" else 0.0, CENTRE_Z_MM[section]]) * scale
    centre += rng.uniform(-1, 1, 3) * (6, 4, 3)
    origin = centre - steps @ ((np.array(grid) - 1) / 2)
    return Frame(tuple(grid), origin, steps, scale), spacing
