"""Sixty damaged files of checkpoints, models and data: none is silent, none ends in a traceback."""

import pytest

from benchmarks import damage


@pytest.mark.slow
def test_damage_to_any_file_is_named_or_harmless(tmp_path):
    found = damage.campaign(60, 1, tmp_path)
    assert len(found) == 60 and len({one["what"] for one in found}) == 6
    assert [one for one in found if one["outcome"] not in ("went on", "refused", "harmless")] == []
    assert {one["kind"] for one in found} == set(damage.KINDS)
    assert all(one["said"] for one in found if one["outcome"] == "refused")
    # The harmless ones lie outside what is read: beside the parameters or the volumes, or in the model card.
    apart = [one for one in found if one["outcome"] == "harmless" and one["kind"] != "zero"]
    files = [one["file"] for one in apart if one["what"] != "parameters"]
    assert all(file in ("README.md", "durations.json", "digests.json") or file.startswith("volumes/") for file in files)


def test_the_table_counts_every_case():
    found = [{"what": "load", "kind": kind, "outcome": "refused"} for kind in ("cut", "cut", "flip")]
    assert damage.table(found).splitlines()[2:] == ["| load | cut | 2 | 0 | 0 |", "| load | flip | 1 | 0 | 0 |"]
