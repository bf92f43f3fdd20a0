"""The canonical CT volume: one orientation, one unit, stated spacing; and the checks every reader shares.

Axis legend: D slices toward Superior, H rows toward Posterior, W columns toward the patient's Left.

World vectors are in the patient axes of DICOM, LPS: x toward Left, y toward Posterior, z toward Superior, in mm.
"""

import dataclasses
import itertools
import math
from contextvars import ContextVar
from typing import Literal

import nibabel as nib
import numpy as np

from tghmoe_jax.errors import UserError

Unit = Literal["HU", "unit-interval"]

MIN_SLICES = 4  # fewer is a picture, not a volume: one slab of the default patch depth
MIN_PIXELS = 16
MAX_VOXELS = 2**30  # 4 GiB as float32; a header that claims more is damaged or hostile
most_voxels: ContextVar[int] = ContextVar("most_voxels", default=MAX_VOXELS)  # a server has less room for each scan
SPACING_RANGE_MM = (0.02, 50.0)
MAX_SHEAR_DEGREES = 1.0
MAX_PLACE_MM = 1e7  # of a voxel, from the scanner: beyond, a header is damaged

_TARGET = np.array([[0, 0, 1], [0, 1, 0], [1, 0, 0]], float)  # S, P, L as rows of LPS components
_LETTERS = (("R", "L"), ("A", "P"), ("I", "S"))


@dataclasses.dataclass(frozen=True)
class Volume:
    """A scan as read. array float32 (D, H, W); spacing_mm is (z, y, x), or None where the source states none.

    orientation is "LPS" (the canonical one) or "as stored" where the source states none; window names the window the
    source was already cut to, None for plain HU. history lists what was done and warnings what a user should check,
    both without paths or patient data. affine float64 (4, 4) takes a voxel (slice, row, column, 1) of `array` to mm in
    the patient axes (LPS), None where the source does not place it.
    """

    array: np.ndarray
    unit: Unit
    spacing_mm: tuple[float, float, float] | None
    orientation: str
    window: str | None
    history: tuple[str, ...]
    warnings: tuple[str, ...] = ()
    affine: np.ndarray | None = dataclasses.field(default=None, repr=False)

    def __post_init__(self):
        if self.array.ndim != 3 or self.array.dtype != np.float32:
            raise ValueError(f"a Volume holds float32 (D, H, W), not {self.array.dtype} {self.array.shape}")


@dataclasses.dataclass(frozen=True)
class AxisOrder:
    """How stored axes become the canonical ones, known before a voxel is read.

    order[i] is the stored axis of canonical axis i; flips[i] is True where it runs backwards; spacing_mm is (z, y, x).
    axes (3, 3): row i is the step in mm (LPS) of stored axis i.
    """

    order: tuple[int, int, int]
    flips: tuple[bool, bool, bool]
    spacing_mm: tuple[float, float, float]
    notes: tuple[str, ...]
    axes: np.ndarray

    def shape(self, stored: tuple[int, int, int]) -> tuple[int, int, int]:
        """The canonical shape (D, H, W) of a stored shape."""
        return tuple(stored[axis] for axis in self.order)

    def as_stored(self, canonical: np.ndarray) -> np.ndarray:
        """A view of a canonical array with the stored axes: what is written into it lands in its canonical place."""
        steps = tuple(slice(None, None, -1) if flip else slice(None) for flip in self.flips)
        return canonical[steps].transpose(np.argsort(self.order))

    def affine(self, origin: np.ndarray, stored: tuple[int, int, int]) -> np.ndarray:
        """`Volume.affine` of a stored shape whose voxel 0 lies at `origin` (3,) in mm (LPS)."""
        last = [stored[axis] - 1 for axis in range(3)]
        backwards = [axis for axis, flip in zip(self.order, self.flips, strict=True) if flip]
        affine = np.eye(4)
        affine[:3, :3] = (self.axes[list(self.order)] * np.where(self.flips, -1, 1)[:, None]).T
        affine[:3, 3] = origin + sum(last[axis] * self.axes[axis] for axis in backwards)
        return affine


