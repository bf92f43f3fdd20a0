"""NIfTI scans (.nii, .nii.gz) to canonical volumes in HU.

Voxels are read slab by slab through nibabel's array proxy, straight into their canonical place, so a scan is never held
twice. Extensions and free text of the header are never read: they may hold the patient's name.
"""

import contextlib
import dataclasses
import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import nibabel as nib
import numpy as np

from tghmoe_jax.errors import UserError
from tghmoe_jax.scans.bounds import MAX_PACKING, check_stored_size, plain_file
from tghmoe_jax.scans.hounsfield import check_hu
from tghmoe_jax.scans.volume import Volume, canonical_grid, check_canonical_shape, check_shape

_TO_MM = {"mm": 1.0, "unknown": 1.0, "meter": 1000.0, "micron": 0.001}
_RAS_TO_LPS = np.array([-1.0, -1.0, 1.0])
_BROKEN = (OSError, EOFError, ValueError, zlib.error)
_KINDS = {348: (nib.Nifti1Header, 352), 540: (nib.Nifti2Header, 544)}  # by size; the least offset of the voxels
_SINGLE, _PAIRED = (b"n+1", b"n+2"), (b"ni1", b"ni2")
MAX_OFFSET = 2**24  # what lies between header and voxels: extensions, never more than some kilobytes
_CHUNK = 2**22
GZIP = b"\x1f\x8b"
_TRAILING = 2**12  # writers may round the end of a file; a plane more than the header states is damage


def read_nifti(path: Path, assume_hu: bool = False) -> Volume:
    """Read one NIfTI file. The header's scl_slope and scl_inter are applied once, in float64; the result must be HU.

    The sform is used where its code is set, else the qform. Raises UserError for what is not a 3D CT scan with an
    orientation and a spacing, for a sform and a qform that differ by a flip, another order of axes or 30 degrees, and
    for sizes that the file cannot hold; smaller differences of the two forms are warnings of the volume. `assume_hu`:
    values that do not look like HU are read with a warning.
    """
    with open_nifti(path) as stored:
        grid = canonical_grid(stored.axes, str(path))
        check_canonical_shape(grid.shape(stored.shape), str(path))
        array = np.empty(grid.shape(stored.shape), np.float32)
        view = grid.as_stored(array)
        for first, part in stored.slabs():
            with np.errstate(over="ignore"):  # what is not a number is refused with the volume
                view[..., first : first + part.shape[-1]] = part
    warnings = stored.warnings + check_hu(array, str(path), assume_hu)
    sizes = " x ".join(str(n) for n in stored.shape)
    history = (
        f"NIfTI, {sizes} {stored.dtype}, spacing from the affine",
        f"HU as stored, scl_slope {stored.slope:g} and scl_inter {stored.inter:g} applied once",
        *grid.notes,
    )
    affine = grid.affine(stored.origin, stored.shape)
    return Volume(array, "HU", grid.spacing_mm, "LPS", None, history, warnings, affine)


# --------------------------------------------------------------------------------------------------------- opening


