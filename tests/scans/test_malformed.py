"""Kinds of files and folders that are no readable volume, each with its one sentence.

Each row: the kind, what makes it in a folder (returning the path to read), and a fragment of the sentence. What
`refusal` checks of every sentence: it names the path, it is one line, it holds a mend and nothing of the patient.
"""

import gzip
import io
import os
import struct
import zipfile
import zlib

import nibabel as nib
import numpy as np
import pytest
from PIL import Image, PngImagePlugin
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.filewriter import dcmwrite
from pydicom.uid import DeflatedExplicitVRLittleEndian, JPEG2000Lossless, RLELossless

from tests.scans.ct_fixtures import (
    SECRET,
    affine_of,
    axes_of,
    dicom_slices,
    patient,
    refusal,
    save,
    write_dicom,
    write_dicomdir,
    write_enhanced,
    write_nifti,
)

# ----------------------------------------------------------------------------------------------------------- NIfTI


def nifti(name="scan.nii", values=None, **fields):
    """A maker of the patient's NIfTI file with header fields replaced, however absurd."""

    def make(folder):
        path = write_nifti(folder / name.removesuffix(".gz"), patient() if values is None else values)
        raw = path.read_bytes()
        header = np.frombuffer(raw[:348], nib.nifti1.header_dtype).copy()
        header["descrip"], header["aux_file"], header["db_name"] = f"{SECRET}^NAME", f"{SECRET}.dcm", SECRET
        for field, value in fields.items():
            header[field] = value
        data = header.tobytes() + raw[348:]
        path.unlink()
        path = folder / name
        path.write_bytes(gzip.compress(data, 1) if name.endswith(".gz") else data)
        return path

    return make


def content(name, data):
    """A maker of a file with these bytes."""

    def make(folder):
        (folder / name).write_bytes(data)
        return folder / name

    return make


def cut(make, keep):
    """A maker of the same file cut after `keep` of its bytes (a share, or from the end where negative)."""

    def short(folder):
        path = make(folder)
        whole = path.read_bytes()
        path.write_bytes(whole[: keep if isinstance(keep, int) else int(len(whole) * keep)])
        return path

    return short


def flipped_bit(folder):
    path = nifti("scan.nii.gz")(folder)
    data = bytearray(path.read_bytes())
    data[-6] ^= 1  # the check sum of the stream
    path.write_bytes(data)
    return path


def longer(folder):
    path = nifti()(folder)
    path.write_bytes(path.read_bytes() + bytes(10_000))
    return path


def gzip_bomb(folder):
    """The header of 2.1 GB in front of zeros that pack 1,000 to 1: 2 MB on disk."""
    head = nifti(dim=[3, 1024, 1024, 1000, 1, 1, 1, 1])(folder).read_bytes()[:352]
    path = folder / "scan.nii.gz"
    with gzip.open(path, "wb", 1) as file:
        file.write(head)
        file.write(bytes(2**24))
    packed = path.read_bytes()
    path.write_bytes(packed + bytes(3_000_000))  # so that deflate's own limit would allow the size
    return path


def two_forms(sform, qform):
    def make(folder):
        image = nib.Nifti1Image(patient(), affine_of(axes_of()))
        image.set_sform(sform @ affine_of(axes_of()), code=1)
        image.set_qform(qform @ affine_of(axes_of()), code=1)
        image.to_filename(folder / "scan.nii")
        return folder / "scan.nii"

    return make


def pipe(folder):
    os.mkfifo(folder / "scan.nii")
    return folder / "scan.nii"


def raw_ge():
    """Stored values, never rescaled, with the scanner's padding."""
    stored = (patient().astype(np.int32) + 1024).astype(np.int16)
    stored[:, :6] = -2000
    return stored


