"""The micro F1 of finding triples."""

import pytest

from tests.evaluation.test_protocols import report
from tghmoe_jax.evaluation.protocols import kind_scores

NODULE = ("nodule", "lung", "left")
CYST = ("cyst", "kidney", "right")
STONE = ("stone", "kidney", "left")


def micro_f1(pairs):
    """The score of reports with these (true, stated) triples."""
    ones = [report(i, "text", true, stated) for i, (true, stated) in enumerate(pairs)]
    return kind_scores({"report": ones}, resamples=0)["report/finding_f1"].value


def test_micro_f1_pools_reports_before_dividing():
    # TP 1, FP 1, FN 2 -> 2 / 5; the mean of the two reports' own F1 would be 1/3.
    assert micro_f1([({NODULE, CYST}, {NODULE}), ({STONE}, {CYST})]) == pytest.approx(2 / 5)


def test_side_and_organ_are_part_of_a_finding():
    assert micro_f1([({NODULE}, {("nodule", "lung", "right")})]) == 0.0


def test_reports_without_findings_count_nothing():
    assert micro_f1([(set(), set())]) is None
    assert micro_f1([]) is None
    assert micro_f1([(set(), set()), ({CYST}, {CYST})]) == 1.0
