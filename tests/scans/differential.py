"""Drawn scans with up to three random faults, read by this project and by plain code that shares nothing with it.

    python -m tests.scans.differential 2000        the counts of the docs, and what was read wrongly

A fault is `harmless` (the drawn scan must come out), `told` (the scan must be refused or warned about) or `open` (the
plain reader says what comes out). The seed of a scan is its number.
"""

import collections
import copy
import dataclasses
import gzip
import shutil
import struct
import sys
import tempfile
import warnings
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, JPEG2000Lossless, JPEGLSLossless, RLELossless

from tests.scans.bodies import REGIONS, draw, outside
from tests.scans.ct_fixtures import affine_of, dicom_slices, turned
from tghmoe_jax.errors import UserError
from tghmoe_jax.scans.reading import read_volume

FAULTS: dict[str, dict[str, tuple[str, object]]] = {"dicom": {}, "nifti": {}}


class Inapplicable(Exception):
    """A fault that another fault leaves no room for."""


def fault(family, kind):
    def add(function):
        FAULTS[family][function.__name__] = (kind, function)
        return function

    return add


@dataclasses.dataclass
class Case:
    """One scan: what was drawn, canonical (D, H, W) in HU, and the files that the faults change."""

    rng: np.random.Generator
    folder: Path
    hu: np.ndarray
    spacing: tuple[float, float, float]
    axes: np.ndarray
    origin: np.ndarray
    path: Path | None = None
    slices: list = dataclasses.field(default_factory=list)
    files: list = dataclasses.field(default_factory=list)  # changes of the written files, in order
    header: dict = dataclasses.field(default_factory=dict)  # NIfTI: fields, and what the writer is told

    def pick(self, *choices):
        return choices[self.rng.integers(len(choices))]

    def middle(self):
        return int(self.rng.integers(2, len(self.slices) - 2))


def drawn(number, family, folder):
    """The scan of this number, with its faults applied and written: (Case, names of the faults)."""
    rng = np.random.default_rng([number, len(family)])
    shape = tuple(int(n) for n in rng.integers((9, 32, 32), (15, 45, 45)))
    name = list(REGIONS)[rng.integers(len(REGIONS))]
    hu = draw(REGIONS[name], rng.choice([0, 5, 15]), seed=number, shape=shape).clip(-1024, 3000).astype(np.int16)
    spacing = tuple(float(round(s, 2)) for s in rng.uniform(0.6, 4, 3))
    angle = rng.choice([0, 0, np.radians(9)])
    turn = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    axes = np.diag(spacing)[:, ::-1] @ turn.T
    case = Case(rng, folder, hu, spacing, axes, rng.uniform(-300, 300, 3).round(2))
    wanted = rng.permutation(list(FAULTS[family]))[: rng.integers(0, 4)]
    applied = []
    (begin_dicom if family == "dicom" else begin_nifti)(case)
    for fault_name in sorted(wanted):
        try:
            FAULTS[family][fault_name][1](case)
        except (Inapplicable, AttributeError, ValueError):  # or a tag that another fault took out
            continue
        applied.append(str(fault_name))
    (write_dicom if family == "dicom" else write_nifti)(case)
    return case, applied


def judge(number, family, folder):
    """(outcome, faults, message): `equal`, `refused`, `warned` or `different`."""
    case, applied = drawn(number, family, folder)
    kinds = {FAULTS[family][name][0] for name in applied}
    try:
        volume = read_volume(case.path)
    except UserError as error:
        return "refused", applied, str(error)
    if volume.warnings:
        return "warned", applied, "; ".join(volume.warnings)
    if "told" in kinds:
        return "different", applied, "read without a word"
    if kinds <= {"harmless"}:
        array, spacing = case.hu, case.spacing
    else:
        try:
            array, spacing = (plain_dicom if family == "dicom" else plain_nifti)(case.path)
        except Exception as error:  # noqa: BLE001 - damage that the plain reader does not survive
            return "different", applied, f"the plain reader fails: {error!r}"
    if array.shape != volume.array.shape or not np.allclose(array, volume.array, atol=1e-3, rtol=1e-6):
        return "different", applied, f"voxels: {array.shape} and {volume.array.shape}"
    if not np.allclose(spacing, volume.spacing_mm, rtol=0.02 if "rounded_positions" in applied else 1e-3):
        return "different", applied, f"spacing: {spacing} and {volume.spacing_mm}"
    return "equal", applied, ""


