"""A run that is killed and started again is the run that nobody killed: the same losses, bit for bit."""

import json
import random
import shutil
import signal

import pytest

from configs import common, stage1
from tests import tiny_run
from tghmoe_jax.errors import UserError
from tghmoe_jax.training import run_folder, stored
from tghmoe_jax.training.reporting import deterministic, read_metrics

# What the killed process does to itself. A loss is noted, half of the next line is written, and the process is gone;
# its last checkpoint is whole by then;
KILLED_AT_STEP = """
import os, signal
from tghmoe_jax.training import checkpoints, reporting, stored
record, save = reporting.RunLog.record, checkpoints.Checkpoints.save
def saved(self, *args, **kw):
    save(self, *args, **kw)
    self.finish()
checkpoints.Checkpoints.save = saved
def dying(self, step, *args):
    record(self, step, *args)
    if step == {step}:
        self._file.write('{{"step": {step}1, "lo')
        self._file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
reporting.RunLog.record = dying
"""
# or it is gone in the middle of the checkpoint of this step, when parameters and moments may be written already.
KILLED_IN_CHECKPOINT = """
import os, signal
import grain
from tghmoe_jax.training.checkpoints import Checkpoints
save, write = Checkpoints.save, grain.checkpoint.CheckpointHandler.save
def saving(self, state, iterator, **kw):
    if int(state.step) == {step}:
        grain.checkpoint.CheckpointHandler.save = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
    save(self, state, iterator, **kw)
Checkpoints.save = saving
"""


def losses(run) -> list[dict]:
    return [deterministic(record) for record in read_metrics(run / "metrics.jsonl")]


ONCE = [(KILLED_AT_STEP.format(step=5), None, {3})]
STEP = random.randint(4, tiny_run.STEPS)  # noqa: S311
THRICE = [
    (KILLED_AT_STEP.format(step=2), None, set()),
    (KILLED_IN_CHECKPOINT.format(step=6), None, {3}),
    (KILLED_AT_STEP.format(step=STEP), 3, {3, 6} if STEP > 6 else {3}),
]


@pytest.mark.parametrize(
    "kills", [pytest.param(ONCE, id="once"), pytest.param(THRICE, id="thrice", marks=pytest.mark.slow)]
)
def test_a_killed_run_resumes_with_the_losses_of_an_unbroken_one(tiny_folder, tiny_stage1, kills):
    """Killed after a checkpoint; or before the first one, within the second, and after a random step."""
    run = tiny_folder / f"killed_{len(kills)}"

    def again(code: str = ""):
        flags = (*tiny_run.options(tiny_folder), "--config.eval.every=0")  # an evaluation changes no loss
        return tiny_run.command(tiny_folder, "stage1.py", run, *flags, code=code)

    for code, continues, holds in kills:
        done = again(code)
        assert done.returncode == -signal.SIGKILL, done.stderr[-3000:]
        assert (f"continued from step {continues}" in done.stdout) == (continues is not None)
        assert {int(path.name) for path in (run / "checkpoints").glob("*") if path.name.isdigit()} == holds, kills
    done = again()
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"continued from step {max(kills[-1][2])}" in done.stdout
    unbroken, broken = losses(tiny_stage1), losses(run)
    assert [record["step"] for record in broken] == list(range(1, tiny_run.STEPS + 1))
    assert broken == unbroken, kills
    one, other = (stored.load_params(folder)[0] for folder in (tiny_stage1, run))
    assert one.keys() == other.keys() and all(one[name].tobytes() == other[name].tobytes() for name in one)


def test_a_change_of_steps_is_recorded_once_and_compared_with_the_last_one(tmp_path):
    config = common.get_config()
    config.train.steps = 8
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    (tmp_path / "manifest.json").write_text(json.dumps({"seeds": {"train": 0}}))
    assert run_folder.record_steps(tmp_path, 4, 8) == 8
    assert run_folder.read_manifest(tmp_path) == {"seeds": {"train": 0}}
    assert [run_folder.record_steps(tmp_path, 4, 12) for _ in range(2)] == [8, 12]
    assert run_folder.record_steps(tmp_path, 6, 8) == 12
    assert run_folder.read_manifest(tmp_path) == {
        "seeds": {"train": 0},
        "schedules": [
            {"from_step": 4, "steps": 12, "steps_before": 8},
            {"from_step": 6, "steps": 8, "steps_before": 12},
        ],
    }


