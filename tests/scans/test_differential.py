"""No drawn scan with faults is read wrongly without a word (see `differential`, which runs the whole campaign)."""

import re
from pathlib import Path

import pytest

from tests.scans import differential
from tghmoe_jax.scans import acquisitions, dicom, dicom_files

DOCS = Path(__file__).resolve().parents[2] / "docs" / "volumes.md"


def run(numbers):
    wrong = []
    found = differential.campaign(numbers, wrong.append)
    assert not wrong, "\n".join(wrong)
    return found


def test_some_scans_with_faults_are_equal_refused_or_warned_about():
    assert sum(counts["equal"] for counts in run(range(24)).values()) > 4


@pytest.mark.slow
def test_many_scans_with_faults_are_equal_refused_or_warned_about():
    found = run(range(24, 224))
    for counts in found.values():
        assert min(counts[kind] for kind in ("equal", "refused", "warned")) > 0
        assert counts["right scans refused or warned"] <= 0.02 * counts.total()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "blind"),
    [
        (acquisitions, {"split": lambda along, _: ([list(range(len(along)))], ""), "doubts": lambda along, _: ()}),
        (dicom_files, {"_counts": lambda passed, files: ()}),
        (dicom, {"check_hu": lambda array, name, assumed: ()}),
        (dicom, {"_cut_off": lambda stack, blank: 0}),
    ],
    ids=["acquisitions", "counts", "HU", "blank slices"],
)
def test_the_campaign_sees_a_reader_that_is_blind(monkeypatch, module, blind):
    wrong = []
    for name, function in blind.items():
        monkeypatch.setattr(module, name, function)
    for start in range(0, 2000, 50):
        differential.campaign(range(start, start + 50, 2), wrong.append)
        if wrong:
            return
    raise AssertionError("nothing was seen")


def test_the_docs_give_the_counts_of_the_whole_campaign():
    rows = re.findall(
        r"^\| (DICOM|NIfTI) \| (\d+) \| (\d+) \| (\d+) \| (\d+) \|$", DOCS.read_text(encoding="utf-8"), re.M
    )
    assert [row[0] for row in rows] == ["DICOM", "NIfTI"]
    for _, *counts, different in rows:
        assert sum(map(int, counts)) == 1000 and different == "0"