# ------------------------------------------------------------------------------------------------- the plain readers


def canonical(array, affine):
    """An array with a RAS affine as (S, P, L), and its spacing (z, y, x), by nibabel."""
    image = nib.as_closest_canonical(nib.Nifti1Image(array, affine))
    return np.asarray(image.dataobj)[::-1, ::-1].transpose(2, 1, 0), image.header.get_zooms()[2::-1]


def plain_dicom(path):
    found = []
    for file in sorted(f for f in path.rglob("*") if f.is_file() and not f.name.startswith(".") and f.stat().st_size):
        try:
            ds = pydicom.dcmread(file, force=True)
            if "Rows" not in ds or "PixelData" not in ds:
                continue
        except Exception:  # noqa: BLE001
            continue
        if "TransferSyntaxUID" not in ds.file_meta:
            ds.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2" if ds.original_encoding[0] else ExplicitVRLittleEndian
        stored = ds.pixel_array.astype(float)
        hu = stored * float(ds.RescaleSlope) + float(ds.RescaleIntercept)
        if "PixelPaddingValue" in ds:
            outside_hu = ds.PixelPaddingValue * float(ds.RescaleSlope) + float(ds.RescaleIntercept)
            if not -1024 <= outside_hu <= 3071:
                hu[stored == ds.PixelPaddingValue] = -1024
        row, column = np.reshape(np.array(ds.ImageOrientationPatient, float), (2, 3))
        position = np.array(ds.ImagePositionPatient, float)
        found.append((position @ np.cross(row, column), position, row, column, np.array(ds.PixelSpacing, float), hu))
    found.sort(key=lambda entry: entry[0])
    _, first, row, column, (high, wide), _ = found[0]
    step = (found[-1][1] - first) / (len(found) - 1)
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = np.stack([step, column * high, row * wide], axis=1), first
    return canonical(np.stack([entry[-1] for entry in found]), np.diag([-1, -1, 1, 1]) @ affine)


def plain_nifti(path):
    data = path.read_bytes()
    data = gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
    order = "<" if struct.unpack("<i", data[:4])[0] in (348, 540) else ">"

    def get(offset, code, count):
        return np.array(struct.unpack_from(f"{order}{count}{code}", data, offset), float)

    if struct.unpack(f"{order}i", data[:4])[0] == 540:
        dim, kind, pixdim = get(16, "q", 8), get(12, "h", 1), get(104, "d", 8)
        (offset,), (slope, inter) = get(168, "q", 1), get(176, "d", 2)
        codes, quaternion, shift, rows = get(344, "i", 2), get(352, "d", 3), get(376, "d", 3), get(400, "d", 12)
        units = int(get(500, "i", 1)[0])
    else:
        dim, kind, pixdim = get(40, "h", 8), get(70, "h", 1), get(76, "f", 8)
        (offset,), (slope, inter) = get(108, "f", 1), get(112, "f", 2)
        codes, quaternion, shift, rows = get(252, "h", 2), get(256, "f", 3), get(268, "f", 3), get(280, "f", 12)
        units = data[123]
    shape = tuple(int(n) for n in dim[1:4])
    dtype = np.dtype({4: "i2", 8: "i4", 16: "f4", 64: "f8", 512: "u2", 2: "u1", 256: "i1", 768: "u4"}[int(kind[0])])
    values = np.frombuffer(data, dtype.newbyteorder(order), int(np.prod(shape)), int(offset)).reshape(shape, order="F")
    values = values.astype(float) * slope + inter if slope and not np.isnan(slope) else values.astype(float)
    affine = np.eye(4)
    if codes[1] > 0:
        affine[:3] = rows.reshape(3, 4)
    else:
        b, c, d = quaternion
        a = np.sqrt(max(0.0, 1 - b * b - c * c - d * d))
        turn = np.array(
            [
                [a * a + b * b - c * c - d * d, 2 * (b * c - a * d), 2 * (b * d + a * c)],
                [2 * (b * c + a * d), a * a + c * c - b * b - d * d, 2 * (c * d - a * b)],
                [2 * (b * d - a * c), 2 * (c * d + a * b), a * a + d * d - b * b - c * c],
            ]
        )
        affine[:3, :3] = turn * pixdim[1:4] * [1, 1, -1 if pixdim[0] < 0 else 1]
        affine[:3, 3] = shift
    affine[:3] *= {0: 1, 1: 1000, 2: 1, 3: 0.001}[units & 7]
    return canonical(values, affine)


