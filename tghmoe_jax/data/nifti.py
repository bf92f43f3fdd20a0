"""NIfTI scans (.nii, .nii.gz) to canonical volumes in HU."""

import gzip
import zlib
from pathlib import Path

import nibabel as nib
import numpy as np

from tghmoe_jax.data.canonical import Volume, canonicalise, check_canonical_shape, check_hu, check_shape
from tghmoe_jax.errors import UserError

_TO_MM = {"mm": 1.0, "unknown": 1.0, "meter": 1000.0, "micron": 0.001}
_RAS_TO_LPS = np.array([-1.0, -1.0, 1.0])
_BROKEN = (OSError, EOFError, ValueError, zlib.error, gzip.BadGzipFile, nib.spatialimages.HeaderDataError)


def read_nifti(path: Path) -> Volume:
    """Read one NIfTI file. The header's scl_slope and scl_inter are applied once, by nibabel; the result must be HU.

    Raises UserError for what is not a 3D CT scan with an orientation and a spacing.
    """
    image = _open(path)
    shape = image.shape[:3] if len(image.shape) > 3 and set(image.shape[3:]) == {1} else image.shape
    check_shape(shape, str(path))
    dtype = image.get_data_dtype()
    if dtype.fields is not None or dtype.kind not in "iuf":
        raise UserError(f"{path} holds colours or complex numbers ({dtype}): name the scan itself, in HU.")
    axes = _axes(image, path)
    slope, inter = (1.0 if value is None else float(value) for value in _stored_scaling(image))
    try:
        array = image.get_fdata(dtype=np.float32, caching="unchanged").reshape(shape)
    except _BROKEN:
        raise UserError(f"{path} is cut short or damaged: copy or export it again.") from None
    array, spacing, notes = canonicalise(array, axes, str(path))
    check_canonical_shape(array.shape, str(path))
    check_hu(array, str(path))
    size = " x ".join(str(n) for n in shape)
    history = (
        f"NIfTI, {size} {dtype}, spacing from the affine",
        f"HU as stored, scl_slope {slope:g} and scl_inter {inter:g} applied once",
        *notes,
    )
    return Volume(array, "HU", spacing, "LPS", None, history)


def _open(path: Path) -> nib.Nifti1Image:
    if path.stat().st_size == 0:
        raise UserError(f"{path} is an empty file: copy or export it again.")
    try:
        # The classes by name: nib.load would also take other formats that hide behind the suffix.
        for kind in (nib.Nifti1Image, nib.Nifti2Image):
            if kind.path_maybe_image(str(path))[0]:
                return kind.from_filename(str(path))
    except (*_BROKEN, nib.filebasedimages.ImageFileError):
        pass
    raise UserError(f"{path} is not a NIfTI file: name a .nii or .nii.gz scan, or a DICOM folder.")


def _stored_scaling(image: nib.Nifti1Image) -> tuple[float | None, float | None]:
    """scl_slope and scl_inter of the file; nibabel blanks them in the header once loaded and keeps them here."""
    return getattr(image.dataobj, "slope", None), getattr(image.dataobj, "inter", None)


def _axes(image: nib.Nifti1Image, path: Path) -> np.ndarray:
    """The world step (LPS, mm) of each stored axis, as rows."""
    header = image.header
    sform, sform_code = header.get_sform(coded=True)
    try:
        qform, qform_code = header.get_qform(coded=True)
    except ValueError:  # a quaternion longer than one
        qform, qform_code = None, 0
    if not sform_code and not qform_code:
        raise UserError(
            f"{path} states no orientation (sform and qform codes are 0), so left and right are unknown: "
            "convert the scan again from DICOM."
        )
    affine = sform if sform_code else qform
    if not np.all(np.isfinite(affine)):
        raise UserError(f"{path} has an affine with NaN or infinite entries: convert the scan again from DICOM.")
    if not np.all(np.any(affine[:3, :3], axis=0)):
        raise UserError(f"{path} states no voxel spacing (an axis of its affine is 0): convert it again from DICOM.")
    scale = _TO_MM[header.get_xyzt_units()[0]]
    axes = affine[:3, :3].T * _RAS_TO_LPS * scale
    if sform_code and qform_code and _disagree(sform, qform):
        raise UserError(
            f"{path} states two orientations (sform and qform differ), so left and right are unknown: "
            "convert the scan again from DICOM."
        )
    return axes


def _disagree(sform: np.ndarray, qform: np.ndarray) -> bool:
    """True where an axis of the two differs by more than 30 degrees: a flip or another order, not rounding."""
    a, b = (form[:3, :3] / np.linalg.norm(form[:3, :3], axis=0) for form in (sform, qform))
    return not np.all(np.sum(a * b, axis=0) > np.cos(np.radians(30)))
