"""The drain: a thin dense tube whose course and reach no single slice shows.

In each slice that it crosses it is a dot or a short dash. Its place in the middle slice is drawn before its course is,
and the dash lies the same way in all slices: neither says where it runs. Axis legend: D slices, H rows, W columns.
"""

import dataclasses

import numpy as np

from tghmoe_jax.drawn.canvas import Canvas
from tghmoe_jax.drawn.chance import pick

# What a drain does from slice to slice, by plane: the way that the slices go, and (rows, columns) of each course.
ALONG = {"axial": "up", "oblique": "up", "coronal": "back", "sagittal": "left"}
_AXIAL = {"right": (0, -1), "left": (0, 1), "front": (-1, 0), "back": (1, 0)}
COURSES = {
    "axial": _AXIAL,
    "oblique": _AXIAL,  # as seen within the slices
    "coronal": {"right": (0, -1), "left": (0, 1), "up": (-1, 0), "down": (1, 0)},
    "sagittal": {"front": (0, -1), "back": (0, 1), "up": (-1, 0), "down": (1, 0)},
}
COURSE_NAMES = tuple(dict.fromkeys(name for ways in COURSES.values() for name in ways))
REACHES = {"a quarter": 0.25, "half": 0.5, "three quarters": 0.75, "all": 1.0}
CHANCE = 0.8  # of a drain: with four courses, each is as frequent as no drain
DRIFT = (0.2, 0.23)  # between its ends, a share of the field
ASIDE = 0.3  # most that it drifts across its course, a share of that
BEND = 0.012  # most that it bends off a straight course, a share of the field
EDGE = 0.025  # along the sides of the field that stays free of it
WIDTH_MM, HU = (4.0, 8.0), (200.0, 900.0)
LEAST_PIXELS = 1.25  # of its width
LEAST_CONTRAST_HU = 200.0  # above what it crosses: in bone and in contrast agent it would be lost


@dataclasses.dataclass(frozen=True)
class Drain:
    """A drain; `first` is the first slice that it crosses and `places` its (row, column) in each."""

    course: str
    reach: str
    first: int
    places: tuple[tuple[float, float], ...]

    @classmethod
    def from_json(cls, row: dict | None) -> "Drain | None":
        return row and cls(**{**row, "places": tuple(tuple(place) for place in row["places"])})


def plan_drain(plane: str, grid: tuple[int, int, int], high: float, rng: np.random.Generator) -> Drain | None:
    """A drain, or None. `high` is the part of the rows that the scan covers, about the middle."""
    there, course, reach = rng.random() < CHANCE, pick(rng, list(COURSES[plane])), pick(rng, list(REACHES))
    count = max(2, round(REACHES[reach] * grid[0]))
    first = int(rng.integers(grid[0] - count + 1))
    middle = grid[0] // 2
    known = middle - first if first <= middle < first + count else (count - 1) / 2
    way = np.array(COURSES[plane][course], float)
    drift = rng.uniform(*DRIFT) * (way + rng.uniform(-ASIDE, ASIDE) * way[::-1])
    part = (np.arange(count) - known) / (count - 1)
    # The place in slice `known` lies anywhere from which no course leaves the field: as far from the others as it can,
    # so that in the slices at the ends too its place says little.
    room = np.array([0.5 * high, 0.5]) - EDGE - BEND - np.abs(part).max() * DRIFT[1] * np.hypot(1, ASIDE)
    angle, distance = rng.uniform(0, 2 * np.pi), np.sqrt(rng.random())
    start = distance * room * (np.sin(angle), np.cos(angle))
    bend = rng.uniform(-BEND, BEND, 2) * np.sin((part - part[0]) * np.pi * rng.integers(1, 4))[:, None]  # 0 at its ends
    places = (0.5 + start + part[:, None] * drift + bend) * grid[1:] - 0.5
    if not there:
        return None
    return Drain(course, reach, first, tuple((round(float(r), 2), round(float(c), 2)) for r, c in places))


def draw_drain(canvas: Canvas, drain: Drain, pixel_mm: float, rng: np.random.Generator) -> None:
    """Draws the dots of a drain."""
    width = max(rng.uniform(*WIDTH_MM), LEAST_PIXELS * pixel_mm) / pixel_mm
    hu, angle, length = np.exp(rng.uniform(*np.log(HU))), rng.uniform(0, np.pi), width * rng.uniform(1, 1.8)
    rows, columns = np.ogrid[: canvas.hu.shape[1], : canvas.hu.shape[2]]
    for index, (row, column) in enumerate(drain.places, drain.first):
        r, c = rows - row, columns - column
        along, across = np.cos(angle) * r + np.sin(angle) * c, np.cos(angle) * c - np.sin(angle) * r
        beyond = np.maximum(np.abs(along) - (length - width) / 2, 0)
        weight = np.clip(width / 2 - np.hypot(beyond, across) + 0.5, 0, 1).astype(np.float32)
        value = np.maximum(np.float32(hu), canvas.hu[index] + np.float32(LEAST_CONTRAST_HU))
        canvas.blend((index, slice(None), slice(None)), weight, value)