NIFTI = {
    "nothing": (content("scan.nii", b""), "empty file"),
    "text as .nii": (content("scan.nii", b"notes " * 200), "not a NIfTI"),
    "text in gzip": (content("scan.nii.gz", gzip.compress(b"notes " * 200)), "not a NIfTI"),
    "gzip of nothing": (content("scan.nii.gz", gzip.compress(b"")), "not a NIfTI"),
    "gzip magic alone": (content("scan.nii.gz", b"\x1f\x8b junk"), "not a NIfTI"),
    "a header cut short": (cut(nifti(), 200), "not a NIfTI"),
    "a header alone": (cut(nifti(), 352), "cut short"),
    "voxels cut short": (cut(nifti(), 0.7), "cut short"),
    "a packed stream cut short": (cut(nifti("scan.nii.gz"), 0.7), "cut short"),
    "a packed stream without its end": (cut(nifti("scan.nii.gz"), -8), "cut short"),
    "a wrong check sum": (flipped_bit, "cut short or damaged"),
    "more voxels than stated": (longer, "more voxels than its header states"),
    "fewer slices stated than stored": (nifti("scan.nii.gz", dim=[3, 12, 36, 30, 1, 1, 1, 1]), "more voxels"),
    "a gzip bomb": (gzip_bomb, "as no scan does"),
    "a size beyond the file": (nifti(dim=[3, 512, 512, 512, 1, 1, 1, 1]), "cut short"),
    "a size beyond a packed file": (nifti("scan.nii.gz", dim=[3, 512, 512, 512, 1, 1, 1, 1]), "cut short"),
    "a size beyond any scan": (nifti(dim=[3, 32000, 32000, 32000, 1, 1, 1, 1]), "more than 1073741824"),
    "a negative size": (nifti(dim=[3, -12, 36, 44, 1, 1, 1, 1]), "empty"),
    "no dimensions": (nifti(dim=[0, 0, 0, 0, 0, 0, 0, 0]), "empty"),
    "nine dimensions": (nifti(dim=[9, 12, 36, 44, 1, 1, 1, 1]), "not a NIfTI"),
    "a picture": (nifti(dim=[2, 36, 44, 1, 1, 1, 1, 1]), "2D"),
    "several phases": (nifti(dim=[4, 6, 36, 44, 2, 1, 1, 1]), "4D"),
    "an unknown voxel type": (nifti(datatype=7), "unknown voxel type 7"),
    "no voxel type": (nifti(datatype=0), "voxel type"),
    "colours": (nifti(datatype=128), "colours"),
    "complex numbers": (nifti(datatype=32), "complex"),
    "half of a pair": (nifti(magic=b"ni1"), "half of a pair"),
    "Analyze without a magic": (nifti(magic=b""), "not a NIfTI"),
    "voxels within the header": (nifti(vox_offset=0), "voxels start at byte 0"),
    "voxels far away": (nifti(vox_offset=3e9), "voxels start at byte 3e+09"),
    "voxels nowhere": (nifti(vox_offset=np.nan), "voxels start at byte nan"),
    "an infinite slope": (nifti(scl_slope=np.inf), "scaling that is not finite"),
    "an intercept that is not a number": (nifti(scl_slope=1, scl_inter=np.nan), "scaling that is not finite"),
    "an unknown unit of length": (nifti(xyzt_units=5), "unknown unit of length"),
    "no orientation": (nifti(sform_code=0, qform_code=0), "left and right are unknown"),
    "a damaged quaternion": (nifti(sform_code=0, qform_code=1, quatern_b=9), "left and right are unknown"),
    "an affine that is not a number": (nifti(srow_x=np.nan), "NaN"),
    "an affine of zeros": (nifti(srow_x=0, srow_y=0, srow_z=0), "no voxel spacing"),
    "an affine beyond any scale": (nifti(srow_x=[0, 0, 3e38, 0]), "voxels of"),
    "voxels of a micron": (nifti(xyzt_units=3), "outside 0.02 to 50"),
    "sheared axes": (nifti(srow_z=[3, 0.9, 0, 0]), "tilted gantry"),
    "forms that disagree on the side": (two_forms(np.diag([-1, 1, 1, 1]), np.eye(4)), "two orientations"),
    "one value": (nifti(values=np.full((12, 36, 44), -1000, np.int16)), "one value"),
    "NaN among the voxels": (nifti(values=np.where(patient() > 600, np.nan, patient()).astype("f4")), "NaN"),
    "values rescaled twice": (nifti(values=patient() - np.int16(1024)), "twice"),
    "values never rescaled": (nifti(values=(patient().astype("i4") + 1024).astype("u2")), "not Hounsfield units"),
    "values never rescaled, padded": (nifti(values=raw_ge()), "never been applied"),
    "a windowed export": (nifti(values=np.clip(patient() / 4 + 60, 0, 255).astype("u1")), "not Hounsfield units"),
    "a label map": (nifti(values=(patient() > 0).astype("u1")), "label map"),
    "too few slices": (nifti(values=patient()[:3]), "3 axial slices"),
    "too few pixels": (nifti(values=patient()[:, :9]), "9 x 44 pixels"),
    "a pipe": (pipe, "neither a file nor a folder"),
    "another format by name": (content("scan.vtk", b"# vtk"), "not a known kind of scan"),
    "nothing there": (lambda folder: folder / "scan.nii", "does not exist"),
}

