"""Clinical F1, CRG and AUROC from label tables: counted by hand, faults named."""

import json

import numpy as np
import pytest

from tghmoe_jax import evaluate
from tghmoe_jax.errors import UserError
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
    assert lines[0].split()[:2] == ["label", "F1"] and len(lines) == 9
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


def tables_of(tmp_path, predicted, true):
    names = [f"label {j}" for j in range(true.shape[1])]
    return [
        write(tmp_path / f"{name}.csv", ["id", *names], [[f"c{i}", *row] for i, row in enumerate(values.tolist())])
        for name, values in (("predicted", predicted), ("true", true))
    ]


def crg_by_hand(predicted, true):
    """The challenge's formula, decision by decision."""
    counts = {"tp": 0, "fn": 0, "fp": 0}
    for says, is_so in zip(predicted.ravel(), true.ravel(), strict=True):
        counts["tp"] += says and is_so
        counts["fn"] += not says and is_so
        counts["fp"] += says and not is_so
    positives = int(counts["tp"] + counts["fn"])
    r, u = (true.size - positives) / (2 * positives), (true.size - positives) / 2
    return u / (2 * u - (r * int(counts["tp"]) - r * int(counts["fn"]) - int(counts["fp"])))


def test_crg_is_1_for_all_right_a_third_for_all_negative_and_the_formula_between(tmp_path):
    rng = np.random.default_rng(1)
    true = (rng.random((40, 18)) < 0.2).astype(int)
    noisy = np.where(rng.random(true.shape) < 0.8, true, 1 - true)
    for predicted, expected in ((true, 1.0), (true * 0, 1 / 3), (noisy, crg_by_hand(noisy > 0, true > 0))):
        micro = labels.score(*tables_of(tmp_path, predicted, true))["micro"]
        assert micro["crg"] == pytest.approx(expected)
        assert micro["crg_ci95"][0] <= expected + 1e-9 and expected - 1e-9 <= micro["crg_ci95"][1]
    assert labels.score(*tables_of(tmp_path, true, true * 0))["micro"]["crg"] is None  # no positive: not defined


def auroc_of_pairs(scores, true):
    """The share of (positive, negative) pairs in order, equal ones half: no ranks, no sorting."""
    pairs = [(p > n) + (p == n) / 2 for p in scores[true > 0] for n in scores[true == 0]]
    return np.mean(pairs) if pairs else None


def test_auroc_is_the_share_of_pairs_in_order_with_ties_and_weights():
    rng = np.random.default_rng(2)
    for levels in (3, 10, 1000):
        scores, true = rng.integers(0, levels, 60) / levels, rng.random(60) < 0.3
        weights = rng.integers(0, 4, (5, 60))
        areas = labels.auroc(scores, true, weights)
        for area, weight in zip(areas, weights, strict=True):
            row = np.repeat(np.arange(60), weight)  # a weight is a case that stands so often
            assert area == pytest.approx(auroc_of_pairs(scores[row], true[row]))
    assert np.isnan(labels.auroc(scores, scores < 0, np.ones((1, 60)))).all()


def test_a_table_of_scores_has_aurocs_and_the_labels_of_its_threshold(tmp_path, capsys):
    rng = np.random.default_rng(3)
    true = (rng.random((60, 3)) < 0.3).astype(int)
    true[:, 2] = 0  # one class alone
    scores = np.clip(true * 0.3 + rng.random(true.shape) * 0.7, 0, 1).round(2)
    files = tables_of(tmp_path, scores, true)
    found = labels.score(*files)
    single = [found[f"label {j}"] for j in range(3)]
    expected = [auroc_of_pairs(scores[:, j], true[:, j]) for j in range(2)]
    assert [one["auroc"] for one in single] == [*map(pytest.approx, expected), None]
    assert all(one["auroc_ci95"][0] < one["auroc"] < one["auroc_ci95"][1] for one in (*single[:2], found["macro"]))
    assert found["macro"]["auroc"] == pytest.approx(np.mean(expected))
    binary = labels.score(*tables_of(tmp_path, (scores >= 0.5).astype(int), true))
    assert binary["micro"] == found["micro"] and binary["macro"]["auroc"] is None
    assert evaluate.main(["score", "--pred-labels", str(files[0]), "--true-labels", str(files[1])]) == 0
    assert "CRG" in capsys.readouterr().out
    files[1].write_text(files[1].read_text().replace(",1", ",0.7"))
    with pytest.raises(UserError, match="neither 0 nor 1"):
        labels.score(*files)


def test_recall_of_rare_labels_and_normal_rows_show_a_collapse_to_the_common(tmp_path):
    true = np.array([[1, 1, 0, 0]] * 6 + [[1, 0, 1, 0], [1, 0, 0, 1], [0, 0, 0, 0], [0, 0, 0, 0]])
    predicted = np.tile([1, 1, 0, 0], (10, 1))
    micro = labels.score(*tables_of(tmp_path, predicted, true))["micro"]
    assert (micro["recall_rare"], micro["recall_frequent"]) == (0.0, 1.0)  # 3 and 4 occur once each: below the median
    assert (micro["all_normal"], micro["all_normal_true"]) == (0.0, 0.2)
