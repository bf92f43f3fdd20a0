"""Time and peak memory of the full-scale vision tower over 16 to 128 slices, joint and window attention above.

    python -m benchmarks.cases.depth --slices 32 --kind joint [--runs 5] [--small]

runs one of them: each has a process of its own, so that its peak of memory is its own. The peak is that of resident
memory from the first run on, weights included, the compiler's not. There is no peer; what is bounded is the growth of
window attention's time over that of the slices, and joint attention's memory at 32 slices over 6 GiB.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

from benchmarks.measure import ROOT, Row, peak_memory, seconds

SLICES, SMALL_SLICES = (16, 32, 64, 128), (2, 4)
KINDS = ("joint", "window")
GROWTH = 1.2
MEMORY = 6 << 30  # at 32 slices
BUDGET = 120.0  # seconds after which no further run of a size is begun


def run(small: bool, runs: int) -> list[Row]:
    found = {
        (kind, slices): measured(kind, slices, small, runs)
        for kind in KINDS
        for slices in (SMALL_SLICES if small else SLICES)
    }
    rows = [
        Row(f"{kind}, {slices} slices", one["seconds"], work=[(one["flops"], 0.0)], notes={"peak_memory": one["peak"]})
        for (kind, slices), one in found.items()
    ]
    first, *_, last = SMALL_SLICES if small else SLICES
    middle = lambda slices: statistics.median(found["window", slices]["seconds"])  # noqa: E731
    growth = middle(last) / middle(first) / (last / first)
    rows.append(Row(f"window, {first} to {last} slices: growth over that of the slices", bound=GROWTH, value=growth))
    at = SMALL_SLICES[-1] if small else 32
    share = found["joint", at]["peak"] / MEMORY
    rows.append(Row(f"joint, {at} slices: peak memory over 6 GiB", bound=1.0, value=share))
    return rows


def measured(kind: str, slices: int, small: bool, runs: int) -> dict:
    """Seconds of each run, useful FLOPs and the peak of memory in bytes, from a process of its own."""
    command = [sys.executable, "-m", "benchmarks.cases.depth", f"--kind={kind}", f"--slices={slices}", f"--runs={runs}"]
    command += ["--small"] if small else []
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "JAX_PLATFORMS": "cpu"})
    if done.returncode:
        raise SystemExit(f"error: depth, {kind}, {slices} slices: {(done.stderr.strip() or 'killed').splitlines()[-1]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def here(kind: str, slices: int, small: bool, runs: int) -> dict:
    """The same in this process."""
    import numpy as np

    from benchmarks import models
    from tghmoe_jax.bases import phi3v

    vision = models.CLIP_SMALL if small else phi3v.CLIP_L_336
    layers, size = vision["num_hidden_layers"], vision["image_size"]
    text = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1}
    config = (
        models.experiment("stage1.py:phi3v").base_config.to_dict()
        | text
        | {"intermediate_size": 64, "vocab_size": 64, "vision_config": vision}
    )
    rng = np.random.default_rng(0)
    leaves = {
        name: np.float32(0.02) * rng.standard_normal(shape, np.float32)
        for name, shape in phi3v.FAMILY.shapes(config).items()
    }
    joint = tuple(range(layers // 2, layers - 1))  # as `configs/stage1.py:phi3v` has them
    model, variables = models.ours(config, leaves, size, patch_depth=2, attn3d_layers=joint, attn3d_kind=kind)
    del leaves
    images = rng.random((1, slices, size, size, 3), np.float32)
    run = models.compiled_tower(model, variables, images)
    Path("/proc/self/clear_refs").write_text("5")  # the peak of memory starts anew
    times = []
    while len(times) < runs and (not times or sum(times) < BUDGET):
        times.append(seconds(lambda: run(images)))
    return {"seconds": times, "flops": models.tower_flops(model, slices), "peak": peak_memory()}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cases.depth", description=__doc__.split("\n")[0])
    parser.add_argument("--kind", choices=KINDS, required=True)
    parser.add_argument("--slices", type=int, required=True)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--small", action="store_true")
    args = parser.parse_args()
    print(json.dumps(here(**vars(args))))


if __name__ == "__main__":
    main()
