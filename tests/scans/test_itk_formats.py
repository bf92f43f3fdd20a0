"""NRRD and MetaImage: the same volume as of the NIfTI file of the same scan, and what is refused."""

import re
import sys

import numpy as np
import pytest
import SimpleITK as sitk

from tests.scans.ct_fixtures import (
    ORIGIN,
    REAL,
    SECRET,
    assert_same_volume,
    axes_of,
    needs_real,
    patient,
    refusal,
    turned,
    write_nifti,
)
from tests.scans.test_nifti import ORIENTATIONS
from tghmoe_jax.scans.itk_formats import NAMES
from tghmoe_jax.scans.reading import read_volume


def write(path, stored, axes, origin=ORIGIN, packed=False):
    """A stored array (z, y, x) whose axis i steps by row i of `axes` (LPS, mm), by SimpleITK."""
    image = sitk.GetImageFromArray(np.ascontiguousarray(stored))
    spacing = np.linalg.norm(axes, axis=1)
    image.SetSpacing([float(s) for s in spacing[::-1]])
    image.SetDirection((axes / spacing[:, None])[::-1].T.ravel().tolist())
    image.SetOrigin([float(v) for v in origin])
    image.SetMetaData("note", f"{SECRET}^NAME")
    sitk.WriteImage(image, str(path), packed)
    return path


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_every_orientation_gives_the_volume_of_the_nifti_file(tmp_path, name, packed):
    wanted = read_volume(write_nifti(tmp_path / "scan.nii", patient()))
    for orientation in ORIENTATIONS[::5]:
        order, flips = orientation[:, 0].astype(int), orientation[:, 1] < 0
        stored, axes, origin = turned(patient(), axes_of(), ORIGIN, tuple(order), tuple(flips))
        volume = read_volume(write(tmp_path / f"scan{name}", stored, axes, origin, packed))
        assert_same_volume(volume, wanted)
        assert volume.warnings == () and SECRET not in " ".join(volume.history)


@pytest.mark.parametrize("dtype", ["i2", "u2", "i4", "f4", "f8"])
@pytest.mark.parametrize("name", [".nrrd", ".mha"])
def test_every_voxel_type_gives_one_volume(tmp_path, name, dtype):
    hu = patient()
    stored = hu.astype(dtype) if dtype != "u2" else (hu.astype(int) + 1024).astype(dtype)
    path = write(tmp_path / f"scan{name}", stored, axes_of())
    if dtype == "u2" and name == ".mha":
        scaled = b"ElementToIntensityFunctionSlope = 1\nElementToIntensityFunctionOffset = -1024\nElementType"
        path.write_bytes(path.read_bytes().replace(b"ElementType", scaled))  # SimpleITK does not apply it
    elif dtype == "u2":
        assert "not Hounsfield units" in refusal(path)
        return
    np.testing.assert_array_equal(read_volume(path).array, hu)


@needs_real
@pytest.mark.parametrize("name", [".nrrd", ".mha"])
def test_a_real_scan_is_read_alike(tmp_path, name):
    sitk.WriteImage(sitk.ReadImage(str(REAL / "abdomen_slab_3mm.nii.gz")), str(tmp_path / f"scan{name}"), True)
    assert_same_volume(read_volume(tmp_path / f"scan{name}"), read_volume(REAL / "abdomen_slab_3mm.nii.gz"))


@pytest.mark.parametrize(("space", "signs"), [("right-anterior-superior", (-1, -1, 1)), ("LAS", (1, -1, 1))])
def test_a_space_of_the_patient_is_turned_to_his_axes(tmp_path, space, signs):
    path = write(tmp_path / "scan.nrrd", patient(), axes_of() * signs)
    path.write_bytes(path.read_bytes().replace(b"left-posterior-superior", space.encode()))
    assert_same_volume(read_volume(path), read_volume(write_nifti(tmp_path / "scan.nii", patient())))


def changed(name, pattern, by, packed=False):
    """A maker of the patient's file whose header text is changed."""

    def make(folder):
        path = write(folder / name, patient(), axes_of(), packed=packed)
        data, count = re.subn(pattern, by, path.read_bytes(), count=1)
        assert count == 1
        path.write_bytes(data)
        return path

    return make


def damaged(name, change, packed=True):
    """A maker of the patient's file with the bytes of its data changed."""

    def make(folder):
        path = write(folder / name, patient(), axes_of(), packed=packed)
        path.write_bytes(change(path.read_bytes()))
        return path

    return make


def without_data(folder):
    path = write(folder / "scan.mhd", patient(), axes_of())
    (folder / "scan.raw").unlink()
    return path


def linked_data(folder):
    path = write(folder / "scan.nhdr", patient(), axes_of())
    (folder / "scan.raw").rename(folder.parent / "elsewhere.raw")
    (folder / "scan.raw").symlink_to(folder.parent / "elsewhere.raw")
    return path


def text(data):
    def make(folder):
        (folder / "scan.nrrd").write_bytes(data)
        return folder / "scan.nrrd"

    return make


def flip(data):
    return data[:-1200] + bytes([data[-1200] ^ 255]) + data[-1199:]


