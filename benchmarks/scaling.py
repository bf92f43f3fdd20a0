"""The paper's claims against the number of training volumes, on drawn scans: tables and plots of docs/ablations.md.

    python -m benchmarks.scaling                                  # trains what is missing; then table and plot
    python -m benchmarks.scaling --study phantom                  # the same on the phantom, not on synthetic patients
    python -m benchmarks.scaling --volumes 50 --only base --seeds 0     # two trainings
    python -m benchmarks.scaling --volumes 50 --only base --seeds 0 --remake    # trains them again, beside what is kept
    python -m benchmarks.scaling --table                          # trains nothing

A cell is one question of `tghmoe_jax.ablate --question` at one number of volumes. The contrast of a claim whose gate is
met is asked more items. The answers of each training are kept in docs/ablations/STUDY, graded, one small file each;
what has a file there is not trained again. The runs lie in --workdir, where a stopped command resumes.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tghmoe_jax import writing
from tghmoe_jax.evaluation import paired_seeds, provenance
from tghmoe_jax.evaluation.paired_seeds import Graded, primary
from tghmoe_jax.evaluation.text_table import interval
from tghmoe_jax.reader import examination
from tghmoe_jax.samples.questions import FAMILIES, TYPES
from tghmoe_jax.sharding.mesh import simulate_devices
from tghmoe_jax.studies import ablate
from tghmoe_jax.studies.deciding import Experiment, answers, pairs
from tghmoe_jax.studies.decisions import QUESTIONS, USUAL, Arm
from tghmoe_jax.training import compile_cache, heap, run_folder

ROOT = Path(__file__).resolve().parent.parent
KEPT, PLOTS = ROOT / "docs" / "ablations", ROOT / "docs" / "images"
VOLUMES = (50, 200, 800, 3200)
SCALED = ("base", "slices", "experts")  # asked at every number of volumes
MORE = ("steps", "order", "tasks", "scan", "stages", "groups")  # at the largest alone
STEPS, ITEMS = 800, 400  # beside the defaults of configs/stage1.py, in every study
MORE_ITEMS = 2_000  # of a claim's contrast, which asks the closed questions alone: they alone are tested
LINES = {  # question -> the side that its line shows, and its colour; the first side is the same run for all
    "": ("the recipe (stage 1)", "#1f5fa8"), "base": ("random vision tower", "#d98c3f"),
    "slices": ("single slices", "#3b8f4f"), "experts": ("one dense FFN", "#7a4fa3"),
}  # fmt: skip

Cells = Mapping[tuple[int, str], Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class Study:
    """The same cells on one kind of drawn scans.

    `flags` are its config keys, `families` {name: question types} the columns of its table, and `ordered` the family
    whose answers need the slices in order.
    """

    name: str
    flags: Mapping[str, Any]
    seeds: tuple[int, ...]
    families: Mapping[str, tuple[str, ...]]
    ordered: str

    @property
    def kept(self) -> Path:
        return KEPT / self.name

    @property
    def plot(self) -> Path:
        return PLOTS / f"scaling-{self.name}.png"

    def fixed(self, volumes: int, items: int = ITEMS) -> dict[str, Any]:
        cell = {"data.name": self.name, "data.volumes": volumes, "train.steps": STEPS, "eval.items": items}
        return cell | dict(self.flags)

    def experiment(self, volumes: int, question: str, workdir: Path, items: int = ITEMS) -> Experiment:
        flags = [f"--config.{key}={value}" for key, value in self.fixed(volumes, items).items()]
        kinds = ("closed",) if items == MORE_ITEMS else ()
        return Experiment(question, "configs/stage1.py", workdir / str(volumes), tuple(flags), kinds)

    def file_of(self, volumes: int, arm: Arm, seed: int, items: int = ITEMS) -> Path:
        of = (str(volumes), arm.name, arm.shows, f"{items}_items" if items != ITEMS else "", f"seed{seed}")
        return self.kept / f"{'-'.join(filter(None, of))}.json"


STUDIES = {
    study.name: study
    for study in (
        Study("patients", {"data.text_length": 96}, (0, 1, 2), FAMILIES, "depth"),
        # Seeds 0 to 4 are those of the first table, by which this study was planned.
        Study("phantom", {}, (5, 6, 7), {type: (type,) for type in TYPES}, "location"),
    )
}


def cells() -> list[tuple[int, str]]:
    """(volumes, question) in the order in which they are run: the largest number first, since it says most."""
    return [(VOLUMES[-1], name) for name in (*SCALED, *MORE)] + [(n, q) for n in VOLUMES[-2::-1] for q in SCALED]


def ask(study: Study, cell: tuple[int, str], workdir: Path, seeds: Sequence[int], items: int, remake: bool) -> None:
    """All trainings of a cell, what is kept left out."""
    one = study.experiment(*cell, workdir, items)
    own, others = one.arms()
    for seed in seeds:
        for arm in (own, *others):
            train(study, one, cell[0], arm, seed, items, remake)


def train(study: Study, one: Experiment, volumes: int, arm: Arm, seed: int, items: int, remake: bool) -> None:
    """One training whose answers are kept, or with `remake` shown beside what is kept."""
    file = study.file_of(volumes, arm, seed, items)
    if file.is_file() and not remake:
        return
    one.run(arm, seed)
    found = answers(one, arm, seed)
    if file.is_file():
        known = kept(study, volumes, arm, seed, items)
        before = {kind: share(run, primary([*run.scores])) for kind, run in known.items()}
        for kind, run in found.items():
            print(f"{file.stem} {kind}: {share(run, primary([*run.scores])):.3f}, kept {before[kind]:.3f}", flush=True)
        return
    # Without paths of this machine: the command is told by the file's name, and a stage 1 by its folder's.
    by, config = provenance.made_by(), run_folder.flatten(one.config(arm, seed))
    config["init_from"] = Path(config["init_from"]).name
    made = {
        "config": config, "date": by["date"], "code": by["code"],
        "minutes": ablate.minutes_of(one.folder(arm, seed)),
    }  # fmt: skip
    slim = {
        kind: dataclasses.replace(run, scores={(name := primary([*run.scores])): run.scores[name]})
        for kind, run in found.items()
    }
    study.kept.mkdir(parents=True, exist_ok=True)
    record = {"made": made, "answers": {kind: run.to_json() for kind, run in slim.items()}}
    writing.write(file, json.dumps(record, separators=(",", ":")) + "\n")


def kept(study: Study, volumes: int, arm: Arm, seed: int, items: int = ITEMS) -> dict[str, Graded]:
    """What is kept of one training. ValueError where it was made by other settings than the study's."""
    file = study.file_of(volumes, arm, seed, items)
    record = json.loads(file.read_text())
    fixed = {key: value for key, value in study.fixed(volumes, items).items() if key not in arm.changes}
    if any(record["made"]["config"][key] != value for key, value in fixed.items()):
        raise ValueError(f"{file} was made by other settings; delete it.")
    return {kind: Graded.from_json(run) for kind, run in record["answers"].items()}


