"""Trains and scores the rows of configs/ablations.py and tabulates them against the full recipe.

Rows whose stage 1 is the same share its run. What the table is made from is kept in <workdir>/results, one small file a
row and seed: a row with a result there no longer needs its runs. Axis legend: S seeds, N items.
"""

import dataclasses
import json
import runpy
import statistics as plain
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import traverse_util
from ml_collections import ConfigDict

from tghmoe_jax import evaluate, train, writing
from tghmoe_jax.datasets.sources import DRAWN
from tghmoe_jax.errors import UserError
from tghmoe_jax.evaluation import comparison, files, outputs, paired_seeds, statistics, text_table
from tghmoe_jax.models.config import current
from tghmoe_jax.training import reporting, run_folder
from tghmoe_jax.training.command_line import experiment, parse

# The two scores that are read; `score`, what a claim is judged by, is their mean (docs/ablations.md).
SCORES = {"closed": ("closed", "accuracy_strict"), "finding_f1": ("report", "finding_f1")}
EFFECT = 0.02  # of `score`: a smaller difference does not count (fixed in docs/ablations.md before the runs)
# What may differ between a result's config and the one asked for: paths, and keys that change no score.
_MAY_CHANGE = (
    "train.bad_steps", "init_from", "data.workers", "checkpoint.", "eval.batch", "eval.controls",
    "eval.calibration", "eval.best", "eval.patience", "mesh.",
)  # fmt: skip
WRONG_GROUP = "guidance=wrong"  # not trained: the full recipe, asked with the other task's experts


# ---- runs ------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Ablation:
    """Rows of a config file ({name: configs.ablations.Row}), where their runs lie, and the command line's changes."""

    file: Path
    rows: dict[str, Any]
    workdir: Path
    flags: tuple[str, ...] = ()

    @classmethod
    def of(cls, file: str, workdir: str | Path, flags: Sequence[str] = ()) -> "Ablation":
        """UserError without such a file or its rows."""
        file = experiment(file)
        rows = runpy.run_path(file).get("ROWS")
        if not rows:
            raise UserError(f"--config {file} has no ROWS; name a file like configs/ablations.py.")
        return cls(Path(file), rows, Path(workdir), tuple(flags))

    def resolve(self, row: str, stage: int, seed: int) -> ConfigDict:
        """The config of one stage of one row. UserError for an unknown flag."""
        return parse(["ablate", f"--config={self.file}:{row},stage={stage},seed={seed}", *self.flags])[0]

    def first_run(self, row: str, seed: int) -> Path:
        """The folder of a row's first stage: that of the first row of the table whose first stage is the same."""
        wanted = run_folder.flatten(self.resolve(row, 1, seed))
        owner = next(other for other in self.rows if run_folder.flatten(self.resolve(other, 1, seed)) == wanted)
        return self.workdir / f"{owner}-stage1-seed{seed}"

    def last_run(self, row: str, seed: int) -> Path:
        """The folder of the row's last stage, which is scored."""
        two = self.rows[row].last_stage == 2
        return self.workdir / f"{row}-stage2-seed{seed}" if two else self.first_run(row, seed)

    def result_file(self, row: str, seed: int) -> Path:
        return self.workdir / "results" / f"{row}-seed{seed}.json"

    def result(self, row: str, seed: int) -> dict | None:
        """What `result_of` kept of the row, once it has been asked. UserError where it was made by another config."""
        file = self.result_file(row, seed)
        if not file.is_file():
            return None
        result = json.loads(file.read_text())
        old, new = result.get("config"), run_folder.flatten(self.resolve(row, self.rows[row].last_stage, seed))
        if old is None:
            raise UserError(f"{file} does not name the config it was made with; delete it and run the command again.")
        free = (*_MAY_CHANGE, "data.root") if new["data.name"] in DRAWN else _MAY_CHANGE
        old = traverse_util.unflatten_dict(old, sep=".")  # a result of an earlier version may hold keys that have gone
        old = run_folder.flatten(old | {"model": current(old["model"])})
        if differ := run_folder.differing(old, new, free):
            raise UserError(
                f"{file} was made with another config, which differs in {', '.join(differ[:5])}"
                f"{', ...' if len(differ) > 5 else ''}; choose another --workdir or delete that file."
            )
        return result

    def run(self, row: str, seed: int) -> None:
        """Trains what a row still lacks, asks its last stage the test questions and keeps the result."""
        file = self.result_file(row, seed)
        if self.result(row, seed):
            return
        first, last = self.first_run(row, seed), self.last_run(row, seed)
        train_stage(self.resolve(row, 1, seed), first)
        if last != first:
            config = self.resolve(row, 2, seed)
            config.init_from = str(first)
            train_stage(config, last)
        if not list(last.glob("eval/*/metrics.json")):
            evaluate.run_again(str(last), None, str(last))
        file.parent.mkdir(parents=True, exist_ok=True)
        config = run_folder.flatten(self.resolve(row, self.rows[row].last_stage, seed))
        writing.write(file, json.dumps(result_of(first, last) | {"config": config}, separators=(",", ":")) + "\n")
        jax.clear_caches()


