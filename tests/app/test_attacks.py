"""What somebody sends who means ill: each of these once got through."""

import gzip
import struct
import zipfile

import nibabel as nib
import numpy as np
import pydicom

from tests.app.client import Client, files_of
from tests.app.served import served
from tests.scans.ct_fixtures import SECRET, patient, write_dicom, write_nifti

META = (
    "ObjectType = Image\nNDims = 3\nBinaryData = True\nBinaryDataByteOrderMSB = False\nCompressedData = False\n"
    "TransformMatrix = 1 0 0 0 1 0 0 0 1\nOffset = 0 0 0\nElementSpacing = 1.5 1.5 3\nDimSize = 44 36 12\n"
    "ElementType = MET_SHORT\n"
)


# ---- files that mean two things --------------------------------------------------------------------------------------


def test_no_file_of_the_server_is_opened_by_a_header(tmp_path):
    """ITK passes over a field in small letters and opens the file that the next one names."""
    other = tmp_path / "other.raw"
    (patient() + np.int16(7)).tofile(other)
    head = f"{META}elementdatafile = LOCAL\nElementDataFile = {other}\n".encode()
    with served(tmp_path) as (room, port):
        client = Client(port)
        client.open([(".mha", head + patient().tobytes())])
        found = np.frombuffer(client.raw("GET", "/api/slice?axis=0&index=0")[2], np.int16)
        assert not np.array_equal(found, patient()[0].ravel() + 7)


def test_a_header_with_a_giant_number_of_axes_ends_no_server(tmp_path):
    with served(tmp_path) as (room, port):
        client = Client(port)
        head = META.replace("NDims = 3", "NDims = 1000000\nndims = 3") + "ElementDataFile = LOCAL\n"
        assert "states a field of its header twice" in client.open([(".mha", head.encode() + patient().tobytes())])[1]
        assert Client(port).example()


# ---- names in the place of codes and numbers -------------------------------------------------------------------------


def test_a_name_in_the_place_of_a_code_or_a_size_is_not_repeated(tmp_path):
    with served(tmp_path) as (_, port):
        client = Client(port)
        for number, (keyword, vr) in enumerate((("Modality", "CS"), ("Columns", "LO"), ("Rows", "LO"))):
            study = tmp_path / str(number)
            for series in (1, 2):
                for file in write_dicom(study, series=series).iterdir():
                    dataset = pydicom.dcmread(file)
                    dataset[keyword] = pydicom.DataElement(keyword, vr, SECRET)
                    dataset.save_as(file)
            result, error = client.open(files_of(study))
            assert len(result["choices"]) == 2 and SECRET not in str(result)
            client.call("POST", "choose", {"number": 0})
            assert SECRET not in str(client.finished())


# ---- sizes and places that no scan has -------------------------------------------------------------------------------


def test_numbers_beyond_any_scan_are_a_sentence(tmp_path):
    far = write_nifti(tmp_path / "far.nii", patient(), origin=(3e38, 0, 0)).read_bytes()
    away = nib.Nifti2Image(patient().T, np.eye(4), None)
    away.set_sform(np.diag([0.001, 0.001, 0.003, 1]) + np.eye(4)[:, ::-1] * [0, 0, 0, 1e308], 1)
    away.header.set_xyzt_units("meter")
    many = META.replace("DimSize = 44", f"DimSize = {'9' * 400}") + "ElementDataFile = LOCAL\n"
    head = f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({'9' * 400}, 32, 32), }}".encode().ljust(501) + b"\n"
    array = b"\x93NUMPY\1\0" + len(head).to_bytes(2, "little") + head
    for number, file in enumerate(sorted(write_dicom(tmp_path / "dicom").iterdir())):
        dataset = pydicom.dcmread(file)
        dataset.ImagePositionPatient = [0, 0, f"{number}e200"]
        dataset.save_as(file)
    kinds = (
        ([(".nii", far)], "position"), ([(".nii", away.to_bytes())], "position"), ([(".mha", many.encode())], "empty"),
        ([(".npy", array)], "voxels, more than"), (files_of(tmp_path / "dicom"), "position"),
    )  # fmt: skip
    with served(tmp_path) as (_, port):
        client = Client(port)
        for files, part in kinds:
            result, error = client.open(files)
            assert result is None and part in error and len(error) < 200


def test_a_long_list_of_files_is_not_read(tmp_path, monkeypatch):
    """`zipfile` makes an object of each entry; a list may say that it is short, and be long in its 64-bit form."""
    entry = struct.pack("<4s6H3L5H2L", b"PK\1\2", 20, 20, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0) + b"x"
    listed, count = entry * 30_000, 30_000
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 1, 1, len(listed), 0, 0)
    end64 = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, count, count, len(listed), 0)
    short = struct.pack("<4sLQL", b"PK\6\7", 0, len(listed), 1) + struct.pack(
        "<4s4H2LH", b"PK\5\6", 0, 0, 1, 1, 47, 0, 0
    )
    read = []
    monkeypatch.setattr(zipfile.ZipFile, "_RealGetContents", lambda archive: read.append(archive))
    with served(tmp_path) as (_, port):
        client = Client(port)
        for ending, content in (
            (".npz", listed + end),
            (".npz", listed + end64 + short),
            (".zip", listed + end64 + short),
        ):
            result, error = client.open([(ending, content)])
            assert result is None and not read and ("more arrays than one" in error or "too many files" in error)


def test_a_packed_file_without_content_is_refused_at_once(tmp_path, monkeypatch):
    """`gzip` reads a name byte by byte, and empty parts one by one: a file of 1 GiB took minutes."""
    monkeypatch.setattr(gzip.GzipFile, "read", None)
    named = b"\x1f\x8b\x08\x08\0\0\0\0\0\xff" + b"a" * 2**18
    with served(tmp_path) as (_, port):
        for content in (named, gzip.compress(b"") * 5000):
            assert "is not a NIfTI file" in Client(port).open([(".nii.gz", content)])[1]
