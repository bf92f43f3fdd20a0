"""Files of the VLM3D challenge: written, read again, and scored like the CSV files they came from."""

import json

import numpy as np
import pytest

from tests.evaluation.test_labels import write
from tghmoe_jax import evaluate
from tghmoe_jax.evaluation import labels, vlm3d

TRUE = {"valid_1_a_1": "Nodule in the right upper lobe.", "valid_2_a_1": "Normal chest.", "valid_3_a_1": "Cyst."}
SAID = {"valid_1_a_1": "Nodule in the left upper lobe.", "valid_2_a_1": "Normal chest.", "valid_3_a_1": ""}


def reports(path, texts, wrapped=False, suffix=""):
    listed = [{"input_image_name": name + suffix, "report": text} for name, text in texts.items()]
    value = {"name": "Generated reports", "type": "Report generation", "version": {"major": 1, "minor": 0}}
    value |= {"generated_reports": listed}
    path.write_text(json.dumps([{"outputs": [{"value": value}]}] if wrapped else value))
    return str(path)


def scored(capsys, *argv):
    assert evaluate.main(["score", *argv, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(("wrapped", "suffix"), [(False, ""), (True, ".nii.gz")])
def test_reports_round_trip_through_both_forms(tmp_path, capsys, wrapped, suffix):
    said = reports(tmp_path / "said.json", SAID, wrapped, suffix)
    true = reports(tmp_path / "true.json", TRUE)
    out, to = tmp_path / "again.json", tmp_path / "scores"
    first = scored(capsys, said, "--truth", true, "--vlm3d", str(out), "--to", str(to))
    assert vlm3d.read_reports(out) == SAID
    assert json.loads(out.read_text()).keys() == {"name", "type", "version", "generated_reports"}
    assert scored(capsys, str(out), "--truth", true) == first  # the file that was written
    assert scored(capsys, str(to), "--vlm3d", str(tmp_path / "third.json")) == first  # and the CSV file
    assert (tmp_path / "third.json").read_bytes() == out.read_bytes()
    assert first["report/empty"] == pytest.approx(1 / 3)
    assert evaluate.main(["score", said, "--truth", true]) == 0, "and as a table"


def test_a_report_that_is_missing_counts_as_empty(tmp_path, capsys):
    said = reports(tmp_path / "said.json", {"valid_2_a_1": TRUE["valid_2_a_1"]})
    assert scored(capsys, said, "--truth", reports(tmp_path / "true.json", TRUE))["report/bleu1"] == pytest.approx(
        1 / 3
    )


def test_probabilities_round_trip_and_score_as_the_table(tmp_path, capsys):
    rng = np.random.default_rng(0)
    names = ["Medical material", "Lung nodule"]
    values, true = rng.random((20, 2)).round(3), (rng.random((20, 2)) < 0.4).astype(int)
    cases = [f"valid_{i}_a_1" for i in range(20)]
    table = write(
        tmp_path / "p.csv", ["id", *names], [[c, *row] for c, row in zip(cases, values.tolist(), strict=True)]
    )
    truth = write(
        tmp_path / "t.csv", ["AccessionNo", *names],
        [[f"{c}.nii.gz", *row] for c, row in zip(cases, true.tolist(), strict=True)],
    )  # fmt: skip
    out = tmp_path / "results.json"
    argv = ["--pred-labels", str(table), "--true-labels", str(truth)]
    first = scored(capsys, *argv, "--vlm3d", str(out))
    assert first["macro"]["auroc"] is not None
    assert scored(capsys, "--pred-labels", str(out), "--true-labels", str(truth)) == first
    again = labels.read(out, "--pred-labels", scores=True)
    assert again[:2] == (cases, names) and np.array_equal(again[2], values)
    value = json.loads(out.read_text())
    assert vlm3d.probabilities_file(*again) == value and value["type"] == "Abnormality Classification"
    out.write_text(json.dumps([{"outputs": [{"value": value}]}]))
    assert scored(capsys, "--pred-labels", str(out), "--true-labels", str(truth)) == first


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{}", "is not a file of the VLM3D challenge"),
        ("[]", "is not a file of the VLM3D challenge"),
        ("not json", "is not valid JSON"),
        ('{"generated_reports": [{"input_image_name": "a", "report": 3}]}', "the report is not text"),
        ('{"generated_reports": [{"input_image_name": "z", "report": "x"}]}', "names volumes that"),
        ('{"generated_reports": [{"input_image_name": "a"}]}', "each with its own input_image_name and report"),
        (json.dumps({"generated_reports": [{"input_image_name": name, "report": ""} for name in ("a", "a.nii")]}),
         "each with its own input_image_name"),
    ],
)  # fmt: skip
def test_another_file_is_refused_in_one_sentence(tmp_path, capsys, content, said):
    (tmp_path / "p.json").write_text(content)
    assert evaluate.main(["score", str(tmp_path / "p.json"), "--truth", reports(tmp_path / "t.json", TRUE)]) == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1


def test_flags_that_do_not_belong_together_are_refused(tmp_path, capsys):
    said = reports(tmp_path / "said.json", SAID)
    csv = tmp_path / "open.csv"
    csv.write_text("Question,Answer,Pred\nq,a,a\n")
    for argv, message in (
        ([said], "with --truth"),
        ([str(csv), "--truth", said], "--truth belongs to a JSON file"),
        ([str(csv), "--vlm3d", str(tmp_path / "x.json")], "--vlm3d needs reports"),
        ([said, "--truth", said, "--vlm3d", said], "exists; name a new file"),
    ):
        assert evaluate.main(["score", *argv]) == 2
        assert message in capsys.readouterr().err