def share(run: Graded, score: str, types: tuple[str, ...] | None = None) -> float:
    """A score of all items, or of those of some question types."""
    rows = [i for i, type in enumerate(run.types) if types is None or type in types]
    top, bottom = run.scores[score][rows].sum(0)
    return float(top / bottom) if bottom else float("nan")


def found(study: Study, workdir: Path, most: int | None = None, items: int = ITEMS) -> Cells:
    """{cell: `paired_seeds.difference` of the seeds (at `most` so many) of which every training is kept, with their
    `runs` and `numbers`}, by files of so many items."""
    known = {}
    for volumes, name in cells():
        own, others = study.experiment(volumes, name, workdir).arms()
        arms = (own, *others)
        seeds = [s for s in study.seeds if all(study.file_of(volumes, arm, s, items).is_file() for arm in arms)]
        if seeds := seeds[:most]:
            every = ([kept(study, volumes, arm, seed, items) for arm in arms] for seed in seeds)
            runs = [(first, list(zip(others, rest, strict=True))) for first, *rest in every]
            known[volumes, name] = paired_seeds.difference([pairs(*run) for run in runs]) | {
                "runs": runs, "numbers": seeds,
            }  # fmt: skip
    return known


def table(study: Study, known: Cells) -> str:
    """A row a cell: the primary score, which is ranked accuracy; its families; then the mean of all kinds."""
    lines = [
        "| volumes | question | seeds | ranked accuracy of the sides | difference | p | "
        f"{' | '.join(study.families)} | all kinds |",
        "|---" * (7 + len(study.families)) + "|",
    ]
    for (volumes, name), cell in sorted(known.items()):
        one = cell["kinds"].get("closed", cell)
        sides = f"{QUESTIONS[name].sides[0]} {one['first']:.3f}, {QUESTIONS[name].sides[1]} {one['second']:.3f}"
        differ = [f"{of['difference']:+.3f} {interval(of['ci95'], '+')}".strip() for of in (one, cell)]
        families = [f"{gap:+.3f}" for gap in by_family(study, cell)]
        p = "-" if one["p"] is None else f"{one['p']:.3f}"
        lines.append(
            f"| {volumes} | `{name}` | {len(one['seeds'])} | {sides} | {differ[0]} | {p} | {' | '.join(families)} | "
            f"{differ[1]} |"
        )
    return "\n".join(lines)


