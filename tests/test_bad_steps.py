"""Whole commands that meet NaN: a run that passes over bad steps, a run that ends, and models that are refused."""

import json
import signal

import numpy as np
import pytest

from tests import tiny_run
from tests.test_resume import KILLED_AT_STEP, losses
from tghmoe_jax.training import guard, stored
from tghmoe_jax.weights import storage

# Batches of these steps have a spacing that is not a number; every one reads it.
SPOILED = """
import numpy as np
from tghmoe_jax.samples.pipeline import TrainBatches
def spoiled(self, step, sound=TrainBatches.map):
    batch = sound(self, step)
    if int(step) + 1 in {steps}:
        batch["slice_spacing"] = batch["slice_spacing"] * np.float32(np.nan)
    return batch
TrainBatches.map = spoiled
"""


def train(folder, name: str, code: str, *flags: str, devices: int = 1):
    options = (*tiny_run.options(folder), "--config.eval.every=0", "--config.model.depth_rope.unit=mm", *flags)
    return tiny_run.command(folder, "stage1.py", folder / name, *options, code=code, devices=devices)


def steps_of(run) -> set[int]:
    return {int(path.name) for path in (run / "checkpoints").glob("*") if path.name.isdigit()}


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 2])
def test_a_run_passes_over_bad_steps_and_resumes_bit_for_bit(tiny_folder, devices):
    spoiled = SPOILED.format(steps="(2, 3, 5)")
    runs = [tiny_folder / f"{name}_{devices}" for name in ("bad_once", "bad_killed")]
    done = train(tiny_folder, runs[0].name, spoiled, devices=devices)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "step 2 changed nothing: the loss is not finite" in done.stderr
    killed = train(tiny_folder, runs[1].name, spoiled + KILLED_AT_STEP.format(step=5), devices=devices)
    assert killed.returncode == -signal.SIGKILL and steps_of(runs[1]) == {3}, killed.stderr[-3000:]
    again = train(tiny_folder, runs[1].name, spoiled, devices=devices)
    assert again.returncode == 0 and "continued from step 3" in again.stdout, again.stderr[-3000:]
    assert [record["bad"] for record in losses(runs[0])] == [0, 1, 1, 0, 1, 0, 0, 0]
    assert losses(runs[0]) == losses(runs[1])
    one, other = (stored.load_params(run)[0] for run in runs)
    assert all(one[name].tobytes() == other[name].tobytes() for name in one)
    one, other = ((run / guard.FILE).read_text() for run in runs)
    assert one == other
    records = [json.loads(line) for line in one.splitlines()]
    assert [record["step"] for record in records] == [2, 3, 5]
    assert all(len(record["items"]) == 16 and record["items"][0]["volume"] for record in records)


@pytest.mark.slow
def test_a_run_that_diverges_keeps_its_good_checkpoint_and_says_why(tiny_folder):
    done = train(
        tiny_folder, "diverged", SPOILED.format(steps="range(5, 99)"), "--config.train.bad_steps=3",
        "--config.checkpoint.keep=1", "--config.checkpoint.every=2",
    )  # fmt: skip
    assert done.returncode == 65 and "Traceback" not in done.stderr, done.stderr[-3000:]
    (sentence,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert all(part in sentence for part in ("3 steps in a row up to step 7", "volumes phantom ", "connector/fc1"))
    # That of step 6 came after a bad step: it took no other's place.
    assert steps_of(tiny_folder / "diverged") == {4, 6}


@pytest.mark.slow
def test_a_stage_does_not_begin_with_nan(tiny_folder):
    base = tiny_folder / "base_nan"
    tensors = {name: one.load() for name, one in storage.read_tensors(tiny_run.write_base(base)).items()}
    name = next(name for name in tensors if "mlp" in name)
    tensors[name] = np.full_like(tensors[name], np.nan)
    storage.write_tensors(base, tensors)
    done = train(tiny_folder, "from_nan", "", f"--config.base={base}")
    assert done.returncode == 2 and "gives NaN or infinite parameters" in done.stderr, done.stderr[-3000:]
    assert not (tiny_folder / "from_nan").exists()
