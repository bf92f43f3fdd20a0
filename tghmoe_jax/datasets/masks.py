"""Segmentation masks on the grid of a scan: label values as stored, in the canonical orientation, never interpolated.

Axis legend: D slices toward Superior, H rows toward Posterior, W columns toward Left.
"""

import dataclasses
import itertools
import warnings
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom

from tghmoe_jax.datasets.index_files import read_csv, read_json, text_fault
from tghmoe_jax.datasets.items import Rejected
from tghmoe_jax.errors import UserError
from tghmoe_jax.scans.volume import canonicalise, check_shape

MAX_LABEL = 4095  # values of published label sets stay far below; more is a scan, not a mask
MAX_LABEL_FILE = 2**20
DEFLATE = 1032  # bytes that deflate can make of one; masks come near it
VALUE_COLUMNS = ("value", "label", "id", "index")
_TO_MM = {"mm": 1.0, "unknown": 1.0, "meter": 1000.0, "micron": 0.001}
_RAS_TO_LPS = np.array([-1.0, -1.0, 1.0])
_BROKEN = (OSError, EOFError, ValueError, nib.filebasedimages.ImageFileError, nib.spatialimages.HeaderDataError)


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where a grid lies: stored shape, the step of each stored axis (rows, LPS, mm) and the position of voxel 0."""

    shape: tuple[int, int, int]
    axes: np.ndarray
    origin: np.ndarray

    def differs(self, other: "Placement") -> bool:
        """Whether two grids do not hold the same voxels; their axes may be stored in another order or direction."""
        if sorted(self.shape) != sorted(other.shape):
            return True
        apart = np.linalg.norm(self._corners()[:, None] - other._corners()[None], axis=-1)
        return bool(np.max(np.min(apart, axis=1)) > 0.1 * min(np.linalg.norm(self.axes, axis=1)))

    def _corners(self) -> np.ndarray:
        """The positions of the eight corner voxels, (8, 3)."""
        ends = np.array(list(itertools.product(*((0, n - 1) for n in self.shape))))
        return self.origin + ends @ self.axes


@dataclasses.dataclass(frozen=True)
class LabelMap:
    """array uint16 (D, H, W) of label values, spacing_mm (z, y, x), names of the values that are labels."""

    array: np.ndarray
    spacing_mm: tuple[float, float, float]
    names: dict[int, str]


def read_mask(scan: Path, mask: Path, labels: Path | None) -> LabelMap:
    """The mask of a scan: one label map with a table of names, or a folder of binary masks named by their structure.

    UserError for a mask on another grid than the scan's, for values that are no labels, and for one the table lacks.
    """
    frame = frame_of(scan)
    if not mask.is_dir():
        if labels is None:
            raise UserError(f"{mask} has no table of label names: name one as its labels.")
        names = read_labels(labels)
        array, spacing = _canonical(*_stored(mask, scan, frame), mask)
        unknown = sorted(set(np.flatnonzero(np.bincount(array.ravel())).tolist()) - {0, *names})
        if unknown:
            raise UserError(f"{mask} holds the label {unknown[0]}, which {labels} does not name: add it to the table.")
        return LabelMap(array, spacing, names)
    files = sorted(path for path in mask.iterdir() if path.name.endswith((".nii", ".nii.gz")))
    if not files or len(files) > MAX_LABEL:
        raise UserError(f"{mask} holds {len(files)} masks: name the folder of one scan's .nii.gz masks.")
    names = {value: _name(path.name.partition(".nii")[0], mask) for value, path in enumerate(files, 1)}
    # Masks stored alike (all of a scan, as a rule) are put together before the one turn to the canonical order.
    layouts: dict[tuple, tuple[np.ndarray, Placement]] = {}
    for value, path in enumerate(files, 1):
        stored, own = _stored(path, scan, frame)
        together, _ = layouts.setdefault((own.shape, own.axes.tobytes()), (np.zeros(own.shape, np.uint16), own))
        together[stored > 0] = value
    turned = [_canonical(together, own, mask) for together, own in layouts.values()]
    return LabelMap(np.maximum.reduce([array for array, _ in turned]), turned[0][1], names)


def read_labels(path: Path) -> dict[int, str]:
    """Names by value, of a JSON object (either way round) or a CSV with columns `value` and `name`; 0 is left out."""
    if not path.is_file():
        raise UserError(f"{path} does not exist: name the table of label names, JSON or CSV.")
    if path.suffix.lower() == ".csv":
        bad: list[Rejected] = []
        rows = [row for _, row in read_csv(path, ("name",), bad)]
        column = next((column for column in VALUE_COLUMNS if rows and column in rows[0]), None)
        if bad or column is None:
            raise UserError(f"{path} is no table of label names: it needs the columns value and name in every row.")
        pairs = [(row[column], row["name"]) for row in rows]
    else:
        table = read_json(path, MAX_LABEL_FILE)
        if not isinstance(table, dict) or not table:
            raise UserError(f"{path} is no table of label names: write a JSON object of value and name.")
        pairs = [(value, name) if _is_value(value) else (name, value) for value, name in table.items()]
    names: dict[int, str] = {}
    for value, name in pairs:
        if not _is_value(value) or not isinstance(name, str):
            raise UserError(f"{path} pairs a name with no whole number from 0 to {MAX_LABEL}: correct the table.")
        if int(value) in names:
            raise UserError(f"{path} names the label {int(value)} twice: keep one name.")
        names[int(value)] = _name(name, path)
    names.pop(0, None)
    if len(set(names.values())) != len(names) or not names:
        raise UserError(f"{path} gives one name to two labels, or none at all: name every structure once.")
    return names


def frame_of(scan: Path) -> Placement:
    """Where the grid of a NIfTI file or of a folder of one DICOM series lies; no voxel is read."""
    if scan.is_dir():
        return _dicom_frame(scan)
    if not scan.name.endswith((".nii", ".nii.gz")):
        raise UserError(
            f"{scan} states no position of its voxels, so no mask fits it: give the scan as NIfTI or DICOM."
        )
    return _nifti_frame(_open(scan), scan)


def _is_value(value) -> bool:
    text = str(value).strip()
    return text.isascii() and text.isdigit() and int(text[:6]) <= MAX_LABEL


def _name(name: str, where: Path) -> str:
    if text_fault(name, "name") or len(name) > 60:
        raise UserError(f"{where} holds a label name that is empty, too long or no plain text: correct it.")
    return name.strip()


def _open(path: Path) -> nib.Nifti1Image:
    if not path.is_file():
        raise UserError(f"{path} does not exist: name a .nii or .nii.gz file.")
    try:
        for kind in (nib.Nifti1Image, nib.Nifti2Image):
            if kind.path_maybe_image(str(path))[0]:
                image = kind.from_filename(str(path))
                check_shape(image.shape, str(path))
                _check_size(image, path)
                return image
    except UserError:
        raise
    except _BROKEN:
        pass
    raise UserError(f"{path} is not a NIfTI file: name a .nii or .nii.gz file.")


def _check_size(image: nib.Nifti1Image, path: Path) -> None:
    """Refuses a header that states more than its file can hold, before nibabel reserves memory for it."""
    with path.open("rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
    size = path.stat().st_size * (DEFLATE if packed else 1) + 2**16
    if int(np.prod([float(n) for n in image.shape])) * image.get_data_dtype().itemsize > size:
        raise UserError(f"{path} is cut short, or its header is damaged: copy or export it again.")


def _nifti_frame(image: nib.Nifti1Image, path: Path) -> Placement:
    header = image.header
    if not int(header["sform_code"]) and not int(header["qform_code"]):
        raise UserError(
            f"{path} states no orientation, so its left and right are unknown: export it with its geometry."
        )
    if not np.all(np.isfinite(image.affine)):
        raise UserError(f"{path} has an affine with NaN or infinite entries: export it with its geometry.")
    scale = _TO_MM.get(header.get_xyzt_units()[0], 1.0)
    to_lps = _RAS_TO_LPS * scale
    return Placement(image.shape, image.affine[:3, :3].T * to_lps, image.affine[:3, 3] * to_lps)


def _stored(path: Path, scan: Path, frame: Placement) -> tuple[np.ndarray, Placement]:
    """Label values in their stored order, uint8 or uint16, of a mask on the scan's grid; and where they lie."""
    image = _open(path)
    own = _nifti_frame(image, path)
    if own.differs(frame):
        raise UserError(f"{path} lies on another grid than {scan}: resample the mask to the scan, nearest neighbour.")
    dtype = image.get_data_dtype()
    if dtype.fields is not None or dtype.kind not in "biuf":
        raise UserError(
            f"{path} holds {dtype} where whole label values are expected: save the mask as uint8 or uint16."
        )
    try:
        stored = np.asanyarray(image.dataobj)
    except _BROKEN:
        raise UserError(f"{path} is cut short or damaged: copy or export it again.") from None
    if not (stored.min() >= 0 and stored.max() <= MAX_LABEL):  # NaN is neither
        raise UserError(
            f"{path} holds values outside 0 to {MAX_LABEL}: it is no mask of labels, name the segmentation."
        )
    values = stored if stored.dtype == np.uint8 else stored.astype(np.uint16)
    if dtype.kind == "f" and not np.array_equal(values, stored):
        raise UserError(
            f"{path} holds values between labels, as after interpolation: export it with nearest neighbour."
        )
    return values, own