# ----------------------------------------------------------------------------------------------------------- DICOM


def dicom(edit=None, skip=(), **options):
    """A maker of the patient's series with `edit(index, slice)` applied, but for the slices skipped."""

    def make(folder):
        slices = dicom_slices(folder / "series", patient((12, 40, 44)), **options)
        for index, ds in enumerate(slices):
            if edit:
                edit(index, ds)
        save(slices, skip)
        return folder / "series"

    return make


def with_tags(at=None, **values):
    def edit(index, ds):
        if at is None or index == at:
            for keyword, value in values.items():
                setattr(ds, keyword, value) if value is not None else delattr(ds, keyword)

    return dicom(edit)


def rewritten(change, which=4, edit=None):
    """A maker of the series with the bytes of one file changed."""

    def make(folder):
        path = dicom(edit)(folder)
        file = sorted(path.iterdir())[which]
        file.write_bytes(change(file.read_bytes()))
        return path

    return make


def length_of_pixels(data):
    """The pixel data claims 4 GB where less than a slice is left."""
    at = data.index(b"\xe0\x7f\x10\x00OW") + 8
    return data[:at] + struct.pack("<I", 0xFFFFFFF0) + data[at + 4 : -500]


def larger_frame(data):
    """The codestream of JPEG 2000 claims 60,000 x 60,000 pixels."""
    at = data.index(b"\xff\x4f\xff\x51") + 8
    return data[:at] + struct.pack(">II", 60_000, 60_000) + data[at + 8 :]


def compressed(syntax):
    return lambda index, ds: ds.compress(syntax)


def deflated(folder):
    path = dicom()(folder)
    (ds, *_) = dicom_slices(folder / "series", patient((12, 40, 44)))
    ds.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    dcmwrite(ds.filename, ds, enforce_file_format=True)
    return path


def many_nested(data):
    """A sequence in a sequence, 5,000 deep."""
    at = data.index(b"\xe0\x7f\x10\x00OW")
    item = b"\x08\x00\x40\x11SQ\0\0\xff\xff\xff\xff\xfe\xff\x00\xe0\xff\xff\xff\xff"
    return data[:at] + item * 5_000 + data[at:]


def two_series(folder):
    write_dicom(folder / "series", series=4)
    return write_dicom(folder / "series", series=7)


def twice(folder):
    path = dicom()(folder)
    copy = dicom_slices(path, patient((12, 40, 44)))[5]
    copy.filename = str(path / "copy")
    save([copy])
    return path


def linked_out(folder):
    path = dicom(skip=(5,))(folder)
    outside = write_dicom(folder / "outside", patient((12, 40, 44)))
    os.symlink(sorted(outside.iterdir())[6], path / "slice")
    return path


