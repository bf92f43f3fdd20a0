"""Runs of several processes, started as a user starts them: they train, stop and fail as one."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys

import pytest

from tests import tiny_run
from tests.test_stop import AT_STEP
from tghmoe_jax.errors import PREEMPTED, UserError
from tghmoe_jax.training import hosts, stopping
from tghmoe_jax.training.reporting import read_metrics

POD = str(tiny_run.ROOT / "launch" / "local_pod.sh")
WAIT = 600  # of a test for processes that hang


def flags(folder, **changes) -> list[str]:
    """Stage 1 on eight devices; `changes` are keys with `_` for a dot."""
    more = {"train.accumulate": 1, "train.batch": 32, "eval.items": 4, "eval.batch": 8}
    more |= {key.replace("_", "."): value for key, value in changes.items()}
    config = f"--config={tiny_run.ROOT / 'configs' / 'stage1.py'}"
    return [config, *tiny_run.options(folder), *(f"--config.{key}={value}" for key, value in more.items())]


def environment() -> dict[str, str]:
    own = {"PYTHON": sys.executable, "PYTHONUNBUFFERED": "1", "JAX_PLATFORMS": "cpu"}  # no TPU library speaks
    return tiny_run.environment() | own


def pod(folder, *arguments) -> subprocess.Popen:
    """local_pod.sh with two processes of four devices."""
    return subprocess.Popen(
        [POD, "2", "4", "--", *arguments], cwd=folder, env=environment(), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def two(folder, places, *arguments, own=((), ()), code=(tiny_run.ROOT,) * 2) -> list[tuple[int, str]]:
    """(exit code, stderr) of two processes in the folders `places`, each with its `own` arguments and its `code`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for number, (place, more, root) in enumerate(zip(places, own, code, strict=True)):
        place.mkdir(parents=True, exist_ok=True)
        more_environment = {"JAX_NUM_CPU_DEVICES": "4", "PYTHONPATH": str(root)}
        who = [f"--coordinator=127.0.0.1:{port}", f"--process={number}", "--processes=2"]
        started.append(
            subprocess.Popen(
                [sys.executable, "-m", "tghmoe_jax.main", *who, *arguments, *more], cwd=place, text=True,
                env=environment() | more_environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            )
        )  # fmt: skip
    errors = [one.communicate(timeout=WAIT)[1] for one in started]
    return [(one.returncode, text) for one, text in zip(started, errors, strict=True)]


# What Gloo's threads write to the standard output of every process, piece by piece and into each other's lines.
GLOO = re.compile(r"\[Gloo\]|Rank|is connected to|peer ranks\.|Expected number of connected peer ranks is :|\d+|\s")


def said(text: str) -> list[str]:
    """The lines of one process without the notices of the C++ below."""
    return [line for line in text.splitlines() if GLOO.sub("", line)]


def of_process(number: int, output: str) -> str:
    """What process `number` of a pod wrote, of the output of all."""
    own = f"{number}: "
    return "\n".join(line.removeprefix(own) for line in output.splitlines() if line.startswith(own))


@pytest.mark.slow
def test_two_processes_train_evaluate_and_leave_one_run(tiny_folder):
    """... which one process continues."""
    run = tiny_folder / "pod"
    output, _ = (started := pod(tiny_folder, *flags(tiny_folder, train_steps=3), f"--workdir={run}")).communicate(
        timeout=WAIT
    )
    assert started.returncode == 0, output[-3000:]
    assert "on 8 cpu devices of 2 processes" in output
    assert said(of_process(0, output)) and not said(of_process(1, output)), "one process speaks"
    assert [record["step"] for record in read_metrics(run / "metrics.jsonl")] == [1, 2, 3]
    assert len(list(run.glob("events.*"))) == 1
    assert json.loads((run / "manifest.json").read_text())["processes"] == 2
    assert (run / "eval" / "3" / "metrics.json").is_file() and (run / "checkpoints" / "3").is_dir()

    done = tiny_run.command(tiny_folder, "stage1.py", run, *flags(tiny_folder, train_steps=5, eval_every=0)[1:])
    assert done.returncode == 0 and "continued from step 3" in done.stdout, done.stderr[-3000:]
    assert [record["step"] for record in read_metrics(run / "metrics.jsonl")] == [1, 2, 3, 4, 5]


