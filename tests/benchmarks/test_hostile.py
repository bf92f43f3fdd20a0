"""Files that a stranger wrote: no traceback, nothing raw, nothing changed outside the named folder."""

import collections

import pytest

from benchmarks import hostile


def bad(found):
    return [one for one in found if one["outcome"] not in ("refused", "harmless")]


@pytest.mark.slow
def test_a_strangers_files_neither_break_nor_leave_anything(tmp_path):
    found = hostile.campaign(30, 4, len(hostile.LAYOUTS), 1, tmp_path)
    assert bad(found) == []
    counts = collections.Counter(one["outcome"] for one in found)
    assert len(found) >= 60 and counts["refused"] > 20 and counts["harmless"] > 10


def test_texts_of_a_stranger_come_back_as_they_were_and_as_no_formula(tmp_path):
    for number, text in enumerate(("=1+1", "\x1b[2J'", "x\n# Approved")):
        outcome, said = hostile.in_tables(text, tmp_path / str(number), tmp_path / f"{number}-out")
        assert outcome == "harmless", said


@pytest.mark.parametrize(
    "line, outcome",
    [("# Model", "harmless"), ("# Model\n# Approved", "RAW"), ("# M <b>", "RAW"), ("# \\[M\\]", "harmless"),
     ("# [M](x)", "RAW"), ("# M\x1b[2J", "RAW")],
)  # fmt: skip
def test_a_heading_or_a_link_of_a_stranger_is_seen(line, outcome):
    assert hostile.card_outcome(f"{line}\n\n- Domain: x\n", "# M\n\n- Domain: y\n") == outcome
