"""A drawn scan as a DICOM series, and what may be wrong with it (see `differential`)."""

import copy
import shutil
from pathlib import Path

import numpy as np
import pydicom
from pydicom.uid import ExplicitVRBigEndian, JPEG2000Lossless, JPEGLSLossless, RLELossless

from tests.scans.bodies import outside
from tests.scans.ct_fixtures import dicom_slices, turned
from tests.scans.faults import FAULTS, Inapplicable, fault


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
