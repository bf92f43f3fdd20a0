"""Lists of scans: what a row may say, what is refused by its line, and which scans a folder holds."""

import numpy as np
import pytest

from tests.scans import ct_fixtures as ct
from tghmoe_jax.datasets.scan_list import Listed, read_list, read_listed
from tghmoe_jax.errors import UserError
from tghmoe_jax.samples.questions import Question
from tghmoe_jax.scans.finding import find_scans


def test_rows_of_a_volume_are_one_scan_with_their_questions(tmp_path):
    (tmp_path / "list.csv").write_text(
        "PatientName,id,volume,question,choices,answer,case\n"
        "Doe,one,a.npy,Which plane?,axial|coronal,axial,p\n"
        "Roe,two,sub/b.npy,,,,q\n"
        "Doe,one,a.npy,What is shown?,,,p\n"
    )
    plane = Question("vqa", "closed", "question", "Which plane?", ("axial", "coronal"), "axial")
    shown = Question("vqa", "open", "question", "What is shown?", (), "")
    expected = [Listed("a.npy", "one", 0, (plane, shown)), Listed("sub/b.npy", "two", 1)]
    assert read_list(tmp_path / "list.csv") == (tmp_path, expected)
    assert read_list(tmp_path / "list.csv", tmp_path / "scans")[0] == tmp_path / "scans"
    assert plane.letter == "A" and shown.letter == "" and Question(*["vqa"] * 4, ("a", "b"), "").letter == ""


def test_a_manifest_is_a_list(tmp_path):
    """... whose line with an empty question asks for a report, as in training."""
    (tmp_path / "m.jsonl").write_text(
        '{"volume": "a.npy", "question": "", "answer": "Normal.", "split": "test"}\n{"volume": "b#series=2"}\n'
    )
    (first, second) = read_list(tmp_path / "m.jsonl")[1]
    assert [(q.kind, q.answer) for q in first.questions] == [("report", "Normal.")]
    assert second == Listed("b#series=2", "b#series=2")


@pytest.mark.parametrize("text, message", [
    ("volume\n../secret.npy\n", ":2: its path climbs out of its folder with '..'"),
    ("volume\n/secret.npy\n", ":2: its path is absolute"),
    ("volume\na\na\n", ":3: its volume has a row without a question"),
    ("volume,question\na,q\na,q\n", ":3: the same is asked"),
    ("volume,id\na,1\nb,1\n", "gives two volumes the same id"),
    ("volume,id,question\na,1,q\na,2,r\n", ":3: another row gives its volume another id or case"),
    ("volume,answer\na,secret\n", ":2: the answer has no question"),
    ("volume,question,choices,answer\na,q,x|y,secret\n", ":2: the answer is not one of the choices"),
    ("volume,question,choices\na,q,x\n", ":2: the choices are not a list of 2 to 4"),
    ("volume,id\na\n", ":2: the row has 1 fields"), ("path\na\n", "lacks the column volume"),
    ("volume\n", "lists no scan"), ("volume#series\na\n", "lacks the column volume"),
    ("volume\na#series=0\n", ":2: what follows #series= is not a number"),
])  # fmt: skip
def test_a_wrong_row_is_refused_by_its_line_and_not_quoted(tmp_path, text, message):
    (tmp_path / "list.csv").write_text(text)
    with pytest.raises(UserError) as error:
        read_list(tmp_path / "list.csv")
    assert message in str(error.value) and "secret" not in str(error.value)


@pytest.mark.parametrize("name", ["absent.csv", "list.txt"])
def test_what_is_no_list_is_refused(tmp_path, name):
    (tmp_path / "list.txt").write_text("volume\n")
    with pytest.raises(UserError, match=r"is no folder, \.csv or \.jsonl"):
        read_list(tmp_path / name)


def test_every_scan_of_a_folder_is_found_once(tmp_path):
    for name in ("b/x.npy", "b/c/y.nii.gz", "z.mha", ".hidden/n.npy", ".a.npy", "notes.txt", "pictures/1.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    series = tmp_path / "patient" / "study"
    (series / "more").mkdir(parents=True)
    (series / "none").mkdir()
    for file in (series / "IM1", series / "more" / "IM2"):
        file.write_bytes(bytes(128) + b"DICM")
    found = ["b/c/y.nii.gz", "b/x.npy", "patient/study", "pictures", "z.mha"]
    assert find_scans(tmp_path) == found
    assert [scan.volume for scan in read_list(tmp_path)[1]] == found
    with pytest.raises(UserError, match="is itself one scan"):
        find_scans(series)
    with pytest.raises(UserError, match="holds no scan"):
        find_scans(series / "none")


@pytest.mark.parametrize("content", [None, b"", b"no array", b"\x93NUMPY\x01\x00"])
def test_why_a_scan_cannot_be_read_never_holds_its_path(tmp_path, content):
    name = f"{ct.SECRET}.npy"
    if content is not None:
        (tmp_path / name).write_bytes(content)
    fault = read_listed(tmp_path, {"slices": 4, "size": 8, "channels": "windows3"}, None, False, Listed(name, "scan 1"))
    assert isinstance(fault, str) and fault.startswith("scan 1") and ct.SECRET not in fault
    assert str(tmp_path) not in fault


def test_a_scan_of_a_list_is_the_one_that_predict_reads(tmp_path):
    np.save(tmp_path / "a.npy", np.random.default_rng(0).random((1, 8, 32, 32), np.float32))
    data = {"slices": 4, "size": 8, "channels": "windows3"}
    found = read_listed(tmp_path, data, None, False, Listed("a.npy", "a"))
    assert found.prepared.slices.shape == (4, 8, 8, 3) and found.warnings
