"""The keys of metrics.json, their values on a run small enough to count by hand, and what is written."""

import csv
import dataclasses
import json

import numpy as np
import pytest

from tghmoe_jax.evaluation import DISCLAIMER
from tghmoe_jax.evaluation.outputs import table, write_json, write_predictions
from tghmoe_jax.evaluation.protocols import NOT_ASKED, Prediction, score
from tghmoe_jax.samples.questions import Question

ORGANS = ("liver", "spleen", "left kidney", "bladder")
PLANES = ("axial", "coronal", "sagittal", "oblique")
CYST = ("cyst", "kidney", "right")
STONE = ("stone", "kidney", "left")

KEYS = {
    "closed/accuracy", "closed/accuracy_strict", "closed/accuracy_macro", "closed/ranked_accuracy",
    "closed/by_type/plane", "closed/by_type/phase", "closed/by_type/organ", "closed/by_type/abnormality",
    "closed/by_type/location", "report/finding_f1", "control/shuffled_closed_accuracy", "control/shuffled_finding_f1",
    "control/blind_closed_accuracy", "control/section_shuffled_closed_accuracy",
    "control/section_shuffled_finding_f1", "control/wrong_group_closed_accuracy", "control/wrong_group_finding_f1",
    "router/task_accuracy", "router/task_accuracy_unseen_wording", "router/keyword_accuracy",
    "router/keyword_accuracy_unseen_wording", "moe/load_max_over_mean", "moe/load_min_share",
    *(
        f"{kind}/{name}"
        for kind in ("closed", "open")
        for name in ("calibration_error", "risk_area", "accuracy_surest_half")
    ),
    *(
        f"closed/{score}_{group}"
        for score in ("accuracy", "ranked")
        for group in ("global", "local", "depth", "comparison", "macro_families")
    ),
    "open/exact", "open/number", "open/number_macro", "report/recall_rare", "report/recall_frequent",
    *(f"open/number_by_type/{type}" for type in ("plane", "phase", "organ", "abnormality", "location")),
    *(f"report/{name}" for name in ("distinct", "most_frequent", "all_normal", "all_normal_true")),
    *(f"report/ladder_{step}" for step in ("present", "side", "lobe")),
    "closed/accuracy_strict_macro", "closed/letter_text_disagree", "closed/no_choice",
    "closed/empty", "open/empty", "report/empty", "control/blind_finding_f1",
    *(
        f"control/{name}_{score}"
        for name in ("shuffled", "section_shuffled", "blind", "wrong_group")
        for score in ("closed_accuracy_strict", "report_bleu1")
    ),
    *(f"closed/by_type_strict/{type}" for type in ("plane", "phase", "organ", "abnormality", "location")),
    *(
        f"{kind}/{name}"
        for kind in ("open", "report")
        for name in ("bleu1", "bleu2", "bleu3", "bleu4", "rouge1", "rougeL", "meteor", "cider", "bert_f1",
                     "corpus_bleu1", "corpus_bleu2", "corpus_bleu3", "corpus_bleu4")
    ),
}  # fmt: skip


def closed(index, type, choices, answer, output, **known):
    return Prediction.of(index, Question("vqa", "closed", type, "Which one?", choices, answer), output, **known)


def report(index, output, true, stated, **known):
    question = Question("report", "report", "", "Describe the scan.", (), "A cyst in the right kidney.")
    sets = {"findings_true": frozenset(true), "findings_stated": frozenset(stated)}
    return Prediction.of(index, question, output, **sets, **known)


def small_run():
    openly = Question("vqa", "open", "organ", "Which organ?", (), "the left kidney")
    return {
        "closed": [
            closed(0, "organ", ORGANS, "liver", "A. liver", ranked="A", task_predicted="vqa"),
            closed(0, "plane", PLANES, "coronal", "coronal", ranked="B", task_predicted="vqa"),
            closed(1, "organ", ORGANS, "spleen", "A. liver B. spleen", ranked="A", task_predicted="vqa"),
            closed(2, "organ", ORGANS, "bladder", "B. spleen", ranked="D", task_predicted="report"),
        ],
        "open": [Prediction.of(3, openly, "left kidney"), Prediction.of(4, openly, "")],
        "report": [
            report(0, "A cyst in the right kidney.", [CYST], [CYST]),
            report(1, "A stone in the left kidney.", [CYST], [STONE]),
        ],
        "control/shuffled_closed": [closed(0, "organ", ORGANS, "liver", "B. spleen")],
        "control/section_shuffled_closed": [closed(0, "organ", ORGANS, "liver", "A. liver")],
        "control/wrong_group_report": [report(0, "", [CYST], [])],
    }