def turned_slice(index, ds):
    if index == 3:
        ds.ImageOrientationPatient = [0, 1, 0, 0, 0, -1]


def shifted(index, ds):
    if index == 6:
        x, y, z = ds.ImagePositionPatient
        ds.ImagePositionPatient = [x + 8, y, z]


def tilted(folder):
    axes = axes_of()
    axes[0, 1] = 0.5
    return write_dicom(folder / "series", axes=axes)


def enhanced(change):
    """A maker of an enhanced file changed by `change(dataset)`."""

    def make(folder):
        file = write_enhanced(folder / "enhanced", patient())
        ds = dcmread(file)
        change(ds)
        ds.save_as(file, enforce_file_format=True)
        return file

    return make


def index_of(names):
    return lambda folder: write_dicomdir(folder, patient(), names)


def index_without_a_class(folder):
    """A DICOMDIR whose class of object has a value representation that does not exist."""
    index = write_dicomdir(folder, patient())
    whole = index.read_bytes()
    at = whole.index(b"\x02\x00\x02\x00UI")
    index.write_bytes(whole[: at + 5] + b"\x00" + whole[at + 6 :])
    return index


DICOM = {
    "an empty folder": (lambda folder: folder, "empty folder"),
    "a folder of notes": (lambda folder: content("notes.txt", b"DICM")(folder).parent, "no DICOM image"),
    "a missing slice": (dicom(skip=(5,)), "misses slices"),
    "a slice twice": (twice, "at the position of another"),
    "two series": (two_series, "choose one with --series"),
    "a tilted gantry": (tilted, "tilted by 9.5 degrees"),
    "a localizer among the slices": (dicom(turned_slice), "mixes orientations"),
    "a slice shifted in plane": (dicom(shifted), "shifted"),
    "slices of two sizes": (
        rewritten(
            lambda data: data.replace(b"\x28\x00\x10\x00US\x02\x00\x28\x00", b"\x28\x00\x10\x00US\x02\x00\x20\x00")
        ),
        "different size",
    ),
    "two pixel spacings": (with_tags(3, PixelSpacing=[1.4, 1.4]), "mixes pixel spacings"),
    "another modality": (with_tags(Modality="MR"), "not CT"),
    "a modality that is no code": (with_tags(Modality=f"{SECRET} x"), "unnamed images"),
    "no position": (with_tags(2, ImagePositionPatient=None), "no slice position"),
    "no orientation of slices": (with_tags(2, ImageOrientationPatient=None), "no slice orientation"),
    "no rescale": (with_tags(2, RescaleSlope=None), "HU are unknown"),
    "a rescale to another unit": (with_tags(RescaleType="US"), "another unit than HU"),
    "a look-up table": (with_tags(ModalityLUTSequence=[Dataset()]), "look-up table"),
    "pixels in colour": (with_tags(PhotometricInterpretation="RGB", SamplesPerPixel=3), "colour"),
    "an odd number of bits": (with_tags(BitsAllocated=12), "12 bits a pixel"),
    "frames without positions": (with_tags(NumberOfFrames=3), "multi-frame"),
    "pixels beyond the files": (with_tags(Rows=30_000, Columns=1_000), "cut short"),
    "pixels beyond any scan": (with_tags(Rows=60_000, Columns=60_000), "more than 1073741824"),
    "no pixels": (with_tags(4, PixelData=None), "no pixels"),
    "pixels cut short": (rewritten(lambda data: data[:-500]), "of 12 in"),
    "a length of 4 GB": (rewritten(length_of_pixels), "of 12 in"),
    "a JPEG 2000 frame of another size": (rewritten(larger_frame, edit=compressed(JPEG2000Lossless)), "decoded"),
    "JPEG 2000 cut short": (rewritten(lambda data: data[:-800], edit=compressed(JPEG2000Lossless)), "of 12 in"),
    "RLE cut short": (rewritten(lambda data: data[:-400], edit=compressed(RLELossless)), "of 12 in"),
    "a deflated file": (deflated, "deflated"),
    "a header cut short": (rewritten(lambda data: data[:450], which=0), "cannot be parsed"),
    "sequences without end": (rewritten(many_nested), "cannot be parsed"),
    "a link that leads out": (linked_out, "link that leads out"),
    "values rescaled twice": (with_tags(RescaleIntercept=-2048), "twice"),
    "one slice": (dicom(skip=tuple(range(1, 12))), "one slice"),
    "an enhanced file of other frames": (enhanced(lambda ds: setattr(ds, "NumberOfFrames", 400)), "states 400 frames"),
    "an enhanced file without positions": (
        enhanced(lambda ds: [delattr(g, "PlanePositionSequence") for g in ds.PerFrameFunctionalGroupsSequence]),
        "no slice position",
    ),
    "an index that climbs out": (index_of([f"../{SECRET}/IM{i:04d}" for i in range(12)]), "outside of its folder"),
    "an index of missing files": (index_of([f"IMAGES/{SECRET}{i}" for i in range(12)]), "12 files that are not there"),
    "an index of nothing": (index_of([]), "lists 0 images"),
    "an index that is not known as one": (index_without_a_class, "not a DICOM image"),
}

