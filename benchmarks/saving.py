"""How long a checkpoint stops the training, and what memory saving and resuming take.

    python -m benchmarks.saving [--gib 1] [--leaves 24] [--folder DIR]

A state of float32 arrays, a third of them parameters and the others moments, passes through the checkpoints that a run
writes, while steps go on that take over its memory as a training step does. `blocked`: what `save` takes, and on a CPU
what a step takes more whose arrays are still needed, so that it cannot take over their memory (`first`: in a process
that takes new memory for it, as a run's first saves do). `writing`: from the call
until the files are there with their digests; `step_after`: a step meanwhile, which on a CPU shares the cores. Peaks
(VmHWM, each part in a process of its own) are without what the process held before; a resume must not take more than
the steps did, and one leaf. The folder (default: the system's for temporary files) needs the room.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging

from tghmoe_jax.training import checkpoints, heap
from tghmoe_jax.training.step import TrainState

STEPS = 7  # before the save, of which the first compiles
COPIES = 5  # of which the first two take new memory from the system, as the first two saves of a run do


def state(gib: float, leaves: int) -> TrainState:
    """Its shapes; `leaves` parameters with two moments each."""
    side = round((gib * 2**30 / 3 / leaves / 4) ** 0.5)
    one = jax.ShapeDtypeStruct((side, side), jnp.float32, sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0]))
    trained = {f"decoder/block_{i}/kernel": one for i in range(leaves)}
    number = jax.ShapeDtypeStruct((), jnp.int32, sharding=one.sharding)
    opt = jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=one.sharding),
        jax.eval_shape(optax.scale_by_adam().init, trained),
    )
    return TrainState(number, trained, {}, opt)


def numbers() -> grain.DatasetIterator:
    return iter(grain.MapDataset.range(100).to_iter_dataset())


def resident(key: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at its peak."""
    line = next(one for one in Path("/proc/self/status").read_text().splitlines() if one.startswith(key))
    return int(line.split()[1]) * 1024


def reset_peak() -> int:
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


def size(tree) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def save(shapes: TrainState, run: Path) -> dict[str, float]:
    held = reset_peak()
    # Random as trained ones are: nothing to compress.
    make = jax.jit(
        lambda: jax.tree.map(lambda s: jax.random.normal(jax.random.key(0), s.shape).astype(s.dtype), shapes)
    )
    step = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    now, store = make(), checkpoints.Checkpoints(run, keep=2)

    def timed() -> float:
        nonlocal now
        begun = time.perf_counter()
        now = jax.block_until_ready(step(now))
        return time.perf_counter() - begun

    usual = statistics.median([timed() for _ in range(STEPS)][1:])
    without = resident("VmHWM") - held
    copied = []
    for _ in range(COPIES if jax.default_backend() == "cpu" else 0):
        needed = [np.asarray(leaf) for leaf in jax.tree.leaves(now)]
        copied.append(max(0.0, timed() - usual))
        del needed
    begun = time.perf_counter()
    store.save(now, numbers())
    called, after = time.perf_counter() - begun, timed()
    store.finish()
    written = time.perf_counter() - begun
    store.close()
    first, later = max(copied, default=0.0), statistics.median(copied[2:] or [0.0])
    blocked = called + later
    return {
        "state": size(shapes), "save": called, "step": usual, "copied": later, "copied_first": first,
        "step_after": after, "blocked": blocked, "writing": written, "share": blocked / written,
        "share_first": (called + first) / written,
        "peak_running": without, "peak_saving": resident("VmHWM") - held,
    }  # fmt: skip


def resume(shapes: TrainState, run: Path) -> dict[str, float]:
    store, held = checkpoints.Checkpoints(run, keep=2), reset_peak()
    begun = time.perf_counter()
    now = jax.block_until_ready(store.restore(shapes, numbers()))
    seconds, peak = time.perf_counter() - begun, resident("VmHWM") - held
    store.close()
    largest = max(leaf.nbytes for leaf in jax.tree.leaves(now))
    return {"state": size(now), "largest": largest, "seconds": seconds, "peak_resuming": peak}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.saving", description=__doc__.split("\n")[0])
    parser.add_argument("--gib", type=float, default=1.0)
    parser.add_argument("--leaves", type=int, default=24)
    parser.add_argument("--folder", default=None)
    parser.add_argument("--part", choices=("save", "resume"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        logging.set_verbosity(logging.ERROR)
        heap.keep_freed_memory()  # as a run does
        part = {"save": save, "resume": resume}[args.part]
        print(json.dumps(part(state(args.gib, args.leaves), Path(args.folder))))
        return
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        flags = [f"--gib={args.gib}", f"--leaves={args.leaves}", f"--folder={folder}"]
        for part in ("save", "resume"):
            command = [sys.executable, "-m", "benchmarks.saving", *flags, f"--part={part}"]
            done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ)
            print(part, json.dumps({key: round(one, 4) for key, one in json.loads(done.stdout).items()}))


if __name__ == "__main__":
    main()
