"""The project's own manifest: strict, told by line, and the same after a round trip."""

import json
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.datasets import dataset_fixtures as fixtures
from tests.scans.ct_fixtures import SECRET, patient, write_dicom
from tghmoe_jax.datasets.index_files import MAX_LINE, split_of_case
from tghmoe_jax.datasets.manifest import OPTIONAL, REQUIRED, check_manifest
from tghmoe_jax.datasets.registry import open_dataset
from tghmoe_jax.errors import UserError

line = fixtures.manifest_line


def problems(tmp_path, *rows):
    (tmp_path / "scans").mkdir(exist_ok=True)
    for number in range(3):
        (tmp_path / "scans" / f"{number}.nii.gz").touch()
    path = fixtures.write_lines(tmp_path / "m.jsonl", rows)
    report = check_manifest(path)
    for problem in report.problems:
        assert problem.where.startswith(f"{path}:") and problem.reason.endswith(".") and "\n" not in problem.reason
        assert f"{problem.where}: {problem.reason}" in report.text()
    return [(int(problem.where.rpartition(":")[2]), problem.reason) for problem in report.problems]


def test_a_good_manifest_has_no_problem_and_opens(tmp_path):
    data = fixtures.write_manifest(tmp_path)
    report = check_manifest(tmp_path / "manifest.jsonl", tmp_path)
    assert report.problems == () and "12 items, no problem found" in report.text()
    dataset = open_dataset(data)
    assert dataset.items == report.items
    assert [item.kind for item in dataset.items[:3]] == ["open", "closed", "report"]
    assert dataset.items[2].question == "Indication: Cough. Write the report of this CT."
    table = [row.split() for row in report.text().splitlines()[:4]]
    assert table[0] == ["split", "volumes", "cases", "report", "open", "closed"]
    assert table[1:] == [["train", "2", "2", "2", "2", "2"], ["validation", *"11111"], ["test", *"11111"]]


def test_null_is_left_out(tmp_path):
    """As tables that are exported to JSON lines write an empty cell; an unknown key is reported all the same."""
    keys = ("choices", "task", "type", "case", "split", "indication")
    assert not problems(tmp_path, line(1, case=None))
    (plain,) = check_manifest(tmp_path / "m.jsonl", tmp_path).items
    assert not problems(tmp_path, {**line(1), **dict.fromkeys(keys)})
    assert check_manifest(tmp_path / "m.jsonl", tmp_path).items == (plain,)
    found = problems(tmp_path, {**line(1), "answer": None, "patient": None})
    assert [reason for _, reason in found][1:] == ["the key answer is missing."] and "'patient'" in found[0][1]


