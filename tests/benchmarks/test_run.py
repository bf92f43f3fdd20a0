"""Every case of the benchmark at small size, by the real command: outputs equal the peer's, and there is a ratio."""

import json
import math
import subprocess
import sys

import pytest

from benchmarks import measure
from benchmarks import run as benchmark
from tests import tiny_run

# What each case compares before it times anything, within its own tolerance; the others measure one program against
# itself.
COMPARES = {"vision": 4, "train_step": 2, "moe_layer": 3, "decode": 4}


def command(*flags: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.run", *flags], cwd=tiny_run.ROOT, env=tiny_run.environment(),
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip


@pytest.fixture(scope="module")
def report() -> dict:
    """What the command says of all cases; it leaves the page and the reports of real sizes alone."""
    kept = [file.read_bytes() if file.is_file() else None for file in (benchmark.PAGE, benchmark.REPORTS)]
    done = command("--small", "--runs=1", "--json")
    assert done.stdout, done.stderr[-3000:]
    assert kept == [file.read_bytes() if file.is_file() else None for file in (benchmark.PAGE, benchmark.REPORTS)]
    return json.loads(done.stdout) | {"stderr": done.stderr}


@pytest.mark.slow
@pytest.mark.parametrize("name", benchmark.CASES)
def test_a_case_runs_at_small_size_and_gives_ratios_of_equal_outputs(report, name):
    assert report["rates"]["matmul"] > 0 and report["rates"]["bandwidth"] > 0 and report["machine"]["versions"]["torch"]
    assert "error" not in report["cases"][name], report["stderr"][-3000:]
    rows = report["cases"][name]["rows"]
    ratios = [row["ratio"] for row in rows if row["ratio"] is not None]
    assert ratios and all(math.isfinite(ratio) and ratio > 0 for ratio in ratios)
    assert all(row["reached"] == (row["ratio"] <= row["bound"]) for row in rows if row["bound"] is not None)
    if name in ("train_step", "vision", "moe_layer"):
        assert sum("difference" in row["notes"] for row in rows) == COMPARES[name] == len(rows)
    if name == "train_step":
        for row in rows:
            for ours, peers in row["notes"]["losses"]:
                assert ours == pytest.approx(peers, rel=1e-5)
    if name == "decode":
        assert all(row["notes"]["distinct"] > 1 for row in rows if row["notes"]["tokens"] > 1)


def test_a_wrong_name_is_reported():
    done = command("--only=speed")
    assert done.returncode == 2 and done.stderr.startswith("error: 'speed' is no case; name some of vision, ")


def test_outputs_that_differ_end_the_case():
    measure.must_agree("features", [1.0, 2.0, 3.0], [1.0, 2.0, 3.0001], 1e-3)
    for wrong in ([1.0, 2.0, 3.1], [1.0, 2.0, math.nan], [1.0, 2.0]):
        with pytest.raises(SystemExit, match="error: features: "):
            measure.must_agree("features", [1.0, 2.0, 3.0], wrong, 1e-3)


def test_runs_alternate_and_each_side_is_first_as_often():
    order = []
    times = measure.alternate(lambda: order.append("ours"), lambda: order.append("peer"), 4)
    assert order == ["ours", "peer", *["ours", "peer", "peer", "ours"] * 2] and [len(one) for one in times] == [4, 4]


def test_a_way_of_the_peer_that_fails_is_left_out():
    def broken():
        raise RuntimeError("no compiler")

    name, _, tried = measure.better({"compiled": broken, "eager": lambda: None})
    assert name == "eager" and tried["compiled"] == "RuntimeError: no compiler"


def test_the_page_keeps_its_words_and_the_rows_of_other_cases(tmp_path, monkeypatch):
    page, reports = tmp_path / "speed.md", tmp_path / "speed.json"
    monkeypatch.setattr(benchmark, "PAGE", page)
    monkeypatch.setattr(benchmark, "REPORTS", reports)
    page.write_text("Before.\n" + "".join(benchmark.MARKS) + "After.\n")
    about = {
        "machine": {"processor": "P", "cores": 2, "busy_before": 0.01, "python": "3", "versions": {}, "commit": "c"},
        "rates": {"matmul": 2e9, "worst_matmul": 1e9, "matmul_torch": 2e9, "matmul_jax": 1e9, "bandwidth": 1e9},
    }

    def rows(ratio: float) -> dict:
        row = measure.Row("a", [ratio, ratio], [1.0, 1.0], 0.9, work=[(1e9, 0), (0, 2e8)])
        return {"rows": [row.record()], **about}

    benchmark.keep({"depth": rows(0.5)})
    benchmark.keep({"vision": rows(0.95)})
    text = page.read_text()
    assert text.startswith("Before.\n") and text.endswith("After.\n")
    lines = [line for line in text.splitlines() if line.startswith(("| vision", "| depth"))]
    assert lines == [
        "| vision: a | 0.95 | 1 | 0.95 | 0.9 | no | 0.7 | 2 |",
        "| depth: a | 0.5 | 1 | 0.5 | 0.9 | yes | 0.7 | 2 |",
    ]
    assert "these are no figures to rely on" in text  # the machine's rate changed
    assert "Not run yet: train_step, moe_layer, decode, pipeline, compile." in text
