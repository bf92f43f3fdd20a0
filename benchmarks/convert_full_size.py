"""Time and peak memory of carrying a full-size Phi-3-V (4.2B parameters, 8.3 GB of bf16) in and out, bit for bit.

    python -m benchmarks.convert_full_size [--folder DIR]

Writes a random checkpoint in shards, converts it, exports it again and compares every tensor. Needs 25 GB of disk in
the folder (default: the system's for temporary files), which is emptied afterwards. Each step is a process of its own;
its peak is what the operating system reports for it (VmHWM).
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path

import ml_dtypes
import numpy as np

from tghmoe_jax.bases import phi3v
from tghmoe_jax.bases.base import EMBEDDED
from tghmoe_jax.weights import storage

CONFIG = {
    "architectures": ["Phi3VForCausalLM"], "model_type": "phi3_v", "hidden_size": 3072, "intermediate_size": 8192,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32064,
    "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "max_position_embeddings": 131072,
    "original_max_position_embeddings": 4096, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
}  # fmt: skip


def write(folder: Path) -> None:
    """A random checkpoint: every tensor has values of its own, so that exchanged ones would show."""

    def random(name: str, shape: tuple[int, ...]) -> np.ndarray:
        rng = np.random.default_rng(zlib.crc32(name.encode()))
        words = rng.integers(0, 1 << 14, shape, np.uint16)  # finite bf16 bit patterns
        return words.view(ml_dtypes.bfloat16)

    bf16 = np.dtype(ml_dtypes.bfloat16)
    tensors = {
        entry.name: storage.Lazy(
            entry.torch_shape, bf16, lambda entry=entry: random(entry.name, entry.torch_shape)
        )
        for entry in phi3v.entries(CONFIG)
    }  # fmt: skip
    storage.write_tensors(folder, tensors)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(EMBEDDED / name, folder / name)


def compare(one: Path, other: Path) -> None:
    """Exits with an error where a tensor differs in a bit."""
    a, b = storage.read_tensors(one), storage.read_tensors(other)
    assert a.keys() == b.keys(), "the names differ"
    for name in a:
        assert bits(a[name]) == bits(b[name]), f"{name} differs"


def bits(tensor: storage.Lazy) -> tuple:
    data = tensor.load()
    return data.shape, data.dtype, zlib.crc32(data.tobytes()), zlib.adler32(data.tobytes())


def measured(name: str, command: list[str]) -> None:
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
    parser.add_argument("--folder", help="where 25 GB may be written")
    parser.add_argument("--step", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.step:
        {"write": write, "compare": compare}[args.step[0]](*map(Path, args.step[1:]))
        return
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        hub, converted, again = (Path(name) / part for part in ("hub", "converted", "again"))
        hub.mkdir()
        measured("write", ["benchmarks.convert_full_size", "--step", "write", str(hub)])
        measured("convert", ["tghmoe_jax.convert", "--from", str(hub), "--to", str(converted)])
        measured("export", ["tghmoe_jax.convert", "--from", str(converted), "--to", str(again), "--export"])
        measured("compare", ["benchmarks.convert_full_size", "--step", "compare", str(hub), str(again)])
    print("every tensor is the same, bit for bit")


if __name__ == "__main__":
    main()
