"""The whole command `python -m tghmoe_jax.prepare`: what it leaves, what it refuses, and that a kill costs nothing."""

import json
import random
import re
import signal
import subprocess
import warnings
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest

from tests import tiny_run
from tests.datasets import dataset_fixtures
from tests.prepare_runs import KILLED_AT_FILE, SHARD, VOLUMES, arguments, contents, rows, started, write_scans
from tests.scans import ct_fixtures as ct
from tghmoe_jax import prepare
from tghmoe_jax.datasets import prepared, preparing, workers
from tghmoe_jax.scans.reading import read_volume
from tghmoe_jax.scans.slices import prepare_slices

KILLS = 20


@pytest.fixture(scope="module")
def scans(tmp_path_factory) -> Path:
    return write_scans(tmp_path_factory.mktemp("scans"))


@pytest.fixture(scope="module")
def unbroken(scans, tmp_path_factory) -> Path:
    """The set as one process makes it at once."""
    folder = tmp_path_factory.mktemp("unbroken") / "set"
    process = started(scans, folder, "--workers=1")
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert "13 of 13 volumes, 1 rejected" in out
    return folder


def test_the_set_holds_every_volume_once_as_the_model_reads_it(scans, unbroken):
    found = prepared.PreparedSet(unbroken, 8, 24)
    assert list(found.rows) == [f"{i}.npy" for i in range(VOLUMES) if i != 4]
    for key in found.rows:
        slices, mask = found.grid(key).slices(8, "windows3")
        wanted = prepare_slices(read_volume(scans / key), 8, 24)
        assert np.array_equal(slices, wanted.slices) and np.array_equal(mask, wanted.slice_mask)
    assert {path.name for path in unbroken.iterdir()} == {
        ".lock", "card.json", "card.md", "digests.json", "durations.json", "items.jsonl", "leaks.csv", "prepare.json",
        "rejected.csv", "volumes", "warnings.csv",
    }  # fmt: skip
    assert len(list((unbroken / "volumes").glob("*.array_record"))) == 3
    (bad,) = rows(unbroken / "rejected.csv")
    assert bad["where"] == "4.npy" and bad["reason"].endswith(".") and str(scans) not in bad["reason"]
    assert json.loads((unbroken / "card.json").read_text())["volumes"] == {"train": 6, "validation": 3, "test": 3}


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\u0085", " "])
def test_texts_with_other_line_separators_are_checked_prepared_and_read(tmp_path, separator, capsys):
    """A report pasted from a web page (U+2028, U+2029), or with an ellipsis read as Latin-1 (U+0085)."""
    report = f"Findings: no effusion{separator}and nothing else. Impression: normal."
    np.save(tmp_path / "0.npy", np.random.default_rng(0).random((1, 8, 32, 32), np.float32))
    line = {"volume": "0.npy", "question": "", "answer": report, "task": "report", "split": "train"}
    file = dataset_fixtures.write_lines(tmp_path / "manifest.jsonl", [line])
    assert prepare.main(["--check", str(file)]) == 0
    assert prepare.main(arguments(tmp_path, tmp_path / "set", "--workers=1")) == 0
    (item,) = prepared.PreparedSet(tmp_path / "set", 8, 24).items
    assert item.answer == report
    capsys.readouterr()
    assert prepare.main(arguments(tmp_path, tmp_path / "set")) == 0 and "is prepared already" in capsys.readouterr().out