@dataclasses.dataclass(frozen=True)
class OpenNifti:
    """An open file whose header was judged: stored shape, dtype and scaling, and where the grid lies.

    axes (3, 3): row i is the step in mm (LPS) of stored axis i; origin (3,) is the position of voxel 0.
    """

    path: Path
    file: BinaryIO
    shape: tuple[int, int, int]
    dtype: np.dtype
    offset: int
    slope: float
    inter: float
    axes: np.ndarray
    origin: np.ndarray
    warnings: tuple[str, ...]

    def slabs(self) -> Iterator[tuple[int, np.ndarray]]:
        """(first plane, scaled values) of some planes of the last axis at a time. UserError for a damaged file."""
        proxy = nib.arrayproxy.ArrayProxy(self.file, (self.shape, self.dtype, self.offset), mmap=False)
        step = max(1, _CHUNK // (self.shape[0] * self.shape[1] * self.dtype.itemsize))
        for first in range(0, self.shape[-1], step):
            with self._damage():
                part = proxy[..., first : first + step]
            with np.errstate(over="ignore", invalid="ignore"):
                plain = (self.slope, self.inter) == (1.0, 0.0)
                yield first, part if plain else part * np.float64(self.slope) + self.inter
        with self._damage():
            rest = len(self.file.read(_TRAILING + 1))  # to the end of the file, where gzip proves its check sum
        if rest >= min(_TRAILING, self.shape[0] * self.shape[1] * self.dtype.itemsize):
            raise UserError(f"{self.path} holds more voxels than its header states: copy or export it again.")

    @contextlib.contextmanager
    def _damage(self) -> Iterator[None]:
        try:
            yield
        except _BROKEN:
            raise UserError(f"{self.path} is cut short or damaged: copy or export it again.") from None


@contextlib.contextmanager
def open_nifti(path: Path, most_packing: int = MAX_PACKING) -> Iterator[OpenNifti]:
    """A file, unpacked where its content (not its name) is gzip, by `most_packing` at most. UserError for a bad header.

    No memory is taken for voxels that the file cannot hold.
    """
    size = path.stat().st_size
    if size == 0:
        raise UserError(f"{path} is an empty file: copy or export it again.")
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(plain_file(path))
        start = file.read(2**16)
        packed = start[:2] == GZIP
        if packed and not _unpacks(start):
            raise UserError(f"{path} is not a NIfTI file: name a .nii or .nii.gz scan, or a DICOM folder.")
        file.seek(0)
        file = stack.enter_context(gzip.GzipFile(fileobj=file)) if packed else file
        header, least = _header(file, path)
        shape, dtype = _shape(header, path), _dtype(header, path)
        axes, origin, warnings = _placement(header, path)
        slope, inter = _scaling(header, path)
        offset = float(header["vox_offset"])
        if not least <= offset <= MAX_OFFSET:
            raise UserError(f"{path} states that its voxels start at byte {offset:g}: copy or export it again.")
        stated = int(offset) + int(np.prod(shape)) * dtype.itemsize
        check_stored_size(stated, size, packed, str(path), most_packing)
        yield OpenNifti(path, file, shape, dtype, int(offset), slope, inter, axes, origin, warnings)


# ---------------------------------------------------------------------------------------------------------- header


def _unpacks(start: bytes) -> bool:
    """Whether the start of a gzip file holds data: a name without end or empty parts would be read byte by byte."""
    try:
        return bool(zlib.decompressobj(31).decompress(start, 1))
    except zlib.error:
        return False


def _header(file: BinaryIO, path: Path) -> tuple[nib.Nifti1Header, int]:
    """The header and the least offset of voxels after it. Not nibabel's own checks: they quote the header in logs."""
    try:
        block = file.read(348)
        size = next((n for n in _KINDS for order in ("little", "big") if int.from_bytes(block[:4], order) == n), 348)
        block += file.read(size - 348)
        kind, least = _KINDS[size]
        if block[:2] == GZIP:
            raise UserError(f"{path} is packed twice (gzip in gzip): unpack it once.")
        header = kind(block, check=False)
        magic = bytes(header["magic"].item())[:3]
        if magic in _PAIRED:
            raise UserError(f"{path} is half of a pair (.hdr and .img): save the scan as one .nii or .nii.gz file.")
        if int(header["sizeof_hdr"]) == size and magic in _SINGLE:
            return header, least
    except (*_BROKEN, nib.wrapstruct.WrapStructError) as error:
        if isinstance(error, UserError):
            raise
    raise UserError(f"{path} is not a NIfTI file: name a .nii or .nii.gz scan, or a DICOM folder.")


def _shape(header: nib.Nifti1Header, path: Path) -> tuple[int, ...]:
    dim = [int(n) for n in header["dim"]]
    if not 0 <= dim[0] <= 7:
        raise UserError(f"{path} states {dim[0]} dimensions: copy or export it again.")
    shape = tuple(dim[1 : dim[0] + 1])
    if len(shape) > 3 and set(shape[3:]) == {1}:
        shape = shape[:3]
    check_shape(shape, str(path))
    return shape


def _dtype(header: nib.Nifti1Header, path: Path) -> np.dtype:
    try:
        dtype = header.get_data_dtype()
    except (KeyError, nib.spatialimages.HeaderDataError):
        dtype = None
    if dtype is None or dtype.itemsize == 0:
        code = int(header["datatype"])
        raise UserError(f"{path} states the unknown voxel type {code}: export the scan again, as int16.")
    if dtype.fields is not None or dtype.kind not in "iuf":
        raise UserError(f"{path} holds colours or complex numbers ({dtype}): name the scan itself, in HU.")
    return dtype


def _scaling(header: nib.Nifti1Header, path: Path) -> tuple[float, float]:
    """scl_slope and scl_inter; a slope of 0 means, as the standard has it, that none applies."""
    slope, inter = float(header["scl_slope"]), float(header["scl_inter"])
    if slope == 0 or np.isnan(slope):
        return 1.0, 0.0
    if not (np.isfinite(slope) and np.isfinite(inter)):
        raise UserError(f"{path} states a scaling that is not finite (scl_slope, scl_inter): export the scan again.")
    return slope, inter


def _placement(header: nib.Nifti1Header, path: Path) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """Axes and origin as in `OpenNifti`, and the warnings of a sform and qform that differ."""
    sform, sform_code = header.get_sform(coded=True)
    header["pixdim"][0] = -1 if header["pixdim"][0] < 0 else 1  # so nifti1.h has it; some writers leave 0
    try:
        with np.errstate(all="ignore"):
            qform, qform_code = header.get_qform(coded=True)
    except (ValueError, nib.spatialimages.HeaderDataError):  # a quaternion longer than one, or a negative spacing
        qform, qform_code = None, 0
    if not sform_code > 0 and not qform_code > 0:
        raise UserError(
            f"{path} states no orientation (no valid sform or qform), so left and right are unknown: "
            "convert the scan again from DICOM."
        )
    warnings = ()
    if sform_code > 0 and qform_code > 0 and not _spans(sform) and _spans(qform):
        sform_code, warnings = 0, ("geometry: the sform states no voxel spacing; the qform was used",)
    affine = sform if sform_code > 0 else qform
    if not np.all(np.isfinite(affine)):
        raise UserError(f"{path} has an affine with NaN or infinite entries: convert the scan again from DICOM.")
    if not _spans(affine):
        raise UserError(f"{path} states no voxel spacing (an axis of its affine is 0): convert it again from DICOM.")
    try:
        unit = header.get_xyzt_units()[0]
        scale = _TO_MM[unit]
    except KeyError:
        raise UserError(f"{path} states an unknown unit of length: set its spacing to mm (xyzt_units 2).") from None
    if sform_code > 0 and qform_code > 0:
        warnings = _compared(sform, qform, scale, path)
    if unit == "unknown":
        warnings += ("units: the file states no unit of length (xyzt_units 0); its spacing was read as mm",)
    with np.errstate(over="ignore"):  # a place or a length beyond floats is refused later
        return affine[:3, :3].T * _RAS_TO_LPS * scale, affine[:3, 3] * _RAS_TO_LPS * scale, warnings


def _spans(affine: np.ndarray) -> bool:
    """Whether every axis of an affine has a length."""
    return bool(np.all(np.isfinite(affine)) and np.all(np.any(affine[:3, :3], axis=0)))


def _compared(sform: np.ndarray, qform: np.ndarray, scale: float, path: Path) -> tuple[str, ...]:
    """Refuses two forms that differ by a flip or another order of axes; reports what is more than rounding."""
    if not np.all(np.isfinite(qform)):
        return ("geometry: the qform is not finite; the sform was used",)
    lengths = np.linalg.norm(sform[:3, :3], axis=0), np.linalg.norm(qform[:3, :3], axis=0)
    if not np.all(lengths[1]):
        return ("geometry: the qform states no voxel spacing; the sform was used",)
    cosines = np.sum(sform[:3, :3] / lengths[0] * (qform[:3, :3] / lengths[1]), axis=0)
    angle = float(np.degrees(np.arccos(np.clip(cosines.min(), -1, 1))))
    if angle > 30:
        raise UserError(
            f"{path} states two orientations (sform and qform differ), so left and right are unknown: "
            "convert the scan again from DICOM."
        )
    found = []
    if angle > 0.5:
        found.append(f"by {angle:.1f} degrees")
    spacing = float(np.max(np.abs(lengths[1] / lengths[0] - 1)))
    if spacing > 0.01:
        found.append(f"in voxel size by {100 * spacing:.0f} %")
    shift = float(np.linalg.norm(sform[:3, 3] - qform[:3, 3])) * scale
    if shift > 1:
        found.append(f"in position by {shift:.1f} mm")
    return (f"geometry: sform and qform differ {' and '.join(found)}; the sform was used",) if found else ()
