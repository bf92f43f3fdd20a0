"""SIGTERM and Ctrl-C at the moments of a run: one line, the documented exit code, and nothing is lost."""

import signal
import subprocess
import sys

import pytest

from tests import tiny_run
from tests.test_resume import losses
from tghmoe_jax.errors import PREEMPTED

AT_STEP = """
import os
from tghmoe_jax.training import reporting
record = reporting.RunLog.record
def told(self, step, values):
    record(self, step, values)
    if step == 2:
        for _ in range({times}):
            os.kill(os.getpid(), {number})
reporting.RunLog.record = told
"""
# The first of these calls is interrupted; what it was doing is done again by the resumed run.
BEFORE = """
import os
from tghmoe_jax import {module}
before = {module}.{name}
def told(*args, **kw):
    os.kill(os.getpid(), {number})
    raise SystemExit("the signal was not heard")
{module}.{name} = told
"""


def run(folder, name: str, code: str, *flags: str):
    options = (*tiny_run.options(folder), *flags)
    done = tiny_run.command(folder, "stage1.py", folder / name, *options, code=code)
    assert "Traceback" not in done.stderr and "not heard" not in done.stderr, done.stderr[-3000:]
    return done


def steps_of(folder) -> set[str]:
    return {path.name for path in (folder / "checkpoints").iterdir() if path.name.isdigit()}


@pytest.mark.slow
def test_ctrl_c_saves_and_ends_like_sigterm(tiny_folder, tiny_stage1):
    """And the resumed run, evaluation included, is that of the run that nobody stopped."""
    done = run(tiny_folder, "interrupted", AT_STEP.format(times=1, number=int(signal.SIGINT)))
    assert done.returncode == PREEMPTED and "stopped by Ctrl-C after step 2, which is saved" in done.stderr
    assert steps_of(tiny_folder / "interrupted") == {"2"}
    evaluation = BEFORE.format(module="evaluate", name="evaluate_all", number=int(signal.SIGINT))
    done = run(tiny_folder, "interrupted", evaluation)
    assert done.returncode == PREEMPTED and f"stopped by Ctrl-C after step {tiny_run.STEPS}" in done.stderr
    assert str(tiny_run.STEPS) in steps_of(tiny_folder / "interrupted")
    assert run(tiny_folder, "interrupted", "").returncode == 0
    assert losses(tiny_folder / "interrupted") == losses(tiny_stage1)
    assert tiny_run.metrics(tiny_folder / "interrupted") == tiny_run.metrics(tiny_stage1)


@pytest.mark.slow
def test_the_second_signal_ends_at_once(tiny_folder):
    done = run(tiny_folder, "twice", AT_STEP.format(times=2, number=int(signal.SIGINT)))
    assert done.returncode == PREEMPTED and "stopped by Ctrl-C; the same command goes on" in done.stderr
    assert steps_of(tiny_folder / "twice") == set()


@pytest.mark.slow
@pytest.mark.parametrize("module, name", [("train", "make_source"), ("train", "initial_state")])
def test_a_signal_before_the_first_step_is_one_line(tiny_folder, module, name):
    done = run(tiny_folder, "early", BEFORE.format(module=module, name=name, number=int(signal.SIGTERM)))
    assert done.returncode == PREEMPTED
    assert done.stderr == "stopped by SIGTERM; the same command goes on from the last checkpoint, if there is one.\n"
    assert not (tiny_folder / "early").exists()


DEAF = """
import ctypes, os, signal, sys
from tghmoe_jax import errors
errors._GRACE = 0.05
def work():
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.siginterrupt(number, False)
    print("ready", flush=True)
    ctypes.CDLL(None).read(os.pipe()[0], ctypes.create_string_buffer(1), 1)  # as a compiler that no signal interrupts
sys.exit(errors.run_command(work))
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_is_heard_while_the_main_thread_is_deaf(number, code):
    process = subprocess.Popen(
        [sys.executable, "-c", DEAF], cwd=tiny_run.ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code and errors.startswith("stopped by ") and errors.count("\n") == 1, errors


@pytest.mark.slow
@pytest.mark.parametrize("name", ["predict", "prepare", "convert", "evaluate", "verify"])
def test_every_command_ends_with_one_line(name):
    """Its main is replaced by one that is interrupted, and by one whose disk is full."""
    start = "import runpy, sys, os, signal\nfrom tghmoe_jax import errors\nsys.argv = ['x', '--help']\n"
    for act, code, said in (
        ("os.kill(os.getpid(), signal.SIGINT)", 130, "stopped by Ctrl-C.\n"),
        ("raise OSError(28, 'No space left on device', '/x')", 2, "error: /x cannot be read or written (No space"),
    ):
        body = f"run = errors.run_command\nerrors.run_command = lambda main: run(act)\ndef act():\n    {act}\n"
        text = f"{start}{body}runpy.run_module('tghmoe_jax.{name}', run_name='__main__')"
        done = subprocess.run([sys.executable, "-c", text], cwd=tiny_run.ROOT, capture_output=True, text=True)
        assert done.returncode == code and done.stderr.startswith(said), done.stderr


IMPORTING = """
import os, runpy, sys
sys.argv[0] = "-m"  # as Python has it while it looks for the module
class Killed:
    def find_spec(self, name, *where):
        if name == "jax":
            os.kill(os.getpid(), {number})
sys.meta_path.insert(0, Killed())
runpy.run_module("tghmoe_jax.{module}", run_name="__main__")
"""


@pytest.mark.parametrize(("module", "number", "code", "said"), [
    ("main", signal.SIGTERM, PREEMPTED, "stopped by SIGTERM; the same command goes on from the last checkpoint"),
    ("main", signal.SIGINT, PREEMPTED, "stopped by Ctrl-C; the same command goes on from the last checkpoint"),
    pytest.param("predict", signal.SIGINT, -signal.SIGINT, "", marks=pytest.mark.slow),
])  # fmt: skip
def test_a_signal_while_modules_are_imported_shows_no_traceback(module, number, code, said):
    program = IMPORTING.format(module=module, number=int(number))
    done = subprocess.run([sys.executable, "-c", program], cwd=tiny_run.ROOT, capture_output=True, text=True)
    assert done.returncode == code and done.stderr.startswith(said) and done.stderr.count("\n") == bool(said)
