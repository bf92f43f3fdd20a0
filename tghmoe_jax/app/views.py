"""What the page draws: slices as numbers, where they lie in the patient, and what is laid over them.

Axes are those of a volume: 0 slices toward Superior, 1 rows toward Posterior, 2 columns toward the patient's Left.
"""

from typing import Any

import numpy as np

from tghmoe_jax.errors import UserError
from tghmoe_jax.evaluation.evidence_plot import Box, Evidence
from tghmoe_jax.evaluation.routing_plot import RoutingMap
from tghmoe_jax.scans.scan import Scan
from tghmoe_jax.scans.slices import WINDOWS, target_axes, voxel_edges, window_names
from tghmoe_jax.scans.volume import Volume

PRESETS = ("mediastinum", "lung", "bone", "brain", "soft_tissue", "full")


def geometry(volume: Volume, scan: Scan, channels: str) -> dict[str, Any]:
    """All that the page needs to know of a scan but its voxels.

    `model`: for each axis of the model's grid its length, voxels of the scan in one step, and how many voxels of
    padding lie before voxel 0; the windows of its channels.
    """
    count, size = scan.prepared.slices.shape[:2]
    axes = target_axes(volume.array.shape, volume.spacing_mm, count, size)
    shape = volume.array.shape
    return {
        "shape": shape, "spacing": volume.spacing_mm or (1.0, 1.0, 1.0), "stated": volume.spacing_mm is not None,
        "affine": None if volume.affine is None else volume.affine.tolist(), "unit": volume.unit,
        "presets": {name: WINDOWS[name] for name in PRESETS} if volume.unit == "HU" else {"full": (0.5, 1.0)},
        "model": {
            "axes": [
                {"length": n, "step": span / n, "pad": (span - own) / 2}
                for (n, span), own in zip(axes, shape, strict=True)
            ],
            "channels": window_names(channels) if volume.unit == "HU" else ("as stored",),
        },
        "history": volume.history, "warnings": scan.warnings,
    }  # fmt: skip


def slice_of(volume: Volume, axis: int, index: int) -> tuple[bytes, str]:
    """One slice of a scan as little-endian numbers and their type: int16 where it holds whole numbers, else float32."""
    values = np.take(volume.array, _within(index, volume.array.shape[axis]), axis=axis)
    whole = np.rint(np.clip(values, -(2**15), 2**15 - 1)).astype("<i2")
    return (whole.tobytes(), "int16") if np.array_equal(whole, values) else (values.astype("<f4").tobytes(), "float32")


def model_slice_of(scan: Scan, axis: int, index: int, channel: int) -> tuple[bytes, str]:
    """One slice of the model's input, uint8 of one channel; padded slices at the end are left out."""
    slices = scan.prepared.slices[scan.prepared.slice_mask]
    values = np.take(slices, _within(index, slices.shape[axis]), axis=axis)
    return np.ascontiguousarray(values[..., channel]).tobytes(), "uint8"


def _within(index: int, length: int) -> int:
    if not 0 <= index < length:
        raise UserError(f"slice {index} does not exist; ask for one from 0 to {length - 1}.")
    return index


def evidence_parts(evidence: Evidence) -> dict[str, Any]:
    """Slabs and regions as boxes in voxels, each as strong as its share of the strongest."""

    def parts(boxes: tuple[Box, ...]) -> list[dict[str, Any]]:
        most = max((box.strength for box in boxes), default=0) or 1.0
        return [box.to_json() | {"edges": box.edges.tolist(), "shade": max(0.0, box.strength / most)} for box in boxes]

    return {"slabs": parts(evidence.slabs), "regions": parts(evidence.regions)}


def expert_parts(routing: RoutingMap, scan: Scan, volume: Volume) -> dict[str, Any] | None:
    """The first expert of each patch, layer by layer, and the edges of the patches along each axis in voxels. None
    where no layer has several experts."""
    if not routing.layers:
        return None
    count, size = scan.prepared.slices.shape[:2]
    slabs, side = routing.winner.shape[1:3]
    depth, width = -(-count // slabs), size / side

    def edges(axis: int, number: int, step: float) -> list[list[float]]:
        box = np.array([[0, count], [0, size], [0, size]], float)
        found = []
        for i in range(number):
            box[axis] = i * step, (i + 1) * step
            found.append(voxel_edges(volume, count, size, box)[axis].tolist())
        return found

    return {
        "layers": routing.layers, "winner": routing.winner.tolist(), "experts": routing.load.shape[1],
        "load": np.round(routing.load, 4).tolist(),
        "edges": [edges(0, slabs, depth), edges(1, side, width), edges(2, side, width)],
    }  # fmt: skip
