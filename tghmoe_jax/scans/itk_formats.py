"""NRRD (.nrrd, .nhdr) and MetaImage (.mha, .mhd) scans to canonical volumes in HU.

Header and voxels are both read here. A library that reads the header a second time may find another data file or
another size in it than the checks did: ITK goes by upper and lower case, and ends the process at some headers. Free
text is not used.
"""

import dataclasses
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import nibabel as nib
import numpy as np

from tghmoe_jax.errors import UserError
from tghmoe_jax.scans.bounds import check_stored_size, plain_file
from tghmoe_jax.scans.hounsfield import check_hu
from tghmoe_jax.scans.paths import inside
from tghmoe_jax.scans.volume import Volume, canonical_grid, check_canonical_shape, check_shape

NAMES = (".nrrd", ".nhdr", ".mha", ".mhd")
_HEADER = 2**16  # bytes in which a header must end
_TRAILING = 2**12
_SPACES = {  # what takes the axes of a space to those of the patient (LPS)
    "left-posterior-superior": (1, 1, 1), "lps": (1, 1, 1),
    "right-anterior-superior": (-1, -1, 1), "ras": (-1, -1, 1),
    "left-anterior-superior": (1, -1, 1), "las": (1, -1, 1),
}  # fmt: skip
_WHOLE = {"char": "i1", "short": "i2", "int": "i4", "long": "i4", "longlong": "i8", "long long": "i8"}
_WHOLE |= {f"int{8 * n}{end}": f"i{n}" for n in (1, 2, 4, 8) for end in ("", "_t")}
_TYPES = _WHOLE | {"float": "f4", "double": "f8"} | {f"signed {name}": code for name, code in _WHOLE.items()}
_TYPES |= {f"{sign}{name}": f"u{code[1]}" for sign in ("u", "unsigned ") for name, code in _WHOLE.items()}

_META_ALONE = ("long", "ulong", "signed long", "unsigned long")  # NRRD has no type of this name
_ORDERS = ("binarydatabyteordermsb", "elementbyteordermsb")


@dataclasses.dataclass(frozen=True)
class _Header:
    """What a header states. shape in the order of the file, x first; data begin at byte `offset` of `data`.

    axes (3, 3): row i is the step in mm (LPS) of axis i of (z, y, x); origin (3,) is the position of voxel 0.
    """

    kind: str
    shape: tuple[int, ...]
    dtype: np.dtype
    axes: np.ndarray
    origin: np.ndarray
    data: Path
    offset: int
    packed: bool
    slope: float = 1.0
    inter: float = 0.0
    letters: str = ""  # where each axis comes from, as MetaImage repeats it


def read_itk(path: Path, assume_hu: bool = False) -> Volume:
    """Read one NRRD or MetaImage file. A scale in the header is applied once, in float64; the result must be HU.

    Raises UserError for what is not a 3D CT scan with an orientation, a spacing in mm and its data beside it.
    `assume_hu` as in `read_volume`.
    """
    header = _nrrd(path) if path.suffix.lower() in NAMES[:2] else _meta_image(path)
    check_shape(header.shape, str(path))
    _check_data(header, path)
    grid = canonical_grid(header.axes, str(path))
    stored = header.shape[::-1]  # z, y, x
    check_canonical_shape(grid.shape(stored), str(path))
    array = np.empty(grid.shape(stored), np.float32)
    plain = (header.slope, header.inter) == (1.0, 0.0)
    for plane, values in zip(grid.as_stored(array), _planes(header, path), strict=True):
        with np.errstate(over="ignore", invalid="ignore"):  # what is not a number is refused with the volume
            plane[...] = values if plain else values * np.float64(header.slope) + header.inter
    warnings = check_hu(array, str(path), assume_hu)
    if header.letters not in ("", "???", _letters(header.axes)):
        warnings += ("geometry: AnatomicalOrientation contradicts TransformMatrix; the matrix was used",)
    sizes = " x ".join(map(str, header.shape))
    history = (
        f"{header.kind}, {sizes} {header.dtype}",
        f"HU as stored, slope {header.slope:g} and offset {header.inter:g} applied once",
        *grid.notes,
    )
    affine = grid.affine(header.origin, stored)
    return Volume(array, "HU", grid.spacing_mm, "LPS", None, history, warnings, affine)


def _letters(axes: np.ndarray) -> str:
    """Where the axes of a file, x first, come from: RAI where they run toward Left, Posterior and Superior."""
    return "".join(nib.aff2axcodes(nib.affines.from_matvec(axes[::-1].T), (("L", "R"), ("P", "A"), ("S", "I"))))


# ---- voxels ----------------------------------------------------------------------------------------------------------


