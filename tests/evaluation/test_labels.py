"""Clinical F1 from label tables: counted by hand, faults named."""

import json

import numpy as np
import pytest

from tghmoe_jax import evaluate
from tghmoe_jax.evaluation import labels


def write(path, header, rows):
    path.write_text("\n".join([",".join(header), *(",".join(map(str, row)) for row in rows)]) + "\n")
    return path


@pytest.fixture
def tables(tmp_path):
    true = write(tmp_path / "true.csv", ["Case", "Nodule", "Effusion", "Hernia"],
                 [["a", 1, 0, 0], ["b", 1, 1, 0], ["c", 0, 1, 0], ["d", 0, 0, 0]])  # fmt: skip
    predicted = write(tmp_path / "pred.csv", ["Case", "Hernia", "Nodule", "Effusion"],
                      [["d", 0, 1, 0], ["a", 0, 1, 0], ["b", 0, 0, 1], ["c", 0, 0, 1]])  # fmt: skip
    return predicted, true


def test_scores_counted_by_hand_with_rows_and_columns_in_another_order(tables):
    found = labels.score(*tables)
    assert list(found) == ["micro", "macro", "Nodule", "Effusion", "Hernia"]
    assert found["Nodule"]["f1"] == pytest.approx(2 / 4) and found["Nodule"]["prevalence"] == 0.5
    assert found["Nodule"]["precision"] == found["Nodule"]["recall"] == 0.5
    assert found["Effusion"]["f1"] == 1.0
    assert found["Hernia"]["f1"] is None and found["Hernia"]["ci95"] is None  # nowhere true, nowhere predicted
    assert found["micro"]["f1"] == pytest.approx(2 * 3 / (2 * 3 + 1 + 1))
    assert found["macro"]["f1"] == pytest.approx((0.5 + 1.0) / 2)


def test_intervals_hold_their_scores_and_narrow_with_more_cases(tmp_path):
    widths = []
    for count in (50, 800):
        rng = np.random.default_rng(count)
        true = rng.random((count, 18)) < 0.2
        predicted = np.where(rng.random((count, 18)) < 0.85, true, ~true)
        names = [f"label {j}" for j in range(18)]
        files = [
            write(tmp_path / f"{name}.csv", ["id", *names], [[i, *map(int, row)] for i, row in enumerate(values)])
            for name, values in (("p", predicted), ("t", true))
        ]
        found = labels.score(*files)
        for one in found.values():
            assert one["ci95"][0] <= one["f1"] <= one["ci95"][1]
        widths.append(found["micro"]["ci95"][1] - found["micro"]["ci95"][0])
    assert widths[1] < widths[0] / 2


def test_reconstructions_of_one_patient_are_drawn_together(tmp_path):
    """Every row given three times, as CT-RATE has several reconstructions of a scan, leaves the interval as it is."""
    rng = np.random.default_rng(0)
    true = rng.random((60, 4)) < 0.4
    predicted = np.where(rng.random((60, 4)) < 0.8, true, ~true)

    def interval(copies, name):
        files = [
            write(tmp_path / f"{name}-{side}-{copies}.csv", ["VolumeName", *"abcd"],
                  [[name.format(i=i, k=k), *map(int, row)] for i, row in enumerate(values) for k in range(copies)])
            for side, values in (("p", predicted), ("t", true))
        ]  # fmt: skip
        found = labels.score(*files)["micro"]
        assert found["items"] == 60 * copies
        return found["units"], found["ci95"][1] - found["ci95"][0]

    once, copied = (interval(copies, "valid_{i}_a_{k}.nii.gz") for copies in (1, 3))
    assert once[0] == copied[0] == 60 and copied[1] == pytest.approx(once[1])
    assert interval(3, "row {i} {k}")[1] < 0.8 * once[1]  # names that say nothing are rows of their own


def test_the_command_prints_a_table_and_json(tables, capsys):
    argv = ["score", "--pred-labels", str(tables[0]), "--true-labels", str(tables[1])]
    assert evaluate.main(argv) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:2] == ["label", "F1"] and len(lines) == 7
    assert lines[-1] == "intervals: whole cases are drawn, of which there are 4 in 4 rows."
    assert evaluate.main([*argv, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["Effusion"]["f1"] == 1.0


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "needs a header"),
        ("Case,Nodule\n", "needs a header"),
        ("Case,Nodule,Effusion,Hernia\na,1,0\n", "ends in the middle of row 2"),
        ("Case,Nodule,Effusion,Hernia\na,1,0,yes\n", "row 2: Hernia is 'yes', neither 0 nor 1"),
        ("Case,Nodule,Effusion,Hernia\na,1,0,0\na,1,0,0\n", "names the case 'a' twice"),
        ("Case,Nodule,Nodule,Hernia\na,1,0,0\n", "names the label 'Nodule' twice"),
        ("Case,Nodule,Effusion,Hernia\na,1,0,0\n", "differ in their cases (b, c, d)"),
        ("Case,Nodule\na,1\nb,0\n\nc,0\nd,0\n\n", "differ in their labels (Effusion, Hernia)"),  # blank lines are none
        ("Case,Nodule,Micro,Hernia\na,1,0,0\n", "names a label 'micro'"),
    ],
)
def test_a_table_that_does_not_fit_is_one_sentence(tables, text, said, capsys):
    tables[0].write_text(text)
    assert evaluate.main(["score", "--pred-labels", str(tables[0]), "--true-labels", str(tables[1])]) == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1


def test_a_column_without_a_name_is_no_label(tables):
    before = labels.score(*tables)
    for table in tables:
        head, *body = table.read_text().splitlines()
        named = [f"{head.replace(',', ',,', 1)},Unnamed: 0"]
        table.write_text("\n".join(named + [f"{row.replace(',', f',{i % 2},', 1)},1" for i, row in enumerate(body)]))
    assert labels.score(*tables) == before


def test_both_tables_are_needed(tables, capsys):
    for argv in (["score"], ["score", "--pred-labels", str(tables[0])], ["score", "x.csv", "--true-labels", "y.csv"]):
        assert evaluate.main(argv) == 2
        assert "--pred-labels and --true-labels" in capsys.readouterr().err
