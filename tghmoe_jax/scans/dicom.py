"""DICOM CT series (a folder, a DICOMDIR, or one enhanced multi-frame file) to canonical volumes in HU.

Only the tags listed here and in dicom_files.py are ever parsed, so no patient data enters the program; errors name the
path the user gave and positions in the stack, never a file inside it (scanners put identifiers into file names), a UID
or a tag's value.
"""

import contextlib
import logging
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pydicom
from pydicom.encaps import generate_frames

from tghmoe_jax.errors import UserError
from tghmoe_jax.scans import acquisitions, stack
from tghmoe_jax.scans.bounds import check_stored_size
from tghmoe_jax.scans.coded import coded_shape
from tghmoe_jax.scans.dicom_files import (
    ACQUISITION,
    Series,
    check_ct,
    frames_of,
    listed,
    read_tags,
    study_at,
    summary,
    tag,
    whole,
)
from tghmoe_jax.scans.hounsfield import check_hu
from tghmoe_jax.scans.volume import Volume, canonical_grid, check_canonical_shape, check_shape

PADDING_HU = -1024.0
_BEYOND = 1e9  # no place, size or scale of a CT comes near

_PIXELS = (
    *("Rows", "Columns", "NumberOfFrames", "SamplesPerPixel", "PhotometricInterpretation", "PixelRepresentation"),
    *("BitsAllocated", "BitsStored", "HighBit", "PlanarConfiguration", "PixelData", "ExtendedOffsetTable"),
    *("ExtendedOffsetTableLengths",),
)
_PLAIN = ("PhotometricInterpretation", "SamplesPerPixel", "BitsAllocated", "BitsStored", "PixelRepresentation")
# In an enhanced file each value lives in a functional group, shared or per frame.
_GROUPS = {
    "ImagePositionPatient": "PlanePositionSequence",
    "ImageOrientationPatient": "PlaneOrientationSequence",
    "PixelSpacing": "PixelMeasuresSequence",
    "RescaleSlope": "PixelValueTransformationSequence",
    "RescaleIntercept": "PixelValueTransformationSequence",
    "RescaleType": "PixelValueTransformationSequence",
    "FrameAcquisitionNumber": "FrameContentSequence",
    "TemporalPositionIndex": "FrameContentSequence",
    "FrameAcquisitionDateTime": "FrameContentSequence",
}
# What a frame calls the tags that tell acquisitions apart.
_OF_FRAMES = {
    "AcquisitionNumber": "FrameAcquisitionNumber",
    "TemporalPositionIdentifier": "TemporalPositionIndex",
    "AcquisitionDateTime": "FrameAcquisitionDateTime",
}


def read_dicom(path: Path, series: int | None = None, assume_hu: bool = False) -> Volume:
    """Read one CT series. `series` counts from 1 in the order that the error for several series lists.

    Rescale slope and intercept are applied once, slice by slice; slices are ordered by their position along the normal
    and the slice spacing is the step between positions. Raises UserError for everything that is not one complete,
    straight, evenly spaced CT series.
    """
    with _quiet():
        return _read(path, series, assume_hu)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """pydicom quotes tag values and file names in its warnings, on reading and again on first access; drop them."""
    logger = logging.getLogger("pydicom")
    before = logger.disabled
    logger.disabled = True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.disabled = before


def read_geometry(path: Path) -> tuple[tuple[int, int, int], np.ndarray, np.ndarray]:
    """Where the grid of one CT series lies, no pixel read: shape, axes (3, 3) whose row i is the step in mm (LPS) of
    stored axis i, and the position (3,) of the first voxel. UserError as `read_dicom`."""
    with _quiet():
        _, slices, _ = _chosen(path, None)
    return (len(slices), *slices[0].shape), stack.axes(slices), slices[0].position


def series_of(path: Path) -> list[tuple[int, str]]:
    """The numbers that `series` of `read_dicom` takes, each with what tells it apart, no description among it.

    A series of several acquisitions stands there as these. UserError as `read_dicom` for what holds no image.
    """
    with _quiet():
        study = study_at(path)
        splits = [_split(group, path)[0] for group in study.series]
        found = [(i, summary(group)) for i, group in enumerate(study.series, 1) if len(splits[i - 1]) < 2]
        parts = [part for split in splits if len(split) > 1 for part in split]
        return found + [(len(splits) + i, f"one acquisition, {len(part)} slices") for i, part in enumerate(parts, 1)]


