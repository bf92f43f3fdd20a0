"""DICOM CT series (a folder, a DICOMDIR, or one enhanced multi-frame file) to canonical volumes in HU.

Only the tags listed here are ever parsed, so no patient data enters the program; errors name the path the user gave and
positions in the stack, never a file inside it (scanners put identifiers into file names), a UID or a tag's value.
"""

import contextlib
import dataclasses
import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pydicom
from pydicom.encaps import generate_frames
from pydicom.filereader import read_dataset
from pydicom.uid import (
    CTImageStorage,
    DeflatedExplicitVRLittleEndian,
    EnhancedCTImageStorage,
    LegacyConvertedEnhancedCTImageStorage,
    MediaStorageDirectoryStorage,
)

from tghmoe_jax.data.bounds import check_stored_size, plain_file
from tghmoe_jax.data.canonical import Volume, canonical_grid, check_canonical_shape, check_hu, check_shape
from tghmoe_jax.data.coded import coded_shape
from tghmoe_jax.data.paths import inside
from tghmoe_jax.errors import UserError

MAX_FILES = 20_000  # a study, not a disk
MAX_INDEX = 2**26  # bytes of a DICOMDIR
MAX_TILT_DEGREES = 1.0
PADDING_HU = -1024.0

_GEOMETRY = ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "RescaleSlope", "RescaleIntercept")
_HEADER = (
    *_GEOMETRY,
    *("Modality", "SeriesInstanceUID", "SeriesNumber", "Rows", "Columns", "NumberOfFrames", "SamplesPerPixel"),
    *("PhotometricInterpretation", "RescaleType", "ModalityLUTSequence", "PixelPaddingValue", "PixelRepresentation"),
    *("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence", "BitsAllocated"),
)
_PIXELS = (
    *("Rows", "Columns", "NumberOfFrames", "SamplesPerPixel", "PhotometricInterpretation", "PixelRepresentation"),
    *("BitsAllocated", "BitsStored", "HighBit", "PlanarConfiguration", "PixelData", "ExtendedOffsetTable"),
    *("ExtendedOffsetTableLengths",),
)
_CT_IMAGES = (CTImageStorage, EnhancedCTImageStorage, LegacyConvertedEnhancedCTImageStorage)
# In an enhanced file each value lives in a functional group, shared or per frame.
_GROUPS = {
    "ImagePositionPatient": "PlanePositionSequence",
    "ImageOrientationPatient": "PlaneOrientationSequence",
    "PixelSpacing": "PixelMeasuresSequence",
    "RescaleSlope": "PixelValueTransformationSequence",
    "RescaleIntercept": "PixelValueTransformationSequence",
    "RescaleType": "PixelValueTransformationSequence",
}


@dataclasses.dataclass(frozen=True)
class _Slice:
    """One image of the stack: where its pixels are, where it lies (LPS, mm) and how it is scaled."""

    file: Path
    frame: int | None
    shape: tuple[int, int]
    position: np.ndarray  # (3,)
    row: np.ndarray  # (3,) unit vector along increasing column index
    column: np.ndarray  # (3,) unit vector along increasing row index
    spacing: tuple[float, float]  # between rows, between columns
    slope: float
    intercept: float
    padding: float | None


def read_dicom(path: Path, series: int | None = None) -> Volume:
    """Read one CT series. `series` counts from 1 in the order that the error for several series lists.

    Rescale slope and intercept are applied once, slice by slice; slices are ordered by their position along the normal
    and the slice spacing is the step between positions. Raises UserError for everything that is not one complete,
    straight, evenly spaced CT series.
    """
    with _quiet():
        return _read(path, series)


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


