"""Data sets as they are published: what is read from each layout, and what is refused or left out, with its reason."""

import collections
import pickle
import re

import numpy as np
import pytest

from tests.datasets import dataset_fixtures as fixtures
from tests.scans.ct_fixtures import SECRET, patient, write_dicom
from tghmoe_jax.datasets.m3d import report_of
from tghmoe_jax.datasets.registry import open_dataset
from tghmoe_jax.errors import UserError


def kinds(dataset, split):
    return collections.Counter(item.kind for item in dataset.items if item.split == split)


@pytest.mark.parametrize("name", ["m3d", "ct_rate", "deeptumorvqa", "3d_rad", "llava", "manifest"])
def test_every_item_names_a_volume_that_reads_and_a_letter_where_it_has_choices(tmp_path, name):
    dataset = open_dataset(getattr(fixtures, f"write_{name}")(tmp_path))
    assert dataset.name == name and dataset.items
    for item in dataset.items:
        assert item.split in ("train", "validation", "test") and item.case and item.answer
        assert (item.question == "") == (item.task == "report") or "Indication" in item.question
        asked = item.asked("Write the report.")
        assert asked.prompt and asked.target and (not item.choices or asked.letter in "ABCD")
    read = pickle.loads(pickle.dumps(dataset.read))  # it is sent to worker processes
    for key in {item.volume for item in dataset.items}:
        assert read(key).array.ndim == 3


# ------------------------------------------------------------------------------------------------------------ M3D


def test_m3d_rows_are_asked_closed_and_open_with_the_choice_na_as_text(tmp_path):
    dataset = open_dataset(fixtures.write_m3d(tmp_path))
    assert dataset.rejected == ()
    assert kinds(dataset, "train") == {"report": 2, "open": 18, "closed": 18}
    assert kinds(dataset, "validation") == {"report": 1, "open": 9, "closed": 9}
    assert kinds(dataset, "test") == {"report": 2, "open": 18, "closed": 18}
    plane = next(item for item in dataset.items if item.type == "plane" and item.choices)
    assert plane.choices == ("Sagittal", "Axial", "Coronal", "NA") and plane.asked().target == "B. Axial"
    assert {item.case for item in dataset.items} == {
        "ct_case/000006",
        "ct_quizze/000007",
        "ct_case/000011",
        "ct_quizze/012518",
    }
    report = next(item for item in dataset.items if item.task == "report" and item.case.endswith("012518"))
    assert report.answer == "A small nodule in case 012518." and report.question == ""


def test_m3d_volume_of_the_published_shape_reads_bit_for_bit(tmp_path):
    data = fixtures.write_m3d(tmp_path, (1, 32, 256, 256)) | {"manifest": "M3D_Cap_npy/M3D_Cap.json"}
    dataset = open_dataset(data)
    volume = dataset.read(dataset.items[0].volume)
    np.testing.assert_array_equal(volume.array, np.load(tmp_path / dataset.items[0].volume)[0])
    assert volume.unit == "unit-interval" and volume.spacing_mm is None


def test_m3d_test_set_is_chosen_and_yes_no_questions_are_read_when_named(tmp_path):
    data = fixtures.write_m3d(tmp_path)
    hard = open_dataset(data | {"manifest": "M3D_Cap_npy/M3D_Cap.json#hard_test"})
    assert [item.case for item in hard.items if item.split == "test"] == ["ct_quizze/012518"]
    more = open_dataset(data | {"manifest": "M3D-VQA/M3D_VQA_yn_train.csv, M3D-VQA/M3D_VQA_test5k.csv"})
    assert kinds(more, "train") == {"open": 2} and kinds(more, "test") == {"open": 5, "closed": 5}
    assert [item.answer for item in more.items][:2] == ["Yes", "No."]


def test_m3d_paths_relative_to_the_index_are_found_too(tmp_path):
    data = fixtures.write_m3d(tmp_path)
    index = tmp_path / "M3D_Cap_npy" / "M3D_Cap.json"
    index.write_text(index.read_text().replace('"M3D_Cap_npy/', '"'))
    dataset = open_dataset(data | {"manifest": "M3D_Cap_npy/M3D_Cap.json"})
    assert not dataset.rejected and all(item.volume.startswith("M3D_Cap_npy/ct_") for item in dataset.items)


