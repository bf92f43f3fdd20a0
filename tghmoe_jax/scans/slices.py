"""From a volume to the model's input: resampling, HU windows, and slices of three channels.

Axis legend: N slices of the scan, D slices of the model, H rows, W columns, S pixels of the model's square slice.

The canonical volume counts up toward Superior, Posterior and Left (the patient axes of DICOM), so a slice shown with
row 0 on top has the front of the patient on top and the patient's right on the image's left.
"""

import dataclasses
import functools

import numpy as np
from scipy.sparse import csr_array

from tghmoe_jax.errors import UserError
from tghmoe_jax.scans.volume import Volume

# Centre and width in HU, as radiologists name them.
WINDOWS: dict[str, tuple[float, float]] = {
    "lung": (-600.0, 1500.0),
    "mediastinum": (40.0, 400.0),
    "bone": (400.0, 1800.0),
    "brain": (40.0, 80.0),
    "full": (0.0, 2000.0),
    "wide": (0.0, 2048.0),
    "soft_tissue": (40.0, 350.0),
}
CHANNELS = {
    "windows3": ("lung", "mediastinum", "bone"),
    "medgemma": ("wide", "soft_tissue", "brain"),  # of MedGemma 1.5's published CT notebook
}

AIR = {"HU": -1000.0, "unit-interval": 0.0}  # what surrounds a slice that is padded to a square
FLOOR_HU = -1024.0  # below lies only what scanners write outside their field of view


@dataclasses.dataclass(frozen=True)
class Prepared:
    """The model's input. slices uint8 (D, S, S, 3); slice_mask bool (D,), False where no slice of the scan stands.

    spacing_mm is (z, y, x) of the resampled grid, None where the source states none; history as in Volume; hu_range is
    the lowest and highest HU of the resampled grid, None where the source holds no HU.
    """

    slices: np.ndarray
    slice_mask: np.ndarray
    spacing_mm: tuple[float, float, float] | None
    history: tuple[str, ...]
    hu_range: tuple[int, int] | None = None


# -------------------------------------------------------------------------------------------------------- windows


def window_names(channels: str) -> tuple[str, str, str]:
    """The windows of the three channels: a name of `CHANNELS`, `repeat:<window>`, or `repeat` for `repeat:full`."""
    if channels in CHANNELS:
        return CHANNELS[channels]
    mode, colon, name = channels.partition(":")
    name = name if colon else "full"
    if mode != "repeat" or name not in WINDOWS:
        raise UserError(
            f"channels={channels!r} is unknown: use {', '.join(CHANNELS)} or repeat:<window> with one of "
            f"{', '.join(WINDOWS)}."
        )
    return (name, name, name)


@functools.cache
def window_table(windows: tuple[str, str, str]) -> np.ndarray:
    """uint8 (65536, 3): the channels of every int16 HU, found by its unsigned bits: faster than arithmetic."""
    hu = np.arange(2**16, dtype=np.uint16).view(np.int16)
    columns = []
    for centre, width in (WINDOWS[name] for name in windows):
        scaled = (hu.astype(np.float32) - np.float32(centre - width / 2)) * np.float32(255 / width)
        columns.append(np.rint(np.clip(scaled, 0, 255)).astype(np.uint8))
    return np.stack(columns, -1)


def to_channels(values: np.ndarray, channels: str = "windows3", out: np.ndarray | None = None) -> np.ndarray:
    """Whole values (..., D, H, W) to uint8 (..., D, H, W, 3), written into `out` where one is given.

    int16 is HU: each window spans 0 to 255, ends clipped. uint8 was windowed by its source and fills all three alike.
    This is the only way from values to what the tower sees, in training and prediction. ValueError for another dtype.
    """
    windows = window_names(channels)
    out = np.empty((*values.shape, 3), np.uint8) if out is None else out
    if values.dtype == np.uint8:
        for channel in range(3):  # five times as fast as one assignment
            out[..., channel] = values
    elif values.dtype == np.int16:  # row i of the table belongs to the HU whose unsigned bits are i
        np.take(window_table(windows), values.view(np.uint16), axis=0, out=out, mode="clip")
    else:
        raise ValueError(f"channels are made of int16 HU or uint8, not of {values.dtype}")
    return out