def test_equal_numbers_in_the_two_archives_of_m3d_are_two_patients(tmp_path):
    """000007 of ct_case is trained on, 000007 of ct_quizze tested; two volumes of one case are still a leak."""
    splits = {"train": ["ct_case/000007", "ct_case/000008"], "test": ["ct_quizze/000007", "ct_case/000008"]}
    rng = np.random.default_rng(0)
    index = {}
    for split, cases in splits.items():
        for case in cases:
            folder = tmp_path / "M3D_Cap_npy" / case
            folder.mkdir(parents=True, exist_ok=True)
            np.save(folder / f"{split}.npy", rng.random((1, 8, 32, 32), np.float32))
            (folder / "text.txt").write_text(f"study_findings: Seen in {case}.")
            place = f"M3D_Cap_npy/{case}"
            index.setdefault(split, []).append({"image": f"{place}/{split}.npy", "text": f"{place}/text.txt"})
    dataset_fixtures.write_json(tmp_path / "M3D_Cap_npy" / "M3D_Cap.json", index)
    config = tiny_run.ROOT / "configs" / "data_m3d.py"
    flags = arguments(tmp_path, tmp_path / "set", "--workers=1")[1:]
    assert prepare.main([f"--config={config}", *flags]) == 0
    found = [(row["kind"], row["key_a"], row["key_b"]) for row in rows(tmp_path / "set" / "leaks.csv")]
    assert found == [("case", "M3D_Cap_npy/ct_case/000008/train.npy", "M3D_Cap_npy/ct_case/000008/test.npy")]


def test_what_a_reader_warns_of_is_kept(tmp_path):
    """In the provenance of the volume, in warnings.csv and as counts of the card."""
    inverted = ct.dicom_slices(tmp_path / "inverted", dataset_fixtures.body(1))
    for one in inverted:
        one.PhotometricInterpretation = "MONOCHROME1"
    ct.save(inverted)
    ct.write_nifti(tmp_path / "plain.nii", dataset_fixtures.body(2))
    affine = ct.affine_of(ct.axes_of())
    moved = nib.Nifti1Image(dataset_fixtures.body(3), affine)
    moved.set_sform(affine, code=1)
    affine[2, 3] += 20
    moved.set_qform(affine, code=1)
    moved.header.set_xyzt_units("mm")
    moved.to_filename(tmp_path / "moved.nii")
    line = {"question": "Which side?", "answer": "left", "split": "train"}
    keys = ("inverted", "plain.nii", "moved.nii")
    dataset_fixtures.write_lines(tmp_path / "manifest.jsonl", [line | {"volume": key} for key in keys])
    assert prepare.main(arguments(tmp_path, tmp_path / "set", "--workers=1")) == 0
    warned = {key: list(read_volume(tmp_path / key).warnings) for key in keys}
    assert [len(warned[key]) for key in keys] == [1, 0, 1]
    stored = prepared.PreparedSet(tmp_path / "set").rows
    assert {key: stored[key]["warnings"] for key in keys} == warned
    listed = [(row["volume"], row["warning"]) for row in rows(tmp_path / "set" / "warnings.csv")]
    assert listed == [(key, one) for key in keys for one in warned[key]]
    card = json.loads((tmp_path / "set" / "card.json").read_text())
    assert card["with_warnings"] == 2 and card["warnings"] == {"geometry": 1, "photometric": 1}
    assert "- warnings: geometry 1, photometric 1" in (tmp_path / "set" / "card.md").read_text()


def test_no_case_is_named_in_the_set(unbroken):
    assert not [name for name, content in contents(unbroken).items() if b"patient " in content]