# ------------------------------------------------------------------------------------------------------------- DICOM


def begin_dicom(case):
    """Slices in memory, stored in any plane; `case.stored` is a view of `case.hu`, slice by slice."""
    order = tuple(case.rng.permutation(3)) if case.rng.random() < 0.3 else (0, 1, 2)
    flips = tuple(case.rng.random(3) < 0.3)
    case.stored, axes, origin = turned(case.hu, case.axes, case.origin, order, flips)
    case.path = case.folder / "series"
    case.slices = dicom_slices(case.path, case.stored, axes=axes, origin=tuple(origin))
    for index, ds in enumerate(case.slices):
        ds.filename = str(case.path / f"IM{index:03d}")
        ds.InstanceNumber = index + 1


def write_dicom(case):
    for ds in case.slices:
        Path(ds.filename).parent.mkdir(parents=True, exist_ok=True)
        whole = len(ds.get("PixelData", b"")) == 2 * ds.Rows * ds.Columns and "BitsStored" in ds
        whole = whole and ds.get("NumberOfFrames", 1) == 1 and "PhotometricInterpretation" in ds
        if case.header.get("syntax") and whole:
            small = min(ds.Rows, ds.Columns) < 32  # of which OpenJPEG makes no frame
            ds.compress(RLELossless if small else case.header["syntax"])
        if case.header.get("big") and whole:
            ds.PixelData = stored_of(ds).byteswap().tobytes()
            ds.file_meta.TransferSyntaxUID = ExplicitVRBigEndian
            pydicom.dcmwrite(ds.filename, ds, implicit_vr=False, little_endian=False, enforce_file_format=True)
            continue
        ds.save_as(ds.filename, enforce_file_format=True)
    for change in case.files:
        change()


def stored_of(ds):
    return np.frombuffer(ds.PixelData, np.int16 if ds.PixelRepresentation else np.uint16).reshape(ds.Rows, ds.Columns)


def each(change):
    """A fault that changes every slice by `change(case, index, ds)`."""

    def apply(case):
        for index, ds in enumerate(case.slices):
            change(case, index, ds)

    return apply


def all_slices(family, kind):
    def add(function):
        FAULTS[family][function.__name__] = (kind, each(function))
        return function

    return add


@fault("dicom", "harmless")
def any_order_of_names(case):
    for ds, number in zip(case.slices, case.rng.permutation(900), strict=False):
        ds.filename = str(case.path / f"Größe {number}.dcm")


@fault("dicom", "harmless")
def compressed(case):
    if case.header or any("PixelPaddingValue" in ds for ds in case.slices):
        raise Inapplicable
    case.header["syntax"] = case.pick(RLELossless, JPEG2000Lossless, JPEGLSLossless)


@fault("dicom", "harmless")
def big_endian(case):
    if case.header:
        raise Inapplicable
    case.header["big"] = True


@all_slices("dicom", "harmless")
def intercept_of_each_slice(case, index, ds):
    shift = 10 * (index % 4)
    ds.PixelData, ds.RescaleIntercept = (stored_of(ds) + np.uint16(shift)).tobytes(), ds.RescaleIntercept - shift


