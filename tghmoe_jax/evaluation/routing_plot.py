"""A picture of one answer's routing: the load of each expert, and the winning expert of each patch over the slices.

Axis legend: M MoE layers, E experts, D slabs of the model, G patches along a side, S pixels of a slice, N slices.
"""

import dataclasses
import io
from pathlib import Path

import numpy as np

from tghmoe_jax import writing
from tghmoe_jax.evaluation import DISCLAIMER

MAX_SLABS, MAX_LAYERS = 6, 8  # what is drawn; more would be too small to see
CAPTION = (
    "Routing, not explanation: colours show which expert processed a patch first, not what the model saw, and say "
    "nothing about where a finding is."
)
_SOFT_TISSUE = 1  # channel of the mediastinal window (all three are equal where one window is repeated)


@dataclasses.dataclass(frozen=True)
class RoutingMap:
    """How one request was routed.

    task names the expert group used; probabilities {task: float} are the task router's, None without one. `layers` (M)
    are the tower's layers with several experts; load float (M, E) are shares that sum to 1 over E; winner int
    (M, D, G, G) is the first choice of each patch, -1 in slabs without a real slice.
    """

    task: str
    probabilities: dict[str, float] | None
    layers: tuple[int, ...]
    load: np.ndarray
    winner: np.ndarray


def draw(path: str | Path, routing: RoutingMap, slices: np.ndarray, slice_mask: np.ndarray, checkpoint: str) -> None:
    """Writes the picture as PNG, whole or not at all.

    slices uint8 (N, S, S, 3) and slice_mask bool (N,) are the model's input; `checkpoint` is printed. Nothing else is,
    so the picture names no patient and no file.
    """
    write(path, _figure(routing, slices, slice_mask, checkpoint), CAPTION)


def write(path: str | Path, figure, caption: str) -> None:
    """Writes a matplotlib figure as PNG, whole or not at all, described by its caption and the disclaimer."""
    with writing.renamed(path) as part:
        figure.savefig(part, format="png", dpi=110, metadata={"Description": f"{caption} {DISCLAIMER}"})


def png(routing: RoutingMap, slices: np.ndarray, slice_mask: np.ndarray, checkpoint: str) -> bytes:
    """The same picture, in memory."""
    buffer = io.BytesIO()
    _figure(routing, slices, slice_mask, checkpoint).savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def _figure(routing: RoutingMap, slices: np.ndarray, slice_mask: np.ndarray, checkpoint: str):
    from matplotlib.figure import Figure  # slow to import, and wanted for this file alone; no display is needed

    experts, slabs = routing.load.shape[1], routing.winner.shape[1]
    colours = _colours(experts)
    real = [d for d in range(slabs) if (routing.winner[0, d] >= 0).any()]
    columns = spread(real, MAX_SLABS)
    rows = spread(range(len(routing.layers)), MAX_LAYERS)
    depth = -(-len(slices) // slabs)  # slices of a slab

    figure = Figure(figsize=(3.4 + 1.9 * len(columns), 1.5 + 1.9 * len(rows)), layout="constrained")
    grid = figure.add_gridspec(len(rows), len(columns) + 1, width_ratios=[1.5] + [1] * len(columns))
    for y, layer in enumerate(rows):
        axis = figure.add_subplot(grid[y, 0])
        axis.bar(range(experts), routing.load[layer], color=colours)
        axis.axhline(1 / experts, color="black", linewidth=0.8, linestyle="--")
        axis.set_title(f"layer {routing.layers[layer]}: expert load", fontsize=9)
        if experts <= 16:
            axis.set_xticks(range(experts), labels=map(str, range(experts)))
        axis.set_xlabel("expert, in its colour", fontsize=8)
        axis.set_ylabel("share of tokens", fontsize=8)
        axis.tick_params(labelsize=8)
        for x, slab in enumerate(columns, 1):
            axis = figure.add_subplot(grid[y, x])
            own = [n for n in range(slab * depth, min((slab + 1) * depth, len(slices))) if slice_mask[n]]
            middle = own[len(own) // 2]
            size = slices.shape[1]
            grey = slices[middle, :, :, _SOFT_TISSUE]
            axis.imshow(grey, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
            overlay = colours[routing.winner[layer, slab]]
            axis.imshow(overlay, extent=(-0.5, size - 0.5, size - 0.5, -0.5), alpha=0.4, interpolation="nearest")
            axis.set_xticks([]), axis.set_yticks([])
            span = f"slice {own[0] + 1}" if len(own) == 1 else f"slices {own[0] + 1}-{own[-1] + 1}"
            axis.set_title(f"{span} of {int(slice_mask.sum())}", fontsize=8)
    shown = "" if len(columns) == len(real) and len(rows) == len(routing.layers) else " (some slabs or layers left out)"
    figure.suptitle(
        f"Experts of the {routing.task} group, checkpoint {checkpoint}{shown}; slices count upward, 1 is the lowest",
        fontsize=10,
    )
    figure.supxlabel(f"{CAPTION}\n{DISCLAIMER}", fontsize=8, wrap=True)
    return figure


def _colours(count: int) -> np.ndarray:
    """RGB (count, 3), up to eight distinct for colour-blind readers (Okabe and Ito); more are spread over the hues."""
    from matplotlib import colormaps, colors

    named = ["#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7", "#000000"]
    found = colors.to_rgba_array(named[:count]) if count <= len(named) else colormaps["hsv"](np.arange(count) / count)
    return found[:, :3]


def spread(items, most: int) -> list:
    """At most `most` of the items, evenly spread, first and last included."""
    items = list(items)
    return [items[i] for i in np.linspace(0, len(items) - 1, min(most, len(items))).round().astype(int)]
