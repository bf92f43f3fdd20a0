"""mode=evaluate lays the parameters over the mesh as training does, and answers as one device."""

import json
import re

import pytest

from tests import tiny_run

SHARE_OF_A_DEVICE = """
import jax
from tghmoe_jax import evaluate
load = evaluate.load_sharded
def reported(run, text_length, batch, mesh):
    reader = load(run, text_length, batch, mesh)
    leaves = jax.tree.leaves(reader.variables)
    held = sum(leaf.addressable_shards[0].data.nbytes for leaf in leaves)
    print("share", held / sum(leaf.nbytes for leaf in leaves), dict(mesh.shape))
    return reader
evaluate.load_sharded = reported
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "most", "axes"),
    [
        ({"fsdp": 4, "data": 2}, 0.6, {"data": 2, "fsdp": 4, "expert": 1}),
        # Its groups lie on an axis of their own because the run, not the evaluating config, has 4 experts a group.
        ({"data": 1, "expert": 8}, 0.9, {"data": 1, "fsdp": 1, "group": 2, "expert": 4}),
    ],
)
def test_a_device_holds_a_share_of_the_parameters_and_the_scores_stay(tiny_folder, tiny_stage2, mesh, most, axes):
    name = "on_" + "_".join(f"{axis}{size}" for axis, size in mesh.items())
    flags = [*tiny_run.options(tiny_folder), f"--config.init_from={tiny_stage2}", "--config.model.tgh.experts=16"]
    flags += [f"--config.mesh.{axis}={size}" for axis, size in mesh.items()]
    done = tiny_run.command(tiny_folder, "evaluate.py", tiny_folder / name, *flags, code=SHARE_OF_A_DEVICE, devices=8)
    assert done.returncode == 0, done.stderr[-3000:]
    share, shape = re.search(r"^share ([\d.]+) (.+)$", done.stdout, re.MULTILINE).groups()
    assert float(share) < most and json.loads(shape.replace("'", '"')) == axes
    scores, expected = (
        {key: value for key, value in tiny_run.metrics(run).items() if not isinstance(value, list)}
        for run in (tiny_folder / name, tiny_stage2)
    )
    assert scores == pytest.approx(expected, abs=0.02)