def train_stage(config: ConfigDict, folder: Path) -> None:
    """Trains a run, or the rest of it. Programs of one run are of no use to the next."""
    if not (folder / "checkpoints" / str(config.train.steps)).is_dir():
        print(f"\n==== {folder}", flush=True)
        if code := train.run(config, str(folder)):
            sys.exit(code)  # SIGTERM; the same command resumes
        jax.clear_caches()


# ---- results ---------------------------------------------------------------------------------------------------------


def result_of(first: Path, last: Path) -> dict:
    """All that the table needs of one row and seed, from the folders of its first and last stage.

    metrics: the evaluation's; items {score: [numerators, denominators, number of each item's unit]}; what the manifest
    of the last stage says of its code, seeds and sizes; minutes: all training steps of both stages at their median.
    """
    (file,) = last.glob("eval/*/metrics.json")
    run = files.read_run(file.parent)
    items = {}
    for name, (kind, column) in SCORES.items():
        top, bottom = comparison.columns(kind, run[kind], judged=True)[column]  # counts, both of them
        number: dict[Any, int] = {}
        units = [number.setdefault(one.unit, len(number)) for one in run[kind]]
        items[name] = [top.astype(int).tolist(), bottom.astype(int).tolist(), units]
    manifest = run_folder.read_manifest(last)
    return {
        "metrics": json.loads(file.read_text()), "items": items,
        "manifest": {key: manifest.get(key) for key in ("git", "seeds", "base", "devices", "parameters")},
        "minutes": sum(minutes_of(folder) for folder in dict.fromkeys([first, last])),
    }  # fmt: skip


def minutes_of(run: Path) -> float:
    """All training steps of a run at their median."""
    steps = [one["timing"]["step_seconds"] for one in reporting.read_metrics(run / "metrics.jsonl")]
    return plain.median(steps) * len(steps) / 60


def values_of(result: dict, wrong_group: bool = False) -> dict[str, float | None]:
    """{score: value} of one result, or of its questions asked with the other task's experts (None: not asked)."""
    keys = {name: "/".join(place) for name, place in SCORES.items()}
    if wrong_group:
        keys = {"closed": "control/wrong_group_closed_accuracy_strict", "finding_f1": "control/wrong_group_finding_f1"}
    values = {name: result["metrics"][key] for name, key in keys.items()}
    return values | {"score": None if None in values.values() else plain.mean(values.values())}


# ---- the table -------------------------------------------------------------------------------------------------------