@all_slices("dicom", "harmless")
def rounded_positions(case, index, ds):
    ds.ImagePositionPatient = [round(float(v), 1) for v in ds.ImagePositionPatient]


@all_slices("dicom", "harmless")
def thickness_is_not_the_step(case, index, ds):
    ds.SliceThickness, ds.SpacingBetweenSlices = 7.5, 9.9


@all_slices("dicom", "harmless")
def padding_with_its_tag(case, index, ds):
    pixels = stored_of(ds).copy()
    pixels[outside((1, *pixels.shape))] = 63536
    case.stored[index][outside((1, *pixels.shape))] = -1024
    ds.PixelData, ds.PixelPaddingValue = pixels.tobytes(), 63536


@all_slices("dicom", "harmless")
def high_bits(case, index, ds):
    if not case.header and ds.PixelRepresentation == 0 and stored_of(ds).max() < 4096:
        ds.BitsStored, ds.HighBit = 12, 11


@all_slices("dicom", "harmless")
def subfolders(case, index, ds):
    ds.filename = str(case.path / f"DISK{index % 3}" / Path(ds.filename).name)


@all_slices("dicom", "harmless")
def step_and_shoot(case, index, ds):
    ds.AcquisitionNumber, ds.AcquisitionTime = 1 + index // 4, f"{101500 + index:06d}"


@fault("dicom", "harmless")
def hidden_files(case):
    case.files.append(lambda: (case.path / "._IM001").write_bytes(b"Mac OS X"))


@fault("dicom", "harmless")
def no_preamble(case):
    if case.header:
        raise Inapplicable
    case.files.insert(0, lambda: [_strip(Path(ds.filename)) for ds in case.slices[:: case.rng.integers(1, 4)]])


def _strip(file):
    file.write_bytes(file.read_bytes()[132:])


def spoil(name, change):
    """A told fault: some files at one end are changed on the disk."""

    def apply(case):
        count = int(case.rng.integers(1, 4))
        part = slice(-count, None) if case.rng.random() < 0.5 else slice(count)
        case.files.append(lambda: [change(f) for ds in case.slices[part] if (f := Path(ds.filename)).is_file()])

    FAULTS["dicom"][name] = ("told", apply)


def _cut(file):
    file.write_bytes(file.read_bytes()[: int(file.stat().st_size * 0.7)])


spoil("empty_files", lambda file: file.write_bytes(b""))
spoil("zeroed_files", lambda file: file.write_bytes(bytes(file.stat().st_size)))
spoil("pages_for_files", lambda file: file.write_bytes(b"<html>404</html>" * 9))
spoil("dead_links", lambda file: (file.unlink(), file.symlink_to("nowhere")))
spoil("files_cut_short", _cut)


@fault("dicom", "told")
def missing_slice(case):
    del case.slices[case.middle()]


@fault("dicom", "told")
def slice_twice(case):
    at = case.middle()
    case.files.insert(0, lambda: shutil.copy(case.slices[at - 1].filename, case.path / "copy"))


@fault("dicom", "told")
def second_acquisition(case):
    keyword = case.pick("AcquisitionNumber", "AcquisitionTime", "ConvolutionKernel", "InstanceNumber")
    half = (np.array(case.slices[1].ImagePositionPatient) - np.array(case.slices[0].ImagePositionPatient)) / 2
    half *= case.pick(0, 1)
    count = len(case.slices)
    for index, ds in enumerate(list(case.slices)):
        other = copy.deepcopy(ds)
        other.filename = f"{ds.filename}.b"
        other.ImagePositionPatient = [float(v) for v in np.array(ds.ImagePositionPatient) + half]
        for phase, one in enumerate((ds, other)):
            value = {"AcquisitionTime": f"1015{20 * phase:02d}", "ConvolutionKernel": f"B{phase}"}.get(
                keyword, phase + 1
            )
            setattr(one, keyword, index + 1 + phase * count if keyword == "InstanceNumber" else value)
        case.slices.append(other)


