"""A tiny random base and the commands that train on it in seconds: what the whole-command tests share."""

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np

from configs import pretrain2d
from tghmoe_jax.bases import phi3v
from tghmoe_jax.bases.base import EMBEDDED, save_base
from tghmoe_jax.samples.tokenizer import FILES

ROOT = Path(__file__).resolve().parent.parent
# Compiles in a third of the time. Later versions of XLA do not know the option, and end at it.
_KNOWN = importlib.metadata.version("jaxlib").startswith("0.10.")
WITHOUT_EMITTERS = {"XLA_FLAGS": "--xla_cpu_use_fusion_emitters=false"} if _KNOWN else {}
COMPILER_OPTIONS = {"xla_cpu_use_fusion_emitters": False} if _KNOWN else {}
SIZE, SLICES, STEPS, ITEMS = 32, 8, 8, 12
BASE = pretrain2d.BASE | {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
    "intermediate_size": 48,
    "vision_config": pretrain2d.BASE["vision_config"] | {
        "hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 32,
        "image_size": SIZE,
    },
}  # fmt: skip


def write_base(folder: Path) -> Path:
    """A random 2D base with the embedded tokeniser."""
    params = {}
    for name, shape in phi3v.FAMILY.shapes(BASE).items():
        rng = np.random.default_rng(zlib.crc32(name.encode()))
        params[name] = rng.normal(float(name.endswith("scale")), 0.15, shape).astype(np.float32)
    save_base(folder, params, BASE)
    for name in FILES:
        shutil.copyfile(EMBEDDED / name, folder / name)
    return folder


def options(folder: Path) -> list[str]:
    """The flags that shrink stage 1 or stage 2; `folder` holds the base and the data's cache."""
    sizes = {
        "base": folder / "base", "data.root": folder / "data", "data.volumes": 40, "data.slices": SLICES,
        "data.size": SIZE, "model.patch_depth": 2, "model.attn3d_layers": "1,2", "model.tgh.layers": "1,2",
        "model.tgh.hidden": 24, "model.depth_rope.rotary_dim": 8, "train.batch": 16, "train.accumulate": 2,
        "optimizer.name": "adamw",  # compiles faster; the default is trained with in tests/test_main.py
        "train.steps": STEPS, "checkpoint.every": 3, "eval.items": ITEMS, "eval.calibration": 24, "eval.batch": 6,
        "eval.new_tokens": 6, "eval.answer_tokens": 4, "data.mixture.report": 1, "data.mixture.open": 1,
        "data.mixture.closed": 1,
    }  # fmt: skip
    return [f"--config.{key}={value}" for key, value in sizes.items()]


def keep_programs(folder: Path) -> dict[str, str]:
    """The environment in which compiled programs are kept in `folder`, even the smallest."""
    return {
        "JAX_COMPILATION_CACHE_DIR": str(folder),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }


def environment(devices: int = 1) -> dict[str, str]:
    """Of a command: programs are compiled quickly, for so many devices, and kept as tests/conftest.py says."""
    quick = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    return {**os.environ, **quick, **WITHOUT_EMITTERS, "JAX_NUM_CPU_DEVICES": str(devices), "PYTHONPATH": str(ROOT)}


def command(
    folder: Path, config: str, workdir: Path | str, *flags: str, code: str = "", devices: int = 1
) -> subprocess.CompletedProcess:
    """Runs `python -m tghmoe_jax.main` in `folder` on so many devices; `code` is run in its process before."""
    as_main = "import sys; from tghmoe_jax.main import *; sys.exit(run_command(main, PREEMPTED))"
    start = ["-c", f"{code}\n{as_main}"] if code else ["-m", "tghmoe_jax.main"]
    arguments = [f"--config={ROOT / 'configs' / config}", f"--workdir={workdir}", *flags]
    return subprocess.run(
        [sys.executable, *start, *arguments], cwd=folder, env=environment(devices), capture_output=True, text=True,
        timeout=900,
    )  # fmt: skip


def trained(folder: Path, config: str, name: str, *flags: str, devices: int = 1) -> Path:
    """The finished run `name` in `folder`."""
    done = command(folder, config, folder / name, *options(folder), *flags, devices=devices)
    assert done.returncode == 0, done.stderr[-3000:]
    (folder / f"{name}.out").write_text(done.stdout)
    return folder / name


def metrics(run: Path) -> dict:
    """The scores of a run's only evaluation."""
    (file,) = run.glob("eval/*/metrics.json")
    return json.loads(file.read_text())
