"""Phi-3-V's HD transform against torch's resampling and a plain reference of this file's own (model-spec 2.3)."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from tghmoe_jax.bases import pictures
from tghmoe_jax.errors import UserError

SIDE = 28


def drawn(width: int, height: int) -> Image.Image:
    rng = np.random.default_rng(width * 1000 + height)
    small = rng.integers(0, 256, (max(2, height // 9), max(2, width // 9), 3), np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def reference(image: Image.Image, most: int) -> tuple[np.ndarray, tuple[int, int]]:
    """The transform in the order of Microsoft's processor, with torch for the global view."""
    flipped = image.width < image.height
    if flipped:
        image = image.transpose(Image.Transpose.TRANSPOSE)
    ratio, s = image.width / image.height, 1
    while s * math.ceil(s / ratio) <= most:
        s += 1
    s -= 1
    width = int(s * SIDE)
    image = image.resize((width, int(width / ratio)), Image.Resampling.BILINEAR)
    target = int(math.ceil(image.height / SIDE) * SIDE)
    canvas = Image.new("RGB", (width, target), (255, 255, 255))
    canvas.paste(image, (0, int((target - image.height) / 2)))
    if flipped:
        canvas = canvas.transpose(Image.Transpose.TRANSPOSE)
    hd = torch.from_numpy(np.asarray(canvas).copy()).permute(2, 0, 1).float()[None] / 255
    whole = torch.nn.functional.interpolate(hd, size=(SIDE, SIDE), mode="bicubic")[0].permute(1, 2, 0).numpy()
    rows, columns = hd.shape[2] // SIDE, hd.shape[3] // SIDE
    crops = [
        hd[0, :, r * SIDE : (r + 1) * SIDE, c * SIDE : (c + 1) * SIDE].permute(1, 2, 0).numpy()
        for r in range(rows)
        for c in range(columns)
    ]
    return np.stack([whole, *crops]), (rows, columns)


@pytest.mark.parametrize("most", [1, 4, 16])
@pytest.mark.parametrize("size", [(100, 100), (200, 90), (90, 200), (333, 41), (29, 400), (28, 28)])
def test_views_are_those_of_the_published_processor(size, most):
    if most == 1 and size in ((333, 41), (29, 400)):
        assert math.ceil(1 / (max(size) / min(size))) == 1  # one crop, mostly white
    expected, grid = reference(drawn(*size), most)
    found, rows_columns = pictures.views(drawn(*size), SIDE, most)
    assert rows_columns == grid and found.dtype == np.float32 and len(found) == 1 + grid[0] * grid[1]
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_the_global_view_of_a_single_crop_is_the_crop():
    found, grid = pictures.views(drawn(28, 28), SIDE, 1)
    assert grid == (1, 1)
    np.testing.assert_allclose(found[0], found[1], atol=1e-6)


def test_no_file_that_is_not_a_picture_is_read(tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(b"GIF89a nonsense")
    for path, said in ((tmp_path / "a.png", "not a picture"), (tmp_path / "absent.png", "does not exist")):
        with pytest.raises(UserError, match=said):
            pictures.read_picture(path)
    Image.fromarray(np.arange(4096, dtype=np.uint16).reshape(64, 64)).save(tmp_path / "deep.png")
    with pytest.raises(UserError, match="more than 8 bits"):
        pictures.read_picture(tmp_path / "deep.png")
    drawn(64, 64).save(tmp_path / "cut.png")
    data = (tmp_path / "cut.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(data[:60] + b"\0" * 40 + data[100:])
    (tmp_path / "a.eps").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EOF\n")
    for name in ("cut.png", "a.eps"):
        with pytest.raises(UserError, match="not a picture"):
            pictures.read_picture(tmp_path / name)
    drawn(64, 64).save(tmp_path / "b.png")
    monkeypatch.setattr(pictures, "MOST_PIXELS", 1000)
    with pytest.raises(UserError, match="64 x 64 pixels"):
        pictures.read_picture(tmp_path / "b.png")
