"""What a TGH-MoE layer of full width executes, forward and backward, compiled for a TPU topology that is not there."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.parametrize("transport", ["all_to_all", "ragged"])
def test_a_layer_executes_little_more_than_its_chosen_experts_ask_for(transport):
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.moe_layer", "--topology", "v5e:2x4", "--slabs", "1",
         "--transport", transport],
        capture_output=True, text=True, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert found["mesh"] == {"data": 1, "fsdp": 2, "expert": 4}
    assert 1 <= found["ratio"] <= 1.35, found
    assert found["kernels"] == (6 if transport == "ragged" else 0)  # two forward, four backward
    devices = [device for group in found["all_to_all_groups"] for device in group]
    assert sorted(devices) == list(range(8)) and all(len(group) == 4 for group in found["all_to_all_groups"])
