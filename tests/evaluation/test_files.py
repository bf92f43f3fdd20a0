"""Prediction files: what this project writes reads back to the same scores, and so do M3D's plain forms."""

import csv
import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest

from tests.evaluation.test_protocols import small_run
from tghmoe_jax import evaluate
from tghmoe_jax.errors import UserError
from tghmoe_jax.evaluation import comparison, files
from tghmoe_jax.evaluation.outputs import write_predictions
from tghmoe_jax.evaluation.protocols import kind_scores, score

SIDELESS = ("cyst", "liver", "")


def write_csv(path, columns, rows):
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([columns, *rows])
    return path


def test_what_is_written_reads_back_to_the_same_scores(tmp_path):
    run = small_run()
    run["report"][0] = run["report"][0].__class__(
        **{**run["report"][0].__dict__, "findings_stated": frozenset([SIDELESS])}
    )
    write_predictions(tmp_path, run)
    again = files.read_run(tmp_path)
    assert again["report"][0].findings_stated == {SIDELESS}
    before, after = kind_scores(run), kind_scores(again)
    assert {key: score for key, score in before.items() if score.value is not None} == {
        key: score for key, score in after.items() if score.value is not None
    }


def test_cases_read_back_and_are_drawn_whole_in_a_comparison(tmp_path):
    plain = small_run()["closed"][0]
    runs = {}
    for name, share in (("a", 2), ("b", 3)):
        ones = [
            dataclasses.replace(
                plain, index=i, case=i // 30, output="A. liver" if i % (share + i // 30) else "B. spleen"
            )
            for i in range(60)
        ]
        write_predictions(tmp_path / name, {"closed": ones})
        runs[name] = files.read_run(tmp_path / name)
        assert [one.case for one in runs[name]["closed"]] == [i // 30 for i in range(60)]
    found = comparison.compare(runs["a"], runs["b"])["closed/accuracy"]
    of_case = [
        np.mean(
            [
                b.correct - a.correct
                for a, b in zip(runs["a"]["closed"], runs["b"]["closed"], strict=True)
                if a.case == c
            ]
        )
        for c in (0, 1)
    ]
    np.testing.assert_allclose(found["ci95"], sorted(of_case))


def test_the_answers_under_each_control_are_read_back(tmp_path, capsys):
    run = small_run()
    write_predictions(tmp_path, run)
    again = files.read_run(tmp_path)
    outputs = lambda ones: [(one.index, one.prompt, one.output) for one in ones]  # noqa: E731
    for control in ("shuffled", "section_shuffled"):
        assert outputs(again[f"control/{control}_closed"]) == outputs(run[f"control/{control}_closed"])
    assert outputs(again["control/wrong_group_report"]) == [(0, "Describe the scan.", "")]  # it answered nothing
    assert evaluate.main(["score", str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["control/shuffled_closed_accuracy"] == 0 and found["control/section_shuffled_closed_accuracy"] == 1


def test_any_text_that_a_model_writes_reads_back(tmp_path):
    run = small_run()
    texts = ["a\rb", "a\nb", 'say "a, b"', " a ", "", ";", "é\u2028x"]
    openly = run["open"][0]
    run = {"open": [openly.__class__(**{**openly.__dict__, "index": i, "output": t}) for i, t in enumerate(texts)]}
    write_predictions(tmp_path, run)
    assert [one.output for one in files.read_run(tmp_path)["open"]] == texts


def test_two_files_of_one_kind_are_refused(tmp_path):
    for name in ("a", "b"):
        write_csv(tmp_path / f"predictions_{name}.csv", ["Question", "Answer", "Pred"], [["q", "a", "p"]])
    with pytest.raises(UserError, match="two files of open"):
        files.read_run(tmp_path)


def test_an_empty_answer_under_a_control_counts_as_wrong_and_an_item_left_out_does_not(tmp_path):
    plain = small_run()["closed"][0]
    asked = [dataclasses.replace(plain, index=i) for i in range(8)]
    blind = [dataclasses.replace(one, output="" if one.index % 2 else "A. liver") for one in asked]
    run = {"closed": asked, "control/blind_closed": blind, "control/section_shuffled_closed": blind[:2]}
    write_predictions(tmp_path, run)
    for metrics in (score(run), score(files.read_run(tmp_path))):
        assert metrics["control/blind_closed_accuracy"] == 0.5
        assert metrics["control/section_shuffled_closed_accuracy"] == 0.5
    assert len(files.read_run(tmp_path)["control/section_shuffled_closed"]) == 2


def test_cases_may_be_names_and_types_numbers_of_a_table_program(tmp_path):
    columns = ["Question Type", "Question", "Answer", "Pred", "Case"]
    file = write_csv(tmp_path / "p.csv", columns, [["1.0", "q", "a", "p", "pat-1"], ["2", "q", "a", "p", "pat-2"]])
    read = files.read_file(file)[0][1]
    assert [one.unit for one in read] == [("case", "pat-1"), ("case", "pat-2")]
    assert [one.type for one in read] == ["plane", "phase"]


@pytest.mark.parametrize(
    ("text", "choices"),
    [
        ("Choices: A. axial\nB. coronal\nC. oblique", ("axial", "coronal", "oblique")),
        ("Choices: A. axial, B. coronal, C. oblique", ("axial", "coronal", "oblique")),
        ("Choices: A. left, then right B. neither", ("left, then right", "neither")),
        ("Choices: A. axial/B. coronal", ()),
        ("Choices: A.axial B. coronal", ()),
        ("Choices: A. axial B.coronal C. oblique", ()),
    ],
)
def test_choices_are_found_however_they_are_set(tmp_path, text, choices):
    columns = ["Question", "Answer", "Answer Choice", "Pred"]
    file = write_csv(tmp_path / "p.csv", columns, [[f"Which? {text}", "x", "B", "B. x"]])
    assert files.read_file(file)[0][1][0].choices == choices


def test_without_choices_the_strict_rule_gives_no_score(tmp_path):
    columns = ["Question", "Answer", "Answer Choice", "Pred"]
    file = write_csv(tmp_path / "p.csv", columns, [["Which plane?", "axial", "A", "A. axial"]])
    scores = kind_scores({"closed": files.read_file(file)[0][1]})
    assert scores["closed/accuracy"].value == 1.0 and scores["closed/accuracy_strict"].value is None


def test_m3ds_own_forms_are_read_without_this_projects_columns(tmp_path):
    closed = write_csv(
        tmp_path / "eval_close_vqa.csv",
        ["Question Type", "Question", "Answer", "Answer Choice", "Pred", "Correct"],
        [
            ["1", "Which plane? Choices: A. axial B. coronal C. sagittal D. NA", "axial", "A", "A. axial", "1"],
            ["5", "Where? Choices: A. vitamin B. liver B. left C. lung D. colon", "lung", "C", "none C. of these", "0"],
        ],
    )
    ((kind, read, _),) = files.read_file(closed)
    assert kind == "closed" and [one.type for one in read] == ["plane", "location"]
    assert read[0].choices == ("axial", "coronal", "sagittal", "NA") and read[0].question == "Which plane?"
    assert read[1].choices == ("vitamin", "liver B. left", "lung", "colon")
    scores = kind_scores({"closed": read})
    assert scores["closed/accuracy"].value == 1.0  # containment, as published
    assert scores["closed/accuracy_strict"].value == 0.5
    report = write_csv(
        tmp_path / "eval_caption.csv", ["Question", "Ground Truth", "pred", "bleu"], [["q", "a b", "a b", "0"]]
    )
    ((kind, read, _),) = files.read_file(report)
    assert kind == "report" and kind_scores({"report": read})["report/bleu1"].value == pytest.approx(1)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "lacks the columns of every known kind"),
        (b"a,b\n1,2\n", "lacks the columns of every known kind"),
        (b"Question,Answer,Pred\n", "holds no predictions"),
        (b"Question,Answer,Pred\nq,a,p\nq,a", "ends in the middle of row 3"),
        (b"Question,Answer,Pred,Volume\nq,a,p,x\n", "Volume is not a number"),
        (b"Question,Answer,Pred,Volume\nq,a,p,Smith\n", "Volume is not a number"),
        (b"Question,Answer,Pred,Volume\nq,a,p,1\nq,a,p,\n", "numbers the volume of some rows only"),
        (b'Question,Answer,Pred\nq,a,"cut\nq,a,p\nq,a,p\n', "not a CSV file in UTF-8"),
        (b'Question,Answer,Pred\nq,a,"lone\nq,a,p" more\n', "not a CSV file in UTF-8"),
        (b"Question,Answer,Pred,Pred\nq,a,p,r\n", "two columns of the same name"),
        (b"Question,Answer,Pred,Control blind\nq,a,p\n", "ends in the middle of row 2"),
        (b"Question,Answer,Pred\nq,a,left, right\n", "row 2 has more columns than the header"),
        (b"Question,Answer,Answer Choice,Pred\nq,a,E,p\n", "Answer Choice is 'E'"),
        (b"Question;Answer;Pred\nq;a, b;p\n", "separates its columns by semicolons, not by commas"),
        (b'[\n {"Question": "q",\n "Pred": "p"}\n]', "holds JSON, not a table"),
        (b"Question,Answer,Pred\n\xff\xfe,a,p\n", "not a CSV file in UTF-8"),
    ],
)
def test_a_bad_file_is_one_sentence(tmp_path, content, said, capsys):
    (tmp_path / "p.csv").write_bytes(content)
    assert evaluate.main(["score", str(tmp_path / "p.csv")]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and said in err, err
    assert "Smith" not in err


def system(accuracy: float, items: int = 1000, seed: int = 0):
    """Closed answers of a system that is right this often, on items that every system gets."""
    rng = np.random.default_rng(seed)
    right = np.zeros(items, bool)
    right[rng.permutation(items)[: round(accuracy * items)]] = True
    plain = small_run()["closed"][0].__dict__
    return {
        "closed": [
            small_run()["closed"][0].__class__(
                **{**plain, "index": i, "output": f"{plain['letter']}. x" if hit else "no", "ranked": None}
            )
            for i, hit in enumerate(right)
        ]
    }


def test_a_run_does_not_differ_from_itself():
    result = comparison.compare(system(0.7), system(0.7))
    assert result["closed/accuracy"]["difference"] == 0 and result["closed/accuracy"]["ci95"] == [0, 0]
    shown = comparison.table(result)
    assert "differs" not in shown and "No score shows a difference" in shown


def test_five_points_on_a_thousand_items_are_found():
    result = comparison.compare(system(0.70, seed=1), system(0.75, seed=1))
    found = result["closed/accuracy"]
    assert found["difference"] == pytest.approx(0.05) and found["ci95"][0] > 0 and found["items"] == 1000
    shown = comparison.table(result)
    assert "differs: the interval leaves out 0" in shown and "No score shows a difference" not in shown


def test_independent_systems_of_equal_quality_seldom_differ():
    marked = sum(
        "differs" in comparison.table(comparison.compare(system(0.7, 300, 2 * s), system(0.7, 300, 2 * s + 1)))
        for s in range(40)
    )
    assert marked <= 6  # 5 % of them are expected to


def test_few_volumes_are_counted_and_no_difference_of_theirs_is_marked():
    """Ten questions each about three volumes: their spread says nothing of other volumes."""
    one, other = system(0.2, 30), system(0.8, 30)
    for run in (one, other):
        run["closed"] = [
            dataclasses.replace(a, index=i % 3, question=f"question {i}") for i, a in enumerate(run["closed"])
        ]
    found = comparison.compare(one, other)
    assert found["closed/accuracy"]["units"] == 3 and found["closed/accuracy"]["items"] == 30
    shown = comparison.table(found)
    assert "differs" not in shown and "few: fewer than 20" in shown
    assert "No score shows a difference" not in shown  # nothing can be said of so few


def test_cases_that_one_side_knows_are_drawn_for_both():
    one, other = system(0.7, 60), system(0.7, 60, seed=1)
    cased = {"closed": [dataclasses.replace(a, case=i // 20) for i, a in enumerate(other["closed"])]}
    there, back = (comparison.compare(*pair)["closed/accuracy"] for pair in ((one, cased), (cased, one)))
    assert there["units"] == back["units"] == 3
    np.testing.assert_allclose(there["ci95"], [-back["ci95"][1], -back["ci95"][0]])


def test_an_item_that_stands_twice_in_both_is_compared_twice():
    one, other = system(0.7, 40), system(0.7, 40)
    for run in (one, other):
        run["closed"].append(run["closed"][0])
    assert comparison.compare(one, other)["closed/accuracy"]["items"] == 41
    del other["closed"][-1]
    with pytest.raises(UserError, match="1 items are in one run only"):
        comparison.compare(one, other)


def test_the_order_of_rows_does_not_matter_but_the_items_do():
    one, other = system(0.7), system(0.7)
    other["closed"] = other["closed"][::-1]
    assert comparison.compare(one, other)["closed/accuracy"]["ci95"] == [0, 0]
    other["closed"] = other["closed"][1:]
    with pytest.raises(UserError, match="1 items are in one run only"):
        comparison.compare(one, other)
    with pytest.raises(UserError, match="no kind of prediction in common"):
        comparison.compare(one, {})


def test_the_commands_print_a_table_and_json(tmp_path, capsys):
    write_predictions(tmp_path / "a", small_run())
    write_predictions(tmp_path / "b", small_run())
    assert evaluate.main(["score", str(tmp_path / "a")]) == 0
    out = capsys.readouterr().out
    assert "closed/accuracy_strict" in out and "report/finding_f1" in out and "not for clinical use" in out
    assert evaluate.main(["score", str(tmp_path / "a"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["closed/accuracy"] == 0.5
    assert evaluate.main(["compare", str(tmp_path / "a"), str(tmp_path / "b"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["report/finding_f1"]["difference"] == 0


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([], "command"), (["score"], "predictions"), (["score", "absent.csv"], "absent.csv"),
        (["run", "absent"], "absent"), (["rate", "x"], "rate"),
    ],
)  # fmt: skip
def test_a_wrong_command_is_one_sentence(argv, said, capsys):
    assert evaluate.main(argv) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and said in err


def test_the_command_runs_as_a_module(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "tghmoe_jax.evaluate", "score", str(tmp_path)], capture_output=True, text=True
    )
    assert done.returncode == 2 and "predictions_*.csv" in done.stderr