@fault("dicom", "told")
def second_series(case):
    for ds in case.slices[::2]:
        ds.SeriesInstanceUID += ".2"


@all_slices("dicom", "told")
def never_rescaled(case, index, ds):
    ds.RescaleIntercept = float(ds.RescaleIntercept) + 1024


@all_slices("dicom", "told")
def rescaled_twice(case, index, ds):
    if ds.RescaleIntercept > -1000 or ds.RescaleType != "HU":  # never rescaled, as the fault before made it
        raise Inapplicable
    ds.RescaleIntercept = float(ds.RescaleIntercept) - 1024


@fault("dicom", "told")
def zeroed_pixels(case):
    at = min(case.middle(), len(case.stored) - 2)
    if case.header or np.mean(case.stored[at - 1] > -300) < 0.06:
        raise Inapplicable
    case.slices[at].PixelData = bytes(len(case.slices[at].PixelData))


def one_slice(name, **values):
    """A told fault: tags of one slice are set, or taken out where the value is None."""

    def apply(case):
        ds = case.slices[case.middle()]
        for keyword, value in values.items():
            if value is None and keyword in ds:
                delattr(ds, keyword)
            elif value is not None:
                setattr(ds, keyword, value)

    FAULTS["dicom"][name] = ("told", apply)


one_slice("another_orientation", ImageOrientationPatient=[0, 0.6, 0.8, 0.8, 0.36, -0.48])
one_slice("another_spacing", PixelSpacing=[5.5, 5.5])
one_slice("no_position", ImagePositionPatient=None)
one_slice("no_rescale", RescaleIntercept=None)
one_slice("no_slope", RescaleSlope=None)
one_slice("no_bits", BitsStored=None)
one_slice("negative_slope", RescaleSlope=-1)
one_slice("another_modality", Modality="MR")
one_slice("another_unit", RescaleType="US")
one_slice("no_photometric", PhotometricInterpretation=None)
one_slice("monochrome1", PhotometricInterpretation="MONOCHROME1")
one_slice("two_frames", NumberOfFrames=2)
one_slice("no_pixels", PixelData=None)
one_slice("wrong_rows", Rows=99)


@all_slices("dicom", "told")
def tilted_gantry(case, index, ds):
    column = np.array(ds.ImageOrientationPatient[3:], float)
    step = np.linalg.norm(
        np.array(case.slices[-1].ImagePositionPatient) - np.array(case.slices[0].ImagePositionPatient)
    )
    ds.ImagePositionPatient = [
        float(v) for v in np.array(ds.ImagePositionPatient) + index * 0.1 * step / len(case.slices) * column
    ]


@fault("dicom", "told")
def linked_folder(case):
    (case.folder / "elsewhere").mkdir()
    case.files.append(lambda: (case.path / "more").symlink_to(case.folder / "elsewhere"))


@fault("dicom", "open")
def short_at_one_end(case):
    del case.slices[: case.rng.integers(1, 3)]


@fault("dicom", "open")
def swapped_positions(case):
    one, other = case.slices[1], case.slices[3]
    one.ImagePositionPatient, other.ImagePositionPatient = other.ImagePositionPatient, one.ImagePositionPatient


@all_slices("dicom", "open")
def spacing_of_all(case, index, ds):
    ds.PixelSpacing = [float(ds.PixelSpacing[0]) * 1.5, float(ds.PixelSpacing[1]) * 1.5]


def flipped_bytes(case, low, high):
    """Bytes of one written file are set at random, between these shares of its length."""
    at, rng = case.middle(), case.rng

    def change():
        file = Path(case.slices[at - 1].filename)
        if not file.is_file():  # a dead link
            return
        data = bytearray(file.read_bytes())
        for _ in range(rng.integers(1, 4)):
            data[int(rng.uniform(low, high) * len(data))] = int(rng.integers(256))
        file.write_bytes(data)

    case.files.append(change)


