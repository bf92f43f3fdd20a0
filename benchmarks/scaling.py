"""The paper's claims against the number of training volumes, on drawn patients: table and plot of docs/ablations.md.

    python -m benchmarks.scaling                        # trains what is missing; then table and plot
    python -m benchmarks.scaling --volumes 50 --only base    # one cell: six trainings
    python -m benchmarks.scaling --table                # trains nothing

A cell is one question of `tghmoe_jax.ablate --question` at one number of volumes. What it found is kept in
docs/ablations/patients, one small file each; a cell with a file there is not run again. The runs lie in --workdir,
where a stopped command resumes.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tghmoe_jax import ablate, writing
from tghmoe_jax.evaluation.text_table import interval
from tghmoe_jax.studies.decisions import QUESTIONS

ROOT = Path(__file__).resolve().parent.parent
KEPT = ROOT / "docs" / "ablations" / "patients"
PLOT = ROOT / "docs" / "images" / "scaling.png"
VOLUMES = (50, 200, 800, 3200)
SCALED = ("base", "slices", "experts")  # asked at every number of volumes
MORE = ("tasks", "order", "scan")  # at the largest alone
SEEDS = 3
# What the examination fixes beside the defaults of configs/stage1.py.
FLAGS = {"data.name": "patients", "data.text_length": 96, "train.steps": 800, "eval.items": 400}
LINES = {  # question -> the side that its line shows, and its colour; the first side is the same run for all
    "": ("the recipe (stage 1)", "#1f5fa8"), "base": ("random vision tower", "#d98c3f"),
    "slices": ("single slices", "#3b8f4f"), "experts": ("one dense FFN", "#7a4fa3"),
}  # fmt: skip

Cells = Mapping[tuple[int, str], Mapping[str, Any]]


def cells() -> list[tuple[int, str]]:
    """(volumes, question) in the order in which they are run: the largest number first, since it says most."""
    return [(VOLUMES[-1], name) for name in (*SCALED, *MORE)] + [(n, q) for n in VOLUMES[-2::-1] for q in SCALED]


def file_of(volumes: int, question: str) -> Path:
    return KEPT / f"{volumes}-{question}.json"


def run(volumes: int, question: str, workdir: Path) -> None:
    """Trains and asks one cell, and keeps what it found."""
    flags = [f"--config.{key}={value}" for key, value in (FLAGS | {"data.volumes": volumes}).items()]
    folder = workdir / str(volumes)
    argv = ["--config=configs/stage1.py", f"--question={question}", f"--seeds={SEEDS}", f"--workdir={folder}", *flags]
    if code := ablate.main(argv):
        sys.exit(code)
    KEPT.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(folder / f"{question}.json", file_of(volumes, question))


def found() -> Cells:
    """The kept cells. ValueError for one that was made by other settings than FLAGS and SEEDS."""
    known = {cell: json.loads(file.read_text()) for cell in cells() if (file := file_of(*cell)).is_file()}
    for (volumes, name), cell in known.items():
        fixed = FLAGS | {"data.volumes": volumes}
        if len(cell["seeds"]) != SEEDS or any(cell["made"]["config"][key] != value for key, value in fixed.items()):
            raise ValueError(f"{file_of(volumes, name)} was made by other settings; delete it.")
    return known


def table(known: Cells) -> str:
    """A row a cell: the primary score, which is ranked accuracy; then the mean of all kinds and its verdict."""
    lines = [
        "| volumes | question | ranked accuracy of the sides | difference | p | all kinds | their verdict |",
        "|---|---|---|---|---|---|---|",
    ]
    for (volumes, name), cell in sorted(known.items()):
        one = cell["kinds"]["closed"]
        sides = f"{QUESTIONS[name].sides[0]} {one['first']:.3f}, {QUESTIONS[name].sides[1]} {one['second']:.3f}"
        differ = [f"{of['difference']:+.3f} {interval(of['ci95'], '+')}" for of in (one, cell)]
        said = next((word for word in ("first", "second", "equal") if cell["verdict"].endswith(
            getattr(QUESTIONS[name], word))), "")  # fmt: skip
        words = {"first": f"{QUESTIONS[name].sides[0]} better", "second": f"{QUESTIONS[name].sides[1]} better",
                 "equal": "no difference that counts", "": "undecided"}  # fmt: skip
        lines.append(f"| {volumes} | `{name}` | {sides} | {differ[0]} | {one['p']:.3f} | {differ[1]} | {words[said]} |")
    return "\n".join(lines)


def plot(known: Cells, file: Path) -> None:
    """Ranked accuracy of closed questions against the number of volumes, the mean of the seeds."""
    from matplotlib.figure import Figure  # slow to import, and wanted here alone

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for name, (label, colour) in LINES.items():
        of = {v: cell["kinds"]["closed"] for (v, q), cell in sorted(known.items()) if q == (name or SCALED[0])}
        if of:
            axes.plot(
                [*of], [one["second" if name else "first"] for one in of.values()], "o-", color=colour, label=label
            )
    axes.set(xscale="log", xlabel="training volumes", ylabel="ranked accuracy of closed questions")
    axes.set_xticks(VOLUMES, [f"{v:,}" for v in VOLUMES])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(file, dpi=150)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=__doc__.split("\n")[0])
    parser.add_argument("--volumes", type=int, choices=VOLUMES, help="only this number of training volumes")
    parser.add_argument("--only", choices=(*SCALED, *MORE), help="only this question")
    parser.add_argument("--workdir", type=Path, default=Path("runs/scaling"), help="folder of the runs")
    parser.add_argument("--table", action="store_true", help="train nothing")
    args = parser.parse_args(argv)
    wanted = [(v, q) for v, q in cells() if args.volumes in (None, v) and args.only in (None, q)]
    if not wanted:
        parser.error(f"{args.only} is asked at {VOLUMES[-1]} volumes alone")
    for volumes, question in wanted:
        if not args.table and not file_of(volumes, question).is_file():
            run(volumes, question, args.workdir)
    if known := found():
        writing.write(KEPT / "table.md", table(known) + "\n")
        plot(known, PLOT)
        print(table(known))
    return 0


if __name__ == "__main__":
    sys.exit(main())
