"""Drawn volumes on disk: a split is drawn once into a cache folder, then read by random access.

The cache holds volumes.npy, int16 (N, D, H, W) in HU, truth.jsonl, one line for each volume, and digests.json. One that
is not proven whole is drawn anew.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import importlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tghmoe_jax import digests
from tghmoe_jax.errors import UserError

SPLITS = ("train", "validation", "test")
SPLIT_SEEDS = 10_000_000  # seeds set aside for one split
FILES = ("truth.jsonl", "volumes.npy")
INLINE = 200  # up to this many volumes are drawn without starting processes


@dataclasses.dataclass(frozen=True)
class Drawing:
    """A data set that is drawn.

    `styles` are its ways of drawing, (seed, grid) -> an object with `hu`, int16 (D, H, W), and `truth`, a dataclass.
    `module` names the module that holds this object as DRAWING: further processes import it. `generator` is part of the
    cache's name and counts up with every change of a volume or its truth.
    """

    name: str
    module: str
    generator: int
    styles: Mapping[str, Callable[..., Any]]


def seeds_of(split: str, count: int, seed: int) -> range:
    """The volume seeds of a split: no two splits share one, and a longer split begins with a shorter one's volumes."""
    first = (seed * len(SPLITS) + SPLITS.index(split)) * SPLIT_SEEDS
    return range(first, first + count)


def prepare(
    drawing: Drawing, root: Path, split: str, count: int, seed: int, grid: tuple[int, int, int], style: str,
    processes: int,
) -> Path:  # fmt: skip
    """Draws the split unless its cache exists and is whole, and returns the cache folder.

    The folder is filled under a temporary name and renamed, so that a reader never sees half a cache and two processes
    that draw the same split do not disturb each other.
    """
    key = json.dumps(
        {"generator": drawing.generator, "split": split, "count": count, "seed": seed, "grid": grid, "style": style}
    )
    folder = root / f"{drawing.name}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    if folder.is_dir():
        if not (wrong := _problems(folder)):
            return folder
        print(f"{folder} is damaged ({digests.told(wrong)}): its volumes are drawn anew", file=sys.stderr)
        _discard(folder)
    root.mkdir(parents=True, exist_ok=True)
    seeds = seeds_of(split, count, seed)
    building, lock = _begin(root, drawing.name)
    try:
        _reserve(building / "volumes.npy", (count, *grid), drawing.name)
        workers = max(1, processes) if count > INLINE else 1
        cuts = [count * i // workers for i in range(workers + 1)]
        parts = [(seeds[a], a, b - a) for a, b in zip(cuts, cuts[1:], strict=False)]
        if workers == 1:
            _fill(building, drawing.styles[style], *parts[0])
        else:
            _fill_apart(building, drawing, style, parts)
        with open(building / "truth.jsonl", "wb") as joined:
            for _, start, _ in parts:
                part = building / f"truth-{start}.jsonl"
                joined.write(part.read_bytes())
                part.unlink()
        digests.write(building, digests.of_files(building, FILES))
        os.chmod(building, 0o755)
        try:
            os.replace(building, folder)
        except OSError:
            if not folder.is_dir():  # else another process was first, with the same volumes
                raise
    finally:
        shutil.rmtree(building, ignore_errors=True)
        os.close(lock)
    return folder


def _problems(folder: Path) -> list[str]:
    return digests.problems(folder) if (folder / digests.FILE).exists() else [f"{digests.FILE} is missing"]


def _discard(folder: Path) -> None:
    """Removes a cache; files in it that are not the cache's own stay, in a folder of another name."""
    for name in (*FILES, digests.FILE):
        (folder / name).unlink(missing_ok=True)
    try:
        folder.rmdir()
    except OSError:
        folder.rename(tempfile.mkdtemp(prefix=f"{folder.name}-foreign-", dir=folder.parent))


def _begin(root: Path, name: str) -> tuple[Path, int]:
    """A hidden folder and the lock that is held on it; those of this host's processes that were killed are removed."""
    begins = f".{name}-{socket.gethostname()}-"
    with contextlib.ExitStack() as closing:
        whole = os.open(root, os.O_RDONLY)
        closing.callback(os.close, whole)
        with contextlib.suppress(OSError):  # a disk without locks: nothing is removed
            fcntl.flock(whole, fcntl.LOCK_EX)
            for left in root.glob(f"{begins}*"):
                handle = os.open(left, os.O_RDONLY)
                closing.callback(os.close, handle)
                with contextlib.suppress(BlockingIOError):
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(left, ignore_errors=True)
        building = Path(tempfile.mkdtemp(prefix=begins, dir=root))
        lock = os.open(building, os.O_RDONLY)
        with contextlib.suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
    return building, lock


def _reserve(file: Path, shape: tuple[int, ...], name: str) -> None:
    """Creates an int16 array file whose disk space is taken now: a disk that fills up later would kill the writer."""
    np.lib.format.open_memmap(file, "w+", np.int16, shape).flush()
    size = file.stat().st_size
    if shutil.disk_usage(file.parent).free < size:
        raise UserError(
            f"The {name} cache needs {size / 2**30:.1f} GiB and {file.parent.parent} has less free: "
            "make room there, or ask for a smaller count."
        )
    if hasattr(os, "posix_fallocate"):
        with open(file, "r+b") as handle:
            os.posix_fallocate(handle.fileno(), 0, size)


def _fill(folder: Path, draw: Callable[..., Any], first_seed: int, start: int, count: int) -> None:
    """Draws `count` volumes into rows `start`... of volumes.npy and their truth into truth-<start>.jsonl."""
    volumes = np.load(folder / "volumes.npy", mmap_mode="r+", allow_pickle=False)
    with open(folder / f"truth-{start}.jsonl", "w", encoding="utf-8") as lines:
        for i in range(count):
            drawn = draw(first_seed + i, volumes.shape[1:])
            volumes[start + i] = drawn.hu
            lines.write(json.dumps(dataclasses.asdict(drawn.truth)) + "\n")
    volumes.flush()


def _fill_apart(folder: Path, drawing: Drawing, style: str, parts: list[tuple[int, int, int]]) -> None:
    """Runs `_fill` once per part in fresh interpreters: a fork after JAX has started threads can hang, and a spawned
    pool would run the caller's main module again."""
    package = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(p for p in (package, os.environ.get("PYTHONPATH")) if p)
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    running = []
    try:
        for part in parts:
            command = [sys.executable, "-m", __name__, drawing.module, style, str(folder), *map(str, part)]
            running.append(
                subprocess.Popen(
                    command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
                )
            )
        for process in running:
            errors = process.stderr.read()
            process.wait()
            if process.returncode:
                said = errors.decode(errors="replace")[-2000:]
                raise RuntimeError(f"drawing {drawing.name} volumes failed: {said}")
    finally:
        for process in running:
            if process.poll() is None:
                process.kill()
                process.wait()


def _end_with_parent() -> None:
    """Ends this process when the one that started it is gone: nothing is ever written to its standard input."""
    os.read(0, 1)
    os._exit(1)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of Ctrl-C the parent takes care
    threading.Thread(target=_end_with_parent, daemon=True).start()
    module, style, folder = sys.argv[1:4]
    _fill(Path(folder), importlib.import_module(module).DRAWING.styles[style], *map(int, sys.argv[4:]))
