"""The slices of a DICOM series as one straight, complete, even stack."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from tghmoe_jax.errors import UserError

MAX_TILT_DEGREES = 1.0


@dataclasses.dataclass(frozen=True)
class Slice:
    """One image of the stack: where its pixels are, where it lies (LPS, mm) and how it is scaled."""

    file: Path
    frame: int | None  # of so many frames
    frames: int
    shape: tuple[int, int]
    position: np.ndarray  # (3,)
    row: np.ndarray  # (3,) unit vector along increasing column index
    column: np.ndarray  # (3,) unit vector along increasing row index
    spacing: tuple[float, float]  # between rows, between columns
    slope: float
    intercept: float
    padding: float | None
    labels: Mapping[str, str]  # of the tags ACQUISITION


def along(slices: Sequence[Slice]) -> np.ndarray:
    """Positions (N,) in mm along the normal of the first slice."""
    return np.stack([entry.position for entry in slices]) @ np.cross(slices[0].row, slices[0].column)


def axes(slices: list[Slice]) -> np.ndarray:
    first = slices[0]
    step = (slices[-1].position - first.position) / (len(slices) - 1)
    return np.stack([step, first.column * first.spacing[0], first.row * first.spacing[1]])


def sorted_stack(slices: list[Slice], path: Path) -> list[Slice]:
    """Slices in order of position along the normal; refuses anything but one straight, complete, even stack."""
    first = slices[0]
    normal = np.cross(first.row, first.column)
    if len({entry.shape for entry in slices}) > 1:
        raise UserError(f"{path} mixes slices of different size: keep the slices of one series.")
    # 0.5 degrees: scanners write direction cosines with as few as four digits.
    same = np.cos(np.radians(0.5))
    if any(entry.row @ first.row < same or entry.column @ first.column < same for entry in slices):
        raise UserError(
            f"{path} mixes orientations (a localizer among the slices?): keep the slices of one orientation."
        )
    if any(not np.allclose(entry.spacing, first.spacing, rtol=1e-3) for entry in slices):
        raise UserError(f"{path} mixes pixel spacings: keep the slices of one series.")
    if len(slices) < 2:
        raise UserError(f"{path} holds one slice, which is not a volume: name the folder of the whole series.")
    ordered = sorted(slices, key=lambda entry: float(entry.position @ normal))
    positions = np.stack([entry.position for entry in ordered])  # (N, 3)
    along = positions @ normal
    steps = np.diff(along)
    doubles = int(np.count_nonzero(steps < 0.01))
    if doubles:
        raise UserError(
            f"{path} holds {doubles} slice{'s' if doubles > 1 else ''} at the position of another (several phases, "
            "or copies?): keep one acquisition."
        )
    usual = float(np.median(steps))
    # Positions may be rounded to 0.1 mm: their distance from an even stack counts, not each step.
    line = np.polynomial.Polynomial.fit(np.arange(len(along)), along, 1)(np.arange(len(along)))
    if np.max(np.abs(along - line)) > max(0.1 * usual, min(0.1, 0.25 * usual)):
        at = int(np.argmax(np.abs(steps - usual)))
        raise UserError(
            f"{path} misses slices or is unevenly spaced: slices {at + 1} and {at + 2} of {len(ordered)} lie "
            f"{steps[at]:.2f} mm apart where {usual:.2f} mm is usual; export the complete series."
        )
    straight = positions[0] + np.linspace(0, 1, len(ordered))[:, None] * (positions[-1] - positions[0])
    aside = positions - straight - np.outer((positions - straight) @ normal, normal)
    course = positions[-1] - positions[0]
    tilt = np.degrees(np.arccos(min(1.0, abs(course @ normal) / np.linalg.norm(course))))
    if tilt > MAX_TILT_DEGREES:
        raise UserError(
            f"{path} was taken with a gantry tilted by {tilt:.1f} degrees: resample it to a straight grid first."
        )
    if np.max(np.linalg.norm(aside, axis=1)) > max(first.spacing):
        raise UserError(f"{path} holds slices shifted against each other in plane: keep one reconstruction.")
    return ordered
