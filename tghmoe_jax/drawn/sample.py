"""Draws a sample scan to ask about: `python -m tghmoe_jax.drawn.sample --to sample.nii.gz`.

It is a phantom of the test split, which the embedded reader was not trained on: an abdomen of 16 slices of 64 x 64
pixels with one lesion. Another `--number` is another phantom, in any plane and with up to three lesions.
"""

import gzip
import sys
from pathlib import Path

import nibabel
import numpy as np

from tghmoe_jax import writing
from tghmoe_jax.drawn import phantom
from tghmoe_jax.drawn.cache import SPLIT_SEEDS, seeds_of
from tghmoe_jax.errors import CommandParser, UserError, command, run_command

NUMBER = 49


def nifti(array: np.ndarray, spacing_mm: tuple[float, float, float]) -> nibabel.Nifti1Image:
    """A canonical int16 array (D, H, W) with its spacing (z, y, x), placed in mm about its middle.

    NIfTI counts toward the right, the front and the head.
    """
    dz, dy, dx = spacing_mm
    affine = np.diag([-dx, -dy, dz, 1.0])
    affine[:3, 3] = -affine[:3, :3] @ (np.array(array.shape[::-1]) - 1) / 2
    image = nibabel.Nifti1Image(array.transpose(2, 1, 0), affine)
    image.header.set_xyzt_units("mm")
    image.set_qform(image.affine, code=1)
    return image


def arguments() -> CommandParser:
    """The flags of the command."""
    parser = CommandParser(prog="python -m tghmoe_jax.drawn.sample", description="Draw a sample scan.")
    parser.add_argument("--to", metavar="FILE", required=True, help="a new file that ends in .nii.gz")
    which = f"which phantom of the test split, from 0; default {NUMBER}"
    parser.add_argument("--number", type=int, metavar="N", default=NUMBER, help=which)
    return parser


@command
def main(argv: list[str]) -> int:
    """Writes the file and says what it shows."""
    args = arguments().parse_args(argv)
    file = Path(args.to)
    if not file.name.endswith(".nii.gz"):
        raise UserError(f"--to {file} must end in .nii.gz.")
    if file.exists() or file.is_symlink():
        raise UserError(f"--to {file} exists and is never overwritten; name a new file.")
    if not file.parent.is_dir():
        raise UserError(f"--to {file} is in no folder that exists; create the folder first.")
    if not 0 <= args.number < SPLIT_SEEDS:
        raise UserError(f"--number {args.number} must be 0 to {SPLIT_SEEDS - 1}.")
    drawn = phantom.draw(seeds_of("test", args.number + 1, 0)[-1])
    truth = drawn.truth
    lesions = ", ".join(f"{one.kind} ({one.place}, {one.size_mm:.0f} mm)" for one in truth.lesions) or "no lesion"
    with writing.renamed(file) as part:
        part.write_bytes(gzip.compress(nifti(drawn.hu, truth.spacing_mm).to_bytes(), mtime=0))
    print(f"{file}: a drawn {truth.section}, {truth.phase}, {truth.plane} slices; {lesions}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
