"""What all tests share: compiled programs, two tiers, and runs that are trained once a session.

`python -m pytest -q` is the quick tier; `-m ""` adds the tests marked `slow` and gives property tests all their
examples (docs/testing.md).
"""

import contextlib
import os
import shutil
from pathlib import Path

import pytest
from filelock import FileLock
from hypothesis import settings

from tests import tiny_run
from tghmoe_jax import errors

# One cache of compiled programs for all test processes, the commands that they start, and the next session.
PROGRAMS = tiny_run.ROOT / ".cache" / "tests" / "programs"
MAX_BYTES = 2 << 30
for key, value in tiny_run.keep_programs(PROGRAMS).items():
    os.environ.setdefault(key, value)

settings.register_profile("quick", derandomize=True, max_examples=10, deadline=None)
settings.register_profile("full", max_examples=100, deadline=None)


def pytest_configure(config):
    settings.load_profile("quick" if config.option.markexpr == "not slow" else "full")
    if not hasattr(config, "workerinput") and PROGRAMS.is_dir():
        size = 0
        for file in PROGRAMS.iterdir():
            with contextlib.suppress(FileNotFoundError):  # another session's, which it has finished meanwhile
                size += file.stat().st_size
        if size > MAX_BYTES:
            shutil.rmtree(PROGRAMS)


@pytest.fixture(autouse=True)
def no_signal_of_another_test():
    yield
    errors.HEARD.clear()
    errors.SENT_AGAIN.clear()


@pytest.fixture
def kept_programs(tmp_path):
    """A folder of compiled and traced programs of a test's own."""
    import jax  # which reads the environment above

    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "programs"))
    yield tmp_path / "programs"
    jax.config.update("jax_compilation_cache_dir", before)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory, worker_id) -> Path:
    """A folder with a tiny random base, in which the runs below are started; all test processes share it."""
    folder = tmp_path_factory.getbasetemp()
    folder = (folder if worker_id == "master" else folder.parent) / "runs"
    return once(folder, "base", lambda: tiny_run.write_base(folder / "base")).parent


@pytest.fixture(scope="session")
def tiny_stage1(tiny_folder) -> Path:
    """A finished stage 1, evaluation included. Read only."""
    return once(tiny_folder, "stage1", lambda: tiny_run.trained(tiny_folder, "stage1.py", "stage1"))


@pytest.fixture(scope="session")
def tiny_stage2(tiny_folder, tiny_stage1) -> Path:
    """A finished stage 2 of that stage 1, started from the folder's own `stage1`. Read only."""
    flag = f"--config.init_from={tiny_stage1}"
    return once(tiny_folder, "stage2", lambda: tiny_run.trained(tiny_folder, "stage2.py", "stage2", flag))


def once(folder: Path, name: str, make) -> Path:
    """`folder`/`name`, made by the first test process that asks for it; the others wait."""
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / f".{name}.lock"):
        if not (folder / f".{name}.done").exists():
            make()
            (folder / f".{name}.done").touch()
    return folder / name
