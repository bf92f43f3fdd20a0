"""A step over several devices is the step on one; each parameter lies where its rule says."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from jax.sharding import PartitionSpec as P

from tghmoe_jax.sharding.mesh import make_mesh
from tghmoe_jax.sharding.rules import spec


@pytest.fixture(scope="module")
def report():
    """What tests/devices/steps_on_meshes.py prints."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.devices.steps_on_meshes"], capture_output=True, text=True,
        cwd=Path(__file__).parents[2], env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("mesh", ["fsdp", "data_expert"])
def test_steps_on_2_and_4_devices_equal_the_steps_on_one(report, mesh):
    """Two steps: losses, router statistics and every leaf; parameters and experts sharded where the mesh has axes."""
    assert report["devices"] == 4 and report["moved"] > 1e-3
    found = report[mesh]
    assert max(found["scalars"].values()) < 1e-3, found["scalars"]
    assert found["leaves"] < 1e-4
    assert (found["fsdp"] > 10) == (mesh == "fsdp")
    assert (found["expert"] == 4) == (mesh == "data_expert")


def test_a_leaf_of_a_base_is_read_in_the_parts_of_its_devices(report):
    assert report["placed"] == {"parts": [[3, 2, 2], [3, 2, 2]], "whole": True}


@pytest.mark.parametrize(
    ("name", "stacked", "shape", "expected"),
    [
        ("vision/block_2/moe/experts/fc1/kernel", False, (2, 4, 24, 32), P(None, "expert", None, "fsdp")),
        ("vision/block_2/moe/experts/fc2/kernel", True, (4, 2, 4, 32, 24), P(None, None, "expert", "fsdp", None)),
        ("vision/block_2/moe/experts/fc1/bias", False, (2, 4, 32), P(None, "expert", None)),
        ("vision/block_3/task_ffn/experts/fc1/kernel", False, (2, 1, 24, 32), P(None, None, None, "fsdp")),  # 1 expert
        ("vision/block_0/attn/q/kernel", False, (24, 2, 12), P("fsdp", None, None)),
        ("decoder/block_0/attn/out/kernel", True, (2, 4, 8, 33), P()),  # 33 does not divide
        ("decoder/embed/embedding", False, (64, 32), P("fsdp", None)),
        ("vision/block_2/moe/router/x/kernel", False, (2, 24, 4), P()),
        ("connector/fc1/kernel", False, (96, 32), P(None, "fsdp")),
    ],
)
def test_each_leaf_is_sharded_by_its_rule_where_the_axis_divides(name, stacked, shape, expected):
    assert spec(name, stacked, shape, {"data": 2, "fsdp": 2, "expert": 2}) == expected
    assert spec(name, stacked, shape, {"data": 8, "fsdp": 1, "expert": 1}) == P()


def test_a_mesh_that_does_not_fit_the_devices_is_refused():
    count = jax.device_count()
    assert dict(make_mesh().shape) == {"data": count, "fsdp": 1, "expert": 1}
    with pytest.raises(ValueError, match=f"does not give {count} devices"):
        make_mesh(data=count + 1)
    with pytest.raises(ValueError, match=f"does not give {count} devices"):
        make_mesh(data=-1, fsdp=3 * count)
    with pytest.raises(ValueError, match="only one of"):
        make_mesh(data=-1, fsdp=-1)
