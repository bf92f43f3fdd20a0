"""NRRD (.nrrd, .nhdr) and MetaImage (.mha, .mhd) scans to canonical volumes in HU, through SimpleITK.

SimpleITK decodes; the text header is read here as well, for what SimpleITK passes over in silence: a space that is not
of the patient, units, a scale, a damaged packed stream, and data files that lie elsewhere. Free text is not used.
"""

import dataclasses
import zlib
from pathlib import Path

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
_SPACES = ("left-posterior-superior", "lps", "right-anterior-superior", "ras", "left-anterior-superior", "las")
_BYTES = {"char": 1, "short": 2, "int": 4, "long": 4, "longlong": 8, "long long": 8, "float": 4, "double": 8}
_BYTES |= {f"u{name}": size for name, size in _BYTES.items()} | {f"unsigned {name}": s for name, s in _BYTES.items()}
_BYTES |= {f"{sign}int{8 * n}{end}": n for sign in ("", "u") for n in (1, 2, 4, 8) for end in ("", "_t")}
_BYTES |= {f"signed {name}": _BYTES[name] for name in ("char", "short", "int")} | {"uchar": 1}


@dataclasses.dataclass(frozen=True)
class _Header:
    """What a header states. shape in the order of the file, x first; data begin at byte `offset` of `data`."""

    kind: str
    shape: tuple[int, ...]
    itemsize: int
    data: Path
    offset: int
    packed: bool
    slope: float = 1.0
    inter: float = 0.0
    letters: str = ""  # where each axis comes from, as MetaImage repeats it


def read_itk(path: Path, assume_hu: bool = False) -> Volume:
    """Read one NRRD or MetaImage file. A scale in the header is applied once, in float64; the result must be HU.

    Raises UserError where SimpleITK is not installed, and for what is not a 3D CT scan with an orientation, a spacing
    in mm and its data beside it. `assume_hu` as in `read_volume`.
    """
    try:
        import SimpleITK as sitk
    except ImportError:
        raise UserError(f"{path} needs SimpleITK to be read: pip install SimpleITK.") from None
    header = _nrrd(path) if path.suffix.lower() in NAMES[:2] else _meta_image(path)
    check_shape(header.shape, str(path))
    _check_data(header, path)
    reader = sitk.ImageFileReader()
    reader.SetImageIO("NrrdImageIO" if header.kind == "NRRD" else "MetaImageIO")
    reader.SetFileName(str(path))
    try:
        image = reader.Execute()
        stored = sitk.GetArrayViewFromImage(image)  # z, y, x
        if (
            image.GetSize() != header.shape
            or stored.dtype.itemsize != header.itemsize
            or stored.dtype.kind not in "iuf"
        ):
            raise ValueError("another grid than the header's")
        axes = (np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()).T[::-1]
        origin = np.array(image.GetOrigin())
    except Exception:  # noqa: BLE001 - ITK's messages quote the file
        raise UserError(f"{path} is cut short, damaged or not {header.kind}: copy or export it again.") from None
    grid = canonical_grid(axes, str(path))
    shape = grid.shape(stored.shape)
    check_canonical_shape(shape, str(path))
    array = np.empty(shape, np.float32)
    plain = (header.slope, header.inter) == (1.0, 0.0)
    for plane, values in zip(grid.as_stored(array), stored, strict=True):
        plane[...] = values if plain else values * np.float64(header.slope) + header.inter
    warnings = check_hu(array, str(path), assume_hu)
    if header.letters not in ("", "???", _letters(axes)):
        warnings += ("geometry: AnatomicalOrientation contradicts TransformMatrix; the matrix was used",)
    sizes = " x ".join(map(str, header.shape))
    history = (
        f"{header.kind}, {sizes} {stored.dtype}, by SimpleITK",
        f"HU as stored, slope {header.slope:g} and offset {header.inter:g} applied once",
        *grid.notes,
    )
    return Volume(array, "HU", grid.spacing_mm, "LPS", None, history, warnings, grid.affine(origin, stored.shape))


def _letters(axes: np.ndarray) -> str:
    """Where the axes of a file, x first, come from: RAI where they run toward Left, Posterior and Superior."""
    return "".join(nib.aff2axcodes(nib.affines.from_matvec(axes[::-1].T), (("L", "R"), ("P", "A"), ("S", "I"))))