@pytest.mark.parametrize(
    "bad, reason",
    [
        ("{", "not valid JSON"),
        ("[" * 50_000, "not valid JSON"),
        ("[1]", "not a JSON object"),
        ('{"volume": "a", "volume": "b"}', "a key occurs twice"),
        (line(1, patient="x"), "the key 'patient' is unknown"),
        (line(1, volume=None), "the key volume is missing"),
        (line(1, question=None), "the key question is missing"),
        (line(1, answer=None), "the key answer is missing"),
        (line(1, answer=3), "the answer is not text"),
        (line(1, answer=" "), "the answer is empty"),
        (line(1, question="", task="vqa"), "the question is empty"),
        (line(1, question="x" * 40_000), "the question has 40000 characters"),
        (line(1, question="a\x00b"), "control characters"),
        (json.dumps(line(1, answer="\ud800")), "control characters"),
        (line(1, indication=["cough"]), "the indication is not text"),
        (line(1, task="caption"), "not one of report, vqa"),
        (line(1, split="dev"), "the split is not one of train"),
        (line(1, split=["train"]), "the split is not one of train"),
        (line(1, task={}), "not one of report, vqa"),
        (line(1, case=7), "the case is not text"),
        (line(1, type="t" * 201), "more than 200 characters"),
        (line(1, choices=["No"]), "not a list of 2 to 4"),
        (line(1, choices="No, Yes"), "not a list of 2 to 4"),
        (line(1, choices=list("abcde")), "not a list of 2 to 4"),
        (line(1, choices=["No", 1]), "the choice is not text"),
        (line(1, choices=["No", "No"]), "a choice occurs twice"),
        (line(1, choices=["no", "yes"]), "the answer is not one of the choices"),
        (line(1, choices=["No", "Yes"], task="report"), "the task report has no choices"),
        (line(1, volume="scans/9.nii.gz"), "does not exist below the root"),
        (line(1, volume="/scans/1.nii.gz"), "its path is absolute"),
        (line(1, volume="scans\\..\\..\\1.nii.gz"), "its path climbs out"),
        (line(1, volume="x" * 5000), "its path has 5000 characters"),
        (line(1, volume="scans#series=0"), "what follows #series= is not a number"),
        (line(1, volume="scans#series="), "what follows #series= is not a number"),
        (line(1, volume="scans#series=two"), "what follows #series= is not a number"),
        (line(1, volume="../a#series=1"), "its path climbs out"),
        (line(0), "the same is asked of the same volume in line 1"),
        (line(0, answer="Yes"), "the same is asked of the same volume in line 1"),
        (line(1, case="c0", split="test"), "its case is in the split train in line 1"),
    ],
)
def test_a_bad_line_is_reported_with_its_number(tmp_path, bad, reason):
    good = line(0, split="train")
    found = problems(tmp_path, good, "", bad, line(2))
    assert [number for number, _ in found] == [3] and reason in found[0][1], found
    if "does not exist" not in reason:  # a missing volume is judged when it is read
        with pytest.raises(UserError, match=r"m\.jsonl:3: .* see all with python -m tghmoe_jax\.prepare --check"):
            open_dataset({"name": "manifest", "root": str(tmp_path), "manifest": "m.jsonl"})


def test_every_problem_of_a_line_is_listed(tmp_path):
    bad = line(0, volume="scans/9.nii.gz", choices=["a", "a", ""], patient="x", split="dev")
    reasons = [reason for _, reason in problems(tmp_path, bad)]
    for words in ("key 'patient'", "the split", "choice is empty", "twice", "not one of the choices", "not exist"):
        assert sum(words in reason for reason in reasons) == 1, (words, reasons)
    assert len(reasons) == 6


@pytest.mark.parametrize("indent", [None, 1])
def test_a_json_list_is_named_as_one(tmp_path, indent):
    (tmp_path / "m.jsonl").write_text(json.dumps([line(0), line(1)], indent=indent))
    (problem,) = check_manifest(tmp_path / "m.jsonl").problems
    assert problem.where.endswith("m.jsonl:1") and "is a JSON list" in problem.reason


def test_one_series_of_a_study_is_named_behind_its_folder(tmp_path):
    for number, shape in ((4, (12, 36, 44)), (7, (9, 32, 32))):
        write_dicom(tmp_path / "study", patient(shape), series=number)
    rows = [line(0, volume=f"study{part}", case="c") for part in ("#series=1", "#series=2", "#series=3", "")]
    path = fixtures.write_lines(tmp_path / "m.jsonl", rows)
    assert check_manifest(path).problems == ()
    read = open_dataset({"name": "manifest", "root": str(tmp_path), "manifest": "m.jsonl"}).read
    assert [read(row["volume"]).array.shape[0] for row in rows[:2]] == [12, 9]
    for row, words in ((rows[2], "#series=3 does not exist in"), (rows[3], "choose one with #series=N.")):
        with pytest.raises(UserError) as error:
            read(row["volume"])
        assert words in str(error.value) and "--series" not in str(error.value)


def test_the_export_that_the_docs_show_writes_a_manifest(tmp_path, monkeypatch):
    docs = Path(__file__).resolve().parents[2] / "docs" / "own-data.md"
    (code,) = re.findall(r"```python\n(.*?)```", docs.read_text(encoding="utf-8"), re.DOTALL)
    rows = [["1.nii", "p1", "Effusion, left.", "", "Cough"], ["2.nii", "p2", "Keine.", "Unauff\u00e4llig.", ""]]
    fixtures.write_csv(tmp_path / "reports.csv", ["study", "patient", "findings", "impression", "indication"], rows)
    (tmp_path / "scans").mkdir()
    for name, *_ in rows:
        (tmp_path / "scans" / name).touch()
    monkeypatch.chdir(tmp_path)
    exec(code, {})  # noqa: S102 - it is what users copy
    report = check_manifest("scans/manifest.jsonl")
    assert report.problems == ()
    assert [item.answer for item in report.items] == [
        "Findings: Effusion, left.",
        "Findings: Keine. Impression: Unauff\u00e4llig.",
    ]
    assert [item.question for item in report.items] == ["Indication: Cough. Write the report of this CT.", ""]


