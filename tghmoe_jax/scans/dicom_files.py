"""Which files of a folder, a DICOMDIR or a single file make a CT series, and the listed tags of each.

Only listed tags are ever parsed; errors name the path the user gave, never a file inside it, a UID or a tag's value.
"""

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pydicom
from pydicom.filereader import read_dataset
from pydicom.uid import (
    CTImageStorage,
    DeflatedExplicitVRLittleEndian,
    EnhancedCTImageStorage,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    LegacyConvertedEnhancedCTImageStorage,
    MediaStorageDirectoryStorage,
)

from tghmoe_jax.errors import UserError
from tghmoe_jax.scans.bounds import POINTER, plain_file
from tghmoe_jax.scans.paths import hub_blobs, inside

MAX_FILES = 20_000  # a study, not a disk
MAX_INDEX = 2**26  # bytes of a DICOMDIR
_LISTED = 12  # series of one message

# What may differ between two acquisitions of one series, from the plainest on.
ACQUISITION = (
    *("AcquisitionNumber", "TemporalPositionIdentifier", "AcquisitionDateTime", "AcquisitionTime", "ConvolutionKernel"),
    *("KVP", "SliceThickness", "InstanceNumber"),
)
_GEOMETRY = ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "RescaleSlope", "RescaleIntercept")
_HEADER = (
    *_GEOMETRY,
    *("Modality", "SeriesInstanceUID", "SeriesNumber", "Rows", "Columns", "NumberOfFrames", "SamplesPerPixel"),
    *("PhotometricInterpretation", "RescaleType", "ModalityLUTSequence", "PixelPaddingValue", "PixelRepresentation"),
    *("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence", "BitsAllocated", "BitsStored"),
    *("SOPClassUID", *ACQUISITION),
)
# Of images and of what lies beside them (PS3.3, C.7.3.1.1.1).
_MODALITIES = frozenset(
    (
        "CT MR PT NM US CR DX DR MG XA RF OT SC ES GM SM IO PX OP OPT OCT XC BI EC ECG EM FA FS VF LEN LS RG TG ST "
        "BMD BDUS IVUS IVOCT HC PR SR DOC KO SEG REG FID AU TEXTUREMAP STAIN RTIMAGE RTDOSE RTSTRUCT RTPLAN RTRECORD"
    ).split()
)
_CT_IMAGES = (CTImageStorage, EnhancedCTImageStorage, LegacyConvertedEnhancedCTImageStorage)


Series = list[tuple[Path, pydicom.Dataset]]  # files of one series, with their headers


class Study(NamedTuple):
    """The image series under a path, by series number and then UID, and what to warn about."""

    series: list[Series]
    warnings: tuple[str, ...]


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return _indexed(path) if _is_index(path) else [path]
    found: list[Path] = []
    root = path.resolve()
    for folder, folders, names in os.walk(path):
        folders[:] = [name for name in folders if not name.startswith(".")]
        seen = [Path(folder, name) for name in names if not name.startswith(".")]
        linked = [link for name in folders if (link := Path(folder, name)).is_symlink()]
        if not all(_is_walked(link.resolve(), root) for link in linked):
            raise UserError(f"{path} holds a linked folder: copy the files of that folder into {path}.")
        found += [file for file in seen if file.is_file() or file.is_symlink()]
        if len(found) > MAX_FILES:
            raise UserError(f"{path} holds more than {MAX_FILES} files: name the folder of one series.")
    allowed = (root, *hub_blobs(root))
    links = [file.resolve() for file in found if file.is_symlink()]
    if any(not any(map(link.is_relative_to, allowed)) for link in links):
        raise UserError(f"{path} holds a link that leads out of it: copy the files into the folder.")
    return sorted(found)


def _is_walked(folder: Path, root: Path) -> bool:
    """Whether the walk of `root`, which passes over hidden folders, meets this folder under its own name."""
    return folder.is_relative_to(root) and not any(part.startswith(".") for part in folder.relative_to(root).parts)


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


def is_dicom(file: Path) -> bool:
    """Whether a file begins as DICOM does: with a preamble and `DICM`, or, as older programs write, with a tag."""
    with plain_file(file) as stream:
        return bool(_start(stream.read(132)))


def _start(head: bytes) -> str:
    """`DICM`, `tag` for a data set alone, or nothing."""
    if head[128:] == b"DICM":
        return "DICM"
    group, element = head[:2], int.from_bytes(head[2:4], "little")
    # The first tags of an image: of the groups 2 and 8, with a value representation or a length that fits.
    known = group in (b"\2\0", b"\10\0") and element < 0x20
    return "tag" if known and (head[4:6].isalpha() or 0 < int.from_bytes(head[4:8], "little") < 256) else ""


def _meta(file: Path) -> pydicom.Dataset:
    """The file meta group, empty where there is none. It states how the rest is packed."""
    with plain_file(file) as stream:
        if _start(stream.read(132)) != "DICM":
            stream.seek(0)
        return read_dataset(stream, False, True, stop_when=lambda tag, vr, length: tag >> 16 != 2)


