"""SIGTERM and Ctrl-C at the moments of a run: one line, the documented exit code, and nothing is lost."""

import os
import signal
import subprocess
import sys

import pytest

from tests import tiny_run
from tests.test_resume import losses
from tghmoe_jax import errors
from tghmoe_jax.errors import PIPE_CLOSED, PREEMPTED
from tghmoe_jax.training import stopping

AT_STEP = """
import os
from tghmoe_jax.training import stopping
at = stopping.Stop.at
def told(self):
    if self.calls == 2:  # after steps 0 and 1; this call is that of step 2
        for _ in range({times}):
            os.kill(os.getpid(), {number})
    return at(self)
stopping.Stop.at = told
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


# So many calls of the model into an evaluation, or when its files are written.
IN_EVALUATION = """
import os
from tghmoe_jax.evaluation import outputs
from tghmoe_jax.reader.reader import Reader
place, name, left = {place}, "{name}", [{calls}]
def told(*args, before=getattr(place, name), **kw):
    left[0] -= 1
    if not left[0]:
        os.kill(os.getpid(), {number})
        raise SystemExit("the signal was not heard")
    return before(*args, **kw)
setattr(place, name, told)
"""


def run(folder, name: str, code: str, *flags: str):
    options = (*tiny_run.options(folder), *flags)
    done = tiny_run.command(folder, "stage1.py", folder / name, *options, code=code)
    assert "Traceback" not in done.stderr and "not heard" not in done.stderr, done.stderr[-3000:]
    return done


def steps_of(folder) -> set[str]:
    return {path.name for path in (folder / "checkpoints").glob("*") if path.name.isdigit()}


IN_GARBAGE = """
import gc, os, sys, time
from tghmoe_jax.errors import run_command
def note(phase, info):
    if phase == "start":
        gc.callbacks.remove(note)
        os.kill(os.getpid(), {number})
        for _ in range(1000):  # Python hears a signal between two of its own steps
            pass
def main():
    gc.callbacks.append(note)
    gc.collect()
    time.sleep(60)
    return 0
sys.exit(run_command(main))
"""


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_that_is_heard_while_garbage_is_collected_ends_a_command_all_the_same(number, code):
    start = [sys.executable, "-c", IN_GARBAGE.format(number=int(number))]
    done = subprocess.run(start, capture_output=True, text=True, timeout=50, cwd=tiny_run.ROOT)
    assert done.returncode == code and done.stderr.count("\n") == 1 and "Traceback" not in done.stderr, done.stderr


def test_a_run_that_hears_a_signal_again_saves_before_it_ends():
    """Sent again, it is no second one, which would end the run at once."""
    heard = signal.getsignal(signal.SIGINT)
    with stopping.Stop() as stop:
        signal.raise_signal(signal.SIGINT)
        errors.SENT_AGAIN.set()
        signal.raise_signal(signal.SIGINT)
        assert stop.asked and not errors.SENT_AGAIN.is_set()
        with pytest.raises(errors.Stopped):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is heard


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
def test_an_evaluation_that_sigterm_interrupts_is_done_again(tiny_folder, tiny_stage1):
    """Whenever it comes; at first the checkpoint of its step may still be written."""
    folder = tiny_folder / "examined"
    for place, name, calls in (("Reader", "_call", 1), ("Reader", "_call", 7), ("outputs", "write_json", 1)):
        moment = IN_EVALUATION.format(place=place, name=name, calls=calls, number=int(signal.SIGTERM))
        done = run(tiny_folder, "examined", moment)
        assert done.returncode == PREEMPTED, done.stderr[-3000:]
        assert f"stopped by SIGTERM after step {tiny_run.STEPS}, which is saved" in done.stderr
        assert str(tiny_run.STEPS) in steps_of(folder) and not list(folder.glob("eval/*/metrics.json"))
    done = run(tiny_folder, "examined", "")
    assert done.returncode == 0 and f"continued from step {tiny_run.STEPS}" in done.stdout
    assert losses(folder) == losses(tiny_stage1) and tiny_run.metrics(folder) == tiny_run.metrics(tiny_stage1)


@pytest.mark.slow
def test_the_second_signal_ends_at_once(tiny_folder):
    done = run(tiny_folder, "twice", AT_STEP.format(times=2, number=int(signal.SIGINT)))
    assert done.returncode == PREEMPTED and "stopped by Ctrl-C; the same command continues" in done.stderr
    assert steps_of(tiny_folder / "twice") == set()


@pytest.mark.slow
@pytest.mark.parametrize("module, name", [("train", "make_source"), ("train", "initial_state")])
def test_a_signal_before_the_first_step_is_one_line(tiny_folder, module, name):
    done = run(tiny_folder, "early", BEFORE.format(module=module, name=name, number=int(signal.SIGTERM)))
    assert done.returncode == PREEMPTED
    assert done.stderr == "stopped by SIGTERM; the same command continues from the last checkpoint, if there is one.\n"
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


PIPED = """
import os, sys
from tghmoe_jax import errors
def work():
    {act}
    return 0
sys.exit(errors.run_command(work))
"""


@pytest.mark.parametrize(("act", "code", "said"), [
    ("print('line\\n' * 100000)", PIPE_CLOSED, ""),
    ("print('short')", PIPE_CLOSED, ""),  # fails when it is flushed, at the end
    ("print('short'); sys.exit(0)", PIPE_CLOSED, ""),  # as --help ends
    ("raise BrokenPipeError(32, 'of a worker')", 1, "of a worker"),  # of another pipe: a fault
])  # fmt: skip
def test_a_reader_of_the_output_that_goes_ends_a_command_quietly(act, code, said):
    read, write = os.pipe()
    if not said:
        os.close(read)
    text = PIPED.format(act=act)
    done = subprocess.run(
        [sys.executable, "-c", text], cwd=tiny_run.ROOT, stdout=write, stderr=subprocess.PIPE, text=True
    )
    os.close(write)
    assert done.returncode == code and (said in done.stderr if said else not done.stderr), done.stderr


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
    ("main", signal.SIGTERM, PREEMPTED, "stopped by SIGTERM; the same command continues from the last checkpoint"),
    ("main", signal.SIGINT, PREEMPTED, "stopped by Ctrl-C; the same command continues from the last checkpoint"),
    pytest.param("predict", signal.SIGINT, -signal.SIGINT, "", marks=pytest.mark.slow),
])  # fmt: skip
def test_a_signal_while_modules_are_imported_shows_no_traceback(module, number, code, said):
    program = IMPORTING.format(module=module, number=int(number))
    done = subprocess.run([sys.executable, "-c", program], cwd=tiny_run.ROOT, capture_output=True, text=True)
    assert done.returncode == code and done.stderr.startswith(said) and done.stderr.count("\n") == bool(said)
