"""Parts of a scan that a key names: a box of voxels, in slices of one of three planes.

Axis legend: D slices toward Superior, H rows toward Posterior, W columns toward Left.
"""

import dataclasses
import hashlib
import re
from collections.abc import Sequence

import numpy as np

from tghmoe_jax.errors import UserError
from tghmoe_jax.scans.volume import Volume, check_canonical_shape

PLANES = ("axial", "coronal", "sagittal")
ORDERS = {"coronal": (1, 0, 2), "sagittal": (2, 0, 1)}  # of the canonical axes
_FRAGMENT = re.compile(r"#((?:[zyx]=\d{1,5}:\d{1,5}|plane=[a-z]+)(?:;(?:[zyx]=\d{1,5}:\d{1,5}|plane=[a-z]+))*)$")


@dataclasses.dataclass(frozen=True)
class Part:
    """A box of a scan in canonical voxels, (first, end) of z, y, x, and the plane its slices are cut in."""

    box: tuple[tuple[int, int], tuple[int, int], tuple[int, int]]
    plane: str = "axial"

    def key(self, volume: str) -> str:
        """`scan.nii.gz#z=10:40;y=0:90;x=5:80;plane=coronal`."""
        ranges = ";".join(f"{axis}={low}:{high}" for axis, (low, high) in zip("zyx", self.box, strict=True))
        return f"{volume}#{ranges};plane={self.plane}"


def split_key(key: str) -> tuple[str, str]:
    """The path of a key and its fragment, empty for a whole scan."""
    found = _FRAGMENT.search(key)
    return (key[: found.start()], found[1]) if found else (key, "")


def part_of(volume: Volume, fragment: str, name: str) -> Volume:
    """A part of a volume, its voxels unchanged, as of `cut`."""
    array, box, plane = cut(volume.array, fragment, name)
    spacing = volume.spacing_mm
    if plane != "axial":
        spacing = spacing and tuple(spacing[axis] for axis in ORDERS[plane])
    check_canonical_shape(array.shape, name)
    note = "part " + ", ".join(f"{axis} {s.start}:{s.stop}" for axis, s in zip("zyx", box, strict=True))
    return dataclasses.replace(
        volume,
        array=array,
        spacing_mm=spacing,
        orientation=volume.orientation if plane == "axial" else f"{plane} slices of {volume.orientation}",
        history=(*volume.history, f"{note}, {plane} slices"),
    )


def cut(array: np.ndarray, fragment: str, name: str) -> tuple[np.ndarray, tuple[slice, slice, slice], str]:
    """The part of a canonical array (D, H, W) that a fragment names, its box, and its plane.

    An axis that the fragment leaves out stays whole. Coronal slices run toward Posterior with rows toward Inferior and
    columns toward Left; sagittal ones toward Left with rows toward Inferior and columns toward Posterior. UserError for
    a box that does not lie in the array.
    """
    said = dict(field.split("=") for field in fragment.split(";"))
    plane = said.pop("plane", "axial")
    if plane not in PLANES:
        raise UserError(f"{name} asks for the plane {plane}: use one of {', '.join(PLANES)}.")
    box = []
    for axis, size in zip("zyx", array.shape, strict=True):
        low, high = (int(value) for value in said[axis].split(":")) if axis in said else (0, size)
        if not 0 <= low < high <= size:
            raise UserError(f"{name} asks for {axis}={low}:{high} of {size} voxels: name a range inside the scan.")
        box.append(slice(low, high))
    part = array[tuple(box)]
    if plane != "axial":
        part = part.transpose(ORDERS[plane])[:, ::-1]
    return np.ascontiguousarray(part), tuple(box), plane


def draw_parts(shape: Sequence[int], count: int, seed: str) -> list[Part]:
    """`count` parts drawn by `seed`, a third of each plane: four to ten tenths of each axis, 16 voxels at least."""
    rng = np.random.default_rng(list(hashlib.sha256(seed.encode()).digest()[:8]))
    parts = []
    for number in range(count):
        box = []
        for size in shape:
            length = int(rng.integers(min(size, max(16, round(0.4 * size))), size + 1))
            low = int(rng.integers(0, size - length + 1))
            box.append((low, low + length))
        parts.append(Part(tuple(box), PLANES[number % 3]))
    return parts
