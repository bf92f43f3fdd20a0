"""The benchmark of one GPU: refused without one, and run in small on this machine."""

import json

import pytest

from benchmarks import gpu


def test_without_a_gpu_one_sentence_says_what_to_do(capsys):
    assert gpu.main([]) == 2
    (told,) = capsys.readouterr().err.splitlines()
    assert "JAX sees no NVIDIA GPU here (its devices: cpu)" in told and "requirements-gpu.txt" in told


def test_what_no_time_is_left_for_is_named(capsys, monkeypatch):
    monkeypatch.setattr(gpu, "steps", lambda config, device: {"name": "training step", "seconds": 1.0, "mfu": None})
    assert gpu.main(["--small", "--json", "--minutes=0"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert rows[0]["name"].startswith("attention, slab") and rows[0]["seconds"] > 0
    assert rows[-1] == {"name": "the checks that follow", "left_out": "no time"}
    assert "left out: no time" in gpu.line(rows[-1])


@pytest.mark.slow
def test_the_whole_benchmark_runs_in_small(capsys):
    assert gpu.main(["--small", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)["rows"]}
    assert sum(name.startswith("attention, ") for name in rows) == 8  # four masks, blocked and xla
    step = rows["training step of 16 samples"]
    assert step["passed"] and step["steps_a_second"] * step["seconds"] == pytest.approx(1)
    assert any(name.startswith("donated training step") for name in rows)
