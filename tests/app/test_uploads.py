"""What is sent to the reading room: scans are opened, everything else is one sentence that leaves nothing behind."""

import asyncio

import numpy as np
import pytest

from tests.app.bad_uploads import malformed, nifti, zipped, zips
from tests.app.client import Client, files_of, packed
from tests.app.served import served
from tests.scans.ct_fixtures import SECRET, patient, write_dicom
from tghmoe_jax.app import uploads
from tghmoe_jax.app.room import Limits
from tghmoe_jax.errors import UserError


def nothing_left(room):
    return not [one for one in room.folder.rglob("*") if one.is_file()]


def is_sentence(text):
    """One line that says what is wrong and what to do, without a path, a flag or a name."""
    good = text and text.endswith(".") and "\n" not in text and (";" in text or ":" in text)
    return good and not any(part in text for part in (SECRET, "/tmp", "--", "Error", "Traceback", "tghmoe-app"))


@pytest.mark.filterwarnings("ignore:Invalid value for VR", "ignore:Duplicate name")  # of what the makers write
@pytest.mark.parametrize("step", [12, pytest.param(1, marks=pytest.mark.slow)])
def test_a_bad_upload_is_one_sentence_and_leaves_nothing(tmp_path, step, capfd):
    kinds = {kind: [(".zip", data)] for kind, data in zips(tmp_path, step == 1).items()}
    (tmp_path / "made").mkdir()
    kinds |= malformed(tmp_path / "made", step)
    assert len(kinds) >= (100 if step == 1 else 25)
    capfd.readouterr()
    with served(tmp_path, Limits(minute=10**6)) as (room, port):
        client = Client(port)
        for kind, files in kinds.items():
            result, error = client.open(files)
            assert result is None and is_sentence(error), (kind, result, error)
            assert nothing_left(room), kind
        result, _ = client.open([(".nii", nifti(tmp_path))])  # the page goes on
        assert result["scan"]["shape"] == [12, 36, 44]
    assert SECRET not in "".join(capfd.readouterr())


def test_every_form_of_a_scan_opens_and_leaves_no_file(tmp_path):
    dicom = files_of(write_dicom(tmp_path / "dicom"))
    unit = np.random.default_rng(0).random((1, 12, 36, 44)).astype(np.float32)
    np.save(tmp_path / "m3d.npy", unit)
    forms = {
        "DICOM files": dicom,
        "a zip file of DICOM": [(".zip", zipped({f"a/{SECRET}{i}": data for i, (_, data) in enumerate(dicom)}))],
        "NIfTI": [(".nii", nifti(tmp_path))],
        "a zip file of NIfTI": [(".zip", zipped({f"{SECRET}.nii": nifti(tmp_path), "README": b"text"}))],
        "an array": files_of(tmp_path / "m3d.npy"),
    }
    with served(tmp_path) as (room, port):
        client = Client(port)
        for form, files in forms.items():
            result, error = client.open(files)
            assert result["scan"]["shape"] == [12, 36, 44] and not error, (form, error)
            assert (result["scan"]["affine"] is None) == (form == "an array")
            assert nothing_left(room), form


def test_several_series_are_listed_and_the_chosen_one_is_read(tmp_path):
    write_dicom(tmp_path / "study", patient(), series=1)
    write_dicom(tmp_path / "study", patient((8, 36, 44)), series=2)
    with served(tmp_path) as (room, port):
        client = Client(port)
        result, _ = client.open(files_of(tmp_path / "study"))
        assert result == {"choices": ["CT, 36 x 44, 12 slices", "CT, 36 x 44, 8 slices"]}
        for number, slices in ((1, 8), (0, 12)):
            assert client.call("POST", "choose", {"number": number})[0] == 200
            assert client.finished()["result"]["scan"]["shape"][0] == slices
        assert client.call("POST", "choose", {"number": 2})[0] == 400
        assert not nothing_left(room)  # the other series may still be chosen
        client.call("DELETE", "session")
        assert nothing_left(room)


def test_limits_are_seen_before_anything_is_read(tmp_path):
    scan = [(".nii", nifti(tmp_path))]
    with served(tmp_path, Limits(bytes=1000)) as (room, port):
        assert "more than the 1000" in Client(port).open(scan)[1] and not list(room.folder.iterdir())
    with served(tmp_path, Limits(voxels=1000)) as (room, port):
        assert "12 x 36 x 44 voxels, more than 1000" in Client(port).open(scan)[1] and nothing_left(room)
    with served(tmp_path, Limits(memory=1000)) as (_, port):
        assert "holds too many scans" in Client(port).open(scan)[1]


@pytest.mark.parametrize(
    "body, length",
    [
        (b"", 0),
        (b"\0\0\0", 3),
        (b"\xff\xff\xff\xff", 4),
        (packed([(".nii", b"1234")]), 1000),  # the connection ends too soon
        (packed([(".nii", b"1234")])[:-1], None),
        (packed([(".nii", b"1234")]) + b"5", None),
        (b"\0\0\0\2[]", None),
        (b"\0\0\0\1{", None),
        (b'\0\0\0\x0f[[".nii", -1]]  ', None),
        (b'\0\0\0\x0e[["../x", true]]', None),
        (packed([("", b"")] * 20_001), None),
        (b"\0\0\x20\0" + b"[" * 8192, None),
    ],
)
def test_a_body_of_another_form_is_refused(tmp_path, body, length):
    async def chunks():
        for start in range(0, len(body), 5000):
            yield body[start : start + 5000]

    with pytest.raises(UserError):
        asyncio.run(uploads.receive(chunks(), len(body) if length is None else length, tmp_path / "in", 2**20))


def test_no_name_of_a_file_is_ever_a_path(tmp_path):
    """Endings that are paths put their files under numbers like any other."""

    async def chunks():
        yield packed([("/../../etc/passwd", b"x"), (".nii/../../y", b"y"), ("a.ZIP", b"z")])

    folder = tmp_path / "in"
    asyncio.run(uploads.receive(chunks(), len(asyncio.run(anext(chunks()))), folder, 2**20))
    found = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file())
    assert found == ["in/dicom/00000.dcm", "in/dicom/00001.dcm", "in/files/00002.zip"]