def test_nothing_that_names_a_patient_is_left_or_printed(tmp_path):
    """Planted in tags, header texts, file names inside a series and the case; read well, badly and not at all."""
    scans = tmp_path / "scans"
    scans.mkdir()

    def damaged(slices):
        for one in slices:
            with pydicom.config.disable_value_validation():
                one.SeriesInstanceUID, one.PatientBirthDate = f"{ct.SECRET} no uid", f"{ct.SECRET} no date"
        return slices

    ct.write_dicom(scans / "whole")
    with warnings.catch_warnings(action="ignore"):  # that it is written so
        ct.save(damaged(ct.dicom_slices(scans / "odd", ct.patient())))
    ct.save(ct.dicom_slices(scans / "gap", ct.patient()), skip=(4,))
    ct.write_dicom(scans / "two", series=1)
    ct.write_dicom(scans / "two", series=2)
    ct.write_dicomdir(scans / "medium", ct.patient(), [f"IMAGES/{ct.SECRET}"])
    scan = bytearray(ct.write_nifti(scans / "scan.nii", ct.patient()).read_bytes())
    scan[148 : 148 + len(ct.SECRET)] = ct.SECRET.encode()  # what it describes
    (scans / "scan.nii").write_bytes(scan)
    (scans / "cut.nii").write_bytes(scan[:5000])
    names = ("whole", "odd", "gap", "two", "medium/DICOMDIR", "scan.nii", "cut.nii")
    line = {"question": "Which side?", "answer": "left", "case": f"{ct.SECRET}^NAME"}
    dataset_fixtures.write_lines(scans / "manifest.jsonl", [line | {"volume": name} for name in names])
    process = started(scans, tmp_path / "set", "--workers=2")
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    rejected = {row["where"] for row in rows(tmp_path / "set" / "rejected.csv")}
    assert rejected == {"gap", "two", "medium/DICOMDIR", "cut.nii"}
    ct.nothing_secret(out + err)
    for name, content in contents(tmp_path / "set").items():
        assert ct.SECRET.encode() not in content and ct.UID.encode() not in content, name


@pytest.mark.slow
def test_a_killed_preparation_goes_on_to_the_very_same_files(scans, unbroken, tmp_path):
    """Killed at random places of its own writing, then, with two workers, at a random time; one kill after another."""
    wanted, folder, kills, sets = contents(unbroken), tmp_path / "0", 0, 0
    while kills < KILLS:
        if kills % 2:
            process = started(scans, folder, "--workers=2")
            try:
                process.wait(timeout=random.uniform(0.5, 3))  # noqa: S311
            except subprocess.TimeoutExpired:
                process.kill()
        else:
            at, before = random.randint(1, 20), random.random() < 0.5  # noqa: S311
            process = started(scans, folder, "--workers=1", code=KILLED_AT_FILE.format(at=at, before=before))
        _, err = process.communicate(timeout=300)
        assert process.returncode in (0, -signal.SIGKILL), err
        kills += process.returncode != 0
        if process.returncode == 0:  # it was finished before its kill
            assert contents(folder) == wanted
            sets += 1
            folder = tmp_path / str(sets)
    process = started(scans, folder, "--workers=2")
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert contents(folder) == wanted


def test_what_is_done_is_not_done_again(scans, unbroken, tmp_path):
    folder = tmp_path / "set"
    process = started(scans, folder, "--workers=1", code=KILLED_AT_FILE.format(at=12, before=False))
    process.communicate(timeout=300)
    assert process.returncode == -signal.SIGKILL
    kept = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}
    process = started(scans, folder, "--workers=1")
    out, _ = process.communicate(timeout=300)
    there = int(out.split(" of 13 volumes are there already")[0])
    assert there == 7 and json.loads((folder / "durations.json").read_text())["volumes_of_this_run"] == 13 - there
    again = {path: path.stat().st_mtime_ns for path in kept if path.is_file()}
    assert again == {path: kept[path] for path in again} and any("array_record" in path.name for path in again)
    before = contents(folder)
    process = started(scans, folder)
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0 and "is prepared already" in out and contents(folder) == before


def test_a_run_killed_behind_the_card_leaves_nothing_that_stays(scans, unbroken, tmp_path):
    folder = tmp_path / "set"
    killed = """
import os, signal
replace = os.replace
def dying(part, file):
    if str(file).endswith("durations.json"):
        os.kill(os.getpid(), signal.SIGKILL)
    replace(part, file)
os.replace = dying
"""
    process = started(scans, folder, "--workers=1", code=killed)
    process.communicate(timeout=300)
    assert process.returncode == -signal.SIGKILL and list(folder.glob(".durations.json.*.part"))
    process = started(scans, folder)
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0 and "is prepared already" in out
    assert contents(folder) == contents(unbroken) and not (folder / preparing.WORK).exists()


