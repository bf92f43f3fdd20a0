"""A 2D picture as Phi-3-V's crops and global view (model-spec 2.3), or as LLaVA-1.5's single view (3.1).

Axis legend: V views, S side in pixels.
"""

import math
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from tghmoe_jax.errors import UserError
from tghmoe_jax.weights.adapt import bicubic

FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP", "GIF")
MOST_PIXELS = 100_000_000  # a larger picture is refused before it is decoded


def read_picture(path: str | Path) -> Image.Image:
    """An RGB picture. UserError where the file is none, or far larger than any camera's."""
    try:
        with Image.open(path, formats=FORMATS) as image:  # EPS and the like would start other programs
            if image.width * image.height > MOST_PIXELS:
                raise UserError(f"--image {path} has {image.width} x {image.height} pixels; make it smaller.")
            if image.mode.startswith(("I", "F")):
                raise UserError(
                    f"--image {path} has more than 8 bits a channel, which need a window; save it with 8 bits, or name "
                    "a scan with --volume."
                )
            return ImageOps.exif_transpose(image).convert("RGB")  # a camera may store a picture turned
    except FileNotFoundError as error:
        raise UserError(f"--image {path} does not exist; name a picture.") from error
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"--image {path} is not a picture that can be read ({error}); name a PNG or JPEG.") from error


def views(image: Image.Image, side: int, most: int) -> tuple[np.ndarray, tuple[int, int]]:
    """The global view, then the crops row by row, float32 (V, S, S, 3), white being 1; and their (rows, columns).

    The picture is scaled to as many crops of `side` pixels as `most` allows, and padded with white above and below
    (left and right of a picture that is higher than wide).
    """
    upright = image.height > image.width
    if upright:
        image = image.transpose(Image.Transpose.TRANSPOSE)
    ratio = image.width / image.height
    scale = 1
    while (scale + 1) * math.ceil((scale + 1) / ratio) <= most:
        scale += 1
    width = side * scale
    pixels = np.asarray(image.resize((width, max(1, int(width / ratio))), Image.Resampling.BILINEAR), np.float32) / 255
    missing = -len(pixels) % side
    pixels = np.pad(pixels, [(missing // 2, missing - missing // 2), (0, 0), (0, 0)], constant_values=1.0)
    if upright:
        pixels = pixels.transpose(1, 0, 2)
    rows, columns = pixels.shape[0] // side, pixels.shape[1] // side
    crops = pixels.reshape(rows, side, columns, side, 3).transpose(0, 2, 1, 3, 4).reshape(-1, side, side, 3)
    whole = bicubic(bicubic(pixels, side, 0), side, 1)
    return np.concatenate([whole[None], crops]).astype(np.float32), (rows, columns)


def squashed(image: Image.Image, side: int, resample: Image.Resampling) -> tuple[np.ndarray, None]:
    """SigLIP's one view, float32 (1, S, S, 3): the whole picture, whatever its shape. No crops."""
    return np.asarray(image.resize((side, side), resample), np.float32)[None] / 255, None


def square(image: Image.Image, side: int) -> tuple[np.ndarray, None]:
    """LLaVA-1.5's one view, float32 (1, S, S, 3): the shorter edge scaled to `side`, the middle cut out. No crops."""
    short = min(image.size)
    width, height = (side if edge == short else int(side * edge / short) for edge in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - side) // 2, (height - side) // 2
    return np.asarray(image.crop((left, top, left + side, top + side)), np.float32)[None] / 255, None
