"""A few kills and signals at drawn moments: the run ends as the one that nobody touched."""

import pytest

from benchmarks import kills


@pytest.mark.slow
@pytest.mark.parametrize(
    ("signals", "processes", "count"), [(["KILL"], 1, 6), (["TERM", "INT"], 1, 4), (["KILL", "TERM"], 2, 4)]
)
def test_a_run_that_is_hit_ends_as_the_unbroken_one(tmp_path, signals, processes, count):
    hits, runs = kills.campaign(count, signals, processes, count, 3, tmp_path)
    assert len(hits) == count and all(run["hits"] for run in runs[:1])
    assert [one["faults"] for one in hits + runs if one["faults"]] == []


def test_the_table_counts_hits_and_faults_of_each_phase():
    hits = [{"phase": "save", "signal": "INT", "seconds": 1.26, "faults": faults} for faults in ([], ["late"])]
    rows = kills.table(hits, [{"hits": 2, "faults": []}]).splitlines()
    assert '| save | 2 | {"late": 1} | 1.3 |' in rows and "| step | 0 | 0 | 0.0 |" in rows
    assert rows[-1] == "2 hits; 1 runs came to their end, 0 of them with faults"
