"""Runs that several test files read: trained once a session, in processes of their own."""

import os
from pathlib import Path

import pytest

os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", "")  # commands called here keep no programs in the user's home

from tests import tiny_run


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory) -> Path:
    """A folder with a tiny random base, which the runs below are started in."""
    folder = tmp_path_factory.mktemp("runs")
    tiny_run.write_base(folder / "base")
    return folder


@pytest.fixture(scope="session")
def tiny_stage1(tiny_folder) -> Path:
    """A finished stage 1, evaluation included. Read only."""
    return tiny_run.trained(tiny_folder, "stage1.py", "stage1")


@pytest.fixture(scope="session")
def tiny_stage2(tiny_folder, tiny_stage1) -> Path:
    """A finished stage 2 of that stage 1, started from the folder's own `stage1`. Read only."""
    return tiny_run.trained(tiny_folder, "stage2.py", "stage2", f"--config.init_from={tiny_stage1}")
