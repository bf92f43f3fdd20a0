"""Scores on crops of labelled scans: the real commands from masks to the table, with intervals by scan."""

import csv
import json
import subprocess
import sys

import pytest

from tests import tiny_run
from tests.datasets.dataset_fixtures import write_labelmap_index


@pytest.mark.slow
def test_the_embedded_reader_is_scored_on_parts_of_labelled_scans_by_scan(tmp_path):
    root = tmp_path / "scans"
    write_labelmap_index(root, cases=2, parts=6)
    to = tmp_path / "scored"
    command = [sys.executable, "-m", "benchmarks.real_series", root, "--index", root / "index.json", "--items", "24"]
    done = subprocess.run(
        [*map(str, command), "--to", str(to)], cwd=tiny_run.ROOT, capture_output=True, text=True, timeout=540
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (folder,) = (to / "eval").iterdir()
    with open(folder / "predictions_closed.csv", encoding="utf-8", newline="") as lines:
        rows = list(csv.DictReader(lines))
    assert len(rows) == 24 and {row["Case"] for row in rows} == {"0", "1"}
    assert len({row["Volume"] for row in rows}) > 2  # parts, which are no cases
    # The limit keeps each question balanced between its choices, but for the one that it cuts through.
    given = {}
    for row in rows:
        given.setdefault(row["Question"], []).append(row["Answer Choice"])
    uneven = [letters for text, letters in given.items() if len(set(map(letters.count, "ABC"[: text.count(". ")]))) > 1]
    assert len(uneven) <= 1, uneven
    # The interval of two scans is their own two scores: it is by scan, not by part.
    of_scan = [[int(row["Correct"]) for row in rows if row["Case"] == case] for case in "01"]
    low_high = sorted(sum(right) / len(right) for right in of_scan)
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["closed/accuracy_ci95"] == low_high
    for control in ("shuffled", "blind"):
        assert metrics[f"control/{control}_closed_accuracy"] is not None
    assert "whole cases are drawn, of which there are 2" in (folder / "scores.txt").read_text()
    assert (
        "| `closed/accuracy` (24) |" in done.stdout
        and "| score | ranked | shuffled | blind | wrong_group | guessing |" in done.stdout
    )
    assert "not for clinical use" in done.stdout.splitlines()[-1]