def test_all_problems_are_listed_in_the_order_of_the_lines(tmp_path):
    found = problems(tmp_path, line(0), "{", line(1, answer="", task="x"), line(0), line(2, volume="../a"))
    assert [number for number, _ in found] == [2, 3, 3, 4, 5]


def test_no_value_of_a_manifest_is_quoted(tmp_path):
    rows = [line(0, **{key: f"{SECRET}\x00" for key in (*REQUIRED, *OPTIONAL)}), line(1, case=SECRET, split="train"),
            line(2, case=SECRET, split="test"), line(1, volume=f"/{SECRET}/a.nii"),
            line(1, volume=f"../{SECRET}' climbs \"/a.nii"), line(1, volume=f"{SECRET}.nii")]  # fmt: skip
    found = problems(tmp_path, *rows)
    assert {number for number, _ in found} == {1, 3, 4, 5, 6}
    assert not any(SECRET in reason for _, reason in found)


def test_a_line_without_a_split_follows_its_case_and_else_a_hash(tmp_path):
    rows = [line(0, case="a"), line(1, case="a", split="test"), line(2, case="b"), line(2, question="Why?", case="b")]
    (tmp_path / "scans").mkdir()
    fixtures.write_lines(tmp_path / "m.jsonl", rows)
    items = open_dataset({"name": "manifest", "root": str(tmp_path), "manifest": "m.jsonl"}).items
    assert [item.split for item in items] == ["test", "test", split_of_case("b"), split_of_case("b")]
    shares = [split_of_case(f"case{number}") for number in range(2000)]
    assert abs(shares.count("train") / 2000 - 0.8) < 0.04 and abs(shares.count("test") / 2000 - 0.1) < 0.03


@pytest.mark.parametrize("text", [b"\xff\xfe", b"x" * (MAX_LINE + 2)])
def test_a_file_that_is_no_text_is_refused(tmp_path, text):
    path = tmp_path / "m.jsonl"
    path.write_bytes(text)
    with pytest.raises(UserError, match=r"m\.jsonl .*(UTF-8|longer than)"):
        check_manifest(path)
    with pytest.raises(UserError, match="does not exist: name a manifest"):
        check_manifest(tmp_path / "none.jsonl")


words = st.text(st.characters(exclude_categories=("Cc", "Cs")), min_size=1, max_size=30).filter(
    lambda text: text == text.strip() and text
)
entries = st.lists(
    st.fixed_dictionaries(
        {"volume": st.sampled_from(["a/1.nii.gz", "b.nii", "c d.npy"]), "question": words},
        optional={
            "type": words, "case": words, "indication": words,
            "choices": st.lists(words, min_size=2, max_size=4, unique=True), "task": st.just("vqa"),
        },
    ),
    min_size=1, max_size=8, unique_by=lambda row: row["question"],
)  # fmt: skip


@given(entries, st.data())
@settings(deadline=None)
def test_what_is_written_is_read(tmp_path_factory, rows, data):
    """Any text of any language comes through unchanged, as one item a line."""
    for row in rows:
        row["answer"] = data.draw(st.sampled_from(row["choices"]) if "choices" in row else words)
    root = tmp_path_factory.mktemp("round")
    fixtures.write_lines(root / "m.jsonl", [json.dumps(row, ensure_ascii=data.draw(st.booleans())) for row in rows])
    items = open_dataset({"name": "manifest", "root": str(root), "manifest": "m.jsonl"}).items
    assert len(items) == len(rows)
    for item, row in zip(items, rows, strict=True):
        assert (item.volume, item.answer) == (row["volume"], row["answer"])
        assert item.choices == tuple(row.get("choices", ())) and item.case == row.get("case", row["volume"])
        assert item.question.endswith(row["question"]) and row.get("indication", "").rstrip(".") in item.question
        assert item.type == row.get("type", "question") and item.split == split_of_case(item.case)
