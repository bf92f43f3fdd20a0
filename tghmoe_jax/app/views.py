"""What the page draws: slices as numbers, their position in the patient, and the overlays.

Axes are those of a volume: 0 slices toward Superior, 1 rows toward Posterior, 2 columns toward the patient's Left.
"""

import io
import weakref
from collections.abc import Iterator
from typing import Any

import nibabel as nib
import numpy as np
from PIL import Image, ImageDraw

from tghmoe_jax.errors import UserError
from tghmoe_jax.evaluation.evidence_plot import GREY, Box, Evidence
from tghmoe_jax.evaluation.routing_plot import RoutingMap
from tghmoe_jax.scans.scan import Scan
from tghmoe_jax.scans.slices import WINDOWS, target_axes, voxel_edges, window_names
from tghmoe_jax.scans.volume import Volume

PICTURE = 240  # pixels of the longer side of a picture that is kept
MOST_WHOLE = 2**27  # voxels of a scan that is sent as a whole
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
        "volume": volume.affine is not None and volume.array.size <= MOST_WHOLE,
        "history": volume.history, "warnings": scan.warnings,
    }  # fmt: skip


def slice_of(volume: Volume, axis: int, index: int) -> tuple[bytes, str]:
    """One slice of a scan as little-endian numbers and their type: int16 where it holds whole numbers, else float32."""
    values = np.take(volume.array, _within(index, volume.array.shape[axis]), axis=axis)
    whole = np.rint(np.clip(values, -(2**15), 2**15 - 1)).astype("<i2")
    return (whole.tobytes(), "int16") if np.array_equal(whole, values) else (values.astype("<f4").tobytes(), "float32")


def nifti_parts(volume: Volume) -> tuple[int, Iterator[bytes]]:
    """The whole scan as NIfTI for a viewer, without text: its length in bytes, and the header and each slice.

    Parts are made when they are wanted, and the volume is not kept for them: a browser that stops reading holds one
    slice. Where the scan was closed meanwhile, the rest does not come.
    """
    if volume.affine is None or volume.array.size > MOST_WHOLE:
        raise UserError("this scan is too large or not placed, so it is not shown in 3D; use the plain views.")
    low, high = volume.array.min(), volume.array.max()
    whole = -(2**15) <= low and high < 2**15 and all(np.array_equal(one, np.rint(one)) for one in volume.array)
    dtype = np.dtype("<i2" if whole else "<f4")
    # Columns, rows and slices in the order of their millimetres: the order of the array in memory. NIfTI's x and y run
    # the other way.
    header = nib.Nifti1Header(endianness="<")
    header.set_data_shape(volume.array.shape[::-1])
    header.set_data_dtype(dtype)
    affine = np.diag([-1.0, -1.0, 1.0, 1.0]) @ volume.affine[:, [2, 1, 0, 3]]
    header.set_qform(affine, 0)
    header.set_sform(affine, 2)
    header.set_xyzt_units("mm")
    header["magic"], header["vox_offset"] = b"n+1", 352
    head = header.binaryblock + bytes(4)
    kept, count = weakref.ref(volume), len(volume.array)

    def parts() -> Iterator[bytes]:
        yield head
        for index in range(count):
            if (found := kept()) is None:
                return
            part = found.array[index].astype(dtype).tobytes()
            del found
            yield part

    return len(head) + volume.array.size * dtype.itemsize, parts()


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


def picture_of(evidence: Evidence) -> bytes:
    """A small PNG: the middle axial slice of the strongest region, with a red box and the patient's sides."""
    volume, region = evidence.volume, evidence.regions[0]
    low, high = GREY[volume.unit]
    values = volume.array[sum(region.voxels[0]) // 2 - 1]
    grey = np.clip((values - low) * (255 / (high - low)), 0, 255).astype(np.uint8)
    _, dy, dx = volume.spacing_mm or (1.0, 1.0, 1.0)
    scale = PICTURE / max(grey.shape[0] * dy, grey.shape[1] * dx)
    size = [max(1, round(grey.shape[1] * dx * scale)), max(1, round(grey.shape[0] * dy * scale))]
    image = Image.fromarray(grey).resize(size, Image.Resampling.BILINEAR).convert("RGB")
    pen = ImageDraw.Draw(image)
    (top, bottom), (left, right) = region.edges[1:] * [[dy * scale], [dx * scale]]
    pen.rectangle((left, top, right - 1, bottom - 1), outline=(255, 32, 32))
    if volume.affine is not None:
        for letter, x in (("R", 3), ("L", size[0] - 10)):
            pen.text((x, size[1] // 2), letter, fill=(255, 227, 77))
    out = io.BytesIO()
    image.quantize(64).save(out, "PNG")
    return out.getvalue()


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
