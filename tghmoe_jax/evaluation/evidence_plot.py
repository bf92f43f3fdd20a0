"""Evidence of an answer: boxes in the scan as it was read, and a picture of them.

Axis legend: slices run toward Superior, rows toward Posterior, columns toward the patient's Left (scans/volume.py).
"""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from tghmoe_jax.evaluation import DISCLAIMER, routing_plot
from tghmoe_jax.scans.volume import Volume

MAX_SLABS = 6
CAPTION = (
    "What the answer rests on: how far its log-likelihood falls when a part of what the tower saw is hidden from the "
    "decoder. It shows what the decoder used, not that the answer is right."
)
GREY = {"HU": (-160.0, 240.0), "unit-interval": (0.0, 1.0)}  # of HU the mediastinal window
LETTERS = (("L", "R"), ("P", "A"), ("S", "I"))  # of the patient axes x, y, z: above and below 0


@dataclasses.dataclass(frozen=True)
class Box:
    """A box of the scan and the fall in nats when it is hidden.

    edges float64 (3, 2): low and high of slice, row and column in voxels, 0 being the outer side of voxel 0. share: of
    the fall with everything hidden, None where that is not above 0. centre_mm (x, y, z) in the patient axes (LPS) and
    size_mm along slices, rows and columns, None where the source does not place its voxels.
    """

    edges: np.ndarray
    fall: float
    share: float | None
    strength: float
    centre_mm: tuple[float, float, float] | None
    size_mm: tuple[float, float, float] | None

    @property
    def voxels(self) -> list[list[int]]:
        """First and last slice, row and column, counting from 1; a voxel belongs to the box that holds its centre."""
        low, high = np.round(self.edges.T).astype(int)
        return [[int(a) + 1, max(int(a) + 1, int(b))] for a, b in zip(low, high, strict=True)]

    def to_json(self) -> dict[str, Any]:
        found = {"slices": self.voxels[0], "rows": self.voxels[1], "columns": self.voxels[2]}
        millimetres = {
            name: None if value is None else [round(v, 1) for v in value]
            for name, value in (("centre_mm", self.centre_mm), ("size_mm", self.size_mm))
        }
        share = None if self.share is None else round(self.share, 4)
        strength = float(f"{self.strength:.4g}")  # four digits wherever they begin: its size depends on the model
        return found | millimetres | {"fall": round(self.fall, 4), "share": share, "strength": strength}


@dataclasses.dataclass(frozen=True)
class Evidence:
    """Where `answer` rests: `slabs` of the whole scan, and `regions` of the strongest slab, the strongest first.

    whole: the fall in nats with everything hidden. rows: of the decoder that finding it took. volume: the scan as read.
    """

    answer: str
    whole: float
    slabs: tuple[Box, ...]
    regions: tuple[Box, ...]
    rows: int
    volume: Volume = dataclasses.field(repr=False)

    def to_json(self) -> dict[str, Any]:
        """The key `evidence` of `predict --json`."""
        placed = self.volume.affine is not None
        frame = "LPS: x toward the patient's left, y toward the back, z toward the head" if placed else None
        return {
            "answer": self.answer, "fall_of_all": round(self.whole, 4), "frame": frame,
            "slabs": [slab.to_json() for slab in self.slabs], "region": self.regions[0].to_json(),
            "decoder_rows": self.rows,
        }  # fmt: skip

    def __str__(self) -> str:
        region = self.regions[0]
        (first, last), rows, columns = region.voxels
        share = "" if region.share is None else f", {region.share:.0%} of the fall with all hidden"
        return (
            f"slices {first}-{last}, rows {rows[0]}-{rows[1]}, columns {columns[0]}-{columns[1]}"
            f"{millimetres(region)}: hiding it takes {region.fall:.2f} nats{share}"
        )


def millimetres(part: Box) -> str:
    """The centre of a part for a reader: each axis by its letter and the distance from 0."""
    if part.centre_mm is None:
        return ""
    named = (f"{pair[value < 0]} {abs(value):.0f}" for pair, value in zip(LETTERS, part.centre_mm, strict=True))
    return f", centre {', '.join(named)} mm"


def draw(path: str | Path, evidence: Evidence, checkpoint: str) -> None:
    """Writes slices of the scan with what each slab and each region of the strongest takes away, as PNG.

    `checkpoint` is printed. Nothing names a patient or a file.
    """
    from matplotlib.figure import Figure  # slow to import, and wanted for this file alone; no display is needed
    from matplotlib.patches import Rectangle

    volume, strongest = evidence.volume, max(evidence.slabs, key=lambda slab: slab.strength)
    shown = routing_plot.spread(evidence.slabs, MAX_SLABS)
    if not any(slab is strongest for slab in shown):
        shown[int(np.argmin([abs(slab.edges[0, 0] - strongest.edges[0, 0]) for slab in shown]))] = strongest
    high, wide = volume.array.shape[1:]
    aspect = volume.spacing_mm[1] / volume.spacing_mm[2] if volume.spacing_mm else 1.0
    low_grey, high_grey = GREY[volume.unit]
    figure = Figure(figsize=(2.6 * len(shown), 3.9), layout="constrained")
    for axis, slab in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
        first, last = slab.voxels[0]
        middle = (first + last) // 2
        axis.imshow(volume.array[middle - 1], cmap="gray", vmin=low_grey, vmax=high_grey, aspect=aspect)
        share = "" if slab.share is None else f"\n{slab.share:.0%} of the fall"
        axis.set_title(f"slice {middle} of {first}-{last}{share}", fontsize=8)
        axis.set_xticks([]), axis.set_yticks([])
        if volume.affine is not None:  # without a stated orientation no side is named
            for x, y, letter in ((0.03, 0.5, "R"), (0.97, 0.5, "L"), (0.5, 0.97, "A"), (0.5, 0.03, "P")):
                axis.text(x, y, letter, color="yellow", fontsize=9, ha="center", va="center", transform=axis.transAxes)
        if slab is not strongest:
            continue
        most = max(evidence.regions[0].strength, 0.0) or 1.0
        for i, region in enumerate(evidence.regions):
            (top, bottom), (left, right) = region.edges[1:] - 0.5
            box = (left, top), right - left, bottom - top
            axis.add_patch(
                Rectangle(*box, color="red", alpha=0.35 * np.clip(region.strength / most, 0, 1), linewidth=0)
            )
            if not i:
                axis.add_patch(Rectangle(*box, fill=False, edgecolor="red", linewidth=1.5))
        axis.set_xlim(-0.5, wide - 0.5), axis.set_ylim(high - 0.5, -0.5)
    region = evidence.regions[0]
    figure.suptitle(
        f"Evidence, checkpoint {checkpoint}; red box: the strongest region{millimetres(region)}", fontsize=9
    )
    figure.supxlabel(f"{CAPTION}\n{DISCLAIMER}", fontsize=7, wrap=True)
    routing_plot.write(path, figure, CAPTION)
