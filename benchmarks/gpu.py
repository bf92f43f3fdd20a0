"""What one NVIDIA GPU does, in at most eight minutes: attention backends, training steps of a preset, the self-check.

    python -m benchmarks.gpu [--config configs/finetune.py:phi3v,lora=16,pod=l4-1] [--minutes 8] [--json]

Weights and batches are drawn, so nothing is read. What no time is left for is named and left out. Not yet run on a GPU.
`--small` runs all of it on any machine, in small. Exit codes: 0 done, 1 a check failed, 2 no GPU, or another fault that
the user can fix.
"""

import json
import logging
import sys
import time
from collections.abc import Iterator

import jax  # before tools.aot, which keeps it from the devices of the machine
import jax.numpy as jnp
import numpy as np

from tghmoe_jax.errors import CommandParser, UserError, command, run_command
from tghmoe_jax.ops.attention import Mask, attention
from tghmoe_jax.ops.platform import platform
from tghmoe_jax.sharding.mesh import make_mesh
from tghmoe_jax.tools import aot, flops, selfcheck
from tghmoe_jax.tools.chips import chip_of
from tghmoe_jax.training import program
from tghmoe_jax.training.command_line import parse

BACKENDS = {"cudnn": "cudnn", "blocked": "blocked", "xla": "plain"}  # xla: all scores, fused as XLA likes
CONFIG = "configs/finetune.py:phi3v,lora=16,pod=h100-1"
STEP_SECONDS = 240  # with less than this left, no step is compiled
STEPS = 3