def by_family(study: Study, cell: Mapping[str, Any]) -> list[float]:
    """The difference of ranked accuracy in each family of closed questions, the mean of the seeds."""
    both = [pairs(*run)["closed"] for run in cell["runs"]]
    return [
        float(np.mean([share(b, "ranked_accuracy", types) - share(a, "ranked_accuracy", types) for a, b in both]))
        for types in study.families.values()
    ]


@dataclasses.dataclass(frozen=True)
class Claim:
    """A claim of the paper: the cell that tests it, and its gate, by the plan.

    `gate` is what `measured` gives, of the cells `of`: it must be at least `bound` (or, with `below`, less than it).
    """

    says: str
    contrast: tuple[int, str]
    gate: str
    of: tuple[tuple[int, str], ...]
    measured: Callable[[Study, Cells], float | None]
    bound: float
    below: bool = False

    def number(self, study: Study, known: Cells, first: Cells) -> float | None:
        """What the gate measures: with the first seed, where that alone misses it; else with all seeds, if it has them.

        first: the cells with their first seed alone.
        """
        number = self.measured(study, first)
        if not self.passes(number):
            return number
        whole = all(len(known[cell]["numbers"]) == len(study.seeds) for cell in self.of)
        return self.measured(study, known) if whole else None

    def passes(self, number: float | None) -> bool:
        return number is not None and (number < self.bound if self.below else number >= self.bound)


def gap(known: Cells, cell: tuple[int, str]) -> float | None:
    """The second side's ranked accuracy minus the first one's."""
    return known[cell]["kinds"]["closed"]["difference"] if cell in known else None


def scarcity(study: Study, known: Cells) -> float | None:
    ends = [known.get((volumes, "base")) for volumes in (VOLUMES[0], VOLUMES[-1])]
    if None in ends:
        return None
    both = {*ends[0]["numbers"]} & {*ends[1]["numbers"]}
    few, many = (np.mean([of_seed(cell, seed)[1] for seed in both]) for cell in ends)
    return float(many - few)


def of_seed(cell: Mapping[str, Any], seed: int) -> tuple[float, float]:
    """The ranked accuracy of both sides with one seed."""
    return tuple(share(run, "ranked_accuracy") for run in pairs(*cell["runs"][cell["numbers"].index(seed)])["closed"])


