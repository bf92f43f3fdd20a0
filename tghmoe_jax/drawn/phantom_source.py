"""The embedded phantom as a data source: drawn once into a cache folder, then read by random access.

The cache holds volumes.npy, int16 (N, D, H, W) in HU, truth.jsonl, one line for each volume, and digests.json. One that
is not proven whole is drawn anew.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import numpy as np

from tghmoe_jax import digests
from tghmoe_jax.drawn import binding, phantom, phantom2
from tghmoe_jax.drawn.phantom import GENERATOR, Truth
from tghmoe_jax.drawn.phantom_adversarial import ADVERSARIAL
from tghmoe_jax.drawn.phantom_text import AUX_NAMES, aux_targets, lesion_labels, make_question
from tghmoe_jax.drawn.phantom_wordings import SEEN, UNSEEN
from tghmoe_jax.errors import UserError
from tghmoe_jax.samples.questions import Kind, Question, cell_grid, touched
from tghmoe_jax.scans.scan import low_high
from tghmoe_jax.scans.slices import to_channels, window_names

STYLES = {"first": phantom.draw, "second": phantom2.draw}  # training draws the first style only
WORDINGS = {"seen": SEEN, "unseen": UNSEEN, "second": phantom2.WORDING, **ADVERSARIAL}  # training asks in `seen` only
SPLITS = ("train", "validation", "test")
SPLIT_SEEDS = 10_000_000  # seeds set aside for one split
COARSEST = (8, 24)  # slices and pixels: on a coarser grid no place is found for lesions that span four pixels
FILES = ("truth.jsonl", "volumes.npy")
INLINE = 200  # up to this many volumes are drawn without starting processes


class PhantomSource:
    """`samples.Source` over phantom volumes.

    `root` is the folder for caches; `style` a key of STYLES, how volumes are drawn; `wording` a key of WORDINGS, how
    requests and reports are phrased.
    """

    aux_names = AUX_NAMES
    kinds = ("closed", "open", "report", "binding")

    def __init__(
        self,
        root: str | Path,
        split: str,
        count: int,
        seed: int = 0,
        grid: tuple[int, int, int] = (16, 64, 64),
        channels: str = "windows3",
        wording: str = "seen",
        style: str = "first",
        processes: int = 2,
    ):
        for name, value, known in (("split", split, SPLITS), ("wording", wording, WORDINGS), ("style", style, STYLES)):
            if value not in known:
                raise UserError(f"{name}={value!r} is unknown: use one of {', '.join(known)}.")
        if not 0 < count <= SPLIT_SEEDS:
            raise UserError(f"count={count} is out of range: ask for 1 to {SPLIT_SEEDS} phantom volumes.")
        if grid[0] < COARSEST[0] or min(grid[1:]) < COARSEST[1]:
            raise UserError(
                f"--config.data.slices={grid[0]} and --config.data.size={grid[1]} are too coarse to draw lesions on; "
                f"use at least {COARSEST[0]} slices of {COARSEST[1]} pixels."
            )
        self.wording = WORDINGS[wording]
        window_names(channels)  # refused here, not at the first volume
        self.channels = channels
        self.split = split
        folder = prepare(Path(root), split, count, seed, tuple(grid), style, processes)
        self.volumes = np.load(folder / "volumes.npy", mmap_mode="r", allow_pickle=False)
        with open(folder / "truth.jsonl", encoding="utf-8") as lines:
            self.truths = [Truth.from_json(json.loads(line)) for line in lines]

    def __len__(self) -> int:
        return len(self.truths)

    def slices(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """uint8 (D, H, W, 3), and the mask bool (D,): every phantom slice is real."""
        levels = to_channels(self.volumes[index], self.channels)
        return levels, np.ones(len(levels), bool)

    def slice_spacing(self, index: int) -> float:
        """Distance of neighbouring slices in mm."""
        return float(self.truths[index].spacing_mm[0])

    def question(self, index: int, kind: Kind, rng: np.random.Generator, type: str | None = None) -> Question:
        """A request about volume `index`; without `type` all five question types are equally likely."""
        if kind == "binding":
            return binding.ask(rng)
        return make_question(self.truths[index], kind, rng, type, self.wording)

    def aux(self, index: int) -> np.ndarray:
        """float32 (A,) in 0..1, named by `aux_names`."""
        return aux_targets(self.truths[index])

    def aux_cells(self, index: int, cell: tuple[int, int, int]) -> np.ndarray:
        """bool (V, R, C, A): a lesion's labels are read off the cells that it touches (see `samples.Source`)."""
        truth, shape = self.truths[index], self.volumes.shape[1:]
        cells = np.ones((*cell_grid(shape, cell), len(AUX_NAMES)), bool)
        for lesion in truth.lesions:
            half = lesion.size_mm / 2 / np.array(truth.spacing_mm)
            cells[..., lesion_labels(lesion)] = touched(shape, cell, lesion.centre, half)[..., None]
        return cells

    def input_ranges(self) -> dict:
        """Spacing (slice, row, column) and field of view in mm, number of slices, and HU, as [low, high]."""
        spacing = np.array([truth.spacing_mm for truth in self.truths])
        view = spacing[:, 1:] * self.volumes.shape[2:]
        few = self.volumes[:: max(1, len(self.volumes) // 200)]
        return {
            "spacing_mm": [low_high(column) for column in spacing.T],
            "slices": [int(self.volumes.shape[1])] * 2,
            "field_of_view_mm": low_high(view),
            "hu": low_high(few),
        }

    def group(self, index: int) -> str:
        """The body section."""
        return self.truths[index].section

    def sides(self, index: int) -> tuple[str, str]:
        """The patient's side at the left and at the right edge of each slice."""
        _, _, toward = phantom.DIRECTIONS[self.truths[index].plane]
        return ("R", "L") if toward[0] else ("A", "P")

    @property
    def lesions_mm(self) -> list[float] | None:
        """The smallest and the largest size of the drawn lesions; None where no volume has one."""
        sizes = [lesion.size_mm for truth in self.truths for lesion in truth.lesions]
        return low_high(sizes) if sizes else None

    def findings(self, index: int) -> frozenset[tuple[str, str, str]]:
        """True (lesion, organ, side) triples."""
        return self.truths[index].triples


def seeds_of(split: str, count: int, seed: int) -> range:
    """The volume seeds of a split: no two splits share one, and a longer split begins with a shorter one's volumes."""
    first = (seed * len(SPLITS) + SPLITS.index(split)) * SPLIT_SEEDS
    return range(first, first + count)


def prepare(
    root: Path, split: str, count: int, seed: int, grid: tuple[int, int, int], style: str, processes: int
) -> Path:
    """Draws the split unless its cache exists and is whole, and returns the cache folder.

    The folder is filled under a temporary name and renamed, so that a reader never sees half a cache and two processes
    that draw the same split do not disturb each other.
    """
    key = json.dumps(
        {"generator": GENERATOR, "split": split, "count": count, "seed": seed, "grid": grid, "style": style}
    )
    folder = root / f"phantom-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    if folder.is_dir():
        if not (wrong := _problems(folder)):
            return folder
        print(f"{folder} is damaged ({digests.told(wrong)}): its volumes are drawn anew", file=sys.stderr)
        _discard(folder)
    root.mkdir(parents=True, exist_ok=True)
    seeds = seeds_of(split, count, seed)
    building, lock = _begin(root)
    try:
        _reserve(building / "volumes.npy", (count, *grid))
        workers = max(1, processes) if count > INLINE else 1
        cuts = [count * i // workers for i in range(workers + 1)]
        parts = [(seeds[a], a, b - a) for a, b in zip(cuts, cuts[1:], strict=False)]
        if workers == 1:
            _fill(building, style, *parts[0])
        else:
            _fill_apart(building, style, parts)
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


def _begin(root: Path) -> tuple[Path, int]:
    """A hidden folder and the lock that is held on it; those of this host's processes that were killed are removed."""
    name = f".phantom-{socket.gethostname()}-"
    with contextlib.ExitStack() as closing:
        whole = os.open(root, os.O_RDONLY)
        closing.callback(os.close, whole)
        with contextlib.suppress(OSError):  # a disk without locks: nothing is removed
            fcntl.flock(whole, fcntl.LOCK_EX)
            for left in root.glob(f"{name}*"):
                handle = os.open(left, os.O_RDONLY)
                closing.callback(os.close, handle)
                with contextlib.suppress(BlockingIOError):
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(left, ignore_errors=True)
        building = Path(tempfile.mkdtemp(prefix=name, dir=root))
        lock = os.open(building, os.O_RDONLY)
        with contextlib.suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
    return building, lock


def _reserve(file: Path, shape: tuple[int, ...]) -> None:
    """Creates an int16 array file whose disk space is taken now: a disk that fills up later would kill the writer."""
    np.lib.format.open_memmap(file, "w+", np.int16, shape).flush()
    size = file.stat().st_size
    if shutil.disk_usage(file.parent).free < size:
        raise UserError(
            f"The phantom cache needs {size / 2**30:.1f} GiB and {file.parent.parent} has less free: "
            "make room there, or ask for a smaller count."
        )
    if hasattr(os, "posix_fallocate"):
        with open(file, "r+b") as handle:
            os.posix_fallocate(handle.fileno(), 0, size)


def _fill(folder: Path, style: str, first_seed: int, start: int, count: int) -> None:
    """Draws `count` volumes into rows `start`... of volumes.npy and their truth into truth-<start>.jsonl."""
    volumes = np.load(folder / "volumes.npy", mmap_mode="r+", allow_pickle=False)
    with open(folder / f"truth-{start}.jsonl", "w", encoding="utf-8") as lines:
        for i in range(count):
            drawn = STYLES[style](first_seed + i, volumes.shape[1:])
            volumes[start + i] = drawn.hu
            lines.write(json.dumps(dataclasses.asdict(drawn.truth)) + "\n")
    volumes.flush()


def _fill_apart(folder: Path, style: str, parts: list[tuple[int, int, int]]) -> None:
    """Runs `_fill` once per part in fresh interpreters: a fork after JAX has started threads can hang, and a spawned
    pool would run the caller's main module again."""
    package = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(p for p in (package, os.environ.get("PYTHONPATH")) if p)
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    running = []
    try:
        for part in parts:
            command = [sys.executable, "-m", "tghmoe_jax.drawn.phantom_source", str(folder), style, *map(str, part)]
            running.append(
                subprocess.Popen(
                    command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
                )
            )
        for process in running:
            errors = process.stderr.read()
            process.wait()
            if process.returncode:
                raise RuntimeError(f"drawing phantoms failed: {errors.decode(errors='replace')[-2000:]}")
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
    _fill(Path(sys.argv[1]), sys.argv[2], *map(int, sys.argv[3:]))
