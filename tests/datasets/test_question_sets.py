"""DeepTumorVQA v2 and 3D-RAD: what is asked of which volume, in which split, and what is left out."""

import pytest

from tests.datasets import dataset_fixtures as fixtures
from tests.scans.ct_fixtures import axes_of, write_nifti
from tghmoe_jax.datasets.registry import open_dataset
from tghmoe_jax.errors import UserError


def of(dataset, split):
    return [item for item in dataset.items if item.split == split]


def test_tumor_questions_are_asked_with_choices_and_openly_by_subtype(tmp_path):
    dataset = open_dataset(fixtures.write_deeptumorvqa(tmp_path))
    assert dataset.rejected == ()
    for split, volumes in (("test", ("1", "2")), ("train", ("3", "4"))):
        items = of(dataset, split)
        assert [item.kind for item in items] == ["open", "closed"] * 2
        assert {item.case for item in items} == {f"BDMAP_0000000{number}" for number in volumes}
        graded, measured = items[1], items[3]
        assert graded.choices == ("Normal", "Moderate", "Severe", "Mild") and graded.asked().target == "A. Normal"
        assert graded.type == "splenomegaly grading" and items[0].answer == "Normal (no splenomegaly)"
        assert measured.choices == ("1200.0", "1450.2", "1700.5") and measured.asked().letter == "B"
        assert measured.question == "What is the volume of the liver in cm3?"
    assert of(dataset, "test")[0].volume.startswith("benchmark/ct/") and of(dataset, "train")[0].volume[0] == "B"


def test_lines_of_json_and_the_pool_of_the_benchmark_are_test_items(tmp_path):
    fixtures.write_deeptumorvqa(tmp_path)
    (tmp_path / "benchmark" / "test_qa.json").unlink()
    fixtures.write_lines(tmp_path / "benchmark" / "test_qa.jsonl", [fixtures.tumor_question(1, "BDMAP_00000001")])
    assert len(of(open_dataset({"name": "deeptumorvqa", "root": str(tmp_path), "manifest": ""}), "test")) == 2
    (tmp_path / "train" / "train_qa.csv").rename(tmp_path / "train" / "val_qa_pool.csv")
    named = {"name": "deeptumorvqa", "root": str(tmp_path), "manifest": "train/val_qa_pool.csv"}
    assert {item.split for item in open_dataset(named).items} == {"test"}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"image_id": "../secret"}, "its image is not one of AbdomenAtlas"),
        ({"answer": None}, "the answer is empty"),
        ({"question": "x" * 40_000}, "40000 characters"),
        ({"mc_question": "Which? A: one C: two"}, "its choices are not lettered"),
        ({"correct_option": "E"}, "its correct option is not the letter"),
        ({"mc_question": "Which? A: one B: one"}, "two of its choices"),
    ],
)
def test_a_bad_tumor_question_is_left_out_with_its_place_and_reason(tmp_path, change, reason):
    data = fixtures.write_deeptumorvqa(tmp_path)
    asked = [fixtures.tumor_question(1, "BDMAP_00000001", **change), "no object"]
    fixtures.write_json(tmp_path / "benchmark" / "test_qa.json", {"questions": asked})
    dataset = open_dataset(data)
    assert [one.where for one in dataset.rejected] == ["test_qa.json[0]", "test_qa.json[1]"]
    assert reason in dataset.rejected[0].reason and "not an object" in dataset.rejected[1].reason
    assert all(item.kind == "open" for item in of(dataset, "test"))


def test_rad_questions_name_the_volumes_of_ct_rate(tmp_path):
    dataset = open_dataset(fixtures.write_3d_rad(tmp_path))
    assert dataset.rejected == ()
    for split, real in (("train", "train_1"), ("test", "valid_2")):
        thick, hernia, lesion = of(dataset, split)
        assert (thick.kind, hernia.kind, lesion.kind) == ("open", "closed", "closed")
        assert thick.type == "medical computation" and thick.answer == "1.5 cm"
        assert hernia.choices == ("Yes", "No") and hernia.asked().target == "B. No"
        assert lesion.asked().letter == "C" and len(lesion.choices) == 4
        assert hernia.case == real and f"/{real}/" in hernia.volume


def test_a_table_of_paths_says_where_rad_volumes_lie(tmp_path):
    fixtures.write_3d_rad(tmp_path)
    write_nifti(tmp_path / "own.nii.gz", fixtures.body(3), axes_of(fixtures.SPACING))
    fixtures.write_csv(tmp_path / "valid_path.csv", ["VolumeName", "Path"], [["test_2_b_1.nii.gz", "own.nii.gz"]])
    manifest = "valid_path.csv,3DRAD/test/Task4_Existence_Detection/Hiatal hernia.csv"
    data = {"name": "3d_rad", "root": str(tmp_path), "manifest": manifest}
    (item,) = open_dataset(data).items
    assert item.volume == "own.nii.gz" and open_dataset(data).read(item.volume).array.ndim == 3
    fixtures.write_csv(tmp_path / "valid_path.csv", ["VolumeName", "Path"], [["test_2_b_1.nii.gz", "../../etc/x"]])
    with pytest.raises(UserError, match="no usable item"):
        open_dataset(data)


@pytest.mark.parametrize(
    ("column", "value", "reason"),
    [
        ("Task", "9", "its task is not one of 1 to 6"),
        ("VolumeName", "train_1_a_1.nii.gz", "its volume is of the other split"),
        ("VolumeName", "scan.nii.gz", "not one of CT-RATE"),
        ("AnswerChoice", "C", "its answer choice is not the letter"),
        ("AnswerChoice", "A", "not the text of its choice A"),
        ("Choice B", "Yes", "two or more different texts"),
        ("Question", "", "the question is empty"),
    ],
)
def test_a_bad_rad_row_is_left_out_with_its_line_and_reason(tmp_path, column, value, reason):
    data = fixtures.write_3d_rad(tmp_path)
    row = [4, 8, "test_2_b_1.nii.gz", "Is it present?", "No", "Close", "B", "Yes", "No", "-", "-"]
    row[fixtures.RAD_COLUMNS.index(column)] = value
    name = "3DRAD/test/Task4_Existence_Detection/Hiatal hernia.csv"
    fixtures.write_csv(tmp_path / name, fixtures.RAD_COLUMNS, [row])
    (left,) = open_dataset(data).rejected
    assert left.where == "Hiatal hernia.csv:2" and reason in left.reason


@pytest.mark.parametrize(
    ("name", "file", "content", "message"),
    [
        ("deeptumorvqa", None, "", "holds neither benchmark/test_qa.json"),
        ("deeptumorvqa", "benchmark/test_qa.json", "[]", "not an object with a list of questions"),
        ("deeptumorvqa", "train/train_qa.csv", "a,b\n1,2\n", "lacks the columns"),
        ("3d_rad", None, "", "holds no 3DRAD/test"),
        ("3d_rad", "3DRAD/test/Task1_Image_Observation/x.csv", "a,b\n1,2\n", "lacks the columns"),
    ],
)
def test_another_format_is_refused_in_one_sentence(tmp_path, name, file, content, message):
    if file:
        (tmp_path / file).parent.mkdir(parents=True)
        (tmp_path / file).write_text(content)
    with pytest.raises(UserError, match=message):
        open_dataset({"name": name, "root": str(tmp_path), "manifest": ""})
