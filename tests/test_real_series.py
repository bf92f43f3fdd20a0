"""Scores on crops of labelled scans: the real commands from masks to the table, with intervals by scan."""

import csv
import json
import subprocess
import sys

import nibabel
import numpy as np
import pytest

from benchmarks import real_series
from tests import tiny_run
from tests.datasets.dataset_fixtures import write_labelmap_index
from tghmoe_jax.scans.reading import read_volume


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
    assert "| answered | by scans | by parts | ranked | by scans | by parts | shuffled | " in done.stdout
    accuracy, (low, high) = metrics["closed/accuracy"], low_high
    assert f"| all (24) | {accuracy:.3f} | [{low:.3f}, {high:.3f}] | [" in done.stdout
    assert "not for clinical use" in done.stdout.splitlines()[-1]


def test_crops_of_a_section_lie_in_it_and_keep_the_patients_axes(tmp_path, monkeypatch):
    monkeypatch.setattr(real_series, "REGIONS", (("a.nii.gz", 0, 20, "pelvis"), ("a.nii.gz", 24, 44, "abdomen")))
    z, y, x = np.meshgrid(*map(np.arange, (44, 20, 24)), indexing="ij")  # toward the head, the back and the left
    place = (500 * z + 20 * y + x).astype(np.int16) - 1000
    stored = nibabel.Nifti1Image(place.transpose(2, 1, 0)[::-1], np.diag([2.0, -2.0, 3.0, 1.0]))  # x runs to the right
    nibabel.save(stored, tmp_path / "a.nii.gz")
    rows = [json.loads(line) for line in real_series.crops(tmp_path, tmp_path, 40).splitlines()]
    answers = [row["answer"] for row in rows]
    assert len(rows) >= 36 and abs(answers.count("pelvis") - answers.count("abdomen")) <= 4
    assert {row["type"] for row in rows} == {"pelvis, a", "abdomen, a"}
    assert {row["case"] for row in rows} == {"a.nii.gz"} and all("pelvis" in row["choices"] for row in rows)
    for row in rows:
        volume = read_volume(tmp_path / row["volume"], assume_hu=True)
        slices = (volume.array.astype(int) + 1000) // 500
        first, end = (0, 20) if row["answer"] == "pelvis" else (24, 44)
        assert first <= slices.min() and slices.max() < end
        assert volume.spacing_mm == pytest.approx((3.0, 2.0, 2.0))
        assert [np.unique(np.diff(volume.array, axis=axis)).tolist() for axis in range(3)] == [[500], [20], [1]]


def test_a_folder_without_the_series_is_one_sentence_and_may_be_tried_again(tmp_path, capsys):
    for _ in range(2):
        assert real_series.run([str(tmp_path), "--section", "--to", str(tmp_path / "to")]) == 2
        assert capsys.readouterr().err.startswith("error: ")