@pytest.mark.slow
def test_sigterm_to_one_process_saves_and_ends_all_at_one_step(tiny_folder):
    run = tiny_folder / "stopped"
    more = flags(tiny_folder, train_steps=100_000, eval_every=0, checkpoint_every=100_000)
    started = pod(tiny_folder, *more, f"--workdir={run}")
    lines = []
    for line in started.stdout:
        lines.append(line)
        if "step 1/" in line:
            started.send_signal(signal.SIGTERM)  # which the script passes to its last process
            break
    output = "".join(lines) + started.communicate(timeout=WAIT)[0]
    assert started.returncode == PREEMPTED, output[-3000:]
    (step,) = re.findall(r"0: stopped by SIGTERM after step (\d+), which is saved", output)
    assert [path.name for path in (run / "checkpoints").glob("*") if path.name.isdigit()] == [step]
    assert [record["step"] for record in read_metrics(run / "metrics.jsonl")] == list(range(1, int(step) + 1))


@pytest.mark.slow
def test_sigterm_to_one_process_in_an_evaluation_ends_all_and_loses_nothing(tiny_folder):
    run = tiny_folder / "examined_pod"
    more = [*flags(tiny_folder, train_steps=2, checkpoint_every=100), f"--workdir={run}"]
    started, lines = pod(tiny_folder, *more), []
    for line in started.stdout:
        lines.append(line)
        if "evaluated " in line:
            started.send_signal(signal.SIGTERM)
            break
    output = "".join(lines) + started.communicate(timeout=WAIT)[0]
    assert started.returncode == PREEMPTED and "stopped by SIGTERM" in output, output[-3000:]
    assert "Traceback" not in output and not list(run.glob("eval/*/metrics.json"))
    again = pod(tiny_folder, *more)
    output, _ = again.communicate(timeout=WAIT)
    assert again.returncode == 0 and "continued from step 2" in output, output[-3000:]
    assert (run / "eval" / "2" / "metrics.json").is_file()


def test_sigterm_to_a_single_process_saves_and_ends(tiny_folder):
    run = tiny_folder / "stopped_alone"
    kill = AT_STEP.format(times=1, number=int(signal.SIGTERM))
    done = tiny_run.command(tiny_folder, "stage1.py", run, *tiny_run.options(tiny_folder), code=kill)
    assert done.returncode == PREEMPTED, done.stderr[-3000:]
    assert "stopped by SIGTERM after step 2" in done.stderr
    assert [path.name for path in (run / "checkpoints").glob("*") if path.name.isdigit()] == ["2"]


@pytest.mark.slow
def test_different_workdirs_are_reported_at_the_start(tiny_folder):
    places = [tiny_folder / "disk0", tiny_folder / "disk1"]
    (first, text), (second, other) = two(tiny_folder, places, *flags(tiny_folder), "--workdir=runs/own")
    assert (first, second) == (2, 2), text + other
    assert len(said(text)) == 1, text
    (line,) = said(text)
    assert line.startswith("error: --workdir runs/own is another folder for process 1 on ")
    assert not said(other)
    assert not (places[0] / "runs").exists(), "the check leaves nothing"


@pytest.mark.parametrize("own, message", [
    ((), "--config.train.batch=33 must be a multiple of 32"),
    (("--config.train.seed=1",), "the config of process 1 on .* differs from that of process 0"),
    (("--config.train.sede=1",), r"process 1: --config.train.sede is unknown \(did you mean seed\?\)"),
])  # fmt: skip
def test_an_error_is_one_sentence_of_process_0_and_ends_all(tiny_folder, own, message):
    batch = 32 if own else 33
    arguments = [*flags(tiny_folder, train_batch=batch), f"--workdir={tiny_folder / 'never'}"]
    (first, text), (second, other) = two(tiny_folder, [tiny_folder] * 2, *arguments, own=((), own))
    assert (first, second) == (2, 2), text + other
    assert len(said(text)) == 1, text
    (line,) = said(text)
    assert re.match("error: " + message, line), line
    assert not said(other)
    assert not (tiny_folder / "never").exists()


@pytest.mark.slow
def test_a_host_with_other_code_is_named(tiny_folder):
    other = tiny_folder / "other_code"
    shutil.copytree(tiny_run.ROOT / "tghmoe_jax", other / "tghmoe_jax", ignore=shutil.ignore_patterns("__pycache__"))
    with (other / "tghmoe_jax" / "errors.py").open("a") as file:
        file.write("# one line more\n")
    arguments = [*flags(tiny_folder), f"--workdir={tiny_folder / 'never'}"]
    (first, text), (second, more) = two(tiny_folder, [tiny_folder] * 2, *arguments, code=(tiny_run.ROOT, other))
    assert (first, second) == (2, 2), text + more
    (line,) = said(text)
    assert re.match("error: the code of process 1 on .* differs from that of process 0", line), line


def test_a_host_that_sees_another_base_is_named(tiny_folder):
    places = [tiny_folder / "base0", tiny_folder / "base1"]
    for place in places:
        shutil.copytree(tiny_folder / "base", place / "base")
    (places[1] / "base" / "config.json").write_text("{}")
    arguments = [*flags(tiny_folder), f"--workdir={tiny_folder / 'never'}", "--config.base=base"]
    (first, text), (second, more) = two(tiny_folder, places, *arguments)
    assert (first, second) == (2, 2), text + more
    (line,) = said(text)
    assert re.match("error: --config.base=base of process 1 on .* differs from that of process 0", line), line


