"""Sixty damaged files of checkpoints and of an exported model: none is silent, none ends in a traceback."""

import pytest

from benchmarks import damage


@pytest.mark.slow
def test_damage_to_any_file_is_named_or_harmless(tmp_path):
    found = damage.campaign(60, 1, tmp_path)
    assert len(found) == 60 and {one["what"] for one in found} == {"resume", "parameters", "load"}
    assert [one for one in found if one["outcome"] not in ("went on", "refused", "harmless")] == []
    assert {one["kind"] for one in found} == set(damage.KINDS)
    assert all(one["said"] for one in found if one["outcome"] == "refused")
    # The harmless ones lie outside what is read: beside the parameters, or in the model card.
    apart = [one for one in found if one["outcome"] == "harmless" and one["kind"] != "zero"]
    assert all(one["what"] == "parameters" or one["file"] == "README.md" for one in apart)


def test_the_table_counts_every_case():
    found = [{"what": "load", "kind": kind, "outcome": "refused"} for kind in ("cut", "cut", "flip")]
    assert damage.table(found).splitlines()[2:] == ["| load | cut | 2 | 0 | 0 |", "| load | flip | 1 | 0 | 0 |"]
