"""Segmentation masks on the grid of a scan: label values as stored, in the canonical orientation, never interpolated.

Axis legend: D slices toward Superior, H rows toward Posterior, W columns toward Left.
"""

import contextlib
import dataclasses
import itertools
import re
from pathlib import Path

import numpy as np

from tghmoe_jax.datasets.index_files import read_csv, read_json, read_text, text_fault
from tghmoe_jax.datasets.items import Rejected
from tghmoe_jax.errors import UserError
from tghmoe_jax.scans.bounds import DEFLATE
from tghmoe_jax.scans.dicom import read_geometry
from tghmoe_jax.scans.nifti import OpenNifti, open_nifti
from tghmoe_jax.scans.paths import inside
from tghmoe_jax.scans.volume import canonicalise

MAX_LABEL = 4095  # values of published label sets stay far below; more is a scan, not a mask
MAX_LABEL_FILE = 2**20
VALUE_COLUMNS = ("value", "label", "id", "index")
# A line of a table of 3D Slicer (value, name, colours) or ITK-SNAP (value, colours, two switches, "name").
_COLOUR_LINE = re.compile(r"\s*(\d+)\s+(?:([^\s\d]\S*)(?:\s+\d+){3,4}|(?:[\d.]+\s+){6}\"(.*)\")\s*", re.ASCII)
_SIDE_WORD = re.compile(r"(?<![a-z])(left|right)(?![a-z])", re.IGNORECASE)


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
    frame = placement_of(scan)
    if not mask.is_dir():
        if labels is None:
            raise UserError(f"{mask} has no table of label names: name one as its labels.")
        names = read_labels(labels)
        array, spacing = _canonical(*_stored(mask, scan, frame), mask)
        unknown = sorted({value for plane in array for value in np.unique(plane).tolist()} - {0, *names})
        if unknown:
            raise UserError(f"{mask} holds the label {unknown[0]}, which {labels} does not name: add it to the table.")
        return LabelMap(array, spacing, names)
    # A Mac leaves `._liver.nii.gz` beside `liver.nii.gz` where its disks are read elsewhere.
    named = sorted(path.name for path in mask.iterdir() if _is_nifti(path) and not path.name.startswith("."))
    files = [inside(mask, name) for name in named]
    if not files or len(files) > MAX_LABEL:
        raise UserError(f"{mask} holds {len(files)} masks: name the folder of one scan's .nii.gz masks.")
    names = {value: _name(re.split(r"\.nii", name, flags=re.I)[0], mask) for value, name in enumerate(named, 1)}
    if len(set(names.values())) < len(names):
        raise UserError(f"{mask} holds two masks of one structure: keep one of them.")
    # Masks stored alike (all of a scan, as a rule) are put together before the one turn to the canonical order.
    layouts: dict[tuple, tuple[np.ndarray, Placement]] = {}
    for value, path in enumerate(files, 1):
        stored, own = _stored(path, scan, frame)
        together, _ = layouts.setdefault((own.shape, own.axes.tobytes()), (np.zeros(own.shape, np.uint16), own))
        together[stored > 0] = value
    turned = [_canonical(together, own, mask) for together, own in layouts.values()]
    return LabelMap(np.maximum.reduce([array for array, _ in turned]), turned[0][1], names)


