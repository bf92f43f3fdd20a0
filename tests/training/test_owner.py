"""Two commands in one folder: the second is told of the first, and one that has ended is none."""

import dataclasses
import json
import os
import subprocess
import sys

import pytest

from tests import tiny_run
from tghmoe_jax.errors import UserError
from tghmoe_jax.training import owner


def no_wait(seconds):
    raise AssertionError("an owner on this machine is known at once")


def put(folder, one: owner.Owner) -> None:
    folder.mkdir(exist_ok=True)
    (folder / owner.FILE).write_text(json.dumps(dataclasses.asdict(one)))


def ended() -> int:
    """The number of a process that was."""
    return int(subprocess.check_output([sys.executable, "-c", "import os; print(os.getpid())"]))


def test_the_second_is_told_who_holds_the_folder_and_the_folder_is_free_again_after(tmp_path):
    folder = tmp_path / "runs" / "one"
    with owner.Hold(folder, "--workdir", no_wait) as hold:
        hold.check()
        with pytest.raises(UserError, match=rf"--workdir .*one is in use by process {os.getpid()} on \S+ since \d+-"):
            with owner.Hold(folder, "--workdir", no_wait):
                pass
        assert [file.name for file in folder.iterdir()] == [owner.FILE], "the refused one took nothing away"
    assert not (tmp_path / "runs").exists(), "what was made and stayed empty is gone"
    with owner.Hold(folder, "--workdir", no_wait):
        (folder / "config.json").write_text("{}")
    assert [file.name for file in folder.iterdir()] == ["config.json"]


@pytest.mark.parametrize("gone", ["ended", "another process has its number", "cut short"])
def test_an_owner_that_has_ended_is_none(tmp_path, gone):
    this = owner.Owner.this()
    number = ended() if gone == "ended" else os.getpid()
    put(tmp_path, dataclasses.replace(this, process=number, started="1", token="other"))
    if gone == "cut short":
        (tmp_path / owner.FILE).write_text('{"host": "node')
    with owner.Hold(tmp_path, "--workdir", no_wait if gone != "cut short" else lambda seconds: None) as hold:
        hold.check()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("lives", [True, False])
def test_an_owner_on_another_machine_is_known_by_its_signs_of_life(tmp_path, lives):
    put(tmp_path, dataclasses.replace(owner.Owner.this(), host="node7", machine="another", process=12, since="noon"))
    waits = []

    def wait(seconds):
        waits.append(seconds)
        if lives and len(waits) == 3:
            os.utime(tmp_path / owner.FILE, ns=(len(waits), len(waits)))

    if lives:
        with pytest.raises(UserError, match="in use by process 12 on node7 since noon; wait until it ends, or name"):
            owner.Hold(tmp_path, "--workdir", wait).__enter__()
        assert len(waits) == 3
    else:
        with owner.Hold(tmp_path, "--workdir", wait):
            assert sum(waits) >= owner._SILENT
    assert (tmp_path / owner.FILE).exists() == lives


def test_signs_of_life_are_given_and_a_folder_that_was_taken_over_is_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr(owner, "_BEAT", 0.01)
    with owner.Hold(tmp_path, "--workdir", no_wait) as hold:
        os.utime(tmp_path / owner.FILE, ns=(0, 0))
        while (tmp_path / owner.FILE).stat().st_mtime_ns == 0:
            pass  # ends with the next sign
        put(tmp_path, dataclasses.replace(owner.Owner.this(), host="node7", process=12))
        with pytest.raises(UserError, match="was taken over by process 12 on node7"):
            hold.check()
    assert (tmp_path / owner.FILE).exists(), "it belongs to the other"


def test_a_folder_that_nobody_can_write_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--to .*file/below cannot be written \(Not a directory\); name another"):
        with owner.Hold(tmp_path / "file" / "below", "--to"):
            pass


@pytest.mark.slow
def test_two_commands_in_one_workdir(tiny_folder):
    """The first is held at its second step until the second command has been refused."""
    held = """
import os, subprocess, sys
from tghmoe_jax.training import reporting
record = reporting.RunLog.record
def slow(self, step, *args):
    record(self, step, *args)
    if step == 2:
        done = subprocess.run([sys.executable, "-m", "tghmoe_jax.main", *sys.argv[1:]], capture_output=True, text=True)
        print("SECOND", done.returncode, done.stderr)
reporting.RunLog.record = slow
"""
    flags = (*tiny_run.options(tiny_folder), "--config.eval.every=0", "--config.train.steps=3")
    done = tiny_run.command(tiny_folder, "stage1.py", tiny_folder / "held", *flags, code=held)
    assert done.returncode == 0, done.stderr[-3000:]
    second = done.stdout.partition("SECOND ")[2]
    assert second.startswith("2 error: --workdir") and "is in use by process" in second and "Traceback" not in second
    lines = (tiny_folder / "held" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3]
    assert not (tiny_folder / "held" / owner.FILE).exists()
