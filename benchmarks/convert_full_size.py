"""Time and peak memory of converting a full-size base (4B parameters, some 8.5 GB of bf16) in and out, bit for bit.

    python -m benchmarks.convert_full_size [--family phi3_v|gemma3] [--folder DIR]

Writes a random checkpoint in shards, converts it, exports it again, compares every tensor, and puts the leaves of the
full-scale stage 1 together from it, of which each is dropped where a device would take it. Needs 26 GB of disk in the
folder (default: the system's for temporary files), which is emptied afterwards. Each step is a process of its own; its
peak is what the operating system reports for it (VmHWM).
"""

import argparse
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path

import ml_dtypes
import numpy as np

from benchmarks.models import experiment
from tghmoe_jax import train
from tghmoe_jax.bases.base import FAMILIES, flattened
from tghmoe_jax.tools import aot
from tghmoe_jax.training import loading, program
from tghmoe_jax.weights import storage

PRESETS = {"phi3_v": "stage1.py:phi3v", "gemma3": "stage1.py:medgemma"}


def write(folder: Path, family: str) -> None:
    """A random checkpoint: every tensor has values of its own, so that exchanged ones would show."""
    names = {"architectures": [FAMILIES[family].architectures[0]], "model_type": FAMILIES[family].model_types[0]}
    config = experiment(PRESETS[family]).base_config.to_dict() | names | {"torch_dtype": "bfloat16"}

    def random(name: str, shape: tuple[int, ...]) -> np.ndarray:
        rng = np.random.default_rng(zlib.crc32(name.encode()))
        words = rng.integers(0, 1 << 14, shape, np.uint16)  # finite bf16 bit patterns
        return words.view(ml_dtypes.bfloat16)

    bf16 = np.dtype(ml_dtypes.bfloat16)
    tensors = {
        entry.name: storage.Lazy(
            entry.torch_shape, bf16, lambda entry=entry: random(entry.name, entry.torch_shape)
        )
        for entry in FAMILIES[family].table(flattened(config))
    }  # fmt: skip
    storage.write_tensors(folder, tensors)
    (folder / "config.json").write_text(json.dumps(config))


def assemble(folder: Path, family: str) -> None:
    """The leaves of stage 1, each made, looked at and dropped as it is when devices take their parts."""
    config = experiment(PRESETS[family])
    config.base = str(folder)
    origin = train.load_origin(config)
    tokenizer = aot.stand_in_tokenizer(origin.config)
    model = program.build_model(config, origin.config, (), tokenizer, ())
    loaded, fresh, report = train.assemble(origin, loading.param_shapes(model, config.data), config.model.inflation)
    total = sum(np.asarray(leaf).size for leaf in loaded.values())
    print(f"{len(loaded)} leaves, {total:,} parameters; {len(fresh)} are new\n{report}", file=sys.stderr)


def compare(one: Path, other: Path) -> None:
    """Exits with an error where a tensor differs in a bit."""
    a, b = storage.read_tensors(one), storage.read_tensors(other)
    assert a.keys() == b.keys(), "the names differ"
    for name in a:
        assert bits(a[name]) == bits(b[name]), f"{name} differs"


def bits(tensor: storage.Lazy) -> tuple:
    data = tensor.load()
    return data.shape, data.dtype, zlib.crc32(data.tobytes()), zlib.adler32(data.tobytes())


def measured(name: str, *command: str) -> None:
    """Runs a process and prints its time and peak resident memory."""
    begun = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", *command], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{name} failed")
    print(f"{name:<8} {time.perf_counter() - begun:7.1f} s  peak {usage.ru_maxrss / 2**20:5.2f} GiB", flush=True)


def main() -> None:
    """The whole benchmark, or one step of it in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--family", choices=PRESETS, default="phi3_v")
    parser.add_argument("--folder", help="where 26 GB may be written")
    parser.add_argument("--step", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.step:
        steps = {
            "write": functools.partial(write, family=args.family),
            "assemble": functools.partial(assemble, family=args.family),
            "compare": compare,
        }
        steps[args.step[0]](*map(Path, args.step[1:]))
        return
    own = ("benchmarks.convert_full_size", "--family", args.family, "--step")
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        hub, converted, again = (Path(name) / part for part in ("hub", "converted", "again"))
        hub.mkdir()
        measured("write", *own, "write", str(hub))
        measured("convert", "tghmoe_jax.convert", "--from", str(hub), "--to", str(converted))
        measured("export", "tghmoe_jax.convert", "--from", str(converted), "--to", str(again), "--export")
        measured("compare", *own, "compare", str(hub), str(again))
        measured("assemble", *own, "assemble", str(hub))
    print("every tensor is the same, bit for bit")


if __name__ == "__main__":
    main()