# ------------------------------------------------------------------------------------------------------ resampling


def resample(volume: Volume, slices: int, size: int) -> Volume:
    """To min(N, slices) slices of size x size pixels, the square (in mm) padded with air around the centre.

    Linear with half-pixel centres; where an axis shrinks, the kernel widens by the same factor (anti-aliasing), as
    Pillow's BILINEAR and jax.image.resize do. Depth is never invented: fewer slices stay as they are. Computed in
    float64 slice by slice, a function of the canonical volume alone.
    """
    count, rows, columns = volume.array.shape
    axes = target_axes(volume.array.shape, volume.spacing_mm, slices, size)
    weights = [_weights(n, target, length) for n, (target, length) in zip(volume.array.shape, axes, strict=True)]
    array = _apply(volume, *weights)
    dz, dy, dx = volume.spacing_mm or (1.0, 1.0, 1.0)
    side = max(rows * dy, columns * dx)
    history = [
        f"{rows} x {columns} padded to a square of {'pixels' if volume.spacing_mm is None else f'{side:.1f} mm'}"
    ]
    history.append(f"resampled in plane to {size} x {size}, linear, anti-aliased")
    spacing = None if volume.spacing_mm is None else (dz, side / size, side / size)
    if count > slices:
        history.append(f"{count} slices resampled to {slices}, linear, anti-aliased")
        spacing = spacing and (dz * count / slices, *spacing[1:])
    history = (*volume.history, *history)
    return dataclasses.replace(volume, array=array, spacing_mm=spacing, history=history, affine=None)


def nearest(array: np.ndarray, spacing_mm: tuple[float, float, float] | None, slices: int, size: int) -> np.ndarray:
    """Labels (N, H, W) on the grid that `resample` gives a volume of this spacing: each the label of the voxel at its
    centre, 0 in the padding. Labels are never interpolated."""
    for axis, (target, length) in enumerate(target_axes(array.shape, spacing_mm, slices, size)):
        source = array.shape[axis]
        place = np.floor((np.arange(target) + 0.5) * length / target - (length - source) / 2).astype(int)
        taken = np.take(array, np.clip(place, 0, source - 1), axis)
        beyond = (place < 0) | (place >= source)
        taken[(slice(None),) * axis + (beyond,)] = 0
        array = taken
    return array


def target_axes(
    shape: tuple[int, int, int], spacing_mm: tuple[float, float, float] | None, slices: int, size: int
) -> list[tuple[int, float]]:
    """For each axis of a volume of `shape`: the length of the model's grid, and how many voxels it spans about the
    volume's centre."""
    count, rows, columns = shape
    _, dy, dx = spacing_mm or (1.0, 1.0, 1.0)
    high, wide = rows * dy, columns * dx
    side = max(high, wide)
    # Rounding of a header must not turn a square into an almost-square: below 1e-4 the two sides are equal.
    return [
        (min(slices, count), count),
        (size, rows if side - high <= 1e-4 * side else side / dy),
        (size, columns if side - wide <= 1e-4 * side else side / dx),
    ]


def voxel_edges(volume: Volume, slices: int, size: int, box: np.ndarray) -> np.ndarray:
    """Edges float64 (3, 2), low and high of each axis, of a box of the model's grid of `slices` and `size`, in voxels
    of the volume that it was resampled from. Edge 0 is the outer side of voxel 0; what lies in padding is cut off."""
    axes = target_axes(volume.array.shape, volume.spacing_mm, slices, size)
    scale = np.array([[length / target] for target, length in axes])
    shape = np.array(volume.array.shape, float)[:, None]
    pad = (np.array([[length] for _, length in axes]) - shape) / 2
    return np.clip(np.asarray(box, float) * scale - pad, 0, shape)