def cost_of_disorder(study: Study, known: Cells) -> float | None:
    cell = known.get((VOLUMES[-1], "order"))
    return -by_family(study, cell)[[*study.families].index(study.ordered)] if cell else None


def above_guessing(study: Study, known: Cells) -> float | None:
    cell = known.get((VOLUMES[-1], "experts"))
    return cell["kinds"]["closed"]["first"] - guessing(study) if cell else None


def guessing(study: Study) -> float:
    """What guessing scores in the closed questions: the mean of 1 / choices."""
    one = study.experiment(VOLUMES[-1], "experts", ROOT)
    e = one.config(Arm(USUAL), 0).eval
    asked = examination.questions(one.validation, "closed", e["items"], e.seed, ())
    return float(np.mean([1 / len(question.choices) for _, question in asked]))


CLAIMS = (
    Claim("the 2D weights are worth keeping", (200, "base"),
          "a random tower gains from 50 to 3,200 volumes", ((VOLUMES[0], "base"), (VOLUMES[-1], "base")), scarcity,
          0.10),
    Claim("3D attention above, 2D below", (VOLUMES[-1], "slices"),
          "slices in random order cost the questions that need it", ((VOLUMES[-1], "order"),), cost_of_disorder, 0.10),
    Claim("token experts and task experts", (VOLUMES[-1], "experts"),
          "the recipe is above guessing", ((VOLUMES[-1], "experts"),), above_guessing, 0.10),
    Claim("the prompt should pick the group", (VOLUMES[-1], "groups"),
          "a model for each task gains", ((VOLUMES[-1], "tasks"),),
          lambda study, known: gap(known, (VOLUMES[-1], "tasks")), 0.03),
    Claim("two stages beat one", (VOLUMES[-1], "stages"),
          "twice the steps gain less", ((VOLUMES[-1], "steps"),),
          lambda study, known: gap(known, (VOLUMES[-1], "steps")), 0.02, below=True),
)  # fmt: skip