def _chosen(path: Path, number: int | None) -> tuple[Series, list[stack.Slice], tuple[str, ...]]:
    """The files of one series, or of one of its acquisitions, their slices as a stack, and warnings.

    `number` counts the series from 1 and, behind them, the acquisitions of those that hold several.
    """
    study = study_at(path)
    count = len(study.series)
    if number is None and count > 1:
        alone = all(len(group) == 1 and frames_of(group[0][1]) is None for group in study.series)
        hint = ", as each slice has a UID or number of its own (export them as one)" if alone and count > 3 else ""
        raise UserError(f"{path} holds {count} series{hint} ({listed(study.series)}): choose one with --series N.")
    splits = [_split(group, path) for group in study.series]
    parts = [part for split, _ in splits if len(split) > 1 for part in split]
    if number is not None and not 1 <= number <= count + len(parts):
        raise UserError(f"--series {number} does not exist in {path}: choose among {listed(study.series)}.")
    if number is not None and number > count:
        slices = parts[number - count - 1]
        files = {one.file for one in slices}
        group = [entry for series in study.series for entry in series if entry[0] in files]
        check_ct(group, path)
        return group, stack.sorted_stack(slices, path), study.warnings
    group, (split, by) = study.series[(number or 1) - 1], splits[(number or 1) - 1]
    check_ct(group, path)
    if len(split) > 1:
        first = count + 1 + next(i for i, part in enumerate(parts) if part is split[0])
        choices = "; ".join(f"{first + i}: {len(part)} slices" for i, part in enumerate(split))
        raise UserError(
            f"{path} holds {len(split)} acquisitions in one series, told apart by {by} ({choices}): "
            "choose one with --series N."
        )
    slices = stack.sorted_stack(_slices(group, path), path)
    return (
        group,
        slices,
        (*study.warnings, *acquisitions.doubts(stack.along(slices), [entry.labels for entry in slices])),
    )


def _split(series: Series, path: Path) -> tuple[list[list[stack.Slice]], str]:
    """The slices of each acquisition of a series, and what tells them apart; none of a series that cannot be read."""
    try:
        slices = _slices(series, path)
    except UserError:  # it is told where this series is chosen
        return [], ""
    parts, by = acquisitions.split(stack.along(slices), [entry.labels for entry in slices])
    return [[slices[index] for index in part] for part in parts], by


def _slices(series: Series, path: Path) -> list[stack.Slice]:
    return [entry for file, header in series for entry in _slices_of(file, header, path)]


def _read(path: Path, series: int | None, assume_hu: bool) -> Volume:
    datasets, slices, noted = _chosen(path, series)
    first = slices[0]
    check_shape((len(slices), *first.shape), str(path))
    grid = canonical_grid(stack.axes(slices), str(path))
    shape = grid.shape((len(slices), *first.shape))
    check_canonical_shape(shape, str(path))
    _check_stored(datasets, path)
    array = np.empty(shape, np.float32)
    syntaxes, blank = _fill(stored := grid.as_stored(array), slices, path)
    blank = _cut_off(stored, blank)
    warnings = check_hu(array, str(path), assume_hu)
    if any(tag(header, "PhotometricInterpretation") == "MONOCHROME1" for _, header in datasets):
        if warnings and not assume_hu:
            raise UserError(
                f"{path} is inverted grey (MONOCHROME1) whose values do not lie as HU do: export the original CT."
            )
        warnings += ("photometric: MONOCHROME1; HU were taken from the stored values, which some programs invert",)
    scales = sorted({(entry.slope, entry.intercept) for entry in slices})
    scale = f"slope {scales[0][0]:g} and intercept {scales[0][1]:g}" if len(scales) == 1 else "the slope of each slice"
    history = (
        f"DICOM, {len(slices)} slices of {first.shape[0]} x {first.shape[1]}, {', '.join(sorted(syntaxes))}",
        f"HU, rescale ({scale}) applied once",
        "slices sorted by position along the normal, spacing from positions",
        *grid.notes,
    )
    if blank:
        noted += (
            f"slices: {blank} of {len(slices)} hold one value beside tissue, as files that were copied in part do",
        )
    affine = grid.affine(first.position, (len(slices), *first.shape))
    return Volume(array, "HU", grid.spacing_mm, "LPS", None, history, (*noted, *warnings), affine)


# ------------------------------------------------------------------------------------------------------- geometry