KINDS = {
    "no NRRD": (text(b"notes"), "not a NRRD file"),
    "a NRRD magic alone": (text(b"NRRD0004\n"), "not one 3D volume"),
    "no space": (changed("scan.nrrd", rb"space: left.*\n", b""), "states no orientation"),
    "a space of the scanner": (changed("scan.nrrd", rb"left-posterior-superior", b"scanner-xyz"), "no orientation"),
    "no directions": (changed("scan.nrrd", rb"space directions: .*\n", b"spacings: 1 1 1\n"), "no orientation"),
    "metres": (changed("scan.nrrd", rb"kinds:", b'space units: "m" "m" "m"\nkinds:'), "another unit than mm"),
    "4D": (changed("scan.nrrd", rb"dimension: 3", b"dimension: 4"), "dimension is not 3"),
    "text as data": (changed("scan.nrrd", rb"encoding: raw", b"encoding: ascii"), "encoded in a way"),
    "blocks": (changed("scan.nrrd", rb"type: short", b"type: block"), "no plain numbers"),
    "a size beyond the file": (changed("scan.nrrd", rb"sizes: 44 36 12", b"sizes: 440 360 120"), "cut short"),
    "a size beyond any scan": (changed("scan.nrrd", rb"sizes: 44", b"sizes: 4400000000"), "more than"),
    "fewer slices than stored": (changed("scan.nrrd", rb"sizes: 44 36 12", b"sizes: 44 36 6"), "more voxels"),
    "data elsewhere": (changed("scan.nhdr", rb"data file: .*", b"data file: ../scan.raw"), "outside of its folder"),
    "data of the system": (
        changed("scan.mhd", rb"ElementDataFile = .*", b"ElementDataFile = /etc/passwd"),
        "outside of its folder",
    ),
    "data by a link": (linked_data, "outside of its folder"),
    "several data files": (changed("scan.nhdr", rb"data file: .*", b"data file: s%03d 1 9 1"), "several files"),
    "a NRRD cut short": (damaged("scan.nrrd", lambda data: data[:-300]), "cut short"),
    "a NRRD of wrong bits": (damaged("scan.nrrd", flip), "damaged"),
    "no MetaImage": (lambda folder: text(b"notes")(folder).rename(folder / "scan.mha"), "not a MetaImage file"),
    "no data file": (without_data, "not there"),
    "no matrix": (changed("scan.mha", rb"TransformMatrix = .*\n", b""), "no orientation"),
    "no spacing": (changed("scan.mha", rb"ElementSpacing = .*\n", b""), "no voxel spacing"),
    "a MetaImage cut short": (damaged("scan.mha", lambda data: data[:-300]), "cut short"),
    "a MetaImage of wrong bits": (damaged("scan.mha", flip), "damaged"),
    "a plain MetaImage cut short": (damaged("scan.mha", lambda data: data[:-300], False), "cut short"),
    "colours": (changed("scan.mha", rb"ElementType", b"ElementNumberOfChannels = 3\nElementType"), "no plain numbers"),
    "centimetres": (changed("scan.mha", rb"ElementType", b"DistanceUnits = cm\nElementType"), "another unit than mm"),
    "a field twice": (changed("scan.nrrd", rb"sizes:", b"Sizes: 44 36 12\nsizes:"), "a field of its header twice"),
    "a field twice, in other letters": (changed("scan.mha", rb"NDims = 3", b"NDims = 9\nndims = 3"), "header twice"),
    "two names of one field": (changed("scan.mha", rb"Offset =", b"Origin = 0 0 0\nOffset ="), "header twice"),
    "no order of bytes": (changed("scan.nrrd", rb"endian: .*\n", b""), "order of its bytes"),
    "a type of another format": (changed("scan.nrrd", rb"type: short", b"type: long"), "no plain numbers"),
    "axes that are no places": (changed("scan.nrrd", rb"kinds: domain", b"kinds: vector"), "no plain numbers"),
    "an origin that is no place": (changed("scan.nrrd", rb"space origin: .*", b"space origin: (1,nan,2)"), "position"),
    "a name longer than any file's": (
        changed("scan.mhd", rb"ElementDataFile = .*", b"ElementDataFile = " + b"a" * 300),
        "not there",
    ),
    "sheared axes": (changed("scan.nrrd", rb"\(0,0,3\)", b"(0,0.9,3)"), "tilted gantry"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_malformed_file_is_refused_in_one_sentence(tmp_path, kind, capfd):
    make, fragment = KINDS[kind]
    (tmp_path / "set").mkdir()
    assert fragment in refusal(make(tmp_path / "set"))
    assert capfd.readouterr().err == ""


def test_letters_that_contradict_the_matrix_are_a_warning(tmp_path):
    path = changed("scan.mha", rb"AnatomicalOrientation = RAI", b"AnatomicalOrientation = LAI")(tmp_path)
    (warning,) = read_volume(path).warnings
    assert "contradicts" in warning


def test_simpleitk_is_not_needed(tmp_path, monkeypatch):
    path = write(tmp_path / "scan.nrrd", patient(), axes_of())
    monkeypatch.setitem(sys.modules, "SimpleITK", None)
    assert read_volume(path).array.shape == patient().shape


@pytest.mark.parametrize("name", [".nrrd", ".mha"])
def test_the_order_of_bytes_is_that_of_the_header(tmp_path, name):
    path = write(tmp_path / f"scan{name}", patient(), axes_of())
    data = patient().astype(">i2").tobytes()
    head = path.read_bytes()[: -len(data)]
    head = head.replace(b"endian: little", b"endian: big").replace(b"OrderMSB = False", b"OrderMSB = True")
    path.write_bytes(head + data)
    np.testing.assert_array_equal(read_volume(path).array, patient())


def test_data_at_the_end_of_a_file_are_found_there(tmp_path):
    path = changed("scan.mhd", rb"ElementType", b"HeaderSize = -1\nElementType")(tmp_path)
    raw = tmp_path / "scan.raw"
    raw.write_bytes(bytes(1000) + raw.read_bytes())
    np.testing.assert_array_equal(read_volume(path).array, patient())