def canonical_grid(axes: np.ndarray, name: str) -> AxisOrder:
    """The permutation and flips (never an interpolation) to the nearest S, P, L order.

    `axes` (3, 3): row i is the world step in mm of stored axis i. The choice depends on the world vectors alone, not on
    their order or sign, so every stored orientation of one scan gives the same bits. `name` stands in errors, which
    refuse sheared axes and absurd spacing.
    """
    axes = np.asarray(axes, float)
    with np.errstate(over="ignore"):  # a length beyond floats is refused below
        lengths = np.linalg.norm(axes, axis=1)
    if not np.all(np.isfinite(lengths)) or np.any(lengths == 0):
        raise UserError(f"{name} states no voxel spacing: export the scan again with its geometry.")
    low, high = SPACING_RANGE_MM
    if np.any(lengths < low) or np.any(lengths > high):
        sizes = " x ".join(f"{length:.4g}" for length in lengths)
        raise UserError(
            f"{name} states voxels of {sizes} mm, outside {low} to {high} mm: correct the spacing in its header."
        )
    units = axes / lengths[:, None]
    shear = max(abs(float(units[i] @ units[j])) for i, j in ((0, 1), (0, 2), (1, 2)))
    if np.degrees(np.arcsin(min(shear, 1.0))) > MAX_SHEAR_DEGREES:
        raise UserError(
            f"{name} has slices that are not at right angles to the stack (a tilted gantry): "
            "resample it to a straight grid first."
        )

    def fit(order: tuple[int, ...]) -> tuple:
        # At 45 degrees two orders fit alike; the vectors themselves, without sign, then decide.
        chosen = units[list(order)]
        signs = np.where(np.sum(chosen * _TARGET, axis=1, keepdims=True) < 0, -1, 1)
        return (round(float(np.sum(np.abs(chosen * _TARGET))), 4), *np.round(chosen * signs, 3).ravel().tolist())

    order = max(itertools.permutations(range(3)), key=fit)
    along = np.sum(units[list(order)] * _TARGET, axis=1)
    # A tenth of a micrometre is far below any scanner and above the rounding of a float32 affine.
    spacing = tuple(round(float(lengths[axis]), 4) for axis in order)
    tilt = float(np.degrees(np.arccos(np.clip(np.min(np.abs(along)), -1, 1))))
    letters = "".join(nib.aff2axcodes(nib.affines.from_matvec(axes.T), _LETTERS))
    notes = [f"axes {letters} -> SPL (slices, rows, columns), not interpolated"]
    if tilt > 0.5:
        notes.append(f"oblique by {tilt:.1f} degrees, kept on its own grid")
    return AxisOrder(order, tuple(bool(value < 0) for value in along), spacing, tuple(notes), axes)


def canonicalise(array: np.ndarray, axes: np.ndarray, name: str) -> tuple[np.ndarray, tuple, tuple[str, ...]]:
    """A stored array in the order of `canonical_grid`: float32 (D, H, W) contiguous, spacing (z, y, x), history."""
    grid = canonical_grid(axes, name)
    canonical = np.empty(grid.shape(array.shape), np.float32)
    grid.as_stored(canonical)[...] = array
    return canonical, grid.spacing_mm, grid.notes


def check_shape(shape: tuple[int, ...], name: str) -> None:
    """Refuse what is not a 3D volume of a size that can be read. Call it on the header, before any voxel is read."""
    sizes = " x ".join(str(size) if abs(size) < 10**18 else "countless" for size in shape)  # one may have 4,000 digits
    if len(shape) == 4 and min(shape) > 0:
        raise UserError(
            f"{name} is 4D ({sizes}): split the series of volumes (phases, times) into 3D files and name one of them."
        )
    if not shape or min(shape) <= 0:
        raise UserError(f"{name} is empty ({sizes or 'no'} voxels): export the scan again.")
    if len(shape) != 3:
        raise UserError(f"{name} is {len(shape)}D ({sizes}) where a scan is 3D: name a volume.")
    if math.prod(shape) > (most := most_voxels.get()):
        raise UserError(f"{name} claims {sizes} voxels, more than {most}: check its header, or crop the scan.")


def check_canonical_shape(shape: tuple[int, int, int], name: str) -> None:
    """Refuse a stack too thin or too small to be read as a volume."""
    if shape[0] < MIN_SLICES:
        raise UserError(
            f"{name} has {shape[0]} axial slice{'s' if shape[0] > 1 else ''} where at least {MIN_SLICES} are needed: "
            "name the whole scan."
        )
    if min(shape[1:]) < MIN_PIXELS:
        raise UserError(
            f"{name} has slices of {shape[1]} x {shape[2]} pixels where at least {MIN_PIXELS} x {MIN_PIXELS} "
            "are needed: name the whole scan."
        )


def check_place(affine: np.ndarray, name: str) -> None:
    """Refuse a scan that lies where no scanner is. `affine` as of a Volume."""
    if not np.all(np.abs(affine) < MAX_PLACE_MM):  # also where it is NaN
        raise UserError(f"{name} states a position of kilometres or none: correct it in its header.")


def check_finite(array: np.ndarray, name: str) -> tuple[float, float]:
    """The smallest and greatest value; refuses NaN, infinity and a volume of one value."""
    low, high = float(array.min()), float(array.max())  # NaN and infinity reach one of the two
    if not (np.isfinite(low) and np.isfinite(high)):
        raise UserError(
            f"{name} holds NaN or infinite voxels: export the scan again, or set voxels outside the scan to -1024 HU."
        )
    if low == high:
        raise UserError(f"{name} holds the one value {low:g} in every voxel: it is blank, name another scan.")
    return low, high
