"""The keyword rule, and scores under predicted, true and wrong routing counted by hand."""

import pytest

from tghmoe_jax.evaluation.protocols import Prediction
from tghmoe_jax.evaluation.router_tests import score_way, table, task_by_keyword
from tghmoe_jax.samples.questions import Question

PLANES = ("axial", "coronal", "sagittal", "oblique")
CYST, STONE = ("cyst", "kidney", "right"), ("stone", "kidney", "left")


@pytest.mark.parametrize(
    ("question", "task"),
    [
        ("Write a report for this CT.", "report"),
        ("SUMMARISE the findings.", "report"),
        ("Which plane is this?", "vqa"),
        ("Which finding is present?", "vqa"),
        ("What do you see?", "vqa"),  # a report, which no word gives away
        ("Describe the location of the cyst.", "report"),  # a question, which a word makes look like a report
        ("", "vqa"),
    ],
)
def test_the_keyword_rule_looks_at_words_alone(question, task):
    assert task_by_keyword(question) == task


def closed(i, output):
    return Prediction.of(i, Question("vqa", "closed", "plane", "Which plane?", PLANES, "axial"), output)


def report(i, stated):
    question = Question("report", "report", "report", "Say what you see.", (), "A cyst.")
    return Prediction.of(i, question, "", findings_true=frozenset([CYST]), findings_stated=frozenset(stated))


ORACLE = {"closed": [closed(i, "A. axial") for i in range(4)], "report": [report(0, [CYST]), report(1, [CYST])]}
WRONG = {"closed": [closed(i, "B. coronal") for i in range(4)], "report": [report(0, [STONE]), report(1, [CYST])]}


HITS = {"closed": [True, False, True, True], "open": [False, False, True, False], "report": [False, True]}


def test_predicted_routing_takes_each_answer_from_the_group_that_the_router_picks():
    scores = score_way(ORACLE, WRONG, HITS)
    assert [scores[f"router/{kind}"] for kind in ("closed", "open", "report")] == [0.75, 0.25, 0.5]
    assert scores["keyword/vqa"] == 1.0 and scores["keyword/report"] == 0.0
    assert [scores[f"closed/accuracy/{name}"] for name in ("predicted", "oracle", "wrong")] == [0.75, 1.0, 0.0]
    assert [scores[f"report/finding_f1/{name}"] for name in ("predicted", "oracle", "wrong")] == [0.5, 1.0, 0.5]
    low, high = scores["closed/accuracy/predicted_ci95"]
    assert 0 <= low <= 0.75 <= high <= 1


@pytest.mark.parametrize("hit", [True, False])
def test_a_router_that_is_always_right_or_wrong_scores_as_the_forced_group(hit):
    scores = score_way(ORACLE, WRONG, {"closed": [hit] * 4, "report": [hit] * 2})
    same = "oracle" if hit else "wrong"
    for score in ("closed/accuracy", "report/finding_f1"):
        assert scores[f"{score}/predicted"] == scores[f"{score}/{same}"]
        assert scores[f"{score}/predicted_ci95"] == scores[f"{score}/{same}_ci95"]


def test_the_table_has_a_line_for_each_way_with_all_its_numbers():
    scores = score_way(ORACLE, WRONG, HITS)
    head, first, second = table({"seen": scores, "typos": scores | {"closed/accuracy/wrong": None}}).splitlines()
    assert "closed" in head and first.split()[:4] == ["seen", "0.750", "0.250", "0.500"] and len(first.split()) == 12
    assert second.split().count("-") == 1