@fault("dicom", "open")
def bytes_of_the_header(case):
    flipped_bytes(case, 0, min(0.9, 1100 / (len(case.slices[0].PixelData) + 1100)))


@fault("dicom", "open")
def bytes_of_the_pixels(case):
    if case.header:
        raise Inapplicable
    flipped_bytes(case, 0.7, 1)


# ------------------------------------------------------------------------------------------------------------- NIfTI


def begin_nifti(case):
    order, flips = tuple(case.rng.permutation(3)), tuple(case.rng.random(3) < 0.5)
    case.stored, case.axes, case.origin = turned(case.hu, case.axes, case.origin, order, flips)
    case.path = case.folder / "scan.nii"


def write_nifti(case):
    told = {key: case.header.pop(key) for key in list(case.header) if key[0].isupper()}
    values = case.header.pop("values", case.stored)
    values = values.astype(told.get("TYPE", values.dtype))
    affine = affine_of(case.axes * told.get("SCALE", 1), tuple(case.origin * told.get("SCALE", 1)))
    kind = told.get("KIND", nib.Nifti1Image)
    image = kind(values, affine, kind.header_class(endianness=told.get("ORDER", "<")))
    image.set_data_dtype(values.dtype.newbyteorder(told.get("ORDER", "<")))
    image.header.set_xyzt_units(told.get("UNIT", "mm"))
    codes = told.get("CODES", (1, 2))
    image.set_qform(told.get("QFORM", affine), code=codes[0])
    image.set_sform(affine, code=codes[1])
    if told.get("EXTENSION"):
        image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"SECRET text" * 9))
    image.to_filename(case.path)
    data = bytearray(case.path.read_bytes())
    head = np.frombuffer(bytes(data[: image.header.sizeof_hdr]), image.header.structarr.dtype).copy()
    for key, value in case.header.items():
        head[key] = value
    data[: image.header.sizeof_hdr] = head.tobytes()
    for change in case.files:
        data = change(data)
    if told.get("PACKED"):
        data = gzip.compress(data, 1)
        case.path = case.path.with_name("scan.nii.gz")
    if told.get("CUT"):
        data = data[: int(len(data) * told["CUT"])]
    if told.get("TWICE"):
        data = gzip.compress(data, 1)
    case.path.write_bytes(data)


def with_header(name, kind, make):
    """A fault that is a few entries of `Case.header`; capitals tell the writer, other keys are fields."""

    def apply(case):
        entries = make(case)
        forms = {"CODES", "QFORM", "srow_x"}
        if entries.keys() & case.header.keys() or (forms & entries.keys() and forms & case.header.keys()):
            raise Inapplicable
        case.header.update(entries)

    FAULTS["nifti"][name] = (kind, apply)


def _shifted(case, degrees=0.0, shift=0.0, flip=False):
    affine = affine_of(case.axes, tuple(case.origin))
    a = np.radians(degrees)
    turn = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])
    affine[:3, :3] = turn @ affine[:3, :3]
    affine[2, 3] += shift
    return np.diag([-1, 1, 1, 1]) @ affine if flip else affine


