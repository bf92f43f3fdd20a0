"""Draws a data set of CT with segmentation masks: `python -m tghmoe_jax.drawn.labelled --to DIR`.

Each volume is a synthetic patient (docs/volumes.md) in axial slices, with a mask of 82 structures under the names
of TotalSegmentator. An index tells the data set `labelmap` what to ask of them (docs/data-sets.md).
"""

import concurrent.futures
import gzip
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np

from tghmoe_jax.drawn import patients, phantom
from tghmoe_jax.drawn.cache import SPLIT_SEEDS, SPLITS, seeds_of
from tghmoe_jax.drawn.patient_trunk import RIBS, VERTEBRAE
from tghmoe_jax.drawn.sample import nifti
from tghmoe_jax.errors import CommandParser, UserError, command, run_command

PAIRED = (
    "adrenal_gland", "autochthon", "clavicula", "femur", "gluteus_maximus", "gluteus_medius", "hip", "humerus",
    "iliac_artery", "iliac_vena", "iliopsoas", "kidney", "lung_lower_lobe", "lung_upper_lobe", "scapula",
)  # fmt: skip
SINGLE = (
    "aorta", "colon", "costal_cartilages", "duodenum", "esophagus", "gallbladder", "heart", "inferior_vena_cava",
    "liver", "pancreas", "portal_vein_and_splenic_vein", "prostate", "sacrum", "small_bowel", "spinal_cord", "spleen",
    "sternum", "stomach", "superior_vena_cava", "trachea", "urinary_bladder",
)  # fmt: skip
RIB_NAMES = tuple(f"rib_{side}_{12 - above}" for side in ("left", "right") for above in range(RIBS))
STRUCTURES = (*SINGLE, *VERTEBRAE, *RIB_NAMES, *(f"{name}_{side}" for name in PAIRED for side in ("left", "right")))
GRID = (40, 96, 96)
MAX_PARTS = 1000  # that the data set labelmap takes
SHARES = {"train": 0.8, "validation": 0.1, "test": 0.1}
INDEX, NAMES = "index.json", "label_names.json"


def draw(seed: int, grid: tuple[int, int, int] = GRID) -> phantom.Phantom:
    """The patient of a seed in axial slices, with labels 1 + index into STRUCTURES, 0 for none."""
    return patients.draw(seed, grid, "axial", STRUCTURES)


def write_case(folder: str, name: str, seed: int, grid: tuple[int, int, int]) -> None:
    """<name>.nii.gz and <name>_mask.nii.gz in a folder."""
    drawn = draw(seed, grid)
    for suffix, array in (("", drawn.hu), ("_mask", drawn.labels.astype(np.int16))):
        image = nifti(array, drawn.truth.spacing_mm)
        (Path(folder) / f"{name}{suffix}.nii.gz").write_bytes(gzip.compress(image.to_bytes(), 3, mtime=0))


def arguments() -> CommandParser:
    """The flags of the command."""
    parser = CommandParser(prog="python -m tghmoe_jax.drawn.labelled", description="Draw CT with segmentation masks.")
    add = parser.add_argument
    add("--to", metavar="DIR", required=True, help="a new folder")
    add("--volumes", type=int, metavar="N", default=1000, help="scans, of which 80, 10 and 10 % for the splits")
    add("--parts", type=int, metavar="N", default=8, help="crops and re-slicings of each that are asked about too")
    sizes = " ".join(map(str, GRID))
    add("--grid", type=int, nargs=3, metavar="N", default=GRID, help=f"slices, rows and columns; default {sizes}")
    return parser


@command
def main(argv: list[str]) -> int:
    """Writes scans, masks, the table of names and the index."""
    args = arguments().parse_args(argv)
    folder, grid = Path(args.to), tuple(args.grid)
    if folder.exists() or folder.is_symlink():
        raise UserError(f"--to {folder} exists and is never overwritten; name a new folder.")
    if not 10 <= args.volumes <= SPLIT_SEEDS:
        raise UserError(f"--volumes {args.volumes} must be 10 to {SPLIT_SEEDS}.")
    if not all(16 <= size <= 512 for size in grid):
        raise UserError(f"--grid {' '.join(map(str, grid))}: each must be 16 to 512.")
    if not 0 <= args.parts <= MAX_PARTS:
        raise UserError(f"--parts {args.parts} must be 0 to {MAX_PARTS}.")
    if not folder.parent.is_dir():
        raise UserError(f"--to {folder} is in no folder that exists; create the folder first.")
    counts = {split: int(share * args.volumes) for split, share in SHARES.items()}
    counts["train"] = args.volumes - counts["validation"] - counts["test"]
    seeds = [(split, seed) for split in SPLITS for seed in seeds_of(split, counts[split], 0)]
    cases = [(split, f"{split}-{seed % SPLIT_SEEDS:05d}", seed) for split, seed in seeds]
    part = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        context = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(os.cpu_count(), mp_context=context) as pool:
            jobs = [pool.submit(write_case, str(part), name, seed, grid) for _, name, seed in cases]
            for done, job in enumerate(jobs, 1):
                job.result()
                if done % 100 == 0 or done == len(jobs):
                    print(f"{done} of {len(jobs)} scans drawn", flush=True)
        (part / NAMES).write_text(
            json.dumps({str(n): name for n, name in enumerate(STRUCTURES, 1)}, indent=1) + "\n", encoding="utf-8"
        )
        rows = [
            {"volume": f"{name}.nii.gz", "mask": f"{name}_mask.nii.gz", "labels": NAMES, "case": name, "split": split,
             "parts": args.parts}
            for split, name, _ in cases
        ]  # fmt: skip
        (part / INDEX).write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
        os.chmod(part, 0o755)
        part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    print(
        f"{folder}: {len(cases)} scans with masks; next: python -m tghmoe_jax.prepare "
        f"--config configs/data_manifest.py --config.data.name=labelmap --config.data.root={folder} "
        f"--config.data.manifest={INDEX} --config.data.slices=16 --config.data.size=64 --to NEW"
    )
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