def read_labels(path: Path) -> dict[int, str]:
    """Names by value; 0 is left out.

    A JSON object (either way round), nnU-Net's dataset.json, a CSV with columns `value` and `name`, or a label table of
    3D Slicer (.ctbl, .txt) or ITK-SNAP (.txt).
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist: name the table of label names, JSON or CSV.")
    if path.suffix.lower() == ".csv":
        bad: list[Rejected] = []
        rows = [row for _, row in read_csv(path, ("name",), bad)]
        column = next((column for column in VALUE_COLUMNS if rows and column in rows[0]), None)
        if bad or column is None:
            raise UserError(f"{path} is not a table of label names: it needs the columns value and name in every row.")
        pairs = [(row[column], row["name"]) for row in rows]
    elif path.suffix.lower() in (".ctbl", ".txt"):
        lines = enumerate(read_text(path, MAX_LABEL_FILE).split("\n"), 1)
        found = [(n, _COLOUR_LINE.fullmatch(line)) for n, line in lines if not re.match(r"\s*(#|$)", line)]
        if wrong := next((number for number, match in found if match is None), None):
            raise UserError(f"{path} line {wrong} is not one of a label table of 3D Slicer or ITK-SNAP: correct it.")
        pairs = [(match[1], match[2] or match[3]) for _, match in found]
    else:
        table = read_json(path, MAX_LABEL_FILE)
        if isinstance(table, dict) and isinstance(table.get("labels"), dict):  # nnU-Net's dataset.json
            table = table["labels"]
            if any(isinstance(value, list) for value in table.values()) or "ignore" in table:
                raise UserError(
                    f"{path} names regions of several labels, or a label to ignore: write a table of one name for each "
                    "value of the masks, and leave out scans that are annotated in part."
                )
        if not isinstance(table, dict) or not table:
            raise UserError(f"{path} is not a table of label names: write a JSON object of value and name.")
        pairs = [(value, name) if _is_value(value) else (name, value) for value, name in table.items()]
    names: dict[int, str] = {}
    for value, name in pairs:
        if not _is_value(value) or not isinstance(name, str):
            raise UserError(f"{path} has a value that is not a whole number from 0 to {MAX_LABEL}: correct it.")
        if int(value) in names:
            raise UserError(f"{path} names the label {int(value)} twice: keep one name.")
        names[int(value)] = _name(name, path)
    names.pop(0, None)
    if len(set(names.values())) != len(names) or not names:
        raise UserError(f"{path} gives one name to two labels, or none at all: name every structure once.")
    return names


def placement_of(scan: Path) -> Placement:
    """Where the grid of a NIfTI file or of a folder of one DICOM series lies; no voxel is read."""
    if scan.is_dir():
        return Placement(*read_geometry(scan))
    if not _is_nifti(scan):
        raise UserError(
            f"{scan} states no position of its voxels, so no mask fits it: give the scan as NIfTI or DICOM."
        )
    with _opened(scan) as image:
        return Placement(image.shape, image.axes, image.origin)


def _is_nifti(path: Path) -> bool:
    return path.name.lower().endswith((".nii", ".nii.gz"))


def _is_value(value) -> bool:
    text = str(value).strip()
    return text.isascii() and text.isdigit() and int(text[:6]) <= MAX_LABEL


def _name(name: str, where: Path) -> str:
    if text_fault(name, "name") or len(name) > 60:
        raise UserError(f"{where} holds a label name that is empty, too long or no plain text: correct it.")
    return _SIDE_WORD.sub(lambda side: side[1].lower(), "_".join(name.split()))


def _opened(path: Path) -> contextlib.AbstractContextManager[OpenNifti]:
    if not path.is_file():
        raise UserError(f"{path} does not exist: name a .nii or .nii.gz file.")
    return open_nifti(path, most_packing=DEFLATE)  # masks come near what deflate can do


def _stored(path: Path, scan: Path, frame: Placement) -> tuple[np.ndarray, Placement]:
    """Label values uint16 in their stored order, of a mask on the scan's grid; and where they lie."""
    with _opened(path) as image:
        own = Placement(image.shape, image.axes, image.origin)
        if own.differs(frame):
            raise UserError(
                f"{path} lies on another grid than {scan}: resample the mask to the scan, nearest neighbour."
            )
        values = np.empty(image.shape, np.uint16)
        for first, part in image.slabs():
            if not (part.min() >= 0 and part.max() <= MAX_LABEL):  # NaN is neither
                raise UserError(
                    f"{path} holds values outside 0 to {MAX_LABEL}: it is not a mask of labels, name the segmentation."
                )
            values[..., first : first + part.shape[-1]] = part
            if not np.array_equal(values[..., first : first + part.shape[-1]], part):
                raise UserError(
                    f"{path} holds values between labels, as after interpolation: export it with nearest neighbour."
                )
    return values, own


def _canonical(stored: np.ndarray, own: Placement, path: Path) -> tuple[np.ndarray, tuple[float, float, float]]:
    """Label values uint16 (D, H, W) and the spacing, by the very turn that scans take (exact in its float32)."""
    array, spacing, _ = canonicalise(stored, own.axes, str(path))
    return array.astype(np.uint16), spacing