def test_exactly_the_designed_keys_each_with_an_interval():
    for run in ({}, small_run()):
        metrics = score(run)
        named = {key for key in metrics if not key.endswith("_few_units")}
        assert named == KEYS | {f"{key}_ci95" for key in KEYS}


def test_an_empty_run_gives_only_nulls():
    assert set(score({}).values()) == {None}
    assert set(score({"closed": [], "open": [], "report": []}).values()) == {None}


def test_values_counted_by_hand():
    metrics = score(small_run(), router={"task_accuracy_unseen_wording": ([True, True, True, False], "abcd")})
    expected = {
        "closed/accuracy": 2 / 4,  # "A. liver" and the echoed list
        "closed/accuracy_strict": 2 / 4,  # "A. liver" and the exact text
        "closed/accuracy_macro": (0 + 2 / 3) / 2,
        "closed/accuracy_strict_macro": (1 + 1 / 3) / 2,
        "closed/by_type_strict/organ": 1 / 3,
        "closed/empty": 0.0,
        "open/empty": 1 / 2,
        "closed/ranked_accuracy": 3 / 4,
        "closed/by_type/organ": 2 / 3,
        "closed/by_type/plane": 0.0,
        "closed/by_type/phase": None,
        "closed/accuracy_local": 2 / 3,
        "closed/accuracy_depth": None,
        "closed/ranked_global": 1.0,
        "closed/ranked_macro_families": (1 + 2 / 3) / 2,  # the families that were not asked do not count
        "open/bleu1": np.exp(1 - 3 / 2) / 2,
        "open/rouge1": 0.8 / 2,
        "open/meteor": None,
        "report/finding_f1": 2 / 4,
        "control/shuffled_closed_accuracy": 0.0,
        "control/section_shuffled_closed_accuracy": 1.0,
        "control/blind_closed_accuracy": None,
        "control/wrong_group_finding_f1": 0.0,
        "control/shuffled_finding_f1": None,
        "router/task_accuracy": 3 / 4,
        "router/task_accuracy_unseen_wording": 3 / 4,
    }
    assert {key: metrics[key] for key in expected} == {
        key: None if value is None else pytest.approx(value) for key, value in expected.items()
    }


def test_answers_of_a_wrong_form_are_counted_apart_and_scored_as_before():
    outputs = ("A. liver", "A. spleen", "the heart", "")
    run = {"closed": [closed(i, "organ", ORGANS, "liver", output) for i, output in enumerate(outputs)]}
    metrics = score(run)
    names = ("letter_text_disagree", "no_choice", "empty", "accuracy", "accuracy_strict")
    assert [metrics[f"closed/{name}"] for name in names] == [1 / 4, 1 / 4, 1 / 4, 1 / 2, 1 / 2]


def test_intervals_hold_their_scores():
    metrics = score(small_run())
    for key in KEYS:
        pair = metrics[f"{key}_ci95"]
        if pair is not None:
            assert 0 <= pair[0] <= metrics[key] <= pair[1] <= (10 if key.endswith("cider") else 1)
    assert metrics["closed/accuracy_ci95"] is not None
    assert metrics["closed/by_type/plane_ci95"] is None  # one volume alone says nothing of the spread


