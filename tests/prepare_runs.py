"""The command `python -m tghmoe_jax.prepare` in a process of its own, for the tests of what it leaves and survives."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np

from tests import tiny_run

VOLUMES, SHARD = 13, 5
SMALL_SHARDS = f"from tghmoe_jax.datasets import prepared; prepared.SHARD = {SHARD}\n"
# What the killed process does to itself: it is gone before or after a file gets its name.
KILLED_AT_FILE = """
import itertools, os, signal
replace, count = os.replace, itertools.count(1)
def dying(*names):
    number = next(count)
    if number == {at} and {before}:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(*names)
    if number == {at}:
        os.kill(os.getpid(), signal.SIGKILL)
os.replace = dying
"""


def write_scans(root: Path, volumes: int = VOLUMES, bad: tuple[int, ...] = (4,)) -> Path:
    """A manifest of so many volumes, of which some are no volumes."""
    rng = np.random.default_rng(0)
    rows = []
    for i in range(volumes):
        np.save(root / f"{i}.npy", rng.random((1, 8, 32, 32), np.float32))
        split = ("train", "train", "validation", "test")[i % 4]
        rows.append({"volume": f"{i}.npy", "case": f"patient {i}", "split": split, "question": "Which side?"})
        rows[-1] |= {"answer": "left", "choices": ["left", "right"]}
    for i in bad:
        (root / f"{i}.npy").write_bytes(b"no array")
    (root / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def arguments(scans: Path, to: Path, *more: str) -> list[str]:
    config = tiny_run.ROOT / "configs" / "data_manifest.py"
    return [
        f"--config={config}", f"--config.data.root={scans}", "--config.data.slices=8", "--config.data.size=24",
        f"--to={to}", *more,
    ]  # fmt: skip


def started(scans: Path, to: Path, *more: str, code: str = "") -> subprocess.Popen:
    """The command in a process of its own, with small shards; `code` is run before."""
    program = f"{SMALL_SHARDS}{code}\nimport sys\nfrom tghmoe_jax.prepare import main\nsys.exit(main())"
    return subprocess.Popen(
        [sys.executable, "-c", program, *arguments(scans, to, *more)], cwd=tiny_run.ROOT,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a set but the one that says how long it took, and what desktops and disks leave."""
    found = {path.relative_to(folder).as_posix(): path for path in folder.rglob("[!.]*") if path.is_file()}
    return {name: path.read_bytes() for name, path in found.items() if name != "durations.json"}


def rows(file: Path) -> list[dict[str, str]]:
    with open(file, encoding="utf-8", newline="") as lines:
        return list(csv.DictReader(lines))