def _read(path: Path, series: int | None) -> Volume:
    datasets = _choose(_series_of(path), series, path)
    slices = _sorted([entry for file, header in datasets for entry in _slices_of(file, header, path)], path)
    first = slices[0]
    check_shape((len(slices), *first.shape), str(path))
    step = (slices[-1].position - first.position) / max(len(slices) - 1, 1)
    axes = np.stack([step, first.column * first.spacing[0], first.row * first.spacing[1]])
    grid = canonical_grid(axes, str(path))
    shape = grid.shape((len(slices), *first.shape))
    check_canonical_shape(shape, str(path))
    _check_stored(datasets, path)
    array = np.empty(shape, np.float32)
    syntaxes = _fill(grid.as_stored(array), slices, path)
    warnings = check_hu(array, str(path))
    if any(_get(header, "PhotometricInterpretation") == "MONOCHROME1" for _, header in datasets):
        if warnings:
            raise UserError(
                f"{path} is inverted grey (MONOCHROME1) without soft tissue near 0 HU: export the original CT."
            )
        warnings = ("photometric: MONOCHROME1; HU were taken from the stored values, which some programs invert",)
    scales = sorted({(entry.slope, entry.intercept) for entry in slices})
    scale = f"slope {scales[0][0]:g} and intercept {scales[0][1]:g}" if len(scales) == 1 else "the slope of each slice"
    history = (
        f"DICOM, {len(slices)} slices of {first.shape[0]} x {first.shape[1]}, {', '.join(sorted(syntaxes))}",
        f"HU, rescale ({scale}) applied once",
        "slices sorted by position along the normal, spacing from positions",
        *grid.notes,
    )
    return Volume(array, "HU", grid.spacing_mm, "LPS", None, history, warnings)


# ---------------------------------------------------------------------------------------------- files and series


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return _indexed(path) if _is_index(path) else [path]
    found: list[Path] = []
    root = path.resolve()
    for folder, _, names in os.walk(path):
        found += [file for name in names if not name.startswith(".") and (file := Path(folder, name)).is_file()]
        if len(found) > MAX_FILES:
            raise UserError(f"{path} holds more than {MAX_FILES} files: name the folder of one series.")
    if any(file.is_symlink() and not file.resolve().is_relative_to(root) for file in found):
        raise UserError(f"{path} holds a link that leads out of it: copy the files into the folder.")
    return sorted(found)


def _is_index(path: Path) -> bool:
    """Whether a file says that it is a DICOMDIR. One too damaged to say so is refused later, as an image is."""
    try:
        return _get(_meta(path), "MediaStorageSOPClassUID") == MediaStorageDirectoryStorage
    except PermissionError:
        raise
    except Exception:  # noqa: BLE001 - pydicom raises anything, and quotes values
        return False


def _indexed(path: Path) -> list[Path]:
    """The image files that a DICOMDIR lists; its records also hold names of patients, which are not looked at."""
    if path.stat().st_size > MAX_INDEX:
        raise UserError(f"{path} is larger than any index of a medium: name the folder of one series.")
    found = set()
    try:
        for record in _dataset(path, ["DirectoryRecordSequence"]).DirectoryRecordSequence:
            if _get(record, "DirectoryRecordType") == "IMAGE":
                parts = _get(record, "ReferencedFileID")
                found.add("/".join([parts] if isinstance(parts, str) else map(str, parts)))
    except Exception:  # noqa: BLE001 - pydicom raises anything, and quotes values
        raise UserError(f"{path} is a damaged index (DICOMDIR): name the folder of one series instead.") from None
    if not found or len(found) > MAX_FILES:
        raise UserError(f"{path} lists {len(found)} images: name the folder of one series instead.")
    try:
        files = [inside(path.parent, name) for name in sorted(found)]
    except UserError:
        raise UserError(f"{path} lists a file outside of its folder: name the folder of one series instead.") from None
    missing = sum(not file.is_file() for file in files)
    if missing:
        raise UserError(f"{path} lists {missing} files that are not there: copy the whole medium, or name a folder.")
    return files