with_header("packed", "harmless", lambda case: {"PACKED": True})
with_header("version_2", "harmless", lambda case: {"KIND": nib.Nifti2Image})
with_header("big_endian", "harmless", lambda case: {"ORDER": ">"})
with_header("other_type", "harmless", lambda case: {"TYPE": case.pick("i4", "f4", "f8")})
with_header("extension", "harmless", lambda case: {"EXTENSION": True})
with_header(
    "unit", "harmless", lambda case: case.pick({"UNIT": "micron", "SCALE": 1000}, {"UNIT": "meter", "SCALE": 1e-3})
)
with_header("sform_alone", "harmless", lambda case: {"CODES": (0, int(case.rng.integers(1, 5)))})
with_header("qform_alone", "harmless", lambda case: {"CODES": (int(case.rng.integers(1, 5)), 0)})
with_header("notes", "harmless", lambda case: {"descrip": b"SECRET", "aux_file": b"x.dcm"})
with_header(
    "scaled",
    "harmless",
    lambda case: {"values": ((case.stored.astype("i4") + 1024) * 2), "scl_slope": 0.5, "scl_inter": -1024},
)
with_header("slope_of_zero", "harmless", lambda case: {"scl_slope": 0, "scl_inter": 77})
with_header("never_rescaled", "told", lambda case: {"values": case.stored + np.int16(1024)})
with_header("rescaled_twice", "told", lambda case: {"values": case.stored - np.int16(1024)})
with_header(
    "clipped", "told", lambda case: {"values": case.stored.clip(*case.pick((-160, 240), (-57, 164), (-200, 300)))}
)
with_header("labels", "told", lambda case: {"values": (case.stored > 0).astype("i2")})
with_header("normalised", "told", lambda case: {"values": (case.stored / 1000).astype("f4")})
with_header(
    "not_a_number", "told", lambda case: {"values": np.where(case.stored > 30, np.nan, case.stored).astype("f4")}
)
with_header("wrong_sign", "told", lambda case: {"values": case.stored.astype("u2")})
with_header("no_form", "told", lambda case: {"CODES": (0, 0)})
with_header("sform_of_zeros", "told", lambda case: {"srow_x": 0, "srow_y": 0, "srow_z": 0})
with_header("other_side", "told", lambda case: {"QFORM": _shifted(case, flip=True)})
with_header("turned_qform", "told", lambda case: {"QFORM": _shifted(case, case.rng.uniform(2, 25))})
with_header("moved_qform", "told", lambda case: {"QFORM": _shifted(case, shift=case.rng.uniform(5, 90))})
with_header(
    "four_axes", "told", lambda case: {"dim": [4, *case.stored.shape[:2], case.stored.shape[2] // 2, 2, 1, 1, 1]}
)
with_header(
    "fewer_slices", "told", lambda case: {"dim": [3, *case.stored.shape[:2], case.stored.shape[2] - 4, 1, 1, 1, 1]}
)
with_header(
    "more_slices", "told", lambda case: {"dim": [3, *case.stored.shape[:2], case.stored.shape[2] + 2, 1, 1, 1, 1]}
)
with_header("cut_short", "told", lambda case: {"CUT": case.rng.uniform(0.3, 0.98)})
with_header("packed_twice", "told", lambda case: {"TWICE": True, "PACKED": True})
with_header("infinite_slope", "told", lambda case: {"scl_slope": np.inf})
with_header("other_spacing", "open", lambda case: {"SCALE": case.rng.uniform(0.5, 1.4)})


@fault("nifti", "open")
def bytes_of_the_start(case):
    def change(data):
        for _ in range(case.rng.integers(1, 4)):
            data[case.rng.integers(352)] = int(case.rng.integers(256))
        return data

    case.files.append(change)


@fault("nifti", "open")
def bytes_of_the_voxels(case):
    def change(data):
        for _ in range(case.rng.integers(1, 9)):
            data[case.rng.integers(700, len(data))] = int(case.rng.integers(256))
        return data

    case.files.append(change)


def campaign(numbers, say=print):
    """Outcomes of these scans of both families: {family: Counter}; what was read wrongly without a word is said."""
    found = {family: collections.Counter() for family in FAULTS}
    for number in numbers:
        family = ("dicom", "nifti")[number % 2]
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            outcome, applied, message = judge(number, family, Path(folder))
        found[family][outcome] += 1
        if outcome == "different":
            say(f"{family} {number}: {', '.join(applied) or 'no fault'}: {message}")
        found[family]["right scans refused or warned"] += outcome in ("refused", "warned") and all(
            FAULTS[family][name][0] == "harmless" for name in applied
        )
    return found


if __name__ == "__main__":
    for family, counts in campaign(range(int(sys.argv[1]))).items():
        print(family, dict(counts))
