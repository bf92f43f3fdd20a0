"""A further metric is one `Metric` and one line that registers it: scores, files, comparisons and tables follow."""

import csv

import pytest

from tests.evaluation.test_protocols import small_run
from tghmoe_jax.evaluation import comparison, files, metrics, outputs, protocols

JUDGED = {"left kidney": 0.8, "": 0.0}  # as a judge would give them
JUDGE = metrics.Metric("judge", "open", lambda ones: [JUDGED[one.output] for one in ones], column="judge")


@pytest.fixture(autouse=True)
def judge():
    metrics.register(JUDGE)
    yield
    del metrics.METRICS["open", "judge"]


def test_a_judged_metric_is_scored_written_read_compared_and_shown(tmp_path):
    run = small_run()
    scores = protocols.score(run)
    assert scores["open/judge"] == pytest.approx(0.4) and scores["open/judge_ci95"] is not None
    outputs.write_predictions(tmp_path, run)
    rows = list(csv.DictReader((tmp_path / "predictions_open.csv").read_text().splitlines()))
    assert [row["judge"] for row in rows] == ["0.8", "0.0"]
    again = files.read_run(tmp_path)
    assert protocols.score(again)["open/judge"] == scores["open/judge"]
    assert comparison.compare(run, again)["open/judge"]["difference"] == 0
    assert "open/judge " in outputs.table(scores, run)


def test_a_name_is_registered_once():
    with pytest.raises(ValueError, match="registered already"):
        metrics.register(JUDGE)