def _meta(file: Path) -> pydicom.Dataset:
    """The file meta group, empty for what is not DICOM. It tells how the rest is packed before that is unpacked."""
    with plain_file(file) as stream:
        if stream.read(132)[128:] != b"DICM":
            return pydicom.Dataset()
        return read_dataset(stream, False, True, stop_when=lambda tag, vr, length: tag >> 16 != 2)


def _dataset(file: Path, tags: Sequence[str], **options) -> pydicom.Dataset:
    """The listed tags of a DICOM file. Anything may be raised."""
    with plain_file(file) as stream:
        return pydicom.dcmread(stream, specific_tags=list(tags), **options)


def _header(file: Path, path: Path) -> pydicom.Dataset | None:
    """The listed tags of an image; None for what is not DICOM or carries no image (reports, indexes, structures).

    UserError for DICOM that cannot be parsed: the slice would be missing.
    """
    try:
        meta = _meta(file)
        if not meta:
            return None
        deflated = _get(meta, "TransferSyntaxUID") == DeflatedExplicitVRLittleEndian
        if not deflated:
            header = _dataset(file, _HEADER, stop_before_pixels=True)
            if _get(header, "Rows") and _get(header, "Columns"):
                return header
            if _get(meta, "MediaStorageSOPClassUID") not in _CT_IMAGES:
                return None
            raise ValueError("a CT image without a size")
    except PermissionError:
        raise
    except Exception:  # noqa: BLE001 - pydicom raises anything on damaged files, and quotes them
        raise UserError(f"{path} holds a damaged DICOM file that cannot be parsed: copy the series again.") from None
    # pydicom would unpack it without a bound.
    raise UserError(f"{path} holds deflated DICOM files: export the series without deflation.")


def _get(dataset: pydicom.Dataset, keyword: str):
    """A tag's value; None where it is missing or damaged (values are converted on first access)."""
    try:
        return dataset.get(keyword)
    except Exception:  # noqa: BLE001 - as above
        return None


def _series_of(path: Path) -> list[list[tuple[Path, pydicom.Dataset]]]:
    """The image series under the path, in a stable order: by series number, then by UID."""
    groups: dict[tuple, list[tuple[Path, pydicom.Dataset]]] = {}
    files = _files(path)
    for file in files:
        header = _header(file, path)
        if header is not None:
            number = str(_get(header, "SeriesNumber") or "")
            key = (int(number) if number.isdecimal() else -1, str(_get(header, "SeriesInstanceUID") or ""))
            groups.setdefault(key, []).append((file, header))
    if not groups:
        if path.is_file():
            raise UserError(f"{path} is not a DICOM image with pixels: name a CT scan.")
        what = "is an empty folder" if not files else "holds no DICOM image with pixels"
        raise UserError(f"{path} {what}: name the folder of one CT series, or a .nii or .nii.gz file.")
    return [groups[key] for key in sorted(groups)]


def _choose(
    series: list[list[tuple[Path, pydicom.Dataset]]], number: int | None, path: Path
) -> list[tuple[Path, pydicom.Dataset]]:
    listed = "; ".join(f"{index}: {_summary(group)}" for index, group in enumerate(series, 1))
    if number is None and len(series) > 1:
        raise UserError(f"{path} holds {len(series)} series ({listed}): choose one with --series N.")
    if number is not None and not 1 <= number <= len(series):
        raise UserError(f"--series {number} does not exist in {path}: choose among {listed}.")
    chosen = series[(number or 1) - 1]
    modalities = sorted({_modality(header) for _, header in chosen})
    if modalities != ["CT"]:
        raise UserError(f"{path} holds {' and '.join(modalities)} images, not CT: name a CT series.")
    return chosen


def _modality(header: pydicom.Dataset) -> str:
    """The modality code, checked so that nothing but a code of the standard's form can reach a message."""
    value = str(_get(header, "Modality") or "")
    return value if value.isascii() and value.isalnum() and value.isupper() and len(value) <= 16 else "unnamed"


