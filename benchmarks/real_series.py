"""A reader asked about two real labelled series: crops and re-slicings, with the blind and the shuffled control.

    python -m benchmarks.real_series ROOT [--run embedded] [--parts 60] [--items 300] [--to runs/real-series]

ROOT holds the two labelled example series of TotalSegmentator under the names of SERIES; `--index FILE` names other
scans and masks below it (docs/data-sets.md, labelmap). What is asked is prepared by `tghmoe_jax.prepare` and scored by
`tghmoe_jax.main --config configs/evaluate.py`, so this file holds no rule of its own; it prints a table of
docs/results.md.

A sanity check of the path from a file to an answer and no benchmark: parts of one scan are not independent, so the
intervals draw whole scans. Of two scans that interval is their own two scores, and says nothing of a third.
"""

import argparse
import csv
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from tghmoe_jax import evaluate, prepare
from tghmoe_jax.evaluation import DISCLAIMER, comparison, files
from tghmoe_jax.evaluation.closed import contains_letter
from tghmoe_jax.evaluation.protocols import Prediction
from tghmoe_jax.training.command_line import parse

SERIES = (
    ("dicom_abdomen", "dicom_abdomen_labels.nii.gz"),
    ("abdomen_slab_3mm.nii.gz", "abdomen_slab_3mm_labels.nii.gz"),
)
CONTROLS = ("shuffled", "blind", "wrong_group")
SIZES = ("--config.data.slices=16", "--config.data.size=64")  # of the embedded reader


def index(parts: int) -> str:
    """The index of SERIES: each scan a case of its own, all of it a test."""
    return json.dumps(
        [
            {
                "volume": volume,
                "mask": mask,
                "labels": "label_names.json",
                "case": volume,
                "split": "test",
                "parts": parts,
            }
            for volume, mask in SERIES
        ]
    )


def markdown(folder: Path) -> str:
    """The scores of `folder`, each beside its controls and what guessing among the choices gives."""
    metrics = json.loads((folder / "metrics.json").read_text())
    with open(folder / "predictions_closed.csv", encoding="utf-8", newline="") as lines:
        controls = [{name: row.get(f"Control {name}") for name in CONTROLS} for row in csv.DictReader(lines)]
    asked = files.read_run(folder)
    closed = list(zip(asked["closed"], controls, strict=True))
    count = f"{len(closed)} closed, {len(asked['open'])} open, {len(asked['report'])} reports"
    scans = len({one.unit for one, _ in closed})
    lines = [
        f"| {count}; {scans} scans | score | ranked | {' | '.join(CONTROLS)} | guessing |",
        "|---" * (4 + len(CONTROLS)) + "|",
    ]
    for name in ("", *dict.fromkeys(one.type for one, _ in closed)):
        own = [(one, text) for one, text in closed if name in ("", one.type)]
        beside = [score(metrics, f"control/{c}_closed_accuracy") for c in CONTROLS]
        if name:
            beside = [said(own, c) for c in CONTROLS]
        ranked = comparison.columns("closed", [one for one, _ in own], judged=True)["ranked_accuracy"]
        guess = np.mean([1 / len(one.choices) for one, _ in own])
        key = f"closed/by_type/{name}" if name else "closed/accuracy"
        cells = [score(metrics, key), f"{ranked[0].sum() / ranked[1].sum():.3f}", *beside, f"{guess:.3f}"]
        lines.append(f"| `{key}` ({len(own)}) | {' | '.join(cells)} |")
    for key in ("closed/ranked_accuracy", "open/bleu1", "report/bleu1"):
        lines.append(f"| `{key}` | {score(metrics, key)} |" + " - |" * (2 + len(CONTROLS)))
    return "\n".join([*lines, "", DISCLAIMER])


def said(own: Sequence[tuple[Prediction, Mapping[str, str | None]]], control: str) -> str:
    """The accuracy of some questions under a control; a model with one group of experts has no wrong one."""
    texts = [text[control] for _, text in own]
    if None in texts:
        return "-"
    return f"{np.mean([contains_letter(text, one.letter) for (one, _), text in zip(own, texts, strict=True)]):.3f}"


def score(metrics: Mapping[str, object], key: str) -> str:
    """The value with its interval, where there are any."""
    value, pair = metrics[key], metrics[f"{key}_ci95"]
    return ("-" if value is None else f"{value:.3f}") + (f" [{pair[0]:.3f}, {pair[1]:.3f}]" if pair else "")


def run(argv: Sequence[str] | None = None) -> int:
    """Prepares, asks and prints; returns the exit code of the command that failed, or 0."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("root", type=Path, help="folder of the scans and masks")
    parser.add_argument("--index", type=Path, help="index of scans and masks; default the two series of SERIES")
    parser.add_argument("--run", default="embedded", help="whose answers; default the embedded reader")
    parser.add_argument("--parts", type=int, default=60, help="crops and re-slicings of each series of SERIES")
    parser.add_argument("--items", type=int, default=300, help="most questions of a kind")
    parser.add_argument("--to", type=Path, default=Path("runs/real-series"))
    args = parser.parse_args(argv)
    args.to.mkdir(parents=True, exist_ok=True)
    manifest = args.index or args.to / "index.json"
    if not args.index:
        manifest.write_text(index(args.parts) + "\n")
    data = (
        "--config.data.name=labelmap",
        f"--config.data.root={args.root}",
        f"--config.data.manifest={manifest.resolve()}",
    )
    prepared = args.to / "prepared"
    code = prepare.main(["--config", "configs/data_manifest.py", *data, *SIZES, "--to", str(prepared)])
    if code:
        return code
    config, _ = parse(
        [
            "real_series", "--config=configs/evaluate.py", f"--config.init_from={args.run}",
            "--config.data.name=labelmap", f"--config.data.root={prepared}", f"--config.eval.items={args.items}",
        ]
    )  # fmt: skip
    evaluate.run(config, args.to)
    latest = max((args.to / "eval").glob("*/metrics.json"), key=lambda file: file.stat().st_mtime)
    print("\n" + markdown(latest.parent))
    return 0


if __name__ == "__main__":
    sys.exit(run())
