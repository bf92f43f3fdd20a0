"""What full-scale runs take on TPU pods, compiled here without one: the table of docs/scale.md.

    python -m benchmarks.scale [ROW ...]

compiles every row, or those named, each by `tghmoe_jax.aot` in a process of its own; keeps the reports in
docs/scale.json and writes the table between the marks of docs/scale.md anew. Rows take minutes and up to 12 GiB each.
TPU rows need requirements-tpu.txt and GPU rows requirements-gpu.txt: those that cannot be compiled here are left out.
"""

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.measure import fill

DOCS = Path(__file__).resolve().parent.parent / "docs"
REPORTS, PAGE = DOCS / "scale.json", DOCS / "scale.md"
MARKS = ("<!-- table: python -m benchmarks.scale -->\n", "<!-- end of the table -->\n")
SPEED, SPEED_MARKS = DOCS / "speed.md", ("<!-- rates: python -m benchmarks.scale -->\n", "<!-- end of the rates -->\n")
GRID = {"v5e-64": "v5e:8x8", "v5p-32": "v5p:2x2x4", "v6e-16": "v6e:4x4"}
GPUS = {"h100-8": "h100:8", "h100-1": "h100:1", "l4-1": "l4:1"}
ONE = ("--topology", "v5e:1x1", "--mesh", "data=1,fsdp=1,expert=1")


def train(stage: int, pod: str, *more: str, preset: str = "phi3v") -> tuple[str, ...]:
    return ("--config", f"configs/stage{stage}.py:{preset},pod={pod}", "--topology", (GRID | GPUS)[pod], *more)


def read(step: str, preset: str = "phi3v", batch: int = 2) -> tuple[str, ...]:
    return ("--config", f"configs/stage2.py:{preset}", *ONE, "--step", step, f"--config.eval.batch={batch}")


def tune(preset: str) -> tuple[str, ...]:
    return ("--config", f"configs/finetune.py:{preset},lora=16", "--topology", "v5e:4x4", "--mesh", "fsdp=16")


def tune_on_gpu(pod: str) -> tuple[str, ...]:
    return ("--config", f"configs/finetune.py:phi3v,lora=16,pod={pod}", "--topology", GPUS[pod])


def decode_on_gpu(pod: str, batch: int) -> tuple[str, ...]:
    """Each card with the whole model."""
    cards = GPUS[pod].partition(":")[2]
    return (
        *("--config", f"configs/finetune.py:phi3v,pod={pod}", "--topology", GPUS[pod], "--step", "decode"),
        *("--mesh", f"data={cards},fsdp=1,expert=1", f"--config.eval.batch={batch}"),
    )


WINDOW, FULL = "--config.model.attn3d_kind=window", "--config.model.remat=full"
ROWS = {
    **{f"stage {stage}, {pod}": train(stage, pod) for stage in (1, 2) for pod in GRID},
    "fine-tuning, low rank, v5e-16": tune("phi3v"),
    "decode, one v5e": read("decode"),
    "evaluate, one v5e": read("evaluate"),
    **{
        f"medgemma, stage {stage}, {pod}": train(stage, pod, preset="medgemma") for stage in (1, 2) for pod in GRID
    },
    "medgemma, fine-tuning, low rank, v5e-16": tune("medgemma"),
    "medgemma, decode, one v5e": read("decode", "medgemma", 1),
    "medgemma, evaluate, one v5e": read("evaluate", "medgemma", 1),
    **{
        f"stage 1, {pod}, {slices} slices, {kind}": train(
            1, pod, FULL, f"--config.data.slices={slices}", *([WINDOW] if kind == "window" else [])
        )
        for slices, pod, kind in (
            (64, "v5p-32", "joint"), (64, "v5p-32", "window"), (128, "v5p-32", "window"), (64, "v6e-16", "window"),
            (64, "v5e-64", "window"), (128, "v5p-32", "joint"),
        )
    },
    **{f"stage {stage}, h100-8": train(stage, "h100-8") for stage in (1, 2)},
    **{f"fine-tuning, low rank, {pod}": tune_on_gpu(pod) for pod in GPUS},
    **{f"decode, {pod}": decode_on_gpu(pod, rows) for pod, rows in (("h100-8", 256), ("h100-1", 32), ("l4-1", 4))},
}  # fmt: skip


def compiled(arguments: tuple[str, ...]) -> dict:
    """The report of `tghmoe_jax.aot` or its error, with seconds and peak memory of the process in GiB."""
    start = time.perf_counter()
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        command = [sys.executable, "-m", "tghmoe_jax.aot", "--json", *arguments]
        process = subprocess.Popen(command, stdout=out, stderr=err, cwd=DOCS.parent)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        err.seek(0)
        told = err.read().strip().splitlines()
        report = json.loads(out.read()) if process.returncode == 0 else {"error": told[-1] if told else "no report"}
    took = {"seconds": round(time.perf_counter() - start), "memory": round(usage.ru_maxrss / 2**20, 2)}
    return report | {"host": took, "command": "python -m tghmoe_jax.aot " + " ".join(arguments)}