def _canonical(stored: np.ndarray, own: Placement, path: Path) -> tuple[np.ndarray, tuple[float, float, float]]:
    """Label values uint16 (D, H, W) and the spacing, by the very turn that scans take (exact in its float32)."""
    array, spacing, _ = canonicalise(stored, own.axes, str(path))
    return array.astype(np.uint16), spacing


def _dicom_frame(folder: Path) -> Placement:
    """The grid of one series; whether it is one, straight and complete, is judged when its voxels are read."""
    tags = ["ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "Rows", "Columns"]
    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for file in sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith(".")):
            try:
                header = pydicom.dcmread(file, stop_before_pixels=True, specific_tags=tags)
                position, cosines = (np.array([float(v) for v in header.get(tag)]) for tag in tags[:2])
                spacing = [float(v) for v in header.PixelSpacing]
                found.append((position, cosines, spacing, (int(header.Rows), int(header.Columns))))
            except Exception:  # noqa: BLE001, S112 - what is no image has no position; read_volume judges the rest
                continue
    if len(found) < 2:
        raise UserError(f"{folder} holds no series of DICOM slices with positions: convert the scan to NIfTI.")
    _, cosines, (between_rows, between_columns), plane = found[0]
    normal = np.cross(cosines[:3], cosines[3:])
    positions = sorted((entry[0] for entry in found), key=lambda position: float(position @ normal))
    step = (positions[-1] - positions[0]) / (len(positions) - 1)
    axes = np.stack([step, cosines[3:] * between_rows, cosines[:3] * between_columns])
    return Placement((len(positions), *plane), axes, positions[0])