def verdicts(numbers: Mapping[Claim, float | None], contrasts: Cells) -> str:
    """A row a claim: its gate, its contrast and how it ends, by the rules of docs/ablations.md.

    numbers: what the gate of each claim measures.
    """
    tested = {
        cell: one
        for cell in (claim.contrast for claim, number in numbers.items() if claim.passes(number))
        if cell in contrasts and len((one := contrasts[cell]["kinds"]["closed"])["seeds"]) >= paired_seeds.LEAST_SEEDS
    }
    passed, level = set(), len(CLAIMS)  # Holm: the smallest p value against 0.05 / 5, the next against 0.05 / 4, ...
    for cell, one in sorted(tested.items(), key=lambda item: item[1]["p"]):
        if one["p"] > 0.05 / level:
            break
        passed.add(cell)
        level -= 1
    heads = ["claim", "gate", "bound", "measured", f"contrast, {MORE_ITEMS:,} items", "difference", "p", "here"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for claim, number in numbers.items():
        cell, differs, p = claim.contrast, "-", "-"
        if one := tested.get(cell):
            differs = f"{one['difference']:+.3f} {interval(one['ci95'], '+')}".strip()
            p = f"{one['p']:.3f}"
        ends = ending(claim, number, tested.get(cell), cell in passed)
        bound = f"{'< ' if claim.below else ''}{claim.bound:.2f}"
        asked = f"`{cell[1]}` at {cell[0]:,}"
        shown = "-" if number is None else f"{number:+.3f}"
        lines.append(f"| {claim.says} | {claim.gate} | {bound} | {shown} | {asked} | {differs} | {p} | {ends} |")
    return "\n".join(lines)


def ending(claim: Claim, number: float | None, one: Mapping[str, Any] | None, passed: bool) -> str:
    """How a claim ends: `number` is its gate's, `one` its contrast, and `passed` what Holm's rule says of it."""
    if number is None:
        return "not measured yet"
    if not claim.passes(number):
        return "**untestable here**: the gate failed"
    if one is None:
        return "not tested yet"
    low, high = one["ci95"]
    if passed and abs(one["difference"]) >= ablate.EFFECT:
        return "**holds**" if one["difference"] < 0 else "**fails**"
    return "**no difference that counts**" if -ablate.EFFECT < low and high < ablate.EFFECT else "**not shown**"


def plot(study: Study, known: Cells, file: Path) -> None:
    """Ranked accuracy of closed questions against the number of volumes, with the first seed, which most cells have
    alone; bars: 95 % of the choice of items."""
    from matplotlib.figure import Figure  # slow to import, and wanted here alone

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for place, (name, (label, colour)) in enumerate(LINES.items()):
        first = study.seeds[0]
        of = {v: c for (v, q), c in sorted(known.items()) if q == (name or SCALED[0]) and first in c["numbers"]}
        if of:
            scores = np.array([of_seed(cell, first)[bool(name)] for cell in of.values()])
            items = np.array([len(pairs(*cell["runs"][0])["closed"][0].types) for cell in of.values()])
            half = 1.96 * np.sqrt(scores * (1 - scores) / items)
            beside = np.array([*of]) * 1.05**place  # so that bars can be told apart
            axes.errorbar(beside, scores, half, fmt="o-", capsize=3, color=colour, label=label)
    axes.axhline(guessing(study), color="#888888", linestyle="--", label="guessing")
    axes.set(xscale="log", ylim=(0, 1), xlabel="training volumes", ylabel="ranked accuracy of closed questions")
    axes.set_xticks(VOLUMES, [f"{v:,}" for v in VOLUMES])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, loc="upper left")
    figure.savefig(file, dpi=150)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=__doc__.split("\n")[0])
    asked = (*SCALED, *MORE)
    parser.add_argument("--volumes", type=int, nargs="+", default=VOLUMES, choices=VOLUMES, help="only so many volumes")
    parser.add_argument("--only", nargs="+", default=asked, choices=asked, help="only these questions")
    parser.add_argument("--study", default="patients", choices=STUDIES, help="the scans; default patients")
    parser.add_argument("--seeds", type=int, nargs="+", help="only these seeds")
    parser.add_argument("--workdir", type=Path, default=Path("runs/scaling"), help="folder of the runs")
    parser.add_argument("--remake", action="store_true", help="train what is kept too, and print both scores")
    parser.add_argument("--table", action="store_true", help="train nothing")
    args = parser.parse_args(argv)
    study = STUDIES[args.study]
    if unknown := {*(args.seeds or ())} - {*study.seeds}:
        parser.error(f"the study {study.name} has the seeds {study.seeds} and not {unknown}")
    wanted = [(v, q) for v, q in cells() if v in args.volumes and q in args.only]
    if not wanted:
        parser.error(f"{', '.join(args.only)}: asked at {VOLUMES[-1]} volumes alone")
    if not args.table:
        simulate_devices()
        compile_cache.keep()
    seeds = args.seeds or study.seeds
    for cell in wanted if not args.table else ():
        ask(study, cell, args.workdir, seeds, ITEMS, args.remake)
    known, first = found(study, args.workdir), found(study, args.workdir, most=1)
    gates = {claim: claim.number(study, known, first) for claim in CLAIMS}
    for claim, number in gates.items() if not args.table else ():
        if claim.passes(number) and claim.contrast in wanted:
            ask(study, claim.contrast, args.workdir, seeds, MORE_ITEMS, args.remake)
    print(f"files of answers that are kept: {len(list(study.kept.glob('*-seed*.json')))}")
    if known:
        contrasts = found(study, args.workdir, items=MORE_ITEMS)
        said = f"{table(study, known)}\n\n{verdicts(gates, contrasts)}"
        writing.write(study.kept / "table.md", said + "\n")
        plot(study, known, study.plot)
        print(said)
    return 0


if __name__ == "__main__":
    heap.keep_freed_memory()
    sys.exit(main())