def read_tags(file: Path, tags: Sequence[str], **options) -> pydicom.Dataset:
    """The listed tags of a DICOM file, and its transfer syntax. Anything may be raised."""
    with plain_file(file) as stream:
        dataset = pydicom.dcmread(stream, specific_tags=list(tags), force=True, **options)
    if "TransferSyntaxUID" not in dataset.file_meta:
        implicit, little = dataset.original_encoding
        syntax = ImplicitVRLittleEndian if implicit else ExplicitVRLittleEndian if little else ExplicitVRBigEndian
        dataset.file_meta.TransferSyntaxUID = syntax
    return dataset


def _header(file: Path, path: Path) -> pydicom.Dataset | str:
    """The listed tags of an image, or why the file is passed over (reports, indexes and structures carry no image).

    UserError for DICOM that cannot be parsed: the slice would be missing.
    """
    if not file.exists():
        return "lead nowhere"
    with plain_file(file) as stream:
        head = stream.read(132)
    if not any(head):
        return "are empty" if not head else "are zeros"
    if not _start(head):
        return "are Git LFS pointers" if head.startswith(POINTER) else "are not DICOM"
    try:
        meta = _meta(file)
        deflated = tag(meta, "TransferSyntaxUID") == DeflatedExplicitVRLittleEndian
        if not deflated:
            header = read_tags(file, _HEADER, stop_before_pixels=True)
            if tag(header, "Rows") and tag(header, "Columns"):
                return header
            if (tag(meta, "MediaStorageSOPClassUID") or tag(header, "SOPClassUID")) not in _CT_IMAGES:
                return "hold no image"
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


def study_at(path: Path) -> Study:
    """The image series under a folder, a DICOMDIR or a file. UserError where there is none."""
    groups: dict[tuple, Series] = {}
    passed: Counter[str] = Counter()
    files = _files(path)
    for file in files:
        header = _header(file, path)
        if isinstance(header, str):
            passed[header] += 1
        else:
            number = str(tag(header, "SeriesNumber") or "")
            key = (int(number) if number.isdecimal() else -1, str(tag(header, "SeriesInstanceUID") or ""))
            groups.setdefault(key, []).append((file, header))
    if not groups:
        if path.is_file():
            raise UserError(f"{path} is not a DICOM image with pixels: name a CT scan.")
        what = "is an empty folder"
        if files:
            what = f"holds no DICOM image with pixels ({_reasons(passed)})"
        raise UserError(f"{path} {what}: name the folder of one CT series, or a .nii or .nii.gz file.")
    return Study([groups[key] for key in sorted(groups)], _counts(passed, len(files)))


def _counts(passed: Counter[str], files: int) -> tuple[str, ...]:
    """A warning of files that may be slices: a series that is short at one end shows no gap."""
    if not passed - Counter({"hold no image": passed["hold no image"]}):
        return ()
    return (f"files: {passed.total()} of {files} passed over ({_reasons(passed)}); check that no slice is missing",)


def _reasons(passed: Counter[str]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in sorted(passed.items()))


def check_ct(series: Series, path: Path) -> None:
    """UserError where a series holds other images than CT."""
    modalities = sorted({_modality(header) for _, header in series})
    if modalities != ["CT"]:
        raise UserError(f"{path} holds {' and '.join(modalities)} images, not CT: name a CT series.")


def _modality(header: pydicom.Dataset) -> str:
    """The modality code. Only one of the standard's can reach a message: in place of a code a name may stand there."""
    value = str(tag(header, "Modality") or "")
    return value if value in _MODALITIES else "unnamed"


def listed(series: list[Series]) -> str:
    """The series with their numbers, the first of many."""
    rest = [f"and {len(series) - _LISTED} more"] if len(series) > _LISTED else []
    return "; ".join([f"{index}: {summary(group)}" for index, group in enumerate(series[:_LISTED], 1)] + rest)


def summary(group: Series) -> str:
    """What distinguishes series without their descriptions, which may hold patient data."""
    first = group[0][1]
    count = sum(frames_of(header) or 1 for _, header in group)
    rows, columns = whole(first, "Rows"), whole(first, "Columns")
    size = f"{rows} x {columns}" if rows and columns else "unknown size"
    return f"{_modality(first)}, {size}, {count} slice{'s' if count > 1 else ''}"


def frames_of(header: pydicom.Dataset) -> int | None:
    """The number of frames of a multi-frame file, None for a classic one."""
    groups = tag(header, "PerFrameFunctionalGroupsSequence")
    return len(groups) if isinstance(groups, pydicom.Sequence) and groups else None


def whole(header: pydicom.Dataset, keyword: str) -> int | None:
    """A tag that holds one whole number; None where it holds anything else."""
    value = tag(header, keyword)
    return int(value) if isinstance(value, int) else None
