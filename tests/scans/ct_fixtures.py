"""Generated scans for the tests: one synthetic patient, written as NIfTI or DICOM in any stored orientation.

Axis legend: D slices toward Superior, H rows toward Posterior, W columns toward Left (the canonical order).

Axes are (3, 3): row i is the world step in mm (LPS) of stored axis i.
"""

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, EnhancedCTImageStorage, ExplicitVRLittleEndian, MediaStorageDirectoryStorage

from tghmoe_jax.errors import UserError
from tghmoe_jax.scans.reading import read_volume
from tghmoe_jax.scans.volume import Volume

REAL = Path(__file__).resolve().parents[3] / "shared" / "data" / "ct"
needs_real = pytest.mark.skipif(not REAL.exists(), reason="no real scans in ../shared/data/ct")

SECRET = "SECRET"  # stands in every identifying tag and file name
UID = "1.2.826.0.1.3680043.8.498.77"
SPACING = (3.0, 1.5, 1.5)
ORIGIN = (-31.5, -250.25, 410.5)


def patient(shape: tuple[int, int, int] = (12, 36, 44)) -> np.ndarray:
    """A body in whole HU int16 (D, H, W), unlike any flip or turn of itself.

    Lungs in the upper half, a spine at the back, a bright marker on the patient's left, a dark one at the front, and a
    value that counts the slices.
    """
    depth, height, width = shape
    z, y, x = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")
    hu = np.full(shape, -1000, np.int16)
    body = (x / 0.9) ** 2 + (y / 0.8) ** 2 < 1
    hu[body] = 40
    for side in (-0.4, 0.4):
        hu[body & (z > 0) & (((x - side) / 0.3) ** 2 + (y / 0.5) ** 2 < 1)] = -850
    hu[body & (x**2 + (y - 0.55) ** 2 < 0.03)] = 700
    hu[body & ((x - 0.65) ** 2 + (y + 0.1) ** 2 < 0.006)] = 1200
    hu[body & ((x + 0.2) ** 2 + (y + 0.6) ** 2 < 0.02)] = -100
    hu[:, height // 2, width // 2] = 100 * np.arange(depth)
    return hu


def axes_of(spacing: tuple[float, float, float] = SPACING) -> np.ndarray:
    """The axes of a canonical array."""
    dz, dy, dx = spacing
    return np.array([[0, 0, dz], [0, dy, 0], [dx, 0, 0]], float)


def turned(
    array: np.ndarray, axes: np.ndarray, origin: tuple, order: tuple[int, ...], flips: tuple[bool, ...]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The same scan stored with its axes permuted, then flipped: array, axes and origin."""
    array, axes, origin = np.transpose(array, order), np.array(axes)[list(order)], np.array(origin, float)
    for axis, flip in enumerate(flips):
        if flip:
            array = np.flip(array, axis)
            origin = origin + axes[axis] * (array.shape[axis] - 1)
            axes[axis] = -axes[axis]
    return array, axes, origin


# ---------------------------------------------------------------------------------------------------------- NIfTI


def affine_of(axes: np.ndarray, origin: tuple = ORIGIN) -> np.ndarray:
    """NIfTI's affine, in RAS, of LPS axes and origin."""
    affine = np.eye(4)
    affine[:3, :3] = np.asarray(axes).T
    affine[:3, 3] = origin
    return np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine


def write_nifti(
    path: Path,
    stored: np.ndarray,
    axes: np.ndarray | None = None,
    origin: tuple = ORIGIN,
    slope: float | None = None,
    inter: float = 0.0,
) -> Path:
    """Write stored values; `slope` and `inter` go into the header without touching the voxels."""
    image = nib.Nifti1Image(stored, affine_of(axes_of() if axes is None else axes, origin))
    image.header.set_xyzt_units("mm")
    if slope is None:
        image.to_filename(path)
        return path
    image.header.set_data_dtype(stored.dtype)
    image.header.set_slope_inter(slope, inter)
    image.header["vox_offset"] = 352
    raw = image.header.copy()
    raw["magic"] = b"n+1"
    raw["scl_slope"], raw["scl_inter"] = slope, inter
    path.write_bytes(raw.binaryblock + b"\0" * 4 + stored.tobytes(order="F"))
    return path


# ---------------------------------------------------------------------------------------------------------- DICOM


def _base(file: Path, storage: str, series: int, number: int) -> FileDataset:
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = storage
    meta.MediaStorageSOPInstanceUID = f"{UID}.{series}.{number}"
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds = FileDataset(file, {}, file_meta=meta, preamble=b"\0" * 128)
    ds.SOPClassUID, ds.SOPInstanceUID = storage, meta.MediaStorageSOPInstanceUID
    ds.PatientName, ds.PatientID, ds.InstitutionName = f"{SECRET}^NAME", f"{SECRET}-ID", f"{SECRET} hospital"
    ds.SeriesDescription, ds.StudyInstanceUID = f"{SECRET} series", f"{UID}.1"
    ds.SeriesInstanceUID, ds.SeriesNumber, ds.Modality = f"{UID}.{series}", series, "CT"
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 16, 15, 0
    return ds


def dicom_slices(
    folder: Path,
    hu: np.ndarray,
    axes: np.ndarray | None = None,
    origin: tuple = ORIGIN,
    slope: float = 1.0,
    intercept: float = -1024.0,
    series: int = 1,
) -> list[FileDataset]:
    """The slices of a stored array (slice, row, column) in its order, not yet saved. Values become unsigned 16 bit."""
    axes = axes_of() if axes is None else np.asarray(axes, float)
    spacing = np.linalg.norm(axes, axis=1)
    stored = np.rint((hu - intercept) / slope).astype(np.uint16)
    folder.mkdir(parents=True, exist_ok=True)
    slices = []
    for index, picture in enumerate(stored):
        # File names run against the positions, and instance numbers at random: neither may order the slices.
        ds = _base(folder / f"CT.{SECRET}.{series}.{len(stored) - index:03d}", CTImageStorage, series, index + 1)
        ds.InstanceNumber = int((index * 7919) % 101) + 1
        ds.Rows, ds.Columns = picture.shape
        ds.ImagePositionPatient = [float(v) for v in np.array(origin) + index * axes[0]]
        ds.ImageOrientationPatient = [float(v) for v in (*(axes[2] / spacing[2]), *(axes[1] / spacing[1]))]
        ds.PixelSpacing = [float(spacing[1]), float(spacing[2])]
        ds.SliceThickness = 5.0  # not the step between slices
        ds.RescaleSlope, ds.RescaleIntercept, ds.RescaleType = slope, intercept, "HU"
        ds.PixelData = picture.tobytes()
        slices.append(ds)
    return slices


def save(slices: list[FileDataset], skip: tuple[int, ...] = ()) -> None:
    """Write slices to their files, but for those skipped."""
    for index, ds in enumerate(slices):
        if index not in skip:
            ds.save_as(ds.filename, enforce_file_format=True)


def write_dicom(folder: Path, hu: np.ndarray | None = None, **options) -> Path:
    """A whole series of the patient (or of `hu`)."""
    save(dicom_slices(folder, patient() if hu is None else hu, **options))
    return folder


def write_enhanced(file: Path, hu: np.ndarray) -> Path:
    """One enhanced multi-frame file: frames in reverse, geometry and rescale in functional groups."""
    axes = axes_of()
    ds = _base(file, EnhancedCTImageStorage, 1, 1)
    shared = Dataset()
    ds.SharedFunctionalGroupsSequence = [shared]
    for holder, values in (
        ("PlaneOrientationSequence", {"ImageOrientationPatient": [1, 0, 0, 0, 1, 0]}),
        ("PixelMeasuresSequence", {"PixelSpacing": [SPACING[1], SPACING[2]], "SliceThickness": 5}),
        ("PixelValueTransformationSequence", {"RescaleSlope": 1, "RescaleIntercept": -1024, "RescaleType": "HU"}),
    ):
        inner = Dataset()
        for keyword, value in values.items():
            setattr(inner, keyword, value)
        setattr(shared, holder, [inner])
    frames = []
    for index in reversed(range(len(hu))):
        inner, group = Dataset(), Dataset()
        inner.ImagePositionPatient = [float(v) for v in np.array(ORIGIN) + index * axes[0]]
        group.PlanePositionSequence = [inner]
        frames.append(group)
    ds.PerFrameFunctionalGroupsSequence = frames
    ds.NumberOfFrames, ds.Rows, ds.Columns = hu.shape
    ds.PixelData = (hu[::-1].astype(np.int32) + 1024).astype(np.uint16).tobytes()
    ds.save_as(file, enforce_file_format=True)
    return file


def write_dicomdir(folder: Path, hu: np.ndarray, names: list[str] | None = None) -> Path:
    """A medium: the series under IMAGES/, and the index DICOMDIR with its patient, study, series and image records.

    `names` replaces the paths that the image records list.
    """
    slices = dicom_slices(folder / "IMAGES", hu)
    for index, ds in enumerate(slices):
        ds.filename = str(folder / "IMAGES" / f"IM{index:04d}")
    save(slices)
    records = []
    for kind in ("PATIENT", "STUDY", "SERIES"):
        record = Dataset()
        record.OffsetOfTheNextDirectoryRecord, record.RecordInUseFlag = 0, 0xFFFF
        record.OffsetOfReferencedLowerLevelDirectoryEntity, record.DirectoryRecordType = 0, kind
        record.PatientName, record.PatientID = f"{SECRET}^NAME", f"{SECRET}-ID"
        records.append(record)
    for name in names if names is not None else [f"IMAGES/IM{index:04d}" for index in range(len(hu))]:
        record = Dataset()
        record.OffsetOfTheNextDirectoryRecord, record.RecordInUseFlag = 0, 0xFFFF
        record.OffsetOfReferencedLowerLevelDirectoryEntity, record.DirectoryRecordType = 0, "IMAGE"
        record.ReferencedFileID = name.split("/")
        records.append(record)
    ds = _base(folder / "DICOMDIR", MediaStorageDirectoryStorage, 1, 1)
    for keyword in ("Rows", "PixelData", "Modality", "SeriesInstanceUID"):
        if keyword in ds:
            delattr(ds, keyword)
    ds.FileSetID, ds.DirectoryRecordSequence = SECRET, records
    ds.save_as(ds.filename, enforce_file_format=True)
    return folder / "DICOMDIR"


# --------------------------------------------------------------------------------------------------------- checks


def refusal(path: Path, **options) -> str:
    """The message with which reading is refused, after the checks that every refusal must pass."""
    with pytest.raises(UserError) as caught:
        read_volume(path, **options)
    message = str(caught.value)
    assert str(path) in message, message
    assert message.endswith(".") and "\n" not in message, message
    assert ":" in message.replace(str(path), ""), f"no mend in: {message}"
    nothing_secret(message)
    assert caught.value.__cause__ is None
    return message


def nothing_secret(text: str) -> None:
    """No patient, institution, description, UID or file inside a folder may be told."""
    assert SECRET not in text and UID not in text, text


def assert_same_volume(one: Volume, other: Volume) -> None:
    np.testing.assert_array_equal(one.array, other.array)
    assert (one.unit, one.spacing_mm, one.orientation) == (other.unit, other.spacing_mm, other.orientation)