def _slices_of(file: Path, header: pydicom.Dataset, path: Path) -> list[stack.Slice]:
    for keyword in _PLAIN:
        if tag(header, keyword) is None:
            raise UserError(f"{path} holds a slice that states no {keyword}: export the original CT series.")
    # MONOCHROME1 asks a display to invert the greys. HU are the same function of the stored values, and an export of
    # a display, whose values were inverted themselves, fails the check of HU.
    colour = tag(header, "PhotometricInterpretation") not in ("MONOCHROME1", "MONOCHROME2")
    if colour or tag(header, "SamplesPerPixel") != 1:
        raise UserError(f"{path} holds images in colour: export the original CT series.")
    if whole(header, "Rows") is None or whole(header, "Columns") is None:
        raise UserError(f"{path} holds a slice that states no size: export the original CT series.")
    if tag(header, "ModalityLUTSequence"):
        raise UserError(f"{path} scales its pixels by a look-up table: export it with a rescale slope and intercept.")
    frames = frames_of(header)
    stated = tag(header, "NumberOfFrames")
    stated = int(stated) if isinstance(stated, int) else 1
    if frames is not None and stated != frames:
        raise UserError(f"{path} states {stated} frames and describes {frames}: export the original CT series.")
    if frames is None and stated != 1:
        raise UserError(f"{path} is a multi-frame image without positions of its frames: export it as single slices.")
    return [_slice(file, header, frame, path) for frame in ([None] if frames is None else range(frames))]


def _slice(file: Path, header: pydicom.Dataset, frame: int | None, path: Path) -> stack.Slice:
    kind = _value(header, frame, "RescaleType")
    if kind and str(kind).strip() not in ("HU", "HU_MOD"):
        raise UserError(f"{path} is rescaled to another unit than HU: export the original CT series.")
    position = _floats(header, frame, "ImagePositionPatient", 3, path, "slice position")
    orientation = _floats(header, frame, "ImageOrientationPatient", 6, path, "slice orientation")
    spacing = _floats(header, frame, "PixelSpacing", 2, path, "pixel spacing")
    slope = _floats(header, frame, "RescaleSlope", 1, path, "rescale slope, so HU are unknown")[0]
    intercept = _floats(header, frame, "RescaleIntercept", 1, path, "rescale intercept, so HU are unknown")[0]
    row, column = orientation[:3], orientation[3:]
    lengths = np.linalg.norm(row), np.linalg.norm(column)
    if max(abs(length - 1) for length in lengths) > 0.01 or abs(row @ column) > 0.01:
        raise UserError(f"{path} states an orientation that is not two unit vectors at right angles: export it again.")
    if slope <= 0 or min(spacing) <= 0:
        what = "a rescale slope" if slope <= 0 else "a pixel spacing"
        raise UserError(f"{path} states {what} that is not positive: export the original CT series.")
    padding = tag(header, "PixelPaddingValue")
    return stack.Slice(
        file=file,
        frame=frame,
        frames=frames_of(header) or 1,
        shape=(int(header.Rows), int(header.Columns)),
        position=position,
        row=row / lengths[0],
        column=column / lengths[1],
        spacing=(float(spacing[0]), float(spacing[1])),
        slope=float(slope),
        intercept=float(intercept),
        padding=float(padding) if isinstance(padding, int) else None,
        labels={keyword: _label(header, frame, keyword) for keyword in ACQUISITION},
    )


def _label(header: pydicom.Dataset, frame: int | None, keyword: str) -> str:
    value = tag(header, keyword) if frame is None else None
    if frame is not None and keyword in _OF_FRAMES:
        value = _value(header, frame, _OF_FRAMES[keyword])
    return "" if value is None else str(value)


def _value(header: pydicom.Dataset, frame: int | None, keyword: str):
    """A tag of the file, or of the frame's functional group (its own before the shared one)."""
    if frame is None:
        return tag(header, keyword)
    for groups, index in (("PerFrameFunctionalGroupsSequence", frame), ("SharedFunctionalGroupsSequence", 0)):
        sequence = tag(header, groups)
        holder = tag(sequence[index], _GROUPS[keyword]) if isinstance(sequence, pydicom.Sequence) and sequence else None
        if isinstance(holder, pydicom.Sequence) and holder:
            return tag(holder[0], keyword)
    return None


def _floats(header: pydicom.Dataset, frame: int | None, keyword: str, count: int, path: Path, what: str) -> np.ndarray:
    try:
        value = _value(header, frame, keyword)
        values = np.array([float(part) for part in (np.atleast_1d(value) if value is not None else ())])
    except (TypeError, ValueError):
        values = np.array([])
    if values.shape != (count,) or not np.all(np.abs(values) < _BEYOND):  # also where one is NaN
        raise UserError(f"{path} holds a slice that states no {what}: export the original CT series.")
    return values