@pytest.mark.slow
def test_a_resumed_run_with_more_steps_says_that_its_schedule_moves(tiny_folder, tiny_stage1):
    run = tiny_folder / "longer"
    shutil.copytree(tiny_stage1, run)
    more = tiny_run.STEPS + 1
    flags = (*tiny_run.options(tiny_folder), "--config.eval.every=0", f"--config.train.steps={more}")
    done = tiny_run.command(tiny_folder, "stage1.py", run, *flags)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"now ends at step {more} (was {tiny_run.STEPS})" in done.stdout
    change = {"from_step": tiny_run.STEPS, "steps": more, "steps_before": tiny_run.STEPS}
    assert run_folder.read_manifest(run)["schedules"] == [change]


def test_a_finished_run_that_is_started_again_stays_as_it_is(tiny_folder, tiny_stage1):
    before = {path: path.stat().st_mtime_ns for path in tiny_stage1.rglob("*") if not path.name.startswith("events.")}
    kept = {path: path.read_bytes() for path in before if path.name in ("metrics.jsonl", "metrics.json", "config.json")}
    done = tiny_run.command(tiny_folder, "stage1.py", tiny_stage1, *tiny_run.options(tiny_folder))
    assert done.returncode == 0 and f"continued from step {tiny_run.STEPS}" in done.stdout, done.stderr[-3000:]
    assert {path: path.read_bytes() for path in kept} == kept
    assert {path for path in tiny_stage1.rglob("*") if not path.name.startswith("events.")} == set(before)


@pytest.mark.slow
def test_a_stage_resumes_although_what_it_started_from_is_gone(tiny_folder, tiny_stage1, tiny_stage2):
    """Neither a base nor stage 1 is read, and no state but the restored one is made."""
    run, first = tiny_folder / "orphan", shutil.copytree(tiny_stage1, tiny_folder / "first")
    flags = (*tiny_run.options(tiny_folder), "--config.eval.every=0", f"--config.init_from={first}")
    done = tiny_run.command(tiny_folder, "stage2.py", run, *flags, code=KILLED_AT_STEP.format(step=5))
    assert done.returncode == -signal.SIGKILL, done.stderr[-3000:]
    shutil.rmtree(first)
    unread = "from tghmoe_jax import train\ntrain.load_origin = train.initial_state = None\n"
    done = tiny_run.command(tiny_folder, "stage2.py", run, *flags, code=unread)
    assert done.returncode == 0 and "continued from step 3" in done.stdout, done.stderr[-3000:]
    assert losses(run) == losses(tiny_stage2)


@pytest.mark.slow
def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(tiny_folder, tiny_stage1, tiny_stage2):
    run = shutil.copytree(tiny_stage1, tiny_folder / "spoiled")
    file = max((run / "checkpoints" / "8").glob("params/d/*"), key=lambda path: path.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)
    done = tiny_run.command(
        tiny_folder, "stage2.py", tiny_folder / "never", *tiny_run.options(tiny_folder), f"--config.init_from={run}"
    )
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    assert "checkpoints/8 is damaged" in done.stderr
    done = tiny_run.command(tiny_folder, "stage1.py", run, *tiny_run.options(tiny_folder))
    assert done.returncode == 0 and "continued from step 6" in done.stdout, done.stderr[-3000:]
    assert "the checkpoint of step 8 is damaged" in done.stdout and len(list((run / "damaged").iterdir())) == 1
    assert losses(run) == losses(tiny_stage1) and tiny_run.metrics(run) == tiny_run.metrics(tiny_stage1)


def test_checkpoints_without_a_config_are_not_continued(tiny_folder, tiny_stage1, tmp_path):
    run = shutil.copytree(tiny_stage1, tmp_path / "run", ignore=shutil.ignore_patterns("config.json", "eval"))
    with pytest.raises(UserError, match="holds checkpoints but no config.json; copy that back, or name another"):
        run_folder.check_workdir(stage1.get_config(), run)