def test_m3d_volume_that_was_not_prepared_is_read_from_its_raw_folder(tmp_path):
    dataset = open_dataset(fixtures.write_m3d(tmp_path))
    key = dataset.items[0].volume
    (tmp_path / key).unlink()
    with pytest.raises(UserError, match=r"M3D_Cap_npy/ct_case/000006/Axial_non_contrast\.npy does not exist"):
        dataset.read(key)
    write_dicom(tmp_path / "M3D_Cap/ct_case/000006/Axial_non_contrast")  # whatever read_volume takes for a folder
    np.testing.assert_array_equal(dataset.read(key).array, patient())


@pytest.mark.parametrize(
    "text, report",
    [
        ("Title:Quiz\ndiscussion:\nLong talk.\nstudy_findings:\nA mass\nin the lung.\n", "A mass in the lung."),
        ("Title:Quiz\ndiscussion:\nLong talk.\nstudy_findings:\n-\n", "Long talk. study_findings: -"),
        ("Already the report.", "Already the report."),
        ("Title: a study_findings: ", "Title: a study_findings:"),
        ("study_findings:\n\ndiscussion:\n", "discussion:"),
    ],
)
def test_m3d_report_is_what_its_own_preparation_keeps(text, report):
    assert report_of(text) == report


# -------------------------------------------------------------------------------------------------------- CT-RATE


def test_ct_rate_reports_questions_and_labels(tmp_path):
    dataset = open_dataset(fixtures.write_ct_rate(tmp_path))
    reports = {item.volume: item for item in dataset.items if item.task == "report"}
    assert len(reports) == 6  # two of eight volumes show no chest, and the VQA's copies are not asked again
    first = reports["dataset/train_fixed/train_1/train_1_a/train_1_a_1.nii.gz"]
    assert (first.case, first.split) == ("train_1", "train")
    assert first.answer == "Findings: Heart size is normal in patient 1. No effusion. Impression: Normal chest."
    second = reports["dataset/train_fixed/train_1/train_1_a/train_1_a_2.nii.gz"]
    assert second.answer.startswith("Findings:") and "Impression" not in second.answer and "iven" not in second.answer
    of = [item for item in dataset.items if item.volume == first.volume and item.type != "abnormality"]
    assert [(item.type, item.question, item.answer) for item in of if item.task == "vqa"] == [
        ("long_answer", "Describe the lungs.", "The lungs are clear."),
        ("long_answer", "And the heart?", "It is normal."),
        ("short_answer", "Is there an effusion?", "No"),
        ("multiple_choice", "What is seen?", "Normal lungs"),
    ]
    closed = next(item for item in of if item.choices)
    assert closed.choices == ("Nodule", "Effusion", "Normal lungs", "Emphysema") and closed.asked().letter == "C"
    assert {item.split for item in dataset.items} == {"train", "test"}
    where = [entry.where for entry in dataset.rejected]
    assert "train_reports.csv:6" in where  # the third volume; findings above it span two lines each


def test_ct_rate_labels_are_asked_as_often_with_yes_as_with_no(tmp_path):
    dataset = open_dataset(fixtures.write_ct_rate(tmp_path))
    answers = collections.defaultdict(collections.Counter)
    for item in dataset.items:
        if item.type == "abnormality":
            answers[item.split, item.question][item.answer] += 1
    assert answers and all(count["Yes"] == count["No"] for count in answers.values())
    assert not any("effusion present" in question for _, question in answers)  # it is always there


def test_a_column_without_a_name_is_no_finding(tmp_path):
    """Row numbers as pandas writes them, and as it names them when it reads and writes them again."""
    data = fixtures.write_ct_rate(tmp_path)
    before = open_dataset(data)
    for table in (tmp_path / "dataset" / "multi_abnormality_labels").iterdir():
        head, *rows = table.read_text().splitlines()
        numbered = [f",{head},Unnamed: 0,"] + [f"{i},{row},{i % 2},{i % 2}" for i, row in enumerate(rows)]
        table.write_text("\n".join(numbered))
    assert open_dataset(data).items == before.items