@pytest.mark.parametrize("process", [0, 1])
def test_a_process_whose_partners_do_not_come_says_where_it_waited(tiny_folder, process):
    with socket.socket() as taken:  # bound and silent, but for process 0, which listens there itself
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        if process == 0:
            taken.close()
        done = tiny_run.command(
            tiny_folder, "stage1.py", "never", f"--coordinator={address}", f"--process={process}", "--processes=2",
            "--wait=3", code="import os\nos.environ[\"JAX_PLATFORMS\"] = \"cpu\"",
        )  # fmt: skip
    assert done.returncode == 2
    (line,) = said(done.stderr)
    assert line.startswith("error: ") and f"process {process}" in line and address in line and "3 seconds" in line


@pytest.mark.parametrize("given, message", [
    (("host:1", "0", "", ""), "belong together"),
    (("host:1", "2", "2", ""), "--process=2 must lie between 0 and 1"),
    (("host", "0", "2", ""), "--coordinator=host is not an address"),
    (("host:1", "x", "2", ""), "--process=x must be a whole number"),
    (("", "", "3", ""), "--processes=3 needs --coordinator"),
    (("", "", "", "0"), "--wait=0 is too small"),
])  # fmt: skip
def test_flags_that_do_not_fit_each_other_are_named(given, message):
    with pytest.raises(UserError, match=message):
        hosts.Place.of(*given)


def test_the_identity_of_a_folder_follows_its_files(tmp_path):
    (tmp_path / "weights.safetensors").write_bytes(b"0" * 100)
    (tmp_path / "config.json").write_text('{"a": 1}')
    before = hosts.identity(tmp_path)
    (tmp_path / "config.json").write_text('{"a": 2}')
    changed = hosts.identity(tmp_path)
    os.truncate(tmp_path / "weights.safetensors", 99)
    assert len({before, changed, hosts.identity(tmp_path), hosts.identity(tmp_path / "absent")}) == 4


def test_a_process_alone_reports_its_own_error(capsys):
    assert hosts.fail("error: a flag is wrong.", 2, "the traceback\n") == 2
    assert capsys.readouterr().err == "the traceback\nerror: a flag is wrong.\n"
    hosts.check({"the code": "other"}, "no/folder")  # there is no other process to differ from
    assert hosts.first() and not hosts.several() and hosts.as_first_sees(True)


def test_sigterm_asks_only_while_a_run_watches_for_it():
    before = signal.getsignal(signal.SIGTERM)
    with stopping.Stop() as stop:
        assert not stop.at()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.at()
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_signal_before_the_first_step_of_a_resumed_run_stops_all_processes(monkeypatch):
    """jax's rule: all stop at the number after the largest that one of them had asked with when the signal came."""
    monkeypatch.setattr(hosts, "several", lambda: True)
    asked = []
    for heard in (0, 1, 3):  # calls before the signal
        stop = stopping.Stop()
        monkeypatch.setattr(
            stopping.multihost_utils,
            "reached_preemption_sync_point",
            lambda n, heard=heard: asked.append(n) or n == heard + 1,
        )
        assert [stop.at() for _ in range(heard + 1)] == [False] * heard + [True]
    assert asked == [1, 1, 2, 1, 2, 3, 4]


def test_a_signal_is_heard_in_an_evaluation_and_jax_own_handler_comes_back():
    """Here in place of jax's: the system's, which ignores it."""
    code = """
import ctypes, os, signal
from tghmoe_jax import errors
from tghmoe_jax.training import hosts, stopping
ctypes.CDLL(None).signal(signal.SIGTERM, ctypes.c_void_p(1))  # SIG_IGN, unknown to Python
hosts.several = lambda: True
with stopping.Stop() as stop:
    os.kill(os.getpid(), signal.SIGTERM)
    try:
        with stop.breaking():
            os.kill(os.getpid(), signal.SIGTERM)
            raise SystemExit("not heard")
    except errors.Stopped as stopped:
        print("heard", stopped)
    os.kill(os.getpid(), signal.SIGTERM)
    print("ignored")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment())
    assert done.stdout == "heard stopped by SIGTERM\nignored\n", done.stderr


def test_the_digest_of_a_config_follows_its_keys_and_values_alone():
    one, other, changed = ({"a": 1, "b": (2,)}, {"b": (2,), "a": 1}, {"a": 1, "b": (3,)})
    assert hosts.config_digest(one) == hosts.config_digest(other) != hosts.config_digest(changed)
    assert hosts.code_version() == hosts.code_version()