def _check_data(header: _Header, path: Path) -> None:
    """Refuse data that are fewer, more or packed otherwise than the header states, before memory is taken."""
    stated = header.itemsize * int(np.prod([float(n) for n in header.shape]))
    if not header.data.is_file():
        raise UserError(f"{path} names a data file that is not there: copy both files into one folder.")
    size = max(0, header.data.stat().st_size - header.offset)
    check_stored_size(stated, size, header.packed, str(path))
    if not header.packed and size - stated >= min(_TRAILING, stated // header.shape[2]):
        raise UserError(f"{path} holds more voxels than its header states: copy or export it again.")
    if header.packed and header.kind == "MetaImage":  # which ITK reads as zeros or noise where the stream is damaged
        stream, count = zlib.decompressobj(), 0
        try:
            with plain_file(header.data) as file:
                file.seek(header.offset)
                while not stream.eof and (part := file.read(2**16)):
                    count += len(stream.decompress(part))
        except zlib.error:
            count = -1
        if not stream.eof or count != stated:
            raise UserError(f"{path} is cut short or damaged: copy or export it again.")


def _lines(path: Path, end: bytes) -> tuple[dict[str, str], int]:
    """Fields by lower-case name, up to the line that `end` begins (with it), and where that line ends."""
    with plain_file(path) as file:
        text = file.read(_HEADER)
    fields, place = {}, 0
    while place < len(text):
        stop = text.find(b"\n", place)
        line = text[place : stop if stop >= 0 else len(text)].strip()
        place = stop + 1 if stop >= 0 else len(text)
        name, separator, value = line.partition(b"=" if end else b":")
        if separator and not value.startswith(b"="):  # key:=value is free text
            fields[name.strip().lower().decode("latin-1")] = value.strip().decode("utf-8", "replace")
        if line.lower().startswith(end) if end else not line:
            break
    return fields, place


def _numbers(text: str, kind: type = float) -> tuple:
    try:
        return tuple(kind(part) for part in text.replace(",", " ").replace("(", " ").replace(")", " ").split())
    except (ValueError, OverflowError):
        return ()


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
    data = fields.get("data file", fields.get("datafile"))
    encoding, kind = fields.get("encoding", "").lower(), fields.get("type", "").lower()
    if fields.get("dimension") != "3":
        raise UserError(f"{path} is not one 3D volume (its dimension is not 3): split it into 3D files.")
    if encoding not in ("raw", "gzip", "gz"):
        raise UserError(f"{path} is encoded in a way that is not read: save it raw or with gzip.")
    if kind not in _BYTES:
        raise UserError(f"{path} holds no plain numbers: save the scan as short or float.")
    if fields.get("space", "").lower() not in _SPACES or len(_numbers(fields.get("space directions", ""))) != 9:
        raise UserError(
            f"{path} states no orientation in the patient (space and space directions), so left and right are unknown: "
            "convert the scan again from DICOM."
        )
    if set(fields.get("space units", "mm").replace('"', " ").split()) != {"mm"}:
        raise UserError(f"{path} states its spacing in another unit than mm: export it in mm.")
    if any(fields.get(key, "0") != "0" for key in ("byte skip", "byteskip", "line skip", "lineskip")):
        raise UserError(f"{path} skips a part of its data: save it again without a skip.")
    where = (path, end) if data is None else (_beside(path, data), 0)
    return _Header("NRRD", _numbers(fields.get("sizes", ""), int), _BYTES[kind], *where, encoding != "raw")


def _meta_image(path: Path) -> _Header:
    fields, end = _lines(path, b"elementdatafile")
    data, kind = fields.get("elementdatafile"), fields.get("elementtype", "").upper()
    if not data or "ndims" not in fields:
        raise UserError(f"{path} is not a MetaImage file: name a scan in that format.")
    kind = kind.removeprefix("MET_").lower().replace("long_long", "longlong")
    if fields["ndims"] != "3":
        raise UserError(f"{path} is not one 3D volume (NDims is not 3): split it into 3D files.")
    if kind not in _BYTES or fields.get("elementnumberofchannels", "1") != "1":
        raise UserError(f"{path} holds no plain numbers: save the scan as MET_SHORT or MET_FLOAT.")
    if fields.get("binarydata", "true").lower() != "true" or fields.get("headersize", "0") not in ("0", "-1"):
        raise UserError(f"{path} is encoded in a way that is not read: save it as binary data.")
    matrix = next((fields[key] for key in ("transformmatrix", "orientation", "rotation") if key in fields), "")
    if len(_numbers(matrix)) != 9:
        raise UserError(f"{path} states no orientation (TransformMatrix): convert the scan again from DICOM.")
    if len(_numbers(fields.get("elementspacing", ""))) != 3:
        raise UserError(f"{path} states no voxel spacing (ElementSpacing): convert the scan again from DICOM.")
    if fields.get("distanceunits", "mm").lower() not in ("mm", "?"):
        raise UserError(f"{path} states its spacing in another unit than mm: export it in mm.")
    given = (("slope", "1"), ("offset", "0"))
    scale = [_numbers(fields.get(f"elementtointensityfunction{key}", default)) for key, default in given]
    if any(len(part) != 1 or not np.isfinite(part[0]) for part in scale) or scale[0][0] == 0:
        raise UserError(f"{path} states a scale that is no number (ElementToIntensityFunction): export it again.")
    packed = fields.get("compresseddata", "false").lower() == "true"
    where = (path, end) if data.upper() == "LOCAL" else (_beside(path, data), 0)
    return _Header(
        "MetaImage",
        _numbers(fields.get("dimsize", ""), int),
        _BYTES[kind],
        *where,
        packed,
        scale[0][0],
        scale[1][0],
        fields.get("anatomicalorientation", "").upper(),
    )
