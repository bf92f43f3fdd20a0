"""Slices of a case side by side, in the window that shows its finding, with their numbers and the patient's sides.

Axis legend: D slices of a volume, S pixels of a slice.
"""

import io
import re
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

SLICES, COLUMNS = 16, 8  # of a picture, and in each of its rows
TILE = 128  # pixels of a slice in the picture, about; a small one is enlarged by a whole number, so that it stays sharp
GAP, GREY = 2, 90  # pixels between two slices, and their level
# Words that a finding or its organ is named by, and the windows that show it, the first that the channels hold.
_SEEN_IN = (
    (r"lung|pulmon|nodul|emphysem|pneumo(?!peritoneum)|bronch|opacit|consolidat|atelecta|airway|trache|fibros|ground.glass",
     ("lung", "wide", "full")),
    (r"bone|bony|osse|skelet|fractur|rib\b|ribs\b|spine|spinal|vertebra|sclero|metasta|calcif|stone|calcul|lithiasis|aneurysm",
     ("bone", "wide", "full")),
    (r"brain|cerebr|intracrani|infarct|h(?:a)?emorrhag|subdural|ventricle", ("brain",)),
)  # fmt: skip
_SOFT = ("mediastinum", "soft_tissue", "full")  # of everything else


def windows_of(texts: Sequence[str], channels: Sequence[str]) -> list[int]:
    """The channels, of the windows named `channels`, that show what each of `texts` is about; at least one."""
    found: dict[int, None] = {}
    for text in texts or ("",):
        wanted = [names for words, names in _SEEN_IN if re.search(words, text, re.IGNORECASE)]
        for names in wanted or [_SOFT]:
            shown = (channels.index(name) for name in (*names, *_SOFT) if name in channels)
            found[next(shown, 1)] = None
    return sorted(found)


def strip(slices: np.ndarray, mask: np.ndarray, sides: tuple[str, str] | None) -> tuple[bytes, str]:
    """Up to SLICES of one channel uint8 (D, S, S), evenly spaced among those of mask bool (D,) and in rows of COLUMNS,
    as PNG; and how many they are.

    Each tile bears the slice's number, from 1, and `sides`, the patient's at its left and its right edge.
    """
    real = np.flatnonzero(mask) if mask.any() else np.array([0])
    chosen = real[np.unique(np.linspace(0, len(real) - 1, min(SLICES, len(real))).round().astype(int))]
    tiles = [_tile(slices[i], int(i) + 1, sides) for i in chosen]
    tiles += [np.zeros_like(tiles[0])] * (-len(tiles) % min(COLUMNS, len(tiles)))
    framed = [np.pad(tile, ((0, GAP), (0, GAP)), constant_values=GREY) for tile in tiles]
    rows = [np.concatenate(framed[i : i + COLUMNS], axis=1) for i in range(0, len(framed), COLUMNS)]
    buffer = io.BytesIO()
    Image.fromarray(np.concatenate(rows)).save(buffer, "PNG")
    return buffer.getvalue(), f"{len(chosen)} of {len(real)} slices"


def _tile(pixels: np.ndarray, number: int, sides: tuple[str, str] | None) -> np.ndarray:
    """uint8 (T, T) of a slice (S, S): enlarged by repeating pixels, or averaged where it is larger than a tile."""
    size = len(pixels)
    times = max(1, round(TILE / size))
    image = Image.fromarray(np.ascontiguousarray(pixels)).resize(
        (TILE, TILE) if size > 2 * TILE else (size * times,) * 2,
        Image.Resampling.BOX if size > 2 * TILE else Image.Resampling.NEAREST,
    )
    drawing, font, edge = ImageDraw.Draw(image), ImageFont.load_default(11), image.size[0]
    places = [((2, 0), str(number), "la")]
    if sides:
        places += [((2, edge // 2), sides[0], "lm"), ((edge - 2, edge // 2), sides[1], "rm")]
    for place, text, anchor in places:
        drawing.text(place, text, fill=255, font=font, anchor=anchor, stroke_width=1, stroke_fill=0)
    return np.asarray(image)
