"""Which files of a folder, a DICOMDIR or a single file make a CT series, and the listed tags of each.

Only listed tags are ever parsed; errors name the path the user gave, never a file inside it, a UID or a tag's value.
"""

import os
from collections.abc import Sequence
from pathlib import Path

import pydicom
from pydicom.filereader import read_dataset
from pydicom.uid import (
    CTImageStorage,
    DeflatedExplicitVRLittleEndian,
    EnhancedCTImageStorage,
    LegacyConvertedEnhancedCTImageStorage,
    MediaStorageDirectoryStorage,
)

from tghmoe_jax.errors import UserError
from tghmoe_jax.scans.bounds import plain_file
from tghmoe_jax.scans.paths import inside

MAX_FILES = 20_000  # a study, not a disk
MAX_INDEX = 2**26  # bytes of a DICOMDIR

_GEOMETRY = ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "RescaleSlope", "RescaleIntercept")
_HEADER = (
    *_GEOMETRY,
    *("Modality", "SeriesInstanceUID", "SeriesNumber", "Rows", "Columns", "NumberOfFrames", "SamplesPerPixel"),
    *("PhotometricInterpretation", "RescaleType", "ModalityLUTSequence", "PixelPaddingValue", "PixelRepresentation"),
    *("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence", "BitsAllocated"),
)
_CT_IMAGES = (CTImageStorage, EnhancedCTImageStorage, LegacyConvertedEnhancedCTImageStorage)


def series_at(path: Path, number: int | None) -> list[tuple[Path, pydicom.Dataset]]:
    """The image files of one CT series under the path, with their headers; `number` counts from 1 in the order that the
    error for several series lists. UserError where there is none, or none of several is chosen."""
    return _choose(_series_of(path), number, path)


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
    """Whether a file is a DICOMDIR. One too damaged to be recognised is refused later, as an image is."""
    try:
        return tag(_meta(path), "MediaStorageSOPClassUID") == MediaStorageDirectoryStorage
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
        for record in read_tags(path, ["DirectoryRecordSequence"]).DirectoryRecordSequence:
            if tag(record, "DirectoryRecordType") == "IMAGE":
                parts = tag(record, "ReferencedFileID")
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
    """The file meta group, empty for what is not DICOM. It states how the rest is packed."""
    with plain_file(file) as stream:
        if stream.read(132)[128:] != b"DICM":
            return pydicom.Dataset()
        return read_dataset(stream, False, True, stop_when=lambda tag, vr, length: tag >> 16 != 2)


def read_tags(file: Path, tags: Sequence[str], **options) -> pydicom.Dataset:
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
        deflated = tag(meta, "TransferSyntaxUID") == DeflatedExplicitVRLittleEndian
        if not deflated:
            header = read_tags(file, _HEADER, stop_before_pixels=True)
            if tag(header, "Rows") and tag(header, "Columns"):
                return header
            if tag(meta, "MediaStorageSOPClassUID") not in _CT_IMAGES:
                return None
            raise ValueError("a CT image without a size")
    except PermissionError:
        raise
    except Exception:  # noqa: BLE001 - pydicom raises anything on damaged files, and quotes them
        raise UserError(f"{path} holds a damaged DICOM file that cannot be parsed: copy the series again.") from None
    # pydicom would unpack it without a bound.
    raise UserError(f"{path} holds deflated DICOM files: export the series without deflation.")


def tag(dataset: pydicom.Dataset, keyword: str):
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
            number = str(tag(header, "SeriesNumber") or "")
            key = (int(number) if number.isdecimal() else -1, str(tag(header, "SeriesInstanceUID") or ""))
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
    value = str(tag(header, "Modality") or "")
    return value if value.isascii() and value.isalnum() and value.isupper() and len(value) <= 16 else "unnamed"


def _summary(group: list[tuple[Path, pydicom.Dataset]]) -> str:
    """What distinguishes series without their descriptions, which may hold patient data."""
    first = group[0][1]
    count = sum(frames_of(header) or 1 for _, header in group)
    size = f"{tag(first, 'Rows')} x {tag(first, 'Columns')}" if whole(first, "Rows") else "unknown size"
    return f"{_modality(first)}, {size}, {count} slice{'s' if count > 1 else ''}"


def frames_of(header: pydicom.Dataset) -> int | None:
    """The number of frames of a multi-frame file, None for a classic one."""
    groups = tag(header, "PerFrameFunctionalGroupsSequence")
    return len(groups) if isinstance(groups, pydicom.Sequence) and groups else None


def whole(header: pydicom.Dataset, keyword: str) -> int | None:
    """A tag that holds one whole number; None where it holds anything else."""
    value = tag(header, keyword)
    return int(value) if isinstance(value, int) else None
