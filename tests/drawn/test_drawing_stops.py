"""Drawing that is stopped leaves neither processes nor folders behind."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests import tiny_run
from tghmoe_jax.drawn import cache, phantom_source

DRAW = """
import subprocess, sys
from tghmoe_jax.drawn import phantom_source
from tghmoe_jax.errors import run_command
start = subprocess.Popen
def told(*args, **kw):
    process = start(*args, **kw)
    print(process.pid, flush=True)
    return process
subprocess.Popen = told
grid = (16, 64, 64)
sys.exit(run_command(lambda: phantom_source.PhantomSource(sys.argv[1], "train", 20000, grid=grid) and 0))
"""


def begin(root: Path) -> tuple[subprocess.Popen, list[int]]:
    """A process that draws for minutes, and the numbers of its two workers."""
    process = subprocess.Popen(
        [sys.executable, "-c", DRAW, str(root)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=tiny_run.environment(),
    )  # fmt: skip
    return process, [int(process.stdout.readline()) for _ in range(2)]


def wait_for(workers: list[int]) -> None:
    """Until none of them runs; of a process whose parent is gone only its number tells."""
    while workers:
        workers = [one for one in workers if runs(one)]


def runs(number: int) -> bool:
    try:
        state = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"  # ended, and nobody has asked yet


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_drawing_and_all_that_belongs_to_it(tmp_path, number, code):
    process, workers = begin(tmp_path)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code and errors.startswith("stopped by ") and errors.count("\n") == 1, errors
    wait_for(workers)  # one that had just begun ends itself, a moment after its parent
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_killed_drawing_ends_its_workers_and_its_folder_goes_with_the_next(tmp_path):
    process, workers = begin(tmp_path)
    process.kill()
    process.communicate()
    wait_for(workers)  # the test's own time limit is the limit
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".phantom-")
    phantom_source.PhantomSource(tmp_path, "train", 2, grid=(8, 24, 24))
    assert [path.name.startswith(".") for path in tmp_path.iterdir()] == [False]


def test_a_folder_that_is_being_filled_is_left_alone(tmp_path):
    building, lock = cache._begin(tmp_path, "phantom")
    phantom_source.PhantomSource(tmp_path, "train", 2, grid=(8, 24, 24))
    assert building.is_dir()
    os.close(lock)
    phantom_source.PhantomSource(tmp_path, "train", 3, grid=(8, 24, 24))
    assert not building.exists()