def cells(name: str, report: dict) -> list[str]:
    host = report["host"]
    end = [f"{host['seconds']} s, {host['memory']:.1f} GiB"]
    if "error" in report:
        return [name, report["error"].removeprefix("error: "), *[""] * 10, *end]
    gib = lambda key: f"{report['bytes'][key] / 2**30:.2f}"  # noqa: E731
    found: dict[str, list[float]] = {}
    for one in report["collectives"].values():
        for kind, c in one.items():
            total = found.setdefault(kind, [0, 0])
            total[0], total[1] = total[0] + c["count"], total[1] + c["bytes"] / 2**30
    samples = report.get("samples")
    return [
        name, f"{report['image_positions']:,}", " x ".join(map(str, report["mesh"].values())),
        f"{report['batch']}" + (f" / {report['accumulate']}, {report['remat']}" if samples else ""),
        f"{gib('arguments')} + {gib('temporaries')}",
        f"{report['donated']['leaves']} of {report['donated']['of']}, {gib('donated')}" if samples else "",
        f"{gib('peak')} of {gib('hbm')}", f"{report['bytes']['spare_share']:.0%}",
        "; ".join(f"{kind} {n:.0f} ({size:.1f})" for kind, (n, size) in found.items()) or "none",
        f"{report['flops']['useful'] / 1e12:.0f} / {report['flops']['executed'] / 1e12:.0f}",
        f"{report['roofline']['seconds']:.2f} s, {report['roofline']['mfu_bound']:.0%}",
        f"{samples['chip_hours']:.0f} / {samples['chip_hours_at_roofline']:.0f}" if samples else "", *end,
    ]  # fmt: skip


HEAD = [
    "row", "positions a scan", "data x fsdp x expert", "batch / microbatches, remat", "arguments + temporaries",
    "leaves donated, GiB", "peak of HBM", "spare", "collectives a step (GiB)", "TFLOPs a chip, useful / executed",
    "roofline, MFU bound", "chip-hours for 625,000 samples at 35% MFU / roofline", "compile",
]  # fmt: skip


RATES_HEAD = ["row", "least seconds", "taken by", "a chip and second at most", "at an MFU of 35%"]


def rates(name: str, report: dict) -> list[str]:
    """What a chip does in a second: samples of a train step, new tokens of `decode`."""
    least, batch = report["roofline"]["seconds"], report["batch"]
    longest = max(("compute", "hbm", "ici"), key=report["roofline"].get)
    taken = {"compute": "products", "hbm": "memory", "ici": "interconnect"}[longest]
    if samples := report.get("samples"):
        usual = samples["number"] / samples["chip_hours"] / 3600
        return [name, f"{least:.2f}", taken, f"{batch / least / report['chips']:.2f} samples", f"{usual:.2f} samples"]
    return [name, f"{least:.2f}", taken, f"{batch * report['new_tokens'] / least / report['chips']:.0f} tokens", ""]


def requirements(name: str) -> str:
    """What this machine lacks to compile a row: the name of the file to install, or nothing."""
    gpu = ROWS[name][ROWS[name].index("--topology") + 1] in GPUS.values()
    module, file = ("jax_cuda13_plugin", "requirements-gpu.txt") if gpu else ("libtpu", "requirements-tpu.txt")
    return "" if importlib.util.find_spec(module) else file


def main(names: list[str]) -> int:
    """Compiles the rows and writes the table; 1 where one does not fit, 2 where one cannot be compiled here."""
    unknown = [name for name in names if name not in ROWS]
    if unknown:
        print(f"error: {unknown[0]!r} is no row; name some of {'; '.join(ROWS)}.", file=sys.stderr)
        return 2
    lacking = {name: lacks for name in names or ROWS if (lacks := requirements(name))}
    for name, lacks in lacking.items():
        verdict = "error:" if names else "left out:"
        print(f"{verdict} {name!r} needs pip install -r {lacks}.", file=sys.stderr)
    if names and lacking:
        return 2
    here = [name for name in names or ROWS if name not in lacking]
    for name in here:
        print(f"{name} ...", flush=True)
        report = compiled(ROWS[name])
        reports = json.loads(REPORTS.read_text()) if REPORTS.is_file() else {}
        REPORTS.write_text(json.dumps({**reports, name: report}, indent=1) + "\n")
        print(" | ".join(cells(name, report)), flush=True)
        write()
    return int(any("error" in json.loads(REPORTS.read_text())[name] for name in here))


def write() -> None:
    """The tables of the kept reports, between the marks of both pages."""
    reports = json.loads(REPORTS.read_text()) if REPORTS.is_file() else {}
    rows = [HEAD, ["---"] * len(HEAD), *(cells(name, reports[name]) for name in ROWS if name in reports)]
    table = "".join(f"| {' | '.join(row)} |\n" for row in rows)
    if missing := [name for name in ROWS if name not in reports]:
        table += f"\nNot compiled yet: {'; '.join(missing)}.\n"
    fill(PAGE, MARKS, table)
    rows = [RATES_HEAD, ["---"] * len(RATES_HEAD)]
    rows += [rates(name, reports[name]) for name in ROWS if reports.get(name, {}).get("step") in ("train", "decode")]
    fill(SPEED, SPEED_MARKS, "".join(f"| {' | '.join(row)} |\n" for row in rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
