"""Disks that are full, read-only or not a folder: one sentence, exit code 2, and what was good stays."""

import os
import shutil
import subprocess

import pytest

from tests import tiny_run
from tests.test_resume import losses

SIZES = {"before the first checkpoint": "60k", "in the first one": "200k", "in a later one": "2600k"}


def in_namespace(script: str, *args: str) -> subprocess.CompletedProcess:
    """Runs a shell script that may mount."""
    return subprocess.run(
        ["unshare", "--user", "--map-root-user", "--mount", "sh", "-ec", script, "sh", *args], capture_output=True,
        text=True, env=tiny_run.environment(), timeout=900,
    )  # fmt: skip


@pytest.fixture(scope="module")
def mounts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mount")
    if not shutil.which("unshare") or in_namespace('mount -t tmpfs tmpfs "$1"', str(folder)).returncode:
        pytest.skip("this machine does not let a user mount")


def arguments(folder, run) -> list[str]:
    flags = (*tiny_run.options(folder), "--config.eval.every=0")
    return [f"--config={tiny_run.ROOT}/configs/stage1.py", f"--workdir={run}", *flags]


@pytest.mark.slow
@pytest.mark.parametrize("when", SIZES)
def test_a_disk_that_fills_up_is_one_sentence_and_the_run_goes_on_with_more_room(
    mounts, tiny_folder, tiny_stage1, tmp_path, when
):
    script = """mount -t tmpfs -o size=$1 tmpfs "$2"; to=$3; shift 3
    python -m tghmoe_jax.main "$@" || echo code $? >&2; cp -r "$(dirname "${to}")/disk/run" "${to}" """
    disk, kept = tmp_path / "disk", tmp_path / "kept"
    disk.mkdir()
    done = in_namespace(script, SIZES[when], str(disk), str(kept), *arguments(tiny_folder, disk / "run"))
    assert done.stderr.endswith("code 2\n") and "Traceback" not in done.stderr, done.stderr[-3000:]
    (sentence,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "No space left on device" in sentence and str(disk) in sentence and "make room there" in sentence
    steps = {path.name for path in (kept / "checkpoints").glob("*") if path.name.isdigit()}
    assert steps == ({"3"} if when == "in a later one" else set())
    of_a_checkpoint = sentence.startswith("error: the checkpoint of step")  # or of a log, which may be written first
    assert ("that of step 3 is whole" in sentence) == (bool(steps) and of_a_checkpoint)
    again = tiny_run.command(tiny_folder, "stage1.py", kept, *arguments(tiny_folder, kept)[2:])
    assert again.returncode == 0 and ("continued from step 3" in again.stdout) == bool(steps), again.stderr[-3000:]
    assert losses(kept) == losses(tiny_stage1)


@pytest.mark.slow
def test_a_read_only_disk_is_one_sentence(mounts, tiny_folder, tiny_stage1, tmp_path):
    """A run that would go on, a new one, scores that would be written, and data that would be drawn."""
    disk = tmp_path / "disk"
    shutil.copytree(tiny_stage1, disk / "run")
    shutil.rmtree(disk / "run" / "checkpoints" / str(tiny_run.STEPS))
    start = 'mount --bind "$1" "$1"; mount -o remount,ro,bind "$1"; shift; '
    evaluate = ["run", str(tiny_stage1), "--items", "4", "--to", str(disk / "scores")]
    drawn = [*arguments(tiny_folder, tmp_path / "other"), f"--config.data.root={disk / 'data'}"]
    for module, own in (
        ("main", arguments(tiny_folder, disk / "run")), ("main", arguments(tiny_folder, disk / "new")),
        ("evaluate", evaluate), ("main", drawn),
    ):  # fmt: skip
        done = in_namespace(start + f'python -m tghmoe_jax.{module} "$@"', str(disk), *own)
        assert done.returncode == 2 and done.stderr.startswith("error: "), done.stderr[-3000:]
        assert done.stderr.count("\n") == 1 and "Read-only file system" in done.stderr and str(disk) in done.stderr
    assert not (tmp_path / "other").exists() and os.listdir(disk) == ["run"]