# --------------------------------------------------------------------------------------------------------- pixels


def _check_stored(datasets: list[tuple[Path, pydicom.Dataset]], path: Path) -> None:
    """Refuse headers that state more pixels than their files can hold, before memory is taken for them."""
    stated = size = 0
    for file, header in datasets:
        bits = whole(header, "BitsAllocated")
        if bits not in (8, 16, 32):
            raise UserError(f"{path} holds a slice of {bits or 'no'} bits a pixel: export the original CT series.")
        stated += (frames_of(header) or 1) * whole(header, "Rows") * whole(header, "Columns") * bits // 8
        size += file.stat().st_size
    # All are judged as packed: a single slice without its pixels is reported with its place in the stack.
    check_stored_size(stated, size, True, str(path))


def _fill(out: np.ndarray, slices: Sequence[stack.Slice], path: Path) -> tuple[set[str], list[int]]:
    """Writes the slices in HU into an array (N, H, W), in the order given.

    Returns the names of the transfer syntaxes met, and which slices hold hardly more than one value.
    """
    syntaxes: set[str] = set()
    blank = []
    file, frames = None, np.empty(0)
    for index, entry in enumerate(slices):
        if entry.file != file:
            frames, syntax = _decode(entry, f"slice {index + 1} of {len(slices)} in {path}")
            file = entry.file
            syntaxes.add(syntax)
        stored = frames if entry.frame is None else frames[entry.frame : entry.frame + 1]
        if stored.size != out[index].size:
            raise UserError(
                f"slice {index + 1} of {len(slices)} in {path} has fewer pixels than it states: copy it again."
            )
        stored = stored.reshape(entry.shape)
        hu = stored * np.float64(entry.slope) + entry.intercept
        if entry.padding is not None:
            padded = entry.padding * entry.slope + entry.intercept
            # Some writers name a tissue value here by mistake; only a value that no tissue has marks the outside.
            if padded < PADDING_HU or padded > 3071:
                hu[stored == entry.padding] = PADDING_HU
        out[index] = hu
        if np.count_nonzero(stored == stored.flat[0]) > 0.99 * stored.size:
            blank.append(index)
    return syntaxes, blank


def _cut_off(stack: np.ndarray, blank: list[int]) -> int:
    """How many blank slices lie in a run at which tissue ends at once; at the border of a body it grows less."""

    def tissue(index: int) -> float:
        return np.count_nonzero(stack[index] > -300) / stack[index].size if 0 <= index < len(stack) else 0.0

    count = 0
    for run in np.split(blank, np.flatnonzero(np.diff(blank) > 1) + 1) if blank else []:
        ends = ((tissue(run[0] - 1), tissue(run[0] - 2)), (tissue(run[-1] + 1), tissue(run[-1] + 2)))
        count += len(run) if any(near > max(0.05, 0.8 * next_) for near, next_ in ends) else 0
    return count


def _decode(entry: stack.Slice, what: str) -> tuple[np.ndarray, str]:
    """Stored values of the frames of one file, and its transfer syntax; `what` names it in errors."""
    syntax = "unknown encoding"
    try:
        dataset = read_tags(entry.file, _PIXELS)
        uid = dataset.file_meta.TransferSyntaxUID
        syntax = uid.name if uid.is_transfer_syntax and not uid.is_private else syntax
        pixels = None
        if dataset.get("PixelData"):
            if (int(dataset.get("NumberOfFrames") or 1), dataset.Rows, dataset.Columns) != (entry.frames, *entry.shape):
                raise ValueError("another size than the header's")
            if uid.is_encapsulated:
                _check_coded(dataset, entry.frames, entry.shape)
            pixels = dataset.pixel_array
    except Exception:  # noqa: BLE001 - decoders raise anything, and their messages may quote the file
        raise UserError(
            f"{what} cannot be decoded ({syntax}): copy it again, or export the series without compression."
        ) from None
    if pixels is None:
        raise UserError(f"{what} has no pixels or is cut short: copy the series again, with its images.")
    return pixels, syntax


def _check_coded(dataset: pydicom.Dataset, count: int, shape: tuple[int, int]) -> None:
    """ValueError where a compressed frame is of another size than the header states: decoders go by the frame."""
    plain = shape[0] * shape[1] * dataset.BitsAllocated // 8
    for frame in generate_frames(dataset.PixelData, number_of_frames=count):
        if len(frame) > 2 * plain + 2**16 or coded_shape(frame) not in (shape, None):
            raise ValueError("a frame of another size")