def _summary(group: list[tuple[Path, pydicom.Dataset]]) -> str:
    """What tells series apart without a description, which may hold patient data."""
    first = group[0][1]
    count = sum(_frames(header) or 1 for _, header in group)
    size = f"{_get(first, 'Rows')} x {_get(first, 'Columns')}" if _whole(first, "Rows") else "unknown size"
    return f"{_modality(first)}, {size}, {count} slice{'s' if count > 1 else ''}"


def _frames(header: pydicom.Dataset) -> int | None:
    """The number of frames of a multi-frame file, None for a classic one."""
    groups = _get(header, "PerFrameFunctionalGroupsSequence")
    return len(groups) if isinstance(groups, pydicom.Sequence) and groups else None


def _whole(header: pydicom.Dataset, keyword: str) -> int | None:
    """A tag that holds one whole number; None where it holds anything else."""
    value = _get(header, keyword)
    return int(value) if isinstance(value, int) else None


# ------------------------------------------------------------------------------------------------------- geometry


def _slices_of(file: Path, header: pydicom.Dataset, path: Path) -> list[_Slice]:
    # MONOCHROME1 asks a display to invert the greys. HU are the same function of the stored values, and an export of
    # a display, whose values were inverted themselves, fails the check of HU.
    colour = _get(header, "PhotometricInterpretation") not in ("MONOCHROME1", "MONOCHROME2")
    if colour or _get(header, "SamplesPerPixel") not in (1, None):
        raise UserError(f"{path} holds images in colour: export the original CT series.")
    if _whole(header, "Rows") is None or _whole(header, "Columns") is None:
        raise UserError(f"{path} holds a slice that states no size: export the original CT series.")
    if _get(header, "ModalityLUTSequence"):
        raise UserError(f"{path} scales its pixels by a look-up table: export it with a rescale slope and intercept.")
    frames = _frames(header)
    stated = _get(header, "NumberOfFrames")
    stated = int(stated) if isinstance(stated, int) else 1
    if frames is not None and stated != frames:
        raise UserError(f"{path} states {stated} frames and describes {frames}: export the original CT series.")
    if frames is None and stated != 1:
        raise UserError(f"{path} is a multi-frame image without positions of its frames: export it as single slices.")
    return [_slice(file, header, frame, path) for frame in ([None] if frames is None else range(frames))]


def _slice(file: Path, header: pydicom.Dataset, frame: int | None, path: Path) -> _Slice:
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
    if slope == 0 or min(spacing) <= 0:
        what = "a rescale slope" if slope == 0 else "a pixel spacing"
        raise UserError(f"{path} states {what} that is not positive: export the original CT series.")
    padding = _get(header, "PixelPaddingValue")
    return _Slice(
        file=file,
        frame=frame,
        shape=(int(header.Rows), int(header.Columns)),
        position=position,
        row=row / lengths[0],
        column=column / lengths[1],
        spacing=(float(spacing[0]), float(spacing[1])),
        slope=float(slope),
        intercept=float(intercept),
        padding=float(padding) if isinstance(padding, int) else None,
    )


def _value(header: pydicom.Dataset, frame: int | None, keyword: str):
    """A tag of the file, or of the frame's functional group (its own before the shared one)."""
    if frame is None:
        return _get(header, keyword)
    for groups, index in (("PerFrameFunctionalGroupsSequence", frame), ("SharedFunctionalGroupsSequence", 0)):
        sequence = _get(header, groups)
        holder = (
            _get(sequence[index], _GROUPS[keyword]) if isinstance(sequence, pydicom.Sequence) and sequence else None
        )
        if isinstance(holder, pydicom.Sequence) and holder:
            return _get(holder[0], keyword)
    return None