def test_progress_reports_count_speed_and_time_left(scans, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(workers, "REPORT_SECONDS", 0.0)
    assert prepare.main(arguments(scans, tmp_path / "set", "--workers=1")) == 0
    lines = capsys.readouterr().out.splitlines()[:VOLUMES]
    for done, line in enumerate(lines, 1):
        assert re.fullmatch(rf"{done} of 13 volumes, {int(done > 4)} rejected, [\d.]+ a second, 0:00:\d\d left", line)


# ---------------------------------------------------------------------------------------------------------- refusals


@pytest.fixture
def refused(capsys):
    """The one sentence of the command."""

    def refused(*argv: str) -> str:
        assert prepare.main(list(argv)) == 2
        err = capsys.readouterr().err
        assert err.startswith("error: ") and err.count("\n") == 1 and err.endswith(".\n"), err
        return err

    return refused


def test_other_parameters_in_the_same_folder_are_refused_by_name(scans, unbroken, refused, monkeypatch):
    monkeypatch.setattr(prepared, "SHARD", SHARD)
    sentence = refused(*arguments(scans, unbroken, "--config.data.slices=6", "--config.data.size=32"))
    assert "other values of data.size, data.slices;" in sentence


def test_what_cannot_be_prepared_is_one_sentence(scans, tmp_path, refused):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("")
    assert "holds other files" in refused(*arguments(scans, tmp_path / "other"))
    assert "holds a comma" in refused(*arguments(scans, tmp_path / "a,b"))
    assert "--config is missing" in refused()
    assert "--workers 0" in refused(*arguments(scans, tmp_path / "new", "--workers=0"))
    assert "--config.data.stepz" in refused(*arguments(scans, tmp_path / "new", "--config.data.stepz=3"))
    assert "--config.data.size=0" in refused(*arguments(scans, tmp_path / "new", "--config.data.size=0"))
    assert "wrokers" in refused(*arguments(scans, tmp_path / "new", "--wrokers=2"))
    assert "is not a folder" in refused(*arguments(tmp_path / "absent", tmp_path / "new"))
    assert not (tmp_path / "new").exists()


def test_a_set_of_which_nothing_can_be_read_says_where_the_reasons_are(tmp_path, refused):
    (tmp_path / "0.npy").write_bytes(b"no array")
    line = {"volume": "0.npy", "question": "Which side?", "answer": "left"}
    (tmp_path / "manifest.jsonl").write_text(json.dumps(line) + "\n")
    sentence = refused(*arguments(tmp_path, tmp_path / "set", "--workers=1"))
    assert "rejected.csv gives the reasons" in sentence and len(rows(tmp_path / "set" / "rejected.csv")) == 1


@pytest.mark.parametrize(
    "name, splits",
    [("m3d", "train validation test"), ("ct_rate", "train test"), ("llava", "train test"),
     ("labelmap", "train validation"), ("labelmap_index", "test")],
)  # fmt: skip
def test_published_layouts_are_prepared(tmp_path, name, splits):
    root = tmp_path / "raw"
    root.mkdir()
    data = getattr(dataset_fixtures, f"write_{name}")(root)
    own = tiny_run.ROOT / "configs" / f"data_{name}.py"
    config = own if own.is_file() else tiny_run.ROOT / "configs" / "data_manifest.py"
    flags = [f"--config.data.{key}={value}" for key, value in (data | {"slices": 8, "size": 24}).items()]
    assert prepare.main([f"--config={config}", *flags, "--workers=1", f"--to={tmp_path / 'set'}"]) == 0
    found = prepared.PreparedSet(tmp_path / "set", 8, 24)
    assert {item.volume for item in found.items} == set(found.rows) and found.items
    assert {item.split for item in found.items} == set(splits.split())


def test_a_manifest_is_checked(scans, tmp_path, capsys):
    assert prepare.main(["--check", str(scans / "manifest.jsonl")]) == 0
    assert "no problem found" in capsys.readouterr().out
    (tmp_path / "bad.jsonl").write_text('{"volume": "absent.npy"}\n')
    assert prepare.main(["--check", str(tmp_path / "bad.jsonl")]) == 2
    assert "bad.jsonl:1" in capsys.readouterr().out
