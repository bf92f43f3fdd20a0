"""The settings of tests/tiny.py for every test of this folder, and processes with devices of their own."""

import os
import subprocess
import sys
from pathlib import Path

from tests.tiny import exact_and_quick  # noqa: F401
from tests.tiny_run import WITHOUT_EMITTERS

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {"JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "2", **WITHOUT_EMITTERS}


def start_module(name: str, *arguments: str) -> subprocess.Popen:
    """`python -m NAME ARGUMENTS` with what it prints kept."""
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", name, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, cwd=ROOT, env=os.environ | ENVIRONMENT,
    )  # fmt: skip


def run_module(name: str, *arguments: str) -> str:
    """What a process prints that ends well."""
    process = start_module(name, *arguments)
    out, errors = process.communicate()
    assert process.returncode == 0, errors[-3000:]
    return out
