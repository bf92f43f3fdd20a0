"""Whatever the bytes of a header, reading ends soon, stays small, and gives a volume or one sentence.

FUZZ_EXAMPLES sets how many files each test makes, else the profile of hypothesis does:

    FUZZ_EXAMPLES=1500 pytest tests/scans/test_fuzz.py --hypothesis-seed=7
"""

import contextlib
import gzip
import io
import os
import signal
import tracemalloc
import zipfile

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydicom.uid import JPEG2000Lossless, JPEGLSLossless, RLELossless

from tests.scans.ct_fixtures import (
    SECRET,
    UID,
    Volume,
    axes_of,
    dicom_slices,
    patient,
    save,
    write_dicomdir,
    write_nifti,
)
from tests.scans.test_itk_formats import write
from tghmoe_jax.errors import UserError
from tghmoe_jax.scans.reading import read_volume

SHAPE = (5, 34, 36)
MOST_SECONDS, MOST_BYTES = 10, 2**30
fuzz = settings(
    max_examples=int(os.environ.get("FUZZ_EXAMPLES", settings.default.max_examples)),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


class Hang(BaseException):
    """No `except Exception` of a reader may swallow it."""


@contextlib.contextmanager
def bounded():
    """Fails where the block takes longer than 10 s or more memory than 1 GiB at once."""

    def hang(*_):
        raise Hang(f"longer than {MOST_SECONDS} s")

    before = signal.signal(signal.SIGALRM, hang)
    signal.alarm(MOST_SECONDS)
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < MOST_BYTES
    finally:
        tracemalloc.stop()
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def survives(path):
    """Reads; the outcome is a finite volume or one sentence without patient data."""
    with bounded():
        try:
            volume = read_volume(path)
        except UserError as error:
            message = str(error)
        else:
            assert isinstance(volume, Volume) and np.isfinite(volume.array).all()
            message = " ".join((*volume.history, *volume.warnings, "."))
    assert message.endswith(".") and "\n" not in message and "\0" not in message, message
    assert SECRET not in message and UID not in message, message


def edits(size, least=1):
    """Some bytes to be set, and perhaps where the file is cut off."""
    byte = st.one_of(st.sampled_from([0, 1, 0x7F, 0x80, 0xFF]), st.integers(0, 255))
    cut = st.one_of(st.none(), st.none(), st.integers(0, size))
    return st.tuples(st.lists(st.tuples(st.integers(0, size - 1), byte), min_size=least, max_size=6), cut)


def edited(data, change):
    changes, cut = change
    data = bytearray(data)
    for place, byte in changes:
        data[place] = byte
    return bytes(data[:cut])


def word(offset, code, values):
    """An edit of one field of a header: `values` in the machine form `code`."""
    return st.sampled_from(values).map(
        lambda value: [(offset + i, b) for i, b in enumerate(np.array(value, code).tobytes())]
    )


@pytest.fixture(scope="module")
def nifti(tmp_path_factory):
    path = write_nifti(tmp_path_factory.mktemp("nifti") / "scan.nii", patient(SHAPE))
    data = bytearray(path.read_bytes())
    data[148 : 148 + len(SECRET)] = SECRET.encode()  # descrip
    data[228 : 228 + len(SECRET)] = SECRET.encode()  # aux_file
    return bytes(data)


@fuzz
@given(change=edits(352), packed=st.booleans())
def test_any_nifti_header(tmp_path, nifti, change, packed):
    path = tmp_path / f"scan.nii{'.gz' if packed else ''}"
    data = edited(nifti, change)
    path.write_bytes(gzip.compress(data, 1) if packed else data)
    survives(path)


EXTREMES = [0, 1, -1, 2, 7, 8, 255, 32767, -32768]
REALS = [0.0, -1.0, np.nan, np.inf, -np.inf, 1e38, 1e-38, 352.0, 3e9, 2.0**24]
FIELDS = st.one_of(
    *[word(40 + 2 * i, "<i2", EXTREMES) for i in range(8)],  # dim
    *[word(place, "<i2", [0, 1, 2, 4, 8, 16, 64, 128, 512, 768, 1280, 1536, 2304, -1]) for place in (70, 72)],
    *[word(place, "<f4", REALS) for place in (*range(76, 120, 4), *range(256, 328, 4))],  # pixdim, offset, scale, forms
    *[word(place, "<i2", EXTREMES) for place in (252, 254)],  # form codes
    st.integers(0, 255).map(lambda value: [(123, value)]),  # units
)


@fuzz
@given(fields=st.lists(FIELDS, min_size=1, max_size=4), packed=st.booleans())
def test_extreme_nifti_fields(tmp_path, nifti, fields, packed):
    path = tmp_path / f"scan.nii{'.gz' if packed else ''}"
    data = edited(nifti, (sum(fields, []), None))
    path.write_bytes(gzip.compress(data, 1) if packed else data)
    survives(path)


@pytest.fixture(scope="module", params=[".nrrd", ".mha"])
def by_itk(tmp_path_factory, request):
    path = tmp_path_factory.mktemp("itk") / f"scan{request.param}"
    return path, write(path, patient(SHAPE), axes_of(), packed=True).read_bytes()


@fuzz
@given(data=st.data())
def test_any_nrrd_or_meta_image(by_itk, data):
    path, whole = by_itk
    path.write_bytes(edited(whole, data.draw(edits(min(len(whole), 700)))))
    survives(path)


@fuzz
@given(data=st.data())
def test_any_packed_stream(tmp_path, nifti, data):
    path = tmp_path / "scan.nii.gz"
    packed = gzip.compress(nifti, 1, mtime=0)
    path.write_bytes(edited(packed, data.draw(edits(min(len(packed), 600)))))
    survives(path)


@fuzz
@given(data=st.data(), packed=st.booleans())
def test_any_numpy_header(tmp_path, data, packed):
    stream = io.BytesIO()
    np.save(stream, (patient(SHAPE).astype(np.float32) + 1000) / 3000)
    array = edited(stream.getvalue(), data.draw(edits(128, least=0)))
    path = tmp_path / f"volume.np{'z' if packed else 'y'}"
    if packed:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("arr_0.npy", array)
        whole = path.read_bytes()
        head, tail = data.draw(edits(60, least=0))[0], data.draw(edits(90, least=0))[0]
        path.write_bytes(edited(whole, (head + [(len(whole) - 90 + place, byte) for place, byte in tail], None)))
    else:
        path.write_bytes(array)
    survives(path)


@fuzz
@given(
    shape=st.lists(st.sampled_from([0, 1, 4, 5, 34, 36, -1, 2**31, 2**63, 10**30, True, "16"]), max_size=5),
    descr=st.sampled_from(["<f4", ">i8", "|u1", "|O", "<U9999999", "|V99999999", ("<f4", (10**6,)), "", 7, "<f16"]),
    order=st.sampled_from([True, False, "yes"]),
)
def test_any_numpy_declaration(tmp_path, shape, descr, order):
    head = repr({"descr": descr, "fortran_order": order, "shape": tuple(shape)}).encode()
    path = tmp_path / "volume.npy"
    path.write_bytes(b"\x93NUMPY\x01\x00" + len(head).to_bytes(2, "little") + head + bytes(4 * int(np.prod(SHAPE))))
    survives(path)


@pytest.fixture(scope="module", params=[None, RLELossless, JPEG2000Lossless, JPEGLSLossless], ids=str)
def series(tmp_path_factory, request):
    folder = tmp_path_factory.mktemp("series")
    slices = dicom_slices(folder, patient(SHAPE))
    for ds in slices:
        if request.param:
            ds.compress(request.param)
    save(slices)
    return folder


@fuzz
@given(data=st.data())
def test_any_dicom_header(series, data):
    file = sorted(series.iterdir())[data.draw(st.integers(0, SHAPE[0] - 1))]
    whole = file.read_bytes()
    try:
        file.write_bytes(edited(whole, data.draw(edits(len(whole)))))
        survives(series)
    finally:
        file.write_bytes(whole)


@fuzz
@given(data=st.data())
def test_any_index_of_a_medium(tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp() / "medium"
    if not folder.exists():
        write_dicomdir(folder, patient(SHAPE))
    whole = (folder / "DICOMDIR").read_bytes()
    try:
        (folder / "DICOMDIR").write_bytes(edited(whole, data.draw(edits(len(whole)))))
        survives(folder / "DICOMDIR")
    finally:
        (folder / "DICOMDIR").write_bytes(whole)