def _apply(volume: Volume, depth: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """float32 (D', H', W') of the weights (D', D), (H', H) and (W', W), in float64, one target slice at a time.

    Depth goes first: it leaves the fewest values. Weights sum to less than one where the kernel reaches into the
    padding; the rest is air. Sparse products rather than BLAS, whose bits depend on the processor.
    """
    air = AIR[volume.unit]
    rows, columns = csr_array(rows), csr_array(columns)
    out = np.empty((len(depth), rows.shape[0], columns.shape[0]), np.float32)
    plane, part = (np.empty(volume.array.shape[1:], np.float64) for _ in range(2))
    for target, weights in enumerate(depth):
        plane.fill(0.0)
        for index in np.flatnonzero(weights):
            np.copyto(part, volume.array[index])
            if volume.unit == "HU":
                np.maximum(part, FLOOR_HU, out=part)
            part -= air
            part *= weights[index]
            plane += part
        out[target] = (columns @ np.ascontiguousarray((rows @ plane).T)).T + air
    return out


def _weights(source: int, target: int, length: float) -> np.ndarray:
    """Linear resampling weights float64 (target, source).

    The target spans `length` source pixels around the centre of the source. What of it lies beyond the source is
    padding and takes its share of the weight, so rows sum to one or less; without padding they sum to one.
    """
    pad = (length - source) / 2
    scale = length / target
    support = max(scale, 1.0)
    beyond = int(np.ceil(pad + support)) if pad > 0 else 0
    centres = (np.arange(target) + 0.5) * scale - pad
    pixels = np.arange(-beyond, source + beyond) + 0.5
    kernel = np.maximum(0.0, 1 - np.abs(pixels - centres[:, None]) / support)
    return (kernel / kernel.sum(axis=1, keepdims=True))[:, beyond : beyond + source]


# ------------------------------------------------------------------------------------------------ the model's input


@dataclasses.dataclass(frozen=True)
class Grid:
    """A volume on the model's grid: values (N, S, S), int16 HU or uint8 of the unit interval.

    spacing_mm is (z, y, x), None where the source states none; history and orientation as in Volume. `labels` uint16
    (N, S, S) are those of its mask, None where the data set has none.
    """

    values: np.ndarray
    spacing_mm: tuple[float, float, float] | None
    history: tuple[str, ...]
    orientation: str = "as stored"
    labels: np.ndarray | None = None

    @property
    def hu_range(self) -> tuple[int, int] | None:
        """The lowest and highest HU; None where the source holds no HU."""
        return (int(self.values.min()), int(self.values.max())) if self.values.dtype == np.int16 else None

    def slices(self, count: int, channels: str) -> tuple[np.ndarray, np.ndarray]:
        """The model's slices uint8 (D, S, S, 3), zero at the end, and the mask bool (D,) of real ones; D = `count`."""
        real, size = self.values.shape[:2]
        out = np.zeros((count, size, size, 3), np.uint8)
        to_channels(self.values, channels, out[:real])
        return out, np.arange(count) < real


def to_grid(volume: Volume, slices: int, size: int) -> Grid:
    """A canonical volume resampled and rounded: HU to int16, the unit interval to uint8."""
    grid = resample(volume, slices, size)
    if volume.unit == "HU":
        values = np.clip(np.rint(grid.array), -(2**15), 2**15 - 1).astype(np.int16)
    else:
        values = np.rint(np.clip(grid.array, 0, 1) * 255).astype(np.uint8)
    return Grid(values, grid.spacing_mm, grid.history, grid.orientation)


def prepare_slices(volume: Volume, slices: int, size: int, channels: str = "windows3") -> Prepared:
    """The model's slices of a scan: resampled, rounded, windowed, padded at the end with masked zero slices.

    `channels` names HU windows; values of a unit interval were windowed by their source and fill all three alike.
    """
    grid = to_grid(volume, slices, size)
    out, mask = grid.slices(slices, channels)
    if grid.hu_range is None:
        note = "no HU window: values of the unit interval in all three channels"
    else:
        note = f"HU windows {', '.join(window_names(channels))}"
    missing = slices - int(mask.sum())
    notes = [note, f"{missing} slices masked, none invented"] if missing else [note]
    return Prepared(out, mask, grid.spacing_mm, (*grid.history, *notes), grid.hu_range)
