"""Folders of numbered pictures, M3D's raw form: `<n>.png` or `<n>.jpeg`, one slice each (data-and-evaluation 1.1).

The pictures were windowed by their source and state neither spacing nor orientation, so neither is invented.
"""

import re
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

from tghmoe_jax.errors import UserError
from tghmoe_jax.scans.paths import inside
from tghmoe_jax.scans.volume import Volume, check_canonical_shape, check_finite, check_shape

_NAME = re.compile(r"([0-9]{1,9})\.(png|jpe?g)", re.IGNORECASE | re.ASCII)
MAX_PICTURES = 5_000
MAX_SIDE = 4_096


def is_picture_folder(path: Path) -> bool:
    """True for a folder whose files are numbered pictures, and perhaps the text of their case."""
    names = [entry.name for entry in path.iterdir() if not entry.name.startswith(".")]
    pictures = [name for name in names if _NAME.fullmatch(name)]
    return bool(pictures) and all(name in pictures or name.lower().endswith(".txt") for name in names)


def read_pictures(path: Path) -> Volume:
    """Read a folder of numbered pictures: sorted by number, 8-bit grey, the most common size kept, divided by 255.

    The header of every picture is judged before one is decoded. Errors name slices by their number. Raises UserError
    for two pictures of one number, more than 8 bits, a damaged picture and what is not a volume.
    """
    files: dict[int, Path] = {}
    for name in sorted(entry.name for entry in path.iterdir()):
        match = _NAME.fullmatch(name)
        if match is None:
            continue
        number = int(match[1])
        if number in files:
            raise UserError(f"{path} holds two pictures of number {number}: keep one of them.")
        files[number] = inside(path, name)
        if len(files) > MAX_PICTURES:
            raise UserError(f"{path} holds more than {MAX_PICTURES} pictures: name the folder of one series.")
    sizes = {number: _size(files[number], number, path) for number in sorted(files)}
    shape = Counter(sizes.values()).most_common(1)[0][0]
    kept = [number for number, size in sizes.items() if size == shape]
    check_shape((len(kept), *shape), str(path))
    check_canonical_shape((len(kept), *shape), str(path))
    array = np.empty((len(kept), *shape), np.float32)
    for plane, number in zip(array, kept, strict=True):
        plane[...] = _grey(files[number], number, path, shape)
    array /= 255
    check_finite(array, str(path))
    text = " x ".join(map(str, array.shape))
    history = [f"pictures by number, {text}, 8-bit grey / 255", "spacing and orientation unknown"]
    warnings = []
    if len(kept) < len(sizes):
        left = len(sizes) - len(kept)
        history.append(f"{left} of {len(sizes)} pictures left out, as their size is not the most common one")
        warnings.append(f"slices: {history[-1]}")
    window = "unknown, cut by its source"
    return Volume(array, "unit-interval", None, "as stored", window, tuple(history), tuple(warnings))


def _size(file: Path, number: int, path: Path) -> tuple[int, int]:
    """Height and width by the picture's header."""
    try:
        with Image.open(file, formats=("PNG", "JPEG")) as image:
            mode, width, height = image.mode, image.width, image.height
    except Exception:  # noqa: BLE001 - Pillow's readers raise anything, and their messages may quote the file
        raise UserError(f"picture {number} in {path} cannot be read: copy it again, as PNG or JPEG.") from None
    if max(width, height) > MAX_SIDE:
        raise UserError(
            f"picture {number} in {path} states {width} x {height} pixels, more than {MAX_SIDE} a side: "
            "copy it again, or make it smaller."
        )
    if mode.startswith(("I", "F")):
        raise UserError(f"picture {number} in {path} has more than 8 bits, so its window is unknown: save 8-bit grey.")
    return height, width


def _grey(file: Path, number: int, path: Path, shape: tuple[int, int]) -> np.ndarray:
    try:
        with Image.open(file, formats=("PNG", "JPEG")) as image:
            grey = np.asarray(image.convert("L"))
    except Exception:  # noqa: BLE001 - as above
        raise UserError(f"picture {number} in {path} is cut short or damaged: copy it again.") from None
    if grey.shape != shape:
        raise UserError(f"picture {number} in {path} changed while it was read: name a folder at rest.")
    return grey
