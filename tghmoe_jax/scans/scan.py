"""One scan as the model sees it, with warnings where it differs from what a run was trained on.

Axis legend: D slices of the model, S pixels of a slice.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tghmoe_jax.scans.reading import read_volume
from tghmoe_jax.scans.slices import Prepared, prepare_slices
from tghmoe_jax.scans.volume import Volume


@dataclasses.dataclass(frozen=True)
class Scan:
    """A prepared scan, as the source of one volume that `pipeline.collate` reads. `warnings` are for the user.

    `in_range`: whether it states unit, orientation and spacing and is like the training data (`range_warnings`).
    `read_for` is what it was prepared by and compared with (`reading_of`): another run may need other windows.
    `volume` is the scan as read, where it was to be kept.
    """

    prepared: Prepared
    warnings: tuple[str, ...]
    read_for: tuple = ()
    in_range: bool = True
    volume: Volume | None = None

    def slices(self, index: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Slices uint8 (D, S, S, 3) and the mask bool (D,) of real slices."""
        return self.prepared.slices, self.prepared.slice_mask

    def slice_spacing(self, index: int = 0) -> float:
        """Distance of neighbouring slices in mm, 1.0 where the source states none."""
        return self.prepared.spacing_mm[0] if self.prepared.spacing_mm else 1.0


def reading_of(data: Mapping[str, Any], ranges: Mapping[str, Any] | None) -> tuple:
    """All that `read_scan` takes from a run."""
    return data["slices"], data["size"], data["channels"], ranges


def read_scan(
    path: str | Path, data: Mapping[str, Any], ranges: Mapping[str, Any] | None, series: int | None = None,
    assume_hu: bool = False, keep: bool = False,
) -> Scan:  # fmt: skip
    """Reads, orients, resamples and windows a scan as a config's `data` section states.

    `ranges` is the run's `input_ranges` (see `range_warnings`); `series` and `assume_hu` as in `read_volume`, whose
    UserErrors it raises. With `keep` the volume as read stays with the scan.
    """
    return scan_of(read_volume(path, series, assume_hu), data, ranges, keep)


def scan_of(volume: Volume, data: Mapping[str, Any], ranges: Mapping[str, Any] | None, keep: bool = False) -> Scan:
    """A volume as a config's `data` section states, with what there is to warn of."""
    prepared = prepare_slices(volume, data["slices"], data["size"], data["channels"])
    notes = []
    if volume.unit != "HU":
        notes.append("units: the volume holds no HU, so its values were windowed by the program that wrote it")
    if volume.orientation == "as stored":
        notes.append("orientation: the volume states none, so left and right, front and back may be exchanged")
    outside = range_warnings(prepared, ranges)
    warnings, kept = (*volume.warnings, *notes, *outside), volume if keep else None
    return Scan(prepared, warnings, reading_of(data, ranges), not (notes or outside), kept)


def low_high(values: np.ndarray | Sequence[float]) -> list[float]:
    """The limits of values as `input_ranges` stores them: two decimals."""
    return [round(float(np.min(values)), 2), round(float(np.max(values)), 2)]


def range_warnings(prepared: Prepared, ranges: Mapping[str, Any] | None) -> list[str]:
    """One sentence for each property of the model's input that lies outside the ranges of the training data.

    `ranges`: `spacing_mm` 3 x [low, high], `slices`, `field_of_view_mm` and `hu` [low, high], all of the model's grid.
    """
    if not ranges:
        return ["ranges: the checkpoint stores none, so the scan cannot be compared with its training data"]
    found = []

    def compare(what: str, value: float, limits: tuple[float, float], unit: str) -> None:
        low, high = limits
        slack = 0.005 + 1e-4 * abs(value)  # ranges are stored with two decimals
        if not low - slack <= value <= high + slack:
            seen = f"{low:g}" if low == high else f"{low:g} to {high:g}"
            text = f"{what} {value:.4g}{unit}, outside the {seen}{unit} of the training data"
            if text not in found:  # rows and columns of the model's square pixels say the same
                found.append(text)

    if prepared.spacing_mm is None:
        found.append("spacing: the volume states none, so spacing and field of view cannot be checked")
    else:
        pixels = prepared.slices.shape[1]
        names = ("slices", "pixels", "pixels")
        for name, value, limits in zip(names, prepared.spacing_mm, ranges.get("spacing_mm", ()), strict=False):
            # Those of the scan itself may be much closer, so the sentence says whose they are.
            compare(f"spacing: after resampling for the model, {name} are apart by", value, limits, " mm")
        if "field_of_view_mm" in ranges:
            compare("field of view: a side of", prepared.spacing_mm[1] * pixels, ranges["field_of_view_mm"], " mm")
    if "slices" in ranges:
        compare("slices: a number of", int(prepared.slice_mask.sum()), ranges["slices"], "")
    if prepared.hu_range is not None and "hu" in ranges:
        compare("HU: a lowest value of", prepared.hu_range[0], ranges["hu"], " HU")
        compare("HU: a highest value of", prepared.hu_range[1], ranges["hu"], " HU")
    return found
