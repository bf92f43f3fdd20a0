"""Ablation rows: each trains and is scored, shared stages are trained once, and the table says what the runs say."""

import json
import shutil

import numpy as np
import pytest

from configs import ablations
from tests import tiny_run
from tghmoe_jax import ablate
from tghmoe_jax.data.tokenizer import FILES
from tghmoe_jax.errors import UserError
from tghmoe_jax.evaluation import statistics
from tghmoe_jax.training import runs
from tghmoe_jax.weights.base import EMBEDDED, save_base
from tghmoe_jax.weights.phi3v import canonical_shapes

# As deep as the embedded base, since the rows name its layers.
BASE = tiny_run.BASE | {"vision_config": tiny_run.BASE["vision_config"] | {"num_hidden_layers": 6}}
STEPS = 2


@pytest.fixture(scope="module")
def flags(tmp_path_factory) -> list[str]:
    """What shrinks every row."""
    folder = tmp_path_factory.mktemp("ablate")
    rng = np.random.default_rng(0)
    shapes = canonical_shapes(BASE)
    save_base(folder / "base", {n: rng.normal(0, 0.15, s).astype(np.float32) for n, s in shapes.items()}, BASE)
    for name in FILES:
        shutil.copyfile(EMBEDDED / name, folder / "base" / name)
    sizes = {
        "base": folder / "base", "data.root": folder / "data", "data.volumes": 16, "data.size": tiny_run.SIZE,
        "model.tgh.hidden": 8, "model.depth_rope.rotary_dim": 8, "train.batch": 16, "train.accumulate": 1,
        "train.steps": STEPS, "eval.items": 4, "eval.batch": 4, "eval.new_tokens": 2, "eval.answer_tokens": 2,
    }  # fmt: skip
    return [f"--config.{key}={value}" for key, value in sizes.items()]


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return tmp_path_factory.mktemp("ablations")


@pytest.mark.parametrize("row", ablations.ROWS)
def test_every_row_trains_and_is_scored(row, workdir, flags):
    ablate.run_row(workdir, row, 0, flags)
    last = ablate.scored_run(workdir, row, 0, flags)
    assert ablate.finished(last, STEPS)
    values = ablate.values_of(ablate.scores_of(last))
    assert all(0 <= value <= 1 for value in values.values())
    assert runs.read_manifest(last)["parameters"]["total"] > 0
