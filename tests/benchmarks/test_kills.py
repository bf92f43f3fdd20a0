"""The report of the campaign of kills and signals."""

from benchmarks import kills


def test_the_table_counts_hits_and_faults_of_each_phase():
    hits = [{"phase": "save", "signal": "INT", "seconds": 1.26, "faults": faults} for faults in ([], ["late"])]
    rows = kills.table(hits, [{"hits": 2, "faults": []}]).splitlines()
    assert '| save | 2 | {"late": 1} | 1.3 |' in rows and "| step | 0 | 0 | 0.0 |" in rows
    assert rows[-1] == "2 hits; 1 runs came to their end, 0 of them with faults"