def summary(table: Ablation, rows: Sequence[str], seeds: int | None) -> list[dict]:
    """One record a row that has finished for a seed: scores over seeds and items, and its difference from `full`."""
    done = {}
    for row in dict.fromkeys(["full", *rows]):
        found = {seed: table.result(row, seed) for seed in range(seeds or table.rows[row].seeds)}
        done[row] = {seed: result for seed, result in found.items() if result}
    reference = {seed: values_of(result) for seed, result in done["full"].items()}
    names = [row for row in done if done[row]]
    if reference and all(None not in values_of(one, True).values() for one in done["full"].values()):
        names.insert(1, WRONG_GROUP)
    return [record(table, name, done["full" if name == WRONG_GROUP else name], reference) for name in names]


def record(table: Ablation, name: str, results: dict[int, dict], reference: dict[int, dict]) -> dict:
    """The numbers of one row of the table; results {seed: result}, reference {seed: scores of the full recipe}."""
    wrong = name == WRONG_GROUP
    values = {seed: values_of(result, wrong) for seed, result in results.items()}
    row = {
        "row": name, "seeds": sorted(values),
        "what": "the full recipe asked with the other task's experts" if wrong else table.rows[name].what,
        **{key: plain.mean(one[key] for one in values.values()) for key in (*SCORES, "score")},
    }  # fmt: skip
    if not wrong:
        for key in SCORES:
            top, bottom, units = zip(*(result["items"][key] for result in results.values()), strict=True)
            row[f"{key}_ci95"] = statistics.nested_ci95(np.array(top), np.array(bottom), units[0])
        one = results[min(results)]
        row |= {"parameters": one["manifest"]["parameters"], "minutes": one["minutes"]}
    if name != "full":
        pairs = [{key: values[s][key] - reference[s][key] for key in values[s]} for s in values if s in reference]
        for key in (*SCORES, "score") if pairs else ():
            row[f"{key}_difference"] = plain.mean(one[key] for one in pairs)
            row[f"{key}_difference_ci95"] = statistics.student_ci95([one[key] for one in pairs])
        planned = table.rows["full" if wrong else name].seeds
        if len(pairs) >= max(planned, paired_seeds.LEAST_SEEDS):  # only when all seeds are there: no early stop
            row["verdict"] = verdict(row["score_difference"], row["score_difference_ci95"])
    return row


def verdict(difference: float, interval: tuple[float, float]) -> str:
    """What a row's score minus the full recipe's says, by the rule of docs/ablations.md."""
    low, high = interval
    if high < 0 and difference <= -EFFECT:
        return "full better"
    if low > 0:
        return "row better"
    return "none that counts" if -EFFECT < low and high < EFFECT else "not shown"


def markdown(records: Sequence[dict]) -> str:
    """The table for people; a difference is the row's minus the full recipe's, over the seeds that both have."""
    lines = [
        "| row | what differs | seeds | closed | finding F1 | score - full's | verdict | M parameters, active "
        "| minutes |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for one in records:
        shown = [f"{one[key]:.3f} {text_table.interval(one.get(f'{key}_ci95'))}".rstrip() for key in SCORES]
        difference = ""
        if "score_difference" in one:
            low_high = text_table.interval(one["score_difference_ci95"], "+")
            difference = f"{one['score_difference']:+.3f} {low_high}".rstrip()
        size = one.get("parameters")
        sizes = f"{size['total'] / 1e6:.2f}, {size['active'] / 1e6:.2f}" if size else ""
        minutes = f"{one['minutes']:.1f}" if "minutes" in one else ""
        lines.append(
            f"| `{one['row']}` | {one['what']} | {len(one['seeds'])} | {' | '.join(shown)} | {difference} | "
            f"{one.get('verdict', '')} | {sizes} | {minutes} |"
        )
    return "\n".join(lines)


def write_table(table: Ablation, rows: Sequence[str], seeds: int | None) -> None:
    records = summary(table, rows, seeds)
    outputs.write_json(table.workdir / "table.json", records)
    writing.write(table.workdir / "table.md", markdown(records) + "\n")
    print(markdown(records), flush=True)