def _check_data(header: _Header, path: Path) -> None:
    """Refuse data that are fewer or more than the header states, before memory is taken."""
    stated = header.dtype.itemsize * int(np.prod([float(n) for n in header.shape]))
    try:
        there = header.data.is_file()
    except OSError:  # a name longer than any file's
        there = False
    if not there:
        raise UserError(f"{path} names a data file that is not there: copy both files into one folder.")
    size = max(0, header.data.stat().st_size - header.offset)
    check_stored_size(stated, size, header.packed, str(path))
    if not header.packed and size - stated >= min(_TRAILING, stated // header.shape[2]):
        raise UserError(f"{path} holds more voxels than its header states: copy or export it again.")


def _planes(header: _Header, path: Path) -> Iterator[np.ndarray]:
    """The stored values (y, x) of each z. UserError for data that are cut short or damaged."""
    size = header.dtype.itemsize * header.shape[0] * header.shape[1]
    with plain_file(header.data) as file:
        file.seek(header.offset)
        source = _Inflated(file) if header.packed else file
        try:
            for _ in range(header.shape[2]):
                part = source.read(size)
                if len(part) != size:
                    raise EOFError
                yield np.frombuffer(part, header.dtype).reshape(header.shape[1], header.shape[0])
            if header.packed and source.read(1):  # to the end of the stream, where its check sum is
                raise EOFError
        except (EOFError, zlib.error):
            raise UserError(f"{path} is cut short, damaged or not {header.kind}: copy or export it again.") from None


class _Inflated:
    """The bytes of a zlib or gzip stream. EOFError where it ends too soon, zlib.error where it is damaged."""

    def __init__(self, file: BinaryIO):
        self._file, self._stream = file, zlib.decompressobj(47)  # 47: the stream itself says which of the two it is

    def read(self, size: int) -> bytes:
        """`size` bytes, fewer at the end of the stream."""
        parts = []
        while size and not self._stream.eof:
            packed = self._stream.unconsumed_tail or self._file.read(2**16)
            part = self._stream.decompress(packed, size)
            if not (packed or part or self._stream.eof):
                raise EOFError
            parts.append(part)
            size -= len(part)
        return b"".join(parts)


# ---- headers ---------------------------------------------------------------------------------------------------------


def _lines(path: Path, end: bytes) -> tuple[dict[str, str], int]:
    """Fields by lower-case name, up to the line that `end` begins (with it), and where that line ends. UserError for a
    field that is stated twice: what it means depends on who reads it."""
    with plain_file(path) as file:
        text = file.read(_HEADER)
    fields, place = {}, 0
    while place < len(text):
        stop = text.find(b"\n", place)
        line = text[place : stop if stop >= 0 else len(text)].strip()
        place = stop + 1 if stop >= 0 else len(text)
        name, separator, value = line.partition(b"=" if end else b":")
        if separator and not value.startswith(b"=") and not line.startswith(b"#"):  # key:=value is free text
            name = name.strip().lower().decode("latin-1")
            if name in fields:
                raise UserError(f"{path} states a field of its header twice: export it again.")
            fields[name] = value.strip().decode("utf-8", "replace")
        if line.lower().startswith(end) if end else not line:
            break
    return fields, place


def _stated(fields: dict[str, str], names: tuple[str, ...], default: str, path: Path) -> str:
    """The field that has one of these names. UserError where two have, since they may differ."""
    found = [fields[name] for name in names if name in fields]
    if len(found) > 1:
        raise UserError(f"{path} states a field of its header twice: export it again.")
    return found[0] if found else default


def _numbers(text: str, kind: type = float) -> tuple:
    """The numbers of a text; none where a part of it is no number, or longer than any that means something."""
    parts = text.replace(",", " ").replace("(", " ").replace(")", " ").split()
    try:
        return tuple(kind(part) for part in parts) if all(len(part) < 40 for part in parts) else ()
    except (ValueError, OverflowError):
        return ()


def _is_true(text: str) -> bool:
    """As MetaImage has it."""
    return text[:1] in ("T", "t", "1")


def _origin(text: str, path: Path) -> np.ndarray:
    found = np.array(_numbers(text))
    if found.shape != (3,) or not np.all(np.isfinite(found)):
        raise UserError(f"{path} states a position that is not three numbers: export it again.")
    return found


def _beside(path: Path, name: str) -> Path:
    """The data file that a header names, proven to lie in the header's folder or below."""
    if name.upper().startswith("LIST") or "%" in name:
        raise UserError(f"{path} spreads its data over several files: save the scan as one.")
    try:
        return inside(path.parent, name)
    except UserError:
        raise UserError(f"{path} names a data file outside of its folder: copy both files into one folder.") from None


def _nrrd(path: Path) -> _Header:
    with plain_file(path) as file:
        if file.read(7) != b"NRRD000":
            raise UserError(f"{path} is not a NRRD file: name a scan in that format.")
    fields, end = _lines(path, b"")
    data = _stated(fields, ("data file", "datafile"), "", path)
    encoding, kind = fields.get("encoding", "").lower(), fields.get("type", "").lower()
    if fields.get("dimension") != "3":
        raise UserError(f"{path} is not one 3D volume (its dimension is not 3): split it into 3D files.")
    if encoding not in ("raw", "gzip", "gz"):
        raise UserError(f"{path} is encoded in a way that is not read: save it raw or with gzip.")
    kinds = set(fields.get("kinds", "").lower().split())
    if kind not in _TYPES or kind in _META_ALONE or not kinds <= {"domain", "space", "???"}:
        raise UserError(f"{path} holds no plain numbers: save the scan as short or float.")
    order = fields.get("endian", "").lower()
    if order not in ("little", "big") and _TYPES[kind][1] != "1":
        raise UserError(f"{path} does not state the order of its bytes (endian): export it again.")
    directions, signs = _numbers(fields.get("space directions", "")), _SPACES.get(fields.get("space", "").lower())
    if signs is None or len(directions) != 9:
        raise UserError(
            f"{path} states no orientation in the patient (space and space directions), so left and right are unknown: "
            "convert the scan again from DICOM."
        )
    if set(fields.get("space units", "mm").replace('"', " ").split()) != {"mm"}:
        raise UserError(f"{path} states its spacing in another unit than mm: export it in mm.")
    if any(fields.get(key, "0") != "0" for key in ("byte skip", "byteskip", "line skip", "lineskip")):
        raise UserError(f"{path} skips a part of its data: save it again without a skip.")
    where = (_beside(path, data), 0) if data else (path, end)
    axes = np.reshape(directions, (3, 3))[::-1] * signs
    origin = _origin(fields.get("space origin", "0 0 0"), path) * signs
    dtype = np.dtype(_TYPES[kind]).newbyteorder(">" if order == "big" else "<")
    return _Header("NRRD", _numbers(fields.get("sizes", ""), int), dtype, axes, origin, *where, encoding != "raw")


def _meta_image(path: Path) -> _Header:
    fields, end = _lines(path, b"elementdatafile")
    data, kind = fields.get("elementdatafile"), fields.get("elementtype", "").upper()
    if not data or "ndims" not in fields:
        raise UserError(f"{path} is not a MetaImage file: name a scan in that format.")
    kind = kind.removeprefix("MET_").lower().replace("long_long", "longlong")
    if fields["ndims"] != "3":
        raise UserError(f"{path} is not one 3D volume (NDims is not 3): split it into 3D files.")
    if kind not in _TYPES or fields.get("elementnumberofchannels", "1") != "1":
        raise UserError(f"{path} holds no plain numbers: save the scan as MET_SHORT or MET_FLOAT.")
    if fields.get("binarydata", "true").lower() != "true" or fields.get("headersize", "0") not in ("0", "-1"):
        raise UserError(f"{path} is encoded in a way that is not read: save it as binary data.")
    matrix = _numbers(_stated(fields, ("transformmatrix", "orientation", "rotation"), "", path))
    if len(matrix) != 9:
        raise UserError(f"{path} states no orientation (TransformMatrix): convert the scan again from DICOM.")
    spacing = _numbers(fields.get("elementspacing", ""))
    if len(spacing) != 3:
        raise UserError(f"{path} states no voxel spacing (ElementSpacing): convert the scan again from DICOM.")
    if fields.get("distanceunits", "mm").lower() not in ("mm", "?"):
        raise UserError(f"{path} states its spacing in another unit than mm: export it in mm.")
    given = (("slope", "1"), ("offset", "0"))
    scale = [_numbers(fields.get(f"elementtointensityfunction{key}", default)) for key, default in given]
    if any(len(part) != 1 or not np.isfinite(part[0]) for part in scale) or scale[0][0] == 0:
        raise UserError(f"{path} states a scale that is no number (ElementToIntensityFunction): export it again.")
    packed = _is_true(fields.get("compresseddata", "false"))
    file, offset = (path, end) if data.upper() == "LOCAL" else (_beside(path, data), 0)
    shape, order = _numbers(fields.get("dimsize", ""), int), _stated(fields, _ORDERS, "false", path)
    dtype = np.dtype(_TYPES[kind]).newbyteorder(">" if _is_true(order) else "<")
    check_shape(shape, str(path))
    if fields.get("headersize") == "-1" and not packed and file.is_file():  # the data are the end of the file
        offset = max(offset, file.stat().st_size - dtype.itemsize * int(np.prod([float(n) for n in shape])))
    axes = (np.reshape(matrix, (3, 3)) * np.reshape(spacing, (3, 1)))[::-1]
    origin = _origin(_stated(fields, ("offset", "position", "origin"), "0 0 0", path), path)
    letters = fields.get("anatomicalorientation", "").upper()
    return _Header("MetaImage", shape, dtype, axes, origin, file, offset, packed, scale[0][0], scale[1][0], letters)