@command
def main(argv: list[str]) -> int:
    """Runs the command and returns its exit code."""
    parser = CommandParser(prog="python -m benchmarks.gpu", description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--minutes", type=float, default=8.0, help="after which nothing more is begun")
    parser.add_argument("--small", action="store_true", help="small shapes, on whatever device is there")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args, rest = parser.parse_known_args(argv)
    logging.getLogger("jax._src.xla_bridge").setLevel(logging.CRITICAL)  # a traceback of its plugin, where no GPU is
    if platform() != "gpu" and not args.small:
        raise UserError(
            f"JAX sees no NVIDIA GPU here (its devices: {platform()}); run this where there is one, after "
            "pip install -r requirements-gpu.txt, or give --small to try it in small "
            "(`python -c 'import jax; jax.devices()'` says what is missing)."
        )
    if not any(part.startswith("--config") for part in rest):
        rest = ["--config", "configs/finetune.py:lora=4" if args.small else CONFIG, *rest]
    config, _ = parse(["gpu", *rest])
    end = time.monotonic() + 60 * args.minutes
    device = jax.local_devices()[0]
    rows: list[dict] = []

    def told(row: dict) -> None:
        rows.append(row)
        if not args.json:
            print(line(row), flush=True)

    for row in attentions(args.small):
        told(row)
        if time.monotonic() > end:
            break
    if args.small or end - time.monotonic() > STEP_SECONDS:
        told(steps(config, device))
    else:
        told({"name": "training step", "left_out": "no time"})
    checks = selfcheck.checks(selfcheck.SMALL if args.small else selfcheck.FULL)
    while time.monotonic() < end and (check := next(checks, None)):
        told({"name": check.name, "passed": check.passed, "seconds": check.seconds, "mfu": selfcheck.mfu(check)})
    if time.monotonic() >= end:
        told({"name": "the checks that follow", "left_out": "no time"})
    if args.json:
        print(json.dumps({"device": device.device_kind, "jax": jax.__version__, "rows": rows}, indent=1))
    return int(not all(row.get("passed", True) for row in rows))


def attentions(small: bool) -> Iterator[dict]:
    """Forward and backward of the model's attentions, by every backend; seconds and the share of the chip's peak."""
    valid = lambda rows, length: np.ones((rows, length), bool)  # noqa: E731
    size = (lambda rows, length: (1, length // 16)) if small else (lambda rows, length: (rows, length))
    chip = chip_of(jax.local_devices()[0])
    for name, (rows, length), (heads, head), causal, blocks in (
        ("slab", size(64, 577), (16, 64), False, False), ("volume", size(1, 9232), (16, 64), False, False),
        ("decoder", size(4, 1405), (32, 96), True, False), ("image blocks", size(4, 2069), (8, 128), True, True),
    ):  # fmt: skip
        own = np.arange(length, dtype=np.int32)[None] // 256 * np.ones((rows, 1), np.int32) if blocks else None
        mask = Mask(key_valid=None if name == "slab" else valid(rows, length), causal=causal, blocks=own)
        q = jax.random.normal(jax.random.key(0), (rows, length, heads, head), jnp.bfloat16)
        useful = 3 * 4.0 * flops.attention_pairs(length, length, "plain", causal)[0] * head * heads * rows
        for shown, backend in BACKENDS.items():
            if small and backend == "cudnn":
                continue

            def total(q, backend=backend, mask=mask):
                return jnp.sum(attention(q, q, q, mask, backend).astype(jnp.float32))

            row = {"name": f"attention, {name} {rows} x {length}, {shown}"}
            try:
                spent = selfcheck.seconds(jax.jit(jax.grad(total)).lower(q).compile(), q)
            except jax.errors.JaxRuntimeError as error:  # scores that do not fit
                yield row | {"left_out": " ".join(str(error).split())[:100]}
                continue
            yield row | {"seconds": spent, "mfu": useful / spent / chip.peak if chip else None}


def steps(config, device) -> dict:
    """One microbatch of the config a step, on one device: steps and samples a second, MFU."""
    config.train.batch //= config.train.accumulate
    config.train.accumulate = 1
    config.mesh.update({"data": 1, "fsdp": 1, "expert": 1})
    mesh = make_mesh(1, 1, 1, [device], config.model.tgh.experts)
    base, tokenizer = aot.base_of(config)
    with jax.set_mesh(mesh):
        spec = program.batch_spec(config, mesh)
        model = program.build_model(config, base, (), tokenizer, spec.task_shares)
        one = program.build(config, model, spec, mesh)
        keys = dict(zip(one.shapes, jax.random.split(jax.random.key(0), len(one.shapes)), strict=True))
        draw = jax.jit(
            lambda key, s: 0.02 * jax.random.normal(key, s.shape, s.dtype), static_argnums=1,
            out_shardings=jax.NamedSharding(mesh, jax.P()),
        )  # fmt: skip
        state = one.state({path: draw(keys[path], s) for path, s in one.shapes.items()})
        drawn = selfcheck.random_batch(one.batch_shapes(), model, seed=3)
        batch = {key: jax.device_put(drawn[key], s.sharding) for key, s in one.batch_shapes().items()}
        begun = time.perf_counter()
        step = one.step().lower(state, batch).compile()
        compiling = time.perf_counter() - begun
        state, scalars = step(state, batch)
        jax.block_until_ready(state)
        begun = time.perf_counter()
        for _ in range(STEPS):
            state, scalars = step(state, batch)
        jax.block_until_ready(state)
    spent, chip = (time.perf_counter() - begun) / STEPS, chip_of(device)
    backend = "cudnn" if platform() == "gpu" else "plain"
    sample = flops.train_sample(
        model.cfg, one.shapes, one.trains, config.data.slices, config.data.text_length, backend
    )  # fmt: skip
    useful = sample.useful * config.train.batch
    stats = device.memory_stats() or {}
    return {
        "name": f"training step of {config.train.batch} samples", "seconds": spent, "steps_a_second": 1 / spent,
        "mfu": useful / spent / chip.peak if chip else None, "compile_seconds": compiling,
        "peak_gib": stats.get("peak_bytes_in_use", 0) / 2**30, "passed": bool(np.isfinite(scalars["loss"])),
    }  # fmt: skip


def line(row: dict) -> str:
    """A row for people."""
    if "left_out" in row:
        return f"{row['name']:52} left out: {row['left_out']}"
    parts = [f"{row['name']:52}", f"{1e3 * row['seconds']:9.2f} ms"]
    parts += [f"{row['mfu']:4.0%} MFU"] if row["mfu"] is not None else []
    parts += [f"{row['steps_a_second']:.3f} steps/s, {row['peak_gib']:.1f} GiB"] if "steps_a_second" in row else []
    return "  ".join([*parts, {True: "", False: "FAIL"}[row.get("passed", True)]]).rstrip()


if __name__ == "__main__":
    sys.exit(run_command(main))