def test_intervals_draw_whole_cases_where_a_data_set_tells_them():
    """Forty parts of two scans: by part the interval would be narrow, by case it is the scores of the two scans."""
    right = [i % 20 < (15 if i < 20 else 5) for i in range(40)]
    asked = [closed(i, "organ", ORGANS, "liver", "A. liver" if hit else "B. spleen") for i, hit in enumerate(right)]
    by_case = [dataclasses.replace(one, case=one.index // 20) for one in asked]
    narrow, wide = (score({"closed": run})["closed/accuracy_ci95"] for run in (asked, by_case))
    assert wide == [0.25, 0.75] and narrow[1] - narrow[0] < 0.4
    assert score({"closed": by_case[:20]})["closed/accuracy_ci95"] is None  # one case alone
    assert "cases are drawn, of which there are 2; so few" in table(score({"closed": by_case}), {"closed": by_case})
    assert "cases" not in table(score({"closed": asked}), {"closed": asked})


def test_given_router_decisions_take_the_place_of_the_noted_ones():
    assert score(small_run(), router={"task_accuracy": ([True, False], "ab")})["router/task_accuracy"] == 0.5


def test_intervals_of_the_router_draw_whole_prompts():
    """The same prompt asked a hundred times is one decision: three wordings, one of them always sent astray."""
    decisions = [i % 3 > 0 for i in range(300)]
    metrics = score({}, router={"keyword_accuracy": (decisions, [f"wording {i % 3}" for i in range(300)])})
    assert metrics["router/keyword_accuracy"] == pytest.approx(2 / 3)
    assert metrics["router/keyword_accuracy_ci95"][0] == 0 and metrics["router/keyword_accuracy_ci95"][1] == 1
    ones = [closed(i, "organ", ORGANS, "liver", "x", task_predicted="vqa") for i in range(50)]
    assert score({"closed": ones})["router/task_accuracy_ci95"] is None  # one prompt


def test_rows_without_a_type_have_no_macro_mean():
    ones = [closed(i, "", ORGANS, "liver", "A. liver") for i in range(4)]
    assert score({"closed": ones})["closed/accuracy_macro"] is None


def test_ranked_accuracy_needs_every_question_ranked():
    run = small_run()
    run["closed"].append(closed(5, "organ", ORGANS, "liver", "A. liver"))
    assert score(run)["closed/ranked_accuracy"] is None


def test_load_is_the_worst_layer_and_skips_groups_without_tokens():
    load = np.array([[[10, 10, 10, 10], [0, 0, 0, 0]], [[20, 10, 8, 2], [1, 1, 1, 1]]])  # (layer, group, E)
    metrics = score({}, load=load)
    assert metrics["moe/load_max_over_mean"] == pytest.approx(2.0)
    assert metrics["moe/load_min_share"] == pytest.approx(0.05)
    assert score({}, load=np.zeros((2, 4)))["moe/load_min_share"] is None


def test_metrics_file_is_strict_json(tmp_path):
    metrics = score(small_run())
    write_json(tmp_path / "metrics.json", metrics)
    assert json.loads((tmp_path / "metrics.json").read_text()) == metrics
    assert [one.name for one in tmp_path.iterdir()] == ["metrics.json"]


def test_csv_files_carry_the_columns_of_m3d_first_and_the_disclaimer(tmp_path):
    run = small_run()
    run["closed"].append(closed(9, "organ", ORGANS, "liver", 'a "quoted",\noutput é'))
    written = write_predictions(tmp_path, run)
    assert {path.name for path in written} == {f"predictions_{kind}.csv" for kind in ("closed", "open", "report")}
    rows = {}
    for path in written:
        with open(path, newline="", encoding="utf-8") as file:
            rows[path.name.removeprefix("predictions_").removesuffix(".csv")] = list(csv.DictReader(file))
    assert list(rows["closed"][0])[:6] == ["Question Type", "Question", "Answer", "Answer Choice", "Pred", "Correct"]
    overlap = ["bleu", "rouge1", "meteor", "bert_f1"]
    assert list(rows["open"][0])[:8] == ["Question Type", "Question", "Answer", "Pred", *overlap]
    assert list(rows["report"][0])[:7] == ["Question", "Ground Truth", "pred", *overlap]
    assert {row["Disclaimer"] for file in rows.values() for row in file} == {DISCLAIMER}

    first = rows["closed"][0]
    assert first["Question Type"] == "3"
    assert first["Question"] == "Which one? Choices: A. liver B. spleen C. left kidney D. bladder"
    assert (first["Answer Choice"], first["Correct"], first["Strict"], first["Ranked"]) == ("A", "1", "1", "A")
    assert (first["Control shuffled"], first["Control section_shuffled"]) == ("B. spleen", "A. liver")
    assert rows["closed"][-1]["Pred"] == 'a "quoted",\noutput é'
    assert rows["closed"][-1]["Control shuffled"] == NOT_ASKED
    assert rows["report"][1]["Findings Stated"] == "stone / kidney / left"
    assert rows["report"][0]["meteor"] == ""


def test_table_sets_controls_beside_their_scores():
    run = small_run()
    metrics = score(run)
    lines = {line.split()[0]: line for line in table(metrics).splitlines() if line.strip()}
    assert lines["closed/accuracy"].split()[-4:] == ["0.000", "1.000", "-", "-"]
    assert lines["report/finding_f1"].split()[-4:] == ["-", "-", "-", "0.000"]
    assert lines["closed/by_type/organ"].split()[-4:] == ["-", "-", "-", "-"]
    assert not any(line.startswith("control/") for line in lines)
    assert table(metrics).splitlines()[-1] == DISCLAIMER

    filled = {line.split()[0]: line for line in table(metrics, run).splitlines() if line.strip()}
    assert filled["closed/by_type/organ"].split()[-4:] == ["0.000", "1.000", "-", "-"]


def test_table_says_what_the_wrong_group_changes_item_by_item():
    """Eight of a hundred answers change for the worse: inside the interval of the score, and an effect all the same."""
    right = [i % 2 == 0 for i in range(100)]
    asked = [closed(i, "organ", ORGANS, "liver", "A. liver" if hit else "B. spleen") for i, hit in enumerate(right)]
    worse = [dataclasses.replace(one, output="B. spleen") if i < 16 else one for i, one in enumerate(asked)]
    run = {"closed": asked}
    assert "other task's experts" not in table(score(run), run)
    run["control/wrong_group_closed"] = asked
    said = table(score(run), run)
    assert "100 items that the router sent to their task score +0.000 [+0.000, +0.000]: no effect of the task" in said
    run["control/wrong_group_closed"] = worse
    metrics = score(run)
    low, high = metrics["closed/accuracy_ci95"]
    assert low < metrics["control/wrong_group_closed_accuracy"] < high
    said = table(metrics, run)
    assert "score -0.080" in said and "the choice of experts matters" in said
    run["control/wrong_group_closed"] = worse[:50]  # those that were asked of both
    assert "50 items that the router sent to their task score -0.160" in table(score(run), run)
    run["closed"] = [
        dataclasses.replace(one, task_predicted="report" if one.index % 4 == 3 else "vqa") for one in asked
    ]
    assert "task score -0.211" in table(score(run), run)  # 8 of 38: where the router erred nothing is forced
    astray = {"report": [dataclasses.replace(one, task_predicted="vqa") for one in small_run()["report"]]}
    astray["control/wrong_group_report"] = astray["report"]
    assert "other task's experts" not in table(score(astray), astray)  # none is left to compare
    few = {kind: [dataclasses.replace(one, case=one.index % 2) for one in ones] for kind, ones in run.items()}
    assert "2 cases or volumes are too few to judge by" in table(score(few), few)


def test_confidence_is_scored_where_every_answer_has_one():
    run = [closed(i, "organ", ORGANS, "liver", "A. liver" if i % 4 else "B. spleen") for i in range(40)]
    sure = [dataclasses.replace(one, confidence=0.9 if one.right else 0.6) for one in run]
    metrics = score({"closed": sure})
    assert metrics["closed/calibration_error"] == pytest.approx(0.75 * 0.1 + 0.25 * 0.6)
    assert metrics["closed/accuracy_surest_half"] == 1 and metrics["closed/risk_area"] < 0.25
    for one in (run, [*sure[1:], run[0]]):
        assert score({"closed": one})["closed/calibration_error"] is None