def test_ct_rate_slope_and_intercept_are_not_applied_again(tmp_path):
    dataset = open_dataset(fixtures.write_ct_rate(tmp_path))
    key = "dataset/valid_fixed/valid_1/valid_1_a/valid_1_a_1.nii.gz"
    volume = dataset.read(key)
    np.testing.assert_array_equal(volume.array, fixtures.body(10))
    assert "metadata's slope 1 and intercept -1024 not applied" in volume.history[-1]
    for wrong in ("twice", "raw"):
        fixtures.ct_rate_volume(tmp_path, "valid_1_a_1.nii.gz", 10, **{wrong: True})
        with pytest.raises(UserError, match="rescale"):
            dataset.read(key)


def test_ct_rate_header_and_table_must_state_one_spacing(tmp_path):
    data = fixtures.write_ct_rate(tmp_path)
    table = tmp_path / "dataset" / "metadata" / "validation_metadata.csv"
    table.write_text(table.read_text().replace("[1.5, 1.5]", "[0.75, 0.75]", 1))
    dataset = open_dataset(data)
    with pytest.raises(UserError, match=r"3 x 1.5 x 1.5 mm .* 3 x 0.75 x 0.75 mm in the metadata table"):
        dataset.read("dataset/valid_fixed/valid_1/valid_1_a/valid_1_a_1.nii.gz")
    dataset.read("dataset/valid_fixed/valid_3/valid_3_a/valid_3_a_1.nii.gz")


@pytest.mark.parametrize("folder", ["dataset", "."])
def test_ct_rate_is_found_from_either_root_and_without_the_fixed_folders(tmp_path, folder):
    fixtures.write_ct_rate(tmp_path)
    (tmp_path / "dataset" / "valid_fixed").rename(tmp_path / "dataset" / "valid")
    dataset = open_dataset({"name": "ct_rate", "root": str(tmp_path / folder), "manifest": ""})
    for key in {item.volume for item in dataset.items}:
        dataset.read(key)


@pytest.mark.parametrize("name", ["ct_rate", "m3d"])
def test_a_set_in_the_cache_of_the_hub_is_read(tmp_path, name):
    """Every file there is a link into `blobs`, which lies beside the folder of the snapshot."""
    plain = open_dataset(getattr(fixtures, f"write_{name}")(tmp_path / "plain"))
    cache = tmp_path / "hub" / "datasets--owner--name"
    (cache / "blobs").mkdir(parents=True)
    for number, file in enumerate(p for p in (tmp_path / "plain").rglob("*") if p.is_file()):
        link = cache / "snapshots" / "0a1b" / file.relative_to(tmp_path / "plain")
        link.parent.mkdir(parents=True, exist_ok=True)
        (cache / "blobs" / f"{number:040x}").write_bytes(file.read_bytes())
        link.symlink_to(cache / "blobs" / f"{number:040x}")
    found = open_dataset({"name": name, "root": str(cache / "snapshots" / "0a1b"), "manifest": ""})
    assert found.items == plain.items and found.rejected == plain.rejected
    for key in {item.volume for item in found.items}:
        np.testing.assert_array_equal(found.read(key).array, plain.read(key).array)


def test_ct_rate_reports_of_the_vqa_file_are_used_where_no_table_has_them(tmp_path):
    data = fixtures.write_ct_rate(tmp_path) | {"manifest": "dataset/vqa/valid_vqa.json"}
    dataset = open_dataset(data)
    assert kinds(dataset, "test") == {"report": 3, "open": 9, "closed": 3} and not kinds(dataset, "train")


# ----------------------------------------------------------------------------------------------------- LLaVA JSON