# ---------------------------------------------------------------------------------------------- NumPy and pictures


def unit(shape=(1, 8, 24, 24)):
    return np.random.default_rng(0).uniform(0, 1, shape).astype(np.float32)


def npy(array, **options):
    def make(folder):
        np.save(folder / "volume.npy", array, **options)
        return folder / "volume.npy"

    return make


def declared(shape, descr="<f4"):
    """A .npy header in front of few bytes."""
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": descr, "fortran_order": False, "shape": shape})
    return stream.getvalue() + bytes(1000)


def npz(method=zipfile.ZIP_DEFLATED, **members):
    def make(folder):
        with zipfile.ZipFile(folder / "volume.npz", "w", method) as archive:
            for name, data in members.items():
                archive.writestr(f"{name}.npy", data)
        return folder / "volume.npz"

    return make


def packed(array):
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def zip_bomb(folder):
    """70 MB of zeros in 70 kB."""
    with zipfile.ZipFile(folder / "volume.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        with archive.open("volume.npy", "w") as file:
            np.lib.format.write_array_header_1_0(
                file, {"descr": "|u1", "fortran_order": False, "shape": (70, 1000, 1000)}
            )
            for _ in range(7):
                file.write(bytes(10**7))
    return folder / "volume.npz"


NUMPY = {
    "no array": (content("volume.npy", b"notes"), "not a plain NumPy array"),
    "an array without its header": (content("volume.npy", b"\x93NUMPY\x01\x00 nothing"), "not a plain NumPy array"),
    "a header that is code": (
        content("volume.npy", b"\x93NUMPY\x01\x00\x20\x00" + b"__import__('os').getcwd() ".ljust(32)),
        "not a plain NumPy array",
    ),
    "another version of the format": (content("volume.npy", b"\x93NUMPY\x02\x00\xff\xff\xff\xff"), "not a plain NumPy"),
    "pickled objects": (npy(np.full((8, 24, 24), None, object), allow_pickle=True), "pickled"),
    "an array cut short": (cut(npy(unit()), 0.5), "cut short"),
    "an array beyond the file": (content("volume.npy", declared((900, 1000, 1000))), "cut short"),
    "an array beyond any scan": (content("volume.npy", declared((9000, 9000, 9000))), "more than"),
    "a scan in HU": (npy(patient()), "where a NumPy volume lies in 0 to 1"),
    "CT2Rep's units": (npz(arr_0=packed((patient().clip(-1000, 200) + 400) / 600)), "where a NumPy volume lies"),
    "a stack of volumes": (npy(unit((2, 8, 24, 24))), "4D"),
    "text values": (npy(np.full((8, 24, 24), "x")), "real numbers"),
    "an archive of two arrays": (npz(a=packed(unit()), b=packed(unit())), "2 arrays"),
    "an archive of none": (npz(), "0 arrays"),
    "an archive packed otherwise": (npz(zipfile.ZIP_LZMA, a=packed(unit())), "packed in a way"),
    "an archive cut short": (cut(npz(a=packed(unit())), 0.5), "not a plain NumPy array"),
    "a zip bomb": (zip_bomb, "as no scan does"),
}


def pictures(edit=None, count=6, names="{}.png", **options):
    """A maker of a folder of numbered pictures of 40 x 32; `edit(folder)` has the last word."""

    def make(folder):
        folder = folder / "Axial_non_contrast"
        folder.mkdir()
        grey = np.random.default_rng(0).integers(0, 255, (count, 40, 32), np.uint8)
        for index, plane in enumerate(grey):
            Image.fromarray(plane).save(folder / names.format(index + 1), **options)
        if edit:
            edit(folder)
        return folder

    return make


def png_bomb(folder):
    """50,000 x 50,000 pixels of zeros: 2.5 GB from 3 MB."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 50_000, 50_000, 8, 0, 0, 0, 0))
    data = chunk(b"IDAT", zlib.compress(bytes(10**6)))
    (folder / "3.png").write_bytes(b"\x89PNG\r\n\x1a\n" + head + data + chunk(b"IEND", b""))


def text_bomb(folder):
    """A text chunk that unpacks to 10 MB."""
    info = PngImagePlugin.PngInfo()
    info.add_text("note", "x" * 10**7, zip=True)
    Image.new("L", (32, 40)).save(folder / "3.png", pnginfo=info)


def shorten(folder):
    file = folder / "4.png"
    file.write_bytes(file.read_bytes()[:-200])


def picture_linked_out(folder):
    (folder.parent / f"{SECRET}.png").write_bytes((folder / "3.png").read_bytes())
    (folder / "3.png").unlink()
    os.symlink(folder.parent / f"{SECRET}.png", folder / "3.png")


PICTURES = {
    "a picture that is none": (pictures(lambda folder: (folder / "3.png").write_text("notes")), "picture 3 in"),
    "a picture cut short": (pictures(shorten), "picture 4 in"),
    "two pictures of one number": (
        pictures(lambda folder: Image.new("L", (32, 40)).save(folder / "03.png")),
        "two pictures of number 3",
    ),
    "pictures of 16 bits": (
        pictures(lambda folder: Image.new("I;16", (32, 40)).save(folder / "3.png")),
        "more than 8 bits",
    ),
    "a picture bomb": (pictures(png_bomb), "picture 3 in"),
    "a text bomb in a picture": (pictures(text_bomb), "picture 3 in"),
    "another format behind .png": (
        pictures(lambda folder: Image.new("L", (32, 40)).save(folder / "3.png", "BMP")),
        "picture 3 in",
    ),
    "too few pictures": (pictures(count=3), "3 axial slices"),
    "blank pictures": (
        pictures(lambda folder: [Image.new("L", (32, 40)).save(file) for file in folder.iterdir()]),
        "one value",
    ),
    "a picture linked from elsewhere": (pictures(picture_linked_out), "through a link"),
}

KINDS = {
    f"{family}: {kind}": row
    for family, table in (("NIfTI", NIFTI), ("DICOM", DICOM), ("NumPy", NUMPY), ("pictures", PICTURES))
    for kind, row in table.items()
}


@pytest.mark.filterwarnings("ignore:Invalid value for VR")  # what the makers write on purpose
@pytest.mark.parametrize("kind", KINDS)
def test_malformed_volume_is_refused_in_one_sentence(tmp_path, kind):
    make, fragment = KINDS[kind]
    assert fragment and fragment in refusal(make(tmp_path))


def test_the_table_holds_enough_kinds():
    assert len(KINDS) >= 60
