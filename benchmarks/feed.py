"""How many prepared volumes a second grain feeds from worker processes: 32 x 256 x 256, stored as uint8 or int16 HU.

    python -m benchmarks.feed [--workers 2] [--seconds 20] [--folder DIR]

Prepares drawn volumes with the texture of a scan, then times, each in a process of its own and after a warm-up: one
record read and unpacked; the same with its three channels; and whole training batches of 16 rows through
`pipeline.train_iterator`, from a thread and from worker processes. The page cache holds the set, so disks are left out.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np

from tghmoe_jax.data import pipeline, preparing
from tghmoe_jax.data.canonical import Volume
from tghmoe_jax.data.file_source import FileSource
from tghmoe_jax.data.items import Dataset, Item
from tghmoe_jax.data.tokenizer import Tokenizer

SLICES, SIZE, VOLUMES, ROWS = 32, 256, 64, 16
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


def rate(step, seconds: float, volumes: int = 1) -> float:
    """Volumes a second of `step()`, after a warm-up."""
    for _ in range(3):
        step()
    begun, count = time.perf_counter(), 0
    while time.perf_counter() - begun < seconds:
        step()
        count += volumes
    return count / (time.perf_counter() - begun)


def once(way: str, unit: str, root: Path, workers: int, seconds: float) -> float:
    """The rate of one way."""
    data = {"name": "manifest", "root": str(root / unit), "manifest": "", "slices": SLICES, "size": SIZE,
            "channels": "windows3"}  # fmt: skip
    source = FileSource(data, "train")
    keys = iter(range(10**9))
    if way == "record":
        return rate(lambda: source._read[0](source.key(next(keys) % VOLUMES)), seconds)
    if way == "slices":
        return rate(lambda: source._read[0](source.key(next(keys) % VOLUMES)).slices(SLICES, "windows3"), seconds)
    spec = pipeline.BatchSpec(ROWS, 1, 1, 64, (("open", 1),), ("report", "vqa"))
    tokenizer = Tokenizer.from_folder(ASSETS)
    batches = pipeline.train_iterator(source, tokenizer, spec, 0, 10**6, workers=workers if way == "workers" else 0)
    return rate(lambda: next(batches), seconds, ROWS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--folder", help="where 200 MB may be written")
    parser.add_argument("--once", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.once:
        way, unit, root = args.once
        print(json.dumps(once(way, unit, Path(root), args.workers, args.seconds)))
        return
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        for unit in ("unit-interval", "HU"):
            prepare(unit, Path(name))
            stored = sum(file.stat().st_size for file in (Path(name) / unit / "volumes").iterdir()) / VOLUMES
            print(f"{unit}: {stored / 1e6:.2f} MB a volume")
            for way in ("record", "slices", "thread", "workers"):
                command = [sys.executable, "-m", "benchmarks.feed", "--once", way, unit, name]
                command += [f"--workers={args.workers}", f"--seconds={args.seconds}"]
                text = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
                label = f"batches from {args.workers} workers" if way == "workers" else way
                print(f"  {label:<24}{json.loads(text):8.0f} volumes a second", flush=True)


if __name__ == "__main__":
    main()
