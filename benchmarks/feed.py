"""How many prepared volumes a second grain feeds from worker processes: 32 x 256 x 256, stored as uint8 or int16 HU.

    python -m benchmarks.feed [--workers 2] [--seconds 20] [--folder DIR]

Prepares drawn volumes with the texture of a scan, then times, each in a process of its own and after a warm-up: one
record read and unpacked; the same with its three channels; whole training batches of 16 rows through
`pipeline.train_iterator` from a thread; records, and those batches, from worker processes. The page cache holds the
set, so disks are left out. `python -m benchmarks.data` ends with the same table.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import grain
import numpy as np
from absl import flags

from tghmoe_jax.bases.phi3v import CHAT
from tghmoe_jax.datasets import prepared, preparing
from tghmoe_jax.datasets.file_source import FileSource
from tghmoe_jax.datasets.items import Dataset, Item
from tghmoe_jax.samples import pipeline
from tghmoe_jax.samples.tokenizer import Tokenizer
from tghmoe_jax.scans.volume import Volume

SLICES, SIZE, VOLUMES, ROWS = 32, 256, 64, 16
WINDOWS = 5
UNITS = ("unit-interval", "HU")
ASSETS = Path(pipeline.__file__).parents[1] / "assets" / "base"


def draw(unit: str, key: str) -> Volume:
    """A body with smooth texture and noise, so that it packs about 2 to 1 as a scan does."""
    rng = np.random.default_rng(list(key.encode()))
    y, x = np.meshgrid(*[np.linspace(-1, 1, SIZE)] * 2, indexing="ij")
    hu = np.where((x / 0.9) ** 2 + (y / 0.7) ** 2 < 1, 40.0, -1000.0)[None] + rng.normal(0, 12, (SLICES, SIZE, SIZE))
    array = hu if unit == "HU" else np.clip((hu + 1000) / 1400, 0, 1)
    return Volume(array.astype(np.float32), unit, (3.0, 1.5, 1.5), "LPS", None, ())


def prepare(unit: str, root: Path) -> None:
    item = partial(Item, case="c", split="train", task="vqa", type="organ", question="Which organ?", answer="liver")
    items = tuple(item(volume=f"{i}") for i in range(VOLUMES))
    data = {"name": "manifest", "root": "", "manifest": "", "slices": SLICES, "size": SIZE}
    dataset = Dataset("manifest", root, items, (), partial(draw, unit))
    preparing.prepare(data, root / unit, say=lambda text: None, dataset=dataset)


def rate(step, seconds: float, volumes: int = 1) -> dict[str, float]:
    """Volumes a second of `step()` after a warm-up, the median of WINDOWS stretches, and CPU ms a volume of all."""
    for _ in range(3):
        step()
    rates, total, busy = [], 0, cpu_seconds()
    for _ in range(WINDOWS):
        begun, count = time.perf_counter(), 0
        while time.perf_counter() - begun < seconds / WINDOWS:
            step()
            count += volumes
        rates.append(count / (time.perf_counter() - begun))
        total += count
    return {"rate": statistics.median(rates), "cpu_ms": (cpu_seconds() - busy) * 1000 / total}


def cpu_seconds() -> float:
    """Of this process and its children, the workers, so far."""
    total = 0
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # a process that has just ended
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            if os.getpid() in (int(folder.name), int(fields[1])):
                total += int(fields[11]) + int(fields[12])
    return total / os.sysconf("SC_CLK_TCK")


def once(way: str, unit: str, root: Path, workers: int, seconds: float) -> dict[str, float]:
    """The rate of one way."""
    data = {"name": "manifest", "root": str(root / unit), "manifest": "", "slices": SLICES, "size": SIZE,
            "channels": "windows3"}  # fmt: skip
    source = FileSource(data, "train")
    keys, read = iter(range(10**9)), source._read[0]
    if way == "record":
        return rate(lambda: read(source.key(next(keys) % VOLUMES)), seconds)
    if way == "slices":
        return rate(lambda: read(source.key(next(keys) % VOLUMES)).slices(SLICES, "windows3"), seconds)
    if way == "records":
        flags.FLAGS.mark_as_parsed()  # grain reads flags of its own when it starts workers
        grids = grain.MapDataset.range(10**6).map(partial(stored, source)).to_iter_dataset().batch(ROWS)
        grids = iter(grids.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers)))
        return rate(lambda: next(grids), seconds, ROWS)
    spec = pipeline.BatchSpec(ROWS, 1, 1, 64, (("open", 1),), ("report", "vqa"))
    tokenizer = Tokenizer.from_folder(ASSETS, CHAT)
    batches = pipeline.train_iterator(source, tokenizer, spec, 0, 10**6, workers=workers if way == "batches" else 0)
    return rate(lambda: next(batches), seconds, ROWS)


def stored(source: FileSource, index: int) -> np.ndarray:
    """(32, 256, 256) uint8 or int16 as it lies in the shard."""
    return source._read[0](source.key(int(index) % VOLUMES)).values


def table(folder: Path, workers: int, seconds: float) -> None:
    """Prints the rates of every way, each in a process of its own; writes 200 MB into `folder`."""
    label = {
        "record": "one process, records", "slices": "one process, three channels", "thread": "batches from a thread",
        "records": f"grain, records from {workers} workers", "batches": f"grain, batches from {workers} workers",
    }  # fmt: skip
    print(f"{'':<40} {'volumes a second':>17} {'CPU ms a volume':>17}")
    for unit in UNITS:
        prepare(unit, folder)
        size = sum(file.stat().st_size for file in (folder / unit / "volumes").iterdir()) / VOLUMES
        print(f"{SLICES} x {SIZE} x {SIZE} {prepared.DTYPES[unit].__name__}, {size / 1e6:.2f} MB stored a volume")
        for way, name in label.items():
            command = [sys.executable, "-m", "benchmarks.feed", "--once", way, unit, str(folder)]
            command += [f"--workers={workers}", f"--seconds={seconds}"]
            result = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
            print(f"  {name:<38} {result['rate']:17.0f} {result['cpu_ms']:17.1f}", flush=True)


def main() -> None:
    """The table, or with `--once` one of its rows."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=20.0, help="of each way")
    parser.add_argument("--folder", help="where 200 MB may be written")
    parser.add_argument("--once", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.once:
        way, unit, root = args.once
        print(json.dumps(once(way, unit, Path(root), args.workers, args.seconds)))
        return
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        table(Path(name), args.workers, args.seconds)


if __name__ == "__main__":
    main()
