"""A reader asked about real example series: crops and re-slicings, with the blind and the shuffled control.

    python -m benchmarks.real_series ROOT [--run embedded] [--parts 60] [--items 300] [--to runs/real-series]
    python -m benchmarks.real_series ROOT --run runs/patients --section --items 400 --to runs/real-sections

ROOT holds the example series of TotalSegmentator. The first command asks what the masks of the two labelled ones
answer; `--index FILE` names other scans and masks below ROOT (docs/data-sets.md, labelmap). The second asks which
section of the body crops of two scans show, as the text of `--config.data.name=patients` does. What is asked is
prepared by `tghmoe_jax.prepare` and scored by `tghmoe_jax.main --config configs/evaluate.py`; this file holds no other
rule than REGIONS, and prints a table of docs/results.md.

A sanity check of the path from a file to an answer and no benchmark. An interval by scans draws whole scans: of two
scans it is their own two scores, and says nothing of a third. An interval by parts draws the parts as if they were
independent, which parts of one scan are not: it says what the choice of parts changes, and nothing of other patients.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import nibabel
import numpy as np

from tghmoe_jax import evaluate, prepare
from tghmoe_jax.datasets.parts import draw_parts
from tghmoe_jax.drawn.patient_text import WORDINGS
from tghmoe_jax.drawn.phantom_lesions import SECTIONS
from tghmoe_jax.drawn.sample import nifti
from tghmoe_jax.errors import command, run_command
from tghmoe_jax.evaluation import DISCLAIMER, comparison, files
from tghmoe_jax.evaluation.closed import contains_letter
from tghmoe_jax.evaluation.protocols import Prediction
from tghmoe_jax.evaluation.statistics import ratio_ci95
from tghmoe_jax.evaluation.text_table import interval
from tghmoe_jax.scans.reading import read_volume
from tghmoe_jax.training.command_line import parse

SERIES = (
    ("dicom_abdomen", "dicom_abdomen_labels.nii.gz"),
    ("abdomen_slab_3mm.nii.gz", "abdomen_slab_3mm_labels.nii.gz"),
)
# (series, first and end slice counted from the feet, what the middle of any part of them shows), by looking at them:
# abdomen_pelvis is the pelvis up to the iliac crests, and the abdomen above them. What lies between is left out. The
# slab is no third scan: it is a part of abdomen_pelvis.
REGIONS = (
    ("abdomen_pelvis_3mm.nii.gz", 0, 45, "pelvis"),
    ("abdomen_pelvis_3mm.nii.gz", 60, 112, "abdomen"),
    ("dicom_abdomen", 0, 20, "abdomen"),
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


def crops(root: Path, to: Path, items: int) -> str:
    """A manifest of `items` questions about crops of REGIONS, each answer as often; the crops go to `to`.

    A crop has four to ten tenths of each axis, and 16 voxels at least. Its slices are axial, as those of every file
    are. The type of a question names section and scan, so that the table has a row for each region.
    """
    asked = WORDINGS["seen"].questions["section"][1]
    lines = []
    for section in sorted({region[-1] for region in REGIONS}):
        regions = [region for region in REGIONS if region[-1] == section]
        for number, (name, first, end, _) in enumerate(regions):
            volume = read_volume(root / name)
            region = volume.array[first:end]
            count = items // 2 // len(regions) + (number < items // 2 % len(regions))
            for part in dict.fromkeys(draw_parts(region.shape, count, f"{name} {section}")):
                box = tuple(slice(low, high) for low, high in part.box)
                file = f"{section}-{len(lines):04}.nii.gz"
                nibabel.save(nifti(region[box].astype(np.int16), volume.spacing_mm), to / file)
                row = {"volume": file, "question": asked, "answer": section, "choices": SECTIONS, "case": name}
                lines.append(json.dumps(row | {"type": f"{section}, {name.partition('.')[0]}", "split": "test"}))
    return "\n".join(lines)


def markdown(folder: Path) -> str:
    """The scores of `folder`, each beside its controls and what guessing among the choices gives."""
    metrics = json.loads((folder / "metrics.json").read_text())
    asked = files.read_run(folder)
    closed = asked["closed"]
    counts = {"closed": "closed", "open": "open", "report": "reports"}
    count = ", ".join(f"{len(asked[kind])} {name}" for kind, name in counts.items() if asked.get(kind))
    scans = len({one.unit for one in closed})
    lines = [
        f"| {count}; {scans} scans | answered | by scans | by parts | ranked | by scans | by parts "
        f"| {' | '.join(CONTROLS)} | guessing |",
        "|---" * (8 + len(CONTROLS)) + "|",
    ]
    for name in ("", *dict.fromkeys(one.type for one in closed)):
        own, *under = (
            [one for one in ones if name in ("", one.type)]
            for ones in (closed, *(asked.get(f"control/{control}_closed", ()) for control in CONTROLS))
        )
        columns = comparison.columns("closed", own, judged=True)
        cells = [cell for score in ("accuracy", "ranked_accuracy") for cell in shares(columns[score], own)]
        guess = np.mean([1 / len(one.choices) for one in own])
        beside = [right(ones) for ones in under]
        lines.append(f"| {name or 'all'} ({len(own)}) | {' | '.join([*cells, *beside])} | {guess:.3f} |")
    for kind in (kind for kind in ("open", "report") if kind in asked):
        value = metrics[f"{kind}/bleu1"]
        lines.append(f"| `{kind}/bleu1` | {value:.3f} | {interval(metrics[f'{kind}/bleu1_ci95'])} |" + " - |" * 8)
    return "\n".join([*lines, "", DISCLAIMER])


def shares(column: tuple[np.ndarray, np.ndarray], ones: Sequence[Prediction]) -> tuple[str, str, str]:
    """A score of some questions (numerators and denominators), and its intervals by scans and by parts."""
    units = [one.unit for one in ones], [one.key for one in ones]
    intervals = (interval(ratio_ci95(*(side[:, None] for side in column), of)) for of in units)
    return f"{column[0].sum() / column[1].sum():.3f}", *intervals


def right(ones: Sequence[Prediction]) -> str:
    """The accuracy of closed questions; nothing to say where none was asked."""
    return f"{np.mean([contains_letter(one.output, one.letter) for one in ones]):.3f}" if ones else "-"


@command
def run(argv: Sequence[str]) -> int:
    """Prepares, asks and prints; returns the exit code of the command that failed, or 0."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("root", type=Path, help="folder of the scans and masks")
    parser.add_argument("--index", type=Path, help="index of scans and masks; default the two series of SERIES")
    parser.add_argument("--run", default="embedded", help="whose answers; default the embedded reader")
    parser.add_argument("--parts", type=int, default=60, help="crops and re-slicings of each series of SERIES")
    parser.add_argument("--items", type=int, default=300, help="most questions of a kind")
    parser.add_argument("--to", type=Path, default=Path("runs/real-series"))
    parser.add_argument("--section", action="store_true", help="ask for the section of the body instead")
    args = parser.parse_args(argv)
    if args.section and args.index:
        parser.error("--section asks about the series of REGIONS, and --index names others; leave one out")
    args.to.mkdir(parents=True, exist_ok=True)
    root, name = args.root, "labelmap"
    manifest = args.index or args.to / "index.json"
    if args.section:
        root, name = args.to / "crops", "manifest"
        manifest = root / "manifest.jsonl"
        root.mkdir(exist_ok=True)
        manifest.write_text(crops(args.root, root, args.items) + "\n")
    elif not args.index:
        manifest.write_text(index(args.parts) + "\n")
    data = f"--config.data.name={name}"
    where = f"--config.data.root={root}", f"--config.data.manifest={manifest.resolve()}"
    prepared = args.to / "prepared"
    code = prepare.main(["--config", "configs/data_manifest.py", data, *where, *SIZES, "--to", str(prepared)])
    if code:
        return code
    config, _ = parse(
        [
            "real_series", "--config=configs/evaluate.py", f"--config.init_from={args.run}",
            data, f"--config.data.root={prepared}", f"--config.eval.items={args.items}",
        ]
    )  # fmt: skip
    evaluate.run(config, args.to)
    latest = max((args.to / "eval").glob("*/metrics.json"), key=lambda file: file.stat().st_mtime)
    print("\n" + markdown(latest.parent))
    return 0


if __name__ == "__main__":
    sys.exit(run_command(run))