def test_llava_conversations_captions_and_answers(tmp_path):
    dataset = open_dataset(fixtures.write_llava(tmp_path))
    assert dataset.rejected == ()
    told = [(item.kind, item.split, item.type, item.question, item.answer) for item in dataset.items]
    assert told == [
        ("open", "train", "question", "What is seen?", "A nodule."),
        ("closed", "train", "question", "Which side?", "Right"),
        ("report", "train", "report", "", "The chest is normal."),
        ("closed", "test", "location", "Which side?", "Left"),
        ("open", "test", "abnormality", "What is seen?", "A cyst."),
    ]
    assert dataset.items[1].choices == ("Left", "Right", "Both", "NA")


def test_a_bad_turn_of_a_conversation_costs_the_others_nothing(tmp_path):
    spoken = [{"from": "human", "value": "Which? Choices: A. one B. two"}, {"from": "gpt", "value": "three"}, *GOOD]
    fixtures.write_json(tmp_path / "train.json", [{"image3d": "a.npy", "conversations": spoken}])
    dataset = open_dataset({"name": "llava", "root": str(tmp_path), "manifest": "train.json"})
    assert [item.answer for item in dataset.items] == ["Nothing."] and len(dataset.rejected) == 1


# ----------------------------------------------------------------------------------------------------- bad inputs


def _rejected(dataset):
    assert all(re.fullmatch(r"[^\n]+\.", entry.reason) for entry in dataset.rejected), dataset.rejected
    return [entry.reason for entry in dataset.rejected]


M3D_ROW = dict(
    zip(fixtures.M3D_COLUMNS, fixtures.m3d_questions("M3D_Cap_npy/ct_case/000006/a.npy", "r")[0], strict=True)
)


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"Image Path": "../../etc/passwd"}, "climbs out"),
        ({"Image Path": "/etc/000006/a.npy"}, "is absolute"),
        ({"Image Path": "C:\\000006\\a.npy"}, "is absolute"),
        ({"Image Path": ""}, "names no image"),
        ({"Image Path": "M3D_Cap_npy/ct_case/6/a.npy"}, "not a six-digit case"),
        ({"Question Type": "6"}, "not one of 1 to 5"),
        ({"Question Type": "plane"}, "not one of 1 to 5"),
        ({"Question": " "}, "the question is empty"),
        ({"Question": "x" * 40_000}, "the question has 40000 characters"),
        ({"Answer": "Coronal"}, "not the text of its choice B"),
        ({"Answer Choice": "E"}, "not one of A to D"),
        ({"Answer Choice": ""}, "not one of A to D"),
        ({"Choice D": "Axial"}, "another letter has the text"),
        ({"Choice C": ""}, "the choice is empty"),
        ({"Question": "a\x07b"}, "control characters"),
    ],
)
def test_a_bad_row_of_m3d_is_left_out_with_its_line_and_reason(tmp_path, change, reason):
    rows = [M3D_ROW, M3D_ROW | change, M3D_ROW]
    fixtures.write_csv(tmp_path / "M3D_VQA_test.csv", fixtures.M3D_COLUMNS, [list(row.values()) for row in rows])
    dataset = open_dataset({"name": "m3d", "root": str(tmp_path), "manifest": "M3D_VQA_test.csv"})
    assert len(dataset.items) == 4
    assert [entry.where for entry in dataset.rejected] == ["M3D_VQA_test.csv:3"]
    assert reason in _rejected(dataset)[0]