def _floats(header: pydicom.Dataset, frame: int | None, keyword: str, count: int, path: Path, what: str) -> np.ndarray:
    try:
        value = _value(header, frame, keyword)
        values = np.array([float(part) for part in (np.atleast_1d(value) if value is not None else ())])
    except (TypeError, ValueError):
        values = np.array([])
    if values.shape != (count,) or not np.all(np.isfinite(values)):
        raise UserError(f"{path} holds a slice that states no {what}: export the original CT series.")
    return values


def _sorted(slices: list[_Slice], path: Path) -> list[_Slice]:
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
        raise UserError(f"{path} holds one slice, which is no volume: name the folder of the whole series.")
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
    uneven = np.flatnonzero(np.abs(steps - usual) > max(0.1 * usual, 0.02))
    if uneven.size:
        at = int(uneven[0])
        raise UserError(
            f"{path} misses slices or is unevenly spaced: slices {at + 1} and {at + 2} of {len(ordered)} lie "
            f"{steps[at]:.2f} mm apart where {usual:.2f} mm is usual; export the complete series."
        )
    line = positions[0] + np.linspace(0, 1, len(ordered))[:, None] * (positions[-1] - positions[0])
    aside = positions - line - np.outer((positions - line) @ normal, normal)
    course = positions[-1] - positions[0]
    tilt = np.degrees(np.arccos(min(1.0, abs(course @ normal) / np.linalg.norm(course))))
    if tilt > MAX_TILT_DEGREES:
        raise UserError(
            f"{path} was taken with a gantry tilted by {tilt:.1f} degrees: resample it to a straight grid first."
        )
    if np.max(np.linalg.norm(aside, axis=1)) > max(first.spacing):
        raise UserError(f"{path} holds slices shifted against each other in plane: keep one reconstruction.")
    return ordered


# --------------------------------------------------------------------------------------------------------- pixels


def _check_stored(datasets: list[tuple[Path, pydicom.Dataset]], path: Path) -> None:
    """Refuse headers that state more pixels than their files can hold, before memory is taken for them."""
    stated = size = 0
    for file, header in datasets:
        bits = _whole(header, "BitsAllocated")
        if bits not in (8, 16, 32):
            raise UserError(f"{path} holds a slice of {bits or 'no'} bits a pixel: export the original CT series.")
        stated += (_frames(header) or 1) * _whole(header, "Rows") * _whole(header, "Columns") * bits // 8
        size += file.stat().st_size
    # All are judged as packed: a single slice without its pixels is told with its place in the stack.
    check_stored_size(stated, size, True, str(path))


def _fill(stack: np.ndarray, slices: Sequence[_Slice], path: Path) -> set[str]:
    """Writes the slices in HU into an array (N, H, W), in the order given; the names of the transfer syntaxes met."""
    syntaxes: set[str] = set()
    file, frames = None, np.empty(0)
    for index, entry in enumerate(slices):
        if entry.file != file:
            count = sum(other.file == entry.file for other in slices) if entry.frame is not None else 1
            frames, syntax = _decode(entry, count, f"slice {index + 1} of {len(slices)} in {path}")
            file = entry.file
            syntaxes.add(syntax)
        stored = frames if entry.frame is None else frames[entry.frame : entry.frame + 1]
        if stored.size != stack[index].size:
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
        stack[index] = hu
    return syntaxes


def _decode(entry: _Slice, count: int, what: str) -> tuple[np.ndarray, str]:
    """Stored values of the `count` frames of one file and its transfer syntax; `what` names it in errors."""
    syntax = "unknown encoding"
    try:
        dataset = _dataset(entry.file, _PIXELS)
        uid = dataset.file_meta.TransferSyntaxUID
        syntax = uid.name if uid.is_transfer_syntax and not uid.is_private else syntax
        pixels = None
        if dataset.get("PixelData"):
            if (int(dataset.get("NumberOfFrames") or 1), dataset.Rows, dataset.Columns) != (count, *entry.shape):
                raise ValueError("another size than the header's")
            if uid.is_encapsulated:
                _check_coded(dataset, count, entry.shape)
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