GOOD = {"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "Nothing."}


@pytest.mark.parametrize(
    "entry, reason",
    [
        ("text", "not an object"),
        ({"conversations": GOOD}, "exactly one volume"),
        ({"image3d": ["a.npy", "b.npy"], "conversations": GOOD}, "exactly one volume"),
        ({"image3d": ["a.npy"], "vision2d": ["x.png"], "conversations": GOOD}, "no pictures"),
        ({"image3d": ["../a.npy"], "conversations": GOOD}, "climbs out"),
        ({"image3d": ["a.npy"], "conversations": []}, "no conversations"),
        ({"image3d": ["a.npy"], "conversations": GOOD[:1]}, "do not alternate"),
        ({"image3d": ["a.npy"], "conversations": GOOD[::-1]}, "do not alternate"),
        ({"image3d": ["a.npy"], "conversations": [{"from": "human", "value": "<image>\n"}, GOOD[1]]}, "empty"),
        ({"image3d": ["a.npy"], "conversations": [GOOD[0], {"from": "gpt", "value": 3}]}, "is not text"),
        (
            {"image3d": ["a.npy"], "conversations": [{"from": "human", "value": "Which? Choices: A. one B. two"},
                                                     {"from": "gpt", "value": "three"}]},
            "not one of its choices",
        ),
        (
            {"image3d": ["a.npy"], "conversations": [{"from": "human", "value": "Which? Choices: A. one B. two"},
                                                     {"from": "gpt", "value": "A. two"}]},
            "not the choice that it letters",
        ),
        (
            {"image3d": ["a.npy"], "conversations": [{"from": "human", "value": "Which? Choices: A. one C. two"},
                                                     GOOD[1]]},
            "not lettered A., B. to D.",
        ),
    ],
)  # fmt: skip
def test_a_bad_conversation_is_left_out_with_its_place_and_reason(tmp_path, entry, reason):
    good = {"image3d": ["a.npy"], "conversations": GOOD}
    fixtures.write_json(tmp_path / "train.json", [good, entry])
    dataset = open_dataset({"name": "llava", "root": str(tmp_path), "manifest": "train.json"})
    assert len(dataset.items) == 1 and [e.where for e in dataset.rejected] == ["train.json[1]"]
    assert reason in _rejected(dataset)[0]


def _ct_rate_table(table, edit):
    def damage(root):
        data = fixtures.write_ct_rate(root)
        path = next((root / "dataset").glob(f"*/{table}"))
        path.write_text(edit(path.read_text()))
        return data

    return damage


@pytest.mark.parametrize(
    "damage, reason",
    [
        (_ct_rate_table("train_reports.csv", lambda t: t.replace("train_3_b_1.nii.gz", "x.nii.gz")), "one of CT-RATE"),
        (_ct_rate_table("train_reports.csv", lambda t: t.replace("train_3_b_1", "train_1_a_1")), "a report already"),
        (_ct_rate_table("train_reports.csv", lambda t: t), "neither findings nor impression"),
        (_ct_rate_table("train_metadata.csv", lambda t: t.replace('"[1.5, 1.5]"', "wide", 1)), "is not a number"),
        (_ct_rate_table("train_metadata.csv", lambda t: t.replace('"[1.5, 1.5]"', '"[1.5, 1.5, 1]"', 1)), "a number"),
        (_ct_rate_table("train_metadata.csv", lambda t: t.replace(",3.0,", ",-3.0,", 1)), "is not a number"),
        (_ct_rate_table("no_chest_train.txt", lambda t: t), "shows no chest"),
        (_ct_rate_table("train_predicted_labels.csv", lambda t: t.replace("a_1.nii.gz,0", "a_1.nii.gz,2", 1)),
         "neither 0 nor 1"),
        (_ct_rate_table("train_vqa.json", lambda t: t.replace("(c) Normal lungs (d)", "(e) Normal lungs (d)")),
         "not (a), (b) to (d)"),
        (_ct_rate_table("train_vqa.json", lambda t: t.replace("train_1_a_1.nii.gz", "../train_1_a_1.nii.gz")),
         "not one of CT-RATE"),
        (_ct_rate_table("train_reports.csv", lambda t: t.replace("CT,", "CT,,", 1)), "has 6 fields"),
    ],
)  # fmt: skip
def test_what_is_left_out_of_ct_rate_is_reported(tmp_path, damage, reason):
    dataset = open_dataset(damage(tmp_path))
    assert any(reason in told for told in _rejected(dataset)), dataset.rejected


def test_no_column_of_sites_or_scanners_reaches_an_item_an_error_or_a_history(tmp_path):
    data = fixtures.write_ct_rate(tmp_path)
    for table in (tmp_path / "dataset" / "metadata").glob("*.csv"):
        table.write_text(table.read_text().replace('"[1.5, 1.5]"', f"{SECRET}", 1))
    dataset = open_dataset(data)
    told = [repr(dataset.items), repr(dataset.rejected), repr(dataset.read)]
    for key in {item.volume for item in dataset.items}:
        told.append(repr(dataset.read(key).history))
    assert dataset.rejected and SECRET not in "".join(told)


def _open(name, files, manifest=""):
    def build(root):
        for path, text in files.items():
            path = root / path
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return {"name": name, "root": str(root), "manifest": manifest}

    return build


HEADER = ",".join(fixtures.M3D_COLUMNS)


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda root: {"name": "other", "root": str(root)}, r"name=other is not a data set of files"),
        (lambda root: {"name": "m3d", "root": ""}, r"--config.data.root= is not a folder"),
        (lambda root: {"name": "m3d", "root": "gs://bucket/m3d"}, r"root=gs://bucket/m3d is not a folder"),
        (_open("m3d", {}), "holds neither M3D_Cap_npy"),
        (_open("m3d", {}, "none.csv"), "none.csv is not a file"),
        (_open("m3d", {"a.json": "{"}, "a.json"), "not valid JSON"),
        (_open("m3d", {"a.json": "[" * 100_000}, "a.json"), "not valid JSON"),
        (_open("m3d", {"a.json": b"\xff\xfe{}"}, "a.json"), "not valid JSON in UTF-8"),
        (_open("m3d", {"a.json": "[1, 2]"}, "a.json"), "not an object of splits"),
        (_open("m3d", {"a.json": '{"other": []}'}, "a.json"), "lacks the splits"),
        (_open("m3d", {"a.json": '{"train": []}'}, "a.json#hard_test"), "no split 'hard_test'"),
        (_open("m3d", {"a.json": '{"train": [{"image": "x"}]}'}, "a.json"), "no usable item"),
        (_open("m3d", {"questions.csv": HEADER}, "questions.csv"), "does not name its split"),
        (_open("m3d", {"a_test.csv": ""}, "a_test.csv"), "is an empty file"),
        (_open("m3d", {"a_test.csv": "Image Path,Question\n"}, "a_test.csv"), "lacks the columns Text"),
        (_open("m3d", {"a_test.csv": f"{HEADER},Text\n"}, "a_test.csv"), "names a column twice"),
        (_open("m3d", {"a_test.csv": HEADER.replace(",", ";")}, "a_test.csv"), "by semicolons, not by commas"),
        (_open("m3d", {"a_test.csv": '[{"Text": "a"}]'}, "a_test.csv"), "holds JSON, not a table"),
        (_open("m3d", {"a_test.csv": f"{HEADER}\n" + "x" * 2**20 + "y\n"}, "a_test.csv"), "longer than 1048576"),
        (_open("m3d", {"a_test.csv": f'{HEADER}\n"open'}, "a_test.csv"), "not valid CSV"),
        (_open("m3d", {"a_test.csv": HEADER.encode() + b"\n\xff\n"}, "a_test.csv"), "not UTF-8"),
        (_open("ct_rate", {}), "no reports, questions or labels"),
        (_open("ct_rate", {"a.csv": "x"}, "a.csv"), "not one of CT-RATE's reports, vqa or labels"),
        (_open("ct_rate", {"a_vqa.json": "{}"}, "a_vqa.json"), "not a list of conversations"),
        (_open("llava", {}), "needs --config.data.manifest"),
        (_open("llava", {"a.json": "{}"}, "a.json"), "not a list of conversations"),
        (_open("manifest", {}), "needs --config.data.manifest"),
        (_open("manifest", {"m.jsonl": ""}, "m.jsonl"), "the file has no line"),
    ],
)
def test_a_data_set_of_another_format_is_refused_in_one_sentence(tmp_path, build, message):
    with pytest.raises(UserError, match=re.escape(message) if "\\" not in message else message) as caught:
        open_dataset(build(tmp_path))
    text = str(caught.value)
    assert text.endswith(".") and "\n" not in text and ":" in text.replace(str(tmp_path), "")
